package pagestore

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/proto"
)

func TestDedupFollowsMovedPages(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	k := newSimulatedKernel(1, 32)
	var parent ID
	for cell := range 5 {
		if cell > 0 {
			k.run(40, 25)
		}
		images := k.dump(t)
		m := meta("k1")
		m.Parent = parent
		c, st := mustPut(t, s, m, images)
		if cell == 0 {
			if st.New == 0 || st.Zero == 0 || st.Written >= st.Size*6/10 {
				t.Errorf("first: %+v: nothing was compressed", st)
			}
		} else if pages := st.New / ChunkSize; pages > 40+25+10 {
			// 65 pages of memory, and a few chunks of the small files.
			t.Errorf("cell %d stored %d new chunks", cell, pages)
		}
		if cell > 0 && st.Written > st.Size*3/100 {
			t.Errorf("cell %d: %d bytes written of %d", cell, st.Written, st.Size)
		}
		mustRestore(t, s, c.ID, images)
		parent = c.ID
	}
	var disk int64
	for _, n := range storeFiles(t, dir) {
		disk += n
	}
	if disk != s.Used() {
		t.Errorf("on disk %d bytes, Used says %d", disk, s.Used())
	}
}

func TestSameImagesCostNothingAfterReopen(t *testing.T) {
	dir := t.TempDir()
	images := newSimulatedKernel(2, 8).dump(t)
	s := openStore(t, dir, synced)
	first, _ := mustPut(t, s, meta("k1"), images)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, dir, synced)
	m := meta("k2")
	m.Label, m.Host.CRIU, m.Attributes = "again", "4.2.1", map[string]string{"a": "b"}
	second, st := mustPut(t, s, m, images)
	if st.New != 0 || st.Written > 4096 {
		t.Errorf("stored again: %+v", st)
	}
	s.Close() //nolint:errcheck // tested above
	s = openStore(t, dir, synced)
	for _, id := range []ID{first.ID, second.ID} {
		mustRestore(t, s, id, images)
	}
	got, err := s.Get(second.ID)
	if err != nil || got.Label != "again" || got.Host.CRIU != "4.2.1" || got.Attributes["a"] != "b" || got.Size != second.Size {
		t.Errorf("got %+v, %v", got, err)
	}
	if u := s.Used(); u <= 0 {
		t.Errorf("Used %d", u)
	}
}

// randomTree makes files of all kinds below dir.
func randomTree(t *testing.T, r *rand.Rand, dir string) {
	t.Helper()
	dirs := []string{dir}
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	for i := range 30 {
		at := filepath.Join(dirs[r.IntN(len(dirs))], fmt.Sprintf("n%d-\xff-ü", i))
		switch r.IntN(6) {
		case 0:
			must(os.Mkdir(at, 0o755))
			dirs = append(dirs, at)
		case 1:
			must(os.Symlink([]string{"../x", "/etc/passwd", "dangling"}[r.IntN(3)], at))
		case 2:
			must(syscall.Mkfifo(at, 0o640))
		case 3: // sparse
			f, err := os.Create(at)
			must(err)
			must(f.Truncate(int64(r.IntN(8 << 20))))
			_, err = f.WriteAt([]byte("data"), int64(r.IntN(8<<20)))
			must(err)
			must(f.Close())
		default:
			b := make([]byte, []int{0, 1, ChunkSize - 1, ChunkSize, ChunkSize + 1, r.IntN(3 << 20)}[r.IntN(6)])
			for j := range b {
				b[j] = byte(r.IntN(3))
			}
			must(os.WriteFile(at, b, 0o600))
			must(os.Chmod(at, []os.FileMode{0o600, 0o400, 0o755 | os.ModeSetuid, 0o644}[r.IntN(4)]))
		}
	}
	old := time.Unix(1700000000, 12345)
	for _, d := range slices.Backward(dirs) {
		must(os.Chmod(d, []os.FileMode{0o700, 0o755, 0o777 | os.ModeSticky}[r.IntN(3)]))
		must(os.Chtimes(d, old, old))
	}
}

func TestRandomTreesComeBack(t *testing.T) {
	s := openStore(t, t.TempDir())
	for seed := range uint64(25) {
		r := rand.New(rand.NewPCG(seed, 7))
		dir := filepath.Join(t.TempDir(), "tree")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		randomTree(t, r, dir)
		c, _ := mustPut(t, s, meta("k1"), dir)
		mustRestore(t, s, c.ID, dir)
		again, st := mustPut(t, s, meta("k1"), dir)
		if st.New != 0 {
			t.Errorf("seed %d: %d new bytes the second time", seed, st.New)
		}
		mustRestore(t, s, again.ID, dir)
	}
}

