package pgverb

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
)

// Kind is what a statement does.
type Kind uint8

// The kinds. None is a statement that does not belong to a session alone.
const (
	None           Kind = iota
	Begin               // BEGIN, START TRANSACTION
	Commit              // COMMIT, END
	Rollback            // ROLLBACK, ABORT
	Savepoint           // SAVEPOINT Name
	Release             // RELEASE Name
	RollbackTo          // ROLLBACK TO Name
	SetTransaction      // SET TRANSACTION
	Set                 // SET, RESET of the setting Name
	ResetAll            // RESET ALL
	Show                // SHOW Name; has rows
	Prepare             // PREPARE Name AS Query
	Execute             // EXECUTE Name; may have rows
	Deallocate          // DEALLOCATE Name; "" is ALL
	Declare             // DECLARE Name CURSOR FOR Query
	Fetch               // FETCH from Name; has rows
	Move                // MOVE in Name
	Close               // CLOSE Name; "" is ALL
	Discard             // DISCARD; Name is all, plans, sequences or temp
	Lock                // LOCK TABLE; as the user wrote it
	Constraints         // SET CONSTRAINTS
)

// Reserved begins the names of prepared statements and cursors that are ours.
const Reserved = "postern"

// Statement is a statement that was understood.
type Statement struct {
	Kind Kind
	// SQL goes to the server in place of the user's text.
	SQL string
	// Name is of what Kind says, without quotes.
	Name string
	// Millis is what statement_timeout and lock_timeout were set to; 0 is none.
	// They are kept by the session's process, which sets both for each statement.
	Millis int64
	// Local is set for SET LOCAL.
	Local bool
	// Query is the statement within PREPARE and DECLARE, the rest of the text from
	// the byte Start on.
	Query string
	Start int
}

// Refusal is why a statement can't run.
type Refusal struct {
	// Position is in characters from 1.
	Position int
	Message  string
}

// Error implements error.
func (r *Refusal) Error() string { return r.Message }

// verbs are the first words of the statements that are looked at.
var verbs = map[string]func(*reader) *Statement{
	"begin": (*reader).begin, "start": (*reader).begin, "commit": (*reader).commit, "end": (*reader).commit,
	"rollback": (*reader).rollback, "abort": (*reader).rollback, "savepoint": (*reader).savepoint, "release": (*reader).release,
	"set": (*reader).set, "reset": (*reader).reset, "show": (*reader).show, "prepare": (*reader).prepare, "execute": (*reader).execute,
	"deallocate": (*reader).deallocate, "declare": (*reader).declare, "fetch": (*reader).fetch, "move": (*reader).fetch,
	"close": (*reader).close, "discard": (*reader).discard, "lock": (*reader).lock,
}

// Parse reads one statement; nil is one of another kind, to be judged as a query.
// On a read-only source transactions begin READ ONLY whatever the text says, and
// what asks for more is refused.
func Parse(text string, readOnly bool) (s *Statement, refusal *Refusal) {
	keyword := sqltext.FirstKeyword(text)
	read := verbs[keyword]
	if read == nil {
		return nil, nil
	}
	r := &reader{text: text, readOnly: readOnly}
	defer func() {
		if v := recover(); v != nil {
			refused, ok := v.(*Refusal)
			if !ok {
				panic(v)
			}
			s, refusal = nil, refused
		}
	}()
	r.load()
	if r.peek(0) != keyword { // in parentheses
		r.refuse("%s can't be understood", strings.ToUpper(keyword))
	}
	return read(r), nil
}

// reader reads the tokens of a statement; what does not fit panics with a Refusal.
type reader struct {
	text     string
	readOnly bool
	tokens   []sqltext.Token
	at       int
}

// maxTokens bounds a statement other than the query in it.
const maxTokens = 2000

