package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// dump dumps into fresh directories beside the kernel's.
func dump(t *testing.T, a *Agent, stay bool) (Dumped, DumpOrder) {
	t.Helper()
	dir := t.TempDir()
	o := DumpOrder{Images: filepath.Join(dir, "images"), Private: filepath.Join(dir, "private"), Stay: stay, Wait: 5 * time.Second}
	if err := errors.Join(os.Mkdir(o.Images, 0o700), os.Mkdir(o.Private, 0o700)); err != nil {
		t.Fatal(err)
	}
	d, err := a.Dump(soon(t), o)
	if err != nil {
		t.Fatal(err)
	}
	return d, o
}

func TestDumpGoesOnAndRestoreTurnsBack(t *testing.T) {
	criutest.Path(t)
	dir, _ := newSpec(t)
	a, _ := spawn(t, dir)
	c := attach(t, a, "one")
	if got := c.run("import os; n = 1; open('f', 'w').write('before'); print(n)"); got != "1\n" {
		t.Fatal(got)
	}
	d, o := dump(t, a, false)
	if d.Standstill <= 0 || d.Busy || len(d.Kernel) == 0 {
		t.Errorf("%+v", d)
	}
	// The client that was attached before is attached still.
	if got := c.run("n += 1; open('f', 'w').write('after'); print(n)"); got != "2\n" {
		t.Fatal(got)
	}
	before := waitState(t, a, posternv1.KernelState_KERNEL_STATE_IDLE)
	if err := a.Restore(soon(t), RestoreOrder{Images: o.Images, Private: o.Private, Kernel: d.Kernel, Checkpoint: "ckp_x"}); err != nil {
		t.Fatal(err)
	}
	if got := c.run("print(n, open('f').read())"); got != "1 before\n" {
		t.Fatal(got)
	}
	after := waitState(t, a, posternv1.KernelState_KERNEL_STATE_IDLE)
	if after.Checkpoint != "ckp_x" || after.Generation != before.Generation+1 || after.Sequence <= before.Sequence {
		t.Errorf("before %v, after %v", before, after)
	}
	if _, err := os.Stat(filepath.Join(dir, "private.old")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the old private files are left: %v", err)
	}
	// An interrupt and a restart find the restored kernel.
	id := c.execute("import time\nwhile True: time.sleep(0.01)")
	waitState(t, a, posternv1.KernelState_KERNEL_STATE_BUSY)
	if _, err := a.Interrupt(soon(t)); err != nil {
		t.Fatal(err)
	}
	if _, reply := c.result(id); reply.content["ename"] != "KeyboardInterrupt" {
		t.Errorf("%v", reply)
	}
	if _, err := a.Restart(soon(t)); err != nil {
		t.Fatal(err)
	}
	if _, reply := c.result(c.execute("n")); reply.content["ename"] != "NameError" {
		t.Errorf("%v", reply)
	}
}

func TestWhatIsSentDuringADumpIsAnsweredAfter(t *testing.T) {
	criutest.Path(t)
	dir, _ := newSpec(t)
	a, _ := spawn(t, dir)
	c := attach(t, a, "one")
	c.run("big = bytearray(os.urandom(1)) * (200 << 20) if 'os' in globals() else bytes(range(256)) * (1 << 19); n = 0")
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 3 {
			dump(t, a, false)
		}
	}()
	sent := map[string]bool{}
	for i := 0; ; i++ {
		id := c.execute("n += 1; print(n)")
		sent[id] = true
		out, reply := c.result(id)
		if reply.content["status"] != "ok" || strings.TrimSpace(out) == "" {
			t.Fatalf("%q %v", out, reply)
		}
		select {
		case <-done:
			var n int
			if err := json.Unmarshal([]byte(c.run("print(n)")), &n); err != nil || n != len(sent) {
				t.Fatalf("%d of %d requests ran: %v", n, len(sent), err)
			}
			return
		default:
		}
	}
}

