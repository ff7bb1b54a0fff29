package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/stack"
)

// historyQuery is what `query list -o json` prints of a statement.
type historyQuery struct {
	ID, State, SQL, TokenName, KernelID, Source string
	Rows, Bytes                                 string
	Error                                       struct{ Code, Message string }
}

// TestKernelSQLHistory runs statements from a kernel while the link is up, while it is
// away and agentd is killed, and after the kernel's token was revoked, and counts them
// in the history and in the audit chain.
func TestKernelSQLHistory(t *testing.T) {
	needRoot(t)
	pg := database(t, "khist")
	if err := pg.SQLIn(t.Context(), "khist", "create table people as select i as id, 'name ' || i as name from generate_series(1, 10) i", "grant select on people to reader"); err != nil {
		t.Fatal(err)
	}
	s := newStack(t, stack.Options{})
	a, err := s.Join(t.Context(), "host", "sources:\n"+mustSource(t, s.Dir, "db", pg.SocketDSN("reader", "khist"), "")+"kernels:\n  specs: [python3]\n  warm: 0\n  sources: [db]\n")
	if err != nil {
		t.Fatal(err)
	}
	ana := newToken(t, s, "ana", "analyst")
	anaFile := filepath.Join(s.Dir, "ana.token")
	if err := os.WriteFile(anaFile, []byte(ana+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	as := func(args ...string) string {
		t.Helper()
		e := postern(t, s, append(args, "--token-file", anaFile)...)
		if e.code != 0 {
			t.Fatalf("%v: %s", args, e.stderr)
		}
		return strings.TrimSpace(e.stdout)
	}
	kernel := as("kernel", "start", "host")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
		defer cancel()
		if _, err := s.Postern(ctx, "kernel", "stop", kernel); err != nil {
			t.Error(err)
		}
	})
	out := as("kernel", "exec", kernel, `
import postern, threading, time, os
postern.sql("select id, name from people order by id")
try: postern.sql("delete from people")
except postern.Error as e: print(e.code)
try: postern.sql("select nix")
except postern.Error as e: print(e.sqlstate)`)
	if !strings.Contains(out, "POLICY_DENIED") || !strings.Contains(out, "42703") {
		t.Fatalf("the kernel printed %s", out)
	}
	history := func(mark string) []historyQuery {
		t.Helper()
		var found []historyQuery
		for _, q := range mustJSON[[]historyQuery](t, s, "query", "list", "--limit", "1000") {
			if strings.Contains(q.SQL, mark) {
				found = append(found, q)
			}
		}
		return found
	}
	for mark, want := range map[string]historyQuery{
		"from people order": {State: "done", Rows: "10"},
		"delete from":       {State: "denied"},
		"select nix":        {State: "failed"},
	} {
		var got []historyQuery
		eventually(t, time.Minute, mark, func() error {
			if got = history(mark); len(got) != 1 {
				return fmt.Errorf("%d statements with %q in the history", len(got), mark)
			}
			return nil
		})
		if q := got[0]; q.State != want.State || q.Rows != want.Rows && want.Rows != "" || q.KernelID != kernel || q.TokenName != "ana" || q.Source != "db" {
			t.Errorf("%s: the history has %+v", mark, q)
		}
	}
	id := history("from people order")[0].ID
	if rows := mustJSON[shown](t, s, "query", "show", id, "--rows"); rows.Kept == nil || len(rows.Kept.Rows) != 10 || rows.Kept.Rows[9]["name"] != "name 10" {
		t.Errorf("kept are %+v", rows.Kept)
	}
	if text := must(t, s, "query", "show", id); !strings.Contains(text, kernel) {
		t.Errorf("no kernel in\n%s", text)
	}

	// The link goes away, and agentd dies, while a thread of the kernel asks on.
	const n = 30
	as("kernel", "exec", kernel, fmt.Sprintf(`
def ask():
    i = 0
    while i < %d:
        try:
            postern.sql(f"select {i} as away")
            i += 1
        except postern.Error as e:
            failed = e # agentd was killed: the same again
        time.sleep(0.1)
    open("away", "w").close()
    while True:
        time.sleep(0.2)
        try: postern.sql("select 'revoked'")
        except Exception as e: last = e
threading.Thread(target=ask, daemon=True).start()`, n))
	eventually(t, time.Minute, "the first statements", func() error {
		if len(history("as away")) < 3 {
			return fmt.Errorf("%d statements", len(history("as away")))
		}
		return nil
	})
	s.ControlPlane.Kill()
	local := func() (ended int) {
		for _, e := range localEntries(t, a) {
			if strings.Contains(e, "as away") && strings.Contains(e, `"action":"sql.run"`) {
				ended++
			}
		}
		return ended
	}
	eventually(t, 30*time.Second, "statements without a link", func() error {
		if n := local(); n < 15 {
			return fmt.Errorf("%d statements", n)
		}
		return nil
	})
	a.Process.Kill()
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 60*time.Second, "the last statement without a link", func() error {
		if l := local(); l < n {
			return fmt.Errorf("%d statements", l)
		}
		return nil
	})
	if err := s.StartControlPlane(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "the history of what ran without a link", func() error {
		if got := len(history("as away")); got < n {
			return fmt.Errorf("%d of %d statements", got, n)
		}
		return nil
	})
	// Once each, in the history and in the chain, and what the host's own log has.
	done := map[string]int{}
	for _, q := range history("as away") {
		if q.State == "done" {
			done[q.SQL]++
		}
	}
	for i := range n {
		if sql := fmt.Sprintf("select %d as away", i); done[sql] != 1 {
			t.Errorf("%q is %d times in the history", sql, done[sql])
		}
	}
	chain := map[string]int{}
	for _, e := range allEntries(t, s, "") {
		if e.Action == "sql.run" && strings.Contains(e.Statement, "as away") {
			chain[e.QueryID]++
			if e.Target != "kernel "+kernel || e.Actor != "token ana" || e.Agent != "host" {
				t.Errorf("the chain has %+v", e)
			}
		}
	}
	for _, q := range history("as away") {
		if chain[q.ID] != 1 {
			t.Errorf("%s is %d times in the chain", q.SQL, chain[q.ID])
		}
	}
	auditVerifies(t, s)

	// A token that is revoked while the host is away: its kernel may ask until the host
	// hears of it, and then never again, whoever restarts.
	a.Process.Kill()
	must(t, s, "token", "revoke", "ana")
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	denied := func() error {
		got := history("'revoked'")
		if len(got) == 0 || got[0].State != "denied" || !strings.Contains(got[0].Error.Message, "was revoked") {
			return fmt.Errorf("the newest statement is %+v", got[:min(len(got), 1)])
		}
		return nil
	}
	eventually(t, 30*time.Second, "a refusal", denied)
	s.ControlPlane.Kill()
	a.Process.Kill()
	before := len(localEntries(t, a))
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "a refusal without a link", func() error {
		for _, e := range localEntries(t, a)[before:] {
			if strings.Contains(e, `"action":"sql.run"`) && strings.Contains(e, "'revoked'") {
				if !strings.Contains(e, `"verdict":"denied"`) {
					t.Fatalf("after a restart of agentd it ran: %s", e)
				}
				return nil
			}
		}
		return fmt.Errorf("no statement yet")
	})
	if err := s.StartControlPlane(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.Online(t.Context()); err != nil {
		t.Fatal(err)
	}
}
