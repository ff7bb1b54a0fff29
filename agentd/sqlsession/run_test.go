package sqlsession_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestRun(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	got, outcome := query(t, m, request("SELECT id, name FROM things WHERE id < 3 ORDER BY id"))
	if want := [][]string{{"1", "thing 1"}, {"2", "thing 2"}}; !reflect.DeepEqual(got.rows, want) {
		t.Errorf("got %v, want %v", got.rows, want)
	}
	if outcome.CommandTag != "SELECT 2" || outcome.Duration.AsDuration() <= 0 {
		t.Errorf("got %v, want SELECT 2 and a duration", outcome)
	}
	got, _ = query(t, m, request("SELECT i FROM generate_series(1, 300000) i"))
	for i, row := range got.rows {
		if row[0] != fmt.Sprint(i+1) {
			t.Fatalf("row %d: got %s, want %d", i, row[0], i+1)
		}
	}
	if len(got.rows) != 300000 {
		t.Errorf("got %d rows, want 300000", len(got.rows))
	}
}

func TestParameters(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	nasty := `'; DROP TABLE things; -- {{id}} :id`
	tests := []struct {
		name string
		r    sqlsession.Request
		want []string
	}{
		{"inferred type", with("SELECT name FROM things WHERE id = {{id}}", map[string]string{"id": "2"}), []string{"thing 2"}},
		{"both forms, repeated", with("SELECT :a::int + {{a}}, {{b}}::text", map[string]string{"a": "4", "b": "x"}), []string{"8", "x"}},
		{"NULL", with("SELECT :a::text IS NULL", nil, "a"), []string{"true"}},
		{"empty is not NULL", with("SELECT :a::text = ''", map[string]string{"a": ""}), []string{"true"}},
		{"never pasted", with("SELECT {{a}}::text", map[string]string{"a": nasty}), []string{nasty}},
		{"in an array", with("SELECT id FROM things WHERE id = ANY(:ids) AND id > 1", map[string]string{"ids": "{1,3}"}), []string{"3"}},
		{"limit", with("SELECT id FROM things ORDER BY id LIMIT {{n}}", map[string]string{"n": "1"}), []string{"1"}},
		{"list", with("SELECT sum(id) FROM things WHERE id IN ({{l|list}})", map[string]string{"l": "[1,3,null,1000000]"}), []string{"4"}},
		{"list of texts", with("SELECT sum(id) FROM things WHERE name IN ({{l|list}})", map[string]string{"l": `["thing 2","it's"]`}), []string{"2"}},
		{"empty list", with("SELECT count(*) FROM things WHERE id IN ({{l|list}})", map[string]string{"l": "[]"}), []string{"0"}},
		{"not in an empty list", with("SELECT count(*) FROM things WHERE id NOT IN ({{l|list}}) AND NOT name || 'x' IN ({{l|list}}) AND true = id in ({{l|list}}) IS FALSE", map[string]string{"l": "[]"}), []string{"1000"}},
		{"identifiers", with("SELECT max({{c|identifier}}) FROM {{t|identifier}} t", map[string]string{"t": "public.things", "c": "t.id"}), []string{"1000"}},
		{"typed", typed("SELECT pg_typeof({{x}}) || ' ' || {{x}}", "int8", "7"), []string{"bigint 7"}},
		{"typed list", typed("SELECT 7.0 IN ({{x|list}}) AND 9007199254740993 IN ({{x|list}})", "Numeric", "[7, 9007199254740993]"), []string{"true"}},
		{"typed array", typed("SELECT pg_typeof({{x}}) || ' ' || {{x}}::text", "text[]", `["a","b,\"c"]`), []string{`text[] {a,"b,\"c"}`}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, _ := query(t, m, test.r)
			if !reflect.DeepEqual(got.rows, [][]string{test.want}) {
				t.Fatalf("got %q, want %q", got.rows, test.want)
			}
		})
	}
	refused := []struct {
		name, says string
		r          sqlsession.Request
		code       proto.Code
	}{
		{"unknown", `no value is given for parameter "x"`, request("SELECT {{x}}"), proto.CodeInvalid},
		{"unused", `does not use parameter "x"`, with("SELECT 1", map[string]string{"x": "1"}), proto.CodeInvalid},
		{"native", "$1 is not supported", request("SELECT $1"), proto.CodeInvalid},
		{"bad value", "22P02", with("SELECT name FROM things WHERE id = {{id}}", map[string]string{"id": "two"}), proto.CodeSQL},
		{"zero byte", "not UTF-8", with("SELECT :x::text", map[string]string{"x": "a\x00b"}), proto.CodeInvalid},
		{"unknown type", `"blob" is no type`, typed("SELECT {{x}}", "blob", "1"), proto.CodeInvalid},
		{"value of another type", "22P02", typed("SELECT {{x}}", "int8", "one"), proto.CodeSQL},
		{"identifier of nothing", "42P01", with("SELECT 1 FROM {{t|identifier}}", map[string]string{"t": "things; DROP TABLE things"}), proto.CodeSQL},
		{"no type", "parameter {{x}}: cast it", with("SELECT {{x}} IS NULL", map[string]string{"x": "1"}), proto.CodeSQL},
	}
	for _, test := range refused {
		t.Run(test.name, func(t *testing.T) {
			if e := refuse(t, m, test.r, test.code); !strings.Contains(e.Error(), test.says) {
				t.Fatalf("got %v, want %q in it", e, test.says)
			}
		})
	}
}