func TestSuspendAndResumeWithANewShim(t *testing.T) {
	criutest.Path(t)
	dir, _ := newSpec(t)
	a, p := spawn(t, dir)
	c := attach(t, a, "one")
	c.run("n = 41")
	// Left stopped, and let go on: nobody notices.
	dump(t, a, true)
	if err := a.GoOn(soon(t)); err != nil {
		t.Fatal(err)
	}
	if got := c.run("n += 1; print(n)"); got != "42\n" {
		t.Fatal(got)
	}
	d, o := dump(t, a, true)
	if err := a.Suspend(soon(t), "ckp_y"); err != nil {
		t.Fatal(err)
	}
	if k := waitState(t, a, posternv1.KernelState_KERNEL_STATE_SUSPENDED); k.Checkpoint != "ckp_y" {
		t.Errorf("%v", k)
	}
	_ = p.Kill()
	_, _ = p.Wait()
	a, _ = spawn(t, dir)
	waitState(t, a, posternv1.KernelState_KERNEL_STATE_SUSPENDED)
	bad := RestoreOrder{Images: t.TempDir(), Kernel: d.Kernel, Checkpoint: "ckp_y"}
	if err := a.Restore(soon(t), bad); err == nil {
		t.Fatal("restored from nothing")
	}
	if k := waitState(t, a, posternv1.KernelState_KERNEL_STATE_SUSPENDED); !strings.Contains(k.Reason, "could not be restored") {
		t.Errorf("%v", k)
	}
	if err := a.Restore(soon(t), RestoreOrder{Images: o.Images, Kernel: d.Kernel, Checkpoint: "ckp_y"}); err != nil {
		t.Fatal(err)
	}
	c = attach(t, a, "one")
	if got := c.run("print(n)"); got != "42\n" {
		t.Fatal(got)
	}
}

// kill -9 of a shim while its kernel is stopped for a suspend: the next one lets it go on.
func TestAKilledShimLeavesNoStoppedKernel(t *testing.T) {
	criutest.Path(t)
	dir, _ := newSpec(t)
	a, p := spawn(t, dir)
	c := attach(t, a, "one")
	c.run("n = 1")
	dump(t, a, true)
	_ = p.Kill()
	_, _ = p.Wait()
	a, _ = spawn(t, dir)
	c = attach(t, a, "one")
	if got := c.run("print(n)"); got != "1\n" {
		t.Fatal(got)
	}
	if err := a.Suspend(soon(t), "ckp_z"); err == nil {
		t.Error("a kernel that went on was suspended with an old checkpoint")
	}
}

// kill -9 of a shim in the midst of dumps: no kernel is lost.
func TestAShimKilledInTheMidstOfADumpLosesNoKernel(t *testing.T) {
	criutest.Path(t)
	dir, _ := newSpec(t)
	a, p := spawn(t, dir)
	c := attach(t, a, "one")
	c.run("n = 0; big = bytes(range(256)) * (1 << 18)")
	for i, after := range []time.Duration{30, 60, 90, 120, 160, 200} {
		images := t.TempDir()
		o := DumpOrder{Images: images, Private: t.TempDir()}
		done := make(chan error, 1)
		go func() { _, err := a.Dump(soon(t), o); done <- err }()
		time.Sleep(after * time.Millisecond)
		_ = p.Kill()
		_, _ = p.Wait()
		t.Logf("killed after %d ms: %v", after, <-done)
		a, p = spawn(t, dir)
		c = attach(t, a, jupyter.NewID())
		var n int
		if err := json.Unmarshal([]byte(c.run("n += 1; print(n)")), &n); err != nil || n != i+1 {
			t.Fatalf("n is %d, want %d: %v", n, i+1, err)
		}
	}
}

// A rollback whose images CRIU refuses: the kernel is suspended with the checkpoint, its
// files are what they were, a new shim says so too, and it comes back when the images do.
func TestAFailedRollbackLeavesASuspendedKernel(t *testing.T) {
	criutest.Path(t)
	dir, _ := newSpec(t)
	a, p := spawn(t, dir)
	c := attach(t, a, "one")
	c.run("n = 1; open('f', 'w').write('before')")
	d, o := dump(t, a, false)
	c.run("n = 2; open('f', 'w').write('after')")
	copied := filepath.Join(t.TempDir(), "private")
	if out, err := exec.Command("cp", "-a", o.Private, copied).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	pid, _, err := sandbox.Find(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Restore(soon(t), RestoreOrder{Images: t.TempDir(), Private: copied, Kernel: d.Kernel, Checkpoint: "ckp_a"}); err == nil {
		t.Fatal("restored from nothing")
	}
	check := func() {
		t.Helper()
		if k := waitState(t, a, posternv1.KernelState_KERNEL_STATE_SUSPENDED); k.Checkpoint != "ckp_a" {
			t.Errorf("%v", k)
		}
		if text, err := os.ReadFile(filepath.Join(dir, "private", "home", "f")); err != nil || string(text) != "after" {
			t.Errorf("its file says %q, %v", text, err)
		}
		if _, err := os.Stat(filepath.Join(dir, "private.old")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("private.old: %v", err)
		}
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
			t.Errorf("process %d of before is there still", pid)
		}
	}
	check()
	_ = p.Kill()
	_, _ = p.Wait()
	a, _ = spawn(t, dir)
	check()
	if err := a.Restore(soon(t), RestoreOrder{Images: o.Images, Private: o.Private, Kernel: d.Kernel, Checkpoint: "ckp_a"}); err != nil {
		t.Fatal(err)
	}
	if got := attach(t, a, "one").run("print(n, open('f').read())"); got != "1 before\n" {
		t.Fatal(got)
	}
}

