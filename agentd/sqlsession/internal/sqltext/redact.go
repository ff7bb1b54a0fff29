package sqltext

import "strings"

// Redact replaces every literal in an expression, as the server writes it into a
// plan, by a question mark: strings, numbers, and TRUE, FALSE and NULL that are no
// part of IS TRUE and the like.
func Redact(text string) string {
	var (
		out      strings.Builder
		scan     = scanner{text: text}
		last     string // the last word, in lower case; "" behind anything else
		beforeIt string
	)
	out.Grow(len(text))
	for {
		t, ok := scan.next()
		if !ok {
			return out.String()
		}
		if t.kind == space {
			// A comment is none of the server's.
			out.WriteByte(' ')
			continue
		}
		lower := ""
		switch t.kind {
		case literal:
			out.WriteByte('?')
		case number:
			if last == "subplan" || last == "initplan" {
				out.WriteString(t.text)
			} else {
				out.WriteByte('?')
			}
		case word:
			lower = strings.ToLower(t.text)
			is := last == "is" || last == "not" && beforeIt == "is"
			if (lower == "true" || lower == "false" || lower == "null") && !is {
				out.WriteByte('?')
			} else {
				out.WriteString(t.text)
			}
		default:
			out.WriteString(t.text)
		}
		beforeIt, last = last, lower
	}
}
