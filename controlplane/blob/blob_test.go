package blob_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/controlplane/blob"
	"github.com/postern-dev/postern/controlplane/filekey"
	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/controlplane/pki"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
)

var ctx = context.Background()

// bench is an object store with two workspaces of one organization.
type bench struct {
	t     *testing.T
	index *store.Store
	keys  *filekey.Service
	*blob.Store
	dir  string
	org  string
	a, b int64
}

// place makes room for an object store: its address, and the directory in which its objects
// can be seen as files. The tag reals3 has another one.
var place = func(t *testing.T) (where, dir string) {
	dir = filepath.Join(storetest.Dir(t), "blob")
	return dir, dir
}

func open(t *testing.T, index *store.Store, where string, grace time.Duration) *bench {
	t.Helper()
	o, err := index.CreateOrganization(ctx, "acme", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	ca, err := pki.Open(ctx, pki.Config{Store: index, MasterKeyFile: filepath.Join(t.TempDir(), "master.key")})
	if err != nil {
		t.Fatal(err)
	}
	k := &bench{t: t, index: index, org: o.Id, keys: filekey.New(index, ca.Keys())}
	if where == "" {
		where, k.dir = place(t)
	}
	k.Store, err = blob.Open(ctx, where, blob.Config{
		Logger: slog.New(slog.DiscardHandler), Index: index, Grace: grace, Replaced: time.Nanosecond,
		Keys: k.keys,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	})
	for i, number := range []*int64{&k.a, &k.b} {
		w := &filetree.Workspace{ID: proto.NewID("wsp_"), Organization: o.Id, Name: string(rune('a' + i)), Created: time.Now(), Seq: 1, NextID: 16}
		if err := index.InsertWorkspace(ctx, w, &filetree.Node{ID: 1, Type: filetree.Directory, Links: 1, Seq: 1}); err != nil {
			t.Fatal(err)
		}
		*number = w.Number
	}
	return k
}

func chunk(n int) []byte {
	b := make([]byte, n)
	rand.Read(b) //nolint:errcheck // it never fails
	return b
}

func (k *bench) put(ws int64, chunks ...[]byte) []filetree.Hash {
	k.t.Helper()
	hashes, err := k.Put(ctx, k.org, ws, chunks)
	if err != nil {
		k.t.Fatal(err)
	}
	return hashes
}

// files are the objects' paths.
func (k *bench) files() []string {
	k.t.Helper()
	var all []string
	err := filepath.WalkDir(k.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			all = append(all, path)
		}
		if path == k.dir && errors.Is(err, fs.ErrNotExist) {
			return nil // a bucket without objects has no directories either
		}
		return err
	})
	if err != nil {
		k.t.Fatal(err)
	}
	return all
}

func wantCode(t *testing.T, err error, want proto.Code) {
	t.Helper()
	if proto.CodeOf(err) != want {
		t.Fatalf("got error %v (%v), want %v", err, proto.CodeOf(err), want)
	}
}

func TestChunks(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		k := open(t, s, "", 0)
		secret := append([]byte("a very secret line that must not be on the disk"), chunk(5000)...)
		chunks := [][]byte{secret, chunk(filechunk.Size), chunk(1), secret}
		hashes := k.put(k.a, chunks...)
		got, err := k.Get(ctx, k.org, k.a, hashes)
		if err != nil {
			t.Fatal(err)
		}
		for i := range chunks {
			if !bytes.Equal(got[i], chunks[i]) {
				t.Errorf("chunk %d: %d bytes, want %d", i, len(got[i]), len(chunks[i]))
			}
		}
		if n := len(k.files()); n != 3 {
			t.Errorf("%d objects, want 3", n)
		}
		for _, path := range k.files() {
			content, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(content, []byte("secret line")) || strings.Contains(path, string(hashes[0][:4])) {
				t.Errorf("%s is not sealed", path)
			}
		}
		// Another workspace has it only once it has stored it, and that costs no object.
		_, err = k.Get(ctx, k.org, k.b, hashes[:1])
		wantCode(t, err, proto.CodeNotFound)
		_, err = k.Get(ctx, "org_other", k.b, hashes[:1])
		wantCode(t, err, proto.CodeNotFound)
		k.put(k.b, secret)
		if _, err := k.Get(ctx, k.org, k.b, hashes[:1]); err != nil {
			t.Error(err)
		}
		if n := len(k.files()); n != 3 {
			t.Errorf("%d objects after the same chunk again, want 3", n)
		}
		for _, bad := range [][]byte{nil, make([]byte, filechunk.Size+1)} {
			_, err := k.Put(ctx, k.org, k.a, [][]byte{bad})
			wantCode(t, err, proto.CodeInvalid)
		}
	})
}

