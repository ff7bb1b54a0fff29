package shim

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// childOf is a child of a process; 0: it has none.
func childOf(pid int) int {
	tasks, _ := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/children")
	for _, path := range tasks {
		text, _ := os.ReadFile(path)
		for _, field := range strings.Fields(string(text)) {
			line, _ := os.ReadFile("/proc/" + field + "/cmdline")
			if child, err := strconv.Atoi(field); err == nil && strings.Contains(string(line), "\x00lazy-pages\x00") {
				return child
			}
		}
	}
	return 0
}

// bigKernel is a kernel with memory that takes a while to come, and what it was dumped to.
func bigKernel(t *testing.T) (dir string, a *Agent, p *os.Process, order func() RestoreOrder) {
	t.Helper()
	criutest.Path(t)
	dir, _ = newSpec(t)
	a, p = spawn(t, dir)
	c := attach(t, a, "one")
	if got := c.run("import os, zlib; big = os.urandom(1 << 20) * 160; was = zlib.crc32(big); n = 1; print(n)"); got != "1\n" {
		t.Fatal(got)
	}
	d, o := dump(t, a, false)
	return dir, a, p, func() RestoreOrder {
		return RestoreOrder{Images: o.Images, Kernel: d.Kernel, Checkpoint: "ckp_l", Lazy: 1 << 20}
	}
}

// halted restores until who brings the memory in was stopped in the midst of it, and returns
// its process id.
func halted(t *testing.T, a *Agent, p *os.Process, o RestoreOrder) (server int) {
	t.Helper()
	// A busy machine may let it come to its end before it is met, many times in a row.
	for began := time.Now(); time.Since(began) < 5*time.Minute; {
		found, quit := make(chan int, 1), make(chan struct{})
		go func() {
			for {
				select {
				case <-quit:
					found <- 0
					return
				default:
				}
				if pid := childOf(p.Pid); pid > 0 && childOf(pid) > 0 { // it has its guard
					_ = unix.Kill(pid, unix.SIGSTOP)
					found <- pid
					return
				}
				time.Sleep(50 * time.Microsecond)
			}
		}()
		err := a.Restore(soon(t), o)
		close(quit)
		server = <-found
		if err != nil {
			t.Fatal(err)
		}
		if k, err := a.Kernel(soon(t)); err != nil {
			t.Fatal(err)
		} else if server > 0 && k.Notice == stillFilling {
			return server
		}
	}
	t.Fatal("no restore was met while its memory came")
	return 0
}

// A kernel that is restored lazily answers, is saved as soon as all is there, and a restore
// beside one that is not done ends that.
func TestALazyRestoreAnswersAndIsSavedWhenAllIsThere(t *testing.T) {
	_, a, p, order := bigKernel(t)
	server := halted(t, a, p, order())
	if _, err := a.Dump(soon(t), DumpOrder{Images: t.TempDir(), Private: t.TempDir(), Timeout: time.Second}); err == nil || !strings.Contains(err.Error(), "still being brought in") {
		t.Errorf("saved without its memory: %v", err)
	}
	if err := unix.Kill(server, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	c := attach(t, a, "two")
	if got := c.run("n += 1; print(n, zlib.crc32(big) == was)"); got != "2 True\n" {
		t.Fatal(got)
	}
	d, o := dump(t, a, false) // it waits
	if k, err := a.Kernel(soon(t)); err != nil || k.Notice != "" {
		t.Errorf("%v, %v", k, err)
	}
	halted(t, a, p, order())
	if err := a.Restore(soon(t), RestoreOrder{Images: o.Images, Kernel: d.Kernel, Checkpoint: "ckp_m", Lazy: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	c = attach(t, a, "three")
	if got := c.run("n += 1; print(n, zlib.crc32(big) == was)"); got != "3 True\n" {
		t.Fatal(got)
	}
	// Processes that share memory would each get their own.
	if got := c.run("import time\nif os.fork() == 0:\n    time.sleep(10_000)\nprint(n)"); got != "3\n" {
		t.Fatal(got)
	}
	d, o = dump(t, a, false)
	if err := a.Restore(soon(t), RestoreOrder{Images: o.Images, Kernel: d.Kernel, Checkpoint: "ckp_n", Lazy: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if k, err := a.Kernel(soon(t)); err != nil || !strings.HasPrefix(k.Notice, "restored eagerly: its processes may share memory") {
		t.Errorf("%v, %v", k, err)
	}
	if got := attach(t, a, "four").run("n += 1; print(n, zlib.crc32(big) == was)"); got != "4 True\n" {
		t.Fatal(got)
	}
}

// Who brings a kernel's memory in is killed: the kernel is dead, and says why; it can be
// rolled back.
func TestAKernelWithoutItsMemoryIsDead(t *testing.T) {
	_, a, p, order := bigKernel(t)
	server := halted(t, a, p, order())
	if err := unix.Kill(server, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	k := waitState(t, a, posternv1.KernelState_KERNEL_STATE_DEAD)
	if !strings.Contains(k.Reason, "its memory could not be brought back") || !strings.Contains(k.Reason, "ckp_l") {
		t.Errorf("it says %q", k.Reason)
	}
	if err := a.Restore(soon(t), order()); err != nil {
		t.Fatal(err)
	}
	if got := attach(t, a, "two").run("n += 1; print(n, zlib.crc32(big) == was)"); got != "2 True\n" {
		t.Fatal(got)
	}
}

// A shim that is killed meanwhile changes nothing: the next one has the kernel, its memory
// comes, and it is saved when it is there.
func TestTheMemoryOfAKernelOutlivesItsShim(t *testing.T) {
	dir, a, p, order := bigKernel(t)
	server := halted(t, a, p, order())
	_ = p.Kill()
	_, _ = p.Wait()
	a, p = spawn(t, dir)
	k, err := a.Kernel(soon(t))
	if err != nil || k.Notice != stillFilling {
		t.Errorf("%v, %v", k, err)
	}
	if err := unix.Kill(server, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if got := attach(t, a, "two").run("n += 1; print(n, zlib.crc32(big) == was)"); got != "2 True\n" {
		t.Fatal(got)
	}
	dump(t, a, false)

	// With everybody killed at once the next shim ends it before it says anything.
	server = halted(t, a, p, order())
	_ = p.Kill()
	_, _ = p.Wait()
	guard := childOf(server)
	if err := errors.Join(unix.Kill(guard, unix.SIGSTOP), unix.Kill(server, unix.SIGKILL), unix.Kill(guard, unix.SIGKILL)); err != nil {
		t.Fatal(err)
	}
	a, _ = spawn(t, dir)
	if k := waitState(t, a, posternv1.KernelState_KERNEL_STATE_DEAD); !strings.Contains(k.Reason, "its memory could not be brought back") {
		t.Errorf("it says %q", k.Reason)
	}
}
