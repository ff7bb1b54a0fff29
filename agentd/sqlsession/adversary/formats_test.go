package adversary

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"unicode"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"github.com/apache/arrow-go/v18/arrow/memory"
	"github.com/apache/arrow-go/v18/parquet/file"
	"github.com/apache/arrow-go/v18/parquet/pqarrow"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto/rowfmt"
)

// TestTypesInEveryFormat: each kind of type that PostgreSQL and its extensions
// have, NULLs and the ends of ranges among the values, is in each format what
// psql shows, by the rules of package rowfmt.
func TestTypesInEveryFormat(t *testing.T) {
	w := ownWorld(t)
	if err := w.script(t.Context(), alpha, "testdata/types.sql"); err != nil {
		t.Fatal(err)
	}
	if err := w.server.SQL(t.Context(), "ALTER ROLE root SET search_path = gen, public"); err != nil {
		t.Fatal(err)
	}
	m, log := newManager(t, w.source("db", roleRoot, alpha, sqlsession.Guard{}))
	names := columns["any"]
	var statements []string
	for _, name := range names {
		statements = append(statements, "SELECT "+name+" FROM a ORDER BY id")
	}
	want := psql(t, w, statements)
	for i, name := range names {
		t.Run(name, func(t *testing.T) {
			got := ask(t, m, log, "db", statements[i], false)
			if got.err != nil {
				t.Fatal(got.err)
			}
			if len(want[i].rows) != 44 {
				t.Fatalf("psql has %d rows, want 44", len(want[i].rows))
			}
			checkArrow(t, w, name, got.stream)
			for j, mine := range ours(t, got.stream) {
				if mine != want[i].rows[j] {
					t.Errorf("csv, row %d: got %q, want %q", j, mine, want[i].rows[j])
				}
			}
			checkJSON(t, got.stream, want[i].rows)
			checkTable(t, got.stream, want[i].rows)
			checkParquet(t, got.stream)
		})
	}
}

func convert(t *testing.T, stream []byte, format rowfmt.Format) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := rowfmt.Convert(t.Context(), &out, bytes.NewReader(stream), format, rowfmt.Options{}); err != nil {
		t.Fatalf("%s: %v", format, err)
	}
	return out.Bytes()
}

// record reads a stream whose rows fit into one batch.
func record(t *testing.T, stream []byte) arrow.RecordBatch {
	t.Helper()
	r, err := ipc.NewReader(bytes.NewReader(stream))
	if err != nil || !r.Next() {
		t.Fatalf("arrow: %v", err)
	}
	t.Cleanup(r.Release)
	return r.RecordBatch()
}

// checkArrow holds the field's metadata against the server's own name of the type.
func checkArrow(t *testing.T, w *world, column string, stream []byte) {
	t.Helper()
	var name string
	var domain bool
	err := w.watcher.QueryRow(t.Context(), `SELECT CASE WHEN n.nspname = 'pg_catalog' THEN y.typname ELSE n.nspname || '.' || y.typname END, d.typtype = 'd'
		FROM pg_attribute a JOIN pg_type d ON d.oid = a.atttypid JOIN pg_type y ON y.oid = CASE WHEN d.typtype = 'd' THEN d.typbasetype ELSE d.oid END JOIN pg_namespace n ON n.oid = y.typnamespace
		WHERE a.attrelid = 'gen.a'::regclass AND a.attname = $1`, column).Scan(&name, &domain)
	if err != nil {
		t.Fatal(err)
	}
	batch := record(t, stream)
	if got, _ := batch.Schema().Field(0).Metadata.GetValue("pg.type"); got != name {
		t.Errorf("arrow: pg.type is %q, want %q", got, name)
	}
	if nulls := batch.Column(0).NullN(); nulls < 4 && column != "id" {
		t.Errorf("arrow: %d NULLs, want 4 at least", nulls)
	}
}

// checkJSON holds json and ndjson against psql's text.
func checkJSON(t *testing.T, stream []byte, want []string) {
	t.Helper()
	var all, lines []map[string]json.RawMessage
	if err := json.Unmarshal(convert(t, stream, rowfmt.JSON), &all); err != nil {
		t.Fatalf("json: %v", err)
	}
	for line := range bytes.Lines(convert(t, stream, rowfmt.NDJSON)) {
		var row map[string]json.RawMessage
		if err := json.Unmarshal(line, &row); err != nil {
			t.Fatalf("ndjson: %v", err)
		}
		lines = append(lines, row)
	}
	if len(all) != len(want) || len(lines) != len(want) {
		t.Fatalf("json has %d rows, ndjson %d, want %d", len(all), len(lines), len(want))
	}
	field := record(t, stream).Schema().Field(0)
	for i := range want {
		for format, rows := range map[string][]map[string]json.RawMessage{"json": all, "ndjson": lines} {
			if wrong := jsonDiffers(rows[i][field.Name], want[i], field); wrong != "" {
				t.Errorf("%s, row %d: %s", format, i, wrong)
			}
		}
	}
}

