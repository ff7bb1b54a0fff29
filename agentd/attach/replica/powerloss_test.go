package replica

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/postern-dev/postern/agentd/attach/remote/simulatedremote"
	"github.com/postern-dev/postern/agentd/attach/tree"
)

// synced remembers what is on disk for sure: lengths of journals, and -1 for contents.
type synced struct {
	mu     sync.Mutex
	at     map[string]int64
	frozen bool
}

// freeze makes it forget what is synced from now on.
func (s *synced) freeze() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.frozen = true
}

func (s *synced) tell(path string, length int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.at == nil {
		s.at = map[string]int64{}
	}
	if !s.frozen {
		s.at[path] = length
	}
}

func (s *synced) length(path string) (int64, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.at[path]
	return n, ok
}

// copyDir copies a replica's directory as it is now, or, if only is not nil, as a loss of power leaves it
// that takes the unsynced end of the journal, but not contents.
func copyDir(t *testing.T, from string, only *synced) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "replica")
	err := filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		data, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		if only != nil && strings.HasPrefix(filepath.Base(p), "journal-") {
			n, _ := only.length(p)
			data = data[:n]
		}
		return os.WriteFile(filepath.Join(to, rel), data, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
	return to
}

// unsynced makes a file of data that nobody closed.
func unsynced(t *testing.T, r *Replica, name string, data []byte) uint64 {
	t.Helper()
	a, err := r.Make(ctx, Caller{}, tree.Root, name, Make{Type: tree.File, Mode: 0o644, Open: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Write(ctx, a.ID, 0, data); err != nil {
		t.Fatal(err)
	}
	return a.ID
}

// TestContentsOfLostNodes: a loss of power takes nodes that were not synced, so that their ids are free
// again, and leaves what was written to them. Files that are made then have none of it, and keep their own.
func TestContentsOfLostNodes(t *testing.T) {
	r := simulatedremote.New()
	var disk synced
	dir := t.TempDir()
	a := open(t, r, dir, "a", func(c *Config) { c.Boot, c.SyncedForTest = "1", disk.tell })
	put(t, a, "kept", noise(100, 1))
	drain(t, a)
	disk.freeze() // the uploader syncs them soon
	r.Cut(true)
	const files = 40
	for i := range files {
		unsynced(t, a, fmt.Sprint("lost", i), noise(50_000, int64(i)))
	}
	after := copyDir(t, dir, &disk)
	for _, id := range a.openForTest() {
		a.Release(id, true)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	r.Cut(false)

	b := open(t, r, after, "a", func(c *Config) { c.Boot = "2" })
	wantContent(t, b, "kept", noise(100, 1))
	if got := names(t, b, tree.Root); len(got) != 1 {
		t.Fatalf("after the loss of power: %v", got)
	}
	check := func(b *Replica) {
		t.Helper()
		for i := range 2 * files {
			wantContent(t, b, fmt.Sprint("new", i), noise(10+3000*(i%20), int64(1000+i)))
		}
	}
	for i := range 2 * files {
		put(t, b, fmt.Sprint("new", i), noise(10+3000*(i%20), int64(1000+i)))
		if i%10 == 0 {
			b.sweep()
		}
	}
	check(b)
	b.sweep()
	eventually(t, "what nobody owns is removed", func() bool {
		b.sweep()
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.stocked && len(b.doomed) == 0
	})
	drain(t, b)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	r.Cut(true) // nothing is fetched
	b = open(t, r, after, "a", func(c *Config) { c.Boot = "2" })
	check(b)
	contents := 0
	if err := b.store.Walk(func(uint64, int64) error { contents++; return nil }); err != nil {
		t.Fatal(err)
	}
	if contents != 2*files+1 {
		t.Errorf("%d contents lie on disk, want %d", contents, 2*files+1)
	}
}

// TestSyncAfterTakeover: what a process left in the page cache when it was killed is on disk after a sync
// that the process behind it answers.
func TestSyncAfterTakeover(t *testing.T) {
	r := simulatedremote.New()
	dir := t.TempDir()
	a := open(t, r, dir, "a")
	id := unsynced(t, a, "f", noise(100_000, 1))
	killed := copyDir(t, dir, nil)
	a.Release(id, true)

	var disk synced
	b := open(t, r, killed, "a", func(c *Config) { c.SyncedForTest = disk.tell })
	b.Inherit()
	r.Cut(true)
	if err := b.FsyncDir(); err != nil {
		t.Fatal(err)
	}
	journal := filepath.Join(killed, "journal", "journal-1")
	text, err := os.ReadFile(journal)
	if err != nil {
		t.Fatal(err)
	}
	// Behind its entries there may be room of zeros.
	if n, told := disk.length(journal); n < int64(len(bytes.TrimRight(text, "\x00"))) {
		t.Errorf("%d bytes of the journal are synced (told: %v), want its entries, %d with zeros", n, told, len(text))
	}
	if err := b.Fsync(id); err != nil {
		t.Fatal(err)
	}
	if _, ok := disk.length(b.store.Path(id)); !ok {
		t.Error("the content is not synced")
	}
}

// TestNotedButLost: a loss of power may leave the journal's word for a change and not the change. What was
// synced or uploaded before it is there.
func TestNotedButLost(t *testing.T) {
	r := simulatedremote.New()
	dir := t.TempDir()
	a := open(t, r, dir, "a", func(c *Config) { c.Boot = "1" })
	uploaded := put(t, a, "uploaded", noise(100_000, 1))
	gone := put(t, a, "gone", noise(90_000, 2))
	drain(t, a)
	r.Cut(true)
	synced := put(t, a, "synced", noise(80_000, 3))
	fresh := unsynced(t, a, "fresh", noise(70_000, 4))
	a.Release(fresh, true)
	// These are written to, and noted by Release, but nobody closed them: Flush is close.
	for _, id := range []uint64{uploaded, gone, synced} {
		if _, err := a.Open(ctx, id, true, false); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Write(ctx, id, 200_000, noise(50_000, 5)); err != nil {
			t.Fatal(err)
		}
		a.Release(id, true)
	}
	after := copyDir(t, dir, nil)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	in := func(id uint64) string {
		return filepath.Join(after, "data", fmt.Sprintf("%02x", byte(id)), fmt.Sprintf("%x", id))
	}
	for id, size := range map[uint64]int64{uploaded: 100_000, synced: 80_000} {
		if err := os.Truncate(in(id), size); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range []uint64{gone, fresh} {
		if err := os.Remove(in(id)); err != nil {
			t.Fatal(err)
		}
	}

	r.Cut(false)
	b := open(t, r, after, "a", func(c *Config) { c.Boot = "2" })
	check := func(b *Replica) {
		t.Helper()
		wantContent(t, b, "uploaded", noise(100_000, 1))
		wantContent(t, b, "gone", noise(90_000, 2))
		wantContent(t, b, "synced", noise(80_000, 3))
		wantContent(t, b, "fresh", nil)
	}
	check(b)
	drain(t, b)
	eventually(t, "the size is known again", func() bool {
		at, err := b.GetAttr(ctx, gone)
		return err == nil && at.Size == 90_000
	})
	check(b)
	check(open(t, r, t.TempDir(), "other"))
}

// TestEvictedAfterUpload: a content that was uploaded and made room is fetched again after a loss of power.
func TestEvictedAfterUpload(t *testing.T) {
	r := simulatedremote.New()
	var disk synced
	dir := t.TempDir()
	a := open(t, r, dir, "a", func(c *Config) { c.Boot, c.SyncedForTest = "1", disk.tell })
	id := put(t, a, "f", noise(100_000, 1))
	drain(t, a)
	a.mu.Lock()
	freed := a.evictLocked(1)
	a.mu.Unlock()
	if freed == 0 {
		t.Fatal("nothing was evicted")
	}
	if _, err := os.Stat(a.store.Path(id)); !os.IsNotExist(err) {
		t.Fatalf("the content is there: %v", err)
	}
	after := copyDir(t, dir, &disk)
	b := open(t, r, after, "a", func(c *Config) { c.Boot = "2" })
	wantContent(t, b, "f", noise(100_000, 1))
	drain(t, b)
	wantContent(t, b, "f", noise(100_000, 1))
}

// TestPowerLossAtFirst: a replica whose first life ended before anything was synced is opened again.
func TestPowerLossAtFirst(t *testing.T) {
	r := simulatedremote.New()
	var disk synced
	dir := t.TempDir()
	a := open(t, r, dir, "a", func(c *Config) { c.Boot, c.SyncedForTest = "1", disk.tell })
	after := copyDir(t, dir, &disk)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	b := open(t, r, after, "a", func(c *Config) { c.Boot = "2" })
	put(t, b, "f", noise(100, 1))
	wantContent(t, b, "f", noise(100, 1))
}
