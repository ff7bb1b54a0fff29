package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/e2e/stack"
)

// TestKillAtTheFirstStart kills a control plane again and again at any moment of
// its first start: it makes its databases, keys and first token whole or anew.
func TestKillAtTheFirstStart(t *testing.T) {
	s, err := stack.New(stack.Options{Bin: ownBinaries(t), Dir: shortDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			showLogs(t, s)
		}
	})
	for range 30 {
		// The harness waits for the control plane to be ready or to end.
		ctx, cancel := context.WithCancel(t.Context())
		timer := time.AfterFunc(rand.N(60*time.Millisecond), cancel)
		s.StartControlPlane(ctx) //nolint:errcheck // it is to fail
		timer.Stop()
		cancel()
		s.ControlPlane.Kill()
		// A token that was written works from then on, unless the kill came
		// between the file and the database: then the next start replaces it.
	}
	startControlPlane(t, s)
	must(t, s, "status")
	if _, err := s.Join(t.Context(), "host", ""); err != nil {
		t.Fatal(err)
	}
	auditVerifies(t, s)
	if tokens := mustJSON[[]struct{ Name string }](t, s, "token", "list"); len(tokens) != 1 {
		t.Errorf("there are %d tokens, want the one admin: %v", len(tokens), tokens)
	}
	stoppedClean(t, s)
}

// TestKillWhileRegistering kills agentd register at any moment: the host has a
// whole identity or none, and the next try works.
func TestKillWhileRegistering(t *testing.T) {
	s := ownStack(t)
	key := must(t, s, "key", "create", "--uses", "1000")
	a := hostNamed(t, s, "host")
	a.Env = s.Env
	installed := 0
	for range 40 {
		cmd := registerCommand(t, a, "--key-file", "-")
		cmd.Stdin = strings.NewReader(key)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(rand.N(25 * time.Millisecond)) // any moment
		cmd.Process.Kill()                        //nolint:errcheck // it may have ended
		cmd.Wait()                                //nolint:errcheck // it was killed
		if _, err := os.Stat(filepath.Join(a.StateDir(), "identity")); err != nil {
			continue
		}
		// It got through: what is there works, and is told from nothing.
		installed++
		e := register(t, s, "host", key)
		e.said(t, 1, "agentd: this host is agent host", "use --force to replace it")
		if installed == 1 {
			comesOnline(t, s, a)
			stop(t, a.Process)
		}
		if err := os.RemoveAll(filepath.Join(a.StateDir(), "identity")); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d of 40 got through", installed)
	if err := register(t, s, "host", key).err(); err != nil {
		t.Fatal(err)
	}
	comesOnline(t, s, a)
	auditVerifies(t, s)
	stoppedClean(t, s)
}

// comesOnline starts an agent whose name is not known: those that got no answer
// to their registration may have taken "host", "host-2" and so on.
func comesOnline(t *testing.T, s *stack.Stack, a *stack.Agent) {
	t.Helper()
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "one agent is online", func() error {
		n := 0
		for _, agent := range mustJSON[[]struct{ Online bool }](t, s, "agent", "list") {
			if agent.Online {
				n++
			}
		}
		if n != 1 {
			return fmt.Errorf("%d are", n)
		}
		return nil
	})
}

// TestKillOfTheDatabase kills a data source's PostgreSQL under a query: the error
// names it, agentd stays, and works with it again once it is back.
func TestKillOfTheDatabase(t *testing.T) {
	pg := pgserver.Start(t)
	if err := pg.CreateRole(t.Context(), "reader", readerPassword); err != nil {
		t.Fatal(err)
	}
	s := ownStack(t)
	joinOwn(t, s, "host", "sources:\n"+mustSource(t, s.Dir, "db", pg.DSN("reader", "postgres"), "      max_rows: 100000000\n      max_bytes: 20GiB\n"))
	for _, statement := range []struct {
		sql  string
		rows int
	}{
		{"select pg_sleep(60)", 0},
		{"select i, repeat('x', 100) from generate_series(1, 20000000) i", 1000},
	} {
		f := fly(t, s, "host/db", statement.sql)
		f.rows(t, statement.rows)
		eventually(t, time.Minute, "the database runs the query", func() error {
			conn, err := pg.Connect(t.Context(), "postgres")
			if err != nil {
				return err
			}
			defer conn.Close(t.Context())
			var n int
			if err := conn.QueryRow(t.Context(), "select count(*) from pg_stat_activity where usename = 'reader' and state = 'active' and query like 'select%'").Scan(&n); err != nil || n != 1 {
				return fmt.Errorf("%d run: %v", n, err)
			}
			return nil
		})
		if err := pg.Kill(); err != nil {
			t.Fatal(err)
		}
		end, _ := f.land(t)
		end.said(t, 1, "postern: ", "the connection to PostgreSQL at 127.0.0.1:", "was lost")
		postern(t, s, "sql", "host/db", "select 1").said(t, 1, "postern: ", "cannot reach PostgreSQL at 127.0.0.1:")
		if err := pg.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		answers(t, s, "host/db", "select 1", "1")
	}
	auditVerifies(t, s)
	stoppedClean(t, s)
}
