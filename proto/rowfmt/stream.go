package rowfmt

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// Bounds on what a stream may claim.
const (
	// maxMetadata bounds the metadata of one message, in bytes.
	maxMetadata = 16 << 20
	// maxColumns is more than any database of ours returns (MySQL: 4096).
	maxColumns = 4096
	// maxBareRows bounds the rows of one batch without columns, which cost the
	// sender nothing.
	maxBareRows = 1 << 20
	// keepBody is the largest body buffer kept from one batch to the next, in
	// bytes.
	keepBody = 8 << 20
)

// Arrow's numbers for what a message and a type are (format/Message.fbs,
// format/Schema.fbs).
const (
	headerSchema      = 1
	headerDictionary  = 2
	headerRecordBatch = 3

	typeInt       = 2
	typeFloat     = 3
	typeBinary    = 4
	typeUTF8      = 5
	typeBool      = 6
	typeDate      = 8
	typeTime      = 9
	typeTimestamp = 10

	unitMicrosecond = 2
)

var typeNames = map[byte]string{
	0: "none", 1: "null", 7: "decimal", 11: "interval", 12: "list", 13: "struct", 14: "union", 15: "fixed-size binary",
	16: "fixed-size list", 17: "map", 18: "duration", 19: "large binary", 20: "large utf8", 21: "large list",
	22: "run-end encoded", 23: "binary view", 24: "utf8 view",
}

// kind is the form of a column's values in memory.
type kind uint8

const (
	kindBool kind = iota + 1
	kindInt8
	kindInt16
	kindInt32
	kindInt64
	kindUint8
	kindUint16
	kindUint32
	kindUint64
	kindFloat32
	kindFloat64
	kindUTF8
	kindBinary
	kindDate
	kindTimestamp
	kindTimestampUTC
	kindTime
)

// width is the size of a value in bytes; 0 for bits and variable length.
func (k kind) width() int {
	switch k {
	case kindInt8, kindUint8:
		return 1
	case kindInt16, kindUint16:
		return 2
	case kindInt32, kindUint32, kindFloat32, kindDate:
		return 4
	case kindInt64, kindUint64, kindFloat64, kindTimestamp, kindTimestampUTC, kindTime:
		return 8
	default:
		return 0
	}
}

func (k kind) variable() bool { return k == kindUTF8 || k == kindBinary }

// column is one column's type and, after next, its values in the batch. Every
// offset has been checked: values may be read without looking.
type column struct {
	name     string
	kind     kind
	zone     string
	nullable bool
	pgType   string
	meta     [][2]string

	valid   []byte // a bit a row; nil: no NULL
	offsets []byte // variable length: rows+1 int32
	data    []byte
}

func (c *column) null(row int) bool {
	return c.valid != nil && c.valid[row>>3]&(1<<(row&7)) == 0
}

func (c *column) bool(row int) bool { return c.data[row>>3]&(1<<(row&7)) != 0 }

func (c *column) bytes(row int) []byte {
	o := c.offsets[4*row : 4*row+8]
	return c.data[binary.LittleEndian.Uint32(o):binary.LittleEndian.Uint32(o[4:])]
}

func (c *column) u32(row int) uint32 { return binary.LittleEndian.Uint32(c.data[4*row:]) }
func (c *column) u64(row int) uint64 { return binary.LittleEndian.Uint64(c.data[8*row:]) }

// stream decodes an Arrow IPC stream
// (https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format).
type stream struct {
	r       *bufio.Reader
	max     int64
	columns []column
	meta    []byte
	body    []byte
	// fresh gives every batch a body buffer of its own.
	fresh bool
}

func newStream(r io.Reader, maxMessage int64) *stream {
	return &stream{r: bufio.NewReaderSize(r, 64<<10), max: maxMessage}
}

// message reads the next message and returns its metadata, header type and
// header table; io.EOF at the end of the stream.
func (s *stream) message() (f *flat, header byte, table int, err error) {
	var word [4]byte
	size, err := s.prefix(word[:])
	if err != nil {
		return nil, 0, 0, err
	}
	if size == 0 {
		return nil, 0, 0, io.EOF
	}
	if size > maxMetadata {
		return nil, 0, 0, fmt.Errorf("%w: metadata of %d bytes, more than %d", ErrGarbled, size, maxMetadata)
	}
	if s.meta, err = readGrowing(s.r, s.meta[:0], int64(size)); err != nil {
		return nil, 0, 0, err
	}
	f = newFlat(s.meta)
	message := f.root()
	header = f.byteField(message, 1)
	table = f.table(message, 2)
	length := f.int64Field(message, 3)
	if f.err == nil && table == 0 {
		f.fail("a message without header")
	}
	if f.err != nil {
		return nil, 0, 0, f.err
	}
	if length < 0 {
		return nil, 0, 0, fmt.Errorf("%w: a body of %d bytes", ErrGarbled, length)
	}
	if length > s.max {
		return nil, 0, 0, fmt.Errorf("one batch of the result has %d MiB, more than the %d MiB that can be converted: ask for format arrow, or for fewer or smaller columns", length>>20, s.max>>20)
	}
	if s.fresh || cap(s.body) > keepBody {
		s.body = nil
	}
	s.body, err = readGrowing(s.r, s.body[:0], length)
	return f, header, table, err
}

