package bucketfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/postern-dev/postern/agentd/attach/bucket"
)

const (
	rootID = 1
	// resent marks a request that the kernel sends again after a takeover.
	resent = 1 << 63
	// noEntry is how long the kernel may believe that there is no such name.
	noEntry = time.Second
	// blockSize is what stat(2) recommends for reads.
	blockSize = 128 << 10
)

// Options are what a mount is like. They must be the same for each process that serves it.
type Options struct {
	// Slot tells the file systems of a bucket apart.
	Slot uint8
}

// MountOptions are what the connection must be opened with.
func MountOptions() fuse.MountOptions {
	return fuse.MountOptions{
		AllowOther: true, FsName: "postern", Name: "postern", MaxWrite: 1 << 20, MaxReadAhead: 1 << 20, MaxBackground: 64, DirectMountStrict: true,
	}
}

// node is a file or directory that the kernel knows, or one above those. Guarded by Bucket.mu.
type node struct {
	id     uint64
	parent *node
	name   string
	dir    bool
	made   uint64 // the request that made it, if one did
	kids   map[string]*node
	// lookups counts what this process has told the kernel; inherited: one before has, too.
	lookups   uint64
	inherited bool
	gone      bool // removed, or another file has its name
	// object is what the bucket said last, believed until then.
	object  bucket.Object
	until   time.Time
	st      *stage
	handles map[uint64]*handle
}

// handle is an open file. Guarded by Bucket.mu, but for pace.
type handle struct {
	id     uint64
	n      *node
	writer bool
	object bucket.Object // the version that it reads
	st     *stage        // counted as a user of it
	pace   pace
}

// FS is a file system. It implements fuse.RawFileSystem.
type FS struct {
	fuse.RawFileSystem
	b    *Bucket
	slot uint8

	// Guarded by Bucket.mu.
	table   *table
	nodes   map[uint64]*node
	handles map[uint64]*handle
	dirs    map[uint64]*listing
	nextID  uint64
	nextFH  uint64
	broken  bool // the table cannot be written
}

var _ fuse.RawFileSystem = (*FS)(nil)

// Mount makes a file system. Begin must be called before the first request, and End after the last.
func (b *Bucket) Mount(o Options) *FS {
	f := &FS{
		RawFileSystem: fuse.NewDefaultRawFileSystem(), b: b, slot: o.Slot,
		nodes: map[uint64]*node{}, handles: map[uint64]*handle{}, dirs: map[uint64]*listing{}, nextID: rootID + 1, nextFH: 1,
	}
	f.nodes[rootID] = &node{id: rootID, dir: true, kids: map[string]*node{}, lookups: 1}
	return f
}

func (f *FS) tablePath() string {
	return filepath.Join(f.b.cfg.Dir, fmt.Sprintf("nodes-%d.log", f.slot))
}

// Begin prepares for requests. inherited: the kernel knows nodes, and has handles, of a
// process before this one.
func (f *FS) Begin(inherited bool) error {
	b := f.b
	b.mu.Lock()
	var err error
	if inherited {
		err = f.inheritLocked()
	}
	if err == nil {
		f.table, err = openTable(f.tablePath(), !inherited)
	}
	if err == nil && inherited {
		err = f.table.replace(f.linesLocked())
	}
	if err == nil {
		b.mounted[f.slot] = f
	}
	b.mu.Unlock()
	if err != nil {
		return fmt.Errorf("node ids of bucket %s: %w", b.cfg.Name, err)
	}
	b.settle(func(st *stage) bool { return st.rec.Gone && st.rec.Slot == f.slot })
	return nil
}

// End says that the mount has ended.
func (f *FS) End() {
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	for _, h := range f.handles {
		f.closeLocked(h)
	}
	if f.b.mounted[f.slot] == f {
		delete(f.b.mounted, f.slot)
		os.Remove(f.tablePath()) //nolint:errcheck // the next mount empties it
	}
	f.table.close() //nolint:errcheck // nobody reads it
	f.table = nil
	f.b.wake()
}

