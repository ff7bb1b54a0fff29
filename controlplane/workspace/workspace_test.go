package workspace_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	protobuf "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// noise is content that no two tests share.
func noise(n int) string {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16), byte(time.Now().UnixNano())})
	r.Read(b) //nolint:errcheck // it can't fail
	return string(b)
}

func TestUsers(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		k := newKit(t, s)
		f := k.files()
		for name, want := range map[string]proto.Code{"Upper": proto.CodeInvalid, "": proto.CodeInvalid, "-x": proto.CodeInvalid, strings.Repeat("x", 64): proto.CodeInvalid, "a/b": proto.CodeInvalid} {
			_, err := f.CreateWorkspace(ctx, connect.NewRequest(&posternv1.CreateWorkspaceRequest{Name: name}))
			wantCode(t, err, want)
		}
		if _, err := f.CreateWorkspace(ctx, connect.NewRequest(&posternv1.CreateWorkspaceRequest{Name: "w"})); err != nil {
			t.Fatal(err)
		}
		_, err := f.CreateWorkspace(ctx, connect.NewRequest(&posternv1.CreateWorkspaceRequest{Name: "w"}))
		wantCode(t, err, proto.CodeAlreadyExists)

		// Contents of every shape come back.
		contents := map[string]string{
			"/empty": "", "/small": "hello", "/inline": noise(filechunk.MaxInline), "/chunk": noise(filechunk.MaxInline + 1), "/one": noise(filechunk.Size),
			"/more": noise(3*filechunk.Size + 17), "/hole": strings.Repeat("\x00", 2*filechunk.Size+5), "/mixed": noise(100) + strings.Repeat("\x00", 4*filechunk.Size) + noise(9),
			"/a/b/deep": "x", "/zeros": "\x00\x00",
		}
		for path, content := range contents {
			k.put("w", path, content)
		}
		for path, content := range contents {
			k.want("w", path, content)
		}
		want := []string{"/a/", "/a/b/", "/a/b/deep", "/chunk", "/empty", "/hole", "/inline", "/mixed", "/more", "/one", "/small", "/zeros"}
		if got := k.tree("w"); !reflect.DeepEqual(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		w, err := f.GetWorkspace(ctx, connect.NewRequest(&posternv1.WorkspaceRequest{Workspace: "w"}))
		if err != nil {
			t.Fatal(err)
		}
		used := len(contents["/small"]) + len(contents["/inline"]) + len(contents["/chunk"]) + len(contents["/one"]) + len(contents["/more"]) + 1 + 2 + // holes are free
			filechunk.Size + filechunk.Length(uint64(len(contents["/mixed"])), 4)
		if w.Msg.UsedBytes != uint64(used) || w.Msg.Nodes != uint64(len(want)) || w.Msg.KeptBytes != uint64(used) {
			t.Errorf("used %d, kept %d, nodes %d: want %d, %d, %d", w.Msg.UsedBytes, w.Msg.KeptBytes, w.Msg.Nodes, used, used, len(want))
		}

		// Ranges and ETags.
		got, resp := k.get("w", "/more", "Range", fmt.Sprintf("bytes=%d-%d", filechunk.Size-3, filechunk.Size+4))
		if resp.StatusCode != http.StatusPartialContent || got != contents["/more"][filechunk.Size-3:filechunk.Size+5] {
			t.Errorf("range: %s, %d bytes", resp.Status, len(got))
		}
		etag := resp.Header.Get("ETag")
		if want := `"` + filechunk.ETag(uint64(len(contents["/more"])), filechunk.Names([]byte(contents["/more"]))) + `"`; etag != want {
			t.Errorf("ETag %s, want %s", etag, want)
		}
		if _, resp = k.get("w", "/more", "If-None-Match", etag); resp.StatusCode != http.StatusNotModified {
			t.Errorf("not modified: %s", resp.Status)
		}
		if _, resp = k.get("w", "/nope"); resp.StatusCode != http.StatusNotFound {
			t.Errorf("nothing there: %s", resp.Status)
		}

		// The same content again is no new version; another one is.
		v := k.put("w", "/small", "hello").Header.Get("X-Postern-Version")
		if v != "1" {
			t.Errorf("version %s of the same content, want 1", v)
		}
		if v = k.put("w", "/small", "again", "If-Match", "1").Header.Get("X-Postern-Version"); v != "2" {
			t.Errorf("version %s, want 2", v)
		}
		kept := k.put("w", "/small", "too late", "If-Match", "1").Header.Get("X-Postern-Kept-As")
		if !strings.HasPrefix(kept, `"/small (conflict api `) {
			t.Errorf("a conflict was kept as %s", kept)
		}
		k.want("w", "/small", "again")
		conflicts, err := f.ListConflicts(ctx, connect.NewRequest(&posternv1.WorkspaceRequest{Workspace: "w"}))
		if err != nil || len(conflicts.Msg.Conflicts) != 1 || string(conflicts.Msg.Conflicts[0].Path) != "/small" {
			t.Errorf("conflicts: %v, %v", conflicts, err)
		}

		// Moving and removing.
		move := func(from, to string, replace bool) error {
			_, err := f.MoveFile(ctx, connect.NewRequest(&posternv1.MoveFileRequest{Workspace: "w", From: []byte(from), To: []byte(to), Replace: replace}))
			return err
		}
		wantCode(t, move("/small", "/one", false), proto.CodeAlreadyExists)
		wantCode(t, move("/a", "/a/b/c", false), proto.CodeInvalid)
		wantCode(t, move("/nope", "/x", false), proto.CodeNotFound)
		if err := move("/small", "/one", true); err != nil {
			t.Fatal(err)
		}
		k.want("w", "/one", "again")
		_, err = f.RemoveFile(ctx, connect.NewRequest(&posternv1.RemoveFileRequest{Workspace: "w", Path: []byte("/a")}))
		wantCode(t, err, proto.CodeInvalid)
		removed, err := f.RemoveFile(ctx, connect.NewRequest(&posternv1.RemoveFileRequest{Workspace: "w", Path: []byte("/a"), Recursive: true}))
		if err != nil || removed.Msg.Files != 1 {
			t.Fatalf("remove: %v, %v", removed, err)
		}
		if _, resp = k.get("w", "/a/b/deep"); resp.StatusCode != http.StatusNotFound {
			t.Errorf("removed, but there: %s", resp.Status)
		}
		var acts []string
		for _, e := range k.audit {
			if e.Actor != "token ana" || e.Organization != k.org {
				t.Errorf("entry %+v", e)
			}
			acts = append(acts, e.Action)
		}
		for _, want := range []string{"workspace.create", "file.put", "file.get", "file.mv", "file.rm"} {
			if !strings.Contains(strings.Join(acts, " "), want) {
				t.Errorf("no audit entry %s among %v", want, acts)
			}
		}
	})
}

