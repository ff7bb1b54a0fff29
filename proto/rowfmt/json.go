package rowfmt

import (
	"bytes"
	"encoding/json"
	"strconv"
	"unicode/utf8"
)

type jsonEncoder struct {
	*out
	columns []column
	// keys are `{"a":`, `,"b":` and so on.
	keys  [][]byte
	form  []jsonForm
	lines bool
	any   bool
}

// jsonForm is what a column of text becomes.
type jsonForm uint8

const (
	formString jsonForm = iota
	formNumber
	formRaw
)

func newJSON(o *out, columns []column, lines bool) *jsonEncoder {
	e := &jsonEncoder{out: o, columns: columns, lines: lines, form: make([]jsonForm, len(columns))}
	for i, name := range uniqueNames(columns) {
		start := byte(',')
		if i == 0 {
			start = '{'
		}
		key := appendQuoted([]byte{start, '"'}, []byte(name))
		e.keys = append(e.keys, append(key, '"', ':'))
		switch columns[i].pgType {
		case "numeric":
			e.form[i] = formNumber
		case "json", "jsonb":
			e.form[i] = formRaw
		}
	}
	return e
}

// uniqueNames returns the columns' names with _2, _3, ... added to those that
// came before; a name that a column really has is never given to another.
func uniqueNames(columns []column) []string {
	taken := make(map[string]bool, len(columns))
	for i := range columns {
		taken[columns[i].name] = true
	}
	names := make([]string, len(columns))
	seen := make(map[string]int, len(columns))
	for i := range columns {
		name := columns[i].name
		names[i] = name
		if seen[name]++; seen[name] == 1 {
			continue
		}
		for n := max(2, seen[name]); ; n++ {
			candidate := name + "_" + strconv.Itoa(n)
			if !taken[candidate] {
				taken[candidate] = true
				seen[name] = n
				names[i] = candidate
				break
			}
		}
	}
	return names
}

func (e *jsonEncoder) begin() error {
	if !e.lines {
		e.buf = append(e.buf, '[')
	}
	return e.flush()
}

func (e *jsonEncoder) end() error {
	switch {
	case e.lines:
	case e.any:
		e.buf = append(e.buf, "\n]\n"...)
	default:
		e.buf = append(e.buf, "]\n"...)
	}
	return nil
}

func (e *jsonEncoder) abort() {}

func (e *jsonEncoder) batch(rows int) error {
	for row := range rows {
		if !e.lines {
			if e.any {
				e.buf = append(e.buf, ',')
			}
			e.buf = append(e.buf, '\n')
		}
		e.any = true
		if len(e.columns) == 0 {
			e.buf = append(e.buf, '{')
		}
		for i := range e.columns {
			e.buf = append(e.buf, e.keys[i]...)
			e.value(i, row)
		}
		e.buf = append(e.buf, '}')
		if e.lines {
			e.buf = append(e.buf, '\n')
		}
		if e.full() {
			if err := e.flush(); err != nil {
				return err
			}
		}
	}
	return e.flush()
}

func (e *jsonEncoder) value(i, row int) {
	c := &e.columns[i]
	if c.null(row) {
		e.buf = append(e.buf, "null"...)
		return
	}
	switch c.kind {
	case kindUTF8:
		e.text(e.form[i], c.bytes(row))
	case kindBinary:
		e.buf = append(e.buf, `"\\x`...)
		e.hex(c.bytes(row))
		e.buf = append(e.buf, '"')
	case kindBool:
		if c.bool(row) {
			e.buf = append(e.buf, "true"...)
		} else {
			e.buf = append(e.buf, "false"...)
		}
	case kindFloat32, kindFloat64:
		v, bits := floatOf(c, row)
		if name := nonFinite(v); name != "" {
			e.quoted(name)
			return
		}
		e.buf = appendFloat(e.buf, v, bits)
	case kindDate, kindTime:
		e.buf = append(e.buf, '"')
		e.buf = appendPlain(e.buf, c, row)
		e.buf = append(e.buf, '"')
	case kindTimestamp:
		e.buf = append(e.buf, '"')
		e.buf = appendTimestamp(e.buf, int64(c.u64(row)), 'T', "")
		e.buf = append(e.buf, '"')
	case kindTimestampUTC:
		e.buf = append(e.buf, '"')
		e.buf = appendTimestamp(e.buf, int64(c.u64(row)), 'T', "Z")
		e.buf = append(e.buf, '"')
	default:
		e.buf = appendPlain(e.buf, c, row)
	}
}

