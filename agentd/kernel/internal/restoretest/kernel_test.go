package restoretest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/checkpoint"
	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
)

// client executes code in a kernel and prints what it printed; it runs in the kernel's
// network namespace, so its sockets stand in no dump's way, and is gone afterwards.
const client = `
import sys, json
from jupyter_client import BlockingKernelClient
import time
c = BlockingKernelClient(); c.load_connection_file(sys.argv[1])
c.ip = sys.argv[2]
c.start_channels(hb=False)
for attempt in range(200):
    m = c.kernel_info()
    try:
        c.get_shell_msg(timeout=0.3)
        c.get_iopub_msg(timeout=0.3)
        break
    except Exception:
        pass
else:
    sys.exit("the kernel does not answer")
while True:
    try: c.get_iopub_msg(timeout=0.05)
    except Exception: break
out = []
def hook(m):
    k, b = m['header']['msg_type'], m['content']
    if k == 'stream': out.append(b['text'])
    elif k == 'error': out.append('ERROR ' + b['ename'] + ': ' + b['evalue'] + '\n')
    elif k == 'execute_result': out.append(b['data']['text/plain'] + '\n')
c.execute_interactive(sys.stdin.read(), output_hook=hook, timeout=60, allow_stdin=False)
c.stop_channels()
sys.stdout.write(''.join(out))
`

// kernel is a real ipykernel in a real sandbox.
type kernel struct {
	t    *testing.T
	dir  string
	spec sandbox.Spec
	box  *sandbox.Sandbox
}

var lastUID atomic.Uint32

func newUID() uint32 { return 1_960_000_000 + uint32(os.Getpid()%10_000)*1000 + lastUID.Add(1) }

// newKernel makes the places of a kernel that has not started.
func newKernel(t *testing.T) *kernel {
	t.Helper()
	criutest.Path(t)
	if err := checkpoint.Subreaper(); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "kernel")
	if err != nil {
		t.Fatal(err)
	}
	uid := newUID()
	k := &kernel{t: t, dir: dir, spec: sandbox.Spec{
		ID: fmt.Sprintf("ckpt-%d", uid), UID: uid, GID: uid, StateDir: dir, RunDir: dir + "/run", PrivateDir: dir + "/private", LogFile: dir + "/log",
		Argv:    []string{"/usr/bin/python3", "-m", "ipykernel_launcher", "-f", sandbox.RunInside + "/connection.json", "--HistoryManager.enabled=False"},
		Network: sandbox.Network{Mode: sandbox.NetworkNone},
		Limits:  sandbox.Limits{Memory: 2 << 30, PIDs: 256},
	}}
	t.Cleanup(func() {
		k.stop()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := sandbox.Cleanup(ctx, k.spec); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			log, _ := os.ReadFile(k.spec.LogFile)
			t.Logf("log of %s: %.3000s", k.spec.ID, log)
		}
		os.RemoveAll(dir)
	})
	return k
}

func (k *kernel) writeConnection() {
	k.t.Helper()
	text, err := json.Marshal(map[string]any{
		"transport": "ipc", "ip": sandbox.RunInside + "/k", "shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5,
		"signature_scheme": "hmac-sha256", "key": "0123456789abcdef", "kernel_name": "python3",
	})
	if err == nil {
		err = os.MkdirAll(k.spec.RunDir, 0o700)
	}
	if err == nil {
		err = errors.Join(os.WriteFile(k.spec.RunDir+"/connection.json", text, 0o644), os.Chown(k.spec.RunDir, int(k.spec.UID), int(k.spec.GID)))
	}
	if err != nil {
		k.t.Fatal(err)
	}
}

func startKernel(t *testing.T) *kernel {
	t.Helper()
	k := newKernel(t)
	k.writeConnection()
	box, err := sandbox.Start(t.Context(), k.spec)
	if err != nil {
		t.Fatal(err)
	}
	k.box, k.spec = box, box.Spec()
	return k
}

func (k *kernel) stop() {
	if k.box == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := k.box.Kill(ctx); err != nil {
		k.t.Error(err)
	}
	k.box.Close()
	k.box = nil
}

