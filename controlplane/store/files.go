package store

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"slices"

	"github.com/postern-dev/postern/controlplane/filetree"
)

// fileTx implements filetree.Tx.
type fileTx struct {
	h handle
	w *filetree.Workspace
}

var _ filetree.Tx = (*fileTx)(nil)

// maxListedInline bounds the contents that one List returns, in bytes.
const maxListedInline = 2 << 20

// Workspace implements filetree.Tx.
func (t *fileTx) Workspace() *filetree.Workspace { return t.w }

// batchSizes are the lengths of the lists in statements: there must not be too many
// different statements.
var batchSizes = []int{500, 64, 8, 1}

// batches calls f with the items in such lengths; the last one may be filled up with a
// repetition.
func batches[T any](items []T, f func([]T) error) error {
	for len(items) > 0 {
		size := batchSizes[0]
		for _, s := range batchSizes {
			if s >= len(items) {
				size = s
			}
		}
		n := min(size, len(items))
		batch := items[:n:n]
		items = items[n:]
		for len(batch) < size {
			batch = append(batch, batch[len(batch)-1])
		}
		if err := f(batch); err != nil {
			return err
		}
	}
	return nil
}

func anys[T any](head []any, items []T) []any {
	all := slices.Grow(head, len(items))
	for _, item := range items {
		all = append(all, item)
	}
	return all
}

