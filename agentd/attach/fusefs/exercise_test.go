package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// exerciser does the same random operations on a mount and on an ordinary directory, and
// wants the same answers.
type exerciser struct {
	t     *testing.T
	rand  *rand.Rand
	roots [2]string // the mount, the model
	open  []handles
	log   []string
}

// handles are one file opened twice.
type handles struct {
	fds  [2]int
	name string
}

// steps is how many operations a run does: few in every test run, more by environment.
func steps(t *testing.T, few int) (int, int64) {
	t.Helper()
	n, seed := few, time.Now().UnixNano()
	if s := os.Getenv("POSTERN_EXERCISE_STEPS"); s != "" {
		n, _ = strconv.Atoi(s)
	}
	if s := os.Getenv("POSTERN_EXERCISE_SEED"); s != "" {
		seed, _ = strconv.ParseInt(s, 10, 64)
	}
	t.Logf("POSTERN_EXERCISE_STEPS=%d POSTERN_EXERCISE_SEED=%d", n, seed)
	return n, seed
}

// TestExercise compares the mount with the file system below it, and what arrives at
// another host with both.
func TestExercise(t *testing.T) {
	for _, through := range []bool{true, false} {
		t.Run(fmt.Sprintf("passthrough=%v", through), func(t *testing.T) {
			w := newWorld(t)
			m := w.mount(serving{NoPassthrough: !through})
			m.watchdog()
			n, seed := steps(t, amount(1000, 30_000))
			e := &exerciser{t: t, rand: rand.New(rand.NewSource(seed)), roots: [2]string{m.path, t.TempDir()}}
			for i := range n {
				e.step()
				if i%500 == 499 {
					e.compare(e.roots[0], e.roots[1])
				}
			}
			for len(e.open) > 0 {
				e.closeOne(0)
			}
			e.compare(e.roots[0], e.roots[1])
			// The same after the process that serves was another one.
			m.close()
			m = w.mount(serving{Dir: m.dir, Target: m.path, NoPassthrough: !through})
			e.compare(m.path, e.roots[1])
			drained(t, m)
			other := w.mount(serving{NoPassthrough: !through})
			look(t, other.path) // the number of links of a directory is known when it was listed
			for until := time.Now().Add(time.Minute); time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
				if e.differ(other.path, e.roots[1]) == "" {
					break // the kernel has heard of those numbers
				}
			}
			e.compare(other.path, e.roots[1])
		})
	}
}

// drained waits until nothing is unsent; the mount tells by an fsync of its root and the
// queue of its replica, which the child prints.
func drained(t *testing.T, m *mounted) {
	t.Helper()
	if _, err := m.in.Write([]byte("d")); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 64)
	n, err := m.out.Read(line)
	if err != nil || string(line[:n]) != "drained\n" {
		t.Fatalf("draining: %q, %v", line[:n], err)
	}
}

func (e *exerciser) path(depth int) string {
	p := ""
	for range e.rand.Intn(depth) {
		p += fmt.Sprintf("d%d/", e.rand.Intn(3))
	}
	return p + fmt.Sprintf("%c%d", "fd"[e.rand.Intn(2)], e.rand.Intn(4))
}

// both does something on both sides and wants the same errno.
func (e *exerciser) both(what string, f func(root string, side int) error) bool {
	e.t.Helper()
	e.log = append(e.log, what)
	var errs [2]error
	for i, root := range e.roots {
		errs[i] = f(root, i)
	}
	if (errs[0] == nil) != (errs[1] == nil) || errs[0] != nil && errno(errs[0]) != errno(errs[1]) {
		e.fail("%s: %v on the mount, %v on the model", what, errs[0], errs[1])
	}
	return errs[0] == nil
}

func (e *exerciser) fail(format string, args ...any) {
	e.t.Helper()
	for _, l := range e.log[max(0, len(e.log)-40):] {
		e.t.Log(l)
	}
	e.t.Fatalf(format, args...)
}

func errno(err error) syscall.Errno {
	var n syscall.Errno
	if errors.As(err, &n) {
		return n
	}
	return 0
}

