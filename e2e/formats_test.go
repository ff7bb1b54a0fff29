package e2e

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"github.com/apache/arrow-go/v18/arrow/memory"
	"github.com/apache/arrow-go/v18/parquet/file"
	"github.com/apache/arrow-go/v18/parquet/pqarrow"

	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/e2e/stack"
)

// mixed has a column of every common type, rows with ends of ranges, odd texts
// and NULLs.
var mixed = []string{
	`create table mixed (
		id int8 primary key, b bool, i2 int2, i4 int4, n numeric, f4 float4, f8 float8, t text, v varchar(20), c char(5), u uuid,
		d date, tm time, ts timestamp, tz timestamptz, iv interval, j jsonb, y bytea, a int4[], ip inet)`,
	`insert into mixed values
		(1, true, 32767, 2147483647, 12345678901234567890.123456789, 1.5, 2.25, 'plain', 'v', 'c', '00000000-0000-0000-0000-000000000001',
			'2026-11-22', '13:14:15.123456', '2026-11-22 13:14:15.123456', '2026-11-22 13:14:15.123456+02', '1 day 02:03:04', '{"k": [1, null, "x"]}', '\x00ff10', '{1,2,NULL}', '10.0.0.1/8'),
		(2, false, -32768, -2147483648, -0.00000001, 'NaN', 'Infinity', E'quote " comma , line\nbreak\ttab', '', '', 'ffffffff-ffff-ffff-ffff-ffffffffffff',
			'0001-01-01', '00:00:00', '1970-01-01', '1970-01-01 00:00:00+00', '-1 year', '[]', '', '{}', '::1'),
		(3, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null),
		(4, true, 0, 0, 0, -0.0, 5e-324, 'Grüße, 世界 🙂', '\.', 'äöü', '12345678-1234-1234-1234-123456789abc',
			'9999-12-31', '23:59:59.999999', '9999-12-31 23:59:59.999999', '2000-02-29 12:00:00-11:30', '00:00:00.000001', 'null', '\xdeadbeef', '{2147483647}', '192.168.0.0/16')`,
	`grant select on mixed to reader`,
	`create table bulk as select i::int8 as id, 'name, ' || i as name, (i * 0.25)::numeric(12,2) as amount, timestamp '2026-01-01' + i * interval '1 second' as at,
		case when i % 3 = 0 then null else 'note "' || i % 7 || '"' end as note from generate_series(1, 300000) i`,
	`grant select on bulk to reader`,
}

// psql runs psql as the role reader, in UTC, and returns what it prints.
func psql(t *testing.T, pg *pgserver.Server, database string, args ...string) []byte {
	t.Helper()
	args = append([]string{"-X", "-q", "-h", pg.Host, "-p", strconv.Itoa(pg.Port), "-U", "reader", "-d", database, "-v", "ON_ERROR_STOP=1"}, args...)
	cmd := exec.CommandContext(t.Context(), pg.Bin("psql"), args...)
	cmd.Env = []string{"PGPASSWORD=" + readerPassword, "PGTZ=UTC", "PGCLIENTENCODING=UTF8", "LC_ALL=C.UTF-8", "HOME=/nonexistent", "PATH=" + os.Getenv("PATH")}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("psql: %v: %s", err, stderr.String())
	}
	return out
}

