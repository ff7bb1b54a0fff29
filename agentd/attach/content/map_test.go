package content

import (
	"bytes"
	"crypto/sha256"
	"os"
	"path/filepath"
	"testing"
)

func testMap(t testing.TB) (string, *chunkMap) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "m")
	m, err := createMap(name, 7, 2*uint64(chunkSize)+5, 3)
	if err != nil {
		t.Fatal(err)
	}
	h := sha256.Sum256([]byte("x"))
	if err := m.putHashes(0, [][]byte{h[:], nil, h[:]}); err != nil {
		t.Fatal(err)
	}
	if err := m.commit(name); err != nil {
		t.Fatal(err)
	}
	return name, m
}

func TestMap(t *testing.T) {
	name, m := testMap(t)
	defer m.file.Close()
	for i, s := range map[int]byte{0: present, 2: changed, 6: changed} {
		if err := m.set(i, s); err != nil {
			t.Fatal(err)
		}
	}
	again, err := openMap(name)
	if err != nil {
		t.Fatal(err)
	}
	defer again.file.Close()
	if want := []byte{present, absent, changed, changed, changed, changed, changed}; !bytes.Equal(again.states, want) {
		t.Errorf("states %v, want %v", again.states, want)
	}
	if again.version != 7 || again.size != 2*uint64(chunkSize)+5 || again.state(100) != changed {
		t.Errorf("map %+v", again)
	}
	if h, err := again.hash(1); h != nil || err != nil {
		t.Errorf("a hole has the hash %x, %v", h, err)
	}
}

// TestMapDamage: no byte of the header or of a hash may be another one.
func TestMapDamage(t *testing.T) {
	name, m := testMap(t)
	m.file.Close()
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	check := func(data []byte) error {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		m, err := openMap(name)
		if err == nil {
			m.file.Close()
		}
		return err
	}
	for i := range whole {
		if i >= 36 && i < mapHeader || i >= mapHeader+3*hashSize {
			continue // not used; states, which are checked by the hashes
		}
		bad := bytes.Clone(whole)
		bad[i] ^= 0x10
		if check(bad) == nil {
			t.Errorf("damage at byte %d is not found", i)
		}
	}
	for n := range whole {
		if check(whole[:n]) == nil {
			t.Errorf("a map cut at byte %d is taken", n)
		}
	}
}

func FuzzMap(f *testing.F) {
	name, m := testMap(f)
	m.file.Close()
	whole, _ := os.ReadFile(name)
	f.Add(whole)
	f.Fuzz(func(t *testing.T, data []byte) {
		name := filepath.Join(t.TempDir(), "m")
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if m, err := openMap(name); err == nil {
			for i := range m.chunks {
				if _, err := m.hash(i); err != nil {
					t.Error(err)
				}
			}
			m.file.Close()
		}
	})
}
