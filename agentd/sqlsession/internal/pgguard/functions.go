package pgguard

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
)

// harmless are the volatile functions of PostgreSQL itself that change nothing
// that another session, or a later one, can see. Each was asked that question;
// those of versions to come are refused until somebody has.
var harmless = set(`
 random random_normal clock_timestamp timeofday gen_random_uuid uuidv4 uuidv7 pg_sleep pg_sleep_for pg_sleep_until current_query
 currval lastval pg_sequence_last_value pg_get_sequence_data
 pg_blocking_pids pg_safe_snapshot_blocking_pids pg_isolation_test_session_is_blocked pg_lock_status pg_prepared_xact
 pg_collation_actual_version pg_database_collation_actual_version pg_jit_available
 pg_control_checkpoint pg_control_init pg_control_recovery pg_control_system
 pg_current_wal_flush_lsn pg_current_wal_insert_lsn pg_current_wal_lsn pg_is_in_recovery pg_is_wal_replay_paused pg_get_wal_replay_pause_state
 pg_last_wal_receive_lsn pg_last_wal_replay_lsn pg_last_xact_replay_timestamp pg_get_wal_resource_managers pg_available_wal_summaries pg_wal_summary_contents
 pg_get_wal_summarizer_state
 pg_database_size pg_tablespace_size pg_relation_size pg_table_size pg_indexes_size pg_total_relation_size
 pg_partition_tree pg_partition_ancestors pg_get_multixact_members pg_last_committed_xact pg_xact_commit_timestamp pg_xact_commit_timestamp_origin
 pg_xact_status txid_status pg_get_backend_memory_contexts pg_get_shmem_allocations pg_get_shmem_allocations_numa pg_notification_queue_usage
 pg_replication_origin_progress pg_replication_origin_session_is_setup pg_replication_origin_session_progress pg_show_replication_origin_status
 pg_stat_get_recovery_prefetch pg_stat_have_stats pg_stat_get_xact_blocks_fetched pg_stat_get_xact_blocks_hit pg_stat_get_xact_function_calls
 pg_stat_get_xact_function_self_time pg_stat_get_xact_function_total_time pg_stat_get_xact_numscans pg_stat_get_xact_tuples_deleted
 pg_stat_get_xact_tuples_fetched pg_stat_get_xact_tuples_hot_updated pg_stat_get_xact_tuples_newpage_updated pg_stat_get_xact_tuples_inserted
 pg_stat_get_xact_tuples_returned pg_stat_get_xact_tuples_updated pg_stat_get_io pg_get_wait_events pg_get_aios amvalidate`)

// harmlessExtension are the volatile functions of well-known extensions that
// only look or only compute.
var harmlessExtension = set(`
 uuid_generate_v1 uuid_generate_v1mc uuid_generate_v4 gen_random_bytes gen_random_uuid gen_salt normal_rand
 pg_stat_statements pg_stat_statements_info pg_buffercache_pages pg_buffercache_summary pg_buffercache_usage_counts
 pgstattuple pgstatindex pgstattuple_approx pgstatginindex pgstathashindex pg_relpages pgrowlocks
 pg_freespace pg_visibility pg_visibility_map pg_visibility_map_summary`)

// outside are the functions, of PostgreSQL and its own extensions, whose work is
// not undone by the end of the transaction, or that run SQL which they are given as
// a value, or look up what they touch by a value; whatever their volatility says. Only a
// policy that names one exactly lets it through.
var outside = set(`
 set_config setseed pg_notify nextval setval pg_terminate_backend pg_cancel_backend pg_reload_conf pg_rotate_logfile pg_rotate_logfile_old pg_promote
 pg_switch_wal pg_log_backend_memory_contexts pg_stat_file pg_current_logfile pg_hba_file_rules pg_ident_file_mappings pg_show_all_file_settings
 pg_import_system_collations pg_extension_config_dump pg_nextoid pg_stop_making_pinned_objects pg_export_snapshot loread lowrite currtid currtid2
 txid_current pg_current_xact_id pg_prewarm autoprewarm_start_worker autoprewarm_dump_now pg_truncate_visibility_map
 fmgr_internal_validator fmgr_c_validator fmgr_sql_validator plpgsql_validator
 pg_input_is_valid pg_input_error_info domain_in record_in array_in range_in multirange_in
 ts_stat ts_rewrite xpath_table crosstab crosstab2 crosstab3 crosstab4 crosstabn connectby hypopg hypopg_reset`)