// with is a statement with values, and those absent as NULL.
func with(sql string, values map[string]string, absent ...string) sqlsession.Request {
	r := request(sql)
	for name, value := range values {
		r.Parameters = append(r.Parameters, &posternv1.Parameter{Name: name, Value: &value})
	}
	for _, name := range absent {
		r.Parameters = append(r.Parameters, &posternv1.Parameter{Name: name})
	}
	return r
}

// typed is a statement with one parameter, x.
func typed(sql, kind, value string) sqlsession.Request {
	r := request(sql)
	r.Parameters = []*posternv1.Parameter{{Name: "x", Value: &value, Type: kind}}
	return r
}

// TestIdentifierAsTheServer holds identifiers against the server's own quote_ident:
// whatever the name, the server reads that one name back.
func TestIdentifierAsTheServer(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	names := []string{"a", "A b", `x"y`, `"`, `""`, `\`, "é😀", "select", "a\nb", "--", "/*", "$1", "{{x}}", ":x", "'", `U&"\0041"`, strings.Repeat("n", 63), strings.Repeat("é", 31), "\u202e", "\x01"}
	for i := range 60 { // and some of nothing but what has a meaning
		var b strings.Builder
		for n := i; n > 0; n /= 4 {
			b.WriteByte("\"\\'-"[n%4])
		}
		b.WriteByte('"')
		names = append(names, b.String())
	}
	for _, name := range names {
		quoted := `"` + strings.ReplaceAll(name, `"`, `""`) + `"`
		got, _ := query(t, m, with("SELECT 1 AS {{n|identifier}}, {{plain}}::text, quote_ident({{plain}}) IN ({{plain}}, {{quoted}})", map[string]string{"n": quoted, "plain": name, "quoted": quoted}))
		if got.schema.Field(0).Name != name || got.rows[0][2] != "true" {
			t.Errorf("%q: the server read %q, %v", name, got.schema.Field(0).Name, got.rows[0])
		}
	}
}

func TestErrors(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	value := "1"
	r := request("SELECT 'é', {{long_name}}::int, oops FROM things")
	r.Parameters = []*posternv1.Parameter{{Name: "long_name", Value: &value}}
	tests := []struct {
		name, state, says string
		r                 sqlsession.Request
		position          int32
	}{
		{"position", "42703", "position 13", request("SELECT 'é', oops FROM things"), 13},
		{"position behind a placeholder", "42703", "oops", r, 33},
		{"syntax", "42601", "syntax error", request("SELEC 1"), 1},
		{"table", "42P01", "nope", request("SELECT * FROM nope"), 15},
		{"run time", "22012", "division by zero", request("SELECT 1/(id-500) FROM things"), 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			e := refuse(t, m, test.r, proto.CodeSQL)
			if e.SQL.GetSqlstate() != test.state || e.SQL.GetPosition() != test.position || !strings.Contains(e.Error(), test.says) || strings.Contains(e.Error(), "\n") {
				t.Fatalf("got %v, %v, want %s at %d with %q", e, e.SQL, test.state, test.position, test.says)
			}
		})
	}

	t.Run("rows before an error", func(t *testing.T) {
		var out bytes.Buffer
		// More rows than the first batch, so that some are out by then.
		outcome, err := m.Run(t.Context(), request("SELECT i, 1/(i-50000) FROM generate_series(1, 60000) i"), &out)
		if proto.CodeOf(err) != proto.CodeSQL || outcome.Rows != 49999 {
			t.Fatalf("got %d rows, %v, want 49999 and an SQL error", outcome.Rows, err)
		}
		if got := decode(t, out.Bytes()); len(got.rows) != 49999 {
			t.Fatalf("got %d rows in the stream, want 49999", len(got.rows))
		}
	})
	t.Run("nothing written before an early error", func(t *testing.T) {
		var out bytes.Buffer
		if _, err := m.Run(t.Context(), request("SELECT 1/0"), &out); err == nil || out.Len() > 0 {
			t.Fatalf("got %v, %d bytes, want an error and none", err, out.Len())
		}
	})
	r = request("SELECT 1")
	r.Source = "nope"
	refuse(t, m, r, proto.CodeNotFound)
	refuse(t, m, request(" ; -- nothing\n"), proto.CodeInvalid)
	refuse(t, m, request("SELECT '\xff'"), proto.CodeInvalid)
	refuse(t, m, request("SELECT '"+strings.Repeat("x", sqlsession.MaxSQL)+"'"), proto.CodeBodyTooLarge)
	if got, _ := query(t, m, request("SELECT length('"+strings.Repeat("\x01", sqlsession.MaxSQL-100)+"')")); got.rows[0][0] != fmt.Sprint(sqlsession.MaxSQL-100) {
		t.Errorf("the longest statement: got %v", got.rows)
	}
}

