package sqltext

import (
	"strings"
	"unicode/utf8"
)

// FirstKeyword is the first word of the text in lower case, behind comments,
// empty statements and opening parentheses. It is "" when the text says
// nothing, and "?" when it starts with something that is no word.
func FirstKeyword(text string) string {
	scan := scanner{text: text}
	for {
		t, ok := scan.next()
		if !ok {
			return ""
		}
		switch {
		case t.kind == space, t.text == ";", t.text == "(":
		case t.kind == word:
			return strings.ToLower(t.text)
		default:
			return "?"
		}
	}
}

// nullWords begin what can make a NULL of a column that has none, or mix a column
// with others.
var nullWords = map[string]bool{
	"left": true, "right": true, "full": true, "outer": true, "rollup": true, "cube": true, "grouping": true, "merge": true,
	"union": true, "intersect": true, "except": true,
}

// MayAddNulls tells whether a NULL may come out of a column of the text's result
// although the column that it is of is NOT NULL: by an outer join and the like. It
// says so too often rather than too rarely.
func MayAddNulls(text string) bool {
	scan := scanner{text: text}
	for {
		t, ok := scan.next()
		if !ok {
			return false
		}
		if t.kind == word && nullWords[strings.ToLower(t.text)] {
			return true
		}
	}
}

// Call is a function call that a read-only source refuses.
type Call struct {
	// Name is the function's, without schema, in lower case.
	Name string
	// Position is where it stands, in characters from 1.
	Position int
}

// RefusedCall finds a call of a function that acts outside the transaction, so
// that reading only and rolling back do not undo it: other backends, the
// server's files and settings, large objects, other servers, or SQL in a
// string. It is a cheap first line: functions hidden in views, operators or
// the database's own functions are not seen here. The second is a role with
// few rights.
func RefusedCall(text string) (Call, bool) {
	var (
		scan     = scanner{text: text}
		last     Call
		position = 1
	)
	for {
		t, ok := scan.next()
		if !ok {
			return Call{}, false
		}
		switch {
		case t.kind == space:
		case last.Name == escaped && (strings.EqualFold(t.text, "uescape") || t.kind == literal):
		case t.kind == word:
			last = Call{strings.ToLower(t.text), position}
		case t.kind == quoted:
			last = Call{unquote(t.text), position}
		case t.text == "(" && last.Name != "" && refused(last.Name):
			return last, true
		default:
			last = Call{}
		}
		position += utf8.RuneCountInString(t.text)
	}
}

// unquote returns the name in a quoted identifier. U&"" can hide any name
// behind escapes, so it counts as a refused one.
func unquote(text string) string {
	if text[0] == '"' {
		return strings.ReplaceAll(strings.TrimSuffix(text[1:], `"`), `""`, `"`)
	}
	return escaped
}

// escaped stands for a name that can't be read by tokens alone.
const escaped = `U&""`

func refused(name string) bool {
	if name == escaped || refusedFunctions[name] {
		return true
	}
	for _, prefix := range refusedPrefixes {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// refusedPrefixes name families: other servers, large objects, replication,
// the server's files, statistics, backups, indexes.
var refusedPrefixes = []string{
	"dblink", "lo_", "pg_replication_", "pg_create_", "pg_drop_", "pg_copy_", "pg_logical_", "pg_read_", "pg_ls_", "pg_file_",
	"pg_stat_reset", "pg_stat_statements_reset", "pg_backup_", "pg_wal_replay_", "pg_start_", "pg_stop_",
	"brin_summarize_", "brin_desummarize_", "gin_clean_", "pg_sync_", "binary_upgrade_", "pg_restore_", "pg_clear_", "heap_force_",
	"postgres_fdw_disconnect",
}

var refusedFunctions = map[string]bool{
	"pg_terminate_backend": true, "pg_cancel_backend": true, "pg_reload_conf": true, "pg_rotate_logfile": true,
	"pg_rotate_logfile_old": true, "pg_promote": true, "pg_switch_wal": true, "pg_notify": true,
	"pg_log_backend_memory_contexts": true, "pg_stat_file": true, "pg_current_logfile": true, "pg_import_system_collations": true,
	"pg_extension_config_dump": true, "pg_nextoid": true, "loread": true, "lowrite": true, "pg_prewarm": true,
	"autoprewarm_start_worker": true, "autoprewarm_dump_now": true, "pg_truncate_visibility_map": true,
	// These run SQL that they are given as a string.
	"query_to_xml": true, "query_to_xmlschema": true, "query_to_xml_and_xmlschema": true, "ts_stat": true, "ts_rewrite": true,
	"xpath_table": true, "crosstab": true, "crosstab2": true, "crosstab3": true, "crosstab4": true, "crosstabn": true, "connectby": true,
}
