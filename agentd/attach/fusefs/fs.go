package fusefs

import (
	"errors"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/postern-dev/postern/agentd/attach/replica"
	"github.com/postern-dev/postern/agentd/attach/tree"
)

// Kernel is the connection that a file system is served on.
type Kernel interface {
	EntryNotify(parent uint64, name string) fuse.Status
	InodeNotify(node uint64, off, length int64) fuse.Status
	// OpenBacking lets the kernel read and write fd for a node, once for each node; key
	// names the open. again: that open was counted before, by this process or one that it
	// took over from. CloseBacking ends an open. The id survives a takeover.
	OpenBacking(node, key uint64, fd int) (id int32, again bool, err error)
	CloseBacking(node, key uint64)
	// Backings counts what a process before this one left open.
	Backings() map[uint64]int
	Passthrough() bool
}

// Options are what a mount is like. They must be the same for each process that serves it.
type Options struct {
	// Squash: everything belongs to UID and GID, and whoever reaches the mount may do
	// what the owner may.
	Squash   bool
	UID, GID uint32
	ReadOnly bool
	// Slot tells requests of the file systems of a replica apart: 0 to 127, another for each.
	Slot uint8
	// Valid is how long the kernel may keep names and attributes; 0: a day.
	Valid time.Duration
}

// resent marks a request that the kernel sends again after a takeover.
const resent = 1 << 63

// MountOptions are what the connection must be opened with.
func MountOptions(o Options) fuse.MountOptions {
	m := fuse.MountOptions{
		AllowOther: true,
		FsName:     "postern",
		Name:       "postern",
		// A process that is killed while the kernel copies a request to it, or a reply from it,
		// makes the kernel answer EIO; that takes longer the larger they are.
		MaxWrite:      256 << 10,
		MaxReadAhead:  1 << 20,
		MaxBackground: 64,
		// Pushes say what is not valid any more; a time does not.
		ExplicitDataCacheControl: true,
		EnableSymlinkCaching:     true,
		DirectMountStrict:        true,
		// With it the kernel does not ask for security.capability before every write: setuid,
		// setgid and capabilities are never stored, so there is nothing to clear.
		ExtraCapabilities: fuse.CAP_HANDLE_KILLPRIV_V2,
	}
	m.Options = []string{"default_permissions"}
	return m
}

// FS is a file system. It implements fuse.RawFileSystem and replica.Listener.
type FS struct {
	fuse.RawFileSystem
	r    *replica.Replica
	opts Options

	mu     sync.Mutex // held for memory only
	kernel Kernel
	// lookups counts what the kernel knows of each node; inherited: it may know any.
	lookups   map[uint64]uint64
	inherited bool
	// before are nodes that the kernel may know from a process before this one.
	before map[uint64]struct{}
	modes  map[uint64]*mode
}

// mode is how handles on a file are served.
type mode struct {
	through bool
	handles int
}

var (
	_ fuse.RawFileSystem = (*FS)(nil)
	_ replica.Listener   = (*FS)(nil)
)

// New returns a file system on r. It is listed as a Listener of r until Close.
func New(r *replica.Replica, opts Options) *FS {
	if opts.Valid == 0 {
		opts.Valid = 24 * time.Hour
	}
	f := &FS{
		RawFileSystem: fuse.NewDefaultRawFileSystem(), r: r, opts: opts,
		lookups: map[uint64]uint64{}, modes: map[uint64]*mode{},
	}
	r.Listen(f)
	return f
}

// Close says that the mount has ended.
func (f *FS) Close() { f.r.Unlisten(f) }

// SetKernel gives the file system its connection, before the first request. inherited
// says that another process served it before: the kernel knows nodes that this
// one has not told it of.
func (f *FS) SetKernel(k Kernel, inherited bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kernel, f.inherited = k, inherited
	if inherited {
		f.before = f.r.IDs()
	}
	for node, n := range k.Backings() {
		f.modes[node] = &mode{through: true, handles: n}
	}
}

// String implements fuse.RawFileSystem.
func (f *FS) String() string { return "postern" }

// InvalEntry implements replica.Listener.
func (f *FS) InvalEntry(parent uint64, name string) {
	f.mu.Lock()
	k, known := f.kernel, f.lookups[parent] > 0 || f.inherited || parent == tree.Root
	f.mu.Unlock()
	if k != nil && known {
		k.EntryNotify(parent, name)
	}
}

// InvalInode implements replica.Listener.
func (f *FS) InvalInode(id uint64) {
	f.mu.Lock()
	k, known := f.kernel, f.lookups[id] > 0 || f.inherited || id == tree.Root
	f.mu.Unlock()
	if k != nil && known {
		k.InodeNotify(id, 0, -1)
	}
}

// Holds implements replica.Listener.
func (f *FS) Holds(id uint64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, before := f.before[id]
	return f.lookups[id] > 0 || before
}

