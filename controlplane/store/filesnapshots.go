package store

import (
	"context"
	"database/sql"
	"time"

	"github.com/postern-dev/postern/controlplane/filetree"
	posternproto "github.com/postern-dev/postern/proto"
)

// PutSnapshot implements filetree.Tx.
func (t *fileTx) PutSnapshot(ctx context.Context, s *filetree.Snapshot) error {
	_, err := t.h.exec(ctx, "INSERT INTO file_snapshots (workspace, id, name, seq, created, author, nodes, bytes) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
		t.w.Number, s.ID, s.Name, s.Seq, millis(s.Created), plainText(s.By), s.Nodes, s.Bytes)
	if isUnique(err) {
		return posternproto.Errorf(posternproto.CodeAlreadyExists, "there is a snapshot %q already", clip(s.Name))
	}
	t.w.SnapshotSeq = max(t.w.SnapshotSeq, s.Seq)
	return err
}

// DeleteSnapshot implements filetree.Tx.
func (t *fileTx) DeleteSnapshot(ctx context.Context, id string) error {
	if _, err := t.h.exec(ctx, "DELETE FROM file_snapshots WHERE workspace = ? AND id = ?", t.w.Number, id); err != nil {
		return err
	}
	return t.h.row(ctx, "SELECT coalesce(max(seq), 0) FROM file_snapshots WHERE workspace = ?", t.w.Number).Scan(&t.w.SnapshotSeq)
}

// Snapshots implements filetree.Tx.
func (t *fileTx) Snapshots(ctx context.Context) ([]filetree.Snapshot, error) {
	var all []filetree.Snapshot
	err := t.h.each(ctx, func(scan func(...any) error) error {
		var s filetree.Snapshot
		var created int64
		err := scan(&s.ID, &s.Name, &s.Seq, &created, &s.By, &s.Nodes, &s.Bytes)
		s.Created = time.UnixMilli(created).UTC()
		all = append(all, s)
		return err
	}, "SELECT id, name, seq, created, author, nodes, bytes FROM file_snapshots WHERE workspace = ? ORDER BY seq DESC, created DESC, id DESC", t.w.Number)
	return all, err
}

func (t *fileTx) someEntries(ctx context.Context, query string, args ...any) ([]filetree.Entry, error) {
	var all []filetree.Entry
	err := t.h.each(ctx, func(scan func(...any) error) error {
		var e filetree.Entry
		err := scan(&e.Parent, &e.Name, &e.Node, &e.Seq)
		all = append(all, e)
		return err
	}, query, args...)
	return all, err
}

// EntriesAt implements filetree.Tx.
func (t *fileTx) EntriesAt(ctx context.Context, seq uint64) ([]filetree.Entry, error) {
	return t.someEntries(ctx, "SELECT parent, name, node, seq FROM file_entry_history WHERE workspace = ? AND seq <= ? AND until > ? AND parent <> ? ORDER BY parent, name",
		t.w.Number, seq, seq, filetree.Trash)
}

// EntriesSince implements filetree.Tx.
func (t *fileTx) EntriesSince(ctx context.Context, seq uint64) ([]filetree.Entry, error) {
	return t.someEntries(ctx, "SELECT parent, name, node, seq FROM file_entries WHERE workspace = ? AND seq > ? AND parent <> ? ORDER BY parent, name", t.w.Number, seq, filetree.Trash)
}

// NodesAt implements filetree.Tx.
func (t *fileTx) NodesAt(ctx context.Context, seq uint64) (map[uint64]*filetree.Node, error) {
	all := map[uint64]*filetree.Node{}
	err := t.h.each(ctx, func(scan func(...any) error) error {
		n := &filetree.Node{}
		err := scan(nodeFields(n)...)
		all[n.ID] = n
		return err
	}, "SELECT "+nodeColumns+" FROM file_node_history n WHERE n.workspace = ? AND n.seq <= ? AND n.until > ?", t.w.Number, seq, seq)
	return all, err
}

