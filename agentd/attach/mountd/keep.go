package mountd

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/postern-dev/postern/agentd/attach/fdkeeper"
)

var errNoKeeper = errors.New("the keeper of mounts has gone: another one is being started")

// atKeeper calls the keeper.
func (d *Daemon) atKeeper(do func(*fdkeeper.Client) error) error {
	d.mu.Lock()
	k, known := d.keeper, d.known
	d.mu.Unlock()
	if !known {
		return errNoKeeper
	}
	return do(k)
}

// beat tells the keeper that we live, and gives everything to another one when ours has
// died. It also closes workspaces that nobody needs.
func (d *Daemon) beat(ctx context.Context) {
	mem := newMemory()
	ticker := time.NewTicker(beatEvery)
	defer ticker.Stop()
	for {
		err := d.atKeeper((*fdkeeper.Client).Beat)
		if err != nil && ctx.Err() == nil {
			d.cfg.Logger.Warn("the keeper of mounts does not answer", "err", err)
			if err := d.another(ctx); err != nil && ctx.Err() == nil {
				d.cfg.Logger.Error("no other keeper of mounts", "err", err)
			}
		}
		d.tidy()
		mem.tune(time.Now())
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// opening tells the keeper that mounts are on their way, until ctx ends.
func (d *Daemon) opening(ctx context.Context, k *fdkeeper.Client) {
	ticker := time.NewTicker(openingEvery)
	defer ticker.Stop()
	for ctx.Err() == nil {
		if err := k.Opening(); err != nil {
			return // beat finds out
		}
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
	}
}

// another finds or starts a keeper and gives it all connections.
func (d *Daemon) another(ctx context.Context) error {
	d.changing.Lock()
	defer d.changing.Unlock()
	d.mu.Lock()
	d.known = false
	old := d.keeper
	d.mu.Unlock()
	if err := d.cfg.SpawnKeeper(ctx); err != nil {
		return err
	}
	k, err := old.Again()
	if err != nil {
		return err
	}
	d.mu.Lock()
	d.keeper = k
	d.mu.Unlock()
	kept, err := k.Claim(ctx)
	if err != nil {
		return err
	}
	d.mu.Lock()
	d.known = true
	var all []*superblock
	for _, o := range d.open {
		for _, s := range o.supers {
			all = append(all, s)
		}
	}
	d.mu.Unlock()
	for _, s := range all {
		give := d.give
		if slices.Contains(kept, s.name) { // the keeper lives, only the conversation had ended
			give = d.confirm
		}
		if err := give(k, s); err != nil {
			d.cfg.Logger.Error("mount not given to the new keeper", "workspace", s.state.Workspace, "err", err)
		}
	}
	d.cfg.Logger.Info("another keeper has the mounts", "connections", len(all))
	return nil
}

// give puts a superblock that is served already to a new keeper.
func (d *Daemon) give(k *fdkeeper.Client, s *superblock) error {
	text, err := d.blob(s)
	if err != nil {
		return err
	}
	d.mu.Lock()
	spare := s.spare
	s.spare = nil
	d.mu.Unlock()
	if spare == nil {
		return errors.New("there is no spare of it: it ends with this process")
	}
	defer spare.Close() //nolint:errcheck // the keeper has moved it
	if err := k.Put(s.name, s.minor, text, s.dev, spare); err != nil {
		return err
	}
	if err := k.Serving(s.name); err != nil {
		return err
	}
	next, err := k.Clone(s.name, false)
	if err != nil {
		return err
	}
	d.mu.Lock()
	s.spare = next
	d.mu.Unlock()
	return nil
}

// confirm tells a keeper that has a superblock already how it is now.
func (d *Daemon) confirm(k *fdkeeper.Client, s *superblock) error {
	text, err := d.blob(s)
	if err != nil {
		return err
	}
	return errors.Join(k.Update(s.name, text), k.Serving(s.name))
}

// reopen opens the workspaces of earlier lives that have something to send.
func (d *Daemon) reopen(ctx context.Context) {
	if d.cfg.Pending == nil {
		return
	}
	for _, name := range d.cfg.Pending() {
		if ctx.Err() != nil {
			return
		}
		d.changing.Lock()
		may, err := d.cfg.Decide(name)
		// What was written while it was allowed is sent all the same.
		if _, err := d.get(ctx, name, err == nil && may.ReadOnly); err != nil && ctx.Err() == nil {
			d.cfg.Logger.Warn("workspace with unsent writes not opened", "workspace", name, "err", err)
		}
		d.changing.Unlock()
	}
}

// tidy closes workspaces that are not mounted and have sent everything.
func (d *Daemon) tidy() {
	if !d.changing.TryLock() {
		return
	}
	defer d.changing.Unlock()
	d.mu.Lock()
	var free []*opened
	for _, o := range d.open {
		if len(o.supers) == 0 {
			free = append(free, o)
		}
	}
	d.mu.Unlock()
	for _, o := range free {
		if st := o.ws.Status(); st.UnsentOps > 0 || st.UnsentBytes > 0 {
			continue
		}
		if err := d.shut(o); err != nil {
			d.cfg.Logger.Warn("workspace not closed", "workspace", o.name, "err", err)
		}
	}
}
