package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/e2e/stack"
)

// asToken runs postern with another token.
func asToken(t *testing.T, s *stack.Stack, token string, args ...string) ended {
	t.Helper()
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	return postern(t, s, append(args, "--token-file", file)...)
}

// describe is a tree as text: modes, times, contents and targets.
func describe(t *testing.T, root string) string {
	t.Helper()
	var out strings.Builder
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, name)
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(name)
			fmt.Fprintf(&out, "%q -> %q\n", rel, target)
			return err
		case d.IsDir():
			fmt.Fprintf(&out, "%q/\n", rel)
		default:
			content, err := os.ReadFile(name)
			fmt.Fprintf(&out, "%q %v %d %x\n", rel, info.Mode(), info.ModTime().UnixNano(), content)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// TestFiles puts trees of hostile names into a workspace and gets them back.
func TestFiles(t *testing.T) {
	s := newStack(t, stack.Options{})
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	names := []string{
		"plain", "with space", " leading", "trailing ", "-rf", "new\nline", "tab\t", "\xff\xfe invalid", "quote'\"`$(x)", "ünïcødé", "a:b", "%2e%2e", "?#&", "\\back\\slash",
		"~", "..." + strings.Repeat("x", 252), strings.Repeat("é", 127), ".hidden", "*", "\x1b[31m", "CON", "nul.",
	}
	for i := range 1000 {
		names = append(names, fmt.Sprintf("many/%d/%d", i%10, i))
	}
	for i, name := range names {
		file := filepath.Join(tree, fmt.Sprint("d", i%3), name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, bytes.Repeat([]byte{byte(i)}, i*7), fs.FileMode(0o600+i%2*0o055)); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(file, time.Unix(1_600_000_000, int64(i)), time.Unix(1_600_000_000, int64(i)*1001)); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{"out": "../../etc/passwd", "abs": "/etc/passwd", "in": "d0/plain", "loop": "loop"} {
		if err := os.Symlink(target, filepath.Join(tree, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(tree, "empty"), 0o755); err != nil {
		t.Fatal(err)
	}

	if got := postern(t, s, "file", "put", "-r", tree, "w:/"); got.code != 0 || !strings.Contains(got.stderr, "workspace w is made") {
		t.Fatalf("got %+v", got)
	}
	back := filepath.Join(dir, "back")
	must(t, s, "file", "get", "-r", "w:/tree", back)
	if got, want := describe(t, back), describe(t, tree); got != want {
		t.Errorf("what came back differs:\n%s\nwant\n%s", got, want)
	}
	// Again: nothing is sent, nothing is gotten.
	if got := postern(t, s, "file", "put", "-r", tree, "w:/"); got.code != 0 || !strings.Contains(got.stderr, "0 B sent, 1,026 files were there") {
		t.Errorf("put again: %+v", got)
	}
	if got := postern(t, s, "file", "get", "-r", "w:/tree", dir); got.code != 0 || !strings.Contains(got.stderr, "1,022 files were there") {
		t.Errorf("get again: %+v", got)
	}
	if got := postern(t, s, "file", "ls", "w:/tree/d0"); strings.ContainsAny(got.stdout, "\x1b\t") || strings.Contains(got.stdout, "\xff") || strings.Count(got.stdout, "\n") != 9 {
		t.Errorf("listing: %+v", got)
	}

	// One file's life.
	file := filepath.Join(dir, "notes.md")
	for i := range 3 {
		if err := os.WriteFile(file, fmt.Appendf(nil, "version %d\n", i+1), 0o644); err != nil {
			t.Fatal(err)
		}
		must(t, s, "file", "put", file, "w:/notes.md")
	}
	if got := must(t, s, "file", "cat", "w:/notes.md"); got != "version 3" {
		t.Errorf("got %q", got)
	}
	versions := mustJSON[[]struct {
		Version string
		Current bool
		By      string
	}](t, s, "file", "history", "w:/notes.md")
	if len(versions) != 3 || !versions[0].Current || versions[0].By != "token admin" {
		t.Fatalf("versions: %+v", versions)
	}
	if got := must(t, s, "file", "cat", "--version", versions[2].Version, "w:/notes.md"); got != "version 1" {
		t.Errorf("the oldest version: %q", got)
	}
	must(t, s, "file", "restore", "--version", versions[2].Version, "w:/notes.md")
	if got := must(t, s, "file", "cat", "w:/notes.md"); got != "version 1" {
		t.Errorf("restored: %q", got)
	}
	must(t, s, "file", "mv", "w:/notes.md", "w:/tree/empty/")
	must(t, s, "file", "rm", "w:/tree/empty/notes.md")
	postern(t, s, "file", "cat", "w:/tree/empty/notes.md").said(t, 4, "not found")
	must(t, s, "file", "restore", "w:/tree/empty/notes.md")
	if got := must(t, s, "file", "cat", "w:/tree/empty/notes.md"); got != "version 1" {
		t.Errorf("out of the trash: %q", got)
	}
	// Two writers: both are kept.
	postern(t, s, "file", "put", "--base", versions[2].Version, file, "w:/tree/empty/notes.md").said(t, 1, "is kept as")
	if got := must(t, s, "file", "conflicts", "w"); !strings.Contains(got, "/tree/empty/notes.md") {
		t.Errorf("conflicts: %q", got)
	}
	// A snapshot of all.
	must(t, s, "workspace", "snapshot", "create", "w", "before")
	must(t, s, "file", "rm", "-r", "w:/tree")
	must(t, s, "workspace", "snapshot", "restore", "w", "before")
	if got := must(t, s, "file", "cat", "w:/tree/empty/notes.md"); got != "version 1" {
		t.Errorf("out of the snapshot: %q", got)
	}
	// Archives.
	for _, format := range []string{"tar", "zip"} {
		archive := filepath.Join(dir, "w."+format)
		must(t, s, "file", "get", "w:/", "--format", format, archive)
		list := exec.Command("tar", "tf", archive)
		if format == "zip" {
			list = exec.Command("python3", "-m", "zipfile", "-l", archive)
		}
		if out, err := list.CombinedOutput(); err != nil || !strings.Contains(string(out), "tree/empty/notes.md") {
			t.Errorf("%s: %v: %s", format, err, out)
		}
	}

	// Who may not, and what is not there.
	viewer := must(t, s, "token", "create", "looker", "--role", "viewer")
	asToken(t, s, viewer, "file", "put", file, "w:/x").said(t, 3, "needs analyst")
	if got := asToken(t, s, viewer, "file", "cat", "w:/tree/empty/notes.md"); got.code != 0 || got.stdout != "version 1\n" {
		t.Errorf("a viewer reads: %+v", got)
	}
	other := strings.Fields(must(t, s, "org", "create", "other"))
	asToken(t, s, other[len(other)-1], "file", "ls", "w:/").said(t, 4, "not found")
	postern(t, s, "file", "get", "nowhere:/x").said(t, 4, "not found")
	postern(t, s, "file", "get", "w:/../etc/passwd").said(t, 2, "..")
	postern(t, s, "file", "get", "w:/tree", dir).said(t, 2, "use -r")
	postern(t, s, "file", "put", tree, "w:/").said(t, 2, "use -r")
	postern(t, s, "file", "put", filepath.Join(dir, "none"), "w:/").said(t, 1, "no such file")
	// The quota is one line, and leaves what was there.
	must(t, s, "workspace", "set", "w", "--quota", "1MiB")
	big := filepath.Join(dir, "big")
	if err := os.WriteFile(big, bytes.Repeat([]byte("quota"), 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := postern(t, s, "file", "put", big, "w:/tree/empty/notes.md"); got.code != 1 || !strings.Contains(got.stderr, "quota") || strings.Count(got.stderr, "\n") != 1 {
		t.Errorf("over quota: %+v", got)
	}
	if got := must(t, s, "file", "cat", "w:/tree/empty/notes.md"); got != "version 1" {
		t.Errorf("after the quota: %q", got)
	}
	auditVerifies(t, s)
}

// TestFileTransfersResume kills the client and the control plane in the midst of
// transfers: run again, they send and get what is missing.
func TestFileTransfersResume(t *testing.T) {
	s := newStack(t, stack.Options{})
	dir := t.TempDir()
	size := int64(120 << 20)
	if os.Getenv("POSTERN_LONG") != "" {
		size = 300 << 20
	}
	content := make([]byte, size)
	rand.Read(content) //nolint:errcheck // it never fails
	file := filepath.Join(dir, "big")
	if err := os.WriteFile(file, content, 0o644); err != nil {
		t.Fatal(err)
	}
	must(t, s, "workspace", "create", "w")

	// The client is killed while it sends; how much lies with the server is seen at the disk.
	stored := func() int64 {
		var sum int64
		filepath.WalkDir(filepath.Join(s.DataDir(), "blob"), func(_ string, d fs.DirEntry, err error) error { //nolint:errcheck // files come and go
			if err == nil && d.Type().IsRegular() {
				if info, err := d.Info(); err == nil {
					sum += info.Size()
				}
			}
			return nil
		})
		return sum
	}
	reach := func(what string, part int64, now func() int64) {
		t.Helper()
		for end := time.Now().Add(50 * time.Second); now() < part; time.Sleep(2 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: %d of %d bytes", what, now(), part)
			}
		}
	}
	put := s.Command(t.Context(), "file", "put", file, "w:/big")
	if err := put.Start(); err != nil {
		t.Fatal(err)
	}
	reach("put", size/4, stored)
	put.Process.Kill() //nolint:errcheck // it may just have ended
	put.Wait()         //nolint:errcheck // it was killed
	postern(t, s, "file", "cat", "w:/big").said(t, 4, "not found")
	before := stored()

	// The control plane is killed while the next one goes on; that one waits for it.
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	put = s.Command(ctx, "file", "put", "-r", dir, "w:/copy")
	var said bytes.Buffer
	put.Stderr = &said
	if err := put.Start(); err != nil {
		t.Fatal(err)
	}
	reach("put again", max(before+1, size/2), stored)
	s.ControlPlane.Kill()
	time.Sleep(300 * time.Millisecond)
	if err := s.StartControlPlane(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := put.Wait(); err != nil {
		t.Fatalf("%v: %s", err, said.String())
	}
	sent := regexp.MustCompile(`([0-9.]+) MiB sent`).FindStringSubmatch(said.String())
	var mib float64
	if sent == nil {
		t.Fatalf("%q", said.String())
	}
	fmt.Sscan(sent[1], &mib) //nolint:errcheck // matched
	if most := float64(size-before)/(1<<20) + 60; mib > most {
		t.Errorf("%.1f MiB were sent, at most %.1f were missing", mib, most)
	}
	// What was under way at the kills may lie there twice, until it is collected.
	if now := stored(); now > size+2*48<<20 {
		t.Errorf("%d bytes are stored for a file of %d", now, size)
	}

	// And back: killed, then gone on with.
	out := filepath.Join(dir, "out")
	get := s.Command(t.Context(), "file", "get", "w:/copy/big", out)
	if err := get.Start(); err != nil {
		t.Fatal(err)
	}
	part := func() int64 {
		found, _ := filepath.Glob(filepath.Join(dir, ".postern-*.part"))
		if len(found) == 0 {
			return 0
		}
		info, err := os.Stat(found[0])
		if err != nil {
			return size // it is complete
		}
		return info.Size()
	}
	reach("get", size/4, part)
	get.Process.Kill() //nolint:errcheck // it may just have ended
	get.Wait()         //nolint:errcheck // it was killed
	get = s.Command(ctx, "file", "get", "w:/copy/big", out)
	get.Stderr = os.Stderr
	have := part()
	if err := get.Start(); err != nil {
		t.Fatal(err)
	}
	reach("get again", have+1, part)
	s.ControlPlane.Kill()
	time.Sleep(300 * time.Millisecond)
	if err := s.StartControlPlane(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := get.Wait(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(out)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("%v, %d bytes that differ", err, len(got))
	}
	if found, _ := filepath.Glob(filepath.Join(dir, ".postern-*")); len(found) != 0 {
		t.Errorf("left over: %v", found)
	}

	// A part that was damaged on our disk is noticed, and gotten anew.
	if err := os.Remove(out); err != nil {
		t.Fatal(err)
	}
	get = s.Command(t.Context(), "file", "get", "w:/copy/big", out)
	if err := get.Start(); err != nil {
		t.Fatal(err)
	}
	reach("get for damage", size/4, part)
	get.Process.Kill() //nolint:errcheck // it may just have ended
	get.Wait()         //nolint:errcheck // it was killed
	if found, _ := filepath.Glob(filepath.Join(dir, ".postern-*.part")); len(found) == 1 {
		f, err := os.OpenFile(found[0], os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Pwrite(int(f.Fd()), []byte("damage"), 1<<20); err != nil {
			t.Fatal(err)
		}
		f.Close() //nolint:errcheck // it was written
	}
	must(t, s, "file", "get", "w:/copy/big", out)
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, content) {
		t.Errorf("after damage: %v, %d bytes that differ", err, len(got))
	}
}

// TestFilesSparse: a file with holes has holes at the control plane and when it is gotten.
func TestFilesSparse(t *testing.T) {
	s := newStack(t, stack.Options{})
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 10_000)
	rand.Read(data) //nolint:errcheck // it never fails
	for _, off := range []int64{0, 30<<20 + 123} {
		if _, err := f.WriteAt(data, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Truncate(64<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	must(t, s, "file", "put", f.Name(), "w:/sparse")
	must(t, s, "file", "get", "w:/sparse", filepath.Join(dir, "back"))
	want, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(dir, "back"))
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("what came back differs: %d bytes, %v", len(got), err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "back"), &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 > 256<<10 {
		t.Errorf("it takes %d bytes on disk", st.Blocks*512)
	}
}
