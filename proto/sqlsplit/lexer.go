package sqlsplit

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// Engine names an engine as data sources do.
type Engine string

// The engines. MariaDB is MySQL here.
const (
	Postgres Engine = "postgres" // with standard_conforming_strings on
	MySQL    Engine = "mysql"    // sql_mode without ANSI_QUOTES and NO_BACKSLASH_ESCAPES
	SQLite   Engine = "sqlite"
)

// ParseEngine knows the engines by name. The error is one line.
func ParseEngine(name string) (Engine, error) {
	switch e := Engine(name); e {
	case Postgres, MySQL, SQLite:
		return e, nil
	}
	return "", fmt.Errorf("unknown engine %q: this version knows postgres, mysql and sqlite", name)
}

// kind is what a token is.
type kind uint8

const (
	blank    kind = iota // white space and comments, or a part of one
	word                 // an identifier or keyword without quotes
	quote                // a text in quotes, or a part of one
	operand              // a number, or a placeholder of the engine's own
	symbol               // anything else
	brace                // {{name}}, {{name|form}}
	variable             // :name
)

// maxBrace is how many bytes {{name|form}} can have.
const maxBrace = 256

// lexer cuts lines into tokens. What is open at the end of a line, it remembers.
type lexer struct {
	engine Engine
	// open is what is not closed: ' " ` [ or $ (a dollar quote) or * (a comment);
	// 0 is nothing.
	open byte
	// escapes: a backslash takes the next character's meaning in the text that is open.
	escapes bool
	tag     string // of a dollar quote
	depth   int    // of PostgreSQL's comments, which nest
	// continues says that an E'' of PostgreSQL has just ended; with lineBreak, another
	// quote would go on with it.
	continues, lineBreak bool
}

// next is the token, or the part of one, that text begins with. text is the rest of a
// line, not empty; n is at least 1.
func (l *lexer) next(text string) (k kind, n int) {
	switch l.open {
	case 0:
	case '*':
		return blank, l.comment(text)
	default:
		return quote, l.quoted(text)
	}
	c := text[0]
	if isSpace(c) {
		for n = 0; n < len(text) && isSpace(text[n]); n++ {
			l.lineBreak = l.lineBreak || text[n] == '\n' || text[n] == '\r'
		}
		return blank, n
	}
	if n := l.lineComment(text); n > 0 {
		return blank, n
	}
	continued := l.continues && l.lineBreak
	l.continues, l.lineBreak = false, false
	switch {
	case strings.HasPrefix(text, "/*"):
		l.open, l.depth = '*', 1
		if l.engine == MySQL && (strings.HasPrefix(text, "/*!") || len(text) > 3 && strings.EqualFold(text[:4], "/*M!")) {
			return symbol, 2 // the server runs what stands in it
		}
		return blank, 2
	case c == '\'', c == '"', c == '`' && l.engine != Postgres, c == '[' && l.engine == SQLite:
		l.open = c
		l.escapes = l.engine == MySQL && c != '`' || c == '\'' && continued
		return quote, 1
	case c == '$' && l.engine == Postgres:
		return l.dollar(text)
	case c == '?' && l.engine == MySQL:
		return operand, 1
	case (c == '?' || c == '@' || c == '$') && l.engine == SQLite:
		for n = 1; n < len(text) && isWord(text[n]); n++ {
		}
		return operand, n
	case isWordStart(c), c == '$' && l.engine == MySQL:
		for n = 1; n < len(text) && isWord(text[n]); n++ {
		}
		if l.engine == Postgres && (text[:n] == "e" || text[:n] == "E") && n < len(text) && text[n] == '\'' {
			l.open, l.escapes = '\'', true
			return quote, n + 1
		}
		return word, n
	case isDigit(c), c == '.' && len(text) > 1 && isDigit(text[1]):
		return operand, l.number(text)
	case strings.HasPrefix(text, "{{"):
		if _, n := braces(text); n > 0 {
			return brace, n
		}
	case strings.HasPrefix(text, "::"), strings.HasPrefix(text, ":="):
		return symbol, 2
	case c == ':' && len(text) > 1 && text[1] < utf8.RuneSelf && isWordStart(text[1]):
		for n = 2; n < len(text) && text[n] < utf8.RuneSelf && isWord(text[n]) && text[n] != '$'; n++ {
		}
		return variable, n
	}
	return symbol, 1
}

