package pagestore

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

var testKey = Key{1, 2, 3}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// unsynced is the disk without waiting for it: syncs are what crash_test.go is about,
// and a shared machine takes tenths of a second for each.
type unsynced struct{ osFileSystem }

type unsyncedFile struct{ file }

func (unsyncedFile) Sync() error { return nil }

func (unsynced) create(path string) (file, error) {
	f, err := osFileSystem{}.create(path)
	return unsyncedFile{f}, err
}

func (unsynced) syncDir(string) error { return nil }

// synced makes openStore use the disk as it is, with its lock.
func synced(o *Options) { o.files = nil }

func openStore(t testing.TB, dir string, change ...func(*Options)) *Store {
	t.Helper()
	o := Options{Dir: dir, Key: testKey, Logger: quiet(), files: unsynced{}}
	for _, c := range change {
		c(&o)
	}
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() }) //nolint:errcheck // closed twice is fine
	return s
}

func meta(kernel string) Meta { return Meta{Organization: "org_a", Kernel: kernel} }

func mustPut(t testing.TB, s *Store, m Meta, dir string) (Checkpoint, PutStats) {
	t.Helper()
	c, st, err := s.Put(context.Background(), m, []Tree{{"images", dir}})
	if err != nil {
		t.Fatal(err)
	}
	return c, st
}

func restored(t testing.TB, s *Store, id ID) string {
	t.Helper()
	dir := t.TempDir()
	if _, err := s.Restore(context.Background(), id, map[string]string{"images": dir}); err != nil {
		t.Fatal(err)
	}
	return dir
}

func mustRestore(t testing.TB, s *Store, id ID, want string) {
	t.Helper()
	sameTree(t, want, restored(t, s, id))
}

// snapshot describes a tree: path to kind, mode, owner, time, content.
func snapshot(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel := strings.TrimPrefix(path, dir)
		st := info.Sys().(*syscall.Stat_t)
		desc := fmt.Sprintf("%v %d:%d", info.Mode(), st.Uid, st.Gid)
		switch info.Mode().Type() {
		case fs.ModeSocket:
			return nil
		case fs.ModeSymlink:
			l, err := os.Readlink(path)
			if err != nil {
				return err
			}
			desc += " -> " + l
		case 0:
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			desc += fmt.Sprintf(" %d %s", info.ModTime().UnixNano(), b)
		default:
			desc += fmt.Sprintf(" %d", info.ModTime().UnixNano())
		}
		out[rel] = desc
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func sameTree(t testing.TB, want, got string) {
	t.Helper()
	w, g := snapshot(t, want), snapshot(t, got)
	for path, d := range w {
		if g[path] != d {
			t.Fatalf("%s: got %.100q, want %.100q", path, g[path], d)
		}
	}
	if len(g) != len(w) {
		t.Fatalf("got %d entries, want %d", len(g), len(w))
	}
}

// collectAll runs Collect until it is done, in small steps.
func collectAll(t testing.TB, s *Store) (total CollectStats) {
	t.Helper()
	for range 10000 {
		st, err := s.Collect(context.Background(), 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		total.Deleted += st.Deleted
		total.Rewritten += st.Rewritten
		total.Freed += st.Freed
		if st.Done {
			return total
		}
	}
	t.Fatal("Collect is never done")
	return total
}

func storeFiles(t testing.TB, dir string) map[string]int64 {
	t.Helper()
	out := map[string]int64{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil && d.Name() != "lock" {
			out[path] = info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// emptyDir fails the test unless dir holds nothing.
func emptyDir(t testing.TB, dir string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(list) > 0 {
		t.Fatalf("%s is left with %v", dir, list)
	}
}
