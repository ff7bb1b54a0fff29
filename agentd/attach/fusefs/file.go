package fusefs

import (
	"context"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/postern-dev/postern/agentd/attach/replica"
)

// Kinds of handles, which are the lowest bits of their numbers; above them is the number of
// the request that opened them, so that one that is sent again is the same handle.
const (
	handleCached  = 1
	handleThrough = 2
	handleWriter  = 4
	handleBits    = 3
)

// openKey names an open by its request: the same when the request is sent again.
func openKey(h *fuse.InHeader) uint64 { return h.Unique &^ resent }

func writes(flags uint32) bool { return flags&syscall.O_ACCMODE != syscall.O_RDONLY }

// Create implements fuse.RawFileSystem.
func (f *FS) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	ctx, done := request(cancel)
	defer done()
	if id, made := f.again(&in.InHeader); made {
		a, err := f.r.GetAttr(ctx, id)
		if err != nil {
			return status(err)
		}
		return f.created(ctx, in, a, true, out)
	}
	var a replica.Attr
	err := f.roomy(func() (err error) {
		a, err = f.r.Make(ctx, f.caller(&in.InHeader), in.NodeId, name, create(in))
		return err
	})
	if err == syscall.EEXIST && in.Flags&syscall.O_EXCL == 0 {
		// Somebody else made it since the kernel looked.
		if a, err = f.r.Lookup(ctx, in.NodeId, name); err == nil {
			return f.created(ctx, in, a, true, out)
		}
	}
	if err != nil {
		return status(err)
	}
	return f.created(ctx, in, a, false, out)
}

// Tmpfile implements fuse.RawFileSystem.
func (f *FS) Tmpfile(cancel <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	ctx, done := request(cancel)
	defer done()
	if id, made := f.again(&in.InHeader); made {
		a, err := f.r.GetAttr(ctx, id)
		if err != nil {
			return status(err)
		}
		return f.created(ctx, in, a, true, out)
	}
	a, err := f.r.MakeUnnamed(ctx, f.caller(&in.InHeader), permissions(in.Mode))
	if err != nil {
		return status(err)
	}
	return f.created(ctx, in, a, false, out)
}

func create(in *fuse.CreateIn) replica.Make {
	return replica.Make{Type: 1, Mode: permissions(in.Mode), Open: true}
}

// created answers with a file that was just made, which is open already unless it must be
// opened. Its handle goes through the daemon, so that no backing file is needed for one that
// stays empty. What is written through one that cannot read is not kept by the kernel as well: it would
// copy it into pages of its own, which cost more than the copy, and nobody reads those: who opens the file
// after it was closed is passed through to its backing file. A handle that can read may be
// mapped, for which there must be pages.
func (f *FS) created(ctx context.Context, in *fuse.CreateIn, a replica.Attr, mustOpen bool, out *fuse.CreateOut) fuse.Status {
	key := openKey(&in.InHeader)
	if mustOpen {
		if s := f.open(ctx, key, a.ID, syscall.O_RDWR, &out.OpenOut); !s.Ok() {
			return s
		}
	} else {
		f.mu.Lock()
		m := f.modes[a.ID]
		if m == nil {
			m = &mode{}
			f.modes[a.ID] = m
		}
		m.handles++
		f.mu.Unlock()
		out.Fh = key<<handleBits | handleCached | handleWriter
		out.OpenFlags = fuse.FOPEN_KEEP_CACHE
		if in.Flags&syscall.O_ACCMODE == syscall.O_WRONLY {
			out.OpenFlags |= fuse.FOPEN_DIRECT_IO
		}
	}
	f.entryOut(a, &out.EntryOut)
	return fuse.OK
}

// Open implements fuse.RawFileSystem.
func (f *FS) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	ctx, done := request(cancel)
	defer done()
	return f.open(ctx, openKey(&in.InHeader), in.NodeId, in.Flags, out)
}

