package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/attach/mountd"
	"github.com/postern-dev/postern/agentd/attach/remote/simulatedremote"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

// mounts is a lab whose control plane has workspaces.
type mounts struct {
	*lab
	remote *simulatedremote.Remote
	dir    string // below which the host may mount
}

func newMounts(t *testing.T) *mounts {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
	c := newTestControl(t)
	remote := simulatedremote.New()
	c.attach = simulatedremote.Handler(remote)
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	m := &mounts{lab: newLab(t, c, "attachments:\n  workspaces: ['lab*', 'ro']\n  read_only: [ro]\n  host_mounts: ["+dir+"]\n"), remote: remote, dir: dir}
	t.Cleanup(m.clean)
	m.start()
	m.eventually("mountd", func() error {
		if s := m.d.attachmentStatus(); s.PID == 0 {
			return errors.New(s.Error)
		}
		return nil
	})
	poll(t, "the link", func() bool { return m.d.link.State().Up }) // else a workspace is refused that the host doesn't know
	return m
}

// clean ends mountd and its keeper, and takes mounts away.
func (m *mounts) clean() {
	if m.t.Failed() {
		log, _ := os.ReadFile(m.path("state/attach/" + attachLog))
		m.t.Logf("mountd's log:\n%s", log)
	}
	for _, dir := range []string{m.dir, m.path("state/attach/kernels")} {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if ours, _ := mountd.Mounted(filepath.Join(dir, e.Name())); ours {
				_ = unix.Unmount(filepath.Join(dir, e.Name()), unix.MNT_DETACH)
			}
		}
	}
	m.eventually("the end of mountd and its keeper", func() error {
		left := m.processes()
		for _, pid := range left {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		if len(left) > 0 {
			return fmt.Errorf("processes %v", left)
		}
		return nil
	})
}

func (m *mounts) processes() (out []int) {
	found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range found {
		text, _ := os.ReadFile(path)
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if bytes.Contains(text, []byte(m.path("state"))) && pid != os.Getpid() {
			out = append(out, pid)
		}
	}
	return out
}

func (m *mounts) eventually(what string, ok func() error) {
	m.t.Helper()
	var err error
	for until := time.Now().Add(2 * time.Minute); time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
		if err = ok(); err == nil {
			return
		}
	}
	m.t.Errorf("%s: %v", what, err)
}

// target makes a directory to mount on.
func (m *mounts) target(name string) string {
	m.t.Helper()
	dir := filepath.Join(m.dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		m.t.Fatal(err)
	}
	return dir
}

func (m *mounts) mount(workspace, dir string, readOnly bool) error {
	var out bytes.Buffer
	return mountHere(m.t.Context(), &m.d.places, &out, workspace, dir, readOnly)
}

// sh runs a command in a process of its own: this one is the tests' agentd.
func (m *mounts) sh(format string, args ...any) string {
	m.t.Helper()
	script := fmt.Sprintf(format, args...)
	ctx, cancel := context.WithTimeout(m.t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "/bin/sh", "-c", script).CombinedOutput()
	if err != nil {
		return strings.TrimSpace(string(out)) + " " + err.Error()
	}
	return strings.TrimSpace(string(out))
}

func TestMountOnTheHost(t *testing.T) {
	m := newMounts(t)
	dir := m.target("books")
	if err := m.mount("lab", dir, false); err != nil {
		t.Fatal(err)
	}
	if got := m.sh("echo hello > %s/f && cat %s/f", dir, dir); got != "hello" {
		t.Errorf("a file written and read: %s", got)
	}
	// A file that is open lives through everything that may happen to processes.
	if got := m.sh("exec 3<%s/f; kill -9 %d; sleep 0.1; cat <&3; cat %s/f", dir, m.d.attachmentStatus().PID, dir); got != "hello\nhello" {
		t.Errorf("after kill -9 of mountd: %s", got)
	}
	m.stop()
	if got := m.sh("cat %s/f; echo more >> %s/f", dir, dir); got != "hello" {
		t.Errorf("while agentd is away: %s", got)
	}
	m.start()
	m.eventually("everything sent", func() error {
		s := m.d.attachmentStatus()
		if len(s.Workspaces) != 1 || s.Workspaces[0].UnsentChanges > 0 || len(s.Workspaces[0].Mounts) != 1 || s.Workspaces[0].Mounts[0] != dir {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	if err := umountHere(t.Context(), &m.d.places, dir, false); err != nil {
		t.Fatal(err)
	}
	if here, err := mountd.Mounted(dir); here || err != nil {
		t.Errorf("still mounted: %v, %v", here, err)
	}
	if err := umountHere(t.Context(), &m.d.places, dir, false); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("unmounted twice: %v", err)
	}
	if got := m.actions(); !strings.Contains(got, "attachment.mount done") || !strings.Contains(got, "attachment.umount done") {
		t.Errorf("audit log: %s", got)
	}
	// What was mounted once is there again.
	if err := m.mount("lab", dir, true); err != nil {
		t.Fatal(err)
	}
	if got := m.sh("cat %s/f; touch %s/g", dir, dir); !strings.HasPrefix(got, "hello\nmore\n") || !strings.Contains(got, "Read-only") {
		t.Errorf("mounted again, read-only: %s", got)
	}
}

func TestMountPolicy(t *testing.T) {
	m := newMounts(t)
	inside := m.target("a")
	link := filepath.Join(m.dir, "link")
	if err := os.Symlink("/tmp", link); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, workspace, dir string }{
		{"another workspace", "secret", inside},
		{"another directory", "lab", t.TempDir()},
		{"the root of the allowed", "lab", m.dir},
	} {
		if err := m.mount(c.workspace, c.dir, false); proto.CodeOf(err) != proto.CodePolicyDenied {
			t.Errorf("%s: %v, want POLICY_DENIED", c.name, err)
		}
	}
	if err := m.mount("lab", link, false); err == nil || !strings.Contains(err.Error(), "no directory") {
		t.Errorf("a symbolic link: %v", err)
	}
	if err := m.mount("lab", filepath.Join(m.dir, "nothing"), false); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	if err := umountHere(t.Context(), &m.d.places, "/", true); err == nil {
		t.Error("/ was unmounted")
	}
	if err := umountHere(t.Context(), &m.d.places, "/proc", true); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("a mount that is not ours: %v", err)
	}
	// Read-only by policy, whatever was asked for.
	if err := m.mount("ro", inside, false); err != nil {
		t.Fatal(err)
	}
	if got := m.sh("touch %s/f", inside); !strings.Contains(got, "Read-only") {
		t.Errorf("a write where the policy lets nobody: %s", got)
	}
	if got := m.actions(); strings.Count(got, "attachment.mount denied") != 3 {
		t.Errorf("audit log: %s", got)
	}
}

