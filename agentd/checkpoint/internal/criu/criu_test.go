package criu_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
	"github.com/postern-dev/postern/agentd/checkpoint/internal/criu"
)

// program is a tree of its own: it counts in memory at each command, has a thread, a
// child, a pipe, a timer and a TCP listener.
const program = `
import os, sys, threading, socket, signal, time
os.closerange(3, 256)
base = sys.argv[1]
count, ticks = 0, 0
keep = os.urandom(int(sys.argv[2]) << 20)
def tick(*_):
    global ticks
    ticks += 1
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen()
r, w = os.pipe()
if os.fork() == 0:
    signal.setitimer(signal.ITIMER_REAL, 0)
    while True:
        b = os.read(r, 1)
        os.write(2, b)
threading.Thread(target=lambda: time.sleep(1e6), daemon=True).start()
extra = []
commands = os.fdopen(os.open(base + "/fifo", os.O_RDWR))
print("ready", flush=True)
while True:
    line = commands.readline().strip()
    if line == "count":
        count += 1
        print("count", count, flush=True)
    elif line == "ticks":
        print("ticks", ticks, flush=True)
    elif line == "child":
        os.write(w, b"c")
    elif line.startswith("exec "):
        exec(line[5:])
        print("done", flush=True)
`

type tree struct {
	t   *testing.T
	dir string
	pid int
	out int64
}

func driver(t *testing.T) *criu.Driver {
	t.Helper()
	return &criu.Driver{Path: criutest.Path(t), Self: "/proc/self/exe", TestOnlyPreload: criutest.Preload(t)}
}

