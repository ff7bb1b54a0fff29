package replica

import (
	"context"
	"errors"
	"log/slog"
	"syscall"
	"time"

	"github.com/postern-dev/postern/agentd/attach/content"
	"github.com/postern-dev/postern/agentd/attach/tree"
	"github.com/postern-dev/postern/proto/filechunk"
)

// fetchToWrite is how much of a file may be missing for it to be fetched whole when it
// is opened for writing; then the kernel writes to it directly.
const fetchToWrite = 16 << 20

// openLocked adds a user to a content.
func (r *Replica) openLocked(n *tree.Node, write bool) (*opened, error) {
	return r.openNodeLocked(n, write, false)
}

// openNodeLocked is openLocked; made: the node was made just now.
func (r *Replica) openNodeLocked(n *tree.Node, write, made bool) (*opened, error) {
	o := r.open[n.ID]
	if o == nil {
		w := content.Want{New: made, ID: n.ID, Version: n.Version, Size: n.Size, Whole: n.Has(tree.Local), Changed: n.Has(tree.Dirty) || n.Version == 0, Stamp: n.Stamp}
		f, err := r.store.Acquire(w)
		if err != nil {
			r.say(slog.LevelError, "content cannot be opened", "node", n.ID, "err", err)
			return nil, errnoOrIO(err)
		}
		if w.Whole && !n.Has(tree.Dirty) && !n.Has(tree.Writing) && n.Version != 0 {
			if size, _, ctime, err := f.Stat(); err == nil && (ctime != n.Stamp || size != n.Size) && !n.Has(tree.Mapped) {
				// Nobody was to write to it, and somebody did: check it against its hashes.
				r.log.Warn("a cached file was changed behind our back; checking it", "node", n.ID)
				r.store.Release(f)
				w.Whole, w.Doubt = false, true
				if f, err = r.store.Acquire(w); err != nil {
					r.say(slog.LevelError, "content cannot be opened", "node", n.ID, "err", err)
					return nil, errnoOrIO(err)
				}
			}
		}
		if n.Has(tree.Local) && !f.Whole() {
			n.Flags &^= tree.Local // its file is gone, or in doubt; it is fetched again
		}
		o = &opened{file: f, flushed: n.Stamp, recorded: n.Stamp}
		if n.Has(tree.Dirty) {
			// Its last change may have been noted by a process before this one, or by nobody's close.
			o.flushed = unflushed
		}
		if n.Flags&(tree.Local|tree.Partial) == 0 {
			n.Flags |= tree.Partial // in the journal with the next change; Walk finds it anyway
		}
		r.open[n.ID] = o
	}
	o.users++
	if write {
		o.writers++
	}
	r.lru.use(n.ID)
	return o, nil
}

// unflushed is the stamp of no content.
const unflushed = -1

func errnoOrIO(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) && (errno == syscall.ENOSPC || errno == syscall.EDQUOT || errno == syscall.EMFILE || errno == syscall.ENFILE) {
		return errno
	}
	return syscall.EIO
}

// closeLocked takes a user from a content.
func (r *Replica) closeLocked(id uint64, o *opened) {
	if o.users--; o.users > 0 || o.lost && r.unknown[id] || r.open[id] != o {
		return
	}
	if n := r.s.Node(id); n != nil && n.Type == tree.File {
		r.wholeLocked(n, o)
		r.lru.add(id, int64(o.file.Blocks())*512)
	}
	delete(r.open, id)
	r.store.Release(o.file)
	if r.stale[id] {
		r.wakeUploader()
	}
}

// wholeLocked notes that a content has become whole.
func (r *Replica) wholeLocked(n *tree.Node, o *opened) {
	if n.Has(tree.Local) || !o.file.Whole() {
		return
	}
	before, _, stamp, err := o.file.Stat()
	if err != nil {
		return
	}
	if stamp != n.Stamp || before != n.Size {
		n.Size, n.Mtime, n.Stamp = before, stamp, stamp
		n.Ctime = max(n.Ctime, stamp)
	}
	// From here on the backing file's times say when it was written to.
	ctime, ok, err := o.file.Untrack()
	if err != nil {
		return
	}
	c := n.Clone()
	c.Flags = c.Flags&^tree.Partial | tree.Local
	if ok {
		for _, at := range []*int64{&o.flushed, &o.recorded} {
			if *at == n.Stamp {
				*at = ctime
			}
		}
		c.Stamp = ctime
	}
	if r.reserveLastLocked(1024) != nil {
		return
	}
	b := r.s.Batch()
	b.Put(c)
	_ = r.commitLocked(b) //nolint:errcheck // it was logged; the content is fetched again
}

// Opened is what Open tells.
type Opened struct {
	// FD is the backing file's, valid until Release; -1: it is empty and has none yet.
	FD int
	// Whole: the kernel may read and write FD directly.
	Whole bool
	Size  uint64
	// Cached: handles of before are not passed through, so this one must not be.
	Cached bool
}

