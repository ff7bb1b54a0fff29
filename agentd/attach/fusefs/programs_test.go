package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// run runs a program and returns what it printed.
func run(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "HOME="+dir, "GIT_CONFIG_NOSYSTEM=1", "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@b", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@b")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// TestPrograms: what people really run, and on another host what they left.
func TestPrograms(t *testing.T) {
	w := newWorld(t)
	m := w.mount(serving{})
	m.watchdog()
	repo := filepath.Join(m.path, "repo")
	if err := os.Mkdir(repo, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, repo, "git", "init", "-q")
	for i := range amount(80, 200) {
		dir := filepath.Join(repo, fmt.Sprint("d", i%7))
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), bytes.Repeat([]byte{byte(i)}, i*100), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	run(t, repo, "git", "add", ".")
	run(t, repo, "git", "commit", "-qm", "one")
	run(t, m.path, "git", "clone", "-q", "repo", "clone")
	run(t, filepath.Join(m.path, "clone"), "git", "fsck", "--strict")
	rows := fmt.Sprint(amount(100, 300))
	for _, mode := range []string{"WAL", "DELETE", "TRUNCATE"} {
		run(t, m.path, "python3", "-c", `
import sqlite3, sys
db = sqlite3.connect("db-"+sys.argv[1])
assert db.execute("pragma journal_mode="+sys.argv[1]).fetchone()[0].upper() == sys.argv[1]
db.execute("create table t(i integer primary key, v text)")
n = int(sys.argv[2])
for i in range(n):
    with db: db.execute("insert into t values(?, ?)", (i, "x"*i))
other = sqlite3.connect("db-"+sys.argv[1])
assert other.execute("select count(*), sum(length(v)) from t").fetchone() == (n, n*(n-1)//2)
assert db.execute("pragma integrity_check").fetchone()[0] == "ok"
other.close(); db.close()
`, mode, rows)
	}
	run(t, m.path, "tar", "cf", "all.tar", "clone")
	if err := os.Mkdir(filepath.Join(m.path, "out"), 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, filepath.Join(m.path, "out"), "tar", "xf", "../all.tar")
	run(t, m.path, "diff", "-r", "clone", "out/clone")
	drained(t, m)
	other := w.mount(serving{})
	run(t, other.path, "diff", "-r", "clone", "out/clone")
	if out := run(t, filepath.Join(other.path, "clone"), "git", "-c", "safe.directory=*", "status", "--porcelain"); out != "" {
		t.Errorf("git status on another host: %s", out)
	}
	run(t, other.path, "python3", "-c", `
import sqlite3, sys
for m in ("WAL", "DELETE", "TRUNCATE"):
    assert sqlite3.connect("db-"+m).execute("select count(*) from t").fetchone()[0] == int(sys.argv[1])
`, rows)
}

// TestAppend: appends of many programs never overwrite each other.
func TestAppend(t *testing.T) {
	for _, through := range []bool{true, false} {
		t.Run(fmt.Sprintf("passthrough=%v", through), func(t *testing.T) {
			w := newWorld(t)
			m := w.mount(serving{NoPassthrough: !through})
			m.watchdog()
			log := filepath.Join(m.path, "log")
			if err := os.WriteFile(log, []byte("begin\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			lines := amount(100, 1000)
			var wg sync.WaitGroup
			for i := range 4 {
				wg.Go(func() {
					out, err := exec.Command("sh", "-c", fmt.Sprintf("i=0; while [ $i -lt %d ]; do echo line %d $i >> %s; i=$((i+1)); done", lines, i, log)).CombinedOutput()
					if err != nil {
						t.Errorf("%v: %s", err, out)
					}
				})
			}
			wg.Wait()
			b, err := os.ReadFile(log)
			if err != nil || bytes.Count(b, []byte("\n")) != 1+4*lines || bytes.Contains(b, []byte{0}) {
				t.Errorf("%d lines of %d, %v", bytes.Count(b, []byte("\n")), 1+4*lines, err)
			}
		})
	}
}

// TestLocks: flock and open file description locks exclude each other between handles.
func TestLocks(t *testing.T) {
	w := newWorld(t)
	m := w.mount(serving{})
	m.watchdog()
	var fds [2]int
	for i := range fds {
		fd, err := syscall.Open(filepath.Join(m.path, "lock"), syscall.O_CREAT|syscall.O_RDWR, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		defer syscall.Close(fd)
		fds[i] = fd
	}
	if err := syscall.Flock(fds[0], syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(fds[1], syscall.LOCK_EX|syscall.LOCK_NB); err != syscall.EAGAIN {
		t.Errorf("a second flock: %v", err)
	}
	if err := unix.FcntlFlock(uintptr(fds[0]), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Len: 10}); err != nil {
		t.Fatal(err)
	}
	if err := unix.FcntlFlock(uintptr(fds[1]), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 5, Len: 10}); err != syscall.EAGAIN {
		t.Errorf("a lock over another: %v", err)
	}
	if err := unix.FcntlFlock(uintptr(fds[1]), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 10, Len: 10}); err != nil {
		t.Errorf("a lock beside another: %v", err)
	}
}

// TestExtendedAttributesAndPassthrough: writing to a file that is passed through asks the daemon nothing, although
// extended attributes work.
func TestExtendedAttributesAndPassthrough(t *testing.T) {
	w := newWorld(t)
	m := w.mount(serving{})
	m.watchdog()
	file := filepath.Join(m.path, "f")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(file, "user.a", []byte("b"), 0); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	// A server that is stopped answers nothing.
	if err := m.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		for i := range 100 {
			if _, err := f.WriteAt([]byte("y"), int64(i)*4096); err != nil {
				done <- err
				return
			}
			if _, err := f.ReadAt(make([]byte, 1), int64(i)*4096); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Error("a write waits for the daemon")
		_ = m.cmd.Process.Signal(syscall.SIGCONT)
		<-done
	}
	if err := m.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 10)
	if n, err := unix.Getxattr(file, "user.a", buf); err != nil || string(buf[:n]) != "b" {
		t.Errorf("the attribute: %q, %v", buf[:n], err)
	}
}
