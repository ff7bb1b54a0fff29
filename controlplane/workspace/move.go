package workspace

import (
	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// moveEntry is a host's rename. If what it renamed was moved by somebody else meanwhile
// it is moved from there; if the new name was taken meanwhile, it is kept under another.
func (h *host) moveEntry(op *posternv1.FileOp_Rename, at int64, result *posternv1.FileOpResult) error {
	for _, name := range [][]byte{op.Name, op.NewName} {
		if err := checkName(name); err != nil {
			return err
		}
	}
	n, from, err := h.source(op)
	if err != nil {
		return err
	}
	wanted, err := h.pathIn(op.NewParent, op.NewName)
	if err != nil {
		return err
	}
	to, err := h.directory(op.NewParent)
	if err != nil {
		return err
	}
	if op.Exchange {
		return h.exchange(op, n, from, to, at, wanted)
	}
	conflict := to == nil
	if conflict {
		if to, err = h.conflicts(); err != nil {
			return err
		}
	}
	if err := h.mayMove(n, to); err != nil {
		return err
	}
	name := op.NewName
	if !conflict {
		there, err := h.lookup(to.ID, name)
		if err != nil {
			return err
		}
		switch {
		case there == nil:
		case there.ID == n.ID:
			if from.parent == to.ID && from.name == string(name) {
				return nil // it is there
			}
			// Two names of one file: the old one goes.
			return h.unlinkMoved(n, from, at)
		default:
			replaced, err := h.replace(there, op, n, to, at)
			if err != nil {
				return err
			}
			conflict = !replaced
		}
	}
	if conflict {
		if name, err = h.freeName(to.ID, op.NewName, h.name); err != nil {
			return err
		}
	}
	lived, err := h.alive(n)
	if err != nil {
		return err
	}
	if err := h.unlink(from.parent, []byte(from.name), n, at); err != nil {
		return err
	}
	n.Ctime = at
	if err := h.link(to.ID, name, n, at); err != nil {
		return err
	}
	if !lived {
		if err := h.recharge(n, from); err != nil {
			return err
		}
	}
	h.did.add("rename", wanted, 0)
	if conflict {
		return h.kept(result, wanted, n)
	}
	return nil
}

// source is what a host renames, and the name that it has here: the one that the host
// knows, another one, or one in the trash.
func (h *host) source(op *posternv1.FileOp_Rename) (*node, place, error) {
	none := place{}
	id, err := h.redirected(op.Id, filetree.NoBase)
	if err != nil {
		return nil, none, err
	}
	n, err := h.node(id)
	if err != nil {
		return nil, none, err
	}
	if n == nil || id <= filetree.LastReserved {
		return nil, none, proto.Errorf(proto.CodeNotFound, "node %d is not there", op.Id)
	}
	if d, err := h.directory(op.Parent); err != nil {
		return nil, none, err
	} else if d != nil {
		e, err := h.entry(d.ID, op.Name)
		if err != nil {
			return nil, none, err
		}
		if e.node == n.ID {
			return n, e.place, nil
		}
	}
	if n.Parent == 0 {
		return nil, none, proto.Errorf(proto.CodeNotFound, "node %d is not there", op.Id)
	}
	return n, place{n.Parent, string(n.Name)}, nil
}

// mayMove fails if a directory would come to lie in itself, or too deep.
func (t *tree) mayMove(n, to *node) error {
	if n.Type != filetree.Directory {
		return nil
	}
	inside, err := t.below(to.ID, n.ID)
	if err != nil {
		return err
	}
	if inside {
		return proto.Errorf(proto.CodeInvalid, "a directory can't be moved into itself")
	}
	// How deep it is itself is not looked at: a chain can so grow beyond the bound once,
	// and walks stop there.
	return t.shallow(to, filetree.Directory)
}

// replace removes what a rename is to replace. It is false if that is to stay: it is not
// what the host knew, or is not to be replaced by such a thing.
func (h *host) replace(there *node, op *posternv1.FileOp_Rename, n, to *node, at int64) (bool, error) {
	known := there.ID == op.Replaces
	if !known && op.Replaces != 0 {
		kept, err := h.redirected(op.Replaces, filetree.NoBase)
		if err != nil {
			return false, err
		}
		known = kept == there.ID
	}
	if !known || (there.Type == filetree.Directory) != (n.Type == filetree.Directory) {
		return false, nil
	}
	if there.Type == filetree.Directory {
		if some, err := h.hasEntries(there.ID); err != nil || some {
			return false, err
		}
	}
	there.Ctime = at
	return true, h.trash(to.ID, op.NewName, there, at)
}

func (h *host) unlinkMoved(n *node, from place, at int64) error {
	n.Ctime = at
	return h.unlink(from.parent, []byte(from.name), n, at)
}

// exchange swaps two names; both must be what the host knew.
func (h *host) exchange(op *posternv1.FileOp_Rename, n *node, from place, to *node, at int64, wanted []byte) error {
	changed := proto.Errorf(proto.CodeInvalid, "the two names were changed meanwhile: they are not swapped")
	if to == nil || from.parent == filetree.Trash || from.name != string(op.Name) {
		return changed
	}
	other, err := h.lookup(to.ID, op.NewName)
	if err != nil {
		return err
	}
	if other == nil || op.Replaces != 0 && other.ID != op.Replaces {
		return changed
	}
	if other.ID == n.ID {
		return nil
	}
	dir, err := h.node(from.parent)
	if err != nil {
		return err
	}
	if err := h.mayMove(n, to); err != nil {
		return err
	}
	if err := h.mayMove(other, dir); err != nil {
		return err
	}
	n.Ctime, other.Ctime = at, at
	// Both lose their name first: a link that is the last must not be the last for a moment.
	for _, step := range []func() error{
		func() error { return h.unlink(from.parent, op.Name, n, at) },
		func() error { return h.unlink(to.ID, op.NewName, other, at) },
		func() error { return h.link(to.ID, op.NewName, n, at) },
		func() error { return h.link(from.parent, op.Name, other, at) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	h.did.add("rename", wanted, 0)
	return nil
}

// recharge counts what came back out of the trash, and takes it off the trash's list.
func (t *tree) recharge(n *node, from place) error {
	if err := t.flush(); err != nil {
		return err
	}
	nodes, stored := uint64(0), n.Stored
	if n.Type == filetree.Directory {
		var err error
		if nodes, _, stored, err = t.tx.Subtree(t.ctx, n.ID); err != nil {
			return err
		}
	}
	if err := t.charge(int64(nodes)+1, int64(stored), true); err != nil {
		return err
	}
	id, ok := parseTrashName([]byte(from.name))
	if !ok || from.parent != filetree.Trash {
		return nil
	}
	return t.tx.DeleteTrashed(t.ctx, id)
}
