package replica

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/postern-dev/postern/agentd/attach/content"
	"github.com/postern-dev/postern/agentd/attach/journal"
	"github.com/postern-dev/postern/agentd/attach/remote"
	"github.com/postern-dev/postern/agentd/attach/tree"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Config is what a Replica needs.
type Config struct {
	// Dir is its directory on this host, made if it is not there. One process has it at a time.
	Dir string
	// Workspace is the name, MountID the host's UUID of this replica, the same for ever.
	Workspace string
	MountID   string
	Remote    remote.Remote
	Log       *slog.Logger
	// ReadOnly: no operation that changes anything.
	ReadOnly bool
	// CacheBytes is how much disk contents that can be fetched again may take; 0: 20 GiB.
	CacheBytes int64
	// MetadataBytes is about how much memory names and attributes may take that can be listed
	// again; 0: 48 MiB, which is about 150,000 files. Directories that nobody has used for a second are forgotten
	// beyond it, the one used longest ago first.
	MetadataBytes int64
	// MaxUnsent is how many bytes of content may wait for the control plane; beyond it,
	// writers get ENOSPC. 0: 50 GiB.
	MaxUnsent int64
	// Deadline is how long a request may wait for the control plane; 0: 20 s.
	Deadline time.Duration
	// Boot names this life of the host; empty: the kernel's.
	Boot string
	// SyncedForTest is told what is on disk for sure: so much of a journal, or, if length is
	// negative, a whole file as it is now.
	SyncedForTest func(path string, length int64)
	// NowForTest is the clock of tests that set it back and forth; nil: the host's.
	NowForTest func() time.Time
}

// maxQueue is how many operations may wait for the control plane.
const maxQueue = 1_000_000

// Replica is an open replica.
type Replica struct {
	cfg     Config
	log     *slog.Logger
	dir     os.FileInfo // Config.Dir as it was opened
	store   *content.Store
	journal *journal.Journal

	ctx    context.Context // ends at Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	kick    chan struct{} // the queue has something
	linked  chan struct{} // the control plane can be reached again
	compact chan struct{} // the journal has grown
	crowded chan struct{} // names and attributes take more than they should

	mu   sync.Mutex
	s    *tree.State
	last journal.Position
	// confirmed is where the journal says last that something was uploaded: a content is only removed from this
	// host, to be fetched again, when that is durable.
	confirmed journal.Position
	open      map[uint64]*opened
	loading   map[uint64]chan struct{}
	// lookedInto is the directory of which another one was listed last.
	lookedInto uint64
	listeners  []Listener
	queued     map[uint64]uint64 // node → number of its last SetContent in the queue
	sent       uint64            // operations up to this number are on their way
	// Handles of before a takeover may be open on these; how many is not known.
	unknown  map[uint64]bool
	redo     map[uint64]bool // files whose content the journal has
	closed   map[uint64]time.Time
	unsent   int64 // bytes of dirty contents
	readOnly bool  // by the control plane or Config
	status   Status
	unlinked time.Time // while status.Connected is false: since when, or when Open was called
	// The newest of what was kept under another name, at most maxConflicts.
	conflicts []Conflict
	cramped   time.Time     // when makeRoomLocked last found nothing
	changed   chan struct{} // closed and replaced when something in the queue moved
	stale     map[uint64]bool
	// Contents of nodes that are gone; their files go when the journal's word for it is
	// durable, so that a node that a loss of power brings back has its content.
	doomed map[uint64]bool
	// stocked: every content whose node a loss of power took away is doomed, or gone.
	stocked bool
	refused map[uint64]time.Time // contents to offer again, and when
	lru     lru
	dirs    dirs

	// maybeSent is the number of the last operation that may have been sent without an
	// answer, by this process or one before it. The uploader's alone.
	maybeSent uint64
	// attempts name the contents of those of this process; "" is more than one. The
	// uploader's alone, at most maxOps.
	attempts map[uint64]string
	// resent is the number of the last operation that repeats such a one; mu guards it.
	resent uint64

	notes  notes
	limits limits
}

// opened is a content that handles are open on.
type opened struct {
	file    *content.File
	users   int // handles, requests and uploads
	handles int
	writers int
	// Stamps of what was last made durable, unflushed if that is not known, and of what the journal knows.
	flushed, recorded int64
	// lost: opened after a takeover, for handles that were not counted.
	lost bool
}

// Listener is told what the kernel must not go on believing. Its methods may wait for
// the kernel, and are called from a goroutine that holds nothing.
type Listener interface {
	InvalEntry(parent uint64, name string)
	InvalInode(id uint64)
	// Holds tells whether the kernel may still know a node.
	Holds(id uint64) bool
	// LetGo asks the kernel to forget the only name of a node that is no directory and that nobody
	// has open. If it does, Replica.Forgotten is called, sooner or later.
	LetGo(parent uint64, name string, id uint64)
}

