package rowfmt_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"testing"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"github.com/apache/arrow-go/v18/arrow/memory"

	"github.com/postern-dev/postern/proto/rowfmt"
)

// field makes a column as a SQL session names it.
func field(name string, t arrow.DataType, pgType string) arrow.Field {
	return arrow.Field{Name: name, Type: t, Nullable: true, Metadata: arrow.NewMetadata([]string{"pg.type"}, []string{pgType})}
}

// encode writes rows, split into batches of size, as an Arrow IPC stream.
func encode(t testing.TB, fields []arrow.Field, rows [][]any, size int) []byte {
	t.Helper()
	schema := arrow.NewSchema(fields, nil)
	var buf bytes.Buffer
	w := ipc.NewWriter(&buf, ipc.WithSchema(schema))
	for len(rows) > 0 {
		n := min(size, len(rows))
		w1 := record(t, schema, rows[:n])
		if err := w.Write(w1); err != nil {
			t.Fatal(err)
		}
		rows = rows[n:]
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func record(t testing.TB, schema *arrow.Schema, rows [][]any) arrow.RecordBatch {
	t.Helper()
	b := array.NewRecordBuilder(memory.DefaultAllocator, schema)
	for _, row := range rows {
		for i, v := range row {
			appendValue(t, b.Field(i), v)
		}
	}
	if len(schema.Fields()) == 0 {
		return array.NewRecordBatch(schema, nil, int64(len(rows)))
	}
	return b.NewRecordBatch()
}

func appendValue(t testing.TB, b array.Builder, v any) {
	t.Helper()
	if v == nil {
		b.AppendNull()
		return
	}
	switch b := b.(type) {
	case *array.BooleanBuilder:
		b.Append(v.(bool))
	case *array.Int16Builder:
		b.Append(int16(v.(int)))
	case *array.Int32Builder:
		b.Append(int32(v.(int)))
	case *array.Int64Builder:
		b.Append(int64(v.(int)))
	case *array.Uint32Builder:
		b.Append(uint32(v.(int)))
	case *array.Float32Builder:
		b.Append(float32(v.(float64)))
	case *array.Float64Builder:
		b.Append(v.(float64))
	case *array.StringBuilder:
		b.Append(v.(string))
	case *array.BinaryBuilder:
		b.Append([]byte(v.(string)))
	case *array.Date32Builder:
		b.Append(arrow.Date32(v.(int)))
	case *array.TimestampBuilder:
		b.Append(arrow.Timestamp(v.(int)))
	case *array.Time64Builder:
		b.Append(arrow.Time64(v.(int)))
	default:
		t.Fatalf("no builder for %T", b)
	}
}

var (
	timestamp   = &arrow.TimestampType{Unit: arrow.Microsecond}
	timestamptz = &arrow.TimestampType{Unit: arrow.Microsecond, TimeZone: "UTC"}
)

// sample is a result with every type that a SQL session emits, its corners, and
// NULL in every column.
func sample(t testing.TB) []byte {
	t.Helper()
	fields := []arrow.Field{
		field("b", arrow.FixedWidthTypes.Boolean, "bool"),
		field("i2", arrow.PrimitiveTypes.Int16, "int2"),
		field("i4", arrow.PrimitiveTypes.Int32, "int4"),
		field("i8", arrow.PrimitiveTypes.Int64, "int8"),
		field("oid", arrow.PrimitiveTypes.Uint32, "oid"),
		field("f4", arrow.PrimitiveTypes.Float32, "float4"),
		field("f8", arrow.PrimitiveTypes.Float64, "float8"),
		field("t", arrow.BinaryTypes.String, "text"),
		field("n", arrow.BinaryTypes.String, "numeric"),
		field("j", arrow.BinaryTypes.String, "json"),
		field("by", arrow.BinaryTypes.Binary, "bytea"),
		field("d", arrow.FixedWidthTypes.Date32, "date"),
		field("ts", timestamp, "timestamp"),
		field("tz", timestamptz, "timestamptz"),
		field("ti", arrow.FixedWidthTypes.Time64us, "time"),
		field("t", arrow.BinaryTypes.String, "uuid"),
	}
	null := make([]any, len(fields))
	rows := [][]any{
		{true, -32768, 2147483647, 9007199254740993, 4294967295, 1.5, 0.1, "plain", "123.4500", `{"a": 1,` + "\n" + ` "a": [true]}`, "\x00\xffz", 0, 0, 0, 0, "6f1d"},
		{false, 32767, -2147483648, math.MinInt64, 0, 16777216.0, 1e20, "", "NaN", `{broken`, "", -1, -1, -1, 86_400_000_000, "x"},
		null,
		{true, 0, 0, math.MaxInt64, 1, math.Inf(1), math.NaN(), `quote " comma , ` + "\nline", "-0.00000000000000000001", `"text"`, "\x1b[31m", math.MaxInt32, math.MaxInt64, math.MinInt64, 3_723_000_001, "y"},
		{true, 0, 0, 0, 1, math.Inf(-1), math.Copysign(0, -1), "esc \x1b[31m \t tab \x85 bidi \u202e end", "1e5", `[]`, "a", 19_723, 1_704_067_200_123_456, 1_704_067_200_120_000, 1, "z"},
		{true, 0, 0, 0, 1, 0.0001, 123456.789, "bad \xff\xc3 utf8, 日本 e\u0301 😀 \u2028", "Infinity", `null`, "b", -2_932_896, -62_135_596_800_000_001, 253_402_300_800_000_000, 2, `\.`},
		{true, 0, 0, 0, 1, 0.00001, 1e15, " spaces ", "007", `12.50`, "c", math.MinInt32, math.MinInt64, math.MaxInt64, 3, "w"},
	}
	return encode(t, fields, rows, 3)
}

func convert(t testing.TB, src []byte, f rowfmt.Format, opts rowfmt.Options) []byte {
	t.Helper()
	var dst bytes.Buffer
	if err := rowfmt.Convert(context.Background(), &dst, bytes.NewReader(src), f, opts); err != nil {
		t.Fatalf("convert to %s: %v", f, err)
	}
	return dst.Bytes()
}

// benchRows is the table: int8, 20 characters, float8, timestamptz.
func benchRows(n int) ([]arrow.Field, [][]any) {
	fields := []arrow.Field{
		field("id", arrow.PrimitiveTypes.Int64, "int8"),
		field("name", arrow.BinaryTypes.String, "text"),
		field("value", arrow.PrimitiveTypes.Float64, "float8"),
		field("at", timestamptz, "timestamptz"),
	}
	rows := make([][]any, n)
	for i := range rows {
		rows[i] = []any{i * 7919, fmt.Sprintf("%020d", i), math.Sqrt(float64(i)), 1_700_000_000_000_000 + i*1_234_567}
	}
	return fields, rows
}

func BenchmarkConvert(b *testing.B) {
	const n = 65_536
	fields, rows := benchRows(n)
	src := encode(b, fields, rows, n)
	for _, f := range rowfmt.Formats() {
		b.Run(string(f), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := rowfmt.Convert(context.Background(), io.Discard, bytes.NewReader(src), f, rowfmt.Options{}); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/row")
		})
	}
}
