package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/e2e/stack"
)

// savedKernel is a kernel on an agent that makes checkpoints, through kills.
type savedKernel struct {
	t  *testing.T
	s  *stack.Stack
	a  *stack.Agent
	id string
	// uid is its user.
	uid int
	// n is what the variable n is, saved what it was at each checkpoint that was
	// acknowledged.
	n     int
	saved map[string]int
	// killed is who was killed last, traps how often the kernel ended by CRIU's breakpoint.
	killed string
	traps  int
}

// firstUID is the first user id of the kernels of these tests' agents.
const firstUID = 1_984_000_000

func joinWithCheckpoints(t *testing.T, s *stack.Stack, a *stack.Agent) {
	t.Helper()
	key, err := s.NewKey(t.Context())
	if err == nil {
		err = a.Register(t.Context(), key)
	}
	if err == nil {
		err = a.Start()
	}
	if err == nil {
		err = a.Online(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func newSavedKernel(t *testing.T, s *stack.Stack, a *stack.Agent, cell string) *savedKernel {
	t.Helper()
	k := &savedKernel{t: t, s: s, a: a, saved: map[string]int{}}
	k.id = must(t, s, "kernel", "start", a.Name)
	t.Cleanup(func() {
		if k.id != "" && t.Failed() {
			for _, name := range []string{"log", "shim.log"} {
				text, _ := os.ReadFile(filepath.Join(a.StateDir(), "kernels", k.id, name))
				t.Logf("%s: %s", name, text)
			}
		}
		if k.id != "" {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if _, err := s.Postern(ctx, "kernel", "stop", k.id); err != nil {
				t.Errorf("stop: %v", err)
			}
		}
	})
	var spec struct {
		Sandbox struct {
			UID int `json:"uid"`
		} `json:"sandbox"`
	}
	text, err := os.ReadFile(filepath.Join(a.StateDir(), "kernels", k.id, "spec.json"))
	if err == nil {
		err = json.Unmarshal(text, &spec)
	}
	if err != nil || spec.Sandbox.UID == 0 {
		t.Fatalf("the kernel's user: %v, %s", err, text)
	}
	k.uid = spec.Sandbox.UID
	must(t, s, "kernel", "exec", k.id, cell+"\nn = 0")
	return k
}

// set makes n another number, in memory and in a private file.
func (k *savedKernel) set() {
	k.t.Helper()
	k.n++
	must(k.t, k.s, "kernel", "exec", k.id, fmt.Sprintf("n = %d; open('n', 'w').write(str(n))", k.n))
}

// is fails unless n is one of these, in memory and on disk alike, and notes which.
func (k *savedKernel) is(want ...int) {
	k.t.Helper()
	out := strings.Fields(must(k.t, k.s, "kernel", "exec", k.id, "print(n, open('n').read())"))
	if len(out) != 2 || out[0] != out[1] {
		k.t.Fatalf("memory and file say %q", out)
	}
	n, err := strconv.Atoi(out[0])
	if err != nil || !slices.Contains(want, n) {
		k.t.Fatalf("n is %d, want one of %v", n, want)
	}
	k.n = n
}

func (k *savedKernel) save() string {
	k.t.Helper()
	id := must(k.t, k.s, "kernel", "checkpoint", k.id)
	k.saved[id] = k.n
	return id
}

// state is the kernel's, as the list says it.
func (k *savedKernel) state() string {
	e := postern(k.t, k.s, "kernel", "list")
	for line := range strings.Lines(e.stdout) {
		if strings.HasPrefix(line, k.id) {
			return line
		}
	}
	return e.stderr + e.stdout
}

// settle waits until the kernel is suspended, or answers, and reports whether it was
// suspended; that it resumes.
func (k *savedKernel) settle() (suspended bool) {
	k.t.Helper()
	var state string
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		state = k.state()
		if strings.Contains(state, "suspended") {
			k.noProcess()
			must(k.t, k.s, "kernel", "resume", k.id)
			suspended = true
			break
		}
		if strings.Contains(state, "idle") {
			break
		}
		if strings.Contains(state, "dead") {
			if k.traps++; k.traps > 2 || k.killed != "criu" && k.killed != "helper" || !strings.Contains(state, "SIGTRAP") {
				k.t.Fatalf("the kernel is dead: %s", state)
			}
			// CRIU runs code of its own in the kernel's processes, up to a breakpoint: where it
			// is killed meanwhile they meet that alone (docs/checkpoints.md).
			k.t.Logf("CRIU's breakpoint ended the kernel: %s", strings.TrimSpace(state))
			must(k.t, k.s, "kernel", "rollback", k.id, k.first())
			k.set()
			return false
		}
	}
	if e := postern(k.t, k.s, "kernel", "exec", k.id, "1"); e.code != 0 {
		k.t.Fatalf("the kernel does not answer: %s; it was %s, is %s", e.stderr, state, k.state())
	}
	return suspended
}

// processes are those of the kernel's user, with their parents, zombies left out.
func (k *savedKernel) processes() map[int]int {
	k.t.Helper()
	found := map[int]int{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		k.t.Fatal(err)
	}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join("/proc", e.Name(), "status"))
		if err != nil {
			continue
		}
		var pid, parent, uid int
		zombie := false
		for line := range strings.Lines(string(text)) {
			switch f := strings.Fields(line); f[0] {
			case "Pid:":
				pid, _ = strconv.Atoi(f[1])
			case "PPid:":
				parent, _ = strconv.Atoi(f[1])
			case "Uid:":
				uid, _ = strconv.Atoi(f[1])
			case "State:":
				zombie = f[1] == "Z"
			}
		}
		if !zombie && uid == k.uid {
			found[pid] = parent
		}
	}
	return found
}

