package workspace_test

import (
	"database/sql"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// keptRows is how many rows a workspace says that it keeps.
func (k *kit) keptRows(ws string) uint64 {
	k.t.Helper()
	w, err := k.store.Workspace(ctx, k.org, ws)
	if err != nil {
		k.t.Fatal(err)
	}
	return w.KeptRows
}

func (k *kit) limit(ws string, r *posternv1.UpdateWorkspaceRequest) {
	k.t.Helper()
	r.Workspace = ws
	if _, err := k.files().UpdateWorkspace(ctx, connect.NewRequest(r)); err != nil {
		k.t.Fatal(err)
	}
}

func makeLink(id, parent uint64, name string) *posternv1.FileOp {
	return &posternv1.FileOp{Op: &posternv1.FileOp_MakeLink_{MakeLink: &posternv1.FileOp_MakeLink{Id: id, Parent: parent, Name: []byte(name)}}}
}

func symlink(id uint64, name, target string) *posternv1.FileOp {
	return &posternv1.FileOp{Op: &posternv1.FileOp_Create_{Create: &posternv1.FileOp_Create{
		Parent: 1, Name: []byte(name), Node: &posternv1.Node{Id: id, Type: isLink, Target: []byte(target)},
	}}}
}

// TestKeptRows: the count of rows is that of the tables, whatever happens, and goes down to nothing.
func TestKeptRows(t *testing.T) {
	path := filepath.Join(storetest.Dir(t), "postern.db")
	k := newKit(t, storetest.Open(t, store.Config{SQLitePath: path}))
	db, err := sql.Open("sqlite", "file:"+path+"?mode=ro")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	// What a store of before is counted by, when it is opened.
	migration, err := os.ReadFile("../store/migrations/sqlite/00035_file_rows.sql")
	if err != nil {
		t.Fatal(err)
	}
	_, count, found := strings.Cut(string(migration), "UPDATE workspaces SET kept_rows =")
	count, _, ended := strings.Cut(count, ";")
	if !found || !ended {
		t.Fatalf("the migration does not count: %s", migration)
	}
	check := func(after string) {
		t.Helper()
		var want uint64
		if err := db.QueryRow("SELECT " + count + " FROM workspaces WHERE name = 'w'").Scan(&want); err != nil {
			t.Fatal(err)
		}
		if got := k.keptRows("w"); got != want {
			t.Fatalf("after %s it counts %d rows: there are %d", after, got, want)
		}
	}
	k.put("w", "/first", "1")
	r := rand.New(rand.NewPCG(5, 2026))
	f := k.files()
	h := k.host("h1", "w")
	var snapshots []string
	for range 12 {
		k.mutate("w", r, 12)
		check("changes")
		made, err := f.CreateSnapshot(ctx, connect.NewRequest(&posternv1.CreateSnapshotRequest{Workspace: "w"}))
		if err != nil {
			t.Fatal(err)
		}
		snapshots = append(snapshots, made.Msg.Name)
		time.Sleep(2 * time.Millisecond) // the names are times
	}
	linked := h.newID()
	h.ok(create(linked, 1, "linked", isFile), write(linked, 0, "content"))
	h.ok(makeLink(linked, 1, "second"), makeLink(linked, 1, "third"))
	check("links")
	if n := k.keptRows("w"); n < 100 {
		t.Fatalf("%d rows: too few to show anything", n)
	}
	h.ok(rename(linked, 1, "second", 1, "fourth", 0), remove(linked, 1, "third"))
	check("fewer links")
	if _, err := f.RestoreSnapshot(ctx, connect.NewRequest(&posternv1.RestoreSnapshotRequest{Workspace: "w", Snapshot: snapshots[3], Path: []byte("/")})); err != nil {
		t.Fatal(err)
	}
	check("a restored snapshot")
	for _, name := range snapshots {
		if _, err := f.DeleteSnapshot(ctx, connect.NewRequest(&posternv1.SnapshotRequest{Workspace: "w", Snapshot: name})); err != nil {
			t.Fatal(err)
		}
	}
	if err := k.s.Keep(ctx); err != nil {
		t.Fatal(err)
	}
	check("no snapshots")
	for _, path := range k.tree("w") {
		f.RemoveFile(ctx, connect.NewRequest(&posternv1.RemoveFileRequest{Workspace: "w", Path: []byte(path), Recursive: true})) //nolint:errcheck // some went with their directory
	}
	check("removal")
	k.emptyTrash("w")
	if err := k.s.Keep(ctx); err != nil {
		t.Fatal(err)
	}
	check("the trash was emptied")
	if n := k.keptRows("w"); n != 0 {
		t.Errorf("nothing is left, but %d rows", n)
	}
}

func (k *kit) emptyTrash(ws string) {
	k.t.Helper()
	if _, err := k.files().EmptyTrash(ctx, connect.NewRequest(&posternv1.EmptyTrashRequest{Workspace: ws})); err != nil {
		k.t.Fatal(err)
	}
}

// TestRowsAreBounded: whoever writes things of no bytes for ever is stopped, may remove, and goes on
// when there is room.
func TestRowsAreBounded(t *testing.T) {
	const bound = 10_000
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		k := newKit(t, s)
		k.put("w", "/stays", "it stays")
		k.limit("w", &posternv1.UpdateWorkspaceRequest{QuotaNodes: ptr(uint64(20))})
		h := k.host("h1", "w")
		for full, n := false, 0; !full && n < 2*bound; n += 250 {
			var batch []*posternv1.FileOp
			for range 250 { // links go to the trash when they are removed
				id := h.newID()
				batch = append(batch, symlink(id, "l", "x"), remove(id, 1, "l"))
			}
			r, err := h.try(batch...)
			full = err != nil || len(r.Results) < len(batch)
		}
		_, err := h.try(symlink(h.newID(), "more", "x"))
		wantCode(t, err, proto.CodeStorageFull)
		if !strings.Contains(err.Error(), "empty the trash") {
			t.Errorf("it does not say what to do: %v", err)
		}
		if n := k.keptRows("w"); n != bound {
			t.Errorf("%d rows, want %d", n, bound)
		}
		k.want("w", "/stays", "it stays")
		if _, err := k.files().CreateSnapshot(ctx, connect.NewRequest(&posternv1.CreateSnapshotRequest{Workspace: "w"})); proto.CodeOf(err) != proto.CodeStorageFull {
			t.Errorf("a snapshot: %v", err)
		}
		if _, err := k.files().RemoveFile(ctx, connect.NewRequest(&posternv1.RemoveFileRequest{Workspace: "w", Path: []byte("/stays")})); err != nil {
			t.Errorf("removing is refused: %v", err)
		}
		k.emptyTrash("w")
		h.ok(symlink(h.newID(), "more", "x"))
	})
}

