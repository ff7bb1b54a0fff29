package uplink_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/uplink"
	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

// testUID is that of uplinks of these tests: no other test's.
const testUID = 1_900_065_700

// patient is how long is waited for what must come, on a busy machine too.
const patient = 2 * time.Minute

// starter is a Starter that the end of the test waits for.
func starter(t *testing.T, change func(*uplink.Config)) *uplink.Starter {
	c := uplink.Config{UID: testUID}
	if change != nil {
		change(&c)
	}
	s := uplink.New(c)
	t.Cleanup(s.Close)
	return s
}

func host(t *testing.T, s *uplink.Starter, opts ...tunneltest.Option) *tunneltest.Host {
	return tunneltest.NewHost(t, append(opts, tunneltest.WithDial(func(d *tunnel.DialConfig) { d.Carrier = s.Carrier }))...)
}

// children are the uplinks of this process.
func children(t *testing.T) []int {
	t.Helper()
	return childrenOf(t, os.Getpid())
}

func childrenOf(t *testing.T, parent int) []int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var out []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || status(pid)["PPid"] != strconv.Itoa(parent) || strings.HasPrefix(status(pid)["State"], "Z") {
			continue
		}
		if line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && strings.Contains(string(line), "\x00"+uplink.Arg) {
			out = append(out, pid)
		}
	}
	return out
}

func child(t *testing.T) int {
	t.Helper()
	pids := children(t)
	if len(pids) != 1 {
		t.Fatalf("uplinks: %v, want one", pids)
	}
	return pids[0]
}

// status is /proc/PID/status; empty if there is no such process.
func status(pid int) map[string]string {
	out := map[string]string{}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return out
	}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		out[name] = strings.TrimSpace(value)
	}
	return out
}

func alive(pid int) bool {
	state := status(pid)["State"]
	return state != "" && !strings.HasPrefix(state, "Z")
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patient); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it did not come to it: %s", what)
		}
	}
}

func echo(t *testing.T, tun *tunnel.Tunnel) {
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := tun.Listener().Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				_, _ = io.Copy(c, c)
				_ = c.Close()
			})
		}
	})
	t.Cleanup(func() {
		_ = tun.Close(nil)
		wg.Wait()
	})
}

func exchange(t *testing.T, tun *tunnel.Tunnel, class tunnel.Class, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patient)
	defer cancel()
	c, err := tun.Open(ctx, class)
	if err != nil {
		t.Fatalf("%v: %v", class, err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patient))
	sent := make([]byte, n)
	for i := range sent {
		sent[i] = byte(i * 7 / 3)
	}
	failed := make(chan error, 1)
	go func() {
		_, err := c.Write(sent)
		failed <- err
	}()
	got := make([]byte, n)
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatalf("%v: %v", class, err)
	}
	if err := <-failed; err != nil {
		t.Fatalf("%v: %v", class, err)
	}
	if !slices.Equal(got, sent) {
		t.Fatalf("%v: other bytes came back", class)
	}
}

var classes = []tunnel.Class{tunnel.Control, tunnel.Bulk, tunnel.Solo}

func needRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// holds tells whether a process has a socket's inode.
func holds(t *testing.T, pid int, inode string) bool {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(fds) == 0 {
		t.Fatalf("descriptors of %d: %v, %v", pid, fds, err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && to == "socket:["+inode+"]" {
			return true
		}
	}
	return false
}

// inodeOf is that of the TCP socket with a local port.
func inodeOf(t *testing.T, port int) string {
	t.Helper()
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) > 9 && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) && f[3] == "01" {
				return f[9]
			}
		}
	}
	t.Fatalf("no TCP socket has port %d", port)
	return ""
}

