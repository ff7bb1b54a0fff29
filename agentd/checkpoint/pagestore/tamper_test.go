package pagestore

import (
	"cmp"
	"errors"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/postern-dev/postern/proto"
)

// smallStore is a closed store with two checkpoints of one kernel, the second of
// which uses the packs of both, raw and compressed segments among them.
func smallStore(t *testing.T) (dir string, images string, id ID) {
	t.Helper()
	dir = t.TempDir()
	s := openStore(t, dir)
	k := newSimulatedKernel(8, 1)
	mustPut(t, s, meta("k1"), k.dump(t))
	k.run(10, 10)
	images = k.dump(t)
	c, _ := mustPut(t, s, meta("k1"), images)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return dir, images, c.ID
}

// refused opens the store and says whether Restore or Verify of everything finds the
// damage; what is restored must be right.
func refused(t *testing.T, dir string, id ID, images string) bool {
	t.Helper()
	s, err := Open(Options{Dir: dir, Key: testKey, Logger: quiet(), files: unsynced{}})
	if err != nil {
		return true
	}
	defer s.Close() //nolint:errcheck // only read
	found := false
	list, damagedIDs := s.List("org_a", "")
	if len(damagedIDs) > 0 {
		found = true
	}
	if len(list)+len(damagedIDs) < 2 {
		found = true // a checkpoint that is gone is seen by whoever asks for it
	}
	dst := t.TempDir()
	_, err = s.Restore(t.Context(), id, map[string]string{"images": dst})
	if err == nil {
		sameTree(t, images, dst)
	} else {
		emptyDir(t, dst)
		if !strings.Contains(err.Error(), string(id)) || strings.Contains(err.Error(), "\n") {
			t.Errorf("the error does not name the checkpoint in one line: %v", err)
		}
		if proto.CodeOf(err) != proto.CodeNotFound && !errors.Is(err, ErrDamaged) {
			t.Errorf("not ErrDamaged: %v", err)
		}
		found = true
	}
	if found {
		return true
	}
	problems, err := s.Verify(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return found || len(problems) > 0
}

func TestUntouchedStoreIsSound(t *testing.T) {
	dir, images, id := smallStore(t)
	if refused(t, dir, id, images) {
		t.Error("found damage where there is none")
	}
}

func TestFlippedBitAnywhereIsFound(t *testing.T) {
	for i := range 6 { // two packs, two lists of files, two descriptions
		dir, images, id := smallStore(t)
		files := storeFiles(t, dir)
		if len(files) != 6 {
			t.Fatalf("the store has the files %v", files)
		}
		path := slices.SortedFunc(maps.Keys(files), func(a, b string) int {
			return cmp.Or(cmp.Compare(filepath.Ext(a), filepath.Ext(b)), cmp.Compare(a, b))
		})[i]
		name, size := filepath.Base(path), files[path]
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		// Both ends byte by byte (header, table, hashes' end, trailer), the rest in steps.
		var offsets []int
		step := max(1, int(size)/16)
		for off := 0; off < int(size); off++ {
			if off < 44 || off >= int(size)-32 || off%step == 0 {
				offsets = append(offsets, off)
			}
		}
		for _, off := range offsets {
			bad := append([]byte(nil), whole...)
			bad[off] ^= 1 << rand.IntN(8)
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			if !refused(t, dir, id, images) {
				t.Errorf("%s: a flipped bit in byte %d of %d went unnoticed", name, off, size)
			}
		}
		for _, n := range []int{0, 1, 20, 47, 48, int(size) / 2, int(size) - 1} {
			if err := os.WriteFile(path, whole[:min(n, int(size)-1)], 0o600); err != nil {
				t.Fatal(err)
			}
			if !refused(t, dir, id, images) {
				t.Errorf("%s: cut to %d of %d bytes went unnoticed", name, n, size)
			}
		}
		if err := os.WriteFile(path, append(append([]byte(nil), whole...), 0), 0o600); err != nil {
			t.Fatal(err)
		}
		if !refused(t, dir, id, images) {
			t.Errorf("%s: a byte more went unnoticed", name)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if !refused(t, dir, id, images) {
			t.Errorf("%s: its removal went unnoticed", name)
		}
	}
}

func TestExchangedFilesAreFound(t *testing.T) {
	for _, suffix := range []string{packSuffix, metaSuffix, fileSuffix} {
		dir, images, id := smallStore(t)
		var two []string
		for path := range storeFiles(t, dir) {
			if strings.HasSuffix(path, suffix) {
				two = append(two, path)
			}
		}
		if len(two) != 2 {
			t.Fatalf("%d files *%s, want 2", len(two), suffix)
		}
		for _, move := range [][2]string{{two[0], two[0] + "x"}, {two[1], two[0]}, {two[0] + "x", two[1]}} {
			if err := os.Rename(move[0], move[1]); err != nil {
				t.Fatal(err)
			}
		}
		if !refused(t, dir, id, images) {
			t.Errorf("two %s files exchanged went unnoticed", suffix)
		}
	}
}

func TestVerifyNamesCheckpointAndChunks(t *testing.T) {
	dir, _, _ := smallStore(t)
	var flipped string
	for path, size := range storeFiles(t, dir) {
		if strings.HasSuffix(path, packSuffix) && size > 100<<10 {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			b[size/2] ^= 1
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			flipped = strings.TrimSuffix(filepath.Base(path), packSuffix)
			break
		}
	}
	s := openStore(t, dir)
	problems, err := s.Verify(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(problems) == 0 {
		t.Fatal("nothing found")
	}
	for _, p := range problems {
		if p.Checkpoint == "" || !strings.Contains(p.Err.Error(), flipped) || !strings.Contains(p.Err.Error(), "segment") {
			t.Errorf("%+v", p)
		}
	}
	// Nothing new may lean on what is damaged: the same images are stored again.
	k := newSimulatedKernel(8, 1)
	images := k.dump(t)
	c, st := mustPut(t, s, meta("k2"), images)
	if st.New == 0 {
		t.Error("Put leaned on a damaged pack")
	}
	mustRestore(t, s, c.ID, images)
}
