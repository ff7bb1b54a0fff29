package bucketfs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/postern-dev/postern/agentd/attach/bucket"
	"github.com/postern-dev/postern/proto"
)

// DefaultTTL is how long names, sizes and times are believed.
const DefaultTTL = 5 * time.Second

const (
	// defaultDeadline bounds a request of the kernel that needs the object store.
	defaultDeadline = 20 * time.Second
	// copyDeadline bounds a rename, whose object is copied.
	copyDeadline = 55 * time.Second
	// UploadDeadline bounds an upload at close; one that stands still ends much sooner.
	UploadDeadline = 6 * time.Hour
	// retryFirst and retryLast are the waits between attempts at what could not be uploaded.
	retryFirst = 2 * time.Second
	retryLast  = time.Minute
	// orphanTime is how long stages wait for a mount that may take them over.
	orphanTime = 30 * time.Second
)

// Config is what a Bucket needs.
type Config struct {
	// Dir is where cache and stages are; one process may use it at a time.
	Dir string
	// Name is for the log and errors.
	Name   string
	Remote bucket.Remote
	// ReadOnly refuses changes.
	ReadOnly bool
	// CacheBytes bounds the cache, MaxStaged what is staged at once, in bytes.
	CacheBytes, MaxStaged int64
	// TTL 0: DefaultTTL. Deadline 0: 20 s.
	TTL, Deadline time.Duration
	// Boot tells one life of the host from another; "": the kernel's boot id.
	Boot string
	// RetryForTest replaces retryFirst.
	RetryForTest time.Duration
	Log          *slog.Logger
}

// Bucket is an open bucket: what its mounts share. Close it once, after its file systems
// were served for the last time.
type Bucket struct {
	cfg    Config
	cache  *cache
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup
	kick   chan struct{} // a stage wants to be uploaded

	connected atomic.Bool
	lastError atomic.Pointer[string]
	hidden    atomic.Int64

	mu      sync.Mutex
	byKey   map[string]*stage // of files that have a name
	stages  map[string]*stage // all, by id
	left    map[string]*stage // of a life before, not taken over yet
	staged  int64             // bytes
	opened  time.Time
	mounted map[uint8]*FS
}

// Status is how things are.
type Status struct {
	// Unsent counts files with changes that the bucket does not have, of UnsentBytes;
	// Oldest is the oldest change.
	Unsent      int
	UnsentBytes int64
	Oldest      time.Time
	CacheBytes  int64
	Nodes       int
	// Hidden counts keys that listings came across and that cannot be files.
	Hidden    int64
	Connected bool
	LastError string
}

// Open opens the state directory; it does not reach out to the bucket.
func Open(cfg Config) (*Bucket, error) {
	if cfg.TTL == 0 {
		cfg.TTL = DefaultTTL
	}
	if cfg.Deadline == 0 {
		cfg.Deadline = defaultDeadline
	}
	if cfg.RetryForTest == 0 {
		cfg.RetryForTest = retryFirst
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Boot == "" {
		id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return nil, err
		}
		cfg.Boot = strings.TrimSpace(string(id))
	}
	if err := os.MkdirAll(filepath.Join(cfg.Dir, stagedDir), 0o700); err != nil {
		return nil, err
	}
	b := &Bucket{
		cfg: cfg, kick: make(chan struct{}, 1), byKey: map[string]*stage{}, stages: map[string]*stage{}, left: map[string]*stage{},
		opened: time.Now(), mounted: map[uint8]*FS{},
	}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.connected.Store(true)
	var err error
	if b.cache, err = openCache(filepath.Join(cfg.Dir, cacheDir), cfg.CacheBytes, b.fetch); err != nil {
		return nil, fmt.Errorf("cache of bucket %s: %w", cfg.Name, err)
	}
	if err := b.loadStages(); err != nil {
		return nil, fmt.Errorf("staged files of bucket %s: %w", cfg.Name, err)
	}
	b.wg.Go(b.work)
	return b, nil
}

// Check lists the root, once.
func (b *Bucket) Check(ctx context.Context) error {
	_, err := b.cfg.Remote.List(ctx, "", "", 1)
	b.heard(err)
	return err
}

// Fresh settles what lives before have left, where no mount of theirs goes on.
func (b *Bucket) Fresh() { b.settle(func(*stage) bool { return true }) }

