package e2e

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/stack"
	"github.com/postern-dev/postern/proto/jupyter"
)

// withSecrets is a stack with an agent "host" whose kernels may have secrets.
func withSecrets(t *testing.T, o stack.Options, config string) (*stack.Stack, *stack.Agent) {
	t.Helper()
	needRoot(t)
	s := newStack(t, o)
	a, err := s.Join(t.Context(), "host", config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopKernels(t, s) })
	return s, a
}

// stopKernels stops all kernels: they outlive agentd.
func stopKernels(t *testing.T, s *stack.Stack) {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	text, err := s.Postern(ctx, "kernel", "list")
	if err != nil {
		t.Error(err)
	}
	for line := range strings.Lines(text) {
		if id, _, _ := strings.Cut(line, " "); id != "ID" {
			if _, err := s.Postern(ctx, "kernel", "stop", id); err != nil {
				t.Error(err)
			}
		}
	}
}

// setSecret sets a secret's value by stdin.
func setSecret(t *testing.T, s *stack.Stack, name, value string, args ...string) ended {
	t.Helper()
	cmd := s.Command(t.Context(), append([]string{"secret", "set", name}, args...)...)
	cmd.Stdin = strings.NewReader(value + "\n")
	e := finish(t, cmd)
	if e.code != 0 {
		t.Fatalf("secret set: exit code %d: %s", e.code, e.stderr)
	}
	return e
}

// findCanaries looks for values, and what they look like in hexadecimal and base64, in all
// files below a directory and in the arguments and environments of all processes.
func findCanaries(t *testing.T, dir string, values ...string) {
	t.Helper()
	var needles [][]byte
	for _, v := range values {
		needles = append(needles, []byte(v), []byte(hex.EncodeToString([]byte(v))), []byte(base64.RawStdEncoding.EncodeToString([]byte(v))[:16]))
	}
	look := func(path string) {
		text, err := os.ReadFile(path)
		if err != nil {
			return // it has ended
		}
		for i, n := range needles {
			if bytes.Contains(text, n) {
				t.Errorf("%s holds value %d", path, i/3)
			}
		}
	}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			look(path)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	for _, pattern := range []string{"/proc/[0-9]*/environ", "/proc/[0-9]*/cmdline"} {
		list, err := filepath.Glob(pattern)
		if err != nil || len(list) == 0 {
			t.Fatalf("%s: %v", pattern, err)
		}
		for _, path := range list {
			look(path)
		}
	}
}