// TestVersionsAreBounded is TestRowsAreBounded for versions where all of them are kept.
func TestVersionsAreBounded(t *testing.T) {
	const bound = 10_000
	k := newKit(t, storetest.SQLite(t))
	k.put("w", "/f", "0")
	k.limit("w", &posternv1.UpdateWorkspaceRequest{QuotaNodes: ptr(uint64(20)), KeepVersions: ptr(uint32(0)), KeepFor: durationpb.New(0)})
	h := k.host("h1", "w")
	id := h.newID()
	h.ok(create(id, 1, "g", isFile))
	version := uint64(0)
	var err error
	for err == nil && version < 2*bound {
		var batch []*posternv1.FileOp
		for i := range uint64(500) {
			batch = append(batch, write(id, version+i, string(rune('a'+(version+i)%2))))
		}
		var r *posternv1.CommitResponse
		if r, err = h.try(batch...); err == nil {
			version += uint64(len(r.Results))
		}
	}
	wantCode(t, err, proto.CodeStorageFull)
	if n := k.keptRows("w"); n != bound {
		t.Errorf("%d rows, want %d", n, bound)
	}
	k.want("w", "/g", string(rune('a'+(version-1)%2)))
}

// TestOrganizationNodes: an organization's workspaces share a bound.
func TestOrganizationNodes(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		k := newKit(t, s)
		k.close()
		k.organizationNodes = 10
		k.open("")
		for _, path := range []string{"/1", "/2", "/3", "/d/4", "/5"} { // six with /d
			k.put("a", path, "x")
		}
		for _, path := range []string{"/1", "/2", "/3"} {
			k.put("b", path, "x")
		}
		h := k.host("h1", "b")
		h.ok(create(h.newID(), 1, "4", isFile))
		_, err := h.try(create(h.newID(), 1, "5", isFile))
		wantCode(t, err, proto.CodeStorageFull)
		if want := "the organization has 10 files and directories of 10"; !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
		_, err = k.files().MakeDirectory(ctx, connect.NewRequest(&posternv1.MakeDirectoryRequest{Workspace: "a", Path: []byte("/e")}))
		wantCode(t, err, proto.CodeStorageFull)
		k.put("a", "/1", "what is there may change")
		if _, err := k.files().RemoveFile(ctx, connect.NewRequest(&posternv1.RemoveFileRequest{Workspace: "a", Path: []byte("/d"), Recursive: true})); err != nil {
			t.Fatal(err)
		}
		h.ok(create(h.newID(), 1, "5", isFile), create(h.newID(), 1, "6", isFile))
		// What comes back counts again.
		_, err = k.files().RestoreFile(ctx, connect.NewRequest(&posternv1.RestoreFileRequest{Workspace: "a", Path: []byte("/d")}))
		wantCode(t, err, proto.CodeStorageFull)
	})
}