var outsidePrefixes = []string{
	"dblink", "lo_", "pg_advisory_", "pg_try_advisory_", "pg_replication_origin_", "pg_replication_slot_", "pg_create_", "pg_drop_", "pg_copy_", "pg_logical_",
	"pg_read_", "pg_ls_", "pg_file_", "pg_logdir_", "pg_stat_reset", "pg_stat_statements_reset", "pg_stat_force_", "pg_backup_", "pg_start_", "pg_stop_", "pg_wal_replay_", "pg_buffercache_evict",
	"brin_summarize_", "brin_desummarize_", "gin_clean_", "pg_sync_", "binary_upgrade_", "pg_restore_", "pg_clear_", "heap_force_",
	"postgres_fdw_disconnect", "query_to_xml", "cursor_to_xml", "table_to_xml", "schema_to_xml", "database_to_xml",
}

// worldly are those of outside that reach beyond the database: files, programs,
// other servers, other backends, the server itself. They are refused where
// writing is allowed, too.
var worldly = set(`
 pg_terminate_backend pg_cancel_backend pg_reload_conf pg_rotate_logfile pg_rotate_logfile_old pg_promote pg_switch_wal pg_log_backend_memory_contexts
 pg_stat_file pg_current_logfile pg_hba_file_rules pg_ident_file_mappings pg_show_all_file_settings pg_import_system_collations pg_nextoid
 pg_stop_making_pinned_objects lo_import lo_export heap_force_kill heap_force_freeze`)

var worldlyPrefixes = []string{
	"dblink", "pg_read_", "pg_ls_", "pg_file_", "pg_logdir_", "pg_create_", "pg_drop_", "pg_copy_", "pg_replication_", "pg_logical_slot_", "pg_backup_", "pg_start_", "pg_stop_",
	"pg_wal_replay_", "pg_sync_", "binary_upgrade_", "pg_stat_reset", "pg_stat_statements_reset", "postgres_fdw_disconnect",
}

// systemOID is the first id of what is not PostgreSQL's own.
const systemOID = 16384

func isOutside(name string) bool {
	return outside[name] || !harmless[name] && hasPrefix(name, outsidePrefixes)
}

func isWorldly(name string) bool { return worldly[name] || hasPrefix(name, worldlyPrefixes) }

// Outside are the names of functions of PostgreSQL that a statement is refused
// for whatever the catalog says of them.
func Outside() []string { return slices.Sorted(maps.Keys(outside)) }

func hasPrefix(name string, prefixes []string) bool {
	return slices.ContainsFunc(prefixes, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

// allowance is how a policy's functions list covers a function.
type allowance uint8

const (
	notListed allowance = iota
	byPattern
	byName
)

func (c *checker) listed(p Proc) allowance {
	found := notListed
	for _, pattern := range c.in.Guard.Functions {
		name := p.Name
		if strings.Contains(pattern, ".") {
			name = p.Schema + "." + p.Name
		}
		switch {
		case pattern == name:
			return byName
		case found == notListed:
			if ok, err := path.Match(pattern, name); err == nil && ok {
				found = byPattern
			}
		}
	}
	return found
}

// mayRun says why a function must not be called, "" if it may.
func (c *checker) mayRun(p Proc) string {
	listed := c.listed(p)
	builtin := p.OID < systemOID
	switch {
	case listed == byName:
		return ""
	case c.writes && !c.narrowed:
		if (builtin || p.Extension) && isWorldly(p.Name) {
			return "acts outside of the database, where nothing can be rolled back"
		}
		return ""
	case c.writes && builtin && p.Name == "nextval":
		return "" // what INSERT does for a serial column
	case (builtin || p.Extension) && isOutside(p.Name):
		return "acts outside of the transaction, or on what it is given as a text"
	case listed == byPattern:
		return ""
	case builtin && p.Volatility == 'v' && !harmless[p.Name]:
		return "is not known to change nothing"
	case builtin:
		return ""
	case p.Extension && p.Volatility == 'v' && !harmlessExtension[p.Name]:
		return "belongs to an extension and is volatile: it may change something"
	case p.Extension:
		return ""
	}
	return "is the database's own: what it does is not known"
}

// advice is the way out.
func advice(p Proc) string {
	return fmt.Sprintf("the host's policy can allow it (functions: [%s.%s])", p.Schema, p.Name)
}
