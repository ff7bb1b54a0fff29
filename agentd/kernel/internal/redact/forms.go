package redact

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"html"
	"net/url"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	// minForm is the shortest form, in bytes; what is shorter would be found by chance.
	minForm = 8
	// minLine is the shortest line of a value of several lines that counts by itself.
	minLine = 16
	// maxLines is how many lines of a value count by themselves, from its first.
	maxLines = 256
)

// forms are the texts that a value may appear as, each once.
func forms(value string) []string {
	var out []string
	seen := map[string]bool{}
	add := func(list ...string) {
		for _, f := range list {
			if len(f) >= minForm && !seen[f] {
				seen[f] = true
				out = append(out, f)
			}
		}
	}
	plain := []string{value}
	if strings.ContainsAny(value, "\r\n") {
		for line := range strings.Lines(value) {
			line = strings.TrimRight(line, "\r\n")
			if len(line) >= minLine && len(plain) <= maxLines && !strings.HasPrefix(line, "-----") { // PEM's own words are no secret
				plain = append(plain, line)
			}
		}
	}
	add(plain...)
	for _, v := range plain {
		for _, quote := range []byte{'\'', '"'} {
			add(repr(v, quote, false), repr(v, quote, true))
		}
		add(bytesRepr(v))
		for _, text := range []string{v, repr(v, '\'', false)} {
			once := inJSON(text, false)
			add(once, inJSON(text, true), inJSON(once, false))
		}
		add(url.QueryEscape(v), url.PathEscape(v), lowerPercent(url.QueryEscape(v)), lowerPercent(url.PathEscape(v)), html.EscapeString(v), strings.ReplaceAll(html.EscapeString(v), "&#39;", "&#x27;"))
	}
	add(hex.EncodeToString([]byte(value)), strings.ToUpper(hex.EncodeToString([]byte(value))))
	add(base64Forms(value)...)
	return out
}

// base64Forms are what is in common to all base64 texts that hold the value after 0, 1
// or 2 other bytes (modulo 3).
func base64Forms(value string) []string {
	var out []string
	for _, e := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		for before := range 3 {
			text := e.EncodeToString(append(make([]byte, before), value...))
			first := (8*before + 5) / 6
			last := (8*before + 8*len(value)) / 6
			out = append(out, text[first:last])
		}
	}
	return out
}

// repr is the inside of Python's repr of a str; ascii: of ascii().
func repr(v string, quote byte, ascii bool) string {
	var b strings.Builder
	for _, r := range v {
		switch {
		case r == '\\', r == rune(quote):
			b.WriteByte('\\')
			b.WriteRune(r)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\r':
			b.WriteString(`\r`)
		case r == '\t':
			b.WriteString(`\t`)
		case r < 0x20 || r == 0x7f || ascii && r > 0x7f && r < 0x100:
			fmt.Fprintf(&b, `\x%02x`, r)
		case r > 0x7f && r < 0x100 && !unicode.IsPrint(r):
			fmt.Fprintf(&b, `\x%02x`, r)
		case r > 0xffff && (ascii || !unicode.IsPrint(r)):
			fmt.Fprintf(&b, `\U%08x`, r)
		case r > 0x7f && (ascii || !unicode.IsPrint(r)):
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// bytesRepr is the inside of Python's repr of the value's bytes.
func bytesRepr(v string) string {
	var b strings.Builder
	for i := range len(v) {
		switch c := v[i]; {
		case c == '\\':
			b.WriteString(`\\`)
		case c == '\n':
			b.WriteString(`\n`)
		case c == '\r':
			b.WriteString(`\r`)
		case c == '\t':
			b.WriteString(`\t`)
		case c < 0x20 || c > 0x7e:
			fmt.Fprintf(&b, `\x%02x`, c)
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

// inJSON is the inside of a JSON string; ascii: with \u for all that is not ASCII, as
// Python's json has it.
func inJSON(v string, ascii bool) string {
	text := marshal(v)
	text = text[1 : len(text)-1]
	if !ascii {
		return text
	}
	var b strings.Builder
	for _, r := range text {
		switch {
		case r < utf8.RuneSelf:
			b.WriteRune(r)
		case r > 0xffff:
			high, low := (r-0x10000)>>10+0xd800, (r-0x10000)&0x3ff+0xdc00
			fmt.Fprintf(&b, `\u%04x\u%04x`, high, low)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}

// marshal is a JSON string, without Go's own escapes for HTML.
func marshal(v string) string {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return `""` // a string always encodes
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// lowerPercent writes %AB as %ab.
func lowerPercent(v string) string {
	b := []byte(v)
	for i := 0; i+2 < len(b); i++ {
		if b[i] == '%' {
			copy(b[i+1:i+3], strings.ToLower(string(b[i+1:i+3])))
		}
	}
	return string(b)
}
