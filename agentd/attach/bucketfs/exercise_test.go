package bucketfs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// amount is how much of something a test does: few, or, with POSTERN_LONG=1, many.
func amount(few, many int) int {
	if os.Getenv("POSTERN_LONG") == "1" {
		return many
	}
	return few
}

// TestExercise does random things on a mount and on a directory, with one request in twenty
// failing, and wants the same of both; in the end the bucket has what the directory has.
func TestExercise(t *testing.T) {
	w := newWorld(t)
	m := w.mount(serving{TTL: 50 * time.Millisecond, Cache: 16 << 20})
	w.faults.set(0.05, false, "")
	model := t.TempDir()
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 1))
	t.Logf("seed %d", seed)
	names := []string{"a", "b", "c", "d", "e"}
	pick := func() string {
		path := names[r.IntN(len(names))]
		for r.IntN(2) == 0 {
			path += "/" + names[r.IntN(len(names))]
		}
		return path
	}
	content := func() []byte {
		b := make([]byte, r.IntN(10_000))
		if r.IntN(10) == 0 {
			b = make([]byte, r.IntN(3<<20))
		}
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return b
	}
	// Files that are open in both, with the operations that go to them.
	type pair struct{ real, model *os.File }
	var open []pair
	closeOne := func(i int) {
		if err := open[i].real.Close(); err != nil {
			t.Fatalf("close: %v", err)
		}
		open[i].model.Close()
		open = append(open[:i], open[i+1:]...)
	}
	for step := range amount(500, 5000) {
		path, other, data := pick(), pick(), content()
		off, size := r.Int64N(20_000), r.Int64N(30_000)
		flags := []int{os.O_RDWR | os.O_CREATE, os.O_RDWR | os.O_CREATE | os.O_TRUNC, os.O_RDWR | os.O_CREATE | os.O_EXCL, os.O_WRONLY | os.O_APPEND, os.O_RDWR}[r.IntN(5)]
		op := r.IntN(11)
		do := func(root string) (out string, err error) {
			at := filepath.Join(root, path)
			switch op {
			case 0, 1:
				f, err := os.OpenFile(at, flags, 0o644)
				if err != nil {
					return "", err
				}
				_, werr := f.Write(data)
				return "", errors.Join(werr, f.Close())
			case 2:
				f, err := os.OpenFile(at, os.O_RDWR, 0)
				if err != nil {
					return "", err
				}
				_, werr := f.WriteAt(data, off)
				return "", errors.Join(werr, f.Close())
			case 3:
				return "", os.Truncate(at, size)
			case 4:
				return "", syscall.Unlink(at)
			case 5:
				return "", os.Mkdir(at, 0o755)
			case 6:
				return "", syscall.Rmdir(at)
			case 7:
				if st, err := os.Lstat(at); err == nil && st.IsDir() {
					return "", nil // EXDEV here, by design
				}
				return "", os.Rename(at, filepath.Join(root, other))
			case 8:
				b, err := os.ReadFile(at)
				return string(b), err
			case 9:
				entries, err := os.ReadDir(at)
				for _, e := range entries {
					out += fmt.Sprint(e.Name(), e.IsDir(), " ")
				}
				return out, err
			default:
				st, err := os.Stat(at)
				if err != nil || st.IsDir() {
					return "", err
				}
				return fmt.Sprint(st.Size()), nil
			}
		}
		switch k := r.IntN(20); {
		case k == 0 && len(open) < 5:
			real, rerr := os.OpenFile(filepath.Join(m.path, path), os.O_RDWR, 0)
			mod, merr := os.OpenFile(filepath.Join(model, path), os.O_RDWR, 0)
			if (rerr == nil) != (merr == nil) {
				t.Fatalf("step %d: open %s: %v, want %v", step, path, rerr, merr)
			}
			if rerr == nil {
				open = append(open, pair{real, mod})
			}
		case k == 1 && len(open) > 0:
			closeOne(r.IntN(len(open)))
		case k == 2 && len(open) > 0:
			p := open[r.IntN(len(open))]
			if _, err := p.real.WriteAt(data, off); err != nil && !errors.Is(err, syscall.ESTALE) {
				t.Fatalf("step %d: write to an open file: %v", step, err)
			} else if err == nil {
				if _, err := p.model.WriteAt(data, off); err != nil {
					t.Fatal(err)
				}
			}
		}
		got, gotErr := do(m.path)
		want, wantErr := do(model)
		var gotNo, wantNo syscall.Errno
		errors.As(gotErr, &gotNo)
		errors.As(wantErr, &wantNo)
		if got != want || gotNo != wantNo {
			t.Fatalf("step %d: operation %d on %s (%s): %.60q %v, want %.60q %v", step, op, path, other, got, gotErr, want, wantErr)
		}
	}
	for len(open) > 0 {
		closeOne(0)
	}
	w.faults.set(0, false, "")
	eventually(t, "everything uploaded", func() error {
		if s := m.status(); s.Unsent > 0 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	files := 0
	err := filepath.WalkDir(model, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == model || e.IsDir() {
			return err
		}
		files++
		want, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel := strings.TrimPrefix(path, model+"/")
		if got := w.get(rel); !bytes.Equal([]byte(got), want) {
			t.Errorf("object %s: %d bytes, want %d", rel, len(got), len(want))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d files", files)
}