// Open opens a file. Each Open must be followed by one Release.
func (r *Replica) Open(ctx context.Context, id uint64, write, truncate bool) (Opened, error) {
	if truncate {
		if err := r.truncate(ctx, id, 0); err != nil {
			return Opened{}, err
		}
	}
	r.mu.Lock()
	n := r.s.Node(id)
	switch {
	case n == nil:
		r.mu.Unlock()
		return Opened{}, syscall.ESTALE
	case n.Type != tree.File:
		r.mu.Unlock()
		return Opened{}, syscall.EISDIR
	}
	if write {
		if err := r.beginLocked(1024); err != nil {
			r.mu.Unlock()
			return Opened{}, err
		}
		if err := r.unsentLocked(); err != nil {
			r.mu.Unlock()
			return Opened{}, err
		}
	}
	o, err := r.openLocked(n, write)
	if err == nil {
		o.handles++
	}
	r.mu.Unlock()
	if err != nil {
		return Opened{}, err
	}
	if !o.file.Whole() && (n.Size <= filechunk.Size || write && n.Size <= fetchToWrite) {
		// Small: it is wanted whole anyway.
		wctx, cancel := r.wait(ctx)
		err := r.retry(wctx, func() error { return o.file.EnsureAll(wctx) })
		cancel()
		if err != nil {
			r.mu.Lock()
			if write {
				o.writers--
			}
			o.handles--
			r.closeLocked(id, o)
			r.mu.Unlock()
			return Opened{}, r.fetchErrno(ctx, id, err)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if n = r.s.Node(id); n == nil {
		return Opened{}, syscall.ESTALE
	}
	r.wholeLocked(n, o)
	n = r.s.Node(id)
	opened := Opened{FD: -1, Size: n.Size, Cached: n.Has(tree.Cached) && r.unknown[id]}
	if !o.file.Untouched() {
		opened.FD, opened.Whole = o.file.FD(), o.file.Whole()
	}
	return opened, nil
}

// Mode says how a file that was opened will be read and written, before the kernel hears
// that it is open: through the daemon, or passed through.
func (r *Replica) Mode(id uint64, write, through bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.s.Node(id)
	if n == nil {
		return syscall.ESTALE
	}
	flags := n.Flags
	if write {
		flags |= tree.Writing
		if through {
			flags |= tree.Mapped
		}
	}
	if !through {
		flags |= tree.Cached
	}
	if flags == n.Flags {
		return nil
	}
	c := n.Clone()
	c.Flags = flags
	if err := r.reserveLocked(1024); err != nil {
		return err
	}
	b := r.s.Batch()
	b.Put(c)
	return r.commitLocked(b)
}

// Release gives back what Open gave. A file that was written to since its last Flush is
// recorded, but nobody waits for the disk.
func (r *Replica) Release(id uint64, write bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	o := r.open[id]
	if o == nil || o.handles == 0 {
		// A handle of before a takeover, which is one of those that nobody counts.
		if n := r.s.Node(id); write && n != nil && n.Type == tree.File && r.unknown[id] {
			if o, err := r.lostLocked(n); err == nil {
				r.releaseWriterLocked(n, o)
			}
		}
		return
	}
	if o.handles > 0 {
		o.handles--
	}
	n := r.s.Node(id)
	if n != nil && write && n.Type == tree.File {
		if o.writers > 0 {
			o.writers--
		}
		r.releaseWriterLocked(n, o)
	}
	n = r.s.Node(id)
	if n != nil && o.handles == 0 && n.Has(tree.Cached) && !r.unknown[id] {
		c := n.Clone()
		c.Flags &^= tree.Cached
		b := r.s.Batch()
		b.Put(c)
		_ = r.commitLocked(b) //nolint:errcheck // it was logged, and nobody waits
	}
	r.closeLocked(id, o)
}

func (r *Replica) releaseWriterLocked(n *tree.Node, o *opened) {
	o2 := *o
	o2.writers = 1
	if err := r.absorbLocked(n, &o2); err != nil {
		return
	}
	c := n.Clone()
	b := r.s.Batch()
	if n.Stamp != o.recorded {
		r.dirtyLocked(b, c)
		o.recorded = n.Stamp
	}
	if o.writers == 0 && !r.unknown[n.ID] {
		c.Flags &^= tree.Writing
		if c.Has(tree.Mapped) {
			r.closed[c.ID] = time.Now()
		}
		if o.handles == 0 {
			c.Flags &^= tree.Cached
		}
	}
	if r.reserveLastLocked(2048) != nil {
		return
	}
	b.Put(c)
	_ = r.commitLocked(b) //nolint:errcheck // it was logged, and nobody waits
}

// useLocked finds the content of an open file; of one that was opened before a takeover,
// too.
func (r *Replica) use(id uint64) (*opened, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.s.Node(id)
	switch {
	case n == nil:
		return nil, syscall.ESTALE
	case n.Type != tree.File:
		return nil, syscall.EISDIR
	}
	o, err := r.lostLocked(n)
	if err != nil {
		return nil, err
	}
	o.users++
	return o, nil
}

// lostLocked finds the content of a file, which it opens if only handles of before a takeover
// are open on it. It stays open until the kernel forgets the node.
func (r *Replica) lostLocked(n *tree.Node) (*opened, error) {
	o := r.open[n.ID]
	if o != nil {
		return o, nil
	}
	o, err := r.openLocked(n, false)
	if err != nil {
		return nil, err
	}
	o.users--
	o.lost = true
	return o, nil
}

func (r *Replica) unuse(id uint64, o *opened) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closeLocked(id, o)
}
