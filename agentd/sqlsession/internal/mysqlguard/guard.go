package mysqlguard

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto/glob"
)

// Refusal says why a statement is refused.
type Refusal struct {
	Reason string
	// Position is where, in characters from 1; 0: not known.
	Position int
}

// Uses is what a statement that is not refused by itself may use.
type Uses struct {
	// Names are the words and quoted identifiers, without double: any of them may be a
	// table or view.
	Names []string
	// Calls are the functions called without a schema, in lower case.
	Calls []Call
	// Tables are schema and name of what a view's definition names in full, as the
	// server writes all tables, and columns with their table: `db`.`table`.
	Tables [][2]string
	// MayAddNulls tells that NULL may come out of a column although the table's column
	// that it is of has none. It is so too often rather than too rarely.
	MayAddNulls bool
}

// Call is a call of a function.
type Call struct {
	Name     string
	Position int
}

// ReadOnly decides on a statement of a read-only source. functions are the globs of
// functions that the policy lets be called all the same.
func ReadOnly(text string, functions []string) (Uses, *Refusal) {
	return reads(text, functions, readOnlyAllows, false)
}

// Session is ReadOnly for a session that stays open, which has variables: @name may be
// read.
func Session(text string, functions []string) (Uses, *Refusal) {
	return reads(text, functions, readOnlyAllows, true)
}

const readOnlyAllows = "the data source is read-only, which allows SELECT, VALUES, TABLE and WITH ... SELECT"

// Metadata decides on a statement of a source in mode metadata, which the server
// prepares and does not run.
func Metadata(text string, functions []string) (Uses, *Refusal) {
	return reads(text, functions, "the data source tells metadata only, which it can of SELECT, VALUES, TABLE and WITH ... SELECT", false)
}

func reads(text string, functions []string, allows string, variables bool) (Uses, *Refusal) {
	tokens, refusal := scan(text)
	if refusal != nil {
		return Uses{}, refusal
	}
	if tokens = withoutEnd(tokens); len(tokens) == 0 {
		return Uses{}, &Refusal{"the statement is empty", 0}
	}
	first := 0
	for first < len(tokens) && tokens[first].Text == "(" {
		first++
	}
	if first == len(tokens) || tokens[first].Kind != sqltext.KindWord || !readers[strings.ToLower(tokens[first].Text)] {
		t := tokens[min(first, len(tokens)-1)]
		if w := strings.ToLower(t.Text); t.Kind == sqltext.KindWord && (w == "explain" || w == "analyze") {
			return Uses{}, &Refusal{fmt.Sprintf("%s is refused: leave it out of the text, and ask for the plan with postern sql --explain (or explain in the request), which the data source's policy decides on", shown(t)), t.Position}
		}
		return Uses{}, &Refusal{fmt.Sprintf("%s is refused: %s", shown(t), allows), t.Position}
	}
	if refusal := words(tokens, variables); refusal != nil {
		return Uses{}, refusal
	}
	u, refusal := uses(tokens, functions, "", nil)
	u.MayAddNulls = mayAddNulls(tokens)
	return u, refusal
}

// nullWords are in every text in which a NULL may come of a column that has none:
// outer joins, set operations, and aggregates, as one row without a group comes of no
// rows (that group_concat and its like have more words does not matter: so have all).
var nullWords = set(`left right full outer natural union except intersect minus rollup cube grouping with recursive values table having
 any_value avg bit_and bit_or bit_xor count group_concat json_arrayagg json_objectagg max median min std stddev stddev_pop stddev_samp sum var_pop var_samp
 variance st_collect percentile_cont percentile_disc lead lag`)

func mayAddNulls(tokens []sqltext.Piece) bool {
	for _, t := range tokens {
		if (t.Kind == sqltext.KindWord || t.Kind == sqltext.KindIdentifier) && nullWords[strings.ToLower(t.Text)] {
			return true
		}
	}
	return false
}

// View decides on the definition of a view, as the server tells it. besides, if it is
// not nil, tells of stored functions that may be called although the policy does not
// list them.
func View(definition, schema string, functions []string, besides func(schema, name string) bool) (Uses, *Refusal) {
	tokens, refusal := scan(definition)
	if refusal != nil {
		return Uses{}, refusal
	}
	u, refusal := uses(tokens, functions, schema, besides)
	if refusal == nil {
		u.Tables = tables(tokens)
	}
	return u, refusal
}

