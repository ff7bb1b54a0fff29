package child

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/ipc"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
)

const (
	// keptBytes bounds the first rows that are kept, and the last ones, in bytes
	// of their values.
	keptBytes = 256 << 10
	// longestKept and shortestKept bound what is kept of one value, in bytes: the
	// more columns, the less, so that one row always fits.
	longestKept  = 4 << 10
	shortestKept = 64
)

// keeper keeps the first and the last rows of a result. It looks at a batch when
// that was written, not at every row: of a big result nearly all rows cost nothing.
type keeper struct {
	first, last int // rows to keep
	value       int // bytes to keep of a value
	like        []column

	head   *excerpt
	closed bool // the head takes no more
	// tail are consecutive excerpts that end at the last row so far.
	tail      []*excerpt
	tailRows  int
	tailBytes int
	spare     *excerpt
}

// excerpt is some consecutive rows, copied.
type excerpt struct {
	from    uint64 // the number of its first row, from 0
	columns []column
	sizes   []int // of each row
	bytes   int
	cut     []int // values cut, of each row
}

// newKeeper returns nil if there is nothing to keep.
func newKeeper(columns []column, first, last int) *keeper {
	if len(columns) == 0 || first <= 0 && last <= 0 {
		return nil
	}
	k := &keeper{first: max(first, 0), last: max(last, 0), like: columns}
	k.value = max(shortestKept, min(longestKept, keptBytes/2/len(columns)))
	k.head = k.newExcerpt(0)
	return k
}

func (k *keeper) newExcerpt(from uint64) *excerpt {
	if e := k.spare; e != nil {
		k.spare = nil
		e.from, e.bytes = from, 0
		e.sizes, e.cut = e.sizes[:0], e.cut[:0]
		for i := range e.columns {
			e.columns[i].reset()
		}
		return e
	}
	e := &excerpt{from: from, columns: make([]column, len(k.like))}
	for i := range k.like {
		c := &k.like[i]
		e.columns[i] = column{layout: c.layout, binary: c.binary, name: c.name, arrow: c.arrow}
		e.columns[i].reset()
	}
	return e
}

func (e *excerpt) rows() int { return len(e.sizes) }

// take looks at a batch of rows, the first of which has the number from.
func (k *keeper) take(columns []column, rows int, from uint64) {
	for i := 0; i < rows && !k.closed; i++ {
		if size := k.size(columns, i); k.head.rows() < k.first && k.head.bytes+size <= keptBytes {
			k.head.add(columns, i, size, k.value)
		} else {
			k.closed = true
		}
	}
	// The last rows of the batch that are not in the head, as far as they fit.
	start, bytes := rows, 0
	for start > 0 && rows-start < k.last && from+uint64(start) > uint64(k.head.rows()) {
		size := k.size(columns, start-1)
		if bytes+size > keptBytes {
			break
		}
		bytes += size
		start--
	}
	// Earlier rows can't be among the last if there is a gap before these.
	if start > 0 {
		k.drop(len(k.tail))
	}
	if start == rows {
		return
	}
	// Of those before it, only what may still be needed.
	drop, restRows, restBytes := 0, k.tailRows, k.tailBytes
	for _, e := range k.tail {
		restRows, restBytes = restRows-e.rows(), restBytes-e.bytes
		if restRows+rows-start < k.last && restBytes+bytes < keptBytes {
			break
		}
		drop++
	}
	k.drop(drop)
	e := k.newExcerpt(from + uint64(start))
	for i := start; i < rows; i++ {
		e.add(columns, i, k.size(columns, i), k.value)
	}
	k.tail = append(k.tail, e)
	k.tailRows += e.rows()
	k.tailBytes += e.bytes
}

// drop forgets the oldest excerpts of the tail.
func (k *keeper) drop(n int) {
	for _, e := range k.tail[:n] {
		k.tailRows -= e.rows()
		k.tailBytes -= e.bytes
		k.spare = e
	}
	k.tail = append(k.tail[:0], k.tail[n:]...)
}

// size is how many bytes are kept of a row.
func (k *keeper) size(columns []column, row int) int {
	size := 0
	for i := range columns {
		c := &columns[i]
		size++
		switch {
		case c.null(row):
		case c.layout <= layoutUUID:
			start, end := c.span(row)
			size += 4 + min(end-start, k.value)
		default:
			size += max(1, c.layout.width())
		}
	}
	return size
}

// add copies a row.
func (e *excerpt) add(columns []column, row, size, limit int) {
	n, cut := e.rows(), 0
	for i := range columns {
		if e.columns[i].copy(n, &columns[i], row, limit) {
			cut++
		}
	}
	e.sizes = append(e.sizes, size)
	e.cut = append(e.cut, cut)
	e.bytes += size
}

