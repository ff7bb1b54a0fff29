package snapshot

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of what is copied; ErrTooLarge is returned beyond.
const (
	MaxEntries = 200_000
	MaxDepth   = 64
)

// ErrTooLarge is returned when a directory has more entries, levels or bytes than the
// bounds allow.
var ErrTooLarge = errors.New("the kernel's private directory is too large for a checkpoint: move files to a workspace")

// Copy is a copy in the making.
type Copy struct {
	from, to *os.Root
	max      int64
	// seen is each path as the last pass found it.
	seen  map[string]stamp
	bytes int64
}

// stamp tells whether a file is still what it was: any write or change of it moves ctime.
type stamp struct {
	inode uint64
	size  int64
	mode  fs.FileMode
	ctime unix.Timespec
}

// Stats is what a pass did.
type Stats struct {
	Entries, Copied int
	Bytes           int64 // of the files that were copied
	Shared          int   // of those: without copying their content
	Took            time.Duration
}

// New begins a copy of the directory from into the directory to, which must be empty.
// max bounds the bytes of files; zero means 16 GiB.
func New(from, to string, max int64) (*Copy, error) {
	if max <= 0 {
		max = 16 << 30
	}
	f, err := os.OpenRoot(from)
	if err != nil {
		return nil, err
	}
	t, err := os.OpenRoot(to)
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return &Copy{from: f, to: t, max: max, seen: map[string]stamp{}}, nil
}

// Close lets go of the directories; what was copied stays.
func (c *Copy) Close() {
	_ = c.from.Close()
	_ = c.to.Close()
}

// Pass makes the copy equal to the original as it finds it. Files that vanish or change
// in kind meanwhile are left to the next pass. After a pass during which nothing
// changes, both are equal.
func (c *Copy) Pass() (Stats, error) {
	began := time.Now()
	p := &pass{Copy: c, now: map[string]stamp{}}
	c.bytes = 0
	if err := p.directory(".", 0); err != nil {
		return p.stats, err
	}
	for name := range c.seen {
		if _, there := p.now[name]; !there {
			if err := c.to.RemoveAll(name); err != nil && !gone(err) {
				return p.stats, err
			}
		}
	}
	c.seen = p.now
	p.stats.Entries = len(p.now)
	p.stats.Took = time.Since(began)
	return p.stats, nil
}

type pass struct {
	*Copy
	now   map[string]stamp
	stats Stats
}

