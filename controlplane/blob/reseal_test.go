package blob_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
)

// rotated replaces the organization's key, and seals anew until nothing is left.
func (k *bench) rotated() {
	k.t.Helper()
	if err := k.keys.Rotate(ctx, k.org); err != nil {
		k.t.Fatal(err)
	}
	k.resealed()
}

func (k *bench) resealed() {
	k.t.Helper()
	for range 10_000 {
		n, err := k.Reseal(ctx, k.org)
		if err != nil {
			k.t.Fatal(err)
		}
		if n == 0 {
			return
		}
	}
	k.t.Fatal("sealing anew does not end")
}

func (k *bench) fileKeys() []store.FileKey {
	k.t.Helper()
	all, err := k.index.FileKeys(ctx, k.org)
	if err != nil {
		k.t.Fatal(err)
	}
	return all
}

func (k *bench) drop(generation int64, force bool) bool {
	k.t.Helper()
	done, err := k.index.DropFileKey(ctx, k.org, generation, force)
	if err != nil {
		k.t.Fatal(err)
	}
	return done
}

// TestReseal: after a rotation all is sealed with the new key, under new names, while the old key opens nothing of it;
// the old objects are gone with the next collection.
func TestReseal(t *testing.T) {
	storetest.Each(t, func(t *testing.T, index *store.Store) {
		k := open(t, index, "", time.Hour)
		var chunks [][]byte
		for i := range 150 { // more than two steps
			chunks = append(chunks, chunk(100+i))
		}
		hashes := k.put(k.a, chunks...)
		k.put(k.b, chunks[:3]...)
		before := k.files()
		_, old, err := k.keys.Newest(ctx, k.org)
		if err != nil {
			t.Fatal(err)
		}
		if k.drop(1, true) {
			t.Error("the only key was dropped")
		}
		k.rotated()
		if err := k.keys.Rotate(ctx, k.org); proto.CodeOf(err) != proto.CodeAlreadyExists {
			t.Errorf("a second rotation meanwhile: got %v", err)
		}
		if all := k.fileKeys(); len(all) != 2 || all[0].Generation != 2 || all[0].Objects != 150 || all[1].Objects != 0 {
			t.Fatalf("got %+v", all)
		}
		if !k.drop(1, false) || len(k.fileKeys()) != 1 || k.drop(2, true) {
			t.Errorf("the keys are %+v", k.fileKeys())
		}
		if _, err := k.Collect(ctx); err != nil {
			t.Fatal(err)
		}
		after := k.files()
		if len(after) != 150 {
			t.Fatalf("%d objects, want 150", len(after))
		}
		for _, path := range before {
			if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is still there: %v", path, err)
			}
		}
		names := map[string]bool{}
		for _, path := range before {
			names[strings.SplitN(filepath.Base(path), ".", 2)[0]] = true
		}
		for _, path := range after {
			if names[strings.SplitN(filepath.Base(path), ".", 2)[0]] {
				t.Errorf("%s has its name by the old key", path)
			}
			sealed, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for _, hash := range hashes {
				if _, err := old.Open(sealed, "chunk "+hexOf(hash)); err == nil {
					t.Fatalf("the old key opens %s", path)
				}
			}
		}
		k.keys.Forget(k.org)
		got, err := k.Get(ctx, k.org, k.a, hashes)
		if err != nil {
			t.Fatal(err)
		}
		for i := range got {
			if !bytes.Equal(got[i], chunks[i]) {
				t.Fatalf("chunk %d is another one", i)
			}
		}
		if again := k.put(k.b, chunks...); len(k.files()) != 150 || again[0] != hashes[0] {
			t.Errorf("%d objects after the same contents: they are not found again", len(k.files()))
		}
	})
}

