package restoretest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/checkpoint"
)

// walls is what holds a kernel, seen from inside; each wall on a line.
const walls = `
import ctypes, errno, os, socket, resource
libc = ctypes.CDLL(None, use_errno=True)
def attempt(what, f, *args):
    try: r = f(*args)
    except OSError as e: r = errno.errorcode[e.errno]
    else: r = "done"
    print(what, r)
def call(what, *args):
    print(what, "done" if libc.syscall(*args) != -1 else errno.errorcode[ctypes.get_errno()])
for pid in ("self", "1"):
    for line in open("/proc/%s/status" % pid):
        if line.startswith(("Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Seccomp:")): print(pid, " ".join(line.split()))
for line in sorted(l.split(" - ")[0].split(" ", 3)[3] for l in open("/proc/self/mountinfo")): print("mount", line.strip())
call("unshare", ctypes.c_long(97 if os.uname().machine == "aarch64" else 272), ctypes.c_long(0x10000000))
for path in ("/x", "/usr/x", "/etc/x", "/dev/x", "/run/x", "/home/x"): attempt("write " + path, open, path, "w")
attempt("mknod", os.mknod, "/tmp/disk", 0o060666, os.makedev(8, 0))
for family in (17, 40, 38): attempt("socket %d" % family, socket.socket, family, socket.SOCK_DGRAM)
attempt("shadow", open, "/etc/shadow")
attempt("metadata", socket.create_connection, ("169.254.169.254", 80), 1)
print("interfaces", socket.if_nameindex())
print("limits", [resource.getrlimit(r) for r in (resource.RLIMIT_CORE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE)])
print("processes", len([p for p in os.listdir("/proc") if p.isdigit()]), "parent", os.getppid(), "host", socket.gethostname())
for place in ("/", "/home", "/etc", "/dev", "/run"): print(place, sorted(os.listdir(place)))
`

// What holds a kernel holds it after a restore too, by the same code and by CRIU's:
// identity, capabilities, filter, mounts with their options, limits, network.
func TestWallsStandAfterARestore(t *testing.T) {
	k := startKernel(t)
	before := k.run(walls)
	for _, want := range []string{
		"self NoNewPrivs: 1", "self Seccomp: 2", "1 NoNewPrivs: 1", "1 Seccomp: 2", "self CapBnd: 0000000000000000", "1 CapEff: 0000000000000000",
		"unshare EPERM", "write /usr/x EROFS", "mknod EPERM", "socket 40 EAFNOSUPPORT", "shadow ENOENT", "metadata ENETUNREACH", "parent 1 host kernel",
	} {
		if !strings.Contains(before, want+"\n") && !strings.Contains(before, want) {
			t.Errorf("before: no %q in\n%s", want, before)
		}
	}
	dump := k.dump(checkpoint.GoOn)
	for range 2 {
		k.stop()
		k.restore(dump)
		if after := k.run(walls); after != before {
			t.Fatalf("before:\n%s\nafter:\n%s", before, after)
		}
	}
	c, err := k.box.Checkpointing()
	if err != nil {
		t.Fatal(err)
	}
	for _, procs := range c.Cgroups {
		list, err := os.ReadFile(procs)
		if err != nil || len(strings.Fields(string(list))) < 2 {
			t.Errorf("%s holds %q, %v: the kernel is not in its group", procs, list, err)
		}
		limit, err := os.ReadFile(filepath.Join(filepath.Dir(procs), "memory.limit_in_bytes"))
		if err == nil && strings.TrimSpace(string(limit)) != fmt.Sprint(k.spec.Limits.Memory) {
			t.Errorf("memory limit %s", limit)
		}
	}
	if missing := k.box.Missing(); len(missing) > 0 {
		t.Logf("this machine lacks: %q", missing)
	}
}
