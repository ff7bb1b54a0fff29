package mysqlguard

import (
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
)

// setting is one that a session may set: none of them changes how a text is cut into
// words, what a value that arrives means, or what a transaction may do.
type setting struct {
	// takes says what values there are, for people.
	takes string
	// read passes a value and gives it in our words.
	read func(p *verbParser) (string, bool)
	// writes: on sources that may write alone.
	writes bool
	// millis is, for limits of time that our process keeps, how many milliseconds the
	// unit has; else 0.
	millis float64
}

// settings by name in lower case.
var settings = map[string]setting{
	"sql_mode":                 {takes: "a list of modes that leave alone how texts are quoted", read: (*verbParser).sqlMode},
	"max_statement_time":       {takes: "seconds", read: number(0, 86400*365, false), millis: 1000},
	"max_execution_time":       {takes: "milliseconds", read: number(0, math.MaxUint32, true), millis: 1},
	"lock_wait_timeout":        {takes: "1 to 30 seconds", read: number(1, 30, true)},
	"innodb_lock_wait_timeout": {takes: "1 to 30 seconds", read: number(1, 30, true)},
	"group_concat_max_len":     {takes: "4 to 16777216", read: orDefault(number(4, 16<<20, true))},
	"sql_select_limit":         {takes: "a number of rows", read: orDefault(number(0, math.MaxInt64, true))},
	"div_precision_increment":  {takes: "0 to 30", read: orDefault(number(0, 30, true))},
	"default_week_format":      {takes: "0 to 7", read: orDefault(number(0, 7, true))},
	"cte_max_recursion_depth":  {takes: "0 to 1000000", read: orDefault(number(0, 1_000_000, true))},
	"max_recursive_iterations": {takes: "0 to 1000000", read: orDefault(number(0, 1_000_000, true))},
	"optimizer_search_depth":   {takes: "0 to 62", read: orDefault(number(0, 62, true))},
	"optimizer_prune_level":    {takes: "0 to 2", read: orDefault(number(0, 2, true))},
	"optimizer_switch":         {takes: "a list of name=on, name=off or name=default", read: orDefault(quoted(isSwitches))},
	"lc_time_names":            {takes: "a locale", read: orDefault(quoted(isPlainName))},
	"transaction_isolation":    {takes: "a level such as 'READ-COMMITTED'", read: quoted(isIsolation)},
	"tx_isolation":             {takes: "a level such as 'READ-COMMITTED'", read: quoted(isIsolation)},
	"sql_big_selects":          {takes: "ON or OFF", read: (*verbParser).onOff},
	"sql_safe_updates":         {takes: "ON or OFF", read: (*verbParser).onOff},
	"foreign_key_checks":       {takes: "ON or OFF", read: (*verbParser).onOff, writes: true},
	"unique_checks":            {takes: "ON or OFF", read: (*verbParser).onOff, writes: true},
	"auto_increment_increment": {takes: "1 to 65535", read: orDefault(number(1, 65535, true)), writes: true},
	"auto_increment_offset":    {takes: "1 to 65535", read: orDefault(number(1, 65535, true)), writes: true},
}

// settingReasons say why what people may well try is refused.
var settingReasons = map[string]string{
	"autocommit":            "say BEGIN, and COMMIT or ROLLBACK",
	"time_zone":             "timestamps are told in UTC: use CONVERT_TZ",
	"names":                 "texts are in utf8mb4",
	"character":             "texts are in utf8mb4",
	"charset":               "texts are in utf8mb4",
	"collation_connection":  "texts are in utf8mb4",
	"global":                "a session has settings of its own alone",
	"persist":               "a session has settings of its own alone",
	"transaction_read_only": "say START TRANSACTION READ ONLY",
	"tx_read_only":          "say START TRANSACTION READ ONLY",
	"password":              "accounts are for the server's administrator",
	"role":                  "accounts are for the server's administrator",
	"statement":             "SET STATEMENT ... FOR is not understood: set it for the session",
}

// harmlessModes are what sql_mode may be made of.
var harmlessModes = set(`strict_trans_tables strict_all_tables only_full_group_by no_zero_in_date no_zero_date error_for_division_by_zero
 no_engine_substitution no_auto_value_on_zero no_unsigned_subtraction pad_char_to_full_length allow_invalid_dates traditional
 time_truncate_fractional time_round_fractional no_auto_create_user no_dir_in_create simultaneous_assignment`)

// value passes one word, number or string; its text is without quotes.
func (p *verbParser) value() (sqltext.Piece, string, bool) {
	if p.at == len(p.tokens) {
		return sqltext.Piece{}, "", false
	}
	t := p.tokens[p.at]
	p.at++
	switch t.Kind {
	case sqltext.KindWord, sqltext.KindNumber:
		return t, t.Text, true
	case sqltext.KindLiteral:
		inner := t.Text[1 : len(t.Text)-1]
		return t, inner, !strings.ContainsAny(inner, `\'"`)
	}
	return t, "", false
}

func (p *verbParser) sqlMode() (string, bool) {
	t, text, ok := p.value()
	if !ok || t.Kind == sqltext.KindNumber {
		return "", false
	}
	for _, mode := range strings.Split(strings.ToLower(text), ",") {
		if mode != "" && !harmlessModes[mode] {
			return "", false
		}
	}
	return "'" + strings.ToUpper(text) + "'", true
}

func (p *verbParser) onOff() (string, bool) {
	_, text, ok := p.value()
	switch strings.ToLower(text) {
	case "1", "on", "true":
		return "1", ok
	case "0", "off", "false":
		return "0", ok
	}
	return "", false
}

// number takes one from least to most, in digits.
func number(least, most float64, whole bool) func(*verbParser) (string, bool) {
	return func(p *verbParser) (string, bool) {
		t, text, ok := p.value()
		n, valid := decimal(text)
		return text, ok && valid && t.Kind == sqltext.KindNumber && n >= least && n <= most && (!whole || !strings.Contains(text, "."))
	}
}

// decimal reads digits with at most one point.
func decimal(text string) (float64, bool) {
	if text == "" || len(text) > 20 || strings.Trim(text, "0123456789.") != "" {
		return 0, false
	}
	n, err := strconv.ParseFloat(text, 64)
	return n, err == nil
}

func orDefault(read func(*verbParser) (string, bool)) func(*verbParser) (string, bool) {
	return func(p *verbParser) (string, bool) {
		if p.word("default") != "" {
			return "DEFAULT", true
		}
		return read(p)
	}
}

func quoted(valid func(string) bool) func(*verbParser) (string, bool) {
	return func(p *verbParser) (string, bool) {
		t, text, ok := p.value()
		return "'" + text + "'", ok && t.Kind != sqltext.KindNumber && valid(strings.ToLower(text))
	}
}

func isPlainName(text string) bool {
	return text != "" && len(text) <= 64 && strings.Trim(text, "abcdefghijklmnopqrstuvwxyz0123456789_") == ""
}

func isSwitches(text string) bool {
	for _, one := range strings.Split(text, ",") {
		name, value, _ := strings.Cut(one, "=")
		if !isPlainName(name) || !slices.Contains([]string{"on", "off", "default"}, value) {
			return false
		}
	}
	return true
}

func isIsolation(text string) bool {
	return slices.Contains([]string{"read-uncommitted", "read-committed", "repeatable-read", "serializable"}, text)
}