// prefix reads the length of the next message's metadata: 0 at the end.
func (s *stream) prefix(word []byte) (uint32, error) {
	if _, err := io.ReadFull(s.r, word); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return 0, cut(err)
		}
		return 0, err
	}
	size := binary.LittleEndian.Uint32(word)
	if size != 0xffffffff { // before Arrow 0.15 there was no such marker
		return size, nil
	}
	if _, err := io.ReadFull(s.r, word); err != nil {
		return 0, cut(err)
	}
	return binary.LittleEndian.Uint32(word), nil
}

func cut(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it breaks off in the middle: %w", ErrGarbled, io.ErrUnexpectedEOF)
	}
	return err
}

// readGrowing appends n bytes of r to b. It allocates as the bytes come, so that
// a claim of a size costs nothing.
func readGrowing(r io.Reader, b []byte, n int64) ([]byte, error) {
	const step = 1 << 20
	for n > 0 {
		part := int(min(n, max(step, int64(len(b)))))
		b = slices.Grow(b, part)
		if _, err := io.ReadFull(r, b[len(b):len(b)+part]); err != nil {
			return b, cut(err)
		}
		b = b[:len(b)+part]
		n -= int64(part)
	}
	return b, nil
}

// readSchema reads the first message.
func (s *stream) readSchema() error {
	f, header, table, err := s.message()
	if err == io.EOF { //nolint:errorlint // message returns it bare
		return ErrNoSchema
	}
	if err != nil {
		return err
	}
	if header != headerSchema {
		return fmt.Errorf("%w: it does not begin with a schema", ErrGarbled)
	}
	if f.int16Field(table, 0, 0) != 0 {
		return fmt.Errorf("%w: it is big-endian", ErrGarbled)
	}
	first, n := f.vector(table, 1, 4)
	if n > maxColumns {
		return fmt.Errorf("%w: %d columns, more than %d", ErrGarbled, n, maxColumns)
	}
	if f.err != nil {
		return f.err
	}
	s.columns = make([]column, n)
	for i := range s.columns {
		if err := decodeField(f, f.follow(first+4*i), &s.columns[i]); err != nil {
			return err
		}
	}
	return nil
}

func decodeField(f *flat, field int, c *column) error {
	c.name = f.text(field, 0)
	c.nullable = f.byteField(field, 1) != 0
	id := f.byteField(field, 2)
	t := f.table(field, 3)
	dictionary := f.table(field, 4)
	first, n := f.vector(field, 6, 4)
	for i := range n {
		pair := f.follow(first + 4*i)
		key, value := f.text(pair, 0), f.text(pair, 1)
		if f.err != nil {
			break
		}
		c.meta = append(c.meta, [2]string{key, value})
		if key == "pg.type" {
			c.pgType = value
		}
	}
	c.kind, c.zone = decodeType(f, id, t)
	if f.err != nil {
		return f.err
	}
	if dictionary != 0 {
		return fmt.Errorf("column %q has Arrow type dictionary, which cannot be converted: ask for format arrow", c.name)
	}
	if c.kind == 0 {
		name := typeNames[id]
		if name == "" {
			name = fmt.Sprintf("number %d in a form that a SQL session does not emit", id)
		}
		return fmt.Errorf("column %q has Arrow type %s, which cannot be converted: ask for format arrow", c.name, name)
	}
	return nil
}

// decodeType returns 0 for a type that a SQL session does not emit.
func decodeType(f *flat, id byte, t int) (kind, string) {
	switch id {
	case typeBool:
		return kindBool, ""
	case typeUTF8:
		return kindUTF8, ""
	case typeBinary:
		return kindBinary, ""
	case typeInt:
		ints := map[int32][2]kind{8: {kindUint8, kindInt8}, 16: {kindUint16, kindInt16}, 32: {kindUint32, kindInt32}, 64: {kindUint64, kindInt64}}
		if f.byteField(t, 1) != 0 {
			return ints[f.int32Field(t, 0, 0)][1], ""
		}
		return ints[f.int32Field(t, 0, 0)][0], ""
	case typeFloat:
		return map[int16]kind{1: kindFloat32, 2: kindFloat64}[f.int16Field(t, 0, 0)], ""
	case typeDate:
		if f.int16Field(t, 0, 1) == 0 {
			return kindDate, ""
		}
	case typeTime:
		if f.int16Field(t, 0, 1) == unitMicrosecond && f.int32Field(t, 1, 32) == 64 {
			return kindTime, ""
		}
	case typeTimestamp:
		if f.int16Field(t, 0, 0) == unitMicrosecond {
			if zone := f.text(t, 1); zone != "" {
				return kindTimestampUTC, zone
			}
			return kindTimestamp, ""
		}
	}
	return 0, ""
}

