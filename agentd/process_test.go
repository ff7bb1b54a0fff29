package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
)

// process is agentd as systemd would start it.
type process struct {
	t      *testing.T
	cmd    *exec.Cmd
	log    *syncBuffer
	notify *net.UnixConn

	mu    sync.Mutex
	told  []string // to systemd, in order
	taken int      // of told, by await
}

// unwatched turns systemd's watchdog off, for tests to which it says nothing.
const unwatched = "WATCHDOG_USEC="

func startProcess(t *testing.T, l *lab, env ...string) *process {
	t.Helper()
	p := startDeaf(t, l, env...)
	reading := make(chan struct{})
	go func() {
		defer close(reading)
		p.listen()
	}()
	t.Cleanup(func() { // before that of startDeaf
		p.end()
		<-reading
	})
	return p
}

// startDeaf is startProcess with a systemd that takes no message.
func startDeaf(t *testing.T, l *lab, env ...string) *process {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, log: &syncBuffer{}, notify: conn}
	p.cmd = exec.Command(os.Args[0], "run", "--config", l.path("agentd.yaml"), "--state", l.path("state"), "--runtime", l.path("run"))
	p.cmd.Env = append([]string{"POSTERN_TEST_AGENTD=1", "NOTIFY_SOCKET=" + socket, "WATCHDOG_USEC=400000"}, env...)
	p.cmd.Stderr = p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.end()
		if t.Failed() {
			t.Log(p.log.String())
		}
	})
	return p
}

// end kills the process if it runs, and closes systemd's socket.
func (p *process) end() {
	if p.cmd.ProcessState == nil {
		p.cmd.Process.Kill() //nolint:errcheck // it may have ended
		p.cmd.Wait()         //nolint:errcheck // it was killed
	}
	p.notify.Close() //nolint:errcheck // a test's
}

// await waits until systemd was told something that begins with want, after what the last
// await found.
func (p *process) await(want string) string {
	p.t.Helper()
	var found string
	poll(p.t, "systemd to be told "+want, func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		for p.taken < len(p.told) && found == "" {
			if strings.HasPrefix(p.told[p.taken], want) {
				found = p.told[p.taken]
			}
			p.taken++
		}
		return found != ""
	})
	return found
}

// listen takes what systemd is told, as systemd does, until the socket is closed.
func (p *process) listen() {
	buf := make([]byte, 4096)
	for {
		n, err := p.notify.Read(buf)
		if err != nil {
			return
		}
		p.mu.Lock()
		p.told = append(p.told, string(buf[:n]))
		p.mu.Unlock()
	}
}

func (p *process) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// reload makes the daemon read its configuration again, and waits until it has: the
// READY=1 of its start may still be unread.
func (p *process) reload() (told string) {
	p.t.Helper()
	p.signal(syscall.SIGHUP)
	told = p.await("RELOADING=1")
	p.await("READY=1")
	return told
}

func (p *process) proc(name string) string {
	p.t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.cmd.Process.Pid, name))
	if err != nil {
		p.t.Fatal(err)
	}
	return string(raw)
}

// TestUnderSystemd goes through the life of the service: ready, watchdog,
// reload, stop; and looks at the process from outside.
func TestUnderSystemd(t *testing.T) {
	_, source := database(t, "")
	source = regexp.MustCompile(`password: .*`).ReplaceAllString(source, "password: {env: WAREHOUSE_PW}")
	c := newTestControl(t)
	l := newLab(t, c, source)
	p := startProcess(t, l, "WAREHOUSE_PW="+marked, "OTHER=stays")
	p.await("READY=1")
	up := c.awaitHello(1)
	if r := c.ask(t.Context(), up, "q1", "shop", "select 1"); r.err != nil {
		t.Errorf("a password from the environment: %v", r.err)
	}
	p.await("WATCHDOG=1")
	p.await("WATCHDOG=1")
	if os.Geteuid() == 0 { // the process hides from its own user
		if env := p.proc("environ"); strings.Contains(env, marked) || !strings.Contains(env, "OTHER=stays") {
			t.Errorf("environment %q", env)
		}
		if limits := p.proc("limits"); !regexp.MustCompile(`Max core file size +0 +0`).MatchString(limits) {
			t.Errorf("limits %s", limits)
		}
		if listening := listeningTCP(t, p.cmd.Process.Pid); len(listening) > 0 {
			t.Errorf("it listens: %v", listening)
		}
	}
	if strings.Contains(p.proc("cmdline"), marked) {
		t.Error("the command line shows the password")
	}

	if told := p.reload(); !regexp.MustCompile(`\nMONOTONIC_USEC=\d+$`).MatchString(told) {
		t.Errorf("told %q", told)
	}
	if r := c.ask(t.Context(), up, "q2", "shop", "select 1"); r.err != nil {
		t.Errorf("after a reload: %v", r.err)
	}

	p.signal(syscall.SIGTERM)
	p.await("STOPPING=1")
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !slices.ContainsFunc(p.told, func(s string) bool { return strings.HasPrefix(s, "STATUS=link up") }) {
		t.Errorf("told %q", p.told)
	}
	if strings.Contains(p.log.String(), marked) {
		t.Error("the log shows the password")
	}
	if got := l.actions(); !strings.HasSuffix(got, "host.stop done") {
		t.Errorf("recorded %s", got)
	}
}