func TestHosts(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		k := newKit(t, s)
		k.put("w", "/readme", "hello")
		a, b := k.host("alpha", "w"), k.host("beta", "w")

		// A host makes files with content in chunks.
		dir, file := a.newID(), a.newID()
		big := []byte(noise(2*filechunk.Size + 9))
		chunks := [][]byte{big[:filechunk.Size], big[filechunk.Size : 2*filechunk.Size], big[2*filechunk.Size:]}
		var names [][]byte
		for _, c := range chunks {
			names = append(names, filechunk.Name(c))
		}
		setBig := func(base uint64) *posternv1.FileOp {
			return &posternv1.FileOp{Op: &posternv1.FileOp_SetContent_{SetContent: &posternv1.FileOp_SetContent{Id: file, BaseVersion: base, Size: uint64(len(big)), Chunks: names}}}
		}
		a.ok(create(dir, 1, "d", isDir), create(file, dir, "big\n\xff", isFile))
		_, err := a.try(setBig(0))
		wantCode(t, err, proto.CodeNotFound) // the chunks are not there
		missing, err := a.MissingChunks(ctx, connect.NewRequest(&posternv1.MissingChunksRequest{WorkspaceId: a.id, Hashes: names}))
		if err != nil || len(missing.Msg.Hashes) != 3 {
			t.Fatalf("missing: %v, %v", missing, err)
		}
		sent, err := a.send(chunks...)
		if err != nil || !reflect.DeepEqual(sent, names) {
			t.Fatalf("sent %x, %v, want %x", sent, err, names)
		}
		missing, err = a.MissingChunks(ctx, connect.NewRequest(&posternv1.MissingChunksRequest{WorkspaceId: a.id, Hashes: names}))
		if err != nil || len(missing.Msg.Hashes) != 0 {
			t.Fatalf("missing: %v, %v", missing, err)
		}
		if r := a.ok(setBig(0)); r[0].Version != 1 {
			t.Errorf("version %d, want 1", r[0].Version)
		}
		k.want("w", "/d/big%0A%FF", string(big))

		// A lost answer: the same operations again get the same answer, and change nothing.
		a.op--
		before := a.opens
		if r := a.ok(setBig(0)); r[0].Version != 1 {
			t.Errorf("again: version %d, want 1", r[0].Version)
		}
		a.reopen("w")
		if a.opens.LastOp != 3 || a.opens.Seq == before.Seq {
			t.Errorf("opened again: %v", a.opens)
		}

		// The other host lists, reads and fetches.
		list, err := b.ListNodes(ctx, connect.NewRequest(&posternv1.ListNodesRequest{WorkspaceId: b.id, Directories: []uint64{1}, Recursive: true}))
		if err != nil || len(list.Msg.Entries) != 3 || len(list.Msg.Complete) != 2 || len(list.Msg.NextPageToken) != 0 {
			t.Fatalf("list: %v, %v", list, err)
		}
		for _, e := range list.Msg.Entries {
			if string(e.Name) == "readme" && (!e.Node.HasInline || string(e.Node.Inline) != "hello") {
				t.Errorf("readme came without its content: %v", e)
			}
		}
		content, err := b.GetContent(ctx, connect.NewRequest(&posternv1.GetContentRequest{WorkspaceId: b.id, Id: file}))
		if err != nil || !reflect.DeepEqual(content.Msg.Chunks, names) || content.Msg.ChunksTotal != 3 || content.Msg.Size != uint64(len(big)) {
			t.Fatalf("content: %v, %v", content, err)
		}
		got, err := b.fetch(names[2], names[0], names[1])
		if err != nil || !bytes.Equal(bytes.Join([][]byte{got[1], got[2], got[0]}, nil), big) {
			t.Fatalf("fetched %d, %v", len(got), err)
		}

		// Both write the same version: the later is kept beside it.
		a.ok(write(file, 1, "from alpha"))
		r := b.do(write(file, 1, "from beta"))
		if r[0].Conflict == nil || !strings.HasPrefix(string(r[0].Conflict.KeptAs), "/d/big\n\xff (conflict beta ") {
			t.Fatalf("no conflict: %v", r[0])
		}
		k.want("w", "/d/big%0A%FF", "from alpha")
		// What beta had in its queue goes to the copy, too.
		r = b.do(write(file, 1, "from beta, later"))
		if r[0].Conflict != nil || r[0].Version != 2 {
			t.Errorf("the queue behind a conflict: %v", r[0])
		}

		// Names that are taken, parents that are gone.
		r = b.do(create(b.newID(), dir, "big\n\xff", isFile), create(b.newID(), 1, "free", isFile))
		if r[0].Conflict == nil || r[1].Conflict != nil || r[1].Refused != "" {
			t.Errorf("names: %v", r)
		}
		if _, err := k.files().RemoveFile(ctx, connect.NewRequest(&posternv1.RemoveFileRequest{Workspace: "w", Path: []byte("/d"), Recursive: true})); err != nil {
			t.Fatal(err)
		}
		r = b.do(create(b.newID(), dir, "orphan", isFile), write(file, 2, "written to what was removed"))
		for i, prefix := range []string{"/.conflicts/orphan (conflict beta ", "/.conflicts/big\n\xff (conflict beta "} {
			if r[i].Conflict == nil || !strings.HasPrefix(string(r[i].Conflict.KeptAs), prefix) {
				t.Errorf("parents that are gone: %v", r[i])
			}
		}

		// What makes no sense is refused, each by itself.
		r = b.do(
			create(5, 1, "stolen", isFile), create(a.newID(), 1, "stolen", isFile), create(b.newID(), 1, "..", isFile), create(b.newID(), 1, "a/b", isFile),
			create(b.newID(), 1, "", isFile), create(b.newID(), 1, strings.Repeat("x", 256), isFile), create(b.newID(), 1, "device", 4), create(b.newID(), 1, "link", isLink),
			write(999_999, 0, "nothing"), write(1, 0, "root"), remove(77, 2, "1"), &posternv1.FileOp{},
		)
		for i, one := range r {
			if one.Refused == "" && i != 10 {
				t.Errorf("operation %d was not refused: %v", i, one)
			}
		}
		if entries := k.tree("w"); reflect.DeepEqual(entries, []string{}) {
			t.Error("nothing is left")
		}
	})
}