// TestDamage: an object that was altered, swapped or lost is an error and no content, and
// storing the chunk again mends it.
func TestDamage(t *testing.T) {
	for name, harm := range map[string]func(t *testing.T, path, other string){
		"altered": func(t *testing.T, path, _ string) {
			content, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			content[len(content)/2] ^= 1
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"cut": func(t *testing.T, path, _ string) {
			if err := os.Truncate(path, 5); err != nil {
				t.Fatal(err)
			}
		},
		"lost": func(t *testing.T, path, _ string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		},
		"swapped": func(t *testing.T, path, other string) {
			content, err := os.ReadFile(other)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		for way, read := range ways {
			t.Run(name+"/"+way, func(t *testing.T) { testDamage(t, harm, read) })
		}
	}
}

func testDamage(t *testing.T, harm func(t *testing.T, path, other string), read func(k *bench, ws int64, hashes []filetree.Hash) ([][]byte, error)) {
	k := open(t, storetest.SQLite(t), "", 0)
	good := chunk(6000)
	hash := k.put(k.a, good)
	path := k.files()[0]
	k.put(k.a, chunk(6000))
	other := ""
	for _, f := range k.files() {
		if f != path {
			other = f
		}
	}
	harm(t, path, other)
	got, err := read(k, k.a, hash)
	wantCode(t, err, proto.CodeInternal)
	if len(got) > 0 && got[0] != nil {
		t.Errorf("%d bytes came of a damaged chunk", len(got[0]))
	}
	missing, err := k.index.MissingChunks(ctx, k.org, k.a, hash, time.Now())
	if err != nil || len(missing) != 1 {
		t.Fatalf("a damaged chunk is not missing: %v, %v", missing, err)
	}
	k.put(k.b, good) // whoever has it mends it
	if got, err := read(k, k.a, hash); err != nil || !bytes.Equal(got[0], good) {
		t.Errorf("not mended: %v", err)
	}
}

// TestFlaky: a bucket that fails one request in ten, in the middle of them too, fails no
// caller and leaves nothing behind.
func TestFlaky(t *testing.T) {
	k := open(t, storetest.SQLite(t), "", time.Millisecond)
	broken := k.Flaky(10)
	var all []filetree.Hash
	for range 30 {
		all = append(all, k.put(k.a, chunk(100), chunk(200), chunk(300))...)
	}
	for i := 0; i < len(all); i += 10 {
		if _, err := k.Get(ctx, k.org, k.a, all[i:min(i+10, len(all))]); err != nil {
			t.Fatal(err)
		}
	}
	if broken() < 15 {
		t.Errorf("only %d requests failed", broken())
	}
	if n := len(k.files()); n != len(all) {
		t.Errorf("%d objects, want %d", n, len(all))
	}
	time.Sleep(5 * time.Millisecond)
	if _, err := k.Collect(ctx); err != nil { // nothing refers to them
		t.Fatal(err)
	}
	if n := len(k.files()); n != 0 {
		t.Errorf("%d objects are left", n)
	}
	_, err := k.Get(ctx, k.org, k.a, all[:1])
	wantCode(t, err, proto.CodeNotFound)

	dead, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	k.Flaky(1)
	if _, err := k.Put(dead, k.org, k.a, [][]byte{chunk(10)}); err == nil {
		t.Error("stored in a bucket that never answers")
	}
}

func TestAddresses(t *testing.T) {
	for where, want := range map[string]string{
		"ftp://host/x": "not understood", "s3://": "without a bucket", "s3://key:secret@bucket": "don't belong", "s3://b/path": "prefix=path/", "s3://b?prefix=x": "slash",
		"s3://b?endpoint=https://me:secret@host": "don't belong", "s3://b?endpoint=host:9000": "https://HOST",
	} {
		err := blob.Validate(where)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v, want %q", where, err, want)
		}
	}
	for _, where := range []string{"/var/lib/x", "s3://bucket", "s3://bucket?region=eu-1&prefix=a/b/"} {
		if err := blob.Validate(where); err != nil {
			t.Errorf("%s: %v", where, err)
		}
	}
}

// TestNeverWritten: a process that is killed after it noted an object and before it made
// anything of it leaves nothing that garbage collection stumbles over.
func TestNeverWritten(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		k := open(t, s, "", time.Millisecond)
		if err := s.BeginUploads(ctx, []string{"v1/zz/zz/never"}, time.Now().Add(-48*time.Hour)); err != nil {
			t.Fatal(err)
		}
		if n, err := k.Collect(ctx); n != 1 || err != nil {
			t.Errorf("collected %d, %v", n, err)
		}
		if n, err := k.Collect(ctx); n != 0 || err != nil {
			t.Errorf("then %d, %v", n, err)
		}
	})
}
