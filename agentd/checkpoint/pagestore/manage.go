package pagestore

import (
	"cmp"
	"context"
	"errors"
	"os"
	"slices"
	"time"

	"github.com/postern-dev/postern/proto"
)

// Get returns a checkpoint; NOT_FOUND if there is none, INTERNAL if it is damaged.
func (s *Store) Get(id ID) (Checkpoint, error) {
	_, rec, done, err := s.read(id)
	if err != nil {
		return Checkpoint{}, err
	}
	done()
	return rec.Checkpoint, nil
}

// List returns an organization's checkpoints, oldest first; only those of kernel if
// that is not empty. damaged are the ids of those whose description can't be read:
// their kernel is unknown.
func (s *Store) List(organization, kernel string) (list []Checkpoint, damaged []ID) {
	o, _ := s.organization(organization, false) //nolint:errcheck // only making one can fail
	if o == nil {
		return nil, nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for id, p := range o.points {
		switch {
		case p.storing:
		case p.damage != nil:
			damaged = append(damaged, id)
		case kernel == "" || p.rec.Kernel == kernel:
			list = append(list, p.rec.Checkpoint)
		}
	}
	slices.Sort(damaged)
	slices.SortFunc(list, func(a, b Checkpoint) int {
		return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.ID, b.ID))
	})
	return list, damaged
}

// Node is a checkpoint in the tree of its kernel, with those made after it.
type Node struct {
	Checkpoint
	Children []*Node // oldest first
}

// Tree returns a kernel's checkpoints as they follow from each other: the roots,
// oldest first. A checkpoint whose parent is not one of the kernel's is a root.
func (s *Store) Tree(organization, kernel string) []*Node {
	list, _ := s.List(organization, kernel)
	nodes := make(map[ID]*Node, len(list))
	for _, c := range list {
		nodes[c.ID] = &Node{Checkpoint: c}
	}
	var roots []*Node
	for _, c := range list {
		n := nodes[c.ID]
		if parent := nodes[c.Parent]; parent != nil && !above(nodes, n, parent) {
			parent.Children = append(parent.Children, n)
		} else {
			roots = append(roots, n)
		}
	}
	return roots
}

// above says whether n is p or an ancestor of it: parents that callers made up could
// form a ring.
func above(nodes map[ID]*Node, n, p *Node) bool {
	for range len(nodes) {
		if p == nil {
			return false
		}
		if p == n {
			return true
		}
		p = nodes[p.Parent]
	}
	return true
}

// Protect sets or clears a checkpoint's protection from Retain. It is durable when it
// returns.
func (s *Store) Protect(id ID, on bool) error {
	return s.change(id, func(r *record) bool {
		changed := r.Protected != on
		r.Protected = on
		return changed
	})
}

// change rewrites a description. One at a time: o.collecting also serves for that,
// since neither takes long.
func (s *Store) change(id ID, edit func(*record) bool) error {
	if err := s.enter(); err != nil {
		return inCheckpoint("change", id, err)
	}
	defer s.busy.Done()
	o, err := s.find(id)
	if err != nil {
		return err
	}
	o.collecting.Lock()
	defer o.collecting.Unlock()
	return inCheckpoint("change", id, o.changeRecord(id, edit))
}

func (o *orgStore) changeRecord(id ID, edit func(*record) bool) error {
	_, rec, done, err := o.store.read(id)
	if err != nil {
		return err
	}
	defer done()
	if !edit(&rec) {
		return nil
	}
	k := o.keyset().newest
	meta, err := o.sealRecord(k, &rec)
	if err != nil {
		return err
	}
	before := o.fileSize(o.metaPath(id))
	if err := writeWhole(o.fs, o.pointDir(), string(id)+metaSuffix, meta); err != nil {
		return err
	}
	o.store.used.Add(int64(len(meta)) - before)
	if err := o.fs.syncDir(o.pointDir()); err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.points[id].rec, o.points[id].metaKey = &rec, k.id
	return nil
}

// Delete removes a checkpoint; its children become children of its parent. It is
// gone for good when Delete returns; its chunks are freed by Collect. A damaged one
// can be deleted. One that is being restored can't: UNAVAILABLE.
func (s *Store) Delete(id ID) error {
	if err := s.enter(); err != nil {
		return inCheckpoint("delete", id, err)
	}
	defer s.busy.Done()
	o, err := s.find(id)
	if err != nil {
		return err
	}
	o.collecting.Lock()
	defer o.collecting.Unlock()
	return inCheckpoint("delete", id, o.delete(id))
}

