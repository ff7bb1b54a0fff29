package workspace_test

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestVersionsAndTrash(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		k := newKit(t, s)
		f := k.files()
		first := noise(filechunk.Size + 5)
		k.put("w", "/d/f", first)
		k.put("w", "/d/f", "second")
		k.put("w", "/d/f", "third")
		versions, err := f.ListFileVersions(ctx, connect.NewRequest(&posternv1.FileRequest{Workspace: "w", Path: []byte("/d/f")}))
		if err != nil || len(versions.Msg.Versions) != 3 {
			t.Fatalf("versions: %v, %v", versions, err)
		}
		for i, v := range versions.Msg.Versions {
			if want := uint64(3 - i); v.Version != want || v.BaseVersion != want-1 || v.By != "token ana" || v.Current != (i == 0) {
				t.Errorf("version %d: %v", i, v)
			}
		}
		if got, _ := k.get("w", "/d/f?version=1"); got != first {
			t.Errorf("version 1: %d bytes", len(got))
		}
		restore := func(path string, version, trash uint64) error {
			_, err := f.RestoreFile(ctx, connect.NewRequest(&posternv1.RestoreFileRequest{Workspace: "w", Path: []byte(path), Version: version, TrashId: trash}))
			return err
		}
		if err := restore("/d/f", 1, 0); err != nil {
			t.Fatal(err)
		}
		k.want("w", "/d/f", first)
		wantCode(t, restore("/d/f", 99, 0), proto.CodeNotFound)

		// Removed, twice, and brought back.
		rm := func(path string) {
			t.Helper()
			if _, err := f.RemoveFile(ctx, connect.NewRequest(&posternv1.RemoveFileRequest{Workspace: "w", Path: []byte(path), Recursive: true})); err != nil {
				t.Fatal(err)
			}
		}
		rm("/d/f")
		k.put("w", "/d/f", "another")
		rm("/d")
		if got := k.tree("w"); len(got) != 0 {
			t.Fatalf("left: %q", got)
		}
		list, err := f.ListTrash(ctx, connect.NewRequest(&posternv1.ListTrashRequest{Workspace: "w"}))
		if err != nil || len(list.Msg.Entries) != 2 || string(list.Msg.Entries[0].Path) != "/d" || list.Msg.Entries[0].Files != 1 || string(list.Msg.Entries[1].Path) != "/d/f" {
			t.Fatalf("trash: %v, %v", list, err)
		}
		wantCode(t, restore("/nope", 0, 0), proto.CodeNotFound)
		if err := restore("/d", 0, 0); err != nil {
			t.Fatal(err)
		}
		k.want("w", "/d/f", "another")
		wantCode(t, restore("/d/f", 0, 0), proto.CodeAlreadyExists)
		if err := restore("/d/old", 0, list.Msg.Entries[1].TrashId); err != nil {
			t.Fatal(err)
		}
		k.want("w", "/d/old", first)
		w, err := f.GetWorkspace(ctx, connect.NewRequest(&posternv1.WorkspaceRequest{Workspace: "w"}))
		if err != nil || w.Msg.Nodes != 3 || w.Msg.UsedBytes != uint64(len(first)+len("another")) {
			t.Errorf("after that: %v, %v", w, err)
		}

		// Emptied.
		rm("/d")
		if emptied, err := f.EmptyTrash(ctx, connect.NewRequest(&posternv1.EmptyTrashRequest{Workspace: "w"})); err != nil || emptied.Msg.Entries != 1 {
			t.Fatalf("emptied: %v, %v", emptied, err)
		}
		w, err = f.GetWorkspace(ctx, connect.NewRequest(&posternv1.WorkspaceRequest{Workspace: "w"}))
		if err != nil || w.Msg.Nodes != 0 || w.Msg.UsedBytes != 0 || w.Msg.KeptBytes != 0 || k.keptRows("w") != 0 {
			t.Errorf("emptied, but: %v, %v", w, err)
		}
	})
}

// TestThinning: of too many versions those that lie closest together go, and old ones.
func TestThinning(t *testing.T) {
	s := storetest.SQLite(t)
	k := newKit(t, s)
	k.put("w", "/f", "0")
	if _, err := k.files().UpdateWorkspace(ctx, connect.NewRequest(&posternv1.UpdateWorkspaceRequest{Workspace: "w", KeepVersions: ptr(uint32(5)), KeepFor: durationpb.New(time.Hour)})); err != nil {
		t.Fatal(err)
	}
	for i := range 30 {
		k.put("w", "/f", fmt.Sprint("content ", i))
	}
	versions, err := k.files().ListFileVersions(ctx, connect.NewRequest(&posternv1.FileRequest{Workspace: "w", Path: []byte("/f")}))
	if err != nil || len(versions.Msg.Versions) != 5 || versions.Msg.Versions[0].Version != 31 || versions.Msg.Versions[1].Version != 30 {
		t.Errorf("kept: %v, %v", versions, err)
	}
	if _, err := k.files().UpdateWorkspace(ctx, connect.NewRequest(&posternv1.UpdateWorkspaceRequest{Workspace: "w", KeepFor: durationpb.New(20 * time.Millisecond)})); err != nil {
		t.Fatal(err)
	}
	time.Sleep(40 * time.Millisecond)
	k.put("w", "/f", "much later")
	versions, err = k.files().ListFileVersions(ctx, connect.NewRequest(&posternv1.FileRequest{Workspace: "w", Path: []byte("/f")}))
	if err != nil || len(versions.Msg.Versions) != 2 {
		t.Errorf("old ones stay: %v, %v", versions, err)
	}
}

