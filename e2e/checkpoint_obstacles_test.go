package e2e

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/postern-dev/postern/e2e/stack"
)

// outsideAddress is an address of this machine that is not loopback: what stands for the
// rest of the world to a kernel.
func outsideAddress(t *testing.T) string {
	t.Helper()
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && n.IP.IsGlobalUnicast() {
			return n.IP.String()
		}
	}
	t.Fatal("this machine has no IPv4 address but loopback")
	return ""
}

// TestCheckpointObstacles: a kernel's connection to the outside is named in one line before
// any dump, the kernel goes on, and without it is saved. (A kernel's /dev has no device that
// could stand in the way, no GPU; agentd/checkpoint/internal/obstacle is tested with those.)
func TestCheckpointObstacles(t *testing.T) {
	needRoot(t)
	outside := outsideAddress(t)
	l, err := net.Listen("tcp", net.JoinHostPort(outside, "0"))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go io.Copy(io.Discard, c) //nolint:errcheck // until the kernel closes it
		}
	}()
	t.Cleanup(func() { l.Close(); <-ended })

	s := newStack(t, stack.Options{Bin: checkpointBinaries(t)})
	a, err := s.NewAgent("host", fmt.Sprintf("kernels: {specs: [python3], warm: 0, uid_base: %d, network: allowed, network_allow: ['%s']}\n", firstUID+200_000, l.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	joinWithCheckpoints(t, s, a)
	k := newSavedKernel(t, s, a, "import os, socket")
	k.set()
	cell := func(code string) { t.Helper(); must(t, s, "kernel", "exec", k.id, code) }
	refused := func(want ...string) {
		t.Helper()
		before := len(k.processes())
		for _, args := range [][]string{{"kernel", "checkpoint", k.id}, {"kernel", "suspend", k.id}} {
			e := postern(t, s, args...)
			if e.code == 0 || strings.Count(strings.TrimSpace(e.stderr), "\n") > 0 {
				t.Errorf("%s: exit code %d: %s", args[1], e.code, e.stderr)
			}
			for _, w := range want {
				if !strings.Contains(e.stderr, w) {
					t.Errorf("%s: %q, want %q", args[1], e.stderr, w)
				}
			}
		}
		if e := postern(t, s, "kernel", "checkpoint", k.id, "--check", "-o", "json"); e.code != 1 || !strings.Contains(e.stdout, want[0]) {
			t.Errorf("the dry check: exit code %d: %s%s, want %q", e.code, e.stdout, e.stderr, want[0])
		}
		k.is(k.n)
		k.oneTree(before)
	}

	cell(fmt.Sprintf("out = socket.create_connection(('%s', %d)); out.send(b'x')", outside, l.Addr().(*net.TCPAddr).Port))
	refused(l.Addr().String(), "connection")
	cell("out.close()")
	k.save()

	k.set()
	k.is(k.n)
}
