package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/stack"
)

// TestRotateTheCertificateAuthority does it with a real agent, on which a statement runs and a session with a transaction
// is open all the while, and with one that is away.
func TestRotateTheCertificateAuthority(t *testing.T) {
	pg := database(t, "rotation")
	s := newStack(t, stack.Options{})
	ctx := t.Context()
	config := "sources:\n" + mustSource(t, s.Dir, "db", pg.SocketDSN("reader", "rotation"), "      mode: read-write\n")
	agent, err := s.Join(ctx, "host", config)
	if err != nil {
		t.Fatal(err)
	}
	sleeper, err := s.Join(ctx, "sleeper", config)
	if err != nil {
		t.Fatal(err)
	}
	if err := sleeper.Process.Stop(20 * time.Second); err != nil {
		t.Fatal(err)
	}
	session := hold(t, api(t, s), 0)
	session.want("begin", "", "open")
	var status struct {
		Stage  string `json:"stage"`
		Behind []struct{ Agent string }
		Keys   string                                `json:"keys"`
		CAs    []struct{ Fingerprint, State string } `json:"authorities"`
	}
	read := func() error {
		out, err := s.Postern(ctx, "ca", "status", "-o", "json")
		if err == nil {
			status.Behind = nil
			err = json.Unmarshal([]byte(out), &status)
		}
		return err
	}
	if err := read(); err != nil || status.Stage != "stable" {
		t.Fatalf("at first: %+v, %v", status, err)
	}
	first := status.CAs[0].Fingerprint
	done := make(chan error, 1)
	go func() {
		out, err := s.Postern(ctx, "sql", "host/db", "-f", "csv", "select 'through', pg_sleep(25)")
		if err == nil && !strings.Contains(out, "through") {
			err = fmt.Errorf("got %q", out)
		}
		done <- err
	}()
	if out, err := s.Postern(ctx, "ca", "rotate"); err != nil || !strings.Contains(out, "announced") {
		t.Fatalf("%q, %v", out, err)
	}
	eventually(t, 3*time.Minute, "the agent that is there to have renewed", func() error {
		if err := read(); err != nil {
			return err
		}
		if status.Stage != "renewing" || len(status.Behind) != 1 || status.Behind[0].Agent != "sleeper" {
			return fmt.Errorf("got %+v", status)
		}
		return nil
	})
	session.want("select 1", "1", "open")
	// The one that was away knows nothing of it, and finds its way all the same.
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 3*time.Minute, "the end of the rotation", func() error {
		if err := read(); err != nil {
			return err
		}
		if status.Stage != "stable" || len(status.CAs) != 1 || status.CAs[0].Fingerprint == first {
			return fmt.Errorf("got %+v", status)
		}
		return nil
	})
	if err := <-done; err != nil {
		t.Errorf("the statement that ran meanwhile: %v", err)
	}
	session.want("commit", "", "none")
	for _, a := range []*stack.Agent{agent, sleeper} {
		if err := a.Online(ctx); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.Postern(ctx, "ca", "rotate", "--force"); err == nil || !strings.Contains(err.Error(), "no old certificate authority") {
		t.Errorf("--force with nothing to drop: %v", err)
	}
}
