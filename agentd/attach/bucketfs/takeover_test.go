package bucketfs

import (
	"fmt"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/postern-dev/postern/agentd/attach/bucket"
)

// life is a process that serves, without a kernel.
type life struct {
	t  *testing.T
	b  *Bucket
	fs *FS
}

func newLife(t *testing.T, dir string, remote bucket.Remote, inherited bool) *life {
	t.Helper()
	b, err := Open(Config{Dir: dir, Name: "test", Remote: remote, CacheBytes: 16 << 20, MaxStaged: 16 << 20, Boot: "one"})
	if err != nil {
		t.Fatal(err)
	}
	l := &life{t: t, b: b, fs: b.Mount(Options{})}
	if err := l.fs.Begin(inherited); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *life) lookup(parent uint64, name string) uint64 {
	l.t.Helper()
	var out fuse.EntryOut
	if s := l.fs.Lookup(nil, &fuse.InHeader{NodeId: parent}, name, &out); !s.Ok() {
		l.t.Fatalf("lookup %s: %v", name, s)
	}
	return out.NodeId
}

func (l *life) read(node, fh uint64) string {
	l.t.Helper()
	buf := make([]byte, 100)
	in := fuse.ReadIn{Fh: fh, Size: 100}
	in.NodeId = node
	r, s := l.fs.Read(nil, &in, buf)
	if !s.Ok() {
		return s.String()
	}
	text, _ := r.Bytes(buf)
	return string(text)
}

func (l *life) write(node, fh, off uint64, content string) {
	l.t.Helper()
	in := fuse.WriteIn{Fh: fh, Offset: off}
	in.NodeId = node
	if n, s := l.fs.Write(nil, &in, []byte(content)); !s.Ok() || int(n) != len(content) {
		l.t.Errorf("write: %d, %v", n, s)
	}
}

// TestTakeover: nodes, handles, stages and unlinked files go on in the next process, and
// requests that are sent again count once.
func TestTakeover(t *testing.T) {
	w := newWorld(t)
	w.put("d/read", "content")
	dir := t.TempDir()
	one := newLife(t, dir, w.store, false)
	d := one.lookup(rootID, "d")
	read := one.lookup(d, "read")
	open := fuse.OpenIn{Flags: syscall.O_RDONLY}
	open.NodeId = read
	var opened fuse.OpenOut
	if s := one.fs.Open(nil, &open, &opened); !s.Ok() {
		t.Fatal(s)
	}
	create := func(l *life, unique uint64, name string) (fuse.CreateOut, fuse.Status) {
		in := fuse.CreateIn{Flags: syscall.O_RDWR | syscall.O_EXCL}
		in.NodeId, in.Unique = d, unique
		var out fuse.CreateOut
		s := l.fs.Create(nil, &in, name, &out)
		return out, s
	}
	made, s := create(one, 77, "new")
	if !s.Ok() {
		t.Fatal(s)
	}
	one.write(made.NodeId, made.Fh, 0, "first")
	gone, s := create(one, 78, "gone")
	if !s.Ok() {
		t.Fatal(s)
	}
	one.write(gone.NodeId, gone.Fh, 0, "unlinked")
	if s := one.fs.Unlink(nil, &fuse.InHeader{NodeId: d}, "gone"); !s.Ok() {
		t.Error(s)
	}
	for i := range 100 { // what is forgotten is not there in the next life
		name := fmt.Sprint("x", i)
		w.put("d/"+name, "x")
		one.fs.Forget(one.lookup(d, name), 1)
	}
	// It dies without a word: what it had in memory is lost, its files are as they are.
	one.b.cancel()
	one.b.wg.Wait()

	two := newLife(t, dir, w.store, true)
	if got := two.lookup(rootID, "d"); got != d {
		t.Errorf("node %d, it was %d", got, d)
	}
	if got := two.lookup(d, "read"); got != read {
		t.Errorf("node %d, it was %d", got, read)
	}
	if got := two.read(read, opened.Fh); got != "content" {
		t.Errorf("an inherited handle reads %q", got)
	}
	again, s := create(two, 77|resent, "new")
	if !s.Ok() || again.NodeId != made.NodeId {
		t.Errorf("CREATE sent again: %v, node %d", s, again.NodeId)
	}
	if _, s := create(two, 79, "new"); s != fuse.Status(syscall.EEXIST) {
		t.Errorf("another CREATE: %v", s)
	}
	two.write(made.NodeId, made.Fh, 5, "second")
	if got := two.read(made.NodeId, again.Fh); got != "firstsecond" {
		t.Errorf("a staged file: %q", got)
	}
	if got := two.read(gone.NodeId, gone.Fh); got != "unlinked" {
		t.Errorf("an unlinked file: %q", got)
	}
	if s := two.fs.Unlink(nil, &fuse.InHeader{NodeId: d, Unique: 80 | resent}, "gone"); !s.Ok() {
		t.Errorf("UNLINK sent again: %v", s)
	}
	if len(two.fs.nodes) > 10 {
		t.Errorf("%d nodes", len(two.fs.nodes))
	}
	flush := fuse.FlushIn{Fh: made.Fh}
	if s := two.fs.Flush(nil, &flush); !s.Ok() {
		t.Error(s)
	}
	if got := w.get("d/new"); got != "firstsecond" {
		t.Errorf("the object: %q", got)
	}
	if got := w.get("d/gone"); got != "<none>" {
		t.Errorf("an unlinked file is in the bucket: %q", got)
	}
	// A node that the life before told of lives until the kernel forgets all of it.
	two.fs.Forget(read, 1)
	if two.fs.nodes[read] == nil {
		t.Error("a node was forgotten too early")
	}
	for _, fh := range []uint64{made.Fh, again.Fh, gone.Fh, opened.Fh} {
		two.fs.Release(nil, &fuse.ReleaseIn{Fh: fh})
	}
	two.fs.Forget(read, 2)
	if two.fs.nodes[read] != nil {
		t.Error("a node was not forgotten")
	}
	if s := two.b.Status(); s.Unsent != 0 || len(two.b.stages) != 0 || two.b.staged != 0 {
		t.Errorf("left: %+v, %d stages, %d bytes", s, len(two.b.stages), two.b.staged)
	}
	two.fs.End()
	if err := two.b.Close(); err != nil {
		t.Error(err)
	}
	one.b.cache.close()
}
