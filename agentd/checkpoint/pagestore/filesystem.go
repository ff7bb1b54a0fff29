package pagestore

import (
	"io"
	"os"
	"path/filepath"
)

// fileSystem is the store's own directory as it uses it; tests put one in its place
// that fails at a chosen step and forgets what was not synced.
type fileSystem interface {
	mkdir(path string) error // and its parents, 0700; no error if it is there
	create(path string) (file, error)
	open(path string) (file, error)
	rename(from, to string) error
	remove(path string) error
	syncDir(path string) error
	readDir(path string) ([]dirEntry, error)
}

// file is an open file of the store: written once from start to end, then read.
type file interface {
	io.Writer
	io.ReaderAt
	io.Closer
	Sync() error
	size() (int64, error)
}

type dirEntry struct {
	name string
	size int64
	dir  bool
}

type osFileSystem struct{}

func (osFileSystem) mkdir(path string) error { return os.MkdirAll(path, 0o700) }

func (osFileSystem) create(path string) (file, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osFileSystem) open(path string) (file, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osFileSystem) rename(from, to string) error { return os.Rename(from, to) }
func (osFileSystem) remove(path string) error     { return os.Remove(path) }

func (osFileSystem) syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}

func (osFileSystem) readDir(path string) ([]dirEntry, error) {
	list, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	out := make([]dirEntry, 0, len(list))
	for _, e := range list {
		info, err := e.Info()
		if err != nil {
			if os.IsNotExist(err) {
				continue
			}
			return nil, err
		}
		out = append(out, dirEntry{name: e.Name(), size: info.Size(), dir: e.IsDir()})
	}
	return out, nil
}

type osFile struct{ *os.File }

func (f osFile) size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// writeWhole puts data at dir/name: temporary file, sync, rename. The caller syncs
// the directory.
func writeWhole(fs fileSystem, dir, name string, data []byte) (err error) {
	tmp := filepath.Join(dir, tmpPrefix+name)
	f, err := fs.create(tmp)
	if os.IsExist(err) { // left by a failed attempt of ours: the lock is held
		if err = fs.remove(tmp); err == nil {
			f, err = fs.create(tmp)
		}
	}
	if err != nil {
		return err
	}
	if _, err = f.Write(data); err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = fs.rename(tmp, filepath.Join(dir, name))
	}
	if err != nil {
		fs.remove(tmp) //nolint:errcheck // the next Open removes it
	}
	return err
}

// readWhole reads dir/name, which must not be larger than limit bytes.
func readWhole(fs fileSystem, path string, limit int64) ([]byte, error) {
	f, err := fs.open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	n, err := f.size()
	if err != nil {
		return nil, err
	}
	if n > limit {
		return nil, errTooLarge
	}
	b := make([]byte, n)
	if _, err := f.ReadAt(b, 0); err != nil && err != io.EOF {
		return nil, err
	}
	return b, nil
}