// Open opens a replica. The first time it needs the control plane; later it does not.
// It takes over nothing of the kernel's: see Inherit.
func Open(ctx context.Context, cfg Config) (*Replica, error) {
	if cfg.CacheBytes == 0 {
		cfg.CacheBytes = 20 << 30
	}
	if cfg.MetadataBytes == 0 {
		cfg.MetadataBytes = 48 << 20
	}
	if cfg.MaxUnsent == 0 {
		cfg.MaxUnsent = 50 << 30
	}
	if cfg.Deadline == 0 {
		cfg.Deadline = 20 * time.Second
	}
	if cfg.NowForTest == nil {
		cfg.NowForTest = time.Now
	}
	if cfg.Boot == "" {
		id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return nil, err
		}
		cfg.Boot = strings.TrimSpace(string(id))
	}
	r := &Replica{
		cfg: cfg, log: cfg.Log.With("workspace", cfg.Workspace), s: tree.New(),
		open: map[uint64]*opened{}, loading: map[uint64]chan struct{}{}, queued: map[uint64]uint64{},
		redo: map[uint64]bool{}, unknown: map[uint64]bool{}, refused: map[uint64]time.Time{}, attempts: map[uint64]string{}, closed: map[uint64]time.Time{}, doomed: map[uint64]bool{}, stale: map[uint64]bool{},
		kick: make(chan struct{}, 1), linked: make(chan struct{}, 1), compact: make(chan struct{}, 1), crowded: make(chan struct{}, 1), changed: make(chan struct{}),
		readOnly: cfg.ReadOnly, unlinked: time.Now(),
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	ccfg := content.Config{Dir: filepath.Join(cfg.Dir, "data"), Fetcher: fetcher{r}, MakeRoom: r.MakeRoom, NowForTest: cfg.NowForTest}
	if cfg.SyncedForTest != nil {
		ccfg.SyncedForTest = func(path string) { cfg.SyncedForTest(path, -1) }
	}
	store, err := content.Open(ccfg)
	if err != nil {
		return nil, err
	}
	r.store = store
	if r.dir, err = os.Stat(cfg.Dir); err != nil {
		store.Close()
		return nil, err
	}
	redo := map[uint64]redoAt{}
	r.journal, err = journal.OpenForTest(filepath.Join(cfg.Dir, "journal"), func(p []byte, at journal.Place) error {
		return r.s.Apply(p, func(id uint64, offset, length int) { redo[id] = redoAt{at, offset, length} })
	}, cfg.SyncedForTest)
	if err != nil {
		store.Close()
		return nil, fmt.Errorf("workspace %s: %w", cfg.Workspace, err)
	}
	r.last = r.journal.End()
	if err := r.recover(redo); err != nil {
		store.Close()
		return nil, errors.Join(fmt.Errorf("workspace %s: %w", cfg.Workspace, err), r.journal.Close())
	}
	if r.s.Meta().WorkspaceID == "" {
		if err := r.first(ctx); err != nil {
			store.Close()
			return nil, errors.Join(err, r.journal.Close())
		}
	}
	if q := r.s.Queue(); len(q) > 0 {
		r.maybeSent = q[len(q)-1].Number
	}
	r.notes.start(r)
	r.wg.Go(r.compactLoop)
	r.wg.Go(r.uploadLoop)
	r.wg.Go(r.watchLoop)
	r.wg.Go(r.takeStock)
	r.wg.Go(r.sweepLoop)
	r.dirs.start(r.s)
	r.wg.Go(r.trimLoop)
	r.wakeUploader()
	return r, nil
}

// first asks the control plane for the workspace.
func (r *Replica) first(ctx context.Context) error {
	resp, err := r.cfg.Remote.OpenWorkspace(ctx, &posternv1.OpenWorkspaceRequest{Name: r.cfg.Workspace, ReadOnly: r.cfg.ReadOnly, MountId: r.cfg.MountID})
	if err != nil {
		return err
	}
	if resp.ChunkSize != filechunk.Size {
		return fmt.Errorf("workspace %s has chunks of %d bytes, this agentd knows %d: upgrade the older side", r.cfg.Workspace, resp.ChunkSize, filechunk.Size)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.readOnly = r.readOnly || resp.ReadOnly
	b := r.s.Batch()
	m := r.s.Meta()
	m.WorkspaceID, m.Seq = resp.WorkspaceId, resp.Seq
	m.NextOp = resp.LastOp + 1
	m.Boot = r.cfg.Boot
	m.QuotaBytes, m.QuotaNodes, m.UsedBytes, m.UsedNodes = resp.QuotaBytes, resp.QuotaNodes, resp.UsedBytes, resp.UsedNodes
	b.Meta(m)
	if resp.Root != nil {
		n, err := fromProto(resp.Root)
		if err != nil || n.ID != tree.Root || n.Type != tree.Directory {
			return fmt.Errorf("workspace %s: the control plane's root is no directory", r.cfg.Workspace)
		}
		n.Links, n.Parent = 1, tree.Root
		b.Put(n)
	}
	return r.commitLocked(b)
}

// WorkspaceID is the control plane's name of the workspace.
func (r *Replica) WorkspaceID() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.s.Meta().WorkspaceID
}

