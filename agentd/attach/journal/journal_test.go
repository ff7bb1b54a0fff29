package journal

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func read(t *testing.T, dir string) (*Journal, []string) {
	t.Helper()
	var got []string
	j, err := Open(dir, func(p []byte, _ Place) error {
		got = append(got, string(p))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return j, got
}

func appendAll(t *testing.T, j *Journal, payloads ...string) Position {
	t.Helper()
	var last Position
	for _, p := range payloads {
		pos, at, err := j.Append([]byte(p))
		if err != nil {
			t.Fatal(err)
		}
		back, err := j.ReadAt(at)
		if err != nil || string(back) != p {
			t.Fatalf("ReadAt: %q, %v; want %q", back, err, p)
		}
		last = pos
	}
	return last
}

func same(t *testing.T, got []string, want ...string) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("replayed %q, want %q", got, want)
	}
}

func TestEntriesComeBack(t *testing.T) {
	dir := t.TempDir()
	j, got := read(t, dir)
	same(t, got)
	if err := j.Reserve(100); err != nil {
		t.Fatal(err)
	}
	if err := j.Sync(appendAll(t, j, "a", "", "c")); err != nil {
		t.Fatal(err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	j, got = read(t, dir)
	same(t, got, "a", "", "c")
	err := j.Begin(func(add func([]byte) error) error { return add([]byte("all")) })
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Sync(appendAll(t, j, "d")); err != nil {
		t.Fatal(err)
	}
	j.Close()
	if names, _ := filepath.Glob(filepath.Join(dir, "*")); len(names) != 1 {
		t.Errorf("old segments stay: %v", names)
	}
	j, got = read(t, dir)
	same(t, got, "all", "d")
	j.Close()
}

// TestTornTail cuts a segment at every byte, and fills the rest with zeros or noise.
func TestTornTail(t *testing.T) {
	dir := t.TempDir()
	j, _ := read(t, dir)
	first := appendAll(t, j, "first", "second")
	appendAll(t, j, "third")
	j.Close()
	name := j.path(1)
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for cut := int(first.offset) - 3; cut < len(whole); cut++ {
		for _, rest := range [][]byte{nil, make([]byte, 5000), bytes.Repeat([]byte("PJe1"), 100)} {
			if err := os.WriteFile(name, append(bytes.Clone(whole[:cut]), rest...), 0o600); err != nil {
				t.Fatal(err)
			}
			j, got := read(t, dir)
			want := []string{"first", "second"}
			if int64(cut) < first.offset {
				want = want[:1]
			}
			same(t, got, want...)
			appendAll(t, j, "more")
			j.Close()
			j, got = read(t, dir)
			same(t, got, append(want, "more")...)
			j.Close()
		}
	}
}

// TestZeros: entries are written over zeros, which stay when the journal is opened again; what is behind
// the entries and not zero is cut off.
func TestZeros(t *testing.T) {
	dir := t.TempDir()
	j, _ := read(t, dir)
	name := j.path(1)
	if err := j.Reserve(100); err != nil {
		t.Fatal(err)
	}
	size := func() int64 {
		t.Helper()
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	before := size()
	var want []string
	for i := range 1000 {
		want = append(want, fmt.Sprint("entry ", i))
	}
	end := appendAll(t, j, want...).offset
	if got := size(); got != before || got < end+zeroStep/2 {
		t.Errorf("the file has %d bytes, and %d before %d bytes of entries were written", got, before, end)
	}
	j.Close()
	for range 2 {
		j, got := read(t, dir)
		same(t, got, want...)
		if err := j.Reserve(100); err != nil {
			t.Fatal(err)
		}
		if got := size(); got != before {
			t.Errorf("opened again the file has %d bytes, not %d", got, before)
		}
		end = appendAll(t, j, "more").offset
		want = append(want, "more")
		j.Close()
	}
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{1}, before-1); err != nil {
		t.Fatal(err)
	}
	f.Close()
	j, got := read(t, dir)
	defer j.Close()
	same(t, got, want...)
	if got := size(); got != end {
		t.Errorf("something is behind the end: the file has %d bytes, not %d", got, end)
	}
	// More than is zeroed at once, and without room having been made.
	if err := j.Reserve(3 * zeroStep); err != nil {
		t.Fatal(err)
	}
	large := strings.Repeat("x", 3*zeroStep)
	appendAll(t, j, large, large)
	if err := j.Reserve(100); err != nil {
		t.Fatal(err)
	}
	appendAll(t, j, "last")
	j.Close()
	j, got = read(t, dir)
	defer j.Close()
	same(t, got, append(want, large, large, "last")...)
}

// TestDamageInTheMiddle: what had been synced is never forgotten silently; what had not
// been may be cut with all that follows.
func TestDamageInTheMiddle(t *testing.T) {
	dir := t.TempDir()
	j, _ := read(t, dir)
	if err := j.Sync(appendAll(t, j, "first", "second")); err != nil {
		t.Fatal(err)
	}
	third := appendAll(t, j, "third", "fourth")
	j.Close()
	whole, _ := os.ReadFile(j.path(1))
	damage := func(at int64) error {
		b := bytes.Clone(whole)
		b[at] ^= 1
		if err := os.WriteFile(j.path(1), b, 0o600); err != nil {
			t.Fatal(err)
		}
		j, err := Open(dir, func([]byte, Place) error { return nil })
		if err == nil {
			j.Close()
		}
		return err
	}
	for at := int64(headerSize); at < third.offset-2*headerSize-11; at++ {
		if err := damage(at); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("damage at byte %d of the synced part: %v, want ErrCorrupt", at, err)
		}
	}
	if err := damage(third.offset - headerSize - 7); err != nil {
		t.Fatalf("damage of what was not synced: %v", err)
	}
}

// TestBeginCutShort: a new segment without its whole dump is not used.
func TestBeginCutShort(t *testing.T) {
	dir := t.TempDir()
	j, _ := read(t, dir)
	appendAll(t, j, "a", "b")
	old, _ := os.ReadFile(j.path(1))
	err := j.Begin(func(add func([]byte) error) error {
		return errors.Join(add([]byte("dump one")), add([]byte("dump two")))
	})
	if err != nil {
		t.Fatal(err)
	}
	j.Close()
	fresh, _ := os.ReadFile(j.path(2))
	for cut := 0; cut < len(fresh); cut += 7 {
		if err := errors.Join(os.WriteFile(j.path(1), old, 0o600), os.WriteFile(j.path(2), fresh[:cut], 0o600)); err != nil {
			t.Fatal(err)
		}
		j, got := read(t, dir)
		same(t, got, "a", "b")
		j.Close()
	}
	// With the old one gone there is nothing to fall back to, and that is said.
	if err := errors.Join(os.Remove(j.path(1)), os.WriteFile(j.path(2), fresh[:20], 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, nil); !errors.Is(err, ErrCorrupt) {
		t.Errorf("%v, want ErrCorrupt", err)
	}
}

func TestSyncIsShared(t *testing.T) {
	dir := t.TempDir()
	syncs := 0
	j, err := OpenForTest(dir, nil, func(string, int64) { syncs++ })
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for range 50 {
				pos, _, err := j.Append(fmt.Appendf(nil, "from %d", i))
				if err == nil {
					err = j.Sync(pos)
				}
				if err != nil {
					t.Error(err)
				}
				if rand.Intn(100) == 0 {
					err := j.Begin(func(add func([]byte) error) error { return add([]byte("x")) })
					if err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if syncs == 0 || syncs > 801 {
		t.Errorf("%d syncs for 800 appends", syncs)
	}
}

func FuzzScan(f *testing.F) {
	dir := f.TempDir()
	j, err := Open(dir, nil)
	if err != nil {
		f.Fatal(err)
	}
	if _, _, err := j.Append([]byte("something")); err != nil {
		f.Fatal(err)
	}
	j.Close()
	whole, _ := os.ReadFile(j.path(1))
	f.Add(whole)
	f.Add(whole[:30])
	f.Fuzz(func(t *testing.T, data []byte) {
		name := filepath.Join(t.TempDir(), "journal-1")
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		_, end, err := scan(name, 1, func([]byte, Place) error { return nil })
		if err == nil && end > int64(len(data)) {
			t.Errorf("good entries end at %d of %d", end, len(data))
		}
	})
}

// TestFirstCutShort: a journal whose making was cut short is begun again, and its first segment is on disk
// before anything is in it.
func TestFirstCutShort(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, firstName), []byte("half of a segm"), 0o600); err != nil {
		t.Fatal(err)
	}
	told := map[string]int64{}
	j, err := OpenForTest(dir, func([]byte, Place) error { return errors.New("there is nothing in it") }, func(path string, n int64) { told[path] = n })
	if err != nil {
		t.Fatal(err)
	}
	if told[j.path(1)] != headerSize {
		t.Errorf("synced are %v, want the mark of %s", told, j.path(1))
	}
	appendAll(t, j, "a")
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if names, _ := filepath.Glob(filepath.Join(dir, "*")); len(names) != 1 {
		t.Errorf("files are %v", names)
	}
	j, got := read(t, dir)
	same(t, got, "a")
	// What was replayed is not known to be on disk.
	if err := j.Sync(j.End()); err != nil || j.durable != j.end {
		t.Errorf("synced up to %d of %d, %v", j.durable, j.end, err)
	}
	j.Close()
}
