package sqlsplit

import (
	"slices"
	"strings"
)

// Placeholders are the names of :name, {{name}} and {{name|form}} in a statement,
// outside of quotes and comments, sorted, each once. Within [ ] a :name right behind
// an operand is the colon of an array slice (a[1:n]) and none; elsewhere there it is
// one if a value of that name is given, so it is listed.
func Placeholders(engine Engine, text string) []string {
	var names []string
	l := lexer{engine: engine}
	brackets, ends := 0, false // ends: the token before can end an expression
	for at := 0; at < len(text); {
		k, n := l.next(text[at:])
		token := text[at : at+n]
		name := ""
		switch {
		case k == brace:
			name, _ = braces(token)
		case k == variable && (brackets == 0 || !ends):
			name = token[1:]
		case token == "[" && k == symbol:
			brackets++
		case token == "]" && k == symbol:
			brackets = max(0, brackets-1)
		}
		if name != "" && !slices.Contains(names, name) {
			names = append(names, name)
		}
		ends = k != blank && (k != symbol || token == ")" || token == "]")
		at += n
	}
	slices.SortFunc(names, strings.Compare)
	return names
}
