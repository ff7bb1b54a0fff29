package fusefs

import (
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// as runs f with a user's identity for files, and without root's rights over them, on a
// thread that ends with it.
func as(uid, gid int, f func() error) (err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlock: the thread is of no more use
		// Groups of this thread alone: Go's own Setgroups is for all.
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETGROUPS, 0, 0, 0); errno != 0 {
			err = errno
			return
		}
		if err = syscall.Setfsgid(gid); err != nil {
			return
		}
		if err = syscall.Setfsuid(uid); err != nil {
			return
		}
		err = f()
	}()
	<-done
	return err
}

// TestPermissions does random operations as several users on the mount and on an ordinary
// directory, and wants the same answers, owners and modes.
func TestPermissions(t *testing.T) {
	w := newWorld(t)
	// Everybody must be able to reach the mount.
	above := openTemp(t)
	if err := errors.Join(os.Chmod(above, 0o755), os.Mkdir(filepath.Join(above, "mnt"), 0o755)); err != nil {
		t.Fatal(err)
	}
	m := w.mount(serving{Target: filepath.Join(above, "mnt")})
	m.watchdog()
	n, seed := steps(t, amount(1500, 30_000))
	e := &exerciser{t: t, rand: rand.New(rand.NewSource(seed)), roots: [2]string{m.path, openTemp(t)}}
	for _, r := range e.roots {
		if err := os.Chmod(r, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	users := [][2]int{{0, 0}, {2001, 3001}, {2002, 3002}, {2003, 3001}}
	umask := syscall.Umask(0)
	defer syscall.Umask(umask)
	for i := range n {
		who := users[e.rand.Intn(len(users))]
		e.asUser(who[0], who[1])
		if i%500 == 499 || i == n-1 {
			e.compare(e.roots[0], e.roots[1])
			e.compareOwners()
		}
	}
}

// openTemp is a temporary directory that everybody can reach.
func openTemp(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "postern-model")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (e *exerciser) asUser(uid, gid int) {
	e.t.Helper()
	p, q := e.path(3), e.path(3)
	mode := uint32(e.rand.Intn(0o2000)) &^ 0o1000
	if e.rand.Intn(3) == 0 {
		mode |= 0o777
	}
	if e.rand.Intn(8) == 0 {
		mode |= 0o1000
	}
	mode &= 0o1777
	owner := [...]int{-1, 0, 2001, 2002, 2003}[e.rand.Intn(5)]
	group := [...]int{-1, 0, 3001, 3002}[e.rand.Intn(4)]
	do := func(what string, f func(path, other string) error) {
		e.t.Helper()
		e.both(fmt.Sprintf("%d: %s", uid, what), func(r string, _ int) error {
			return as(uid, gid, func() error { return f(r+"/"+p, r+"/"+q) })
		})
	}
	switch e.rand.Intn(16) {
	case 0, 1:
		do(fmt.Sprintf("mkdir %s %o", p, mode), func(p, _ string) error { return syscall.Mkdir(p, mode) })
	case 2, 3:
		do(fmt.Sprintf("create %s %o", p, mode), func(p, _ string) error { return openClose(p, syscall.O_CREAT|syscall.O_RDWR, mode) })
	case 4:
		do("unlink "+p, func(p, _ string) error { return syscall.Unlink(p) })
	case 5:
		do("rmdir "+p, func(p, _ string) error { return syscall.Rmdir(p) })
	case 6:
		do("rename "+p+" "+q, syscall.Rename)
	case 7:
		do("link "+p+" "+q, syscall.Link)
	case 8:
		do("symlink "+q, func(_, q string) error { return syscall.Symlink("f0", q) })
	case 9, 10:
		do(fmt.Sprintf("chmod %s %o", p, mode), func(p, _ string) error { return syscall.Chmod(p, mode) })
	case 11:
		do(fmt.Sprintf("lchown %s %d %d", p, owner, group), func(p, _ string) error { return syscall.Lchown(p, owner, group) })
	case 12:
		do("utimes "+p, func(p, _ string) error {
			return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{{Sec: 5}, {Sec: 6}}, 0)
		})
		do("utimes now "+p, func(p, _ string) error {
			return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}, 0)
		})
	case 13:
		do("truncate "+p, func(p, _ string) error { return syscall.Truncate(p, 10) })
		do("setxattr "+p, func(p, _ string) error { return unix.Setxattr(p, "user.a", []byte("b"), 0) })
		do("getxattr "+p, func(p, _ string) error { _, err := unix.Getxattr(p, "user.a", make([]byte, 10)); return err })
	case 14:
		flags := []int{syscall.O_RDONLY, syscall.O_WRONLY, syscall.O_RDWR, syscall.O_RDONLY | syscall.O_TRUNC}[e.rand.Intn(4)]
		do(fmt.Sprintf("open %s %#x", p, flags), func(p, _ string) error { return openClose(p, flags, 0) })
	case 15:
		do("list "+filepath.Dir(p), func(p, _ string) error { _, err := os.ReadDir(filepath.Dir(p)); return err })
		do("stat "+p, func(p, _ string) error { var st syscall.Stat_t; return syscall.Lstat(p, &st) })
	}
}

