package sqlsession_test

import (
	"bytes"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/ipc"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
)

func TestTypes(t *testing.T) {
	if err := server.SQL(t.Context(),
		"CREATE TYPE mood AS ENUM ('sad', 'it''s fine')", "CREATE TYPE pair AS (a int, b text)", "CREATE DOMAIN small AS int CHECK (VALUE < 10)",
	); err != nil {
		t.Fatal(err)
	}
	cleanUp(t, "DROP TYPE mood, pair", "DROP DOMAIN small")
	m := newManager(t, sqlsession.Config{})
	tests := []struct{ expression, arrow, pg, want string }{
		{"true", "bool", "bool", "true"},
		{"false", "bool", "bool", "false"},
		{"32767::int2", "int16", "int2", "32767"},
		{"(-2147483648)::int4", "int32", "int4", "-2147483648"},
		{"9007199254740993::int8", "int64", "int8", "9007199254740993"},
		{"(-9223372036854775808)::int8", "int64", "int8", "-9223372036854775808"},
		{"4294967295::oid", "uint32", "oid", "4294967295"},
		{"1.5::float4", "float32", "float4", "1.5"},
		{"'NaN'::float4", "float32", "float4", "NaN"},
		{"0.1::float8 + 0.2::float8", "float64", "float8", "0.30000000000000004"},
		{"'-Infinity'::float8", "float64", "float8", "-Inf"},
		{"'-0'::float8", "float64", "float8", "-0"},
		{"'x  '::text", "utf8", "text", "x  "},
		{"''::text", "utf8", "text", ""},
		{"'x'::varchar(10)", "utf8", "varchar", "x"},
		{"'x'::char(3)", "utf8", "bpchar", "x  "},
		{"'x'::name", "utf8", "name", "x"},
		{`'x'::"char"`, "utf8", "char", "x"},
		{"U&'e\\0301\\FEFF\\202E\\+01F600' || E'\\x01'", "utf8", "text", "e\u0301\uFEFF\u202E\U0001F600\x01"},
		{"'{ \"b\": 1, \"a\":2, \"a\":3}'::json", "utf8", "json", `{ "b": 1, "a":2, "a":3}`},
		{"'{ \"b\": 1, \"a\":2}'::jsonb", "utf8", "jsonb", `{"a": 2, "b": 1}`},
		{"'<a/>'::xml", "utf8", "xml", "<a/>"},
		{"'\\x00ff'::bytea", "binary", "bytea", "AP8="},
		{"12345678901234567890.123456789::numeric", "utf8", "numeric", "12345678901234567890.123456789"},
		{"'NaN'::numeric", "utf8", "numeric", "NaN"},
		{"'-Infinity'::numeric", "utf8", "numeric", "-Infinity"},
		{"repeat('9', 1500)::numeric", "utf8", "numeric", strings.Repeat("9", 1500)},
		{"1.10::numeric(10,3)", "utf8", "numeric", "1.100"},
		{"'12.34'::money", "utf8", "money", "$12.34"},
		{"date '2000-01-01'", "date32", "date", "2000-01-01"},
		{"date '1969-12-31'", "date32", "date", "1969-12-31"},
		{"time '24:00:00'", "time64[us]", "time", "00:00:00.000000"},
		{"time '01:02:03.000004'", "time64[us]", "time", "01:02:03.000004"},
		{"timetz '01:02:03+05:30'", "utf8", "timetz", "01:02:03+05:30"},
		{"timestamp '2001-02-03 04:05:06.000007'", "timestamp[us]", "timestamp", "2001-02-03T04:05:06.000007Z"},
		{"timestamptz '1893-01-01 00:00:00+00'", "timestamp[us, tz=UTC]", "timestamptz", "1893-01-01T00:00:00Z"},
		{"interval '1 mon -2 days 3.5 s'", "utf8", "interval", "1 mon -2 days +00:00:03.5"},
		{"'00112233-4455-6677-8899-aabbccddeeff'::uuid", "utf8", "uuid", "00112233-4455-6677-8899-aabbccddeeff"},
		{"'1.2.3.4'::inet", "utf8", "inet", "1.2.3.4"},
		{"'1.2.3.0/24'::cidr", "utf8", "cidr", "1.2.3.0/24"},
		{"B'101'", "utf8", "bit", "101"},
		{"point '(1,2)'", "utf8", "point", "(1,2)"},
		{"ARRAY[1,NULL,3]", "utf8", "_int4", "{1,NULL,3}"},
		{"'[-1:1]={1,2,3}'::int[]", "utf8", "_int4", "[-1:1]={1,2,3}"},
		{"ARRAY[ROW(1,'a\"b')::pair]", "utf8", "public._pair", `{"(1,\"a\"\"b\")"}`},
		{"ROW(1,NULL)::pair", "utf8", "public.pair", "(1,)"},
		{"'it''s fine'::mood", "utf8", "public.mood", "it's fine"},
		{"5::small", "int32", "int4", "5"},
		{"int4range(1, 5)", "utf8", "int4range", "[1,5)"},
		{"'[2001-01-01,infinity]'::daterange", "utf8", "daterange", "[2001-01-01,infinity]"},
		{"int4multirange(int4range(1,2), int4range(5,6))", "utf8", "int4multirange", "{[1,2),[5,6)}"},
		{"'fat & rat'::tsquery", "utf8", "tsquery", "'fat' & 'rat'"},
		{"'things'::regclass", "utf8", "regclass", "things"},
		{"pg_lsn '0/16'", "utf8", "pg_lsn", "0/16"},
		{"ROW(1, 'x')", "utf8", "record", "(1,x)"},
	}
	for _, test := range tests {
		t.Run(test.expression[:min(len(test.expression), 40)], func(t *testing.T) {
			// Twice with NULLs around, so that each layout meets them.
			got, _ := query(t, m, request(fmt.Sprintf("SELECT CASE WHEN i IN (2, 4) THEN NULL ELSE %s END AS v FROM generate_series(1, 20) i", test.expression)))
			if strings.HasPrefix(test.expression, "B'") || strings.Contains(test.expression, "small") {
				got, _ = query(t, m, request("SELECT "+test.expression+" AS v FROM generate_series(1, 1)"))
			}
			field := got.schema.Field(0)
			name, _ := field.Metadata.GetValue("pg.type")
			if field.Type.String() != test.arrow || name != test.pg || !field.Nullable {
				t.Errorf("got %s of %s, want %s of %s", field.Type, name, test.arrow, test.pg)
			}
			if _, ok := field.Metadata.GetValue("pg.typmod"); !ok {
				t.Error("no pg.typmod")
			}
			for i, row := range got.rows {
				want := test.want
				if (i == 1 || i == 3) && len(got.rows) > 1 {
					want = "(null)"
				}
				if row[0] != want {
					t.Fatalf("row %d: got %q, want %q", i, row[0], want)
				}
			}
		})
	}
}

