package sqltext

import (
	"strings"
	"unicode/utf8"
)

// kind is what a token is.
type kind uint8

const (
	space    kind = iota // white space and comments
	word                 // an identifier or keyword without quotes
	quoted               // "an identifier" or U&"one", with its quotes
	literal              // a string in any of its forms
	number               // 1, 1.5e3, 0x1f
	native               // $1
	symbol               // one character of anything else; "::" and ":=" are one token
	brace                // {{name}}, {{name|form}}
	variable             // :name
)

// token is a piece of the text; the tokens of a text join to the text.
type token struct {
	kind kind
	text string
}

// scanner cuts a text into tokens. It never fails: what is not closed reaches
// to the end, and the server complains of it.
type scanner struct {
	text string
	at   int
	// lex passes one token of another dialect; nil: of PostgreSQL's.
	lex func(*scanner) kind
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

// next returns the next token; ok is false at the end.
func (s *scanner) next() (t token, ok bool) {
	start := s.at
	if start >= len(s.text) {
		return token{}, false
	}
	lex := s.lex
	if lex == nil {
		lex = (*scanner).scan
	}
	k := lex(s)
	return token{k, s.text[start:s.at]}, true
}

func (s *scanner) peek(offset int) byte {
	if s.at+offset < len(s.text) {
		return s.text[s.at+offset]
	}
	return 0
}

func (s *scanner) scan() kind {
	c := s.text[s.at]
	switch {
	case isSpace(c):
		for s.at < len(s.text) && isSpace(s.text[s.at]) {
			s.at++
		}
		return space
	case c == '-' && s.peek(1) == '-':
		s.lineComment()
		return space
	case c == '/' && s.peek(1) == '*':
		s.blockComment()
		return space
	case c == '\'':
		s.quotedText('\'', false)
		return literal
	case c == '"':
		s.quotedText('"', false)
		return quoted
	case c == '$':
		return s.dollar()
	case isWordStart(c):
		return s.word()
	case isDigit(c), c == '.' && isDigit(s.peek(1)):
		s.number()
		return number
	case c == '{' && s.peek(1) == '{':
		return s.brace()
	case c == ':':
		return s.colon()
	}
	s.at++
	return symbol
}

func (s *scanner) lineComment() {
	for s.at < len(s.text) && s.text[s.at] != '\n' && s.text[s.at] != '\r' {
		s.at++
	}
}

// blockComment passes a comment; they nest.
func (s *scanner) blockComment() {
	depth := 0
	for s.at < len(s.text) {
		switch {
		case s.text[s.at] == '/' && s.peek(1) == '*':
			depth++
			s.at += 2
		case s.text[s.at] == '*' && s.peek(1) == '/':
			depth--
			s.at += 2
			if depth == 0 {
				return
			}
		default:
			s.at++
		}
	}
}

// quotedText passes text in quotes, in which a doubled quote is one quote and,
// with escapes, a backslash takes the next character's meaning. Adjacent
// strings separated by a line break are one to the server and two here, which
// makes no difference unless the first is E”: then the next one is, too.
func (s *scanner) quotedText(quote byte, escapes bool) {
	s.at++
	for s.at < len(s.text) {
		c := s.text[s.at]
		switch {
		case escapes && c == '\\':
			s.at += 2
			if s.at > len(s.text) {
				s.at = len(s.text)
			}
			continue
		case c == quote && s.peek(1) == quote:
			s.at += 2
			continue
		case c == quote:
			s.at++
			if !escapes || !s.continued() {
				return
			}
			continue
		}
		s.at++
	}
}

// continued tells whether, after the end of an E” string, white space with a
// line break and another quote follow; then it stands behind that quote.
func (s *scanner) continued() bool {
	at, lineBreak := s.at, false
	for at < len(s.text) {
		switch c := s.text[at]; {
		case isSpace(c):
			lineBreak = lineBreak || c == '\n' || c == '\r'
			at++
		case c == '-' && at+1 < len(s.text) && s.text[at+1] == '-':
			for at < len(s.text) && s.text[at] != '\n' && s.text[at] != '\r' {
				at++
			}
		case c == '\'' && lineBreak:
			s.at = at + 1
			return true
		default:
			return false
		}
	}
	return false
}

// dollar passes $1, $$text$$ or $tag$text$tag$.
func (s *scanner) dollar() kind {
	if isDigit(s.peek(1)) {
		s.at++
		for s.at < len(s.text) && isDigit(s.text[s.at]) {
			s.at++
		}
		return native
	}
	end := s.at + 1
	for end < len(s.text) && isWord(s.text[end]) && s.text[end] != '$' {
		end++
	}
	if end >= len(s.text) || s.text[end] != '$' {
		s.at++
		return symbol
	}
	tag := s.text[s.at : end+1]
	s.at = end + 1
	if i := strings.Index(s.text[s.at:], tag); i >= 0 {
		s.at += i + len(tag)
	} else {
		s.at = len(s.text)
	}
	return literal
}

// word passes an identifier, or the prefix of a string and the string.
func (s *scanner) word() kind {
	start := s.at
	for s.at < len(s.text) && isWord(s.text[s.at]) {
		s.at++
	}
	name := s.text[start:s.at]
	next := s.peek(0)
	if len(name) == 1 && next == '\'' {
		switch name[0] {
		case 'e', 'E':
			s.quotedText('\'', true)
			return literal
		case 'b', 'B', 'x', 'X', 'n', 'N':
			s.quotedText('\'', false)
			return literal
		}
	}
	if (name == "u" || name == "U") && next == '&' {
		switch s.peek(1) {
		case '\'':
			s.at++
			s.quotedText('\'', false)
			return literal
		case '"':
			s.at++
			s.quotedText('"', false)
			return quoted
		}
	}
	return word
}

// number passes digits, a point, an exponent, and the forms 0x1f and 1_000 of
// newer servers. 1..2 is 1, .., 2.
func (s *scanner) number() {
	point := false
	if s.text[s.at] == '0' && (s.peek(1) == 'x' || s.peek(1) == 'X') && isHex(s.peek(2)) {
		for s.at += 2; s.at < len(s.text) && (isHex(s.text[s.at]) || s.text[s.at] == '_'); s.at++ {
		}
		return
	}
	for s.at < len(s.text) {
		c := s.text[s.at]
		switch {
		case isDigit(c), c == '_' && isDigit(s.peek(1)):
		case c == '.' && !point && s.peek(1) != '.':
			point = true
		case (c == 'e' || c == 'E') && (isDigit(s.peek(1)) || (s.peek(1) == '+' || s.peek(1) == '-') && isDigit(s.peek(2))):
			s.at++
		default:
			return
		}
		s.at++
	}
}

// brace passes {{name}} and {{name|form}}; two braces that are no placeholder
// are symbols.
func (s *scanner) brace() kind {
	// A bounded look ahead: a text of nothing but braces must not take
	// quadratic time.
	const longest = 256
	end := strings.Index(s.text[s.at:min(len(s.text), s.at+longest)], "}}")
	if end < 0 {
		s.at++
		return symbol
	}
	name, form, has := strings.Cut(s.text[s.at+2:s.at+end], "|")
	if !isName(strings.TrimSpace(name)) || has && !isName(strings.TrimSpace(form)) {
		s.at++
		return symbol
	}
	s.at += end + 2
	return brace
}

func (s *scanner) colon() kind {
	switch next := s.peek(1); {
	case next == ':', next == '=':
		s.at += 2
		return symbol
	case isWordStart(next) && next < utf8.RuneSelf:
		s.at++
		for s.at < len(s.text) && isName(s.text[s.at:s.at+1]) || s.at < len(s.text) && isDigit(s.text[s.at]) {
			s.at++
		}
		return variable
	}
	s.at++
	return symbol
}

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
