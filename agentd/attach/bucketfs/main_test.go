package bucketfs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/goleak"

	"github.com/postern-dev/postern/agentd/attach/bucket"
	"github.com/postern-dev/postern/e2e/leakwait"
)

// serveArg makes the test binary the process that serves a mount: whoever serves one must
// not touch it.
const serveArg = "serve-a-bucket-for-test"

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == serveArg {
		if err := serveForTest(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(leakwait.Patient(m))
}

// serving is what the child is told.
type serving struct {
	Dir, Target, Socket string
	ReadOnly            bool
	Cache, Staged       int64
	TTL, Deadline       time.Duration
	Debug               bool
}

func serveForTest(arg string) error {
	var s serving
	if err := json.Unmarshal([]byte(arg), &s); err != nil {
		return err
	}
	client := bucket.Dial(s.Socket, "test")
	defer client.Close()
	b, err := Open(Config{
		Dir: s.Dir, Name: "test", Remote: client, ReadOnly: s.ReadOnly, CacheBytes: s.Cache, MaxStaged: s.Staged, TTL: s.TTL, Deadline: s.Deadline,
		RetryForTest: 50 * time.Millisecond, Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err != nil {
		return err
	}
	b.Fresh()
	fs := b.Mount(Options{})
	if err := fs.Begin(false); err != nil {
		return err
	}
	opts := MountOptions()
	opts.Debug = s.Debug
	opts.Options = []string{"default_permissions"}
	server, err := fuse.NewServer(fs, s.Target, &opts)
	if err != nil {
		return err
	}
	fmt.Println("mounted")
	go func() {
		// The parent closes our stdin when we are to end, and sends a byte to ask for the status.
		var one [1]byte
		for {
			if _, err := os.Stdin.Read(one[:]); err != nil {
				break
			}
			text, _ := json.Marshal(b.Status())
			fmt.Println(string(text))
		}
		for server.Unmount() != nil {
			time.Sleep(50 * time.Millisecond)
		}
	}()
	server.Serve()
	fs.End()
	return b.Close()
}

// world is a bucket, and mounts of it.
type world struct {
	t      *testing.T
	store  *bucket.Store
	faults *faults
	socket string
}

// newWorld makes an empty bucket in memory that answers at a socket as agentd does.
func newWorld(t *testing.T) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "postern-bucketfs")
	if err != nil {
		t.Fatal(err)
	}
	store := bucket.OpenMemoryForTest("test")
	w := &world{t: t, store: store, socket: filepath.Join(dir, "s"), faults: &faults{next: bucket.Handler(func(context.Context, string) (*bucket.Store, func(), error) {
		return store, func() {}, nil
	})}}
	l, err := net.Listen("unix", w.socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: w.faults}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() {
		server.Close()
		<-served
		store.Close()
		os.RemoveAll(dir)
	})
	return w
}

func (w *world) put(key, content string) {
	w.t.Helper()
	if _, err := w.store.Write(w.t.Context(), key, strings.NewReader(content), int64(len(content))); err != nil {
		w.t.Fatal(err)
	}
}

// get is an object's content; "<none>" if there is none.
func (w *world) get(key string) string {
	w.t.Helper()
	o, err := w.store.Head(w.t.Context(), key)
	if bucket.NotFound(err) {
		return "<none>"
	}
	if err != nil {
		w.t.Fatal(err)
	}
	var out bytes.Buffer
	if err := w.store.Read(w.t.Context(), key, o.ETag, 0, o.Size, &out); err != nil {
		w.t.Fatal(err)
	}
	return out.String()
}

// mounted is a mount and the process that serves it.
type mounted struct {
	t    *testing.T
	path string
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *json.Decoder
	dev  uint64
	done chan struct{}
}

