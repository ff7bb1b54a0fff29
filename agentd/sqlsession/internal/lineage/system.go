package lineage

// sensitive are columns of the system's own relations that hold values of
// tables, or texts of statements.
var sensitive = map[Name][]string{
	{"pg_catalog", "pg_statistic"}: {
		"stavalues1", "stavalues2", "stavalues3", "stavalues4", "stavalues5",
		"stanumbers1", "stanumbers2", "stanumbers3", "stanumbers4", "stanumbers5",
	},
	{"pg_catalog", "pg_stats"}: {
		"most_common_vals", "most_common_freqs", "histogram_bounds", "most_common_elems", "most_common_elem_freqs", "elem_count_histogram",
		"range_length_histogram", "range_bounds_histogram",
	},
	{"pg_catalog", "pg_statistic_ext_data"}: {"stxdmcv", "stxdexpr", "stxddependencies"},
	{"pg_catalog", "pg_stats_ext"}:          {"most_common_vals", "most_common_val_nulls", "most_common_freqs", "most_common_base_freqs"},
	{"pg_catalog", "pg_stats_ext_exprs"}: {
		"most_common_vals", "most_common_freqs", "histogram_bounds", "most_common_elems", "most_common_elem_freqs", "elem_count_histogram",
	},
	{"pg_catalog", "pg_stat_activity"}:       {"query"},
	{"pg_catalog", "pg_largeobject"}:         {"data"},
	{"pg_catalog", "pg_prepared_statements"}: {"statement"},
	{"pg_catalog", "pg_cursors"}:             {"statement"},
	{"pg_catalog", "pg_replication_slots"}:   {},
}

// denied are functions of the system that read tables, files or other sessions'
// statements by themselves, or run SQL texts.
var denied = set(`query_to_xml query_to_xmlschema query_to_xml_and_xmlschema cursor_to_xml cursor_to_xmlschema
	table_to_xml table_to_xmlschema table_to_xml_and_xmlschema schema_to_xml schema_to_xmlschema schema_to_xml_and_xmlschema
	database_to_xml database_to_xmlschema database_to_xml_and_xmlschema ts_stat ts_rewrite
	pg_stat_get_activity pg_stat_get_backend_activity pg_stat_get_backend_client_addr
	pg_read_file pg_read_file_old pg_read_binary_file pg_ls_dir pg_ls_logdir pg_ls_waldir pg_ls_tmpdir pg_ls_archive_statusdir pg_stat_file pg_current_logfile
	lo_get lo_export lo_import lo_open loread lo_lseek lo_lseek64 lo_tell lo_tell64 lo_put lowrite lo_from_bytea lo_create lo_creat lo_unlink
	currtid currtid2 pg_logical_slot_get_changes pg_logical_slot_peek_changes pg_logical_slot_get_binary_changes pg_logical_slot_peek_binary_changes
	pg_create_logical_replication_slot pg_copy_logical_replication_slot binary_upgrade_create_empty_extension
	pg_get_statisticsobjdef_expressions brin_page_items pg_restore_relation_stats pg_restore_attribute_stats
	xpath_table dblink dblink_exec dblink_open dblink_fetch crosstab crosstab2 crosstab3 crosstab4 connectby
	get_raw_page heap_page_items heap_page_item_attrs tuple_data_split bt_page_items gist_page_items hash_page_items gin_leafpage_items
	pgstattuple pg_get_wal_records_info pg_get_wal_block_info pg_stat_statements`)

// extensions are those whose functions only look at their arguments.
var extensions = set(`citext pg_trgm hstore ltree intarray unaccent uuid-ossp fuzzystrmatch btree_gin btree_gist cube earthdistance isn seg vector
	pgcrypto tsm_system_rows tsm_system_time dict_int dict_xsyn`)

// harmless tells whether a function looks at nothing but its arguments, as far
// as tables are concerned.
func (a *analyzer) harmless(f Function) bool {
	switch {
	case matches(a.policy.Functions, f) || matches(a.policy.Safe, f):
		return true
	case denied[f.Name] && (f.OID < firstUser || f.Extension != ""):
		return false
	case f.OID < firstUser && f.Schema == "pg_catalog":
		return true
	}
	return extensions[f.Extension]
}
