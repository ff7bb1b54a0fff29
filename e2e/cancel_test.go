package e2e

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/stack"
)

// TestGivingUp ends statements in every way that a client has. Each is gone from
// the database within seconds, whatever it was doing, and the history says how it
// ended.
func TestGivingUp(t *testing.T) {
	pg := database(t, "givingup")
	s := newStack(t, stack.Options{})
	if _, err := s.Join(t.Context(), "host", "sources:\n"+
		mustSource(t, s.Dir, "db", pg.SocketDSN("reader", "givingup"), "      mode: read-write\n      max_rows: 100000000\n      max_bytes: 20GiB\n")); err != nil {
		t.Fatal(err)
	}
	statements := []struct {
		name, sql string
		rows      int
	}{
		{"before the first row", "select pg_sleep(60)", 0},
		{"while rows flow", "select i, repeat('x', 100) from generate_series(1, 20000000) i", 1000},
		{"after some rows", "select i, case when i = 30000 then pg_sleep(60)::text end from generate_series(1, 30000) i", 29000},
		{"within a write", "update items set name = 'changed ' || pg_sleep(6) where id > 0", 0},
	}
	ways := []struct {
		name string
		// end gives up the statement with this id.
		end  func(t *testing.T, f *flight, id string)
		code int // -1: killed
		says string
	}{
		{"Ctrl-C", func(_ *testing.T, f *flight, _ string) { f.cmd.Process.Signal(syscall.SIGINT) }, 1, "interrupted: the statement was "},
		{"query cancel", func(t *testing.T, _ *flight, id string) {
			if e := postern(t, s, "query", "cancel", id); e.code != 0 {
				t.Errorf("query cancel: exit code %d: %s", e.code, e.stderr)
			}
		}, 1, "cancelled"},
		{"SIGKILL", func(_ *testing.T, f *flight, _ string) { f.cmd.Process.Kill() }, -1, ""},
		{"a reader that goes away", func(_ *testing.T, f *flight, _ string) { f.pipe.Close() }, 1, ""},
	}
	before := items(t, "givingup")
	for w, way := range ways {
		for i, statement := range statements {
			if way.name == "a reader that goes away" && statement.name != "while rows flow" {
				continue // it is noticed with the next row
			}
			t.Run(way.name+" "+statement.name, func(t *testing.T) {
				mark := fmt.Sprintf("/* give up %d %d */", w, i)
				f := fly(t, s, "host/db", statement.sql+" "+mark)
				f.rows(t, statement.rows)
				underWay(t, mark, 1)
				running := mustJSON[[]struct{ ID, Sql string }](t, s, "query", "list", "--running")
				if len(running) != 1 {
					t.Fatalf("%d queries run, want 1", len(running))
				}
				id := running[0].ID
				way.end(t, f, id)
				took := underWay(t, mark, 0)
				t.Logf("gone from the database after %.2f s", took.Seconds())
				if took > 5*time.Second {
					t.Error("that is too long")
				}
				switch end, _ := f.land(t); {
				case end.code != way.code:
					t.Errorf("exit code %d, want %d: %s", end.code, way.code, end.stderr)
				case way.says != "":
					end.said(t, way.code, "postern: ", way.says)
				case end.stderr != "":
					t.Errorf("standard error: %s", end.stderr)
				}
				var query struct{ State string }
				eventually(t, time.Minute, "the history knows", func() error {
					if query = mustJSON[struct{ State string }](t, s, "query", "show", id); query.State != "cancelled" {
						return fmt.Errorf("the state is %s", query.State)
					}
					return nil
				})
				for side, log := range map[string]map[string][]string{"control plane": ends(t, s, ""), "host": ends(t, s, "host")} {
					if got := log[id]; len(got) != 1 || got[0] != "cancelled" {
						t.Errorf("the log of the %s says %v, want cancelled", side, got)
					}
				}
				if after := items(t, "givingup"); after != before {
					t.Errorf("the table was %s and is %s", before, after)
				}
			})
		}
	}
	t.Run("a query that has ended", func(t *testing.T) {
		queries := mustJSON[[]struct{ ID string }](t, s, "query", "list")
		if e := postern(t, s, "query", "cancel", queries[0].ID); e.code != 0 || e.stdout+e.stderr == "" {
			t.Errorf("exit code %d: %s%s", e.code, e.stdout, e.stderr)
		}
		postern(t, s, "query", "cancel", "qry_00000000000000000000000000").said(t, 4, "not found")
	})
	answers(t, s, "host/db", "select 1", "1")
	auditVerifies(t, s)
}