func (p *pass) directory(name string, depth int) error {
	if depth > MaxDepth {
		return ErrTooLarge
	}
	d, err := p.from.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close() //nolint:errcheck // it is only read
	for {
		entries, err := d.ReadDir(256)
		for _, e := range entries {
			if err := p.entry(path.Join(name, e.Name()), depth); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	// Its times and owner last: filling it changes them.
	info, err := d.Stat()
	if err != nil {
		return err
	}
	return p.dress(name, info)
}

// gone reports errors of a file that vanished or became another kind in between.
func gone(err error) bool {
	var pe *fs.PathError
	if errors.As(err, &pe) && pe.Err.Error() == "path escapes from parent" { // os.Root's own, unexported
		return true
	}
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENXIO)
}

func (p *pass) entry(name string, depth int) error {
	info, err := p.from.Lstat(name)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if len(p.now) >= MaxEntries {
		return ErrTooLarge
	}
	st := info.Sys().(*syscall.Stat_t)
	s := stamp{inode: st.Ino, size: info.Size(), mode: info.Mode(), ctime: unix.Timespec(st.Ctim)}
	old, known := p.seen[name]
	if known && old.mode.Type() != s.mode.Type() {
		if err := p.to.RemoveAll(name); err != nil {
			return err
		}
		known = false
	}
	switch info.Mode().Type() {
	case fs.ModeDir:
		p.now[name] = s
		if !known {
			if err := p.to.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
		}
		return p.directory(name, depth+1)
	case 0:
		if p.bytes += info.Size(); p.bytes > p.max {
			return ErrTooLarge
		}
		if known && old == s {
			p.now[name] = s
			return nil
		}
		return p.file(name)
	case fs.ModeSymlink:
		if known && old == s {
			p.now[name] = s
			return nil
		}
		target, err := p.from.Readlink(name)
		if gone(err) || errors.Is(err, unix.EINVAL) {
			return nil
		}
		if err != nil {
			return err
		}
		p.now[name] = s
		if err := p.to.RemoveAll(name); err != nil {
			return err
		}
		if err := p.to.Symlink(target, name); err != nil {
			return err
		}
		return p.to.Lchown(name, int(st.Uid), int(st.Gid))
	case fs.ModeNamedPipe:
		p.now[name] = s
		if known && old == s {
			return nil
		}
		if err := p.to.RemoveAll(name); err != nil {
			return err
		}
		return p.fifo(name, info)
	default: // sockets: CRIU binds them anew; devices can't be made by a kernel
		return nil
	}
}

// file copies a regular file. What is copied is what the descriptor shows, whatever the
// name became meanwhile.
func (p *pass) file(name string) error {
	in, err := p.from.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer in.Close() //nolint:errcheck // it is only read
	info, err := in.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return nil
	}
	st := info.Sys().(*syscall.Stat_t)
	if err := p.to.RemoveAll(name); err != nil {
		return err
	}
	out, err := p.to.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close() //nolint:errcheck // closed below when it counts
	p.stats.Copied++
	if err := unix.IoctlFileClone(int(out.Fd()), int(in.Fd())); err == nil {
		p.stats.Shared++
	} else if err := p.content(out, in, info.Size()); err != nil {
		return fmt.Errorf("copy %s: %w", name, err)
	}
	if err := out.Close(); err != nil {
		return err
	}
	p.stats.Bytes += info.Size()
	// As it was before the reading: a later change has another time.
	p.now[name] = stamp{inode: st.Ino, size: info.Size(), mode: info.Mode(), ctime: unix.Timespec(st.Ctim)}
	return p.dress(name, info)
}

// content copies up to size bytes; holes stay holes.
func (p *pass) content(out, in *os.File, size int64) error {
	if err := out.Truncate(size); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(in.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // a hole to the end
		}
		if err != nil {
			data = at
		}
		hole, err := unix.Seek(int(in.Fd()), data, unix.SEEK_HOLE)
		if err != nil || hole > size {
			hole = size
		}
		if hole <= data {
			return nil // it shrank
		}
		if _, err := in.Seek(data, io.SeekStart); err != nil {
			return err
		}
		if _, err := out.Seek(data, io.SeekStart); err != nil {
			return err
		}
		n, err := io.Copy(out, io.LimitReader(in, hole-data))
		if err != nil {
			return err
		}
		if n < hole-data {
			return nil // it shrank: the next pass sees that
		}
		at = hole
	}
	return nil
}

func (p *pass) fifo(name string, info fs.FileInfo) error {
	dir, base := path.Split(name)
	d, err := p.to.OpenFile(path.Clean("./"+dir), os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer d.Close() //nolint:errcheck // it is only read
	if err := unix.Mkfifoat(int(d.Fd()), base, 0o600); err != nil {
		return err
	}
	return p.dress(name, info)
}

// dress gives a copy its original's owner, mode and times.
func (p *pass) dress(name string, info fs.FileInfo) error {
	st := info.Sys().(*syscall.Stat_t)
	if err := p.to.Lchown(name, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	// The kernel's user can't set a set-user-id bit that matters: mounts are nosuid.
	if err := p.to.Chmod(name, info.Mode().Perm()|info.Mode()&(fs.ModeSticky|fs.ModeSetgid|fs.ModeSetuid)); err != nil {
		return err
	}
	return p.to.Chtimes(name, time.Unix(st.Atim.Sec, st.Atim.Nsec), info.ModTime())
}
