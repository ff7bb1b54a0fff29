package fuseserver

import (
	"maps"
	"os"
	"path/filepath"
	"testing"
)

func TestBackingsSurvive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "backings")
	b, err := openBackings(path, true)
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{b.add(1, 10, 5), b.add(1, 11, 5), b.add(1, 11, 5), b.add(2, 12, 6)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, last, err := b.remove(2, 12); !last || err != nil {
		t.Errorf("the last open of a node: %v, %v", last, err)
	}
	if _, last, err := b.remove(2, 12); last || err != nil {
		t.Errorf("the same once more: %v, %v", last, err)
	}
	if err := b.close(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// A record that was cut by a crash counts as not written.
	if err := os.WriteFile(path, append(text, record(recordAdd, 9, 9, 9)[:recordSize-1]...), 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := openBackings(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer again.close()
	if got, want := again.counts(), map[uint64]int{1: 2}; !maps.Equal(got, want) {
		t.Errorf("after the next start: %v, want %v", got, want)
	}
	if id, ok := again.id(1); !ok || id != 5 {
		t.Errorf("id of node 1: %d, %v", id, ok)
	}
	if err := again.add(3, 30, 7); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Size() != int64(len(text))+recordSize {
		t.Errorf("the cut record was kept: %d bytes, %v", st.Size(), err)
	}
}

func TestBackingsStaySmall(t *testing.T) {
	path := filepath.Join(t.TempDir(), "backings")
	b, err := openBackings(path, true)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	if err := b.add(1, 1, 1); err != nil {
		t.Fatal(err)
	}
	for key := uint64(2); key < 10*compactAt; key++ {
		if err := b.add(2, key, 2); err != nil {
			t.Fatal(err)
		}
		if _, _, err := b.remove(2, key); err != nil {
			t.Fatal(err)
		}
	}
	st, err := os.Stat(path)
	if err != nil || st.Size() > 2*compactAt*recordSize {
		t.Errorf("the table of one open file has %d bytes, %v", st.Size(), err)
	}
}

func FuzzBackings(f *testing.F) {
	f.Add(append(record(recordAdd, 1, 2, 3), record(recordRemove, 1, 2, 3)...))
	f.Add([]byte("nothing like it at all, but long enough"))
	f.Fuzz(func(t *testing.T, text []byte) {
		path := filepath.Join(t.TempDir(), "backings")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		b, err := openBackings(path, false)
		if err != nil {
			return
		}
		defer b.close()
		for node, opens := range b.counts() {
			if opens < 1 {
				t.Errorf("node %d has %d opens", node, opens)
			}
		}
	})
}