// What owns the TCP connections has no rights, and agentd owns none.
func TestWhoOwnsTheConnection(t *testing.T) {
	needRoot(t)
	h := host(t, starter(t, nil))
	d, a := h.Dial(t)
	echo(t, a)
	pid := child(t)
	for _, class := range classes {
		exchange(t, d, class, 1<<20)
	}
	inode := inodeOf(t, d.LocalAddr().(*net.TCPAddr).Port)
	if !holds(t, pid, inode) {
		t.Error("the uplink does not have the tunnel's TCP connection")
	}
	if holds(t, os.Getpid(), inode) {
		t.Error("agentd has the tunnel's TCP connection")
	}
	got := status(pid)
	id := strconv.Itoa(testUID)
	for name, want := range map[string]string{
		"Uid": strings.Join([]string{id, id, id, id}, "\t"), "Gid": strings.Join([]string{id, id, id, id}, "\t"), "Groups": "",
		"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapBnd": "0000000000000000", "CapAmb": "0000000000000000",
		"NoNewPrivs": "1", "Seccomp": "2",
	} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Max core file size 0 0", "Max file size 0 0", "Max open files 256 256", "Max locked memory 0 0"} {
		if !strings.Contains(strings.Join(strings.Fields(string(limits)), " "), want) {
			t.Errorf("no %q in the limits", want)
		}
	}
	// Nobody but root may look into it.
	var st syscall.Stat_t
	if err := syscall.Stat(fmt.Sprintf("/proc/%d/fd", pid), &st); err != nil || st.Uid != 0 {
		t.Errorf("its descriptors belong to %d (%v): it is dumpable", st.Uid, err)
	}
	descriptors, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, fd := range descriptors {
		to, err := os.Readlink(fd)
		if err == nil && !strings.HasPrefix(to, "socket:") && !strings.HasPrefix(to, "pipe:") && !strings.HasPrefix(to, "anon_inode:") && to != "/dev/null" && !strings.HasPrefix(to, "/sys/fs/cgroup") {
			t.Errorf("it has %s open", to)
		}
	}
}

// The proxy's password passes by the socket alone.
func TestProxyPasswordIsNotShown(t *testing.T) {
	needRoot(t)
	const password = "s3cret-of-the-proxy"
	var lines strings.Builder
	h := host(t, starter(t, func(c *uplink.Config) { c.Logger = slog.New(slog.NewTextHandler(&lines, nil)) }))
	var asked sync.Map
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, given, _ := parseBasic(r.Header.Get("Proxy-Authorization"))
		asked.Store(given, true)
		up, err := net.Dial("tcp", r.Host)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		down, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			_ = up.Close()
			return
		}
		_, _ = io.WriteString(down, "HTTP/1.1 200 OK\r\n\r\n")
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = io.Copy(up, down)
			_ = up.Close()
		}()
		_, _ = io.Copy(down, up)
		_ = down.Close()
		<-done
	}))
	defer proxy.Close()
	through, _ := url.Parse(proxy.URL)
	through.User = url.UserPassword("alice", password)
	h.Dialed.Proxy = func(*url.URL) (*url.URL, error) { return through, nil }
	d, a := h.Dial(t)
	echo(t, a)
	exchange(t, d, tunnel.Bulk, 1<<20)
	if _, ok := asked.Load(password); !ok {
		t.Error("the proxy was not told the password")
	}
	pid := child(t)
	for _, file := range []string{"cmdline", "environ"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), password) {
			t.Errorf("%s shows the password", file)
		}
		if file == "environ" && strings.Trim(string(b), "\x00") != "" {
			t.Errorf("it has an environment: %q", b)
		}
	}
	_ = d.Close(nil)
	proxy.CloseClientConnections()
	if strings.Contains(lines.String(), password) {
		t.Error("the log shows the password")
	}
}

// The outer TLS believes the CAs that the configuration names, and those that
// SSL_CERT_FILE does.
func TestOuterCAs(t *testing.T) {
	for name, ca := range map[string]func(*testing.T, *uplink.Config, *httptest.Server){
		"none": nil,
		"by the configuration": func(_ *testing.T, c *uplink.Config, front *httptest.Server) {
			c.OuterCAs = [][]byte{front.Certificate().Raw}
		},
		"by SSL_CERT_FILE": func(t *testing.T, _ *uplink.Config, front *httptest.Server) {
			dir, err := os.MkdirTemp("", "uplink") // which everybody may enter
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, "ca.pem")
			block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: front.Certificate().Raw})
			if err := os.WriteFile(file, block, 0o644); err != nil {
				t.Fatal(err)
			}
			t.Setenv("SSL_CERT_FILE", file)
		},
	} {
		t.Run(name, func(t *testing.T) {
			inside := tunneltest.NewHost(t)
			front := httptest.NewUnstartedServer(inside.Server)
			front.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
			front.StartTLS()
			defer front.Close()
			s := starter(t, func(c *uplink.Config) {
				if ca != nil {
					ca(t, c, front)
				}
			})
			inside.Dialed.Carrier = s.Carrier
			inside.Dialed.URL = "wss" + strings.TrimPrefix(front.URL, "https")
			if ca == nil {
				_, err := tunnel.Dial(t.Context(), inside.Dialed)
				if tunnel.FailedStep(err) != tunnel.StepOuterTLS || !strings.Contains(err.Error(), "ca_file") {
					t.Errorf("%v", err)
				}
				return
			}
			d, a := inside.Dial(t)
			echo(t, a)
			exchange(t, d, tunnel.Solo, 1<<20)
			_ = d.Close(nil)
		})
	}
}

