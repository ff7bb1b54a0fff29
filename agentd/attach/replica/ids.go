package replica

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/postern-dev/postern/agentd/attach/tree"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Node ids are reserved from the control plane, so that files can be made without a link:
// when fewer than lowIDs are left, until there are fullIDs.
const (
	lowIDs  = 1 << 19
	fullIDs = 1 << 20
	blockID = 1 << 16
)

// reserveIDs reserves node ids until there are enough.
func (r *Replica) reserveIDs(ctx context.Context, enough uint64) error {
	for {
		r.mu.Lock()
		m := r.s.Meta()
		r.mu.Unlock()
		if m.FreeIDs() >= enough {
			return nil
		}
		ctx, cancel := r.wait(ctx)
		resp, err := r.cfg.Remote.ReserveIDs(ctx, &posternv1.ReserveIDsRequest{WorkspaceId: m.WorkspaceID, MountId: r.cfg.MountID, Count: blockID})
		cancel()
		if err != nil {
			return err
		}
		if resp.Count == 0 || resp.Count > blockID || resp.First <= tree.Root || resp.First+uint64(resp.Count) < resp.First {
			return fmt.Errorf("the control plane reserved the ids %d and %d behind it", resp.First, resp.Count)
		}
		r.mu.Lock()
		m = r.s.Meta()
		m.IDs = append(m.IDs[:len(m.IDs):len(m.IDs)], [2]uint64{resp.First, resp.First + uint64(resp.Count)})
		if n := len(m.IDs); n > 1 && m.IDs[n-2][1] == resp.First {
			m.IDs[n-2][1] += uint64(resp.Count)
			m.IDs = m.IDs[:n-1]
		}
		b := r.s.Batch()
		b.Meta(m)
		err = r.reserveLocked(1024)
		if err == nil {
			err = r.commitLocked(b)
		}
		r.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

var errNoIDs = errors.New("none of the ids for new nodes is left that the control plane reserved")

// takeIDLocked takes an id for a new node; 0: there is none.
func (r *Replica) takeIDLocked(b *tree.Batch) uint64 {
	for m, id := r.s.Meta().TakeID(); id != 0; m, id = m.TakeID() {
		if r.s.Node(id) == nil && !r.leftLocked(id) {
			b.Meta(m)
			return id
		}
	}
	return 0
}

// leftLocked tells whether a content lies under the id of a node that is gone. A loss of power takes
// nodes away that nobody was promised, and so their ids are free again, while what was written to them is
// there in whole or in part: another node of that id would begin with it, and lose its own when
// the first one's is removed.
func (r *Replica) leftLocked(id uint64) bool {
	return r.doomed[id] || !r.stocked && r.store.Exists(id)
}

// haveID returns when there is an id to take.
func (r *Replica) haveID(ctx context.Context) error {
	r.mu.Lock()
	free := r.s.Meta().FreeIDs()
	r.mu.Unlock()
	if free > 0 {
		return nil
	}
	wctx, cancel := r.wait(ctx)
	defer cancel()
	if err := r.retry(wctx, func() error { return r.reserveIDs(wctx, 1) }); err != nil {
		r.say(slog.LevelWarn, "no ids for new files", "err", err)
		return errnoOf(err)
	}
	return nil
}

// pause waits, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
