package sandbox

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// probe is what a hostile kernel tries. Each line names what it tried and how that
// ended: an errno's name, or "done", or a value.
const probe = `
import ctypes, errno, glob, mmap, os, resource, signal, socket, stat, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
def tell(what, outcome): print(what + ":", outcome, flush=True)
def call(what, n, *args):
    r = libc.syscall(ctypes.c_long(n), *[ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in args])
    tell(what, "done" if r != -1 else errno.errorcode[ctypes.get_errno()])
def attempt(what, f, *args):
    try: r = f(*args)
    except OSError as e: r = errno.errorcode.get(e.errno, str(e))
    except ValueError as e: r = e
    else: r = "done"
    tell(what, r)
def write(path):
    with open(path, "w") as f: f.write("x")
def read(path):
    with open(path, "rb") as f: f.read(1)
arm = os.uname().machine == "aarch64"
nr = lambda x86, a64: a64 if arm else x86

for s in (9, 15, 19, 11, 6, 3, 1): os.kill(1, s)
tell("init after signals", "there" if os.getppid() == 1 else "gone")
attempt("kill all others", os.kill, -1, 0)
tell("processes", sorted(int(p) for p in os.listdir("/proc") if p.isdigit()) == [1, os.getpid()])
attempt("kill the starter", os.kill, int(sys.argv[1]), 9)
call("ptrace the starter", nr(101, 117), 16, int(sys.argv[1]), 0, 0)
call("mount", nr(165, 40), b"none", b"/tmp", b"tmpfs", 0, b"")
call("bind over /etc", nr(165, 40), b"/tmp", b"/etc", b"", 4096, b"")
call("remount the root", nr(165, 40), b"", b"/", b"", 32 | 4096, b"")
call("umount", nr(166, 39), b"/usr", 2)
call("open_tree", 428, -100, b"/", 1)
call("fsopen", 430, b"tmpfs", 0)
call("pivot_root", nr(155, 41), b".", b".")
call("chroot", nr(161, 51), b"/tmp")
for flag, name in ((0x10000000, "user"), (0x20000, "mount"), (0x20000000, "pid"), (0x40000000, "net"), (0x8000000, "ipc"), (0x4000000, "uts"), (0x2000000, "cgroup"), (0x80, "time")):
    call("unshare " + name, nr(272, 97), flag)
call("clone with a user namespace", nr(56, 220), 0x10000000 | 17, 0, 0, 0, 0)
call("clone3", 435, 0, 0)
call("setns", nr(308, 268), 0, 0)
call("setuid", nr(105, 146), 0)
call("setgroups", nr(116, 159), 0, 0)
call("bpf", nr(321, 280), 0, 0, 0)
call("perf_event_open", nr(298, 241), 0, 0, 0, 0, 0)
call("keyctl", nr(250, 219), 0, 0)
call("add_key", nr(248, 217), b"user", b"x", b"y", 1, -3)
call("io_uring_setup", 425, 1, 0)
call("userfaultfd", nr(323, 282), 0)
call("init_module", nr(175, 105), 0, 0, 0)
call("open_by_handle_at", nr(304, 265), 0, 0, 0)
call("reboot", nr(169, 142), 0, 0, 0, 0)
call("sethostname", nr(170, 161), b"x", 1)
call("settimeofday", nr(164, 170), 0, 0)
attempt("raise a limit", resource.setrlimit, resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for family, name in ((17, "packet"), (40, "vsock"), (38, "alg"), (15, "key"), (31, "bluetooth"), (44, "xdp"), (30, "tipc"), (29, "can")):
    attempt("socket " + name, socket.socket, family, socket.SOCK_DGRAM)
attempt("socket raw", socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)
attempt("socket netlink audit", socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, 9)
attempt("socket netlink route", socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, 0)
attempt("listen on a low port", lambda: socket.create_server(("127.0.0.1", 80)))
for path in ("/x", "/usr/x", "/etc/x", "/etc/passwd", "/opt/x", "/dev/x", "/run/x", "/.postern/init-1", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/net/ipv4/ip_forward"):
    attempt("write " + path, write, path)
for path in ("/etc/shadow", "/etc/postern/agentd.yaml", "/etc/ssh/ssh_host_rsa_key", "/proc/kcore", "/proc/kmsg", "/dev/mem", "/dev/kmsg", "/dev/sda", "/dev/fuse", "/dev/net/tun", "/proc/1/root/etc/shadow", "/proc/self/root/etc/shadow", "/run/docker.sock", "/sys/kernel/notes"):
    attempt("read " + path, read, path)
for path in ("/root", "/home", "/var", "/srv", "/mnt", "/sys", "/boot", "/var/run", "/proc/1/cwd/"):
    try: tell("list " + path, ",".join(sorted(os.listdir(path))))
    except OSError as e: tell("list " + path, errno.errorcode[e.errno])
for place in (os.path.expanduser("~"), "/tmp", "/dev/shm", "/run/postern"):
    attempt("mknod in " + place, os.mknod, place + "/disk", stat.S_IFBLK | 0o666, os.makedev(8, 0))
attempt("link to a program", os.link, "/usr/bin/env", os.path.expanduser("~/env"))
attempt("remove home", os.rmdir, "/home/kernel")
attempt("rename tmp", os.rename, "/tmp", "/tmp2")
tell("another kernel's files", glob.glob(sys.argv[2] + "/*"))
tell("set-user-id program", subprocess.run([sys.argv[3] + "/id", "-u"], capture_output=True, text=True).stdout.strip() == str(os.getuid()))
own = os.path.expanduser("~/id")
open(own, "wb").write(open("/usr/bin/id", "rb").read()); os.chmod(own, 0o6755)
tell("own set-user-id program", subprocess.run([own, "-u"], capture_output=True, text=True).stdout.strip() == str(os.getuid()))
tell("core", resource.getrlimit(resource.RLIMIT_CORE))
tell("environment of init", set(open("/proc/1/environ").read().split("\0")) - {""} == {k + "=" + v for k, v in os.environ.items()})
if not arm:
    code = mmap.mmap(-1, 4096, prot=7)
    code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3") # mov eax, 20 (getpid of i386); int 0x80; ret
    f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    tell("a call of another architecture", errno.errorcode.get(-f(), "done"))
    call("a call of x32", 0x40000000 | 39)
`