// Close ends what runs. What is not uploaded stays on disk.
func (b *Bucket) Close() error {
	b.cancel()
	b.wg.Wait()
	b.cache.close()
	b.mu.Lock()
	defer b.mu.Unlock()
	var errs []error
	for _, st := range b.stages {
		errs = append(errs, st.f.Close())
	}
	for _, fs := range b.mounted {
		errs = append(errs, fs.table.close())
	}
	clear(b.mounted)
	clear(b.stages)
	return errors.Join(errs...)
}

// heard notes how a request ended, for Status.
func (b *Bucket) heard(err error) {
	switch proto.CodeOf(err) {
	case proto.CodeUnavailable, proto.CodeTimeout, proto.CodeInternal, proto.CodeSourceConfig, proto.CodeSourceCredentials:
		text := strings.Join(strings.Fields(err.Error()), " ")
		b.lastError.Store(&text)
		if b.connected.Swap(false) {
			b.cfg.Log.Warn("bucket not reachable", "bucket", b.cfg.Name, "err", err)
		}
	case proto.CodeCancelled:
	default:
		b.lastError.Store(nil)
		if !b.connected.Swap(true) {
			b.cfg.Log.Info("bucket reachable again", "bucket", b.cfg.Name)
		}
	}
}

// Status tells how things are.
func (b *Bucket) Status() Status {
	s := Status{CacheBytes: b.cache.size(), Hidden: b.hidden.Load(), Connected: b.connected.Load()}
	if text := b.lastError.Load(); text != nil {
		s.LastError = *text
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, st := range b.stages {
		if !st.rec.Dirty || st.rec.Gone {
			continue
		}
		s.Unsent++
		s.UnsentBytes += st.size
		if s.Oldest.IsZero() || st.rec.Since.Before(s.Oldest) {
			s.Oldest = st.rec.Since
		}
		if st.failure != "" {
			s.LastError = st.failure
		}
	}
	for _, fs := range b.mounted {
		s.Nodes += len(fs.nodes)
	}
	return s
}

// MaxUnsentPaths bounds Unsent.
const MaxUnsentPaths = 1000

// Unsent lists the paths of files with changes that the bucket does not have: "/" and the key below
// the prefix, sorted, MaxUnsentPaths at most.
func (b *Bucket) Unsent() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var paths []string
	for _, st := range b.stages {
		if st.rec.Dirty && !st.rec.Gone {
			paths = append(paths, "/"+st.rec.Key)
		}
	}
	slices.Sort(paths)
	return paths[:min(len(paths), MaxUnsentPaths)]
}

// Drain returns when the bucket has all that was written.
func (b *Bucket) Drain(ctx context.Context) error {
	for {
		if b.Status().Unsent == 0 {
			return nil
		}
		b.wake()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (b *Bucket) wake() {
	select {
	case b.kick <- struct{}{}:
	default:
	}
}

// status is what the kernel is told of an error.
func status(err error) fuse.Status {
	var errno syscall.Errno
	switch {
	case err == nil:
		return fuse.OK
	case errors.As(err, &errno):
		return fuse.Status(errno)
	case bucket.NotFound(err):
		return fuse.ENOENT
	case bucket.Changed(err):
		return fuse.Status(syscall.ESTALE)
	case bucket.Denied(err):
		return fuse.EACCES
	case errors.Is(err, context.Canceled):
		return fuse.EINTR
	}
	switch proto.CodeOf(err) {
	case proto.CodeInvalid:
		return fuse.EINVAL
	case proto.CodeBodyTooLarge:
		return fuse.Status(syscall.EFBIG)
	case proto.CodeStorageFull:
		return fuse.Status(syscall.ENOSPC)
	}
	return fuse.EIO
}

// request returns a context that ends after a while, or two seconds after the kernel takes
// the request back: a signal that does not kill the caller does so, too.
func request(cancel <-chan struct{}, most time.Duration) (context.Context, func()) {
	ctx, stop := context.WithTimeout(context.Background(), most)
	if cancel == nil {
		return ctx, stop
	}
	done := make(chan struct{})
	go func() {
		select {
		case <-done:
			return
		case <-cancel:
		}
		t := time.NewTimer(2 * time.Second)
		defer t.Stop()
		select {
		case <-t.C:
			stop()
		case <-done:
		}
	}()
	return ctx, func() { close(done); stop() }
}