// kill -9 of a shim in the midst of rollbacks: the next one has a kernel that is
// suspended, or is back; no process of another is there, and it can be resumed.
func TestAShimKilledInTheMidstOfARestoreLosesNoKernel(t *testing.T) {
	criutest.Path(t)
	dir, spec := newSpec(t)
	a, p := spawn(t, dir)
	c := attach(t, a, "one")
	c.run("n = 1; open('f', 'w').write('before'); big = bytes(range(256)) * (1 << 18)")
	d, o := dump(t, a, false)
	suspended := 0
	for _, after := range []time.Duration{0, 20, 40, 60, 80, 110, 150, 200} {
		c = attach(t, a, jupyter.NewID())
		c.run("n = 2; open('f', 'w').write('after')")
		private := filepath.Join(t.TempDir(), "private")
		order := func() RestoreOrder {
			if out, err := exec.Command("cp", "-a", o.Private, private).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			return RestoreOrder{Images: o.Images, Private: private, Kernel: d.Kernel, Checkpoint: "ckp_a"}
		}
		first := order()
		done := make(chan error, 1)
		go func() { done <- a.Restore(soon(t), first) }()
		time.Sleep(after * time.Millisecond)
		_ = p.Kill()
		_, _ = p.Wait()
		err := <-done
		a, p = spawn(t, dir)
		k, kerr := a.Kernel(soon(t))
		if kerr != nil {
			t.Fatal(kerr)
		}
		t.Logf("killed after %d ms: %v; it is %v", after, err, k.State)
		if k.State == posternv1.KernelState_KERNEL_STATE_SUSPENDED {
			suspended++
			nothingLeft(t, dir, spec)
			_ = os.RemoveAll(private)
			if err := a.Restore(soon(t), order()); err != nil {
				t.Fatal(err)
			}
			if got := attach(t, a, "resumed").run("print(n, open('f').read())"); got != "1 before\n" {
				t.Fatal(got)
			}
		}
		if _, err := os.Stat(filepath.Join(dir, "private.old")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("private.old: %v", err)
		}
	}
	if suspended == 0 {
		t.Error("no kill met a restore")
	}
}

// A shim killed between the note that its kernel is suspended and the end of the
// processes: the next one ends them.
func TestNoProcessOfASuspendedKernelIsLeft(t *testing.T) {
	criutest.Path(t)
	dir, spec := newSpec(t)
	a, p := spawn(t, dir)
	attach(t, a, "one").run("n = 1")
	d, o := dump(t, a, true)
	_ = p.Kill()
	_, _ = p.Wait()
	var st State
	if err := readJSON(filepath.Join(dir, stateFile), &st); err != nil {
		t.Fatal(err)
	}
	st.Suspended, st.Checkpoint = true, "ckp_b"
	if err := WriteState(dir, st); err != nil {
		t.Fatal(err)
	}
	a, _ = spawn(t, dir)
	waitState(t, a, posternv1.KernelState_KERNEL_STATE_SUSPENDED)
	nothingLeft(t, dir, spec)
	if err := a.Restore(soon(t), RestoreOrder{Images: o.Images, Kernel: d.Kernel, Checkpoint: "ckp_b"}); err != nil {
		t.Fatal(err)
	}
	if got := attach(t, a, "one").run("print(n)"); got != "1\n" {
		t.Fatal(got)
	}
}

// nothingLeft fails if the host holds a process, a mount or a cgroup for a kernel.
func nothingLeft(t *testing.T, dir string, spec Spec) {
	t.Helper()
	if left := processesOf(t, spec.Sandbox.UID); len(left) > 0 {
		t.Errorf("processes of a suspended kernel: %v", left)
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("mounts of a suspended kernel, %v:\n%s", err, mounts)
	}
	groups, err := filepath.Glob("/sys/fs/cgroup/*/*/*" + spec.Sandbox.ID + "*")
	if more, merr := filepath.Glob("/sys/fs/cgroup/*/*" + spec.Sandbox.ID + "*"); err != nil || merr != nil || len(groups)+len(more) > 0 {
		t.Errorf("cgroups of a suspended kernel: %v %v", groups, more)
	}
}

// processesOf lists the processes of a user, zombies left out.
func processesOf(t *testing.T, uid uint32) (found []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join("/proc", e.Name(), "status"))
		if err == nil && strings.Contains(string(text), fmt.Sprintf("\nUid:\t%d\t", uid)) && !strings.Contains(string(text), "\nState:\tZ") {
			found = append(found, e.Name())
		}
	}
	return found
}