func TestNotices(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	r := request("DO $$ BEGIN FOR i IN 1..200 LOOP RAISE NOTICE 'number %', i; END LOOP; RAISE WARNING '%', repeat('x', 1000000); END $$")
	r.ReadWrite = true
	_, outcome := query(t, m, r)
	if n := len(outcome.Notices); n != 50 || outcome.Notices[0].Message != "number 1" || outcome.Notices[0].Severity != "NOTICE" {
		t.Errorf("got %d notices, the first %v, want 50 and number 1", n, outcome.Notices[0])
	}
	if _, outcome := query(t, m, request("SELECT 1")); len(outcome.Notices) != 0 {
		t.Errorf("the next statement has %d notices, want none", len(outcome.Notices))
	}
}

// TestNoticesBetweenRows: a notice right before a row is none of the result.
func TestNoticesBetweenRows(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	if err := server.SQL(t.Context(), "CREATE FUNCTION chatty(i int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN RAISE NOTICE 'row %', i; RETURN i; END $$"); err != nil {
		t.Fatal(err)
	}
	cleanUp(t, "DROP FUNCTION chatty(int)")
	r := request("SELECT chatty(i) FROM generate_series(1, 300) i")
	r.ReadWrite = true
	got, outcome := query(t, m, r)
	if len(got.rows) != 300 || got.rows[0][0] != "1" || got.rows[299][0] != "300" {
		t.Errorf("got %d rows", len(got.rows))
	}
	if len(outcome.Notices) != 50 || outcome.Notices[0].Message != "row 1" {
		t.Errorf("got %d notices, want the first 50", len(outcome.Notices))
	}
}

func TestLimits(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	tests := []struct {
		name     string
		sql      string
		maxRows  uint64
		maxBytes uint64
		rows     uint64
		code     proto.Code
	}{
		{name: "exactly", sql: "SELECT generate_series(1, 10)", maxRows: 10, rows: 10},
		{name: "one more", sql: "SELECT generate_series(1, 11)", maxRows: 10, rows: 10, code: proto.CodeRowLimit},
		{name: "many more", sql: "SELECT generate_series(1, 100000000)", maxRows: 123456, rows: 123456, code: proto.CodeRowLimit},
		{name: "bytes", sql: "SELECT repeat('x', 1000) FROM generate_series(1, 1000000)", maxBytes: 3_000_000, rows: 2985, code: proto.CodeByteLimit},
		{name: "bytes of numbers", sql: "SELECT i::int8, NULL::int8 FROM generate_series(1, 1000000) i", maxBytes: 3_000_000, rows: 170_000, code: proto.CodeByteLimit},
		{name: "a value too large", sql: "SELECT repeat('x', 2000000) UNION ALL SELECT 'y'", maxBytes: 1_000_000, code: proto.CodeByteLimit},
		{name: "hardly any bytes", sql: "SELECT 1", maxBytes: 10, code: proto.CodeByteLimit},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r := request(test.sql)
			r.MaxRows, r.MaxBytes = test.maxRows, test.maxBytes
			var out bytes.Buffer
			outcome, err := m.Run(t.Context(), r, &out)
			if proto.CodeOf(err) != test.code {
				t.Fatalf("got %v, want %v", err, test.code)
			}
			if test.maxBytes > 0 {
				// As many rows as fit, give or take what the batches cost.
				if uint64(out.Len()) > test.maxBytes || outcome.Rows < test.rows*95/100 || outcome.Rows > test.rows*11/10 {
					t.Fatalf("got %d rows in %d bytes, want about %d in at most %d", outcome.Rows, out.Len(), test.rows, test.maxBytes)
				}
			} else if outcome.Rows != test.rows {
				t.Fatalf("got %d rows, want %d", outcome.Rows, test.rows)
			}
			if got := decode(t, out.Bytes()); uint64(len(got.rows)) != outcome.Rows {
				t.Fatalf("got %d rows in the stream, want %d", len(got.rows), outcome.Rows)
			}
		})
	}
	// The sessions are good for the next statement, and the database is idle.
	query(t, m, request("SELECT 1"))
	eventually(t, "the backends to be idle", func() bool {
		return one(t, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND state <> 'idle'") == "0"
	})
}

