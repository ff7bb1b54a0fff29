package replica

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"

	"github.com/postern-dev/postern/agentd/attach/tree"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// errnoOf tells an operation what a failed call to the control plane means.
func errnoOf(err error) error {
	var errno syscall.Errno
	switch {
	case err == nil:
		return nil
	case errors.As(err, &errno) && !ofNetwork(err):
		return errno
	case errors.Is(err, context.Canceled):
		return syscall.EINTR
	}
	switch proto.CodeOf(err) {
	case proto.CodePolicyDenied:
		return syscall.EACCES
	case proto.CodeNotFound:
		return syscall.ESTALE
	default:
		return syscall.EIO
	}
}

// know returns when a node is known. The kernel asks for nodes that it has heard of, so
// one that is not known was dropped here.
func (r *Replica) know(ctx context.Context, id uint64) error {
	r.mu.Lock()
	known := r.s.Node(id) != nil
	r.mu.Unlock()
	if known {
		return nil
	}
	return syscall.ESTALE
}

// loaded returns when every name in a directory is known.
func (r *Replica) loaded(ctx context.Context, id uint64) error {
	for {
		r.mu.Lock()
		n := r.s.Node(id)
		r.dirs.use(n)
		switch {
		case n == nil:
			r.mu.Unlock()
			return syscall.ESTALE
		case n.Type != tree.Directory:
			r.mu.Unlock()
			return syscall.ENOTDIR
		case n.Dir.Loaded || n.Links == 0:
			r.mu.Unlock()
			return nil
		}
		wait := r.loading[id]
		if wait == nil {
			wait = make(chan struct{})
			dirs := append([]uint64{id}, r.besidesLocked(n)...)
			for _, d := range dirs {
				r.loading[d] = wait
			}
			r.mu.Unlock()
			r.giveWay(ctx)
			err := r.load(ctx, dirs...)
			r.mu.Lock()
			for _, d := range dirs {
				delete(r.loading, d)
			}
			close(wait)
			r.mu.Unlock()
			if err != nil {
				return err
			}
			continue
		}
		r.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return deadline(ctx)
		}
	}
}

// deadline is the errno of a context that ended.
func deadline(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return syscall.EIO
	}
	return syscall.EINTR
}

// maxDirectory is the most names that one directory may have here.
const maxDirectory = 10_000_000

// besides is how many directories are listed with one that somebody looks into, if it looks
// like going through all of them.
const besides = 63

// besidesLocked lists directories beside n that will be looked into next: if the one
// that they are in was listed, and another one in it before n.
func (r *Replica) besidesLocked(n *tree.Node) []uint64 {
	parent := r.s.Node(n.Parent)
	if n.ID == tree.Root || parent == nil || parent.Dir == nil || !parent.Dir.Loaded {
		return nil
	}
	walking := r.lookedInto == parent.ID
	r.lookedInto = parent.ID
	if !walking {
		return nil
	}
	var ids []uint64
	parent.Dir.From(0, func(e tree.Entry) bool {
		d := r.s.Node(e.ID)
		if d != nil && d.Type == tree.Directory && d != n && !d.Dir.Loaded && r.loading[e.ID] == nil {
			ids = append(ids, e.ID)
		}
		return len(ids) < besides
	})
	return ids
}

// enough is how many entries of directories that nobody asked for yet are taken.
const enough = 50_000