func TestWatch(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		k := newKit(t, s)
		k.put("w", "/readme", "hello")
		a, b := k.host("alpha", "w"), k.host("beta", "w")
		stream, err := b.WatchChanges(ctx, connect.NewRequest(&posternv1.WatchChangesRequest{WorkspaceId: b.id, SinceSeq: b.opens.Seq}))
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close() //nolint:errcheck // it ends with the server
		changes := make(chan *posternv1.NodeChange, 100)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for stream.Receive() {
				for _, c := range stream.Msg().Changes {
					changes <- c
				}
			}
		}()
		next := func() *posternv1.NodeChange {
			t.Helper()
			select {
			case c := <-changes:
				return c
			case <-time.After(time.Minute):
				t.Fatal("no change came")
				return nil
			}
		}
		id := a.newID()
		a.ok(create(id, 1, "new", isFile))
		c := next()
		if c.Node.Id != id || c.MountId != a.mount || len(c.Added) != 1 || string(c.Added[0].Name) != "new" || c.Gone {
			t.Errorf("created: %v", c)
		}
		if c = next(); c.Node.Id != 1 || c.Gone {
			t.Errorf("its directory: %v", c)
		}
		k.put("w", "/new", "text")
		if c = next(); c.Node.Id != id || c.MountId != "" || string(c.Node.Inline) != "text" || c.Node.Version != 1 {
			t.Errorf("written: %v", c)
		}
		a.ok(remove(id, 1, "new"))
		if c = next(); c.Node.Id != id || !c.Gone || len(c.Removed) != 1 {
			t.Errorf("removed: %v", c)
		}
		stream.Close() //nolint:errcheck // as meant
		<-done

		// Somebody who was away for too long, or knows the future, lists again.
		for _, since := range []uint64{1 << 40} {
			stream, err := b.WatchChanges(ctx, connect.NewRequest(&posternv1.WatchChangesRequest{WorkspaceId: b.id, SinceSeq: since}))
			if err != nil || !stream.Receive() || !stream.Msg().Reset_ {
				t.Errorf("since %d: no reset: %v, %v", since, stream.Msg(), stream.Err())
			}
			stream.Close() //nolint:errcheck // as meant
		}
	})
}

