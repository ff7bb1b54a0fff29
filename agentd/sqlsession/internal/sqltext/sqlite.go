package sqltext

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// SQLite is the dialect of SQLite.
var SQLite = &Dialect{
	Placeholder: func(n int) string { return fmt.Sprintf("?%d", n) },
	Numbered:    true,
	Identifier: func(name string) (string, error) {
		switch {
		case name == "":
			return "", errors.New("an identifier can't be empty")
		case !utf8.ValidString(name):
			return "", errors.New("an identifier must be UTF-8")
		case strings.ContainsRune(name, 0):
			return "", errors.New("an identifier can't hold a NUL character")
		}
		return `"` + strings.ReplaceAll(name, `"`, `""`) + `"`, nil
	},
	lex: (*scanner).scanSQLite,
}

// scanSQLite passes one token as tokenize.c does.
func (s *scanner) scanSQLite() kind {
	c := s.text[s.at]
	switch {
	case isSpace(c):
		for s.at < len(s.text) && isSpace(s.text[s.at]) {
			s.at++
		}
		return space
	case c == '-' && s.peek(1) == '-':
		for s.at < len(s.text) && s.text[s.at] != '\n' {
			s.at++
		}
		return space
	case c == '/' && s.peek(1) == '*':
		s.plainComment()
		return space
	case c == '\'':
		s.quotedText(c, false)
		return literal
	case c == '"', c == '`':
		s.quotedText(c, false)
		return quoted
	case c == '[':
		if end := strings.IndexByte(s.text[s.at:], ']'); end >= 0 {
			s.at += end + 1
		} else {
			s.at = len(s.text)
		}
		return quoted
	case c == '?', c == '@', c == '$':
		for s.at++; s.at < len(s.text) && isWord(s.text[s.at]); s.at++ {
		}
		return native
	case isWordStart(c):
		for s.at < len(s.text) && isWord(s.text[s.at]) {
			s.at++
		}
		if name := s.text[s.at-1]; (name == 'x' || name == 'X') && s.peek(0) == '\'' {
			s.quotedText('\'', false)
			return literal
		}
		return word
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
