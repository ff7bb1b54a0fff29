package fdkeeper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/attach/fuseserver"
)

// kept is a running keeper with its server, whose mount is at dir.
type kept struct {
	t       *testing.T
	state   string
	dir     string
	keeper  *os.Process
	control *fuseserver.Control
}

func start(t *testing.T) *kept {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
	control, err := fuseserver.OpenControl()
	if err != nil {
		t.Fatal(err)
	}
	k := &kept{t: t, state: t.TempDir(), dir: t.TempDir(), control: control}
	k.spawn()
	t.Cleanup(k.end)
	var tree *os.File
	k.eventually("the mount", func() error {
		c, err := Dial(k.state)
		if err != nil {
			return err
		}
		defer c.Close()
		tree, err = c.Clone("one", false)
		return err
	})
	defer tree.Close()
	if err := unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, k.dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
	return k
}

func (k *kept) spawn() {
	k.t.Helper()
	command, env := role("keeper", k.state)
	p, err := Spawn(k.t.Context(), SpawnConfig{Command: command, Env: env, LogFile: filepath.Join(k.state, "log")})
	if err != nil {
		k.t.Fatal(err)
	}
	k.keeper = p
}

// end leaves no process and no mount.
func (k *kept) end() {
	if k.t.Failed() {
		log, _ := os.ReadFile(filepath.Join(k.state, "log"))
		k.t.Logf("log:\n%s", log)
	}
	_ = unix.Unmount(k.dir, unix.MNT_DETACH)
	if k.keeper != nil {
		_ = k.keeper.Signal(syscall.SIGTERM)
		_, _ = k.keeper.Wait()
	}
	// A keeper that a server started is nobody's child, and starts another server, as a server does a
	// keeper: until both are killed at once.
	k.eventually("the end of all processes", func() error {
		left := k.processes()
		for _, pid := range left {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		if len(left) > 0 {
			return fmt.Errorf("processes %v", left)
		}
		return nil
	})
	_ = k.control.Close()
}

// processes are those of this test: their command line has its directory.
func (k *kept) processes() (out []int) {
	found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range found {
		text, _ := os.ReadFile(path)
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if bytes.Contains(text, []byte(k.state)) && pid != os.Getpid() {
			out = append(out, pid)
		}
	}
	return out
}

func (k *kept) eventually(what string, ok func() error) {
	k.t.Helper()
	var err error
	for until := time.Now().Add(time.Minute); time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
		if err = ok(); err == nil {
			return
		}
	}
	k.t.Errorf("%s: %v", what, err)
}

func (k *kept) server() int {
	text, err := os.ReadFile(filepath.Join(k.state, "pid"))
	if err != nil {
		k.t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(text))
	if err != nil {
		k.t.Fatal(err)
	}
	return pid
}

// read reads the file in a process of its own: `"12345" 0`, or the errno, and the time.
func (k *kept) read() (string, time.Duration) {
	k.t.Helper()
	command, env := role("read", filepath.Join(k.dir, "f"))
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Env = env
	var out bytes.Buffer
	cmd.Stdout = &out
	var st unix.Statx_t
	_ = unix.Statx(unix.AT_FDCWD, k.dir, unix.AT_STATX_DONT_SYNC, 0, &st)
	ctx, cancel := context.WithTimeout(k.t.Context(), 30*time.Second)
	defer cancel()
	defer context.AfterFunc(ctx, func() { k.t.Error("a reader hangs"); _ = k.control.Abort(st.Dev_minor) })()
	if err := cmd.Run(); err != nil {
		k.t.Fatal(err)
	}
	f := strings.Fields(out.String())
	took, err := strconv.Atoi(f[2])
	if err != nil {
		k.t.Fatal(err)
	}
	return f[0] + " " + f[1], time.Duration(took) * time.Millisecond
}

func (k *kept) wantRead() time.Duration {
	k.t.Helper()
	got, took := k.read()
	if got != `"12345" 0` {
		k.t.Errorf("read: %s", got)
	}
	return took
}

func TestServerIsRestarted(t *testing.T) {
	k := start(t)
	k.wantRead()
	var worst time.Duration
	for range 5 {
		if err := syscall.Kill(k.server(), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		worst = max(worst, k.wantRead())
		time.Sleep(50 * time.Millisecond)
	}
	t.Logf("a read right after kill -9 of the server took at most %v", worst)
}

func TestUpgrade(t *testing.T) {
	k := start(t)
	before := k.server()
	c, err := Dial(k.state)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	command, _ := role("server", k.state)
	if err := c.Renew(command); err != nil {
		t.Fatal(err)
	}
	k.eventually("another server", func() error {
		if k.server() == before {
			return errors.New("the same")
		}
		return nil
	})
	k.wantRead()
	k.eventually("the old server's end", func() error {
		if err := syscall.Kill(before, 0); !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("it is still there: %v", err)
		}
		return nil
	})
	if err := c.Renew([]string{"relative"}); err == nil {
		t.Error("a relative command was taken")
	}
}