// TestResealUnderLoad: readers and writers go on while the key is replaced three times, and objects are collected at once.
func TestResealUnderLoad(t *testing.T) {
	storetest.Each(t, func(t *testing.T, index *store.Store) {
		k := open(t, index, "", time.Hour)
		var chunks [][]byte
		for range 40 {
			chunks = append(chunks, chunk(500))
		}
		hashes := k.put(k.a, chunks...)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		work := func(f func() error) {
			wg.Go(func() {
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
			})
		}
		for range 2 {
			work(func() error {
				got, err := k.Get(ctx, k.org, k.a, hashes)
				for i := range got {
					if err == nil && !bytes.Equal(got[i], chunks[i]) {
						err = errors.New("a chunk is another one")
					}
				}
				return err
			})
		}
		var mu sync.Mutex
		written := map[filetree.Hash][]byte{}
		work(func() error {
			one := chunk(300)
			got, err := k.Put(ctx, k.org, k.b, [][]byte{one})
			if err == nil {
				mu.Lock()
				written[got[0]] = one
				mu.Unlock()
			}
			return err
		})
		work(func() error { _, err := k.Collect(ctx); return err })
		for generation := range int64(3) {
			k.rotated()
			for !k.drop(generation+1, false) { // what was written with it meanwhile
				k.resealed()
			}
		}
		close(stop)
		wg.Wait()
		k.keys.Forget(k.org)
		if all := k.fileKeys(); len(all) != 1 || all[0].Generation != 4 || all[0].Damaged != 0 || all[0].Objects != uint64(40+len(written)) {
			t.Errorf("%+v, want %d objects", all, 40+len(written))
		}
		for hash, want := range written {
			got, err := k.Get(ctx, k.org, k.b, []filetree.Hash{hash})
			if err != nil || !bytes.Equal(got[0], want) {
				t.Fatalf("chunk %x: %v", hash[:4], err)
			}
		}
	})
}