// jsonDiffers tells what is wrong with a value in JSON for psql's text.
func jsonDiffers(got json.RawMessage, want string, field arrow.Field) string {
	complain := func(expected string) string { return fmt.Sprintf("got %s, want %s", got, expected) }
	var text string
	isText := json.Unmarshal(got, &text) == nil && len(got) > 0 && got[0] == '"'
	if want == nullMark {
		if string(got) != "null" {
			return complain("null")
		}
		return ""
	}
	asText := func(want string) string {
		if !isText || text != want {
			return complain(strconv.Quote(want))
		}
		return ""
	}
	name, _ := field.Metadata.GetValue("pg.type")
	switch {
	case field.Type.ID() == arrow.BOOL:
		if full := map[string]string{"t": "true", "f": "false"}[want]; string(got) != full {
			return complain(full)
		}
		return ""
	case name == "json" || name == "jsonb":
		var a, b bytes.Buffer
		if json.Compact(&a, got) != nil || json.Compact(&b, []byte(want)) != nil || a.String() != b.String() {
			return complain(want)
		}
		return ""
	case want == "NaN" || strings.HasSuffix(want, "nfinity"):
		if name == "date" || strings.HasPrefix(name, "timestamp") || strings.HasPrefix(name, "float") || name == "numeric" {
			return asText(want)
		}
	}
	switch name {
	case "int2", "int4", "int8", "oid", "numeric":
		if string(got) != want {
			return complain(want)
		}
		return ""
	case "float4", "float8":
		bits := 64
		if name == "float4" {
			bits = 32
		}
		g, err1 := strconv.ParseFloat(string(got), bits)
		f, err2 := strconv.ParseFloat(want, bits)
		if err1 != nil || err2 != nil || g != f {
			return complain(want)
		}
		return ""
	case "timestamp":
		return asText(strings.Replace(want, " ", "T", 1))
	case "timestamptz":
		return asText(strings.Replace(strings.Replace(want, " ", "T", 1), "+00", "Z", 1))
	}
	return asText(want)
}

// checkTable holds the table's cells against psql's text, those that fit on a line.
func checkTable(t *testing.T, stream []byte, want []string) {
	t.Helper()
	lines := strings.Split(string(convert(t, stream, rowfmt.Table)), "\n")
	if len(lines) < len(want)+2 {
		t.Fatalf("table: %d lines for %d rows", len(lines), len(want))
	}
	for i, text := range want {
		if text == nullMark {
			text = ""
		}
		if strings.ContainsFunc(text, func(r rune) bool { return unicode.IsControl(r) || unicode.Is(unicode.Cf, r) }) {
			continue // shown as escapes
		}
		if got := strings.Trim(lines[i+2], " "); got != strings.Trim(text, " ") {
			t.Errorf("table, row %d: got %q, want %q", i, got, text)
		}
	}
}

// checkParquet reads the Parquet file back and holds it against the Arrow stream.
func checkParquet(t *testing.T, stream []byte) {
	t.Helper()
	data := convert(t, stream, rowfmt.Parquet)
	f, err := file.NewParquetReader(bytes.NewReader(data))
	if err != nil {
		t.Fatalf("parquet: %v", err)
	}
	defer func() { _ = f.Close() }()
	r, err := pqarrow.NewFileReader(f, pqarrow.ArrowReadProperties{}, memory.DefaultAllocator)
	if err != nil {
		t.Fatalf("parquet: %v", err)
	}
	table, err := r.ReadTable(t.Context())
	if err != nil {
		t.Fatalf("parquet: %v", err)
	}
	defer table.Release()
	want := record(t, stream).Column(0)
	chunks := table.Column(0).Data().Chunks()
	if len(chunks) != 1 || chunks[0].Len() != want.Len() {
		t.Fatalf("parquet: %d chunks, want one with %d values", len(chunks), want.Len())
	}
	for i := range want.Len() {
		a, b := cell(chunks[0], i), cell(want, i)
		if a != b {
			t.Errorf("parquet, row %d: got %s, want %s", i, a, b)
		}
	}
}

// cell is a value in a form that does not depend on the zone's name or on
// infinity's rendering.
func cell(values arrow.Array, i int) string {
	if values.IsNull(i) {
		return "(null)"
	}
	switch v := values.(type) {
	case *array.Timestamp:
		return fmt.Sprint(int64(v.Value(i)))
	case *array.Date32:
		return fmt.Sprint(int32(v.Value(i)))
	case *array.Time64:
		return fmt.Sprint(int64(v.Value(i)))
	}
	return values.ValueStr(i)
}
