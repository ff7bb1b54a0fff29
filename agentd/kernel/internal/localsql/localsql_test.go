package localsql

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"github.com/apache/arrow-go/v18/arrow/memory"

	"github.com/postern-dev/postern/agentd/kernel/python"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/sqlsplit/sqlsplittest"
)

// simulatedBackend stands for the SQL of agentd: it answers a few texts.
type simulatedBackend struct {
	t    *testing.T
	some []Source

	mu        sync.Mutex
	asked     []*posternv1.SQLRequest
	cancelled chan struct{}
	waiting   string // a file that tells that "wait" is under way
}

func (b *simulatedBackend) Sources() []Source { return b.some }

func (b *simulatedBackend) Run(ctx context.Context, r *posternv1.SQLRequest, w io.Writer) *posternv1.QueryOutcome {
	b.mu.Lock()
	b.asked = append(b.asked, r)
	b.mu.Unlock()
	switch word, _, _ := strings.Cut(r.Sql, " "); word {
	case "types":
		if err := writeTypes(w); err != nil {
			b.t.Error(err)
		}
		return &posternv1.QueryOutcome{Rows: 5, CommandTag: "SELECT 5"}
	case "many":
		if err := writeMany(w, 300_000); err != nil {
			return &posternv1.QueryOutcome{Error: proto.Detail(err)}
		}
		return &posternv1.QueryOutcome{Rows: 300_000, CommandTag: "SELECT 300000"}
	case "wait":
		if err := os.WriteFile(b.waiting, nil, 0o600); err != nil {
			b.t.Error(err)
		}
		<-ctx.Done()
		close(b.cancelled)
		return &posternv1.QueryOutcome{Error: &posternv1.ErrorDetail{Code: proto.CodeCancelled, Message: "cancelled"}}
	case "half":
		if err := writeMany(w, 10); err != nil {
			b.t.Error(err)
		}
		return &posternv1.QueryOutcome{Rows: 10, Error: &posternv1.ErrorDetail{Code: proto.CodeRowLimit, Message: "more than 10 rows"}}
	case "insert":
		return &posternv1.QueryOutcome{Rows: 3, CommandTag: "INSERT 0 3", Notices: []*posternv1.Notice{{Severity: "NOTICE", Message: "hey"}}}
	}
	return &posternv1.QueryOutcome{Error: &posternv1.ErrorDetail{
		Code: proto.CodeSQL, Message: `relation "nix" does not exist`, Sql: &posternv1.SQLErrorDetail{Sqlstate: "42P01", Position: 15, Hint: "look again"},
	}}
}