// DropHistory implements filetree.Tx.
func (t *fileTx) DropHistory(ctx context.Context, limit int) (int, error) {
	const unneeded = ` NOT EXISTS (SELECT 1 FROM file_snapshots s WHERE s.workspace = h.workspace AND s.seq >= h.seq AND s.seq < h.until)`
	entries, err := t.someEntries(ctx, "SELECT parent, name, node, seq FROM file_entry_history h WHERE workspace = ? AND"+unneeded+" LIMIT ?", t.w.Number, limit)
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		if _, err := t.h.exec(ctx, "DELETE FROM file_entry_history WHERE workspace = ? AND parent = ? AND name = ? AND seq = ?", t.w.Number, e.Parent, e.Name, e.Seq); err != nil {
			return 0, err
		}
	}
	type row struct {
		id, seq, version uint64
		gone             bool
	}
	var nodes []row
	err = t.h.each(ctx, func(scan func(...any) error) error {
		var r row
		var live sql.NullInt64
		err := scan(&r.id, &r.seq, &r.version, &live)
		r.gone = !live.Valid
		nodes = append(nodes, r)
		return err
	}, "SELECT h.id, h.seq, h.version, n.id FROM file_node_history h LEFT JOIN file_nodes n ON n.workspace = h.workspace AND n.id = h.id WHERE h.workspace = ? AND"+unneeded+" LIMIT ?", t.w.Number, limit)
	if err != nil {
		return 0, err
	}
	for _, r := range nodes {
		if _, err := t.h.exec(ctx, "DELETE FROM file_node_history WHERE workspace = ? AND id = ? AND seq = ?", t.w.Number, r.id, r.seq); err != nil {
			return 0, err
		}
		if r.gone && r.version > 0 {
			if err := t.DropVersions(ctx, r.id, r.version); err != nil {
				return 0, err
			}
		}
	}
	t.fewerRows(len(entries) + len(nodes))
	return len(entries) + len(nodes), nil
}

// DropChanges implements filetree.Tx.
func (t *fileTx) DropChanges(ctx context.Context, before uint64, limit int) (int, error) {
	if before <= t.w.OldestChange {
		return 0, nil
	}
	to := min(before, t.w.OldestChange+uint64(limit))
	n, err := t.h.exec(ctx, "DELETE FROM file_changes WHERE workspace = ? AND seq < ?", t.w.Number, to)
	t.w.OldestChange = to
	return int(n), err
}

// LiveWorkspaces are all workspaces of all organizations that were not deleted.
func (s *Store) LiveWorkspaces(ctx context.Context) ([]*filetree.Workspace, error) {
	rows, err := s.reader().query(ctx, "SELECT "+workspaceColumns+" FROM workspaces WHERE deleted IS NULL ORDER BY number")
	return collect(ctx, s, "list workspaces", rows, err, func(rows *sql.Rows) (*filetree.Workspace, error) { return scanWorkspace(rows.Scan) })
}

// purgedTables are what a workspace has rows in, with the columns that tell its rows apart;
// chunks are looked at by themselves.
var purgedTables = []struct{ name, keys string }{
	{"file_entries", "parent, name"},
	{"file_entry_history", "parent, name, seq"},
	{"file_nodes", "id"},
	{"file_node_history", "id, seq"},
	{"file_versions", "node, version"},
	{"file_segments", "hash"},
	{"file_changes", "seq"},
	{"file_answers", "agent, mount, first"},
	{"file_mounts", "agent, mount"},
	{"file_blocks", "first"},
	{"file_redirects", "agent, node, base"},
	{"file_conflicts", "seq"},
	{"file_trash", "id"},
	{"file_snapshots", "id"},
}

// PurgeWorkspaces takes one step of removing what deleted workspaces held: at most limit
// rows. Their chunks are left to CollectChunks. It returns how many rows it removed; zero:
// there is nothing more.
func (s *Store) PurgeWorkspaces(ctx context.Context, limit int) (int, error) {
	done := 0
	err := s.write(ctx, "remove a deleted workspace", func(tx handle) error {
		done = 0
		var numbers []int64
		if err := tx.each(ctx, func(scan func(...any) error) error {
			var n int64
			err := scan(&n)
			numbers = append(numbers, n)
			return err
		}, "SELECT number FROM workspaces WHERE deleted IS NOT NULL ORDER BY number LIMIT 10"); err != nil {
			return err
		}
		for _, number := range numbers {
			for _, table := range purgedTables {
				n, err := tx.exec(ctx, "DELETE FROM "+table.name+" WHERE workspace = ? AND ("+table.keys+") IN (SELECT "+table.keys+" FROM "+table.name+" WHERE workspace = ? LIMIT ?)", number, number, limit)
				if err != nil {
					return err
				}
				if done += int(n); done >= limit {
					return nil
				}
			}
			n, err := tx.exec(ctx, "UPDATE file_chunks SET refs = 0, touched = 0 WHERE workspace = ? AND hash IN (SELECT hash FROM file_chunks WHERE workspace = ? AND (refs > 0 OR touched > 0) LIMIT ?)", number, number, limit)
			if err != nil {
				return err
			}
			if done += int(n); done >= limit {
				return nil
			}
			n, err = tx.exec(ctx, "DELETE FROM workspaces WHERE number = ? AND NOT EXISTS (SELECT 1 FROM file_chunks WHERE workspace = ?)", number, number)
			if err != nil {
				return err
			}
			done += int(n)
		}
		return nil
	})
	return done, err
}