// load lists directories at the control plane and takes over what it says. Only the first
// is sure to be loaded then.
func (r *Replica) load(ctx context.Context, ids ...uint64) error {
	ctx, cancel := r.wait(ctx)
	defer cancel()
	r.mu.Lock()
	ws := r.s.Meta().WorkspaceID
	r.mu.Unlock()
	entries, taken := map[uint64][]*posternv1.Entry{}, map[uint64]bool{}
	// take merges a directory of which all was listed; what was listed of it is not needed any more.
	take := func(id uint64, seq uint64) error {
		if taken[id] || !slices.Contains(ids, id) {
			return nil
		}
		taken[id] = true
		r.mu.Lock()
		defer r.mu.Unlock()
		err := r.mergeLocked(id, entries[id], seq)
		delete(entries, id)
		if id != ids[0] {
			return nil // nobody asked for it
		}
		return err
	}
	var seq uint64
	var token []byte
	for total := 0; ; {
		var resp *posternv1.ListNodesResponse
		err := r.retry(ctx, func() (err error) {
			resp, err = r.cfg.Remote.ListNodes(ctx, &posternv1.ListNodesRequest{WorkspaceId: ws, Directories: ids, PageToken: token})
			return err
		})
		if err != nil {
			errno := errnoOf(err)
			if ctx.Err() != nil {
				errno = deadline(ctx)
			}
			if errno == syscall.EIO {
				return r.refuse("directory cannot be listed", ids[0], err)
			}
			return errno
		}
		if len(token) == 0 {
			seq = resp.Seq
		}
		seq = min(seq, resp.Seq)
		for _, e := range resp.Entries {
			entries[e.GetParent()] = append(entries[e.GetParent()], e)
		}
		for _, id := range resp.Complete {
			if err := take(id, seq); err != nil {
				return err
			}
		}
		if total += len(resp.Entries); total > maxDirectory {
			return r.refuse("directory cannot be listed", ids[0], fmt.Errorf("it has more than %d names", maxDirectory))
		}
		if token = resp.NextPageToken; len(token) == 0 {
			return take(ids[0], seq)
		}
		if taken[ids[0]] && total > enough {
			return nil
		}
	}
}

// mergeLocked makes a directory what the control plane listed, except where operations are
// on their way that it does not know.
func (r *Replica) mergeLocked(id uint64, entries []*posternv1.Entry, seq uint64) error {
	dir := r.s.Node(id)
	if dir == nil || dir.Dir == nil {
		return syscall.ESTALE
	}
	if err := r.reserveLocked(64<<10 + 512*len(entries)); err != nil {
		return err
	}
	b := r.s.Batch()
	pending := r.pendingNamesLocked(id)
	listed := make(map[string]bool, len(entries))
	for _, e := range entries {
		name := string(e.GetName())
		listed[name] = true
		if e.GetParent() != id || pending[name] {
			continue
		}
		if err := checkName(name); err != nil {
			r.log.Warn("the control plane sent a name that cannot be", "name", fmt.Sprintf("%.300q", name))
			continue
		}
		if err := r.takeNodeLocked(b, e.GetNode()); err != nil {
			r.log.Warn("the control plane sent a node that cannot be", "err", err)
			continue
		}
		r.takeNameLocked(b, id, name, e.GetNode().GetId())
		if len(b.Bytes()) > 1<<20 {
			if err := r.commitLocked(b); err != nil {
				return err
			}
			b = r.s.Batch()
		}
	}
	var gone []string
	dir.Dir.From(0, func(e tree.Entry) bool {
		if !listed[e.Name] && !pending[e.Name] {
			gone = append(gone, e.Name)
		}
		return true
	})
	for _, name := range gone {
		r.takeAwayLocked(b, id, name)
	}
	if !dir.Dir.Loaded {
		r.notes.always(id) // its number of links is known now
	}
	b.Loaded(id, true)
	r.dirs.use(r.s.Node(id))
	r.crowdedLocked()
	return r.commitLocked(b)
}

// takeNodeLocked takes over what the control plane says a node is. One that operations
// are on their way for, or whose content was changed here, stays as it is.
func (r *Replica) takeNodeLocked(b *tree.Batch, p *posternv1.Node) error {
	n, err := fromProto(p)
	if err != nil {
		return err
	}
	old := r.s.Node(n.ID)
	if old == nil {
		b.Put(n)
		return nil
	}
	if old.Type != n.Type {
		return fmt.Errorf("node %d was a %d and is a %d", n.ID, old.Type, n.Type)
	}
	if r.s.Touched(n.ID) > 0 && old.Type == tree.File || old.Has(tree.Dirty) || old.Has(tree.Writing) {
		r.stale[n.ID] = true
		return nil
	}
	if n.Seq != 0 && n.Seq <= old.Seq || r.s.Touched(n.ID) > 0 {
		return nil
	}
	n.Flags, n.Stamp, n.Atime, n.Parent = old.Flags, old.Stamp, max(old.Atime, n.Mtime), old.Parent
	if n.Version != old.Version && n.Type == tree.File {
		if r.open[n.ID] != nil {
			// Handles that are open go on with what they have; see Release.
			r.stale[n.ID] = true
			return nil
		}
		n.Flags &^= tree.Local | tree.Partial | tree.Redo
		delete(r.redo, n.ID)
		if err := r.removeCachedLocked(n.ID); err != nil {
			return err
		}
	}
	if n.ID == tree.Root {
		n.Parent, n.Links = tree.Root, 1
	}
	b.Put(n)
	r.notes.node(n.ID)
	return nil
}

