package fuseserver

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// scan reads a file rounds times, each time anew from the server, in blocks: in order, or with a
// negative size anywhere.
func scan(path, size, rounds string) int {
	block, _ := strconv.Atoi(size)
	n, _ := strconv.Atoi(rounds)
	random := block < 0
	block = max(block, -block)
	f, err := os.Open(path)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	st, err := f.Stat()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	buf := make([]byte, block)
	var sum [32]byte
	for range n {
		h := sha256.New()
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			fmt.Println(err)
			return 1
		}
		blocks := int(st.Size()+int64(block)-1) / block
		for i := range blocks {
			at := i
			if random {
				at = rand.Intn(blocks)
			}
			got, err := f.ReadAt(buf, int64(at)*int64(block))
			if err != nil && err != io.EOF {
				fmt.Println(err)
				return 1
			}
			if n == 1 {
				h.Write(buf[:got])
			}
		}
		h.Sum(sum[:0])
	}
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Printf("%s %d\n", hex.EncodeToString(sum[:]), (u.Utime.Nano()+u.Stime.Nano())/1000)
	return 0
}

// cpu is what the server has used, in microseconds.
func (h *mounted) cpu() int64 {
	h.t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.server.Process.Pid))
	if err != nil {
		h.t.Fatal(err)
	}
	f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	u, _ := strconv.ParseInt(f[11], 10, 64)
	s, _ := strconv.ParseInt(f[12], 10, 64)
	return (u + s) * 10_000
}

func (h *mounted) fill(name string, size int) (content []byte) {
	h.t.Helper()
	content = make([]byte, size)
	rand.New(rand.NewSource(1)).Read(content)
	if err := os.WriteFile(filepath.Join(h.shelf, name), content, 0o600); err != nil {
		h.t.Fatal(err)
	}
	return content
}

// TestSplice reads files of all lengths around those that are spliced, in order and anywhere.
func TestSplice(t *testing.T) {
	h := mount(t)
	want := map[string]string{}
	for i, size := range []int{5<<20 + 77, 128 << 10, spliceFrom - 1} {
		name := fmt.Sprintf("f%d", i)
		sum := sha256.Sum256(h.fill(name, size))
		want[name] = hex.EncodeToString(sum[:])
	}
	if got := h.serve(); !strings.HasPrefix(got, "ready") {
		t.Fatal(got)
	}
	for name, sum := range want {
		for _, block := range []string{"1048576", "131072", "65536", "4096"} {
			if got := strings.Fields(h.use("scan", name, block, "1")()); len(got) != 2 || got[0] != sum {
				t.Errorf("%s in blocks of %s: %s, want %s", name, block, got, sum)
			}
		}
	}
	for range 3 { // and by another server
		h.kill()
		if got := h.serve(); !strings.HasPrefix(got, "ready") {
			t.Fatal(got)
		}
		if got := strings.Fields(h.use("scan", "f0", "1048576", "1")()); len(got) != 2 || got[0] != want["f0"] {
			t.Errorf("after a takeover: %s", got)
		}
	}
}

// TestSpliceCost prints what reading costs with splice and without it, and wants the same bytes of both:
// with POSTERN_LONG=1 for more sizes of blocks, and thrice.
func TestSpliceCost(t *testing.T) {
	size, blocks, rounds := 8<<20, []string{"131072"}, 1
	if os.Getenv("POSTERN_LONG") == "1" {
		size, blocks, rounds = 64<<20, []string{"1048576", "131072", "-131072", "-65536", "-32768", "-16384"}, 3
	}
	for _, block := range blocks {
		for round := range rounds {
			var line, sums []string
			for _, splice := range []string{"off", "on"} {
				t.Setenv("FUSESERVER_TEST_SPLICE", splice)
				h := mount(t)
				h.fill("f0", size)
				if got := h.serve(); !strings.HasPrefix(got, "ready") {
					t.Fatal(got)
				}
				before := h.cpu()
				got := strings.Fields(h.use("scan", "f0", block, "8")())
				if len(got) != 2 {
					t.Fatal(got)
				}
				user, _ := strconv.ParseInt(got[1], 10, 64)
				server := h.cpu() - before
				sums = append(sums, got[0])
				line = append(line, fmt.Sprintf("%s: server %d us/MiB, both %d", splice, server/int64(8*size>>20), (server+user)/int64(8*size>>20)))
			}
			if !strings.HasPrefix(block, "-") && sums[0] != sums[1] { // a negative one reads at random
				t.Errorf("blocks of %s: without splice %s was read, with it %s", block, sums[0], sums[1])
			}
			t.Logf("blocks of %s, round %d: %s", block, round, strings.Join(line, "; "))
		}
	}
}