// lineComment is the length of the comment to the end of the line that text begins
// with, without the line break; 0 is none.
func (l *lexer) lineComment(text string) int {
	ends := "\n"
	switch {
	case l.engine == MySQL && text[0] == '#':
	case !strings.HasPrefix(text, "--"):
		return 0
	case l.engine == MySQL && len(text) > 2 && text[2] > ' ' && text[2] != 0x7f:
		return 0 // 1--1 is a difference there
	case l.engine == Postgres:
		ends = "\n\r"
	}
	if n := strings.IndexAny(text, ends); n >= 0 {
		return n
	}
	return len(text)
}

// comment passes what is open of a comment.
func (l *lexer) comment(text string) int {
	for n := 0; n < len(text); n++ {
		switch {
		case strings.HasPrefix(text[n:], "*/"):
			if l.depth--; l.depth == 0 {
				l.open = 0
				return n + 2
			}
			n++
		case l.engine == Postgres && strings.HasPrefix(text[n:], "/*"):
			l.depth++
			n++
		}
	}
	return len(text)
}

// quoted passes what is open of a text in quotes.
func (l *lexer) quoted(text string) int {
	if l.open == '$' {
		if n := strings.Index(text, l.tag); n >= 0 {
			l.open = 0
			return n + len(l.tag)
		}
		return len(text)
	}
	end := l.open
	if end == '[' {
		end = ']'
	}
	for n := 0; n < len(text); n++ {
		switch {
		case l.escapes && text[n] == '\\':
			n++
		case text[n] != end:
		case end != ']' && n+1 < len(text) && text[n+1] == end:
			n++
		default:
			l.continues = l.engine == Postgres && l.escapes
			l.open, l.escapes = 0, false
			return n + 1
		}
	}
	return len(text)
}

// dollar passes $1, or begins $tag$.
func (l *lexer) dollar(text string) (k kind, n int) {
	n = 1
	if n < len(text) && isDigit(text[n]) {
		for n < len(text) && isDigit(text[n]) {
			n++
		}
		return operand, n
	}
	for n < len(text) && isWord(text[n]) && text[n] != '$' {
		n++
	}
	if n == len(text) || text[n] != '$' {
		return symbol, 1
	}
	l.open, l.tag = '$', text[:n+1]
	return quote, n + 1
}

// number is the length of the number that text begins with. It matters in front of a
// letter that would be a prefix of a text in quotes.
func (l *lexer) number(text string) int {
	at := func(i int) byte {
		if i < len(text) {
			return text[i]
		}
		return 0
	}
	if x := at(1); text[0] == '0' && isHex(at(2)) && (x == 'x' || x == 'X' && l.engine != MySQL || x == 'b' && l.engine == MySQL) {
		n := 2
		for n < len(text) && (isHex(text[n]) || text[n] == '_' && l.engine != MySQL) {
			n++
		}
		return n
	}
	point := false
	for n := 0; ; n++ {
		switch c := at(n); {
		case isDigit(c), c == '_' && l.engine != MySQL && isDigit(at(n+1)):
		case c == '.' && !point && (at(n+1) != '.' || l.engine == MySQL):
			point = true
		case (c == 'e' || c == 'E') && (isDigit(at(n+1)) || (at(n+1) == '+' || at(n+1) == '-') && isDigit(at(n+2))):
			n++
		default:
			return n
		}
	}
}

// braces is the name in {{name}} or {{name|form}} at the beginning of text, and the
// length of all; 0 is none.
func braces(text string) (name string, n int) {
	end := strings.Index(text[:min(len(text), maxBrace)], "}}")
	if end < 0 {
		return "", 0
	}
	name, form, has := strings.Cut(text[2:end], "|")
	name = strings.TrimSpace(name)
	if !isName(name) || has && !isName(strings.TrimSpace(form)) {
		return "", 0
	}
	return name, end + 2
}

func isSpace(c byte) bool {
	return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f' || c == '\v'
}

func isWordStart(c byte) bool {
	return c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= utf8.RuneSelf
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func isHex(c byte) bool { return isDigit(c) || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F' }

func isWord(c byte) bool { return isWordStart(c) || isDigit(c) || c == '$' }

// isName tells whether text can name a parameter: [A-Za-z_][A-Za-z0-9_]*.
func isName(text string) bool {
	if text == "" || isDigit(text[0]) {
		return false
	}
	for i := range len(text) {
		if c := text[i]; !isWord(c) || c >= utf8.RuneSelf || c == '$' {
			return false
		}
	}
	return true
}
