package bucketfs

import (
	"context"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/postern-dev/postern/agentd/attach/bucket"
)

func writes(flags uint32) bool { return flags&syscall.O_ACCMODE != syscall.O_RDONLY }

// Create implements fuse.RawFileSystem. The object is made when the file is closed.
func (f *FS) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	ctx, done := request(cancel, f.b.cfg.Deadline)
	defer done()
	n, h, err := f.create(ctx, &in.InHeader, name, in.Flags)
	if err != nil {
		return status(err)
	}
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	f.entryLocked(n, &out.EntryOut)
	out.Fh = h.id
	return fuse.OK
}

func (f *FS) create(ctx context.Context, in *fuse.InHeader, name string, flags uint32) (*node, *handle, error) {
	parent, _, err := f.directory(in.NodeId)
	if err != nil {
		return nil, nil, err
	}
	key, err := f.mayMake(parent, name)
	if err != nil {
		return nil, nil, err
	}
	exclusive := flags&syscall.O_EXCL != 0
	n, err := f.child(ctx, parent, name, exclusive)
	if err == nil {
		ours := in.Unique&resent != 0 && n.made == in.Unique&^resent
		switch {
		case exclusive && !ours:
			return nil, nil, syscall.EEXIST
		case n.dir:
			return nil, nil, syscall.EISDIR
		}
		h, err := f.open(ctx, n, true, flags&syscall.O_TRUNC != 0 && !ours)
		return n, h, err
	}
	if err != syscall.ENOENT {
		return nil, nil, err
	}
	st, err := f.b.newStage(key, false, true)
	if err != nil {
		return nil, nil, err
	}
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	if f.b.byKey[key] != nil {
		// Another mount was faster.
		f.b.remove(st.id)
		st.f.Close() //nolint:errcheck // it is empty
		if exclusive {
			return nil, nil, syscall.EEXIST
		}
		st = f.b.byKey[key]
	} else {
		st.users = 0
		f.b.stages[st.id], f.b.byKey[key] = st, st
	}
	n, lines := f.childLocked(parent, name, false, in.Unique&^resent)
	n.st, n.object = st, bucket.Object{Key: key}
	h, err := f.handleLocked(n, true, lines)
	return n, h, err
}

// handleLocked makes a handle.
func (f *FS) handleLocked(n *node, writer bool, lines []line) (*handle, error) {
	h := &handle{id: f.nextFH, n: n, writer: writer, object: n.object}
	f.nextFH++
	f.handles[h.id] = h
	n.hold(h)
	f.stageOfLocked(h)
	if err := f.noteLocked(append(lines, h.line())...); err != nil {
		f.closeLocked(h)
		return nil, err
	}
	return h, nil
}

// Mknod implements fuse.RawFileSystem. Devices, pipes and sockets are EPERM.
func (f *FS) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	if t := in.Mode & syscall.S_IFMT; t != syscall.S_IFREG && t != 0 {
		return fuse.EPERM
	}
	ctx, done := request(cancel, f.b.cfg.Deadline)
	defer done()
	n, h, err := f.create(ctx, &in.InHeader, name, syscall.O_EXCL)
	if err != nil {
		return status(err)
	}
	f.b.mu.Lock()
	st := h.st
	f.b.mu.Unlock()
	err = f.b.upload(ctx, st, true)
	f.release(h)
	if err != nil {
		return status(err)
	}
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	f.entryLocked(n, out)
	return fuse.OK
}

// Open implements fuse.RawFileSystem.
func (f *FS) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	ctx, done := request(cancel, f.b.cfg.Deadline)
	defer done()
	f.b.mu.Lock()
	n, err := f.node(in.NodeId)
	f.b.mu.Unlock()
	var h *handle
	if err == nil {
		h, err = f.open(ctx, n, writes(in.Flags), in.Flags&syscall.O_TRUNC != 0)
	}
	if err != nil {
		return status(err)
	}
	out.Fh = h.id
	if !h.writer {
		out.OpenFlags |= fuse.FOPEN_NOFLUSH
	}
	return fuse.OK
}

// open makes a handle on the version that is newest as far as is known.
func (f *FS) open(ctx context.Context, n *node, writer, truncate bool) (*handle, error) {
	if writer && f.b.cfg.ReadOnly {
		return nil, syscall.EROFS
	}
	f.b.mu.Lock()
	if n.object.ETag == "" && f.stageLocked(n) == nil {
		n.until = n.until.AddDate(-1, 0, 0) // a listing that did not tell the version
	}
	f.b.mu.Unlock()
	if err := f.refresh(ctx, n); err != nil {
		return nil, err
	}
	f.b.mu.Lock()
	h, err := f.handleLocked(n, writer, nil)
	f.b.mu.Unlock()
	if err != nil || !truncate {
		return h, err
	}
	st, err := f.stageFor(ctx, h, true)
	if err == nil {
		err = f.b.truncate(st, 0)
	}
	if err != nil {
		f.release(h)
		return nil, err
	}
	return h, nil
}

