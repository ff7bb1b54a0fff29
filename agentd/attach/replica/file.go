package replica

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/attach/tree"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// smallContent is the largest content in bytes that a Flush puts into the journal, so that it
// costs one sync and not two.
const smallContent = 32 << 10

// fetchErrno is what a reader gets when content did not come. ctx is the request's own: that it ended
// means that the reader was interrupted.
func (r *Replica) fetchErrno(ctx context.Context, id uint64, err error) error {
	if ctx.Err() != nil && errors.Is(context.Cause(ctx), context.Canceled) {
		return syscall.EINTR
	}
	var errno syscall.Errno
	if errors.As(err, &errno) && errno == syscall.ENOSPC {
		r.say(slog.LevelWarn, "content cannot be fetched", "node", id, "err", err)
		return errno
	}
	return r.refuse("content cannot be fetched", id, err)
}

// dirtyLocked marks a content as newer than its version, and queues it unless it is
// queued already. c is not in the state yet.
func (r *Replica) dirtyLocked(b *tree.Batch, c *tree.Node) {
	if !c.Has(tree.Dirty) {
		c.Flags |= tree.Dirty
		r.unsent += int64(c.Size)
	}
	if c.Links == 0 {
		return // it goes with its name, or never
	}
	if number, ok := r.queued[c.ID]; ok && number > r.sent {
		return
	}
	op := tree.Op{ID: c.ID, Content: true}
	r.queued[c.ID] = r.s.Meta().NextOp
	r.enqueueLocked(b, op, &posternv1.FileOp{Op: &posternv1.FileOp_SetContent_{SetContent: &posternv1.FileOp_SetContent{Id: c.ID}}})
}

// Read returns the descriptor to read n bytes at off from, when they are there, or -1: the
// file is empty. done must be called after reading.
func (r *Replica) Read(ctx context.Context, id uint64, off int64, n int) (fd int, done func(), err error) {
	o, err := r.use(id)
	if err != nil {
		return 0, nil, err
	}
	if !o.file.Whole() {
		wctx, cancel := r.wait(ctx)
		err := r.retry(wctx, func() error { return o.file.Ensure(wctx, off, int64(n)) })
		cancel()
		if err != nil {
			r.unuse(id, o)
			return 0, nil, r.fetchErrno(ctx, id, err)
		}
	}
	fd = -1
	if !o.file.Untouched() {
		fd = o.file.FD()
	}
	return fd, func() { r.unuse(id, o) }, nil
}

// ReadHere gives the descriptor of an open file if all n bytes at off are here and nothing has to be
// waited for; until done is called, if ok.
func (r *Replica) ReadHere(id uint64, off int64, n int) (fd int, done func(), ok bool) {
	o, err := r.use(id)
	if err != nil {
		return 0, nil, false
	}
	if o.file.Whole() && !o.file.Untouched() {
		if size, _, _, err := o.file.Stat(); err == nil && off >= 0 && uint64(off)+uint64(n) <= size {
			return o.file.FD(), func() { r.unuse(id, o) }, true
		}
	}
	r.unuse(id, o)
	return 0, nil, false
}

// Short tells whether a file should have had bytes at off, where none were read: its content
// was cut off behind our back. The kernel must get an error then, or it would ask for ever.
func (r *Replica) Short(id uint64, off int64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	n, err := r.nodeLocked(id)
	if err != nil || uint64(off) >= n.Size {
		return false
	}
	_ = r.refuse("content is shorter on this host's disk than it was", id, fmt.Errorf("it ends at byte %d of %d", off, n.Size))
	return true
}

// ReadFailed notes why bytes of a file that are here could not be read.
func (r *Replica) ReadFailed(id uint64, err error) { _ = r.refuse("content cannot be read", id, err) }

// Write writes to an open file.
func (r *Replica) Write(ctx context.Context, id uint64, off int64, data []byte) (int, error) {
	if off < 0 || uint64(off)+uint64(len(data)) > filechunk.MaxFile {
		return 0, syscall.EFBIG
	}
	o, err := r.use(id)
	if err != nil {
		return 0, err
	}
	defer r.unuse(id, o)
	done, err := r.change(ctx, id, o, off, int64(len(data)))
	if err != nil {
		return 0, err
	}
	defer done()
	n, err := o.file.WriteAt(data, off)
	if noRoom(err) && n == 0 && r.MakeRoom(int64(len(data))) {
		n, err = o.file.WriteAt(data, off)
	}
	if err != nil {
		return n, errnoOrIO(err)
	}
	r.notes.otherData(id)
	return n, nil
}

