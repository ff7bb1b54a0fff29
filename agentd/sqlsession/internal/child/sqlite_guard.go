package child

import (
	"fmt"
	"slices"
	"strings"

	sqlite3 "modernc.org/sqlite/lib"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/proto/glob"
)

// sqliteGuard decides on what SQLite itself says a statement does, while it compiles
// it: what is not on a list is refused, whatever the text looks like. It sees into
// views and triggers, too.
type sqliteGuard struct {
	policy    *frame.Guard
	readWrite bool
	session   bool   // it has temporary objects and settings of its own
	ddl       bool   // the statement changes the schema, as far as it was asked about
	reason    string // of the first refusal
	// readings are noted where columns are masked; else nil.
	readings *sqliteReadings
}

// sqliteReads are pragmas that tell of the schema, by name. Those without parameter
// could change something with one.
var (
	sqliteReads = words(`table_info table_xinfo table_list index_list index_info index_xinfo foreign_key_list function_list collation_list
		compile_options pragma_list module_list foreign_key_check`)
	sqliteReadsWithoutParameter = words(`encoding user_version application_id schema_version data_version page_count page_size freelist_count
		auto_vacuum journal_mode foreign_keys`)
)

// sqliteFunctions are those of SQLite's own that read nothing but what they are given,
// and the table that they stand in. Not here: load_extension, fts3_tokenizer, and what
// a later version may bring.
var sqliteFunctions = words(`abs changes char coalesce concat concat_ws format glob hex if ifnull iif instr last_insert_rowid length like
	likelihood likely lower ltrim max min nullif octet_length printf quote random randomblob replace round rtrim sign soundex
	sqlite_compileoption_get sqlite_compileoption_used sqlite_offset sqlite_source_id sqlite_version substr substring total_changes trim typeof unhex
	unicode unistr unistr_quote unlikely upper zeroblob subtype
	date time datetime julianday unixepoch strftime timediff current_date current_time current_timestamp
	avg count group_concat string_agg sum total median percentile percentile_cont percentile_disc
	row_number rank dense_rank percent_rank cume_dist ntile lag lead first_value last_value nth_value
	acos acosh asin asinh atan atan2 atanh ceil ceiling cos cosh degrees exp floor ln log log10 log2 mod pi pow power radians sin sinh sqrt
	tan tanh trunc
	json jsonb json_array jsonb_array json_array_length json_error_position json_extract jsonb_extract json_insert jsonb_insert json_object
	jsonb_object json_patch jsonb_patch json_pretty json_remove jsonb_remove json_replace jsonb_replace json_set jsonb_set json_type json_valid
	json_quote json_group_array jsonb_group_array json_group_object jsonb_group_object json_array_insert jsonb_array_insert -> ->>
	match regexp snippet highlight bm25 offsets matchinfo fts5 fts5_source_id fts5_locale fts5_get_locale fts5_insttoken
	rtreenode rtreedepth rtreecheck geopoly_area geopoly_blob geopoly_json geopoly_svg geopoly_within geopoly_contains_point geopoly_overlap
	geopoly_debug geopoly_bbox geopoly_xform geopoly_regular geopoly_ccw geopoly_group_bbox`)

// sqliteModules are the virtual tables that a source which may write can make: they
// keep what they have in tables of the same database.
var sqliteModules = words("fts5 rtree rtree_i32 geopoly")

// judge is sqliteDB.judge for the statement at hand.
func (g *sqliteGuard) judge(action int32, a, b, schema, trigger string) bool {
	reason := g.refusal(action, a, b, schema)
	if reason != "" && trigger != "" {
		reason += " (in " + clean(trigger) + ")"
	}
	if g.reason == "" {
		g.reason = reason
	}
	return reason == ""
}

