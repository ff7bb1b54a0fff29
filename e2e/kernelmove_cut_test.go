package e2e

import (
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/stack"
)

// wire is a way to the control plane that can be cut in the worst manner: nothing is
// closed, and nothing passes.
type wire struct {
	listener net.Listener
	target   string
	wg       sync.WaitGroup

	mu    sync.Mutex
	open  chan struct{} // closed while bytes pass
	conns map[net.Conn]struct{}
	done  bool
}

// newWire begins to pass connections on to target.
func newWire(t *testing.T, target string) *wire {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{listener: l, target: target, open: make(chan struct{}), conns: map[net.Conn]struct{}{}}
	close(w.open)
	w.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			w.wg.Go(func() { w.pass(conn) })
		}
	})
	t.Cleanup(func() {
		w.mu.Lock()
		w.done = true
		w.mu.Unlock()
		_ = l.Close()
		w.mend()
		w.wg.Wait()
	})
	return w
}

// address is where to connect to.
func (w *wire) address() string { return w.listener.Addr().String() }

// keep notes a connection; false: it is over.
func (w *wire) keep(c net.Conn) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.done {
		_ = c.Close()
		return false
	}
	w.conns[c] = struct{}{}
	return true
}

func (w *wire) pass(near net.Conn) {
	defer near.Close() //nolint:errcheck // it is over
	if !w.keep(near) {
		return
	}
	far, err := net.Dial("tcp", w.target)
	if err != nil || !w.keep(far) {
		return
	}
	defer far.Close() //nolint:errcheck // it is over
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
		both.Go(func() {
			b := make([]byte, 32<<10)
			for {
				n, err := way[0].Read(b)
				w.mu.Lock()
				open := w.open
				w.mu.Unlock()
				<-open
				if n > 0 {
					if _, werr := way[1].Write(b[:n]); werr != nil {
						err = werr
					}
				}
				if err != nil {
					_ = near.Close()
					_ = far.Close()
					return
				}
			}
		})
	}
	both.Wait()
	w.mu.Lock()
	delete(w.conns, near)
	delete(w.conns, far)
	w.mu.Unlock()
}

// cut lets nothing pass.
func (w *wire) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.open = make(chan struct{})
}

// mend lets new connections pass; what was held up is lost with its connections.
func (w *wire) mend() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.conns {
		_ = c.Close()
	}
	select {
	case <-w.open:
	default:
		close(w.open)
	}
}

// TestKernelMoveNetworkCut cuts the network of one host in the midst of a move, in both
// directions of it, while both agents go on: there is one kernel after that.
func TestKernelMoveNetworkCut(t *testing.T) {
	needRoot(t)
	s := newStack(t, stack.Options{Bin: checkpointBinaries(t)})
	at, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	wires, agents := map[string]*wire{}, map[string]*stack.Agent{}
	for name, config := range map[string]string{
		"host": "kernels:\n  specs: [python3]\n  warm: 0\n", "other": "kernels:\n  specs: [python3]\n  warm: 0\n  uid_base: 1983000000\n",
	} {
		wires[name] = newWire(t, at.Host)
		a, err := s.NewAgent(name, config)
		if err != nil {
			t.Fatal(err)
		}
		a.URL, agents[name] = at.Scheme+"://"+wires[name].address(), a
		if err := a.Register(t.Context(), must(t, s, "key", "create")); err != nil {
			t.Fatal(err)
		}
		startAgent(t, a)
	}
	t.Cleanup(func() { endAllKernels(t, s) })
	id := startedKernel(t, s, "host")
	must(t, s, "kernel", "exec", id, "import os, hashlib; big = os.urandom(100 << 20); sum = hashlib.sha256(big).hexdigest()")
	here, there := "host", "other"
	for _, test := range []struct {
		stage, victim string
		// late: the network comes back when the command has given up.
		late bool
	}{
		{"sending", "from", false},
		{"sending", "to", false},
		{"restoring", "from", false},
		{"restoring", "to", true},
	} {
		cut := wires[here]
		if test.victim == "to" {
			cut = wires[there]
		}
		// The tunnels that a cut before this one has broken are noticed, and others are up.
		eventually(t, patience, "both hosts are back", func() error {
			for range 3 {
				for name := range agents {
					if err := online(t, s, name, true)(); err != nil {
						return fmt.Errorf("%s: %w", name, err)
					}
				}
				time.Sleep(500 * time.Millisecond)
			}
			return nil
		})
		t.Logf("%s's network cut while %s (%s to %s)", test.victim, test.stage, here, there)
		m := startMove(t, s, id, there)
		m.until(test.stage)
		if test.stage == "sending" {
			time.Sleep(100 * time.Millisecond) // it may be all over then, which is right, too
		}
		cut.cut()
		var back *time.Timer
		if !test.late {
			back = time.AfterFunc(10*time.Second, cut.mend)
		}
		code := m.end()
		if back != nil {
			back.Stop()
		}
		cut.mend()
		t.Logf("exit code %d: %s%s", code, m.stdout.String(), m.stderr.String())
		execIs(t, s, id, "print(hashlib.sha256(big).hexdigest() == sum)", "True")
		line := where(t, s, id)
		switch {
		case strings.Contains(line, " "+there+" "):
			here, there = there, here
		case code == 0 || !strings.Contains(line, " "+here+" "):
			t.Errorf("after exit code %d: %q", code, line)
		}
	}
	// Nothing is left of it where it is not, when both know.
	eventually(t, 90*time.Second, "the moves' end", func() error {
		for _, a := range agents {
			if left, err := os.ReadDir(filepath.Join(a.StateDir(), "moves")); err != nil || len(left) > 0 {
				return fmt.Errorf("on %s: %v, %w", a.Name, left, err)
			}
		}
		if left, err := os.ReadDir(filepath.Join(agents[there].StateDir(), "kernels")); err != nil || len(left) > 0 {
			return fmt.Errorf("on %s: %v, %w", there, left, err)
		}
		return nil
	})
}
