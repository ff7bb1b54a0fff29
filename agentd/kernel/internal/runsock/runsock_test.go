package runsock

import (
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The socket is its user's alone, whatever lay in its place; and nothing that a kernel
// puts there is given away.
func TestSocketForKernel(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to give files away")
	}
	dir := t.TempDir()
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	place := filepath.Join(dir, "s.sock")
	if err := os.Symlink(secret, place); err != nil { // of an earlier life
		t.Fatal(err)
	}
	l, err := Listen(dir, "s.sock", 1_980_000_001)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	owner := func(path string) (uid uint32, mode os.FileMode) {
		t.Helper()
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info.Sys().(*syscall.Stat_t).Uid, info.Mode()
	}
	if uid, mode := owner(place); uid != 1_980_000_001 || mode.Perm() != 0o600 || mode.Type() != os.ModeSocket {
		t.Errorf("the socket is %d's, %v", uid, mode)
	}
	conn, err := net.Dial("unix", place)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	peer, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	if uid, err := PeerUID(peer); err != nil || uid != 0 {
		t.Errorf("the peer is %d, %v", uid, err)
	}

	at, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(at)
	for name, put := range map[string]func() error{
		"a link to a file":  func() error { return os.Symlink(secret, place) },
		"a file's own name": func() error { return os.WriteFile(place, nil, 0o600) },
		"a directory":       func() error { return os.Mkdir(place, 0o700) },
	} {
		if err := os.RemoveAll(place); err != nil {
			t.Fatal(err)
		}
		if err := put(); err != nil {
			t.Fatal(err)
		}
		if err := give(at, "s.sock", 1_980_000_001); err == nil {
			t.Errorf("%s was given away", name)
		}
		if uid, _ := owner(place); uid != 0 {
			t.Errorf("%s is %d's now", name, uid)
		}
	}
	if uid, mode := owner(secret); uid != 0 || mode.Perm() != 0o600 {
		t.Errorf("the file is %d's, %v", uid, mode)
	}
}
