package replica

import (
	"context"
	"syscall"

	"github.com/postern-dev/postern/agentd/attach/tree"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Flags of Rename, as renameat2(2) has them.
const (
	RenameNoReplace = 1
	RenameExchange  = 2
)

// Rename moves a name, in one step.
func (r *Replica) Rename(ctx context.Context, by Caller, dir uint64, name string, newDir uint64, newName string, flags uint32) error {
	if err := checkName(newName); err != nil {
		return err
	}
	if flags&^(RenameNoReplace|RenameExchange) != 0 || flags == RenameNoReplace|RenameExchange {
		return syscall.EINVAL
	}
	defer r.dirs.step()()
	if _, err := r.Lookup(ctx, dir, name); err != nil {
		return err
	}
	if err := r.loaded(ctx, newDir); err != nil {
		return err
	}
	if a, err := r.Lookup(ctx, newDir, newName); err == nil && a.Type == tree.Directory {
		if err := r.loaded(ctx, a.ID); err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	from, to := r.s.Node(dir), r.s.Node(newDir)
	if from == nil || to == nil || from.Dir == nil || to.Dir == nil {
		return syscall.ESTALE
	}
	if to.Links == 0 {
		return syscall.ENOENT
	}
	id, target := from.Dir.Lookup(name), to.Dir.Lookup(newName)
	n := r.s.Node(id)
	if id == 0 || n == nil {
		return syscall.ENOENT
	}
	var old *tree.Node
	if target != 0 {
		var err error
		if old, err = r.nodeLocked(target); err != nil {
			return err
		}
	}
	switch {
	case flags&RenameExchange != 0 && old == nil:
		return syscall.ENOENT
	case flags&RenameNoReplace != 0 && old != nil:
		return syscall.EEXIST
	case n.Type == tree.Directory && r.insideLocked(newDir, id):
		return syscall.EINVAL
	case flags&RenameExchange != 0 && old.Type == tree.Directory && r.insideLocked(dir, target):
		return syscall.EINVAL
	}
	if target == id {
		return nil // two names of one file, or one: nothing happens
	}
	if flags&RenameExchange == 0 && old != nil {
		switch {
		case n.Type == tree.Directory && old.Type != tree.Directory:
			return syscall.ENOTDIR
		case n.Type != tree.Directory && old.Type == tree.Directory:
			return syscall.EISDIR
		case old.Type == tree.Directory && (old.Dir.Len() > 0 || !old.Dir.Loaded):
			return syscall.ENOTEMPTY
		}
	}
	if err := r.beginLocked(4096); err != nil {
		return err
	}
	b := r.s.Batch()
	op := &posternv1.FileOp_Rename{
		Id: id, Parent: dir, Name: []byte(name), NewParent: newDir, NewName: []byte(newName), Exchange: flags&RenameExchange != 0, Replaces: target,
	}
	if op.Exchange {
		// One of them has no name for a moment, which only this batch sees.
		b.Unlink(dir, name)
		b.Unlink(newDir, newName)
		b.Link(newDir, newName, id)
		b.Link(dir, name, target)
		r.touchLocked(b, target)
	} else {
		if old != nil {
			r.removeNameLocked(b, newDir, newName, old)
		}
		b.Unlink(dir, name)
		b.Link(newDir, newName, id)
	}
	r.touchLocked(b, id)
	r.touchDirLocked(b, dir)
	if newDir != dir {
		r.touchDirLocked(b, newDir)
	}
	r.enqueueLocked(b, tree.Op{ID: id, Dirs: [2]uint64{dir, newDir}}, &posternv1.FileOp{Op: &posternv1.FileOp_Rename_{Rename: op}})
	if by.Unique != 0 {
		b.Reply(tree.Reply{Unique: by.Unique})
	}
	if err := r.commitLocked(b); err != nil {
		return err
	}
	r.notes.entry(dir, name)
	r.notes.entry(newDir, newName)
	return nil
}
