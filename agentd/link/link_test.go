package link

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/tunnel"
)

func TestPause(t *testing.T) {
	for _, tt := range []struct {
		code     proto.Code
		n        int
		from, to time.Duration
	}{
		{proto.CodeUnavailable, 1, 0, 200 * time.Millisecond},
		{proto.CodeClockSkew, 1, 0, 200 * time.Millisecond},
		{proto.CodeAgentRevoked, 1, 15 * time.Second, 30 * time.Second},
		{proto.CodeAgentRevoked, 9, 15 * time.Second, 30 * time.Second},
		{proto.CodeVersionMismatch, 1, 2 * time.Second, 5 * time.Second},
		{proto.CodeOrganizationDisabled, 3, 10 * time.Second, 20 * time.Second},
		{proto.CodeIdentityExpired, 50, 150 * time.Second, 5 * time.Minute},
	} {
		for range 20 {
			got := pause(tunnel.NewBackoff(tunnel.BackoffConfig{}), proto.Errorf(tt.code, "x"), tt.n)
			if got < tt.from || got > tt.to {
				t.Errorf("%v, failure %d: %s, want %s to %s", tt.code, tt.n, got, tt.from, tt.to)
			}
		}
	}
}

func TestClassify(t *testing.T) {
	skew := proto.Errorf(proto.CodeClockSkew, "the clock")
	for _, tt := range []struct {
		name string
		err  error
		want proto.Code
	}{
		{"clock", &tunnel.DialError{Step: tunnel.StepInnerTLS, Err: skew}, proto.CodeClockSkew},
		{"version", &tunnel.DialError{Step: tunnel.StepHello, Refusal: tunnel.RefusedVersion, Err: &tunnel.Refusal{Code: tunnel.RefusedVersion}}, proto.CodeVersionMismatch},
		{"not admitted", &tunnel.DialError{Step: tunnel.StepHello, Refusal: tunnel.RefusedNotAdmitted, Err: &tunnel.Refusal{Code: tunnel.RefusedNotAdmitted, Text: "no"}}, proto.CodeUnauthenticated},
		{"draining", &tunnel.DialError{Step: tunnel.StepHello, Refusal: tunnel.RefusedDraining, Err: &tunnel.Refusal{Code: tunnel.RefusedDraining}}, proto.CodeUnavailable},
		{"network", &tunnel.DialError{Step: tunnel.StepTCP, Err: errors.New("refused")}, proto.CodeUnavailable},
	} {
		if got := codeOf(Classify(fmt.Errorf("x: %w", tt.err))); got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
	if got := codeOf(lost(tunnel.ErrRevoked)); got != proto.CodeAgentRevoked {
		t.Errorf("revoked: got %v", got)
	}
	if lost(nil) == nil {
		t.Error("a tunnel without cause")
	}
}

// span is an identity that knows its validity alone.
type span struct {
	Identity
	from, to time.Time
}

func (s span) Validity() (from, to time.Time) { return s.from, s.to }

func TestRenewalIsDueAtTwoThirds(t *testing.T) {
	now := time.Now()
	k := New(Config{Identity: span{from: now, to: now.Add(24 * time.Hour)}})
	for range 50 {
		if d := k.renewIn(); d < 14*time.Hour || d > 18*time.Hour {
			t.Fatalf("due in %s", d)
		}
	}
	k = New(Config{Identity: span{from: now.Add(-23 * time.Hour), to: now.Add(time.Hour)}})
	if d := k.renewIn(); d != 0 {
		t.Errorf("overdue, and due in %s", d)
	}
	if d := k.renewAgainIn(30); d > 24*time.Minute {
		t.Errorf("again in %s", d)
	}
}

func TestClientWithoutLink(t *testing.T) {
	k := New(Config{URL: "ws://127.0.0.1:1/tunnel"})
	if _, err := k.Client(); proto.CodeOf(err) != proto.CodeAgentOffline {
		t.Errorf("got %v", err)
	}
	if s := k.State(); s.Up || s.Cause == "" {
		t.Errorf("state %+v", s)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	k.Run(ctx)
}
