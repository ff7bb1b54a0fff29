package replica

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/attach/remote/simulatedremote"
	"github.com/postern-dev/postern/agentd/attach/tree"
)

// caching is a kernel that keeps every name that it is told of until it is asked to let go.
type caching struct {
	mu      sync.Mutex
	held    map[uint64]bool
	pinned  map[uint64]bool // does not let go
	entries map[nameAt]bool // told to be something else now
	r       *Replica
}

func (k *caching) InvalInode(uint64) {}

func (k *caching) InvalEntry(parent uint64, name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.entries[nameAt{parent, name}] = true
}

func (k *caching) Holds(id uint64) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.held[id]
}

func (k *caching) LetGo(_ uint64, _ string, id uint64) {
	k.mu.Lock()
	gone := k.held[id] && !k.pinned[id]
	if gone {
		delete(k.held, id)
	}
	k.mu.Unlock()
	if gone {
		k.r.Forgotten(k, id)
	}
}

// list lists a directory as a program would, and holds what it was told of.
func (k *caching) list(t *testing.T, dir uint64) map[string]Attr {
	t.Helper()
	k.r.OpenDir(dir)
	defer k.r.ReleaseDir(dir)
	out := map[string]Attr{}
	if err := k.r.ReadDir(ctx, dir, 0, func(n Name) bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.held[n.Attr.ID] = true
		if _, twice := out[n.Name]; twice {
			t.Errorf("%s is listed twice", n.Name)
		}
		out[n.Name] = n.Attr
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

// all lists everything and counts the files.
func (k *caching) all(t *testing.T) (files int) {
	t.Helper()
	for _, a := range k.list(t, tree.Root) {
		if a.Type == tree.Directory {
			files += len(k.list(t, a.ID))
		}
	}
	return files
}

func (k *caching) bytes() int64 {
	k.r.mu.Lock()
	defer k.r.mu.Unlock()
	return k.r.s.Bytes()
}

func trimming(t *testing.T, r *simulatedremote.Remote, dir string, limit int64) *caching {
	t.Helper()
	k := &caching{held: map[uint64]bool{}, pinned: map[uint64]bool{}, entries: map[nameAt]bool{}}
	k.r = open(t, r, dir, "a", func(c *Config) { c.MetadataBytes = limit })
	k.r.Listen(k)
	return k
}

func (k *caching) until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waiting for %s: %d bytes, %+v", what, k.bytes(), k.r.Status())
		}
	}
}

