package pagestore

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Options say where a store lies and what it may use.
type Options struct {
	Dir    string       // made if missing, 0700; on a file system of its own choice
	Key    Key          // the host's; without it nothing can be read again. Unused if LoadRing is set
	Logger *slog.Logger // required

	// Limit bounds what the store takes on disk, in bytes; Put refuses what would
	// not fit, with STORAGE_FULL. Zero means only the disk's size does.
	Limit int64
	// IndexChunks bounds the chunks of each organization that can be found again,
	// 40 bytes of memory each. Zero means 4 Mi: 16 GiB of distinct memory.
	IndexChunks int
	// Workers is how many goroutines hash, compress and encrypt for one Put or
	// Restore. Zero means as many as processors, at most 8.
	Workers int

	// LoadRing returns the host's keys, once, when the store is locked; SaveRing makes what
	// it is called with durable in their place before it returns. Without them there is Key
	// alone and no rotation.
	LoadRing func() (*Ring, error)
	SaveRing func(*Ring) error

	files fileSystem // tests only; nil means the disk
}

const (
	defaultIndexChunks = 4 << 20
	mostWorkers        = 8
)

// Store is an open store. Close it.
type Store struct {
	opts Options
	fs   fileSystem
	log  *slog.Logger
	lock *os.File

	used atomic.Int64 // bytes on disk, with those being written

	mu     sync.Mutex // above every orgStore.mu
	orgs   map[string]*orgStore
	closed bool
	ring   *Ring
	// rotations counts them since Open, so that it can be told what began before one.
	rotations int
	// unsure is why the ring on disk may be another than ring: then no organization is
	// added, whose chunks' hashes would depend on which one it is.
	unsure error
	busy   sync.WaitGroup // calls under way
}

// orgStore is the part of the store that belongs to one organization.
type orgStore struct {
	store *Store
	fs    fileSystem
	name  string
	dir   string
	set   atomic.Pointer[keyset]

	collecting sync.Mutex // one Collect at a time; above mu

	mu     sync.Mutex // held for memory only, never for I/O
	points map[ID]*point
	packs  map[packID]*packInfo
	byNum  []*packInfo // by packInfo.num; those gone stay as they were
	index  *index
	gc     *cycle // the collection under way, nil if none
	dirty  bool   // something was deleted since the last cycle began
}

// point is a checkpoint: stored, or being stored (then only reserved).
type point struct {
	rec     *record // nil while it is being stored, and if it is damaged
	damage  error   // why rec is nil
	storing bool
	since   int // storing: Store.rotations when it began
	// metaKey and filesKey are the keys of the ring that its files are sealed with.
	metaKey, filesKey keyID

	readers int // Restore, Export and Verify calls; it can't be deleted meanwhile
}

// packInfo is a pack as memory knows it.
type packInfo struct {
	id      packID
	num     uint32
	size    int64
	pins    int   // Puts that found chunks in it and are not committed yet
	pending bool  // of a Put that is not committed yet
	key     keyID // of the ring
	edition int   // grows whenever chunks of it are dropped

	damaged   bool // Verify said so: no new checkpoint may lean on it
	rewriting bool // its file may still list chunks that are to be dropped
}

// Open opens the store in o.Dir and clears away what a crash left behind. A damaged
// checkpoint does not keep it from opening; List shows it.
func Open(o Options) (*Store, error) {
	if o.Logger == nil || o.Dir == "" {
		return nil, errors.New("open the checkpoint store: Dir and Logger are required")
	}
	if o.IndexChunks == 0 {
		o.IndexChunks = defaultIndexChunks
	}
	if o.Workers == 0 {
		o.Workers = min(runtime.GOMAXPROCS(0), mostWorkers)
	}
	s := &Store{opts: o, fs: o.files, log: o.Logger, orgs: map[string]*orgStore{}}
	if s.fs == nil {
		s.fs = osFileSystem{}
		if err := s.takeLock(); err != nil {
			return nil, err
		}
	}
	if err := s.loadRing(); err != nil {
		s.unlock()
		return nil, err
	}
	if err := s.load(); err != nil {
		s.unlock()
		return nil, fmt.Errorf("open the checkpoint store %s: %w", o.Dir, err)
	}
	return s, nil
}

func (s *Store) loadRing() (err error) {
	if s.opts.LoadRing != nil {
		s.ring, err = s.opts.LoadRing()
	} else {
		s.ring, err = ringOf(s.opts.Key, time.Now())
	}
	return err
}

