package masterkey_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/controlplane/masterkey"
)

func create(t *testing.T) (*masterkey.Keys, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "master.key")
	keys, err := masterkey.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	return keys, path
}

func seal(t *testing.T, keys *masterkey.Keys, text string) []byte {
	t.Helper()
	sealed, err := keys.Box("p").Seal([]byte(text), "x")
	if err != nil {
		t.Fatal(err)
	}
	return sealed
}

func wantOpen(t *testing.T, keys *masterkey.Keys, sealed []byte, want string) {
	t.Helper()
	if got, err := keys.Box("p").Open(sealed, "x"); err != nil || string(got) != want {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
}

// TestRotate: the new key seals, both open, and after the old one is dropped what it sealed does not open.
func TestRotate(t *testing.T) {
	keys, path := create(t)
	before, err := os.ReadFile(path)
	if err != nil || len(before) != masterkey.Size {
		t.Fatalf("the first file: %d bytes, %v", len(before), err)
	}
	old := seal(t, keys, "old")
	if masterkey.KeyOf(old) != masterkey.FirstID {
		t.Errorf("the first key's id is %q", masterkey.KeyOf(old))
	}
	id, err := keys.New()
	if err != nil {
		t.Fatal(err)
	}
	if sealed := seal(t, keys, "x"); masterkey.KeyOf(sealed) != masterkey.FirstID {
		t.Error("the new key seals before it was said to")
	}
	keys.Use(id, masterkey.FirstID)
	fresh := seal(t, keys, "fresh")
	if masterkey.KeyOf(fresh) != id {
		t.Errorf("sealed by %s, want %s", masterkey.KeyOf(fresh), id)
	}
	again, err := masterkey.Open(path)
	if err != nil || !slices.Equal(again.IDs(), []string{masterkey.FirstID, id}) {
		t.Fatalf("the ring on disk: %v, %v", again.IDs(), err)
	}
	wantOpen(t, again, old, "old")
	wantOpen(t, again, fresh, "fresh")
	resealed, err := keys.Box("p").Reseal(old, "x")
	if err != nil || masterkey.KeyOf(resealed) != id {
		t.Fatalf("sealed anew by %s, %v", masterkey.KeyOf(resealed), err)
	}
	// Who has the old key alone opens neither.
	stale := filepath.Join(t.TempDir(), "master.key")
	if err := os.WriteFile(stale, before, 0o600); err != nil {
		t.Fatal(err)
	}
	thief, err := masterkey.Open(stale)
	if err != nil {
		t.Fatal(err)
	}
	var lacks *masterkey.NoKeyError
	for _, sealed := range [][]byte{fresh, resealed} {
		if _, err := thief.Box("p").Open(sealed, "x"); !errors.As(err, &lacks) || lacks.ID != id {
			t.Errorf("with the old key: got %v", err)
		}
	}
	if err := keys.Drop(id); err == nil {
		t.Error("the key that seals was dropped")
	}
	if err := keys.Drop(masterkey.FirstID); err != nil {
		t.Fatal(err)
	}
	if _, err := keys.Box("p").Open(old, "x"); !errors.As(err, &lacks) || lacks.ID != masterkey.FirstID {
		t.Errorf("what the dropped key sealed: got %v", err)
	}
	wantOpen(t, keys, resealed, "old")
	content, err := os.ReadFile(path)
	if err != nil || bytes.Contains(content, before) || strings.Contains(string(content), `"1"`) {
		t.Errorf("the dropped key is in the file, or %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(path), "*")); err != nil || len(left) != 1 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	for _, one := range []any{keys.Box("p"), masterkey.NewDataKey(), masterkey.NewRing()} {
		text, err := json.Marshal(one)
		if got := fmt.Sprintf("%v %+v %#v %s", one, one, one, text); err != nil || got != `redacted redacted redacted "redacted"` {
			t.Errorf("%T prints as %s, %v", one, got, err)
		}
	}
}

// TestSealedAltered: what was altered, moved or cut does not open, and never panics.
func TestSealedAltered(t *testing.T) {
	keys, _ := create(t)
	id, err := keys.New()
	if err != nil {
		t.Fatal(err)
	}
	for _, active := range []string{masterkey.FirstID, id} {
		keys.Use(active, active)
		sealed := seal(t, keys, "text")
		for i := range sealed {
			other := bytes.Clone(sealed)
			other[i] ^= 1
			if _, err := keys.Box("p").Open(other, "x"); err == nil {
				t.Errorf("key %s: byte %d altered, opened", active, i)
			}
			if _, err := keys.Box("p").Open(sealed[:i], "x"); err == nil {
				t.Errorf("key %s: cut to %d bytes, opened", active, i)
			}
		}
		if _, err := keys.Box("p").Open(sealed, "y"); err == nil {
			t.Error("opened about another thing")
		}
		if _, err := keys.Box("q").Open(sealed, "x"); err == nil {
			t.Error("opened for another purpose")
		}
	}
}

// leftBehind makes files beside a ring's: one that a process left behind which was killed, and one of somebody
// else's. swept fails the test unless the first alone is gone.
func leftBehind(t *testing.T, path string) (leave func(), swept func(by string)) {
	t.Helper()
	leave = func() {
		t.Helper()
		for _, name := range []string{".master.key.12345", ".master.key.mine"} {
			if err := os.WriteFile(filepath.Join(filepath.Dir(path), name), []byte("left"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return leave, func(by string) {
		t.Helper()
		if left, err := filepath.Glob(filepath.Join(filepath.Dir(path), ".master.key.*")); err != nil || len(left) != 1 || filepath.Ext(left[0]) != ".mine" {
			t.Errorf("left behind by %s: %v, %v", by, left, err)
		}
	}
}

// TestSweep: what a process left behind that was killed while it made or changed the file is taken away by the
// next that makes it, and by Sweep, unless somebody writes the file just now.
func TestSweep(t *testing.T) {
	path := filepath.Join(t.TempDir(), "master.key")
	leave, swept := leftBehind(t, path)
	leave()
	if _, err := masterkey.Create(path); err != nil {
		t.Fatal(err)
	}
	swept("Create")
	leave()
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	masterkey.Sweep(path)
	if _, err := os.Stat(filepath.Join(filepath.Dir(path), ".master.key.12345")); err != nil {
		t.Errorf("somebody wrote it just then: %v", err)
	}
	if err := dir.Close(); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "linked.key")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	masterkey.Sweep(link)
	swept("Sweep")
	if _, err := masterkey.Open(path); err != nil {
		t.Error(err)
	}
}

// TestRefresh: a key that comes into the file is found, one that leaves it while it is needed comes back, and a
// file that is bad changes nothing.
func TestRefresh(t *testing.T) {
	keys, path := create(t)
	first, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	leave, swept := leftBehind(t, path)
	leave()
	id, err := masterkey.AddTo(path)
	if err != nil {
		t.Fatal(err)
	}
	swept("a change")
	if err := keys.Refresh(); err != nil || !keys.Has(id) {
		t.Fatalf("a key in the file is not found: %v, %v", keys.IDs(), err)
	}
	replace := func(content []byte) {
		t.Helper()
		if err := os.WriteFile(path+".new", content, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	replace(first)
	if err := keys.Refresh(); err != nil || !keys.Has(id) {
		t.Fatalf("an old copy of the file took a key: %v, %v", keys.IDs(), err)
	}
	if again, err := masterkey.Open(path); err != nil || !again.Has(id) {
		t.Fatalf("the key is not in the file again: %v", err)
	}
	for name, content := range map[string][]byte{"short": first[:5], "empty": nil, "another installation": bytes.Repeat([]byte{7}, masterkey.Size), "not JSON": bytes.Repeat([]byte("x"), 200)} {
		replace(content)
		if err := keys.Refresh(); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: got %v", name, err)
		}
		if !slices.Equal(keys.IDs(), []string{masterkey.FirstID, id}) {
			t.Errorf("%s: the keys are %v", name, keys.IDs())
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := keys.Refresh(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: got %v", err)
	}
	// A dropped key that somebody puts back stays dropped.
	replace(first)
	if err := keys.Refresh(); err != nil {
		t.Fatal(err)
	}
	keys.Use(id, id)
	if err := keys.Drop(masterkey.FirstID); err != nil {
		t.Fatal(err)
	}
	replace(first)
	if err := keys.Refresh(); err != nil || keys.Has(masterkey.FirstID) || !keys.Has(id) {
		t.Errorf("after an old copy came back: %v, %v", keys.IDs(), err)
	}
}

// TestGiven: a key goes from one control plane to another, and no other one in its place.
func TestGiven(t *testing.T) {
	a, path := create(t)
	first, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := filepath.Join(t.TempDir(), "master.key")
	if err := os.WriteFile(elsewhere, first, 0o640); err != nil {
		t.Fatal(err)
	}
	b, err := masterkey.Open(elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	id, err := a.New()
	if err != nil {
		t.Fatal(err)
	}
	if a.Give(masterkey.FirstID) != nil || a.Give("unknown") != nil {
		t.Error("the first key, or one that is not there, was given")
	}
	key := a.Give(id)
	for name, bad := range map[string][]byte{"another": bytes.Repeat([]byte{1}, masterkey.Size), "short": key[:31], "none": nil} {
		if err := b.Add(id, bad); err == nil {
			t.Errorf("%s: taken for the key %s", name, id)
		}
	}
	for range 2 {
		if err := b.Add(id, key); err != nil {
			t.Fatal(err)
		}
	}
	a.Use(id, id)
	sealed := seal(t, a, "across")
	if again, err := masterkey.Open(elsewhere); err != nil {
		t.Error(err)
	} else {
		wantOpen(t, again, sealed, "across")
	}
	if info, err := os.Stat(elsewhere); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	for range masterkey.MaxRing - 2 {
		if _, err := a.New(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.New(); err == nil {
		t.Error("a ring without end")
	}
}

// TestPeer: while a key is replaced, both ends accept what either shows.
func TestPeer(t *testing.T) {
	keys, _ := create(t)
	before, accepted, err := keys.Peer()
	if err != nil || len(accepted) != 1 {
		t.Fatalf("%d keys are accepted, %v", len(accepted), err)
	}
	id, err := keys.New()
	if err != nil {
		t.Fatal(err)
	}
	keys.Use(id, masterkey.FirstID)
	own, accepted, err := keys.Peer()
	if err != nil || !own.Equal(before) || len(accepted) != 2 {
		t.Errorf("the key shown changed too early, or %d are accepted, %v", len(accepted), err)
	}
	keys.Use(id, id)
	if own, _, err = keys.Peer(); err != nil || own.Equal(before) || !accepted[1].Equal(own.Public()) {
		t.Errorf("the key shown is not the new one: %v", err)
	}
}

// TestOffline: the file alone can be changed, too.
func TestOffline(t *testing.T) {
	_, path := create(t)
	if err := masterkey.RemoveFrom(path, masterkey.FirstID); err == nil {
		t.Error("the only key was removed")
	}
	id, err := masterkey.AddTo(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := masterkey.RemoveFrom(path, "nobody"); err == nil {
		t.Error("an unknown key was removed")
	}
	if err := masterkey.RemoveFrom(path, masterkey.FirstID); err != nil {
		t.Fatal(err)
	}
	keys, err := masterkey.Open(path)
	if err != nil || !slices.Equal(keys.IDs(), []string{id}) {
		t.Fatalf("%v, %v", keys.IDs(), err)
	}
	wantOpen(t, keys, seal(t, keys, "x"), "x")
	if _, err := keys.FirstDataKey("files"); err == nil {
		t.Error("a first key that is gone")
	}
}

// FuzzParse: no file makes it fail in another way than by an error, and what is read is written as it was.
func FuzzParse(f *testing.F) {
	ring, _, err := masterkey.NewRing().WithNew()
	if err != nil {
		f.Fatal(err)
	}
	content, err := ring.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(content)
	f.Add(content[:len(content)-5])
	f.Add(bytes.Repeat([]byte{1}, masterkey.Size))
	f.Add([]byte(`{"version":1,"keys":[]}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		ring, err := masterkey.Parse(content)
		if err != nil {
			return
		}
		encoded, err := ring.Encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := masterkey.Parse(encoded)
		if err != nil || !slices.Equal(again.IDs(), ring.IDs()) {
			t.Errorf("%v became %v, %v", ring.IDs(), again, err)
		}
	})
}

// TestOpenInPlace: what is opened is within what was sealed, and nothing else is opened.
func TestOpenInPlace(t *testing.T) {
	one := masterkey.NewDataKey()
	sealed, err := one.Seal([]byte("plain text"), "x")
	if err != nil {
		t.Fatal(err)
	}
	room := bytes.Clone(sealed)
	if got, err := one.OpenInPlace(room, "x"); err != nil || string(got) != "plain text" || !bytes.Contains(room, got) {
		t.Errorf("got %q, %v", got, err)
	}
	for _, wrong := range [][]byte{nil, sealed[:5], sealed[:len(sealed)-1]} {
		if _, err := one.OpenInPlace(bytes.Clone(wrong), "x"); err == nil {
			t.Errorf("opened %d bytes of %d", len(wrong), len(sealed))
		}
	}
	if _, err := one.OpenInPlace(bytes.Clone(sealed), "y"); err == nil {
		t.Error("opened about another thing")
	}
}

// TestRefreshWhileAdding: a key that comes into the file while it is read is found, at the latest with the next look.
func TestRefreshWhileAdding(t *testing.T) {
	for range 50 {
		keys, path := create(t)
		stop, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := keys.Refresh(); err != nil {
					t.Error(err)
					return
				}
			}
		}()
		id, err := masterkey.AddTo(path)
		close(stop)
		<-done
		if err != nil {
			t.Fatal(err)
		}
		if err := keys.Refresh(); err != nil || !keys.Has(id) {
			t.Fatalf("the key %s is not found: %v, %v", id, keys.IDs(), err)
		}
	}
}