func TestUnsentWrites(t *testing.T) {
	m := newMounts(t)
	dir := m.target("a")
	if err := m.mount("lab", dir, false); err != nil {
		t.Fatal(err)
	}
	if got := m.sh("echo 1 > %s/first; ls %s", dir, dir); got != "first" {
		t.Fatalf("with a link: %s", got)
	}
	m.remote.Cut(true)
	if got := m.sh("echo precious > %s/f", dir); got != "" {
		t.Errorf("a write without a link: %s", got)
	}
	// The command waits 10 s; what it does is asked for here without.
	client := m.d.attach.client
	if err := client.Settle(t.Context(), "", "host:"+dir, 100*time.Millisecond); proto.CodeOf(err) != proto.CodeUnavailable || !strings.Contains(err.Error(), "--force") {
		t.Errorf("unsent writes: %v", err)
	}
	if s := m.d.attachmentStatus(); len(s.Workspaces) != 1 || s.Workspaces[0].UnsentChanges == 0 {
		t.Errorf("status: %+v", s)
	}
	up := m.c.awaitHello(1)
	host := posternv1connect.NewAttachHostServiceClient(&http.Client{Transport: up.Transport(tunnel.Control)}, "http://agent")
	told, err := host.GetAttachStatus(t.Context(), connect.NewRequest(&posternv1.GetAttachStatusRequest{Workspace: "lab"}))
	if err != nil {
		t.Fatal(err)
	}
	if s := told.Msg.Mounts; len(s) != 1 || s[0].UnsentOps == 0 || !s[0].OldestUnsent.IsValid() || len(s[0].Targets) != 1 || s[0].Targets[0] != dir || len(s[0].MountId) != 36 || !slices.ContainsFunc(s[0].UnsentPaths, func(p []byte) bool { return string(p) == "/f" }) {
		t.Errorf("what the control plane is told: %v", s)
	}
	if s := m.d.attachmentStatus(); len(s.Workspaces) != 1 || !slices.Contains(s.Workspaces[0].UnsentPaths, "/f") {
		t.Errorf("paths: %+v", s)
	}
	if err := umountHere(t.Context(), &m.d.places, dir, true); err != nil {
		t.Fatal(err)
	}
	// Nothing is lost: another mountd finds it, and sends it.
	if err := syscall.Kill(m.d.attachmentStatus().PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	m.eventually("a mountd with something to send", func() error {
		if s := m.d.attachmentStatus(); len(s.Workspaces) != 1 || s.Workspaces[0].UnsentChanges == 0 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	m.remote.Cut(false)
	m.eventually("everything sent, and the workspace closed", func() error {
		if s := m.d.attachmentStatus(); s.PID == 0 || len(s.Workspaces) > 0 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

// TestStaleMounts wants what both processes left when they died together to be gone after
// the next start.
func TestStaleMounts(t *testing.T) {
	m := newMounts(t)
	dir := m.target("a")
	if err := m.mount("lab", dir, false); err != nil {
		t.Fatal(err)
	}
	m.stop()
	for _, pid := range m.processes() {
		_ = syscall.Kill(pid, syscall.SIGSTOP)
	}
	for _, pid := range m.processes() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	m.eventually("ENOTCONN", func() error {
		if got := m.sh("ls %s", dir); !strings.Contains(got, "not connected") && !strings.Contains(got, "onnection abort") {
			return errors.New(got)
		}
		return nil
	})
	m.start()
	poll(t, "the link", func() bool { return m.d.link.State().Up })
	m.eventually("the directory without its dead mount", func() error {
		here, err := mountd.Mounted(dir)
		if here {
			err = errors.New("still mounted")
		}
		return err
	})
	if err := m.mount("lab", dir, false); err != nil {
		t.Fatal(err)
	}
	if got := m.sh("echo again > %s/f; cat %s/f", dir, dir); got != "again" {
		t.Errorf("mounted anew: %s", got)
	}
}
