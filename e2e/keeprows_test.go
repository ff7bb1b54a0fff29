package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/postern-dev/postern/e2e/stack"
)

// shown is what `query show --rows -o json` prints.
type shown struct {
	Query struct{ State string }
	Kept  *struct {
		First, Last, Cut int
		Total            string
		Rows             []map[string]any
	}
}

// TestKeptRows looks at the rows that the history keeps, of statements that end in
// every way, and for what must not be found at the control plane.
func TestKeptRows(t *testing.T) {
	pg := database(t, "kept")
	canary := marked("canary")
	if err := pg.SQLIn(t.Context(), "kept",
		"create table people as select i as id, '"+canary+" ' || i as name from generate_series(1, 150) i",
		"grant select on people to reader",
	); err != nil {
		t.Fatal(err)
	}
	s := newStack(t, stack.Options{})
	dsn := pg.SocketDSN("reader", "kept")
	if _, err := s.Join(t.Context(), "host", "sources:\n"+mustSource(t, s.Dir, "db", dsn, "")+
		mustSource(t, s.Dir, "none", dsn, "      keep_rows: off\n")+
		mustSource(t, s.Dir, "few", dsn, "      mode: read-write\n      keep_rows: {first: 2, last: 1}\n")); err != nil {
		t.Fatal(err)
	}
	newest := func(t *testing.T) string {
		t.Helper()
		return mustJSON[[]struct{ ID string }](t, s, "query", "list", "--limit", "1")[0].ID
	}
	for _, test := range []struct {
		name, source, sql  string
		code               int
		state              string
		first, last, total int // first -1: nothing is kept
	}{
		{"first and last overlap", "db", "select * from people order by id", 0, "done", 100, 50, 150},
		{"no rows", "db", "select * from people where false", 0, "done", 0, 0, 0},
		{"a million rows", "db", "select i as id, 'row ' || i from generate_series(1, 1000000) i", 0, "done", 100, 100, 1000000},
		{"a limit", "db", "select i as id from generate_series(1, 1000001) i", 1, "failed", 100, 100, 1000000},
		{"an error after some rows", "db", "select i as id, 1 / (5000 - i) from generate_series(1, 9000) i", 1, "failed", 100, 100, -1},
		{"an error before the first", "db", "select 1 / 0 as id", 1, "failed", -1, 0, 0},
		{"refused", "db", "delete from people", 3, "denied", -1, 0, 0},
		{"a policy of few", "few", "select * from people order by id", 0, "done", 2, 1, 150},
		{"a command", "few", "update items set name = 'x' where id = 1", 0, "done", -1, 0, 0},
		{"a policy of none", "none", "select * from people order by id", 0, "done", -1, 0, 0},
		{"long values", "db", "select i as id, repeat('long', 1000000) as v from generate_series(1, 3) i", 0, "done", 3, 0, 3},
	} {
		t.Run(test.name, func(t *testing.T) {
			if e := postern(t, s, "sql", "host/"+test.source, "-f", "csv", "-O", os.DevNull, test.sql); e.code != test.code {
				t.Fatalf("exit code %d: %s", e.code, e.stderr)
			}
			id := newest(t)
			var got shown
			if err := json.Unmarshal([]byte(must(t, s, "query", "show", id, "--rows", "-o", "json")), &got); err != nil {
				t.Fatal(err)
			}
			if got.Query.State != test.state {
				t.Errorf("state %s, want %s", got.Query.State, test.state)
			}
			if test.first < 0 {
				if got.Kept != nil {
					t.Errorf("kept %+v", got.Kept)
				}
				postern(t, s, "query", "show", id, "-f", "csv").said(t, 4, "no rows are kept")
				return
			}
			k := got.Kept
			if k == nil || k.First != test.first || k.Last != test.last || test.total >= 0 && k.Total != fmt.Sprint(test.total) || len(k.Rows) != k.First+k.Last {
				t.Fatalf("kept %.300s", fmt.Sprintf("%+v", k))
			}
			for i, row := range k.Rows {
				want := i + 1
				if i >= k.First {
					var total int
					fmt.Sscan(k.Total, &total) //nolint:errcheck // then it is 0
					want = total - len(k.Rows) + i + 1
				}
				if row["id"] != float64(want) {
					t.Fatalf("row %d is %.100v, want that with id %d", i, row, want)
				}
			}
			if test.name == "long values" && (k.Cut != 3 || !strings.HasSuffix(k.Rows[0]["v"].(string), "… (cut, 4000000 bytes in all)")) {
				t.Errorf("%d values cut", k.Cut)
			}
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		f := fly(t, s, "host/db", "select i as id, case when i = 30000 then pg_sleep(60)::text end from generate_series(1, 30000) i /* kept cancel */")
		f.rows(t, 2000) // the database holds some back
		underWay(t, "/* kept cancel */", 1)
		id := mustJSON[[]struct{ ID string }](t, s, "query", "list", "--running")[0].ID
		must(t, s, "query", "cancel", id)
		if end, _ := f.land(t); end.code != 1 {
			t.Errorf("exit code %d: %s", end.code, end.stderr)
		}
		out := must(t, s, "query", "show", id, "-f", "csv")
		if lines := strings.Split(out, "\n"); len(lines) != 201 || !strings.HasPrefix(lines[1], "1,") || !strings.HasPrefix(lines[100], "100,") {
			t.Errorf("%d lines, the last is %q", len(lines), lines[len(lines)-1])
		}
	})
	t.Run("the client is killed", func(t *testing.T) {
		f := fly(t, s, "host/db", "select i as id, case when i = 30000 then pg_sleep(60)::text end from generate_series(1, 30000) i /* kept kill */")
		f.rows(t, 2000) // the database holds some back
		underWay(t, "/* kept kill */", 1)
		id := mustJSON[[]struct{ ID string }](t, s, "query", "list", "--running")[0].ID
		f.cmd.Process.Kill() //nolint:errcheck // land sees it
		f.land(t)
		eventually(t, patience, "the rows are there", func() error {
			if e := postern(t, s, "query", "show", id, "-f", "csv"); e.code != 0 {
				return fmt.Errorf("exit code %d: %s", e.code, e.stderr)
			}
			return nil
		})
	})

	// Nothing of it is in the control plane's files in the clear.
	err := filepath.WalkDir(s.DataDir(), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		if bytes.Contains(content, []byte(canary)) {
			t.Errorf("%s holds rows in the clear", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	looked := 0
	for _, e := range allEntries(t, s, "") {
		if e.Action == "query.rows" {
			looked++
		}
	}
	if looked < 7 {
		t.Errorf("%d entries of somebody who looked at rows", looked)
	}
	auditVerifies(t, s)
}