// TestKeeperDies wants the server to go on, and everything to be kept again by the keeper
// that it starts: both may die then, one after the other.
func TestKeeperDies(t *testing.T) {
	k := start(t)
	k.wantRead()
	server := k.server()
	if err := k.keeper.Kill(); err != nil {
		t.Fatal(err)
	}
	_, _ = k.keeper.Wait()
	k.keeper = nil
	k.wantRead()
	k.eventually("a new keeper", func() error {
		c, err := Dial(k.state)
		if err != nil {
			return err
		}
		defer c.Close()
		names, err := c.List()
		if err == nil && len(names) != 1 {
			err = fmt.Errorf("it keeps %v", names)
		}
		return err
	})
	if got := k.server(); got != server {
		t.Errorf("the server was replaced: %d, was %d", got, server)
	}
	if err := syscall.Kill(server, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	k.wantRead()
}

// TestNobodyServes wants an error for whoever waits when no server can be started, and
// soon.
func TestNobodyServes(t *testing.T) {
	k := start(t)
	if err := os.WriteFile(filepath.Join(k.state, "refuse"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(k.server(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	got, took := k.read()
	if !strings.HasSuffix(got, fmt.Sprintf(" %d", int(syscall.ECONNABORTED))) && !strings.HasSuffix(got, fmt.Sprintf(" %d", int(syscall.ENOTCONN))) {
		t.Errorf("read: %s, want ENOTCONN", got)
	}
	t.Logf("%s after %v", got, took)
	k.eventually("the connection is let go", func() error {
		c, err := Dial(k.state)
		if err != nil {
			return err
		}
		defer c.Close()
		names, err := c.List()
		if len(names) > 0 {
			err = fmt.Errorf("still kept: %v", names)
		}
		return err
	})
}

// TestSlowServer wants whoever waits to go on waiting for a server that is slow to take over, but
// says that it does.
func TestSlowServer(t *testing.T) {
	k := start(t)
	k.wantRead()
	if err := os.WriteFile(filepath.Join(k.state, "slow"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(k.server(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	t.Logf("a read while the next server is slow took %v", k.wantRead())
}

// TestDeafServer wants a server that hangs to be killed and replaced.
func TestDeafServer(t *testing.T) {
	k := start(t)
	k.wantRead()
	server := k.server()
	if err := syscall.Kill(server, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	k.eventually("every thread is stopped", func() error { // a thread on its way may still answer
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", server))
		for _, task := range tasks {
			text, _ := os.ReadFile(task)
			if _, state, _ := bytes.Cut(text, []byte(") ")); len(state) > 0 && state[0] != 'T' {
				return fmt.Errorf("%s: %c", task, state[0])
			}
		}
		return err
	})
	t.Logf("a read while the server hangs took %v", k.wantRead())
	if k.server() == server {
		t.Error("it was not replaced")
	}
}

func TestSecondKeeper(t *testing.T) {
	k := start(t)
	command, env := role("keeper", k.state)
	p, err := Spawn(t.Context(), SpawnConfig{Command: command, Env: env, LogFile: filepath.Join(k.state, "log")})
	if err != nil {
		t.Fatal(err)
	}
	if st, err := p.Wait(); err != nil || !st.Success() {
		t.Errorf("a second keeper: %v, %v", st, err)
	}
	k.wantRead()
}

func TestClientsAreHeldToTheRules(t *testing.T) {
	k := start(t)
	c, err := Dial(k.state)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Clone("two", false); !errors.Is(err, ErrUnknown) {
		t.Errorf("a connection that is not there: %v", err)
	}
	for what, err := range map[string]error{
		"drop": c.Drop("one"), "update": c.Update("one", nil), "serving": c.Serving("one"), "beat": c.Beat(),
	} {
		if err == nil {
			t.Errorf("%s without a claim was let through", what)
		}
	}
	if _, err := Dial(t.TempDir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("where no keeper is: %v", err)
	}
	ro, err := c.Clone("one", true)
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	dir := t.TempDir()
	if err := unix.MoveMount(int(ro.Fd()), "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH) //nolint:errcheck // the test has failed or is done
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); f[4] == dir && !strings.HasPrefix(f[5], "ro,") {
			t.Errorf("a read-only copy is mounted %s", f[5])
		}
	}
}

// TestSameServerClaimsAgain wants a server whose conversation broke to go on: it is not
// told to end, and has what it had.
func TestSameServerClaimsAgain(t *testing.T) {
	k := start(t)
	k.wantRead()
	server := k.server()
	// The server's role ends its conversation when this file is there, once.
	if err := os.WriteFile(filepath.Join(k.state, "hangup"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	k.eventually("the server's new conversation", func() error {
		if _, err := os.Stat(filepath.Join(k.state, "again")); err != nil {
			return err
		}
		return nil
	})
	k.wantRead()
	if got := k.server(); got != server {
		t.Errorf("the server was replaced: %d, was %d", got, server)
	}
	if err := syscall.Kill(server, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	k.wantRead()
}