// start starts the program as another user in a pid namespace of its own.
func start(t *testing.T, mib int) *tree {
	t.Helper()
	if err := criu.Subreaper(); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "criu")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(dir+"/fifo", 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir+"/fifo", 0o666); err != nil {
		t.Fatal(err)
	}
	root := dir + "/root"
	if err := errors.Join(os.Mkdir(root, 0o755), os.WriteFile(dir+"/out", nil, 0o666), os.Chmod(dir+"/out", 0o666)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", `set -e; dir=$1; root=$dir/root; shift
		mount --make-rprivate /; mount --bind / $root; mount -t proc proc $root/proc
		mount -t tmpfs -o mode=755 dev $root/dev; mknod -m 666 $root/dev/null c 1 3; mknod -m 666 $root/dev/urandom c 1 9
		cd $root; pivot_root . mnt; umount -l mnt; cd /
		exec setpriv --reuid 1500 --regid 1500 --clear-groups --no-new-privs setsid "$@" </dev/null >>$dir/out 2>&1`,
		"sh", dir, "/usr/bin/python3", "-c", program, dir, strconv.Itoa(mib))
	cmd.Dir, cmd.Env = "/", []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(mountRoot(t, dir))
	tr := &tree{t: t, dir: dir, pid: cmd.Process.Pid}
	t.Cleanup(func() { tr.kill() })
	tr.expect("ready")
	return tr
}

// mountRoot makes what a restore needs as its root, and returns what removes it.
func mountRoot(t *testing.T, dir string) func() {
	root := dir + "/restore-root"
	if err := errors.Join(os.Mkdir(root, 0o755), unix.Mount("/", root, "", unix.MS_BIND, ""), unix.Mount("", root, "", unix.MS_PRIVATE, "")); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}
}

// kill ends the tree and waits for it: it is this process's child.
func (tr *tree) kill() {
	if tr.pid > 0 {
		_ = unix.Kill(tr.pid, unix.SIGKILL)
		var ws unix.WaitStatus
		_, _ = unix.Wait4(tr.pid, &ws, 0, nil)
		tr.pid = 0
	}
}

// gone waits for a tree that a dump ended.
func (tr *tree) gone() {
	tr.t.Helper()
	var ws unix.WaitStatus
	if _, err := unix.Wait4(tr.pid, &ws, 0, nil); err != nil {
		tr.t.Fatalf("wait for the dumped tree: %v", err)
	}
	tr.pid = 0
}

func (tr *tree) say(line string) {
	tr.t.Helper()
	f, err := os.OpenFile(tr.dir+"/fifo", os.O_RDWR, 0)
	if err != nil {
		tr.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(line + "\n"); err != nil {
		tr.t.Fatal(err)
	}
}

// expect waits for more output that ends in want's line; it returns the new output.
func (tr *tree) expect(want string) string {
	tr.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		b, err := os.ReadFile(tr.dir + "/out")
		if err != nil {
			tr.t.Fatal(err)
		}
		if s := string(b[tr.out:]); strings.Contains(s, want) {
			tr.out = int64(len(b))
			return s
		} else if time.Now().After(deadline) {
			tr.t.Fatalf("no %q within a minute, got %q", want, s)
		}
	}
}

// usable checks that every part of the tree works and that the count is n afterwards.
func (tr *tree) usable(n int) {
	tr.t.Helper()
	tr.say("count")
	if got := tr.expect("count"); !strings.Contains(got, fmt.Sprintf("count %d\n", n)) {
		tr.t.Fatalf("got %q, want count %d", got, n)
	}
	tr.say("child")
	tr.expect("c")
	ticks := -1
	for {
		tr.say("ticks")
		var k int
		if _, err := fmt.Sscanf(tr.expect("ticks"), "ticks %d", &k); err != nil {
			tr.t.Fatal(err)
		}
		if ticks >= 0 && k > ticks {
			return
		}
		ticks = max(ticks, k)
		time.Sleep(20 * time.Millisecond)
	}
}

func TestDumpAndRestore(t *testing.T) {
	d := driver(t)
	tr := start(t, 8)
	tr.usable(1)
	images := t.TempDir()
	stats, err := d.Dump(t.Context(), criu.Dump{PID: tr.pid, Images: images, LeaveRunning: true})
	if err != nil {
		t.Fatal(err)
	}
	if stats.Frozen <= 0 || stats.Frozen > stats.Took || stats.PagesWritten < 8<<20>>12 {
		t.Errorf("figures that can't be: %+v", stats)
	}
	tr.usable(2) // it went on
	for range 3 {
		tr.kill()
		r, err := d.Restore(t.Context(), criu.Restore{Images: images, Root: tr.dir + "/restore-root"})
		if err != nil {
			t.Fatal(err)
		}
		tr.pid = r.PID
		tr.usable(2) // as it was
	}
	second := t.TempDir()
	if _, err := d.Dump(t.Context(), criu.Dump{PID: tr.pid, Images: second}); err != nil {
		t.Fatal(err)
	}
	tr.gone()
	r, err := d.Restore(t.Context(), criu.Restore{Images: second, Root: tr.dir + "/restore-root"})
	if err != nil {
		t.Fatal(err)
	}
	tr.pid = r.PID
	tr.usable(3)
}

func TestRefusalsNameTheCause(t *testing.T) {
	d := driver(t)
	for _, test := range []struct {
		name, code string
		cause      criu.Cause
	}{
		{"unix socket to the outside", "s = socket.socket(socket.AF_UNIX); s.connect(base + '/peer'); extra.append(s)", criu.CauseExternalSocket},
	} {
		t.Run(test.name, func(t *testing.T) {
			tr := start(t, 1)
			listener, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(listener)
			if err := errors.Join(unix.Bind(listener, &unix.SockaddrUnix{Name: tr.dir + "/peer"}), unix.Listen(listener, 1), os.Chmod(tr.dir+"/peer", 0o777)); err != nil {
				t.Fatal(err)
			}
			tr.say("exec " + test.code)
			tr.expect("done")
			accepted, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(accepted)
			_, err = d.Dump(t.Context(), criu.Dump{PID: tr.pid, Images: t.TempDir()})
			var e *criu.Error
			if !errors.As(err, &e) || e.Cause != test.cause {
				t.Fatalf("got %v (%#v), want the cause %q", err, e, test.cause)
			}
			tr.usable(1)
		})
	}
}

func TestDeadlineEndsADumpAndNotTheTree(t *testing.T) {
	d := driver(t)
	tr := start(t, 64)
	n := 0
	for _, after := range []time.Duration{1, 5, 10, 20, 40, 60, 80, 100, 120, 160} {
		ctx, cancel := context.WithTimeout(t.Context(), after*time.Millisecond)
		_, err := d.Dump(ctx, criu.Dump{PID: tr.pid, Images: t.TempDir(), LeaveRunning: true})
		cancel()
		if err != nil {
			t.Logf("%d ms: %v", after, err)
		}
		n++
		tr.usable(n)
	}
	if _, err := d.Dump(t.Context(), criu.Dump{PID: tr.pid, Images: t.TempDir()}); err != nil {
		t.Fatalf("a dump after ended ones: %v", err)
	}
	tr.gone()
}

func TestDeadlineEndsARestoreAndLeavesNothing(t *testing.T) {
	d := driver(t)
	tr := start(t, 64)
	images := t.TempDir()
	if _, err := d.Dump(t.Context(), criu.Dump{PID: tr.pid, Images: images}); err != nil {
		t.Fatal(err)
	}
	tr.gone()
	for _, after := range []time.Duration{1, 10, 20, 30, 40, 60, 80, 100, 150} {
		ctx, cancel := context.WithTimeout(t.Context(), after*time.Millisecond)
		r, err := d.Restore(ctx, criu.Restore{Images: images, Root: tr.dir + "/restore-root"})
		cancel()
		if err == nil {
			tr.pid = r.PID
			tr.kill()
			continue
		}
		t.Logf("%d ms: %v", after, err)
		var ws unix.WaitStatus
		for { // whatever CRIU left to this process is dead
			pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
			if err != nil {
				break
			}
			if pid == 0 {
				children, _ := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/children", os.Getpid()))
				t.Fatalf("a process is left: %s", children)
			}
		}
	}
	r, err := d.Restore(t.Context(), criu.Restore{Images: images, Root: tr.dir + "/restore-root"})
	if err != nil {
		t.Fatal(err)
	}
	tr.pid = r.PID
	tr.usable(1)
}

func TestAFullDiskFailsTheDumpAndNotTheTree(t *testing.T) {
	d := driver(t)
	tr := start(t, 32)
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=8m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(small, unix.MNT_DETACH)
	_, err := d.Dump(t.Context(), criu.Dump{PID: tr.pid, Images: small})
	var e *criu.Error
	if !errors.As(err, &e) || e.Cause != criu.CauseNoSpace {
		t.Fatalf("got %v, want no space", err)
	}
	tr.usable(1)
}

func TestRestoreOfNothing(t *testing.T) {
	d := driver(t)
	_, err := d.Restore(t.Context(), criu.Restore{Images: t.TempDir()})
	var e *criu.Error
	if !errors.As(err, &e) || len(e.Lines) == 0 {
		t.Fatalf("got %v", err)
	}
	if _, err := d.Restore(t.Context(), criu.Restore{Images: filepath.Join(t.TempDir(), "no")}); err == nil {
		t.Fatal("restored from no directory")
	}
	v, err := d.Version(t.Context())
	if err != nil || v < criu.Minimum {
		t.Fatalf("version %d, %v", v, err)
	}
}

func TestExamine(t *testing.T) {
	criutest.Path(t)
	names := map[string]criu.Finding{}
	for _, f := range criu.Examine(t.Context(), "", "/proc/self/exe") {
		t.Logf("%+v", f)
		if f.Message == "" || (f.Grade == criu.Fine) != (f.Remedy == "") {
			t.Errorf("%+v: a fault has a remedy, and nothing else has", f)
		}
		names[f.Name] = f
	}
	for _, name := range []string{"criu", "criu check"} {
		if f := names[name]; f.Message == "" || f.Grade != criu.Fine {
			t.Errorf("%s: %+v", name, f)
		}
	}
	if got, want := names["criu capabilities"].Grade == criu.Fine, criutest.HasSysResource(); got != want {
		t.Errorf("capabilities: %+v", names["criu capabilities"])
	}
	if got := criu.Examine(t.Context(), "/nonexistent", "/proc/self/exe"); len(got) != 1 || got[0].Grade != criu.Broken {
		t.Errorf("without CRIU: %+v", got)
	}
}
