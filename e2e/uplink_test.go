package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/stack"
)

// TestUplink: agentd has no TCP connection; what has the tunnel's is a process
// without rights. Killing or stopping it costs a reconnect.
func TestUplink(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to see what agentd has open")
	}
	s := newStack(t, stack.Options{})
	a := join(t, s, "host")
	answers(t, s, "host/db", "select 'before'", "before")
	one := func() int {
		t.Helper()
		var pids []int
		eventually(t, time.Minute, "agentd has one uplink", func() error {
			if pids = a.Process.ChildrenNamed("uplink"); len(pids) != 1 {
				return fmt.Errorf("it has %v", pids)
			}
			return nil
		})
		return pids[0]
	}
	uplink := one()
	if own := tcpSockets(t, a.Process.PID()); len(own) > 0 {
		t.Errorf("agentd has TCP sockets itself: %q", own)
	}
	if own := tcpSockets(t, uplink); len(own) == 0 {
		t.Error("the uplink has no TCP socket: the search is broken")
	}
	rightless(t, uplink, 1900065794)
	for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGSTOP} {
		before := one()
		if err := syscall.Kill(before, signal); err != nil {
			t.Fatal(err)
		}
		eventually(t, patience, "another uplink", func() error {
			if pids := a.Process.ChildrenNamed("uplink"); len(pids) != 1 || pids[0] == before {
				return fmt.Errorf("after %v: %v, was %d", signal, pids, before)
			}
			if !linkIsUp(t, a) {
				return errors.New("the link is down")
			}
			return nil
		})
		eventually(t, patience, "the agent to be back", online(t, s, "host", true))
		answers(t, s, "host/db", "select 'after'", "after")
	}
	last := one()
	a.Process.Kill()
	eventually(t, time.Minute, "the uplink ends with agentd", func() error {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/exe", last)); err == nil {
			return errors.New("it lives")
		}
		return nil
	})
}

// rightless checks that a process has a user of its own and no rights.
func rightless(t *testing.T, pid, uid int) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{fmt.Sprintf("Uid:\t%d\t%[1]d\t%[1]d\t%[1]d\n", uid), "CapEff:\t0000000000000000\n", "CapBnd:\t0000000000000000\n", "NoNewPrivs:\t1\n", "Seccomp:\t2\n"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("the status of process %d has no %q", pid, want)
		}
	}
}

// tcpSockets are the lines of the kernel's tables that are a process's own.
func tcpSockets(t *testing.T, pid int) (lines []string) {
	t.Helper()
	inodes := map[string]bool{}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(fds) == 0 {
		t.Fatalf("descriptors of process %d: %d, %v", pid, len(fds), err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil {
			if inode, ok := strings.CutPrefix(to, "socket:["); ok {
				inodes[strings.TrimSuffix(inode, "]")] = true
			}
		}
	}
	for _, table := range []string{"tcp", "tcp6", "udp", "udp6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		if err != nil {
			continue // no IPv6
		}
		for line := range strings.Lines(string(text)) {
			if fields := strings.Fields(line); len(fields) > 9 && inodes[fields[9]] {
				lines = append(lines, line)
			}
		}
	}
	return lines
}
