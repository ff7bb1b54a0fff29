package mask

import (
	"encoding/binary"
	"errors"
	"math"
)

// ErrRow is returned for a message that is not what PostgreSQL's protocol says.
var ErrRow = errors.New("a row that is not as PostgreSQL's protocol has it")

// Row masks the rows of one result in PostgreSQL's own protocol. It has scratch
// memory and belongs to one goroutine.
type Row struct {
	columns []*Column // nil: not masked
	oids    []uint32  // of the values as they come
	texts   *Texts
	scratch []byte
}

// NewRow returns nil if there is nothing to mask: columns has a mask or nil for
// each column of the result, oids their types; texts, which may be nil, is for the
// others.
func NewRow(columns []*Column, oids []uint32, texts *Texts) *Row {
	needed := false
	for i, oid := range oids {
		needed = needed || columns[i] != nil || texts.Looks(oid)
	}
	if !needed {
		return nil
	}
	return &Row{columns: columns, oids: oids, texts: texts}
}

// Type is what a column's type is after masking, by its OID before.
func (r *Row) Type(i int) (oid uint32, changed bool) {
	if c := r.columns[i]; c != nil {
		return c.Type(), c.Type() != r.oids[i]
	}
	return r.oids[i], false
}

// Describe changes the types in a RowDescription's body, in place: those of masked
// columns become text, and where they come from is not told.
func (r *Row) Describe(body []byte) error {
	if len(body) < 2 || int(binary.BigEndian.Uint16(body)) != len(r.columns) {
		return ErrRow
	}
	p := body[2:]
	for i := range r.columns {
		end := 0
		for end < len(p) && p[end] != 0 {
			end++
		}
		const rest = 4 + 2 + 4 + 2 + 4 + 2
		if len(p)-end-1 < rest {
			return ErrRow
		}
		field := p[end+1:]
		if oid, changed := r.Type(i); changed {
			binary.BigEndian.PutUint32(field[6:], oid)
			binary.BigEndian.PutUint16(field[10:], math.MaxUint16) // of any length
			binary.BigEndian.PutUint32(field[12:], math.MaxUint32) // no modifier
		}
		p = field[rest:]
	}
	if len(p) != 0 {
		return ErrRow
	}
	return nil
}

// Append appends a DataRow's body, masked, to dst. formats are those that the
// result was asked for, as in Bind: none (text), one for all, or one a column. On
// an error dst is as it was.
func (r *Row) Append(dst, body []byte, formats []int16) ([]byte, error) {
	if len(body) < 2 || int(binary.BigEndian.Uint16(body)) != len(r.columns) {
		return dst, ErrRow
	}
	out := append(dst, body[:2]...)
	p := body[2:]
	for i := range r.columns {
		if len(p) < 4 {
			return dst, ErrRow
		}
		size := int(int32(binary.BigEndian.Uint32(p)))
		if size == -1 {
			out, p = append(out, p[:4]...), p[4:]
			continue
		}
		if size < 0 || size > len(p)-4 {
			return dst, ErrRow
		}
		value := p[4 : 4+size]
		p = p[4+size:]
		at := len(out)
		out = append(out, 0, 0, 0, 0)
		var null bool
		out, null = r.value(out, value, i, formatOf(formats, i))
		if null {
			out = out[:at+4]
			binary.BigEndian.PutUint32(out[at:], math.MaxUint32)
			continue
		}
		binary.BigEndian.PutUint32(out[at:], uint32(len(out)-at-4))
	}
	if len(p) != 0 {
		return dst, ErrRow
	}
	return out, nil
}

func formatOf(formats []int16, i int) int16 {
	switch {
	case len(formats) == 0:
		return 0
	case len(formats) == 1:
		return formats[0]
	case i < len(formats):
		return formats[i]
	}
	return 0
}