// TestTrim: names and attributes that nobody uses are forgotten beyond the limit, but none that
// the control plane does not know, or the kernel; and are there again for whoever looks.
func TestTrim(t *testing.T) {
	const dirs, each, limit = 60, 50, 300_000
	r := simulatedremote.New()
	r.Fill(dirs, each)
	dir := t.TempDir()
	k := trimming(t, r, dir, limit)
	root := k.list(t, tree.Root)
	busy := root["directory-3"].ID
	// Pinned by the kernel; written to and never closed; open; in a directory with an open handle.
	pinned := k.list(t, busy)["file-1.data"].ID
	k.mu.Lock()
	k.pinned[pinned] = true
	k.mu.Unlock()
	made, err := k.r.Make(ctx, Caller{}, busy, "made", Make{Type: tree.File, Mode: 0o600, Open: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.r.Write(ctx, made.ID, 0, []byte("not closed")); err != nil {
		t.Fatal(err)
	}
	sent := put(t, k.r, "sent", []byte("uploaded"))
	drain(t, k.r)
	listing := root["directory-5"].ID
	k.r.OpenDir(listing)
	if n := len(k.list(t, listing)); n != each {
		t.Fatalf("%d names", n)
	}
	if got := k.all(t); got != dirs*each+1 {
		t.Fatalf("%d files, want %d", got, dirs*each+1)
	}
	k.until(t, "names to be forgotten", func() bool { return k.bytes() <= limit })
	known := func(id uint64) bool {
		k.r.mu.Lock()
		defer k.r.mu.Unlock()
		return k.r.s.Node(id) != nil
	}
	if !known(pinned) || !known(made.ID) || !known(busy) {
		t.Error("what the kernel has was forgotten")
	}
	k.r.mu.Lock()
	if d := k.r.s.Node(listing); !d.Dir.Loaded || d.Dir.Len() != each {
		t.Error("a directory with an open handle was forgotten")
	}
	var quiet uint64
	var quietName string
	for name, a := range root {
		if a.Type == tree.Directory && a.ID != busy && !k.r.s.Node(a.ID).Dir.Loaded {
			quietName, quiet = name, a.ID
		}
	}
	k.r.mu.Unlock()
	if quiet == 0 {
		t.Fatal("all directories are listed still")
	}
	k.r.ReleaseDir(listing)

	// What changes elsewhere is told to the kernel, which may know the directory still.
	b := open(t, r, t.TempDir(), "b")
	put(t, b, quietName+"/new", []byte("from elsewhere"))
	if err := b.Remove(ctx, Caller{}, quiet, "file-9.data", false); err != nil {
		t.Fatal(err)
	}
	drain(t, b)
	k.until(t, "the change of elsewhere", func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		return k.entries[nameAt{quiet, "new"}]
	})
	names := k.list(t, quiet)
	if _, there := names["file-9.data"]; there || len(names) != each || names["new"].Size == 0 {
		t.Errorf("%d names after a change of elsewhere: %v", len(names), names["new"])
	}
	// Everything is there again, with the same ids, and by another process too.
	if got := k.all(t); got != dirs*each+1 {
		t.Errorf("%d files, want %d", got, dirs*each+1)
	}
	if a, err := k.r.Lookup(ctx, busy, "made"); err != nil || a.ID != made.ID || a.Size != 10 {
		t.Errorf("what is being written: %+v, %v", a, err)
	}
	if a, err := k.r.Lookup(ctx, tree.Root, "sent"); err != nil || a.ID != sent {
		t.Errorf("what was sent: %+v, %v", a, err)
	}
	k.until(t, "names to be forgotten again", func() bool { return k.bytes() <= limit })
	if err := k.r.Close(); err != nil {
		t.Fatal(err)
	}
	again := trimming(t, r, dir, limit)
	if got := again.bytes(); got > limit+limit/10 {
		t.Errorf("a new process begins with %d bytes", got)
	}
	if got := again.all(t); got != dirs*each+1 {
		t.Errorf("%d files in a new process, want %d", got, dirs*each+1)
	}
	if data, err := get(again.r, tree.Root, "sent"); err != nil || string(data) != "uploaded" {
		t.Errorf("%q, %v", data, err)
	}
}

// TestTrimOffline: nothing is forgotten that could not be listed again.
func TestTrimOffline(t *testing.T) {
	r := simulatedremote.New()
	r.Fill(10, 20)
	k := trimming(t, r, t.TempDir(), 0)
	k.all(t)
	r.Cut(true)
	k.until(t, "the loss of the link", func() bool { return !k.r.Status().Connected })
	k.r.mu.Lock()
	k.r.cfg.MetadataBytes = 1
	for _, e := range k.r.dirs.at {
		e.Value.(*directory).used = time.Time{}
	}
	before := k.r.s.Len()
	k.r.mu.Unlock()
	k.r.trim()
	if got := k.r.Status().Nodes; got != before {
		t.Errorf("%d nodes of %d are left", got, before)
	}
	if got := k.all(t); got != 200 {
		t.Errorf("%d files", got)
	}
	r.Cut(false)
	k.until(t, "forgetting with a link", func() bool { return k.r.Status().Nodes < before/2 })
}

// TestTrimAmidUse lists, makes, renames and removes without pause while everything is forgotten as soon
// as it may be.
func TestTrimAmidUse(t *testing.T) {
	const workers, rounds = 4, 40
	r := simulatedremote.New()
	r.Fill(workers*3, 20)
	k := trimming(t, r, t.TempDir(), 1)
	k.r.mu.Lock()
	k.r.dirs.idle = 0
	k.r.mu.Unlock()
	root := k.list(t, tree.Root)
	stop := make(chan struct{})
	var trims, works sync.WaitGroup
	trims.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			k.r.trim()
		}
	})
	for w := range workers {
		works.Go(func() {
			for i := range rounds {
				from, to := root[fmt.Sprintf("directory-%d", 3*w)].ID, root[fmt.Sprintf("directory-%d", 3*w+1)].ID
				name := fmt.Sprintf("f%d", i)
				a, err := k.r.Make(ctx, Caller{}, from, name, Make{Type: tree.File, Mode: 0o600})
				if err == nil {
					err = k.r.Rename(ctx, Caller{}, from, name, to, name, 0)
				}
				if err != nil {
					t.Errorf("make and rename: %v", err)
					return
				}
				if b, err := k.r.Lookup(ctx, to, name); err != nil || b.ID != a.ID {
					t.Errorf("renamed: %+v, %v", b, err)
				}
				if i%2 == 0 {
					if err := k.r.Remove(ctx, Caller{}, to, name, false); err != nil {
						t.Errorf("remove: %v", err)
					}
				}
				if n := len(k.list(t, from)); n != 20 {
					t.Errorf("%d names, want 20", n)
				}
			}
		})
	}
	works.Wait()
	close(stop)
	trims.Wait()
	drain(t, k.r)
	for w := range workers {
		if n := len(k.list(t, root[fmt.Sprintf("directory-%d", 3*w+1)].ID)); n != 20+rounds/2 {
			t.Errorf("%d names, want %d", n, 20+rounds/2)
		}
	}
	if got := k.r.Status().Conflicts; got != 0 {
		t.Errorf("%d conflicts", got)
	}
}
