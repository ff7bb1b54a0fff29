package filebroker

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func serve(t *testing.T, s Server) *Client {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Serve(pair[0])
	}()
	t.Cleanup(func() {
		_ = unix.Close(pair[1])
		<-done
	})
	c, err := NewClient(pair[1])
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestReadOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	if err := os.WriteFile(path, []byte("content"), 0o640); err != nil {
		t.Fatal(err)
	}
	c := serve(t, Server{Path: path})
	for _, test := range []struct {
		name  string
		file  File
		flags int
		want  error
	}{
		{"database", Database, unix.O_RDONLY, nil},
		{"database to write", Database, unix.O_RDWR, unix.EACCES},
		{"database to create", Database, unix.O_RDWR | unix.O_CREAT, unix.EACCES},
		{"no journal", Journal, unix.O_RDONLY, unix.ENOENT},
		{"journal to create", Journal, unix.O_RDWR | unix.O_CREAT, unix.EACCES},
		{"log of none", WAL, unix.O_RDWR | unix.O_CREAT, unix.EACCES},
		{"index of none", SharedMemory, unix.O_RDWR | unix.O_CREAT, unix.ENOENT},
		{"another", File(9), unix.O_RDONLY, unix.EINVAL},
	} {
		fd, err := c.Open(test.file, test.flags)
		if !errors.Is(err, test.want) && err != test.want {
			t.Errorf("%s: got %v, want %v", test.name, err, test.want)
		}
		if fd >= 0 {
			if _, err := unix.Write(fd, []byte("x")); err == nil {
				t.Errorf("%s: it can be written to", test.name)
			}
			_ = unix.Close(fd)
		}
	}
	if err := c.Unlink(Journal); !errors.Is(err, unix.EACCES) {
		t.Errorf("unlink: got %v", err)
	}
	if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 1 {
		t.Errorf("got %v, want the database alone", entries)
	}
}

func TestLinks(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "secret"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "secret"), filepath.Join(dir, "a.db")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "a.db-wal"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := serve(t, Server{Path: filepath.Join(dir, "a.db"), ReadWrite: true})
	if fd, err := c.Open(Database, unix.O_RDONLY); err == nil {
		t.Errorf("a symbolic link was opened: %d", fd)
	}
	if fd, err := c.Open(WAL, unix.O_RDWR|unix.O_CREAT); err == nil {
		t.Errorf("a pipe was opened: %d", fd)
	}
	if err := Describe(filepath.Join(dir, "a.db")); err == nil {
		t.Error("a symbolic link is described as good")
	}
}

func TestReadWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	if err := os.WriteFile(path, []byte("content"), 0o640); err != nil {
		t.Fatal(err)
	}
	c := serve(t, Server{Path: path, ReadWrite: true})
	fd, err := c.Open(Journal, unix.O_RDWR|unix.O_CREAT)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(fd, []byte("x")); err != nil {
		t.Error(err)
	}
	_ = unix.Close(fd)
	if info, err := os.Stat(path + "-journal"); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("got %v, %v, want the database's mode", info, err)
	}
	if _, err := c.Open(Journal, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL); !errors.Is(err, unix.EEXIST) {
		t.Errorf("exclusive: got %v", err)
	}
	if err := c.Unlink(Journal); err != nil {
		t.Error(err)
	}
	if err := c.Unlink(Database); !errors.Is(err, unix.EACCES) {
		t.Errorf("unlink of the database: got %v", err)
	}
	if _, err := c.Stat(Journal); !errors.Is(err, unix.ENOENT) {
		t.Errorf("stat: got %v", err)
	}
}
