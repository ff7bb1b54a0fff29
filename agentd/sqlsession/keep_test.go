package sqlsession_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// wide is a select list of n columns.
func wide(n int, value string) string {
	var list []string
	for i := range n {
		list = append(list, fmt.Sprintf("%s AS c%04d", value, i))
	}
	return strings.Join(list, ", ")
}

// TestKeptRows compares the rows that are kept with those that were delivered.
func TestKeptRows(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	const series = "SELECT i, CASE WHEN i % 3 > 0 THEN 'text ' || i END t, i % 2 = 0 b, CASE WHEN i % 5 > 0 THEN md5(i::text)::uuid END u, i::int2 % 7::int2 s FROM generate_series(1, %d) i"
	rows := func(n int) string { return strings.ReplaceAll(series, "%d", fmt.Sprint(n)) }
	tests := []struct {
		name, sql           string
		first, last         int // to keep
		maxRows, maxBytes   uint64
		wantFirst, wantLast int
		code                proto.Code
	}{
		{name: "no rows", sql: rows(0), first: 100, last: 100},
		{name: "few rows", sql: rows(7), first: 100, last: 100, wantFirst: 7},
		{name: "as many as the first", sql: rows(100), first: 100, last: 100, wantFirst: 100},
		{name: "first and last overlap", sql: rows(150), first: 100, last: 100, wantFirst: 100, wantLast: 50},
		{name: "first and last meet", sql: rows(200), first: 100, last: 100, wantFirst: 100, wantLast: 100},
		{name: "a gap", sql: rows(201), first: 100, last: 100, wantFirst: 100, wantLast: 100},
		{name: "many batches", sql: rows(30000), first: 100, last: 100, wantFirst: 100, wantLast: 100},
		{name: "a million rows", sql: "SELECT i FROM generate_series(1, 1000000) i", first: 100, last: 100, wantFirst: 100, wantLast: 100},
		{name: "the first alone", sql: rows(30000), first: 10, wantFirst: 10},
		{name: "the last alone", sql: rows(30000), last: 1000, wantLast: 1000},
		{name: "more than a batch", sql: rows(5000), first: 1000, last: 1000, wantFirst: 1000, wantLast: 1000},
		{name: "one by one", sql: "SELECT i, pg_sleep(0.006) FROM generate_series(1, 40) i", first: 3, last: 5, wantFirst: 3, wantLast: 5},
		{name: "row limit", sql: rows(30000), first: 100, last: 100, maxRows: 1500, wantFirst: 100, wantLast: 100, code: proto.CodeRowLimit},
		{name: "byte limit", sql: rows(30000), first: 100, last: 100, maxBytes: 200_000, wantFirst: 100, wantLast: 100, code: proto.CodeByteLimit},
		{name: "an error after some rows", sql: "SELECT i, 1 / (20000 - i) FROM generate_series(1, 30000) i", first: 100, last: 100, wantFirst: 100, wantLast: 100, code: proto.CodeSQL},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r := request(test.sql)
			r.KeepFirst, r.KeepLast, r.MaxRows, r.MaxBytes = test.first, test.last, test.maxRows, test.maxBytes
			calls := 0
			var kept *posternv1.KeptRows
			r.Kept = func(k *posternv1.KeptRows) { kept = k; calls++ }
			var out bytes.Buffer
			outcome, err := m.Run(t.Context(), r, &out)
			if proto.CodeOf(err) != test.code {
				t.Fatalf("got %v, want %v", err, test.code)
			}
			if calls != 1 || kept.Total != outcome.Rows || kept.Cut != 0 {
				t.Fatalf("called %d times with %d rows, %d cut; want once with %d", calls, kept.GetTotal(), kept.GetCut(), outcome.Rows)
			}
			if int(kept.First) != test.wantFirst || int(kept.Last) != test.wantLast {
				t.Errorf("kept %d and %d rows, want %d and %d", kept.First, kept.Last, test.wantFirst, test.wantLast)
			}
			all, got := decode(t, out.Bytes()), decode(t, kept.Arrow)
			if !got.schema.Equal(all.schema) {
				t.Errorf("schema %v, want %v", got.schema, all.schema)
			}
			n := len(all.rows)
			want := append(append([][]string(nil), all.rows[:test.wantFirst]...), all.rows[n-test.wantLast:]...)
			if len(got.rows) != len(want) || len(want) > 0 && !reflect.DeepEqual(got.rows, want) {
				t.Errorf("got %d rows %.300q, want %d %.300q", len(got.rows), fmt.Sprint(got.rows), len(want), fmt.Sprint(want))
			}
		})
	}
}

