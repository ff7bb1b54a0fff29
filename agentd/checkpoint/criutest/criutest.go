package criutest

import (
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Path returns a CRIU that works here. It skips without root, and fails, never skips,
// where packaging/dev/deps.sh criu was not run.
func Path(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: CRIU")
	}
	for _, p := range []string{"/opt/criu/bin/criu", "/usr/sbin/criu"} {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	t.Fatal("no CRIU here: run packaging/dev/deps.sh criu")
	return ""
}

//go:embed testdata/prlimit.c
var source []byte

// Preload returns the path of a library to load into CRIU; "" on a machine that has
// CAP_SYS_RESOURCE, where none is needed.
func Preload(t testing.TB) string {
	t.Helper()
	lib, err := Library()
	if err != nil {
		t.Fatalf("build the library for CRIU (packaging/dev/deps.sh gcc): %v", err)
	}
	return lib
}

// Library is Preload for processes that tests start. It is built once for a machine and
// stays in the directory for temporary files.
func Library() (string, error) {
	if HasSysResource() {
		return "", nil
	}
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("postern-criutest-%d-%x", os.Geteuid(), sha256.Sum256(source))[:40])
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return "", err
	}
	if !info.IsDir() || info.Sys().(*syscall.Stat_t).Uid != uint32(os.Geteuid()) || info.Mode().Perm()&0o022 != 0 {
		return "", fmt.Errorf("%s is another user's", dir)
	}
	lib := filepath.Join(dir, "prlimit.so")
	if _, err := os.Stat(lib); err == nil {
		return lib, nil
	}
	fresh, err := os.MkdirTemp(dir, "build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(fresh) //nolint:errcheck // it is empty by then, or of no use
	c, out := filepath.Join(fresh, "prlimit.c"), filepath.Join(fresh, "prlimit.so")
	if err := os.WriteFile(c, source, 0o644); err != nil {
		return "", err
	}
	if said, err := exec.Command("cc", "-O1", "-Wall", "-shared", "-fPIC", "-o", out, c, "-ldl").CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, said)
	}
	if err := os.Chmod(out, 0o755); err != nil {
		return "", err
	}
	return lib, os.Rename(out, lib)
}

// HasSysResource reports whether this process has CAP_SYS_RESOURCE.
func HasSysResource() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}