func TestSourceLimitsHold(t *testing.T) {
	s := source("db")
	s.MaxRows, s.StatementTimeout, s.ReadWrite = 5, 300*time.Millisecond, false
	m := newManager(t, sqlsession.Config{}, s)
	r := request("SELECT generate_series(1, 100)")
	r.MaxRows = 50
	refuse(t, m, r, proto.CodeRowLimit)
	r = request("SELECT pg_sleep(60)")
	r.Timeout = time.Hour
	refuse(t, m, r, proto.CodeTimeout)
	r = request("DELETE FROM things")
	r.ReadWrite = true
	refuse(t, m, r, proto.CodePolicyDenied)
}

func TestTimeout(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	for _, sql := range []string{"SELECT pg_sleep(60)", "SELECT count(*) FROM generate_series(1, 10000000000) i, generate_series(1, 1000) j"} {
		r := request(sql)
		r.Timeout = 200 * time.Millisecond
		if e := refuse(t, m, r, proto.CodeTimeout); !strings.Contains(e.Error(), "200ms") {
			t.Errorf("got %v, want the limit in it", e)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := m.Run(ctx, request("SELECT pg_sleep(60)"), io.Discard); proto.CodeOf(err) != proto.CodeTimeout {
		t.Errorf("a deadline: got %v, want TIMEOUT", err)
	}
	// A reader that stops does not stop the clock.
	w := newGate()
	defer w.open()
	r := request("SELECT repeat('x', 1000), generate_series(1, 10000000)")
	r.Timeout = 3 * time.Second // it is to begin, too
	result := make(chan error, 1)
	go func() {
		_, err := m.Run(context.Background(), r, w)
		result <- err
	}()
	eventually(t, "the backend to be free", func() bool {
		return w.waiting() && one(t, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND state = 'active'") == "0"
	})
	w.open()
	if err := <-result; proto.CodeOf(err) != proto.CodeTimeout {
		t.Errorf("a slow reader: got %v, want TIMEOUT", err)
	}
}

func TestReadOnlyRefuses(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	before := one(t, "SELECT string_agg(t::text, ',' ORDER BY id) FROM things t")
	for _, sql := range []string{
		"INSERT INTO things VALUES (5000)", "UPDATE things SET name = 'x'", "DELETE FROM things", "TRUNCATE things", "DROP TABLE things",
		"MERGE INTO things t USING things u ON t.id = u.id WHEN MATCHED THEN DELETE",
		"WITH x AS (DELETE FROM things RETURNING *) SELECT * FROM x", "/* c */ (( WITH x AS (INSERT INTO things VALUES (1)) SELECT 1 ))",
		"SELECT * INTO other FROM things", "CREATE TABLE other AS SELECT 1", "CREATE TEMP TABLE other (i int)",
		"SELECT 1; DELETE FROM things", "COMMIT; DELETE FROM things", ";;DELETE FROM things", "-- \n delete from things",
		"BEGIN", "COMMIT", "ROLLBACK", "SET default_transaction_read_only = off", "SET TRANSACTION READ WRITE", "RESET ALL",
		"COPY things TO STDOUT", "COPY things FROM STDIN", "COPY (SELECT 1) TO PROGRAM 'id'", "DO $$ BEGIN DELETE FROM things; END $$",
		"CALL nothing()", "EXPLAIN ANALYZE DELETE FROM things", "EXPLAIN SELECT 1", "SHOW all", "LISTEN x", "NOTIFY x", "LOCK things",
		"PREPARE x AS DELETE FROM things", "EXECUTE x", "DECLARE c CURSOR FOR SELECT 1", "FETCH c", "VACUUM things", "ANALYZE things",
		"SELECT * FROM things FOR UPDATE", "SELECT * FROM things FOR SHARE",
		"SELECT pg_terminate_backend(1)", "SELECT lo_create(0)", "SELECT lo_unlink(1)", "SELECT pg_notify('x', 'y')",
		"SELECT query_to_xml('DELETE FROM things', true, true, '')",
		"SELECT set_config('transaction_read_only', 'off', false)",
	} {
		r := request(sql)
		var out bytes.Buffer
		_, err := m.Run(t.Context(), r, &out)
		if code := proto.CodeOf(err); code != proto.CodePolicyDenied && (code != proto.CodeSQL || !strings.HasPrefix(sql, "SELECT set_config")) {
			t.Errorf("%s: got %v, want POLICY_DENIED", sql, err)
		}
		if out.Len() > 0 {
			t.Errorf("%s: %d bytes came out, want none", sql, out.Len())
		}
	}
	if after := one(t, "SELECT string_agg(t::text, ',' ORDER BY id) FROM things t"); after != before {
		t.Error("something was changed")
	}
	for _, sql := range []string{
		"SELECT 1", "VALUES (1)", "TABLE things", "WITH x AS (SELECT 1) SELECT * FROM x", "(SELECT 1)", " /* a */ select 1 ; -- b", "SELECT 1;;",
		"WITH RECURSIVE n AS (SELECT 1 i UNION ALL SELECT i + 1 FROM n WHERE i < 5) SELECT * FROM n",
	} {
		query(t, m, request(sql))
	}
	e := refuse(t, m, request("SELECT * INTO other FROM things"), proto.CodePolicyDenied)
	if e.SQL.GetPosition() != 15 || !strings.Contains(e.Error(), "read-only") {
		t.Errorf("got %v at %d, want read-only at 15", e, e.SQL.GetPosition())
	}
}

func TestReadWrite(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	write := func(sql string) sqlsession.Request {
		r := request(sql)
		r.ReadWrite = true
		return r
	}
	query(t, m, write("CREATE TABLE written (i int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)"))
	cleanUp(t, "DROP TABLE written")
	got, outcome := query(t, m, write("INSERT INTO written SELECT generate_series(1, 5) RETURNING i"))
	if outcome.CommandTag != "INSERT 0 5" || len(got.rows) != 5 {
		t.Errorf("got %q, %d rows, want INSERT 0 5 and 5", outcome.CommandTag, len(got.rows))
	}
	got, outcome = query(t, m, write("UPDATE written SET i = i + 10"))
	if outcome.CommandTag != "UPDATE 5" || got.schema == nil || got.schema.NumFields() != 0 {
		t.Errorf("got %q, %v, want UPDATE 5 and a schema without fields", outcome.CommandTag, got.schema)
	}
	count := func() string { return one(t, "SELECT string_agg(i::text, ',' ORDER BY i) FROM written") }
	if got := count(); got != "11,12,13,14,15" {
		t.Errorf("got %s", got)
	}
	// A constraint that is checked at COMMIT.
	if e := refuse(t, m, write("INSERT INTO written VALUES (11)"), proto.CodeSQL); e.SQL.GetSqlstate() != "23505" {
		t.Errorf("got %v, want 23505", e.SQL)
	}
	// What is cut off or cancelled changes nothing.
	r := write("INSERT INTO written SELECT generate_series(100, 200000) RETURNING i")
	r.MaxRows = 10
	if e := refuse(t, m, r, proto.CodeRowLimit); !strings.Contains(e.Error(), "rolled back") {
		t.Errorf("got %v, want rolled back in it", e)
	}
	r = write("INSERT INTO written SELECT 100 FROM pg_sleep(60)")
	r.Timeout = 100 * time.Millisecond
	refuse(t, m, r, proto.CodeTimeout)
	refuse(t, m, write("DELETE FROM written; DELETE FROM things"), proto.CodePolicyDenied)
	for _, sql := range []string{
		"BEGIN", "COMMIT", "ROLLBACK", "COPY things TO STDOUT", "COPY things FROM STDIN", "SET ROLE postgres", "RESET ROLE", "PREPARE x AS SELECT 1", "LISTEN x", "DISCARD ALL", "; ; commit",
	} {
		refuse(t, m, write(sql), proto.CodePolicyDenied)
	}
	if got := count(); got != "11,12,13,14,15" {
		t.Errorf("got %s, want it unchanged", got)
	}
	refuse(t, m, write("EXPLAIN SELECT 1"), proto.CodePolicyDenied)
}
