package workspace

import (
	"context"
	"time"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
)

const (
	// keptChanges is how many changes of a workspace the log has, at least: hosts that were
	// away for more list the tree again.
	keptChanges = 100_000
	// keepStep is how many rows one transaction of Keep removes.
	keepStep = 500
)

// Keep removes what workspaces need no longer: what has been in the trash for too long, what
// only deleted snapshots needed, old changes, and deleted workspaces. It goes in bounded
// steps, may be stopped at any of them, and ends when there is nothing left.
func (s *Service) Keep(ctx context.Context) error {
	all, err := s.cfg.Store.LiveWorkspaces(ctx)
	if err != nil {
		return err
	}
	for _, w := range all {
		if err := s.keep(ctx, w); err != nil && proto.CodeOf(err) != proto.CodeNotFound { // deleted meanwhile
			return err
		}
	}
	for {
		n, err := s.cfg.Store.PurgeWorkspaces(ctx, keepStep)
		if err != nil || n == 0 {
			return err
		}
	}
}

func (s *Service) keep(ctx context.Context, w *filetree.Workspace) error {
	for more := true; more; {
		// Look first: most workspaces have nothing to do, and a transaction waits for the disk.
		work := false
		if err := s.cfg.Store.ReadFiles(ctx, w.Organization, w.ID, func(tx filetree.Tx) error {
			expired, err := s.expired(ctx, tx, 1)
			if err != nil {
				return err
			}
			purging, err := tx.Purging(ctx, 1)
			ws := tx.Workspace()
			work = len(expired)+len(purging) > 0 || ws.Seq > ws.OldestChange+keptChanges+keepStep
			return err
		}); err != nil {
			return err
		}
		more = false
		if work {
			if err := s.cfg.Store.UpdateFiles(ctx, w.Organization, w.ID, func(tx filetree.Tx) error {
				expired, err := s.expired(ctx, tx, keepStep)
				if err != nil {
					return err
				}
				for i := range expired {
					if err := tx.MarkPurging(ctx, expired[i].ID); err != nil {
						return err
					}
				}
				ws := tx.Workspace()
				if ws.Seq > keptChanges {
					if _, err := tx.DropChanges(ctx, ws.Seq-keptChanges, keepStep); err != nil {
						return err
					}
				}
				more = len(expired) == keepStep || ws.Seq > ws.OldestChange+keptChanges+keepStep
				return nil
			}); err != nil {
				return err
			}
			if err := s.purge(ctx, w); err != nil {
				return err
			}
		}
	}
	for {
		n := 0
		if err := s.cfg.Store.UpdateFiles(ctx, w.Organization, w.ID, func(tx filetree.Tx) (err error) {
			n, err = tx.DropHistory(ctx, keepStep)
			return err
		}); err != nil || n == 0 {
			return err
		}
	}
}

func (s *Service) expired(ctx context.Context, tx filetree.Tx, limit int) ([]filetree.Trashed, error) {
	keepFor := tx.Workspace().KeepFor
	if keepFor <= 0 {
		return nil, nil
	}
	return tx.ExpiredTrash(ctx, time.Now().Add(-keepFor), limit)
}
