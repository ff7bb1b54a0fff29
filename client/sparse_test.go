package client

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// TestSparse writes contents with runs of zeros in pieces of any size, and wants them back,
// with holes where there are whole blocks of zeros.
func TestSparse(t *testing.T) {
	blocks := func(f *os.File) int64 {
		t.Helper()
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		info, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		return info.Sys().(*syscall.Stat_t).Blocks * 512
	}
	for _, c := range []struct {
		name    string
		runs    []int // lengths: data, zeros, data, ...
		atMost  int64 // bytes on disk
		atLeast int64
	}{
		{"empty", nil, 0, 0},
		{"only data", []int{100_000}, 1 << 20, 100_000},
		{"only a hole", []int{0, 10 << 20}, 0, 0},
		{"a hole at the end", []int{5000, 10 << 20}, 64 << 10, 5000},
		{"a hole at the beginning", []int{0, 10 << 20, 5000}, 64 << 10, 5000},
		{"holes in the midst", []int{4096, 8 << 20, 1, 8 << 20, 12345}, 128 << 10, 12345},
		{"small runs", []int{3, 100, 5, 4095, 7, 1, 9, 8191, 2}, 64 << 10, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			var content []byte
			for i, n := range c.runs {
				run := make([]byte, n)
				for j := range run {
					if i%2 == 0 {
						run[j] = byte(1 + rand.IntN(255))
					}
				}
				content = append(content, run...)
			}
			f, err := os.Create(filepath.Join(t.TempDir(), "f"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			s := &sparse{f: f}
			for rest := content; len(rest) > 0; {
				n := min(len(rest), 1+rand.IntN(70_000))
				if got, err := s.Write(rest[:n]); got != n || err != nil {
					t.Fatalf("%d of %d, %v", got, n, err)
				}
				rest = rest[n:]
			}
			if err := s.end(); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(f.Name())
			if err != nil || !bytes.Equal(got, content) {
				t.Errorf("%d bytes, want %d, %v", len(got), len(content), err)
			}
			if n := blocks(f); n > c.atMost || n < c.atLeast {
				t.Errorf("%d bytes on disk, want %d to %d", n, c.atLeast, c.atMost)
			}
		})
	}
}
