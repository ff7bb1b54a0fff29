package main

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/agentd/identity"
	"github.com/postern-dev/postern/proto"
)

// TestRenewalOverlaps: a statement that runs while the identity is renewed ends
// well, on the old tunnel; the next goes over the new one.
func TestRenewalOverlaps(t *testing.T) {
	_, source := database(t, "")
	c := newTestControl(t)
	l := newLab(t, c, source)
	before := certificate(t, l)
	l.start()
	old := c.awaitHello(1)
	running := make(chan result, 1)
	go func() { running <- c.ask(context.Background(), old, "q1", "shop", "select pg_sleep(2)") }()
	awaitRunning(t, l.d, 1)
	l.d.link.Renew()
	next := c.awaitHello(2)
	if next == old {
		t.Fatal("no new tunnel")
	}
	if r := c.ask(t.Context(), next, "q2", "shop", "select 1"); r.err != nil {
		t.Errorf("on the new tunnel: %v", r.err)
	}
	if r := <-running; r.err != nil {
		t.Errorf("the statement under way: %v", r.err)
	}
	select {
	case <-old.Done():
	case <-time.After(time.Minute):
		t.Error("the old tunnel stays")
	}
	if s := l.d.link.State(); !s.Up {
		t.Errorf("link %+v", s)
	}
	l.stop()
	if certificate(t, l) == before {
		t.Error("the certificate is the old one")
	}
	l.start() // with the new one alone: the old is retired
	c.awaitHello(3)
}

func certificate(t *testing.T, l *lab) string {
	t.Helper()
	i, err := identity.Open(l.path("state"))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, next := i.Credential(); next {
		t.Error("a next pair waits")
	}
	return i.Serial()
}

func awaitRunning(t *testing.T, d *Daemon, n int) {
	t.Helper()
	poll(t, fmt.Sprintf("%d statements to run", n), func() bool { return len(d.sessions.Running()) == n })
}

func poll(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long for %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestRenewalByTime: a short-lived certificate is renewed by itself.
func TestRenewalByTime(t *testing.T) {
	c := newTestControl(t)
	c.life = 8 * time.Second
	l := newLab(t, c, "")
	l.start()
	c.awaitHello(3)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rejoins != 0 || len(c.retired) < 2 {
		t.Errorf("%d rejoins, %d retired", c.rejoins, len(c.retired))
	}
}

func TestRejoinAfterExpiry(t *testing.T) {
	c := newTestControl(t)
	c.life = time.Second
	l := newLab(t, c, "")
	i, err := identity.Open(l.path("state"))
	if err != nil {
		t.Fatal(err)
	}
	_, expires := i.Validity()
	c.mu.Lock()
	c.life = time.Hour
	c.mu.Unlock()
	poll(t, "the certificate to expire", func() bool { return time.Now().After(expires.Add(100 * time.Millisecond)) })
	l.start()
	c.awaitHello(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rejoins != 1 {
		t.Errorf("%d rejoins", c.rejoins)
	}
}

func TestReconnect(t *testing.T) {
	_, source := database(t, "")
	c := newTestControl(t)
	l := newLab(t, c, source)
	l.start()
	for n := 1; n <= 3; n++ {
		up := c.awaitHello(n)
		running := make(chan result, 1)
		go func() {
			running <- c.ask(context.Background(), up, fmt.Sprintf("q%d", n), "shop", "select pg_sleep(60)")
		}()
		awaitRunning(t, l.d, 1)
		c.cut()
		if r := <-running; r.err == nil {
			t.Error("a statement on a cut link ended well")
		}
		awaitRunning(t, l.d, 0) // the hang-up reached the session
	}
	c.awaitHello(4)
	l.stop()
	if got := l.actions(); strings.Count(got, "sql.run cancelled") != 3 {
		t.Errorf("recorded %s", got)
	}
	if n := strings.Count(l.log.String(), "link down, retrying"); n != 3 {
		t.Errorf("%d lines for 3 losses", n)
	}
}

func TestGoAwayMovesFirst(t *testing.T) {
	_, source := database(t, "")
	c := newTestControl(t)
	l := newLab(t, c, source)
	l.start()
	old := c.awaitHello(1)
	running := make(chan result, 1)
	go func() { running <- c.ask(context.Background(), old, "q1", "shop", "select pg_sleep(1)") }()
	awaitRunning(t, l.d, 1)
	old.GoAway(0, 0, "a test")
	c.awaitHello(2)
	if r := <-running; r.err != nil {
		t.Errorf("the statement under way: %v", r.err)
	}
	if s := l.d.link.State(); !s.Up || strings.Contains(l.log.String(), "link down") {
		t.Errorf("the link was down: %+v", s)
	}
}

// TestMoveThatFails: while the next tunnel cannot be had the old one serves; when
// it is lost too the link is down, and comes back.
func TestMoveThatFails(t *testing.T) {
	c := newTestControl(t)
	l := newLab(t, c, "")
	l.start()
	old := c.awaitHello(1)
	c.setRefuse(proto.Errorf(proto.CodeUnavailable, "not now"))
	old.GoAway(0, 0, "a test")
	poll(t, "a try that fails", func() bool { return strings.Contains(l.log.String(), "next tunnel not up") })
	if r := c.ask(t.Context(), old, "q1", "nope", "select 1"); proto.CodeOf(r.err) != proto.CodeNotFound {
		t.Errorf("on the old tunnel: %v", r.err)
	}
	if s := l.d.link.State(); !s.Up {
		t.Errorf("link %+v", s)
	}
	c.cut()
	poll(t, "the link to be down", func() bool { return !l.d.link.State().Up })
	c.setRefuse(nil)
	c.awaitHello(2)
	poll(t, "the link to be up", func() bool { return l.d.link.State().Up })
}

func TestRefusedByTheControlPlane(t *testing.T) {
	c := newTestControl(t)
	l := newLab(t, c, "")
	c.setRefuse(proto.Errorf(proto.CodeAgentRevoked, "the agent was revoked: register it again with a new key"))
	l.start()
	poll(t, "the refusal", func() bool { return l.d.link.State().Code == proto.CodeAgentRevoked })
	s, err := control.Ask(t.Context(), l.path("run"))
	if err != nil || s.Link.Up || s.Link.Code != "AGENT_REVOKED" || !strings.Contains(s.Link.Cause, "register it again") {
		t.Errorf("status %+v, %v", s.Link, err)
	}
}
