package pagestore

import (
	"errors"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
)

// faultFS is a disk in memory that knows what is on stable storage: a file's content
// as of its last sync, a directory's entries as of its last sync. Each operation that
// changes something is a step; at step failAt it fails, once (fault) or, with it, all
// that follow (crash): then reboot shows what a power cut left.
type faultFS struct {
	mu      sync.Mutex
	steps   int
	failAt  int // 0: never
	crash   bool
	fault   error
	crashed bool
	failed  string // what failed
	dirs    map[string]*memDir
}

type memDir struct {
	now, durable map[string]any // *memFile or *memDir
}

type memFile struct {
	data, durable []byte
}

var errCrashed = errors.New("the power is gone")

func newFaultFS() *faultFS { return &faultFS{dirs: map[string]*memDir{".": newMemDir()}} }

func newMemDir() *memDir { return &memDir{now: map[string]any{}, durable: map[string]any{}} }

// step counts an operation; the caller holds mu.
func (m *faultFS) step(op string) error {
	if m.crashed {
		return errCrashed
	}
	m.steps++
	if m.steps != m.failAt {
		return nil
	}
	m.failed = op
	if m.crash {
		m.crashed = true
		return errCrashed
	}
	return m.fault
}

// reboot is what a power cut leaves: what was synced, and of the rest, where r is not
// nil, whatever it likes: each changed entry or not, each unsynced file as it was, in
// part, or with zeros where its data had been.
func (m *faultFS) reboot(r *rand.Rand) *faultFS {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := newFaultFS()
	var copyDir func(path string, from *memDir)
	copyDir = func(path string, from *memDir) {
		to := newMemDir()
		n.dirs[path] = to
		entries := maps.Clone(from.durable)
		if r != nil {
			names := slices.Sorted(maps.Keys(from.now))
			names = append(names, slices.Sorted(maps.Keys(from.durable))...)
			for _, name := range names {
				if r.IntN(2) == 0 {
					if e, there := from.now[name]; there {
						entries[name] = e
					} else {
						delete(entries, name)
					}
				}
			}
		}
		for name, e := range entries {
			switch e := e.(type) {
			case *memDir:
				copyDir(filepath.Join(path, name), e)
				to.now[name], to.durable[name] = n.dirs[filepath.Join(path, name)], n.dirs[filepath.Join(path, name)]
			case *memFile:
				data := slices.Clone(e.durable)
				if r != nil && len(e.data) > len(data) && r.IntN(2) == 0 {
					data = slices.Clone(e.data[:len(data)+r.IntN(len(e.data)-len(data)+1)])
					if r.IntN(2) == 0 {
						clear(data[len(e.durable):])
					}
				}
				f := &memFile{data: data, durable: slices.Clone(data)}
				to.now[name], to.durable[name] = f, f
			}
		}
	}
	copyDir(".", m.dirs["."])
	return n
}

func (m *faultFS) dir(path string) (*memDir, error) {
	d := m.dirs[path]
	if d == nil {
		return nil, fs.ErrNotExist
	}
	return d, nil
}

func (m *faultFS) mkdir(path string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.crashed {
		return errCrashed
	}
	if m.dirs[path] != nil {
		return nil
	}
	if err := m.step("mkdir " + path); err != nil {
		return err
	}
	var missing []string
	for p := path; m.dirs[p] == nil; p = filepath.Dir(p) {
		missing = append(missing, p)
	}
	for _, p := range slices.Backward(missing) {
		d := newMemDir()
		m.dirs[p] = d
		m.dirs[filepath.Dir(p)].now[filepath.Base(p)] = d
	}
	return nil
}

func (m *faultFS) create(path string) (file, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.dir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	if d.now[filepath.Base(path)] != nil {
		return nil, fs.ErrExist
	}
	if err := m.step("create " + path); err != nil {
		return nil, err
	}
	f := &memFile{}
	d.now[filepath.Base(path)] = f
	return &openMemFile{m, f, path}, nil
}

func (m *faultFS) open(path string) (file, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.crashed {
		return nil, errCrashed
	}
	d, err := m.dir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	f, ok := d.now[filepath.Base(path)].(*memFile)
	if !ok {
		return nil, fs.ErrNotExist
	}
	return &openMemFile{m, f, path}, nil
}

func (m *faultFS) rename(from, to string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.dirs[filepath.Dir(from)]
	f := d.now[filepath.Base(from)]
	if f == nil {
		return fs.ErrNotExist
	}
	if err := m.step("rename " + to); err != nil {
		return err
	}
	delete(d.now, filepath.Base(from))
	m.dirs[filepath.Dir(to)].now[filepath.Base(to)] = f
	return nil
}

func (m *faultFS) remove(path string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.dir(filepath.Dir(path))
	if err != nil {
		return err
	}
	if d.now[filepath.Base(path)] == nil {
		return fs.ErrNotExist
	}
	if err := m.step("remove " + path); err != nil {
		return err
	}
	delete(d.now, filepath.Base(path))
	return nil
}

func (m *faultFS) syncDir(path string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.dir(path)
	if err != nil {
		return err
	}
	if err := m.step("sync " + path); err != nil {
		return err
	}
	d.durable = maps.Clone(d.now)
	return nil
}

func (m *faultFS) readDir(path string) (out []dirEntry, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.dir(path)
	if err != nil {
		return nil, err
	}
	for name, e := range d.now {
		f, isFile := e.(*memFile)
		de := dirEntry{name: name, dir: !isFile}
		if isFile {
			de.size = int64(len(f.data))
		}
		out = append(out, de)
	}
	return out, nil
}

// files are the paths of all files.
func (m *faultFS) files() (out []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for path, d := range m.dirs {
		for name, e := range d.now {
			if _, ok := e.(*memFile); ok {
				out = append(out, filepath.Join(path, name))
			}
		}
	}
	slices.Sort(out)
	return out
}

type openMemFile struct {
	m    *faultFS
	f    *memFile
	path string
}

func (o *openMemFile) Write(b []byte) (int, error) {
	o.m.mu.Lock()
	defer o.m.mu.Unlock()
	if err := o.m.step("write " + o.path); err != nil {
		n := len(b) / 2 // a write that fails may have begun
		o.f.data = append(o.f.data, b[:n]...)
		return n, err
	}
	o.f.data = append(o.f.data, b...)
	return len(b), nil
}

func (o *openMemFile) ReadAt(b []byte, off int64) (int, error) {
	o.m.mu.Lock()
	defer o.m.mu.Unlock()
	if o.m.crashed {
		return 0, errCrashed
	}
	if off >= int64(len(o.f.data)) {
		return 0, io.EOF
	}
	n := copy(b, o.f.data[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (o *openMemFile) Sync() error {
	o.m.mu.Lock()
	defer o.m.mu.Unlock()
	if err := o.m.step("fsync " + o.path); err != nil {
		return err
	}
	o.f.durable = slices.Clone(o.f.data)
	return nil
}

func (o *openMemFile) Close() error { return nil }

func (o *openMemFile) size() (int64, error) {
	o.m.mu.Lock()
	defer o.m.mu.Unlock()
	if o.m.crashed {
		return 0, errCrashed
	}
	return int64(len(o.f.data)), nil
}
