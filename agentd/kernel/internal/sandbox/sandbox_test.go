package sandbox

import (
	"errors"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestWhoAndWhere(t *testing.T) {
	spec := testSpec(t, `
import os, json, pwd, socket, sys
status = dict(l.split(":\t", 1) for l in open("/proc/self/status").read().splitlines())
init = dict(l.split(":\t", 1) for l in open("/proc/1/status").read().splitlines())
json.dump({
  "uids": os.getresuid(), "gids": os.getresgid(), "groups": os.getgroups(),
  "caps": [status[c] for c in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
  "init_caps": [init[c] for c in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
  "init_uid": init["Uid"].split(), "nnp": status["NoNewPrivs"], "seccomp": status["Seccomp"], "init_seccomp": init["Seccomp"],
  "cwd": os.getcwd(), "home": os.path.expanduser("~"), "user": pwd.getpwuid(os.getuid()).pw_name,
  "host": socket.gethostname(), "fds": sorted(int(f) for f in os.listdir("/proc/self/fd")),
  "init_fds": [os.readlink("/proc/1/fd/" + f) for f in sorted(os.listdir("/proc/1/fd"))],
  "sid": os.getsid(0) == os.getpid(), "ppid": os.getppid(), "root": sorted(os.listdir("/")), "etc": sorted(os.listdir("/etc")),
  "argv": sys.argv, "interfaces": [n for _, n in socket.if_nameindex()],
}, sys.stdout)`, "one", "two words")
	var got struct {
		UIDs, GIDs       []uint32
		Groups           []int
		Caps             []string
		InitCaps         []string `json:"init_caps"`
		InitUID          []string `json:"init_uid"`
		NNP, Seccomp     string
		InitSeccomp      string `json:"init_seccomp"`
		Cwd, Home, User  string
		Host             string
		FDs              []int
		InitFDs          []string `json:"init_fds"`
		SID              bool
		PPID             int
		Root, Etc        []string
		Argv, Interfaces []string
	}
	report(t, spec, &got)
	for i, id := range append(got.UIDs, got.GIDs...) {
		if id != spec.UID {
			t.Errorf("id %d is %d", i, id)
		}
	}
	if len(got.Groups) != 0 {
		t.Errorf("groups %v", got.Groups)
	}
	for _, c := range append(got.Caps, got.InitCaps...) {
		if strings.Trim(c, "0") != "" {
			t.Errorf("capabilities %s", c)
		}
	}
	if slices.Contains(got.InitUID, "0") {
		t.Errorf("init is root: %v", got.InitUID)
	}
	if got.NNP != "1" || got.Seccomp != "2" || got.InitSeccomp != "2" {
		t.Errorf("no_new_privs %s, seccomp %s, init's %s", got.NNP, got.Seccomp, got.InitSeccomp)
	}
	if got.Cwd != HomeInside || got.Home != HomeInside || got.User != "kernel" || got.Host != "kernel" {
		t.Errorf("cwd %s home %s user %s host %s", got.Cwd, got.Home, got.User, got.Host)
	}
	// The last one is listdir's own.
	if !slices.Equal(got.FDs, []int{0, 1, 2, 3}) {
		t.Errorf("descriptors %v", got.FDs)
	}
	if !slices.Equal(got.InitFDs, []string{"/dev/null", logInside, logInside}) {
		t.Errorf("init's descriptors %v", got.InitFDs)
	}
	if !got.SID || got.PPID != 1 {
		t.Errorf("session of its own %v, parent %d", got.SID, got.PPID)
	}
	for _, name := range got.Root {
		if !slices.Contains([]string{".postern", "bin", "dev", "etc", "home", "lib", "lib32", "lib64", "libx32", "opt", "proc", "run", "sbin", "sys", "tmp", "usr", "var"}, name) {
			t.Errorf("the root has %s", name)
		}
	}
	for _, name := range []string{"shadow", "postern", "ssh", "sudoers", "machine-id", "crontab"} {
		if slices.Contains(got.Etc, name) {
			t.Errorf("/etc has %s", name)
		}
	}
	if !slices.Equal(got.Argv, []string{"-c", "one", "two words"}) {
		t.Errorf("argv %q", got.Argv)
	}
	if !slices.Equal(got.Interfaces, []string{"lo"}) {
		t.Errorf("interfaces %v", got.Interfaces)
	}
}

func TestEnds(t *testing.T) {
	for _, c := range []struct {
		name, code, reason string
		exit               int
	}{
		{"by itself", `pass`, "ended with exit code 0", 0},
		{"with a code", `import sys; sys.exit(7)`, "ended with exit code 7", 7},
		{"by a signal", `import os; os.kill(os.getpid(), 11)`, "killed by SIGSEGV", 139},
		{"with its children left", `import subprocess; subprocess.Popen(["sleep", "1000"])`, "ended with exit code 0", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := testSpec(t, c.code)
			exit, out := run(t, spec)
			if exit.Code != c.exit || exit.Reason != c.reason {
				t.Errorf("got %+v\n%s", exit, out)
			}
			if n := alive(t, spec.UID); n != 0 {
				t.Errorf("%d processes are left", n)
			}
		})
	}
}

