package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestExecute(t *testing.T) {
	dir, _ := newSpec(t)
	a, _ := spawn(t, dir)
	p := attach(t, a, "one")
	// Sent while the kernel starts: it waits.
	if got := p.run("x = 6\nprint('hello')\nx*7"); got != "hello\n42" {
		t.Errorf("printed %q", got)
	}
	k := waitState(t, a, posternv1.KernelState_KERNEL_STATE_IDLE)
	if k.Connections != 1 || k.Generation != 1 || k.Sequence == 0 || k.Spec != "python3" {
		t.Errorf("kernel is %v", k)
	}
	_, reply := p.result(p.execute("1/0"))
	if reply.content["status"] != "error" || reply.content["ename"] != "ZeroDivisionError" {
		t.Errorf("reply is %v", reply)
	}
	id := p.send(jupyter.Shell, "complete_request", map[string]any{"code": "pri", "cursor_pos": 3})
	if _, reply := p.result(id); reply.kind != "complete_reply" {
		t.Errorf("reply is %v", reply)
	}
}

// Two clients on one kernel: both hear what it prints, each gets its own replies.
func TestTwoClients(t *testing.T) {
	dir, _ := newSpec(t)
	a, _ := spawn(t, dir)
	one, two := attach(t, a, "one"), attach(t, a, "two")
	id := one.execute("print('from one')")
	one.result(id)
	heard := false
	two.until("what one did", func(g got) bool {
		if g.channel != jupyter.IOPub {
			t.Errorf("two got %v", g)
		}
		heard = heard || g.kind == "stream"
		return g.parent == id && g.kind == "status" && g.content["execution_state"] == "idle"
	})
	if !heard {
		t.Error("two did not hear what one printed")
	}
	// A question goes to who asked for the cell.
	id = two.execute("print('name:', input('who? '))")
	question := two.until("a question", func(g got) bool { return g.channel == jupyter.Stdin })
	if g := question[len(question)-1]; g.kind != "input_request" || g.parent != id || g.content["prompt"] != "who? " {
		t.Errorf("the question is %v", g)
	}
	two.send(jupyter.Stdin, "input_reply", map[string]any{"value": "Ada"})
	if out, reply := two.result(id); out != "name: Ada\n" || reply.content["status"] != "ok" {
		t.Errorf("printed %q, %v", out, reply)
	}
	id = one.execute("1")
	one.until("one's result", func(g got) bool {
		if g.channel == jupyter.Stdin {
			t.Errorf("one got two's question: %v", g)
		}
		return g.parent == id && g.channel == jupyter.Shell
	})
	// The newer of one name takes the older's place.
	again := attach(t, a, "one", resume)
	for {
		f, err := one.in.Next()
		if err != nil {
			t.Fatal(err)
		}
		if f.GetEnd() != "" {
			break
		}
	}
	if got := again.run("print('again')"); got != "again\n" {
		t.Errorf("printed %q", got)
	}
	k, err := a.Kernel(soon(t))
	if err != nil || k.Connections != 2 {
		t.Errorf("%v, %v: want 2 connections", k, err)
	}
}

