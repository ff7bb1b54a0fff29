package rowfmt_test

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"
	"testing/quick"
	"unicode/utf8"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/memory"
	"github.com/apache/arrow-go/v18/parquet/file"
	"github.com/apache/arrow-go/v18/parquet/pqarrow"

	"github.com/postern-dev/postern/proto/rowfmt"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestGolden(t *testing.T) {
	src := sample(t)
	for _, f := range []rowfmt.Format{rowfmt.CSV, rowfmt.JSON, rowfmt.NDJSON, rowfmt.Table} {
		t.Run(string(f), func(t *testing.T) {
			got := convert(t, src, f, rowfmt.Options{})
			name := filepath.Join("testdata", "sample."+string(f))
			if *update {
				if err := os.WriteFile(name, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s differs from %s:\n%s", f, name, got)
			}
			// However the bytes trickle in, the result is the same.
			var slow bytes.Buffer
			if err := rowfmt.Convert(context.Background(), &slow, iotest.OneByteReader(bytes.NewReader(src)), f, rowfmt.Options{}); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(slow.Bytes(), want) {
				t.Errorf("%s: the result depends on how the bytes arrive", f)
			}
		})
	}
}

func TestGoldenJSONIsJSON(t *testing.T) {
	src := sample(t)
	var whole []map[string]any
	text := convert(t, src, rowfmt.JSON, rowfmt.Options{})
	if err := json.Unmarshal(text, &whole); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	lines := bytes.Split(bytes.TrimSuffix(convert(t, src, rowfmt.NDJSON, rowfmt.Options{}), []byte("\n")), []byte("\n"))
	if len(whole) != 7 || len(lines) != 7 {
		t.Fatalf("json has %d rows, ndjson %d, want 7", len(whole), len(lines))
	}
	for i, line := range lines {
		if !json.Valid(line) || !utf8.Valid(line) {
			t.Errorf("line %d is not JSON: %q", i+1, line)
		}
	}
}

func TestArrowIsACopy(t *testing.T) {
	src := sample(t)
	if got := convert(t, src, rowfmt.Arrow, rowfmt.Options{}); !bytes.Equal(got, src) {
		t.Error("arrow: the bytes changed")
	}
}

func TestParquetReadsBack(t *testing.T) {
	src := sample(t)
	data := convert(t, src, rowfmt.Parquet, rowfmt.Options{})
	reader, err := file.NewParquetReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	fr, err := pqarrow.NewFileReader(reader, pqarrow.ArrowReadProperties{}, memory.DefaultAllocator)
	if err != nil {
		t.Fatal(err)
	}
	table, err := fr.ReadTable(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if table.NumRows() != 7 || table.NumCols() != 16 {
		t.Fatalf("parquet has %d rows and %d columns", table.NumRows(), table.NumCols())
	}
	if got := table.Schema().Field(15).Name; got != "t_2" {
		t.Errorf("the second column t is called %q, want t_2", got)
	}
	if got, _ := table.Schema().Field(8).Metadata.GetValue("pg.type"); got != "numeric" {
		t.Errorf("pg.type of column n is %q, want numeric", got)
	}
	ints := table.Column(3).Data().Chunk(0).(*array.Int64)
	if got := ints.Value(0); got != 9007199254740993 {
		t.Errorf("i8 = %d", got)
	}
	if !ints.IsNull(2) {
		t.Error("NULL is lost")
	}
	if got := table.Column(7).Data().Chunk(0).(*array.String).Value(0); got != "plain" {
		t.Errorf("t = %q", got)
	}
}

func TestParquetRowGroupsAreBounded(t *testing.T) {
	wide := strings.Repeat("x", 100_000)
	rows := make([][]any, 700)
	for i := range rows {
		rows[i] = []any{strconv.Itoa(i) + wide}
	}
	src := encode(t, []arrow.Field{field("t", arrow.BinaryTypes.String, "text")}, rows, 400)
	data := convert(t, src, rowfmt.Parquet, rowfmt.Options{})
	reader, err := file.NewParquetReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if reader.NumRows() != 700 {
		t.Errorf("%d rows, want 700", reader.NumRows())
	}
	for i := range reader.NumRowGroups() {
		if got := reader.RowGroup(i).ByteSize(); got > 20<<20 {
			t.Errorf("row group %d has %d bytes", i, got)
		}
	}
	if reader.NumRowGroups() < 4 {
		t.Errorf("%d row groups, want at least 4", reader.NumRowGroups())
	}
}

func TestCSVProperty(t *testing.T) {
	fields := []arrow.Field{field("k", arrow.PrimitiveTypes.Int64, "int8"), field("a", arrow.BinaryTypes.String, "text"), field("b", arrow.BinaryTypes.String, "text")}
	check := func(a, b []string, long uint16) bool {
		rows := [][]any{}
		for i := range min(len(a), len(b)) {
			rows = append(rows, []any{i, strings.Repeat(a[i], 1+int(long)%2*3000), b[i]})
		}
		text := convert(t, encode(t, fields, rows, 5), rowfmt.CSV, rowfmt.Options{})
		got, err := csv.NewReader(bytes.NewReader(text)).ReadAll()
		if err != nil || len(got) != len(rows)+1 {
			t.Logf("%v, %d records", err, len(got))
			return false
		}
		for i, row := range rows {
			// The reader folds CRLF into LF, within quotes too.
			fold := func(s any) string { return strings.ReplaceAll(s.(string), "\r\n", "\n") }
			if got[i+1][0] != strconv.Itoa(i) || got[i+1][1] != fold(row[1]) || got[i+1][2] != fold(row[2]) {
				t.Logf("%q != %q", got[i+1], row)
				return false
			}
		}
		return true
	}
	if err := quick.Check(check, nil); err != nil {
		t.Error(err)
	}
	if !check([]string{"", `"`, ",", "\r", "\n", `a"b`, `\.`}, []string{"x", "", `""`, "\r\n", "ü", "'", "\x00"}, 1) {
		t.Error("the special strings do not survive")
	}
}

func TestJSONProperty(t *testing.T) {
	fields := []arrow.Field{field("s", arrow.BinaryTypes.String, "text"), field("f", arrow.PrimitiveTypes.Float64, "float8"), field("j", arrow.BinaryTypes.String, "jsonb")}
	check := func(texts []string, raw []byte, f float64, long bool) bool {
		rows := [][]any{}
		for _, s := range append(texts, string(raw)) {
			if long {
				s = strings.Repeat(s+"é", 1+70_000/(len(s)+2))
			}
			rows = append(rows, []any{s, f, s})
		}
		text := convert(t, encode(t, fields, rows, 5), rowfmt.JSON, rowfmt.Options{})
		var got []struct {
			S string
			F float64
			J any
		}
		if err := json.Unmarshal(text, &got); err != nil || len(got) != len(rows) {
			t.Logf("%v in %.200q", err, text)
			return false
		}
		for i, row := range rows {
			want := strings.ToValidUTF8(row[0].(string), "\ufffd")
			if !utf8.ValidString(row[0].(string)) { // one U+FFFD a byte, like Go's own
				want = string([]rune(row[0].(string)))
			}
			if got[i].S != want || got[i].F != f {
				t.Logf("%q != %q, %v != %v", got[i].S, want, got[i].F, f)
				return false
			}
		}
		return true
	}
	if err := quick.Check(check, &quick.Config{MaxCount: 25}); err != nil {
		t.Error(err)
	}
}

// TestPiecesKeepCharacters: a long text is written in pieces, and no character of it is cut in
// two, also where bytes follow that are no character's.
func TestPiecesKeepCharacters(t *testing.T) {
	fields := []arrow.Field{field("s", arrow.BinaryTypes.String, "text")}
	for _, around := range []string{"é", "€", "𝄞", "é\x80", "é\x80\x80\x80\x80", "𝄞\x80\x80\x80\x80\x80", "a\x80\x80\x80\x80\x80", "\xf0\x9d\x84é"} {
		for pad := range 2 * len(around) {
			s := strings.Repeat("x", pad) + strings.Repeat(around, 34_000/len(around)) // more than a piece
			text := convert(t, encode(t, fields, [][]any{{s}}, 1), rowfmt.JSON, rowfmt.Options{})
			var got []struct{ S string }
			if err := json.Unmarshal(text, &got); err != nil || len(got) != 1 {
				t.Fatalf("%q: %v", around, err)
			}
			if want := string([]rune(s)); got[0].S != want { // one U+FFFD a byte that is no character's
				t.Errorf("%q after %d bytes: got %d characters of text, want %d", around, pad, utf8.RuneCountInString(got[0].S), utf8.RuneCountInString(want))
			}
		}
	}
}

func TestDuplicateNames(t *testing.T) {
	text := arrow.BinaryTypes.String
	src := encode(t, []arrow.Field{field("a", text, "text"), field("a", text, "text"), field("a_2", text, "text"), field("a", text, "text"), field("", text, "text"), field("", text, "text")},
		[][]any{{"1", "2", "3", "4", "5", "6"}}, 1)
	got := string(convert(t, src, rowfmt.NDJSON, rowfmt.Options{}))
	want := `{"a":"1","a_3":"2","a_2":"3","a_4":"4","":"5","_2":"6"}` + "\n"
	if got != want {
		t.Errorf("got %s want %s", got, want)
	}
	if got := string(convert(t, src, rowfmt.CSV, rowfmt.Options{})); got != "a,a,a_2,a,,\n1,2,3,4,5,6\n" {
		t.Errorf("csv: %q", got)
	}
}

func TestEmptyResults(t *testing.T) {
	text := arrow.BinaryTypes.String
	tests := []struct {
		name   string
		fields []arrow.Field
		rows   [][]any
		want   map[rowfmt.Format]string
	}{
		{"no rows", []arrow.Field{field("a", text, "text")}, nil, map[rowfmt.Format]string{
			rowfmt.CSV: "a\n", rowfmt.JSON: "[]\n", rowfmt.NDJSON: "", rowfmt.Table: " a\n---\n(0 rows)\n",
		}},
		{"no columns", nil, nil, map[rowfmt.Format]string{rowfmt.CSV: "", rowfmt.JSON: "[]\n", rowfmt.NDJSON: "", rowfmt.Table: ""}},
		{"a row of no columns", nil, [][]any{{}}, map[rowfmt.Format]string{
			rowfmt.CSV: "\n", rowfmt.JSON: "[\n{}\n]\n", rowfmt.NDJSON: "{}\n", rowfmt.Table: "--\n(1 row)\n",
		}},
		{"a NULL alone", []arrow.Field{field("a", text, "text")}, [][]any{{nil}, {""}}, map[rowfmt.Format]string{
			rowfmt.CSV: "a\n\n\"\"\n", rowfmt.NDJSON: "{\"a\":null}\n{\"a\":\"\"}\n", rowfmt.Table: " a\n---\n \n \n(2 rows)\n",
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			src := encode(t, test.fields, test.rows, 10)
			for f, want := range test.want {
				if got := string(convert(t, src, f, rowfmt.Options{})); got != want {
					t.Errorf("%s: got %q, want %q", f, got, want)
				}
			}
		})
	}
}

func TestTableStreamsAfterSizing(t *testing.T) {
	fields := []arrow.Field{field("n", arrow.PrimitiveTypes.Int32, "int4"), field("t", arrow.BinaryTypes.String, "text")}
	var rows [][]any
	for i := range 1500 {
		rows = append(rows, []any{i, strings.Repeat("x", i/300)})
	}
	rows[1400][1] = strings.Repeat("wide ", 10)
	text := string(convert(t, encode(t, fields, rows, 700), rowfmt.Table, rowfmt.Options{}))
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if len(lines) != 1503 || lines[1502] != "(1500 rows)" {
		t.Fatalf("%d lines, the last %q", len(lines), lines[len(lines)-1])
	}
	if lines[0] != "  n  |  t" || lines[1] != "-----+-----" || lines[2] != "   0 | " || lines[302] != " 300 | x" {
		t.Errorf("header and rows:\n%s", strings.Join(lines[:4], "\n"))
	}
	if !strings.HasSuffix(lines[1402], "| "+rows[1400][1].(string)) {
		t.Errorf("wide row: %q", lines[1402])
	}
}

// limitedWriter fails after n bytes.
type limitedWriter struct{ n int }

var errFull = errors.New("the disk is full")

func (w *limitedWriter) Write(p []byte) (int, error) {
	if w.n -= len(p); w.n < 0 {
		return 0, errFull
	}
	return len(p), nil
}

func TestErrors(t *testing.T) {
	src := sample(t)
	broken := errors.New("the line broke")
	all := []rowfmt.Format{rowfmt.CSV, rowfmt.JSON, rowfmt.NDJSON, rowfmt.Table, rowfmt.Parquet}
	for _, f := range all {
		t.Run(string(f), func(t *testing.T) {
			for n := 1; n < len(src)-8; n += 97 {
				var dst bytes.Buffer
				err := rowfmt.Convert(context.Background(), &dst, io.MultiReader(bytes.NewReader(src[:n]), iotest.ErrReader(broken)), f, rowfmt.Options{})
				if !errors.Is(err, broken) {
					t.Fatalf("source fails after %d bytes: %v", n, err)
				}
				if f == rowfmt.JSON && json.Valid(dst.Bytes()) {
					t.Fatalf("half a result is valid JSON: %s", dst.Bytes())
				}
			}
			err := rowfmt.Convert(context.Background(), &limitedWriter{n: 10}, bytes.NewReader(src), f, rowfmt.Options{})
			if !errors.Is(err, errFull) {
				t.Errorf("full disk: %v", err)
			}
			if err := rowfmt.Convert(context.Background(), io.Discard, strings.NewReader(""), f, rowfmt.Options{}); !errors.Is(err, rowfmt.ErrNoSchema) {
				t.Errorf("empty source: %v", err)
			}
			if err := rowfmt.Convert(context.Background(), io.Discard, strings.NewReader("<html>not arrow at all</html>"), f, rowfmt.Options{}); !errors.Is(err, rowfmt.ErrGarbled) {
				t.Errorf("html: %v", err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			if err := rowfmt.Convert(ctx, io.Discard, bytes.NewReader(src), f, rowfmt.Options{}); !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled: %v", err)
			}
			if err := rowfmt.Convert(context.Background(), io.Discard, bytes.NewReader(src), f, rowfmt.Options{MaxMessage: 100}); err == nil || !strings.Contains(err.Error(), "more than the 0 MiB that can be converted") {
				t.Errorf("batch over the limit: %v", err)
			}
		})
	}
	list := encodeList(t)
	if err := rowfmt.Convert(context.Background(), io.Discard, bytes.NewReader(list), rowfmt.CSV, rowfmt.Options{}); err == nil || !strings.Contains(err.Error(), `column "l" has Arrow type list`) {
		t.Errorf("list: %v", err)
	}
	if _, err := rowfmt.ParseFormat("xls"); err == nil || !strings.Contains(err.Error(), "table, csv, json") {
		t.Errorf("unknown format: %v", err)
	}
}

func encodeList(t *testing.T) []byte {
	t.Helper()
	return encode(t, []arrow.Field{{Name: "l", Type: arrow.ListOf(arrow.PrimitiveTypes.Int32)}}, nil, 1)
}

func TestRowsArriveAtOnce(t *testing.T) {
	src := sample(t)
	last := map[rowfmt.Format]string{rowfmt.CSV: ",w\n", rowfmt.NDJSON: `"t_2":"w"}`, rowfmt.JSON: `"t_2":"w"}`}
	for f, row := range last {
		pr, pw := io.Pipe()
		or, ow := io.Pipe()
		done := make(chan error, 1)
		go func() {
			err := rowfmt.Convert(context.Background(), ow, pr, f, rowfmt.Options{})
			ow.CloseWithError(err)
			done <- err
		}()
		// All but the end of the stream: the rows must come without it.
		go pw.Write(src[:len(src)-8])
		var seen []byte
		buf := make([]byte, 4096)
		for !bytes.Contains(seen, []byte(row)) {
			n, err := or.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			seen = append(seen, buf[:n]...)
		}
		pw.Close()
		if _, err := io.Copy(io.Discard, or); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Errorf("%s: %v", f, err)
		}
	}
}

func TestProgress(t *testing.T) {
	var seen []int64
	convert(t, sample(t), rowfmt.CSV, rowfmt.Options{Rows: func(n int64) { seen = append(seen, n) }})
	if len(seen) != 3 || seen[2] != 7 {
		t.Errorf("rows = %v, want 3, 6, 7", seen)
	}
}

// TestNoAllocationPerValue keeps the hot path as it is: what Convert allocates
// does not grow with the rows.
func TestNoAllocationPerValue(t *testing.T) {
	fields, rows := benchRows(20_000)
	src := encode(t, fields, rows, 5000)
	for _, f := range []rowfmt.Format{rowfmt.CSV, rowfmt.NDJSON, rowfmt.Table} {
		got := testing.AllocsPerRun(3, func() {
			_ = rowfmt.Convert(context.Background(), io.Discard, bytes.NewReader(src), f, rowfmt.Options{})
		})
		if got > 400 {
			t.Errorf("%s: %v allocations for 20,000 rows", f, got)
		}
	}
}

// TestMemoryIsConstant converts 2 million rows from a source that repeats one
// batch.
func TestMemoryIsConstant(t *testing.T) {
	fields, rows := benchRows(10_000)
	one := encode(t, fields, rows, len(rows))
	head := encode(t, fields, nil, 1)
	head = head[:len(head)-8]
	body := one[len(head) : len(one)-8]
	for _, f := range []rowfmt.Format{rowfmt.CSV, rowfmt.Parquet} {
		t.Run(string(f), func(t *testing.T) {
			count := 200
			if f == rowfmt.Parquet {
				count = 60
			}
			src := io.MultiReader(bytes.NewReader(head), &repeat{body: body, n: count})
			var peak uint64
			var stats runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&stats)
			before := stats.HeapAlloc
			err := rowfmt.Convert(context.Background(), io.Discard, src, f, rowfmt.Options{Rows: func(n int64) {
				if n%200_000 == 0 {
					runtime.GC()
					runtime.ReadMemStats(&stats)
					peak = max(peak, stats.HeapAlloc)
				}
			}})
			if err != nil {
				t.Fatal(err)
			}
			if grown := int64(peak) - int64(before); grown > 64<<20 {
				t.Errorf("the heap grew by %d MiB", grown>>20)
			}
		})
	}
}

type repeat struct {
	body []byte
	n    int
	rest []byte
}

func (r *repeat) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		if r.n == 0 {
			return 0, io.EOF
		}
		r.n--
		r.rest = r.body
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// TestClaimsCostNothing: a stream that claims a huge body gets no memory for it.
func TestClaimsCostNothing(t *testing.T) {
	src := sample(t)
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	before := stats.TotalAlloc
	count := 0
	for i := 0; i < len(src); i += 3 { // the high bytes of sizes among them
		count++
		bad := bytes.Clone(src)
		bad[i] = 0x7f
		_ = rowfmt.Convert(context.Background(), io.Discard, bytes.NewReader(bad), rowfmt.CSV, rowfmt.Options{})
	}
	runtime.ReadMemStats(&stats)
	if each := (stats.TotalAlloc - before) / uint64(count); each > 4<<20 {
		t.Errorf("%d bytes allocated for each garbled stream of %d", each, len(src))
	}
}

func TestFloats(t *testing.T) {
	check := func(v float64) bool {
		src := encode(t, []arrow.Field{field("f", arrow.PrimitiveTypes.Float64, "float8")}, [][]any{{v}}, 1)
		text := strings.TrimSuffix(strings.TrimPrefix(string(convert(t, src, rowfmt.CSV, rowfmt.Options{})), "f\n"), "\n")
		got, err := strconv.ParseFloat(text, 64)
		return err == nil && math.Float64bits(got) == math.Float64bits(v)
	}
	if err := quick.Check(check, nil); err != nil {
		t.Error(err)
	}
	for _, v := range []float64{0, math.Copysign(0, -1), 1, -1, 1e14, 999999999999999, 1e15, 1e-4, 9.9e-5, math.MaxFloat64, math.SmallestNonzeroFloat64} {
		if !check(v) {
			t.Errorf("%v does not survive", v)
		}
	}
}

func FuzzConvert(f *testing.F) {
	src := sample(f)
	f.Add(src, uint8(0))
	f.Add(src[:len(src)/2], uint8(1))
	f.Add(encode(f, nil, [][]any{{}}, 1), uint8(2))
	f.Add([]byte("\xff\xff\xff\xff\x00\x00\x00\x00"), uint8(3))
	f.Add([]byte{}, uint8(4))
	formats := rowfmt.Formats()
	f.Fuzz(func(t *testing.T, data []byte, which uint8) {
		format := formats[int(which)%len(formats)]
		var dst bytes.Buffer
		err := rowfmt.Convert(context.Background(), &dst, bytes.NewReader(data), format, rowfmt.Options{MaxMessage: 1 << 20})
		if err != nil {
			return
		}
		switch format {
		case rowfmt.JSON:
			if !json.Valid(dst.Bytes()) || !utf8.Valid(dst.Bytes()) {
				t.Errorf("not JSON: %q", dst.Bytes())
			}
		case rowfmt.Table:
			for _, c := range dst.Bytes() {
				if c < ' ' && c != '\n' || c == 0x7f {
					t.Errorf("control character %#x in a table", c)
				}
			}
		}
	})
}

// TestExcerpt: a table says where rows are missing, wherever that is.
func TestExcerpt(t *testing.T) {
	for _, test := range []struct {
		rows          int
		after         int64
		before, where string
	}{
		{3, 0, "", "   1"}, {3, 2, "   2", "   3"}, {3, 3, "   3", "(3 of 10 rows)"}, {1500, 1200, "1200", "1201"}, {0, 0, "", "(0 of 7 rows)"},
	} {
		fields := []arrow.Field{{Name: "n", Type: arrow.PrimitiveTypes.Int64, Nullable: true}}
		rows := make([][]any, test.rows)
		for i := range rows {
			rows[i] = []any{i + 1}
		}
		src := encode(t, fields, rows, 100)
		var out bytes.Buffer
		err := rowfmt.Convert(t.Context(), &out, bytes.NewReader(src), rowfmt.Table, rowfmt.Options{Excerpt: rowfmt.Excerpt{After: test.after, Missing: 7}})
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(out.String(), "\n")
		at := slices.Index(lines, " ... 7 rows ...")
		if at < 0 || strings.TrimSpace(lines[at+1]) != strings.TrimSpace(test.where) || test.before != "" && strings.TrimSpace(lines[at-1]) != strings.TrimSpace(test.before) {
			t.Errorf("%d rows, gap after %d: at line %d of\n%.200s", test.rows, test.after, at, out.String())
		}
		if strings.Count(out.String(), "...") != 2 {
			t.Errorf("more than one gap: %.200s", out.String())
		}
	}
}
