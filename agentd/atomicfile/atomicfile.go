package atomicfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// FS does the few file operations that must be durable. The zero value works.
type FS struct {
	// Fault is asked before each step, with its name ("rename cert.pem"); its
	// error ends the operation there, as a crash would. For tests; nil means none.
	Fault func(op string) error
}

func (f FS) step(op, path string) error {
	if f.Fault == nil {
		return nil
	}
	return f.Fault(op + " " + filepath.Base(path))
}

// Write replaces path by data with this mode: a temporary file beside it,
// fsync, rename, fsync of the directory.
func (f FS) Write(path string, data []byte, mode fs.FileMode) (err error) {
	if err := f.step("create", path); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".tmp-*")
	if err != nil {
		return err
	}
	faulted := false
	defer func() {
		tmp.Close() //nolint:errcheck // an error that matters was seen by Sync
		if err != nil && !faulted {
			os.Remove(tmp.Name()) //nolint:errcheck // it may be renamed already
		}
	}()
	for _, s := range []struct {
		op string
		do func() error
	}{
		{"write", func() error { _, err := tmp.Write(data); return err }},
		{"chmod", func() error { return tmp.Chmod(mode) }},
		{"fsync", tmp.Sync},
	} {
		if err := f.step(s.op, path); err != nil {
			faulted = true
			return err
		}
		if err := s.do(); err != nil {
			return fmt.Errorf("%s %s: %w", s.op, path, err)
		}
	}
	return f.Rename(tmp.Name(), path)
}

// Rename moves from to to, replacing it, and makes that durable.
func (f FS) Rename(from, to string) error {
	if err := f.step("rename", to); err != nil {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return f.SyncDir(filepath.Dir(to))
}

// Exchange puts what is at a in the place of b and makes that durable. What was
// at b, if anything, is at a afterwards.
func (f FS) Exchange(a, b string) error {
	if err := f.step("exchange", b); err != nil {
		return err
	}
	err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.ENOENT) {
		err = os.Rename(a, b)
	}
	if err != nil {
		return fmt.Errorf("exchange %s and %s: %w", a, b, err)
	}
	return f.SyncDir(filepath.Dir(b))
}

// Remove deletes path durably; that it is not there is no error.
func (f FS) Remove(path string) error {
	if err := f.step("remove", path); err != nil {
		return err
	}
	if err := os.Remove(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	return f.SyncDir(filepath.Dir(path))
}

// SyncDir makes the entries of dir durable.
func (f FS) SyncDir(dir string) error {
	if err := f.step("fsync-dir", dir); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close() //nolint:errcheck // it was only read
	return d.Sync()
}
