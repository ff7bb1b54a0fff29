package fuseserver

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// mounted is a mount of a shelf: the test keeps the descriptor, as the keeper does, and
// the server is another process.
type mounted struct {
	t          *testing.T
	dir        string // of the mount
	shelf      string // of its files
	state      string
	m          *Mounted
	control    *Control
	deadline   time.Duration
	env        []string
	mu         sync.Mutex
	server     *exec.Cmd
	serverIn   io.Closer
	serverDone chan struct{}
}

func mount(t *testing.T) *mounted {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: FUSE mounts without fusermount")
	}
	control, err := OpenControl()
	if err != nil {
		t.Fatal(err)
	}
	m, err := NewMount(MountConfig{AllowOther: true})
	if err != nil {
		t.Fatal(err)
	}
	h := &mounted{t: t, dir: t.TempDir(), shelf: t.TempDir(), state: t.TempDir(), m: m, control: control, deadline: DefaultDeadline}
	for _, name := range []string{"f0", "f1", "f2", "p0", "p1", "slow", "stuck"} {
		if err := os.WriteFile(filepath.Join(h.shelf, name), []byte("12345"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.MoveMount(int(m.Tree.Fd()), "", unix.AT_FDCWD, h.dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := control.Abort(m.Minor); err != nil {
			t.Error(err)
		}
		if err := unix.Unmount(h.dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
		h.kill()
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		if err := control.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

// helper is this program in another role; what it prints ends the wait for line.
func (h *mounted) helper(role string, args ...string) *exec.Cmd {
	c := exec.Command(os.Args[0], args...)
	c.Env = append(append(os.Environ(), "FUSESERVER_TEST_ROLE="+role), h.env...)
	c.Stderr = os.Stderr
	return c
}

// serve starts a server and returns its first line: "ready ..." or what is wrong.
func (h *mounted) serve() string {
	h.t.Helper()
	c := h.helper("serve", h.shelf, h.state, h.deadline.String())
	c.ExtraFiles = []*os.File{h.m.Dev}
	in, err := c.StdinPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		h.t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		h.t.Errorf("the server said nothing: %v", err)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Wait() }()
	h.mu.Lock()
	h.server, h.serverIn, h.serverDone = c, in, done
	h.mu.Unlock()
	return strings.TrimSpace(line)
}

// kill is kill -9 of the server.
func (h *mounted) kill() {
	h.mu.Lock()
	c, done := h.server, h.serverDone
	h.server = nil
	h.mu.Unlock()
	if c != nil {
		_ = c.Process.Kill()
		<-done
	}
}

// use starts a user and returns a function that waits for its only line.
func (h *mounted) use(args ...string) func() string {
	h.t.Helper()
	c := h.helper("use", append([]string{args[0], h.dir}, args[1:]...)...)
	var out bytes.Buffer
	c.Stdout = &out
	if err := c.Start(); err != nil {
		h.t.Fatal(err)
	}
	// Whoever waits for a mount that nobody serves does not die of SIGKILL.
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	stop := context.AfterFunc(ctx, func() {
		h.t.Error("a user of the mount hangs: connection aborted")
		_ = h.control.Abort(h.m.Minor)
	})
	return func() string {
		defer cancel()
		defer stop()
		_ = c.Wait()
		return strings.TrimSpace(out.String())
	}
}

// settled waits until every request is answered; those of closed files are nobody's.
func (h *mounted) settled() {
	h.t.Helper()
	for until := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		n, err := h.control.Waiting(h.m.Minor)
		if err == nil && n == 0 {
			return
		}
		if err != nil || time.Now().After(until) {
			h.t.Fatalf("waiting: %d, %v", n, err)
		}
	}
}

func TestFirstLife(t *testing.T) {
	h := mount(t)
	if line := h.serve(); !strings.HasPrefix(line, "ready") {
		t.Fatal(line)
	}
	got := h.use("read", "f0")()
	if !strings.HasPrefix(got, `"12345" errno 0`) {
		t.Errorf("read: %s", got)
	}
	h.settled()
}

// TestKill kills the server again and again while files are read, written, opened and
// looked at, and wants nobody to see an error, a wrong byte, or a wait of a second.
func TestKill(t *testing.T) {
	h := mount(t)
	if line := h.serve(); !strings.HasPrefix(line, "ready") {
		t.Fatal(line)
	}
	result := h.use("load", "4s")
	var worst time.Duration
	for range 20 {
		time.Sleep(150 * time.Millisecond)
		h.kill()
		began := time.Now()
		if line := h.serve(); !strings.HasPrefix(line, "ready") {
			t.Fatal(line)
		}
		worst = max(worst, time.Since(began))
	}
	got := result()
	var total, longest int
	if _, err := fmt.Sscanf(got, "ok %d %d", &total, &longest); err != nil {
		t.Fatalf("under load: %s", got)
	}
	t.Logf("%d operations, the longest %d ms; server back after at most %v", total, longest, worst)
	if total < 1000 {
		t.Errorf("only %d operations: that was no load", total)
	}
}

// TestLostRequest kills the server while it handles a read: the reader gets its bytes
// from the next one.
func TestLostRequest(t *testing.T) {
	h := mount(t)
	h.serve()
	result := h.use("read", "slow")
	for n := 0; n == 0; time.Sleep(5 * time.Millisecond) {
		var err error
		if n, err = h.control.Waiting(h.m.Minor); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(slowTime / 3)
	h.kill()
	if line := h.serve(); !strings.HasPrefix(line, "ready") {
		t.Fatal(line)
	}
	if got := result(); !strings.HasPrefix(got, `"12345" errno 0`) {
		t.Errorf("read: %s", got)
	}
}

// TestPassthrough reads through a file that was open before the server died: without any
// server, and with the next, where another open shares the backing.
func TestPassthrough(t *testing.T) {
	h := mount(t)
	line := h.serve()
	if line != "ready true 0" {
		t.Fatalf("no passthrough: %s", line)
	}
	c := h.helper("use", "hold", h.dir, "p0")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	pipe, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	out := bufio.NewReader(pipe)
	expect := func(want string) {
		t.Helper()
		line, err := out.ReadString('\n')
		if err != nil || line != want+"\n" {
			t.Fatalf("got %q, %v, want %q", line, err, want)
		}
	}
	expect("open")
	h.kill()
	fmt.Fprint(in, "x")
	expect(`"12345" <nil>`)
	if line := h.serve(); line != "ready true 1" {
		t.Errorf("after the takeover: %s", line)
	}
	fmt.Fprint(in, "x")
	expect(`"12345" <nil>`)
	if got := h.use("read", "p0")(); !strings.HasPrefix(got, `"12345" errno 0`) {
		t.Errorf("second open: %s", got)
	}
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait()
	// The last close ends the backing, so the next life knows of none. Nobody waits for it.
	h.settled()
	h.kill()
	if line := h.serve(); line != "ready true 0" {
		t.Errorf("after the last close: %s", line)
	}
}

// TestChangedOptions wants a server with other options refused, and the mount to live on
// with the right ones.
func TestChangedOptions(t *testing.T) {
	h := mount(t)
	h.serve()
	h.kill()
	h.env = []string{"FUSESERVER_TEST_WRITE=65536"}
	if line := h.serve(); line != ErrOptionsChanged.Error() {
		t.Errorf("other options: %s", line)
	}
	h.env = nil
	h.kill()
	if line := h.serve(); !strings.HasPrefix(line, "ready") {
		t.Fatal(line)
	}
	if got := h.use("read", "f0")(); !strings.HasPrefix(got, `"12345" errno 0`) {
		t.Errorf("read: %s", got)
	}
}

// TestDeadline wants an answer where a handler never ends, even when it ignores that it
// was cancelled.
func TestDeadline(t *testing.T) {
	h := mount(t)
	h.deadline = 400 * time.Millisecond
	h.serve()
	if got := h.use("read", "stuck")(); !strings.HasPrefix(got, `"" input/output error`) {
		t.Errorf("read: %s", got)
	}
	if got := h.use("read", "f0")(); !strings.HasPrefix(got, `"12345" errno 0`) {
		t.Errorf("another read: %s", got)
	}
}

// TestAbort wants whoever waits for a server that never comes to get an error.
func TestAbort(t *testing.T) {
	h := mount(t)
	h.serve()
	h.kill()
	result := h.use("read", "f0")
	for n := 0; n == 0; time.Sleep(5 * time.Millisecond) {
		n, _ = h.control.Waiting(h.m.Minor)
	}
	if err := h.control.Abort(h.m.Minor); err != nil {
		t.Fatal(err)
	}
	if got := result(); !strings.Contains(got, "endpoint is not connected") && !strings.Contains(got, "connection abort") {
		t.Errorf("read: %s", got)
	}
	if err := h.control.Abort(h.m.Minor); err != nil {
		t.Errorf("second abort: %v", err)
	}
	if line := h.serve(); strings.HasPrefix(line, "ready") {
		t.Errorf("a server took over a connection that has ended: %s", line)
	}
}

// TestStop stops the server as an upgrade does: what it has read is answered, and the
// next one goes on.
func TestStop(t *testing.T) {
	h := mount(t)
	h.serve()
	result := h.use("load", "2s")
	for range 5 {
		time.Sleep(200 * time.Millisecond)
		if err := h.serverIn.Close(); err != nil {
			t.Fatal(err)
		}
		<-h.serverDone
		if line := h.serve(); !strings.HasPrefix(line, "ready") {
			t.Fatal(line)
		}
	}
	if got := result(); !strings.HasPrefix(got, "ok") {
		t.Errorf("under load: %s", got)
	}
}
