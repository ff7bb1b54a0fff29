package replica

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/postern-dev/postern/agentd/attach/tree"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Attr is what stat tells of a node.
type Attr struct {
	ID       uint64
	Type     tree.Type
	Mode     uint16
	UID, GID uint32
	Size     uint64
	Blocks   uint64 // of 512 bytes; what the content would take if it were here whole
	Nlink    uint32
	Atime    int64
	Mtime    int64
	Ctime    int64
	Btime    int64
	Cached   bool
}

func (r *Replica) attrLocked(n *tree.Node) Attr {
	a := Attr{
		ID: n.ID, Type: n.Type, Mode: n.Mode, UID: n.UID, GID: n.GID, Size: n.Size, Nlink: n.Nlink(),
		Atime: n.Atime, Mtime: n.Mtime, Ctime: n.Ctime, Btime: n.Btime, Cached: n.Has(tree.Cached),
	}
	switch n.Type {
	case tree.Directory:
		a.Size = 4096
		a.Blocks = 8
	case tree.Symlink:
		a.Size = uint64(len(n.Target))
	default:
		a.Blocks = (n.Size + 4095) / 4096 * 8
		if o := r.open[n.ID]; o != nil && n.Has(tree.Local) {
			a.Blocks = o.file.Blocks()
		}
	}
	return a
}

