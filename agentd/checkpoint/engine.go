package checkpoint

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/postern-dev/postern/agentd/checkpoint/internal/convoy"
	"github.com/postern-dev/postern/agentd/checkpoint/pagestore"
	"github.com/postern-dev/postern/proto"
)

// Kernels are the kernels of this host; package kernel has them. Errors carry codes. All
// methods but Look are called for one kernel at a time only.
type Kernels interface {
	// Look describes a kernel; NOT_FOUND if there is none.
	Look(ctx context.Context, id string) (Kernel, error)
	// Dump closes the channels to the kernel, has its memory saved into o.Images by
	// Driver.Dump, copies its private directory, and opens the channels again, or leaves
	// it stopped if o.Stay says so. On an error the kernel goes on.
	Dump(ctx context.Context, id string, o DumpOrder) (Dumped, error)
	// GoOn lets a kernel go on that Dump left stopped. It may be called twice.
	GoOn(ctx context.Context, id string) error
	// Suspend ends a kernel that Dump left stopped; what is left of it is on disk alone.
	// It is durable when it returns.
	Suspend(ctx context.Context, id, checkpoint string) error
	// Restore puts the processes of images in the place of the kernel's own, if it has
	// any. On an error before its own have ended it goes on; after, it is suspended with
	// the checkpoint.
	Restore(ctx context.Context, id string, o RestoreOrder) error
	// Fork makes a new kernel of images, for the same owner as from's. Its user is made
	// by place, which is called with it before the restore.
	Fork(ctx context.Context, id, from string, o RestoreOrder, place func(uid, gid uint32, privateDir string) error) error
}

// Kernel is what the operations need to know of a kernel.
type Kernel struct {
	ID, Organization string
	// Running: it has processes. Suspended: it has none, by intent. Held: a move holds it.
	Running, Suspended, Held bool
	// InitPID is init's process id on the host while it runs.
	InitPID int
	// Checkpoint is what its processes were restored from, at Started; empty: none.
	Checkpoint string
	Started    time.Time
	// PrivateDir is its private directory on the host. What is to take its place is put at
	// PrivateDir.new, what a fork begins with into a directory fork-ID beside it; after a
	// crash whoever has the kernels removes them.
	PrivateDir string
	UID, GID   uint32
	// Attachments are host directories by their mounts' keys: workspaces, which are
	// neither saved nor rolled back.
	Attachments map[string]string
}

// DumpOrder is what Kernels.Dump is to do.
type DumpOrder struct {
	// Images and Private are empty directories for CRIU's images and for the copy of the
	// private directory, MaxPrivate bounds the latter in bytes.
	Images, Private string
	MaxPrivate      int64
	// Stay leaves the kernel stopped.
	Stay bool
	// Wait is how long a cell that runs may go on before the kernel is saved in its midst.
	Wait time.Duration
	// Move is the move that this is for, if any.
	Move string
}

// Dumped is what a dump came to.
type Dumped struct {
	// Kernel is what package kernel needs to make it again: JSON.
	Kernel []byte
	// Busy: it was saved in the midst of a cell.
	Busy       bool
	Standstill time.Duration
}

// RestoreOrder is what Kernels.Restore and Fork are to do.
type RestoreOrder struct {
	Images string
	// Private takes the place of the private directory, by a rename; empty: it stays.
	Private string
	// Kernel is what Dumped.Kernel was.
	Kernel     []byte
	Checkpoint string
	// Move is the move that this is for, if any.
	Move string
	// Why is fork, rollback, resume or move, and SavedAt when the checkpoint was made.
	Why     string
	SavedAt time.Time
}

// Config is what an Engine works with.
type Config struct {
	// State is agentd's state directory. The store is STATE/checkpoints, its ring of keys
	// STATE/checkpoint.key (0600, made at the first start).
	State   string
	Kernels Kernels
	Driver  *Driver
	Logger  *slog.Logger
	// MaxBytes bounds the store on disk; Keep and MaxAge what is kept of each kernel,
	// beside the newest and the protected. Zero means no bound.
	MaxBytes int64
	Keep     int
	MaxAge   time.Duration
	// Memory is where images are while they are written and read: a tmpfs, unless it has
	// no room; then STATE/spool. Empty means a
	// directory of its own in /dev/shm.
	Memory string
	// Moves, Identity and Agent, this host's id, are for moves to and from other hosts;
	// without them there are none.
	Moves    Moves
	Identity Identity
	Agent    func() string
}