func ptr[T any](v T) *T { return &v }

// world is what a workspace should hold: contents by path, "" for directories with a slash.
type world map[string]string

func (k *kit) world(ws string) world {
	k.t.Helper()
	w := world{}
	for _, path := range k.tree(ws) {
		w[path] = ""
		if !strings.HasSuffix(path, "/") {
			w[path], _ = k.get(ws, path)
		}
	}
	return w
}

// mutate does random things.
func (k *kit) mutate(ws string, r *rand.Rand, steps int) {
	k.t.Helper()
	f := k.files()
	for range steps {
		paths := k.tree(ws)
		pick := func() string {
			if len(paths) == 0 {
				return "/"
			}
			return paths[r.IntN(len(paths))]
		}
		dir := func() string {
			for range 20 {
				if p := pick(); strings.HasSuffix(p, "/") {
					return p
				}
			}
			return "/"
		}
		var err error
		switch r.IntN(10) {
		case 0, 1, 2:
			k.put(ws, dir()+fmt.Sprint("f", r.IntN(6)), strings.Repeat(fmt.Sprint(r.IntN(1000)), 1+r.IntN(3000)))
		case 3:
			if p := pick(); !strings.HasSuffix(p, "/") {
				k.put(ws, p, fmt.Sprint("changed ", r.IntN(1000)))
			}
		case 4, 5:
			_, err = f.MakeDirectory(ctx, connect.NewRequest(&posternv1.MakeDirectoryRequest{Workspace: ws, Path: []byte(dir() + fmt.Sprint("d", r.IntN(4)))}))
		case 6, 7, 8:
			_, err = f.MoveFile(ctx, connect.NewRequest(&posternv1.MoveFileRequest{Workspace: ws, From: []byte(pick()), To: []byte(dir() + fmt.Sprint("m", r.IntN(6))), Replace: true}))
		case 9:
			_, err = f.RemoveFile(ctx, connect.NewRequest(&posternv1.RemoveFileRequest{Workspace: ws, Path: []byte(pick()), Recursive: true}))
		}
		if code := proto.CodeOf(err); err != nil && code != proto.CodeInvalid && code != proto.CodeAlreadyExists && code != proto.CodeNotFound {
			k.t.Fatal(err)
		}
	}
}

// objects counts the objects in the directory.
func (k *kit) objects() int {
	k.t.Helper()
	n := 0
	err := filepath.WalkDir(k.dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			n++
		}
		return err
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		k.t.Fatal(err)
	}
	return n
}