func TestSeveralTreesSocketsAndOwners(t *testing.T) {
	s := openStore(t, t.TempDir())
	images, private := newSimulatedKernel(3, 1).dump(t), t.TempDir()
	l, err := net.Listen("unix", filepath.Join(private, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // a test's
	file := filepath.Join(private, "f")
	if err := os.WriteFile(file, []byte("x"), 0o604); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(file, 1500, 1501); err != nil {
			t.Fatal(err)
		}
	}
	c, st, err := s.Put(t.Context(), meta("k1"), []Tree{{"images", images}, {"private", private}})
	if err != nil {
		t.Fatal(err)
	}
	if st.Sockets != 1 {
		t.Errorf("%d sockets left out, want 1", st.Sockets)
	}
	a, b := t.TempDir(), t.TempDir()
	if _, err := s.Restore(t.Context(), c.ID, map[string]string{"images": a}); proto.CodeOf(err) != proto.CodeInvalid {
		t.Errorf("a tree without its directory: %v", err)
	}
	if _, err := s.Restore(t.Context(), c.ID, map[string]string{"images": a, "private": b}); err != nil {
		t.Fatal(err)
	}
	sameTree(t, images, a)
	sameTree(t, private, b)
	if _, err := s.Restore(t.Context(), c.ID, map[string]string{"images": a, "private": b}); proto.CodeOf(err) != proto.CodeInvalid {
		t.Errorf("directories that are not empty: %v", err)
	}
	sameTree(t, images, a)
}

func TestBadInputIsOneClearLine(t *testing.T) {
	s := openStore(t, t.TempDir())
	images := newSimulatedKernel(3, 1).dump(t)
	known, _ := mustPut(t, s, meta("k1"), images)
	withDevice := t.TempDir()
	if os.Geteuid() == 0 {
		if err := syscall.Mknod(filepath.Join(withDevice, "null"), syscall.S_IFCHR|0o666, 1<<8|3); err != nil {
			t.Fatal(err)
		}
	}
	trees := []Tree{{"images", images}}
	for _, c := range []struct {
		name  string
		meta  Meta
		trees []Tree
		code  proto.Code
		want  string
	}{
		{"organization", Meta{Organization: "../x", Kernel: "k"}, trees, proto.CodeInvalid, "organization"},
		{"kernel", Meta{Organization: "o", Kernel: ""}, trees, proto.CodeInvalid, "kernel"},
		{"id", Meta{ID: "x", Organization: "o", Kernel: "k"}, trees, proto.CodeInvalid, "id"},
		{"parent", Meta{Parent: "../x", Organization: "o", Kernel: "k"}, trees, proto.CodeInvalid, "parent"},
		{"own parent", Meta{ID: known.ID, Parent: known.ID, Organization: "o", Kernel: "k"}, trees, proto.CodeInvalid, "own parent"},
		{"twice", Meta{ID: known.ID, Organization: "o", Kernel: "k"}, trees, proto.CodeAlreadyExists, "exists"},
		{"no tree", meta("k"), nil, proto.CodeInvalid, "0 directories"},
		{"tree's name", meta("k"), []Tree{{"A", images}}, proto.CodeInvalid, "not a name"},
		{"same tree", meta("k"), []Tree{{"a", images}, {"a", images}}, proto.CodeInvalid, "twice"},
		{"no directory", meta("k"), []Tree{{"a", images + "/none"}}, proto.CodeInternal, "none"},
		{"a file", meta("k"), []Tree{{"a", images + "/core-7.img"}}, proto.CodeInternal, "core-7.img"},
		{"long label", Meta{Organization: "o", Kernel: "k", Label: strings.Repeat("x", maxMeta)}, trees, proto.CodeInvalid, "label"},
		{"device", meta("k"), []Tree{{"a", withDevice}}, proto.CodeInvalid, "device"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.name == "device" && os.Geteuid() != 0 {
				t.Skip("needs root: makes a device")
			}
			used := s.Used()
			_, _, err := s.Put(t.Context(), c.meta, c.trees)
			if proto.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v: %v", proto.CodeOf(err), err)
			}
			if s.Used() != used {
				t.Errorf("Used went from %d to %d", used, s.Used())
			}
		})
	}
	if _, err := s.Restore(t.Context(), NewID(), nil); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("unknown id: %v", err)
	}
	if list, _ := s.List("org_a", ""); len(list) != 1 {
		t.Errorf("%d checkpoints, want 1", len(list))
	}
}

func TestOrganizationsShareNothing(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	images := newSimulatedKernel(4, 4).dump(t)
	_, first := mustPut(t, s, Meta{Organization: "org_a", Kernel: "k"}, images)
	_, second := mustPut(t, s, Meta{Organization: "org_b", Kernel: "k"}, images)
	if second.New != first.New {
		t.Errorf("the other organization stored %d new bytes, want %d", second.New, first.New)
	}
	ka, err := deriveKeys(testKey, "org_a")
	if err != nil {
		t.Fatal(err)
	}
	kb, err := deriveKeys(testKey, "org_b")
	if err != nil {
		t.Fatal(err)
	}
	if ka.hash == kb.hash || ka.pack == kb.pack || newHasher(&ka).hash(zeroChunk[:]) == newHasher(&kb).hash(zeroChunk[:]) {
		t.Error("two organizations have a key in common")
	}
}

