package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/e2e/stack"
)

// hostStatus is what of `agentd status -o json` these tests look at.
type hostStatus struct {
	Attachments struct {
		PID        int    `json:"pid"`
		Error      string `json:"error"`
		Workspaces []struct {
			Workspace     string   `json:"workspace"`
			Mounts        []string `json:"mounts"`
			UnsentChanges int      `json:"unsent_changes"`
			Conflicts     int      `json:"conflicts"`
		} `json:"workspaces"`
	} `json:"attachments"`
}

func attachStatus(t *testing.T, a *stack.Agent) (s hostStatus, err error) {
	t.Helper()
	text, err := a.Run(t.Context(), "", "status", "--state", a.StateDir(), "--runtime", a.RuntimeDir(), "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(text), &s)
	}
	return s, err
}

// mounted is a stack with a host on which the workspace lab is mounted at target.
func mounted(t *testing.T) (s *stack.Stack, a *stack.Agent, target string) {
	t.Helper()
	needRoot(t)
	s = ownStack(t)
	dir := filepath.Join(shortDir(t), "m")
	target = filepath.Join(dir, "lab")
	if err := os.MkdirAll(target, 0o755); err != nil {
		t.Fatal(err)
	}
	a = joinOwn(t, s, "files", "attachments: {host_mounts: ["+dir+"]}\n")
	t.Cleanup(func() {
		_ = unix.Unmount(target, unix.MNT_DETACH)
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(a.StateDir(), "attach", "mountd.log"))
			t.Logf("mountd's log:\n%s", log)
		}
		// Mounts outlive agentd; these are of nobody else.
		for _, pid := range processesOf(t, s.Bin) {
			text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if bytes.Contains(text, []byte("\x00fdkeeper\x00")) || bytes.Contains(text, []byte("\x00mountd\x00")) {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	})
	must(t, s, "workspace", "create", "lab")
	// mountd may not be up yet: the mount waits for it.
	succeeds(t, agentd(t, a, "mount", "lab", target))
	return s, a, target
}

// agentd runs another command of an agent's.
func agentd(t *testing.T, a *stack.Agent, args ...string) ended {
	t.Helper()
	return finish(t, a.Command(t.Context(), append(args, "--state", a.StateDir(), "--runtime", a.RuntimeDir())...))
}

// succeeds fails the test if a command did not.
func succeeds(t *testing.T, e ended) {
	t.Helper()
	if e.code != 0 {
		t.Fatalf("exit code %d: %s", e.code, e.stderr)
	}
}

// shell runs a script in a directory, in a process of its own: a mount is touched by nobody else.
func shell(t *testing.T, dir, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-euc", script)
	cmd.Dir, cmd.WaitDelay = dir, 5*time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v: %s", script, err, out)
	}
	return string(out)
}

// TestAttachments mounts a workspace on a host and works in it, with the link and without.
func TestAttachments(t *testing.T) {
	s, a, target := mounted(t)
	touched := touchProgram(t, a)
	// Both ways.
	put := func(path, content string) {
		t.Helper()
		cmd := s.Command(t.Context(), "file", "put", "-", "lab:"+path)
		cmd.Stdin = strings.NewReader(content)
		succeeds(t, finish(t, cmd))
	}
	put("/dir/api.txt", "from the API\n")
	eventually(t, time.Minute, "a file of the API on the mount", func() error {
		if got, err := exec.CommandContext(t.Context(), "cat", filepath.Join(target, "dir/api.txt")).CombinedOutput(); err != nil || string(got) != "from the API\n" {
			return fmt.Errorf("%q, %w", got, err)
		}
		return nil
	})
	shell(t, target, "echo from the host > host.txt; ln -s host.txt link; mkdir sub; chmod 750 sub")
	eventually(t, time.Minute, "a file of the host at the control plane", func() error {
		if got := postern(t, s, "file", "cat", "lab:/host.txt"); got.stdout != "from the host\n" {
			return fmt.Errorf("%+v", got)
		}
		return nil
	})
	shell(t, target, "git init -q repo; cd repo; seq 1000 > a; git add a; git -c user.email=a@b -c user.name=n commit -qm first; git fsck --strict")

	// Without the link: what is here can be read and written; what is synced is not lost.
	s.ControlPlane.Kill()
	shell(t, target, "echo offline > off.txt; sync off.txt; cat off.txt host.txt; mv sub moved")
	agentd(t, a, "umount", target).said(t, 1, "not yet at the control plane")
	a.Process.Kill()
	shell(t, target, "cat off.txt; echo more >> off.txt; sync off.txt")
	startControlPlane(t, s)
	startAgent(t, a)
	eventually(t, 30*time.Second, "what was written without a link", func() error {
		if got := postern(t, s, "file", "cat", "lab:/off.txt"); got.stdout != "offline\nmore\n" {
			return fmt.Errorf("%+v", got)
		}
		return nil
	})
	if got := must(t, s, "file", "status", "lab"); !strings.Contains(got, target) {
		t.Errorf("status: %s", got)
	}
	if got := must(t, s, "file", "ls", "lab"); !strings.Contains(got, "moved/") || strings.Contains(got, "sub/") {
		t.Errorf("listing: %s", got)
	}
	// A full quota: the host keeps what it has, says so, and is not cut off by accident.
	must(t, s, "workspace", "set", "lab", "--quota", "1")
	shell(t, target, "head -c 100000 /dev/zero | tr '\\0' x > big; sync big")
	eventually(t, time.Minute, "unsent writes, and why", func() error {
		if got := postern(t, s, "file", "status", "lab"); !strings.Contains(got.stderr, "stand still") || !strings.Contains(got.stderr, "quota") {
			return fmt.Errorf("%+v", got)
		}
		return nil
	})
	postern(t, s, "agent", "revoke", a.Name).said(t, 1, "not uploaded")
	must(t, s, "workspace", "set", "lab", "--quota", "1GiB")
	eventually(t, 90*time.Second, "what the quota kept back", func() error {
		if got := postern(t, s, "file", "cat", "lab:/big"); len(got.stdout) != 100000 {
			return fmt.Errorf("exit code %d, %d bytes", got.code, len(got.stdout))
		}
		return nil
	})
	// What the host's policy does not allow.
	other := t.TempDir()
	agentd(t, a, "mount", "lab", other).said(t, 3, "host_mounts")
	empty := filepath.Join(filepath.Dir(target), "empty")
	if err := os.Mkdir(empty, 0o755); err != nil {
		t.Fatal(err)
	}
	agentd(t, a, "mount", "nowhere", empty).said(t, 4, "nowhere")
	succeeds(t, agentd(t, a, "umount", target))
	agentd(t, a, "umount", target).said(t, 4, "")
	auditVerifies(t, s)
	// Within a minute mountd gives back what of its program it does not use.
	eventually(t, 2*time.Minute, "mountd to become small", func() error {
		st, err := attachStatus(t, a)
		if err != nil || st.Attachments.PID == 0 {
			return fmt.Errorf("mountd: %+v, %v", st.Attachments, err)
		}
		if now := ofProgram(t, st.Attachments.PID); now > touched-16<<20 {
			return fmt.Errorf("%d MiB of its program are mapped, %d were", now>>20, touched>>20)
		}
		return nil
	})
}

