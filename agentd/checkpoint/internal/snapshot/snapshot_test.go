package snapshot

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// listing is everything of a tree that a copy keeps.
func listing(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(p)
		if err != nil {
			return err
		}
		text := info.Mode().String()
		switch info.Mode().Type() {
		case 0:
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			text += " " + info.ModTime().String() + " " + string(b[:min(len(b), 100)]) + " " + string(rune(len(b)))
		case fs.ModeSymlink:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			text += " " + target
		case fs.ModeSocket:
			return nil
		}
		rel, _ := filepath.Rel(dir, p)
		all[rel] = text
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func equal(t *testing.T, from, to string) {
	t.Helper()
	want, got := listing(t, from), listing(t, to)
	for name, text := range want {
		if got[name] != text {
			t.Errorf("%s: got %q, want %q", name, got[name], text)
		}
	}
	for name := range got {
		if _, there := want[name]; !there {
			t.Errorf("%s is left over", name)
		}
	}
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func TestTwoPassesMakeAnEqualCopy(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	at := func(name string) string { return filepath.Join(from, name) }
	must(t, os.Mkdir(at("d"), 0o750), os.WriteFile(at("d/a"), []byte("one"), 0o640), os.WriteFile(at("b"), []byte("two"), 0o600),
		os.Symlink("/etc/shadow", at("l")), unix.Mkfifo(at("p"), 0o600), os.WriteFile(at("gone"), nil, 0o600), os.Mkdir(at("kind"), 0o700), os.WriteFile(at("kind/x"), nil, 0o600))
	sparse, err := os.Create(at("sparse"))
	must(t, err)
	_, err = sparse.WriteAt([]byte("end"), 8<<20)
	must(t, err, sparse.Close())
	c, err := New(from, to, 0)
	must(t, err)
	defer c.Close()
	first, err := c.Pass()
	must(t, err)
	equal(t, from, to)
	if first.Copied != 5 {
		t.Errorf("copied %d files, want 5", first.Copied)
	}
	// The hole is a hole, unless the content is shared.
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(to, "sparse"), &st))
	if st.Blocks*512 > 1<<20 {
		t.Errorf("the sparse copy takes %d bytes", st.Blocks*512)
	}

	must(t, os.WriteFile(at("b"), []byte("TWO"), 0o600), os.Remove(at("gone")), os.RemoveAll(at("kind")), os.WriteFile(at("kind"), []byte("now a file"), 0o600),
		os.Rename(at("d"), at("e")), os.Chmod(at("e/a"), 0o400), os.Remove(at("l")), os.Symlink("b", at("l")))
	second, err := c.Pass()
	must(t, err)
	equal(t, from, to)
	if second.Copied != 3 { // b, kind, e/a: the directory's new name makes it new
		t.Errorf("the second pass copied %d files, want 3", second.Copied)
	}
	third, err := c.Pass()
	must(t, err)
	if third.Copied != 0 {
		t.Errorf("a pass over the same copied %d files", third.Copied)
	}
}

func TestBounds(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	must(t, os.WriteFile(filepath.Join(from, "x"), bytes.Repeat([]byte("x"), 100), 0o600))
	c, err := New(from, to, 99)
	must(t, err)
	defer c.Close()
	if _, err := c.Pass(); !errors.Is(err, ErrTooLarge) {
		t.Fatalf("got %v", err)
	}
	deep := from
	for range MaxDepth + 2 {
		deep = filepath.Join(deep, "d")
	}
	must(t, os.Remove(filepath.Join(from, "x")), os.MkdirAll(deep, 0o700))
	if _, err := c.Pass(); !errors.Is(err, ErrTooLarge) {
		t.Fatalf("got %v", err)
	}
}

// A kernel's user swaps directories for links while root copies them.
func TestNoLinkIsFollowedWhateverHappens(t *testing.T) {
	from, secret := t.TempDir(), t.TempDir()
	must(t, os.WriteFile(filepath.Join(secret, "f"), []byte("SECRET"), 0o600))
	d, l := filepath.Join(from, "d"), filepath.Join(from, "l")
	must(t, os.Mkdir(d, 0o700), os.WriteFile(filepath.Join(d, "f"), []byte("mine"), 0o600), os.Symlink(secret, l))
	done := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-done:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, d, unix.AT_FDCWD, l, unix.RENAME_EXCHANGE)
			}
		}
	}()
	defer func() {
		close(done)
		<-stopped
	}()
	for range 300 {
		to := t.TempDir()
		c, err := New(from, to, 0)
		must(t, err)
		_, err = c.Pass()
		c.Close()
		if err != nil && !gone(err) {
			t.Fatal(err)
		}
		for _, name := range []string{"d/f", "l/f"} {
			if info, err := os.Lstat(filepath.Join(to, filepath.Dir(name))); err != nil || info.Mode()&fs.ModeSymlink != 0 {
				continue
			}
			if b, err := os.ReadFile(filepath.Join(to, name)); err == nil && string(b) != "mine" {
				t.Fatalf("%s holds %q", name, b)
			}
		}
	}
}
