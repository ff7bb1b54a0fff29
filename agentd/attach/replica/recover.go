package replica

import (
	"errors"
	"os"
	"syscall"

	"github.com/postern-dev/postern/agentd/attach/journal"
	"github.com/postern-dev/postern/agentd/attach/tree"
)

// redoAt is where the journal has the content of a file.
type redoAt struct {
	at             journal.Place
	offset, length int
}

// recover makes files and tree agree after the process before this one ended, or the host did.
func (r *Replica) recover(redo map[uint64]redoAt) error {
	m := r.s.Meta()
	crashed := m.Boot != "" && m.Boot != r.cfg.Boot
	b := r.s.Batch()
	if m.Boot != r.cfg.Boot && m.WorkspaceID != "" {
		m.Boot = r.cfg.Boot
		b.Meta(m)
	}
	var look []*tree.Node
	r.s.Each(func(n *tree.Node) {
		if crashed && n.Type == tree.File && n.Has(tree.Partial) && !n.Has(tree.Dirty) {
			r.store.ForgetMap(n.ID) // which chunks are here was not synced
		}
		switch {
		case n.Type != tree.File:
		case n.Flags&(tree.Writing|tree.Redo|tree.Mapped) != 0:
			look = append(look, n)
		case crashed && n.Has(tree.Dirty):
			// What the last close without a sync noted is in the journal, perhaps, and in the file, perhaps.
			look = append(look, n)
		}
	})
	for _, n := range look {
		c := n.Clone()
		if _, ok := redo[n.ID]; ok && !crashed && n.Flags&(tree.Redo|tree.Writing|tree.Mapped) == tree.Redo {
			r.redo[n.ID] = true // nobody wrote to it since
			continue
		}
		if at, ok := redo[n.ID]; ok && n.Has(tree.Redo) {
			if crashed {
				// Not for sure in the file: its last sync was of the journal only.
				if err := r.rewrite(c, at); err != nil {
					return err
				}
			}
			r.redo[n.ID] = true
		}
		if crashed {
			c.Flags &^= tree.Mapped
		}
		// After a crash of the host, what was not synced may be anything. Nobody was promised
		// it, and what is clean is fetched again if its file is not what it was.
		if !crashed || c.Has(tree.Dirty) || c.Version == 0 {
			if err := r.settle(b, c); err != nil {
				return err
			}
		}
		b.Put(c)
	}
	for _, op := range r.s.Queue() {
		if op.Content {
			r.queued[op.ID] = op.Number
		}
	}
	r.s.Each(func(n *tree.Node) {
		if n.Type == tree.File && n.Has(tree.Dirty) {
			r.unsent += int64(n.Size)
		}
		if unsure(n) {
			r.stale[n.ID] = true
		}
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	// A dirty file without an operation: the process ended between the two.
	r.s.Each(func(n *tree.Node) {
		if n.Has(tree.Dirty) && n.Links > 0 && r.queued[n.ID] == 0 {
			r.dirtyLocked(b, n)
		}
	})
	if err := r.reserveLastLocked(len(b.Bytes()) + 4096); err != nil {
		return err
	}
	return r.commitLocked(b)
}

// unsure tells whether a file is to be asked for at the control plane before it is what it says: it lost a
// conflict, or what was written to it here was lost.
func unsure(n *tree.Node) bool {
	return n.Type == tree.File && !n.Has(tree.Dirty) && n.Version != 0 && n.Seq == 0
}

// takeStock finds out what contents take on disk, and which of them belong to nobody. It runs
// while the replica is used already: a file of the store is there only while its node is, or was.
func (r *Replica) takeStock() {
	err := r.store.Walk(func(id uint64, bytes int64) error {
		r.mu.Lock()
		defer r.mu.Unlock()
		if n := r.s.Node(id); n == nil || n.Type != tree.File {
			r.doomed[id] = true
		} else if r.open[id] == nil {
			r.lru.add(id, bytes)
		}
		return r.ctx.Err()
	})
	if err != nil {
		if r.ctx.Err() == nil {
			r.log.Warn("what contents take on disk is not known", "err", err)
		}
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stocked = true
}

// rewrite puts the content that the journal has into the file.
func (r *Replica) rewrite(c *tree.Node, at redoAt) error {
	entry, err := r.journal.ReadAt(at.at)
	if err != nil {
		return err
	}
	data := entry[at.offset : at.offset+at.length]
	if err := os.WriteFile(r.store.Path(c.ID), data, 0o600); err != nil {
		return err
	}
	c.Size = uint64(len(data))
	c.Stamp = 0
	var st syscall.Stat_t
	if err := syscall.Stat(r.store.Path(c.ID), &st); err != nil {
		return err
	}
	c.Stamp = st.Ctim.Nano()
	return nil
}

// settle takes over what was written to a file that nobody closed.
func (r *Replica) settle(b *tree.Batch, c *tree.Node) error {
	if !c.Has(tree.Local) && !c.Has(tree.Partial) {
		return nil
	}
	var st syscall.Stat_t
	err := syscall.Stat(r.store.Path(c.ID), &st)
	switch {
	case errors.Is(err, syscall.ENOENT):
		switch {
		case c.Size == 0 || !c.Has(tree.Dirty) && c.Version != 0:
		case c.Version == 0:
			// It was made since the last sync, and the host crashed: nobody was promised it.
			r.log.Warn("content that was not synced is gone", "node", c.ID, "bytes", c.Size)
			c.Size = 0
		default:
			// So was what was written to it, but not the version that it was written to.
			r.log.Warn("content that was not synced is gone; it is fetched again as it was before", "node", c.ID, "bytes", c.Size)
			c.Flags &^= tree.Local | tree.Partial | tree.Dirty | tree.Redo | tree.Mapped
			r.store.ForgetMap(c.ID)
			c.Seq = 0 // its size and times are asked for; see unsure
		}
		return nil
	case err != nil:
		return err
	}
	if c.Has(tree.Partial) && uint64(st.Size) == c.Size && (c.Has(tree.Dirty) || !r.store.MapChanged(c.ID)) {
		return nil // its times changed when chunks arrived
	}
	if st.Ctim.Nano() != c.Stamp || uint64(st.Size) != c.Size {
		c.Size, c.Mtime, c.Stamp = uint64(st.Size), st.Mtim.Nano(), st.Ctim.Nano()
		c.Ctime = max(c.Ctime, c.Stamp)
		c.Flags |= tree.Dirty
	}
	return nil
}
