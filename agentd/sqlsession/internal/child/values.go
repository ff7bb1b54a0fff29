package child

import "encoding/binary"

// This file is how engines that do not speak PostgreSQL's protocol fill a batch:
// value by value, row by row. A row is measured first (valueSize and fitsMore),
// then each column gets one value, then endRow counts it.

// valueSize is how many bytes a value takes in the column's buffers at most; size
// is its length in bytes where the layout's width does not say, below 0 for NULL.
func (c *column) valueSize(size int) int {
	switch c.layout {
	case layoutText, layoutUUID:
		return 1 + 4 + max(size, 0)
	case layoutBool:
		return 1 + 1
	}
	return 1 + c.layout.width()
}

// fitsMore tells whether a row that takes size bytes in the columns' buffers keeps
// the stream within limit bytes.
func (b *batch) fitsMore(limit uint64, size int) bool {
	return b.sink.total+uint64(b.overhead+b.preamble+endOfStream)+uint64(b.size()+size) <= limit
}

// endRow counts a row of size bytes that all columns have got.
func (b *batch) endRow(size int) {
	b.rows++
	b.bytes += size
}

// setText adds a text, or bytes, as value n of the batch.
func (c *column) setText(n int, v []byte) {
	if c.nulls != 0 {
		c.markValid(n)
	}
	if need := len(c.data) + len(v); len(v) > 1<<20 && cap(c.data) < need {
		// Exactly as much as is needed.
		data := make([]byte, len(c.data), need)
		copy(data, c.data)
		c.data = data
	}
	c.data = append(c.data, v...)
	c.endValue()
}

// setInt adds the low bytes of a number, as many as the layout has, in two's
// complement. Whether it fits is the caller's business.
func (c *column) setInt(n int, v int64) {
	if c.nulls != 0 {
		c.markValid(n)
	}
	switch c.layout.width() {
	case 2:
		c.data = binary.LittleEndian.AppendUint16(c.data, uint16(v))
	case 4:
		c.data = binary.LittleEndian.AppendUint32(c.data, uint32(v))
	default:
		c.data = binary.LittleEndian.AppendUint64(c.data, uint64(v))
	}
}

// setCell adds a value as value n of the batch.
func (c *column) setCell(n int, v *cell) {
	switch {
	case v.null:
		c.setNull(n)
	case c.layout <= layoutUUID:
		c.setText(n, v.text)
	case c.layout == layoutBool:
		if c.nulls != 0 {
			c.markValid(n)
		}
		if n%8 == 0 {
			c.data = append(c.data, 0)
		}
		c.data[n/8] |= byte(v.bits&1) << (n % 8)
	default:
		c.setInt(n, v.bits)
	}
}