func openClose(p string, flags int, mode uint32) error {
	fd, err := syscall.Open(p, flags, mode)
	if err != nil {
		return err
	}
	return syscall.Close(fd)
}

func (e *exerciser) compareOwners() {
	e.t.Helper()
	for p := range look(e.t, e.roots[1]) {
		var st [2]syscall.Stat_t
		for i, r := range e.roots {
			if err := syscall.Lstat(filepath.Join(r, p), &st[i]); err != nil {
				e.fail("%s: %v", p, err)
			}
		}
		if st[0].Uid != st[1].Uid || st[0].Gid != st[1].Gid || st[0].Mode != st[1].Mode {
			e.fail("%s belongs to %d:%d, mode %o; want %d:%d, %o", p, st[0].Uid, st[0].Gid, st[0].Mode, st[1].Uid, st[1].Gid, st[1].Mode)
		}
	}
}

// TestRefused: what is not enforced is refused.
func TestRefused(t *testing.T) {
	w := newWorld(t)
	m := w.mount(serving{})
	m.watchdog()
	file := filepath.Join(m.path, "file")
	if err := os.WriteFile(file, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		got, want error
	}{
		"setuid":      {syscall.Chmod(file, 0o4755), syscall.EPERM},
		"setgid":      {syscall.Chmod(file, 0o2755), syscall.EPERM},
		"pipe":        {syscall.Mkfifo(file+"p", 0o644), syscall.EPERM},
		"device":      {syscall.Mknod(file+"d", syscall.S_IFCHR|0o644, 0x0103), syscall.EPERM},
		"socket":      {syscall.Mknod(file+"s", syscall.S_IFSOCK|0o644, 0), syscall.EPERM},
		"xattr":       {unix.Setxattr(file, "trusted.a", []byte("b"), 0), syscall.EOPNOTSUPP},
		"large xattr": {unix.Setxattr(file, "user.a", make([]byte, 64<<10+1), 0), syscall.E2BIG},
		"long name":   {syscall.Mkdir(m.path+"/"+fmt.Sprintf("%0256d", 0), 0o755), syscall.ENAMETOOLONG},
		"large file":  {syscall.Truncate(file, 5<<40), syscall.EFBIG},
		"collapse": {func() error {
			f, _ := os.OpenFile(file, os.O_RDWR, 0)
			defer f.Close()
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_COLLAPSE_RANGE, 0, 4096)
		}(), syscall.EOPNOTSUPP},
		"link of a dir": {func() error { _ = os.Mkdir(file+"dir", 0o755); return syscall.Link(file+"dir", file+"l") }(), syscall.EPERM},
	} {
		if c.got != c.want {
			t.Errorf("%s: %v, want %v", what, c.got, c.want)
		}
	}
	// Names that look odd are names.
	for _, name := range []string{"new\nline", "\xff\xfe", "...", "-rf", fmt.Sprintf("%0255d", 7)} {
		if err := os.WriteFile(filepath.Join(m.path, name), []byte(name), 0o600); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	drained(t, m)
	other := w.mount(serving{})
	for _, name := range []string{"new\nline", "\xff\xfe", "...", "-rf", fmt.Sprintf("%0255d", 7)} {
		if b, err := os.ReadFile(filepath.Join(other.path, name)); err != nil || string(b) != name {
			t.Errorf("%q on another host: %q, %v", name, b, err)
		}
	}
}