// writeTypes writes each type that SQL sessions send: usual values, the ends, NULL.
func writeTypes(w io.Writer) error {
	us, utc := &arrow.TimestampType{Unit: arrow.Microsecond}, &arrow.TimestampType{Unit: arrow.Microsecond, TimeZone: "UTC"}
	field := func(name string, t arrow.DataType, pg string) arrow.Field {
		return arrow.Field{Name: name, Type: t, Nullable: true, Metadata: arrow.NewMetadata([]string{"pg.type", "pg.typmod"}, []string{pg, "-1"})}
	}
	masked := field("masked", arrow.BinaryTypes.String, "numeric")
	masked.Metadata = arrow.NewMetadata([]string{"pg.type", "postern.mask"}, []string{"numeric", "hash"})
	schema := arrow.NewSchema([]arrow.Field{
		field("b", arrow.FixedWidthTypes.Boolean, "bool"),
		field("i2", arrow.PrimitiveTypes.Int16, "int2"), field("i4", arrow.PrimitiveTypes.Int32, "int4"), field("i8", arrow.PrimitiveTypes.Int64, "int8"),
		field("oid", arrow.PrimitiveTypes.Uint32, "oid"), field("u8", arrow.PrimitiveTypes.Uint64, "xid8"),
		field("f4", arrow.PrimitiveTypes.Float32, "float4"), field("f8", arrow.PrimitiveTypes.Float64, "float8"),
		field("text", arrow.BinaryTypes.String, "text"), field("bytes", arrow.BinaryTypes.Binary, "bytea"),
		field("n", arrow.BinaryTypes.String, "numeric"), field("id", arrow.BinaryTypes.String, "uuid"), masked,
		field("day", arrow.FixedWidthTypes.Date32, "date"), field("clock", arrow.FixedWidthTypes.Time64us, "time"),
		field("ts", us, "timestamp"), field("tz", utc, "timestamptz"), field("near", utc, "timestamptz"),
		field("full", arrow.PrimitiveTypes.Int32, "int4"),
	}, nil)
	b := array.NewRecordBuilder(memory.DefaultAllocator, schema)
	defer b.Release()
	out := ipc.NewWriter(w, ipc.WithSchema(schema))
	for batch := range 2 {
		for row := range 5 {
			if batch == 1 && row > 0 {
				break // a second batch, of one row
			}
			for i, f := range b.Fields() {
				if row == 3 && i != 18 {
					f.AppendNull()
					continue
				}
				pick := func(values ...int64) int64 { return values[row%len(values)] }
				switch f := f.(type) {
				case *array.BooleanBuilder:
					f.Append(row%2 == 0)
				case *array.Int16Builder:
					f.Append(int16(pick(1, math.MinInt16, math.MaxInt16, 0, 5)))
				case *array.Int32Builder:
					f.Append(int32(pick(1, math.MinInt32, math.MaxInt32, 0, 5)))
				case *array.Int64Builder:
					f.Append(pick(9007199254740993, math.MinInt64, math.MaxInt64, 0, 5))
				case *array.Uint32Builder:
					f.Append(uint32(pick(1, math.MaxUint32, 7, 0, 5)))
				case *array.Uint64Builder:
					f.Append([]uint64{1, math.MaxUint64, 7, 0, 5}[row])
				case *array.Float32Builder:
					f.Append([]float32{1.5, float32(math.Inf(1)), -0.25, 0, 5}[row])
				case *array.Float64Builder:
					f.Append([]float64{0.1, math.Inf(-1), math.NaN(), 0, 5}[row])
				case *array.StringBuilder:
					switch i {
					case 10:
						f.Append([]string{"1.10", "NaN", "-Infinity", "", strings.Repeat("9", 60) + ".5"}[row])
					case 11:
						f.Append(fmt.Sprintf("00000000-0000-4000-8000-00000000000%d", row))
					case 12:
						f.Append("qk3z")
					default:
						f.Append([]string{"", "naïve ☃ \U0001F600", "a\x00b\n", "", "x"}[row])
					}
				case *array.BinaryBuilder:
					f.Append([]byte{0, 255, byte(row)})
				case *array.Date32Builder:
					f.Append(arrow.Date32(pick(18262, math.MaxInt32, -719162-366, 0, 2145042905)))
				case *array.Time64Builder:
					f.Append(arrow.Time64(pick(1, 86_400_000_000, 3_600_000_000, 0, 0)))
				case *array.TimestampBuilder:
					if i == 17 {
						f.Append(arrow.Timestamp(pick(1577836800000001, -1, 0, 0, 5)))
					} else {
						f.Append(arrow.Timestamp(pick(1577836800000001, math.MaxInt64, math.MinInt64, 0, -62135596800000000-1)))
					}
				}
			}
		}
		record := b.NewRecordBatch()
		err := out.Write(record)
		record.Release()
		if err != nil {
			return err
		}
	}
	return out.Close()
}

