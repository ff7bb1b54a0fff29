package pagestore

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"
)

// TestMemoryIsBounded puts and restores an image of 2 GiB, a quarter of it distinct
// and half of it a hole, and watches the heap.
func TestMemoryIsBounded(t *testing.T) {
	const size, most = 2 << 30, 150 << 20
	dir := t.TempDir()
	images := t.TempDir()
	f, err := os.Create(filepath.Join(images, "pages-1.img"))
	if err != nil {
		t.Fatal(err)
	}
	// Distinct pages compress well, so that the disk is not what is measured; the rest
	// repeats them, in another order.
	r := rand.New(rand.NewPCG(1, 1))
	buf := make([]byte, 1<<20)
	for off := 0; off < size; off += len(buf) {
		if off >= size/4 && off/len(buf)%3 != 0 {
			if _, err := f.Seek(int64(len(buf)), io.SeekCurrent); err != nil {
				t.Fatal(err)
			}
			continue
		}
		for i := 0; i < len(buf); i += ChunkSize {
			n := uint64(off + i)
			if n >= size/4 {
				n = r.Uint64N(size/4) / ChunkSize * ChunkSize
			}
			binary.LittleEndian.PutUint64(buf[i:], n+1)
		}
		if _, err := f.Write(buf); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, dir)
	watch := func(what string, do func()) {
		t.Helper()
		runtime.GC()
		done, peak := make(chan struct{}), make(chan uint64)
		go func() {
			var highest uint64
			tick := time.NewTicker(5 * time.Millisecond)
			defer tick.Stop()
			for {
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				highest = max(highest, m.HeapInuse)
				select {
				case <-done:
					peak <- highest
					return
				case <-tick.C:
				}
			}
		}()
		do()
		close(done)
		got := <-peak
		t.Logf("%s: %d MiB at most", what, got>>20)
		if got > most {
			t.Errorf("%s took %d MiB, the bound is %d", what, got>>20, most>>20)
		}
	}
	var c Checkpoint
	watch("put", func() { c, _ = mustPut(t, s, meta("k1"), images) })
	dst := t.TempDir()
	watch("restore", func() {
		if _, err := s.Restore(t.Context(), c.ID, map[string]string{"images": dst}); err != nil {
			t.Fatal(err)
		}
	})
	sameFile(t, filepath.Join(images, "pages-1.img"), filepath.Join(dst, "pages-1.img"))
	watch("verify", func() {
		if p, err := s.Verify(t.Context()); err != nil || len(p) > 0 {
			t.Error(p, err)
		}
	})
	watch("collect", func() { collectAll(t, s) })
}

func sameFile(t *testing.T, a, b string) {
	t.Helper()
	fa, err := os.Open(a)
	if err != nil {
		t.Fatal(err)
	}
	defer fa.Close() //nolint:errcheck // only read
	fb, err := os.Open(b)
	if err != nil {
		t.Fatal(err)
	}
	defer fb.Close() //nolint:errcheck // only read
	x, y := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); ; off += int64(len(x)) {
		n, errA := fa.ReadAt(x, off)
		m, errB := fb.ReadAt(y, off)
		if n != m || !bytes.Equal(x[:n], y[:m]) {
			t.Fatalf("different at %d", off)
		}
		if errA != nil || errB != nil {
			return
		}
	}
}

func TestIndexForgetsRatherThanGrows(t *testing.T) {
	s := openStore(t, t.TempDir(), func(o *Options) { o.IndexChunks = packChunks })
	var last ID
	var images string
	for seed := range uint64(6) {
		images = newSimulatedKernel(50+seed, 24).dump(t)
		c, _ := mustPut(t, s, meta("k1"), images)
		last = c.ID
	}
	o, err := s.organization("org_a", false)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(o.index.chunks); n > packChunks {
		t.Errorf("%d chunks in the index, the bound is %d", n, packChunks)
	}
	// A parent's chunks are found in any case.
	for _, parent := range []ID{last, last} {
		m := meta("k1")
		m.Parent = parent
		if _, st := mustPut(t, s, m, images); st.New > 2*ChunkSize {
			t.Errorf("%d new bytes of the parent's", st.New)
		}
	}
	if n := len(o.index.chunks); n > packChunks {
		t.Errorf("%d chunks in the index, the bound is %d", n, packChunks)
	}
}
