package replica

import (
	"context"
	"fmt"
	"time"

	"github.com/postern-dev/postern/agentd/attach/tree"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// watchLoop takes over what changes elsewhere.
func (r *Replica) watchLoop() {
	wait := 100 * time.Millisecond
	for r.ctx.Err() == nil {
		r.mu.Lock()
		m := r.s.Meta()
		r.mu.Unlock()
		err := r.cfg.Remote.WatchChanges(r.ctx, &posternv1.WatchChangesRequest{WorkspaceId: m.WorkspaceID, SinceSeq: m.Seq}, func(resp *posternv1.WatchChangesResponse) error {
			wait = 100 * time.Millisecond
			r.connected(true, nil)
			return r.apply(r.ctx, resp)
		})
		if r.ctx.Err() != nil {
			return
		}
		r.connected(false, err)
		pause(r.ctx, wait)
		wait = min(2*wait, 10*time.Second)
	}
}

func (r *Replica) connected(yes bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.status.Connected == yes {
		return
	}
	r.status.Connected = yes
	if yes {
		r.log.Info("control plane tells of changes")
		r.wakeUploader()
		select {
		case r.linked <- struct{}{}:
		default:
		}
	} else {
		r.unlinked = time.Now()
		r.log.Warn("control plane does not tell of changes; what is here stays as it is", "err", err)
	}
}

// apply takes over changes of elsewhere.
func (r *Replica) apply(ctx context.Context, resp *posternv1.WatchChangesResponse) error {
	r.mu.Lock()
	if resp.Reset_ {
		r.log.Info("too much has changed to be told; listing directories again")
		r.resetLocked()
	}
	r.mu.Unlock()
	for _, c := range resp.Changes {
		if err := r.applyOne(c); err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.s.Meta()
	seq := resp.Seq
	if n := len(resp.Changes); n > 0 {
		seq = max(seq, resp.Changes[n-1].Seq)
	}
	if seq <= m.Seq {
		return nil
	}
	m.Seq = seq
	if err := r.reserveLocked(1024); err != nil {
		return err
	}
	b := r.s.Batch()
	b.Meta(m)
	return r.commitLocked(b)
}

// resetLocked makes everything be listed again.
func (r *Replica) resetLocked() {
	r.s.Each(func(n *tree.Node) {
		if r.listedLocked(n) || n.Type == tree.File && n.Flags&(tree.Local|tree.Partial) != 0 {
			r.stale[n.ID] = true
		}
	})
	r.wakeUploader()
}

// listedLocked tells whether a node is a directory of which somebody may believe to know names, or
// that there are none: it is listed, or was before its names were forgotten.
func (r *Replica) listedLocked(n *tree.Node) bool {
	return n.Type == tree.Directory && (n.Dir.Loaded || n.Dir.Len() > 0 || r.otherHoldsLocked(nil, n.ID))
}

func (r *Replica) applyOne(c *posternv1.NodeChange) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	id := c.GetNode().GetId()
	if c.MountId == r.cfg.MountID {
		return nil // see confirm
	}
	r.notes.fromElsewhere(true)
	defer r.notes.fromElsewhere(false)
	if r.s.Touched(id) > 0 {
		// What was made here goes first; the control plane decides, and then says.
		r.stale[id] = true
		for _, e := range append(c.Added, c.Removed...) {
			r.stale[e.GetParent()] = true
		}
		return nil
	}
	if err := r.reserveLocked(8192 + 2*approximate(c)); err != nil {
		return err
	}
	b := r.s.Batch()
	known := r.s.Node(id) != nil
	for _, e := range c.Added {
		dir := r.s.Node(e.GetParent())
		if dir == nil || dir.Dir == nil {
			continue
		}
		if !dir.Dir.Loaded {
			// Listed when somebody looks; but the kernel may know it from when it was listed before.
			r.notes.entry(dir.ID, string(e.GetName()))
			r.notes.node(dir.ID)
			switch at := dir.Dir.Lookup(string(e.GetName())); {
			case checkName(string(e.GetName())) != nil, at == id, r.s.Touched(dir.ID) > 0 && r.pendingNamesLocked(dir.ID)[string(e.GetName())]:
			case known && !c.Gone:
				r.takeNameLocked(b, dir.ID, string(e.GetName()), id)
			case at != 0: // another node had the name, and is known by it
				r.takeAwayLocked(b, dir.ID, string(e.GetName()))
			}
			continue
		}
		if checkName(string(e.GetName())) != nil {
			continue
		}
		if r.s.Touched(dir.ID) > 0 && r.pendingNamesLocked(dir.ID)[string(e.GetName())] {
			r.stale[dir.ID] = true
			continue
		}
		if !known && !c.Gone {
			if err := r.takeNodeLocked(b, c.Node); err != nil {
				r.log.Warn("the control plane sent a node that cannot be", "err", err)
				return nil
			}
			known = r.s.Node(id) != nil
		}
		if known {
			r.takeNameLocked(b, dir.ID, string(e.GetName()), id)
		}
	}
	if known && !c.Gone {
		if err := r.takeNodeLocked(b, c.Node); err != nil {
			r.log.Warn("the control plane sent a node that cannot be", "err", err)
		}
	}
	for _, e := range c.Removed {
		dir := r.s.Node(e.GetParent())
		if dir == nil || dir.Dir == nil || dir.Dir.Lookup(string(e.GetName())) != id {
			continue
		}
		r.takeAwayLocked(b, dir.ID, string(e.GetName()))
	}
	for _, e := range append(c.Added, c.Removed...) {
		if dir := r.s.Node(e.GetParent()); dir != nil {
			d := dir.Clone()
			d.Mtime = max(d.Mtime, c.GetNode().GetCtimeNs())
			d.Ctime = max(d.Ctime, c.GetNode().GetCtimeNs())
			b.Put(d)
			r.notes.node(d.ID)
		}
	}
	return r.commitLocked(b)
}

func approximate(c *posternv1.NodeChange) int {
	n := len(c.GetNode().GetTarget()) + 512
	for k, v := range c.GetNode().GetXattrs() {
		n += len(k) + len(v)
	}
	return n + 512*(len(c.Added)+len(c.Removed))
}

// takeStaleLocked takes those nodes that may be asked for again now.
func (r *Replica) takeStaleLocked() []uint64 {
	var ids []uint64
	for id := range r.stale {
		n := r.s.Node(id)
		if r.s.Touched(id) > 0 || n != nil && n.Type == tree.File && (n.Has(tree.Dirty) || n.Has(tree.Writing) || r.open[id] != nil) {
			continue
		}
		ids = append(ids, id)
		delete(r.stale, id)
		if len(ids) == 1000 {
			break
		}
	}
	return ids
}

// refresh asks the control plane for nodes again, and lists those that are directories.
func (r *Replica) refresh(ctx context.Context, ids []uint64) (err error) {
	if len(ids) == 0 {
		return nil
	}
	defer func() {
		if err != nil {
			r.mu.Lock()
			defer r.mu.Unlock()
			for _, id := range ids {
				r.stale[id] = true
			}
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	resp, err := r.cfg.Remote.GetNodes(ctx, &posternv1.GetNodesRequest{WorkspaceId: r.WorkspaceID(), Ids: ids})
	if err != nil {
		return err
	}
	for _, e := range resp.Entries {
		c := &posternv1.NodeChange{Node: e.Node, Added: []*posternv1.Entry{e}}
		if err := r.applyOne(c); err != nil {
			return err
		}
	}
	found := map[uint64]bool{}
	for _, e := range resp.Entries {
		found[e.GetNode().GetId()] = true
	}
	for _, id := range ids {
		r.mu.Lock()
		n := r.s.Node(id)
		list := n != nil && r.listedLocked(n)
		r.mu.Unlock()
		if !list || !found[id] && id != tree.Root {
			continue
		}
		if err := r.loadAgain(ctx, id); err != nil {
			return fmt.Errorf("list directory %d again: %w", id, err)
		}
	}
	return nil
}

func (r *Replica) loadAgain(ctx context.Context, id uint64) error {
	r.mu.Lock()
	r.notes.fromElsewhere(true)
	r.mu.Unlock()
	err := r.load(ctx, id)
	r.mu.Lock()
	r.notes.fromElsewhere(false)
	r.mu.Unlock()
	return err
}
