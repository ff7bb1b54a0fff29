package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestKernelMovesLazily moves a kernel that is large enough to run on the other host before all
// of its memory is there: what it reads is what it had, and in the end all came.
func TestKernelMovesLazily(t *testing.T) {
	s, _, b := twoHosts(t)
	id := startedKernel(t, s, "host")
	must(t, s, "kernel", "exec", id, "import os, zlib; big = os.urandom(1 << 20) * 280; was = zlib.crc32(big); n = 41")
	e := postern(t, s, "kernel", "move", id, "other")
	if e.code != 0 || strings.Contains(e.stdout+e.stderr, "eagerly") {
		t.Fatalf("exit code %d: %s%s", e.code, e.stdout, e.stderr)
	}
	execIs(t, s, id, "n += 1; print(n, zlib.crc32(big) == was)", "42 True")
	// It has another name there.
	logs, err := filepath.Glob(filepath.Join(b.StateDir(), "kernels", "*", "shim.log"))
	if err != nil || len(logs) != 1 {
		t.Fatalf("shims' logs on the other host: %q, %v", logs, err)
	}
	eventually(t, 10*time.Second, "all memory is on the other host", func() error {
		text, err := os.ReadFile(logs[0])
		if err == nil && !strings.Contains(string(text), "all memory of the restored kernel is there") {
			err = errors.New(string(text))
		}
		return err
	})
	execIs(t, s, id, "n += 1; print(n, zlib.crc32(big) == was)", "43 True")
}