func (k *savedKernel) noProcess() {
	k.t.Helper()
	if left := k.processes(); len(left) > 0 {
		k.t.Fatalf("a suspended kernel has processes: %v", left)
	}
	k.noMount()
}

// oneTree fails unless the kernel's processes are one tree, of as many as there were.
func (k *savedKernel) oneTree(want int) {
	k.t.Helper()
	all := k.processes()
	roots := 0
	for _, parent := range all {
		if _, ok := all[parent]; !ok {
			roots++
		}
	}
	if roots != 1 || len(all) != want {
		k.t.Fatalf("%d trees of %d processes, want one of %d: %v", roots, len(all), want, all)
	}
	k.noMount()
}

// noMount fails if a kernel's root is mounted on the host, which it is for the time of a
// start or a restore alone.
func (k *savedKernel) noMount() {
	k.t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		k.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, k.a.StateDir()+"/") {
			k.t.Fatalf("left mounted: %s", line)
		}
	}
}

// gone stops the kernel and fails if anything of it is left on the host: processes,
// mounts, cgroups, files, chunks.
func (k *savedKernel) gone() {
	k.t.Helper()
	must(k.t, k.s, "kernel", "stop", k.id)
	if left := k.processes(); len(left) > 0 {
		k.t.Errorf("left running: %v", left)
	}
	k.noMount()
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/postern-kernels/*" + k.id + "*")
	more, _ := filepath.Glob("/sys/fs/cgroup/postern-kernels/*" + k.id + "*")
	if len(groups)+len(more) > 0 {
		k.t.Errorf("left cgroups: %v %v", groups, more)
	}
	if left, _ := filepath.Glob(filepath.Join(k.a.StateDir(), "kernels", "*")); len(left) > 0 {
		k.t.Errorf("left: %v", left)
	}
	var left []string
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		packs, _ := filepath.Glob(filepath.Join(k.a.StateDir(), "checkpoints", "*", "*", "*"))
		spool, _ := filepath.Glob(filepath.Join(k.a.StateDir(), "spool", "*"))
		if left = append(packs, spool...); len(left) == 0 {
			break
		}
	}
	if len(left) > 0 {
		k.t.Errorf("left in the store: %v", left)
	}
	k.id = ""
}

// child finds a process that has parent for its parent and word in its command line; 0:
// there is none. No FUSE mount is in the way of these command lines.
func child(parent int, word string) int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", parent, parent))
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent))
	for _, task := range tasks {
		more, merr := os.ReadFile(task)
		if merr == nil {
			text, err = append(text, more...), nil
		}
	}
	if err != nil {
		return 0
	}
	for _, f := range strings.Fields(string(text)) {
		line, err := os.ReadFile("/proc/" + f + "/cmdline")
		if err == nil && strings.Contains(string(line), word) {
			pid, _ := strconv.Atoi(f)
			return pid
		}
	}
	return 0
}

// victims are who is killed.
var victims = []string{"criu", "helper", "shim", "agentd"}

// victim finds who is to be killed once CRIU is at work; 0: it is not.
func (k *savedKernel) victim(who string) int {
	shim := k.shim()
	helper := child(shim, "criu-helper")
	criu := child(helper, "swrk")
	if shim == 0 || helper == 0 || criu == 0 {
		return 0
	}
	return map[string]int{"criu": criu, "helper": helper, "shim": shim, "agentd": k.a.Process.PID()}[who]
}

// shim is the process id of the kernel's; 0: it has none.
func (k *savedKernel) shim() int {
	list, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range list {
		line, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(line), "kernel-shim\x00"+filepath.Join(k.a.StateDir(), "kernels", k.id)) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			return pid
		}
	}
	return 0
}

// during runs an operation and kills who, a while after CRIU came to work for it; after is
// what the operation said.
func (k *savedKernel) during(who string, wait time.Duration, args ...string) (e ended, killed bool) {
	k.t.Helper()
	k.killed = who
	done, pid := make(chan ended, 1), 0
	go func() { done <- postern(k.t, k.s, args...) }()
	for {
		select {
		case e := <-done:
			return e, false
		default:
		}
		if pid = k.victim(who); pid != 0 {
			break
		}
	}
	time.Sleep(wait)
	killed = unix.Kill(pid, syscall.SIGKILL) == nil
	if who == "agentd" {
		<-k.a.Process.Done()
		if err := k.a.Start(); err != nil {
			k.t.Fatal(err)
		}
		if err := k.a.Online(k.t.Context()); err != nil {
			k.t.Fatal(err)
		}
	}
	return <-done, killed
}

// TestCheckpointsSurviveKills kills CRIU, its helper, the shim and agentd in the midst of
// checkpoints, rollbacks, suspends and resumes: the kernel is as it was before or as it is
// after, no checkpoint that was acknowledged is lost, and nothing is left behind.
func TestCheckpointsSurviveKills(t *testing.T) {
	s := newStack(t, stack.Options{Bin: checkpointBinaries(t)})
	a, err := s.NewAgent("host", fmt.Sprintf("kernels: {specs: [python3], warm: 0, uid_base: %d, checkpoints: {keep: 1000}}\n", firstUID))
	if err != nil {
		t.Fatal(err)
	}
	joinWithCheckpoints(t, s, a)
	// A thread, a child and a pipe go along; random bytes make the store work.
	k := newSavedKernel(t, s, a, "import os, threading, time, subprocess; big = os.urandom(48 << 20)\nthreading.Thread(target=time.sleep, args=(1e9,), daemon=True).start(); child = subprocess.Popen(['cat'], stdin=subprocess.PIPE)")
	k.set()
	first := k.save()
	processes := len(k.processes())
	waits := []time.Duration{15, 60}
	if long {
		waits = []time.Duration{0, 5, 10, 20, 30, 45, 60, 80, 100, 130, 170, 220, 300, 400}
	}
	kills := 0
	for _, who := range victims {
		for i, wait := range waits {
			wait *= time.Millisecond
			if !long && i%2 == 1 && who == "helper" {
				continue // as CRIU, one step later
			}
			note := func(what string, e ended, killed bool) {
				t.Logf("%s, kill %s after %v: killed %v, exit code %d %s", what, who, wait, killed, e.code, strings.TrimSpace(e.stderr))
				if killed {
					kills++
				}
			}

			k.set()
			e, killed := k.during(who, wait, "kernel", "checkpoint", k.id)
			note("checkpoint", e, killed)
			if e.code == 0 {
				k.saved[strings.TrimSpace(e.stdout)] = k.n
			}
			k.settle()
			k.is(k.n)
			k.oneTree(processes)

			before := k.n
			e, killed = k.during(who, wait, "kernel", "rollback", k.id, first)
			note("rollback", e, killed)
			suspended := k.settle()
			switch {
			case e.code == 0 || suspended:
				k.is(k.saved[first])
			default:
				k.is(before, k.saved[first], k.n)
			}
			k.oneTree(processes)
			k.n = before // no number comes twice

			k.set()
			e, killed = k.during(who, wait, "kernel", "suspend", k.id)
			note("suspend", e, killed)
			k.settle()
			k.is(k.n)
			k.oneTree(processes)

			if e := postern(t, s, "kernel", "suspend", k.id); e.code != 0 {
				t.Fatalf("suspend: %s", e.stderr)
			}
			e, killed = k.during(who, wait, "kernel", "resume", k.id)
			note("resume", e, killed)
			k.settle()
			k.is(k.n)
			k.oneTree(processes)
		}
	}
	if kills < len(victims)*2 {
		t.Errorf("only %d kills met an operation", kills)
	}
	// Each that was acknowledged is there and can be gone back to.
	list := must(t, s, "kernel", "checkpoints", k.id)
	back := 0
	for id, n := range k.saved {
		if !strings.Contains(list, id) {
			t.Errorf("checkpoint %s was acknowledged and is not in the list", id)
			continue
		}
		if back++; back > 4 && !long && id != first {
			continue
		}
		must(t, s, "kernel", "rollback", k.id, id)
		k.is(n)
	}
	k.oneTree(processes)
	k.gone()
}