// nodeLocked finds a node and takes over what was written to it.
func (r *Replica) nodeLocked(id uint64) (*tree.Node, error) {
	n := r.s.Node(id)
	if n == nil {
		return nil, syscall.ENOENT
	}
	o := r.open[id]
	if o == nil && r.unknown[id] {
		var err error
		if o, err = r.lostLocked(n); err != nil {
			return nil, err
		}
	}
	if o != nil && n.Type == tree.File {
		if err := r.absorbLocked(n, o); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// absorbLocked takes over size and times of a content that was written to by the
// kernel. What it changes in the node reaches the journal with the next flush; until
// then the node is journaled as Writing.
func (r *Replica) absorbLocked(n *tree.Node, o *opened) error {
	if o.writers == 0 && !o.lost && !n.Has(tree.Writing) && !n.Has(tree.Mapped) {
		return nil
	}
	if !n.Has(tree.Local) && !n.Has(tree.Partial) {
		return nil
	}
	if o.file.Untouched() {
		return nil
	}
	size, mtime, ctime, err := o.file.Stat()
	if err != nil {
		return r.refuse("content cannot be looked at", n.ID, err)
	}
	if ctime == n.Stamp && size == n.Size {
		return nil
	}
	n.Size, n.Mtime, n.Stamp = size, mtime, ctime
	n.Ctime = max(n.Ctime, ctime)
	return nil
}

// GetAttr tells of a node.
func (r *Replica) GetAttr(ctx context.Context, id uint64) (Attr, error) {
	if err := r.know(ctx, id); err != nil {
		return Attr{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	n, err := r.nodeLocked(id)
	if err != nil {
		return Attr{}, err
	}
	return r.attrLocked(n), nil
}

// SetAttr is what SetAttr sets; nil: leave it.
type SetAttr struct {
	Mode         *uint16
	UID, GID     *uint32
	Size         *uint64
	Atime, Mtime *int64
	// Now: Mtime is this moment and was not chosen.
	Now bool
}

// SetAttr changes a node. Bits of the mode other than 01777 are EPERM.
func (r *Replica) SetAttr(ctx context.Context, id uint64, set SetAttr) (Attr, error) {
	if err := r.know(ctx, id); err != nil {
		return Attr{}, err
	}
	if set.Mode != nil && *set.Mode&^0o1777 != 0 {
		return Attr{}, syscall.EPERM
	}
	if set.Size != nil {
		if err := r.truncate(ctx, id, *set.Size); err != nil {
			return Attr{}, err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	n, err := r.nodeLocked(id)
	if err != nil {
		return Attr{}, err
	}
	if set.Mode == nil && set.UID == nil && set.GID == nil && set.Mtime == nil && set.Atime == nil {
		return r.attrLocked(n), nil
	}
	if err := r.beginLocked(1024); err != nil {
		return Attr{}, err
	}
	c, op := n.Clone(), &posternv1.FileOp_SetAttr{Id: id}
	if set.Mode != nil {
		c.Mode = *set.Mode
		m := uint32(c.Mode)
		op.Mode = &m
	}
	if set.UID != nil {
		c.UID, op.Uid = *set.UID, set.UID
	}
	if set.GID != nil {
		c.GID, op.Gid = *set.GID, set.GID
	}
	if set.Mtime != nil {
		c.Mtime, op.MtimeNs = *set.Mtime, set.Mtime
	}
	if set.Atime != nil {
		c.Atime = *set.Atime
	}
	c.Ctime = r.now(c.Ctime)
	b := r.s.Batch()
	b.Put(c)
	if op.MtimeNs != nil {
		delete(r.queued, id) // what is written later is sent later, or its time would be lost
	}
	if op.Mode != nil || op.Uid != nil || op.Gid != nil || op.MtimeNs != nil {
		r.enqueueLocked(b, tree.Op{ID: id}, &posternv1.FileOp{Op: &posternv1.FileOp_SetAttr_{SetAttr: op}})
	}
	if err := r.commitLocked(b); err != nil {
		return Attr{}, err
	}
	r.notes.node(id)
	return r.attrLocked(c), nil
}

// now is the time for a change, later than what it replaces even if the clock was set back
// by less than a second.
func (r *Replica) now(before int64) int64 {
	now := r.cfg.NowForTest().UnixNano()
	if now <= before && before-now < int64(time.Second) {
		return before + 1
	}
	return now
}

const (
	xattrName   = 255
	xattrValues = 64 << 10
	xattrNames  = 64
)

// GetXattr reads an attribute; ENODATA if it is not there.
func (r *Replica) GetXattr(ctx context.Context, id uint64, name string) ([]byte, error) {
	if err := r.know(ctx, id); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.s.Node(id)
	if n == nil {
		return nil, syscall.ENOENT
	}
	v, ok := n.Xattrs[name]
	if !ok {
		if !strings.HasPrefix(name, "user.") && name != "security.capability" {
			return nil, syscall.EOPNOTSUPP
		}
		return nil, syscall.ENODATA
	}
	return []byte(v), nil
}

// ListXattr lists the names of attributes.
func (r *Replica) ListXattr(ctx context.Context, id uint64) ([]string, error) {
	if err := r.know(ctx, id); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.s.Node(id)
	if n == nil {
		return nil, syscall.ENOENT
	}
	names := make([]string, 0, len(n.Xattrs))
	for k := range n.Xattrs {
		names = append(names, k)
	}
	return names, nil
}

// Flags of SetXattr.
const (
	XattrCreate  = 1
	XattrReplace = 2
)

// SetXattr sets an attribute, or removes it if value is nil. Names other than user.* are
// EOPNOTSUPP; more than 64 names, or values of more than 64 KiB together, ENOSPC.
func (r *Replica) SetXattr(ctx context.Context, id uint64, name string, value []byte, flags uint32) error {
	if err := r.know(ctx, id); err != nil {
		return err
	}
	if !strings.HasPrefix(name, "user.") || name == "user." {
		return syscall.EOPNOTSUPP
	}
	if len(name) > xattrName {
		return syscall.ERANGE
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	n, err := r.nodeLocked(id)
	if err != nil {
		return err
	}
	_, there := n.Xattrs[name]
	switch {
	case n.Type == tree.Symlink:
		return syscall.EPERM
	case value == nil && !there, flags&XattrReplace != 0 && !there:
		return syscall.ENODATA
	case flags&XattrCreate != 0 && there:
		return syscall.EEXIST
	}
	c := n.Clone()
	c.Xattrs = n.WithXattr(name, value)
	total := 0
	for _, v := range c.Xattrs {
		total += len(v)
	}
	if total > xattrValues || len(c.Xattrs) > xattrNames {
		return syscall.ENOSPC
	}
	if err := r.beginLocked(2*total + 8192); err != nil {
		return err
	}
	c.Ctime = r.now(c.Ctime)
	b := r.s.Batch()
	b.Put(c)
	r.enqueueLocked(b, tree.Op{ID: id}, &posternv1.FileOp{Op: &posternv1.FileOp_SetXattr_{SetXattr: &posternv1.FileOp_SetXattr{
		Id: id, Name: name, Value: value, Remove: value == nil,
	}}})
	return r.commitLocked(b)
}

// fromProto makes a node of what the control plane says, or says what is wrong with it:
// it is not trusted.
func fromProto(p *posternv1.Node) (*tree.Node, error) {
	n := &tree.Node{
		ID: p.GetId(), Type: tree.Type(p.GetType()), Mode: uint16(p.GetMode() & 0o1777), UID: p.GetUid(), GID: p.GetGid(), Size: p.GetSize(),
		Mtime: p.GetMtimeNs(), Ctime: p.GetCtimeNs(), Btime: p.GetBtimeNs(), Atime: p.GetMtimeNs(), Links: max(p.GetLinks(), 1),
		Version: p.GetVersion(), Seq: p.GetSeq(),
	}
	switch {
	case n.ID == 0:
		return nil, fmt.Errorf("node without an id")
	case n.Type < tree.File || n.Type > tree.Symlink:
		return nil, fmt.Errorf("node %d has the unknown type %d", n.ID, n.Type)
	case n.Size > filechunk.MaxFile:
		return nil, fmt.Errorf("node %d has %d bytes: at most %d", n.ID, n.Size, uint64(filechunk.MaxFile))
	case n.UID == ^uint32(0) || n.GID == ^uint32(0):
		return nil, fmt.Errorf("node %d has no owner", n.ID)
	}
	if n.Type == tree.Symlink {
		n.Target = string(p.GetTarget())
		if len(n.Target) == 0 || len(n.Target) > 4095 || strings.IndexByte(n.Target, 0) >= 0 {
			return nil, fmt.Errorf("symbolic link %d has a target of %d bytes", n.ID, len(n.Target))
		}
	}
	total := 0
	for k, v := range p.GetXattrs() {
		total += len(v)
		if !strings.HasPrefix(k, "user.") || len(k) > xattrName || strings.IndexByte(k, 0) >= 0 || len(p.GetXattrs()) > xattrNames || total > xattrValues {
			return nil, fmt.Errorf("node %d has attributes that are not allowed", n.ID)
		}
		if n.Xattrs == nil {
			n.Xattrs = map[string]string{}
		}
		n.Xattrs[k] = string(v)
	}
	return n, nil
}

// checkName says what the kernel would say of a name.
func checkName(name string) error {
	switch {
	case len(name) > 255:
		return syscall.ENAMETOOLONG
	case name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00"):
		return syscall.EINVAL
	}
	return nil
}