func parseBasic(header string) (user, password string, ok bool) {
	return (&http.Request{Header: http.Header{"Authorization": {header}}}).BasicAuth()
}

// Killing an uplink cuts its tunnel, at once, and nothing else; the next one is new.
func TestKilled(t *testing.T) {
	s := starter(t, nil)
	h := host(t, s)
	d, a := h.Dial(t)
	echo(t, a)
	exchange(t, d, tunnel.Bulk, 1<<20)
	pid := child(t)
	d2, a2 := h.Dial(t) // a tunnel that takes over has an uplink of its own
	echo(t, a2)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.Done():
	case <-time.After(patient):
		t.Fatal("the tunnel lives on")
	}
	if !errors.Is(d.Err(), tunnel.ErrLost) {
		t.Errorf("the tunnel ended with %v", d.Err())
	}
	exchange(t, d2, tunnel.Bulk, 1<<20)
	d3, a3 := h.Dial(t)
	echo(t, a3)
	exchange(t, d3, tunnel.Solo, 1<<20)
	if slices.Contains(children(t), pid) {
		t.Error("it is still there")
	}
}

// A stopped uplink is found as a dead network is, and is gone by the time that anybody
// could dial again.
func TestStopped(t *testing.T) {
	s := starter(t, nil)
	uplink.NeverLate(s)
	h := host(t, s)
	d, a := h.Dial(t)
	echo(t, a)
	exchange(t, d, tunnel.Bulk, 1<<20)
	pid := child(t)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGKILL) })
	select {
	case <-d.Done():
	case <-time.After(patient):
		t.Fatal("the tunnel lives on")
	}
	if !errors.Is(d.Err(), tunnel.ErrSilent) {
		t.Errorf("the tunnel ended with %v", d.Err())
	}
	eventually(t, "the stopped uplink is killed", func() bool { return !alive(pid) })
	d2, a2 := h.Dial(t)
	echo(t, a2)
	exchange(t, d2, tunnel.Bulk, 1<<20)
}

// One that does not even begin is given up too, and is no tunnel's error.
func TestSilentFromTheStart(t *testing.T) {
	h := host(t, starter(t, func(c *uplink.Config) { c.Args = []string{silentArg, uplink.Arg} }))
	h.Dialed.StepTimeout = time.Second
	_, err := tunnel.Dial(t.Context(), h.Dialed)
	if tunnel.FailedStep(err) != tunnel.StepUplink {
		t.Errorf("%v", err)
	}
	eventually(t, "the silent uplink is killed", func() bool { return len(children(t)) == 0 })
}

// An executable that cannot be started is one clear line.
func TestNotStarted(t *testing.T) {
	h := host(t, starter(t, func(c *uplink.Config) { c.Executable = "/no/such/agentd" }))
	_, err := tunnel.Dial(t.Context(), h.Dialed)
	if tunnel.FailedStep(err) != tunnel.StepUplink || !strings.Contains(err.Error(), "/no/such/agentd") || strings.Contains(err.Error(), "\n") {
		t.Errorf("%v", err)
	}
	if os.Geteuid() == 0 {
		h = host(t, starter(t, func(c *uplink.Config) { c.UID = 0 }))
		if _, err := tunnel.Dial(t.Context(), h.Dialed); tunnel.FailedStep(err) != tunnel.StepUplink {
			t.Errorf("as root: %v", err)
		}
	}
}