// TestKeptRowsAreBounded: whatever the rows are like, what is kept stays small, and
// what was cut says so.
func TestKeptRowsAreBounded(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	tests := []struct {
		name, sql string
		cut       bool
		most      int // rows
		least     int
	}{
		{"values of a megabyte", "SELECT i, repeat('é', 500000) FROM generate_series(1, 30) i", true, 60, 30},
		{"a giant value", "SELECT repeat('x', 50000000)", true, 1, 1},
		{"giant bytes", `SELECT decode(repeat('ff', 1000000), 'hex') FROM generate_series(1, 3)`, true, 3, 3},
		{"many rows of a kilobyte", "SELECT repeat('x', 1000) FROM generate_series(1, 5000)", false, 530, 500},
		{"1,600 columns", "SELECT " + wide(1600, "i") + " FROM generate_series(1, 500) i", false, 100, 2},
		{"1,600 long columns", "SELECT " + wide(1600, "repeat('long', 100)") + " FROM generate_series(1, 5) i", true, 5, 1},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r := request(test.sql)
			r.KeepFirst, r.KeepLast = 1000, 1000
			var kept *posternv1.KeptRows
			r.Kept = func(k *posternv1.KeptRows) { kept = k }
			if _, err := m.Run(t.Context(), r, &bytes.Buffer{}); err != nil {
				t.Fatal(err)
			}
			got := decode(t, kept.GetArrow())
			t.Logf("%d and %d rows, %d bytes, %d cut", kept.GetFirst(), kept.GetLast(), len(kept.GetArrow()), kept.GetCut())
			if len(kept.GetArrow()) > 960<<10 || len(got.rows) > test.most || len(got.rows) < test.least || len(got.rows) != int(kept.GetFirst()+kept.GetLast()) {
				t.Errorf("%d rows in %d bytes", len(got.rows), len(kept.GetArrow()))
			}
			if (kept.GetCut() > 0) != test.cut {
				t.Errorf("%d values cut", kept.GetCut())
			}
			if last := len(got.rows) - 1; test.name == "values of a megabyte" && (got.rows[last][0] != "30" || !strings.HasSuffix(got.rows[last][1], "é… (cut, 1000000 bytes in all)")) {
				t.Errorf("the last row is %.20q", got.rows[last])
			}
		})
	}
}

// TestNothingKept: no rows are kept of what returns none, was refused or failed
// before the first row, and none at all unless they are asked for.
func TestNothingKept(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	cleanUp(t, "DROP TABLE IF EXISTS kept_nothing")
	for _, sql := range []string{"CREATE TABLE kept_nothing (i int)", "INSERT INTO kept_nothing VALUES (1)", "SELECT 1 / 0", "SELECT nonsense", "SELECT FROM generate_series(1, 3)"} {
		r := request(sql)
		r.ReadWrite, r.KeepFirst, r.KeepLast = true, 100, 100
		r.Kept = func(k *posternv1.KeptRows) { t.Errorf("%s: kept %v", sql, k) }
		m.Run(t.Context(), r, &bytes.Buffer{}) //nolint:errcheck // some fail
	}
	r := request("SELECT 1")
	r.Kept = func(*posternv1.KeptRows) { t.Error("kept, with nothing to keep") }
	query(t, m, r)
}

// TestKeptRowsOfCancelled: the rows that came before a cancel are kept.
func TestKeptRowsOfCancelled(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	ctx, cancel := context.WithCancelCause(t.Context())
	r := request("SELECT i, CASE WHEN i > 500 THEN pg_sleep(60) END FROM generate_series(1, 600) i")
	r.KeepFirst, r.KeepLast = 100, 100
	var kept *posternv1.KeptRows
	r.Kept = func(k *posternv1.KeptRows) { kept = k }
	outcome, err := m.Run(ctx, r, writerFunc(func(p []byte) (int, error) {
		cancel(errors.New("enough"))
		return len(p), nil
	}))
	if proto.CodeOf(err) != proto.CodeCancelled || kept == nil || kept.Total != outcome.Rows {
		t.Fatalf("got %v, %v", err, kept)
	}
	if got := decode(t, kept.Arrow); len(got.rows) != 200 || got.rows[0][0] != "1" || got.rows[199][0] != fmt.Sprint(kept.Total) {
		t.Errorf("kept %d rows of %d", len(got.rows), kept.Total)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
