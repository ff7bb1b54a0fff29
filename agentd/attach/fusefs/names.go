package fusefs

import (
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/postern-dev/postern/agentd/attach/replica"
	"github.com/postern-dev/postern/agentd/attach/tree"
)

// permissions drops what mknod(2) and others ignore: bits of the type.
func permissions(mode uint32) uint16 { return uint16(mode & 0o7777) }

func (f *FS) make(cancel <-chan struct{}, h *fuse.InHeader, name string, m replica.Make, out *fuse.EntryOut) fuse.Status {
	ctx, done := request(cancel)
	defer done()
	var a replica.Attr
	var err error
	if id, made := f.again(h); made {
		a, err = f.r.GetAttr(ctx, id)
	} else {
		a, err = f.r.Make(ctx, f.caller(h), h.NodeId, name, m)
	}
	if err != nil {
		return status(err)
	}
	f.entryOut(a, out)
	return fuse.OK
}

// Mknod implements fuse.RawFileSystem. Devices, pipes and sockets are EPERM.
func (f *FS) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	if t := in.Mode & syscall.S_IFMT; t != syscall.S_IFREG && t != 0 {
		return fuse.EPERM
	}
	return f.make(cancel, &in.InHeader, name, replica.Make{Type: tree.File, Mode: permissions(in.Mode)}, out)
}

// Mkdir implements fuse.RawFileSystem.
func (f *FS) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return f.make(cancel, &in.InHeader, name, replica.Make{Type: tree.Directory, Mode: permissions(in.Mode)}, out)
}

// Symlink implements fuse.RawFileSystem.
func (f *FS) Symlink(cancel <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	return f.make(cancel, h, name, replica.Make{Type: tree.Symlink, Mode: 0o777, Target: target}, out)
}

// Link implements fuse.RawFileSystem.
func (f *FS) Link(cancel <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	ctx, done := request(cancel)
	defer done()
	var a replica.Attr
	var err error
	if id, made := f.again(&in.InHeader); made {
		a, err = f.r.GetAttr(ctx, id)
	} else {
		a, err = f.r.Link(ctx, f.caller(&in.InHeader), in.Oldnodeid, in.NodeId, name)
	}
	if err != nil {
		return status(err)
	}
	f.entryOut(a, out)
	return fuse.OK
}

func (f *FS) remove(cancel <-chan struct{}, h *fuse.InHeader, name string, directory bool) fuse.Status {
	ctx, done := request(cancel)
	defer done()
	if _, made := f.again(h); made {
		return fuse.OK
	}
	return status(f.r.Remove(ctx, f.caller(h), h.NodeId, name, directory))
}

// Unlink implements fuse.RawFileSystem.
func (f *FS) Unlink(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return f.remove(cancel, h, name, false)
}

// Rmdir implements fuse.RawFileSystem.
func (f *FS) Rmdir(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return f.remove(cancel, h, name, true)
}

// Rename implements fuse.RawFileSystem.
func (f *FS) Rename(cancel <-chan struct{}, in *fuse.RenameIn, name, newName string) fuse.Status {
	ctx, done := request(cancel)
	defer done()
	if _, made := f.again(&in.InHeader); made {
		return fuse.OK
	}
	return status(f.r.Rename(ctx, f.caller(&in.InHeader), in.NodeId, name, in.Newdir, newName, in.Flags))
}

// OpenDir implements fuse.RawFileSystem.
func (f *FS) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	f.r.OpenDir(in.NodeId)
	out.OpenFlags = fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE
	return fuse.OK
}

// ReleaseDir implements fuse.RawFileSystem.
func (f *FS) ReleaseDir(in *fuse.ReleaseIn) { f.r.ReleaseDir(in.NodeId) }

// FsyncDir implements fuse.RawFileSystem.
func (f *FS) FsyncDir(<-chan struct{}, *fuse.FsyncIn) fuse.Status { return status(f.r.FsyncDir()) }

// ReadDir implements fuse.RawFileSystem.
func (f *FS) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.list(cancel, in, func(e fuse.DirEntry, _ *replica.Attr) bool { return out.AddDirEntry(e) })
}

// ReadDirPlus implements fuse.RawFileSystem.
func (f *FS) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.list(cancel, in, func(e fuse.DirEntry, a *replica.Attr) bool {
		entry := out.AddDirLookupEntry(e)
		if entry == nil {
			return false
		}
		if a != nil {
			f.entryOut(*a, entry)
		}
		return true
	})
}

func (f *FS) list(cancel <-chan struct{}, in *fuse.ReadIn, add func(fuse.DirEntry, *replica.Attr) bool) fuse.Status {
	ctx, done := request(cancel)
	defer done()
	for i, name := range []string{".", ".."} {
		if in.Offset > uint64(i) {
			continue
		}
		id := in.NodeId
		if i == 1 {
			id = f.r.Parent(id)
		}
		if !add(fuse.DirEntry{Name: name, Ino: id, Mode: syscall.S_IFDIR, Off: uint64(i) + 1}, nil) {
			return fuse.OK
		}
	}
	return status(f.r.ReadDir(ctx, in.NodeId, in.Offset, func(n replica.Name) bool {
		var at fuse.Attr
		f.attr(n.Attr, &at)
		return add(fuse.DirEntry{Name: n.Name, Ino: n.Attr.ID, Mode: at.Mode, Off: n.Cookie}, &n.Attr)
	}))
}