// TestFormats compares every output format with what psql shows of the same rows.
func TestFormats(t *testing.T) {
	pg := database(t, "formats")
	if err := pg.SQLIn(t.Context(), "formats", mixed...); err != nil {
		t.Fatal(err)
	}
	s := newStack(t, stack.Options{})
	if _, err := s.Join(t.Context(), "host", "sources:\n"+mustSource(t, s.Dir, "db", pg.SocketDSN("reader", "formats"), "")); err != nil {
		t.Fatal(err)
	}
	get := func(format, sql string) []byte {
		t.Helper()
		e := postern(t, s, "sql", "host/db", "-f", format, sql)
		if e.code != 0 || e.stderr != "" {
			t.Fatalf("%s: exit code %d: %s", format, e.code, e.stderr)
		}
		return []byte(e.stdout)
	}

	// What the database says, each value as its own text; NULL is \N.
	const all = "select * from mixed order by id"
	reference := records(t, psql(t, pg, "formats", "-c", `copy (select id, b, i2, i4, n, f4, f8, t, v, c, u, d, tm, ts, tz, iv, j, y, a, ip from mixed order by id) to stdout (format csv, header, null '\N')`))
	header, want := reference[0], reference[1:]

	t.Run("csv", func(t *testing.T) {
		got := records(t, get("csv", all))
		if !slices.Equal(got[0], header) || len(got) != len(want)+1 {
			t.Fatalf("got %v and %d rows", got[0], len(got)-1)
		}
		for r, row := range got[1:] {
			for c, value := range row {
				if expected := want[r][c]; !same(header[c], value, strings.TrimPrefix(expected, `\N`)) {
					t.Errorf("row %d, %s: got %q, want %q", r+1, header[c], value, expected)
				}
			}
		}
	})
	for _, format := range []string{"json", "ndjson"} {
		t.Run(format, func(t *testing.T) {
			text := get(format, all)
			var rows []map[string]json.RawMessage
			if format == "json" {
				if err := json.Unmarshal(text, &rows); err != nil {
					t.Fatal(err)
				}
			} else {
				for line := range bytes.Lines(text) {
					var row map[string]json.RawMessage
					if err := json.Unmarshal(line, &row); err != nil {
						t.Fatalf("%v: %s", err, line)
					}
					rows = append(rows, row)
				}
			}
			if len(rows) != len(want) {
				t.Fatalf("%d rows, want %d", len(rows), len(want))
			}
			for r, row := range rows {
				for c, name := range header {
					value, null := plainJSON(t, row[name])
					if expected := want[r][c]; null != (expected == `\N` || name == "j" && expected == "null") || !null && !same(name, value, expected) {
						t.Errorf("row %d, %s: got %s, want %q", r+1, name, row[name], expected)
					}
				}
			}
		})
	}
	t.Run("table", func(t *testing.T) {
		// As psql shows it, but for blanks at the ends of lines and for booleans.
		for _, sql := range []string{
			"select id, i4, n, v, u, d, iv, j, a, ip from mixed where id <> 2 order by id",
			"select id, name, amount from bulk order by id limit 20",
			"select id from mixed where false",
		} {
			if got, want := trimLines(get("table", sql)), trimLines(psql(t, pg, "formats", "-P", "pager=off", "-c", sql)); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		}
	})
	t.Run("arrow", func(t *testing.T) {
		reader, err := ipc.NewReader(bytes.NewReader(get("arrow", all)))
		if err != nil {
			t.Fatal(err)
		}
		defer reader.Release()
		var rows int
		for reader.Next() {
			checkBatch(t, reader.RecordBatch(), header, want[rows:])
			rows += int(reader.RecordBatch().NumRows())
		}
		if err := reader.Err(); (err != nil && !errors.Is(err, io.EOF)) || rows != len(want) {
			t.Errorf("%d rows, %v", rows, err)
		}
	})
	t.Run("parquet", func(t *testing.T) {
		pf, err := file.NewParquetReader(bytes.NewReader(get("parquet", all)))
		if err != nil {
			t.Fatal(err)
		}
		defer pf.Close()
		fr, err := pqarrow.NewFileReader(pf, pqarrow.ArrowReadProperties{BatchSize: 100}, memory.DefaultAllocator)
		if err != nil {
			t.Fatal(err)
		}
		reader, err := fr.GetRecordReader(t.Context(), nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer reader.Release()
		rows := 0
		for reader.Next() {
			checkBatch(t, reader.RecordBatch(), header, want[rows:])
			rows += int(reader.RecordBatch().NumRows())
		}
		if rows != len(want) {
			t.Errorf("%d rows, want %d", rows, len(want))
		}
	})
	t.Run("300,000 rows of csv", func(t *testing.T) {
		got := get("csv", "select * from bulk order by id")
		want := psql(t, pg, "formats", "-c", "copy (select * from bulk order by id) to stdout (format csv, header)")
		if !bytes.Equal(got, want) {
			a, b := bytes.Split(got, []byte("\n")), bytes.Split(want, []byte("\n"))
			t.Errorf("%d bytes in %d lines, psql has %d in %d", len(got), len(a), len(want), len(b))
			for i := range min(len(a), len(b)) {
				if !bytes.Equal(a[i], b[i]) {
					t.Fatalf("line %d: got %s, want %s", i+1, a[i], b[i])
				}
			}
		}
		t.Logf("%d bytes", len(got))
	})
	t.Run("output file", func(t *testing.T) {
		path := s.Dir + "/out.csv"
		if e := postern(t, s, "sql", "host/db", "-f", "csv", "-O", path, "select id from bulk order by id limit 3"); e.code != 0 || e.stdout != "" {
			t.Errorf("exit code %d: %s%s", e.code, e.stdout, e.stderr)
		}
		if text := readSecret(t, path); text != "id\n1\n2\n3" {
			t.Errorf("got %q", text)
		}
		// Whole or not at all.
		postern(t, s, "sql", "host/db", "-f", "csv", "-O", path, "--max-rows", "2", "select id from bulk").said(t, 1, "more than 2 rows")
		if text := readSecret(t, path); text != "id\n1\n2\n3" {
			t.Errorf("got %q", text)
		}
		for _, name := range files(t, s.Dir) {
			if strings.HasPrefix(name, "out.csv") && name != "out.csv" || strings.HasPrefix(name, ".out") {
				t.Errorf("%s is left", name)
			}
		}
	})
}

func records(t *testing.T, text []byte) [][]string {
	t.Helper()
	all, err := csv.NewReader(bytes.NewReader(text)).ReadAll()
	if err != nil {
		t.Fatalf("%v in %.500s", err, text)
	}
	return all
}

// trimLines removes blanks at the ends of lines, and empty lines at the end.
func trimLines(text []byte) string {
	var b strings.Builder
	for line := range strings.Lines(string(text)) {
		b.WriteString(strings.TrimRight(line, " \n") + "\n")
	}
	return strings.TrimSpace(b.String())
}

// same compares a value as we write it with what the database writes; where the
// forms differ on purpose (docs/cli.md) it is the meaning that counts.
func same(column, got, want string) bool {
	switch column {
	case "b":
		return got == map[string]string{"t": "true", "f": "false", "": ""}[want]
	case "f4", "f8":
		g, gerr := strconv.ParseFloat(got, 64)
		w, werr := strconv.ParseFloat(want, 64)
		return got == want || gerr == nil && werr == nil && (g == w || g != g && w != w)
	case "ts", "tz", "tm":
		return instant(got) == instant(want)
	case "j":
		var g, w any
		if json.Unmarshal([]byte(got), &g) == nil && json.Unmarshal([]byte(want), &w) == nil {
			return fmt.Sprint(g) == fmt.Sprint(w)
		}
	}
	return got == want
}

// instant is a time in one of its spellings, all of them UTC here.
func instant(text string) string {
	text = strings.Replace(text, "T", " ", 1)
	for _, zone := range []string{"Z", "+00:00", "+00"} {
		text = strings.TrimSuffix(text, zone)
	}
	if strings.Contains(text, ".") {
		text = strings.TrimRight(strings.TrimRight(text, "0"), ".")
	}
	return text
}

// plainJSON is a JSON value as text.
func plainJSON(t *testing.T, raw json.RawMessage) (text string, null bool) {
	t.Helper()
	if string(raw) == "null" {
		return "", true
	}
	if len(raw) > 0 && raw[0] == '"' {
		if err := json.Unmarshal(raw, &text); err != nil {
			t.Fatal(err)
		}
		return text, false
	}
	return string(raw), false
}

// checkBatch compares Arrow's values with the database's.
func checkBatch(t *testing.T, batch arrow.RecordBatch, header []string, want [][]string) {
	t.Helper()
	if int(batch.NumCols()) != len(header) {
		t.Fatalf("%d columns, want %d", batch.NumCols(), len(header))
	}
	for c, name := range header {
		if got := batch.ColumnName(c); got != name {
			t.Errorf("column %d is %s, want %s", c+1, got, name)
		}
		for r := range int(batch.NumRows()) {
			values, expected := batch.Column(c), want[r][c]
			if values.IsNull(r) != (expected == `\N`) {
				t.Errorf("row %d, %s: null is %v, want %q", r+1, name, values.IsNull(r), expected)
				continue
			}
			if values.IsNull(r) {
				continue
			}
			got := values.ValueStr(r)
			switch values := values.(type) {
			case *array.Binary:
				got = fmt.Sprintf(`\x%x`, values.Value(r))
			case *array.Time64:
				got = values.Value(r).FormattedString(arrow.Microsecond)
			}
			if !same(name, got, expected) {
				t.Errorf("row %d, %s: got %q, want %q", r+1, name, got, expected)
			}
		}
	}
}