func (s *Store) takeLock() error {
	if err := os.MkdirAll(s.opts.Dir, 0o700); err != nil {
		return fmt.Errorf("open the checkpoint store: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(s.opts.Dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open the checkpoint store: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close() //nolint:errcheck // nothing was written
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("another agentd has it open (%w)", ErrInUse)
		}
		return fmt.Errorf("open the checkpoint store %s: %w", s.opts.Dir, err)
	}
	s.lock = f
	return nil
}

func (s *Store) unlock() {
	if s.lock != nil {
		s.lock.Close() //nolint:errcheck // closing gives the lock back
	}
}

// Close waits for the calls under way (cancel their contexts to be quick) and gives
// the directory back. Later calls fail.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	s.busy.Wait()
	s.unlock()
	return nil
}

// enter begins a call; the caller ends it with s.busy.Done.
func (s *Store) enter() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed
	}
	s.busy.Add(1)
	return nil
}

// Used returns what the store takes on disk, in bytes, including what is being
// written now.
func (s *Store) Used() int64 { return s.used.Load() }

// organization returns an organization's part, making it if create is set, else nil
// if there is none.
func (s *Store) organization(name string, create bool) (*orgStore, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o := s.orgs[name]; o != nil || !create {
		return o, nil
	}
	if s.unsure != nil {
		return nil, fmt.Errorf("the checkpoint key could not be saved when it was rotated: rotate it again, or restart agentd (%w)", s.unsure)
	}
	o, err := s.newOrg(name)
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{o.packDir(), o.pointDir()} {
		if err := s.fs.mkdir(dir); err != nil {
			return nil, err
		}
	}
	for _, dir := range []string{o.dir, s.opts.Dir} {
		if err := s.fs.syncDir(dir); err != nil {
			return nil, err
		}
	}
	s.orgs[name] = o
	return o, nil
}

// newOrg makes an organization's part; the caller holds mu, or is Open.
func (s *Store) newOrg(name string) (*orgStore, error) {
	set, err := s.ring.derive(name)
	if err != nil {
		return nil, err
	}
	o := &orgStore{
		store: s, fs: s.fs, name: name, dir: filepath.Join(s.opts.Dir, name),
		points: map[ID]*point{}, packs: map[packID]*packInfo{}, index: newIndex(s.opts.IndexChunks),
	}
	o.set.Store(set)
	return o, nil
}

// keyset are the organization's keys as they are now.
func (o *orgStore) keyset() *keyset { return o.set.Load() }

func (o *orgStore) packDir() string  { return filepath.Join(o.dir, "packs") }
func (o *orgStore) pointDir() string { return filepath.Join(o.dir, "checkpoints") }

// organizations returns all parts, by name.
func (s *Store) organizations() []*orgStore {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*orgStore
	for _, o := range s.orgs {
		out = append(out, o)
	}
	slices.SortFunc(out, func(a, b *orgStore) int { return cmp.Compare(a.name, b.name) })
	return out
}

// load reads the names of all packs and every checkpoint's description.
func (s *Store) load() error {
	if err := s.fs.mkdir(s.opts.Dir); err != nil {
		return err
	}
	if err := s.fs.syncDir(filepath.Dir(s.opts.Dir)); err != nil {
		return err
	}
	list, err := s.fs.readDir(s.opts.Dir)
	if err != nil {
		return err
	}
	for _, e := range list {
		if !e.dir || !plainName(e.name) {
			continue
		}
		o, err := s.newOrg(e.name)
		if err != nil {
			return err
		}
		for _, dir := range []string{o.packDir(), o.pointDir()} {
			if err := s.fs.mkdir(dir); err != nil {
				return err
			}
		}
		if err := o.load(); err != nil {
			return err
		}
		s.orgs[e.name] = o
	}
	return nil
}

func (o *orgStore) load() error {
	packs, err := o.fs.readDir(o.packDir())
	if err != nil {
		return err
	}
	for _, e := range packs {
		if strings.HasPrefix(e.name, tmpPrefix) {
			if err := o.fs.remove(filepath.Join(o.packDir(), e.name)); err != nil {
				return err
			}
			continue
		}
		if id, ok := parsePackName(e.name); ok {
			info := o.addPackLocked(id)
			info.size = e.size
			if info.key, err = o.sealerOf(filepath.Join(o.packDir(), e.name), packMagic); err != nil {
				return err
			}
			o.store.used.Add(e.size)
		}
	}
	points, err := o.fs.readDir(o.pointDir())
	if err != nil {
		return err
	}
	for _, e := range points {
		if id, ok := strings.CutSuffix(e.name, metaSuffix); ok && ID(id).valid() {
			o.store.used.Add(e.size)
			if err := o.loadPoint(ID(id)); err != nil {
				return err
			}
		}
	}
	for _, e := range points {
		id, isFiles := strings.CutSuffix(e.name, fileSuffix)
		switch {
		case strings.HasPrefix(e.name, tmpPrefix), isFiles && ID(id).valid() && o.points[ID(id)] == nil:
			if err := o.fs.remove(filepath.Join(o.pointDir(), e.name)); err != nil {
				return err
			}
		case isFiles && ID(id).valid():
			o.store.used.Add(e.size)
		}
	}
	o.dirty = len(o.packs) > 0 // a crash may have left packs that nothing refers to
	return nil
}

