package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/jupyterclients"
	"github.com/postern-dev/postern/e2e/simulatedkernels"
)

// realKernels is a control plane and an agent whose kernels are real: only the manager
// between the tunnel and the kernels' shims is a simulated one.
func realKernels(t *testing.T) (*testServer, *simulatedAgent, *simulatedkernels.Shims, jupyterclients.Place) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for kernels' namespaces")
	}
	dir := t.TempDir()
	for _, name := range []string{"agentd", "client/postern"} {
		binary := filepath.Join(dir, filepath.Base(name))
		if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, "../"+name).CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, out)
		}
	}
	state := filepath.Join(dir, "kernels")
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	s := startServer(t)
	shims := simulatedkernels.NewShims(filepath.Join(dir, "agentd"), state)
	t.Cleanup(shims.Close)
	a := newSimulatedAgent(s)
	a.kernels = shims
	if err := a.register(t.Context(), s.newKey(t, s.token, 1), "edge"); err != nil {
		t.Fatal(err)
	}
	a.attach(t)
	return s, a, shims, jupyterclients.Place{Postern: filepath.Join(dir, "postern"), URL: s.url, Agent: "edge", Token: s.newToken(t, s.token, "ana", "analyst")}
}

func TestJupyterClientsWithRealKernels(t *testing.T) {
	_, _, shims, place := realKernels(t)
	place.All(t)
	if left := shims.Kernels(); len(left) != 0 {
		t.Errorf("kernels are left: %v", left)
	}
}

// cutter is a way to the control plane that can be cut.
type cutter struct {
	net.Listener
	mu    sync.Mutex
	conns []net.Conn
	work  sync.WaitGroup
}

func newCutter(t *testing.T, to string) *cutter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{Listener: l}
	c.work.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				in.Close()
				continue
			}
			c.mu.Lock()
			c.conns = append(c.conns, in, out)
			c.mu.Unlock()
			c.work.Go(func() { io.Copy(in, out); in.Close() })
			c.work.Go(func() { io.Copy(out, in); out.Close() })
		}
	})
	t.Cleanup(func() { l.Close(); c.cut(); c.work.Wait() })
	return c
}

func (c *cutter) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		conn.Close()
	}
	c.conns = nil
}

// TestOutputOfRealKernelsArrivesOnce cuts the streams to the host, the whole tunnel and
// the client's connection while a cell prints.
func TestOutputOfRealKernelsArrivesOnce(t *testing.T) {
	s, agent, shims, place := realKernels(t)
	way := newCutter(t, s.Addr().String())
	command := func(args ...string) *exec.Cmd {
		cmd := exec.CommandContext(t.Context(), place.Postern, append([]string{"kernel"}, args...)...)
		cmd.Env = append(os.Environ(), "POSTERN_URL=http://"+way.Addr().String(), "POSTERN_TOKEN="+place.Token)
		return cmd
	}
	id, _, code := outcome(t, command("start", "edge"))
	if code != 0 {
		t.Fatal("no kernel")
	}
	id = strings.TrimSpace(id)
	const n = 60_000
	cmd := command("exec", id, fmt.Sprintf("runs = globals().get('runs', 0) + 1\nimport time\nfor i in range(%d):\n  print('%%08d' %% i)\n  if i %% 2000 == 0: time.sleep(0.1)\nprint('runs', runs)", n))
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
		got++
		switch {
		case got%20_000 == 3000:
			shims.Drop()
		case got%20_000 == 9000:
			way.cut()
		case got == 35_000:
			s.hub.Disconnect(agent.id, nil)
			time.Sleep(200 * time.Millisecond)
			agent.attach(t)
		}
	}
	if lines.Text() != "runs 1" {
		t.Errorf("at the end: %q", lines.Text())
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, said.String())
	}
}