// next reads a batch into the columns and returns its rows; io.EOF after the
// last.
func (s *stream) next() (rows int, err error) {
	f, header, table, err := s.message()
	if err != nil {
		return 0, err
	}
	switch header {
	case headerRecordBatch:
	case headerSchema:
		return 0, fmt.Errorf("%w: a second schema", ErrGarbled)
	case headerDictionary:
		return 0, fmt.Errorf("%w: a dictionary that no column asks for", ErrGarbled)
	default:
		return 0, fmt.Errorf("%w: a message of unknown kind %d", ErrGarbled, header)
	}
	if f.field(table, 3) != 0 {
		return 0, fmt.Errorf("%w: its batches are compressed", ErrGarbled)
	}
	b := batch{flat: f, body: s.body, rows: f.int64Field(table, 0)}
	b.node, b.nodes = f.vector(table, 1, 16)
	b.buffer, b.buffers = f.vector(table, 2, 16)
	if f.err != nil {
		return 0, f.err
	}
	if b.rows < 0 || b.rows > 1<<31-2 || (len(s.columns) == 0 && b.rows > maxBareRows) {
		return 0, fmt.Errorf("%w: a batch of %d rows", ErrGarbled, b.rows)
	}
	for i := range s.columns {
		if err := b.decode(&s.columns[i]); err != nil {
			return 0, fmt.Errorf("%w: column %d: %w", ErrGarbled, i+1, err)
		}
	}
	return int(b.rows), nil
}

// batch hands out the nodes and buffers of a record batch in their order.
type batch struct {
	*flat
	body            []byte
	rows            int64
	node, nodes     int
	buffer, buffers int
}

func (b *batch) nextBuffer(need int64) ([]byte, error) {
	if b.buffers == 0 {
		return nil, errors.New("a buffer is missing")
	}
	offset, length := b.i64(b.buffer), b.i64(b.buffer+8)
	b.buffer += 16
	b.buffers--
	size := int64(len(b.body))
	if offset < 0 || length < 0 || offset > size || length > size-offset {
		return nil, errors.New("a buffer lies outside the body")
	}
	if length < need {
		return nil, fmt.Errorf("a buffer of %d bytes where %d are needed", length, need)
	}
	return b.body[offset : offset+length : offset+length], nil
}

func (b *batch) decode(c *column) error {
	if b.nodes == 0 {
		return errors.New("its node is missing")
	}
	length, nulls := b.i64(b.node), b.i64(b.node+8)
	b.node += 16
	b.nodes--
	if length != b.rows {
		return fmt.Errorf("%d values in a batch of %d rows", length, b.rows)
	}
	bits := (b.rows + 7) / 8
	need := bits
	if nulls == 0 {
		need = 0 // the bitmap may be left out
	}
	valid, err := b.nextBuffer(need)
	if err != nil {
		return err
	}
	c.valid = nil
	if nulls != 0 && b.rows > 0 {
		c.valid = valid
	}
	c.offsets, c.data = nil, nil
	switch {
	case c.kind.variable():
		return b.decodeVariable(c)
	case c.kind == kindBool:
		c.data, err = b.nextBuffer(bits)
	default:
		c.data, err = b.nextBuffer(b.rows * int64(c.kind.width()))
	}
	return err
}

func (b *batch) decodeVariable(c *column) (err error) {
	need := 4 * (b.rows + 1)
	if b.rows == 0 {
		need = 0
	}
	if c.offsets, err = b.nextBuffer(need); err != nil {
		return err
	}
	if c.data, err = b.nextBuffer(0); err != nil || b.rows == 0 {
		return err
	}
	c.offsets = c.offsets[:need]
	last := int32(0)
	for o := c.offsets; len(o) >= 4; o = o[4:] {
		next := int32(binary.LittleEndian.Uint32(o))
		if next < last {
			return errors.New("its offsets run backwards")
		}
		last = next
	}
	if int64(last) > int64(len(c.data)) {
		return errors.New("its values lie outside their buffer")
	}
	return nil
}
