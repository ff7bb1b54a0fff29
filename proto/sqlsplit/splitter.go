package sqlsplit

import (
	"slices"
	"strings"
)

// maxDelimiter is how many bytes the argument of DELIMITER can have.
const maxDelimiter = 16

// Splitter cuts lines into statements. Besides what is quoted it knows what else hides
// a semicolon: on PostgreSQL parentheses and the bodies of BEGIN ATOMIC, on MySQL the
// BEGIN ... END of routines, triggers and events, on SQLite that of triggers. On MySQL
// it knows the line DELIMITER of the mysql client, too.
//
// It keeps the text of the statement that is not complete, however long; its caller
// bounds it (Len).
type Splitter struct {
	lex  lexer
	text strings.Builder
	// delimiter ends a statement.
	delimiter string
	parens    int
	// begun: there is something else than blanks and comments.
	begun bool
	body
}

// body follows statements that have statements in them.
type body struct {
	words   []string // the first of the statement
	ended   bool     // the last token is an END that closed something
	routine int      // 1: the statement makes something with a body; -1: it does not
	depth   int      // of BEGIN and CASE in it
	trigger int      // SQLite's sqlite3_complete: 0, inTrigger, afterSemicolon or afterEnd
}

const (
	inTrigger = 1 + iota
	afterSemicolon
	afterEnd
)

// New makes a Splitter for an engine.
func New(engine Engine) *Splitter {
	return &Splitter{lex: lexer{engine: engine}, delimiter: ";"}
}

// Engine is whose rules hold.
func (s *Splitter) Engine() Engine { return s.lex.engine }

// Feed takes a line with its line break, which only the last one may lack, and returns
// the statements that end in it, without what ends them. Statements of nothing but
// blanks and comments are left out.
func (s *Splitter) Feed(line string) (complete []string) {
	if s.Empty() && s.command(line) {
		return nil
	}
	start := 0
	for i := 0; i < len(line); {
		if s.ends(line[i:]) {
			s.text.WriteString(line[start:i])
			if s.begun {
				complete = append(complete, trim(s.text.String()))
			}
			s.Reset()
			i += len(s.delimiter)
			start = i
			continue
		}
		k, n := s.lex.next(line[i:])
		if k == word && s.delimiter != ";" {
			// END$$ is a word, and the mysql client ends the statement within.
			if at := strings.Index(line[i:min(len(line), i+n+len(s.delimiter)-1)], s.delimiter); at > 0 {
				n = at
			}
		}
		s.see(k, line[i:i+n])
		i += n
	}
	if s.text.Len() > 0 || trim(line[start:]) != "" {
		s.text.WriteString(line[start:])
	}
	return complete
}

// ends tells whether rest begins with what ends the statement.
func (s *Splitter) ends(rest string) bool {
	if s.lex.open != 0 || !strings.HasPrefix(rest, s.delimiter) {
		return false
	}
	switch s.lex.engine {
	case Postgres:
		return s.parens <= 0 && s.depth == 0
	case MySQL:
		return s.depth == 0 || s.delimiter != ";"
	default:
		return s.trigger == 0 || s.trigger == afterEnd
	}
}

// command takes DELIMITER of the mysql client.
func (s *Splitter) command(line string) bool {
	words := strings.Fields(line)
	if s.lex.engine != MySQL || len(words) != 2 || !strings.EqualFold(words[0], "delimiter") || len(words[1]) > maxDelimiter || strings.ContainsAny(words[1], "\\'\"`#") {
		return false
	}
	s.Reset()
	s.delimiter = words[1]
	return true
}

// see takes note of a token.
func (s *Splitter) see(k kind, token string) {
	if k == blank {
		return
	}
	s.begun = true
	ended := s.ended
	s.ended = false
	switch k {
	case word:
		w := strings.ToLower(token)
		switch s.lex.engine {
		case Postgres:
			s.postgres(w)
		case MySQL:
			s.mysql(w, ended)
		default:
			s.sqlite(w)
		}
		return
	case symbol:
		switch token {
		case "(":
			s.parens++
		case ")":
			s.parens--
		}
	}
	if s.lex.engine == SQLite {
		s.sqlite(token)
	}
}