// LetGo implements replica.Listener.
func (f *FS) LetGo(parent uint64, name string, id uint64) {
	f.mu.Lock()
	k, known := f.kernel, f.lookups[id]
	f.mu.Unlock()
	if k == nil || k.EntryNotify(parent, name) != fuse.ENOENT || known > 0 {
		return
	}
	// It does not know the name, so it does not know the node by it.
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.before, id)
}

func (f *FS) know(id uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lookups[id]++
}

// Forget implements fuse.RawFileSystem.
func (f *FS) Forget(id, n uint64) {
	f.mu.Lock()
	left := f.lookups[id]
	// The kernel forgets all at once, so what was known before a takeover is forgotten with it.
	if left <= n || f.inherited {
		delete(f.lookups, id)
		delete(f.before, id)
		left = 0
	} else {
		left -= n
		f.lookups[id] = left
	}
	f.mu.Unlock()
	if left == 0 {
		f.r.Forgotten(f, id)
	}
}

// status is what the kernel is told of an error.
func status(err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return fuse.Status(errno)
	}
	return fuse.EIO
}

// roomy calls do, and once more if the disk was full and the cache could give way: what fails with
// ENOSPC has changed nothing.
func (f *FS) roomy(do func() error) error {
	err := do()
	if errors.Is(err, syscall.ENOSPC) && f.r.MakeRoom(roomAtOnce) {
		err = do()
	}
	return err
}

// roomAtOnce is how many bytes the cache gives when a call fails for want of room.
const roomAtOnce = 8 << 20

func (f *FS) caller(h *fuse.InHeader) replica.Caller {
	c := replica.Caller{UID: h.Uid, GID: h.Gid, Unique: h.Unique&^resent | uint64(f.opts.Slot)<<56}
	if f.opts.Squash {
		c.UID, c.GID = f.opts.UID, f.opts.GID
	}
	return c
}

// again tells whether a request was sent again and its change had been made.
func (f *FS) again(h *fuse.InHeader) (id uint64, made bool) {
	if h.Unique&resent == 0 {
		return 0, false
	}
	return f.r.Replied(f.caller(h).Unique)
}

func (f *FS) attr(a replica.Attr, out *fuse.Attr) {
	out.Ino, out.Size, out.Blocks, out.Nlink, out.Blksize = a.ID, a.Size, a.Blocks, a.Nlink, 4096
	out.Mode = uint32(a.Mode)
	switch a.Type {
	case tree.Directory:
		out.Mode |= syscall.S_IFDIR
	case tree.Symlink:
		out.Mode |= syscall.S_IFLNK
	default:
		out.Mode |= syscall.S_IFREG
	}
	out.Uid, out.Gid = a.UID, a.GID
	if f.opts.Squash {
		out.Uid, out.Gid = f.opts.UID, f.opts.GID
	}
	setTime(&out.Atime, &out.Atimensec, a.Atime)
	setTime(&out.Mtime, &out.Mtimensec, a.Mtime)
	setTime(&out.Ctime, &out.Ctimensec, a.Ctime)
}

func setTime(sec *uint64, nsec *uint32, ns int64) {
	s, n := ns/1e9, ns%1e9
	if n < 0 {
		s, n = s-1, n+1e9
	}
	*sec, *nsec = uint64(s), uint32(n)
}

func (f *FS) attrOut(a replica.Attr, out *fuse.AttrOut) {
	f.attr(a, &out.Attr)
	out.SetTimeout(f.opts.Valid)
}

// entryOut answers with a node, which the kernel knows from then on.
func (f *FS) entryOut(a replica.Attr, out *fuse.EntryOut) {
	f.know(a.ID)
	f.attr(a, &out.Attr)
	out.NodeId, out.Generation = a.ID, 1
	out.SetEntryTimeout(f.opts.Valid)
	out.SetAttrTimeout(f.opts.Valid)
}

// Lookup implements fuse.RawFileSystem.
func (f *FS) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	ctx, done := request(cancel)
	defer done()
	defer f.r.Step()()
	var a replica.Attr
	var err error
	switch name {
	case ".":
		a, err = f.r.GetAttr(ctx, h.NodeId)
	case "..":
		a, err = f.r.GetAttr(ctx, f.r.Parent(h.NodeId))
	default:
		a, err = f.r.Lookup(ctx, h.NodeId, name)
	}
	if errors.Is(err, syscall.ENOENT) {
		// The kernel may remember that, too.
		out.SetEntryTimeout(f.opts.Valid)
		out.NodeId = 0
		return fuse.OK
	}
	if err != nil {
		return status(err)
	}
	f.entryOut(a, out)
	return fuse.OK
}

// GetAttr implements fuse.RawFileSystem.
func (f *FS) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	ctx, done := request(cancel)
	defer done()
	a, err := f.r.GetAttr(ctx, in.NodeId)
	if err != nil {
		return status(err)
	}
	f.attrOut(a, out)
	return fuse.OK
}

