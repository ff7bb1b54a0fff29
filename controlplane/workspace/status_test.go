package workspace_test

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// TestStatus: agents that are online are asked, of the others the last report counts; a
// workspace with unsent writes is not deleted.
func TestStatus(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		k := newKit(t, s)
		k.agents = map[string]string{"agt_alpha": "alpha", "agt_beta": "beta"}
		k.put("w", "/f", "x")
		a, b := k.host("alpha", "w"), k.host("beta", "w")
		report := func(h *host, ops uint64) {
			t.Helper()
			if _, err := h.ReportStatus(ctx, connect.NewRequest(&posternv1.ReportStatusRequest{Mounts: []*posternv1.MountStatus{{MountId: h.mount, Workspace: "w", UnsentOps: ops, UnsentPaths: [][]byte{[]byte("/f\xff")}}}})); err != nil {
				t.Fatal(err)
			}
		}
		report(a, 3)
		report(b, 5)
		status := func() *posternv1.GetFileStatusResponse {
			t.Helper()
			r, err := k.files().GetFileStatus(ctx, connect.NewRequest(&posternv1.GetFileStatusRequest{Workspace: "w"}))
			if err != nil {
				t.Fatal(err)
			}
			return r.Msg
		}
		if r := status(); len(r.Mounts) != 2 || r.Mounts[0].Online || r.Mounts[0].UnsentOps+r.Mounts[1].UnsentOps != 8 || len(r.Silent) != 0 {
			t.Errorf("offline: %v", r)
		}
		_, err := k.files().DeleteWorkspace(ctx, connect.NewRequest(&posternv1.DeleteWorkspaceRequest{Workspace: "w"}))
		wantCode(t, err, proto.CodeInvalid)
		k.ask = func(agent string) (*posternv1.GetAttachStatusResponse, error) {
			if agent == "agt_beta" {
				return nil, errors.New("it hangs")
			}
			return &posternv1.GetAttachStatusResponse{Mounts: []*posternv1.MountStatus{{Workspace: "w", MountId: a.mount}, {Workspace: "another"}}}, nil
		}
		if r := status(); len(r.Mounts) != 2 || len(r.Silent) != 1 || r.Silent[0] != "beta" {
			t.Errorf("one is online: %v", r)
		}
		// One that is online and silent may have more than it said last.
		report(b, 0)
		_, err = k.files().DeleteWorkspace(ctx, connect.NewRequest(&posternv1.DeleteWorkspaceRequest{Workspace: "w"}))
		wantCode(t, err, proto.CodeUnavailable)
		if _, _, err := k.s.Unsent(ctx, k.org, "agt_beta"); err == nil || !strings.Contains(err.Error(), "could not find out whether agent beta has") {
			t.Errorf("silent: %v", err)
		}
		if ops, _, err := k.s.Unsent(ctx, k.org, "agt_alpha"); err != nil || ops != 0 {
			t.Errorf("one that answers: %d, %v", ops, err)
		}
		k.ask = nil
		report(a, 0)
		if _, err := k.files().DeleteWorkspace(ctx, connect.NewRequest(&posternv1.DeleteWorkspaceRequest{Workspace: "w"})); err != nil {
			t.Error(err)
		}
	})
}

func TestArchives(t *testing.T) {
	s := storetest.SQLite(t)
	k := newKit(t, s)
	want := map[string]string{"d/": "", "d/empty": "", "d/sub/": "", "d/sub/big": noise(2*filechunk.Size + 3), "d/sub/hole": strings.Repeat("\x00", filechunk.Size+9), "d/sub/small\n": "text"}
	for name, content := range want {
		if !strings.HasSuffix(name, "/") {
			k.put("w", "/"+strings.ReplaceAll(name, "\n", "%0A"), content)
		}
	}
	h := k.host("alpha", "w")
	link := create(h.newID(), 1, "outside", isLink)
	link.GetCreate().Node.Target = []byte("/etc/passwd")
	h.ok(link)
	archive := func(query string) []byte {
		t.Helper()
		resp, err := k.client(nil).Get(k.server.URL + "/api/v1/archive/w/" + query)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close() //nolint:errcheck // read
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s, %v", query, resp.Status, err)
		}
		return body
	}
	got := map[string]string{}
	r := tar.NewReader(bytes.NewReader(archive("d")))
	for {
		head, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		got[head.Name] = string(content)
	}
	same(t, "tar", got, want)
	body := archive("d?format=zip")
	z, err := zip.NewReader(bytes.NewReader(body), int64(len(body)))
	if err != nil {
		t.Fatal(err)
	}
	got = map[string]string{}
	for _, f := range z.File {
		r, err := f.Open()
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		got[f.Name] = string(content)
	}
	same(t, "zip", got, want)
	found := false
	for r := tar.NewReader(bytes.NewReader(archive("?format=tar"))); ; {
		head, err := r.Next()
		if err != nil {
			break
		}
		found = found || head.Name == "w/outside" && head.Typeflag == tar.TypeSymlink && head.Linkname == "/etc/passwd"
	}
	if !found {
		t.Error("the symbolic link is not in the archive as what it is")
	}
	resp, err := k.client(nil).Get(k.server.URL + "/api/v1/archive/w/d?format=rar")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close() //nolint:errcheck // not read
	if resp.StatusCode != http.StatusBadRequest {
		t.Errorf("rar: %s", resp.Status)
	}
}

