package pgverb

import (
	"math"
	"strconv"
	"strings"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
)

// settings are those that a session may set: how values look, how names are
// found and how plans are made. None of them gives rights, turns a protection off,
// or reaches beyond the session. The function, if any, says why a value is refused.
var settings = func() map[string]func(value string) string {
	m := make(map[string]func(string) string)
	for name := range set(`application_name array_nulls backslash_quote bytea_output client_min_messages constraint_exclusion cpu_index_tuple_cost
		cpu_operator_cost cpu_tuple_cost cursor_tuple_fraction datestyle default_text_search_config effective_cache_size enable_async_append
		enable_bitmapscan enable_distinct_reordering enable_gathermerge enable_group_by_reordering enable_hashagg enable_hashjoin
		enable_incremental_sort enable_indexonlyscan enable_indexscan enable_material enable_memoize enable_mergejoin enable_nestloop
		enable_parallel_append enable_parallel_hash enable_partition_pruning enable_partitionwise_aggregate enable_partitionwise_join
		enable_presorted_aggregate enable_self_join_elimination enable_seqscan enable_sort enable_tidscan extra_float_digits from_collapse_limit
		geqo geqo_effort geqo_generations geqo_pool_size geqo_seed geqo_selection_bias geqo_threshold intervalstyle jit jit_above_cost
		jit_inline_above_cost jit_optimize_above_cost join_collapse_limit lc_monetary lc_numeric lc_time max_parallel_workers_per_gather
		min_parallel_index_scan_size min_parallel_table_scan_size parallel_leader_participation parallel_setup_cost parallel_tuple_cost
		plan_cache_mode quote_all_identifiers random_page_cost recursive_worktable_factor search_path seq_page_cost synchronize_seqscans
		timezone transform_null_equals xmlbinary xmloption`) {
		m[name] = nil
	}
	only := func(reason string, allowed ...string) func(string) string {
		return func(value string) string {
			for _, a := range allowed {
				if strings.EqualFold(value, a) {
					return ""
				}
			}
			return reason
		}
	}
	m["standard_conforming_strings"] = only("it stays on: the text of statements is read that way", "on", "true", "yes", "1")
	m["row_security"] = only("it stays on", "on", "true", "yes", "1")
	m["client_encoding"] = only("it stays UTF8", "utf8", "utf-8", "unicode")
	return m
}()

// Limits are the settings that the session's process keeps and applies itself.
var limits = map[string]bool{"statement_timeout": true, "lock_timeout": true}

// secrets are settings whose values are not shown: they may hold passwords.
var secrets = set(`all primary_conninfo ssl_passphrase_command archive_command restore_command archive_cleanup_command recovery_end_command
	archive_library`)

// Secret tells whether a setting's value may hold a password, by its name in lower
// case; all is one of them.
func Secret(name string) bool { return secrets[name] }

// Settable tells whether a session may set a setting, by its name in lower case.
func Settable(name string) bool {
	_, ok := settings[name]
	return ok || limits[name]
}

func (r *reader) set() *Statement {
	r.next()
	local := false
	switch {
	case r.accept("transaction"):
		return r.setTransaction()
	case r.accept("constraints"):
		return r.constraints()
	case r.peek(0) == "session" && (r.peek(1) == "authorization" || r.peek(1) == "characteristics"), r.peek(0) == "role",
		(r.peek(0) == "local" || r.peek(0) == "session") && (r.peek(1) == "role" || r.peek(1) == "session"):
		r.refuse("this setting can't be set in a session of ours")
	case r.accept("local"):
		local = true
	case r.peek(0) == "session" && r.peek(1) != "=" && r.peek(1) != "to":
		r.at++
	}
	name := ""
	switch {
	case r.accept("time", "zone"):
		name = "timezone"
		if r.accept("local") {
			r.end()
			return r.assign(name, local, nil, true)
		}
	case r.accept("names"):
		name = "client_encoding"
	case r.accept("schema"):
		name = "search_path"
	case r.accept("xml", "option"):
		name = "xmloption"
	default:
		at := r.at
		name = strings.ToLower(r.name())
		if !Settable(name) {
			r.at = at
			r.refuse("the setting %s can't be set in a session of ours", clip(name))
		}
		if !r.accept("to") {
			r.expect("=")
		}
	}
	if r.accept("default") {
		r.end()
		return r.assign(name, local, nil, true)
	}
	var values []string
	for {
		values = append(values, r.setting())
		if r.at == len(r.tokens) {
			break
		}
		r.expect(",")
	}
	return r.assign(name, local, values, false)
}

func clip(name string) string {
	if len(name) > 63 {
		return name[:63]
	}
	return name
}