// What a client misses while it is away it gets when it is back, in order, once.
func TestAway(t *testing.T) {
	dir, _ := newSpec(t)
	a, _ := spawn(t, dir)
	p := attach(t, a, "one")
	p.run("import time")
	id := p.execute("for i in range(200):\n    print(i, flush=True)\n    time.sleep(0.002)")
	seen := 0
	p.until("some output", func(g got) bool {
		if g.kind == "stream" {
			seen++
		}
		return seen == 5
	})
	if err := p.out.Confirm(p.last); err != nil {
		t.Fatal(err)
	}
	confirmed := p.last
	// What comes after the last confirmation comes again.
	p.until("more output", func(g got) bool { return g.kind == "stream" })
	waitFor(t, "the confirmation", func() bool {
		_ = p.stream.Close()
		k, err := a.Kernel(soon(t))
		return err == nil && k.Connections == 0
	})
	waitFor(t, "the cell's end", func() bool {
		d, err := a.Detail(soon(t))
		return err == nil && d.Requests == 0
	})
	waitState(t, a, posternv1.KernelState_KERNEL_STATE_IDLE)
	p = attach(t, a, "one", resume)
	p.last = confirmed
	first, err := p.next()
	if err != nil || first.sequence != confirmed+1 || !first.replayed {
		t.Fatalf("the first delivery is %v, %v, want number %d", first, err, confirmed+1)
	}
	text := ""
	// The reply comes by another socket than the output and may overtake the end of that.
	replied, idle := false, false
	all := append([]got{first}, p.until("the reply and the end", func(g got) bool {
		replied = replied || g.channel == jupyter.Shell && g.parent == id
		idle = idle || g.kind == "status" && g.parent == id && g.content["execution_state"] == "idle"
		return replied && idle
	})...)
	for _, g := range all {
		if g.kind == "stream" {
			text += g.content["text"].(string)
		}
		if !g.replayed {
			t.Errorf("not marked as replayed: %v", g)
		}
	}
	lines := strings.Split(strings.TrimSpace(text), "\n")
	if len(lines) == 0 || lines[len(lines)-1] != "199" {
		t.Fatalf("the output ends with %q", lines[len(lines)-1])
	}
	for i, line := range lines {
		if want := fmt.Sprint(200 - len(lines) + i); line != want {
			t.Fatalf("line %d is %q, want %q", i, line, want)
		}
	}
	// From a number of one's own.
	q := attach(t, a, "two", func(r *posternv1.KernelChannelsRequest) { r.AfterSequence = 1 })
	if g, err := q.next(); err != nil || g.sequence != 2 {
		t.Errorf("after 1 comes %v, %v", g, err)
	}
	// A new client gets what is new alone.
	q = attach(t, a, "three", resume)
	began := q.at.Sequence // it changes while it reads
	p.run("print('new')")
	if g, err := q.next(); err != nil || g.replayed || g.sequence <= began {
		t.Errorf("a new client got %v, %v", g, err)
	}
}

