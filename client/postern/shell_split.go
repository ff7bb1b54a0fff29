package main

import "strings"

// splitter cuts what is typed into statements. It knows what hides a semicolon:
// quotes, dollar quotes, comments, parentheses and the bodies of BEGIN ATOMIC. The
// server has the last word on what is right.
type splitter struct {
	text  strings.Builder
	state rune   // 0, or ' " $ * (comment) as long as it is open
	tag   string // of a dollar quote
	depth int    // of block comments
	// escapes: backslashes count in the string.
	escapes bool
	parens  int
	// words are the first of the statement, body the depth of BEGIN ATOMIC.
	words []string
	body  int
	// begun: there is something else than blanks and comments.
	begun bool
}

// feed takes a line with its line break and returns the statements that end in it,
// without their semicolons.
func (s *splitter) feed(line string) (complete []string) {
	start := 0
	for i := 0; i < len(line); {
		c := line[i]
		rest := line[i:]
		switch {
		case s.state == '\'' || s.state == '"':
			switch {
			case s.escapes && c == '\\' && len(rest) > 1:
				i++
			case byte(s.state) == c && strings.HasPrefix(rest[1:], string(s.state)):
				i++
			case byte(s.state) == c:
				s.state, s.escapes = 0, false
			}
			i++
		case s.state == '$':
			if strings.HasPrefix(rest, s.tag) {
				s.state = 0
				i += len(s.tag)
			} else {
				i++
			}
		case s.state == '*':
			switch {
			case strings.HasPrefix(rest, "/*"):
				s.depth++
				i += 2
			case strings.HasPrefix(rest, "*/"):
				if s.depth--; s.depth == 0 {
					s.state = 0
				}
				i += 2
			default:
				i++
			}
		case strings.HasPrefix(rest, "--"):
			end := strings.IndexByte(rest, '\n')
			if end < 0 {
				end = len(rest)
			}
			i += end
		case strings.HasPrefix(rest, "/*"):
			s.state, s.depth = '*', 1
			i += 2
		case c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f' || c == '\v':
			i++
		case c == '\'' || c == '"':
			s.begun, s.state = true, rune(c)
			i++
		case c == '$':
			s.begun = true
			if tag := dollarTag(rest); tag != "" {
				s.state, s.tag = '$', tag
				i += len(tag)
			} else {
				i++
			}
		case wordByte(c) && !(c >= '0' && c <= '9'):
			s.begun = true
			n := 1
			for n < len(rest) && (wordByte(rest[n]) || rest[n] == '$') {
				n++
			}
			if word := rest[:n]; (word == "e" || word == "E") && n < len(rest) && rest[n] == '\'' {
				s.state, s.escapes = '\'', true
				n++
			} else {
				s.word(strings.ToLower(word))
			}
			i += n
		case c == ';' && s.parens <= 0 && s.body == 0:
			s.text.WriteString(line[start:i])
			if s.begun {
				complete = append(complete, strings.TrimSpace(s.text.String()))
			}
			s.reset()
			i++
			start = i
		default:
			s.begun = true
			switch c {
			case '(':
				s.parens++
			case ')':
				s.parens--
			}
			i++
		}
	}
	if s.begun || s.state != 0 || strings.TrimSpace(line[start:]) != "" {
		s.text.WriteString(line[start:])
	}
	return complete
}

// word follows the bodies of SQL functions, whose statements have semicolons.
func (s *splitter) word(word string) {
	if len(s.words) < 4 {
		s.words = append(s.words, word)
	}
	if s.words[0] != "create" {
		return
	}
	routine := false
	for _, w := range s.words {
		routine = routine || w == "function" || w == "procedure"
	}
	switch {
	case !routine:
	case word == "begin":
		s.body++
	case word == "case" && s.body > 0:
		s.body++
	case word == "end" && s.body > 0:
		s.body--
	}
}

func (s *splitter) reset() { *s = splitter{} }

// pending is what is typed and not complete yet.
func (s *splitter) pending() string {
	if !s.begun {
		return ""
	}
	return strings.TrimSpace(s.text.String())
}

// empty tells that nothing waits: not even a comment that is open.
func (s *splitter) empty() bool { return !s.begun && s.state == 0 }

// mark is what the prompt shows of a statement that goes on.
func (s *splitter) mark() string {
	switch {
	case s.state != 0:
		return string(s.state)
	case s.parens > 0:
		return "("
	case s.begun:
		return "-"
	}
	return "="
}

func wordByte(c byte) bool {
	return c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c >= 0x80
}

// dollarTag is $tag$ at the beginning of text, or "".
func dollarTag(text string) string {
	for i := 1; i < len(text); i++ {
		switch c := text[i]; {
		case c == '$':
			return text[:i+1]
		case !wordByte(c), i == 1 && c >= '0' && c <= '9':
			return ""
		}
	}
	return ""
}

// placeholders are the names of :name and {{name}} in a statement, outside quotes
// and comments.
func placeholders(text string) map[string]bool {
	names := make(map[string]bool)
	s := &splitter{}
	for i := 0; i < len(text); {
		if s.state == 0 {
			if name, n := placeholder(text, i); n > 0 {
				names[name] = true
				i += n
				continue
			}
		}
		// One token at a time, so that the state is known at each.
		n := tokenLength(s, text[i:])
		s.feed(text[i : i+n])
		i += n
	}
	return names
}

// tokenLength is how much of text to feed at once: what only makes sense together.
func tokenLength(s *splitter, text string) int {
	c := text[0]
	switch {
	case s.state == '$' && strings.HasPrefix(text, s.tag):
		return len(s.tag)
	case (s.state == '\'' || s.state == '"') && len(text) > 1 && (s.escapes && c == '\\' || byte(s.state) == c && text[1] == c):
		return 2
	case s.state != 0 && s.state != '*':
		return 1
	case strings.HasPrefix(text, "--"):
		if end := strings.IndexByte(text, '\n'); end >= 0 {
			return end
		}
		return len(text)
	case strings.HasPrefix(text, "/*"), strings.HasPrefix(text, "*/"):
		return 2
	case s.state == '*':
		return 1
	case c == '$':
		if tag := dollarTag(text); tag != "" {
			return len(tag)
		}
	case wordByte(c):
		n := 1
		for n < len(text) && (wordByte(text[n]) || text[n] == '$') {
			n++
		}
		if n == 1 && (c == 'e' || c == 'E') && len(text) > 1 && text[1] == '\'' {
			return 2
		}
		return n
	}
	return 1
}

// placeholder is the name of the placeholder at i, and its length.
func placeholder(text string, i int) (string, int) {
	rest := text[i:]
	switch {
	case strings.HasPrefix(rest, "{{"):
		end := strings.Index(rest, "}}")
		if end < 0 {
			return "", 0
		}
		name, _, _ := strings.Cut(rest[2:end], "|")
		if name = strings.TrimSpace(name); !validName(name) {
			return "", 0
		}
		return name, end + 2
	case rest[0] == ':' && (i == 0 || text[i-1] != ':'):
		n := 1
		for n < len(rest) && rest[n] < 0x80 && wordByte(rest[n]) {
			n++
		}
		if !validName(rest[1:n]) {
			return "", 0
		}
		return rest[1:n], n
	}
	return "", 0
}