func (f *FS) open(ctx context.Context, key, id uint64, flags uint32, out *fuse.OpenOut) fuse.Status {
	write := writes(flags)
	var o replica.Opened
	err := f.roomy(func() (err error) {
		o, err = f.r.Open(ctx, id, write, flags&syscall.O_TRUNC != 0)
		return err
	})
	if err != nil {
		return status(err)
	}
	through, backing := f.begin(id, key, o)
	if err := f.r.Mode(id, write, through); err != nil {
		f.end(id, key, through)
		f.r.Release(id, write)
		return status(err)
	}
	out.Fh = key<<handleBits | handleCached
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	if through {
		out.Fh = key<<handleBits | handleThrough
		out.OpenFlags = fuse.FOPEN_PASSTHROUGH
		out.BackingID = backing
	}
	if write {
		out.Fh |= handleWriter
	} else {
		out.OpenFlags |= fuse.FOPEN_NOFLUSH
	}
	return fuse.OK
}

// begin decides how a handle is served.
func (f *FS) begin(id, key uint64, o replica.Opened) (through bool, backing int32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.modes[id]
	if m == nil {
		m = &mode{through: f.kernel != nil && f.kernel.Passthrough() && o.Whole && !o.Cached}
		f.modes[id] = m
	}
	if m.through {
		var again bool
		var err error
		if backing, again, err = f.kernel.OpenBacking(id, key, o.FD); again {
			return true, backing // SetKernel has counted it
		}
		if err != nil {
			if m.handles > 0 {
				// It cannot be served otherwise, and the kernel will say so.
				m.handles++
				return true, 0
			}
			m.through = false
		}
	}
	m.handles++
	return m.through, backing
}

func (f *FS) end(id, key uint64, through bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.modes[id]; m != nil {
		if m.handles--; m.handles <= 0 {
			delete(f.modes, id)
		}
	}
	if through && f.kernel != nil {
		f.kernel.CloseBacking(id, key)
	}
}

// Release implements fuse.RawFileSystem.
func (f *FS) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	f.end(in.NodeId, in.Fh>>handleBits, in.Fh&handleThrough != 0)
	f.r.Release(in.NodeId, in.Fh&handleWriter != 0)
}

// ReadFile implements fuseserver.Files: what is here whole needs not pass through this process.
func (f *FS) ReadFile(node uint64, offset int64, size int) (fd int, done func(), ok bool) {
	return f.r.ReadHere(node, offset, size)
}

// Read implements fuse.RawFileSystem.
func (f *FS) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	ctx, done := request(cancel)
	defer done()
	fd, release, err := f.r.Read(ctx, in.NodeId, int64(in.Offset), int(in.Size))
	if err != nil {
		return nil, status(err)
	}
	defer release()
	if fd < 0 {
		return fuse.ReadResultData(nil), fuse.OK
	}
	n, err := syscall.Pread(fd, buf[:min(len(buf), int(in.Size))], int64(in.Offset))
	if err != nil {
		f.r.ReadFailed(in.NodeId, err)
		return nil, status(err)
	}
	if n < int(in.Size) && f.r.Short(in.NodeId, int64(in.Offset)+int64(n)) {
		return nil, fuse.EIO
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

// Write implements fuse.RawFileSystem.
func (f *FS) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	ctx, done := request(cancel)
	defer done()
	n, err := f.r.Write(ctx, in.NodeId, int64(in.Offset), data)
	if n > 0 {
		return uint32(n), fuse.OK
	}
	return 0, status(err)
}

// Flush implements fuse.RawFileSystem.
func (f *FS) Flush(_ <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	if in.Fh&handleWriter == 0 {
		return fuse.OK
	}
	return status(f.roomy(func() error { return f.r.Flush(in.NodeId) }))
}

// Fsync implements fuse.RawFileSystem.
func (f *FS) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return status(f.roomy(func() error { return f.r.Fsync(in.NodeId) }))
}

// Fallocate implements fuse.RawFileSystem.
func (f *FS) Fallocate(cancel <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	ctx, done := request(cancel)
	defer done()
	return status(f.r.Fallocate(ctx, in.NodeId, in.Mode, int64(in.Offset), int64(in.Length)))
}

// Lseek implements fuse.RawFileSystem: SEEK_DATA and SEEK_HOLE.
func (f *FS) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	off, err := f.r.Seek(in.NodeId, int64(in.Offset), int(in.Whence))
	out.Offset = uint64(off)
	return status(err)
}