// inheritLocked reads what the process before has left.
func (f *FS) inheritLocked() error {
	_, err := readTable(f.tablePath(), func(l line) {
		f.nextID = max(f.nextID, l.Next, l.ID+1)
		f.nextFH = max(f.nextFH, l.Open+1)
		n := f.nodes[l.ID]
		switch {
		case l.Close != 0:
			if h := f.handles[l.Close]; h != nil {
				delete(h.n.handles, h.id)
				delete(f.handles, h.id)
			}
		case l.Open != 0 && n != nil:
			h := &handle{id: l.Open, n: n, writer: l.Writer}
			if l.Object != nil {
				h.object, n.object = *l.Object, *l.Object
			}
			f.handles[h.id] = h
			n.hold(h)
		case l.Drop && n != nil:
			f.detachLocked(n)
			delete(f.nodes, n.id)
		case l.Gone && n != nil:
			f.detachLocked(n)
			n.gone = true
		case l.ID == 0 || f.nodes[l.Parent] == nil:
		case n != nil: // moved
			f.detachLocked(n)
			f.attachLocked(n, f.nodes[l.Parent], l.Name)
		default:
			n = &node{id: l.ID, dir: l.Dir, made: l.Unique, inherited: true}
			f.nodes[n.id] = n
			f.attachLocked(n, f.nodes[l.Parent], l.Name)
		}
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, st := range f.b.stages {
		if st.rec.Gone && st.rec.Slot == f.slot && f.nodes[st.rec.Node] != nil {
			f.nodes[st.rec.Node].st = st
		}
	}
	for _, h := range f.handles {
		f.stageOfLocked(h)
	}
	return nil
}

// linesLocked is all that the next process needs.
func (f *FS) linesLocked() []line {
	out := []line{{Next: f.nextID}, {Open: f.nextFH}, {Close: f.nextFH}}
	// First those without a name: it may be another's.
	for _, n := range f.nodes {
		if n.gone {
			out = append(out, line{ID: n.id, Parent: rootID, Name: n.name, Dir: n.dir}, line{ID: n.id, Gone: true})
		}
	}
	var walk func(n *node)
	walk = func(n *node) {
		for _, kid := range n.kids {
			out = append(out, line{ID: kid.id, Parent: n.id, Name: kid.name, Dir: kid.dir, Unique: kid.made})
			walk(kid)
		}
	}
	walk(f.nodes[rootID])
	for _, h := range f.handles {
		out = append(out, h.line())
	}
	return out
}

func (h *handle) line() line {
	return line{ID: h.n.id, Open: h.id, Writer: h.writer, Object: &h.object}
}

// noteLocked writes facts for the next process, or all anew when there are many.
func (f *FS) noteLocked(lines ...line) error {
	if f.table == nil {
		return nil
	}
	err := f.table.add(lines...)
	if err == nil && f.table.lines > compactAfter+2*(len(f.nodes)+len(f.handles)) {
		err = f.table.replace(f.linesLocked())
	}
	if err != nil && !f.broken {
		f.broken = true
		f.b.cfg.Log.Error("node ids not kept: the mount would not outlive this process", "bucket", f.b.cfg.Name, "err", err)
	}
	return err
}

func (n *node) hold(h *handle) {
	if n.handles == nil {
		n.handles = map[uint64]*handle{}
	}
	n.handles[h.id] = h
}

func (f *FS) attachLocked(n, parent *node, name string) {
	if parent.kids == nil {
		parent.kids = map[string]*node{}
	}
	if old := parent.kids[name]; old != nil && old != n {
		old.parent, old.gone = nil, true
	}
	parent.kids[name] = n
	n.parent, n.name = parent, name
}

func (f *FS) detachLocked(n *node) {
	if n.parent != nil && n.parent.kids[n.name] == n {
		delete(n.parent.kids, n.name)
	}
	n.parent = nil
}

// keyOf is a node's key; a directory's ends in a slash, the root's is "".
func keyOf(n *node) string {
	if n.parent == nil {
		return ""
	}
	key := keyOf(n.parent) + n.name
	if n.dir {
		key += "/"
	}
	return key
}

// stageLocked is a file's stage, if it has one, whichever mount made it.
func (f *FS) stageLocked(n *node) *stage {
	if n.st != nil && n.st.finished {
		if o := n.st.object; o.ETag != "" && !n.gone {
			f.learnLocked(n, o)
			for _, h := range n.handles {
				h.object = o
			}
		} else {
			n.until = time.Time{}
		}
		n.st = nil
	}
	if n.st == nil && !n.dir && n.parent != nil {
		n.st = f.b.byKey[keyOf(n)]
	}
	return n.st
}

// stageOfLocked is the stage that a handle reads and writes, if there is one; it counts as a user.
func (f *FS) stageOfLocked(h *handle) *stage {
	st := f.stageLocked(h.n)
	if h.st != st {
		f.leaveLocked(h)
		if h.st = st; st != nil {
			st.users++
		}
	}
	return st
}

// leaveLocked takes a handle off its stage, which ends with the last one.
func (f *FS) leaveLocked(h *handle) {
	st := h.st
	h.st = nil
	if st == nil || st.finished {
		return
	}
	if st.users--; st.users > 0 {
		return
	}
	if !st.rec.Dirty || st.rec.Gone {
		f.b.endLocked(st, st.object)
		return
	}
	// Its close failed, or it was mapped and changed since.
	if rec := st.rec; !rec.Closed {
		rec.Closed = true
		if f.b.save(st.id, rec) == nil {
			st.rec = rec
		}
	}
	f.b.wake()
}

func (f *FS) learnLocked(n *node, o bucket.Object) {
	n.object, n.until = o, time.Now().Add(f.b.cfg.TTL)
}

// closeLocked ends a handle.
func (f *FS) closeLocked(h *handle) {
	f.leaveLocked(h)
	delete(h.n.handles, h.id)
	delete(f.handles, h.id)
	f.stageLocked(h.n)
}

// childLocked finds or makes the node of a name, with lines to note.
func (f *FS) childLocked(parent *node, name string, dir bool, unique uint64) (*node, []line) {
	if n := parent.kids[name]; n != nil && n.dir == dir {
		return n, nil
	} else if n != nil {
		n.gone = true
		f.detachLocked(n)
		out := []line{{ID: n.id, Gone: true}}
		next, more := f.childLocked(parent, name, dir, unique)
		return next, append(out, more...)
	}
	n := &node{id: f.nextID, dir: dir, made: unique}
	f.nextID++
	f.nodes[n.id] = n
	f.attachLocked(n, parent, name)
	return n, []line{{ID: n.id, Parent: parent.id, Name: name, Dir: dir, Unique: unique}}
}

// dropLocked forgets nodes that nobody knows.
func (f *FS) dropLocked(n *node) (out []line) {
	for n != nil && n.id != rootID && n.lookups == 0 && !n.inherited && len(n.kids) == 0 && len(n.handles) == 0 {
		parent := n.parent
		f.detachLocked(n)
		delete(f.nodes, n.id)
		out = append(out, line{ID: n.id, Drop: true})
		n = parent
	}
	return out
}

// Forget implements fuse.RawFileSystem.
func (f *FS) Forget(id, count uint64) {
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	n := f.nodes[id]
	if n == nil || id == rootID {
		return
	}
	// The kernel forgets all at once: more than this process told of is what it had from
	// one before.
	if count > n.lookups {
		n.inherited = false
	}
	n.lookups -= min(n.lookups, count)
	f.noteLocked(f.dropLocked(n)...) //nolint:errcheck // it is logged
}

// String implements fuse.RawFileSystem.
func (f *FS) String() string { return "postern bucket" }

func (f *FS) node(id uint64) (*node, error) {
	if n := f.nodes[id]; n != nil {
		return n, nil
	}
	return nil, syscall.ESTALE
}

// directory finds a node that must be one, with its key.
func (f *FS) directory(id uint64) (*node, string, error) {
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	n, err := f.node(id)
	switch {
	case err != nil:
		return nil, "", err
	case !n.dir:
		return nil, "", syscall.ENOTDIR
	case n.gone:
		return nil, "", syscall.ENOENT
	}
	return n, keyOf(n), nil
}

func (f *FS) attrLocked(n *node, out *fuse.Attr) {
	out.Ino, out.Nlink, out.Blksize = n.id, 1, blockSize
	at := n.object.Modified
	var write uint32 = 0o222
	if f.b.cfg.ReadOnly {
		write = 0
	}
	if n.dir {
		out.Mode = syscall.S_IFDIR | 0o555 | write&0o200
		out.Size, at = 4096, f.b.opened
	} else {
		out.Mode = syscall.S_IFREG | 0o444 | write&0o200
		out.Size = uint64(max(n.object.Size, 0))
		if st := f.stageLocked(n); st != nil {
			out.Size = uint64(st.size)
			at = st.rec.Since
			if info, err := st.f.Stat(); err == nil {
				at = info.ModTime()
			}
		}
		if n.gone {
			out.Nlink = 0
		}
	}
	out.Blocks = (out.Size + 511) / 512
	if at.Before(time.Unix(0, 0)) {
		at = time.Unix(0, 0)
	}
	out.SetTimes(&at, &at, &at)
}

// believedLocked tells whether what is known of a node need not be asked for.
func (f *FS) believedLocked(n *node) bool {
	return n.dir || n.gone || f.stageLocked(n) != nil || time.Now().Before(n.until)
}

// refresh asks for an object if what is known of it is too old.
func (f *FS) refresh(ctx context.Context, n *node) error {
	f.b.mu.Lock()
	key, believed := keyOf(n), f.believedLocked(n)
	f.b.mu.Unlock()
	if believed {
		return nil
	}
	o, err := f.b.cfg.Remote.Head(ctx, key)
	f.b.heard(err)
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	switch {
	case n.gone || f.stageLocked(n) != nil || n.parent == nil || keyOf(n) != key:
		return nil // it changed meanwhile
	case bucket.NotFound(err):
		f.detachLocked(n)
		n.gone = true
		f.noteLocked(line{ID: n.id, Gone: true}) //nolint:errcheck // it is logged
		return syscall.ENOENT
	case err != nil:
		return err
	}
	f.learnLocked(n, o)
	return nil
}

// GetAttr implements fuse.RawFileSystem.
func (f *FS) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	ctx, done := request(cancel, f.b.cfg.Deadline)
	defer done()
	f.b.mu.Lock()
	n, err := f.node(in.NodeId)
	f.b.mu.Unlock()
	if err == nil {
		err = f.refresh(ctx, n)
	}
	if err != nil {
		return status(err)
	}
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	f.attrLocked(n, &out.Attr)
	out.SetTimeout(f.validLocked(n))
	return fuse.OK
}

// validLocked is how long the kernel may believe what it is told of a node.
func (f *FS) validLocked(n *node) time.Duration {
	if n.dir || f.stageLocked(n) != nil {
		return min(f.b.cfg.TTL, time.Second)
	}
	return max(time.Until(n.until), 0)
}

func (f *FS) entryLocked(n *node, out *fuse.EntryOut) {
	n.lookups++
	out.NodeId, out.Generation = n.id, 1
	f.attrLocked(n, &out.Attr)
	out.SetEntryTimeout(f.validLocked(n))
	out.SetAttrTimeout(f.validLocked(n))
}

// SetAttr implements fuse.RawFileSystem. Sizes change; times can only be set to now, and
// modes and owners not at all.
func (f *FS) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	ctx, done := request(cancel, f.b.cfg.Deadline)
	defer done()
	f.b.mu.Lock()
	n, err := f.node(in.NodeId)
	if err != nil {
		f.b.mu.Unlock()
		return status(err)
	}
	var now fuse.Attr
	f.attrLocked(n, &now)
	f.b.mu.Unlock()
	if mode, ok := in.GetMode(); ok && mode&0o7777 != now.Mode&0o7777 {
		return fuse.EPERM
	}
	if uid, ok := in.GetUID(); ok && uid != 0 {
		return fuse.EPERM
	}
	if gid, ok := in.GetGID(); ok && gid != 0 {
		return fuse.EPERM
	}
	size, resize := in.GetSize()
	const given, toNow = fuse.FATTR_ATIME | fuse.FATTR_MTIME, fuse.FATTR_ATIME_NOW | fuse.FATTR_MTIME_NOW
	touch := in.Valid&toNow != 0
	// The kernel sends the time of a write's end by itself for some; what a program asks for is EPERM.
	if in.Valid&given != 0 && !touch && !resize {
		return fuse.EPERM
	}
	if (resize || touch && in.Valid&fuse.FATTR_MTIME_NOW != 0) && !n.dir {
		if err := f.change(ctx, n, size, resize); err != nil {
			return status(err)
		}
	}
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	f.attrLocked(n, &out.Attr)
	out.SetTimeout(f.validLocked(n))
	return fuse.OK
}