func (e *jsonEncoder) quoted(s string) {
	e.buf = append(e.buf, '"')
	e.buf = append(e.buf, s...)
	e.buf = append(e.buf, '"')
}

func (e *jsonEncoder) text(form jsonForm, v []byte) {
	switch {
	case form == formNumber && isNumber(v):
		e.buf = append(e.buf, v...)
		return
	case form == formRaw && json.Valid(v) && utf8.Valid(v):
		e.raw(v)
		return
	}
	e.buf = append(e.buf, '"')
	for len(v) > piece {
		n := between(v, piece)
		e.buf = appendQuoted(e.buf, v[:n])
		v = v[n:]
		_ = e.flush() // the error sticks
	}
	e.buf = append(appendQuoted(e.buf, v), '"')
}

// between is n or up to three less: the last place up to n where text, longer than n, can be
// cut without cutting a character. The text need not be UTF-8 throughout.
func between(text []byte, n int) int {
	for i := range utf8.UTFMax {
		if utf8.RuneStart(text[n-i]) {
			return n - i
		}
	}
	return n // none of the four begins a character, so what is there belongs to none
}

// raw appends valid JSON on one line: a line break can only stand between its
// tokens.
func (e *jsonEncoder) raw(v []byte) {
	for {
		i := bytes.IndexAny(v, "\r\n")
		if i < 0 {
			break
		}
		e.buf = append(append(e.buf, v[:i]...), ' ')
		v = v[i+1:]
		if e.full() {
			_ = e.flush() // the error sticks
		}
	}
	e.buf = append(e.buf, v...)
}

// isNumber says whether v is a number as JSON writes it (RFC 8259, section 6).
func isNumber(v []byte) bool {
	if len(v) > 0 && v[0] == '-' {
		v = v[1:]
	}
	whole := digits(v)
	if whole == 0 || (whole > 1 && v[0] == '0') {
		return false
	}
	v = v[whole:]
	if len(v) > 0 && v[0] == '.' {
		n := digits(v[1:])
		if n == 0 {
			return false
		}
		v = v[1+n:]
	}
	if len(v) > 0 && (v[0] == 'e' || v[0] == 'E') {
		v = v[1:]
		if len(v) > 0 && (v[0] == '+' || v[0] == '-') {
			v = v[1:]
		}
		n := digits(v)
		return n > 0 && n == len(v)
	}
	return len(v) == 0
}

func digits(v []byte) int {
	for i, c := range v {
		if c < '0' || c > '9' {
			return i
		}
	}
	return len(v)
}

// plainJSON marks the bytes that stand for themselves in a JSON string.
var plainJSON = func() (t [256]bool) {
	for c := byte(' '); c < utf8.RuneSelf; c++ {
		t[c] = c != '"' && c != '\\' && c != 0x7f
	}
	return t
}()

// appendQuoted appends v as the inside of a JSON string.
func appendQuoted(b, v []byte) []byte {
	start := 0
	for i := 0; i < len(v); {
		c := v[i]
		if plainJSON[c] {
			i++
			continue
		}
		if c >= utf8.RuneSelf {
			r, n := utf8.DecodeRune(v[i:])
			switch {
			case r == utf8.RuneError && n == 1:
				b = append(append(b, v[start:i]...), `\ufffd`...)
			case r == '\u2028' || r == '\u2029': // line ends in JavaScript
				b = append(append(b, v[start:i]...), `\u202`...)
				b = append(b, hexDigits[r&15])
			default:
				i += n
				continue
			}
			i += n
			start = i
			continue
		}
		b = append(b, v[start:i]...)
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\n':
			b = append(b, '\\', 'n')
		case '\r':
			b = append(b, '\\', 'r')
		case '\t':
			b = append(b, '\\', 't')
		default:
			b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		}
		i++
		start = i
	}
	return append(b, v[start:]...)
}
