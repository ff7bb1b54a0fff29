package mountd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/attach/fdkeeper"
	"github.com/postern-dev/postern/agentd/attach/fuseserver"
	"github.com/postern-dev/postern/proto"
)

type running struct {
	t       *testing.T
	dir     string
	client  Client
	keeper  *os.Process
	control *fuseserver.Control
}

func start(t *testing.T) *running {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
	control, err := fuseserver.OpenControl()
	if err != nil {
		t.Fatal(err)
	}
	r := &running{t: t, dir: t.TempDir(), control: control}
	r.client = Client{Dir: r.dir}
	if err := os.WriteFile(filepath.Join(r.dir, "f"), []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	command, env := role("keeper", r.dir)
	r.keeper, err = fdkeeper.Spawn(t.Context(), fdkeeper.SpawnConfig{Command: command, Env: env, LogFile: filepath.Join(r.dir, "log")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.end)
	r.eventually("mountd", func() error { _, err := r.client.Status(t.Context()); return err })
	return r
}

func (r *running) end() {
	if r.t.Failed() {
		log, _ := os.ReadFile(filepath.Join(r.dir, "log"))
		r.t.Logf("log:\n%s", log)
	}
	if r.keeper != nil {
		_ = r.keeper.Signal(syscall.SIGTERM)
		_, _ = r.keeper.Wait()
	}
	for _, pid := range r.processes() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	r.eventually("the end of all processes", func() error {
		if left := r.processes(); len(left) > 0 {
			return fmt.Errorf("processes %v", left)
		}
		return nil
	})
	_ = r.control.Close()
}

func (r *running) processes() (out []int) {
	found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range found {
		text, _ := os.ReadFile(path)
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if bytes.Contains(text, []byte(r.dir)) && pid != os.Getpid() {
			out = append(out, pid)
		}
	}
	return out
}

func (r *running) eventually(what string, ok func() error) {
	r.t.Helper()
	var err error
	for until := time.Now().Add(time.Minute); time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
		if err = ok(); err == nil {
			return
		}
	}
	r.t.Errorf("%s: %v", what, err)
}

// mount attaches a workspace and mounts it on a new directory.
func (r *running) mount(h Holder) string {
	r.t.Helper()
	dir := r.t.TempDir()
	if h.Name == "" {
		h.Name = "host:" + dir
	}
	if _, err := r.client.Attach(r.t.Context(), h); err != nil {
		r.t.Fatal(err)
	}
	tree, err := r.client.Tree(r.t.Context(), h.Workspace, h.Name)
	if err != nil {
		r.t.Fatal(err)
	}
	defer tree.Close()
	if err := unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// use runs this program in a role that touches a mount; it is freed if it hangs.
func (r *running) use(name, dir string, args ...string) string {
	r.t.Helper()
	command, env := role(name, append([]string{filepath.Join(dir, "f")}, args...)...)
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Env = env
	var out bytes.Buffer
	cmd.Stdout = &out
	var st unix.Statx_t
	_ = unix.Statx(unix.AT_FDCWD, dir, unix.AT_STATX_DONT_SYNC, 0, &st)
	ctx, cancel := context.WithTimeout(context.Background(), 40*time.Second)
	defer cancel()
	defer context.AfterFunc(ctx, func() { r.t.Error("a user of the mount hangs"); _ = r.control.Abort(st.Dev_minor) })()
	if err := cmd.Run(); err != nil {
		r.t.Error(err)
	}
	return strings.TrimSpace(out.String())
}

func (r *running) wantRead(dir string) {
	r.t.Helper()
	if got := r.use("read", dir, "0s"); !strings.HasPrefix(got, `"12345" 0`) {
		r.t.Errorf("read: %s", got)
	}
}

func (r *running) status() Status {
	r.t.Helper()
	s, err := r.client.Status(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

func TestMountAndUnmount(t *testing.T) {
	r := start(t)
	dir := r.mount(Holder{Workspace: "books"})
	r.wantRead(dir)
	if got := r.use("write", dir); got != "0" {
		t.Errorf("write: errno %s", got)
	}
	// Another holder shares it; read-only holds for its own mount alone.
	ro := r.mount(Holder{Workspace: "books", ReadOnly: true})
	if got := r.use("write", ro); got != strconv.Itoa(int(syscall.EROFS)) {
		t.Errorf("write to a read-only mount: errno %s", got)
	}
	// A kernel's is a superblock of its own.
	kernel := r.mount(Holder{Workspace: "books", Name: "kernel:1", Squash: true})
	if got := r.use("read", kernel, "0s"); !strings.HasPrefix(got, `"67890" 0`) {
		t.Errorf("read in a kernel's mount: %s", got)
	}
	if s := r.status(); len(s.Workspaces) != 1 || len(s.Holders) != 3 || s.Workspaces[0].Mounts != 3 || !s.Keeper {
		t.Errorf("status: %+v", s)
	}
	for _, d := range []string{dir, ro, kernel} {
		if err := unix.Unmount(d, 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range []string{"host:" + dir, "host:" + ro, "kernel:1", "kernel:1"} {
		if err := r.client.Detach(t.Context(), "", h); err != nil {
			t.Errorf("detach %s: %v", h, err)
		}
	}
	r.eventually("nothing left", func() error {
		if s := r.status(); len(s.Holders)+len(s.Workspaces) > 0 {
			return fmt.Errorf("%+v", s)
		}
		if left, _ := filepath.Glob(filepath.Join(r.dir, "*.backings")); len(left) > 0 {
			return fmt.Errorf("files %v", left)
		}
		return nil
	})
	if err := r.client.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st, err := r.keeper.Wait(); err != nil || !st.Success() {
		t.Errorf("the keeper after the shutdown: %v, %v", st, err)
	}
	r.keeper = nil
}

func TestRefusals(t *testing.T) {
	r := start(t)
	for _, c := range []struct {
		name string
		h    Holder
		code proto.Code
	}{
		{"policy", Holder{Workspace: "secret", Name: "host:/x"}, proto.CodePolicyDenied},
		{"read-only by policy", Holder{Workspace: "ro1", Name: "host:/x"}, proto.CodePolicyDenied},
		{"no such workspace", Holder{Workspace: "missing", Name: "host:/x"}, proto.CodeNotFound},
		{"no holder", Holder{Workspace: "a", Name: "somebody"}, proto.CodeInvalid},
		{"relative directory", Holder{Workspace: "a", Name: "host:x/../y"}, proto.CodeInvalid},
	} {
		if _, err := r.client.Attach(t.Context(), c.h); proto.CodeOf(err) != c.code {
			t.Errorf("%s: %v, want %v", c.name, err, c.code)
		}
	}
	if _, err := r.client.Tree(t.Context(), "a", "host:/x"); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("a mount that nobody asked for: %v", err)
	}
	h := Holder{Workspace: "ro1", Name: "host:/x", ReadOnly: true}
	if _, err := r.client.Attach(t.Context(), h); err != nil {
		t.Error(err)
	}
	if err := r.client.Shutdown(t.Context()); err == nil {
		t.Error("mountd went although a workspace is mounted")
	}
}

func TestUnsent(t *testing.T) {
	r := start(t)
	dir := r.mount(Holder{Workspace: "books"})
	if err := os.WriteFile(filepath.Join(r.dir, "unsent"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err := r.client.Settle(t.Context(), "books", "host:"+dir, 50*time.Millisecond)
	if proto.CodeOf(err) != proto.CodeUnavailable || !strings.Contains(err.Error(), "1000 bytes") {
		t.Errorf("with unsent writes: %v", err)
	}
	details, err := r.client.Details(t.Context(), "books")
	if err != nil || len(details.Unsent) != 300 || len(details.Conflicts) != 1 || string(details.Conflicts[0].KeptAs) != "/a (conflict)" {
		t.Errorf("%d paths, conflicts %+v, %v", len(details.Unsent), details.Conflicts, err)
	}
	for i, path := range details.Unsent {
		if !bytes.HasPrefix(path, fmt.Appendf(nil, "/%d\xff", i)) {
			t.Errorf("path %d: %.10q", i, path)
		}
	}
	if _, err := r.client.Details(t.Context(), "nowhere"); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("of a workspace that is not open: %v", err)
	}
	// Forced: the workspace goes on sending without a mount.
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.client.Detach(t.Context(), "books", "host:"+dir); err != nil {
		t.Fatal(err)
	}
	time.Sleep(beatEvery + beatEvery/2)
	if s := r.status(); len(s.Workspaces) != 1 || s.Workspaces[0].UnsentOps != 3 || s.Workspaces[0].Mounts != 0 {
		t.Errorf("status after a forced detach: %+v", s)
	}
	if err := os.Remove(filepath.Join(r.dir, "unsent")); err != nil {
		t.Fatal(err)
	}
	r.eventually("the workspace is closed once all is sent", func() error {
		if s := r.status(); len(s.Workspaces) > 0 {
			return errors.New("still open")
		}
		return nil
	})
}

// TestKill kills mountd, its keeper, and replaces mountd, while a reader reads, and wants
// the reader to notice nothing but a short wait.
func TestKill(t *testing.T) {
	r := start(t)
	dir := r.mount(Holder{Workspace: "books"})
	result := make(chan string)
	go func() { result <- r.use("read", dir, "6s") }()
	for range 4 {
		time.Sleep(200 * time.Millisecond)
		if err := syscall.Kill(r.status().PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		r.eventually("mountd", func() error { _, err := r.client.Status(t.Context()); return err })
	}
	pid := r.status().PID
	if err := r.keeper.Kill(); err != nil {
		t.Fatal(err)
	}
	_, _ = r.keeper.Wait()
	r.keeper = nil
	r.eventually("another keeper", func() error {
		k, err := fdkeeper.Dial(r.dir)
		if err != nil {
			return err
		}
		defer k.Close()
		names, err := k.List()
		if err == nil && len(names) != 1 {
			err = fmt.Errorf("it has %v", names)
		}
		return err
	})
	if s := r.status(); s.PID != pid {
		t.Errorf("mountd did not survive its keeper")
	}
	k, err := fdkeeper.Dial(r.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	command, _ := role("mountd", r.dir)
	if err := k.Renew(command); err != nil {
		t.Fatal(err)
	}
	r.eventually("a new mountd", func() error {
		s, err := r.client.Status(t.Context())
		if err == nil && (s.PID == pid || len(s.Holders) != 1) {
			err = fmt.Errorf("%+v", s)
		}
		return err
	})
	got := <-result
	f := strings.Fields(got)
	if len(f) != 3 || f[0] != `"12345"` || f[1] != "0" {
		t.Fatalf("the reader saw %s", got)
	}
	t.Logf("the longest read took %s ms", f[2])
	r.wantRead(dir)
}
