package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/attach/remote/simulatedremote"
	"github.com/postern-dev/postern/agentd/attach/tree"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

var ctx = context.Background()

// open opens a replica of r in dir, as host name.
func open(t *testing.T, r *simulatedremote.Remote, dir, name string, change ...func(*Config)) *Replica {
	t.Helper()
	cfg := Config{
		Dir: dir, Workspace: "w", MountID: name, Remote: r, Deadline: 2 * time.Second,
		Log: slog.New(slog.NewTextHandler(logTo{t}, nil)).With("host", name),
	}
	for _, c := range change {
		c(&cfg)
	}
	rep, err := Open(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := rep.Close(); err != nil && !errors.Is(err, errClosedForTest) {
			t.Logf("close: %v", err)
		}
	})
	return rep
}

var errClosedForTest = errors.New("closed before")

type logTo struct{ t *testing.T }

func (l logTo) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// put makes or replaces a file as a program would: open, write, close.
func put(t *testing.T, r *Replica, path string, data []byte) uint64 {
	t.Helper()
	dir, name := walk(t, r, path)
	a, err := r.Lookup(ctx, dir, name)
	if errors.Is(err, syscall.ENOENT) {
		a, err = r.Make(ctx, Caller{}, dir, name, Make{Type: tree.File, Mode: 0o644, Open: true})
	} else if err == nil {
		if _, err = r.Open(ctx, a.ID, true, true); err == nil {
			err = r.Mode(a.ID, true, false)
		}
	}
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	for off := 0; off < len(data); off += 1 << 20 {
		if _, err := r.Write(ctx, a.ID, int64(off), data[off:min(len(data), off+1<<20)]); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
	}
	if err := r.Flush(a.ID); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	r.Release(a.ID, true)
	return a.ID
}

func walk(t *testing.T, r *Replica, path string) (dir uint64, name string) {
	t.Helper()
	dir = tree.Root
	parts := strings.Split(path, "/")
	for _, p := range parts[:len(parts)-1] {
		a, err := r.Lookup(ctx, dir, p)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		dir = a.ID
	}
	return dir, parts[len(parts)-1]
}

func mkdir(t *testing.T, r *Replica, path string) uint64 {
	t.Helper()
	dir, name := walk(t, r, path)
	a, err := r.Make(ctx, Caller{}, dir, name, Make{Type: tree.Directory, Mode: 0o755})
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return a.ID
}

// get reads a file whole.
func get(r *Replica, dir uint64, name string) ([]byte, error) {
	a, err := r.Lookup(ctx, dir, name)
	if err != nil {
		return nil, err
	}
	if _, err := r.Open(ctx, a.ID, false, false); err != nil {
		return nil, err
	}
	defer r.Release(a.ID, false)
	var all []byte
	for off := int64(0); ; {
		buf := make([]byte, 1<<17)
		fd, done, err := r.Read(ctx, a.ID, off, len(buf))
		if err != nil {
			return all, err
		}
		n := 0
		if fd >= 0 {
			n, err = syscall.Pread(fd, buf, off)
		}
		done()
		if err != nil || n == 0 {
			return all, err
		}
		all = append(all, buf[:n]...)
		off += int64(n)
	}
}

func wantContent(t *testing.T, r *Replica, path string, want []byte) {
	t.Helper()
	dir, name := walk(t, r, path)
	got, err := get(r, dir, name)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%s: %d bytes, want %d; first difference at %d", path, len(got), len(want), difference(got, want))
	}
}

func difference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

func drain(t *testing.T, r *Replica) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := r.Drain(ctx); err != nil {
		t.Fatal(err)
	}
}

func names(t *testing.T, r *Replica, dir uint64) []string {
	t.Helper()
	var all []string
	err := r.ReadDir(ctx, dir, 0, func(n Name) bool {
		all = append(all, n.Name)
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(all)
	return all
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never: " + what)
		}
	}
}

func noise(n int, seed int64) []byte {
	b := make([]byte, n)
	rand.New(rand.NewSource(seed)).Read(b)
	return b
}

