package replica

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"syscall"
	"time"

	"github.com/postern-dev/postern/agentd/attach/tree"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// compactAt is how far the journal grows, in bytes, before it is begun anew.
const compactAt = 64 << 20

// compactLoop begins the journal anew when it has grown.
func (r *Replica) compactLoop() {
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-r.compact:
		}
		if err := r.Compact(); err != nil {
			r.log.Warn("journal cannot be compacted; it grows on", "err", err)
			pause(r.ctx, time.Minute)
		}
	}
}

// Compact begins the journal anew with what is so now.
func (r *Replica) Compact() error {
	// Contents that only the journal has for sure must be in their files first.
	r.mu.Lock()
	synced := make(map[uint64]int64, len(r.redo))
	for id := range r.redo {
		if n := r.s.Node(id); n != nil {
			synced[id] = n.Stamp
		}
	}
	r.mu.Unlock()
	if len(synced) > 0 {
		if err := r.store.SyncAll(); err != nil {
			return err
		}
	}
	r.mu.Lock()
	var again []uint64
	for id := range r.redo {
		n := r.s.Node(id)
		if n == nil {
			delete(r.redo, id)
			continue
		}
		if stamp, ok := synced[id]; ok && stamp == n.Stamp {
			n.Flags &^= tree.Redo
			delete(r.redo, id)
		} else {
			again = append(again, id)
		}
	}
	err := r.journal.Begin(func(add func([]byte) error) error {
		if err := r.s.Dump(add); err != nil {
			return err
		}
		for _, id := range again {
			data, err := r.contentOf(id)
			if err != nil {
				return err
			}
			b := r.s.Batch()
			b.Content(id, data)
			if err := add(b.Bytes()); err != nil {
				return err
			}
		}
		return nil
	})
	r.mu.Unlock()
	if err != nil {
		return err
	}
	return r.sync()
}

// contentOf reads a small content.
func (r *Replica) contentOf(id uint64) ([]byte, error) {
	n := r.s.Node(id)
	o, err := r.openLocked(n, false)
	if err != nil {
		return nil, err
	}
	defer r.closeLocked(id, o)
	size, _, _, err := o.file.Stat()
	if err != nil {
		return nil, err
	}
	data := make([]byte, min(size, smallContent))
	_, err = o.file.ReadAt(data, 0)
	if size == 0 {
		err = nil
	}
	return data, err
}

// sweepLoop looks after what nobody waits for: the limit of the cache, files that
// are mapped, ids.
func (r *Replica) sweepLoop() {
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	r.sweep()
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-tick.C:
			r.sweep()
		}
	}
}

// bury removes the files of contents whose nodes are gone.
func (r *Replica) bury() {
	r.mu.Lock()
	doomed := slices.Collect(maps.Keys(r.doomed))
	r.mu.Unlock()
	if len(doomed) == 0 || r.sync() != nil {
		return // found again by the next Open
	}
	for _, id := range doomed {
		r.mu.Lock()
		done := r.removeLocked(id)
		r.mu.Unlock()
		done()
	}
}

// removeLocked removes a content whose node is gone, if it still is: the control plane may have listed it
// again. done must be called, without the lock.
func (r *Replica) removeLocked(id uint64) (done func()) {
	if !r.doomed[id] {
		return func() {}
	}
	delete(r.doomed, id)
	if r.s.Node(id) != nil {
		return func() {}
	}
	done, err := r.store.Unlink(id)
	if err != nil {
		r.doomed[id] = true
		r.say(slog.LevelWarn, "content cannot be removed", "node", id, "err", err)
	}
	return done
}

func (r *Replica) sweep() {
	r.bury()
	r.offerAgain(time.Now())
	r.lookAtMapped()
	r.evict()
	r.mu.Lock()
	low := r.s.Meta().FreeIDs() < lowIDs
	r.mu.Unlock()
	if low && !r.cfg.ReadOnly {
		if err := r.reserveIDs(r.ctx, fullIDs); err != nil && r.ctx.Err() == nil {
			r.log.Debug("no more ids", "err", err)
		}
	}
}

// mappedFor is how long after its last handle was closed a file that was passed through is
// looked at every other second; later it is when it is opened, evicted or fetched again.
const mappedFor = time.Hour