func (e *exerciser) step() {
	e.t.Helper()
	p, q := e.path(4), e.path(4)
	switch e.rand.Intn(24) {
	case 0, 1:
		e.both("mkdir "+p, func(r string, _ int) error { return syscall.Mkdir(r+"/"+p, 0o755) })
	case 2, 3, 4:
		e.create(p)
	case 5:
		e.both("unlink "+p, func(r string, _ int) error { return syscall.Unlink(r + "/" + p) })
	case 6:
		e.both("rmdir "+p, func(r string, _ int) error { return syscall.Rmdir(r + "/" + p) })
	case 7, 8:
		e.both("rename "+p+" "+q, func(r string, _ int) error { return syscall.Rename(r+"/"+p, r+"/"+q) })
	case 9:
		flags := []uint{unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE}[e.rand.Intn(2)]
		e.both(fmt.Sprintf("rename2 %s %s %d", p, q, flags), func(r string, _ int) error {
			return unix.Renameat2(unix.AT_FDCWD, r+"/"+p, unix.AT_FDCWD, r+"/"+q, flags)
		})
	case 10:
		e.both("link "+p+" "+q, func(r string, _ int) error { return syscall.Link(r+"/"+p, r+"/"+q) })
	case 11:
		e.both("symlink "+p+" "+q, func(r string, _ int) error { return syscall.Symlink(p, r+"/"+q) })
	case 12:
		size := e.rand.Int63n(200_000)
		e.both(fmt.Sprintf("truncate %s %d", p, size), func(r string, _ int) error { return syscall.Truncate(r+"/"+p, size) })
	case 13:
		mode := uint32(e.rand.Intn(0o1000)) | 0o600
		e.both(fmt.Sprintf("chmod %s %o", p, mode), func(r string, _ int) error { return unix.Fchmodat(unix.AT_FDCWD, r+"/"+p, mode|0o100, 0) })
	case 14:
		ts := []unix.Timespec{{Sec: e.rand.Int63n(1e9), Nsec: 5}, {Sec: e.rand.Int63n(1e9), Nsec: 7}}
		e.both("utimes "+p, func(r string, _ int) error {
			return unix.UtimesNanoAt(unix.AT_FDCWD, r+"/"+p, ts, unix.AT_SYMLINK_NOFOLLOW)
		})
	case 15:
		if len(e.open) < 8 {
			flags := []int{os.O_RDWR, os.O_RDONLY, os.O_RDWR | os.O_TRUNC, os.O_RDWR | os.O_APPEND}[e.rand.Intn(4)]
			e.openOne(p, flags)
		}
	case 16:
		if len(e.open) > 0 {
			e.closeOne(e.rand.Intn(len(e.open)))
		}
	default:
		if len(e.open) > 0 {
			e.onHandle(e.open[e.rand.Intn(len(e.open))])
		} else {
			e.create(p)
		}
	}
}

func (e *exerciser) create(p string) {
	e.t.Helper()
	if len(e.open) >= 8 {
		e.closeOne(0)
	}
	e.openOne(p, os.O_RDWR|os.O_CREATE|[]int{0, os.O_EXCL, os.O_TRUNC}[e.rand.Intn(3)])
}

func (e *exerciser) openOne(p string, flags int) {
	e.t.Helper()
	h := handles{name: p}
	if e.both(fmt.Sprintf("open %s %#x", p, flags), func(r string, i int) (err error) {
		h.fds[i], err = syscall.Open(r+"/"+p, flags, 0o644)
		return err
	}) {
		var st syscall.Stat_t
		if syscall.Fstat(h.fds[1], &st) == nil && st.Mode&syscall.S_IFMT != syscall.S_IFREG {
			syscall.Close(h.fds[0])
			syscall.Close(h.fds[1])
			return
		}
		e.open = append(e.open, h)
	}
}

func (e *exerciser) closeOne(i int) {
	e.t.Helper()
	h := e.open[i]
	e.open = slices.Delete(e.open, i, i+1)
	e.both("close "+h.name, func(_ string, i int) error { return syscall.Close(h.fds[i]) })
}