// Identity signs for this host and checks what other hosts of the organization signed.
type Identity = convoy.Identity

// Engine makes checkpoints and brings them back. Open it after the kernels were adopted;
// Close waits for what is under way. It is safe for concurrent use.
type Engine struct {
	cfg   Config
	store *pagestore.Store
	spool spool

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	tidy   chan struct{} // capacity 1: something was deleted

	mu   sync.Mutex
	busy map[string]string // kernel: what is done with it
	// leaving and coming are kernels that are moved, by their ids.
	leaving map[string]*leaving
	coming  map[string]*coming
}

// Open opens the store and clears away what earlier operations left behind.
func Open(c Config) (*Engine, error) {
	file := keyFile{path: filepath.Join(c.State, "checkpoint.key")}
	var err error
	if c.Memory == "" {
		sum := sha256.Sum256([]byte(c.State)) // a host may have several agentds
		c.Memory = fmt.Sprintf("/dev/shm/postern-agentd-%x", sum[:6])
	}
	e := &Engine{cfg: c, busy: map[string]string{}, leaving: map[string]*leaving{}, coming: map[string]*coming{}, tidy: make(chan struct{}, 1)}
	if e.spool, err = openSpool(c.Memory, filepath.Join(c.State, "spool"), c.Logger); err != nil {
		return nil, err
	}
	if e.store, err = pagestore.Open(pagestore.Options{Dir: filepath.Join(c.State, "checkpoints"), LoadRing: file.load, SaveRing: file.save, Limit: c.MaxBytes, Logger: c.Logger}); err != nil {
		return nil, err
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.wg.Go(e.clean)
	e.wg.Go(func() { e.spool.tidy(e.ctx) })
	if c.Moves != nil {
		if err := e.openMoves(); err != nil {
			return nil, errors.Join(err, e.Close())
		}
	}
	return e, nil
}

// Close waits for the operations under way, at most until their own deadlines.
func (e *Engine) Close() error {
	e.cancel()
	e.mu.Lock()
	for _, l := range e.leaving {
		l.giveUp.Stop()
	}
	e.mu.Unlock()
	e.wg.Wait()
	e.spool.kept.close()
	if e.spool.memory != "" {
		_ = os.Remove(e.spool.memory) // it is empty, unless something could not be removed
	}
	return e.store.Close()
}

// enter takes a kernel for an operation; the returned function gives it back.
func (e *Engine) enter(kernel, doing string) (func(), error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if what, busy := e.busy[kernel]; busy {
		return nil, proto.Errorf(proto.CodeUnavailable, "kernel %s: %s is under way: try again when it is done", kernel, what)
	}
	if e.ctx.Err() != nil {
		return nil, proto.Errorf(proto.CodeUnavailable, "agentd is being stopped")
	}
	e.busy[kernel] = doing
	e.wg.Add(1)
	return func() {
		e.mu.Lock()
		delete(e.busy, kernel)
		e.mu.Unlock()
		e.wg.Done()
	}, nil
}

// Times of collecting garbage.
const (
	collectEvery  = 15 * time.Minute
	collectBudget = 64 << 20 // bytes rewritten in one step
	collectPause  = 200 * time.Millisecond
)

// clean gives space back in small steps.
func (e *Engine) clean() {
	every := time.NewTicker(collectEvery)
	defer every.Stop()
	e.reseal() // a rotation may have been cut short, or made while no agentd ran
	for {
		select {
		case <-e.ctx.Done():
			return
		case <-e.tidy:
		case <-every.C:
			e.expireMoves()
		}
		e.collect()
		e.reseal()
	}
}

// collect frees what nothing refers to, in bounded steps.
func (e *Engine) collect() {
	for {
		s, err := e.store.Collect(e.ctx, collectBudget)
		if err != nil {
			if e.ctx.Err() == nil {
				e.cfg.Logger.Error("checkpoint store: space not given back", "err", err)
			}
			return
		}
		if s.Done {
			return
		}
		select {
		case <-e.ctx.Done():
			return
		case <-time.After(collectPause):
		}
	}
}

func (e *Engine) collectSoon() {
	select {
	case e.tidy <- struct{}{}:
	default:
	}
}
