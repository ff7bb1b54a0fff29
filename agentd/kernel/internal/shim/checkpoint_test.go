package shim

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
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
