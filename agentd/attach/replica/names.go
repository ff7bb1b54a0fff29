package replica

import (
	"context"
	"syscall"

	"google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/agentd/attach/tree"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Caller is who asks for a change.
type Caller struct {
	UID, GID uint32
	// Unique is the request's number, for Replied; 0: it will not be sent again.
	Unique uint64
}

// nameAt is a name in a directory.
type nameAt struct {
	dir  uint64
	name string
}

// namesOf lists the names that an operation is about.
func namesOf(op tree.Op) []nameAt {
	var f posternv1.FileOp
	if proto.Unmarshal(op.Body, &f) != nil {
		return nil
	}
	switch o := f.Op.(type) {
	case *posternv1.FileOp_Create_:
		return []nameAt{{o.Create.Parent, string(o.Create.Name)}}
	case *posternv1.FileOp_MakeLink_:
		return []nameAt{{o.MakeLink.Parent, string(o.MakeLink.Name)}}
	case *posternv1.FileOp_Remove_:
		return []nameAt{{o.Remove.Parent, string(o.Remove.Name)}}
	case *posternv1.FileOp_Rename_:
		return []nameAt{{o.Rename.Parent, string(o.Rename.Name)}, {o.Rename.NewParent, string(o.Rename.NewName)}}
	}
	return nil
}

// enqueueLocked adds an operation to the queue.
func (r *Replica) enqueueLocked(b *tree.Batch, op tree.Op, f *posternv1.FileOp) {
	op.Number = r.s.Meta().NextOp
	f.Number = op.Number
	f.TimeNs = r.now(0)
	body, err := proto.Marshal(f)
	if err != nil {
		panic(err) // names and targets are bytes, so nothing can be wrong with it
	}
	op.Body = body
	b.Enqueue(op)
	r.wakeUploader()
}

// Replied tells what a request with that number was answered, if its change was made:
// the node that it made, or 0.
func (r *Replica) Replied(unique uint64) (id uint64, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rep, ok := r.s.Reply(unique)
	return rep.ID, ok
}

// Lookup finds a name.
func (r *Replica) Lookup(ctx context.Context, dir uint64, name string) (Attr, error) {
	if len(name) > 255 {
		return Attr{}, syscall.ENAMETOOLONG
	}
	for {
		r.mu.Lock()
		d := r.s.Node(dir)
		switch {
		case d == nil:
			r.mu.Unlock()
			return Attr{}, syscall.ESTALE
		case d.Type != tree.Directory:
			r.mu.Unlock()
			return Attr{}, syscall.ENOTDIR
		}
		r.dirs.use(d)
		if id := d.Dir.Lookup(name); id != 0 {
			n, err := r.nodeLocked(id)
			if err != nil {
				r.mu.Unlock()
				return Attr{}, err
			}
			a := r.attrLocked(n)
			r.mu.Unlock()
			return a, nil
		}
		known := d.Dir.Loaded || d.Links == 0
		r.mu.Unlock()
		if known {
			return Attr{}, syscall.ENOENT
		}
		if err := r.loaded(ctx, dir); err != nil {
			return Attr{}, err
		}
	}
}

// Parent is the directory that a directory is in.
func (r *Replica) Parent(dir uint64) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.s.Node(dir); n != nil {
		return n.Parent
	}
	return tree.Root
}

// Name is what ReadDir tells of a name.
type Name struct {
	Cookie uint64
	Name   string
	Attr   Attr
}

// ReadDir lists the names of a directory behind a cookie, in order, until each returns
// false. It calls each without a lock, at most 512 names at a time, and none of "." and "..".
func (r *Replica) ReadDir(ctx context.Context, dir, cookie uint64, each func(Name) bool) error {
	defer r.dirs.step()()
	if err := r.loaded(ctx, dir); err != nil {
		return err
	}
	for {
		var names []Name
		r.mu.Lock()
		d := r.s.Node(dir)
		if d == nil || d.Dir == nil {
			r.mu.Unlock()
			return syscall.ESTALE
		}
		d.Dir.From(cookie, func(e tree.Entry) bool {
			if n, err := r.nodeLocked(e.ID); err == nil {
				names = append(names, Name{Cookie: e.Cookie, Name: e.Name, Attr: r.attrLocked(n)})
			}
			cookie = e.Cookie
			return len(names) < 512
		})
		r.mu.Unlock()
		if len(names) == 0 {
			return nil
		}
		for _, n := range names {
			if !each(n) {
				return nil
			}
		}
	}
}

