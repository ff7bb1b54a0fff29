package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/e2e/stack"
)

// onFileSystem is an agent whose state is on a file system of its own.
func onFileSystem(t *testing.T, s *stack.Stack, name string, mount func(dir string)) *stack.Agent {
	t.Helper()
	a, err := s.NewAgent(name, fmt.Sprintf("kernels: {specs: [python3], warm: 0, uid_base: %d}\n", firstUID+100_000))
	if err != nil {
		t.Fatal(err)
	}
	mount(a.StateDir())
	t.Cleanup(func() {
		if a.Process != nil {
			a.Process.Kill()
		}
		if err := unix.Unmount(a.StateDir(), unix.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	if err := os.Chmod(a.StateDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	joinWithCheckpoints(t, s, a)
	return a
}

// TestCheckpointsOnAFullDisk fills the disk that the state is on in the midst of dumps: each
// says so, the kernel goes on, what was acknowledged stays, and with space it works again.
func TestCheckpointsOnAFullDisk(t *testing.T) {
	s := newStack(t, stack.Options{Bin: checkpointBinaries(t)})
	a := onFileSystem(t, s, "full", func(dir string) {
		if err := unix.Mount("state", dir, "tmpfs", 0, "size=160m"); err != nil {
			t.Fatal(err)
		}
	})
	k := newSavedKernel(t, s, a, "import os; big = os.urandom(24 << 20)")
	k.set()
	first := k.save()
	processes := len(k.processes())
	refused := func(args ...string) {
		t.Helper()
		e := postern(t, s, args...)
		if e.code != 1 || !strings.Contains(strings.ToLower(e.stderr), "space") && !strings.Contains(e.stderr, "full") || strings.Count(e.stderr, "\n") != 1 {
			t.Fatalf("%s with a full disk: exit code %d: %s", strings.Join(args[:2], " "), e.code, e.stderr)
		}
		t.Logf("%s: %s", strings.Join(args[:2], " "), strings.TrimSpace(e.stderr))
		if state := k.state(); !strings.Contains(state, "idle") {
			k.settle()
		}
		k.is(k.n)
		k.oneTree(processes)
	}
	// The store has no room for what is new in memory.
	must(t, s, "kernel", "exec", k.id, "big = os.urandom(120 << 20)")
	k.set()
	refused("kernel", "checkpoint", k.id)
	refused("kernel", "suspend", k.id)
	must(t, s, "kernel", "exec", k.id, "big = None")
	k.set()
	k.save()
	// The copy of its private files has none, while it stands still.
	must(t, s, "kernel", "exec", k.id, "open('data', 'wb').write(os.urandom(60 << 20)); None")
	k.set()
	refused("kernel", "checkpoint", k.id)
	// Nothing at all can be written, not even to the audit log: then nothing is done.
	fill := filepath.Join(a.StateDir(), "fill")
	must(t, s, "kernel", "exec", k.id, "os.remove('data')")
	f, err := os.Create(fill)
	if err != nil {
		t.Fatal(err)
	}
	for block := make([]byte, 1<<20); ; {
		if _, err := f.Write(block); err != nil {
			break
		}
	}
	for {
		if _, err := f.Write(make([]byte, 4096)); err != nil {
			break
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"checkpoint", k.id}, {"suspend", k.id}, {"rollback", k.id, first}} {
		e := postern(t, s, append([]string{"kernel"}, args...)...)
		if e.code == 0 || !strings.Contains(e.stderr, "space") || strings.Count(e.stderr, "\n") != 1 {
			t.Errorf("%s without any space: exit code %d: %s", args[0], e.code, e.stderr)
		}
		t.Logf("%s: %s", args[0], strings.TrimSpace(e.stderr))
	}
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	k.settle()
	k.is(k.n)
	k.oneTree(processes)
	k.set()
	k.save()
	for id, n := range k.saved {
		must(t, s, "kernel", "rollback", k.id, id)
		k.is(n)
	}
	k.gone()
}

// TestCheckpointsSurviveAPowerCut copies the disk that the state is on, as it is at odd
// moments: what was not synced by then is not on it. With the copy the host starts anew: all
// checkpoints that were acknowledged are there and whole, a suspended kernel comes back, a
// kernel that ran is dead and can be rolled back to each of its checkpoints.
func TestCheckpointsSurviveAPowerCut(t *testing.T) {
	needRoot(t)
	for _, program := range []string{"mkfs.ext4", "losetup"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("%v: install e2fsprogs and mount", err)
		}
	}
	s := newStack(t, stack.Options{Bin: checkpointBinaries(t)})
	disk := filepath.Join(shortDir(t), "disk")
	onLoop := func(dir string) {
		t.Helper()
		if out, err := exec.Command("mount", "-o", "loop", disk, dir).CombinedOutput(); err != nil {
			t.Fatalf("mount: %v: %s", err, out)
		}
	}
	a := onFileSystem(t, s, "cut", func(dir string) {
		f, err := os.Create(disk)
		if err == nil {
			err = f.Truncate(400 << 20)
		}
		if err == nil {
			err = f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		// A commit of the journal every ten minutes: nothing is durable but by a sync.
		if out, err := exec.Command("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", disk).CombinedOutput(); err != nil {
			t.Fatalf("mkfs: %v: %s", err, out)
		}
		onLoop(dir)
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "commit=600"); err != nil {
			t.Fatal(err)
		}
	})
	k := newSavedKernel(t, s, a, "import os; big = os.urandom(8 << 20)")
	k.set()
	k.save()

	// cut ends everything and starts again from what was durable when snap was taken.
	cut := func(snap string) {
		t.Helper()
		a.Process.Kill()
		k.kill()
		if err := unix.Unmount(a.StateDir(), 0); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(snap, disk); err != nil {
			t.Fatal(err)
		}
		onLoop(a.StateDir())
		if err := unix.Mount("", a.StateDir(), "", unix.MS_REMOUNT, "commit=600"); err != nil {
			t.Fatal(err)
		}
		if err := a.Start(); err != nil {
			t.Fatal(err)
		}
		if err := a.Online(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	snapshot := func(name string) string {
		t.Helper()
		to := disk + "." + name
		if out, err := exec.Command("cp", "--sparse=always", disk, to).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v: %s", err, out)
		}
		return to
	}
	rounds := 1
	if long {
		rounds = 12
	}
	for i := range rounds {
		// After each acknowledgement, at once.
		k.set()
		k.save()
		must(t, s, "kernel", "exec", k.id, "open('later', 'w').write('x'); None")
		cut(snapshot("saved"))
		if state := k.waitState("dead"); !strings.Contains(state, "dead") {
			t.Fatalf("after a power cut a kernel that ran is: %s", state)
		}
		k.all()
		k.set()
		if e := postern(t, s, "kernel", "suspend", k.id); e.code != 0 {
			t.Fatalf("suspend: %s", e.stderr)
		}
		cut(snapshot("suspended"))
		k.waitState("suspended")
		must(t, s, "kernel", "resume", k.id)
		k.is(k.n)
		// In the midst of a checkpoint, of a rollback, and of a suspend.
		for what, args := range map[string][]string{"checkpoint": nil, "rollback": {k.first()}, "suspend": nil} {
			k.set() // the one before went back to one checkpoint or another
			done := make(chan ended, 1)
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				done <- finish(t, s.Command(ctx, append([]string{"kernel", what, k.id}, args...)...))
			}()
			for k.victim("criu") == 0 && len(done) == 0 {
				time.Sleep(time.Millisecond)
			}
			time.Sleep(time.Duration(20+i*37%200) * time.Millisecond)
			snap := snapshot(what)
			if e := <-done; e.code == 0 && what == "checkpoint" {
				t.Logf("%s was done by then or a little later", strings.TrimSpace(e.stdout))
			}
			cut(snap)
			if state := k.waitState("dead", "suspended"); strings.Contains(state, "suspended") {
				must(t, s, "kernel", "resume", k.id)
				k.is(k.n, k.saved[k.first()])
			}
			k.all()
		}
	}
	k.gone()
}

// first is the oldest checkpoint.
func (k *savedKernel) first() string {
	best := ""
	for id, n := range k.saved {
		if best == "" || n < k.saved[best] {
			best = id
		}
	}
	return best
}

// all goes back to every checkpoint that was acknowledged.
func (k *savedKernel) all() {
	k.t.Helper()
	last := k.n
	for id, n := range k.saved {
		must(k.t, k.s, "kernel", "rollback", k.id, id)
		k.is(n)
	}
	k.n = last
}

// kill ends the kernel's shim and processes, as a power cut does.
func (k *savedKernel) kill() {
	k.t.Helper()
	if shim := k.shim(); shim != 0 {
		_ = unix.Kill(shim, syscall.SIGKILL)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		left := k.processes()
		for pid := range left {
			_ = unix.Kill(pid, syscall.SIGKILL)
		}
		if len(left) == 0 && k.shim() == 0 {
			return
		}
		if time.Now().After(deadline) {
			k.t.Fatalf("left: %v", left)
		}
	}
}

// waitState waits until the kernel is in one of these states.
func (k *savedKernel) waitState(want ...string) string {
	k.t.Helper()
	var state string
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		state = k.state()
		for _, w := range want {
			if strings.Contains(state, w) {
				return state
			}
		}
	}
	k.t.Fatalf("the kernel is not %v: %s", want, state)
	return ""
}
