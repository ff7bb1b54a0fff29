package atomicfile

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestWriteIsAllOrNothing fails each step of a replacement in turn.
func TestWriteIsAllOrNothing(t *testing.T) {
	boom := errors.New("boom")
	for n := range 20 {
		path := filepath.Join(t.TempDir(), "f")
		if err := (FS{}).Write(path, []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		steps := 0
		fs := FS{Fault: func(string) error {
			steps++
			if steps > n {
				return boom
			}
			return nil
		}}
		err := fs.Write(path, []byte("new"), 0o640)
		got, rerr := os.ReadFile(path)
		if rerr != nil || (string(got) != "old" && string(got) != "new") {
			t.Fatalf("after %d steps: %q, %v", n, got, rerr)
		}
		if err == nil {
			if string(got) != "new" || n < 5 {
				t.Fatalf("after %d steps: %q", n, got)
			}
			st, err := os.Stat(path)
			if err != nil || st.Mode().Perm() != 0o640 {
				t.Fatalf("mode %v, %v", st.Mode(), err)
			}
			return
		}
		if !errors.Is(err, boom) {
			t.Fatal(err)
		}
	}
	t.Fatal("the replacement never ended")
}

func TestExchange(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	mk := func(d, content string) {
		t.Helper()
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(d, "f"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	read := func(d string) string {
		got, _ := os.ReadFile(filepath.Join(d, "f")) //nolint:errcheck // "" is what a missing file reads as
		return string(got)
	}
	mk(a, "one")
	if err := (FS{}).Exchange(a, b); err != nil || read(b) != "one" || read(a) != "" {
		t.Fatalf("into nothing: %v, %q", err, read(b))
	}
	mk(a, "two")
	if err := (FS{}).Exchange(a, b); err != nil || read(b) != "two" || read(a) != "one" {
		t.Fatalf("in place: %v, %q and %q", err, read(a), read(b))
	}
}

func TestRemoveMissing(t *testing.T) {
	if err := (FS{}).Remove(filepath.Join(t.TempDir(), "x")); err != nil {
		t.Fatal(err)
	}
}