// Make is what Make makes.
type Make struct {
	Type   tree.Type
	Mode   uint16
	Target string // of a symbolic link
	// Open: it is a file that is opened for writing at once; Whole handles, not passed through.
	Open bool
}

// Make makes a file, directory or symbolic link. EEXIST if the name is taken. Setuid and setgid are EPERM.
func (r *Replica) Make(ctx context.Context, by Caller, dir uint64, name string, m Make) (Attr, error) {
	if err := checkName(name); err != nil {
		return Attr{}, err
	}
	if m.Mode&^0o1777 != 0 {
		return Attr{}, syscall.EPERM
	}
	if m.Type == tree.Symlink && len(m.Target) > 4095 {
		return Attr{}, syscall.ENAMETOOLONG
	}
	defer r.dirs.step()()
	if err := r.loaded(ctx, dir); err != nil {
		return Attr{}, err
	}
	if err := r.haveID(ctx); err != nil {
		return Attr{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	d := r.s.Node(dir)
	switch {
	case d == nil:
		return Attr{}, syscall.ESTALE
	case d.Type != tree.Directory:
		return Attr{}, syscall.ENOTDIR
	case d.Links == 0:
		return Attr{}, syscall.ENOENT
	case d.Dir.Lookup(name) != 0:
		return Attr{}, syscall.EEXIST
	}
	if err := r.quotaLocked(0, 1); err != nil {
		return Attr{}, err
	}
	if err := r.beginLocked(2048 + 3*len(m.Target)); err != nil {
		return Attr{}, err
	}
	b := r.s.Batch()
	n := r.newNodeLocked(b, by, m)
	if n == nil {
		return Attr{}, r.refuse("nothing can be made", dir, errNoIDs)
	}
	n.Parent = dir
	b.Put(n)
	if m.Type == tree.Directory {
		b.Loaded(n.ID, true)
	}
	b.Link(dir, name, n.ID)
	r.touchDirLocked(b, dir)
	r.enqueueLocked(b, tree.Op{ID: n.ID, Dirs: [2]uint64{dir}}, createOp(dir, name, n))
	if by.Unique != 0 {
		b.Reply(tree.Reply{Unique: by.Unique, ID: n.ID})
	}
	if err := r.commitLocked(b); err != nil {
		return Attr{}, err
	}
	if m.Open {
		o, err := r.openNodeLocked(n, true, true)
		if err != nil {
			return Attr{}, err
		}
		o.handles++
	}
	r.notes.entry(dir, name)
	return r.attrLocked(n), nil
}

func (r *Replica) newNodeLocked(b *tree.Batch, by Caller, m Make) *tree.Node {
	now := r.now(0)
	n := &tree.Node{
		ID: r.takeIDLocked(b), Type: m.Type, Mode: m.Mode, UID: by.UID, GID: by.GID, Target: m.Target, Size: uint64(len(m.Target)),
		Mtime: now, Ctime: now, Btime: now, Atime: now, Links: 1,
	}
	if n.ID == 0 {
		return nil
	}
	if m.Type == tree.File {
		n.Flags = tree.Local
	}
	if m.Open {
		n.Flags |= tree.Writing | tree.Cached
	}
	return n
}

func createOp(dir uint64, name string, n *tree.Node) *posternv1.FileOp {
	p := &posternv1.Node{
		Id: n.ID, Type: posternv1.NodeType(n.Type), Mode: uint32(n.Mode), Uid: n.UID, Gid: n.GID,
		MtimeNs: n.Mtime, CtimeNs: n.Ctime, BtimeNs: n.Btime, Target: []byte(n.Target), Links: 1,
	}
	if len(n.Xattrs) > 0 {
		p.Xattrs = map[string][]byte{}
		for k, v := range n.Xattrs {
			p.Xattrs[k] = []byte(v)
		}
	}
	return &posternv1.FileOp{Op: &posternv1.FileOp_Create_{Create: &posternv1.FileOp_Create{Parent: dir, Name: []byte(name), Node: p}}}
}

// MakeUnnamed makes a file without a name, open for writing, as O_TMPFILE does. The control
// plane hears of it when it gets a name.
func (r *Replica) MakeUnnamed(ctx context.Context, by Caller, mode uint16) (Attr, error) {
	if mode&^0o1777 != 0 {
		return Attr{}, syscall.EPERM
	}
	if err := r.haveID(ctx); err != nil {
		return Attr{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.beginLocked(1024); err != nil {
		return Attr{}, err
	}
	b := r.s.Batch()
	n := r.newNodeLocked(b, by, Make{Type: tree.File, Mode: mode, Open: true})
	if n == nil {
		return Attr{}, r.refuse("nothing can be made", tree.Root, errNoIDs)
	}
	n.Links = 0
	b.Put(n)
	if by.Unique != 0 {
		b.Reply(tree.Reply{Unique: by.Unique, ID: n.ID})
	}
	if err := r.commitLocked(b); err != nil {
		return Attr{}, err
	}
	o, err := r.openNodeLocked(n, true, true)
	if err != nil {
		return Attr{}, err
	}
	o.handles++
	return r.attrLocked(n), nil
}

// touchDirLocked gives a directory new times, because its names changed.
func (r *Replica) touchDirLocked(b *tree.Batch, dir uint64) {
	c := r.s.Node(dir).Clone()
	now := r.now(c.Ctime)
	c.Mtime, c.Ctime = now, now
	b.Put(c)
	r.notes.node(dir)
}

// maxLinks is how many names a file may have.
const maxLinks = 65000

// Link gives a file another name.
func (r *Replica) Link(ctx context.Context, by Caller, id, dir uint64, name string) (Attr, error) {
	if err := checkName(name); err != nil {
		return Attr{}, err
	}
	defer r.dirs.step()()
	if err := r.loaded(ctx, dir); err != nil {
		return Attr{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	d := r.s.Node(dir)
	n, err := r.nodeLocked(id)
	switch {
	case err != nil:
		return Attr{}, err
	case d == nil:
		return Attr{}, syscall.ESTALE
	case d.Type != tree.Directory:
		return Attr{}, syscall.ENOTDIR
	case n.Type == tree.Directory:
		return Attr{}, syscall.EPERM
	case d.Links == 0:
		return Attr{}, syscall.ENOENT
	case d.Dir.Lookup(name) != 0:
		return Attr{}, syscall.EEXIST
	case n.Links >= maxLinks:
		return Attr{}, syscall.EMLINK
	}
	unnamed := n.Links == 0
	if unnamed && n.Version != 0 {
		// It was removed, and the control plane may have forgotten it: O_TMPFILE alone has
		// a way back from no name.
		return Attr{}, syscall.ENOENT
	}
	if err := r.beginLocked(4096); err != nil {
		return Attr{}, err
	}
	b := r.s.Batch()
	c := n.Clone()
	c.Links++
	c.Ctime = r.now(c.Ctime)
	b.Put(c)
	b.Link(dir, name, id)
	r.touchDirLocked(b, dir)
	op := tree.Op{ID: id, Dirs: [2]uint64{dir}}
	if unnamed {
		r.enqueueLocked(b, op, createOp(dir, name, c))
		if c.Size > 0 {
			r.dirtyLocked(b, c)
		}
	} else {
		r.enqueueLocked(b, op, &posternv1.FileOp{Op: &posternv1.FileOp_MakeLink_{MakeLink: &posternv1.FileOp_MakeLink{Id: id, Parent: dir, Name: []byte(name)}}})
	}
	if by.Unique != 0 {
		b.Reply(tree.Reply{Unique: by.Unique, ID: id})
	}
	if err := r.commitLocked(b); err != nil {
		return Attr{}, err
	}
	r.notes.entry(dir, name)
	return r.attrLocked(c), nil
}

// Remove removes a name: of a file or symbolic link (EISDIR otherwise), or of an empty
// directory if directory is set (ENOTDIR otherwise).
func (r *Replica) Remove(ctx context.Context, by Caller, dir uint64, name string, directory bool) error {
	defer r.dirs.step()()
	a, err := r.Lookup(ctx, dir, name)
	if err != nil {
		return err
	}
	if directory && a.Type == tree.Directory {
		if err := r.loaded(ctx, a.ID); err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	d := r.s.Node(dir)
	if d == nil {
		return syscall.ESTALE
	}
	id := d.Dir.Lookup(name)
	if id == 0 {
		return syscall.ENOENT
	}
	n, err := r.nodeLocked(id)
	switch {
	case err != nil:
		return err
	case directory && n.Type != tree.Directory:
		return syscall.ENOTDIR
	case !directory && n.Type == tree.Directory:
		return syscall.EISDIR
	case directory && n.Dir.Len() > 0:
		return syscall.ENOTEMPTY
	case directory && !n.Dir.Loaded:
		return syscall.EAGAIN
	}
	if err := r.beginRemovalLocked(2048); err != nil {
		return err
	}
	b := r.s.Batch()
	r.removeNameLocked(b, dir, name, n)
	r.touchDirLocked(b, dir)
	r.enqueueLocked(b, tree.Op{ID: id, Dirs: [2]uint64{dir}}, &posternv1.FileOp{Op: &posternv1.FileOp_Remove_{Remove: &posternv1.FileOp_Remove{Id: id, Parent: dir, Name: []byte(name)}}})
	if by.Unique != 0 {
		b.Reply(tree.Reply{Unique: by.Unique})
	}
	if err := r.commitLocked(b); err != nil {
		return err
	}
	r.notes.entry(dir, name)
	return nil
}

// removeNameLocked takes a name from a node, which stays without one until nobody has it
// open.
func (r *Replica) removeNameLocked(b *tree.Batch, dir uint64, name string, n *tree.Node) {
	b.Unlink(dir, name)
	c := n.Clone()
	c.Ctime = r.now(c.Ctime)
	if c.Links > 0 {
		c.Links--
	}
	if c.Type == tree.Directory {
		c.Links = 0
	}
	b.Put(c)
	r.notes.node(n.ID)
	if c.Links == 0 && !r.heldLocked(c.ID, nil) {
		r.dropLocked(b, c.ID)
	}
}

// Forgotten says that a Listener's kernel has forgotten a node.
func (r *Replica) Forgotten(l Listener, id uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.s.Node(id)
	if n == nil {
		return
	}
	held := r.unknown[id] && r.otherHoldsLocked(l, id)
	if !held {
		delete(r.unknown, id)
	}
	if o := r.open[id]; o != nil && o.lost && !held {
		// Handles of before a takeover: there are none any more.
		if n.Type == tree.File {
			o.handles, o.writers = 0, 0
			r.releaseWriterLocked(n, o)
			n = r.s.Node(id)
		}
		if o.lost = false; o.users == 0 {
			o.users = 1
			r.closeLocked(id, o)
		}
	}
	if o := r.open[id]; o != nil && !o.lost && !held && o.handles == 0 && o.writers == 0 && n.Type == tree.File && n.Flags&(tree.Cached|tree.Writing) != 0 {
		// Only an upload has it open.
		r.releaseWriterLocked(n, o)
		n = r.s.Node(id)
	}
	if n.Flags&(tree.Cached|tree.Writing) != 0 && r.open[id] == nil && !r.heldLocked(id, l) {
		c := n.Clone()
		c.Flags &^= tree.Cached | tree.Writing
		b := r.s.Batch()
		b.Put(c)
		_ = r.commitLocked(b) //nolint:errcheck // it was logged, and nobody waits
		n = c
	}
	if n.Links > 0 || n.Names > 0 || id == tree.Root || r.heldLocked(id, l) {
		return
	}
	b := r.s.Batch()
	r.dropLocked(b, id)
	_ = r.commitLocked(b) //nolint:errcheck // see above
}

// touchLocked gives a node a new ctime.
func (r *Replica) touchLocked(b *tree.Batch, id uint64) {
	c := r.s.Node(id).Clone()
	c.Ctime = r.now(c.Ctime)
	b.Put(c)
	r.notes.node(id)
}

// Readlink tells where a symbolic link points to.
func (r *Replica) Readlink(id uint64) (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.s.Node(id)
	switch {
	case n == nil:
		return "", syscall.ESTALE
	case n.Type != tree.Symlink:
		return "", syscall.EINVAL
	}
	return n.Target, nil
}