// Kill -9 of the shim: the kernel goes on, the next shim adopts it and the journal.
func TestShimKilled(t *testing.T) {
	dir, _ := newSpec(t)
	a, process := spawn(t, dir)
	p := attach(t, a, "one")
	p.run("import time\nx = 'kept'")
	before, err := a.Detail(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	id := p.execute("print('begun', flush=True)\ntime.sleep(2)\nprint('ended', flush=True)")
	p.until("its beginning", func(g got) bool { return g.kind == "stream" })
	if err := p.out.Confirm(p.last); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the confirmation", func() bool { return confirmed(t, dir, a) })
	if err := process.Kill(); err != nil {
		t.Fatal(err)
	}
	_, _ = process.Wait()
	if _, err := a.Kernel(soon(t)); !errors.Is(err, ErrNoShim) {
		t.Errorf("without a shim: %v", err)
	}
	a, _ = spawn(t, dir)
	q := attach(t, a, "one", resume)
	q.last = p.last
	out, reply := q.result(id)
	if out != "ended\n" || reply.content["status"] != "ok" {
		t.Errorf("printed %q, reply %v", out, reply)
	}
	if got := q.run("print(x)"); got != "kept\n" {
		t.Errorf("printed %q", got)
	}
	after, err := a.Detail(soon(t))
	if err != nil || after.InitPID != before.InitPID || after.PID == before.PID {
		t.Errorf("detail is %+v, %v; was %+v", after, err, before)
	}
}

// confirmed gives the shim time to read what was written to it.
func confirmed(t *testing.T, _ string, a *Agent) bool {
	t.Helper()
	_, err := a.Kernel(soon(t))
	time.Sleep(50 * time.Millisecond)
	return err == nil
}

// The kernel is gone when the next shim comes.
func TestBothKilled(t *testing.T) {
	dir, _ := newSpec(t)
	a, process := spawn(t, dir)
	p := attach(t, a, "one")
	p.run("1")
	d, err := a.Detail(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := process.Kill(); err != nil {
		t.Fatal(err)
	}
	_, _ = process.Wait()
	if err := unix.Kill(d.InitPID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the kernel's end", func() bool { return unix.Kill(d.InitPID, 0) != nil })
	a, _ = spawn(t, dir)
	k := waitState(t, a, posternv1.KernelState_KERNEL_STATE_DEAD)
	if k.Reason == "" || k.Generation != 1 {
		t.Errorf("kernel is %v", k)
	}
	if k, err = a.Restart(soon(t)); err != nil || k.Generation != 2 {
		t.Fatalf("restart: %v, %v", k, err)
	}
	q := attach(t, a, "one", resume)
	if got := q.run("print('alive')"); got != "alive\n" {
		t.Errorf("printed %q", got)
	}
}

func TestDeathAndRestart(t *testing.T) {
	dir, _ := newSpec(t)
	a, _ := spawn(t, dir)
	p := attach(t, a, "one")
	p.run("x = 1")
	id := p.execute("import os; os._exit(7)")
	var reply got
	p.until("its death", func(g got) bool {
		if g.parent == id && g.channel == jupyter.Shell {
			reply = g
		}
		return g.kind == "status" && g.content["execution_state"] == "dead"
	})
	if reply.content["status"] != "error" || !strings.Contains(fmt.Sprint(reply.content["evalue"]), "exit code 7") {
		t.Errorf("the reply to what killed it is %v", reply)
	}
	k := waitState(t, a, posternv1.KernelState_KERNEL_STATE_DEAD)
	if !strings.Contains(k.Reason, "exit code 7") {
		t.Errorf("the reason is %q", k.Reason)
	}
	// What is sent to the dead is answered.
	if _, reply := p.result(p.execute("1")); reply.content["status"] != "error" || !strings.Contains(fmt.Sprint(reply.content["evalue"]), "restart it") {
		t.Errorf("the reply of the dead is %v", reply)
	}
	if _, err := a.Interrupt(soon(t)); err == nil {
		t.Error("a dead kernel was interrupted")
	}
	last := p.last
	if _, err := a.Restart(soon(t)); err != nil {
		t.Fatal(err)
	}
	// Not by an error: ipykernel may abort what it gets right after one.
	if got := p.run("print('x' in globals())"); got != "False\n" {
		t.Errorf("after a restart: %q", got)
	}
	if p.last <= last {
		t.Errorf("sequence numbers began anew: %d after %d", p.last, last)
	}
	// A restart in the middle of a cell.
	id = p.execute("import time; time.sleep(1000)")
	p.until("busy", func(g got) bool { return g.parent == id && g.kind == "status" })
	k, err := a.Restart(soon(t))
	if err != nil || k.Generation != 3 {
		t.Fatalf("restart: %v, %v", k, err)
	}
	if _, reply := p.result(id); !strings.Contains(fmt.Sprint(reply.content["evalue"]), "restarted") {
		t.Errorf("the reply to what was cut: %v", reply)
	}
	if got := p.run("print('fine')"); got != "fine\n" {
		t.Errorf("printed %q", got)
	}
}

// An interrupt reaches a kernel that prints as fast as it can, although nobody reads
// what it prints.
func TestInterruptWhilePrinting(t *testing.T) {
	dir, _ := newSpec(t)
	a, _ := spawn(t, dir)
	p := attach(t, a, "one")
	p.run("1")
	// It flushes at times: without that ipykernel gathers gigabytes on a busy machine, and
	// is in the midst of making JSON of them when the interrupt comes. What it notices
	// outlives a second interrupt, which comes meanwhile where the machine is slow.
	p.execute("import itertools, sys\ndef note():\n  while True:\n    try: return open('interrupted', 'w').close()\n    except KeyboardInterrupt: pass\n" +
		"try:\n  for i in itertools.count():\n    print('x' * 1000)\n    i % 1000 or sys.stdout.flush()\nexcept KeyboardInterrupt:\n  note()\n  raise")
	p.until("output", func(g got) bool { return g.kind == "stream" })
	// It does not read any more, and another one does.
	q := attach(t, a, "two")
	before := q.at.Sequence
	waitFor(t, "output nobody reads", func() bool {
		k, err := a.Kernel(soon(t))
		return err == nil && k.Sequence > before+100
	})
	began := time.Now()
	if _, err := a.Interrupt(soon(t)); err != nil {
		t.Fatal(err)
	}
	delivered := time.Since(began)
	// ipykernel may be interrupted where it swallows that: users press it again.
	again := time.NewTicker(10 * time.Second)
	defer again.Stop()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(stop)
	wg.Go(func() {
		for {
			select {
			case <-again.C:
				ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
				_, _ = a.Interrupt(ctx)
				cancel()
			case <-stop:
				return
			}
		}
	})
	// Its reply comes behind what it had printed by then, which may be a hundred MiB.
	spec, err := ReadSpec(dir)
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the cell to notice", func() bool {
		_, err := os.Stat(filepath.Join(spec.Sandbox.PrivateDir, "home", "interrupted"))
		return err == nil
	})
	t.Logf("delivered after %v, noticed after %v", delivered, time.Since(began))
}

// A gigabyte of output grows nobody's memory, whether clients read or not.
func TestMuchOutput(t *testing.T) {
	size := 100 << 20
	if os.Getenv("POSTERN_LONG") != "" {
		size = 1 << 30
	}
	dir, _ := newSpec(t)
	a, process := spawn(t, dir)
	sleeper := attach(t, a, "sleeper") // it never reads again
	p := attach(t, a, "one")
	p.run("s = 'y' * 99999 + '\\n'")
	id := p.execute(fmt.Sprintf("import sys\nfor i in range(%d): sys.stdout.write(s)", size/100_000))
	var bytes, gaps int
	done := finished(id)
	p.until("its end", func(g got) bool {
		if g.kind == "stream" {
			bytes += len(g.content["text"].(string))
		}
		if g.gap > 0 {
			gaps++
		}
		return done(g)
	})
	peak := peakMemory(t, process.Pid)
	t.Logf("%d MiB of %d came, %d gaps; peak memory of the shim %d MiB", bytes>>20, size>>20, gaps, peak>>20)
	if bytes == 0 || gaps == 0 && bytes != size/100_000*100_000 {
		t.Errorf("%d bytes of %d without a gap", bytes, size)
	}
	if peak > 150<<20 {
		t.Errorf("the shim took %d MiB", peak>>20)
	}
	d, err := a.Detail(soon(t))
	if err != nil || d.JournalBytes > 64<<20 {
		t.Errorf("journal of %d bytes, %v", d.JournalBytes, err)
	}
	// The sleeper wakes: it gets a marker, and then the newest.
	last := p.last
	marked := false
	sleeper.until("the end", func(g got) bool {
		marked = marked || g.gap > 0
		return g.sequence >= last
	})
	if !marked && size > 64<<20 {
		t.Error("no marker for what the journal could not keep")
	}
}

func peakMemory(t *testing.T, pid int) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var kib int64
		if n, _ := fmt.Sscanf(line, "VmHWM: %d kB", &kib); n == 1 {
			return kib << 10
		}
	}
	t.Fatal("no VmHWM")
	return 0
}

