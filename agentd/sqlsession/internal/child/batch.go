package child

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"strconv"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/mask"
)

const (
	// maxBatchRows and maxBatchBytes end a batch. The first ends early so that
	// the first rows arrive at once; from then on batches double in size.
	maxBatchRows    = 65536
	maxBatchBytes   = 1 << 20
	firstBatchRows  = 1000
	firstBatchBytes = 32 << 10
	// giantRow is from where on a row gets a batch of its own, in bytes.
	giantRow = inBuffer - 16
	// The stream's end marker has 8 bytes.
	endOfStream = 8
)

// batch gathers rows in columns and writes them as Arrow record batches.
type batch struct {
	schema  *arrow.Schema
	columns []column
	writer  *ipc.Writer
	sink    *sink
	// rows are in the columns; flushed are in the stream.
	rows    int
	flushed uint64
	bytes   int // on the wire, of the rows in the columns
	target  int // bytes at which to flush
	first   bool
	// overhead is what a record batch adds to its buffers at most, in bytes;
	// preamble is what the schema takes, until it was written.
	overhead, preamble int
	// uuids and words are how many columns take more room in Arrow than on the
	// wire: all of the first, NULLs of the second.
	uuids, words int
	keep         *keeper // nil: nothing is kept
	// hides tells that values are masked; grows is by how many bytes of a row
	// its masks may make it longer, at most, but for those of texts: limit is
	// the longest that the stream may become (0: any), and exceeded is called
	// when masked rows don't fit.
	hides    bool
	grows    int
	limit    uint64
	exceeded func()
}

// field is what a batch needs to know of a column.
type field struct {
	name   string
	layout layout
	binary bool // PostgreSQL's binary format is to be asked for
	arrow  arrow.DataType
	// notNull says that no value is ever NULL.
	notNull bool
	// meta are pairs of key and value for the Arrow schema.
	meta []string
	// oid is PostgreSQL's type; mask and texts are column's.
	oid   uint32
	mask  *mask.Column
	texts *mask.Texts
}

// newBatch describes a result of PostgreSQL's; name gives the name of a type that
// pgTypes does not have. hidden and m, which may be nil, say what is masked.
func newBatch(fields []pgproto3.FieldDescription, name func(oid uint32) string, hidden *hidden, m *masking, out *sink) *batch {
	own := make([]field, len(fields))
	for i, f := range fields {
		t, ok := pgTypes[f.DataTypeOID]
		if !ok {
			t = text(name(f.DataTypeOID))
		}
		own[i] = field{
			name: string(f.Name), layout: t.layout, binary: t.binary, arrow: t.arrow, oid: f.DataTypeOID,
			meta: []string{"pg.type", t.name, "pg.typmod", strconv.Itoa(int(f.TypeModifier))},
		}
		if hidden != nil && hidden.columns[i] != nil {
			own[i].hide(hidden.columns[i], hidden.kinds[i])
		} else if m != nil && m.texts.Looks(f.DataTypeOID) {
			own[i].texts = m.texts
		}
	}
	return newFieldBatch(own, out)
}

// newFieldBatch describes a result. fields may be empty: a statement without rows
// has a schema without fields. Nothing is written before the first flush.
func newFieldBatch(fields []field, out *sink) *batch {
	b := &batch{columns: make([]column, len(fields)), sink: out, target: firstBatchBytes, first: true}
	b.overhead = 1024 + 256*len(fields)
	arrowFields := make([]arrow.Field, len(fields))
	for i, f := range fields {
		c := &b.columns[i]
		*c = column{layout: f.layout, binary: f.binary, name: f.name, arrow: f.arrow, oid: f.oid, mask: f.mask, texts: f.texts}
		c.reset()
		b.hides = b.hides || c.mask != nil || c.texts != nil
		if c.mask != nil {
			b.grows += c.mask.Grows()
		}
		switch c.layout {
		case layoutUUID:
			b.uuids++
		case layout64, layoutTimestamp:
			b.words++
		}
		var keys, values []string
		b.preamble += 512 + len(f.name)
		for k := 0; k+1 < len(f.meta); k += 2 {
			keys, values = append(keys, f.meta[k]), append(values, f.meta[k+1])
			b.preamble += 2 * (len(f.meta[k]) + len(f.meta[k+1]))
		}
		arrowFields[i] = arrow.Field{Name: f.name, Type: f.arrow, Nullable: !f.notNull, Metadata: arrow.NewMetadata(keys, values)}
	}
	b.schema = arrow.NewSchema(arrowFields, nil)
	b.preamble += 1024
	b.writer = ipc.NewWriter(out, ipc.WithSchema(b.schema))
	return b
}