// An uplink does not outlive agentd, also when it is stopped and hears of nothing.
func TestKilledParentLeavesNothing(t *testing.T) {
	h := tunneltest.NewHost(t)
	for _, stopped := range []bool{false, true} {
		t.Run(fmt.Sprintf("stopped %v", stopped), func(t *testing.T) {
			cmd := exec.Command("/proc/self/exe", parentArg, h.URL)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			killed := false
			t.Cleanup(func() {
				if !killed {
					_ = cmd.Process.Kill()
					_ = cmd.Wait()
				}
			})
			var ready [1]byte
			if _, err := io.ReadFull(out, ready[:]); err != nil {
				t.Fatal(err)
			}
			var pids []int
			eventually(t, "it has an uplink", func() bool { pids = childrenOf(t, cmd.Process.Pid); return len(pids) == 1 })
			if stopped {
				if err := syscall.Kill(pids[0], syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			killed = true
			eventually(t, "its uplink ends", func() bool { return !alive(pids[0]) })
		})
	}
}

// parent dials url's server, which refuses it, by an uplink that it keeps.
func parent(to string) int {
	s := uplink.New(uplink.Config{UID: testUID})
	c, err := s.Carrier(tunnel.CarrierConfig{URL: to})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	conn, err := c.Open(context.Background())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	request := `{"class":0,"tunnel":"00112233445566778899aabbccddeeff"}`
	if _, err := conn.Write(append([]byte{0, 0, 0, byte(len(request))}, request...)); err != nil {
		return 1
	}
	if _, err := conn.Read(make([]byte, 100)); err != nil { // it has begun to dial
		return 1
	}
	fmt.Print("r")
	forever()
	return 0
}

func forever() { time.Sleep(time.Hour) }

// tried is what probe found of one thing.
type tried struct{ What, Err string }

// probe is started as an uplink is, and tries what an uplink must not be able to do.
// What came of it it tells on the socket that agentd would speak on.
func probe(args []string) int {
	var out []tried
	try := func(what string, f func() error) {
		err := ""
		if e := f(); e != nil {
			err = e.Error()
		}
		out = append(out, tried{what, err})
	}
	if err := uplink.GiveUp(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	file, port, other := args[0], args[1], args[2]
	try("its port", func() error { return dialOnce("tcp", "127.0.0.1:"+port) })
	try("the resolver's files", func() error { _, err := os.ReadFile("/etc/hosts"); return err })
	try("another port", func() error { return dialOnce("tcp", "127.0.0.1:"+other) })
	try("a file of everybody", func() error { _, err := os.ReadFile(file); return err })
	try("a directory", func() error { _, err := os.ReadDir(filepath.Dir(file)); return err })
	try("write", func() error { return os.WriteFile(file+".new", []byte("x"), 0o600) })
	try("a unix socket", func() error { return dialOnce("unix", file+".sock") })
	try("netlink", func() error { _, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE); return err })
	try("a raw socket", func() error { _, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP); return err })
	try("listen", func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		return unix.Listen(fd, 1)
	})
	try("a program", func() error { return exec.Command("/proc/self/exe", silentArg).Start() })
	try("kill agentd", func() error { return syscall.Kill(os.Getppid(), 0) })
	try("look into agentd", func() error { _, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", os.Getppid())); return err })
	try("trace agentd", func() error { return syscall.PtraceAttach(os.Getppid()) })
	try("become root", func() error { return unix.Setuid(0) })
	b, _ := json.Marshal(out)
	if _, err := os.NewFile(3, "agentd").Write(b); err != nil {
		return 1
	}
	forever()
	return 0
}

func dialOnce(network, address string) error {
	c, err := net.DialTimeout(network, address, patient)
	if err != nil {
		return err
	}
	return c.Close()
}

// What an uplink that was taken over can do on the host: nothing.
func TestTakenOver(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	for d := dir; d != "/tmp" && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("of everybody"), 0o666); err != nil {
		t.Fatal(err)
	}
	local, err := net.Listen("unix", file+".sock")
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	if err := os.Chmod(file+".sock", 0o777); err != nil {
		t.Fatal(err)
	}
	listen := func() (net.Listener, string) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return l, strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	}
	l, port := listen()
	defer l.Close()
	l2, other := listen()
	defer l2.Close()
	s := starter(t, func(c *uplink.Config) { c.Args = []string{probeArg, file, port, other} })
	got, err := uplink.Said(s, tunnel.CarrierConfig{URL: "ws://127.0.0.1:" + port}, patient)
	if err != nil {
		t.Fatal(err)
	}
	var all []tried
	if err := json.Unmarshal(got, &all); err != nil {
		t.Fatalf("%q: %v", got, err)
	}
	if len(all) != 15 {
		t.Errorf("%d things were tried", len(all))
	}
	for i, x := range all {
		if may := i < 2; may != (x.Err == "") {
			t.Errorf("%s: %q", x.What, x.Err)
		}
	}
}
