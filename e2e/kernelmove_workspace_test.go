package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/e2e/stack"
)

// twoHostsWithWorkspaces is twoHosts whose agents mount workspaces: "other" has lab-ro
// read-only, and not lab-here.
func twoHostsWithWorkspaces(t *testing.T) (s *stack.Stack, a, b *stack.Agent) {
	t.Helper()
	needRoot(t)
	s = newStack(t, stack.Options{Bin: checkpointBinaries(t)})
	var all []*stack.Agent
	t.Cleanup(func() { endMounts(t, s, all...) })
	join := func(name, config string) *stack.Agent {
		t.Helper()
		g, err := s.Join(t.Context(), name, config)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, g)
		return g
	}
	data := shortDir(t)
	a = join("host", "kernels:\n  specs: [python3]\n  warm: 0\nattachments:\n  binds: [{name: data, path: "+data+"}]\n")
	b = join("other", "kernels:\n  specs: [python3]\n  warm: 0\n  uid_base: 1983000000\nattachments:\n  workspaces: [lab, lab-ro, lab-full]\n  read_only: [lab-ro]\n")
	t.Cleanup(func() { endAllKernels(t, s) })
	return s, a, b
}

// endMounts ends agents and what serves their mounts, which outlives them, and what is left
// of mounts for kernels, whom nobody has any more.
func endMounts(t *testing.T, s *stack.Stack, agents ...*stack.Agent) {
	t.Helper()
	for _, a := range agents {
		if err := a.Process.Stop(60 * time.Second); err != nil {
			t.Error(err)
		}
	}
	for _, pid := range processesOf(t, s.Bin) {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if bytes.Contains(text, []byte("\x00fdkeeper\x00")) || bytes.Contains(text, []byte("\x00mountd\x00")) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	for _, a := range agents {
		left, _ := os.ReadDir(filepath.Join(a.StateDir(), "attach", "kernels"))
		for _, e := range left {
			_ = unix.Unmount(filepath.Join(a.StateDir(), "attach", "kernels", e.Name()), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
	}
}

// TestKernelMovesWithWorkspaces moves a kernel with a file of a workspace open, and finds
// it, and what it wrote, on the other host.
func TestKernelMovesWithWorkspaces(t *testing.T) {
	s, a, _ := twoHostsWithWorkspaces(t)
	for _, name := range []string{"lab", "lab-ro", "lab-here", "lab-full"} {
		must(t, s, "workspace", "create", name)
	}
	start := func(mounts ...string) string {
		t.Helper()
		args := []string{"kernel", "start", "host"}
		for _, m := range mounts {
			args = append(args, "--mount", m)
		}
		id := strings.TrimSpace(must(t, s, args...))
		execIs(t, s, id, "n = 41; print('up')", "up")
		return id
	}
	id := start("lab", "lab-ro:ro")
	must(t, s, "kernel", "exec", id, `
import os, hashlib, mmap
f = open('open.txt', 'w+'); f.write('one\n'); f.flush()
appended = open('/work/lab/log.txt', 'a'); appended.write('first\n'); appended.flush()
big = os.urandom(9 << 20); open('big.bin', 'wb').write(big); wanted = hashlib.sha256(big).hexdigest(); del big
g = open('map.bin', 'w+b'); g.truncate(8192); m = mmap.mmap(g.fileno(), 8192); m[:4] = b'here'
`)
	e := postern(t, s, "kernel", "move", id, "other")
	if e.code != 0 {
		t.Fatalf("exit code %d: %s%s", e.code, e.stdout, e.stderr)
	}
	if line := where(t, s, id); !strings.Contains(line, "other") {
		t.Errorf("after the move: %s", line)
	}
	execIs(t, s, id, "n += 1; f.seek(0); print(n, f.read().strip(), os.getcwd(), hashlib.sha256(open('big.bin', 'rb').read()).hexdigest() == wanted, bytes(m[:4]))", "42 one /work/lab True b'here'")
	must(t, s, "kernel", "exec", id, "f.write('two\\n'); f.flush(); os.fsync(f); appended.write('second\\n'); appended.flush(); os.fsync(appended); m[4:9] = b'there'; m.flush()")
	for path, want := range map[string]string{"lab:open.txt": "one\ntwo\n", "lab:log.txt": "first\nsecond\n"} {
		eventually(t, 60*time.Second, path, func() error {
			if got, err := s.Postern(t.Context(), "file", "cat", path); err != nil || got != want {
				return fmt.Errorf("%q, %w", got, err)
			}
			return nil
		})
	}
	// What nobody holds any more is let go.
	eventually(t, 60*time.Second, "the release of the first host's mounts", func() error {
		status, err := attachStatus(t, a)
		if err != nil {
			return err
		}
		for _, w := range status.Attachments.Workspaces {
			if len(w.Mounts) > 0 || w.Conflicts > 0 {
				return fmt.Errorf("%+v", w)
			}
		}
		return nil
	})
	if e := postern(t, s, "kernel", "exec", id, "open('/work/lab-ro/x', 'w')"); !strings.Contains(e.stdout+e.stderr, "Read-only") {
		t.Errorf("a write to a read-only one: %s%s", e.stdout, e.stderr)
	}
	// And back, suspended; its user is another one on each host.
	must(t, s, "kernel", "suspend", id)
	must(t, s, "kernel", "move", id, "host")
	must(t, s, "kernel", "resume", id)
	execIs(t, s, id, "f.seek(0); print(n, f.read().split(), bytes(m[:9]))", "42 ['one', 'two'] b'herethere'")
	must(t, s, "kernel", "restart", id)
	execIs(t, s, id, "print(open('open.txt').read().split())", "['one', 'two']")

	// What can't be is refused before the kernel is touched, and it goes on.
	refused := func(id, why string) {
		t.Helper()
		e := postern(t, s, "kernel", "move", id, "other")
		if e.code == 0 || !strings.Contains(e.stderr, why) {
			t.Errorf("exit code %d, want %q: %s", e.code, why, e.stderr)
		}
		if line := where(t, s, id); !strings.Contains(line, "host") {
			t.Errorf("after a refusal: %s", line)
		}
		execIs(t, s, id, "n += 1; print(n)", "42")
		must(t, s, "kernel", "stop", id)
	}
	refused(start("lab-ro"), "read-only")
	refused(start("lab-here"), "lab-here")
	refused(start("data"), "attachments.binds")
	// What does not go up keeps it where it is.
	id = start("lab-full")
	must(t, s, "workspace", "set", "lab-full", "--quota", "1MiB") // the host has been told another one
	must(t, s, "kernel", "exec", id, "import os; open('more', 'wb').write(os.urandom(4 << 20))")
	refused(id, "not at the control plane")
}
