package store

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/postern-dev/postern/controlplane/filetree"
)

const trashColumns = "id, node, path, removed, author, files, bytes"

func scanTrashed(scan func(...any) error) (*filetree.Trashed, error) {
	r := &filetree.Trashed{}
	var removed int64
	err := scan(&r.ID, &r.Node, &r.Path, &removed, &r.By, &r.Files, &r.Bytes)
	r.Removed = time.UnixMilli(removed).UTC()
	return r, err
}

// PutTrashed implements filetree.Tx.
func (t *fileTx) PutTrashed(ctx context.Context, r *filetree.Trashed) error {
	_, err := t.h.exec(ctx, "INSERT INTO file_trash (workspace, "+trashColumns+", purging) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)",
		t.w.Number, r.ID, r.Node, r.Path, millis(r.Removed), plainText(r.By), r.Files, r.Bytes)
	return err
}

// DeleteTrashed implements filetree.Tx.
func (t *fileTx) DeleteTrashed(ctx context.Context, id uint64) error {
	_, err := t.h.exec(ctx, "DELETE FROM file_trash WHERE workspace = ? AND id = ?", t.w.Number, id)
	return err
}

// Trashed implements filetree.Tx.
func (t *fileTx) Trashed(ctx context.Context, id uint64) (*filetree.Trashed, error) {
	r, err := scanTrashed(t.h.row(ctx, "SELECT "+trashColumns+" FROM file_trash WHERE workspace = ? AND id = ? AND purging = 0", t.w.Number, id).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	return r, err
}

// ListTrashed implements filetree.Tx.
func (t *fileTx) ListTrashed(ctx context.Context, before uint64, path []byte, limit int) ([]filetree.Trashed, error) {
	if before == 0 {
		before = 1<<63 - 1
	}
	where, args := "", []any{t.w.Number, before}
	if path != nil {
		where, args = " AND path = ?", append(args, path)
	}
	var all []filetree.Trashed
	err := t.h.each(ctx, func(scan func(...any) error) error {
		r, err := scanTrashed(scan)
		if err == nil {
			all = append(all, *r)
		}
		return err
	}, "SELECT "+trashColumns+" FROM file_trash WHERE workspace = ? AND id < ?"+where+" AND purging = 0 ORDER BY id DESC LIMIT ?", append(args, limit)...)
	return all, err
}

// below is the table of a directory's nodes, itself apart: (node).
const below = `WITH RECURSIVE below (node) AS (SELECT node FROM file_entries WHERE workspace = ? AND parent = ?
	UNION SELECT e.node FROM below b JOIN file_entries e ON e.workspace = ? AND e.parent = b.node) `

// Subtree implements filetree.Tx.
func (t *fileTx) Subtree(ctx context.Context, id uint64) (nodes, files, stored uint64, err error) {
	err = t.h.row(ctx, below+`SELECT count(*), coalesce(sum(CASE WHEN n.type = 1 THEN 1 ELSE 0 END), 0), coalesce(sum(n.stored), 0)
		FROM below b JOIN file_nodes n ON n.workspace = ? AND n.id = b.node`, t.w.Number, id, t.w.Number, t.w.Number).Scan(&nodes, &files, &stored)
	return nodes, files, stored, err
}

// Linked implements filetree.Tx.
func (t *fileTx) Linked(ctx context.Context, id uint64) ([]uint64, error) {
	var all []uint64
	err := t.h.each(ctx, func(scan func(...any) error) error {
		var node uint64
		err := scan(&node)
		all = append(all, node)
		return err
	}, below+"SELECT n.id FROM below b JOIN file_nodes n ON n.workspace = ? AND n.id = b.node AND n.links > 1", t.w.Number, id, t.w.Number, t.w.Number)
	return all, err
}

// MarkPurging implements filetree.Tx.
func (t *fileTx) MarkPurging(ctx context.Context, id uint64) error {
	_, err := t.h.exec(ctx, "UPDATE file_trash SET purging = 1 WHERE workspace = ? AND id = ?", t.w.Number, id)
	return err
}

func (t *fileTx) trashed(ctx context.Context, where string, args ...any) ([]filetree.Trashed, error) {
	var all []filetree.Trashed
	err := t.h.each(ctx, func(scan func(...any) error) error {
		r, err := scanTrashed(scan)
		if err == nil {
			all = append(all, *r)
		}
		return err
	}, "SELECT "+trashColumns+" FROM file_trash WHERE workspace = ? "+where, append([]any{t.w.Number}, args...)...)
	return all, err
}

// Purging implements filetree.Tx.
func (t *fileTx) Purging(ctx context.Context, limit int) ([]filetree.Trashed, error) {
	return t.trashed(ctx, "AND purging = 1 ORDER BY id LIMIT ?", limit)
}

// ExpiredTrash implements filetree.Tx.
func (t *fileTx) ExpiredTrash(ctx context.Context, before time.Time, limit int) ([]filetree.Trashed, error) {
	return t.trashed(ctx, "AND purging = 0 AND removed < ? ORDER BY removed LIMIT ?", millis(before), limit)
}
