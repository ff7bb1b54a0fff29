package confine_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/confine"
)

// probe says what it can do, one word for each, and gives up more by itself if told to.
func probe(args []string) int {
	err := confine.Harden(64, 64)
	switch args[0] {
	case "all":
		err = errors.Join(err, confine.ForbidAll())
	case "all but dialing":
		err = errors.Join(err, confine.ForbidAllButDialing())
	case "wait":
		time.Sleep(time.Hour)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var can []string
	try := func(what string, err error) {
		if err == nil {
			can = append(can, what)
		}
	}
	if n, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); err != nil || n != 1 {
		can = append(can, "new privileges")
	}
	if n, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, unix.CAP_KILL, 0, 0, 0); err != nil || n != 0 {
		can = append(can, "capabilities")
	}
	if n, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || n != 0 {
		can = append(can, "be dumped")
	}
	for _, path := range []string{"/etc/hosts", args[1]} {
		_, err := os.ReadFile(path)
		try("read "+path, err)
	}
	for _, port := range args[2:] {
		c, err := net.DialTimeout("tcp", "127.0.0.1:"+port, time.Minute)
		if err == nil {
			_ = c.Close()
		}
		try("dial "+port, err)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err == nil {
		_ = unix.Close(fd)
	}
	try("make unix sockets", err)
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"agentd", probeArg, "wait"}, nil)
	if err == nil {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	try("start programs", err)
	return map[bool]int{true: 0, false: 1}[json.NewEncoder(os.Stdout).Encode(can) == nil]
}

// run starts a probe and returns what it can do.
func run(t *testing.T, c confine.Confinement, args ...string) []string {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.Command("/proc/self/exe", append([]string{probeArg}, args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null(t), &out, &errs
	c.Executable = "/proc/self/exe"
	if err := confine.Start(cmd, c); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, errs.String())
	}
	var can []string
	if err := json.Unmarshal(out.Bytes(), &can); err != nil {
		t.Fatalf("%q: %v", out.String(), err)
	}
	return can
}

// null is opened here: the thread that starts a process may not.
func null(t *testing.T) *os.File {
	t.Helper()
	f, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func listen(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}

func TestConfinement(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to take capabilities away")
	}
	allowed, other := listen(t), listen(t)
	n, _ := strconv.Atoi(allowed)
	ports := []uint16{uint16(n)}
	dir := t.TempDir()
	file := dir + "/file"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// Programs that it starts are confined as well, and cannot read their executable.
	for name, c := range map[string]struct {
		confinement confine.Confinement
		forbid      string
		want        []string
	}{
		"dialing":      {confine.Confinement{Ports: ports}, "all but dialing", []string{"read /etc/hosts", "dial " + allowed}},
		"readable":     {confine.Confinement{Ports: ports, Readable: []string{file, dir + "/missing"}}, "all but dialing", []string{"read /etc/hosts", "read " + file, "dial " + allowed}},
		"a directory":  {confine.Confinement{Ports: []uint16{}, Readable: []string{dir}}, "all but dialing", []string{"read /etc/hosts", "read " + file}},
		"any port":     {confine.Confinement{}, "all but dialing", []string{"read /etc/hosts", "dial " + allowed, "dial " + other}},
		"offline":      {confine.Confinement{Offline: true}, "all but dialing", nil},
		"nothing more": {confine.Confinement{Ports: ports}, "all", nil},
	} {
		t.Run(name, func(t *testing.T) {
			if got := run(t, c.confinement, c.forbid, file, allowed, other); !slices.Equal(got, c.want) {
				t.Errorf("it can %q, want %q", got, c.want)
			}
		})
	}
}

// TestBornInAGroup: a process is born in a control group, of version 1 by Tasks, of version 2 by
// CgroupFD, whatever the thread that starts it has given up; we ourselves stay where we are.
func TestBornInAGroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes control groups")
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		unified := fields[2] == "cgroup2"
		if !unified && (fields[2] != "cgroup" || !strings.HasSuffix(fields[1], "/pids")) {
			continue
		}
		found++
		name := fmt.Sprintf("postern-confine-test-%d", os.Getpid())
		dir := filepath.Join(fields[1], name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		cmd := exec.Command("/proc/self/exe", probeArg, "wait")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = null(t), null(t), null(t)
		c := confine.Confinement{Executable: "/proc/self/exe", Ended: ended}
		if unified {
			group, err := os.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer group.Close()
			cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd())}
		} else {
			c.Tasks = []string{filepath.Join(dir, "tasks")}
		}
		err := confine.Start(cmd, c)
		if err != nil {
			t.Errorf("%s: %v", fields[2], err)
		} else {
			got, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", cmd.Process.Pid))
			if err != nil || !strings.Contains(string(got), "/"+name+"\n") {
				t.Errorf("%s: it is in %q, %v", fields[2], got, err)
			}
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		close(ended)
		if own, err := os.ReadFile("/proc/self/cgroup"); err != nil || strings.Contains(string(own), name) {
			t.Errorf("%s: we are in %q, %v", fields[2], own, err)
		}
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) { // the thread ends soon
			if err = os.Remove(dir); err == nil || time.Now().After(deadline) {
				break
			}
		}
		if err != nil {
			t.Error(err)
		}
	}
	if found == 0 {
		t.Skip("needs root of a host with control groups")
	}
}

// A signal for the parent's death counts from the end of the thread that started the
// process: that stays as long as the process, and no longer.
func TestThreadStays(t *testing.T) {
	ended := make(chan struct{})
	cmd := exec.Command("/proc/self/exe", probeArg, "wait")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null(t), null(t), null(t)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := confine.Start(cmd, confine.Confinement{Executable: "/proc/self/exe", Ended: ended}); err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, tid := range threads(t) {
		b, err := os.ReadFile("/proc/self/task/" + tid + "/children")
		if err == nil && slices.Contains(strings.Fields(string(b)), strconv.Itoa(cmd.Process.Pid)) {
			found++
		}
	}
	if found != 1 {
		t.Errorf("%d threads have the process as their child", found)
	}
	if err := syscall.Kill(cmd.Process.Pid, 0); err != nil {
		t.Errorf("it is gone: %v", err)
	}
	_ = cmd.Process.Kill()
	var status *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &status) || !status.Sys().(syscall.WaitStatus).Signaled() {
		t.Errorf("it ended with %v", err)
	}
	close(ended)
}

func threads(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}
