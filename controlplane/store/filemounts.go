package store

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/postern-dev/postern/controlplane/filetree"
)

// keptAnswers is for how many operations of a mount the answers are kept, at least.
const keptAnswers = 4096

// keptConflicts is how many conflicts of a workspace are remembered.
const keptConflicts = 1000

// Mount implements filetree.Tx.
func (t *fileTx) Mount(ctx context.Context, agent, mount string) (*filetree.Mount, error) {
	m := &filetree.Mount{Agent: agent, ID: mount}
	var opened int64
	var readOnly int
	err := t.h.row(ctx, "SELECT read_only, last_op, opened FROM file_mounts WHERE workspace = ? AND agent = ? AND mount = ?", t.w.Number, agent, plainText(mount)).Scan(&readOnly, &m.LastOp, &opened)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	m.Opened, m.ReadOnly = time.UnixMilli(opened).UTC(), readOnly != 0
	return m, err
}

// PutMount implements filetree.Tx.
func (t *fileTx) PutMount(ctx context.Context, m *filetree.Mount) error {
	readOnly := 0
	if m.ReadOnly {
		readOnly = 1
	}
	_, err := t.h.exec(ctx, `INSERT INTO file_mounts (workspace, agent, mount, read_only, last_op, opened) VALUES (?, ?, ?, ?, ?, ?)
		ON CONFLICT (workspace, agent, mount) DO UPDATE SET read_only = excluded.read_only, last_op = excluded.last_op, opened = excluded.opened`,
		t.w.Number, m.Agent, plainText(m.ID), readOnly, m.LastOp, millis(m.Opened))
	return err
}

// CountMounts implements filetree.Tx.
func (t *fileTx) CountMounts(ctx context.Context, agent string) (int, error) {
	var n int
	err := t.h.row(ctx, "SELECT count(*) FROM file_mounts WHERE workspace = ? AND agent = ?", t.w.Number, agent).Scan(&n)
	return n, err
}

// Answers implements filetree.Tx.
func (t *fileTx) Answers(ctx context.Context, agent, mount string, op uint64) ([]byte, error) {
	var answers []byte
	err := t.h.row(ctx, "SELECT answers FROM file_answers WHERE workspace = ? AND agent = ? AND mount = ? AND first <= ? AND last >= ?", t.w.Number, agent, plainText(mount), op, op).Scan(&answers)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	return answers, err
}

// PutAnswers implements filetree.Tx.
func (t *fileTx) PutAnswers(ctx context.Context, agent, mount string, first, last uint64, answers []byte) error {
	if _, err := t.h.exec(ctx, "INSERT INTO file_answers (workspace, agent, mount, first, last, answers) VALUES (?, ?, ?, ?, ?, ?)",
		t.w.Number, agent, plainText(mount), first, last, answers); err != nil || last <= keptAnswers {
		return err
	}
	_, err := t.h.exec(ctx, "DELETE FROM file_answers WHERE workspace = ? AND agent = ? AND mount = ? AND last < ?", t.w.Number, agent, plainText(mount), last-keptAnswers)
	return err
}

// PutBlock implements filetree.Tx. A block that follows one of the same agent makes it
// longer.
func (t *fileTx) PutBlock(ctx context.Context, agent string, first, last uint64) error {
	n, err := t.h.exec(ctx, "UPDATE file_blocks SET last = ? WHERE workspace = ? AND agent = ? AND last = ?", last, t.w.Number, agent, first-1)
	if err != nil || n > 0 {
		return err
	}
	_, err = t.h.exec(ctx, "INSERT INTO file_blocks (workspace, first, last, agent) VALUES (?, ?, ?, ?)", t.w.Number, first, last, agent)
	return err
}

// OwnsNode implements filetree.Tx.
func (t *fileTx) OwnsNode(ctx context.Context, agent string, id uint64) (bool, error) {
	var owner string
	var last uint64
	err := t.h.row(ctx, "SELECT agent, last FROM file_blocks WHERE workspace = ? AND first <= ? ORDER BY first DESC LIMIT 1", t.w.Number, id).Scan(&owner, &last)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return owner == agent && id <= last, err
}

// CountBlocks implements filetree.Tx.
func (t *fileTx) CountBlocks(ctx context.Context, limit int) (int, error) {
	var n int
	err := t.h.row(ctx, "SELECT count(*) FROM (SELECT 1 FROM file_blocks WHERE workspace = ? LIMIT ?) AS few", t.w.Number, limit).Scan(&n)
	return n, err
}