// raw runs a statement with one column and returns its only batch.
func raw(t *testing.T, m *sqlsession.Manager, sql string) *ipc.Reader {
	t.Helper()
	var out bytes.Buffer
	if _, err := m.Run(t.Context(), request(sql), &out); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	r, err := ipc.NewReader(&out)
	if err != nil || !r.Next() {
		t.Fatalf("%s: %v", sql, err)
	}
	return r
}

func TestEdgesOfTime(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	stamps := raw(t, m, "SELECT v::timestamptz FROM (VALUES ('infinity'), ('-infinity'), ('4713-01-01 00:00:00+00 BC'), ('1970-01-01 00:00:00+00'), ('294246-12-31 23:59:59.999999+00')) x(v)")
	defer stamps.Release()
	got := stamps.RecordBatch().Column(0).(*array.Timestamp).TimestampValues()
	want := []int64{math.MaxInt64, math.MinInt64, -210863520000000000, 0}
	for i, w := range want {
		if int64(got[i]) != w {
			t.Errorf("timestamp %d: got %d, want %d", i, got[i], w)
		}
	}
	dates := raw(t, m, "SELECT v::date FROM (VALUES ('infinity'), ('-infinity'), ('4713-01-01 BC'), ('5874897-12-31')) x(v)")
	defer dates.Release()
	days := dates.RecordBatch().Column(0).(*array.Date32).Date32Values()
	for i, w := range []int32{math.MaxInt32, math.MinInt32, -2440550, 2145042905} {
		if int32(days[i]) != w {
			t.Errorf("date %d: got %d, want %d", i, days[i], w)
		}
	}
	times := raw(t, m, "SELECT time '24:00:00'")
	defer times.Release()
	if got := times.RecordBatch().Column(0).(*array.Time64).Value(0); got != 86400000000 {
		t.Errorf("24:00:00: got %d, want 86400000000", got)
	}
	// What Arrow can't hold is an error, never a wrong value; the rows before
	// it arrive.
	var out bytes.Buffer
	outcome, err := m.Run(t.Context(), request("SELECT NULL::int, i, CASE WHEN i = 1500 THEN timestamp '294276-12-31' ELSE 'now' END AS late FROM generate_series(1, 3000) i"), &out)
	if proto.CodeOf(err) != proto.CodeInvalid || !strings.Contains(err.Error(), `"late"`) || outcome.Rows != 1499 {
		t.Errorf("got %d rows, %v, want 1499 and an error that names the column", outcome.Rows, err)
	}
	if got := decode(t, out.Bytes()); len(got.rows) != 1499 {
		t.Errorf("got %d rows in the stream, want 1499", len(got.rows))
	}
	query(t, m, request("SELECT 1"))
}

