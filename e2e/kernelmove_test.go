package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/stack"
)

// twoHosts is a stack with agents "host" and "other" that move kernels. They are on one
// machine, so each has users of its own.
func twoHosts(t *testing.T) (s *stack.Stack, a, b *stack.Agent) {
	t.Helper()
	s, a = withKernelsOf(t, stack.Options{Bin: checkpointBinaries(t)})
	b, err := s.Join(t.Context(), "other", "kernels:\n  specs: [python3]\n  warm: 0\n  uid_base: 1983000000\n")
	if err != nil {
		t.Fatal(err)
	}
	return s, a, b
}

// startedKernel starts a kernel and waits until it answers.
func startedKernel(t *testing.T, s *stack.Stack, agent string) string {
	t.Helper()
	id := strings.TrimSpace(must(t, s, "kernel", "start", agent))
	must(t, s, "kernel", "exec", id, "pass")
	return id
}

// where is the agent and the state of a kernel by `postern kernel list`; it must be there
// once.
func where(t *testing.T, s *stack.Stack, id string) (line string) {
	t.Helper()
	list := must(t, s, "kernel", "list")
	for l := range strings.Lines(list) {
		if strings.HasPrefix(l, id) {
			if line != "" {
				t.Errorf("kernel %s is in the list twice:\n%s", id, list)
			}
			line = strings.TrimSpace(l)
		}
	}
	return line
}

// execIs runs code in a kernel until it prints want, for as long as a host may be away.
func execIs(t *testing.T, s *stack.Stack, id, code, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	var out string
	var err error
	for ctx.Err() == nil {
		if out, err = s.Postern(ctx, "kernel", "exec", id, code); err == nil && strings.TrimSpace(out) == want {
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
	t.Fatalf("%s: got %q, %v, want %q", code, out, err, want)
}

// TestKernelMoves moves a kernel there and back, living and suspended, with its memory,
// its files, and what it was sent.
func TestKernelMoves(t *testing.T) {
	s, _, _ := twoHosts(t)
	id := startedKernel(t, s, "host")
	must(t, s, "kernel", "exec", id, "n = 41; big = bytes(range(256)) * 4096; open('f', 'w').write('mine'); import socket; h = socket.socketpair(); h[0].send(b'in a pipe')")
	e := postern(t, s, "kernel", "move", id, "other")
	if e.code != 0 || !strings.Contains(e.stdout, "is on agent other") {
		t.Fatalf("exit code %d: %s%s", e.code, e.stdout, e.stderr)
	}
	for _, stage := range []string{"checking", "suspending", "sending", "restoring"} {
		if !strings.Contains(e.stderr, stage) {
			t.Errorf("stderr lacks %q: %s", stage, e.stderr)
		}
	}
	if line := where(t, s, id); !strings.Contains(line, "other") || !strings.Contains(line, "idle") {
		t.Errorf("after the move: %s", line)
	}
	execIs(t, s, id, "n += 1; print(n, len(big), open('f').read(), h[1].recv(100))", "42 1048576 mine b'in a pipe'")
	if e := postern(t, s, "kernel", "move", id, "other"); e.code == 0 || !strings.Contains(e.stderr, "is on agent other already") {
		t.Errorf("to where it is: exit code %d: %s", e.code, e.stderr)
	}
	if e := postern(t, s, "kernel", "move", id, "nowhere"); e.code == 0 || !strings.Contains(e.stderr, "nowhere") {
		t.Errorf("to nowhere: exit code %d: %s", e.code, e.stderr)
	}
	must(t, s, "kernel", "suspend", id)
	must(t, s, "kernel", "move", id, "host")
	if line := where(t, s, id); !strings.Contains(line, "host") || !strings.Contains(line, "suspended") {
		t.Errorf("after the move of a suspended one: %s", line)
	}
	must(t, s, "kernel", "resume", id)
	execIs(t, s, id, "print(n, open('f').read())", "42 mine")
	must(t, s, "kernel", "restart", id)
	execIs(t, s, id, "print('n' in globals(), open('f').read())", "False mine")
}