// ReadOnly tells whether changes are refused.
func (r *Replica) ReadOnly() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.readOnly
}

// Gone tells whether the directory of the replica was removed since it was opened: it cannot be
// used any more then, and must be closed.
func (r *Replica) Gone() bool {
	now, err := os.Stat(r.cfg.Dir)
	return errors.Is(err, os.ErrNotExist) || err == nil && !os.SameFile(r.dir, now)
}

// Listen adds a Listener.
func (r *Replica) Listen(l Listener) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.listeners = append(r.listeners, l)
}

// Unlisten removes a Listener: its mount has ended.
func (r *Replica) Unlisten(l Listener) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.listeners {
		if r.listeners[i] == l {
			r.listeners = append(r.listeners[:i:i], r.listeners[i+1:]...)
			return
		}
	}
}

// Inherit says that the kernel has handles from a process before this one. Without it,
// Fresh forgets what only such handles could reach.
func (r *Replica) Inherit() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dirs.after = time.Now().Add(unknownListings)
	r.s.Each(func(n *tree.Node) {
		if n.Has(tree.Writing) || n.Has(tree.Cached) {
			r.unknown[n.ID] = true
		}
	})
}

// Fresh says that no mount was taken over: removed files that were open, answers to
// requests that may be sent again, and modes of handles are forgotten.
func (r *Replica) Fresh() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.s.ForgetReplies()
	b := r.s.Batch()
	var gone []uint64
	var again []*tree.Node
	r.s.Each(func(n *tree.Node) {
		switch {
		case n.Links == 0 && n.ID != tree.Root && n.Names == 0:
			gone = append(gone, n.ID)
		case n.Has(tree.Cached) || n.Has(tree.Writing):
			n.Flags &^= tree.Cached | tree.Writing
			again = append(again, n)
		}
	})
	for _, n := range again {
		b.Put(n)
	}
	for _, id := range gone {
		r.dropLocked(b, id)
	}
	return r.commitLocked(b)
}

// Close stops uploading, makes everything durable and gives the directory back. What is
// not uploaded stays on disk. Mounts must have ended.
func (r *Replica) Close() error {
	r.cancel()
	r.notes.stop()
	r.wg.Wait()
	r.mu.Lock()
	for _, o := range r.open {
		r.store.Release(o.file)
	}
	r.open = map[uint64]*opened{}
	r.mu.Unlock()
	r.bury()
	r.store.Close()
	return r.journal.Close()
}

// beginLocked makes sure that a change can be recorded.
func (r *Replica) beginLocked(size int) error {
	if err := r.changeableLocked(); err != nil {
		return err
	}
	return r.reserveLocked(size)
}

// beginRemovalLocked is beginLocked for a change that makes room.
func (r *Replica) beginRemovalLocked(size int) error {
	if err := r.changeableLocked(); err != nil {
		return err
	}
	if r.reserveLocked(size) == nil {
		return nil
	}
	return r.reserveLastLocked(size)
}

func (r *Replica) changeableLocked() error {
	if r.readOnly {
		return syscall.EROFS
	}
	if len(r.s.Queue()) >= maxQueue {
		return syscall.ENOSPC
	}
	return nil
}

func (r *Replica) reserveLocked(size int) error {
	return r.reserved(r.journal.Reserve(size + 4096))
}

// reserveLastLocked is reserveLocked for what makes room, or must not fail.
func (r *Replica) reserveLastLocked(size int) error {
	return r.reserved(r.journal.ReserveLast(size + 4096))
}

func (r *Replica) reserved(err error) error {
	switch {
	case err == nil:
		return nil
	case noRoom(err):
		return syscall.ENOSPC
	default:
		r.say(slog.LevelError, "journal cannot be written", "err", err)
		return syscall.EIO
	}
}

// commitLocked writes a batch to the journal.
func (r *Replica) commitLocked(b *tree.Batch) error {
	if len(b.Bytes()) == 0 {
		return nil
	}
	pos, _, err := r.journal.Append(b.Bytes())
	if err != nil {
		// Memory is ahead of the journal now, which refuses everything from here on.
		r.say(slog.LevelError, "journal cannot be written; nothing can be changed until mountd is restarted", "err", err)
		return syscall.EIO
	}
	r.last = pos
	if r.journal.Size() > compactAt {
		select {
		case r.compact <- struct{}{}:
		default:
		}
	}
	return nil
}

// sync waits until everything so far is on disk.
func (r *Replica) sync() error {
	r.mu.Lock()
	pos := r.last
	r.mu.Unlock()
	if err := r.journal.Sync(pos); err != nil {
		r.say(slog.LevelError, "journal cannot be synced", "err", err)
		return syscall.EIO
	}
	return nil
}

// wakeUploader says that the queue has something.
func (r *Replica) wakeUploader() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// wait returns ctx with the deadline of a request.
func (r *Replica) wait(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, r.cfg.Deadline)
}
