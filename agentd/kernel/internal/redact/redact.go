package redact

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"slices"
	"strings"
)

// Value is one value of a secret; several may have one name.
type Value struct {
	Name  string
	Value []byte
}

type form struct{ text, mark string }

// Set finds the forms of values. Its memory is some 20 times that of the values. A nil
// Set finds nothing.
type Set struct {
	// filter has a bit for each hash of a form's first eight bytes.
	filter [1 << 10]uint64
	// table has the forms by their first eight bytes, the longest first.
	table map[uint64][]form
	// sorted has all forms in order, first their first bytes.
	sorted  []string
	first   [256]bool
	longest int
}

// New returns a Set; values of less than eight bytes are left out. It is nil without any.
func New(values []Value) *Set {
	s := &Set{table: map[uint64][]form{}}
	seen := map[string]bool{}
	for _, v := range values {
		mark := "[secret " + v.Name + "]"
		if len(v.Value) < minForm {
			continue
		}
		for _, text := range forms(string(v.Value)) {
			key := binary.LittleEndian.Uint64([]byte(text[:minForm]))
			if seen[text] {
				continue
			}
			seen[text] = true
			s.table[key] = append(s.table[key], form{text, mark})
			h := hash(key)
			s.filter[h>>6] |= 1 << (h & 63)
			s.sorted, s.first[text[0]] = append(s.sorted, text), true
			s.longest = max(s.longest, len(text))
		}
	}
	if s.longest == 0 {
		return nil
	}
	slices.Sort(s.sorted)
	for _, list := range s.table {
		slices.SortFunc(list, func(a, b form) int { return len(b.text) - len(a.text) })
	}
	return s
}

func hash(key uint64) uint64 { return key * 0x9e3779b97f4a7c15 >> 48 }

// find returns the first form in text at or after from; ok is false if there is none.
func (s *Set) find(text string, from int) (at int, f form, ok bool) {
	if len(text)-from < minForm {
		return 0, form{}, false
	}
	var key uint64
	for i := range minForm - 1 {
		key |= uint64(text[from+i]) << (8 * (i + 1))
	}
	for i := from; i+minForm <= len(text); i++ {
		key = key>>8 | uint64(text[i+minForm-1])<<56
		if h := hash(key); s.filter[h>>6]&(1<<(h&63)) == 0 {
			continue
		}
		for _, f := range s.table[key] {
			if strings.HasPrefix(text[i:], f.text) {
				return i, f, true
			}
		}
	}
	return 0, form{}, false
}

// Text returns text with "[secret NAME]" in the place of each form, and whether there was
// one.
func (s *Set) Text(text string) (string, bool) {
	if s == nil {
		return text, false
	}
	at, f, ok := s.find(text, 0)
	if !ok {
		return text, false
	}
	var b strings.Builder
	from := 0
	for ok {
		b.WriteString(text[from:at])
		b.WriteString(f.mark)
		from = at + len(f.text)
		at, f, ok = s.find(text, from)
	}
	b.WriteString(text[from:])
	return b.String(), true
}

// Only is Text's first result.
func (s *Set) Only(text string) string {
	text, _ = s.Text(text)
	return text
}

// Bytes is Text for what is no text.
func (s *Set) Bytes(b []byte) []byte {
	if s == nil {
		return b
	}
	if out, changed := s.Text(string(b)); changed {
		return []byte(out)
	}
	return b
}

// JSON returns a JSON text with the forms taken out of its strings, keys too. What is no
// JSON is searched as it is. Nothing else of it changes.
func (s *Set) JSON(text []byte) []byte {
	if s == nil || len(text) < minForm {
		return text
	}
	var out []byte
	kept := 0 // text[:kept] is in out
	for i := 0; i < len(text); {
		start := bytes.IndexByte(text[i:], '"')
		if start < 0 {
			break
		}
		start += i
		end, escaped := literalEnd(text, start)
		if end < 0 {
			return s.Bytes(text)
		}
		i = end
		literal := text[start:end]
		value := string(literal[1 : len(literal)-1])
		if escaped && json.Unmarshal(literal, &value) != nil {
			value = string(literal[1 : len(literal)-1])
		}
		if clean, changed := s.Text(value); changed {
			out = append(append(out, text[kept:start]...), marshal(clean)...)
			kept = end
		}
	}
	if kept == 0 {
		return text
	}
	return append(out, text[kept:]...)
}

// literalEnd returns the offset after a JSON string that begins at start, -1 if it does
// not end.
func literalEnd(text []byte, start int) (end int, escaped bool) {
	for i := start + 1; i < len(text); {
		n := bytes.IndexAny(text[i:min(len(text), i+64)], `"\`)
		switch {
		case n < 0:
			i += 64
		case text[i+n] == '"':
			return i + n + 1, escaped
		default:
			escaped = true
			i += n + 2
		}
	}
	return -1, escaped
}

// begins reports whether a form begins with text and goes on.
func (s *Set) begins(text string) bool {
	at, there := slices.BinarySearch(s.sorted, text)
	if there {
		at++
	}
	return at < len(s.sorted) && strings.HasPrefix(s.sorted[at], text)
}

// Stream is one output stream of a kernel. Its zero value is ready.
type Stream struct{ held string }

// Add takes the next text and returns what may be passed on: all but an end that may be
// the beginning of a form, which is shorter than the longest form.
func (t *Stream) Add(s *Set, text string) string {
	text, t.held = t.held+text, ""
	if s == nil {
		return text
	}
	text, _ = s.Text(text)
	for i := max(0, len(text)-s.longest+1); i < len(text); i++ {
		if rest := text[i:]; s.first[rest[0]] && s.begins(rest) {
			t.held = strings.Clone(rest)
			return text[:i]
		}
	}
	return text
}

// Empty reports whether nothing is held back.
func (t *Stream) Empty() bool { return t.held == "" }

// Flush returns what was held back: no more comes that could make it a form.
func (t *Stream) Flush() string {
	held := t.held
	t.held = ""
	return held
}