// SetAttr implements fuse.RawFileSystem.
func (f *FS) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	ctx, done := request(cancel)
	defer done()
	var set replica.SetAttr
	if m, ok := in.GetMode(); ok {
		mode := uint16(m)
		set.Mode = &mode
	}
	if uid, ok := in.GetUID(); ok {
		set.UID = &uid
	}
	if gid, ok := in.GetGID(); ok {
		set.GID = &gid
	}
	if f.opts.Squash {
		if set.UID != nil && *set.UID != f.opts.UID || set.GID != nil && *set.GID != f.opts.GID {
			return fuse.EPERM
		}
		set.UID, set.GID = nil, nil
	}
	if size, ok := in.GetSize(); ok {
		set.Size = &size
	}
	if t, ok := in.GetATime(); ok {
		ns := t.UnixNano()
		set.Atime = &ns
	}
	if t, ok := in.GetMTime(); ok {
		ns := t.UnixNano()
		set.Mtime = &ns
	}
	a, err := f.r.SetAttr(ctx, in.NodeId, set)
	if err != nil {
		return status(err)
	}
	f.attrOut(a, out)
	return fuse.OK
}

// Statx implements fuse.RawFileSystem: it is how the kernel asks for the time of birth.
func (f *FS) Statx(cancel <-chan struct{}, in *fuse.StatxIn, out *fuse.StatxOut) fuse.Status {
	ctx, done := request(cancel)
	defer done()
	a, err := f.r.GetAttr(ctx, in.NodeId)
	if err != nil {
		return status(err)
	}
	var at fuse.Attr
	f.attr(a, &at)
	out.SetTimeout(f.opts.Valid)
	const basicAndBirth = 0x7ff | 0x800
	out.Mask = basicAndBirth
	out.Blksize, out.Nlink, out.Uid, out.Gid, out.Mode = 4096, at.Nlink, at.Uid, at.Gid, uint16(at.Mode)
	out.Ino, out.Size, out.Blocks = at.Ino, at.Size, at.Blocks
	out.Atime = fuse.SxTime{Sec: at.Atime, Nsec: at.Atimensec}
	out.Mtime = fuse.SxTime{Sec: at.Mtime, Nsec: at.Mtimensec}
	out.Ctime = fuse.SxTime{Sec: at.Ctime, Nsec: at.Ctimensec}
	setTime(&out.Btime.Sec, &out.Btime.Nsec, a.Btime)
	return fuse.OK
}

// Readlink implements fuse.RawFileSystem.
func (f *FS) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	target, err := f.r.Readlink(h.NodeId)
	return []byte(target), status(err)
}

// StatFs implements fuse.RawFileSystem.
func (f *FS) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	s, err := f.r.StatFs()
	if err != nil {
		return status(err)
	}
	const block = 4096
	out.Bsize, out.Frsize, out.NameLen = block, block, 255
	out.Blocks, out.Bfree, out.Bavail = s.Bytes/block, s.FreeBytes/block, s.FreeBytes/block
	out.Files, out.Ffree = s.Nodes, s.FreeNodes
	return fuse.OK
}

// GetXAttr implements fuse.RawFileSystem.
func (f *FS) GetXAttr(cancel <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	ctx, done := request(cancel)
	defer done()
	v, err := f.r.GetXattr(ctx, h.NodeId, name)
	if err != nil {
		return 0, status(err)
	}
	if len(v) > len(dest) {
		return uint32(len(v)), fuse.ERANGE
	}
	return uint32(copy(dest, v)), fuse.OK
}

// ListXAttr implements fuse.RawFileSystem.
func (f *FS) ListXAttr(cancel <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	ctx, done := request(cancel)
	defer done()
	names, err := f.r.ListXattr(ctx, h.NodeId)
	if err != nil {
		return 0, status(err)
	}
	var buf []byte
	for _, n := range names {
		buf = append(append(buf, n...), 0)
	}
	if len(buf) > len(dest) {
		return uint32(len(buf)), fuse.ERANGE
	}
	return uint32(copy(dest, buf)), fuse.OK
}

// SetXAttr implements fuse.RawFileSystem.
func (f *FS) SetXAttr(cancel <-chan struct{}, in *fuse.SetXAttrIn, name string, value []byte) fuse.Status {
	ctx, done := request(cancel)
	defer done()
	v := append(make([]byte, 0, len(value)), value...)
	return status(f.r.SetXattr(ctx, in.NodeId, name, v, in.Flags))
}

// RemoveXAttr implements fuse.RawFileSystem.
func (f *FS) RemoveXAttr(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	ctx, done := request(cancel)
	defer done()
	return status(f.r.SetXattr(ctx, h.NodeId, name, nil, 0))
}

// Access implements fuse.RawFileSystem. The kernel checks permissions and does not ask.
func (f *FS) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.ENOSYS }
