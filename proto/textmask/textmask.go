package textmask

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"
)

// Mark is what stands for a match that is not shown at all.
const Mark = "***"

// Bounds of a Set: patterns, and bytes of one.
const (
	MaxPatterns = 200
	MaxPattern  = 1000
)

// Rule is one kind of replacement and the patterns it is for.
type Rule struct {
	Patterns []string
	// Replace appends what stands for a match to dst; nil means Mark. It may
	// be called from several goroutines.
	Replace func(dst, match []byte) []byte
}

// Set is a set of rules; the zero value and nil have none. The rules are
// applied one after the other, each on what the one before has left.
type Set struct {
	rules []compiled
}

type compiled struct {
	re      *regexp.Regexp
	needs   []need // of each pattern
	replace func(dst, match []byte) []byte
}

// Compile makes a Set. The error is one line.
func Compile(rules []Rule) (*Set, error) {
	s, n := &Set{}, 0
	for _, r := range rules {
		if n += len(r.Patterns); n > MaxPatterns {
			return nil, fmt.Errorf("more than %d patterns", MaxPatterns)
		}
		if len(r.Patterns) == 0 {
			continue
		}
		for _, p := range r.Patterns {
			if len(p) > MaxPattern {
				return nil, fmt.Errorf("a pattern has more than %d bytes", MaxPattern)
			}
			re, err := regexp.Compile(p)
			if err != nil {
				return nil, errors.New("a pattern is not a regular expression (RE2)")
			}
			if re.MatchString("") {
				return nil, errors.New("a pattern matches nothing at all, and so everywhere")
			}
		}
		all := "(?:" + strings.Join(r.Patterns, ")|(?:") + ")"
		re, err := regexp.Compile(all)
		if err != nil {
			return nil, errors.New("the patterns are too large together")
		}
		c := compiled{re: re, replace: r.Replace}
		for _, p := range r.Patterns {
			c.needs = append(c.needs, needOf(p))
		}
		if c.replace == nil {
			c.replace = func(dst, _ []byte) []byte { return append(dst, Mark...) }
		}
		s.rules = append(s.rules, c)
	}
	return s, nil
}

// Empty tells whether there is nothing to look for.
func (s *Set) Empty() bool { return s == nil || len(s.rules) == 0 }

// May tells whether text may have a match; false is certain. text may also be
// many texts one behind the other.
func (s *Set) May(text []byte) bool {
	if s == nil {
		return false
	}
	for i := range s.rules {
		if s.rules[i].may(text) {
			return true
		}
	}
	return false
}

// Append appends text to dst without what matches, and tells whether there was
// anything. Where there was nothing dst is returned as it was.
func (s *Set) Append(dst, text []byte) ([]byte, bool) {
	if s == nil {
		return dst, false
	}
	found := false
	for i := range s.rules {
		r := &s.rules[i]
		if !r.may(text) {
			continue
		}
		if out, ok := r.replaceAll(text); ok {
			text, found = out, true
		}
	}
	if !found {
		return dst, false
	}
	return append(dst, text...), true
}

// String returns text without what matches.
func (s *Set) String(text string) string {
	if s.Empty() {
		return text
	}
	if out, ok := s.Append(nil, []byte(text)); ok {
		return string(out)
	}
	return text
}

func (r *compiled) may(text []byte) bool {
	for i := range r.needs {
		if r.needs[i].in(text) {
			return true
		}
	}
	return false
}

// replaceAll returns a new text; not ok means that nothing matches.
func (r *compiled) replaceAll(text []byte) ([]byte, bool) {
	if !r.re.Match(text) {
		return nil, false
	}
	// Each match is found in the whole text, so that what a pattern says of its
	// surroundings (\b, ^) holds.
	return r.re.ReplaceAllFunc(text, func(match []byte) []byte {
		if len(match) == 0 {
			return nil
		}
		return r.replace(nil, match)
	}), true
}

// AppendJSON is Append for a JSON text: strings (names too) and numbers are
// looked at one by one, as what they mean and not as how they are written; the
// result is JSON again. A number that matches becomes a string.
func (s *Set) AppendJSON(dst, text []byte) ([]byte, bool) {
	if s.Empty() || bytes.IndexByte(text, '\\') < 0 && !s.May(text) {
		return dst, false
	}
	start, found, last := len(dst), false, 0
	for i := 0; i < len(text); {
		var end int
		var out []byte
		hit := false
		switch c := text[i]; {
		case c == '"':
			end = stringEnd(text, i)
			if raw := text[i:end]; bytes.IndexByte(raw, '\\') >= 0 {
				var plain string
				if json.Unmarshal(raw, &plain) != nil {
					out, hit = []byte(Mark), true // no JSON: better nothing of it
				} else {
					out, hit = s.Append(nil, []byte(plain))
				}
			} else if len(raw) > 2 {
				out, hit = s.Append(nil, raw[1:len(raw)-1])
			}
		case c == '-' || c >= '0' && c <= '9':
			for end = i + 1; end < len(text) && bytes.IndexByte([]byte("+-.eE0123456789"), text[end]) >= 0; end++ {
			}
			out, hit = s.Append(nil, text[i:end])
		default:
			i++
			continue
		}
		if hit {
			found = true
			dst = append(dst, text[last:i]...)
			dst = appendQuoted(dst, out)
			last = end
		}
		i = end
	}
	if !found {
		return dst[:start], false
	}
	return append(dst, text[last:]...), true
}

// stringEnd is behind the closing quote of the string that begins at i.
func stringEnd(text []byte, i int) int {
	for j := i + 1; j < len(text); j++ {
		switch text[j] {
		case '\\':
			j++
		case '"':
			return j + 1
		}
	}
	return len(text)
}

func appendQuoted(dst, s []byte) []byte {
	const digits = "0123456789abcdef"
	dst = append(dst, '"')
	for _, c := range s {
		switch {
		case c == '"' || c == '\\':
			dst = append(dst, '\\', c)
		case c < 0x20:
			dst = append(dst, '\\', 'u', '0', '0', digits[c>>4], digits[c&15])
		default:
			dst = append(dst, c)
		}
	}
	return append(dst, '"')
}

var reference = regexp.MustCompile(`&#(?:[0-9]{1,7}|x[0-9A-Fa-f]{1,6});`)

// AppendXML is Append for an XML text, in which characters may be written as
// numbers (&#64;).
func (s *Set) AppendXML(dst, text []byte) ([]byte, bool) {
	if s.Empty() || !bytes.Contains(text, []byte("&#")) {
		return s.Append(dst, text)
	}
	plain := reference.ReplaceAllFunc(text, func(ref []byte) []byte {
		n, base := 0, 10
		digits := ref[2 : len(ref)-1]
		if digits[0] == 'x' {
			base, digits = 16, digits[1:]
		}
		for _, c := range bytes.ToLower(digits) {
			d := int(c - '0')
			if c >= 'a' {
				d = int(c-'a') + 10
			}
			n = n*base + d
		}
		if n < 0x20 || n > utf8.MaxRune || strings.ContainsRune(`<>&"'`, rune(n)) {
			return ref
		}
		return utf8.AppendRune(nil, rune(n))
	})
	return s.Append(dst, plain)
}