func (w *world) mount(s serving) *mounted {
	t := w.t
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounting")
	}
	if s.Dir == "" {
		s.Dir = t.TempDir()
	}
	s.Target, s.Socket = t.TempDir(), w.socket
	if s.Cache == 0 {
		s.Cache = 64 << 20
	}
	if s.Staged == 0 {
		s.Staged = 1 << 30
	}
	arg, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	m := &mounted{t: t, path: s.Target, done: make(chan struct{})}
	m.cmd = exec.Command(os.Args[0], serveArg, string(arg))
	m.cmd.Stderr = os.Stderr
	if m.in, err = m.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 64)
	n, _ := out.Read(line)
	go func() {
		defer close(m.done)
		_ = m.cmd.Wait()
	}()
	t.Cleanup(m.close)
	if !strings.HasPrefix(string(line[:n]), "mounted") {
		t.Fatal("the mount was not served")
	}
	m.out = json.NewDecoder(out)
	var st syscall.Stat_t
	if err := syscall.Stat(s.Target, &st); err != nil {
		t.Fatal(err)
	}
	m.dev = st.Dev
	// It takes minutes where everything is slow, which is no hang.
	watchdog := time.AfterFunc(time.Duration(amount(10, 40))*time.Minute, func() {
		select {
		case <-m.done:
			return // and another mount may have its number
		default:
		}
		fmt.Fprintln(os.Stderr, "test hangs: aborting the mount")
		m.abort()
		_ = m.cmd.Process.Signal(syscall.SIGQUIT)
	})
	t.Cleanup(func() { watchdog.Stop() })
	return m
}

// status asks the server.
func (m *mounted) status() (s Status) {
	m.t.Helper()
	if _, err := m.in.Write([]byte("s")); err != nil {
		m.t.Fatal(err)
	}
	if err := m.out.Decode(&s); err != nil {
		m.t.Fatal(err)
	}
	return s
}

func (m *mounted) abort() {
	_ = os.WriteFile(fmt.Sprintf("/sys/fs/fuse/connections/%d/abort", m.dev), []byte("1"), 0)
}

func (m *mounted) close() {
	m.in.Close()
	for began, until := time.Now(), time.Now().Add(time.Minute); ; {
		select {
		case <-m.done:
			return
		case <-time.After(100 * time.Millisecond):
		}
		var st syscall.Stat_t
		switch gone := syscall.Stat(m.path, &st) == nil && st.Dev != m.dev; {
		case gone && time.Since(began) > 2*time.Second:
			// It is unmounted here; whoever made a mount namespace meanwhile has a copy, and
			// the connection would live as long as that.
			m.abort()
		case time.Now().After(until):
			m.t.Error("the server does not end: aborting, and asking it where it is")
			_ = m.cmd.Process.Signal(syscall.SIGQUIT)
			time.Sleep(time.Second)
			m.abort()
			_ = syscall.Unmount(m.path, syscall.MNT_DETACH)
			_ = m.cmd.Process.Kill()
			<-m.done
			return
		}
	}
}

func (m *mounted) write(name, content string) {
	m.t.Helper()
	if err := os.WriteFile(filepath.Join(m.path, name), []byte(content), 0o644); err != nil {
		m.t.Error(err)
	}
}

func (m *mounted) want(name, content string) {
	m.t.Helper()
	got, err := os.ReadFile(filepath.Join(m.path, name))
	if err != nil || string(got) != content {
		m.t.Errorf("%s: %.80q, %v, want %.80q", name, got, err, content)
	}
}

func (m *mounted) wantErr(what string, err error, want syscall.Errno) {
	m.t.Helper()
	if !errors.Is(err, want) {
		m.t.Errorf("%s: %v, want %v", what, err, want)
	}
}

// sh runs a script in the mount.
func (m *mounted) sh(script string) string {
	m.t.Helper()
	cmd := exec.Command("bash", "-euc", script)
	cmd.Dir = m.path
	out, err := cmd.CombinedOutput()
	if err != nil {
		m.t.Errorf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

func eventually(t *testing.T, what string, ok func() error) {
	t.Helper()
	var err error
	for until := time.Now().Add(time.Minute); time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
		if err = ok(); err == nil {
			return
		}
	}
	t.Errorf("%s: %v", what, err)
}