// TestTwoHosts: what one host makes another sees, and the reverse, without asking again.
func TestTwoHosts(t *testing.T) {
	r := simulatedremote.New()
	a, b := open(t, r, t.TempDir(), "a"), open(t, r, t.TempDir(), "b")
	mkdir(t, a, "d")
	big := noise(5<<20+17, 1)
	put(t, a, "d/big", big)
	put(t, a, "d/small", []byte("hello"))
	put(t, a, "d/empty", nil)
	drain(t, a)
	eventually(t, "d on b", func() bool { _, err := b.Lookup(ctx, tree.Root, "d"); return err == nil })
	wantContent(t, b, "d/big", big)
	wantContent(t, b, "d/small", []byte("hello"))
	wantContent(t, b, "d/empty", nil)

	copy(big[3<<20:], "changed")
	put(t, b, "d/big", big)
	drain(t, b)
	eventually(t, "the change on a", func() bool {
		got, err := get(a, mustDir(t, a, "d"), "big")
		return err == nil && bytes.Equal(got, big)
	})
	dir, _ := walk(t, b, "d/x")
	if err := b.Rename(ctx, Caller{}, dir, "small", tree.Root, "moved", 0); err != nil {
		t.Fatal(err)
	}
	if err := b.Remove(ctx, Caller{}, dir, "empty", false); err != nil {
		t.Fatal(err)
	}
	eventually(t, "rename and removal on a", func() bool {
		return fmt.Sprint(names(t, a, tree.Root)) == "[d moved]" && fmt.Sprint(names(t, a, mustDir(t, a, "d"))) == "[big]"
	})
	wantContent(t, a, "moved", []byte("hello"))
}

func mustDir(t *testing.T, r *Replica, path string) uint64 {
	t.Helper()
	dir, _ := walk(t, r, path+"/x")
	return dir
}

// TestOffline: days without a link, a restart in between; then everything arrives in order.
func TestOffline(t *testing.T) {
	r := simulatedremote.New()
	dir := t.TempDir()
	a := open(t, r, dir, "a")
	put(t, a, "known", []byte("before"))
	drain(t, a)
	eventually(t, "ids", func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.s.Meta().FreeIDs() > 100 })
	r.Cut(true)
	mkdir(t, a, "d")
	put(t, a, "d/new", noise(3<<20, 2))
	put(t, a, "known", []byte("after"))
	wantContent(t, a, "known", []byte("after"))
	if s := a.Status(); s.Ops == 0 || s.Bytes < 3<<20 || s.Oldest.IsZero() {
		t.Errorf("status offline: %+v", s)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	a = open(t, r, dir, "a")
	wantContent(t, a, "d/new", noise(3<<20, 2))
	wantContent(t, a, "known", []byte("after"))
	b := func() *Replica { r.Cut(false); return open(t, r, t.TempDir(), "b") }()
	drain(t, a)
	eventually(t, "everything on b", func() bool { return fmt.Sprint(names(t, b, tree.Root)) == "[d known]" })
	wantContent(t, b, "d/new", noise(3<<20, 2))
	wantContent(t, b, "known", []byte("after"))
	if s := a.Status(); s.Ops != 0 || s.Bytes != 0 {
		t.Errorf("status after draining: %+v", s)
	}
}

