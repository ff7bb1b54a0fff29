package content

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/proto/filechunk"
)

// Fetcher is the part of a Remote that contents come from.
type Fetcher interface {
	// Content tells a version's size and calls each with the hashes of its chunks, in
	// order; inline content instead if it has it.
	Content(ctx context.Context, id, version uint64, each func(from, total int, size uint64, hashes [][]byte) error) (inline []byte, isInline bool, err error)
	Fetch(ctx context.Context, hashes [][]byte, each func(i int, content []byte) error) error
}

// Config is what a Store needs.
type Config struct {
	// Dir is made if it is not there.
	Dir     string
	Fetcher Fetcher
	// MakeRoom is asked for so many bytes when the disk is full, without a lock, and tells whether to
	// try again; optional.
	MakeRoom func(bytes int64) bool
	// ReadAhead is the most chunks that are fetched ahead of a reader; 0: 32.
	ReadAhead int
	// SyncedForTest is told which files are on disk as they are now.
	SyncedForTest func(path string)
	// NowForTest is the clock of tests that set it back and forth; nil: the host's.
	NowForTest func() time.Time
}

// streams is how many fetches are on their way at once in a store.
const streams = 4

// Store keeps contents.
type Store struct {
	cfg Config

	ctx    context.Context // ends at Close
	cancel context.CancelFunc
	wg     sync.WaitGroup
	slots  chan struct{}

	mu    sync.Mutex
	files map[uint64]*File // those in use
}

// Open opens the store in cfg.Dir.
func Open(cfg Config) (*Store, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	for i := range 256 {
		err := os.Mkdir(filepath.Join(cfg.Dir, fmt.Sprintf("%02x", i)), 0o700)
		if err != nil && !errors.Is(err, os.ErrExist) {
			return nil, err
		}
	}
	if cfg.NowForTest == nil {
		cfg.NowForTest = time.Now
	}
	if cfg.ReadAhead == 0 {
		cfg.ReadAhead = 32
	}
	s := &Store{cfg: cfg, files: map[uint64]*File{}, slots: make(chan struct{}, streams)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// Close ends what is on its way, and waits for it. Files must have been released.
func (s *Store) Close() {
	s.cancel()
	s.wg.Wait()
}

// Path is where a node's content lies.
func (s *Store) Path(id uint64) string {
	return filepath.Join(s.cfg.Dir, fmt.Sprintf("%02x", byte(id)), strconv.FormatUint(id, 16))
}

func (s *Store) mapPath(id uint64) string { return s.Path(id) + ".map" }

// Remove removes a content, of which no File is in use.
func (s *Store) Remove(id uint64) error {
	err := os.Remove(s.Path(id))
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	if merr := os.Remove(s.mapPath(id)); merr != nil && !errors.Is(merr, os.ErrNotExist) {
		err = errors.Join(err, merr)
	}
	return err
}

// Exists tells whether something lies in the store under a node's id, be it half of a content.
func (s *Store) Exists(id uint64) bool { return exists(s.Path(id)) || exists(s.mapPath(id)) }

// Unlink is Remove in two steps: it takes the names away, and done gives back what the content takes on
// disk, which may take long. A lock may be held for the first.
func (s *Store) Unlink(id uint64) (done func(), err error) {
	done = func() {}
	if f, err := os.Open(s.Path(id)); err == nil {
		done = func() { f.Close() } // until then the inode is there
	}
	return done, s.Remove(id)
}

// ForgetMap forgets which chunks of a content are here.
func (s *Store) ForgetMap(id uint64) { _ = os.Remove(s.mapPath(id)) }

// Walk calls each for every content in the store, with the bytes it takes on disk. Contents may be
// used, made and removed meanwhile.
func (s *Store) Walk(each func(id uint64, bytes int64) error) error {
	for i := range 256 {
		dir := filepath.Join(s.cfg.Dir, fmt.Sprintf("%02x", i))
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			name, isMap := strings.CutSuffix(e.Name(), ".map")
			id, err := strconv.ParseUint(name, 16, 64)
			if err != nil {
				s.removeHalf(dir, e.Name())
				continue
			}
			info, err := e.Info()
			if errors.Is(err, os.ErrNotExist) {
				continue // removed meanwhile
			}
			if err != nil {
				return err
			}
			if isMap && exists(filepath.Join(dir, name)) {
				continue
			}
			if err := each(id, info.Sys().(*unixStat).Blocks*512); err != nil {
				return err
			}
		}
	}
	return nil
}

// removeHalf removes half of a map: a process ended before it counted. One that is being made belongs
// to a content in use.
func (s *Store) removeHalf(dir, name string) {
	hex, ok := strings.CutSuffix(name, ".map.new")
	id, err := strconv.ParseUint(hex, 16, 64)
	if !ok || err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.files[id] == nil {
		_ = os.Remove(filepath.Join(dir, name))
	}
}

func exists(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}

// SyncAll makes everything in the store durable.
func (s *Store) SyncAll() error {
	d, err := os.Open(s.cfg.Dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil || s.cfg.SyncedForTest == nil {
		return err
	}
	return s.Walk(func(id uint64, _ int64) error {
		s.cfg.SyncedForTest(s.Path(id))
		return nil
	})
}

// Want is what a replica knows of the content it asks for.
type Want struct {
	ID      uint64
	Version uint64
	Size    uint64
	// Whole: the content lies here whole; else a map is or will be made.
	Whole bool
	// Changed: it is newer than Version. What is not here then is an error, not a
	// reason to fetch.
	Changed bool
	// Stamp is where Stat begins to count for a content that is not here whole.
	Stamp int64
	// Doubt: what lies here must be checked before it is used.
	Doubt bool
	// New: it was made just now and is empty; nothing lies here under its id.
	New bool
}

// Acquire opens a content, or adds a user to the one that is open. Each must be
// released. It does not fetch anything.
func (s *Store) Acquire(w Want) (*File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.files[w.ID]; f != nil {
		f.users++
		return f, nil
	}
	f := &File{store: s, id: w.ID, version: w.Version, users: 1, whole: w.Whole}
	f.cond = sync.NewCond(&f.mu)
	f.stamp = w.Stamp
	if err := f.open(w); err != nil {
		return nil, err
	}
	f.tracked = !f.whole
	s.files[w.ID] = f
	return f, nil
}

// MapChanged tells whether chunks of a content that is not here whole were written to here.
// It must not be in use.
func (s *Store) MapChanged(id uint64) bool {
	m, err := openMap(s.mapPath(id))
	if err != nil {
		return false
	}
	defer m.file.Close()
	return bytes.IndexByte(m.states, changed) >= 0
}

// InUse finds a content that somebody uses; it adds no user.
func (s *Store) InUse(id uint64) *File {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.files[id]
}

// Release gives a File back. It is closed when nobody uses it and nothing is on its way.
func (s *Store) Release(f *File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f.users--
	s.closeIdleLocked(f)
}

func (s *Store) closeIdleLocked(f *File) {
	f.mu.Lock()
	idle := f.users == 0 && f.fetching == 0 && s.files[f.id] == f
	f.mu.Unlock()
	if idle {
		delete(s.files, f.id)
		f.close()
	}
}

func (s *Store) fetched(f *File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closeIdleLocked(f)
}

// chunkSize is filechunk.Size as int64.
const chunkSize = int64(filechunk.Size)

// Chunks is how many chunks a content of size bytes has.
func Chunks(size uint64) int { return int((size + uint64(chunkSize) - 1) / uint64(chunkSize)) }
