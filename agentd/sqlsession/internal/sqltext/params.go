package sqltext

import (
	"fmt"
	"sort"
	"strings"
	"unicode/utf8"
)

// MaxParameters is how many values a statement can have: the protocol counts
// them in 16 bits.
const MaxParameters = 65535

// Statement is a text whose placeholders have become $1, $2, ...
type Statement struct {
	// Text goes to the server.
	Text string
	// Names says which parameter is $1, $2, ...
	Names []string

	original string
	edits    []edit
}

// edit is one placeholder's replacement, in characters from 0.
type edit struct {
	from, fromLen int // in the text that the user gave
	to, toLen     int // in Text
}

// Bind finds the placeholders {{name}} and :name of a text. given are the
// names of the values at hand. A name that has no value, and a value that no
// placeholder uses, is an error. A text without values may use the server's
// own $1 only to be told that it has none.
//
// Within [ ] a colon may also be that of an array slice. There :name is none
// when an operand stands right before it (a[1:n]), and elsewhere only if there
// is a value of that name. {{name}} is always a placeholder.
func Bind(text string, given []string) (*Statement, error) {
	known := make(map[string]bool, len(given))
	for _, name := range given {
		if !isName(name) {
			return nil, fmt.Errorf("%q is not a parameter's name: use letters, digits and _", name)
		}
		if known[name] {
			return nil, fmt.Errorf("parameter %q is given twice", name)
		}
		known[name] = true
	}
	s := &Statement{original: text}
	var (
		out      strings.Builder
		numbers  = make(map[string]int)
		brackets int
		operand  bool // the token right before can end an expression
		position int  // characters of text so far
		written  int  // characters of out so far
		scan     = scanner{text: text}
	)
	for {
		t, ok := scan.next()
		if !ok {
			break
		}
		length := utf8.RuneCountInString(t.text)
		name := ""
		switch t.kind {
		case native:
			return nil, fmt.Errorf("position %d: %s is not supported: write {{name}} or :name and give a value for it", position+1, t.text)
		case symbol:
			switch t.text {
			case "[":
				brackets++
			case "]":
				brackets = max(0, brackets-1)
			}
		case brace:
			name = strings.TrimSpace(t.text[2 : len(t.text)-2])
		case variable:
			if name = t.text[1:]; brackets > 0 && (operand || !known[name]) {
				name = ""
			}
		}
		operand = t.kind != space && (t.kind != symbol || t.text == ")" || t.text == "]")
		replacement := t.text
		if name != "" {
			if !known[name] {
				return nil, fmt.Errorf("position %d: no value is given for parameter %q", position+1, name)
			}
			n := numbers[name]
			if n == 0 {
				s.Names = append(s.Names, name)
				n = len(s.Names)
				numbers[name] = n
			}
			replacement = fmt.Sprintf("$%d", n)
			// $1 followed by a digit or letter would be another token.
			if next := scan.peek(0); isWord(next) {
				replacement += " "
			}
			// a:name would make a$1, one identifier.
			if position > 0 && isWord(text[scan.at-len(t.text)-1]) {
				replacement = " " + replacement
			}
			s.edits = append(s.edits, edit{position, length, written, len(replacement)})
		}
		out.WriteString(replacement)
		position += length
		if name != "" {
			written += len(replacement)
		} else {
			written += length
		}
	}
	if len(s.Names) > MaxParameters {
		return nil, fmt.Errorf("the statement has %d parameters, more than %d", len(s.Names), MaxParameters)
	}
	var unused []string
	for name := range known {
		if numbers[name] == 0 {
			unused = append(unused, name)
		}
	}
	if len(unused) > 0 {
		sort.Strings(unused)
		return nil, fmt.Errorf("the statement does not use parameter %q: write {{%s}} or :%s where its value belongs", unused[0], unused[0], unused[0])
	}
	s.Text = out.String()
	return s, nil
}

// Position turns the server's 1-based position in Text into that in the
// user's text; both count characters. 0 stays 0.
func (s *Statement) Position(position int) int {
	if position <= 0 {
		return 0
	}
	at, shift := position-1, 0
	for _, e := range s.edits {
		if at < e.to {
			break
		}
		if at < e.to+e.toLen {
			return e.from + 1
		}
		shift += e.fromLen - e.toLen
	}
	at += shift
	return min(at+1, utf8.RuneCountInString(s.original)+1)
}
