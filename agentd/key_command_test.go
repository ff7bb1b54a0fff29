package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/checkpoint"
	"github.com/postern-dev/postern/agentd/control"
)

// runKey runs agentd key with these arguments and directories.
func runKey(t *testing.T, state, run string, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	root := newRoot()
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(append(append([]string{"key"}, args...), "--state", state, "--runtime", run))
	err := root.Execute()
	return out.String(), err
}

func TestKeyCommand(t *testing.T) {
	l := newLab(t, newTestControl(t), "")
	l.configure("log: {level: warn}\n")
	l.start()
	state, run := l.path("state"), l.path("run")
	if _, err := runKey(t, state, run, "list"); err == nil || !strings.Contains(err.Error(), "kernels were off") {
		t.Errorf("where there are no kernels: got %v", err)
	}
	// As a host with kernels has it.
	e, err := checkpoint.Open(checkpoint.Config{State: state, Logger: l.d.logger, Memory: filepath.Join(t.TempDir(), "memory")})
	if err != nil {
		t.Fatal(err)
	}
	l.d.checkpoints.set(e, nil)
	t.Cleanup(func() { e.Close() }) //nolint:errcheck // closed twice is fine
	list := func(args ...string) (keys []control.Key) {
		t.Helper()
		out, err := runKey(t, state, run, append(args, "-o", "json")...)
		if err == nil {
			err = json.Unmarshal([]byte(out), &keys)
		}
		if err != nil {
			t.Fatal(out, err)
		}
		return keys
	}
	before := list("list")
	if len(before) != 1 || !before[0].Newest {
		t.Fatalf("at first: %+v", before)
	}
	after := list("rotate")
	if n := len(after); n == 0 || !after[n-1].Newest || after[n-1].ID == before[0].ID {
		t.Errorf("after a rotation: %+v", after)
	}
	if out, err := runKey(t, state, run, "list"); err != nil || !strings.Contains(out, after[len(after)-1].ID) || !strings.HasPrefix(out, "KEY ") {
		t.Errorf("as text: %q, %v", out, err)
	}
	if _, err := runKey(t, state, run, "list", "-o", "yaml"); err == nil || !strings.Contains(err.Error(), "text or json") {
		t.Errorf("another format: got %v", err)
	}
	l.stop()

	// Without a running agentd.
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	offline := list("rotate")
	if n := len(offline); n == 0 || offline[n-1].ID == after[len(after)-1].ID || !offline[n-1].Newest {
		t.Errorf("without agentd: %+v", offline)
	}
	if _, err := runKey(t, t.TempDir(), t.TempDir(), "rotate"); !errors.Is(err, checkpoint.ErrNoStore) {
		t.Errorf("on a host without checkpoints: got %v", err)
	}
}