func TestLargeMessages(t *testing.T) {
	dir, _ := newSpec(t)
	a, _ := spawn(t, dir)
	p := attach(t, a, "one")
	p.run("from IPython.display import publish_display_data as d")
	id := p.execute("d({'text/plain': 'z' * (20<<20)})\nd({'text/plain': 'z' * (70<<20)})\nprint('after')")
	var large, gap bool
	done := finished(id)
	p.until("its end", func(g got) bool {
		if text, ok := g.content["text"].(string); ok && g.kind == "display_data" {
			large = large || len(text) > 20<<20
		}
		gap = gap || g.gap > 0
		return done(g)
	})
	if !large || !gap {
		t.Errorf("20 MiB came: %v; 70 MiB left a marker: %v", large, gap)
	}
	// Text is never too large: it comes in pieces, cut where nothing is broken.
	id = p.execute("import sys\nn = sys.stdout.write(('z' * 7 + 'ä€😀\\n\\t\"\\\\' + '\\x00') * 1_500_000)")
	var text strings.Builder
	pieces := 0
	done = finished(id)
	p.until("the text", func(g got) bool {
		if g.kind == "stream" && g.parent == id {
			pieces++
			text.WriteString(g.content["text"].(string))
		}
		return done(g)
	})
	want := strings.Repeat("zzzzzzzä€😀\n\t\"\\\x00", 1_500_000)
	if got := text.String(); got != want || pieces < 100 {
		t.Errorf("%d bytes in %d pieces, want %d; equal: %v", len(got), pieces, len(want), got == want)
	}
}

