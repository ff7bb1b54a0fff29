package sqltext

import "strings"

// FirstKeyword is the first word of the text in lower case, behind comments,
// empty statements and opening parentheses. It is "" when the text says
// nothing, and "?" when it starts with something that is no word.
func FirstKeyword(text string) string {
	scan := scanner{text: text}
	for {
		t, ok := scan.next()
		if !ok {
			return ""
		}
		switch {
		case t.kind == space, t.text == ";", t.text == "(":
		case t.kind == word:
			return strings.ToLower(t.text)
		default:
			return "?"
		}
	}
}

// nullWords begin what can make a NULL of a column that has none, or mix a column
// with others.
var nullWords = map[string]bool{
	"left": true, "right": true, "full": true, "outer": true, "rollup": true, "cube": true, "grouping": true, "merge": true,
	"union": true, "intersect": true, "except": true,
}

// MayAddNulls tells whether a NULL may come out of a column of the text's result
// although the column that it is of is NOT NULL: by an outer join and the like. It
// says so too often rather than too rarely.
func MayAddNulls(text string) bool {
	scan := scanner{text: text}
	for {
		t, ok := scan.next()
		if !ok {
			return false
		}
		if t.kind == word && nullWords[strings.ToLower(t.text)] {
			return true
		}
	}
}
