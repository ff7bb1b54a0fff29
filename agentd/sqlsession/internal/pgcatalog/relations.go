package pgcatalog

import "strings"

// relation is one that may be read.
type relation struct {
	// hidden are the columns that hold data: defaults, sources, expressions,
	// statistics. A relation that has any is not read as a whole.
	hidden []string
}

func hides(columns string) relation { return relation{strings.Fields(columns)} }

var open relation

// relations may be read, by schema and name. What is not here is not read: above
// all statistics, activity, settings, passwords, large objects, the options of
// foreign servers, the definitions of rules, triggers and policies.
var relations = map[string]map[string]relation{
	"pg_catalog": {
		"pg_class":       hides("reltuples relpages relallvisible relallfrozen relfrozenxid relminmxid relpartbound"),
		"pg_attribute":   hides("attmissingval attoptions attfdwoptions"),
		"pg_namespace":   open,
		"pg_type":        hides("typdefault typdefaultbin"),
		"pg_index":       hides("indexprs indpred"),
		"pg_constraint":  hides("conbin"),
		"pg_proc":        hides("prosrc probin proargdefaults prosqlbody proconfig"),
		"pg_description": open,
		"pg_attrdef":     hides("adbin"),
		"pg_inherits":    open,
		"pg_am":          open,
		"pg_collation":   open,
		"pg_language":    open,
		"pg_depend":      open,
		"pg_opclass":     open,
		"pg_opfamily":    open,
		"pg_range":       open,
		"pg_cast":        open,
		"pg_operator":    open,
		"pg_extension":   hides("extconfig extcondition"),
		"pg_tables":      open,
		// What psql, JDBC and the like look at beside: names, kinds and flags.
		"pg_policy":                hides("polqual polwithcheck"),
		"pg_trigger":               hides("tgargs tgqual"),
		"pg_rewrite":               hides("ev_qual ev_action"),
		"pg_statistic_ext":         hides("stxexprs"),
		"pg_publication":           open,
		"pg_publication_rel":       hides("prqual"),
		"pg_publication_namespace": open,
		"pg_partitioned_table":     hides("partexprs"),
		"pg_conversion":            open,
		"pg_amop":                  open,
		"pg_amproc":                open,
		"pg_aggregate":             hides("agginitval aggminitval"),
		"pg_event_trigger":         open,
		"pg_transform":             open,
		"pg_ts_config":             open,
		"pg_ts_config_map":         open,
		"pg_ts_dict":               hides("dictinitoption"),
		"pg_ts_parser":             open,
		"pg_ts_template":           open,
		"pg_foreign_data_wrapper":  hides("fdwoptions"),
		"pg_foreign_server":        hides("srvoptions"),
		"pg_foreign_table":         hides("ftoptions"),
		"pg_default_acl":           open,
		"pg_roles":                 hides("rolpassword rolconfig rolvaliduntil"),
		"pg_auth_members":          open,
		"pg_database":              hides("datconfig datfrozenxid datminmxid"),
		"pg_tablespace":            hides("spcoptions"),
		"pg_views":                 hides("definition"),
		"pg_indexes":               hides("indexdef"),
		"pg_user":                  hides("passwd valuntil useconfig"),
		"pg_enum":                  open,
		"pg_subscription":          hides("subconninfo"),
		"pg_user_mappings":         hides("umoptions"),
	},
	"information_schema": {
		"attributes":                      hides("attribute_default"),
		"character_sets":                  open,
		"check_constraints":               hides("check_clause"),
		"collations":                      open,
		"column_domain_usage":             open,
		"column_privileges":               open,
		"column_udt_usage":                open,
		"columns":                         hides("column_default generation_expression"),
		"constraint_column_usage":         open,
		"constraint_table_usage":          open,
		"data_type_privileges":            open,
		"domain_constraints":              open,
		"domain_udt_usage":                open,
		"domains":                         hides("domain_default"),
		"element_types":                   hides("domain_default"),
		"information_schema_catalog_name": open,
		"key_column_usage":                open,
		"parameters":                      hides("parameter_default"),
		"referential_constraints":         open,
		"routine_privileges":              open,
		"routines":                        hides("routine_definition"),
		"schemata":                        open,
		"sequences":                       open,
		"table_constraints":               open,
		"table_privileges":                open,
		"tables":                          open,
		"view_column_usage":               open,
		"view_table_usage":                open,
		"views":                           hides("view_definition"),
	},
}

// hiddenColumns are the hidden columns of all relations: none is named in any
// statement that runs.
var hiddenColumns = func() map[string]bool {
	all := make(map[string]bool)
	for _, schema := range relations {
		for _, r := range schema {
			for _, c := range r.hidden {
				all[c] = true
			}
		}
	}
	return all
}()

// told are the server's own functions that look at the catalog and tell nothing of
// what is hidden.
var told = func() map[string]bool {
	all := make(map[string]bool)
	for _, f := range strings.Fields(`format_type pg_table_is_visible pg_type_is_visible pg_function_is_visible pg_operator_is_visible
		pg_opclass_is_visible pg_collation_is_visible pg_get_userbyid pg_get_function_identity_arguments pg_get_function_result
		has_table_privilege has_schema_privilege has_column_privilege has_function_privilege has_any_column_privilege has_type_privilege
		has_sequence_privilege has_database_privilege pg_has_role
		obj_description col_description to_regclass to_regtype to_regproc to_regprocedure to_regnamespace to_regoper to_regoperator
		pg_opfamily_is_visible pg_conversion_is_visible pg_statistics_obj_is_visible
		pg_ts_config_is_visible pg_ts_dict_is_visible pg_ts_parser_is_visible pg_ts_template_is_visible
		pg_partition_ancestors pg_partition_root getdatabaseencoding pg_char_to_encoding
		current_schemas pg_encoding_to_char pg_relation_is_publishable pg_my_temp_schema pg_is_other_temp_schema
		pg_index_column_has_property pg_index_has_property pg_indexam_has_property pg_get_serial_sequence
		regclass regtype regproc regprocedure regnamespace
		pg_get_keywords`) {
		all[f] = true
	}
	return all
}()

// limits are settings that the server was built with, or that belong to its protocol:
// drivers ask for them. Others may hold paths, commands or secrets.
var limits = func() map[string]bool {
	all := make(map[string]bool)
	for _, s := range strings.Fields(`max_index_keys max_identifier_length max_function_args block_size segment_size wal_block_size
		server_version server_version_num server_encoding integer_datetimes standard_conforming_strings`) {
		all[s] = true
	}
	return all
}()

// Told tells whether a function that comes with the server, by name, may be called
// besides those that look at their arguments alone.
func Told(name string) bool { return told[name] }
