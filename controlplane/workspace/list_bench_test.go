package workspace_test

import (
	"database/sql"
	"path/filepath"
	"testing"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// BenchmarkListNodes lists a directory of 100,000 small files on SQLite, as a host does that mounts it.
func BenchmarkListNodes(b *testing.B) {
	const entries = 100_000
	path := filepath.Join(b.TempDir(), "postern.db")
	s := storetest.Open(b, store.Config{SQLitePath: path})
	k := newKit(b, s)
	k.put("w", "/first", "content")
	db, err := sql.Open("sqlite", path)
	if err != nil {
		b.Fatal(err)
	}
	defer db.Close() //nolint:errcheck // it has written
	for _, statement := range []string{
		`WITH RECURSIVE i(n) AS (SELECT 1000 UNION ALL SELECT n + 1 FROM i WHERE n < 999 + 100000)
		INSERT INTO file_nodes (workspace, id, type, mode, uid, gid, size, stored, mtime, ctime, btime, links, version, seq, parent, name)
		SELECT f.workspace, i.n, f.type, f.mode, f.uid, f.gid, f.size, f.stored, f.mtime, f.ctime, f.btime, 1, f.version, f.seq, f.parent, CAST('f' || i.n AS BLOB) FROM i, file_nodes f WHERE f.name = CAST('first' AS BLOB)`,
		`INSERT INTO file_entries (workspace, parent, name, node, seq) SELECT workspace, parent, name, id, seq FROM file_nodes WHERE id >= 1000`,
		`INSERT INTO file_versions (workspace, node, version, base, size, stored, created, author, etag, inline)
		SELECT n.workspace, n.id, n.version, 0, n.size, n.stored, 0, 'x', v.etag, v.inline FROM file_nodes n, file_versions v WHERE n.id >= 1000`,
	} {
		if _, err := db.Exec(statement); err != nil {
			b.Fatal(err)
		}
	}
	h := k.host("one", "w")
	for b.Loop() {
		got := 0
		r := &posternv1.ListNodesRequest{WorkspaceId: h.id, Directories: []uint64{1}}
		for {
			resp, err := h.ListNodes(ctx, connect.NewRequest(r))
			if err != nil {
				b.Fatal(err)
			}
			got += len(resp.Msg.Entries)
			if r.PageToken = resp.Msg.NextPageToken; len(r.PageToken) == 0 {
				break
			}
		}
		if got < entries {
			b.Fatalf("%d entries", got)
		}
	}
}