// null tells whether a value of the batch is NULL.
func (c *column) null(row int) bool {
	return c.nulls > 0 && c.valid[row/8]&(1<<(row%8)) == 0
}

// span is where a value of variable length is.
func (c *column) span(row int) (start, end int) {
	return int(binary.LittleEndian.Uint32(c.offsets[4*row:])), int(binary.LittleEndian.Uint32(c.offsets[4*row+4:]))
}

// copy adds a value of another column of the same kind as value n. What is longer
// than limit bytes is cut, with a mark; it tells whether that was so.
func (c *column) copy(n int, from *column, row, limit int) (cut bool) {
	if from.null(row) {
		c.setNull(n)
		return false
	}
	if c.nulls != 0 {
		c.markValid(n)
	}
	switch c.layout {
	case layoutText, layoutUUID:
		start, end := from.span(row)
		v := from.data[start:end]
		if len(v) > limit {
			mark := fmt.Sprintf("… (cut, %d bytes in all)", len(v))
			c.data = append(append(c.data, clip(v, max(0, limit-len(mark)))...), mark...)
			cut = true
		} else {
			c.data = append(c.data, v...)
		}
		c.endValue()
	case layoutBool:
		if n%8 == 0 {
			c.data = append(c.data, 0)
		}
		c.data[n/8] |= from.data[row/8] >> (row % 8) & 1 << (n % 8)
	default:
		w := c.layout.width()
		c.data = append(c.data, from.data[row*w:(row+1)*w]...)
	}
	return cut
}

// clip cuts at the edge of a character.
func clip(v []byte, n int) []byte {
	for n > 0 && n < len(v) && v[n]&0xc0 == 0x80 {
		n--
	}
	return v[:n]
}

// encode is the payload of a Kept frame: the first rows, then the last ones, each
// row once. nil if not even the columns' names fit.
func (k *keeper) encode(schema *arrow.Schema) ([]byte, error) {
	first, last := k.head.rows(), k.lastRows()
	for {
		payload, err := k.encodeRows(schema, first, last)
		if err != nil || len(payload) <= frame.MaxKept {
			return payload, err
		}
		if first+last == 0 {
			return nil, nil
		}
		first, last = first/2, last/2 // so many columns that their frames outweigh the values
	}
}

// lastRows is how many of the tail's rows are kept.
func (k *keeper) lastRows() int {
	n, bytes := 0, 0
	for i := len(k.tail) - 1; i >= 0; i-- {
		e := k.tail[i]
		for row := e.rows() - 1; row >= 0; row-- {
			bytes += e.sizes[row]
			if n == k.last || bytes > keptBytes || e.from+uint64(row) < uint64(k.head.rows()) {
				return n
			}
			n++
		}
	}
	return n
}

func (k *keeper) encodeRows(schema *arrow.Schema, first, last int) ([]byte, error) {
	var out bytes.Buffer
	out.Write(make([]byte, frame.KeptHeader))
	writer := ipc.NewWriter(&out, ipc.WithSchema(schema))
	if first+last == 0 {
		// The writer puts the schema before the first batch, or at its end.
		if err := writer.Close(); err != nil {
			return nil, err
		}
		frame.PutKept(out.Bytes(), 0, 0, 0)
		return out.Bytes(), nil
	}
	head := k.newExcerpt(0)
	for row := range first {
		head.add(k.head.columns, row, k.head.sizes[row], k.value)
	}
	cut := 0
	for _, n := range k.head.cut[:first] {
		cut += n
	}
	tail := k.newExcerpt(0)
	skip := -last
	for _, e := range k.tail {
		skip += e.rows()
	}
	for _, e := range k.tail {
		for row := range e.rows() {
			if skip > 0 {
				skip--
				continue
			}
			tail.add(e.columns, row, e.sizes[row], k.value)
			cut += e.cut[row]
		}
	}
	for _, e := range []*excerpt{head, tail} {
		if e.rows() == 0 {
			continue
		}
		if err := e.write(writer, schema); err != nil {
			return nil, err
		}
	}
	if err := writer.Close(); err != nil {
		return nil, err
	}
	frame.PutKept(out.Bytes(), first, last, cut)
	return out.Bytes(), nil
}

func (e *excerpt) write(writer *ipc.Writer, schema *arrow.Schema) error {
	arrays := make([]arrow.Array, len(e.columns))
	for i := range e.columns {
		arrays[i] = e.columns[i].array(e.rows())
	}
	record := array.NewRecordBatch(schema, arrays, int64(e.rows()))
	err := writer.Write(record)
	record.Release()
	for _, a := range arrays {
		a.Release()
	}
	return err
}