func (o *orgStore) delete(id ID) error {
	children, parent, err := o.family(id)
	if err != nil {
		return err
	}
	// Children first: a crash in between leaves a tree that is right either way.
	for _, child := range children {
		if err := o.changeRecord(child, func(r *record) bool { r.Parent = parent; return true }); err != nil {
			return err
		}
	}
	o.mu.Lock()
	p := o.points[id]
	if p == nil || p.storing {
		o.mu.Unlock()
		return notFound(id)
	}
	if p.readers > 0 {
		o.mu.Unlock()
		return proto.Errorf(proto.CodeUnavailable, "it is being read just now: try again when its restore or export has ended")
	}
	delete(o.points, id)
	o.mu.Unlock()
	freed, err := o.removePoint(id)
	o.mu.Lock()
	defer o.mu.Unlock()
	if err != nil {
		o.points[id] = p
		return err
	}
	o.store.used.Add(-freed)
	o.dirty = true
	return nil
}

// removePoint removes the files of a checkpoint. An error means that its description
// may be there after a crash, so nothing else of it was touched.
func (o *orgStore) removePoint(id ID) (freed int64, err error) {
	freed, err = o.removeFile(o.metaPath(id))
	if err == nil {
		err = o.fs.syncDir(o.pointDir())
	}
	if err != nil {
		return 0, err
	}
	n, err := o.removeFile(o.filesPath(id))
	if err != nil { // it means nothing any more; the next Open removes it
		o.store.log.Warn("could not remove a deleted checkpoint's list of files", "checkpoint", id, "err", err)
	}
	return freed + n, nil
}

// removeFile removes a file, if it is there, and returns its size.
func (o *orgStore) removeFile(path string) (size int64, err error) {
	size = o.fileSize(path)
	if err := o.fs.remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	return size, nil
}

// fileSize is the size of a file of the store, for Used; 0 if it is not there.
func (o *orgStore) fileSize(path string) int64 {
	f, err := o.fs.open(path)
	if err != nil {
		return 0
	}
	defer f.Close()     //nolint:errcheck // only read
	size, _ := f.size() //nolint:errcheck // an estimate will do
	return size
}

// family returns the children of a checkpoint, and its parent.
func (o *orgStore) family(id ID) (children []ID, parent ID, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p := o.points[id]
	if p == nil || p.storing {
		return nil, "", notFound(id)
	}
	if p.rec != nil {
		parent = p.rec.Parent
	}
	for other, q := range o.points {
		if q.rec != nil && q.rec.Parent == id && other != parent {
			children = append(children, other)
		}
	}
	slices.Sort(children)
	return children, parent, nil
}

// Policy says which of a kernel's checkpoints Retain keeps. One that any of its rules
// keeps, stays; so do protected ones and the newest. The zero Policy keeps all.
type Policy struct {
	Last   int           // the newest so many
	Every  time.Duration // besides, the newest of each period of this length
	MaxAge time.Duration // but nothing that is older than this
}

// keeps sorts out of list (oldest first) what p does not keep.
func (p Policy) expired(list []Checkpoint, now time.Time) []ID {
	if p == (Policy{}) {
		return nil
	}
	var out []ID
	period := int64(-1)
	for i, c := range slices.Backward(list) {
		newest := i == len(list)-1
		keep := p.Last == 0 && p.Every == 0 || len(list)-i <= p.Last
		if p.Every > 0 {
			if at := c.Time.UnixNano() / int64(p.Every); at != period {
				keep, period = true, at
			}
		}
		if p.MaxAge > 0 && now.Sub(c.Time) > p.MaxAge {
			keep = false
		}
		if !keep && !newest && !c.Protected {
			out = append(out, c.ID)
		}
	}
	return out
}

// Retain deletes the checkpoints of a kernel that p does not keep, and returns them,
// newest first. No checkpoint needs its ancestors: each is whole by itself. One that
// is being restored is left for the next time.
func (s *Store) Retain(ctx context.Context, organization, kernel string, p Policy) ([]ID, error) {
	list, _ := s.List(organization, kernel)
	var deleted []ID
	for _, id := range p.expired(list, time.Now()) {
		if err := ctx.Err(); err != nil {
			return deleted, err
		}
		switch err := s.Delete(id); proto.CodeOf(err) {
		case proto.CodeUnavailable, proto.CodeNotFound:
		default:
			if err != nil {
				return deleted, err
			}
			deleted = append(deleted, id)
		}
	}
	return deleted, nil
}