// lookAtMapped finds files that somebody changes by a mapping after closing them.
func (r *Replica) lookAtMapped() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, since := range r.closed {
		n := r.s.Node(id)
		if n == nil || time.Since(since) > mappedFor {
			delete(r.closed, id)
			continue
		}
		if r.open[id] == nil {
			r.settleLocked(n)
		}
	}
}

// settleLocked takes over what a mapping changed in a file that is not open.
func (r *Replica) settleLocked(n *tree.Node) {
	var st syscall.Stat_t
	if !n.Has(tree.Local) || syscall.Stat(r.store.Path(n.ID), &st) != nil || st.Ctim.Nano() == n.Stamp && uint64(st.Size) == n.Size {
		return
	}
	c := n.Clone()
	c.Size, c.Mtime, c.Stamp = uint64(st.Size), st.Mtim.Nano(), st.Ctim.Nano()
	c.Ctime = max(c.Ctime, c.Stamp)
	if r.reserveLastLocked(2048) != nil {
		return
	}
	b := r.s.Batch()
	r.dirtyLocked(b, c)
	b.Put(c)
	_ = r.commitLocked(b) //nolint:errcheck // it was logged, and nobody waits
}

// evict removes contents that can be fetched again until the rest is within the limit, and the
// disk has some room.
func (r *Replica) evict() {
	r.mu.Lock()
	defer r.mu.Unlock()
	over := r.lru.bytes - r.cfg.CacheBytes
	var st syscall.Statfs_t
	if err := syscall.Statfs(r.cfg.Dir, &st); err == nil {
		over = max(over, min(keepFree, int64(st.Blocks)*st.Bsize/20)-int64(st.Bavail)*st.Bsize)
	}
	if over > 0 {
		r.evictLocked(over)
	}
}

// keepFree is how much of its disk the cache leaves free, in bytes: this, or a twentieth of a small
// one.
const keepFree = 1 << 30

// evictLocked removes contents that can be fetched again, the one used longest ago first, until
// they were so many bytes, and tells how many they were.
func (r *Replica) evictLocked(over int64) (freed int64) {
	if r.lru.bytes == 0 {
		return 0
	}
	b := r.s.Batch()
	r.lru.oldest(func(id uint64, bytes int64) bool {
		n := r.s.Node(id)
		if n == nil {
			return true
		}
		if n.Has(tree.Mapped) {
			r.settleLocked(n)
			n = r.s.Node(id)
		}
		if r.open[id] != nil || n.Version == 0 || n.Flags&(tree.Dirty|tree.Writing|tree.Cached) != 0 || r.heldOpenLocked(id) {
			return true
		}
		if r.removeCachedLocked(id) != nil {
			return false
		}
		c := n.Clone()
		c.Flags &^= tree.Local | tree.Partial | tree.Redo | tree.Mapped
		delete(r.redo, id)
		b.Put(c)
		freed += bytes
		return freed < over
	})
	if r.reserveLastLocked(len(b.Bytes())) == nil {
		_ = r.commitLocked(b) //nolint:errcheck // it was logged, and nobody waits
	}
	return freed
}

// removeCachedLocked removes a content that can be fetched again. A loss of power must not bring back that it
// is not uploaded; so the journal is synced, which it nearly always is already.
func (r *Replica) removeCachedLocked(id uint64) error {
	if err := r.journal.Sync(r.confirmed); err != nil {
		r.say(slog.LevelError, "journal cannot be synced", "err", err)
		return syscall.EIO
	}
	if err := r.store.Remove(id); err != nil {
		r.say(slog.LevelWarn, "content cannot be removed", "node", id, "err", err)
	}
	r.lru.remove(id)
	return nil
}

// noRoom tells whether an error says that the disk is full.
func noRoom(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// MakeRoom frees so many bytes of a disk that is full, from the cache and from what was removed, and
// tells whether there is any sense in trying again what failed with ENOSPC.
func (r *Replica) MakeRoom(bytes int64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.cramped) < time.Second {
		return false // it takes a look at every content here
	}
	// Some more, so that not every write does this.
	freed := r.evictLocked(bytes + 16<<20)
	if len(r.doomed) > 0 && r.journal.Sync(r.last) == nil {
		left := 0
		for id := range r.doomed {
			r.removeLocked(id)()
			if r.doomed[id] {
				left++
			}
		}
		if left == 0 {
			return true
		}
	}
	if freed == 0 {
		r.cramped = time.Now()
	}
	return freed > 0
}