func writeMany(w io.Writer, n int) error {
	schema := arrow.NewSchema([]arrow.Field{{Name: "a", Type: arrow.PrimitiveTypes.Int64}, {Name: "b", Type: arrow.BinaryTypes.String}}, nil)
	b := array.NewRecordBuilder(memory.DefaultAllocator, schema)
	defer b.Release()
	out := ipc.NewWriter(w, ipc.WithSchema(schema))
	for i := range n {
		b.Field(0).(*array.Int64Builder).Append(int64(i))
		b.Field(1).(*array.StringBuilder).Append(fmt.Sprint("row ", i))
		if i%20_000 == 19_999 || i == n-1 {
			record := b.NewRecordBatch()
			err := out.Write(record)
			record.Release()
			if err != nil {
				return err
			}
		}
	}
	return out.Close()
}

// host serves a backend on a socket and runs Python programs beside it.
type host struct {
	t       *testing.T
	backend *simulatedBackend
	socket  string
	module  string
}

func newHost(t *testing.T, sources ...Source) *host {
	dir := t.TempDir()
	module, err := python.Install(filepath.Join(dir, "python"))
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, backend: &simulatedBackend{t: t, some: sources, cancelled: make(chan struct{}), waiting: filepath.Join(dir, "waiting")}, socket: filepath.Join(dir, "s"), module: module}
	l, err := net.Listen("unix", h.socket)
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	group.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			group.Go(func() { _ = Serve(t.Context(), conn, h.backend) })
		}
	})
	t.Cleanup(func() { _ = l.Close(); group.Wait() })
	return h
}

// python runs a program; without third-party packages if bare.
func (h *host) python(bare bool, program string) string {
	h.t.Helper()
	args := []string{"-c", program}
	if bare {
		args = append([]string{"-S"}, args...) // no site-packages: nothing but the standard library
	}
	c := exec.Command("/usr/bin/python3", args...)
	c.Env = append(os.Environ(), "POSTERN_SOCKET="+h.socket, "PYTHONPATH="+h.module, "PYTHONDONTWRITEBYTECODE=1", "HOME="+h.t.TempDir())
	out, err := c.CombinedOutput()
	if err != nil {
		h.t.Fatalf("python: %v\n%s", err, out)
	}
	return strings.TrimSpace(string(out))
}

var warehouse = Source{Name: "warehouse", Engine: "postgres", Mode: "read-only"}

// Every type arrives exactly, with numpy and without.
func TestTypes(t *testing.T) {
	h := newHost(t, warehouse)
	const program = `
import postern
r = postern.sql("types")
for name, kind, values in zip(r.columns, r.types, zip(*r.rows)):
    print(name, kind, *map(repr, values))
`
	want := strings.TrimSpace(`
b bool True False True None True True
i2 int2 1 -32768 32767 None 5 1
i4 int4 1 -2147483648 2147483647 None 5 1
i8 int8 9007199254740993 -9223372036854775808 9223372036854775807 None 5 9007199254740993
oid oid 1 4294967295 7 None 5 1
u8 xid8 1 18446744073709551615 7 None 5 1
f4 float4 1.5 inf -0.25 None 5.0 1.5
f8 float8 0.1 -inf nan None 5.0 0.1
text text '' 'naïve ☃ 😀' 'a\x00b\n' None 'x' ''
bytes bytea b'\x00\xff\x00' b'\x00\xff\x01' b'\x00\xff\x02' None b'\x00\xff\x04' b'\x00\xff\x00'
n numeric Decimal('1.10') Decimal('NaN') Decimal('-Infinity') None Decimal('` + strings.Repeat("9", 60) + `.5') Decimal('1.10')
id uuid UUID('00000000-0000-4000-8000-000000000000') UUID('00000000-0000-4000-8000-000000000001') UUID('00000000-0000-4000-8000-000000000002') None UUID('00000000-0000-4000-8000-000000000004') UUID('00000000-0000-4000-8000-000000000000')
masked numeric 'qk3z' 'qk3z' 'qk3z' None 'qk3z' 'qk3z'
day date datetime.date(2020, 1, 1) 'infinity' '0001-01-01 BC' None '5874897-12-31' datetime.date(2020, 1, 1)
clock time datetime.time(0, 0, 0, 1) '24:00:00' datetime.time(1, 0) None datetime.time(0, 0) datetime.time(0, 0, 0, 1)
ts timestamp datetime.datetime(2020, 1, 1, 0, 0, 0, 1) 'infinity' '-infinity' None '0001-12-31 23:59:59.999999 BC' datetime.datetime(2020, 1, 1, 0, 0, 0, 1)
tz timestamptz datetime.datetime(2020, 1, 1, 0, 0, 0, 1, tzinfo=datetime.timezone.utc) 'infinity' '-infinity' None '0001-12-31 23:59:59.999999+00 BC' datetime.datetime(2020, 1, 1, 0, 0, 0, 1, tzinfo=datetime.timezone.utc)
near timestamptz datetime.datetime(2020, 1, 1, 0, 0, 0, 1, tzinfo=datetime.timezone.utc) datetime.datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=datetime.timezone.utc) datetime.datetime(1970, 1, 1, 0, 0, tzinfo=datetime.timezone.utc) None datetime.datetime(1970, 1, 1, 0, 0, 0, 5, tzinfo=datetime.timezone.utc) datetime.datetime(2020, 1, 1, 0, 0, 0, 1, tzinfo=datetime.timezone.utc)
full int4 1 -2147483648 2147483647 0 5 1`)
	for _, bare := range []bool{true, false} {
		if got := h.python(bare, program); got != want {
			t.Errorf("bare %v: got\n%s\nwant\n%s", bare, got, want)
		}
	}
}