// TestNobodyReadsNotify: whoever started agentd may read nothing of what systemd would; it
// goes on, and SIGTERM ends it.
func TestNobodyReadsNotify(t *testing.T) {
	c := newTestControl(t)
	l := newLab(t, c, "")
	p := startDeaf(t, l, "WATCHDOG_USEC=40000")
	c.awaitHello(1)
	full := func() bool { // a send would wait
		conn, err := net.DialUnix("unixgram", nil, p.notify.LocalAddr().(*net.UnixAddr))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()                                           //nolint:errcheck // a test's
		conn.SetWriteDeadline(time.Now().Add(50 * time.Millisecond)) //nolint:errcheck // a test's
		_, err = conn.Write([]byte("X=1"))
		return errors.Is(err, os.ErrDeadlineExceeded)
	}
	poll(t, "the socket to be full", full)
	p.signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	if got := l.actions(); !strings.HasSuffix(got, "host.stop done") {
		t.Errorf("recorded %s", got)
	}
}

// TestKilled: after kill -9 with a statement under way the next start closes the
// chain, and no process is left.
func TestKilled(t *testing.T) {
	_, source := database(t, "")
	c := newTestControl(t)
	l := newLab(t, c, source)
	for n := 1; n <= 5; n++ {
		p := startProcess(t, l)
		up := c.awaitHello(n)
		running := make(chan result, 1)
		go func() { running <- c.ask(t.Context(), up, fmt.Sprintf("q%d", n), "shop", "select pg_sleep(60)") }()
		poll(t, "the statement to run", func() bool {
			session := slices.ContainsFunc(childrenOf(p.cmd.Process.Pid), func(pid int) bool {
				line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
				return err == nil && strings.Contains(string(line), sqlsession.ChildArg)
			})
			return session && strings.Count(l.actions(), "sql.begin") >= n
		})
		children := childrenOf(p.cmd.Process.Pid)
		p.signal(syscall.SIGKILL)
		p.cmd.Wait() //nolint:errcheck // it was killed
		if r := <-running; r.err == nil {
			t.Error("the statement ended well")
		}
		for _, pid := range children {
			poll(t, fmt.Sprintf("child %d to end", pid), func() bool { return !runs(pid) })
		}
	}
	l.start()
	c.awaitHello(6)
	l.stop()
	if got := l.actions(); strings.Count(got, "sql.lost failed") != 5 {
		t.Errorf("recorded %s", got)
	}
}

// childrenOf lists the direct children of a process.
func childrenOf(pid int) []int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat") //nolint:errcheck // the pattern is good
	var out []int
	for _, stat := range stats {
		raw, err := os.ReadFile(stat)
		if err != nil {
			continue // it has ended
		}
		var child, parent int
		var state string
		if _, err := fmt.Sscanf(string(raw), "%d", &child); err != nil {
			continue
		}
		rest := raw[bytes.LastIndexByte(raw, ')')+1:]
		if _, err := fmt.Sscanf(string(rest), "%s %d", &state, &parent); err == nil && parent == pid {
			out = append(out, child)
		}
	}
	return out
}

// runs reports whether a process exists and is no zombie.
func runs(pid int) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	state := strings.TrimSpace(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	return !strings.HasPrefix(state, "Z")
}

// listeningTCP lists the listening TCP sockets of a process.
func listeningTCP(t *testing.T, pid int) []string {
	t.Helper()
	var inodes []string
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(fds) == 0 {
		t.Fatalf("no descriptors: %v", err)
	}
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && strings.HasPrefix(target, "socket:[") {
			inodes = append(inodes, strings.TrimSuffix(strings.TrimPrefix(target, "socket:["), "]"))
		}
	}
	var out []string
	for _, table := range []string{"tcp", "tcp6"} {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		if err != nil {
			continue // no IPv6
		}
		for line := range strings.Lines(string(raw)) {
			fields := strings.Fields(line)
			if len(fields) > 9 && fields[3] == "0A" && slices.Contains(inodes, fields[9]) {
				out = append(out, fields[1])
			}
		}
	}
	return out
}