// setting reads one value of a setting as text.
func (r *reader) setting() string {
	if sign := r.acceptAny("-", "+"); sign != "" {
		if r.at >= len(r.tokens) || r.tokens[r.at].Kind != sqltext.Number {
			r.unexpected()
		}
		return sign + r.next().Text
	}
	switch t := r.next(); {
	case t.Kind == sqltext.Number:
		return t.Text
	case t.Kind == sqltext.Literal && len(t.Text) > 1 && t.Text[0] == '\'' && strings.HasSuffix(t.Text, "'"):
		return strings.ReplaceAll(strings.TrimSuffix(t.Text[1:], "'"), "''", "'")
	case t.Kind == sqltext.Word, t.Kind == sqltext.Quoted:
		r.at--
		return r.name()
	}
	r.at--
	r.unexpected()
	return ""
}

// assign writes the SET. A list is several values; a default is what the session
// began with.
func (r *reader) assign(name string, local bool, values []string, toDefault bool) *Statement {
	s := &Statement{Kind: Set, Name: name, Local: local}
	verb := "SET SESSION "
	if local {
		verb = "SET LOCAL "
	}
	if toDefault {
		s.SQL = verb + name + " TO DEFAULT"
		return s
	}
	quoted := make([]string, len(values))
	for i, v := range values {
		if check := settings[name]; check != nil {
			if reason := check(v); reason != "" {
				r.at = len(r.tokens) - 1
				r.refuse("the value of %s is refused: %s", name, reason)
			}
		}
		quoted[i] = literal(v)
	}
	if limits[name] {
		if len(values) != 1 {
			r.at = len(r.tokens) - 1
			r.unexpected()
		}
		millis, ok := duration(values[0])
		if !ok {
			r.at = len(r.tokens) - 1
			r.refuse("%s takes milliseconds or a time such as '30s'", name)
		}
		s.Millis = millis
	}
	s.SQL = verb + name + " TO " + strings.Join(quoted, ", ")
	return s
}

// duration reads a time as the server does, in milliseconds.
func duration(text string) (int64, bool) {
	text = strings.TrimSpace(text)
	digits := text[:len(text)-len(strings.TrimLeft(text, "0123456789."))]
	n, err := strconv.ParseFloat(digits, 64)
	unit, ok := map[string]float64{"us": 0.001, "ms": 1, "": 1, "s": 1e3, "min": 60e3, "h": 3600e3, "d": 86400e3}[strings.TrimSpace(text[len(digits):])]
	if n *= unit; err != nil || !ok || n > math.MaxInt32 {
		return 0, false
	}
	if n > 0 {
		n = max(n, 1) // 0 is none
	}
	return int64(math.Round(n)), true
}

// constraints reads SET CONSTRAINTS { ALL | name, ... } { DEFERRED | IMMEDIATE }.
func (r *reader) constraints() *Statement {
	var names []string
	if r.accept("all") {
		names = []string{"ALL"}
	} else {
		for {
			name := quote(r.name())
			for r.accept(".") {
				name += "." + quote(r.name())
			}
			names = append(names, name)
			if !r.accept(",") {
				break
			}
		}
	}
	when := r.acceptAny("deferred", "immediate")
	if when == "" {
		r.unexpected()
	}
	r.end()
	return &Statement{Kind: Constraints, SQL: "SET CONSTRAINTS " + strings.Join(names, ", ") + " " + strings.ToUpper(when)}
}

func (r *reader) reset() *Statement {
	r.next()
	switch {
	case r.accept("all"):
		r.end()
		return &Statement{Kind: ResetAll, SQL: "RESET ALL"}
	case r.accept("time", "zone"):
		r.end()
		return r.assign("timezone", false, nil, true)
	}
	at := r.at
	name := strings.ToLower(r.name())
	if !Settable(name) {
		r.at = at
		r.refuse("the setting %s can't be set in a session of ours", clip(name))
	}
	r.end()
	return r.assign(name, false, nil, true)
}

func (r *reader) show() *Statement {
	r.next()
	name := ""
	switch {
	case r.accept("time", "zone"):
		name = "timezone"
	case r.accept("transaction", "isolation", "level"):
		name = "transaction_isolation"
	case r.accept("session", "authorization"):
		name = "session_authorization"
	default:
		at := r.at
		name = strings.ToLower(r.name())
		for r.accept(".") {
			name += "." + r.name()
		}
		if secrets[name] {
			r.at = at
			if name == "all" {
				r.refuse("SHOW ALL is refused: it shows settings that may hold secrets; show one setting")
			}
			r.refuse("the setting %s is not shown: it may hold a secret", name)
		}
	}
	r.end()
	parts := strings.Split(name, ".")
	for i, p := range parts {
		parts[i] = quote(p)
	}
	return &Statement{Kind: Show, SQL: "SHOW " + strings.Join(parts, "."), Name: name}
}