// TestResealDamaged: a damaged object keeps its key, until it is mended or given up.
func TestResealDamaged(t *testing.T) {
	for name, force := range map[string]bool{"mended": false, "given up": true} {
		t.Run(name, func(t *testing.T) {
			k := open(t, storetest.SQLite(t), "", time.Hour)
			lost := chunk(1000)
			hashes := k.put(k.a, lost)
			if err := os.Remove(k.files()[0]); err != nil {
				t.Fatal(err)
			}
			whole := k.put(k.a, chunk(1000))
			k.rotated()
			if all := k.fileKeys(); all[1].Objects != 1 || all[1].Damaged != 1 || all[0].Objects != 1 {
				t.Fatalf("got %+v", all)
			}
			if k.drop(1, false) {
				t.Fatal("the key of a damaged object was dropped")
			}
			if force {
				if !k.drop(1, true) {
					t.Fatal("not dropped by force")
				}
				k.keys.Forget(k.org)
				_, err := k.Get(ctx, k.org, k.a, hashes)
				wantCode(t, err, proto.CodeInternal)
			}
			k.put(k.a, lost)
			if !force && !k.drop(1, false) {
				t.Error("the key was not dropped after the object was mended")
			}
			for _, hash := range append(hashes, whole...) {
				if _, err := k.Get(ctx, k.org, k.a, []filetree.Hash{hash}); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestResealOfOthersContent: what is under a chunk's name, sealed as if it were it, and is not, is not sealed anew.
func TestResealOfOthersContent(t *testing.T) {
	k := open(t, storetest.SQLite(t), "", time.Hour)
	hash := k.put(k.a, chunk(1000))
	_, key, err := k.keys.Newest(ctx, k.org)
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := key.Seal(bytes.Repeat([]byte("x"), 1000), "chunk "+hex.EncodeToString(hash[0][:]))
	if err == nil {
		err = os.WriteFile(k.files()[0], sealed, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	k.rotated()
	if all := k.fileKeys(); all[1].Objects != 1 || all[1].Damaged != 1 || all[0].Objects != 0 {
		t.Errorf("got %+v", all)
	}
}

// TestResealCut: whatever fails in the midst of it loses nothing, and is gone on with.
func TestResealCut(t *testing.T) {
	k := open(t, storetest.SQLite(t), "", time.Nanosecond)
	chunks := [][]byte{chunk(100), chunk(200), chunk(300)}
	hashes := k.put(k.a, chunks...)
	if err := k.keys.Rotate(ctx, k.org); err != nil {
		t.Fatal(err)
	}
	// As if it were killed after the new objects were written: others hold what they were uploaded as.
	stale, err := k.index.StaleObjects(ctx, k.org, 2, 100)
	if err != nil || len(stale) != 3 {
		t.Fatalf("%d are stale, %v", len(stale), err)
	}
	uploaded := make([]filetree.Object, len(stale))
	var keys []string
	for i, o := range stale {
		o.Key, o.Generation = o.Key+"0", 2
		uploaded[i], keys = o, append(keys, o.Key)
	}
	if err := k.index.BeginUploads(ctx, keys, time.Now().Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	if _, err := k.index.CollectChunks(ctx, time.Now().Add(-time.Minute), time.Now(), 100); err != nil {
		t.Fatal(err)
	}
	// Too late: the collection took them for left behind.
	if err := k.index.ReplaceObjects(ctx, k.org, stale, uploaded, time.Now(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if all := k.fileKeys(); all[1].Objects != 3 {
		t.Fatalf("objects that are being removed took others' places: %+v", all)
	}
	// Noted, but somebody else has replaced the object meanwhile.
	if err := k.index.BeginUploads(ctx, []string{"v1/x"}, time.Now()); err != nil {
		t.Fatal(err)
	}
	gone := stale[0]
	gone.Key = "v1/another"
	if err := k.index.ReplaceObjects(ctx, k.org, []filetree.Object{gone}, []filetree.Object{{Hash: gone.Hash, Key: "v1/x", Generation: 2}}, time.Now(), time.Now()); err != nil {
		t.Fatal(err)
	}
	k.resealed()
	if !k.drop(1, false) {
		t.Error("the old key is still needed")
	}
	garbage, err := k.index.Garbage(ctx, time.Now(), 100)
	if err != nil || len(garbage) != 7 {
		t.Errorf("%d are garbage, want 3 old ones and 4 that came to nothing: %v, %v", len(garbage), garbage, err)
	}
	got, err := k.Get(ctx, k.org, k.a, hashes)
	if err != nil || !bytes.Equal(got[2], chunks[2]) {
		t.Fatal(err)
	}
	// A key that is gone seals nothing any more.
	if err := k.index.BeginUploads(ctx, []string{"v1/late"}, time.Now()); err != nil {
		t.Fatal(err)
	}
	err = k.index.EndUploads(ctx, k.org, k.a, []filetree.Object{{Hash: gone.Hash, Key: "v1/late", Size: 1, Generation: 1}}, time.Now())
	if !errors.Is(err, filetree.ErrKeyReplaced) || proto.CodeOf(err) != proto.CodeUnavailable {
		t.Errorf("an object of a key that is gone: got %v", err)
	}
}

func hexOf(hash filetree.Hash) string { return hex.EncodeToString(hash[:]) }

// TestReplacedIsKept: what was sealed anew stays for as long as copies of the database and of the objects belong together.
func TestReplacedIsKept(t *testing.T) {
	k := open(t, storetest.SQLite(t), "", time.Hour)
	k.put(k.a, chunk(100))
	if err := k.keys.Rotate(ctx, k.org); err != nil {
		t.Fatal(err)
	}
	stale, err := k.index.StaleObjects(ctx, k.org, 2, 100)
	if err != nil || len(stale) != 1 {
		t.Fatalf("%d are stale, %v", len(stale), err)
	}
	if err := k.index.BeginUploads(ctx, []string{"v1/new"}, time.Now()); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	if err := k.index.ReplaceObjects(ctx, k.org, stale, []filetree.Object{{Hash: stale[0].Hash, Key: "v1/new", Generation: 2}}, now, now.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if n, err := k.Collect(ctx); err != nil || n != 0 || len(k.files()) != 1 {
		t.Errorf("%d objects removed, %d left, %v", n, len(k.files()), err)
	}
	if keys, err := k.index.Garbage(ctx, now.Add(2*time.Hour), 100); err != nil || len(keys) != 1 || keys[0] != stale[0].Key {
		t.Errorf("later: %v, %v", keys, err)
	}
}
