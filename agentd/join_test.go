package main

import (
	"bytes"
	"io"
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/regkey"
)

// waiting is a host that has a configuration and, with key, a registration key that
// waits beside it.
func waiting(t *testing.T, c *testControl, key string, mode os.FileMode) (*Daemon, string) {
	t.Helper()
	l := &lab{t: t, c: c, dir: t.TempDir()}
	l.configure("name: waiting\n")
	path := l.path(keyFileName)
	if key != "" {
		if err := os.WriteFile(path, []byte(key), mode); err != nil {
			t.Fatal(err)
		}
	}
	d := NewDaemon(slog.New(slog.NewTextHandler(io.Discard, nil)), new(slog.LevelVar))
	d.places.config, d.state, d.runtime = l.path("agentd.yaml"), l.path("state"), l.path("run")
	d.given = func(string) bool { return true }
	return d, path
}

func TestJoinAtStart(t *testing.T) {
	c := newTestControl(t)
	text, err := os.ReadFile(c.keyFile(t))
	if err != nil {
		t.Fatal(err)
	}
	d, path := waiting(t, c, string(text), 0o600)
	if err := d.join(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := d.Validate(); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadFile(path); err == nil && len(left) > 0 {
		t.Errorf("the key is still there")
	}
	// With an identity the next key is not used up, nor touched.
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.join(t.Context()); err != nil {
		t.Errorf("the second start: %v", err)
	}
	if left, err := os.ReadFile(path); err != nil || !bytes.Equal(left, text) {
		t.Errorf("a registered host touched the key: %v", err)
	}
}

func TestJoinAtStartRefusals(t *testing.T) {
	c := newTestControl(t)
	text, err := os.ReadFile(c.keyFile(t))
	if err != nil {
		t.Fatal(err)
	}
	other := regkey.New(c.key.Fingerprint)
	for name, tt := range map[string]struct {
		key, says string
		mode      os.FileMode
		exit      int
	}{
		"none":       {},
		"for all":    {key: string(text), mode: 0o644, says: "chmod 600", exit: proto.ExitFailed},
		"not a key":  {key: "hello\n", mode: 0o600, says: keyFileName, exit: proto.ExitFailed},
		"of another": {key: other.Encode(), mode: 0o600, says: "join with", exit: proto.ExitDenied},
	} {
		t.Run(name, func(t *testing.T) {
			d, path := waiting(t, c, tt.key, tt.mode)
			err := d.join(t.Context())
			if tt.says == "" {
				if err != nil || d.Validate() == nil {
					t.Errorf("got %v, and an identity", err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.says) || strings.Contains(err.Error(), tt.key) || proto.ExitCode(err) != tt.exit {
				t.Errorf("got %v, exit %d", err, proto.ExitCode(err))
			}
			if left, err := os.ReadFile(path); err != nil || string(left) != tt.key {
				t.Errorf("a key that was not used was taken away: %v", err)
			}
		})
	}
}