// postgres follows the bodies of SQL functions: CREATE FUNCTION ... BEGIN ATOMIC.
func (b *body) postgres(w string) {
	if len(b.words) < 4 {
		b.words = append(b.words, w)
	}
	switch {
	case b.words[0] != "create" || !slices.Contains(b.words, "function") && !slices.Contains(b.words, "procedure"):
	case w == "begin":
		b.depth++
	case w == "case" && b.depth > 0:
		b.depth++
	case w == "end" && b.depth > 0:
		b.depth--
	}
}

// mysqlObjects are what CREATE makes: those with bodies, and others.
var mysqlObjects = map[string]int{
	"procedure": 1, "function": 1, "trigger": 1, "event": 1, "package": 1,
	"table": -1, "view": -1, "index": -1, "database": -1, "schema": -1, "user": -1, "role": -1, "server": -1, "sequence": -1,
	"tablespace": -1, "logfile": -1, "undo": -1, "resource": -1, "spatial": -1,
}

// mysql follows BEGIN ... END in what CREATE [OR REPLACE] [DEFINER = ...] makes. CASE
// ends with END, or END CASE; what else ends with END and a word does not count.
func (b *body) mysql(w string, ended bool) {
	if len(b.words) == 0 {
		b.words = append(b.words, w)
		if w != "create" && w != "alter" {
			b.routine = -1
		}
		return
	}
	if b.routine == 0 {
		b.routine = mysqlObjects[w]
		return
	}
	if b.routine < 0 {
		return
	}
	if ended {
		switch w {
		case "case":
			return
		case "if", "loop", "while", "repeat", "for":
			b.depth++
			return
		}
	}
	switch {
	case w == "begin":
		b.depth++
	case w == "case" && b.depth > 0:
		b.depth++
	case w == "end" && b.depth > 0:
		b.depth--
		b.ended = true
	}
}

// sqlite follows CREATE TRIGGER as sqlite3_complete does: it ends with ; END ;
func (b *body) sqlite(w string) {
	switch {
	case b.trigger == 0 && len(b.words) < 6:
		b.words = append(b.words, w)
		rest := b.words
		if rest[0] == "explain" {
			rest = rest[1:]
			if len(rest) > 1 && rest[0] == "query" && rest[1] == "plan" {
				rest = rest[2:]
			}
		}
		if n := len(rest); n == 2 && rest[0] == "create" && w == "trigger" || n == 3 && rest[0] == "create" && (rest[1] == "temp" || rest[1] == "temporary") && w == "trigger" {
			b.trigger = inTrigger
		}
	case b.trigger == 0:
	case w == ";":
		b.trigger = afterSemicolon
	case w == "end" && b.trigger == afterSemicolon:
		b.trigger = afterEnd
	default:
		b.trigger = inTrigger
	}
}

// trim takes blanks away, those that servers know.
func trim(text string) string { return strings.Trim(text, " \t\n\r\f\v") }

// Reset forgets what is not complete. A DELIMITER stays.
func (s *Splitter) Reset() {
	*s = Splitter{lex: lexer{engine: s.lex.engine}, delimiter: s.delimiter}
}

// Text is all that waits for its end, as it was fed.
func (s *Splitter) Text() string { return s.text.String() }

// Len is how many bytes Text has.
func (s *Splitter) Len() int { return s.text.Len() }

// Pending is the statement that is not complete yet; "" if nothing but blanks and
// comments waits.
func (s *Splitter) Pending() string {
	if !s.begun {
		return ""
	}
	return trim(s.text.String())
}

// Empty tells that nothing waits: not even a comment that is open.
func (s *Splitter) Empty() bool { return !s.begun && s.lex.open == 0 }

// Open is what is not closed: one of ' " ` [, $ for a dollar quote, * for a comment,
// or 0.
func (s *Splitter) Open() byte { return s.lex.open }

// Quoted tells that a text in quotes is not closed.
func (s *Splitter) Quoted() bool { return s.lex.open != 0 && s.lex.open != '*' }

// Mark is what a prompt shows of a statement that goes on: what is open, ( or -; =
// where one begins.
func (s *Splitter) Mark() string {
	switch {
	case s.lex.open != 0:
		return string(rune(s.lex.open))
	case s.parens > 0:
		return "("
	case s.begun:
		return "-"
	}
	return "="
}