func TestShapes(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	t.Run("no rows", func(t *testing.T) {
		got, outcome := query(t, m, request("SELECT id, name FROM things WHERE false"))
		if got.schema.NumFields() != 2 || len(got.rows) != 0 || outcome.CommandTag != "SELECT 0" {
			t.Errorf("got %v, %d rows", got.schema, len(got.rows))
		}
	})
	t.Run("no columns", func(t *testing.T) {
		got, _ := query(t, m, request("SELECT FROM generate_series(1, 3)"))
		if got.schema.NumFields() != 0 || len(got.rows) != 3 {
			t.Errorf("got %v, %d rows, want none and 3", got.schema, len(got.rows))
		}
	})
	t.Run("same names", func(t *testing.T) {
		got, _ := query(t, m, request(`SELECT 1 AS a, 2 AS a, 3 AS "a b""c", 4`))
		if got.schema.Field(0).Name != "a" || got.schema.Field(1).Name != "a" || got.schema.Field(2).Name != `a b"c` || got.rows[0][1] != "2" {
			t.Errorf("got %v, %v", got.schema, got.rows)
		}
	})
	t.Run("many columns", func(t *testing.T) {
		var sql strings.Builder
		sql.WriteString("SELECT 0 AS c0")
		for i := 1; i < 1600; i++ {
			fmt.Fprintf(&sql, ", CASE WHEN i %% 3 = 0 THEN NULL ELSE i + %d END AS c%d", i, i)
		}
		sql.WriteString(" FROM generate_series(1, 200) i")
		got, _ := query(t, m, request(sql.String()))
		if len(got.rows) != 200 || got.rows[0][1599] != "1600" || got.rows[2][5] != "(null)" {
			t.Errorf("got %d rows", len(got.rows))
		}
	})
	t.Run("rows of many sizes", func(t *testing.T) {
		// Around the read buffer's size and beyond.
		got, _ := query(t, m, request("SELECT i, repeat(chr(65 + i % 26), (i * 7919) % 600000) AS v, NULL::text FROM generate_series(1, 300) i"))
		for i, row := range got.rows {
			n := i + 1
			if want := strings.Repeat(string(rune(65+n%26)), (n*7919)%600000); row[0] != fmt.Sprint(n) || row[1] != want || row[2] != "(null)" {
				t.Fatalf("row %d: got %d bytes, want %d", n, len(row[1]), len(want))
			}
		}
	})
}

func TestGiantValue(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	var counted counter
	outcome, err := m.Run(t.Context(), request("SELECT 1 AS a, repeat('x', 100000000) AS b, 2 AS c, NULL AS d"), &counted)
	if err != nil || outcome.Rows != 1 || counted.n < 100000000 {
		t.Fatalf("got %d rows, %d bytes, %v", outcome.Rows, counted.n, err)
	}
	got, _ := query(t, m, request("SELECT decode(repeat('ab', 5000000), 'hex') UNION ALL SELECT 'x'"))
	if len(got.rows) != 2 {
		t.Fatalf("got %d rows, want 2", len(got.rows))
	}
}

type counter struct{ n int }

func (c *counter) Write(p []byte) (int, error) {
	c.n += len(p)
	return len(p), nil
}

func TestSQLASCII(t *testing.T) {
	if err := server.SQL(t.Context(), "CREATE DATABASE ascii TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'"); err != nil {
		t.Fatal(err)
	}
	cleanUp(t, "DROP DATABASE ascii WITH (FORCE)")
	s := source("db")
	s.DSN = server.DSN("reader", "ascii")
	m := newManager(t, sqlsession.Config{}, s)
	if got, _ := query(t, m, request(`SELECT E'\xc3\xa9'`)); got.rows[0][0] != "é" {
		t.Errorf("got %q, want é", got.rows[0][0])
	}
	// Text in Arrow is UTF-8: what is none is an error of the server's.
	if e := refuse(t, m, request(`SELECT E'\xff'`), proto.CodeSQL); e.SQL.GetSqlstate() != "22021" {
		t.Errorf("got %v, want 22021", e)
	}
	refuse(t, m, request(`SELECT 1, repeat(E'\xff', 1000000) AS bad, 'x'`), proto.CodeSQL)
	query(t, m, request("SELECT 1"))
}