// Around a checkpoint nothing that a client sent is lost.
func TestQuiesce(t *testing.T) {
	dir, _ := newSpec(t)
	a, _ := spawn(t, dir)
	p := attach(t, a, "one")
	p.run("x = 1")
	q, err := a.Quiesce(soon(t), 10*time.Second)
	if err != nil || q.Busy || q.Requests != 0 || q.InitPID == 0 {
		t.Fatalf("quiesced: %+v, %v", q, err)
	}
	// ipykernel has one to itself.
	if n := sockets(t, q.InitPID); n > 1 {
		t.Errorf("%d connections to the kernel's sockets are open", n)
	}
	waitState(t, a, posternv1.KernelState_KERNEL_STATE_CHANGING)
	if _, err := a.Quiesce(soon(t), 0); err == nil {
		t.Error("quiesced twice")
	}
	var ids []string
	for i := range 20 {
		ids = append(ids, p.execute(fmt.Sprintf("x += 1; print('cell', %d, x)", i)))
	}
	if _, err := a.Resume(soon(t)); err != nil {
		t.Fatal(err)
	}
	printed, done := map[string]string{}, finished(ids[len(ids)-1])
	p.until("all cells", func(g got) bool {
		if g.kind == "stream" {
			printed[g.parent] += g.content["text"].(string)
		}
		return done(g)
	})
	for i, id := range ids {
		if want := fmt.Sprintf("cell %d %d\n", i, i+2); printed[id] != want {
			t.Errorf("cell %d printed %q, want %q", i, printed[id], want)
		}
	}
	waitState(t, a, posternv1.KernelState_KERNEL_STATE_IDLE)
	if _, err := a.Resume(soon(t)); err == nil {
		t.Error("resumed what was not quiesced")
	}
	// In the middle of a cell, with others behind it: every request gets a reply.
	ids = []string{p.execute("import time; time.sleep(1); print('slept')"), p.execute("print('second')"), p.execute("1/0"), p.execute("print('never')")}
	p.until("busy", func(g got) bool { return g.parent == ids[0] && g.kind == "status" })
	q, err = a.Quiesce(soon(t), 0)
	if err != nil || !q.Busy || q.Requests == 0 {
		t.Fatalf("quiesced: %+v, %v", q, err)
	}
	if _, err := a.Resume(soon(t)); err != nil {
		t.Fatal(err)
	}
	replies := map[string]string{}
	p.until("all replies", func(g got) bool {
		if g.channel == jupyter.Shell {
			replies[g.parent] = fmt.Sprint(g.content["status"])
		}
		return len(replies) == len(ids)
	})
	t.Logf("replies %v", replies)
	if replies[ids[0]] != "ok" || replies[ids[2]] == "ok" {
		t.Errorf("replies %v of %v", replies, ids)
	}
	time.Sleep(500 * time.Millisecond) // ipykernel aborts what comes soon after an error
	if got := p.run("print('fine')"); got != "fine\n" {
		t.Errorf("printed %q", got)
	}
	waitFor(t, "no requests", func() bool {
		d, err := a.Detail(soon(t))
		return err == nil && d.Requests == 0 && d.Queued == 0
	})
}

