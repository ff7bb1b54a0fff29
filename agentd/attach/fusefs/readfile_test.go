package fusefs

import (
	"bytes"
	"log/slog"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/postern-dev/postern/agentd/attach/fuseserver"
	"github.com/postern-dev/postern/agentd/attach/remote/simulatedremote"
	"github.com/postern-dev/postern/agentd/attach/replica"
)

var _ fuseserver.Files = (*FS)(nil)

// TestReadFile: the server gets a file to splice from if all that is asked for is in it, and only then.
func TestReadFile(t *testing.T) {
	remote := simulatedremote.New()
	r, err := replica.Open(t.Context(), replica.Config{
		Dir: filepath.Join(t.TempDir(), "r"), Workspace: "w", MountID: "m", Remote: remote, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fs := New(r, Options{})
	defer fs.Close()
	header := func(node, unique uint64) fuse.InHeader { return fuse.InHeader{NodeId: node, Unique: unique} }
	var made fuse.CreateOut
	if s := fs.Create(nil, &fuse.CreateIn{InHeader: header(1, 2), Flags: syscall.O_RDWR, Mode: 0o644}, "f", &made); !s.Ok() {
		t.Fatal(s)
	}
	if _, _, ok := fs.ReadFile(made.NodeId, 0, 1); ok {
		t.Error("an empty file has a byte")
	}
	content := bytes.Repeat([]byte("0123456789abcdef"), 64<<10/4)
	if _, s := fs.Write(nil, &fuse.WriteIn{InHeader: header(made.NodeId, 4), Fh: made.Fh}, content); !s.Ok() {
		t.Fatal(s)
	}
	fd, done, ok := fs.ReadFile(made.NodeId, 4096, 128<<10)
	if !ok {
		t.Fatal("what was just written is not here")
	}
	got := make([]byte, 128<<10)
	if n, err := syscall.Pread(fd, got, 4096); err != nil || n != len(got) || !bytes.Equal(got, content[4096:4096+len(got)]) {
		t.Errorf("%d bytes, %v", n, err)
	}
	done()
	for name, at := range map[string]int64{"behind the end": int64(len(content)), "over the end": int64(len(content)) - 100, "before the beginning": -1} {
		if _, _, ok := fs.ReadFile(made.NodeId, at, 128<<10); ok {
			t.Errorf("%s: ok", name)
		}
	}
	if _, _, ok := fs.ReadFile(999, 0, 1); ok {
		t.Error("a node that is not there: ok")
	}
	fs.Release(nil, &fuse.ReleaseIn{InHeader: header(made.NodeId, 8), Fh: made.Fh})
}