// change resizes a file, or makes it new of the same content: its time is then now. Without
// a handle it is uploaded at once.
func (f *FS) change(ctx context.Context, n *node, size uint64, resize bool) error {
	if size > bucket.MaxObject {
		return syscall.EFBIG
	}
	h, err := f.open(ctx, n, true, resize && size == 0)
	if err != nil {
		return err
	}
	st, err := f.staged(ctx, h)
	if err == nil {
		to := int64(size)
		if !resize {
			f.b.mu.Lock()
			to = st.size
			f.b.mu.Unlock()
		}
		err = f.b.truncate(st, to)
	}
	f.b.mu.Lock()
	others := len(n.handles) > 1
	f.b.mu.Unlock()
	if err == nil && !others {
		err = f.b.upload(ctx, st, true)
	}
	f.release(h)
	return err
}

// StatFs implements fuse.RawFileSystem: a bucket has no size.
func (f *FS) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	const block = 4096
	out.Bsize, out.Frsize, out.NameLen = block, block, bucket.MaxName
	out.Blocks, out.Bfree, out.Bavail = 1<<38, 1<<38, 1<<38 // 1 PiB
	out.Files, out.Ffree = 1<<40, 1<<40
	return fuse.OK
}

// Access implements fuse.RawFileSystem. The kernel checks permissions and does not ask.
func (f *FS) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.ENOSYS }