// heldOpenLocked tells whether handles of before a takeover may be open on a content.
func (r *Replica) heldOpenLocked(id uint64) bool { return len(r.unknown) > 0 && r.heldLocked(id, nil) }

// Status is what a replica has not sent, and what it keeps.
type Status struct {
	// Ops and Bytes are what the control plane has not got.
	Ops   int
	Bytes int64
	// Oldest is when the oldest of it was made; zero: there is none.
	Oldest time.Time
	// Conflicts counts what was kept under another name since the process began.
	Conflicts int
	// CacheBytes is what contents take on disk.
	CacheBytes int64
	Nodes      int
	// Connected: the control plane tells of changes. LastError says why not, or why
	// uploading stands still; empty: it does not.
	Connected bool
	LastError string
}

// Status tells how things are.
func (r *Replica) Status() Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.status
	q := r.s.Queue()
	s.Ops, s.Bytes, s.CacheBytes, s.Nodes = len(q), max(r.unsent, 0), r.lru.bytes, r.s.Len()
	if len(q) > 0 {
		s.Oldest = opTime(q[0])
	}
	return s
}

// Drain returns when everything that was made before it was called is at the control plane.
func (r *Replica) Drain(ctx context.Context) error {
	r.mu.Lock()
	until := r.s.Meta().NextOp - 1
	r.mu.Unlock()
	for {
		r.mu.Lock()
		q := r.s.Queue()
		changed, last := r.changed, r.status.LastError
		until = max(until, r.resent)
		r.mu.Unlock()
		if len(q) == 0 || q[0].Number > until {
			return nil
		}
		r.wakeUploader()
		select {
		case <-changed:
		case <-r.ctx.Done():
			return errors.New("the replica was closed")
		case <-ctx.Done():
			return fmt.Errorf("%d operations are not sent (%s): %w", len(q), last, ctx.Err())
		}
	}
}

// movedLocked wakes those who wait for the queue.
func (r *Replica) movedLocked() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// fetcher is what content calls.
type fetcher struct{ r *Replica }

// Content implements content.Fetcher.
func (f fetcher) Content(ctx context.Context, id, version uint64, each func(from, total int, size uint64, hashes [][]byte) error) ([]byte, bool, error) {
	r := f.r
	ws := r.WorkspaceID()
	r.mu.Lock()
	n := r.s.Node(id)
	small := n != nil && n.Size <= 4096
	r.mu.Unlock()
	if small {
		resp, err := r.cfg.Remote.GetNodes(ctx, &posternv1.GetNodesRequest{WorkspaceId: ws, Ids: []uint64{id}})
		if err != nil {
			return nil, false, err
		}
		for _, e := range resp.Entries {
			if e.Node.GetId() == id && e.Node.GetVersion() == version && e.Node.GetHasInline() {
				if uint64(len(e.Node.Inline)) != e.Node.GetSize() {
					return nil, false, fmt.Errorf("inline content of %d bytes for %d", len(e.Node.Inline), e.Node.GetSize())
				}
				return e.Node.Inline, true, nil
			}
		}
	}
	from := 0
	for {
		resp, err := r.cfg.Remote.GetContent(ctx, &posternv1.GetContentRequest{WorkspaceId: ws, Id: id, Version: version, From: uint64(from)})
		if err != nil {
			return nil, false, err
		}
		if resp.ChunksTotal > 1<<32 || len(resp.Chunks) == 0 && uint64(from) < resp.ChunksTotal {
			return nil, false, fmt.Errorf("content of node %d: %d chunks of %d from %d", id, len(resp.Chunks), resp.ChunksTotal, from)
		}
		if err := each(from, int(resp.ChunksTotal), resp.Size, resp.Chunks); err != nil {
			return nil, false, err
		}
		if from += len(resp.Chunks); uint64(from) >= resp.ChunksTotal {
			return nil, false, nil
		}
	}
}

// Fetch implements content.Fetcher.
func (f fetcher) Fetch(ctx context.Context, hashes [][]byte, each func(int, []byte) error) error {
	return f.r.cfg.Remote.FetchChunks(ctx, f.r.WorkspaceID(), hashes, each)
}
