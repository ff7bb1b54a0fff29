package enginetest

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
)

// TestHeld: an open session outlives agentd with its transaction, and on SQLite, whose
// files agentd opens, it ends with it.
func TestHeld(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		dir := t.TempDir()
		s := db.source
		readWrite(&s)
		start := func() *sqlsession.Manager {
			m := sqlsession.New(sqlsession.Config{Warm: -1, Parser: parser, Hold: dir})
			m.SetSources([]sqlsession.Source{s})
			return m
		}
		stop := func(m *sqlsession.Manager) {
			t.Helper()
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if err := m.Close(ctx); err != nil {
				t.Errorf("Close: %v", err)
			}
		}
		m := start()
		if db.engine == "postgres" {
			waitForParser(t, m)
		}
		x := openSession(t, m, true)
		x.run("create temporary table held (n integer)", "none")
		x.run("begin", "open")
		x.run("insert into held values (41)", "open")
		stop(m)
		m = start()
		defer stop(m)
		n := m.Resume(func(_ sqlsession.Open, lost string) func(string, uint64) {
			if lost != "" {
				t.Errorf("lost: %s", lost)
			}
			return func(reason string, _ uint64) { x.ended <- reason }
		})
		x.m = m
		if db.engine == "sqlite" {
			if n != 0 {
				t.Errorf("%d sessions are open", n)
			}
			if reason := <-x.ended; reason != "agentd stopped" {
				t.Errorf("it ended as %q", reason)
			}
			return
		}
		if n != 1 {
			t.Fatalf("%d sessions are open, want 1", n)
		}
		x.run("update held set n = n + 1", "open")
		if got := x.value("select n from held", "open"); got != "42" {
			t.Errorf("the transaction holds %s", got)
		}
		x.run("rollback", "none")
		if _, err := m.Run(t.Context(), x.request("select count(*) from held"), io.Discard); err != nil {
			t.Errorf("the temporary table is gone: %v", err)
		}
		if err := m.CloseSession(x.id, "tok_a", "done"); err != nil {
			t.Error(err)
		}
		if reason := <-x.ended; reason != "done" {
			t.Errorf("it ended as %q", reason)
		}
	})
}
