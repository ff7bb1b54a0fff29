package obstacle

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// find runs Python code to a point and looks at it.
func find(t *testing.T, code string, own ...string) []Obstacle {
	t.Helper()
	cmd := exec.Command("/usr/bin/python3", "-c", "import os, socket, sys, mmap, ctypes\n"+code+"\nprint('ready', flush=True)\nsys.stdin.read()")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		in.Close()
		cmd.Wait()
	}()
	if b := make([]byte, 5); true {
		if _, err := out.Read(b); err != nil || string(b) != "ready" {
			t.Fatalf("%q %v", b, err)
		}
	}
	found, err := Find(t.Context(), []int{cmd.Process.Pid}, own...)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestWhatStandsInTheWayIsNamed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: to look into other namespaces' sockets")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := strings.TrimPrefix(l.Addr().String(), "127.0.0.1:")
	path := filepath.Join(t.TempDir(), "s")
	// As agentd listens for a kernel's statements; seen from another network namespace.
	run, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer run.Close()
	statements, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/sql.sock", run.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer statements.Close()
	u, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	for _, l := range []net.Listener{u, statements} {
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				_, _ = c.Write([]byte("a")) // accepted: until then it has no other end
			}
		}()
	}
	for _, test := range []struct {
		name, code string
		want       string // a part of the one obstacle's text; empty: none
		own        []string
	}{
		{"nothing", "", "", nil},
		{"outside TCP", "s = socket.create_connection(('127.0.0.1', " + port + "))", "a TCP connection to 127.0.0.1:" + port, nil},
		{"TCP with itself", "l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen(); s = socket.create_connection(l.getsockname()); c, _ = l.accept()", "", nil},
		{"IPv6 with itself", "l = socket.socket(socket.AF_INET6); l.bind(('::1', 0)); l.listen(); s = socket.create_connection(l.getsockname()[:2]); c, _ = l.accept()", "", nil},
		{"listener", "l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen()", "", nil},
		{"outside unix", "s = socket.socket(socket.AF_UNIX); s.connect('" + path + "'); s.recv(1)", "a unix socket (" + path + ") connected to a process outside", nil},
		{"a statement", "s = socket.socket(socket.AF_UNIX); s.connect('" + filepath.Join(run.Name(), "sql.sock") + "'); s.recv(1)", "a statement of %%sql or postern.sql that is under way", nil},
		{"a statement, from a network namespace of its own", "ctypes.CDLL(None).unshare(0x40000000)\ns = socket.socket(socket.AF_UNIX); s.connect('" + filepath.Join(run.Name(), "sql.sock") + "'); s.recv(1)", "a statement of %%sql or postern.sql that is under way", nil},
		{"outside unix, from a network namespace of its own", "ctypes.CDLL(None).unshare(0x40000000)\ns = socket.socket(socket.AF_UNIX); s.connect('" + path + "'); s.recv(1)", "a unix socket (" + path + ") connected to a process outside", nil},
		{"own unix", "s = socket.socket(socket.AF_UNIX); s.connect('" + path + "'); s.recv(1)", "", []string{filepath.Dir(path)}},
		{"socketpair", "a, b = socket.socketpair()", "", nil},
		{"device", "f = open('/dev/kmsg')", "the device /dev/kmsg", nil},
		{"GPU by its path", "os.mkdir('/dev/dri') if not os.path.exists('/dev/dri') else None\np='/dev/dri/postern-test'\nf = open(p, 'w'); os.unlink(p)\nos.listdir('/dev/dri') or os.rmdir('/dev/dri')", "the GPU device /dev/dri/postern-test", nil},
		{"null", "f = open('/dev/null'); g = open('/dev/urandom')", "", nil},
		{"deleted file", "f = open('/tmp/postern-obstacle', 'w+'); os.unlink('/tmp/postern-obstacle')", "", nil},
		{"epoll, eventfd, pipe", "import select; e = select.epoll(); p = os.pipe()", "", nil},
		{"io_uring", "p = ctypes.create_string_buffer(120); fd = ctypes.CDLL(None).syscall(425, 4, p)\nif fd < 0: fd = ctypes.CDLL(None).syscall(323, 0)", "descriptor", nil},
		{"a name with control characters", "n = '/dev/x\\x1b[2Jy'; f = open(n, 'w'); os.unlink(n)", "/dev/x?[2Jy", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			found := find(t, test.code, test.own...)
			switch {
			case test.want == "" && len(found) > 0:
				t.Errorf("got %v, want none", found)
			case test.want != "" && (len(found) != 1 || !strings.Contains(found[0].String(), test.want) || found[0].Remedy == ""):
				t.Errorf("got %v, want %q", found, test.want)
			}
		})
	}
}

func TestNestedNamespaceAndDebugger(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: namespaces")
	}
	start := func(flags uintptr) *exec.Cmd {
		cmd := exec.Command("/bin/sleep", "100")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
		return cmd
	}
	a, b := start(0), start(unix.CLONE_NEWIPC)
	found, err := Find(t.Context(), []int{a.Process.Pid, b.Process.Pid})
	if err != nil || len(found) != 1 || !strings.Contains(found[0].What, "ipc namespace") {
		t.Errorf("got %v, %v", found, err)
	}
	if _, err := Find(t.Context(), []int{1 << 22}); err == nil {
		t.Error("a process that is not there was looked at")
	}
}