// sockets counts the connections to the kernel's ZeroMQ sockets, as the kernel's network
// namespace has them.
func sockets(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/unix", pid))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(text)) {
		// Num RefCount Protocol Flags Type St Inode Path; St 03 is connected
		f := strings.Fields(line)
		if len(f) == 8 && f[5] == "03" && strings.Contains(f[7], sandbox.RunInside) {
			n++
		}
	}
	return n
}

func waitFor(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if holds() {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// What the kernel leaves in its run directory leads the shim nowhere.
func TestHostileRunDirectory(t *testing.T) {
	dir, _ := newSpec(t, func(s *Spec) {
		s.Sandbox.Argv = []string{python, "-c", `
import os, time
os.chdir('/run/postern')
os.symlink('/proc/self/cwd/postern-secret', 'k-2')
time.sleep(1000)`}
	})
	a, _ := spawn(t, dir)
	time.Sleep(300 * time.Millisecond)
	k, err := a.Kernel(soon(t))
	if err != nil || k.State != posternv1.KernelState_KERNEL_STATE_STARTING {
		t.Errorf("%v, %v", k, err)
	}
	text, _ := os.ReadFile(filepath.Join(dir, logFile))
	if !strings.Contains(string(text), "no socket of the kernel's") {
		t.Errorf("the log says %s", text)
	}
}

func TestRefusals(t *testing.T) {
	dir, _ := newSpec(t)
	a, _ := spawn(t, dir)
	_, err := kernelstream.Dial(soon(t), a, &posternv1.KernelChannelsRequest{Client: strings.Repeat("x", 129)})
	if proto.CodeOf(err) != proto.CodeInvalid {
		t.Errorf("a long name: %v", err)
	}
	for name, m := range map[string]*posternv1.KernelMessage{
		"iopub":   {Channel: jupyter.IOPub, Header: []byte(`{"msg_id":"1","msg_type":"x"}`)},
		"no id":   {Channel: jupyter.Shell, Header: []byte(`{"msg_type":"x"}`)},
		"long id": {Channel: jupyter.Shell, Header: []byte(`{"msg_type":"x","msg_id":"` + strings.Repeat("i", 300) + `"}`)},
	} {
		p := attach(t, a, "one")
		if err := p.out.Message(m); err != nil {
			t.Fatal(err)
		}
		for {
			f, err := p.in.Next()
			if err != nil {
				t.Errorf("%s: the stream ended without a word: %v", name, err)
				break
			}
			if f.GetEnd() != "" {
				if err := kernelstream.EndError(f); proto.CodeOf(err) != proto.CodeInvalid {
					t.Errorf("%s: %v", name, err)
				}
				break
			}
		}
	}
	if _, err := Spawn(soon(t), "/proc/self/exe", dir); err == nil || !strings.Contains(err.Error(), "another shim") {
		t.Errorf("a second shim: %v", err)
	}
}

func TestCannotStart(t *testing.T) {
	dir, _ := newSpec(t, func(s *Spec) { s.Sandbox.Argv = []string{"/no/such/program"} })
	a, _ := spawn(t, dir)
	k := waitState(t, a, posternv1.KernelState_KERNEL_STATE_DEAD)
	if !strings.Contains(k.Reason, "/no/such/program") {
		t.Errorf("the reason is %q", k.Reason)
	}
}

// Stop leaves nothing that runs.
func TestStop(t *testing.T) {
	dir, spec := newSpec(t)
	a, process := spawn(t, dir)
	p := attach(t, a, "one")
	p.run("import subprocess; subprocess.Popen(['sleep', '1000'])")
	if err := a.Stop(soon(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := process.Wait(); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		var st unix.Stat_t
		if e.Name()[0] >= '0' && e.Name()[0] <= '9' && unix.Stat("/proc/"+e.Name(), &st) == nil && st.Uid == spec.Sandbox.UID {
			t.Errorf("process %s is left", e.Name())
		}
	}
	for {
		f, err := p.in.Next()
		if err != nil {
			t.Errorf("the client was not told: %v", err)
			break
		}
		if f.GetEnd() != "" {
			break
		}
	}
}
