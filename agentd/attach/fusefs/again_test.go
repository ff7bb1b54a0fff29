package fusefs

import (
	"log/slog"
	"maps"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/postern-dev/postern/agentd/attach/remote/simulatedremote"
	"github.com/postern-dev/postern/agentd/attach/replica"
)

// keys is a Kernel that remembers opens as fuseserver.Conn does.
type keys map[uint64]map[uint64]bool

func (k keys) EntryNotify(uint64, string) fuse.Status       { return fuse.OK }
func (k keys) InodeNotify(uint64, int64, int64) fuse.Status { return fuse.OK }
func (k keys) Passthrough() bool                            { return true }

func (k keys) OpenBacking(node, key uint64, _ int) (int32, bool, error) {
	again := k[node][key]
	if k[node] == nil {
		k[node] = map[uint64]bool{}
	}
	k[node][key] = true
	return int32(node), again, nil
}

func (k keys) CloseBacking(node, key uint64) {
	if delete(k[node], key); len(k[node]) == 0 {
		delete(k, node)
	}
}

func (k keys) Backings() map[uint64]int {
	out := map[uint64]int{}
	for node, opens := range k {
		out[node] = len(opens)
	}
	return out
}

// TestOpenSentAgain opens a file that is passed through; the process dies before the kernel
// has the answer, and its successor gets the request again: that is one open, not two.
func TestOpenSentAgain(t *testing.T) {
	r, err := replica.Open(t.Context(), replica.Config{
		Dir: filepath.Join(t.TempDir(), "r"), Workspace: "w", MountID: "m", Remote: simulatedremote.New(), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	k := keys{}
	life := func(inherited bool) *FS {
		fs := New(r, Options{})
		fs.SetKernel(k, inherited)
		return fs
	}
	header := func(node, unique uint64) fuse.InHeader { return fuse.InHeader{NodeId: node, Unique: unique} }
	fs := life(false)
	var made fuse.CreateOut
	if s := fs.Create(nil, &fuse.CreateIn{InHeader: header(1, 2), Flags: syscall.O_RDWR, Mode: 0o644}, "f", &made); !s.Ok() {
		t.Fatal(s)
	}
	if _, s := fs.Write(nil, &fuse.WriteIn{InHeader: header(made.NodeId, 4), Fh: made.Fh}, []byte("x")); !s.Ok() {
		t.Fatal(s)
	}
	if s := fs.Flush(nil, &fuse.FlushIn{InHeader: header(made.NodeId, 6), Fh: made.Fh}); !s.Ok() {
		t.Fatal(s)
	}
	fs.Release(nil, &fuse.ReleaseIn{InHeader: header(made.NodeId, 8), Fh: made.Fh})

	opening := func(fs *FS, unique uint64) fuse.OpenOut {
		t.Helper()
		var out fuse.OpenOut
		if s := fs.Open(nil, &fuse.OpenIn{InHeader: header(made.NodeId, unique), Flags: syscall.O_RDWR}, &out); !s.Ok() {
			t.Fatal(s)
		}
		if out.OpenFlags&fuse.FOPEN_PASSTHROUGH == 0 {
			t.Fatalf("not passed through: %+v", out)
		}
		return out
	}
	opening(fs, 10)
	fs.Close()
	fs = life(true)
	again, other := opening(fs, 10|resent), opening(fs, 12)
	if again.Fh == other.Fh {
		t.Errorf("two opens are one handle, %x", again.Fh)
	}
	if got, want := k.Backings(), map[uint64]int{made.NodeId: 2}; !maps.Equal(got, want) {
		t.Errorf("opens: %v, want %v", got, want)
	}
	fs.Release(nil, &fuse.ReleaseIn{InHeader: header(made.NodeId, 14), Fh: again.Fh})
	fs.Release(nil, &fuse.ReleaseIn{InHeader: header(made.NodeId, 16), Fh: other.Fh})
	if got := k.Backings(); len(got) > 0 {
		t.Errorf("after both were closed: %v", got)
	}
	if len(fs.modes) > 0 {
		t.Errorf("the file system counts %v", fs.modes)
	}
	fs.Close()
}
