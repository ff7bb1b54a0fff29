package bucketfs

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestOneInTen: one request in ten breaks off, before its answer or in the midst of it.
func TestOneInTen(t *testing.T) {
	w := newWorld(t)
	m := w.mount(serving{Cache: 16 << 20, TTL: 100 * time.Millisecond})
	w.faults.set(0.1, false, "")
	body := make([]byte, 3<<20+5)
	rand.Read(body) //nolint:errcheck // it never fails
	for i := range 30 {
		name := filepath.Join(m.path, fmt.Sprint(i))
		if err := os.WriteFile(name, body, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(name, name+"r"); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(name + "r")
		if err != nil || !bytes.Equal(got, body) {
			t.Fatalf("%d: %d bytes, %v", i, len(got), err)
		}
		if i%3 == 0 {
			if err := os.Remove(name + "r"); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := strings.Fields(names(t, m.path)); len(got) != 20 {
		t.Errorf("%d files left: %v", len(got), got)
	}
	w.faults.set(0, false, "")
	if s := m.status(); s.Unsent != 0 || s.CacheBytes > 16<<20 {
		t.Errorf("%+v", s)
	}
}

// TestGone: what is not here is an error in bounded time; what is in the cache is read.
func TestGone(t *testing.T) {
	w := newWorld(t)
	w.put("here", "in the cache")
	w.put("there", "not in the cache")
	m := w.mount(serving{TTL: time.Hour, Deadline: 2 * time.Second})
	m.want("here", "in the cache")
	if _, err := os.Stat(m.path + "/there"); err != nil {
		t.Fatal(err)
	}
	w.faults.set(0, true, "")
	m.want("here", "in the cache")
	_, err := os.ReadFile(m.path + "/there")
	m.wantErr("read", err, syscall.EIO)
	_, err = os.Stat(m.path + "/unknown")
	m.wantErr("stat", err, syscall.EIO)
	_, err = os.ReadDir(m.path)
	m.wantErr("list", err, syscall.EIO)
	m.wantErr("mkdir", os.Mkdir(m.path+"/d", 0o755), syscall.EIO)
	if s := m.status(); s.Connected || s.LastError == "" {
		t.Errorf("status: %+v", s)
	}
	w.faults.set(0, false, "")
	m.want("there", "not in the cache")
	if s := m.status(); !s.Connected || s.LastError != "" {
		t.Errorf("status: %+v", s)
	}
}

// TestFailedClose: an upload that is refused is an error of close; the file is kept, and
// offered again.
func TestFailedClose(t *testing.T) {
	w := newWorld(t)
	w.put("f", "old")
	m := w.mount(serving{})
	w.faults.set(0, false, "write")
	f, err := os.Create(m.path + "/f")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("new"); err != nil {
		t.Fatal(err)
	}
	m.wantErr("fsync", f.Sync(), syscall.EACCES)
	m.wantErr("close", f.Close(), syscall.EACCES)
	m.want("f", "new")
	if got := w.get("f"); got != "old" {
		t.Errorf("the object: %q", got)
	}
	if s := m.status(); s.Unsent != 1 || s.UnsentBytes != 3 || s.Oldest.IsZero() || !strings.Contains(s.LastError, "refused for the test") {
		t.Errorf("status: %+v", s)
	}
	m.wantErr("another", os.WriteFile(m.path+"/g", []byte("g"), 0o600), syscall.EACCES)
	if err := os.Remove(m.path + "/g"); err != nil { // whoever gives it up removes it
		t.Error(err)
	}
	w.faults.set(0, false, "")
	eventually(t, "uploaded", func() error {
		if s := m.status(); s.Unsent != 0 || w.get("f") != "new" {
			return fmt.Errorf("%+v, %q", s, w.get("f"))
		}
		return nil
	})
	m.want("f", "new")
	if got := w.get("g"); got != "<none>" {
		t.Errorf("a file that was removed: %q", got)
	}
}

// kill ends the server without a word.
func (m *mounted) kill() {
	m.t.Helper()
	_ = m.cmd.Process.Kill()
	<-m.done
	m.abort()
	if err := syscall.Unmount(m.path, syscall.MNT_DETACH); err != nil {
		m.t.Error(err)
	}
}

// TestMountLost: the mount ends with files that were closed, which the next life uploads,
// and files that were not, which never replace an object.
func TestMountLost(t *testing.T) {
	w := newWorld(t)
	w.put("torn", "whole")
	dir := t.TempDir()
	m := w.mount(serving{Dir: dir})
	w.faults.set(0, false, "write")
	f, err := os.OpenFile(m.path+"/torn", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("X"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.path+"/closed", []byte("closed"), 0o600); !errors.Is(err, syscall.EACCES) {
		t.Fatal(err)
	}
	m.kill()
	w.faults.set(0, false, "")
	next := w.mount(serving{Dir: dir})
	eventually(t, "uploaded by the next life", func() error {
		if got := w.get("closed"); got != "closed" {
			return errors.New(got)
		}
		return nil
	})
	next.want("torn", "whole")
	if got := w.get("torn"); got != "whole" {
		t.Errorf("a file that was never closed: %q", got)
	}
	eventually(t, "nothing staged", func() error {
		left, err := os.ReadDir(filepath.Join(dir, stagedDir))
		if err != nil || len(left) > 0 {
			return fmt.Errorf("%v, %v", left, err)
		}
		return nil
	})
}

// TestReplaced: a handle never mixes two versions.
func TestReplaced(t *testing.T) {
	w := newWorld(t)
	old := strings.Repeat("a", 4<<20)
	w.put("f", old)
	m := w.mount(serving{TTL: 50 * time.Millisecond})
	f, err := os.Open(m.path + "/f")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 4096)
	if _, err := f.ReadAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	w.put("f", strings.Repeat("b", 4<<20))
	time.Sleep(100 * time.Millisecond)
	// A fresh look finds the new one, which the old handle is not.
	if got, err := os.ReadFile(m.path + "/f"); err != nil || strings.Contains(string(got), "a") || len(got) != len(old) {
		t.Errorf("a new handle: %d bytes, %v", len(got), err)
	}
	// Bypassing what the kernel has: the server itself must refuse.
	d, err := os.OpenFile(m.path+"/f", os.O_RDONLY|syscall.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	w.put("f", strings.Repeat("c", 4<<20))
	time.Sleep(100 * time.Millisecond)
	if _, err := os.Stat(m.path + "/f"); err != nil {
		t.Fatal(err)
	}
	_, err = d.ReadAt(make([]byte, 4096), 3<<20)
	m.wantErr("a handle of an older version", err, syscall.ESTALE)
}

// TestDamagedCache: a chunk that was altered on disk is fetched again.
func TestDamagedCache(t *testing.T) {
	w := newWorld(t)
	content := strings.Repeat("0123456789", 150_000)
	w.put("f", content)
	dir := t.TempDir()
	m := w.mount(serving{Dir: dir})
	m.want("f", content)
	m.close()
	chunks, err := filepath.Glob(filepath.Join(dir, cacheDir, "*", "*"))
	if err != nil || len(chunks) != 2 {
		t.Fatalf("chunks %v, %v", chunks, err)
	}
	for i, path := range chunks {
		if i == 0 {
			err = os.Truncate(path, 100)
		} else {
			err = os.WriteFile(path, bytes.Repeat([]byte("x"), 1000), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	next := w.mount(serving{Dir: dir})
	next.want("f", content)
}

// TestStageFull: what may be written is bounded.
func TestStageFull(t *testing.T) {
	w := newWorld(t)
	w.put("large", strings.Repeat("l", 2<<20))
	m := w.mount(serving{Staged: 1 << 20})
	m.wantErr("a large file", os.WriteFile(m.path+"/f", make([]byte, 2<<20), 0o600), syscall.ENOSPC)
	f, err := os.OpenFile(m.path+"/large", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteString("x")
	m.wantErr("a change of a large object", err, syscall.ENOSPC)
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if got := w.get("large"); len(got) != 2<<20 || strings.Contains(got, "x") {
		t.Error("the object has changed")
	}
	m.sh("rm -f f; echo small > small; test $(cat small) = small")
}
