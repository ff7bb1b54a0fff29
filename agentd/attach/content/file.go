package content

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

type unixStat = syscall.Stat_t

// ErrLost is returned when a content that only this host has is not here.
var ErrLost = errors.New("content that was not uploaded is gone from this host")

// File is a content that is open.
type File struct {
	store   *Store
	id      uint64
	version uint64
	users   int // under store.mu
	fd      *os.File

	mu       sync.Mutex
	cond     *sync.Cond // a fetch ended
	whole    bool
	chunks   *chunkMap // nil if whole, or not known yet
	checked  []bool    // chunks that this process has checked
	inFlight map[int]bool
	fetching int
	failed   map[int]error // why the last fetch of a chunk failed; taken by who waits
	changing int           // changes of the backing file on their way: Change to done
	newName  bool          // the file was made since its directory was synced
	doubt    bool          // without a map, there may be something good here

	// A content that is not here whole changes when chunks arrive, so its times say nothing:
	// while tracked, stamp is when it was last written to.
	tracked bool
	stamp   int64

	next   int // the chunk that a reader in order reads next
	window int
}

func (f *File) open(w Want) error {
	if w.New {
		f.whole = true // backing makes its file when somebody writes to it
		return nil
	}
	name := f.store.Path(w.ID)
	fd, err := os.OpenFile(name, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		if w.Size == 0 {
			f.whole = true // and it has no backing file until somebody writes to it
			return nil
		}
		if w.Changed {
			return fmt.Errorf("%w: %s", ErrLost, name)
		}
		fd, err = os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		f.newName = true
		f.whole = false
	}
	if err != nil {
		return err
	}
	f.fd = fd
	if w.Size == 0 {
		f.whole = true
		if info, err := fd.Stat(); w.Changed || err == nil && info.Size() == 0 {
			return err
		}
		return fd.Truncate(0)
	}
	if f.whole {
		return nil
	}
	m, err := openMap(f.store.mapPath(w.ID))
	switch {
	case err == nil && w.Changed:
		// Of whatever version it is: chunks that are not here are the same in all since.
		f.chunks = m
	case err == nil && m.version == w.Version:
		for i, s := range m.states[:m.chunks] {
			if s == changed {
				m.states[i] = present // sent since; checked before it is used
			}
		}
		m.states = m.states[:m.chunks]
		f.chunks = m
	case w.Changed:
		fd.Close()
		return fmt.Errorf("%w: %w", ErrLost, err)
	case err == nil:
		m.file.Close()
		fallthrough
	default:
		if f.doubt = w.Doubt; f.doubt {
			return nil // what is here is checked when the hashes are
		}
		// Nothing of that version is here.
		if err := fd.Truncate(0); err != nil {
			fd.Close()
			return err
		}
		if err := fd.Truncate(int64(w.Size)); err != nil {
			fd.Close()
			return err
		}
	}
	return nil
}

func (f *File) close() {
	if f.fd != nil {
		f.fd.Close()
	}
	if f.chunks != nil {
		f.chunks.file.Close()
	}
}

// Untouched tells whether there is no backing file yet: the content is empty.
func (f *File) Untouched() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fd == nil
}

// backing returns the backing file, which it makes if needed: empty.
func (f *File) backing() (*os.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd == nil {
		fd, err := os.OpenFile(f.store.Path(f.id), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return nil, err
		}
		f.fd, f.newName = fd, true
	}
	return f.fd, nil
}

// FD is the descriptor of the backing file, valid until the File is released. It must not be
// Untouched.
func (f *File) FD() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return int(f.fd.Fd())
}

// ReadAt and WriteAt reach the backing file; see Ensure and Change.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if f.Untouched() {
		return 0, io.EOF
	}
	return f.fd.ReadAt(p, off)
}

// WriteAt writes to the backing file.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	fd, err := f.backing()
	if err != nil {
		return 0, err
	}
	defer f.written()
	return fd.WriteAt(p, off)
}

// written notes that the content was changed here.
func (f *File) written() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stamp = max(f.store.cfg.NowForTest().UnixNano(), f.stamp+1)
}

// Untrack returns the change time of the backing file of a content that has become whole,
// which is what Stat tells from then on. ok is false if it was so before.
func (f *File) Untrack() (ctime int64, ok bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.tracked || !f.whole || f.fd == nil {
		return 0, false, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.fd.Fd()), &st); err != nil {
		return 0, false, err
	}
	f.tracked = false
	return st.Ctim.Nano(), true, nil
}

// Allocate is fallocate(2).
func (f *File) Allocate(mode uint32, off, n int64) error {
	fd, err := f.backing()
	if err != nil {
		return err
	}
	defer f.written()
	return unix.Fallocate(int(fd.Fd()), mode, off, n)
}

// Stat is the backing file's, or, for a content that is not here whole, when it was last written
// to. All is 0 for one that is Untouched.
func (f *File) Stat() (size uint64, mtime, ctime int64, err error) {
	if f.Untouched() {
		return 0, 0, 0, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(f.FD(), &st); err != nil {
		return 0, 0, 0, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.tracked {
		return uint64(st.Size), f.stamp, f.stamp, nil
	}
	return uint64(st.Size), st.Mtim.Nano(), st.Ctim.Nano(), nil
}

// Blocks is what the content takes on disk, in units of 512 bytes.
func (f *File) Blocks() uint64 {
	var st unix.Stat_t
	if f.Untouched() || unix.Fstat(f.FD(), &st) != nil {
		return 0
	}
	return uint64(st.Blocks)
}

// Whole tells whether all of it is here, and without a map.
func (f *File) Whole() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.whole
}

// Sync makes the content durable, and its name.
func (f *File) Sync() error {
	if f.Untouched() {
		return nil
	}
	if err := unix.Fdatasync(f.FD()); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.chunks != nil {
		if err := unix.Fdatasync(int(f.chunks.file.Fd())); err != nil {
			return err
		}
	}
	if f.newName || f.chunks != nil {
		d, err := os.Open(filepath.Dir(f.fd.Name()))
		if err != nil {
			return err
		}
		defer d.Close()
		if err := d.Sync(); err != nil {
			return err
		}
		f.newName = false
	}
	if tell := f.store.cfg.SyncedForTest; tell != nil {
		tell(f.fd.Name())
		if f.chunks != nil {
			tell(f.store.mapPath(f.id))
		}
	}
	return nil
}

// chunkLen is the length of a chunk of the version.
func (f *File) chunkLen(i int) int64 {
	return min(chunkSize, int64(f.chunks.size)-int64(i)*chunkSize)
}