// touchProgram maps all code and constants of the mountd of a host, and returns how many bytes of files it has
// mapped then.
func touchProgram(t *testing.T, a *stack.Agent) int64 {
	t.Helper()
	st, err := attachStatus(t, a)
	if err != nil || st.Attachments.PID == 0 {
		t.Fatalf("mountd: %+v, %v", st.Attachments, err)
	}
	pid := st.Attachments.PID
	dir := fmt.Sprintf("/proc/%d/", pid)
	program, err := os.Readlink(dir + "exe")
	if err != nil {
		t.Fatal(err)
	}
	maps, err := os.ReadFile(dir + "maps")
	if err != nil {
		t.Fatal(err)
	}
	memory, err := os.Open(dir + "mem")
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var permissions string
		if !strings.HasSuffix(line, " "+program+"\n") {
			continue
		}
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &permissions); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if strings.Contains(permissions, "w") {
			continue
		}
		if _, err := io.Copy(io.Discard, io.NewSectionReader(memory, from, to-from)); err != nil {
			t.Fatal(err)
		}
	}
	return ofProgram(t, pid)
}

// ofProgram is how many bytes of files a process has mapped and in memory.
func ofProgram(t *testing.T, pid int) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\nRssFile:")
	var kib int64
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		t.Fatalf("RssFile of %d: %v", pid, err)
	}
	return kib << 10
}

// TestMountAfterRemoval removes a host's replica as soon as it is unmounted and mounts the
// workspace again: mountd has the old one open still, and must not serve it.
func TestMountAfterRemoval(t *testing.T) {
	s, a, target := mounted(t)
	for i := range 3 {
		name := fmt.Sprintf("f%d", i)
		shell(t, target, "echo "+name+" > "+name)
		eventually(t, time.Minute, "the unmount", func() error {
			if got := agentd(t, a, "umount", target); got.code != 0 {
				return errors.New(got.stderr)
			}
			return nil
		})
		replica := filepath.Join(a.StateDir(), "attach", "workspaces", "lab")
		if err := os.RemoveAll(replica); err != nil {
			t.Fatal(err)
		}
		if i == 1 { // and with its name
			if err := os.Remove(replica + ".id"); err != nil {
				t.Fatal(err)
			}
		}
		succeeds(t, agentd(t, a, "mount", "lab", target))
		if got := shell(t, target, "cat f*"); got != "f0\nf1\nf2\n"[:3*(i+1)] {
			t.Errorf("after removal %d: %q", i, got)
		}
	}
	if got := must(t, s, "file", "conflicts", "lab", "-o", "json"); got != "[]" {
		t.Errorf("conflicts: %s", got)
	}
	succeeds(t, agentd(t, a, "umount", target))
}