// change prepares a content for being written to; done must be called when it was.
func (r *Replica) change(ctx context.Context, id uint64, o *opened, off, n int64) (done func(), err error) {
	r.mu.Lock()
	err = r.unsentLocked()
	node := r.s.Node(id)
	if err == nil && node != nil && uint64(off+n) > node.Size {
		// What was written since the last flush is not counted anywhere else.
		err = r.quotaLocked(uint64(off+n)-node.Size, 0)
	}
	if err == nil && node != nil && !node.Has(tree.Writing) {
		// A handle of before a takeover, or one that only allocates.
		c := node.Clone()
		c.Flags |= tree.Writing
		b := r.s.Batch()
		b.Put(c)
		if err = r.reserveLocked(1024); err == nil {
			err = r.commitLocked(b)
		}
	}
	r.mu.Unlock()
	if err != nil {
		return nil, err
	}
	wctx, cancel := r.wait(ctx)
	defer cancel()
	err = r.retry(wctx, func() (err error) {
		done, err = o.file.Change(wctx, off, n)
		return err
	})
	if err != nil {
		return nil, r.fetchErrno(ctx, id, err)
	}
	return done, nil
}

// Flush records what was written to a file, and returns when it is durable; at once if
// nothing was.
func (r *Replica) Flush(id uint64) error { return r.flush(id, false) }

// Fsync is Flush, and makes everything else about the file durable.
func (r *Replica) Fsync(id uint64) error { return r.flush(id, true) }

// FsyncDir makes every change of names and attributes durable.
func (r *Replica) FsyncDir() error { return r.sync() }

func (r *Replica) flush(id uint64, always bool) error {
	r.mu.Lock()
	n := r.s.Node(id)
	o := r.open[id]
	if n != nil && o == nil && r.unknown[id] {
		var err error
		if o, err = r.lostLocked(n); err != nil {
			r.mu.Unlock()
			return err
		}
	}
	if n == nil || n.Type != tree.File || o == nil {
		r.mu.Unlock()
		if always {
			return r.sync()
		}
		return nil
	}
	if err := r.absorbLocked(n, o); err != nil {
		r.mu.Unlock()
		return err
	}
	if n.Stamp == o.flushed {
		r.mu.Unlock()
		if always {
			return r.sync()
		}
		return nil
	}
	small := n.Size <= smallContent && o.file.Whole()
	if small {
		err := r.recordLocked(n, o, true)
		r.mu.Unlock()
		if err != nil {
			return err
		}
		return r.sync()
	}
	o.users++
	r.mu.Unlock()
	defer r.unuse(id, o)
	if err := o.file.Sync(); err != nil {
		r.log.Error("content cannot be synced", "node", id, "err", err)
		return errnoOrIO(err)
	}
	r.mu.Lock()
	if n = r.s.Node(id); n == nil {
		r.mu.Unlock()
		return nil
	}
	err := r.recordLocked(n, o, false)
	r.mu.Unlock()
	if err != nil {
		return err
	}
	return r.sync()
}

// recordLocked writes to the journal what a file is now, with its content or without.
func (r *Replica) recordLocked(n *tree.Node, o *opened, small bool) error {
	if err := r.reserveLocked(smallContent + 4096); err != nil {
		return err
	}
	c := n.Clone()
	b := r.s.Batch()
	if n.Stamp != o.recorded {
		r.dirtyLocked(b, c)
	}
	if small {
		data := make([]byte, n.Size)
		if _, err := o.file.ReadAt(data, 0); err != nil && n.Size > 0 {
			return r.refuse("content cannot be read", n.ID, err)
		}
		c.Flags |= tree.Redo
		r.redo[n.ID] = true
		b.Content(n.ID, data)
	} else {
		c.Flags &^= tree.Redo
		delete(r.redo, n.ID)
	}
	b.Put(c)
	o.flushed, o.recorded = c.Stamp, c.Stamp
	return r.commitLocked(b)
}

// truncate sets the size of a file.
func (r *Replica) truncate(ctx context.Context, id, size uint64) error {
	if size > filechunk.MaxFile {
		return syscall.EFBIG
	}
	r.mu.Lock()
	n := r.s.Node(id)
	switch {
	case n == nil:
		r.mu.Unlock()
		return syscall.ESTALE
	case n.Type == tree.Directory:
		r.mu.Unlock()
		return syscall.EISDIR
	case n.Type != tree.File:
		r.mu.Unlock()
		return syscall.EINVAL
	}
	begin := r.beginLocked
	if size < n.Size {
		begin = r.beginRemovalLocked
	}
	if err := begin(2048); err != nil {
		r.mu.Unlock()
		return err
	}
	if size > n.Size {
		if err := r.quotaLocked(size-n.Size, 0); err != nil {
			r.mu.Unlock()
			return err
		}
	}
	o, err := r.openLocked(n, true)
	if err == nil && !n.Has(tree.Writing) {
		c := n.Clone()
		c.Flags |= tree.Writing
		b := r.s.Batch()
		b.Put(c)
		err = r.commitLocked(b)
	}
	r.mu.Unlock()
	if err != nil {
		return err
	}
	wctx, cancel := r.wait(ctx)
	defer cancel()
	err = r.retry(wctx, func() error { return o.file.Truncate(wctx, int64(size)) })
	r.mu.Lock()
	defer r.mu.Unlock()
	o.writers--
	if n := r.s.Node(id); n != nil {
		if err == nil {
			// truncate(2) to the same size changes the times, too.
			if s, _, ctime, serr := o.file.Stat(); serr == nil && s == n.Size && ctime == n.Stamp {
				r.modifiedLocked(n)
			}
		}
		r.releaseWriterLocked(n, o)
	}
	r.closeLocked(id, o)
	if err != nil {
		return r.fetchErrno(ctx, id, err)
	}
	r.notes.node(id)
	return nil
}

