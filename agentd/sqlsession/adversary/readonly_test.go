package adversary

import (
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession"
)

// TestReadOnly: no statement, however phrased, changes anything that somebody else
// could see.
func TestReadOnly(t *testing.T) {
	w := sharedWorld(t)
	m, log := newManager(t,
		w.source(roleRoot, roleRoot, alpha, sqlsession.Guard{Mode: "read-only"}),
		w.source(roleShadow, roleShadow, alpha, sqlsession.Guard{Mode: "read-only"}))
	r := newReport(t, "readonly")
	defer r.end()
	before, err := w.snapshot(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	attacks := append(corpus(t, "testdata/readonly.sql"), generated()...)
	for _, source := range []string{roleRoot, roleShadow} {
		session := later(t, m, log, source)
		for _, a := range attacks {
			// What must be refused must be so for both; traps in the search path are for one.
			shadowed := strings.HasPrefix(a.why, "[shadow] ")
			if source == roleShadow && a.expect != refused && !shadowed || source == roleRoot && shadowed {
				continue
			}
			got := ask(t, m, log, source, w.fill(a.sql, alpha), false)
			var problems []string
			if p := a.judge(got); p != "" {
				problems = append(problems, p)
			}
			found, after, err := w.changed(t.Context(), before)
			if err != nil {
				t.Fatalf("after %s: %v", clip(a.sql), err)
			}
			for _, f := range found {
				problems = append(problems, "changed: "+f)
			}
			if len(found) > 0 {
				w.repair(t, found)
				if after, err = w.snapshot(t.Context(), nil); err != nil {
					t.Fatal(err)
				}
			}
			if now := later(t, m, log, source); now != session {
				problems = append(problems, "the owner's next statement meets other settings: "+clip(delta(session, now)))
			}
			before = after
			if source == roleShadow && !shadowed {
				a.why = "[shadow] " + a.why
			}
			r.add(a, problems)
		}
	}
}

// later is what the owner's next statement finds in its session.
func later(t *testing.T, m *sqlsession.Manager, log *lockedBuffer, source string) string {
	t.Helper()
	got := ask(t, m, log, source, "SELECT name, setting FROM pg_catalog.pg_settings WHERE name NOT LIKE '%.%' ORDER BY name", false)
	if got.err != nil {
		return got.err.Error()
	}
	return strings.Join(got.rows, "\n")
}