// Redirect implements filetree.Tx.
func (t *fileTx) Redirect(ctx context.Context, agent string, node, base uint64) (uint64, error) {
	var kept uint64
	err := t.h.row(ctx, "SELECT kept FROM file_redirects WHERE workspace = ? AND agent = ? AND node = ? AND base = ?", t.w.Number, agent, node, base).Scan(&kept)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil
	}
	return kept, err
}

// PutRedirect implements filetree.Tx.
func (t *fileTx) PutRedirect(ctx context.Context, agent string, node, base, kept uint64) error {
	_, err := t.h.exec(ctx, `INSERT INTO file_redirects (workspace, agent, node, base, kept) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT (workspace, agent, node, base) DO UPDATE SET kept = excluded.kept`, t.w.Number, agent, node, base, kept)
	return err
}

// PutConflict implements filetree.Tx.
func (t *fileTx) PutConflict(ctx context.Context, c *filetree.Conflict) error {
	if _, err := t.h.exec(ctx, "INSERT INTO file_conflicts (workspace, seq, path, kept_as, kept_id, time, agent) VALUES (?, ?, ?, ?, ?, ?, ?)",
		t.w.Number, c.Seq, c.Path, c.KeptAs, c.KeptID, millis(c.Time), plainText(c.Agent)); err != nil {
		return err
	}
	_, err := t.h.exec(ctx, "DELETE FROM file_conflicts WHERE workspace = ? AND seq <= (SELECT seq FROM file_conflicts WHERE workspace = ? ORDER BY seq DESC LIMIT 1 OFFSET ?)", t.w.Number, t.w.Number, keptConflicts)
	return err
}

// Conflicts implements filetree.Tx.
func (t *fileTx) Conflicts(ctx context.Context, limit int) ([]filetree.Conflict, error) {
	var all []filetree.Conflict
	err := t.h.each(ctx, func(scan func(...any) error) error {
		var c filetree.Conflict
		var at int64
		err := scan(&c.Seq, &c.Path, &c.KeptAs, &c.KeptID, &at, &c.Agent)
		c.Time = time.UnixMilli(at).UTC()
		all = append(all, c)
		return err
	}, "SELECT seq, path, kept_as, kept_id, time, agent FROM file_conflicts WHERE workspace = ? ORDER BY seq DESC LIMIT ?", t.w.Number, limit)
	return all, err
}

// SetMountStatus keeps what an agent says of its mounts, by mount, where they are mounts of
// workspaces of its organization.
func (s *Store) SetMountStatus(ctx context.Context, organization, agent string, statuses map[string][]byte, now time.Time) error {
	return s.writeRelaxed(ctx, "keep the status of mounts", func(tx handle) error {
		for mount, status := range statuses {
			if _, err := tx.exec(ctx, `UPDATE file_mounts SET status = ?, reported = ? WHERE agent = ? AND mount = ?
				AND workspace IN (SELECT number FROM workspaces WHERE organization = ?)`, status, millis(now), agent, plainText(mount), organization); err != nil {
				return err
			}
		}
		return nil
	})
}

// MountReports are the mounts of an organization's live workspaces; workspace narrows
// them to one, by its name, agent to one, by its id.
func (s *Store) MountReports(ctx context.Context, organization, workspace, agent string) ([]filetree.MountReport, error) {
	rows, err := s.reader().query(ctx, `SELECT w.name, m.agent, m.mount, m.status, m.reported FROM workspaces w JOIN file_mounts m ON m.workspace = w.number
		WHERE w.organization = ? AND w.deleted IS NULL AND (? = '' OR w.name = ?) AND (? = '' OR m.agent = ?) ORDER BY w.name, m.agent, m.mount`,
		organization, plainText(workspace), plainText(workspace), agent, agent)
	return collect(ctx, s, "list mounts", rows, err, func(rows *sql.Rows) (filetree.MountReport, error) {
		var r filetree.MountReport
		var reported sql.NullInt64
		err := rows.Scan(&r.Workspace, &r.Agent, &r.Mount, &r.Status, &reported)
		if reported.Valid {
			r.Reported = time.UnixMilli(reported.Int64).UTC()
		}
		return r, err
	})
}