// expected is what comes of each, for those where it is not EPERM.
const expected = `
init after signals: there
kill all others: ESRCH|done
processes: True
kill the starter: ESRCH
ptrace the starter: ESRCH
clone3: ENOSYS
io_uring_setup: ENOSYS
userfaultfd: ENOSYS
raise a limit: not allowed to raise maximum limit
socket *: EAFNOSUPPORT
socket raw: EPERM
socket netlink audit: EAFNOSUPPORT
socket netlink route: done
listen on a low port: EACCES
write *: EROFS
write /.postern/init-1: EROFS|ETXTBSY|EACCES
write /etc/passwd: EROFS|EACCES
write /proc/sys/kernel/core_pattern: EACCES
write /proc/sysrq-trigger: EACCES|ENOENT
write /proc/sys/net/ipv4/ip_forward: EACCES
read *: ENOENT
read /proc/kcore: EACCES|ENOENT|EPERM
read /proc/kmsg: EACCES|EPERM
list /root: ENOENT
list /home: kernel
list /var: run,tmp
list /srv: *srv
list /mnt: ENOENT
list /sys:
list /boot: ENOENT
list /var/run: kernel.log,postern
list /proc/1/cwd/: 
mknod in *: EPERM
link to a program: EXDEV
remove home: EBUSY|EROFS|EACCES
rename tmp: EBUSY|EROFS|EACCES|EXDEV
another kernel's files: []
set-user-id program: True
own set-user-id program: True
core: (1, 1)
environment of init: True
a call of another architecture: ENOSYS
a call of x32: ENOSYS
`

// judge compares what a probe printed with what is expected, the most particular
// line first.
func judge(t *testing.T, out string) {
	t.Helper()
	want := map[string]string{}
	for line := range strings.Lines(strings.TrimSpace(expected)) {
		what, outcome, _ := strings.Cut(strings.TrimRight(line, "\n"), ":")
		want[what] = strings.TrimSpace(outcome)
	}
	seen := 0
	for line := range strings.Lines(strings.TrimSpace(out)) {
		what, outcome, ok := strings.Cut(strings.TrimRight(line, "\n"), ":")
		outcome = strings.TrimSpace(outcome)
		if !ok {
			t.Errorf("it printed %q", line)
			continue
		}
		seen++
		expect, particular := want[what]
		if !particular {
			expect = "EPERM"
			for general, outcome := range want {
				if head, ok := strings.CutSuffix(general, "*"); ok && strings.HasPrefix(what, head) {
					expect = outcome
				}
			}
		}
		match := false
		for alternative := range strings.SplitSeq(expect, "|") {
			match = match || outcome == alternative || strings.HasPrefix(alternative, "*")
		}
		if !match {
			t.Errorf("%s: %s, want %s", what, outcome, expect)
		}
	}
	least := 96
	if runtime.GOARCH != "amd64" {
		least -= 2
	}
	if seen < least {
		t.Errorf("it tried %d things, want %d:\n%s", seen, least, out)
	}
}

func TestHostileKernel(t *testing.T) {
	needRoot(t)
	other := testSpec(t, `import time; print("ready"); time.sleep(1000)`)
	start(t, other)
	waitFor(t, "the other kernel", logHas(other, "ready"))
	// A set-user-id program that root put in the kernel's sight.
	visible, err := os.MkdirTemp("/srv", "postern-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(visible) })
	if out, err := exec.Command("cp", "/usr/bin/id", visible+"/id").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Chmod(visible+"/id", 0o755|os.ModeSetuid|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(visible, 0o755); err != nil {
		t.Fatal(err)
	}
	spec := testSpec(t, probe, fmt.Sprint(os.Getpid()), other.StateDir, visible)
	spec.Visible = []string{visible}
	exit, out := run(t, spec)
	if exit.Code != 0 {
		t.Fatalf("%s:\n%s", exit.Reason, out)
	}
	judge(t, out)
}

// A kernel cannot lead what is done on the host for it astray: places that it can
// write are mounted from directories whose parents are root's.
func TestPlacesCannotBeSwapped(t *testing.T) {
	spec := testSpec(t, `
import os, shutil
for d in ("/home/kernel", "/tmp", "/run/postern"):
    for f in os.listdir(d): shutil.rmtree(d + "/" + f, ignore_errors=True)
    os.symlink("/etc", d + "/home"); os.symlink("/etc", d + "/tmp")`)
	for range 2 {
		if exit, out := run(t, spec); exit.Code != 0 && !strings.Contains(out, "File exists") {
			t.Fatalf("%s: %s", exit.Reason, out)
		}
	}
	for _, dir := range []string{"home", "tmp"} {
		st, err := os.Lstat(filepath.Join(spec.PrivateDir, dir))
		if err != nil || !st.IsDir() {
			t.Errorf("%s: %v, %v", dir, st, err)
		}
	}
}
