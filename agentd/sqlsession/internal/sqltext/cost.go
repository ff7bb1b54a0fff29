package sqltext

import (
	"strings"
	"unicode/utf8"
)

// maxOperatorWork bounds the work of PostgreSQL's scanner that Laborious looks
// for, in characters looked at: under a tenth of a second of a core.
const maxOperatorWork = 16 << 20

// Laborious tells whether PostgreSQL's scanner would need time by the square of
// the text's length, and for what: position is in characters from 1.
//
// Wherever an operator or a comment begins, the scanner looks at all characters
// in a row that could be an operator, '/' and '*' among them, before it takes the
// first few. 4 MiB of "/**/" thus take hours, in which the server can't be
// interrupted, neither by its timeout nor by a cancel request.
func Laborious(text string) (position int, is bool) {
	scan := scanner{text: text}
	work, end := 0, 0 // end is that of the run of operator characters at hand
	look := func(at int) bool {
		for end = max(end, at); end < len(text) && isOperator(text[end]); {
			end++
		}
		work += end - at
		return work > maxOperatorWork
	}
	for {
		start := scan.at
		t, ok := scan.next()
		if !ok {
			return 0, false
		}
		slow := false
		switch {
		case t.kind == symbol && isOperator(t.text[0]):
			slow = look(start)
		case t.kind == space && strings.HasPrefix(t.text, "/*"):
			for i := 0; i+1 < len(t.text) && !slow; i++ {
				if t.text[i] == '/' && t.text[i+1] == '*' {
					slow = look(start + i)
				}
			}
		}
		if slow {
			return utf8.RuneCountInString(text[:start]) + 1, true
		}
	}
}

// isOperator tells whether c can be part of an operator.
func isOperator(c byte) bool { return strings.IndexByte("~!@#^&|`?+-*/%<>=", c) >= 0 }
