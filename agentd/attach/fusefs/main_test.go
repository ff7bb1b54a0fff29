package fusefs

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/goleak"

	"github.com/postern-dev/postern/agentd/attach/remote"
	"github.com/postern-dev/postern/agentd/attach/remote/simulatedremote"
	"github.com/postern-dev/postern/agentd/attach/replica"
	"github.com/postern-dev/postern/e2e/leakwait"
)

// serveArg makes the test binary the process that serves a mount: whoever serves one must
// not touch it.
const serveArg = "serve-a-mount-for-test"

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
	Options             Options
	Config              testConfig
	NoPassthrough       bool
	Shadow              string // directory for what is durable, for tests of power loss
	Debug               bool
	// Clock is a file with nanoseconds by which the clock is off; "": it is not.
	Clock string
}

type testConfig struct {
	CacheBytes, MaxUnsent int64
	MetadataBytes         int64
	Deadline              time.Duration
	Boot                  string
	ReadOnly              bool
}

func serveForTest(arg string) error {
	var s serving
	if err := json.Unmarshal([]byte(arg), &s); err != nil {
		return err
	}
	var synced func(string, int64)
	if s.Shadow != "" {
		synced = shadow(s.Shadow)
	}
	r, err := replica.Open(context.Background(), replica.Config{
		SyncedForTest: synced, NowForTest: shifted(s.Clock),
		Dir: s.Dir, Workspace: "test", MountID: "mount of " + s.Dir, Remote: remote.Dial(s.Socket),
		Log:        slog.New(slog.NewTextHandler(os.Stderr, nil)),
		CacheBytes: s.Config.CacheBytes, MetadataBytes: s.Config.MetadataBytes, MaxUnsent: s.Config.MaxUnsent, Deadline: s.Config.Deadline, Boot: s.Config.Boot, ReadOnly: s.Config.ReadOnly,
	})
	if err != nil {
		return err
	}
	if err := r.Fresh(); err != nil {
		return err
	}
	if name := os.Getenv("POSTERN_CPU_PROFILE"); name != "" {
		f, err := os.Create(name)
		if err != nil {
			return err
		}
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	fs := New(r, s.Options)
	opts := MountOptions(s.Options)
	opts.Debug = s.Debug
	server, err := fuse.NewServer(fs, s.Target, &opts)
	if err != nil {
		return err
	}
	fs.SetKernel(&testKernel{Server: server, open: map[uint64]*backing{}, off: s.NoPassthrough}, false)
	fmt.Println("mounted")
	go func() {
		// The parent closes our stdin when we are to end, says d to have everything sent, and n to hear
		// how many nodes are known.
		var b [1]byte
		for n, _ := os.Stdin.Read(b[:]); n > 0; n, _ = os.Stdin.Read(b[:]) {
			if b[0] == 'n' {
				fmt.Printf("nodes %d\n", r.Status().Nodes)
				continue
			}
			if err := r.Drain(context.Background()); err != nil {
				fmt.Println(err)
			} else {
				fmt.Println("drained")
			}
		}
		for server.Unmount() != nil {
			time.Sleep(50 * time.Millisecond)
		}
	}()
	server.Serve()
	fs.Close()
	return r.Close()
}

// testKernel is a Kernel on go-fuse's own server, which cannot be taken over.
type testKernel struct {
	*fuse.Server
	off  bool
	mu   sync.Mutex
	open map[uint64]*backing
}

type backing struct {
	id   int32
	refs int
}

func (k *testKernel) Passthrough() bool        { return !k.off }
func (k *testKernel) Backings() map[uint64]int { return nil }
func (k *testKernel) OpenBacking(node, _ uint64, fd int) (int32, bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if b := k.open[node]; b != nil {
		b.refs++
		return b.id, false, nil
	}
	id, errno := k.RegisterBackingFd(&fuse.BackingMap{Fd: int32(fd)})
	if errno != 0 {
		return 0, false, errno
	}
	k.open[node] = &backing{id, 1}
	return id, false, nil
}

func (k *testKernel) CloseBacking(node, _ uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if b := k.open[node]; b != nil {
		if b.refs--; b.refs == 0 {
			k.UnregisterBackingFd(b.id)
			delete(k.open, node)
		}
	}
}

// world is a control plane for the test, and mounts of it.
type world struct {
	t      *testing.T
	remote *simulatedremote.Remote
	socket string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounting")
	}
	w := &world{t: t, remote: simulatedremote.New()}
	dir, err := os.MkdirTemp("", "postern-fusefs")
	if err != nil {
		t.Fatal(err)
	}
	w.socket = filepath.Join(dir, "s")
	l, err := net.Listen("unix", w.socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	server := &http.Server{Handler: simulatedremote.Handler(w.remote), BaseContext: func(net.Listener) context.Context { return ctx }}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() {
		cancel()
		server.Close()
		<-served
		os.RemoveAll(dir)
	})
	return w
}