// stopWriter makes a program end that writes to a mount until the file stop is there, and waits for it.
func stopWriter(t *testing.T, writer *exec.Cmd, stop string, ended <-chan error) {
	t.Helper()
	if err := os.WriteFile(stop, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(60 * time.Second):
		_ = writer.Process.Kill()
		t.Fatal("the writer hangs")
	}
}

// allUploaded waits until the control plane has everything of the only workspace that a host has mounted.
func allUploaded(t *testing.T, a *stack.Agent) {
	t.Helper()
	eventually(t, 2*time.Minute, "everything at the control plane", func() error {
		st, err := attachStatus(t, a)
		if err == nil && (len(st.Attachments.Workspaces) != 1 || st.Attachments.Workspaces[0].UnsentChanges > 0) {
			err = fmt.Errorf("%+v", st.Attachments)
		}
		return err
	})
}

// TestMountThroughKills writes and syncs files on a mounted workspace while mountd, agentd
// and the control plane are killed at random moments, mountd and agentd 200 times each at full length. The writer
// must see no error, and every file must be whole on the host and at the control plane.
func TestMountThroughKills(t *testing.T) {
	s, a, target := mounted(t)
	dir := filepath.Dir(target)
	ofMountd, ofAgentd, ofControlPlane, pause := 6, 3, 3, ""
	if long {
		ofMountd, ofAgentd, ofControlPlane, pause = 200, 200, 50, "0.05" // all files are looked at in the end
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	// The writer: a file is named in the list once it is synced. The list is elsewhere.
	list := filepath.Join(filepath.Dir(dir), "list")
	script := `i=0; while [ ! -e "$3" ]; do
		echo "content of $i" > "$1/n$i" && sync "$1/n$i" && mv "$1/n$i" "$1/f$i" && echo "f$i content of $i" >> "$2" || echo "FAILED $i" >> "$2"
		[ -z "$4" ] || sleep "$4"
		i=$((i+1)); done`
	stop := filepath.Join(filepath.Dir(dir), "stop")
	writer := exec.Command("/bin/sh", "-c", script, "writer", target, list, stop, pause)
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() { written <- writer.Wait() }()
	defer writer.Process.Kill() //nolint:errcheck // it has ended, unless the test failed

	const mountd, daemon, server = 0, 1, 2
	victims := slices.Concat(slices.Repeat([]int{mountd}, ofMountd), slices.Repeat([]int{daemon}, ofAgentd), slices.Repeat([]int{server}, ofControlPlane))
	r.Shuffle(len(victims), func(i, j int) { victims[i], victims[j] = victims[j], victims[i] })
	begun, killed := time.Now(), 0
	for i, victim := range victims {
		time.Sleep(time.Duration(200+r.IntN(500)) * time.Millisecond)
		switch victim {
		case daemon:
			a.Process.Kill()
			startAgent(t, a)
		case server:
			s.ControlPlane.Kill()
			startControlPlane(t, s)
		case mountd:
			eventually(t, time.Minute, "a mountd to kill", func() error {
				st, err := attachStatus(t, a)
				switch pid := st.Attachments.PID; {
				case err != nil:
					return err
				case pid == 0 || pid == killed:
					return fmt.Errorf("mountd is %d: %s", pid, st.Attachments.Error)
				default:
					killed = pid
					return syscall.Kill(pid, syscall.SIGKILL)
				}
			})
		}
		if i%50 == 49 {
			t.Logf("%d kills in %s", i+1, time.Since(begun).Round(time.Second))
		}
	}
	stopWriter(t, writer, stop, written)
	allUploaded(t, a)
	text, err := os.ReadFile(list)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	t.Logf("%d files, %d kills of mountd, %d of agentd, %d of the control plane", len(lines), ofMountd, ofAgentd, ofControlPlane)
	if len(lines) < 20 {
		t.Errorf("only %d files: that was no load", len(lines))
	}
	// By a process of its own, as all that touches a mount.
	local := map[string]string{}
	for line := range strings.Lines(shell(t, target, "find . -type f -exec grep -H '' {} +")) {
		name, content, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		local[strings.TrimPrefix(name, "./")] = content
	}
	if len(local) != len(lines) {
		t.Errorf("%d files on the host, want %d", len(local), len(lines))
	}
	for _, line := range lines {
		name, want, _ := strings.Cut(line, " ")
		if name == "FAILED" {
			t.Errorf("the writer saw an error at file %s", want)
		} else if local[name] != want {
			t.Errorf("%s on the host: %q", name, local[name])
		}
	}
	// And at the control plane, all of them.
	back := t.TempDir()
	must(t, s, "file", "get", "-r", "lab:/", back)
	for _, line := range lines {
		name, want, _ := strings.Cut(line, " ")
		if got, err := os.ReadFile(filepath.Join(back, name)); err != nil || string(got) != want+"\n" {
			t.Errorf("%s at the control plane: %q, %v", name, got, err)
		}
	}
	if got := must(t, s, "file", "conflicts", "lab", "-o", "json"); got != "[]" {
		t.Errorf("conflicts although nobody else wrote: %s", got)
	}
	succeeds(t, agentd(t, a, "umount", target))
}