// tables finds `db`.`name` after FROM, JOIN, a comma or a parenthesis. Of columns,
// which look the same, only those of a list get in: they are two names as well, so
// what precedes decides, and the server writes columns of a join as `table`.`column`.
func tables(tokens []sqltext.Piece) [][2]string {
	var found [][2]string
	is := func(i int, text string) bool {
		return i >= 0 && i < len(tokens) && tokens[i].Kind != sqltext.KindIdentifier && strings.EqualFold(tokens[i].Text, text)
	}
	// inCall holds, for each open parenthesis, whether it is that of a function which
	// has a FROM of its own.
	var inCall []bool
	for i := range tokens {
		switch {
		case is(i, "("):
			inCall = append(inCall, is(i-1, "extract") || is(i-1, "trim") || is(i-1, "substr") || is(i-1, "substring"))
		case is(i, ")") && len(inCall) > 0:
			inCall = inCall[:len(inCall)-1]
		}
		if n := len(inCall); n > 0 && inCall[n-1] {
			continue
		}
		if i+2 >= len(tokens) || tokens[i].Kind != sqltext.KindIdentifier || !is(i+1, ".") || tokens[i+2].Kind != sqltext.KindIdentifier || is(i+3, ".") || is(i+3, "(") {
			continue
		}
		before := i - 1
		for is(before, "(") {
			before--
		}
		if is(before, "from") || is(before, "join") || is(before, "straight_join") {
			found = append(found, [2]string{tokens[i].Text, tokens[i+2].Text})
		}
	}
	return found
}

// readers are the words that a statement which reads begins with.
var readers = set("select values table with")

// writers are what a statement that begins like one which reads may still hold. All
// are reserved: a column of such a name goes in backticks.
var writers = set("insert update delete replace into outfile dumpfile procedure lock")

// scan cuts the text, and refuses what makes tokens uncertain.
func scan(text string) ([]sqltext.Piece, *Refusal) {
	if !utf8.ValidString(text) {
		return nil, &Refusal{"the statement is not valid UTF-8", 0}
	}
	if strings.ContainsRune(text, 0) {
		return nil, &Refusal{"the statement holds a NUL character", 0}
	}
	var tokens []sqltext.Piece
	for t := range sqltext.MySQL.Pieces(text) {
		if t.Open {
			return nil, &Refusal{"a quote or comment is not closed", t.Position}
		}
		if t.Kind == sqltext.KindComment {
			if strings.HasPrefix(t.Text, "/*!") || strings.HasPrefix(strings.ToUpper(t.Text), "/*M!") || strings.HasPrefix(t.Text, "/*+") {
				return nil, &Refusal{"a comment with code or hints in it is refused", t.Position}
			}
			continue
		}
		if n := len(tokens); n > 0 && t.Joined && (tokens[n-1].Kind == sqltext.KindNumber && (t.Kind == sqltext.KindWord || t.Kind == sqltext.KindNumber) ||
			tokens[n-1].Kind == sqltext.KindWord && t.Kind == sqltext.KindNumber) {
			return nil, &Refusal{"digits and letters without a space between are refused: a name of this kind goes in backticks", t.Position}
		}
		if t.Kind == sqltext.KindIdentifier && strings.HasPrefix(strings.ToLower(t.Text), "#mysql50#") {
			return nil, &Refusal{"a name that begins with #mysql50# is refused: it is another for a table that has one", t.Position}
		}
		if t.Kind == sqltext.KindWord && strings.HasPrefix(t.Text, "$") {
			return nil, &Refusal{"a name that begins with $ is refused: put it in backticks", t.Position}
		}
		if t.Kind == sqltext.KindSymbol && t.Text < " " {
			return nil, &Refusal{"the statement holds a control character", t.Position}
		}
		tokens = append(tokens, t)
	}
	return tokens, nil
}