// formats are the result formats to ask for.
func (b *batch) formats() []int16 {
	formats := make([]int16, len(b.columns))
	for i := range b.columns {
		if b.columns[i].binary {
			formats[i] = 1
		}
	}
	return formats
}

// total is how many rows there are, in the stream or on their way.
func (b *batch) total() uint64 { return b.flushed + uint64(b.rows) }

// full tells whether the batch should be flushed.
func (b *batch) full() bool {
	return b.bytes >= b.target || b.rows >= maxBatchRows || b.first && b.rows >= firstBatchRows
}

// fits tells whether a row of size bytes on the wire keeps the stream within
// limit bytes; row may be nil where only a rough answer can be had.
func (b *batch) fits(limit uint64, size int, row []byte) bool {
	// The cheap answer never says yes too often.
	rest := b.sink.total + uint64(b.overhead+b.preamble+endOfStream)
	cheap := rest + uint64(b.bytes+size) + uint64((b.rows+1)*(20*b.uuids+4*b.words+b.grows+len(b.columns)/8+1))
	if cheap <= limit {
		return true
	}
	masked := (b.rows + 1) * b.grows
	if row == nil {
		return rest+uint64(b.size()+size+masked) <= limit
	}
	return rest+uint64(b.size()+b.measure(row)+masked) <= limit
}

func (b *batch) size() int {
	size := 0
	for i := range b.columns {
		size += b.columns[i].size()
	}
	return size
}

// measure is what a row takes in the columns' buffers, at most.
func (b *batch) measure(row []byte) int {
	size := 0
	p := row[min(2, len(row)):]
	for i := range b.columns {
		c := &b.columns[i]
		n := -1
		if len(p) >= 4 {
			n = int(int32(binary.BigEndian.Uint32(p)))
			p = p[min(len(p), 4+max(n, 0)):]
		}
		size += 1 // bitmap
		switch c.layout {
		case layoutText:
			size += 4 + max(n, 0)
		case layoutUUID:
			size += 4 + uuidText
		case layoutBool:
			size++
		default:
			size += c.layout.width()
		}
	}
	return size
}

// add takes a DataRow's body.
func (b *batch) add(p []byte) error {
	if len(p) < 2 || int(binary.BigEndian.Uint16(p)) != len(b.columns) {
		return fmt.Errorf("%w: a row with the wrong number of columns", errProtocol)
	}
	n := b.rows
	b.bytes += len(p)
	p = p[2:]
	for i := range b.columns {
		c := &b.columns[i]
		if len(p) < 4 {
			return fmt.Errorf("%w: a row that is cut off", errProtocol)
		}
		size := int(int32(binary.BigEndian.Uint32(p)))
		p = p[4:]
		if size < 0 {
			c.setNull(n)
			continue
		}
		if size > len(p) {
			return fmt.Errorf("%w: a row that is cut off", errProtocol)
		}
		if err := c.set(n, p[:size]); err != nil {
			b.undo(i)
			return err
		}
		p = p[size:]
	}
	b.rows++
	return nil
}

// undo takes back what the columns before column i, and perhaps it, have of
// the row at hand. Bytes beyond the last row do no harm; the count of NULLs
// would.
func (b *batch) undo(i int) {
	for j := range b.columns[:i] {
		c := &b.columns[j]
		if c.nulls > 0 && c.valid[b.rows/8]&(1<<(b.rows%8)) == 0 {
			c.nulls--
		}
	}
}

