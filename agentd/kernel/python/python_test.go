package python

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// An installed module is complete, readable for everybody, and never written again.
func TestInstall(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "python")
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			place, err := Install(dir)
			if err != nil || filepath.Base(place) != Version() {
				t.Errorf("%q, %v", place, err)
			}
		})
	}
	group.Wait()
	place, err := Install(dir)
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	err = filepath.WalkDir(place, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if want := map[bool]fs.FileMode{true: 0o755, false: 0o644}[d.IsDir()]; info.Mode().Perm() != want {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		if strings.HasSuffix(path, ".py") {
			count++
		}
		return nil
	})
	if err != nil || count != len(names()) || count < 5 {
		t.Errorf("%d files, %v", count, err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}

// TestSecrets runs what is in testdata on the system's Python, and on others that
// POSTERN_PYTHONS names.
func TestSecrets(t *testing.T) {
	for _, program := range append([]string{"python3"}, strings.Fields(os.Getenv("POSTERN_PYTHONS"))...) {
		cmd := exec.CommandContext(t.Context(), program, "testdata/secrets.py")
		cmd.Env = append(os.Environ(), "PYTHONPATH=.", "PYTHONDONTWRITEBYTECODE=1")
		if out, err := cmd.CombinedOutput(); err != nil || string(out) != "done\n" {
			t.Errorf("%s: %v\n%s", program, err, out)
		}
	}
}