func same(t *testing.T, what string, got, want map[string]string) {
	t.Helper()
	for name, content := range want {
		if have, ok := got[name]; !ok || have != content {
			t.Errorf("%s: %q has %d bytes (%v), want %d", what, name, len(have), ok, len(content))
		}
	}
	if len(got) != len(want) {
		t.Errorf("%s: %d entries, want %d", what, len(got), len(want))
	}
}

// TestQuota: what does not fit waits, and is not lost; what was before it is done.
func TestQuota(t *testing.T) {
	s := storetest.SQLite(t)
	k := newKit(t, s)
	k.put("w", "/f", "x")
	h := k.host("alpha", "w")
	quota := func(bytes, nodes uint64) {
		t.Helper()
		if _, err := k.files().UpdateWorkspace(ctx, connect.NewRequest(&posternv1.UpdateWorkspaceRequest{Workspace: "w", QuotaBytes: &bytes, QuotaNodes: &nodes})); err != nil {
			t.Fatal(err)
		}
	}
	quota(100, 3)
	a, b := h.newID(), h.newID()
	ops := []*posternv1.FileOp{create(a, 1, "a", isFile), write(a, 0, strings.Repeat("a", 50)), create(b, 1, "b", isFile), write(b, 0, strings.Repeat("b", 50))}
	r, err := h.try(ops...)
	if err != nil || len(r.Results) != 3 {
		t.Fatalf("%v, %v: want 3 results", r, err)
	}
	_, err = h.try(ops[3])
	wantCode(t, err, proto.CodeStorageFull)
	_, err = h.try(create(h.newID(), 1, "c", isFile))
	wantCode(t, err, proto.CodeStorageFull)
	quota(1000, 0)
	h.ok(ops[3])
	k.want("w", "/b", strings.Repeat("b", 50))
	k.want("w", "/a", strings.Repeat("a", 50))
}

// TestKeptIsBounded: what a host that was taken over may add to the history is a multiple of the quota,
// and what is there of it stays.
func TestKeptIsBounded(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		k := newKit(t, s)
		k.put("w", "/precious", "kept")
		k.put("w", "/precious", "newer")
		bytes, nodes := uint64(1000), uint64(100)
		if _, err := k.files().UpdateWorkspace(ctx, connect.NewRequest(&posternv1.UpdateWorkspaceRequest{Workspace: "w", QuotaBytes: &bytes, QuotaNodes: &nodes})); err != nil {
			t.Fatal(err)
		}
		h := k.host("alpha", "w")
		id := h.newID()
		h.ok(create(id, 1, "f", isFile))
		var err error
		n := 0
		for ; n < 100 && err == nil; n++ {
			_, err = h.try(write(id, uint64(n), strings.Repeat(string(rune('a'+n%26)), 500)))
		}
		wantCode(t, err, proto.CodeStorageFull)
		if !strings.Contains(err.Error(), "old versions and trash") {
			t.Errorf("it says %v", err)
		}
		if n < 5 || n > 12 {
			t.Errorf("%d versions of 500 bytes", n)
		}
		// Removing is possible, and opens no way around it.
		if _, err := k.files().RemoveFile(ctx, connect.NewRequest(&posternv1.RemoveFileRequest{Workspace: "w", Path: []byte("/f")})); err != nil {
			t.Fatal(err)
		}
		another := h.newID()
		h.ok(create(another, 1, "g", isFile))
		_, err = h.try(write(another, 0, strings.Repeat("g", 500)))
		wantCode(t, err, proto.CodeStorageFull)
		if got, _ := k.get("w", "/precious?version=1"); got != "kept" {
			t.Errorf("the history: %q", got)
		}
		if _, err := k.files().EmptyTrash(ctx, connect.NewRequest(&posternv1.EmptyTrashRequest{Workspace: "w"})); err != nil {
			t.Fatal(err)
		}
		h.ok(write(another, 0, strings.Repeat("g", 500)))
	})
}