// loadPoint reads one description. Damage is remembered, not returned.
func (o *orgStore) loadPoint(id ID) error {
	p := &point{}
	sealed, err := readWhole(o.fs, o.metaPath(id), maxMeta)
	switch {
	case errors.Is(err, errTooLarge) || errors.Is(err, ErrDamaged):
		p.damage = damaged("the description of checkpoint %s has the wrong size", id)
	case err != nil:
		return err
	default:
		p.rec, p.metaKey, p.damage = o.unsealRecord(id, sealed)
	}
	if p.damage != nil {
		o.store.log.Error("a checkpoint is damaged", "checkpoint", id, "organization", o.name, "err", p.damage)
	}
	o.points[id] = p
	if p.filesKey, err = o.sealerOf(o.filesPath(id), filesMagic); err != nil {
		return err
	}
	return nil
}

// sealerOf reads which key sealed a file. Where the ring has one alone, it is that one; of
// a file that is missing or not ours it is none, the zero id.
func (o *orgStore) sealerOf(path, magic string) (keyID, error) {
	set := o.keyset()
	if len(set.byID) == 1 {
		return set.newest.id, nil
	}
	f, err := o.fs.open(path)
	if errors.Is(err, os.ErrNotExist) {
		return keyID{}, nil
	} else if err != nil {
		return keyID{}, err
	}
	defer f.Close() //nolint:errcheck // only read
	head := make([]byte, len(magic)+len(keyID{}))
	if err := readAt(f, head, 0); errors.Is(err, ErrDamaged) {
		return keyID{}, nil
	} else if err != nil {
		return keyID{}, err
	}
	id, bears, _, ok := sealedBy(magic, head)
	if k := set.of(id, bears); ok && k != nil {
		return k.id, nil
	}
	return keyID{}, nil
}

func (o *orgStore) metaPath(id ID) string {
	return filepath.Join(o.pointDir(), string(id)+metaSuffix)
}

func (o *orgStore) filesPath(id ID) string {
	return filepath.Join(o.pointDir(), string(id)+fileSuffix)
}

func (o *orgStore) addPackLocked(id packID) *packInfo {
	p := &packInfo{id: id, num: uint32(len(o.byNum))}
	o.packs[id] = p
	o.byNum = append(o.byNum, p)
	return p
}

// find returns the organization's part that holds id.
func (s *Store) find(id ID) (*orgStore, error) {
	for _, o := range s.organizations() {
		o.mu.Lock()
		p := o.points[id]
		there := p != nil && !p.storing
		o.mu.Unlock()
		if there {
			return o, nil
		}
	}
	return nil, notFound(id)
}

// read finds a checkpoint and keeps it from being deleted until done is called.
func (s *Store) read(id ID) (o *orgStore, rec record, done func(), err error) {
	if o, err = s.find(id); err != nil {
		return nil, rec, nil, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	p := o.points[id]
	switch {
	case p == nil || p.storing:
		return nil, rec, nil, notFound(id)
	case p.damage != nil:
		return nil, rec, nil, p.damage
	}
	p.readers++
	return o, *p.rec, func() {
		o.mu.Lock()
		p.readers--
		o.mu.Unlock()
	}, nil
}

// loadFiles reads and authenticates what a checkpoint is made of.
func (o *orgStore) loadFiles(rec *record) (*manifest, error) {
	for {
		set := o.keyset()
		plain, err := o.readFiles(set, rec)
		if errors.Is(err, errNoKey) && o.keyset() != set {
			continue // it was sealed anew meanwhile
		}
		if err != nil {
			return nil, err
		}
		m, err := decodeManifest(plain)
		if err != nil {
			return nil, damaged("%s", err)
		}
		return m, nil
	}
}

// readFiles reads what loadFiles decodes.
func (o *orgStore) readFiles(set *keyset, rec *record) ([]byte, error) {
	sealed, err := readWhole(o.fs, o.filesPath(rec.ID), maxFiles)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, errTooLarge) || errors.Is(err, ErrDamaged) {
			return nil, damaged("its list of files is missing or has the wrong size")
		}
		return nil, err
	}
	plain, _, err := set.unseal(filesMagic, o.place(rec.ID)+"\x00"+rec.Files, "its list of files", sealed)
	return plain, err
}