func TestDataFrame(t *testing.T) {
	h := newHost(t, warehouse)
	got := h.python(false, `
import postern, pandas
f = postern.sql("types", to="df")
print(" ".join(str(t) for t in f.dtypes))
print(f.i8.tolist(), f.full.tolist(), f.b.isna().tolist(), f.f8.isna().sum(), f.near[3], f.near[0], f.ts[1], len(f), list(f.columns)[:2])
many = postern.sql("many", to="df")
print(len(many), many.a.sum(), many.b.iloc[-1], many.a.dtype)
`)
	want := `boolean Int16 Int32 Int64 UInt32 UInt64 float32 float64 object object object object object object object object object datetime64[ns, UTC] int32
[9007199254740993, -9223372036854775808, 9223372036854775807, <NA>, 5, 9007199254740993] [1, -2147483648, 2147483647, 0, 5, 1] [False, False, False, True, False, False] 2 NaT 2020-01-01 00:00:00.000001+00:00 infinity 6 ['b', 'i2']
300000 44999850000 row 299999 int64`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// Live variables are bound, typed, never pasted.
func TestVariables(t *testing.T) {
	h := newHost(t, warehouse)
	asked := func(i int) *posternv1.SQLRequest {
		h.backend.mu.Lock()
		defer h.backend.mu.Unlock()
		return h.backend.asked[i]
	}
	h.python(false, `
import datetime, decimal, uuid, numpy, pandas, postern
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.extension_manager.load_extension("postern")
shell.push(dict(n=5, evil="'; drop table t; --", nothing=None, some=[1, 2.5, None], flag=True, blob=b"\x00\xff",
  day=datetime.date(2020, 1, 2), at=datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.timezone.utc), d=decimal.Decimal("1.10"),
  np=numpy.int32(7), arr=numpy.array([1, 2]), col=pandas.Series(["a", "b"]), stamp=pandas.Timestamp("2020-01-02"), nat=pandas.NaT,
  f32=numpy.float32(0.1), big=2**80, u=uuid.UUID(int=1)))
postern_result = shell.run_line_magic("sql", "--source warehouse insert {{n}} {{evil}} {{nothing}} {{some|list}} {{flag}} :blob ':col' {{day}} {{at}} {{d}} {{np}} {{arr|list}} {{col|list}} {{stamp}} {{nat}} {{f32}} {{big}} {{u}} x::int a[1:n]")
shell.run_cell_magic("sql", "-p n=6", "insert :n")
`)
	text := func(r *posternv1.SQLRequest) map[string]string {
		m := map[string]string{}
		for _, p := range r.Parameters {
			v := "NULL"
			if p.Value != nil {
				v = *p.Value
			}
			m[p.Name] = p.Type + " " + v
		}
		return m
	}
	got, _ := json.Marshal(text(asked(0)))
	want, _ := json.Marshal(map[string]string{
		"n": "int8 5", "evil": " '; drop table t; --", "nothing": " NULL", "some": `numeric ["1", "2.5", null]`, "flag": "bool true", "blob": `bytea \x00ff`,
		"day": "date 2020-01-02", "at": "timestamptz 2020-01-02 03:00:00+00:00", "d": "numeric 1.10", "np": "int8 7", "arr": `int8 ["1", "2"]`, "col": ` ["a", "b"]`,
		"stamp": "timestamp 2020-01-02 00:00:00", "nat": " NULL", "f32": "float8 0.1", "big": "numeric 1208925819614629174706176", "u": "uuid 00000000-0000-0000-0000-000000000001",
	})
	if !bytes.Equal(got, want) {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if r := asked(1); text(r)["n"] != " 6" || r.Sql != "insert :n" || r.Source != "warehouse" {
		t.Errorf("got %v", r)
	}
	for program, want := range map[string]string{
		`postern.sql("select {{nix}}")`:                                       "NameError: the statement asks for {{nix}}, and there is no variable of that name",
		`postern.sql("select {{x}}", x=object())`:                             "TypeError: variable 'x' is a object, which can't be bound",
		`postern.sql("select {{x}}", x=[1, "a"])`:                             "ValueError: variable 'x': a list has elements of one kind: element 1",
		`postern.sql("select {{x}}", x="\udc80")`:                             "ValueError: variable 'x' has characters that are no text",
		`postern.sql("select * from nix")`:                                    `postern._client.Error: relation "nix" does not exist`,
		`postern.sql("half")`:                                                 "postern._client.Error: more than 10 rows",
		`postern.sql("select 1", source="hr")`:                                "may not use a data source \"hr\"",
		`import os; os.environ["POSTERN_SOCKET"] = "/nix"; postern.sources()`: "Unavailable: agentd on this host can't be reached",
	} {
		got := h.python(true, "import postern, traceback\ntry:\n    "+program+"\n    print('nothing was raised')\nexcept Exception: traceback.print_exc()")
		if !strings.Contains(got, want) {
			t.Errorf("%s: got %s", program, got)
		}
	}
	if got := h.python(true, "import postern\ntry: postern.sql('select nix')\nexcept postern.Error as e: print(e.code, e.sqlstate, e.position, e.hint)"); got != "SQL 42P01 15 look again" {
		t.Error(got)
	}
}

// The module asks for the values that the statement needs on its engine, and for no others.
func TestPlaceholders(t *testing.T) {
	var sources []Source
	for _, engine := range []string{"postgres", "mysql", "sqlite"} {
		sources = append(sources, Source{Name: "my " + engine, Engine: engine})
	}
	h := newHost(t, sources...)
	type question struct {
		Source, Text string
		Want         []string
	}
	var ask []question
	for _, test := range sqlsplittest.Placeholders() {
		for _, engine := range test.Engines {
			ask = append(ask, question{"my " + engine, test.Text, append([]string{}, test.Names...)})
		}
	}
	text, err := json.Marshal(ask)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "cases")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	got := h.python(true, `
import json, postern
from postern import _client
cases = json.load(open("`+file+`"))
for c in cases:
    braces, colons = _client._placeholders(c["Text"], c["Source"])
    if sorted(braces | colons) != c["Want"]: print(c, braces, colons)
print(len(cases))
`)
	if got != fmt.Sprint(len(ask)) {
		t.Error(got)
	}
	got = h.python(false, `
import postern
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.extension_manager.load_extension("postern")
shell.push(dict(n=5))
shell.run_cell_magic("sql", "--source 'my mysql'", "insert 'it\\'s {{no}}', \":n\", {{n}} # it's :no")
try: postern.sql("insert 'it\\'s {{no}}'", source="my postgres")
except NameError as e: print(e)
try: postern.sql("insert " + " ".join(":n%0250d" % i for i in range(3000)), source="my sqlite")
except postern.Error as e: print(e.code, e)
`)
	if !strings.Contains(got, "asks for {{no}}, and there is no variable") || !strings.Contains(got, "INVALID the names of the statement's placeholders have 762000 bytes") {
		t.Error(got)
	}
	h.backend.mu.Lock()
	defer h.backend.mu.Unlock()
	if len(h.backend.asked) != 1 || len(h.backend.asked[0].Parameters) != 1 || h.backend.asked[0].Parameters[0].Name != "n" {
		t.Errorf("it ran %v", h.backend.asked)
	}
	if _, err := find("oracle", "select 1"); err == nil || proto.CodeOf(err) != proto.CodeInternal {
		t.Errorf("an engine that nobody knows: %v", err)
	}
}

func TestSources(t *testing.T) {
	two := newHost(t, warehouse, Source{Name: "shop", Engine: "mysql", Mode: "metadata", Masked: true})
	if got := two.python(true, "import postern; print([s['name'] for s in postern.sources()])"); got != "['warehouse', 'shop']" {
		t.Error(got)
	}
	if got := two.python(true, "import postern\ntry: postern.sql('select 1')\nexcept postern.Error as e: print(e)"); !strings.Contains(got, "warehouse, shop") {
		t.Error(got)
	}
	if got := newHost(t).python(true, "import postern\ntry: postern.sql('select 1')\nexcept postern.Error as e: print(e.code, e)"); !strings.HasPrefix(got, "POLICY_DENIED kernels may use no data source") {
		t.Error(got)
	}
}

// An interrupt in the notebook cancels the statement.
func TestInterrupt(t *testing.T) {
	h := newHost(t, warehouse)
	got := h.python(true, `
import postern, signal, threading, time, os
def interrupt():
    while not os.path.exists("`+h.backend.waiting+`"):
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler) # a job in the background ignores it
threading.Thread(target=interrupt, daemon=True).start()
try:
    postern.sql("wait")
except KeyboardInterrupt:
    print("interrupted")
`)
	if got != "interrupted" {
		t.Error(got)
	}
	select {
	case <-h.backend.cancelled:
	case <-time.After(time.Minute):
		t.Error("the statement goes on")
	}
}

// What a kernel sends may be anything.
func TestHostileKernel(t *testing.T) {
	h := newHost(t, warehouse)
	for name, text := range map[string]string{
		"another frame": "x\x00\x00\x00\x00", "too long": "q\xff\xff\xff\xff", "not JSON": "q\x00\x00\x00\x01{",
		"unknown": "q\x00\x00\x00\x0c{\"op\":\"nix\"}", "wrong type": "q\x00\x00\x00\x0a{\"op\": 77}", "half": "q\x00\x00\x00\x0a{",
	} {
		conn, err := net.Dial("unix", h.socket)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		if name == "half" {
			_ = conn.(*net.UnixConn).CloseWrite()
		}
		answer, err := io.ReadAll(conn)
		_ = conn.Close()
		if err != nil || len(answer) < 5 || answer[0] != 'e' || !strings.Contains(string(answer), `"code":"INVALID"`) {
			t.Errorf("%s: %q, %v", name, answer, err)
		}
	}
	h.backend.mu.Lock()
	defer h.backend.mu.Unlock()
	if len(h.backend.asked) > 0 {
		t.Errorf("it ran %v", h.backend.asked)
	}
}