func TestInterruptAndKill(t *testing.T) {
	// A job of a shell's background ignores interrupts, and so would a kernel that
	// inherits that.
	signal.Ignore(unix.SIGINT)
	defer signal.Reset(unix.SIGINT)
	spec := testSpec(t, `
import time
print("ready")
while True:
    try:
        time.sleep(1000)
    except KeyboardInterrupt:
        print("interrupted")`)
	s := start(t, spec)
	waitFor(t, "ready", logHas(spec, "ready"))
	if err := s.Interrupt(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "interrupted", logHas(spec, "interrupted"))
	if err := s.Kill(context30(t)); err != nil {
		t.Fatal(err)
	}
	exit, err := s.Wait(context30(t))
	if err != nil || !exit.Killed || exit.Reason != "stopped" {
		t.Errorf("got %+v, %v", exit, err)
	}
	if err := s.Interrupt(); err == nil {
		t.Error("a kernel that ended was interrupted")
	}
	if n := alive(t, spec.UID); n != 0 {
		t.Errorf("%d processes are left", n)
	}
	if _, _, err := Find(spec.StateDir); err == nil {
		t.Error("sandbox.json is left")
	}
}

func TestOrphansAreReaped(t *testing.T) {
	spec := testSpec(t, `
import os, time
for i in range(20):
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(0.05)
            os._exit(0)
        os._exit(0)
    os.wait()
def count():
    n = zombies = 0
    for p in os.listdir("/proc"):
        if p.isdigit():
            try: state = open("/proc/%s/stat" % p).read().rsplit(")", 1)[1].split()[0]
            except OSError: continue
            n += 1
            zombies += state == "Z"
    return n, zombies
for i in range(1000):
    if count() == (2, 0): break
    time.sleep(0.01)
print(count())`)
	if exit, out := run(t, spec); exit.Code != 0 || strings.TrimSpace(out) != "(2, 0)" {
		t.Errorf("%s: %s", exit.Reason, out)
	}
}

func TestErrorsAreOneLine(t *testing.T) {
	for _, c := range []struct {
		name, want string
		change     func(*Spec)
	}{
		{"no program", "/nowhere/python cannot be executed in the kernel's sandbox", func(s *Spec) { s.Argv[0] = "/nowhere/python" }},
		{"not in PATH", "surely-not-there is not in the PATH", func(s *Spec) { s.Argv[0] = "surely-not-there" }},
		{"no directory", "working directory", func(s *Spec) { s.Dir = "/nowhere" }},
		{"root", "must not be root's", func(s *Spec) { s.UID = 0 }},
		{"no visible path", "show /nowhere/conda", func(s *Spec) { s.Visible = []string{"/nowhere/conda"} }},
		{"bind on its own places", "the place is the kernel's own", func(s *Spec) { s.Binds = []Bind{{Source: "/etc", Target: "/proc/x"}} }},
		{"bind of nothing", "show /nowhere at /work", func(s *Spec) { s.Binds = []Bind{{Source: "/nowhere", Target: "/work"}} }},
		{"network", `network "most": want none, allowed or open`, func(s *Spec) { s.Network.Mode = "most" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := testSpec(t, "pass")
			changed := spec
			c.change(&changed)
			_, err := Start(context30(t), changed)
			if err == nil {
				t.Fatal("it started")
			}
			if !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %q, want %q in one line", err, c.want)
			}
			if n := alive(t, spec.UID); n != 0 {
				t.Errorf("%d processes are left", n)
			}
		})
	}
}