// staged is the stage of a handle that is about to write: the object is fetched whole.
func (f *FS) staged(ctx context.Context, h *handle) (*stage, error) { return f.stageFor(ctx, h, false) }

func (f *FS) stageFor(ctx context.Context, h *handle, empty bool) (*stage, error) {
	b := f.b
	b.mu.Lock()
	st, n := f.stageOfLocked(h), h.n
	if st != nil {
		b.mu.Unlock()
		return st, nil
	}
	key, o, gone := keyOf(n), h.object, n.gone
	changed := n.object.ETag != o.ETag
	b.mu.Unlock()
	if gone {
		key = o.Key // the content is for this handle alone
	} else if changed {
		return nil, syscall.ESTALE
	}
	made, err := b.newStage(key, true, false)
	if err != nil {
		return nil, err
	}
	if !empty {
		if err := b.fillStage(ctx, made, o); err != nil {
			b.mu.Lock()
			b.staged -= made.size
			b.mu.Unlock()
			b.remove(made.id)
			made.f.Close() //nolint:errcheck // it is removed
			if bucket.NotFound(err) {
				err = syscall.ESTALE // it was removed since it was opened
			}
			return nil, err
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	made.users, made.object = 0, o
	if st := f.stageOfLocked(h); st != nil { // another handle was faster
		b.staged -= made.size
		b.remove(made.id)
		made.f.Close() //nolint:errcheck // it was not needed
		return st, nil
	}
	b.stages[made.id] = made
	switch {
	case h.n.gone:
		made.rec.Gone, made.rec.Slot, made.rec.Node = true, f.slot, n.id
		n.st = made
		if err := b.save(made.id, made.rec); err != nil {
			return nil, err
		}
	case keyOf(h.n) != key: // renamed meanwhile
		made.rec.Key = keyOf(h.n)
		if err := b.save(made.id, made.rec); err != nil {
			return nil, err
		}
		fallthrough
	default:
		b.byKey[made.rec.Key] = made
	}
	for _, other := range h.n.handles {
		f.stageOfLocked(other)
	}
	return h.st, nil
}

func (f *FS) handle(id uint64) (*handle, error) {
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	if h := f.handles[id]; h != nil {
		return h, nil
	}
	return nil, syscall.ESTALE
}

// release ends a handle.
func (f *FS) release(h *handle) {
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	f.closeLocked(h)
	f.noteLocked(append(f.dropLocked(h.n), line{Close: h.id})...) //nolint:errcheck // it is logged
}

// Release implements fuse.RawFileSystem.
func (f *FS) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	if h, err := f.handle(in.Fh); err == nil {
		f.release(h)
	}
}

// Read implements fuse.RawFileSystem.
func (f *FS) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	ctx, done := request(cancel, f.b.cfg.Deadline)
	defer done()
	h, err := f.handle(in.Fh)
	if err != nil {
		return nil, status(err)
	}
	f.b.mu.Lock()
	st, o := f.stageOfLocked(h), h.object
	stale := !h.n.gone && h.n.object.ETag != o.ETag
	f.b.mu.Unlock()
	buf = buf[:min(len(buf), int(in.Size))]
	var n int
	switch {
	case st != nil:
		n, err = st.read(int64(in.Offset), buf)
	case stale:
		err = syscall.ESTALE
	default:
		from, to := h.pace.after(int64(in.Offset), int64(len(buf)))
		f.b.cache.ahead(o, from, to)
		n, err = f.b.cache.read(ctx, o, int64(in.Offset), buf)
		if bucket.NotFound(err) {
			err = syscall.ESTALE // it was removed since it was opened
		}
	}
	if err != nil {
		return nil, status(err)
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

// Write implements fuse.RawFileSystem.
func (f *FS) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	ctx, done := request(cancel, copyDeadline)
	defer done()
	h, err := f.handle(in.Fh)
	if err != nil {
		return 0, status(err)
	}
	st, err := f.staged(ctx, h)
	if err != nil {
		return 0, status(err)
	}
	n, err := f.b.write(st, int64(in.Offset), data)
	return uint32(n), status(err)
}

// Flush implements fuse.RawFileSystem: the bucket has the object when it returns.
func (f *FS) Flush(cancel <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	return f.sync(cancel, in.Fh, true)
}

// Fsync implements fuse.RawFileSystem: the same.
func (f *FS) Fsync(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return f.sync(cancel, in.Fh, false)
}

func (f *FS) sync(cancel <-chan struct{}, id uint64, closed bool) fuse.Status {
	h, err := f.handle(id)
	if err != nil {
		return status(err)
	}
	if !h.writer {
		return fuse.OK
	}
	ctx, done := request(cancel, UploadDeadline)
	defer done()
	f.b.mu.Lock()
	st := f.stageOfLocked(h)
	f.b.mu.Unlock()
	if st == nil {
		return fuse.OK
	}
	return status(f.b.upload(ctx, st, closed))
}

// Fallocate implements fuse.RawFileSystem: there is no such thing as room in a bucket.
func (f *FS) Fallocate(<-chan struct{}, *fuse.FallocateIn) fuse.Status {
	return fuse.Status(syscall.EOPNOTSUPP)
}
