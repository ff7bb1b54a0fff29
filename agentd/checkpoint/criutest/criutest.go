package criutest

import (
	_ "embed"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
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

var build struct {
	sync.Once
	dir, library string
	err          error
}

// Preload returns the path of a library to load into CRIU; "" on a machine that has
// CAP_SYS_RESOURCE, where none is needed. [Clean] removes it.
func Preload(t testing.TB) string {
	t.Helper()
	if HasSysResource() {
		return ""
	}
	build.Do(func() {
		if build.dir, build.err = os.MkdirTemp("", "criutest"); build.err != nil {
			return
		}
		build.err = os.Chmod(build.dir, 0o755)
		c, lib := filepath.Join(build.dir, "prlimit.c"), filepath.Join(build.dir, "prlimit.so")
		if build.err == nil {
			build.err = os.WriteFile(c, source, 0o644)
		}
		if build.err == nil {
			var out []byte
			if out, build.err = exec.Command("cc", "-O1", "-Wall", "-shared", "-fPIC", "-o", lib, c, "-ldl").CombinedOutput(); build.err != nil {
				t.Logf("%s", out)
			}
		}
		build.library = lib
	})
	if build.err != nil {
		t.Fatalf("build the library for CRIU (packaging/dev/deps.sh gcc): %v", build.err)
	}
	return build.library
}

// Clean removes what Preload built; TestMain calls it last.
func Clean() {
	if build.dir != "" {
		_ = os.RemoveAll(build.dir)
	}
}

// HasSysResource reports whether this process has CAP_SYS_RESOURCE.
func HasSysResource() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}