func TestBinds(t *testing.T) {
	spec := testSpec(t, `
import os
print(os.getcwd(), os.listdir("."))
open("made", "w").write("x")
try: open("/data/made", "w")
except OSError as e: print(e.strerror)
print(open("/data/file").read())`)
	work, data := t.TempDir(), t.TempDir()
	if err := os.Chown(work, int(spec.UID), int(spec.GID)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(data, "file"), []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(data, 0o777); err != nil {
		t.Fatal(err)
	}
	spec.Binds = []Bind{{Source: work, Target: "/workspace/mine"}, {Source: data, Target: "/data", ReadOnly: true}}
	exit, out := run(t, spec)
	if want := "/workspace/mine []\nRead-only file system\ncontent\n"; exit.Code != 0 || out != want {
		t.Errorf("%s: %q, want %q", exit.Reason, out, want)
	}
	if _, err := os.Stat(filepath.Join(work, "made")); err != nil {
		t.Error(err)
	}
}

func TestVisible(t *testing.T) {
	dir, err := os.MkdirTemp("/srv", "postern-test-") // what is in /tmp can't be shown
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "tool"), []byte("#!/bin/sh\necho a tool of the host\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	spec := testSpec(t, "")
	spec.Visible = []string{dir}
	spec.Argv = []string{filepath.Join(dir, "tool")}
	if exit, out := run(t, spec); out != "a tool of the host\n" {
		t.Errorf("%s: %q", exit.Reason, out)
	}
}

func TestInNetworkAndAdopt(t *testing.T) {
	spec := testSpec(t, `
import socket, time
s = socket.create_server(("127.0.0.1", 4567))
print("ready")
while True:
    c, _ = s.accept()
    c.sendall(b"from inside")
    c.close()`)
	s, err := Start(context30(t), spec)
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "ready", logHas(spec, "ready"))
	ask := func(s *Sandbox) string {
		var text []byte
		err := s.InNetwork(func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			f := os.NewFile(uintptr(fd), "socket")
			defer f.Close() //nolint:errcheck // it is only read
			if err := unix.Connect(fd, &unix.SockaddrInet4{Port: 4567, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
				return err
			}
			text = make([]byte, 64)
			n, err := f.Read(text)
			text = text[:n]
			return err
		})
		if err != nil {
			t.Error(err)
		}
		return string(text)
	}
	if got := ask(s); got != "from inside" {
		t.Errorf("got %q", got)
	}
	// The starter lets go, and another takes over.
	main, inside := s.Main(), s.Spec().MainPID
	s.Close()
	spec = s.Spec()
	spec.MainPID = 0
	s, err = Adopt(context30(t), spec, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if s.Main() != main || s.Spec().MainPID != inside {
		t.Errorf("adopted main %d (%d inside), it was %d (%d)", s.Main(), s.Spec().MainPID, main, inside)
	}
	if got := ask(s); got != "from inside" {
		t.Errorf("got %q", got)
	}
	if err := s.Kill(context30(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := Adopt(context30(t), spec, 0); err == nil {
		t.Error("a kernel that ended was adopted")
	}
}

// A power cut may leave a part of sandbox.json; then no process of the kernel runs.
func TestACutStateFileIsNoKernel(t *testing.T) {
	for _, text := range []string{"", `{"pid": 1, "sta`, "\x00\x00\x00"} {
		dir := t.TempDir()
		if err := os.WriteFile(dir+"/sandbox.json", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if pid, _, err := Find(dir); !errors.Is(err, ErrGone) {
			t.Errorf("%q: process %d, %v; want ErrGone", text, pid, err)
		}
	}
}