// addFrom takes a DataRow of size bytes from the connection field by field. A
// large value is read straight into its column, so it is held once.
func (b *batch) addFrom(c *wire, size int) error {
	if err := c.need(2); err != nil {
		return err
	}
	if int(binary.BigEndian.Uint16(c.in[c.r:])) != len(b.columns) {
		return fmt.Errorf("%w: a row with the wrong number of columns", errProtocol)
	}
	c.r += 2
	left := size - 2
	b.bytes += size
	for i := range b.columns {
		column := &b.columns[i]
		if err := c.need(4); err != nil {
			return err
		}
		length := int(int32(binary.BigEndian.Uint32(c.in[c.r:])))
		c.r += 4
		left -= 4 + max(length, 0)
		if left < 0 {
			return fmt.Errorf("%w: a row that is cut off", errProtocol)
		}
		switch {
		case length < 0:
			column.setNull(b.rows)
		case length <= 64<<10 || column.layout != layoutText:
			if length > inBuffer {
				return fmt.Errorf("%w: a value of %d bytes in column %q", errProtocol, length, column.name)
			}
			if err := c.need(length); err != nil {
				return err
			}
			err := column.set(b.rows, c.in[c.r:c.r+length])
			c.r += length
			if err != nil {
				b.undo(i)
				return errors.Join(err, c.skip(left))
			}
		default:
			if err := b.addLarge(c, column, length); err != nil {
				return err
			}
		}
	}
	if left != 0 {
		return fmt.Errorf("%w: a row that is too long", errProtocol)
	}
	b.rows++
	return nil
}

func (b *batch) addLarge(c *wire, column *column, length int) error {
	if column.nulls != 0 {
		column.markValid(b.rows)
	}
	at := len(column.data)
	if cap(column.data)-at < length {
		// Exactly as much as is needed: the pages are only touched as the
		// bytes arrive.
		data := make([]byte, at, at+length)
		copy(data, column.data)
		column.data = data
	}
	column.data = column.data[:at+length]
	n := copy(column.data[at:], c.in[c.r:min(c.w, c.r+length)])
	c.r += n
	if err := c.endBulk(); err != nil {
		return err
	}
	if _, err := io.ReadFull(c.conn, column.data[at+n:]); err != nil {
		return err
	}
	column.endValue()
	return nil
}

// flush writes the rows as a record batch.
func (b *batch) flush() error {
	if b.rows == 0 {
		return nil
	}
	b.hideRows()
	if b.rows == 0 {
		b.clear()
		return nil
	}
	arrays := make([]arrow.Array, len(b.columns))
	for i := range b.columns {
		arrays[i] = b.columns[i].array(b.rows)
	}
	record := array.NewRecordBatch(b.schema, arrays, int64(b.rows))
	err := b.writer.Write(record)
	record.Release()
	for _, a := range arrays {
		a.Release()
	}
	if err != nil {
		return err
	}
	giant := b.bytes > 16<<20
	if b.keep != nil {
		b.keep.take(b.columns, b.rows, b.flushed)
	}
	b.flushed += uint64(b.rows)
	b.first, b.preamble = false, 0
	b.target = min(2*b.target, maxBatchBytes)
	b.clear()
	if giant {
		debug.FreeOSMemory() // give back what one value took
	}
	b.sink.flush()
	return b.sink.send(frame.Progress, binary.BigEndian.AppendUint64(nil, b.flushed))
}

// clear forgets the rows at hand.
func (b *batch) clear() {
	b.rows, b.bytes = 0, 0
	for i := range b.columns {
		b.columns[i].reset()
		b.columns[i].spare = recycle(b.columns[i].spare)
	}
}

// close ends the stream.
func (b *batch) close() error {
	if err := b.flush(); err != nil {
		return err
	}
	if err := b.writer.Close(); err != nil {
		return err
	}
	b.sink.flush()
	return nil
}