// takeNameLocked makes a name stand for a node, whatever it stood for.
func (r *Replica) takeNameLocked(b *tree.Batch, dir uint64, name string, id uint64) {
	old := r.s.Node(dir).Dir.Lookup(name)
	if old == id {
		return
	}
	n := r.s.Node(id)
	if n.Type == tree.Directory && r.insideLocked(dir, id) {
		r.log.Warn("the control plane sent a directory that is in itself", "node", id)
		return
	}
	if old != 0 {
		r.takeAwayLocked(b, dir, name)
	}
	if n.Type == tree.Directory && n.Names > 0 {
		// A directory has one name.
		var at string
		r.s.Node(n.Parent).Dir.From(0, func(e tree.Entry) bool {
			at = e.Name
			return e.ID != id
		})
		b.Unlink(n.Parent, at)
		r.notes.entry(n.Parent, at)
	}
	b.Link(dir, name, id)
	r.notes.entry(dir, name)
	r.notes.node(dir)
}

// insideLocked tells whether dir is id or in it.
func (r *Replica) insideLocked(dir, id uint64) bool {
	for range 1 << 16 {
		if dir == id {
			return true
		}
		n := r.s.Node(dir)
		if dir == tree.Root || n == nil || n.Parent == dir {
			return false
		}
		dir = n.Parent
	}
	return true
}

// takeAwayLocked removes a name that is gone elsewhere. The node stays if it has other
// names, or operations on their way; or for those who have it open.
func (r *Replica) takeAwayLocked(b *tree.Batch, dir uint64, name string) {
	id := r.s.Node(dir).Dir.Lookup(name)
	if id == 0 {
		return
	}
	b.Unlink(dir, name)
	r.notes.entry(dir, name)
	r.notes.node(dir)
	r.forgetTreeLocked(b, id)
}

// forgetTreeLocked forgets a node without a name, and what is in it.
func (r *Replica) forgetTreeLocked(b *tree.Batch, id uint64) {
	n := r.s.Node(id)
	if n == nil || n.Names > 0 || id == tree.Root {
		return
	}
	if n.Type == tree.Directory {
		var names []string
		n.Dir.From(0, func(e tree.Entry) bool {
			names = append(names, e.Name)
			return true
		})
		for _, name := range names {
			child := n.Dir.Lookup(name)
			b.Unlink(id, name)
			r.notes.entry(id, name)
			r.forgetTreeLocked(b, child)
		}
	}
	if r.s.Touched(id) > 0 || n.Has(tree.Dirty) || n.Has(tree.Writing) {
		return // its operations go to the control plane, which keeps it as a conflict
	}
	if r.heldLocked(id, nil) {
		c := n.Clone()
		c.Links = 0
		b.Put(c)
		return
	}
	r.dropLocked(b, id)
}

// heldLocked tells whether the kernel may know a node, other than by not.
func (r *Replica) heldLocked(id uint64, not Listener) bool {
	if r.open[id] != nil {
		return true
	}
	return r.otherHoldsLocked(not, id)
}

func (r *Replica) otherHoldsLocked(not Listener, id uint64) bool {
	for _, l := range r.listeners {
		if l != not && l.Holds(id) {
			return true
		}
	}
	return false
}

// dropLocked forgets a node and its content.
func (r *Replica) dropLocked(b *tree.Batch, id uint64) {
	n := r.s.Node(id)
	if n == nil {
		return
	}
	if n.Type == tree.File {
		if n.Has(tree.Dirty) {
			r.unsent -= int64(n.Size)
		}
		if n.Has(tree.Local) || n.Has(tree.Partial) {
			r.doomed[id] = true
		}
		r.lru.remove(id)
		delete(r.redo, id)
		delete(r.closed, id)
	}
	b.Drop(id)
}

// pendingNamesLocked lists the names in a directory that operations on their way are about.
func (r *Replica) pendingNamesLocked(dir uint64) map[string]bool {
	if r.s.Touched(dir) == 0 {
		return nil
	}
	names := map[string]bool{}
	for _, op := range r.s.Queue() {
		if op.Dirs[0] != dir && op.Dirs[1] != dir {
			continue
		}
		for _, at := range namesOf(op) {
			if at.dir == dir {
				names[at.name] = true
			}
		}
	}
	return names
}