// modifiedLocked gives a file new times whose content is what it was.
func (r *Replica) modifiedLocked(n *tree.Node) {
	now := r.now(n.Ctime)
	n.Mtime, n.Ctime = now, now
	if n.Links == 0 {
		return
	}
	b := r.s.Batch()
	b.Put(n)
	delete(r.queued, n.ID)
	r.enqueueLocked(b, tree.Op{ID: n.ID}, &posternv1.FileOp{Op: &posternv1.FileOp_SetAttr_{SetAttr: &posternv1.FileOp_SetAttr{Id: n.ID, MtimeNs: &now}}})
	_ = r.commitLocked(b) //nolint:errcheck // it was logged, and the journal refuses what follows
}

// Fallocate is fallocate(2) of an open file: allocation, punching holes and zeroing.
func (r *Replica) Fallocate(ctx context.Context, id uint64, mode uint32, off, n int64) error {
	const known = unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_ZERO_RANGE
	if mode&^known != 0 {
		return syscall.EOPNOTSUPP
	}
	if uint64(off)+uint64(n) > filechunk.MaxFile {
		return syscall.EFBIG
	}
	o, err := r.use(id)
	if err != nil {
		return err
	}
	defer r.unuse(id, o)
	done, err := r.change(ctx, id, o, off, n)
	if err != nil {
		return err
	}
	defer done()
	if err := o.file.Allocate(mode, off, n); err != nil {
		return err
	}
	r.notes.otherData(id)
	return nil
}

// Seek finds data or a hole behind off, as lseek(2) does. What is not here counts as data.
func (r *Replica) Seek(id uint64, off int64, whence int) (int64, error) {
	o, err := r.use(id)
	if err != nil {
		return 0, err
	}
	defer r.unuse(id, o)
	if o.file.Untouched() {
		return 0, syscall.ENXIO
	}
	if o.file.Whole() {
		return unix.Seek(o.file.FD(), off, whence)
	}
	size, _, _, err := o.file.Stat()
	switch {
	case err != nil:
		return 0, r.refuse("content cannot be looked at", id, err)
	case off < 0 || uint64(off) >= size:
		return 0, syscall.ENXIO
	case whence == unix.SEEK_HOLE:
		return int64(size), nil
	}
	return off, nil
}

// quotaLocked refuses what would go beyond the workspace's quota, as far as is known.
func (r *Replica) quotaLocked(bytes, nodes uint64) error {
	m := r.s.Meta()
	if m.QuotaBytes > 0 && bytes > 0 && m.UsedBytes+uint64(max(r.unsent, 0))+bytes > m.QuotaBytes {
		return syscall.EDQUOT
	}
	if m.QuotaNodes > 0 && nodes > 0 && m.UsedNodes+nodes > m.QuotaNodes {
		return syscall.EDQUOT
	}
	return nil
}

// unsentLocked refuses to write more than may wait for the control plane.
func (r *Replica) unsentLocked() error {
	if r.unsent > r.cfg.MaxUnsent {
		return syscall.ENOSPC
	}
	return nil
}

// StatFs is what statfs(2) tells: of the quota, or of the disk if there is none.
type StatFs struct {
	Bytes, FreeBytes uint64
	Nodes, FreeNodes uint64
}

// StatFs tells how much room there is.
func (r *Replica) StatFs() (StatFs, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(r.cfg.Dir, &st); err != nil {
		return StatFs{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.s.Meta()
	s := StatFs{
		Bytes: st.Blocks * uint64(st.Bsize), FreeBytes: st.Bavail * uint64(st.Bsize),
		Nodes: maxQueue + m.UsedNodes, FreeNodes: uint64(maxQueue - len(r.s.Queue())),
	}
	if m.QuotaBytes > 0 {
		used := m.UsedBytes + uint64(max(r.unsent, 0))
		s.Bytes = m.QuotaBytes
		s.FreeBytes = min(s.FreeBytes, m.QuotaBytes-min(used, m.QuotaBytes))
	}
	if m.QuotaNodes > 0 {
		s.Nodes, s.FreeNodes = m.QuotaNodes, m.QuotaNodes-min(m.UsedNodes, m.QuotaNodes)
	}
	return s, nil
}