// TestStrangers: an agent sees nothing of another organization, nor of a workspace that is
// kept from it, nor a chunk by its hash alone.
func TestStrangers(t *testing.T) {
	s := storetest.SQLite(t)
	k := newKit(t, s)
	content := noise(filechunk.Size)
	k.put("w", "/secret", content)
	k.put("other", "/x", "y")
	name := filechunk.Name([]byte(content))
	o, err := s.CreateOrganization(ctx, "bolt", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	a := k.host("alpha", "w")
	if got, err := a.fetch(name); err != nil || string(got[0]) != content {
		t.Fatalf("its own: %v", err)
	}
	x := k.host("alpha", "other")
	_, err = x.fetch(name)
	wantCode(t, err, proto.CodeNotFound)
	if m, err := x.MissingChunks(ctx, connect.NewRequest(&posternv1.MissingChunksRequest{WorkspaceId: x.id, Hashes: [][]byte{name}})); err != nil || len(m.Msg.Hashes) != 1 {
		t.Errorf("a chunk of another workspace counts as stored: %v, %v", m, err)
	}
	id := x.newID()
	x.ok(create(id, 1, "thief", isFile))
	_, err = x.try(&posternv1.FileOp{Op: &posternv1.FileOp_SetContent_{SetContent: &posternv1.FileOp_SetContent{Id: id, Size: filechunk.Size, Chunks: [][]byte{name}}}})
	wantCode(t, err, proto.CodeNotFound)

	stranger := k.agent("alpha")
	stranger.http = k.client(map[string]string{agentHeader: "alpha", "X-Org": o.Id})
	stranger.id = a.id
	_, err = stranger.fetch(name)
	wantCode(t, err, proto.CodeNotFound)
	_, err = stranger.send([]byte("x"))
	wantCode(t, err, proto.CodeNotFound)

	if _, err := k.files().UpdateWorkspace(ctx, connect.NewRequest(&posternv1.UpdateWorkspaceRequest{Workspace: "w", SetAgents: true, Agents: []string{"beta"}})); err != nil {
		t.Fatal(err)
	}
	_, err = a.fetch(name)
	wantCode(t, err, proto.CodeNotFound)
	_, err = a.try(create(a.newID(), 1, "n", isFile))
	wantCode(t, err, proto.CodeNotFound)
	_, err = a.OpenWorkspace(ctx, connect.NewRequest(&posternv1.OpenWorkspaceRequest{Name: "w", MountId: "another-mount"}))
	wantCode(t, err, proto.CodeNotFound)
	k.host("beta", "w")

	for _, bad := range []protobuf.Message{
		&posternv1.CommitRequest{WorkspaceId: x.id, MountId: x.mount, Ops: make([]*posternv1.FileOp, 501)},
		&posternv1.CommitRequest{WorkspaceId: x.id, MountId: x.mount, Ops: []*posternv1.FileOp{{Number: 9}}},
		&posternv1.CommitRequest{WorkspaceId: x.id, MountId: x.mount},
	} {
		_, err := x.Commit(ctx, connect.NewRequest(bad.(*posternv1.CommitRequest)))
		wantCode(t, err, proto.CodeInvalid)
	}
	_, err = x.Commit(ctx, connect.NewRequest(&posternv1.CommitRequest{WorkspaceId: x.id, MountId: "nobody's-mount", Ops: []*posternv1.FileOp{{Number: 1}}}))
	wantCode(t, err, proto.CodeNotFound)
}
