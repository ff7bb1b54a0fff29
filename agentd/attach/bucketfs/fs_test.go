package bucketfs

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Error(err)
	}
	var out []string
	for _, e := range entries {
		name := e.Name()
		if e.IsDir() {
			name += "/"
		}
		out = append(out, name)
	}
	return strings.Join(out, " ")
}

func TestReadAndList(t *testing.T) {
	w := newWorld(t)
	big := make([]byte, 5<<20+123)
	for i := range big {
		big[i] = byte(rand.Uint32())
	}
	w.put("a.csv", "x,y\n1,2\n")
	w.put("big", string(big))
	w.put("dir/deep/f", "deep")
	w.put("marked/", "")
	w.put("empty", "")
	m := w.mount(serving{})
	if got := names(t, m.path); got != "a.csv big dir/ empty marked/" {
		t.Errorf("root: %s", got)
	}
	if got := names(t, m.path+"/dir"); got != "deep/" {
		t.Errorf("dir: %s", got)
	}
	if got := names(t, m.path+"/marked"); got != "" {
		t.Errorf("marked: %s", got)
	}
	m.want("a.csv", "x,y\n1,2\n")
	m.want("dir/deep/f", "deep")
	m.want("empty", "")
	m.want("big", string(big))
	f, err := os.Open(m.path + "/big")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 70_000)
	for range 50 {
		off := rand.Int64N(int64(len(big)))
		n, _ := f.ReadAt(buf, off)
		if !bytes.Equal(buf[:n], big[off:off+int64(n)]) || n < min(len(buf), len(big)-int(off)) {
			t.Fatalf("read at %d: %d bytes, not the right ones", off, n)
		}
	}
	_, err = os.Stat(m.path + "/nothing")
	m.wantErr("stat of what is not there", err, syscall.ENOENT)
	_, err = os.Stat(m.path + "/" + strings.Repeat("n", 300))
	m.wantErr("stat of a long name", err, syscall.ENAMETOOLONG)
}

