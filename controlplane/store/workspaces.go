package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/postern-dev/postern/controlplane/filetree"
	posternproto "github.com/postern-dev/postern/proto"
)

// maxWorkspaces bounds the workspaces of an organization.
const maxWorkspaces = 10_000

const workspaceColumns = `number, id, organization, name, created, seq, next_id, snapshot_seq, oldest_change,
	quota_bytes, quota_nodes, used_bytes, kept_bytes, nodes, kept_rows, agents, keep_versions, keep_for`

func scanWorkspace(scan func(...any) error) (*filetree.Workspace, error) {
	w := &filetree.Workspace{}
	var created, keepFor int64
	var agents string
	err := scan(&w.Number, &w.ID, &w.Organization, &w.Name, &created, &w.Seq, &w.NextID, &w.SnapshotSeq, &w.OldestChange,
		&w.QuotaBytes, &w.QuotaNodes, &w.UsedBytes, &w.KeptBytes, &w.Nodes, &w.KeptRows, &agents, &w.KeepVersions, &keepFor)
	if err != nil {
		return nil, err
	}
	w.Created, w.KeepFor = time.UnixMilli(created).UTC(), time.Duration(keepFor)*time.Millisecond
	if err := json.Unmarshal([]byte(agents), &w.Agents); err != nil {
		return nil, fmt.Errorf("agents of workspace %s in the store: %w", w.ID, err)
	}
	return w, nil
}

func encodeNames(names []string) string {
	if len(names) == 0 {
		return "[]"
	}
	text, err := json.Marshal(names)
	if err != nil {
		panic(err) // strings always encode
	}
	return string(text)
}

// InsertWorkspace makes a workspace with its root and sets its Number. ALREADY_EXISTS
// means that the organization has one of that name, OVERLOADED that it has too many.
func (s *Store) InsertWorkspace(ctx context.Context, w *filetree.Workspace, root *filetree.Node) error {
	return s.write(ctx, "make a workspace", func(tx handle) error {
		var n int
		if err := tx.row(ctx, "SELECT count(*) FROM workspaces WHERE organization = ?", w.Organization).Scan(&n); err != nil {
			return err
		}
		if n >= maxWorkspaces {
			return posternproto.Errorf(posternproto.CodeOverloaded, "the organization has %d workspaces: delete some", n)
		}
		err := tx.row(ctx, `INSERT INTO workspaces (id, organization, name, created, seq, next_id, snapshot_seq, oldest_change,
			quota_bytes, quota_nodes, used_bytes, kept_bytes, nodes, agents, keep_versions, keep_for) VALUES (?, ?, ?, ?, ?, ?, 0, ?, ?, ?, 0, 0, 0, ?, ?, ?)
			RETURNING number`, w.ID, w.Organization, plainText(w.Name), millis(w.Created), w.Seq, w.NextID, w.OldestChange,
			w.QuotaBytes, w.QuotaNodes, encodeNames(w.Agents), w.KeepVersions, w.KeepFor.Milliseconds()).Scan(&w.Number)
		if isUnique(err) {
			return posternproto.Errorf(posternproto.CodeAlreadyExists, "there is a workspace %q already", clip(w.Name))
		}
		if err != nil {
			return err
		}
		return (&fileTx{h: tx, w: w}).PutNodes(ctx, []*filetree.Node{root})
	})
}

// Workspaces are those of an organization, by name.
func (s *Store) Workspaces(ctx context.Context, organization string) ([]*filetree.Workspace, error) {
	rows, err := s.reader().query(ctx, "SELECT "+workspaceColumns+" FROM workspaces WHERE organization = ? AND deleted IS NULL ORDER BY name", organization)
	return collect(ctx, s, "list workspaces", rows, err, func(rows *sql.Rows) (*filetree.Workspace, error) { return scanWorkspace(rows.Scan) })
}

// Workspace finds a workspace of an organization by its id or name, or NOT_FOUND.
func (s *Store) Workspace(ctx context.Context, organization, idOrName string) (*filetree.Workspace, error) {
	w, err := scanWorkspace(s.reader().row(ctx, "SELECT "+workspaceColumns+` FROM workspaces WHERE organization = ? AND (id = ? OR name = ?) AND deleted IS NULL
		ORDER BY CASE WHEN id = ? THEN 0 ELSE 1 END LIMIT 1`, organization, plainText(idOrName), plainText(idOrName), plainText(idOrName)).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, notFound("workspace", idOrName)
	}
	return w, s.fail(ctx, "find a workspace", err)
}

