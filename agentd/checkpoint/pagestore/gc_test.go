package pagestore

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/postern-dev/postern/proto"
)

func TestCollectFreesWhatNothingRefersTo(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	k := newSimulatedKernel(11, 16)
	type stored struct {
		id     ID
		images string
	}
	var all []stored
	for cell := range 6 {
		if cell > 0 {
			k.run(200, 100)
		}
		images := k.dump(t)
		c, _ := mustPut(t, s, meta("k1"), images)
		all = append(all, stored{c.ID, images})
	}
	if st := collectAll(t, s); st.Freed != 0 {
		t.Errorf("freed %d bytes of what is needed", st.Freed)
	}
	// Everything but the newest goes: what the others alone needed is freed, by
	// deleting packs and by writing others again.
	other, _ := mustPut(t, s, meta("k2"), newSimulatedKernel(12, 4).dump(t))
	for _, c := range all[:5] {
		if err := s.Delete(c.id); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Delete(other.ID); err != nil {
		t.Fatal(err)
	}
	before := s.Used()
	st := collectAll(t, s)
	if st.Deleted == 0 || st.Freed <= 0 || s.Used() != before-st.Freed {
		t.Errorf("%+v, used %d then %d", st, before, s.Used())
	}
	mustRestore(t, s, all[5].id, all[5].images)
	var disk int64
	for _, n := range storeFiles(t, dir) {
		disk += n
	}
	if disk != s.Used() {
		t.Errorf("on disk %d, Used says %d", disk, s.Used())
	}
	s.Close() //nolint:errcheck // only to reopen
	s = openStore(t, dir)
	mustRestore(t, s, all[5].id, all[5].images)
	if p, err := s.Verify(t.Context()); err != nil || len(p) > 0 {
		t.Errorf("verify: %v, %v", p, err)
	}
	if err := s.Delete(all[5].id); err != nil {
		t.Fatal(err)
	}
	collectAll(t, s)
	if left := storeFiles(t, dir); len(left) != 0 || s.Used() != 0 {
		t.Errorf("left of nothing: %v, used %d", left, s.Used())
	}
}

func TestRewrittenPackKeepsItsNumbers(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	// The second checkpoint shares every eighth chunk with the first.
	r := rand.New(rand.NewPCG(1, 2))
	big := make([]byte, 8<<20)
	for i := range big {
		big[i] = byte(r.Uint32())
	}
	first, second := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(first, "f"), big, 0o600); err != nil {
		t.Fatal(err)
	}
	var part []byte
	for off := 0; off < len(big); off += 8 * ChunkSize {
		part = append(part, big[off:off+ChunkSize]...)
	}
	if err := os.WriteFile(filepath.Join(second, "f"), part, 0o600); err != nil {
		t.Fatal(err)
	}
	a, _ := mustPut(t, s, meta("k1"), first)
	b, st := mustPut(t, s, meta("k1"), second)
	if st.New != 0 {
		t.Fatalf("%d new bytes", st.New)
	}
	if err := s.Delete(a.ID); err != nil {
		t.Fatal(err)
	}
	gc := collectAll(t, s)
	if gc.Rewritten != 1 || gc.Freed < 6<<20 {
		t.Errorf("%+v", gc)
	}
	mustRestore(t, s, b.ID, second)
	if p, err := s.Verify(t.Context()); err != nil || len(p) > 0 {
		t.Errorf("verify: %v, %v", p, err)
	}
	// What was dropped must be stored again, what stayed must be found: by this
	// process and by the next.
	for _, want := range []int64{int64(len(big) - len(part)), 0} {
		c, st := mustPut(t, s, meta("k1"), first)
		if st.New != want {
			t.Errorf("%d new bytes, want %d", st.New, want)
		}
		mustRestore(t, s, c.ID, first)
		s.Close() //nolint:errcheck // only to reopen
		s = openStore(t, dir)
	}
}

// TestCollectRacesWithEverything runs Put, Restore, Delete, Verify and Collect at
// once; every checkpoint that was acknowledged and not deleted must come back.
func TestCollectRacesWithEverything(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, func(o *Options) { o.IndexChunks = packChunks * 2 })
	var mu sync.Mutex
	kept := map[ID]string{}
	// A few contents that overlap, so that chunks die and are needed again all the time.
	var contents []string
	for i := range 6 {
		k := newSimulatedKernel(uint64(20+i%3), 2)
		k.run(100*i, 10*i)
		contents = append(contents, k.dump(t))
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	background := func(f func() error) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := f(); err != nil {
					t.Error(err)
					return
				}
			}
		}()
	}
	background(func() error { _, err := s.Collect(context.Background(), 4<<20); return err })
	background(func() error {
		p, err := s.Verify(context.Background())
		if err == nil && len(p) > 0 {
			err = p[0].Err
		}
		return err
	})
	var workers sync.WaitGroup
	for w := range 3 {
		workers.Add(1)
		go func() {
			defer workers.Done()
			r := rand.New(rand.NewPCG(uint64(w), 3))
			for i := range 25 {
				src := contents[r.IntN(len(contents))]
				c, _, err := s.Put(context.Background(), meta(fmt.Sprintf("k%d", w)), []Tree{{"images", src}})
				if err != nil {
					t.Error(err)
					return
				}
				dst := t.TempDir()
				if _, err := s.Restore(context.Background(), c.ID, map[string]string{"images": dst}); err != nil {
					t.Error(err)
					return
				}
				if r.IntN(4) == 0 {
					mu.Lock()
					kept[c.ID] = src
					mu.Unlock()
				} else if err := s.Delete(c.ID); err != nil && proto.CodeOf(err) != proto.CodeUnavailable {
					t.Error(err)
				}
				_ = i
				os.RemoveAll(dst) //nolint:errcheck // room
			}
		}()
	}
	workers.Wait()
	close(stop)
	wg.Wait()
	collectAll(t, s)
	if len(kept) == 0 {
		t.Fatal("nothing was kept")
	}
	for id, src := range kept {
		mustRestore(t, s, id, src)
	}
	for path := range storeFiles(t, dir) {
		if strings.Contains(path, tmpPrefix) {
			t.Errorf("left behind: %s", path)
		}
	}
}

func TestBeingReadIsNotDeleted(t *testing.T) {
	s := openStore(t, t.TempDir())
	c, _ := mustPut(t, s, meta("k1"), tinyTree(t, "x"))
	_, _, done, err := s.read(c.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(c.ID); proto.CodeOf(err) != proto.CodeUnavailable {
		t.Errorf("got %v", err)
	}
	done()
	if err := s.Delete(c.ID); err != nil {
		t.Error(err)
	}
}
