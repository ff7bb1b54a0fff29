package rowfmt

import (
	"fmt"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/memory"
	"github.com/apache/arrow-go/v18/parquet"
	"github.com/apache/arrow-go/v18/parquet/compress"
	"github.com/apache/arrow-go/v18/parquet/pqarrow"
)

const (
	// groupRows and groupBytes bound a row group, which is held in memory.
	groupRows  = 128 << 10
	groupBytes = 16 << 20
)

type parquetEncoder struct {
	*out
	columns []column
	schema  *arrow.Schema
	writer  *pqarrow.FileWriter
	// rows and bytes are those of the row group under way.
	rows  int
	bytes int
	s     *stream
}

func newParquet(o *out, s *stream) (e *parquetEncoder, err error) {
	defer recovered(&err)
	e = &parquetEncoder{out: o, columns: s.columns, s: s}
	fields := make([]arrow.Field, len(s.columns))
	for i, name := range uniqueNames(s.columns) {
		c := &s.columns[i]
		keys, values := make([]string, len(c.meta)), make([]string, len(c.meta))
		for j, pair := range c.meta {
			keys[j], values[j] = pair[0], pair[1]
		}
		fields[i] = arrow.Field{Name: name, Type: arrowType(c), Nullable: true, Metadata: arrow.NewMetadata(keys, values)}
	}
	if len(fields) == 0 {
		return nil, fmt.Errorf("parquet cannot hold a result without columns: ask for another format")
	}
	e.schema = arrow.NewSchema(fields, nil)
	props := parquet.NewWriterProperties(
		parquet.WithCompression(compress.Codecs.Snappy),
		parquet.WithMaxRowGroupLength(groupRows),
		parquet.WithDictionaryPageSizeLimit(256<<10),
		parquet.WithDataPageSize(256<<10),
		parquet.WithCreatedBy("postern"),
	)
	e.writer, err = pqarrow.NewFileWriter(e.schema, o, props, pqarrow.NewArrowWriterProperties(pqarrow.WithStoreSchema()))
	return e, err
}

func arrowType(c *column) arrow.DataType {
	switch c.kind {
	case kindBool:
		return arrow.FixedWidthTypes.Boolean
	case kindInt8:
		return arrow.PrimitiveTypes.Int8
	case kindInt16:
		return arrow.PrimitiveTypes.Int16
	case kindInt32:
		return arrow.PrimitiveTypes.Int32
	case kindInt64:
		return arrow.PrimitiveTypes.Int64
	case kindUint8:
		return arrow.PrimitiveTypes.Uint8
	case kindUint16:
		return arrow.PrimitiveTypes.Uint16
	case kindUint32:
		return arrow.PrimitiveTypes.Uint32
	case kindUint64:
		return arrow.PrimitiveTypes.Uint64
	case kindFloat32:
		return arrow.PrimitiveTypes.Float32
	case kindFloat64:
		return arrow.PrimitiveTypes.Float64
	case kindBinary:
		return arrow.BinaryTypes.Binary
	case kindDate:
		return arrow.FixedWidthTypes.Date32
	case kindTime:
		return arrow.FixedWidthTypes.Time64us
	case kindTimestamp:
		return &arrow.TimestampType{Unit: arrow.Microsecond}
	case kindTimestampUTC:
		return &arrow.TimestampType{Unit: arrow.Microsecond, TimeZone: "UTC"}
	default:
		return arrow.BinaryTypes.String
	}
}

// recovered turns a panic of the parquet library into an error: the input is a
// host's, and one bad result must not end the process.
func recovered(err *error) {
	if r := recover(); r != nil {
		*err = fmt.Errorf("write parquet: %v", r)
	}
}

func (e *parquetEncoder) begin() error { return nil }

func (e *parquetEncoder) batch(rows int) (err error) {
	defer recovered(&err)
	if rows == 0 {
		return nil
	}
	arrays := make([]arrow.Array, len(e.columns))
	for i := range e.columns {
		c := &e.columns[i]
		var valid *memory.Buffer
		if c.valid != nil {
			valid = memory.NewBufferBytes(c.valid)
		}
		buffers := []*memory.Buffer{valid, memory.NewBufferBytes(c.data)}
		if c.kind.variable() {
			buffers = []*memory.Buffer{valid, memory.NewBufferBytes(c.offsets), memory.NewBufferBytes(c.data)}
		}
		nulls := 0
		if c.valid != nil {
			nulls = array.UnknownNullCount
		}
		data := array.NewData(e.schema.Field(i).Type, rows, buffers, nil, nulls, 0)
		arrays[i] = array.MakeFromData(data)
	}
	record := array.NewRecordBatch(e.schema, arrays, int64(rows))
	// A batch is written in parts, so that the group's bound holds whatever the
	// batch's size.
	size := max(1, len(e.s.body)/rows) // bytes a row, about
	for start := 0; start < rows; {
		if e.rows >= groupRows || e.bytes+size > groupBytes && e.rows > 0 {
			e.rows, e.bytes = 0, 0
			if err := e.writer.NewBufferedRowGroupChecked(); err != nil {
				return err
			}
		}
		part := min(rows-start, groupRows-e.rows, max(1, (groupBytes-e.bytes)/size))
		if err := e.writer.WriteBuffered(record.NewSlice(int64(start), int64(start+part))); err != nil {
			return err
		}
		start += part
		e.rows += part
		e.bytes += part * size
	}
	return nil
}

func (e *parquetEncoder) end() (err error) {
	defer recovered(&err)
	return e.writer.Close()
}

// abort writes no footer: half a file must not read as a whole one.
func (e *parquetEncoder) abort() {}