// TestConflict: two hosts change one file, and make one name, without knowing of each other.
// Both contents are there afterwards, on both.
func TestConflict(t *testing.T) {
	r := simulatedremote.New()
	a, b := open(t, r, t.TempDir(), "a"), open(t, r, t.TempDir(), "b")
	put(t, a, "file", []byte("base"))
	drain(t, a)
	eventually(t, "file on b", func() bool { _, err := b.Lookup(ctx, tree.Root, "file"); return err == nil })
	wantContent(t, b, "file", []byte("base"))
	for _, x := range []*Replica{a, b} {
		x := x
		eventually(t, "ids", func() bool { x.mu.Lock(); defer x.mu.Unlock(); return x.s.Meta().FreeIDs() > 100 })
	}
	r.Cut(true)
	put(t, a, "file", []byte("of a"))
	put(t, b, "file", []byte("of b"))
	put(t, a, "made", []byte("made by a"))
	put(t, b, "made", []byte("made by b"))
	r.Cut(false)
	drain(t, a)
	drain(t, b)
	for name, x := range map[string]*Replica{"a": a, "b": b} {
		eventually(t, "both on "+name, func() bool {
			var contents []string
			for _, n := range names(t, x, tree.Root) {
				c, err := get(x, tree.Root, n)
				if err != nil {
					return false
				}
				contents = append(contents, string(c))
			}
			slices.Sort(contents)
			return fmt.Sprint(contents) == "[made by a made by b of a of b]"
		})
	}
	if a.Status().Conflicts+b.Status().Conflicts != 2 {
		t.Errorf("conflicts: %d and %d", a.Status().Conflicts, b.Status().Conflicts)
	}
}

// TestLostReply: a commit whose answer was lost is not made twice.
func TestLostReply(t *testing.T) {
	r := simulatedremote.New()
	fail := 0
	r.OnCommit = func() (error, bool) {
		fail++
		if fail%2 == 1 {
			return errors.New("answer lost"), fail%4 == 1
		}
		return nil, false
	}
	a := open(t, r, t.TempDir(), "a")
	for i := range 20 {
		put(t, a, fmt.Sprint("f", i), fmt.Appendf(nil, "content %d", i))
	}
	drain(t, a)
	b := open(t, r, t.TempDir(), "b")
	if got := names(t, b, tree.Root); len(got) != 20 {
		t.Fatalf("%d names: %q", len(got), got)
	}
	wantContent(t, b, "f7", []byte("content 7"))
}

// TestDamagedCache: what was changed behind our back is fetched again.
func TestDamagedCache(t *testing.T) {
	r := simulatedremote.New()
	a := open(t, r, t.TempDir(), "a")
	data := noise(3<<20+5, 3)
	put(t, a, "f", data)
	drain(t, a)
	dir := t.TempDir()
	b := open(t, r, dir, "b")
	wantContent(t, b, "f", data)
	at, err := b.Lookup(ctx, tree.Root, "f")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	path := b.store.Path(at.ID)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("damage"), 1<<20+7); err != nil {
		t.Fatal(err)
	}
	f.Close()
	b = open(t, r, dir, "b")
	before := r.Fetched()
	wantContent(t, b, "f", data)
	if n := r.Fetched() - before; n != 1 {
		t.Errorf("%d chunks were fetched again, want the damaged one", n)
	}
}

// TestDeadLink: what is not here is EIO within the deadline; what is here is served.
func TestDeadLink(t *testing.T) {
	r := simulatedremote.New()
	a := open(t, r, t.TempDir(), "a")
	data := noise(3<<20, 4)
	put(t, a, "f", data)
	put(t, a, "g", data[:100])
	drain(t, a)
	b := open(t, r, t.TempDir(), "b", func(c *Config) { c.Deadline = 200 * time.Millisecond })
	wantContent(t, b, "g", data[:100])
	r.Silence(true)
	defer r.Silence(false)
	wantContent(t, b, "g", data[:100])
	if _, err := get(b, tree.Root, "f"); !errors.Is(err, syscall.EIO) {
		t.Errorf("without a link: %v, want EIO", err)
	}
	r.Silence(false)
	wantContent(t, b, "f", data)
}

// TestEviction: contents that can be fetched again go when there are too many; those that
// are not uploaded never do.
func TestEviction(t *testing.T) {
	r := simulatedremote.New()
	a := open(t, r, t.TempDir(), "a", func(c *Config) { c.CacheBytes = 2 << 20 })
	for i := range 6 {
		put(t, a, fmt.Sprint("f", i), noise(1<<20, int64(i)))
	}
	drain(t, a)
	r.Cut(true)
	put(t, a, "unsent", noise(3<<20, 100))
	eventually(t, "eviction", func() bool { return a.Status().CacheBytes <= 4<<20 })
	wantContent(t, a, "unsent", noise(3<<20, 100))
	r.Cut(false)
	for i := range 6 {
		wantContent(t, a, fmt.Sprint("f", i), noise(1<<20, int64(i)))
	}
}