// WorkspaceSeq is the number of a workspace's last change; NOT_FOUND if it is gone.
func (s *Store) WorkspaceSeq(ctx context.Context, number int64) (uint64, error) {
	var seq uint64
	err := s.reader().row(ctx, "SELECT seq FROM workspaces WHERE number = ? AND deleted IS NULL", number).Scan(&seq)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, posternproto.Errorf(posternproto.CodeNotFound, "the workspace was deleted")
	}
	return seq, s.fail(ctx, "look for changes", err)
}

// SetWorkspace writes what operators set: quotas, agents, and what is kept.
func (s *Store) SetWorkspace(ctx context.Context, w *filetree.Workspace) error {
	return s.write(ctx, "set up a workspace", func(tx handle) error {
		n, err := tx.exec(ctx, "UPDATE workspaces SET quota_bytes = ?, quota_nodes = ?, agents = ?, keep_versions = ?, keep_for = ? WHERE number = ? AND deleted IS NULL",
			w.QuotaBytes, w.QuotaNodes, encodeNames(w.Agents), w.KeepVersions, w.KeepFor.Milliseconds(), w.Number)
		if err == nil && n == 0 {
			err = notFound("workspace", w.Name)
		}
		return err
	})
}

// DeleteWorkspace hides a workspace for good; PurgeWorkspaces removes what it held.
func (s *Store) DeleteWorkspace(ctx context.Context, number int64, now time.Time) error {
	return s.write(ctx, "delete a workspace", func(tx handle) error {
		n, err := tx.exec(ctx, "UPDATE workspaces SET deleted = ? WHERE number = ? AND deleted IS NULL", millis(now), number)
		if err == nil && n == 0 {
			err = posternproto.Errorf(posternproto.CodeNotFound, "the workspace was deleted")
		}
		return err
	})
}

// UpdateFiles runs f in a transaction on a workspace that nobody else changes meanwhile,
// and that is on the disk when UpdateFiles returns nil. f may run more than once.
// NOT_FOUND means that the organization has no such workspace.
func (s *Store) UpdateFiles(ctx context.Context, organization, id string, f func(filetree.Tx) error) error {
	return s.write(ctx, "change a workspace", func(tx handle) error {
		lock := ""
		if s.engine == postgres {
			lock = " FOR UPDATE"
		}
		t, err := openFiles(ctx, tx, organization, id, lock)
		if err != nil {
			return err
		}
		before := *t.w
		before.Agents = nil
		if err := f(t); err != nil {
			return err
		}
		w := t.w
		_, err = tx.exec(ctx, `UPDATE workspaces SET seq = ?, next_id = ?, snapshot_seq = ?, oldest_change = ?, used_bytes = ?, kept_bytes = ?, nodes = ?, kept_rows = ? WHERE number = ?`,
			w.Seq, w.NextID, w.SnapshotSeq, w.OldestChange, w.UsedBytes, w.KeptBytes, w.Nodes, w.KeptRows, w.Number)
		return err
	})
}

// Siblings implements filetree.Tx. Others may change them meanwhile.
func (t *fileTx) Siblings(ctx context.Context) (nodes, rows uint64, err error) {
	err = t.h.row(ctx, "SELECT coalesce(sum(nodes), 0), coalesce(sum(kept_rows), 0) FROM workspaces WHERE organization = ? AND deleted IS NULL AND number <> ?",
		t.w.Organization, t.w.Number).Scan(&nodes, &rows)
	return nodes, rows, err
}

// ReadFiles runs f on a workspace as it is at one moment; f must not change anything, and
// not take long. NOT_FOUND means that the organization has no such workspace.
func (s *Store) ReadFiles(ctx context.Context, organization, id string, f func(filetree.Tx) error) error {
	const op = "read a workspace"
	options := &sql.TxOptions{ReadOnly: true}
	if s.engine == postgres {
		options.Isolation = sql.LevelRepeatableRead
	}
	tx, err := s.read.BeginTx(ctx, options)
	if err != nil {
		return s.fail(ctx, op, err)
	}
	defer tx.Rollback() //nolint:errcheck // it only read
	t, err := openFiles(ctx, handle{s, tx}, organization, id, "")
	if err == nil {
		err = f(t)
	}
	return s.fail(ctx, op, err)
}

func openFiles(ctx context.Context, h handle, organization, id, lock string) (*fileTx, error) {
	w, err := scanWorkspace(h.row(ctx, "SELECT "+workspaceColumns+" FROM workspaces WHERE organization = ? AND id = ? AND deleted IS NULL"+lock, organization, plainText(id)).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, notFound("workspace", id)
	}
	return &fileTx{h: h, w: w}, err
}
