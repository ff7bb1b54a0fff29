package pagestore

import (
	"bufio"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// counted counts what was sent.
type countedWriter struct {
	w io.Writer
	n int64
}

func (c *countedWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// carry moves a checkpoint between two stores, which speak with each other.
func carry(t *testing.T, here, there *Store, c Checkpoint) (bytes int64, st PutStats) {
	t.Helper()
	key, err := there.HashKey(c.Organization)
	if err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	answers := make(chan []byte, 1)
	sent := make(chan error, 1)
	counter := &countedWriter{w: w}
	go func() {
		b := bufio.NewWriter(counter)
		err := here.Export(t.Context(), c.ID, b, &Known{Key: key, Ask: func() ([]byte, error) {
			if err := b.Flush(); err != nil {
				return nil, err
			}
			select {
			case a := <-answers:
				return a, nil
			case <-time.After(time.Minute):
				return nil, errors.New("no answer")
			}
		}})
		err = errors.Join(err, b.Flush())
		w.CloseWithError(err) //nolint:errcheck // it never fails
		sent <- err
	}()
	_, st, err = there.Import(t.Context(), r, acceptAll, func(a []byte) error { answers <- a; return nil })
	if err = errors.Join(err, <-sent); err != nil {
		t.Fatal(err)
	}
	return counter.n, st
}

// TestWhatIsKnownIsNotSent moves a kernel's checkpoints one after the other: each after the
// first costs what changed.
func TestWhatIsKnownIsNotSent(t *testing.T) {
	here, there := openStore(t, t.TempDir()), openStore(t, t.TempDir(), func(o *Options) { o.Key = Key{42} })
	k := newSimulatedKernel(51, 12)
	var first int64
	for n := range 4 {
		images := k.dump(t)
		c, _ := mustPut(t, here, meta("k1"), images)
		bytes, st := carry(t, here, there, c)
		t.Logf("checkpoint %d: %d bytes sent of %d, %d known", n, bytes, c.Size, st.Known)
		if n == 0 {
			first = bytes
		} else if bytes > first/4 {
			t.Errorf("checkpoint %d took %d bytes, the first %d", n, bytes, first)
		}
		mustRestore(t, there, c.ID, images)
		k.run(20, 10)
	}
	if p, err := there.Verify(t.Context()); err != nil || len(p) > 0 {
		t.Errorf("verify: %v %v", p, err)
	}
}

// TestKnownChunksOfRandomTrees: holes, small files and known pages in any order.
func TestKnownChunksOfRandomTrees(t *testing.T) {
	here, there := openStore(t, t.TempDir()), openStore(t, t.TempDir(), func(o *Options) { o.Key = Key{42} })
	rng := rand.New(rand.NewPCG(7, 7))
	pages := make([][]byte, 300)
	for i := range pages {
		pages[i] = make([]byte, ChunkSize)
		if i%10 != 0 {
			for j := range pages[i] {
				pages[i][j] = byte(rng.Uint32())
			}
		}
	}
	for n := range 6 {
		dir := filepath.Join(t.TempDir(), "tree")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for f := range 4 {
			var content []byte
			for range rng.IntN(2000) {
				content = append(content, pages[rng.IntN(len(pages))]...)
			}
			content = append(content, make([]byte, rng.IntN(5000))...)
			if err := os.WriteFile(filepath.Join(dir, string(rune('a'+f))), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		c, _ := mustPut(t, here, meta("k1"), dir)
		if _, st := carry(t, here, there, c); n > 2 && st.New > 0 {
			t.Errorf("%d new bytes of pages that were all there", st.New)
		}
		mustRestore(t, there, c.ID, dir)
		if n == 3 { // nothing that a question found goes away, and all the rest does
			if err := there.Delete(c.ID); err != nil {
				t.Fatal(err)
			}
			for done := false; !done; {
				s, err := there.Collect(t.Context(), 1<<30)
				if err != nil {
					t.Fatal(err)
				}
				done = s.Done
			}
		}
	}
	if p, err := there.Verify(t.Context()); err != nil || len(p) > 0 {
		t.Errorf("verify: %v %v", p, err)
	}
}
