package localsql

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"github.com/apache/arrow-go/v18/arrow/memory"
)

// simulatedPyarrow stands for the package pyarrow, which Debian does not have: it has the
// functions that to_arrow calls, keeps what they are given, and its Table prints it.
const simulatedPyarrow = `
import json
class Type:
    def __init__(self, *words): self.words = [str(w) for w in words]
def maker(name): return lambda *args: Type(name, *args)
for name in "int8 int16 int32 int64 uint8 uint16 uint32 uint64 float32 float64 date32 time32 time64 timestamp bool_ string large_string binary large_binary null".split():
    globals()[name] = maker(name)
class Field:
    def __init__(self, name, type, nullable, metadata): self.name, self.type, self.nullable, self.metadata = name, type, nullable, metadata
def field(name, type, nullable=True, metadata=None): return Field(name, type, nullable, metadata)
def schema(fields): return list(fields)
def py_buffer(b): return bytes(memoryview(b))
class Array:
    @staticmethod
    def from_buffers(type, length, buffers, null_count=-1, offset=0):
        assert isinstance(type, Type) and offset == 0
        return dict(length=length, nulls=null_count, buffers=[None if b is None else b.hex() for b in buffers])
class RecordBatch:
    @staticmethod
    def from_arrays(arrays, schema=None):
        assert len(arrays) == len(schema)
        return arrays
class Table:
    @staticmethod
    def from_batches(batches, schema=None):
        t = Table()
        t.batches, t.schema = list(batches), schema
        return t
    def dump(self):
        text = lambda b: b.decode() if isinstance(b, bytes) else b
        fields = [dict(name=f.name, type=f.type.words, nullable=f.nullable, metadata={text(k): text(v) for k, v in (f.metadata or {}).items()}) for f in self.schema]
        return json.dumps(dict(fields=fields, batches=self.batches))
`

// TestToArrowWithSimulatedPyarrow makes arrays, by the Go implementation of Arrow, of the
// buffers that to_arrow hands to a simulated pyarrow, and compares them with what was sent.
func TestToArrowWithSimulatedPyarrow(t *testing.T) {
	h := newHost(t, warehouse)
	if err := os.WriteFile(filepath.Join(h.module, "pyarrow.py"), []byte(simulatedPyarrow), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, statement := range []string{"types", "many"} {
		for _, bare := range []bool{true, false} { // without numpy and with it
			t.Run(fmt.Sprintf("%s, bare %t", statement, bare), func(t *testing.T) {
				sent := &bytes.Buffer{}
				err := writeTypes(sent)
				if statement == "many" {
					sent.Reset()
					err = writeMany(sent, 300_000)
				}
				if err != nil {
					t.Fatal(err)
				}
				compare(t, sent.Bytes(), h.python(bare, "import postern; print(postern.sql('"+statement+"', to='arrow').dump())"))
			})
		}
	}
}

// handed is what a simulated Table prints.
type handed struct {
	Fields []struct {
		Name     string
		Type     []string
		Nullable bool
		Metadata map[string]string
	}
	Batches [][]struct {
		Length, Nulls int
		Buffers       []*string
	}
}

// compare holds what was handed over against a stream.
func compare(t *testing.T, stream []byte, text string) {
	t.Helper()
	var got handed
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatalf("%v: %.300s", err, text)
	}
	r, err := ipc.NewReader(bytes.NewReader(stream))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Release()
	if len(got.Fields) != r.Schema().NumFields() {
		t.Fatalf("%d fields, want %d", len(got.Fields), r.Schema().NumFields())
	}
	for i, f := range r.Schema().Fields() {
		g := got.Fields[i]
		if want := pyarrowType(t, f.Type); fmt.Sprint(g.Type) != want || g.Name != f.Name || g.Nullable != f.Nullable {
			t.Errorf("field %d is %+v, want %s of type %s", i, g, f.Name, want)
		}
		for k, v := range f.Metadata.ToMap() {
			if g.Metadata[k] != v {
				t.Errorf("field %s: its metadata %s is %q, want %q", f.Name, k, g.Metadata[k], v)
			}
		}
	}
	n := 0
	for ; r.Next(); n++ {
		want := r.RecordBatch()
		if n >= len(got.Batches) {
			t.Fatalf("%d batches, want more", len(got.Batches))
		}
		for i, column := range want.Columns() {
			g := got.Batches[n][i]
			var buffers []*memory.Buffer
			for _, b := range g.Buffers {
				if b == nil {
					buffers = append(buffers, nil)
					continue
				}
				raw, err := hex.DecodeString(*b)
				if err != nil {
					t.Fatal(err)
				}
				buffers = append(buffers, memory.NewBufferBytes(raw))
			}
			made := array.MakeFromData(array.NewData(column.DataType(), g.Length, buffers, nil, g.Nulls, 0))
			if g.Nulls != column.NullN() || !array.ApproxEqual(made, column, array.WithNaNsEqual(true), array.WithAbsTolerance(0)) {
				t.Errorf("batch %d, column %s: %d NULLs\ngot  %.200v\nwant %.200v", n, want.ColumnName(i), g.Nulls, made, column)
			}
			made.Release()
		}
	}
	if r.Err() != nil || n != len(got.Batches) {
		t.Errorf("%d batches, want %d, %v", len(got.Batches), n, r.Err())
	}
}

// pyarrowType is how the simulated pyarrow names a type.
func pyarrowType(t *testing.T, a arrow.DataType) string {
	t.Helper()
	switch a := a.(type) {
	case *arrow.TimestampType:
		zone := a.TimeZone
		if zone == "" {
			zone = "None"
		}
		return fmt.Sprint([]string{"timestamp", a.Unit.String(), zone})
	case *arrow.Time64Type:
		return fmt.Sprint([]string{"time64", a.Unit.String()})
	}
	name, known := map[arrow.Type]string{
		arrow.BOOL: "bool_", arrow.STRING: "string", arrow.BINARY: "binary", arrow.DATE32: "date32", arrow.FLOAT32: "float32", arrow.FLOAT64: "float64",
		arrow.INT16: "int16", arrow.INT32: "int32", arrow.INT64: "int64", arrow.UINT32: "uint32", arrow.UINT64: "uint64",
	}[a.ID()]
	if !known {
		t.Fatalf("type %s", a)
	}
	return "[" + name + "]"
}
