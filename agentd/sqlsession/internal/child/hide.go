package child

import (
	"bytes"
	"encoding/binary"
	"math"

	"github.com/apache/arrow-go/v18/arrow"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/mask"
)

// hide makes a field one whose values are masked by m. How its values are asked
// for, and its type in Arrow, are then those that the masked ones need.
func (f *field) hide(m *mask.Column, kind mask.Kind) {
	f.mask = m
	if m.NeedsText() || m.Type() != f.oid {
		f.layout, f.binary, f.arrow = layoutText, false, arrow.BinaryTypes.String
	}
	f.notNull = f.notNull && !m.AlwaysNull()
	if m.Type() == mask.OIDText && f.oid != mask.OIDText {
		for i := 0; i+1 < len(f.meta); i += 2 {
			switch f.meta[i] {
			case "pg.type":
				f.meta[i+1] = "text"
			case "pg.typmod":
				f.meta[i+1] = "-1"
			}
		}
	}
	f.meta = append(f.meta, "postern.mask", string(kind))
}

// hide masks the values of a batch of rows, in place.
func (c *column) hide(rows int) {
	switch m := c.mask; {
	case m != nil && m.AlwaysNull():
		c.nullAll(rows)
	case m != nil && c.layout == layoutText:
		c.rewrite(rows, func(dst, value []byte) ([]byte, bool, bool) {
			dst, null := m.Apply(dst, value, 0, 0)
			return dst, null, true
		})
	case m != nil:
		c.noise(rows)
	case c.texts != nil && c.layout == layoutText && c.mayMatch():
		c.rewrite(rows, func(dst, value []byte) ([]byte, bool, bool) {
			dst, found := c.texts.Append(dst, value, c.oid)
			return dst, false, found
		})
	}
}

// mayMatch tells whether a pattern may match any value of the batch.
func (c *column) mayMatch() bool {
	if mask.Escapes(c.oid) && (bytes.IndexByte(c.data, '\\') >= 0 || bytes.Contains(c.data, []byte("&#"))) {
		return true
	}
	return c.texts.May(c.data)
}

// nullAll makes all values NULL.
func (c *column) nullAll(rows int) {
	c.valid = append(c.valid[:0], make([]byte, (rows+7)/8)...)
	c.nulls = rows
	if c.layout <= layoutUUID {
		c.data = c.data[:0]
		clear(c.offsets)
		return
	}
	clear(c.data)
}

// setNullAt makes value n of a full batch NULL.
func (c *column) setNullAt(n, rows int) {
	if c.nulls == 0 {
		c.valid = c.valid[:0]
		for range (rows + 7) / 8 {
			c.valid = append(c.valid, 0xff)
		}
	}
	c.valid[n/8] &^= 1 << (n % 8)
	c.nulls++
}

// rewrite replaces texts. change appends what stands for a value to dst and tells
// whether that is NULL, and whether it is another than the value at all.
func (c *column) rewrite(rows int, change func(dst, value []byte) (result []byte, null, changed bool)) {
	out := c.spare[:0]
	start := 0
	for i := range rows {
		end := int(binary.LittleEndian.Uint32(c.offsets[4*i+4:]))
		if !c.null(i) {
			var null, changed bool
			before := len(out)
			if out, null, changed = change(out, c.data[start:end]); null {
				out = out[:before]
				c.setNullAt(i, rows)
			} else if !changed {
				out = append(out, c.data[start:end]...)
			}
		}
		binary.LittleEndian.PutUint32(c.offsets[4*i+4:], uint32(len(out)))
		start = end
	}
	c.data, c.spare = out, recycle(c.data)
}

// noise moves the numbers of a column that is not text.
func (c *column) noise(rows int) {
	isFloat := c.arrow.ID() == arrow.FLOAT32 || c.arrow.ID() == arrow.FLOAT64
	for i := range rows {
		if c.null(i) {
			continue
		}
		switch c.layout {
		case layout16:
			p := c.data[2*i:]
			binary.LittleEndian.PutUint16(p, uint16(c.mask.Int(int64(int16(binary.LittleEndian.Uint16(p))), 16)))
		case layout32:
			p := c.data[4*i:]
			v := binary.LittleEndian.Uint32(p)
			if isFloat {
				v = math.Float32bits(float32(c.mask.Float(float64(math.Float32frombits(v)), 32)))
			} else {
				v = uint32(c.mask.Int(int64(int32(v)), 32))
			}
			binary.LittleEndian.PutUint32(p, v)
		case layout64:
			p := c.data[8*i:]
			v := binary.LittleEndian.Uint64(p)
			if isFloat {
				v = math.Float64bits(c.mask.Float(math.Float64frombits(v), 64))
			} else {
				v = uint64(c.mask.Int(int64(v), 64))
			}
			binary.LittleEndian.PutUint64(p, v)
		default:
			// No other layout has numbers.
			c.nullAll(rows)
			return
		}
	}
}

// shorten keeps the first rows only.
func (c *column) shorten(rows int) {
	if c.layout <= layoutUUID {
		c.offsets = c.offsets[:4*rows+4]
		c.data = c.data[:binary.LittleEndian.Uint32(c.offsets[4*rows:])]
	} else if w := c.layout.width(); w > 0 {
		c.data = c.data[:w*rows]
	} else {
		c.data = c.data[:(rows+7)/8]
	}
	if c.nulls > 0 {
		nulls := 0
		for i := range rows {
			if c.null(i) {
				nulls++
			}
		}
		if c.nulls = nulls; nulls > 0 {
			c.valid = c.valid[:(rows+7)/8]
		}
	}
}

// hideRows masks the rows at hand. Patterns may make texts longer: where the
// stream would then be longer than its limit, the rows that fit stay, and
// exceeded is called.
func (b *batch) hideRows() {
	if !b.hides {
		return
	}
	before := b.size()
	for i := range b.columns {
		b.columns[i].hide(b.rows)
	}
	if b.limit == 0 || b.size() <= before {
		return
	}
	rest := b.sink.total + uint64(b.overhead+b.preamble+endOfStream)
	if rest+uint64(b.size()) <= b.limit {
		return
	}
	for b.rows > 0 && rest+uint64(b.size()) > b.limit {
		b.rows = b.rows * 3 / 4
		for i := range b.columns {
			b.columns[i].shorten(b.rows)
		}
	}
	b.exceeded()
}
