package sqltext

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

const (
	// MaxList is how many elements a list may have.
	MaxList = 10_000
	// maxParts is how many names an identifier may have: schema, table, column.
	maxParts = 3
	// maxPostgresName is the longest name in bytes; PostgreSQL would cut a longer
	// one, and so mean another.
	maxPostgresName = 63
)

// identifiers writes a value as an identifier: one to three names with points
// between. A name in double quotes may have points of its own.
func (d *Dialect) identifiers(value string) (string, error) {
	parts, err := splitIdentifier(value)
	if err != nil {
		return "", err
	}
	for i, part := range parts {
		if parts[i], err = d.Identifier(part); err != nil {
			return "", err
		}
	}
	return strings.Join(parts, "."), nil
}

// splitIdentifier cuts schema.table and "my schema"."my.table" into names.
func splitIdentifier(value string) ([]string, error) {
	var parts []string
	for rest := value; ; {
		var name string
		if strings.HasPrefix(rest, `"`) {
			end := 1
			for ; ; end++ {
				i := strings.IndexByte(rest[end:], '"')
				if i < 0 {
					return nil, errors.New("the identifier has a quote that is not closed")
				}
				if end += i; !strings.HasPrefix(rest[end+1:], `"`) {
					break
				}
				end++
			}
			name = strings.ReplaceAll(rest[1:end], `""`, `"`)
			rest = rest[end+1:]
			if rest != "" && rest[0] != '.' {
				return nil, errors.New("the identifier has text behind a closed quote")
			}
		} else {
			end := strings.IndexByte(rest, '.')
			if end < 0 {
				end = len(rest)
			}
			name, rest = rest[:end], rest[end:]
		}
		if parts = append(parts, name); len(parts) > maxParts {
			return nil, fmt.Errorf("the identifier has more than %d names", maxParts)
		}
		if rest == "" {
			return parts, nil
		}
		rest = rest[1:]
	}
}

// postgresIdentifier is the server's quote_ident, always with quotes.
func postgresIdentifier(name string) (string, error) {
	switch {
	case name == "":
		return "", errors.New("an identifier has at least one character")
	case !utf8.ValidString(name):
		return "", errors.New("the identifier is not valid UTF-8")
	case strings.IndexByte(name, 0) >= 0:
		return "", errors.New("the identifier has a NUL character")
	case len(name) > maxPostgresName:
		return "", fmt.Errorf("the identifier has %d bytes, more than %d: the server would cut it", len(name), maxPostgresName)
	}
	return `"` + strings.ReplaceAll(name, `"`, `""`) + `"`, nil
}

// listElements are the elements of a list: those of a JSON array, or the value
// itself where it does not begin like one.
func listElements(value *string) ([]*string, error) {
	if value == nil {
		return nil, errors.New("it is NULL, which is no list")
	}
	if !strings.HasPrefix(strings.TrimSpace(*value), "[") {
		return []*string{value}, nil
	}
	return jsonElements(*value)
}

// jsonElements are the elements of a JSON array in the text form of values:
// texts and numbers as they stand, true and false, nil for null.
func jsonElements(value string) ([]*string, error) {
	malformed := errors.New("the list is no JSON array of texts, numbers, true, false and null: write it as in [1,2,3]")
	in := json.NewDecoder(strings.NewReader(value))
	in.UseNumber()
	if t, err := in.Token(); err != nil || t != json.Delim('[') {
		return nil, malformed
	}
	elements := []*string{}
	for in.More() {
		if len(elements) == MaxList {
			return nil, fmt.Errorf("the list has more than %d elements", MaxList)
		}
		before := in.InputOffset()
		t, err := in.Token()
		if err != nil {
			return nil, malformed
		}
		var text string
		switch t := t.(type) {
		case nil:
			elements = append(elements, nil)
			continue
		case string:
			// What is half a surrogate pair would silently become U+FFFD.
			source := strings.ToLower(value[before:in.InputOffset()])
			if strings.ContainsRune(t, utf8.RuneError) && !strings.ContainsRune(source, utf8.RuneError) && !strings.Contains(source, `\ufffd`) {
				return nil, errors.New("the list has a text that is not valid Unicode")
			}
			text = t
		case json.Number:
			text = t.String()
		case bool:
			text = fmt.Sprint(t)
		default:
			return nil, malformed
		}
		elements = append(elements, &text)
	}
	if t, err := in.Token(); err != nil || t != json.Delim(']') || strings.TrimSpace(value[in.InputOffset():]) != "" {
		return nil, malformed
	}
	return elements, nil
}

// ArrayLiteral turns a JSON array into PostgreSQL's text form of an array; other
// texts are returned as they are, for the server to judge.
func ArrayLiteral(value string) string {
	if !strings.HasPrefix(strings.TrimSpace(value), "[") {
		return value
	}
	elements, err := jsonElements(value)
	if err != nil {
		return value
	}
	var out strings.Builder
	out.WriteByte('{')
	for i, e := range elements {
		if i > 0 {
			out.WriteByte(',')
		}
		if e == nil {
			out.WriteString("NULL")
			continue
		}
		out.WriteByte('"')
		for _, c := range []byte(*e) {
			if c == '"' || c == '\\' {
				out.WriteByte('\\')
			}
			out.WriteByte(c)
		}
		out.WriteByte('"')
	}
	out.WriteByte('}')
	return out.String()
}