// load cuts the text up to the query in it. Semicolons in front and at the end are
// left out.
func (r *reader) load() {
	depth, first := 0, ""
	for t := range sqltext.Tokens(r.text) {
		if t.Kind == sqltext.Space || len(r.tokens) == 0 && t.Text == ";" {
			continue
		}
		if r.tokens = append(r.tokens, t); len(r.tokens) > maxTokens {
			r.at = len(r.tokens) - 1
			r.refuse("the statement is too long to be understood")
		}
		word := ""
		if t.Kind == sqltext.Word {
			word = strings.ToLower(t.Text)
		}
		switch {
		case len(r.tokens) == 1:
			first = word
		case t.Text == "(":
			depth++
		case t.Text == ")":
			depth--
		case depth == 0 && (first == "prepare" && word == "as" || first == "declare" && word == "for"):
			return
		}
	}
	for n := len(r.tokens); n > 0 && r.tokens[n-1].Text == ";"; n-- {
		r.tokens = r.tokens[:n-1]
	}
}

// refuse panics with a refusal at the token at hand.
func (r *reader) refuse(format string, args ...any) {
	start := len(r.text)
	if r.at < len(r.tokens) {
		start = r.tokens[r.at].Start
	}
	panic(&Refusal{utf8.RuneCountInString(r.text[:start]) + 1, fmt.Sprintf(format, args...)})
}

func (r *reader) unexpected() {
	if r.at >= len(r.tokens) {
		r.refuse("the statement ends too early")
	}
	if r.tokens[r.at].Text == ";" {
		r.refuse("the text has more than one statement: send them one by one")
	}
	r.refuse("the statement is not understood from here on")
}

// peek is the n-th token from here: a word in lower case, a symbol as it is, else
// "", as at the end.
func (r *reader) peek(n int) string {
	if r.at+n >= len(r.tokens) {
		return ""
	}
	switch t := r.tokens[r.at+n]; t.Kind {
	case sqltext.Word:
		return strings.ToLower(t.Text)
	case sqltext.Symbol:
		return t.Text
	}
	return ""
}

// accept passes these words if they are next.
func (r *reader) accept(words ...string) bool {
	for i, w := range words {
		if r.peek(i) != w {
			return false
		}
	}
	r.at += len(words)
	return true
}

func (r *reader) acceptAny(words ...string) string {
	for _, w := range words {
		if r.accept(w) {
			return w
		}
	}
	return ""
}

func (r *reader) expect(words ...string) {
	if !r.accept(words...) {
		r.unexpected()
	}
}

func (r *reader) end() {
	if r.at < len(r.tokens) {
		r.unexpected()
	}
}

func (r *reader) next() sqltext.Token {
	if r.at >= len(r.tokens) {
		r.unexpected()
	}
	r.at++
	return r.tokens[r.at-1]
}

// name reads an identifier and returns it as the server would take it.
func (r *reader) name() string {
	t := r.next()
	name := ""
	switch {
	case t.Kind == sqltext.Word:
		name = fold(t.Text)
	case t.Kind == sqltext.Quoted && t.Text[0] == '"':
		name = strings.ReplaceAll(strings.TrimSuffix(t.Text[1:], `"`), `""`, `"`)
	default:
		r.at--
		r.unexpected()
	}
	if _, err := sqltext.PostgreSQL.Identifier(name); err != nil {
		r.at--
		r.refuse("%s", err)
	}
	return name
}

// own reads the name of a prepared statement or cursor of the user's.
func (r *reader) own() string {
	name := r.name()
	if strings.HasPrefix(name, Reserved) {
		r.at--
		r.refuse("names that begin with %s are reserved: choose another", Reserved)
	}
	return name
}

// fold is what the server does to a name without quotes.
func fold(word string) string {
	b := []byte(word)
	for i, c := range b {
		if c >= 'A' && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}

func quote(name string) string {
	quoted, _ := sqltext.PostgreSQL.Identifier(name) // looked at by name
	return quoted
}

// literal writes a text as a string of the server's; standard_conforming_strings
// is on.
func literal(text string) string { return "'" + strings.ReplaceAll(text, "'", "''") + "'" }
