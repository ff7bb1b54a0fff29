package fusefs

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestWriteOnly: what is written through the handle that made a file and cannot read, of which the
// kernel keeps no pages, is seen at once by handles that read, and by mappings, of which the
// kernel does; and nothing of theirs is lost by it.
func TestWriteOnly(t *testing.T) {
	for _, appending := range []int{0, unix.O_APPEND} {
		t.Run(fmt.Sprintf("append=%v", appending != 0), func(t *testing.T) { testWriteOnly(t, appending) })
	}
}

func testWriteOnly(t *testing.T, appending int) {
	const size = 96 << 10
	m := newWorld(t).mount(serving{})
	m.watchdog()
	path := filepath.Join(m.path, "f")
	maker := openForTest(t, path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|appending)
	other := openForTest(t, path, unix.O_RDWR)
	want := make([]byte, size)
	r := rand.New(rand.NewPCG(1, uint64(appending)))
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return b
	}
	copy(want, random(size))
	if n, err := unix.Write(maker, want); n != size || err != nil {
		t.Fatalf("%d bytes were written: %v", n, err)
	}
	mapped, err := unix.Mmap(other, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mapped)
	for step := range 300 {
		n := 1 + r.IntN(9000)
		at := r.IntN(size - n)
		b := random(n)
		switch way := r.IntN(4); {
		case way < 2 && appending == 0:
			if got, err := unix.Pwrite(maker, b, int64(at)); got != n || err != nil {
				t.Fatalf("step %d: %d bytes of %d at %d were written: %v", step, got, n, at, err)
			}
		case way < 2: // O_APPEND: wherever it says
			if got, err := unix.Pwrite(maker, b, 0); got != n || err != nil {
				t.Fatalf("step %d: %d bytes of %d were added: %v", step, got, n, err)
			}
			want = append(want, b...)
			at, b = 0, nil
		case way == 2:
			copy(mapped[at:], b)
		default:
			if got, err := unix.Pwrite(other, b, int64(at)); got != n || err != nil {
				t.Fatalf("step %d: %d bytes of %d at %d were written by the other: %v", step, got, n, at, err)
			}
		}
		copy(want[at:], b)
		if !bytes.Equal(mapped, want[:size]) {
			t.Fatalf("step %d: the mapping differs from byte %d on", step, differs(mapped, want))
		}
		got := make([]byte, len(want)+1)
		if n, err := unix.Pread(other, got, 0); n != len(want) || err != nil || !bytes.Equal(got[:n], want) {
			t.Fatalf("step %d: %d bytes are read of %d, and differ from byte %d on: %v", step, n, len(want), differs(got, want), err)
		}
	}
	if err := unix.Msync(mapped, unix.MS_SYNC); err != nil {
		t.Fatal(err)
	}
	for _, fd := range []int{maker, other} {
		if err := unix.Close(fd); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after all were closed %d bytes are read of %d, and differ from byte %d on: %v", len(got), len(want), differs(got, want), err)
	}
}

func openForTest(t *testing.T, path string, flags int) int {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// differs is where two contents begin to differ.
func differs(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}