func (e *exerciser) onHandle(h handles) {
	e.t.Helper()
	off := e.rand.Int63n(150_000)
	data := make([]byte, e.rand.Intn(20_000)+1)
	e.rand.Read(data)
	var n [2]int
	switch e.rand.Intn(9) {
	case 0, 1, 2:
		e.both(fmt.Sprintf("pwrite %s %d+%d", h.name, off, len(data)), func(_ string, i int) (err error) {
			n[i], err = unix.Pwrite(h.fds[i], data, off)
			return err
		})
	case 3:
		var got [2][]byte
		e.both(fmt.Sprintf("pread %s %d+%d", h.name, off, len(data)), func(_ string, i int) (err error) {
			got[i] = make([]byte, len(data))
			n[i], err = unix.Pread(h.fds[i], got[i], off)
			return err
		})
		if n[0] == n[1] && n[0] > 0 && !bytes.Equal(got[0][:n[0]], got[1][:n[0]]) {
			e.fail("pread %s at %d: other bytes", h.name, off)
		}
	case 4:
		e.both(fmt.Sprintf("ftruncate %s %d", h.name, off), func(_ string, i int) error { return syscall.Ftruncate(h.fds[i], off) })
	case 5:
		e.both(fmt.Sprintf("punch %s %d+%d", h.name, off, len(data)), func(_ string, i int) error {
			return unix.Fallocate(h.fds[i], unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, int64(len(data)))
		})
	case 6:
		e.both(fmt.Sprintf("fallocate %s %d+%d", h.name, off, len(data)), func(_ string, i int) error {
			return unix.Fallocate(h.fds[i], 0, off, int64(len(data)))
		})
	case 7:
		e.mapped(h, data)
	case 8:
		e.both("fsync "+h.name, func(_ string, i int) error { return syscall.Fsync(h.fds[i]) })
	}
	if n[0] != n[1] {
		e.fail("%s: %d bytes on the mount, %d on the model", e.log[len(e.log)-1], n[0], n[1])
	}
	var st [2]syscall.Stat_t
	e.both("fstat "+h.name, func(_ string, i int) error { return syscall.Fstat(h.fds[i], &st[i]) })
	if st[0].Size != st[1].Size || st[0].Nlink != st[1].Nlink || st[0].Mode != st[1].Mode {
		e.fail("after %s: size %d, %d links, mode %o; want %d, %d, %o", e.log[len(e.log)-2], st[0].Size, st[0].Nlink, st[0].Mode, st[1].Size, st[1].Nlink, st[1].Mode)
	}
}

// mapped writes through a shared mapping.
func (e *exerciser) mapped(h handles, data []byte) {
	e.t.Helper()
	var st syscall.Stat_t
	if syscall.Fstat(h.fds[1], &st) != nil || st.Size == 0 {
		return
	}
	at := e.rand.Int63n(st.Size)
	data = data[:min(int64(len(data)), st.Size-at)]
	e.both(fmt.Sprintf("mmap %s %d+%d", h.name, at, len(data)), func(_ string, i int) error {
		m, err := unix.Mmap(h.fds[i], 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		copy(m[at:], data)
		return unix.Munmap(m)
	})
}

type seen struct {
	mode   fs.FileMode
	nlink  uint64
	mtime  int64
	data   string
	target string
}

func look(t *testing.T, root string) map[string]seen {
	t.Helper()
	all := map[string]seen{}
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(p)
		if err != nil {
			return err
		}
		s := seen{mode: info.Mode()}
		st := info.Sys().(*syscall.Stat_t)
		switch {
		case info.Mode().IsRegular():
			s.nlink = uint64(st.Nlink)
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			s.data = string(b)
			if info.ModTime().Unix() < 1e9 {
				s.mtime = info.ModTime().UnixNano() // chosen by utimes
			}
		case info.Mode()&fs.ModeSymlink != 0:
			if s.target, err = os.Readlink(p); err != nil {
				return err
			}
		default:
			s.nlink = uint64(st.Nlink)
		}
		rel, _ := filepath.Rel(root, p)
		if rel != "." {
			all[rel] = s
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func (e *exerciser) compare(mount, model string) {
	e.t.Helper()
	if how := e.differ(mount, model); how != "" {
		e.fail("%s", how)
	}
}

// differ says how the mount is not like the model; "": it is.
func (e *exerciser) differ(mount, model string) string {
	e.t.Helper()
	got, want := look(e.t, mount), look(e.t, model)
	for _, p := range slices.Sorted(maps.Keys(want)) {
		g, ok := got[p]
		w := want[p]
		switch {
		case !ok:
			return fmt.Sprintf("%s is not on the mount", p)
		case g.mode != w.mode || g.nlink != w.nlink || g.target != w.target || g.mtime != w.mtime:
			return fmt.Sprintf("%s: mode %v, %d links, to %q, mtime %d; want %v, %d, %q, %d", p, g.mode, g.nlink, g.target, g.mtime, w.mode, w.nlink, w.target, w.mtime)
		case g.data != w.data:
			return fmt.Sprintf("%s: %d bytes, want %d; they differ at %d", p, len(g.data), len(w.data), differ([]byte(g.data), []byte(w.data)))
		}
		delete(got, p)
	}
	if len(got) > 0 {
		return fmt.Sprintf("on the mount, not on the model: %q", slices.Sorted(maps.Keys(got)))
	}
	return ""
}
