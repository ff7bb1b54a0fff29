package pgproxy

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// maxSetting bounds a setting's value in bytes.
const maxSetting = 1 << 10

// settings are those that a client may change, with what their value must be; nil:
// anything. They change how values are read and written, where names are looked for,
// how plans are made, or end a statement early. The limits that they speak of only
// add to ours. Everything else is refused: roles, row security by the settings of
// applications (app.tenant), memory, files, what the server logs.
var settings = map[string]func(value string) string{
	"application_name": nil, "datestyle": nil, "timezone": nil, "intervalstyle": nil, "extra_float_digits": nil,
	"bytea_output": nil, "xmloption": nil, "xmlbinary": nil, "lc_monetary": nil, "lc_numeric": nil, "lc_time": nil,
	"search_path": nil, "default_text_search_config": nil, "array_nulls": nil, "timezone_abbreviations": nil,
	"statement_timeout": nil, "lock_timeout": nil, "idle_in_transaction_session_timeout": nil, "idle_session_timeout": nil,
	"transaction_timeout": nil, "quote_all_identifiers": nil, "escape_string_warning": nil, "synchronize_seqscans": nil,
	// It takes away.
	"restrict_nonsystem_relation_kind": nil,
	// Off makes a statement fail that row security would narrow; it takes nothing away.
	"row_security": nil,
	// Neither takes more than a default allows.
	"default_transaction_isolation": nil, "transaction_isolation": nil,
	"default_transaction_deferrable": nil, "transaction_deferrable": nil,
	"jit": nil, "plan_cache_mode": nil, "constraint_exclusion": nil, "cursor_tuple_fraction": nil,
	"from_collapse_limit": nil, "join_collapse_limit": nil, "geqo": nil, "geqo_threshold": nil,
	"seq_page_cost": nil, "random_page_cost": nil, "cpu_tuple_cost": nil, "cpu_index_tuple_cost": nil, "cpu_operator_cost": nil,
	"effective_cache_size": nil, "parallel_setup_cost": nil, "parallel_tuple_cost": nil,
	"client_encoding":             utf8Only,
	"client_min_messages":         oneOf("notice", "warning", "error"),
	"standard_conforming_strings": switchedOn, // what the parser takes for granted
}

// planner are the prefixes of settings that switch kinds of plans off and on.
const planner = "enable_"

// readOnlySettings may be changed only to what they are already.
var readOnlySettings = map[string]bool{"default_transaction_read_only": true, "transaction_read_only": true}

// writeSettings are allowed beside the others on a source that may be written to:
// dumps restore with them.
var writeSettings = map[string]bool{"check_function_bodies": true, "default_table_access_method": true, "default_tablespace": true, "synchronous_commit": true}

// checkSetting says why a setting may not get a value; "" when it may. Values are
// nil for DEFAULT and RESET: back to what the session began with.
func checkSetting(name string, value *string, readWrite bool) string {
	name = strings.ToLower(name)
	check, known := settings[name]
	switch {
	case readOnlySettings[name]:
		check, known = nil, true
		if !readWrite {
			check = switchedOn
		}
	case strings.HasPrefix(name, planner), readWrite && writeSettings[name]:
		known = true
	}
	switch {
	case !known:
		return fmt.Sprintf("the setting %q may not be changed on this data source", clip(name, 64))
	case value == nil || check == nil:
		return ""
	}
	return check(*value)
}

func utf8Only(value string) string {
	// PostgreSQL looks at letters and digits alone; asyncpg sends quotes as well.
	name := strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' || r >= 'a' && r <= 'z' {
			return r
		}
		return -1
	}, strings.ToLower(value))
	switch name {
	case "utf8", "unicode":
		return ""
	}
	return fmt.Sprintf("client_encoding %q is not supported: UTF8 is", clip(value, 64))
}

func switchedOn(value string) string {
	switch strings.ToLower(value) {
	case "on", "true", "t", "yes", "y", "1", "tr", "tru", "ye":
		return ""
	}
	return fmt.Sprintf("this setting stays on; %q is refused", clip(value, 64))
}

func oneOf(values ...string) func(string) string {
	return func(value string) string {
		for _, v := range values {
			if strings.EqualFold(v, value) {
				return ""
			}
		}
		return fmt.Sprintf("%q is none of %s", clip(value, 64), strings.Join(values, ", "))
	}
}

// Startup checks what a client asked for at startup and returns the settings for
// the server, by lower-case name. What it returns become the session's defaults,
// which RESET and DISCARD go back to. Where the client has no wish, the server's own
// limit of a statement's time is ours. The error is one line for the client.
func Startup(asked [][2]string, readWrite bool, timeout time.Duration) (map[string]string, error) {
	chosen := map[string]string{"statement_timeout": strconv.FormatInt(max(timeout.Milliseconds(), 1), 10)}
	// The questions that verdicts need are asked in the client's transaction; to compile
	// their plans takes a second. A client that wants it for its own can set it.
	chosen["jit"] = "off"
	for _, pair := range asked {
		name, value := strings.ToLower(pair[0]), pair[1]
		if len(value) > maxSetting || strings.ContainsRune(value, 0) {
			return nil, fmt.Errorf("the value of the startup parameter %q is too long or garbled", clip(name, 64))
		}
		if name == "client_encoding" && strings.EqualFold(strings.ReplaceAll(value, "_", ""), "sqlascii") {
			value = "UTF8" // the client is told: ParameterStatus says UTF8
		}
		if refusal := checkSetting(name, &value, readWrite); refusal != "" {
			return nil, fmt.Errorf("startup parameter %q: %s", clip(name, 64), refusal)
		}
		chosen[name] = value
	}
	chosen["client_encoding"] = "UTF8"
	chosen["standard_conforming_strings"] = "on"
	if !readWrite {
		chosen["default_transaction_read_only"] = "on"
	}
	return chosen, nil
}

// clip cuts a text of the client's for a message of ours.
func clip(text string, n int) string {
	if len(text) <= n {
		return text
	}
	for n > 0 && text[n]&0xc0 == 0x80 {
		n--
	}
	return text[:n] + "…"
}