// TestSecretsEndToEnd takes secrets from the command line's stdin into a kernel, through
// rotation, kills and checkpoints, and looks for them everywhere else.
func TestSecretsEndToEnd(t *testing.T) {
	s, a := withSecrets(t, stack.Options{Bin: checkpointBinaries(t)}, "kernels:\n  specs: [python3]\n  warm: 0\n  secrets: {control_plane: allow}\n")
	first, second, third := "canary-1-"+jupyter.NewID(), "canary-2-"+jupyter.NewID(), "canary-3-"+jupyter.NewID()
	exec := func(id, code string) string {
		t.Helper()
		return strings.TrimSpace(must(t, s, "kernel", "exec", id, code))
	}
	setSecret(t, s, "API_TOKEN", first)
	id := strings.TrimSpace(must(t, s, "kernel", "start", "host", "--secret", "API_TOKEN"))
	other := startedKernel(t, s, "host")
	if got := exec(id, "import os; print(len(os.environ['API_TOKEN']), os.environ['API_TOKEN'])"); got != fmt.Sprintf("%d [secret API_TOKEN]", len(first)) {
		t.Errorf("the kernel printed %q", got)
	}
	if got := exec(other, "import os; print('API_TOKEN' in os.environ)"); got != "False" {
		t.Errorf("a kernel without a grant printed %q", got)
	}
	if got := exec(id, "print(In, len(_ih), [m for m in get_ipython().history_manager.get_range() if 'canary' in m[2]])"); strings.Contains(got, "[secret") {
		t.Errorf("history: %q", got)
	}
	if e := postern(t, s, "kernel", "exec", id, "raise RuntimeError(os.environ['API_TOKEN'])"); e.code != 1 || !strings.Contains(e.stderr, "[secret API_TOKEN]") || strings.Contains(e.stderr+e.stdout, first) {
		t.Errorf("a traceback: %+v", e)
	}
	// To all kernels, and set anew.
	must(t, s, "secret", "grant", "API_TOKEN", "--all")
	if e := setSecret(t, s, "API_TOKEN", second); strings.Count(e.stderr, "has the new value") != 2 {
		t.Errorf("rotation: %q", e.stderr)
	}
	for _, k := range []string{id, other} {
		if got := exec(k, "print(os.environ['API_TOKEN'][-7:])"); got != second[len(second)-7:] {
			t.Errorf("after the rotation: %q", got)
		}
	}
	// A checkpoint, a kill of agentd, a rollback, a fork, and a value of meanwhile.
	point := strings.TrimSpace(must(t, s, "kernel", "checkpoint", id))
	a.Process.Signal(syscall.SIGKILL)
	<-a.Process.Done()
	if e := setSecret(t, s, "API_TOKEN", third); !strings.Contains(e.stderr, "its agent is offline: it gets it when the agent is back") {
		t.Errorf("while agentd is away: %q", e.stderr)
	}
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	if err := a.Online(t.Context()); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(2 * time.Minute); exec(id, "print(os.environ['API_TOKEN'][-7:])") != third[len(third)-7:]; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the kernel has not got the value of meanwhile")
		}
	}
	must(t, s, "kernel", "rollback", id, point)
	fork := strings.TrimSpace(must(t, s, "kernel", "fork", id, point))
	for _, k := range []string{id, fork} {
		if got := exec(k, "print(os.environ['API_TOKEN'][-7:], os.environ['API_TOKEN'])"); got != third[len(third)-7:]+" [secret API_TOKEN]" {
			t.Errorf("after the rollback, or in the fork: %q", got)
		}
	}
	must(t, s, "kernel", "suspend", id)
	must(t, s, "kernel", "resume", id)
	if got := exec(id, "print(os.environ['API_TOKEN'])"); got != "[secret API_TOKEN]" {
		t.Errorf("after the resume: %q", got)
	}
	if got := must(t, s, "secret", "list"); strings.Contains(got, "canary") || !strings.Contains(got, "all of admin") {
		t.Errorf("list:\n%s", got)
	}
	if got := must(t, s, "audit", "list", "-o", "json"); !strings.Contains(got, "secret.set") || !strings.Contains(got, "secret.push") {
		t.Errorf("audit:\n%.500s", got)
	}
	findCanaries(t, s.Dir, first, second, third)
	must(t, s, "secret", "rm", "API_TOKEN")
	if got := exec(id, "print('API_TOKEN' in os.environ)"); got != "False" {
		t.Errorf("after its removal: %q", got)
	}
	findCanaries(t, s.Dir, first, second, third)
}

// TestSecretsAreRefusedByDefault: a host takes none unless its owner says so.
func TestSecretsAreRefusedByDefault(t *testing.T) {
	s, _ := withSecrets(t, stack.Options{}, "kernels:\n  specs: [python3]\n  warm: 0\n")
	value := "canary-" + jupyter.NewID()
	setSecret(t, s, "API_TOKEN", value)
	const want = "this host takes no secrets from the control plane: set kernels.secrets.control_plane: allow in agentd.yaml"
	if e := postern(t, s, "kernel", "start", "host", "--secret", "API_TOKEN"); e.code != 3 || !strings.Contains(e.stderr, want) {
		t.Errorf("start: %+v", e)
	}
	id := startedKernel(t, s, "host")
	if e := postern(t, s, "secret", "grant", "API_TOKEN", id); e.code != 3 || !strings.Contains(e.stderr, want) {
		t.Errorf("grant: %+v", e)
	}
	must(t, s, "secret", "grant", "API_TOKEN", "--all")
	if e := postern(t, s, "kernel", "start", "host"); e.code != 0 || !strings.Contains(e.stderr, want) {
		t.Errorf("start with a standing grant: %+v", e)
	}
	findCanaries(t, s.Dir, value)
}
