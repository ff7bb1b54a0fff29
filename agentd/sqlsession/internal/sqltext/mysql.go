package sqltext

import (
	"errors"
	"iter"
	"strings"
	"unicode/utf8"
)

// MySQL is the dialect of MySQL and MariaDB as our sessions set it up: sql_mode
// without ANSI_QUOTES, NO_BACKSLASH_ESCAPES and ORACLE.
var MySQL = &Dialect{
	Placeholder: func(int) string { return "?" },
	Identifier:  mysqlIdentifier,
	// IN and NOT IN of a query without rows are false and true, also for NULL.
	EmptyList: "SELECT NULL FROM DUAL WHERE FALSE",
	lex:       (*scanner).scanMySQL,
}

// maxMySQLName is how many characters an identifier can have.
const maxMySQLName = 64

func mysqlIdentifier(name string) (string, error) {
	switch {
	case name == "":
		return "", errors.New("an identifier can't be empty")
	case !utf8.ValidString(name):
		return "", errors.New("an identifier must be UTF-8")
	case strings.ContainsRune(name, 0):
		return "", errors.New("an identifier can't hold a NUL character")
	case utf8.RuneCountInString(name) > maxMySQLName:
		return "", errors.New("an identifier has 64 characters at most")
	case strings.HasSuffix(name, " "):
		return "", errors.New("an identifier can't end with a space")
	}
	return "`" + strings.ReplaceAll(name, "`", "``") + "`", nil
}

// scanMySQL passes one token as sql_lex.cc does.
func (s *scanner) scanMySQL() kind {
	c := s.text[s.at]
	switch {
	case isSpace(c):
		for s.at < len(s.text) && isSpace(s.text[s.at]) {
			s.at++
		}
		return space
	case c == '#', c == '-' && s.peek(1) == '-' && (s.at+2 == len(s.text) || s.peek(2) <= ' ' || s.peek(2) == 0x7f):
		for s.at < len(s.text) && s.text[s.at] != '\n' {
			s.at++
		}
		return space
	case c == '/' && s.peek(1) == '*':
		s.plainComment()
		return space
	case c == '\'', c == '"':
		s.mysqlString(c)
		return literal
	case c == '`':
		s.quotedText('`', false)
		return quoted
	case c == '?':
		s.at++
		return native
	case isWordStart(c), c == '$':
		for s.at < len(s.text) && isWord(s.text[s.at]) {
			s.at++
		}
		return word
	case isDigit(c), c == '.' && isDigit(s.peek(1)):
		s.mysqlNumber()
		return number
	case c == '{' && s.peek(1) == '{':
		return s.brace()
	case c == ':':
		return s.colon()
	}
	s.at++
	return symbol
}

// mysqlString passes a string, in which a backslash takes the next character's
// meaning and a doubled quote is one.
func (s *scanner) mysqlString(quote byte) {
	for s.at++; s.at < len(s.text); s.at++ {
		switch s.text[s.at] {
		case '\\':
			s.at++
		case quote:
			if s.peek(1) != quote {
				s.at++
				return
			}
			s.at++
		}
	}
	s.at = len(s.text)
}

// plainComment passes a comment that does not nest.
func (s *scanner) plainComment() {
	if end := strings.Index(s.text[s.at+2:], "*/"); end >= 0 {
		s.at += 2 + end + 2
	} else {
		s.at = len(s.text)
	}
}

// mysqlNumber passes digits, 0x1f, 0b01, a point, an exponent. What follows it
// without a space between may belong to the same token for the server.
func (s *scanner) mysqlNumber() {
	if s.text[s.at] == '0' && (s.peek(1) == 'x' || s.peek(1) == 'b') && isHex(s.peek(2)) {
		for s.at += 2; s.at < len(s.text) && isHex(s.text[s.at]); s.at++ {
		}
		return
	}
	point := false
	for s.at < len(s.text) {
		c := s.text[s.at]
		switch {
		case isDigit(c):
		case c == '.' && !point:
			point = true
		case (c == 'e' || c == 'E') && (isDigit(s.peek(1)) || (s.peek(1) == '+' || s.peek(1) == '-') && isDigit(s.peek(2))):
			s.at += 2
			for s.at < len(s.text) && isDigit(s.text[s.at]) {
				s.at++
			}
			return
		default:
			return
		}
		s.at++
	}
}

// PieceKind is what a Piece is.
type PieceKind uint8

// The kinds of pieces.
const (
	KindComment    PieceKind = iota // with its marks
	KindWord                        // an identifier or keyword without quotes
	KindIdentifier                  // an identifier in quotes; Text is the name
	KindLiteral                     // a string, with its quotes
	KindNumber                      // 1, 1.5e3, 0x1f
	KindSymbol                      // one character of anything else, or :=
	KindValue                       // a placeholder
)

// Piece is a piece of a text that means something.
type Piece struct {
	Kind PieceKind
	Text string
	// Position is where it begins, in characters from 1.
	Position int
	// Joined says that it follows the token before without white space.
	Joined bool
	// Open says that a quote or comment is not closed.
	Open bool
}

// Pieces cuts a text; white space is left out.
func (d *Dialect) Pieces(text string) iter.Seq[Piece] {
	return func(yield func(Piece) bool) {
		scan := scanner{text: text, lex: d.lex}
		position, joined := 1, false
		for {
			t, ok := scan.next()
			if !ok {
				return
			}
			out := Piece{Text: t.text, Position: position, Joined: joined}
			position += utf8.RuneCountInString(t.text)
			joined = true
			switch t.kind {
			case space:
				if isSpace(t.text[0]) {
					joined = false
					continue
				}
				out.Kind = KindComment
				out.Open = strings.HasPrefix(t.text, "/*") && (len(t.text) < 4 || !strings.HasSuffix(t.text, "*/"))
				joined = false
			case word:
				out.Kind = KindWord
			case quoted:
				out.Kind = KindIdentifier
				out.Text, out.Open = unquoted(t.text)
			case literal:
				out.Kind, out.Open = KindLiteral, open(t.text)
			case number:
				out.Kind = KindNumber
			case native, brace, variable:
				out.Kind = KindValue
			default:
				out.Kind = KindSymbol
			}
			if !yield(out) {
				return
			}
		}
	}
}

// unquoted is the name in quotes.
func unquoted(text string) (name string, isOpen bool) {
	q := text[:1]
	end := q
	if q == "[" {
		end = "]"
	}
	if len(text) < 2 || !strings.HasSuffix(text, end) {
		return text[1:], true
	}
	inner := text[1 : len(text)-1]
	if q != "[" {
		if strings.Count(inner, q)%2 != 0 {
			return inner, true
		}
		inner = strings.ReplaceAll(inner, q+q, q)
	}
	return inner, false
}

// open tells whether a string with backslash escapes is not closed.
func open(text string) bool {
	q := text[0]
	for i := 1; i < len(text); i++ {
		switch {
		case text[i] == '\\':
			i++
		case text[i] == q && i+1 < len(text) && text[i+1] == q:
			i++
		case text[i] == q:
			return i != len(text)-1
		}
	}
	return true
}

// FirstWord is the first word of a text of the dialect, behind comments and opening
// parentheses; "" if it begins with something else.
func FirstWord(d *Dialect, text string) string {
	for t := range d.Pieces(text) {
		switch {
		case t.Kind == KindComment, t.Text == "(", t.Text == ";":
		case t.Kind == KindWord:
			return t.Text
		default:
			return ""
		}
	}
	return ""
}
