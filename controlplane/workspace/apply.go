package workspace

import (
	"errors"
	"fmt"
	"slices"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// host applies the operations of an agent's mount.
type host struct {
	*tree
	// agent is the agent's id, name its name.
	agent, name string
	// blocks caches that node numbers are the agent's.
	mine map[uint64]bool
	// did tells what was done, for the audit log.
	did *deeds
}

// apply applies one operation. The error is errQuota, the store's, or that of a chunk
// that is not stored; what else is wrong with the operation is in its result.
func (h *host) apply(op *posternv1.FileOp) (*posternv1.FileOpResult, error) {
	result := &posternv1.FileOpResult{Number: op.Number}
	at := op.TimeNs
	if at == 0 {
		at = h.now.UnixNano()
	}
	var err error
	switch o := op.Op.(type) {
	case *posternv1.FileOp_Create_:
		err = h.create(o.Create, at, result)
	case *posternv1.FileOp_SetContent_:
		err = h.setContent(o.SetContent, at, result)
	case *posternv1.FileOp_SetAttr_:
		err = h.setAttr(o.SetAttr, at)
	case *posternv1.FileOp_SetXattr_:
		err = h.setXattr(o.SetXattr, at)
	case *posternv1.FileOp_MakeLink_:
		err = h.makeLink(o.MakeLink, at, result)
	case *posternv1.FileOp_Rename_:
		err = h.moveEntry(o.Rename, at, result)
	case *posternv1.FileOp_Remove_:
		err = h.removeEntry(o.Remove, at)
	default:
		err = proto.Errorf(proto.CodeInvalid, "operation %d is of a kind that this control plane does not know", op.Number)
	}
	var coded *proto.Error
	var missing *missingChunkError
	if errors.As(err, &coded) && !errors.As(err, &missing) && coded.Err == nil {
		// Nothing was changed before an operation is refused.
		result.RefusedCode, result.Refused = coded.Code.String(), coded.Error()
		err = nil
	}
	if err != nil {
		return nil, err
	}
	result.Seq, err = h.done()
	return result, err
}

// directory is the directory that an agent means by a number, if it is to be had.
func (h *host) directory(id uint64) (*node, error) {
	id, err := h.redirected(id, filetree.NoBase)
	if err != nil {
		return nil, err
	}
	n, err := h.node(id)
	if err != nil || n == nil || n.Type != filetree.Directory || id == filetree.Trash {
		return nil, err
	}
	ok, err := h.alive(n)
	if err != nil || !ok {
		return nil, err
	}
	return n, nil
}

// redirected is where operations on a node go.
func (h *host) redirected(id, base uint64) (uint64, error) {
	n, err := h.node(id)
	if err != nil {
		return 0, err
	}
	if n != nil && base == filetree.NoBase {
		ok, err := h.alive(n)
		if err != nil || ok {
			return id, err
		}
	}
	kept, err := h.tx.Redirect(h.ctx, h.agent, id, base)
	if err != nil || kept == 0 {
		return id, err
	}
	k, err := h.node(kept)
	if err != nil || k == nil {
		return id, err
	}
	ok, err := h.alive(k)
	if err != nil || !ok {
		return id, err
	}
	return kept, nil
}

// free finds a place for a name that a host used in a directory: there, unless the
// directory is gone, then among the conflicts; and under that name, unless it is taken, then
// under another. It tells whether it is another place.
func (h *host) free(parent uint64, name []byte) (*node, []byte, bool, error) {
	d, err := h.directory(parent)
	if err != nil {
		return nil, nil, false, err
	}
	conflict := d == nil
	if d == nil {
		if d, err = h.conflicts(); err != nil {
			return nil, nil, false, err
		}
	}
	if !conflict {
		e, err := h.entry(d.ID, name)
		if err != nil || e.node == 0 {
			return d, name, false, err
		}
	}
	kept, err := h.freeName(d.ID, name, h.name)
	return d, kept, true, err
}

// freeName is a conflict's name that is free in a directory.
func (t *tree) freeName(parent uint64, name []byte, host string) ([]byte, error) {
	for n := 1; n < 100_000; n++ {
		kept := conflictName(name, host, t.now, n)
		e, err := t.entry(parent, kept)
		if err != nil || e.node == 0 {
			return kept, err
		}
	}
	return nil, proto.Errorf(proto.CodeOverloaded, "%q has too many conflicts: remove some", clip(string(name)))
}

// conflicts is the directory for what has no other place.
func (t *tree) conflicts() (*node, error) {
	n, err := t.lookup(filetree.Root, []byte(conflictsName))
	if err != nil || n != nil && n.Type == filetree.Directory {
		return n, err
	}
	if n != nil {
		return t.node(filetree.Root)
	}
	at := t.now.UnixNano()
	n = t.make(filetree.Node{ID: t.newID(), Type: filetree.Directory, Mode: 0o755, Mtime: at, Ctime: at, Btime: at})
	if err := t.charge(1, 0, true); err != nil {
		return nil, err
	}
	return n, t.link(filetree.Root, []byte(conflictsName), n, at)
}

// kept records that something was kept elsewhere than was wanted.
func (h *host) kept(result *posternv1.FileOpResult, wanted []byte, n *node) error {
	as, err := h.path(n)
	if err != nil {
		return err
	}
	if _, err := h.done(); err != nil {
		return err
	}
	result.Conflict = &posternv1.FileConflict{Path: wanted, KeptAs: as, KeptId: n.ID, TimeNs: h.now.UnixNano(), Agent: h.name}
	h.did.conflict(wanted, as)
	return h.tx.PutConflict(h.ctx, &filetree.Conflict{Seq: h.ws.Seq, Path: wanted, KeptAs: as, KeptID: n.ID, Time: h.now, Agent: h.name})
}

func (h *host) create(op *posternv1.FileOp_Create, at int64, result *posternv1.FileOpResult) error {
	row, err := newNode(op.GetNode(), at)
	if err != nil {
		return err
	}
	if err := checkName(op.Name); err != nil {
		return err
	}
	if owns, err := h.owns(row.ID); err != nil {
		return err
	} else if !owns {
		return proto.Errorf(proto.CodeInvalid, "node number %d was not reserved for this agent", row.ID)
	}
	if n, err := h.node(row.ID); err != nil {
		return err
	} else if n != nil || h.nodes[row.ID] != nil {
		return proto.Errorf(proto.CodeInvalid, "node number %d is in use, or was", row.ID)
	}
	d, name, conflict, err := h.free(op.Parent, op.Name)
	if err != nil {
		return err
	}
	if err := h.shallow(d, row.Type); err != nil {
		return err
	}
	if err := h.charge(1, 0, false); err != nil {
		return err
	}
	wanted, err := h.pathIn(op.Parent, op.Name)
	if err != nil {
		return err
	}
	n := h.make(row)
	if err := h.link(d.ID, name, n, at); err != nil {
		return err
	}
	h.did.add("create", wanted, 0)
	if conflict {
		return h.kept(result, wanted, n)
	}
	return nil
}

// shallow fails if a directory that would get a directory lies too deep.
func (t *tree) shallow(d *node, kind filetree.Type) error {
	if kind != filetree.Directory {
		return nil
	}
	depth, err := t.depth(d)
	if err == nil && depth >= maxDepth {
		err = proto.Errorf(proto.CodeInvalid, "directories lie %d deep: at most %d", depth+1, maxDepth)
	}
	return err
}

func (h *host) owns(id uint64) (bool, error) {
	if id <= filetree.LastReserved || id >= filetree.NoBase {
		return false, nil
	}
	if h.mine[id] {
		return true, nil
	}
	owns, err := h.tx.OwnsNode(h.ctx, h.agent, id)
	if owns {
		h.mine[id] = true
	}
	return owns, err
}

// newNode is what a Create makes.
func newNode(p *posternv1.Node, at int64) (filetree.Node, error) {
	n := filetree.Node{
		ID: p.GetId(), Type: filetree.Type(p.GetType()), Mode: p.GetMode() & modeBits, UID: p.GetUid(), GID: p.GetGid(),
		Mtime: p.GetMtimeNs(), Ctime: p.GetCtimeNs(), Btime: p.GetBtimeNs(),
	}
	for _, time := range []*int64{&n.Mtime, &n.Ctime, &n.Btime} {
		if *time == 0 {
			*time = at
		}
	}
	switch n.Type {
	case filetree.File, filetree.Directory:
		if len(p.GetTarget()) > 0 {
			return n, proto.Errorf(proto.CodeInvalid, "only a symbolic link has a target")
		}
	case filetree.Symlink:
		if err := checkTarget(p.GetTarget()); err != nil {
			return n, err
		}
		n.Target, n.Size, n.Mode = p.Target, uint64(len(p.Target)), 0o777
	default:
		return n, proto.Errorf(proto.CodeInvalid, "a node of type %d: there are files, directories and symbolic links", n.Type)
	}
	var err error
	n.Xattrs, err = encodeXattrs(p.GetXattrs())
	return n, err
}

func checkTarget(target []byte) error {
	if len(target) == 0 || len(target) > maxTarget || slices.Contains(target, 0) {
		return proto.Errorf(proto.CodeInvalid, "a symbolic link's target has 1 to %d bytes, and none is zero", maxTarget)
	}
	return nil
}

// setContent gives a file a content. If the file changed meanwhile, or is gone, the
// content is kept as another file.
func (h *host) setContent(op *posternv1.FileOp_SetContent, at int64, result *posternv1.FileOpResult) error {
	c := content{size: op.Size, chunks: op.Chunks, inline: op.Inline}
	if err := c.check(); err != nil {
		return err
	}
	mtime := op.MtimeNs
	if mtime == 0 {
		mtime = at
	}
	for _, base := range []uint64{op.BaseVersion, filetree.NoBase} {
		// What became of an earlier conflict of this mount goes on there.
		to, err := h.redirected(op.Id, base)
		if err != nil {
			return err
		}
		if to == op.Id {
			continue
		}
		n, err := h.node(to)
		if err != nil {
			return err
		}
		return h.write(n, c, n.Version, mtime, at, result)
	}
	n, err := h.node(op.Id)
	if err != nil {
		return err
	}
	ok, err := h.alive(n)
	if err != nil {
		return err
	}
	switch {
	case ok && n.Type != filetree.File:
		return proto.Errorf(proto.CodeInvalid, "node %d is no file", op.Id)
	case ok && n.Version == op.BaseVersion:
		return h.write(n, c, op.BaseVersion, mtime, at, result)
	case ok:
		if same, err := h.current(n, c); err != nil || same {
			result.Version = n.Version
			return err
		}
	case n == nil && op.Id <= filetree.LastReserved:
		return proto.Errorf(proto.CodeInvalid, "node %d is no file", op.Id)
	}
	if n == nil {
		// It was removed for good, or never made here: only a file of this agent's or one
		// that was known comes back.
		if known, err := h.owns(op.Id); err != nil {
			return err
		} else if !known && op.BaseVersion == 0 {
			return proto.Errorf(proto.CodeNotFound, "node %d is not there", op.Id)
		}
	}
	return h.conflictCopy(n, ok, op, c, mtime, at, result)
}

// conflictCopy keeps a content as a file of its own.
func (h *host) conflictCopy(n *node, alive bool, op *posternv1.FileOp_SetContent, c content, mtime, at int64, result *posternv1.FileOpResult) error {
	row := filetree.Node{Type: filetree.File, Mode: 0o644, Mtime: mtime, Ctime: at, Btime: at}
	name, wanted := []byte("file "+fmt.Sprint(op.Id)), []byte(nil)
	var d *node
	var err error
	switch {
	case n != nil && alive:
		if d, err = h.node(n.Parent); err != nil {
			return err
		}
		name = n.Name
	case n != nil:
		if wanted, name, d, err = h.wasAt(n); err != nil {
			return err
		}
	}
	if n != nil {
		row.Mode, row.UID, row.GID, row.Xattrs = n.Mode, n.UID, n.GID, n.Xattrs
	}
	// Everything that may be refused comes before anything is changed.
	stored, err := h.stored(c)
	if err != nil {
		return err
	}
	if err := h.keep(stored); err != nil {
		return err
	}
	if err := h.charge(1, int64(stored), false); err != nil {
		return err
	}
	if d == nil {
		if d, err = h.conflicts(); err != nil {
			return err
		}
	}
	if wanted == nil {
		if wanted, err = h.pathIn(d.ID, name); err != nil {
			return err
		}
	}
	kept, err := h.freeName(d.ID, name, h.name)
	if err != nil {
		return err
	}
	row.ID = h.newID()
	made := h.make(row)
	if err := h.link(d.ID, kept, made, at); err != nil {
		return err
	}
	if err := h.addVersion(made, c, 0, stored); err != nil {
		return err
	}
	result.Version = made.Version
	h.did.add("write", wanted, c.size)
	base := op.BaseVersion
	if !alive {
		base = filetree.NoBase
	}
	if err := h.tx.PutRedirect(h.ctx, h.agent, op.Id, base, made.ID); err != nil {
		return err
	}
	return h.kept(result, wanted, made)
}

// wasAt is where something lay that is in the trash: its path, its name, and the
// directory, if that is still there.
func (h *host) wasAt(n *node) (path, name []byte, dir *node, err error) {
	below, err := h.path(n)
	if err != nil {
		return nil, nil, nil, err
	}
	parts, err := splitPath(below)
	if err != nil || len(parts) == 0 {
		return nil, nil, nil, err
	}
	path = joinPath(parts)
	if id, ok := parseTrashName(parts[0]); ok {
		record, err := h.tx.Trashed(h.ctx, id)
		if err != nil {
			return nil, nil, nil, err
		}
		if record != nil {
			path = record.Path
			if len(parts) > 1 {
				path = append(slices.Clone(path), joinPath(parts[1:])...)
			}
		}
	}
	if parts, err = splitPath(path); err != nil || len(parts) == 0 {
		return nil, nil, nil, err
	}
	name = parts[len(parts)-1]
	dir, err = h.walk(parts[:len(parts)-1])
	if err != nil || dir == nil || dir.Type != filetree.Directory {
		return path, name, nil, err
	}
	return path, name, dir, nil
}

// write makes a file's next version, unless it is the one that it has. Both callers
// have seen that it fits.
func (h *host) write(n *node, c content, base uint64, mtime, at int64, result *posternv1.FileOpResult) error {
	path, err := h.path(n)
	if err != nil {
		return err
	}
	if err := h.setVersion(n, c, base, mtime, at); err != nil {
		return err
	}
	result.Version = n.Version
	h.did.add("write", path, c.size)
	return nil
}

func (h *host) setAttr(op *posternv1.FileOp_SetAttr, at int64) error {
	n, err := h.existing(op.Id)
	if err != nil {
		return err
	}
	if op.Mode != nil && n.Type != filetree.Symlink {
		n.Mode = *op.Mode & modeBits
	}
	if op.Uid != nil {
		n.UID = *op.Uid
	}
	if op.Gid != nil {
		n.GID = *op.Gid
	}
	if op.MtimeNs != nil {
		n.Mtime = *op.MtimeNs
	}
	n.Ctime = at
	h.touch(n)
	path, err := h.path(n)
	h.did.add("attributes", path, 0)
	return err
}

// existing is the node that an agent means, or NOT_FOUND.
func (h *host) existing(id uint64) (*node, error) {
	to, err := h.redirected(id, filetree.NoBase)
	if err != nil {
		return nil, err
	}
	n, err := h.node(to)
	if err != nil {
		return nil, err
	}
	ok, err := h.alive(n)
	if err == nil && (!ok || to == filetree.Trash) {
		err = proto.Errorf(proto.CodeNotFound, "node %d is not there", id)
	}
	return n, err
}

func (h *host) setXattr(op *posternv1.FileOp_SetXattr, at int64) error {
	n, err := h.existing(op.Id)
	if err != nil {
		return err
	}
	all, err := decodeXattrs(n.Xattrs)
	if err != nil {
		return err
	}
	if op.Remove {
		delete(all, op.Name)
	} else {
		if all == nil {
			all = map[string][]byte{}
		}
		all[op.Name] = op.Value
	}
	encoded, err := encodeXattrs(all)
	if err != nil {
		return err
	}
	n.Xattrs, n.Ctime = encoded, at
	h.touch(n)
	path, err := h.path(n)
	h.did.add("attributes", path, 0)
	return err
}

func (h *host) makeLink(op *posternv1.FileOp_MakeLink, at int64, result *posternv1.FileOpResult) error {
	if err := checkName(op.Name); err != nil {
		return err
	}
	n, err := h.existing(op.Id)
	if err != nil {
		return err
	}
	if n.Type == filetree.Directory {
		return proto.Errorf(proto.CodeInvalid, "a directory has one name")
	}
	if n.Links >= maxLinks {
		return proto.Errorf(proto.CodeInvalid, "node %d has %d names: no more", op.Id, n.Links)
	}
	if d, err := h.directory(op.Parent); err != nil {
		return err
	} else if d != nil {
		if e, err := h.entry(d.ID, op.Name); err != nil {
			return err
		} else if e.node == n.ID {
			return nil // it has that name
		}
	}
	if err := h.mayKeep(1); err != nil {
		return err
	}
	d, name, conflict, err := h.free(op.Parent, op.Name)
	if err != nil {
		return err
	}
	wanted, err := h.pathIn(op.Parent, op.Name)
	if err != nil {
		return err
	}
	n.Ctime = at
	if err := h.link(d.ID, name, n, at); err != nil {
		return err
	}
	h.did.add("link", wanted, 0)
	if conflict {
		return h.kept(result, wanted, n)
	}
	return nil
}

// maxLinks bounds the names of a file.
const maxLinks = 65_000

func (h *host) removeEntry(op *posternv1.FileOp_Remove, at int64) error {
	if err := checkName(op.Name); err != nil {
		return err
	}
	d, err := h.directory(op.Parent)
	if err != nil || d == nil {
		return err // gone with its directory
	}
	n, err := h.lookup(d.ID, op.Name)
	if err != nil || n == nil {
		return err
	}
	if n.ID != op.Id {
		kept, err := h.redirected(op.Id, filetree.NoBase)
		if err != nil || kept != n.ID {
			return err // somebody else put something else there
		}
	}
	if n.Type == filetree.Directory {
		some, err := h.hasEntries(n.ID)
		if err != nil {
			return err
		}
		if some {
			return proto.Errorf(proto.CodeAlreadyExists, "directory %q is not empty here: it was written to from elsewhere", clip(string(op.Name)))
		}
	}
	path, err := h.pathIn(d.ID, op.Name)
	if err != nil {
		return err
	}
	n.Ctime = at
	if err := h.trash(d.ID, op.Name, n, at); err != nil {
		return err
	}
	h.did.add("remove", path, 0)
	return nil
}
