package sqlsplit

import "slices"

// Placeholders are the names of :name, {{name}} and {{name|form}} in a statement,
// outside of quotes and comments, sorted, each once. Within [ ] a :name right behind
// an operand is the colon of an array slice (a[1:n]) and none; elsewhere there it is
// one if a value of that name is given, so it is listed.
func Placeholders(engine Engine, text string) []string {
	braced, colons := PlaceholdersByForm(engine, text)
	names := append(braced, colons...)
	slices.Sort(names)
	return slices.Compact(names)
}

// PlaceholdersByForm is Placeholders in two lists: the names that stand in {{ }}, which
// always ask for a value, and those behind a colon. A name may be in both.
func PlaceholdersByForm(engine Engine, text string) (braced, colons []string) {
	l := lexer{engine: engine}
	brackets, ends := 0, false // ends: the token before can end an expression
	for at := 0; at < len(text); {
		k, n := l.next(text[at:])
		token := text[at : at+n]
		switch {
		case k == brace:
			name, _ := braces(token)
			braced = append(braced, name)
		case k == variable && (brackets == 0 || !ends):
			colons = append(colons, token[1:])
		case token == "[" && k == symbol:
			brackets++
		case token == "]" && k == symbol:
			brackets = max(0, brackets-1)
		}
		ends = k != blank && (k != symbol || token == ")" || token == "]")
		at += n
	}
	slices.Sort(braced)
	slices.Sort(colons)
	return slices.Compact(braced), slices.Compact(colons)
}
