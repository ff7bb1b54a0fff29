package e2e

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/jupyterclients"
	"github.com/postern-dev/postern/e2e/stack"
)

// withKernels is a stack with an agent "host" that runs kernels, which all end with the
// test.
func withKernels(t *testing.T) (*stack.Stack, *stack.Agent) {
	t.Helper()
	return withKernelsOf(t, stack.Options{})
}

func withKernelsOf(t *testing.T, o stack.Options) (*stack.Stack, *stack.Agent) {
	t.Helper()
	needRoot(t)
	s := newStack(t, o)
	a, err := s.Join(t.Context(), "host", "kernels:\n  specs: [python3]\n  warm: 0\n  journal: 2GiB\n") // nothing is cut, however slow the reader
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { endAllKernels(t, s) })
	return s, a
}

// endAllKernels stops the kernels of a stack: they outlive agentd.
func endAllKernels(t *testing.T, s *stack.Stack) {
	t.Helper()
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

// TestJupyterClients runs Jupyter's own clients, as Debian has them.
func TestJupyterClients(t *testing.T) {
	s, _ := withKernels(t)
	jupyterclients.Place{Postern: filepath.Join(s.Bin, "postern"), URL: s.URL, Agent: "host", Token: newToken(t, s, "ana", "analyst")}.All(t)
	if left := must(t, s, "kernel", "list", "-o", "json"); strings.TrimSpace(left) != "[]" {
		t.Errorf("kernels are left:\n%s", left)
	}
}

// TestKernelOutputArrivesOnce kills and restarts what is between a client and a kernel
// that prints.
func TestKernelOutputArrivesOnce(t *testing.T) {
	s, a := withKernels(t)
	id := strings.TrimSpace(must(t, s, "kernel", "start", "host"))
	const n = 60_000
	cmd := exec.CommandContext(t.Context(), filepath.Join(s.Bin, "postern"), "kernel", "exec", id, "--url", s.URL, "--token-file", s.TokenFile, fmt.Sprintf(
		"runs = globals().get('runs', 0) + 1\nimport time\nfor i in range(%d):\n  print('%%08d' %% i)\n  if i %% 2000 == 0: time.sleep(0.1)\nprint('runs', runs)", n))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	got := 0
	for lines.Scan() && got < n {
		if want := fmt.Sprintf("%08d", got); lines.Text() != want {
			t.Fatalf("line %d is %q, want %q", got, lines.Text(), want)
		}
		switch got++; got {
		case 5_000, 25_000: // kill -9 of agentd, the kernel goes on
			a.Process.Kill()
			if err := a.Start(); err != nil {
				t.Fatal(err)
			}
		case 15_000: // an upgrade of the control plane
			if err := s.ControlPlane.Stop(30 * time.Second); err != nil {
				t.Fatal(err)
			}
			if err := s.StartControlPlane(t.Context()); err != nil {
				t.Fatal(err)
			}
		case 35_000: // kill -9 of the control plane
			s.ControlPlane.Kill()
			if err := s.StartControlPlane(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if lines.Text() != "runs 1" {
		t.Errorf("at the end: %q", lines.Text())
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, said.String())
	}
	if list := must(t, s, "kernel", "list"); !strings.Contains(list, id) {
		t.Errorf("the kernel is not in the list:\n%s", list)
	}
}

// peakMemory is the most memory a process has had, in bytes.
func peakMemory(t *testing.T, p *stack.Process) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return kib << 10
		}
	}
	t.Fatal("no VmHWM")
	return 0
}

// TestMuchKernelOutput lets a cell print a gigabyte, or a part of it where time is
// short, and looks at who grows.
func TestMuchKernelOutput(t *testing.T) {
	s, a := withKernels(t)
	id := strings.TrimSpace(must(t, s, "kernel", "start", "host"))
	must(t, s, "kernel", "exec", id, "print(1)")
	size := 200 << 20
	if long {
		size = 1 << 30
	}
	before := []int{peakMemory(t, s.ControlPlane), peakMemory(t, a.Process)}
	cmd := exec.CommandContext(t.Context(), filepath.Join(s.Bin, "postern"), "kernel", "exec", id, "--url", s.URL, "--token-file", s.TokenFile, fmt.Sprintf("for i in range(%d): print('x' * 65535)", size>>16))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	n, err := io.Copy(io.Discard, out)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if n != int64(size) {
		t.Errorf("%d bytes arrived, want %d", n, size)
	}
	t.Logf("%d MB in %.1f s", size>>20, time.Since(began).Seconds())
	for i, p := range []*stack.Process{s.ControlPlane, a.Process} {
		if grew := peakMemory(t, p) - before[i]; grew > 64<<20 {
			t.Errorf("%s grew by %d MiB", p.Name, grew>>20)
		}
	}
}

// TestKernelsAreOff is a host whose owner allows no kernels.
func TestKernelsAreOff(t *testing.T) {
	s := newStack(t, stack.Options{})
	if _, err := s.Join(t.Context(), "host", ""); err != nil {
		t.Fatal(err)
	}
	postern(t, s, "kernel", "start", "host").said(t, 3, "kernels:")
	postern(t, s, "kernel", "start", "nowhere").said(t, 4, "nowhere")
	if list := must(t, s, "kernel", "list", "-o", "json"); strings.TrimSpace(list) != "[]" {
		t.Errorf("a kernel that was refused is in the list: %s", list)
	}
}