// run executes code and returns what it printed.
func (k *kernel) run(code string) string {
	k.t.Helper()
	cmd := exec.CommandContext(k.t.Context(), "/usr/bin/nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", k.box.PID()), "/usr/bin/python3", "-c", client, k.spec.RunDir+"/connection.json", k.spec.RunDir+"/k")
	cmd.Stdin = strings.NewReader(code)
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			k.t.Fatalf("%s: %v: %s", code, err, exit.Stderr)
		}
		k.t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func (k *kernel) want(code, want string) {
	k.t.Helper()
	if got := k.run(code); got != want {
		k.t.Fatalf("%s\nprinted %q, want %q", code, got, want)
	}
}

func tree(c sandbox.CRIUSpec) checkpoint.Tree {
	t := checkpoint.Tree{PID: c.PID, Root: c.Root, Cgroups: c.Cgroups, NetNSKey: c.NetNSKey, NetNSInode: c.NetNSInode, NetNSPath: c.NetNSPath}
	for _, e := range c.Externals {
		t.Mounts = append(t.Mounts, checkpoint.Mount{Key: e.Key, Inside: e.Inside, Outside: e.Outside})
	}
	return t
}

func (k *kernel) tree() checkpoint.Tree {
	k.t.Helper()
	c, err := k.box.Checkpointing()
	if err != nil {
		k.t.Fatal(err)
	}
	return tree(c)
}

func driver(t *testing.T) *checkpoint.Driver {
	return checkpoint.NewDriver("").TestOnlyPreload(criutest.Preload(t))
}

// dump dumps into a fresh directory with images/ and private/.
func (k *kernel) dump(after checkpoint.After) string {
	k.t.Helper()
	dir := k.t.TempDir()
	images, private := filepath.Join(dir, "images"), filepath.Join(dir, "private")
	if err := errors.Join(os.Mkdir(images, 0o700), os.Mkdir(private, 0o700)); err != nil {
		k.t.Fatal(err)
	}
	f, err := driver(k.t).Dump(k.t.Context(), k.tree(), images, after, checkpoint.CopyDir{From: k.spec.PrivateDir, To: private})
	if err != nil {
		log, _ := exec.Command("grep", "-h", "Error", images+"/criu.log").Output()
		k.t.Fatalf("%v\n%s", err, log)
	}
	k.t.Logf("dumped: stood still %v of %v, %d pages", f.Standstill, f.Took, f.Pages)
	return dir
}

// restore brings the kernel of a dump up in k's places.
func (k *kernel) restore(dump string) {
	k.t.Helper()
	if err := os.RemoveAll(k.spec.PrivateDir); err != nil {
		k.t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", dump+"/private", k.spec.PrivateDir).CombinedOutput(); err != nil {
		k.t.Fatalf("%v: %s", err, out)
	}
	if err := os.Chown(k.spec.PrivateDir, 0, 0); err != nil {
		k.t.Fatal(err)
	}
	p, err := sandbox.Prepare(k.spec)
	if err != nil {
		k.t.Fatal(err)
	}
	images := dump + "/images"
	pid, f, err := driver(k.t).Restore(k.t.Context(), tree(p.CRIU()), images)
	if err != nil {
		p.Abort()
		log, _ := exec.Command("grep", "-h", "Error", images+"/criu.log").Output()
		k.t.Fatalf("%v\n%s", err, log)
	}
	box, err := p.Adopt(k.t.Context(), pid)
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Logf("restored in %v", f.Took)
	k.box = box
}