func TestPlaintextIsNowhereOnDisk(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	src := t.TempDir()
	canary := "CANARY-0123456789"
	for i := range 300 { // both compressed and raw segments, names, links, labels
		b := make([]byte, ChunkSize)
		for j := range b {
			b[j] = byte(rand.Uint32())
		}
		copy(b[i%100:], canary)
		if err := os.WriteFile(filepath.Join(src, fmt.Sprintf("%s-%d", canary, i)), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(canary, filepath.Join(src, "link")); err != nil {
		t.Fatal(err)
	}
	m := meta("k1")
	m.Label, m.Attributes = canary, map[string]string{"x": canary}
	mustPut(t, s, m, src)
	for path := range storeFiles(t, dir) {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), canary) || strings.Contains(path, canary) {
			t.Errorf("%s holds the canary", path)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", path, info.Mode(), err)
		}
	}
	if got := fmt.Sprintf("%v %+v %#v %s", testKey, Options{Key: testKey}, testKey, testKey); strings.Contains(got, "1, 2") || strings.Contains(got, "0x1") || strings.Contains(got, "1 2 3") {
		t.Errorf("the key shows: %s", got)
	}
}

func TestOtherKeyReadsNothing(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	c, _ := mustPut(t, s, meta("k1"), newSimulatedKernel(4, 1).dump(t))
	s.Close() //nolint:errcheck // only to reopen
	s = openStore(t, dir, func(o *Options) { o.Key = Key{9} })
	if _, err := s.Get(c.ID); !errors.Is(err, ErrDamaged) {
		t.Errorf("got %v", err)
	}
	if _, damaged := s.List("org_a", ""); len(damaged) != 1 {
		t.Errorf("%d damaged, want 1", len(damaged))
	}
	if _, err := s.Collect(t.Context(), 1<<30); err == nil || !strings.Contains(err.Error(), string(c.ID)) {
		t.Errorf("Collect beside a damaged checkpoint: %v", err)
	}
	s.Close() //nolint:errcheck // only to reopen
	s = openStore(t, dir)
	if _, err := s.Get(c.ID); err != nil {
		t.Errorf("with its own key again: %v", err)
	}
}

func TestOneProcessAtATime(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, synced)
	if _, err := Open(Options{Dir: dir, Logger: quiet()}); !errors.Is(err, ErrInUse) {
		t.Errorf("second Open: %v", err)
	}
	s.Close() //nolint:errcheck // the next line shows
	openStore(t, dir, synced)
	if _, _, err := s.Put(t.Context(), meta("k"), []Tree{{"images", t.TempDir()}}); err == nil {
		t.Error("Put after Close")
	}
}

func TestLimit(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, func(o *Options) { o.Limit = 6 << 20 })
	first := newSimulatedKernel(5, 8).dump(t)
	c, _ := mustPut(t, s, meta("k1"), first)
	before := storeFiles(t, dir)
	_, _, err := s.Put(t.Context(), meta("k1"), []Tree{{"images", newSimulatedKernel(6, 8).dump(t)}})
	if proto.CodeOf(err) != proto.CodeStorageFull {
		t.Fatalf("got %v", err)
	}
	if after := storeFiles(t, dir); len(after) != len(before) {
		t.Errorf("left behind: %v", after)
	}
	mustRestore(t, s, c.ID, first)
}

func TestCancel(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, synced)
	images := newSimulatedKernel(5, 64).dump(t)
	c, _ := mustPut(t, s, meta("k1"), images)
	before := storeFiles(t, dir)
	other := newSimulatedKernel(6, 64).dump(t)
	for _, after := range []time.Duration{0, time.Millisecond, 10 * time.Millisecond, 30 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		_, _, err := s.Put(ctx, meta("k1"), []Tree{{"images", other}})
		if code := proto.CodeOf(err); err != nil && code != proto.CodeTimeout {
			t.Errorf("put: %v: %v", code, err)
		}
		if now := storeFiles(t, dir); err != nil && len(now) != len(before) {
			t.Errorf("left behind: %v", now)
		}
		cancel()
		dst := t.TempDir()
		ctx, cancel = context.WithTimeout(t.Context(), after)
		if _, err := s.Restore(ctx, c.ID, map[string]string{"images": dst}); err != nil {
			if code := proto.CodeOf(err); code != proto.CodeTimeout {
				t.Errorf("restore: %v: %v", code, err)
			}
			emptyDir(t, dst)
		}
		cancel()
		before = storeFiles(t, dir)
	}
}
