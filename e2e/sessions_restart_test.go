package e2e

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/stack"
	"github.com/postern-dev/postern/proto"
)

// TestSessionsOutliveAgentd restarts agentd by SIGTERM and by kill -9 under open
// sessions: transactions, temporary tables and settings stay, what was under way ends
// well or with a clear error, and a token that was revoked meanwhile loses its sessions.
func TestSessionsOutliveAgentd(t *testing.T) {
	pg := database(t, "restarts")
	s := newStack(t, stack.Options{})
	agent, err := s.Join(t.Context(), "host", "sources:\n"+mustSource(t, s.Dir, "db", pg.SocketDSN("reader", "restarts"), "      mode: read-write\n"))
	if err != nil {
		t.Fatal(err)
	}
	ana := tokenClient(t, s, "ana", "analyst")
	a, b := hold(t, ana, 0), hold(t, ana, 0)
	before := items(t, "restarts")
	a.want("create temp table scratch as select 42 as i", "", "none")
	a.want("set time zone 'Asia/Tokyo'", "", "none")
	a.want("begin", "", "open")
	a.want("update items set name = 'changed'", "", "open")
	gone := hold(t, tokenClient(t, s, "gone", "analyst"), 0)
	gone.want("begin", "", "open")

	type answer struct {
		rows string
		err  error
	}
	under := func(h *held, mark, sql string) <-chan answer {
		t.Helper()
		answers := make(chan answer, 1)
		go func() {
			rows, _, err := h.run(t.Context(), sql)
			answers <- answer{rows, err}
		}()
		underWay(t, mark, 1)
		return answers
	}
	for round, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		// A planned restart lets what is under way end; a kill does not.
		mark := fmt.Sprintf("/* round %d */", round)
		answers := under(b, mark, "select 7, pg_sleep(3) "+mark)
		agent.Process.Signal(sig)
		got := <-answers
		if sig == syscall.SIGTERM && (got.err != nil || !strings.HasPrefix(got.rows, "7,")) {
			t.Errorf("round %d: the statement under way gave %q, %v", round, got.rows, got.err)
		}
		if sig == syscall.SIGKILL && proto.CodeOf(got.err) != proto.CodeAgentLost {
			t.Errorf("round %d: the statement under way gave %q, %v; want AGENT_LOST", round, got.rows, got.err)
		}
		<-agent.Process.Done()
		if round == 1 { // while agentd is away
			must(t, s, "token", "revoke", "gone")
		}
		if err := errors.Join(agent.Start(), agent.Online(t.Context())); err != nil {
			t.Fatal(err)
		}
		b.again("select 1", "1")
		underWay(t, mark, 0)
		a.want("select i from scratch", "42", "open")
		a.want("show timezone", "Asia/Tokyo", "open")
		if now := items(t, "restarts"); now != before {
			t.Errorf("round %d: others see the open transaction: %s", round, now)
		}
	}
	eventually(t, 40*time.Second, "the revoked token's session is gone from the host", func() error { return hosts(t, agent, 2) })
	a.want("commit", "", "none")
	if now := items(t, "restarts"); now == before {
		t.Error("the transaction that outlived agentd twice was not committed")
	}

	resumed, closed := 0, 0
	for _, e := range auditEntries(t, s, "host") {
		switch e.Action {
		case "session.resume":
			resumed++
		case "session.close":
			closed++
			if e.SessionID != gone.id {
				t.Errorf("closed: %+v", e)
			}
		}
	}
	if resumed < 5 || closed != 1 {
		t.Errorf("the host's log has %d resumed and %d closed", resumed, closed)
	}
	auditVerifies(t, s)
}