// each runs a query and calls f for each row.
func (h handle) each(ctx context.Context, f func(scan func(...any) error) error, query string, args ...any) error {
	rows, err := h.query(ctx, query, args...)
	if err != nil {
		return err
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		if err := f(rows.Scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

const nodeColumns = "n.id, n.type, n.mode, n.uid, n.gid, n.size, n.stored, n.mtime, n.ctime, n.btime, n.links, n.version, n.seq, n.target, n.xattrs, n.parent, n.name"

func nodeFields(n *filetree.Node) []any {
	return []any{&n.ID, &n.Type, &n.Mode, &n.UID, &n.GID, &n.Size, &n.Stored, &n.Mtime, &n.Ctime, &n.Btime, &n.Links, &n.Version, &n.Seq, &n.Target, &n.Xattrs, &n.Parent, &n.Name}
}

// withInline joins the contents that are kept beside the metadata.
const withInline = ` LEFT JOIN file_versions v ON v.workspace = n.workspace AND v.node = n.id AND v.version = n.version AND n.type = 1 AND n.size > 0 AND n.size <= 4096`

func inlined(n *filetree.Node) {
	n.HasInline = n.Type == filetree.File && (n.Inline != nil || n.Size == 0)
}

// Node implements filetree.Tx.
func (t *fileTx) Node(ctx context.Context, id uint64) (*filetree.Node, error) {
	n := &filetree.Node{}
	err := t.h.row(ctx, "SELECT "+nodeColumns+" FROM file_nodes n WHERE n.workspace = ? AND n.id = ?", t.w.Number, id).Scan(nodeFields(n)...)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	return n, err
}

// Nodes implements filetree.Tx.
func (t *fileTx) Nodes(ctx context.Context, ids []uint64) (map[uint64]*filetree.Node, error) {
	all := make(map[uint64]*filetree.Node, len(ids))
	err := batches(ids, func(ids []uint64) error {
		return t.h.each(ctx, func(scan func(...any) error) error {
			n := &filetree.Node{}
			if err := scan(append(nodeFields(n), &n.Inline)...); err != nil {
				return err
			}
			inlined(n)
			all[n.ID] = n
			return nil
		}, "SELECT "+nodeColumns+", v.inline FROM file_nodes n"+withInline+" WHERE n.workspace = ? AND n.id IN ("+placeholders(len(ids))+")", anys([]any{t.w.Number}, ids)...)
	})
	return all, err
}

// Entry implements filetree.Tx.
func (t *fileTx) Entry(ctx context.Context, parent uint64, name []byte) (*filetree.Entry, error) {
	e := &filetree.Entry{Parent: parent, Name: name}
	err := t.h.row(ctx, "SELECT node, seq FROM file_entries WHERE workspace = ? AND parent = ? AND name = ?", t.w.Number, parent, name).Scan(&e.Node, &e.Seq)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	return e, err
}

// EntriesOf implements filetree.Tx.
func (t *fileTx) EntriesOf(ctx context.Context, ids []uint64) ([]filetree.Entry, error) {
	var all []filetree.Entry
	err := batches(ids, func(ids []uint64) error {
		return t.h.each(ctx, func(scan func(...any) error) error {
			var e filetree.Entry
			if err := scan(&e.Parent, &e.Name, &e.Node, &e.Seq); err != nil {
				return err
			}
			all = append(all, e)
			return nil
		}, "SELECT parent, name, node, seq FROM file_entries WHERE workspace = ? AND node IN ("+placeholders(len(ids))+") ORDER BY node, parent, name", anys([]any{t.w.Number}, ids)...)
	})
	return all, err
}

// errEnough ends a query early.
var errEnough = errors.New("enough")

// List implements filetree.Tx.
func (t *fileTx) List(ctx context.Context, parent uint64, after []byte, limit int) ([]filetree.Listed, error) {
	var all []filetree.Listed
	contents := 0
	if after == nil {
		after = []byte{} // names have at least one byte
	}
	err := t.h.each(ctx, func(scan func(...any) error) error {
		l := filetree.Listed{}
		n := &l.Of
		if err := scan(append(nodeFields(n), &n.Inline, &l.Name, &l.Entry.Seq)...); err != nil {
			return err
		}
		l.Parent, l.Entry.Node = parent, n.ID
		inlined(n)
		all = append(all, l)
		if contents += len(n.Inline); contents >= maxListedInline {
			return errEnough
		}
		return nil
	}, "SELECT "+nodeColumns+`, v.inline, e.name, e.seq FROM file_entries e JOIN file_nodes n ON n.workspace = e.workspace AND n.id = e.node`+withInline+`
		WHERE e.workspace = ? AND e.parent = ? AND e.name > ? ORDER BY e.name LIMIT ?`, t.w.Number, parent, after, limit)
	if errors.Is(err, errEnough) {
		err = nil
	}
	return all, err
}

// HasEntries implements filetree.Tx.
func (t *fileTx) HasEntries(ctx context.Context, parent uint64) (bool, error) {
	var some bool
	err := t.h.row(ctx, "SELECT EXISTS (SELECT 1 FROM file_entries WHERE workspace = ? AND parent = ?)", t.w.Number, parent).Scan(&some)
	return some, err
}

// keepNodes copies rows to the history that a snapshot knows and that are about to
// change, at until.
func (t *fileTx) keepNodes(ctx context.Context, ids []uint64) error {
	if t.w.SnapshotSeq == 0 {
		return nil
	}
	return batches(ids, func(ids []uint64) error {
		n, err := t.h.exec(ctx, `INSERT INTO file_node_history (workspace, until, id, type, mode, uid, gid, size, stored, mtime, ctime, btime, links, version, seq, target, xattrs, parent, name)
			SELECT n.workspace, ?, `+nodeColumns+` FROM file_nodes n WHERE n.workspace = ? AND n.seq <= ? AND n.id IN (`+placeholders(len(ids))+`) ON CONFLICT DO NOTHING`,
			anys([]any{t.w.Seq, t.w.Number, t.w.SnapshotSeq}, ids)...)
		t.w.KeptRows += uint64(n)
		return err
	})
}

// PutNodes implements filetree.Tx.
func (t *fileTx) PutNodes(ctx context.Context, nodes []*filetree.Node) error {
	ids := make([]uint64, len(nodes))
	values := make([]any, 0, 18*len(nodes))
	for i, n := range nodes {
		ids[i] = n.ID
		name := n.Name
		if name == nil {
			name = []byte{}
		}
		values = append(values, t.w.Number, n.ID, n.Type, n.Mode, n.UID, n.GID, n.Size, n.Stored, n.Mtime, n.Ctime, n.Btime, n.Links, n.Version, n.Seq, null(n.Target), null(n.Xattrs), n.Parent, name)
	}
	if err := t.keepNodes(ctx, ids); err != nil {
		return err
	}
	return t.h.insert(ctx, `INSERT INTO file_nodes (workspace, id, type, mode, uid, gid, size, stored, mtime, ctime, btime, links, version, seq, target, xattrs, parent, name) VALUES `, 18,
		` ON CONFLICT (workspace, id) DO UPDATE SET mode = excluded.mode, uid = excluded.uid, gid = excluded.gid, size = excluded.size, stored = excluded.stored,
			mtime = excluded.mtime, ctime = excluded.ctime, links = excluded.links, version = excluded.version, seq = excluded.seq, target = excluded.target,
			xattrs = excluded.xattrs, parent = excluded.parent, name = excluded.name`, values)
}

// null is NULL for nothing.
func null(b []byte) any {
	if len(b) == 0 {
		return nil
	}
	return b
}

// DeleteNodes implements filetree.Tx.
func (t *fileTx) DeleteNodes(ctx context.Context, ids []uint64) error {
	if err := t.keepNodes(ctx, ids); err != nil {
		return err
	}
	return batches(ids, func(ids []uint64) error {
		if _, err := t.h.exec(ctx, "DELETE FROM file_redirects WHERE workspace = ? AND kept IN ("+placeholders(len(ids))+")", anys([]any{t.w.Number}, ids)...); err != nil {
			return err
		}
		_, err := t.h.exec(ctx, "DELETE FROM file_nodes WHERE workspace = ? AND id IN ("+placeholders(len(ids))+")", anys([]any{t.w.Number}, ids)...)
		return err
	})
}

// PutEntries implements filetree.Tx.
func (t *fileTx) PutEntries(ctx context.Context, entries []filetree.Entry) error {
	if err := t.keepEntries(ctx, entries); err != nil {
		return err
	}
	values := make([]any, 0, 5*len(entries))
	for _, e := range entries {
		values = append(values, t.w.Number, e.Parent, e.Name, e.Node, e.Seq)
	}
	return t.h.insert(ctx, "INSERT INTO file_entries (workspace, parent, name, node, seq) VALUES ", 5,
		" ON CONFLICT (workspace, parent, name) DO UPDATE SET node = excluded.node, seq = excluded.seq", values)
}

func (t *fileTx) keepEntries(ctx context.Context, entries []filetree.Entry) error {
	if t.w.SnapshotSeq == 0 {
		return nil
	}
	for _, e := range entries {
		n, err := t.h.exec(ctx, `INSERT INTO file_entry_history (workspace, parent, name, seq, until, node)
			SELECT workspace, parent, name, seq, ?, node FROM file_entries WHERE workspace = ? AND parent = ? AND name = ? AND seq <= ? ON CONFLICT DO NOTHING`,
			t.w.Seq, t.w.Number, e.Parent, e.Name, t.w.SnapshotSeq)
		if err != nil {
			return err
		}
		t.w.KeptRows += uint64(n)
	}
	return nil
}

// DeleteEntries implements filetree.Tx.
func (t *fileTx) DeleteEntries(ctx context.Context, entries []filetree.Entry) error {
	if err := t.keepEntries(ctx, entries); err != nil {
		return err
	}
	slices.SortFunc(entries, func(a, b filetree.Entry) int { return bytes.Compare(a.Name, b.Name) })
	for _, e := range entries {
		if _, err := t.h.exec(ctx, "DELETE FROM file_entries WHERE workspace = ? AND parent = ? AND name = ?", t.w.Number, e.Parent, e.Name); err != nil {
			return err
		}
	}
	return nil
}

// PutChanges implements filetree.Tx.
func (t *fileTx) PutChanges(ctx context.Context, changes []filetree.Change) error {
	values := make([]any, 0, 5*len(changes))
	for _, c := range changes {
		values = append(values, t.w.Number, c.Seq, plainText(c.Mount), c.Node, null(c.Names))
	}
	return t.h.insert(ctx, "INSERT INTO file_changes (workspace, seq, mount, node, names) VALUES ", 5, "", values)
}

// Changes implements filetree.Tx.
func (t *fileTx) Changes(ctx context.Context, after uint64, limit int) ([]filetree.Change, error) {
	var all []filetree.Change
	err := t.h.each(ctx, func(scan func(...any) error) error {
		var c filetree.Change
		if err := scan(&c.Seq, &c.Mount, &c.Node, &c.Names); err != nil {
			return err
		}
		all = append(all, c)
		return nil
	}, "SELECT seq, mount, node, names FROM file_changes WHERE workspace = ? AND seq > ? ORDER BY seq LIMIT ?", t.w.Number, after, limit)
	return all, err
}