// withoutEnd drops the semicolons at the end.
func withoutEnd(tokens []sqltext.Piece) []sqltext.Piece {
	for len(tokens) > 0 && tokens[len(tokens)-1].Text == ";" && tokens[len(tokens)-1].Kind == sqltext.KindSymbol {
		tokens = tokens[:len(tokens)-1]
	}
	return tokens
}

// words refuses words that do more than read wherever they stand.
func words(tokens []sqltext.Piece, variables bool) *Refusal {
	for i, t := range tokens {
		next := func(n int) string {
			if i+n < len(tokens) && (tokens[i+n].Kind == sqltext.KindWord || tokens[i+n].Kind == sqltext.KindSymbol) {
				return strings.ToLower(tokens[i+n].Text)
			}
			return ""
		}
		switch t.Kind {
		case sqltext.KindSymbol:
			switch {
			case t.Text == ";":
				return &Refusal{"the text has more than one statement: send them one by one", t.Position}
			case t.Text == ":=":
				return &Refusal{":= is refused: the data source is read-only", t.Position}
			case t.Text == "@" && next(1) != "@" && (i == 0 || tokens[i-1].Text != "@"):
				if variables && i+1 < len(tokens) && tokens[i+1].Joined && (tokens[i+1].Kind == sqltext.KindWord || tokens[i+1].Kind == sqltext.KindIdentifier) {
					continue
				}
				return &Refusal{"a variable is refused: statements share none", t.Position}
			case t.Text == "\\":
				return &Refusal{`\ is not understood outside of a string`, t.Position}
			}
		case sqltext.KindWord:
			w := strings.ToLower(t.Text)
			switch {
			case writers[w] && (w != "insert" && w != "replace" || next(1) != "("):
				return &Refusal{fmt.Sprintf("%s is refused: the data source is read-only", strings.ToUpper(w)), t.Position}
			case w == "for" && (next(1) == "update" || next(1) == "share"):
				return &Refusal{"FOR " + strings.ToUpper(next(1)) + " is refused: it locks rows", t.Position}
			case (w == "nextval" || w == "currval") && i > 0 && tokens[i-1].Text == ".":
				return &Refusal{strings.ToUpper(w) + " is refused: it uses up a sequence's value", t.Position}
			case (w == "next" || w == "previous") && next(1) == "value":
				return &Refusal{strings.ToUpper(w) + " VALUE FOR is refused: it uses up a sequence's value", t.Position}
			}
		}
	}
	return nil
}

// uses collects names and calls, and refuses calls that nothing allows.
func uses(tokens []sqltext.Piece, functions []string, schema string, besides func(schema, name string) bool) (Uses, *Refusal) {
	var u Uses
	known := map[string]bool{}
	for i, t := range tokens {
		if t.Kind != sqltext.KindWord && t.Kind != sqltext.KindIdentifier {
			continue
		}
		name := strings.ToLower(t.Text)
		if !known[t.Text] {
			known[t.Text] = true
			u.Names = append(u.Names, t.Text)
		}
		if i+1 >= len(tokens) || tokens[i+1].Text != "(" || tokens[i+1].Kind != sqltext.KindSymbol {
			continue
		}
		if i > 0 && tokens[i-1].Text == "." && tokens[i-1].Kind == sqltext.KindSymbol {
			owner := schema
			if i > 1 {
				owner = tokens[i-2].Text
			}
			if !allowed(functions, owner, name) && (besides == nil || !besides(owner, name)) {
				return Uses{}, &Refusal{fmt.Sprintf("the function %s.%s is refused: it is not one of the server's own, and policy.functions does not list it", clip(owner), clip(name)), t.Position}
			}
			continue
		}
		if t.Kind == sqltext.KindWord && keywords[name] || aliasList(tokens, i) {
			if softKeywords[name] {
				u.Calls = append(u.Calls, Call{name, t.Position})
			}
			continue
		}
		switch {
		case allowed(functions, schema, name): // in a view without a schema: one of the view's own
		case schema != "" && !harmless[name] && !harmlessFamily(name) && besides != nil && besides(schema, name):
		case name == "last_insert_id" && i+2 < len(tokens) && tokens[i+2].Text == ")":
		case !harmless[name] && !harmlessFamily(name):
			return Uses{}, &Refusal{fmt.Sprintf("the function %s is refused: it is not known to be harmless, and policy.functions does not list it", clip(name)), t.Position}
		default:
			u.Calls = append(u.Calls, Call{name, t.Position})
		}
	}
	return u, nil
}

