package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/stack"
)

// returned bounds how long an agent may stay away once the control plane listens
// again: 2 s are promised, the rest is for a busy machine.
const returned = 3 * time.Second

// TestStoppedPeers stops each side with SIGSTOP, under a query: to the other side
// that is a peer that says nothing and closes nothing.
func TestStoppedPeers(t *testing.T) {
	s := newStack(t, stack.Options{})
	a := join(t, s, "host")
	t.Run("agentd", func(t *testing.T) {
		const mark = "stop-agentd"
		q := startSQL(t, s, "host/db", "select pg_sleep(300) /* "+mark+" */")
		underWay(t, mark, 1)
		a.Process.Signal(syscall.SIGSTOP)
		took := eventually(t, patience, "the control plane to see the agent offline", online(t, s, "host", false))
		t.Logf("noticed by the control plane after %.1f s", took.Seconds())
		if took > noticed {
			t.Errorf("a stopped agentd was noticed only after %s", took)
		}
		code, said := q.exit(t, noticed)
		if code != 5 || !oneClearLine(said) || !strings.Contains(said, "agent host") {
			t.Errorf("the query under way: got exit code %d, %q", code, said)
		}
		code, said = startSQL(t, s, "host/db", "select 1").exit(t, noticed)
		if code != 5 || !oneClearLine(said) || !strings.Contains(said, "offline") {
			t.Errorf("a query meanwhile: got exit code %d, %q", code, said)
		}
		a.Process.Signal(syscall.SIGCONT)
		took = eventually(t, patience, "the agent to be back", online(t, s, "host", true))
		t.Logf("back %.1f s after it went on", took.Seconds())
		underWay(t, mark, 0)
		answers(t, s, "host/db", "select 'back'", "back")
	})
	t.Run("control plane", func(t *testing.T) {
		const mark = "stop-control-plane"
		q := startSQL(t, s, "host/db", "select pg_sleep(300) /* "+mark+" */")
		underWay(t, mark, 1)
		s.ControlPlane.Signal(syscall.SIGSTOP)
		took := eventually(t, patience, "agentd to see the link down", func() error {
			if linkIsUp(t, a) {
				return errors.New("it is up")
			}
			return nil
		})
		t.Logf("noticed by agentd after %.1f s", took.Seconds())
		if took > noticed {
			t.Errorf("a stopped control plane was noticed only after %s", took)
		}
		took = underWay(t, mark, 0)
		t.Logf("its statement had ended %.1f s later", took.Seconds())
		s.ControlPlane.Signal(syscall.SIGCONT)
		code, said := q.exit(t, patience)
		if code != 5 || !oneClearLine(said) || !strings.Contains(said, "agent host") {
			t.Errorf("the query under way: got exit code %d, %q", code, said)
		}
		took = eventually(t, patience, "the agent to be back", func() error {
			if !linkIsUp(t, a) {
				return errors.New("the link is down")
			}
			return online(t, s, "host", true)()
		})
		t.Logf("back %.1f s after it went on", took.Seconds())
		answers(t, s, "host/db", "select 'back'", "back")
	})
}

// linkIsUp asks agentd itself.
func linkIsUp(t *testing.T, a *stack.Agent) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	text, err := a.Run(ctx, "", "status", "-o", "json", "--state", a.StateDir(), "--runtime", filepath.Join(a.Dir(), "run"))
	if err != nil {
		t.Fatal(err)
	}
	var status struct{ Link struct{ Up *bool } }
	if err := json.Unmarshal([]byte(text), &status); err != nil || status.Link.Up == nil {
		t.Fatalf("agentd status: %v: %s", err, text)
	}
	return *status.Link.Up
}

// controlPlaneDies kills the control plane, leaves it dead for a while and wants
// the agent back as soon as it serves again.
func controlPlaneDies(t *testing.T, s *stack.Stack, name string) {
	t.Helper()
	s.ControlPlane.Kill()
	time.Sleep(4 * time.Second) // dead for long enough for several tries of the agent
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := s.StartControlPlane(ctx); err != nil {
		t.Fatal(err)
	}
	took := eventually(t, patience, "the agent to be back", online(t, s, name, true))
	t.Logf("back %.2f s after the control plane was ready again", took.Seconds())
	if took > returned {
		t.Errorf("the agent was back only after %s", took)
	}
	answers(t, s, name+"/db", "select 'here'", "here")
}
