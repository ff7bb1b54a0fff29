package e2e

import (
	"bufio"
	"context"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
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
	old := strings.TrimSpace(must(t, s, "kernel", "checkpoint", id, "--label", "old"))
	must(t, s, "kernel", "exec", id, "later = True")
	newer := strings.TrimSpace(must(t, s, "kernel", "checkpoint", id, "--protect"))
	e := postern(t, s, "kernel", "move", id, "other")
	if e.code != 0 || !strings.Contains(e.stdout, "is on agent other") {
		t.Fatalf("exit code %d: %s%s", e.code, e.stdout, e.stderr)
	}
	for _, stage := range []string{"checking", "suspending", "sending", "restoring"} {
		if !strings.Contains(e.stderr, stage) {
			t.Errorf("stderr lacks %q: %s", stage, e.stderr)
		}
	}
	eventually(t, time.Minute, "the moved kernel is idle where it is now", func() error {
		if line := where(t, s, id); !strings.Contains(line, "other") || !strings.Contains(line, "idle") {
			return errors.New(line)
		}
		return nil
	})
	execIs(t, s, id, "n += 1; print(n, len(big), open('f').read(), h[1].recv(100))", "42 1048576 mine b'in a pipe'")
	// Its checkpoints came along.
	list := checkpointList(t, s, id)
	if len(list) != 3 || list[0].ID != old || list[0].Label != "old" || list[1].ID != newer || list[1].Parent != old || !list[1].Protected || list[2].Parent != newer {
		t.Errorf("checkpoints after the move: %+v", list)
	}
	must(t, s, "kernel", "rollback", id, old)
	execIs(t, s, id, "print(n, 'later' in globals())", "41 False")
	must(t, s, "kernel", "rollback", id, newer)
	execIs(t, s, id, "n += 1; print(n, later)", "42 True")
	fork := strings.TrimSpace(must(t, s, "kernel", "fork", id, old))
	execIs(t, s, fork, "print(n, open('f').read())", "41 mine")
	must(t, s, "kernel", "stop", fork)
	if e := postern(t, s, "kernel", "move", id, "other"); e.code == 0 || !strings.Contains(e.stderr, "is on agent other already") {
		t.Errorf("to where it is: exit code %d: %s", e.code, e.stderr)
	}
	if e := postern(t, s, "kernel", "move", id, "nowhere"); e.code == 0 || !strings.Contains(e.stderr, "nowhere") {
		t.Errorf("to nowhere: exit code %d: %s", e.code, e.stderr)
	}
	for agent, want := range map[string]int{"host": http.StatusNotFound, "other": http.StatusOK} {
		token, err := os.ReadFile(s.TokenFile)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.Get(s.URL + "/jupyter/" + agent + "/api/kernels/" + id + "?token=" + strings.TrimSpace(string(token)))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close() //nolint:errcheck // its status is all
		if resp.StatusCode != want {
			t.Errorf("/jupyter/%s answers %d for the kernel, want %d", agent, resp.StatusCode, want)
		}
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

// mover is a `postern kernel move` under way.
type mover struct {
	t      *testing.T
	cmd    *exec.Cmd
	lines  chan string
	stdout strings.Builder
	stderr strings.Builder
}

func startMove(t *testing.T, s *stack.Stack, id, to string) *mover {
	t.Helper()
	m := &mover{t: t, lines: make(chan string, 100)}
	m.cmd = exec.CommandContext(t.Context(), filepath.Join(s.Bin, "postern"), "kernel", "move", id, to, "--url", s.URL, "--token-file", s.TokenFile)
	m.cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	m.cmd.Stdout = &m.stdout
	stderr, err := m.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(m.lines)
		for sc := bufio.NewScanner(stderr); sc.Scan(); {
			m.lines <- sc.Text()
		}
	}()
	return m
}

// until waits for a stage.
func (m *mover) until(stage string) {
	m.t.Helper()
	for line := range m.lines {
		m.stderr.WriteString(line + "\n")
		if line == stage {
			return
		}
	}
	m.t.Fatalf("the move ended before %q: %s", stage, m.stderr.String())
}

// end waits for its end and returns the exit code.
func (m *mover) end() int {
	for line := range m.lines {
		m.stderr.WriteString(line + "\n")
	}
	m.cmd.Wait() //nolint:errcheck // the exit code says it
	return m.cmd.ProcessState.ExitCode()
}

// TestKernelMoveBreaks kills what a move needs, in the midst of it: there is one kernel
// after that, and it is as it was.
func TestKernelMoveBreaks(t *testing.T) {
	s, a, b := twoHosts(t)
	id := startedKernel(t, s, "host")
	// What does not compress, so that sending takes its time.
	must(t, s, "kernel", "exec", id, "import os; big = os.urandom(150 << 20); n = 0; import hashlib; sum = hashlib.sha256(big).hexdigest()")
	at := map[string]*stack.Agent{"host": a, "other": b}
	names := []string{"host", "other"}
	turn := 0
	from := func() (string, string) { return names[turn%2], names[(turn+1)%2] }
	count := 0
	check := func(want ...string) {
		t.Helper()
		count++
		execIs(t, s, id, "n += 1; print(n, hashlib.sha256(big).hexdigest() == sum)", strconv.Itoa(count)+" True")
		line := where(t, s, id)
		for _, name := range want {
			if strings.Contains(line, " "+name+" ") {
				if name != names[turn%2] {
					turn++
				}
				return
			}
		}
		t.Errorf("the kernel is not on %q: %q", want, line)
	}
	restart := func(agent *stack.Agent) {
		t.Helper()
		if err := agent.Start(); err != nil {
			t.Fatal(err)
		}
		if err := agent.Online(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	check("host")
	for _, stage := range []string{"sending", "restoring"} {
		for _, victim := range []string{"client", "from", "to", "controlplane"} {
			here, there := from()
			t.Logf("kill -9 of %s while %s (%s to %s)", victim, stage, here, there)
			m := startMove(t, s, id, there)
			m.until(stage)
			if stage == "sending" {
				time.Sleep(150 * time.Millisecond)
			}
			switch victim {
			case "client":
				m.cmd.Process.Kill() //nolint:errcheck // it may be done
			case "controlplane":
				s.ControlPlane.Kill()
				if err := s.StartControlPlane(t.Context()); err != nil {
					t.Fatal(err)
				}
				for _, agent := range at {
					if err := agent.Online(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
			default:
				agent := at[here]
				if victim == "to" {
					agent = at[there]
				}
				agent.Process.Kill()
				time.Sleep(100 * time.Millisecond)
				restart(agent)
			}
			code := m.end()
			t.Logf("exit code %d: %s%s", code, m.stdout.String(), m.stderr.String())
			want := []string{here, there}
			if code == 0 {
				want = []string{there}
			}
			check(want...)
		}
	}
	for _, agent := range at {
		if left, err := os.ReadDir(filepath.Join(agent.StateDir(), "moves")); err != nil || len(left) > 0 {
			t.Errorf("what moves left on %s: %v, %v", agent.Name, left, err)
		}
	}
	// The host that has no kernel has nothing of it.
	_, there := from()
	if left, err := filepath.Glob(filepath.Join(at[there].StateDir(), "checkpoints", "*", "checkpoints", "*.meta")); err != nil || len(left) > 0 {
		t.Errorf("checkpoints left on %s: %q, %v", there, left, err)
	}
	if left, err := os.ReadDir(filepath.Join(at[there].StateDir(), "kernels")); err != nil || len(left) > 0 {
		t.Errorf("kernels left on %s: %q, %v", there, left, err)
	}
}

// TestKernelMoveIsRefused: what does not fit the other host is told before the kernel is
// touched.
func TestKernelMoveIsRefused(t *testing.T) {
	s, _, b := twoHosts(t)
	id := startedKernel(t, s, "host")
	must(t, s, "kernel", "exec", id, "n = 1; big = b'x' * (120 << 20)")
	for config, want := range map[string]string{
		"kernels:\n  specs: [python3]\n  warm: 0\n  uid_base: 1983000000\n  moves: out\n":                        "takes no kernels of other hosts",
		"kernels:\n  specs: [ir]\n  warm: 0\n  uid_base: 1983000000\n":                                           "no kernels of spec",
		"kernels:\n  specs: [python3]\n  warm: 0\n  uid_base: 1983000000\n  limits: {memory: 128MiB}\n":          "raise kernels.limits.memory",
		"kernels:\n  specs: [python3]\n  warm: 0\n  uid_base: 1983000000\n  checkpoints: {criu: /nonexistent}\n": "kernels.checkpoints.criu",
		"kernels:\n  specs: [python3]\n  warm: 0\n  uid_base: 1983000000\n  spec_dirs: [/nonexistent]\n":         "has no kernelspec",
		"sources: []\n": "kernels",
	} {
		b.Config = config
		if err := b.WriteConfig(); err != nil {
			t.Fatal(err)
		}
		if err := b.Process.Stop(20 * time.Second); err != nil {
			t.Fatal(err)
		}
		if err := b.Start(); err != nil {
			t.Fatal(err)
		}
		if err := b.Online(t.Context()); err != nil {
			t.Fatal(err)
		}
		e := postern(t, s, "kernel", "move", id, "other")
		if e.code == 0 || !strings.Contains(e.stderr, want) || strings.Contains(e.stderr, "suspending") {
			t.Errorf("%s: exit code %d: %s", config, e.code, e.stderr)
		}
	}
	execIs(t, s, id, "print(n)", "1")
	if list := must(t, s, "kernel", "checkpoints", id, "-o", "json"); strings.TrimSpace(list) != "[]" {
		t.Errorf("the kernel was saved: %s", list)
	}
}

// TestClientsMoveAlong: a client that is attached waits while its kernel moves, and gets
// what comes after.
func TestClientsMoveAlong(t *testing.T) {
	s, _, _ := twoHosts(t)
	id := startedKernel(t, s, "host")
	cmd := exec.CommandContext(t.Context(), filepath.Join(s.Bin, "postern"), "kernel", "exec", id, "--url", s.URL, "--token-file", s.TokenFile,
		"import time\nprint('before', flush=True)\nuntil = time.time() + 6\nwhile time.time() < until: time.sleep(0.05)\nprint('after')")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "before" {
		t.Fatalf("got %q: %s", lines.Text(), said.String())
	}
	must(t, s, "kernel", "move", id, "other")
	if !lines.Scan() || lines.Text() != "after" {
		t.Errorf("after the move: %q: %s", lines.Text(), said.String())
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, said.String())
	}
	if line := where(t, s, id); !strings.Contains(line, "other") {
		t.Errorf("after the move: %s", line)
	}
}

// TestSecretsMoveAlong: a moved kernel has on the other host what it was granted, and what
// went there had no value of it.
func TestSecretsMoveAlong(t *testing.T) {
	s, a, b := twoHosts(t)
	for _, agent := range []*stack.Agent{a, b} {
		agent.Config += "  secrets: {control_plane: allow}\n"
		if err := agent.WriteConfig(); err != nil {
			t.Fatal(err)
		}
		if err := agent.Process.Stop(20 * time.Second); err != nil {
			t.Fatal(err)
		}
		if err := agent.Start(); err != nil {
			t.Fatal(err)
		}
		if err := agent.Online(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(t.TempDir(), "value")
	if err := os.WriteFile(file, []byte("canary-that-moves"), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, s, "secret", "set", "TOKEN", "--file", file)
	id := strings.TrimSpace(must(t, s, "kernel", "start", "host", "--secret", "TOKEN"))
	execIs(t, s, id, "import os; print(len(os.environ['TOKEN']))", "17")
	must(t, s, "kernel", "move", id, "other")
	execIs(t, s, id, "import os; print(len(os.environ.get('TOKEN', '')))", "17")
}