// harmlessFamily tells whether a function is one of the families that are harmless as
// a whole.
func harmlessFamily(name string) bool {
	if strings.ContainsFunc(name, func(c rune) bool { return c >= utf8.RuneSelf }) {
		return false
	}
	return strings.HasPrefix(name, "st_") || strings.HasPrefix(name, "json_") || strings.HasPrefix(name, "mbr")
}

// aliasList tells whether the parentheses after token i hold the names of columns:
// WITH name (a, b) AS (, and AS name (a, b).
func aliasList(tokens []sqltext.Piece, i int) bool {
	if i == 0 {
		return false
	}
	end := i + 2
	for ; end < len(tokens) && tokens[end].Text != ")"; end++ {
		if k := tokens[end].Kind; k != sqltext.KindWord && k != sqltext.KindIdentifier && tokens[end].Text != "," {
			return false
		}
	}
	before := strings.ToLower(tokens[i-1].Text)
	if tokens[i-1].Kind == sqltext.KindWord && before == "as" {
		return true
	}
	if end+2 >= len(tokens) || !strings.EqualFold(tokens[end+1].Text, "as") || tokens[end+2].Text != "(" {
		return false
	}
	return before == "with" || before == "recursive" || before == ","
}

func allowed(functions []string, schema, name string) bool {
	for _, pattern := range functions {
		pattern = strings.ToLower(pattern)
		target := name
		if strings.Contains(pattern, ".") {
			if schema == "" {
				continue
			}
			target = strings.ToLower(schema) + "." + name
		}
		if glob.Match(pattern, target) {
			return true
		}
	}
	return false
}

// Allowed tells whether the policy lists a function or view by name.
func Allowed(functions []string, schema, name string) bool {
	return allowed(functions, schema, strings.ToLower(name))
}

func clip(name string) string {
	if r := []rune(name); len(r) > 64 {
		return string(r[:64]) + "..."
	}
	return name
}

func shown(t sqltext.Piece) string { return strings.ToUpper(clip(t.Text)) }

// ReadWrite decides on a statement of a read-write source, by its first word: the
// reason is empty if it may run. session is set in a session that stays open, for what
// ParseVerb leaves.
func ReadWrite(text string, session bool) *Refusal {
	tokens, refusal := scan(text)
	if refusal != nil {
		return refusal
	}
	if tokens = withoutEnd(tokens); len(tokens) == 0 {
		return &Refusal{"the statement is empty", 0}
	}
	for _, t := range tokens {
		if t.Kind == sqltext.KindSymbol && t.Text == "(" {
			continue
		}
		if reason := refusedInReadWrite[strings.ToLower(t.Text)]; reason != "" && t.Kind == sqltext.KindWord {
			if session && (reason == ownTransaction || reason == ownSession) {
				reason = "a session that stays open does not take it"
			}
			return &Refusal{fmt.Sprintf("%s is refused: %s", shown(t), reason), t.Position}
		}
		break
	}
	return nil
}

const (
	ownTransaction = "each statement runs in a transaction of its own"
	ownSession     = "each statement runs in a session of its own, so this would have no effect"
	hostsFiles     = "it reads files"
)

var refusedInReadWrite = map[string]string{
	"begin": ownTransaction, "start": ownTransaction, "commit": ownTransaction, "rollback": ownTransaction, "savepoint": ownTransaction,
	"release": ownTransaction, "lock": ownTransaction, "unlock": ownTransaction, "xa": ownTransaction,
	"set": ownSession, "use": ownSession, "prepare": ownSession, "execute": ownSession, "deallocate": ownSession, "handler": ownSession,
	"declare": ownSession, "load": hostsFiles, "kill": "cancel the statement instead", "shutdown": "it ends the server",
	"delimiter": "it is a command of the mysql program",
}

func set(text string) map[string]bool {
	m := make(map[string]bool)
	for _, w := range strings.Fields(text) {
		m[w] = true
	}
	return m
}