// TestSnapshots restores snapshots of a tree to which random things were done, and in the
// end removes everything.
func TestSnapshots(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		k := newKit(t, s)
		k.close()
		k.grace = time.Millisecond
		k.open("")
		f := k.files()
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		r := rand.New(rand.NewPCG(seed, 1))
		k.put("w", "/begin", "here")
		worlds := map[string]world{}
		for i := range 3 {
			k.mutate("w", r, 40)
			name := fmt.Sprint("s", i)
			worlds[name] = k.world("w")
			if _, err := f.CreateSnapshot(ctx, connect.NewRequest(&posternv1.CreateSnapshotRequest{Workspace: "w", Name: name})); err != nil {
				t.Fatal(err)
			}
		}
		_, err := f.CreateSnapshot(ctx, connect.NewRequest(&posternv1.CreateSnapshotRequest{Workspace: "w", Name: "s0"}))
		wantCode(t, err, proto.CodeAlreadyExists)
		restore := func(name, path string) {
			t.Helper()
			if _, err := f.RestoreSnapshot(ctx, connect.NewRequest(&posternv1.RestoreSnapshotRequest{Workspace: "w", Snapshot: name, Path: []byte(path)})); err != nil {
				t.Fatalf("restore %s: %v", name, err)
			}
		}
		for _, name := range []string{"s2", "s0", "s1", "s0", "s2"} {
			k.mutate("w", r, 25)
			checkCounts(t, k, "w")
			if r.IntN(2) == 0 { // also what is gone for good comes back
				if _, err := f.EmptyTrash(ctx, connect.NewRequest(&posternv1.EmptyTrashRequest{Workspace: "w"})); err != nil {
					t.Fatal(err)
				}
			}
			if err := k.s.Keep(ctx); err != nil {
				t.Fatal(err)
			}
			checkCounts(t, k, "w")
			restore(name, "")
			if got := k.world("w"); !reflect.DeepEqual(got, worlds[name]) {
				t.Fatalf("%s: got\n%q, want\n%q", name, slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(worlds[name])))
			}
			checkCounts(t, k, "w")
		}
		// A part alone.
		for path := range worlds["s1"] {
			if path != "/" && strings.HasSuffix(path, "/") && worlds["s2"][path] == "" && slices.Contains(k.tree("w"), path) {
				_, err := f.RestoreSnapshot(ctx, connect.NewRequest(&posternv1.RestoreSnapshotRequest{Workspace: "w", Snapshot: "s1", Path: []byte(path)}))
				if proto.CodeOf(err) == proto.CodeNotFound {
					continue // another directory has that name now
				}
				if err != nil {
					t.Fatal(err)
				}
				checkCounts(t, k, "w")
				got := k.world("w")
				for at, content := range worlds["s1"] {
					if have, ok := got[at]; strings.HasPrefix(at, path) && (!ok || have != content) {
						t.Fatalf("part %s: %s is not back", path, at)
					}
				}
				for at := range got {
					if _, ok := worlds["s1"][at]; strings.HasPrefix(at, path) && !ok {
						t.Fatalf("part %s: %s stayed", path, at)
					}
				}
				break
			}
		}
		// Everything goes: snapshots, files, trash, and then chunks.
		list, err := f.ListSnapshots(ctx, connect.NewRequest(&posternv1.WorkspaceRequest{Workspace: "w"}))
		if err != nil || len(list.Msg.Snapshots) != 3 || list.Msg.Snapshots[0].Name != "s2" {
			t.Fatalf("snapshots: %v, %v", list, err)
		}
		for _, one := range list.Msg.Snapshots {
			if _, err := f.DeleteSnapshot(ctx, connect.NewRequest(&posternv1.SnapshotRequest{Workspace: "w", Snapshot: one.Id})); err != nil {
				t.Fatal(err)
			}
		}
		for _, path := range k.tree("w") {
			f.RemoveFile(ctx, connect.NewRequest(&posternv1.RemoveFileRequest{Workspace: "w", Path: []byte(path), Recursive: true})) //nolint:errcheck // some went with their directory
		}
		if _, err := f.EmptyTrash(ctx, connect.NewRequest(&posternv1.EmptyTrashRequest{Workspace: "w"})); err != nil {
			t.Fatal(err)
		}
		if err := k.s.Keep(ctx); err != nil {
			t.Fatal(err)
		}
		w, err := f.GetWorkspace(ctx, connect.NewRequest(&posternv1.WorkspaceRequest{Workspace: "w"}))
		if err != nil || w.Msg.Nodes != 0 || w.Msg.UsedBytes != 0 || w.Msg.KeptBytes != 0 || k.keptRows("w") != 0 {
			t.Errorf("all is gone, but: %v, %v", w, err)
		}
		time.Sleep(5 * time.Millisecond) // the grace
		if _, err := k.blobs.Collect(ctx); err != nil {
			t.Fatal(err)
		}
		if n := k.objects(); n != 0 {
			t.Errorf("%d objects are left", n)
		}
	})
}

// checkCounts compares what a workspace counts with what it has.
func checkCounts(t *testing.T, k *kit, ws string) {
	t.Helper()
	w, err := k.files().GetWorkspace(ctx, connect.NewRequest(&posternv1.WorkspaceRequest{Workspace: ws}))
	if err != nil {
		t.Fatal(err)
	}
	nodes, used := uint64(0), uint64(0)
	for path, content := range k.world(ws) {
		_ = path
		nodes++
		used += uint64(len(content))
	}
	if w.Msg.Nodes != nodes || w.Msg.UsedBytes != used {
		t.Fatalf("it counts %d nodes, %d bytes: there are %d, %d", w.Msg.Nodes, w.Msg.UsedBytes, nodes, used)
	}
}

// TestDeletedWorkspace: what a deleted workspace held goes, what others hold stays.
func TestDeletedWorkspace(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		k := newKit(t, s)
		k.close()
		k.grace = time.Millisecond
		k.open("")
		shared, own := noise(filechunk.Size), noise(filechunk.Size+100)
		k.put("a", "/shared", shared)
		k.put("b", "/shared", shared)
		k.put("a", "/own", own)
		if n := k.objects(); n != 3 {
			t.Errorf("%d objects, want 3: the shared one once", n)
		}
		if _, err := k.files().DeleteWorkspace(ctx, connect.NewRequest(&posternv1.DeleteWorkspaceRequest{Workspace: "a"})); err != nil {
			t.Fatal(err)
		}
		_, err := k.files().GetWorkspace(ctx, connect.NewRequest(&posternv1.WorkspaceRequest{Workspace: "a"}))
		wantCode(t, err, proto.CodeNotFound)
		time.Sleep(5 * time.Millisecond)
		for range 2 { // the chunks go in the first, the workspace's row in the second
			if err := k.s.Keep(ctx); err != nil {
				t.Fatal(err)
			}
			if _, err := k.blobs.Collect(ctx); err != nil {
				t.Fatal(err)
			}
		}
		if n := k.objects(); n != 1 {
			t.Errorf("%d objects, want 1", n)
		}
		k.want("b", "/shared", shared)
		k.put("a", "/again", "x") // the name is free
	})
}