// setup is a session with everything that the tests of restores look at.
const setup = `
import numpy as np, pandas as pd, threading, subprocess, socket, os, time, signal, tempfile, multiprocessing
a = np.arange(1_000_000); df = pd.DataFrame({"x": range(1000)})
lock = threading.Lock(); beats = 0
def beat():
    global beats
    while True:
        time.sleep(0.01); beats += 1
threading.Thread(target=beat, daemon=True).start()
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
def ask(s):
    child.stdin.write(s.encode() + b"\n"); child.stdin.flush(); return child.stdout.readline().decode().strip()
listener = socket.socket(); listener.bind(("127.0.0.1", 5599)); listener.listen()
near = socket.create_connection(("127.0.0.1", 5599)); far, _ = listener.accept()
r, w = os.pipe(); os.write(w, b"in flight")
f = open(os.path.expanduser("~/notes"), "w+"); f.write("one"); f.flush()
g = tempfile.TemporaryFile(); g.write(b"deleted"); g.flush()
shm = open("/dev/shm/s", "w+"); shm.write("shm"); shm.flush()
left, right = socket.socketpair()
timer = 0
def tick(*_):
    global timer; timer += 1
signal.signal(signal.SIGALRM, tick); signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
n = 0
print("set up")
`

// check is everything of it; it prints the count and what is wrong.
const check = `
n += 1
bad = []
def ok(what, v):
    if not v: bad.append(what)
ok("numpy", a.sum() == 499999500000); ok("pandas", df.x.sum() == 499500)
b0, t0 = beats, timer; time.sleep(0.2); ok("thread", beats > b0); ok("timer", timer > t0)
ok("child", ask("hello") == "hello")
near.sendall(b"x"); ok("own connection", far.recv(1) == b"x"); far.sendall(b"y"); ok("and back", near.recv(1) == b"y")
c2 = socket.create_connection(("127.0.0.1", 5599)); s2, _ = listener.accept(); c2.sendall(b"z"); ok("listener", s2.recv(1) == b"z"); c2.close(); s2.close()
os.write(w, b"!"); ok("pipe", os.read(r, 100).endswith(b"!"))
f.seek(0); ok("file", f.read().startswith("one")); f.seek(0, 2); f.write("+"); f.flush(); ok("file's size", os.path.getsize(os.path.expanduser("~/notes")) == 3 + n)
g.seek(0); ok("deleted file", g.read().startswith(b"deleted")); 
shm.seek(0); ok("shm", shm.read() == "shm" and open("/dev/shm/s").read() == "shm")
left.send(b"p"); ok("socketpair", right.recv(1) == b"p")
ok("uid", os.getuid() > 1e9)
print(n, *bad)
`

func TestKernelGoesOnAndComesBackAsItWas(t *testing.T) {
	k := startKernel(t)
	k.want(setup, "set up")
	k.want(check, "1")
	dump := k.dump(checkpoint.GoOn)
	k.want(check, "2")
	for range 3 {
		k.stop()
		k.restore(dump)
		k.want(check, "2")
	}
}

func TestStoppedKernelGoesOnOrEnds(t *testing.T) {
	k := startKernel(t)
	k.want(setup, "set up")
	k.dump(checkpoint.Stay)
	if s, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", k.box.Main())); err != nil || !strings.Contains(string(s), ") T ") { // it is in the kernel's own table
		t.Fatalf("the kernel is not stopped: %s %v", s, err)
	}
	driver(t).Continue(k.box.PID())
	k.want(check, "1")
	dump := k.dump(checkpoint.Stay)
	k.stop()
	k.restore(dump)
	k.want(check, "2")
}

func TestTwentyGenerations(t *testing.T) {
	k := startKernel(t)
	k.want(setup, "set up")
	for i := range 20 {
		dump := k.dump(checkpoint.Stay)
		k.stop()
		k.restore(dump)
		if i%5 == 4 {
			k.want(check, fmt.Sprint(i/5+1))
		}
	}
}

// A dump is ended at odd moments, as a deadline or a kill ends it; the kernel goes on,
// and what is saved afterwards is whole.
func TestEndedDumpsHarmNothing(t *testing.T) {
	k := startKernel(t)
	k.want(setup, "set up")
	for i := range 12 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(10+i*12)*time.Millisecond)
		_, err := driver(t).Dump(ctx, k.tree(), t.TempDir(), checkpoint.GoOn)
		cancel()
		t.Logf("after %d ms: %v", 10+i*12, err)
		if i%4 == 3 {
			k.want(check, fmt.Sprint(i/4+1))
		}
	}
	dump := k.dump(checkpoint.GoOn)
	k.stop()
	k.restore(dump)
	k.want(check, "4")
}