// value appends what stands for one value.
func (r *Row) value(dst, value []byte, i int, format int16) (result []byte, null bool) {
	c, oid := r.columns[i], r.oids[i]
	if c == nil {
		return r.text(dst, value, oid, format), false
	}
	in := format
	if in == 1 && c.NeedsText() {
		text, ok := textOf(r.scratch[:0], oid, value)
		if !ok {
			return dst, true // better nothing than something else's hash
		}
		r.scratch, value, in = text, text, 0
	}
	if c.action == toNoise && oid == oidNumeric && format == 1 {
		text, null := c.Apply(nil, value, 0, 0)
		if null {
			return dst, true
		}
		out, ok := binaryNumeric(dst, text)
		return out, !ok
	}
	return c.Apply(dst, value, in, format)
}

// text appends a value in which patterns were looked for.
func (r *Row) text(dst, value []byte, oid uint32, format int16) []byte {
	switch {
	case !r.texts.Looks(oid):
		return append(dst, value...)
	case format == 0:
		if out, found := r.texts.Append(dst, value, oid); found {
			return out
		}
		return append(dst, value...)
	}
	return r.texts.appendBinary(dst, value, oid, 0)
}

// maxNested bounds arrays of composites of arrays.
const maxNested = 16

// appendBinary appends a value in binary form with what matches replaced: the
// texts in arrays and composites one by one, with their lengths.
func (t *Texts) appendBinary(dst, value []byte, oid uint32, depth int) []byte {
	start := len(dst)
	if oid == oidJSONB && len(value) > 0 {
		if out, found := t.Append(append(dst, value[0]), value[1:], oid); found {
			return out
		}
		return append(dst[:start], value...)
	}
	if depth < maxNested && len(value) >= 4 && value[0] == 0 {
		// No text has a zero byte.
		if out, ok := t.appendArray(dst, value, depth); ok {
			return out
		}
		if out, ok := t.appendComposite(dst[:start], value, depth); ok {
			return out
		}
	}
	if out, found := t.Append(dst[:start], value, oid); found {
		return out
	}
	return append(dst[:start], value...)
}

// appendArray does an array: dimensions, flags, type, length and lower bound of
// each dimension, then values with their lengths.
func (t *Texts) appendArray(dst, value []byte, depth int) ([]byte, bool) {
	if len(value) < 12 {
		return dst, false
	}
	dimensions, flags, oid := binary.BigEndian.Uint32(value), binary.BigEndian.Uint32(value[4:]), binary.BigEndian.Uint32(value[8:])
	if dimensions > 6 || flags > 1 || len(value) < 12+8*int(dimensions) {
		return dst, false
	}
	head := 12 + 8*int(dimensions)
	out, p := append(dst, value[:head]...), value[head:]
	for len(p) > 0 {
		var ok bool
		if out, p, ok = t.appendElement(out, p, oid, depth); !ok {
			return dst, false
		}
	}
	return out, true
}

// appendComposite does a row: how many fields, then type, length and value of each.
func (t *Texts) appendComposite(dst, value []byte, depth int) ([]byte, bool) {
	n := binary.BigEndian.Uint32(value)
	out, p := append(dst, value[:4]...), value[4:]
	for range n {
		if len(p) < 4 {
			return dst, false
		}
		oid := binary.BigEndian.Uint32(p)
		out = append(out, p[:4]...)
		var ok bool
		if out, p, ok = t.appendElement(out, p[4:], oid, depth); !ok {
			return dst, false
		}
	}
	return out, len(p) == 0
}

// appendElement does one length and value.
func (t *Texts) appendElement(dst, p []byte, oid uint32, depth int) (out, rest []byte, ok bool) {
	if len(p) < 4 {
		return dst, p, false
	}
	size := int(int32(binary.BigEndian.Uint32(p)))
	if size < 0 {
		return append(dst, p[:4]...), p[4:], true
	}
	if size > len(p)-4 {
		return dst, p, false
	}
	value, at := p[4:4+size], len(dst)
	dst = append(dst, 0, 0, 0, 0)
	if t.Looks(oid) {
		dst = t.appendBinary(dst, value, oid, depth+1)
	} else {
		dst = append(dst, value...)
	}
	binary.BigEndian.PutUint32(dst[at:], uint32(len(dst)-at-4))
	return dst, p[4+size:], true
}