// refusal is why an action is refused, "" if it is not.
func (g *sqliteGuard) refusal(action int32, a, b, schema string) string {
	switch action {
	case sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE:
		return ""
	case sqlite3.SQLITE_READ:
		if strings.EqualFold(a, "sqlite_dbpage") {
			return "reading pages of the file is refused"
		}
		return g.readings.read(a, b)
	case sqlite3.SQLITE_FUNCTION:
		name := strings.ToLower(b)
		if sqliteFunctions[name] || slices.ContainsFunc(g.policy.Functions, func(pattern string) bool { return glob.Match(strings.ToLower(pattern), name) }) {
			return ""
		}
		return fmt.Sprintf("the function %s is refused: it is not known to be harmless, and policy.functions does not list it", clean(b))
	case sqlite3.SQLITE_PRAGMA:
		name := strings.ToLower(a)
		if g.readings != nil && name == "foreign_key_check" {
			return "PRAGMA foreign_key_check is refused: it tells rows, and the data source masks columns"
		}
		if g.sessionPragma(name, b) {
			return ""
		}
		if sqliteReads[name] || sqliteReadsWithoutParameter[name] && b == "" {
			return ""
		}
		return fmt.Sprintf("PRAGMA %s is refused", clean(a))
	case sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH:
		return "other files are refused: ATTACH, DETACH and VACUUM have none"
	case sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_SAVEPOINT:
		return "transaction control is refused: " + ownTransaction
	}
	kind, what := sqliteWrites(action, a)
	if what == "" {
		return "what the statement does is not understood"
	}
	if !g.readWrite {
		// An R-tree compiles what writes its own tables when it is first read. DEFENSIVE
		// keeps statements from them, and one that writes is refused once compiled.
		if strings.HasSuffix(a, "_node") || strings.HasSuffix(a, "_rowid") || strings.HasSuffix(a, "_parent") {
			if kind == "insert" || kind == "update" || kind == "delete" {
				return ""
			}
		}
		return fmt.Sprintf("the data source is read-only: %s is refused", what)
	}
	if g.readings != nil && (kind == "ddl" || kind == "module" || kind == "temp" && !slices.Contains(sqliteTemporaryTables, action)) {
		return "the data source masks columns, which a change of the schema could give other names: " + what + " is refused"
	}
	switch {
	case g.session && (kind == "temp" || strings.EqualFold(schema, "temp") && kind != "module"):
		return "" // the session's own
	case kind == "temp" || strings.EqualFold(schema, "temp") && kind != "schema":
		return "temporary objects are refused: " + ownSession
	case kind == "module":
		if !sqliteModules[strings.ToLower(b)] {
			return fmt.Sprintf("the module %s is refused", clean(b))
		}
		kind = "ddl"
	case kind == "schema":
		// DDL writes there, which is asked about as well; DEFENSIVE keeps others off.
		return ""
	case g.ddl && sqliteKept[strings.ToLower(a)]:
		return ""
	}
	if len(g.policy.WriteStatements) > 0 && !slices.Contains(g.policy.WriteStatements, kind) {
		return fmt.Sprintf("policy.write does not list %s: %s is refused", kind, what)
	}
	g.ddl = g.ddl || kind == "ddl"
	if len(g.policy.WriteSchemas) > 0 && schema != "" && !slices.ContainsFunc(g.policy.WriteSchemas, func(pattern string) bool { return glob.Match(pattern, schema) }) {
		return fmt.Sprintf("policy.write does not list the schema %s: %s is refused", clean(schema), what)
	}
	return ""
}

// sqliteTemporaryTables are the actions that make and drop temporary tables.
var sqliteTemporaryTables = []int32{sqlite3.SQLITE_CREATE_TEMP_TABLE, sqlite3.SQLITE_DROP_TEMP_TABLE, sqlite3.SQLITE_CREATE_TEMP_INDEX, sqlite3.SQLITE_DROP_TEMP_INDEX}

var (
	sqliteSchemaTables = words("sqlite_master sqlite_schema sqlite_temp_master sqlite_temp_schema")
	// sqliteKept are written by some DDL.
	sqliteKept = words("sqlite_sequence sqlite_stat1 sqlite_stat3 sqlite_stat4")
)

// sqliteWrites names an action that changes something, and its kind.
func sqliteWrites(action int32, a string) (kind, what string) {
	switch action {
	case sqlite3.SQLITE_INSERT:
		kind, what = "insert", "INSERT"
	case sqlite3.SQLITE_UPDATE:
		kind, what = "update", "UPDATE"
	case sqlite3.SQLITE_DELETE:
		kind, what = "delete", "DELETE"
	case sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_CREATE_VIEW, sqlite3.SQLITE_CREATE_TRIGGER:
		return "ddl", "CREATE"
	case sqlite3.SQLITE_DROP_TABLE, sqlite3.SQLITE_DROP_INDEX, sqlite3.SQLITE_DROP_VIEW, sqlite3.SQLITE_DROP_TRIGGER, sqlite3.SQLITE_DROP_VTABLE:
		return "ddl", "DROP"
	case sqlite3.SQLITE_ALTER_TABLE:
		return "ddl", "ALTER"
	case sqlite3.SQLITE_REINDEX:
		return "ddl", "REINDEX"
	case sqlite3.SQLITE_ANALYZE:
		return "ddl", "ANALYZE"
	case sqlite3.SQLITE_CREATE_VTABLE:
		return "module", "CREATE VIRTUAL TABLE"
	case sqlite3.SQLITE_CREATE_TEMP_TABLE, sqlite3.SQLITE_CREATE_TEMP_INDEX, sqlite3.SQLITE_CREATE_TEMP_VIEW, sqlite3.SQLITE_CREATE_TEMP_TRIGGER,
		sqlite3.SQLITE_DROP_TEMP_TABLE, sqlite3.SQLITE_DROP_TEMP_INDEX, sqlite3.SQLITE_DROP_TEMP_VIEW, sqlite3.SQLITE_DROP_TEMP_TRIGGER:
		return "temp", "a temporary object"
	default:
		return "", ""
	}
	if sqliteSchemaTables[strings.ToLower(a)] {
		return "schema", what
	}
	return kind, what
}

const (
	ownTransaction = "each statement runs in a transaction of its own"
	ownSession     = "each statement runs in a session of its own, so this would have no effect"
)