func TestWrite(t *testing.T) {
	w := newWorld(t)
	m := w.mount(serving{})
	m.write("new", "hello")
	if got := w.get("new"); got != "hello" {
		t.Errorf("after close: %q", got)
	}
	m.write("new", "other")
	m.want("new", "other")
	// In the midst of a file.
	f, err := os.OpenFile(m.path+"/new", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("HER"), 2); err != nil {
		t.Error(err)
	}
	if got := w.get("new"); got != "other" {
		t.Errorf("before close: %q", got)
	}
	m.want("new", "otHER") // on this host at once
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
	if got := w.get("new"); got != "otHER" {
		t.Errorf("after fsync: %q", got)
	}
	if err := f.Truncate(3); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if got := w.get("new"); got != "otH" {
		t.Errorf("after truncate: %q", got)
	}
	m.sh(`echo more >> new; test "$(cat new)" = otHmore; touch t; test -f t; truncate -s 5 t`)
	if got := w.get("t"); got != "\x00\x00\x00\x00\x00" {
		t.Errorf("touched and truncated: %q", got)
	}
	if s := m.status(); s.Unsent != 0 {
		t.Errorf("unsent: %+v", s)
	}
	_, err = os.OpenFile(m.path+"/new", os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	m.wantErr("O_EXCL", err, syscall.EEXIST)
}

func TestNames(t *testing.T) {
	w := newWorld(t)
	w.put("implicit/only", "x")
	w.put("b", "b")
	m := w.mount(serving{})
	m.sh(`mkdir -p d/e; echo 1 > d/e/one; mv d/e/one d/two; test "$(cat d/two)" = 1; test ! -e d/e/one`)
	if w.get("d/two") != "1\n" || w.get("d/e/one") != "<none>" || w.get("d/e/") != "" {
		t.Error("the bucket has other objects")
	}
	m.write("a", "a")
	if err := os.Rename(m.path+"/a", m.path+"/b"); err != nil {
		t.Error(err)
	}
	m.want("b", "a")
	if w.get("b") != "a" || w.get("a") != "<none>" {
		t.Error("a rename over a file")
	}
	m.write("c", "c")
	m.wantErr("RENAME_NOREPLACE", unix.Renameat2(unix.AT_FDCWD, m.path+"/c", unix.AT_FDCWD, m.path+"/b", unix.RENAME_NOREPLACE), syscall.EEXIST)
	m.wantErr("rename of a directory", os.Rename(m.path+"/d", m.path+"/dd"), syscall.EXDEV)
	m.sh(`mv d dd; test "$(cat dd/two)" = 1; rm -r dd; test ! -e dd`)
	m.wantErr("rmdir of a full one", syscall.Rmdir(m.path+"/implicit"), syscall.ENOTEMPTY)
	m.sh(`rm -r implicit; test ! -e implicit`)
	m.wantErr("mkdir", os.Mkdir(m.path+"/b", 0o755), syscall.EEXIST)
	m.wantErr("symlink", os.Symlink("b", m.path+"/s"), syscall.EPERM)
	m.wantErr("link", os.Link(m.path+"/b", m.path+"/l"), syscall.EPERM)
	m.wantErr("mknod", syscall.Mkfifo(m.path+"/p", 0o600), syscall.EPERM)
	m.wantErr("chmod", os.Chmod(m.path+"/b", 0o777), syscall.EPERM)
	m.wantErr("chown", os.Chown(m.path+"/b", 1, 1), syscall.EPERM)
	m.wantErr("utimes", os.Chtimes(m.path+"/b", time.Unix(1, 0), time.Unix(1, 0)), syscall.EPERM)
	m.wantErr("a newline", os.WriteFile(m.path+"/a\nb", nil, 0o600), syscall.EINVAL)
	m.wantErr("no UTF-8", os.WriteFile(m.path+"/a\xff", nil, 0o600), syscall.EINVAL)
	m.wantErr("an escape", os.WriteFile(m.path+"/__0x2f__", nil, 0o600), syscall.EINVAL)
	long := strings.Repeat("d", 250)
	if err := os.MkdirAll(filepath.Join(m.path, long, long, long), 0o755); err != nil {
		t.Error(err)
	}
	m.wantErr("a long key", os.WriteFile(filepath.Join(m.path, long, long, long, long+"123456789012345678901234"[:20]), nil, 0o600), syscall.ENAMETOOLONG)
}

func TestUnlinkedWhileOpen(t *testing.T) {
	w := newWorld(t)
	m := w.mount(serving{})
	f, err := os.Create(m.path + "/f")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("one"); err != nil {
		t.Error(err)
	}
	if err := os.Remove(f.Name()); err != nil {
		t.Error(err)
	}
	if _, err := f.WriteString("two"); err != nil {
		t.Error(err)
	}
	buf := make([]byte, 10)
	if n, _ := f.ReadAt(buf, 0); string(buf[:n]) != "onetwo" {
		t.Errorf("an unlinked file: %q", buf[:n])
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if got := w.get("f"); got != "<none>" {
		t.Errorf("it came back: %q", got)
	}
	eventually(t, "no stage left", func() error {
		if s := m.status(); s.Unsent != 0 || s.UnsentBytes != 0 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

func TestManyEntries(t *testing.T) {
	w := newWorld(t)
	var want []string
	for i := range 2600 {
		name := fmt.Sprintf("f%05d", i)
		w.put("many/"+name, "x")
		want = append(want, name)
	}
	// A directory of a file's name, a page later, and in the same page.
	w.put("many/f", "hidden")
	w.put("many/f/x", "x")
	w.put("many/z", "hidden")
	w.put("many/z/x", "x")
	m := w.mount(serving{})
	entries, err := os.ReadDir(m.path + "/many")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	want = append(want, "f", "z")
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("%d names, want %d", len(got), len(want))
	}
	for _, name := range []string{"f", "z"} {
		if st, err := os.Stat(m.path + "/many/" + name); err != nil || !st.IsDir() {
			t.Errorf("%s: %v, %v", name, st, err)
		}
	}
	before := w.faults.count()
	if got := m.sh("ls -l many | wc -l"); strings.TrimSpace(got) != "2603" {
		t.Errorf("ls -l: %s", got)
	}
	if n := w.faults.count() - before; n > 60 {
		t.Errorf("ls -l of 2602 entries took %d requests", n)
	}
	if s := m.status(); s.Hidden == 0 {
		t.Error("hidden keys are not counted")
	}
}

// TestReadOnly wants every change refused by the mount itself, and the bucket as it was.
func TestReadOnly(t *testing.T) {
	w := newWorld(t)
	w.put("f", "f")
	w.put("d/", "")
	m := w.mount(serving{ReadOnly: true})
	m.want("f", "f")
	m.wantErr("write", os.WriteFile(m.path+"/f", []byte("x"), 0o600), syscall.EROFS)
	m.wantErr("create", os.WriteFile(m.path+"/new", []byte("x"), 0o600), syscall.EROFS)
	m.wantErr("mkdir", os.Mkdir(m.path+"/new", 0o700), syscall.EROFS)
	m.wantErr("rmdir", syscall.Rmdir(m.path+"/d"), syscall.EROFS)
	if info, err := os.Stat(m.path + "/f"); err != nil || info.Mode() != 0o444 {
		t.Errorf("the file's mode: %v, %v", info, err)
	}
	m.wantErr("truncate", os.Truncate(m.path+"/f", 0), syscall.EROFS)
	m.wantErr("rename", os.Rename(m.path+"/f", m.path+"/g"), syscall.EROFS)
	m.wantErr("remove", syscall.Unlink(m.path+"/f"), syscall.EROFS)
	m.want("f", "f")
	if got := names(t, m.path); got != "d/ f" {
		t.Errorf("there is %q", got)
	}
}