// TestCompact: the journal begun anew is the same replica.
func TestCompact(t *testing.T) {
	r := simulatedremote.New()
	dir := t.TempDir()
	a := open(t, r, dir, "a")
	mkdir(t, a, "d")
	for i := range 50 {
		put(t, a, fmt.Sprint("d/f", i), noise(100*i, int64(i)))
	}
	if err := a.Compact(); err != nil {
		t.Fatal(err)
	}
	put(t, a, "d/after", []byte("x"))
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	r.Cut(true)
	a = open(t, r, dir, "a")
	for i := range 50 {
		wantContent(t, a, fmt.Sprint("d/f", i), noise(100*i, int64(i)))
	}
	wantContent(t, a, "d/after", []byte("x"))
}

// TestManyEntries: a tree of 100,000 names is listed in large steps, and takes little memory.
func TestManyEntries(t *testing.T) {
	const dirs, files = 500, 200
	r := simulatedremote.New()
	r.Fill(dirs, files)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	a := open(t, r, t.TempDir(), "a")
	total := 0
	for _, d := range names(t, a, tree.Root) {
		total += len(names(t, a, mustDir(t, a, d)))
	}
	if total != dirs*files {
		t.Fatalf("%d names, want %d", total, dirs*files)
	}
	if n := r.Listed(); n > 100 {
		t.Errorf("directories were listed %d times for %d", n, dirs)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	per := (after.HeapAlloc - before.HeapAlloc) / (dirs * files)
	t.Logf("%d bytes of memory for each entry", per)
	if per > 600 {
		t.Errorf("%d bytes of memory for each entry", per)
	}
	if err := a.Compact(); err != nil {
		t.Fatal(err)
	}
}

// heldByKernel is a Listener whose kernel knows everything.
type heldByKernel struct{}

func (heldByKernel) InvalEntry(uint64, string)    {}
func (heldByKernel) InvalInode(uint64)            {}
func (heldByKernel) Holds(uint64) bool            { return true }
func (heldByKernel) LetGo(uint64, string, uint64) {}

// TestTakeover: a process takes a replica over while handles are open, through which the
// kernel goes on writing to the backing files.
func TestTakeover(t *testing.T) {
	r := simulatedremote.New()
	dir := t.TempDir()
	a := open(t, r, dir, "a")
	a.Listen(heldByKernel{})
	made, err := a.Make(ctx, Caller{Unique: 77}, tree.Root, "made", Make{Type: tree.File, Mode: 0o644, Open: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Write(ctx, made.ID, 0, []byte("of the first")); err != nil {
		t.Fatal(err)
	}
	through := put(t, a, "through", []byte("written by the kernel: "))
	drain(t, a)
	if _, err := a.Open(ctx, through, true, false); err != nil {
		t.Fatal(err)
	}
	if err := a.Mode(through, true, true); err != nil {
		t.Fatal(err)
	}
	gone := put(t, a, "gone", []byte("removed, and open"))
	if _, err := a.Open(ctx, gone, false, false); err != nil {
		t.Fatal(err)
	}
	if err := a.Remove(ctx, Caller{}, tree.Root, "gone", false); err != nil {
		t.Fatal(err)
	}
	r.Cut(true) // the first process does nothing any more; it is as good as dead
	appendTo := func(id uint64, text string) {
		f, err := os.OpenFile(a.store.Path(id), os.O_WRONLY|os.O_APPEND, 0)
		if err == nil {
			_, err = f.WriteString(text)
			f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	appendTo(through, "before")

	b := open(t, r, dir, "a")
	l := heldByKernel{}
	b.Inherit()
	b.Listen(l)
	if id, ok := b.Replied(77); !ok || id != made.ID {
		t.Errorf("a request that is sent again: %d, %v; want %d", id, ok, made.ID)
	}
	if _, err := b.Write(ctx, made.ID, 12, []byte(", and of the second")); err != nil {
		t.Fatal(err)
	}
	appendTo(through, " and after")
	for id, want := range map[uint64]uint64{made.ID: 31, through: 23 + 6 + 10} {
		if a, err := b.GetAttr(ctx, id); err != nil || a.Size != want {
			t.Errorf("node %d has %d bytes, %v; want %d", id, a.Size, err, want)
		}
		if err := b.Flush(id); err != nil {
			t.Fatal(err)
		}
		b.Release(id, true)
		b.Forgotten(l, id)
	}
	fd, done, err := b.Read(ctx, gone, 0, 100)
	if err != nil || fd < 0 {
		t.Fatalf("a removed file that is open: %d, %v", fd, err)
	}
	done()
	b.Release(gone, false)
	b.Forgotten(l, gone)
	if _, err := b.GetAttr(ctx, gone); !errors.Is(err, syscall.ESTALE) {
		t.Errorf("a removed file that nobody has open any more: %v", err)
	}
	r.Cut(false)
	drain(t, b)
	c := open(t, r, t.TempDir(), "c")
	wantContent(t, c, "made", []byte("of the first, and of the second"))
	wantContent(t, c, "through", []byte("written by the kernel: before and after"))
	if got := fmt.Sprint(names(t, c, tree.Root)); got != "[made through]" {
		t.Errorf("names %s", got)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, id := range []uint64{made.ID, through} {
		if n := b.s.Node(id); n.Flags&(tree.Writing|tree.Cached|tree.Dirty) != 0 {
			t.Errorf("node %d still has flags %b", id, n.Flags)
		}
	}
	if len(b.open) != 0 || len(b.unknown) != 0 {
		t.Errorf("%d contents are open, %d unknown", len(b.open), len(b.unknown))
	}
}

// TestPartial writes to a large file of which only some chunks are here, at random, with
// restarts; the rest of it is fetched as it is needed, and only changed chunks are sent.
func TestPartial(t *testing.T) {
	r := simulatedremote.New()
	model := noise(40<<20+333, 5)
	{
		a := open(t, r, t.TempDir(), "a")
		put(t, a, "big", model)
		drain(t, a)
	}
	dir := t.TempDir()
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewSource(seed))
	b := open(t, r, dir, "b")
	for round := range 4 {
		at, err := b.Lookup(ctx, tree.Root, "big")
		if err != nil {
			t.Fatal(err)
		}
		if at.Size != uint64(len(model)) {
			t.Fatalf("round %d: %d bytes, want %d", round, at.Size, len(model))
		}
		before := r.Fetched()
		o, err := b.Open(ctx, at.ID, true, false)
		if err == nil {
			err = b.Mode(at.ID, true, false)
		}
		if err != nil {
			t.Fatal(err)
		}
		if o.Whole && round == 0 {
			t.Fatal("opening fetched all of a large file")
		}
		for range 8 {
			off := rnd.Intn(len(model))
			switch rnd.Intn(5) {
			case 0:
				size := max(17<<20, off)
				if rnd.Intn(2) == 0 {
					size = len(model) + rnd.Intn(3<<20)
				}
				if err := b.truncate(ctx, at.ID, uint64(size)); err != nil {
					t.Fatal(err)
				}
				if size < len(model) {
					model = model[:size:size]
				} else {
					model = append(model, make([]byte, size-len(model))...)
				}
			case 1:
				n := min(rnd.Intn(200_000)+1, len(model)-off)
				fd, done, err := b.Read(ctx, at.ID, int64(off), n)
				if err != nil {
					t.Fatal(err)
				}
				got := make([]byte, n)
				_, err = syscall.Pread(fd, got, int64(off))
				done()
				if err != nil || !bytes.Equal(got, model[off:off+n]) {
					t.Fatalf("round %d: read %d+%d differs at %d, %v", round, off, n, difference(got, model[off:off+n]), err)
				}
			case 2:
				n := int64(rnd.Intn(3 << 20))
				if err := b.Fallocate(ctx, at.ID, 3, int64(off), n+1); err != nil {
					t.Fatal(err)
				}
				clear(model[off:min(len(model), off+int(n)+1)])
			default:
				data := noise(rnd.Intn(3<<20)+1, rnd.Int63())
				if _, err := b.Write(ctx, at.ID, int64(off), data); err != nil {
					t.Fatal(err)
				}
				if end := off + len(data); end > len(model) {
					model = append(model, make([]byte, end-len(model))...)
				}
				copy(model[off:], data)
			}
		}
		if err := b.Flush(at.ID); err != nil {
			t.Fatal(err)
		}
		b.Release(at.ID, true)
		if n := r.Fetched() - before; round == 0 && n >= 40 {
			t.Errorf("%d chunks were fetched for a few changes", n)
		}
		if rnd.Intn(2) == 0 {
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			b = open(t, r, dir, "b")
		}
		if rnd.Intn(2) == 0 {
			drain(t, b)
		}
	}
	drain(t, b)
	wantContent(t, b, "big", model)
	c := open(t, r, t.TempDir(), "c")
	wantContent(t, c, "big", model)
}

// TestRefused: what the control plane has no room for stays here, and is sent when there is.
func TestRefused(t *testing.T) {
	r := simulatedremote.New()
	a := open(t, r, t.TempDir(), "a")
	r.Quota(100)
	put(t, a, "large", noise(5000, 1))
	put(t, a, "small", []byte("x"))
	drain(t, a)
	if s := a.Status(); s.Bytes != 5000 || s.Conflicts != 1 {
		t.Errorf("status: %+v", s)
	}
	wantContent(t, a, "large", noise(5000, 1))
	r.Quota(0)
	a.offerAgain(time.Now().Add(2 * refusedFor))
	drain(t, a)
	b := open(t, r, t.TempDir(), "b")
	wantContent(t, b, "large", noise(5000, 1))
	wantContent(t, b, "small", []byte("x"))
}

// TestLostReplyAndNewContent: the content of a file changes between a commit whose answer was
// lost and its repetition, which is answered as the first one was.
func TestLostReplyAndNewContent(t *testing.T) {
	r := simulatedremote.New()
	fail := make(chan struct{}, 1)
	wait := make(chan struct{})
	n := 0
	r.OnCommit = func() (error, bool) {
		n++
		if n == 1 {
			fail <- struct{}{}
			<-wait
			return errors.New("answer lost"), true
		}
		return nil, false
	}
	a := open(t, r, t.TempDir(), "a")
	put(t, a, "f", []byte("first"))
	<-fail
	at, err := a.Lookup(ctx, tree.Root, "f")
	if err != nil {
		t.Fatal(err)
	}
	// Without a word to the journal, as a program does that has not closed the file yet.
	if _, err := a.Open(ctx, at.ID, true, false); err != nil {
		t.Fatal(err)
	}
	if err := a.Mode(at.ID, true, false); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Write(ctx, at.ID, 0, []byte("second")); err != nil {
		t.Fatal(err)
	}
	close(wait)
	eventually(t, "the repetition", func() bool { s := a.Status(); return s.Ops == 0 })
	if err := a.Flush(at.ID); err != nil {
		t.Fatal(err)
	}
	a.Release(at.ID, true)
	drain(t, a)
	b := open(t, r, t.TempDir(), "b")
	wantContent(t, b, "f", []byte("second"))
	if s := a.Status(); s.Conflicts != 0 || s.Bytes != 0 {
		t.Errorf("status: %+v", s)
	}
}

// rewriting is a control plane beside which somebody writes: before is called before each commit, whose answer
// is lost if it says so, with (applied) or without the commit.
type rewriting struct {
	*simulatedremote.Remote
	before func(*posternv1.CommitRequest) (lose, applied bool)
}

var errLost = errors.New("the link broke")

func (r rewriting) Commit(ctx context.Context, req *posternv1.CommitRequest) (*posternv1.CommitResponse, error) {
	lose, applied := r.before(req)
	if !lose {
		return r.Remote.Commit(ctx, req)
	}
	if applied {
		if _, err := r.Remote.Commit(ctx, req); err != nil {
			return nil, err
		}
	}
	return nil, errLost
}

// TestLostReplyThenContent: an operation that had no content to send any more was sent, its answer was lost, and
// it has one again when it is repeated. The answer is that of the first time, and of no version.
func TestLostReplyThenContent(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart=%v", restart), func(t *testing.T) {
			r := simulatedremote.New()
			dir := t.TempDir()
			var a *Replica
			var f uint64
			write := func(content string) {
				_, err := a.Open(ctx, f, true, true)
				if err == nil {
					err = a.Mode(f, true, false)
				}
				if err == nil {
					_, err = a.Write(ctx, f, 0, []byte(content))
				}
				if err == nil {
					err = a.Flush(f)
				}
				a.Release(f, true)
				if err != nil {
					t.Errorf("write %q: %v", content, err)
				}
			}
			var armed, lost atomic.Bool
			down := func(*posternv1.CommitRequest) (bool, bool) { return lost.Load() && restart, false }
			again := false
			change := func(c *Config) {
				c.Remote = rewriting{r, func(req *posternv1.CommitRequest) (bool, bool) {
					if !armed.Load() || lost.Load() {
						return down(req)
					}
					for _, op := range req.Ops {
						switch {
						case string(op.GetSetContent().GetInline()) == "two" && !again:
							again = true
							write("three") // by another operation: this one is on its way
							return true, false
						case again && op.GetSetAttr().GetId() == f && op.GetSetAttr().MtimeNs != nil && op.GetSetAttr().Mode == nil:
							write("four")
							lost.Store(true)
							return true, true
						}
					}
					return false, false
				}}
			}
			a = open(t, r, dir, "a", change)
			f = put(t, a, "f", []byte("one"))
			drain(t, a)
			armed.Store(true)
			write("two")
			eventually(t, "the operation without a content", lost.Load)
			if restart {
				if err := a.Close(); err != nil {
					t.Fatal(err)
				}
				a = open(t, r, dir, "a")
			}
			drain(t, a)
			if s := a.Status(); s.Conflicts != 0 || s.Bytes != 0 {
				t.Errorf("status: %+v", s)
			}
			b := open(t, r, t.TempDir(), "b")
			wantContent(t, b, "f", []byte("four"))
			if got := names(t, b, tree.Root); len(got) != 1 {
				t.Errorf("conflicts although nobody else wrote: %q", got)
			}
		})
	}
}

// TestUnreachableContent: a reader of what is not here and cannot come gets EIO, not EINTR, after which
// programs would try again for ever.
func TestUnreachableContent(t *testing.T) {
	r := simulatedremote.New()
	a := open(t, r, t.TempDir(), "a")
	put(t, a, "large", noise(3<<20, 1))
	put(t, a, "small", noise(5000, 2))
	drain(t, a)
	b := open(t, r, t.TempDir(), "b")
	large, err := b.Lookup(ctx, tree.Root, "large")
	if err != nil {
		t.Fatal(err)
	}
	small, err := b.Lookup(ctx, tree.Root, "small")
	if err != nil {
		t.Fatal(err)
	}
	r.Cut(true)
	if _, err := b.Open(ctx, small.ID, false, false); !errors.Is(err, syscall.EIO) {
		t.Errorf("open of a small file: %v, want EIO", err)
	}
	if _, err := b.Open(ctx, large.ID, false, false); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.Read(ctx, large.ID, 0, 4096); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v, want EIO", err)
	}
	if _, err := b.Write(ctx, large.ID, 100, []byte("x")); !errors.Is(err, syscall.EIO) {
		t.Errorf("write in the midst of a chunk: %v, want EIO", err)
	}
	interrupted, interrupt := context.WithCancel(ctx)
	interrupt()
	if _, _, err := b.Read(interrupted, large.ID, 0, 4096); !errors.Is(err, syscall.EINTR) {
		t.Errorf("interrupted read: %v, want EINTR", err)
	}
	b.Release(large.ID, false)
}
