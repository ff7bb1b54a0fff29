package adversary

import (
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession"
)

// TestReadWrite: what a read-write source is limited to holds, and what it allows
// changes what it says and nothing else. The world is its own: it changes.
func TestReadWrite(t *testing.T) {
	w := ownWorld(t)
	limited := sqlsession.Guard{Mode: "read-write", WriteSchemas: []string{"app"}, WriteStatements: []string{"insert", "update", "delete", "merge"}}
	ddl := sqlsession.Guard{Mode: "read-write", WriteSchemas: []string{"app"}, WriteStatements: []string{"insert", "update", "delete", "merge", "truncate", "ddl", "call"}}
	m, log := newManager(t, w.source("limited", roleRoot, alpha, limited), w.source("ddl", roleRoot, alpha, ddl))
	r := newReport(t, "readwrite")
	defer r.end()
	before, err := w.snapshot(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range corpus(t, "testdata/readwrite.sql") {
		source := "limited"
		isDDL := strings.HasPrefix(a.why, "[ddl] ")
		if isDDL {
			source = "ddl"
		}
		got := ask(t, m, log, source, w.fill(a.sql, alpha), true)
		var problems []string
		if p := a.judge(got); p != "" {
			problems = append(problems, p)
		}
		found, after, err := w.changed(t.Context(), before)
		if err != nil {
			t.Fatalf("after %s: %v", clip(a.sql), err)
		}
		for _, f := range found {
			if a.expect == runs && allowed(f, isDDL) || a.expect == fails && (strings.HasPrefix(f, "next xid:") || strings.HasPrefix(f, "wal:")) {
				continue
			}
			problems = append(problems, "changed: "+f)
		}
		if len(found) > 0 {
			w.repair(t, found)
			// Tables may have come and gone.
			if err := w.prepareState(t.Context()); err != nil {
				t.Fatal(err)
			}
			if after, err = w.snapshot(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
		}
		before = after
		r.add(a, problems)
	}
}

// allowed tells whether a change is what a statement on schema app may do.
func allowed(found string, ddl bool) bool {
	for _, prefix := range []string{`table "app".`, `sequence "app".`, "next xid:", "wal:"} {
		if strings.HasPrefix(found, prefix) {
			return true
		}
	}
	return strings.HasPrefix(found, "data directory:") || ddl && strings.HasPrefix(found, `table "pg_catalog".`)
}