// TestLengths: names, targets and attributes are taken up to their bounds, and refused one beyond.
func TestLengths(t *testing.T) {
	k := newKit(t, storetest.SQLite(t))
	k.put("w", "/f", "x")
	h := k.host("h1", "w")
	file := h.newID()
	h.ok(create(file, 1, "g", isFile))
	xattr := func(name string, size int) *posternv1.FileOp {
		return &posternv1.FileOp{Op: &posternv1.FileOp_SetXattr_{SetXattr: &posternv1.FileOp_SetXattr{Id: file, Name: name, Value: make([]byte, size)}}}
	}
	long := func(n int) string { return strings.Repeat("n", n) }
	for name, c := range map[string]struct{ fits, over *posternv1.FileOp }{
		"name":            {create(h.newID(), 1, long(255), isFile), create(h.newID(), 1, long(256), isFile)},
		"directory":       {create(h.newID(), 1, "d"+long(254), isDir), create(h.newID(), 1, "d"+long(255), isDir)},
		"link":            {makeLink(file, 1, "l"+long(254)), makeLink(file, 1, "l"+long(255))},
		"new name":        {rename(file, 1, "g", 1, "g"+long(254), 0), rename(file, 1, "g"+long(254), 1, "h"+long(255), 0)},
		"target":          {symlink(h.newID(), "t1", long(4095)), symlink(h.newID(), "t2", long(4096))},
		"attribute":       {xattr("user."+long(250), 1), xattr("user."+long(251), 1)},
		"attribute value": {xattr("user.v", 60<<10), xattr("user.w", 64<<10)},
		"name not UTF-8":  {create(h.newID(), 1, "\xff\xfe\n", isFile), create(h.newID(), 1, "a/b", isFile)},
	} {
		t.Run(name, func(t *testing.T) {
			if r := h.do(c.fits)[0]; r.RefusedCode != "" {
				t.Errorf("at its bound: %v", r)
			}
			before := k.keptRows("w")
			if r := h.do(c.over)[0]; r.RefusedCode != proto.CodeInvalid.String() {
				t.Errorf("one more: %v", r)
			}
			if n := k.keptRows("w"); n != before {
				t.Errorf("what was refused left %d rows for %d", n, before)
			}
		})
	}
	for name, c := range map[string]struct {
		path string
		fits bool
	}{
		"deep":     {strings.Repeat("/d", 1024), true},
		"too deep": {strings.Repeat("/d", 1025), false},
		"long":     {"/" + long(256), false},
	} {
		_, err := k.files().MakeDirectory(ctx, connect.NewRequest(&posternv1.MakeDirectoryRequest{Workspace: "w", Path: []byte(c.path), Parents: true}))
		if c.fits && err != nil || !c.fits && proto.CodeOf(err) != proto.CodeInvalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}
