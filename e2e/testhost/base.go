package testhost

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// Packages are in every host: what agentd, its kernels and a local PostgreSQL
// need, and what the tests look with.
var Packages = []string{
	"systemd", "systemd-sysv", "dbus", "init-system-helpers", "iproute2", "procps", "ca-certificates",
	"fuse3", "nftables", "python3", "python3-ipykernel", "postgresql", "sqlite3",
}

// CacheDir is where root file systems are kept, as tars of about 400 MB each:
// $POSTERN_TESTHOST_CACHE, or a directory in /var/tmp.
func CacheDir() string {
	if dir := os.Getenv("POSTERN_TESTHOST_CACHE"); dir != "" {
		return dir
	}
	return "/var/tmp/postern-testhost"
}

// base is the tar of a suite's root file system; it is made if it is not there.
// Several processes may ask at once.
func base(ctx context.Context, suite string) (path string, err error) {
	list := strings.Join(Packages, ",")
	sum := sha256.Sum256([]byte(list))
	dir := CacheDir()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	path = filepath.Join(dir, fmt.Sprintf("base-%s-%x.tar", suite, sum[:6]))
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer func() { _ = lock.Close() }()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	if st, err := os.Stat(path); err == nil && st.Size() > 0 {
		return path, nil
	}
	mirror, err := mirror(ctx)
	if err != nil {
		return "", err
	}
	wip := path + ".tmp.tar"
	defer func() { _ = os.Remove(wip) }()
	cmd := exec.CommandContext(ctx, "mmdebstrap", "--quiet", "--variant=minbase", "--include="+list,
		"--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
		suite, wip, mirror)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("mmdebstrap %s: %w: %s", suite, err, lastLines(out, 5))
	}
	return path, os.Rename(wip, path)
}

// mirror is a Debian mirror of this machine's own apt sources.
func mirror(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format=$(REPO_URI)",
		"Created-By: Packages", "Origin: Debian", "Label: Debian").Output()
	if line, _, _ := strings.Cut(string(out), "\n"); err == nil && line != "" {
		return line, nil
	}
	files, _ := filepath.Glob("/etc/apt/sources.list.d/*")
	for _, f := range append([]string{"/etc/apt/sources.list"}, files...) {
		text, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		if m := sourceLine.FindSubmatch(text); m != nil {
			return string(m[1]), nil
		}
	}
	return "", errors.New("no Debian mirror in this machine's apt sources: run apt-get update")
}

var sourceLine = regexp.MustCompile(`(?m)^(?:URIs: *|deb +(?:\[[^]]*\] +)?)(\S*debian/?)(?:\s|$)`)

func lastLines(out []byte, n int) string {
	lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-n):], []byte("; ")))
}