// mounted is a mount and the process that serves it.
type mounted struct {
	t    *testing.T
	dir  string // of the replica
	path string
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  io.Reader
	dev  uint64
	done chan struct{}
	err  error
}

// mount mounts the workspace, with the replica in dir, a new one if it is empty.
func (w *world) mount(s serving) *mounted {
	t := w.t
	t.Helper()
	if s.Dir == "" {
		s.Dir = filepath.Join(t.TempDir(), "replica")
	}
	if s.Target == "" {
		s.Target = filepath.Join(t.TempDir(), "mnt")
		if err := os.Mkdir(s.Target, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s.Socket = w.socket
	arg, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	m := &mounted{t: t, dir: s.Dir, path: s.Target, done: make(chan struct{})}
	m.cmd = exec.Command(os.Args[0], serveArg, string(arg))
	m.cmd.Stderr = os.Stderr
	in, err := m.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	m.in = in
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m.out = out
	line := make([]byte, 64)
	n, _ := out.Read(line)
	go func() {
		defer close(m.done)
		m.err = m.cmd.Wait()
	}()
	t.Cleanup(m.close)
	if !strings.HasPrefix(string(line[:n]), "mounted") {
		t.Fatal("the mount was not served")
	}
	var st syscall.Stat_t
	if err := syscall.Stat(s.Target, &st); err != nil {
		t.Fatal(err)
	}
	m.dev = st.Dev
	return m
}

// abort makes every request on the mount fail, so that nobody waits for ever.
func (m *mounted) abort() {
	_ = os.WriteFile(fmt.Sprintf("/sys/fs/fuse/connections/%d/abort", m.dev), []byte("1"), 0)
}

// kill ends the server without a word; everything on the mount fails from then on.
func (m *mounted) kill() {
	m.t.Helper()
	_ = m.cmd.Process.Kill()
	<-m.done
	m.abort()
}

// detach removes a mount whose server is gone.
func (m *mounted) detach() {
	m.t.Helper()
	if err := syscall.Unmount(m.path, syscall.MNT_DETACH); err != nil {
		m.t.Error(err)
	}
}

// close unmounts and ends the server.
func (m *mounted) close() {
	m.in.Close()
	select {
	case <-m.done:
		return
	case <-time.After(20 * time.Second):
		// A mount namespace that somebody made meanwhile, other tests among them, keeps the file system alive
		// until it ends: then there is nothing that the server could see.
		m.t.Log("the file system is held by somebody; aborting it")
		m.abort()
	}
	select {
	case <-m.done:
	case <-time.After(time.Minute):
		m.t.Error("the server does not end; asking it where it is")
		_ = m.cmd.Process.Signal(syscall.SIGQUIT)
		time.Sleep(time.Second)
		_ = syscall.Unmount(m.path, syscall.MNT_DETACH)
		_ = m.cmd.Process.Kill()
		<-m.done
	}
}

// watchdog aborts the mount when the test hangs: it takes minutes where everything is slow, which is no
// hang.
func (m *mounted) watchdog() {
	t := time.AfterFunc(time.Duration(amount(10, 40))*time.Minute, func() {
		select {
		case <-m.done:
			return // and another mount may have its number
		default:
		}
		fmt.Fprintln(os.Stderr, "test hangs; aborting the mount, and asking the server where it is")
		m.abort()
		_ = m.cmd.Process.Signal(syscall.SIGQUIT)
	})
	m.t.Cleanup(func() { t.Stop() })
}

// refused starts a server that is to refuse, and returns what it says.
func (w *world) refused(s serving) string {
	w.t.Helper()
	s.Socket = w.socket
	arg, err := json.Marshal(s)
	if err != nil {
		w.t.Fatal(err)
	}
	out, err := exec.Command(os.Args[0], serveArg, string(arg)).CombinedOutput()
	if err == nil {
		w.t.Error("it was served all the same")
	}
	return string(out)
}
