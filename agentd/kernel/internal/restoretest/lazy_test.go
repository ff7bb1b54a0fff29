package restoretest

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/checkpoint"
	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
)

// memory is a session with memory that can be told apart from zeros, page by page; sum says
// whether all of it is what it was.
const memory = `
import numpy as np, zlib, os
big = np.random.default_rng(7).integers(1, 255, 300 << 20, dtype=np.uint8)
small = [str(i) * 3 for i in range(200_000)]
def sum(): return zlib.crc32(big), hash(tuple(small)) == was
was = hash(tuple(small))
n = 0
print(sum()[1])
`

// restoreLazily is restore with memory that comes later; eager is why it does not.
func (k *kernel) restoreLazily(dump string) (f checkpoint.Filling, mark, eager string) {
	k.t.Helper()
	if out, err := exec.Command("sh", "-c", `rm -rf "$2" && cp -a "$1"/private "$2" && chown 0:0 "$2"`, "sh", dump, k.spec.PrivateDir).CombinedOutput(); err != nil {
		k.t.Fatalf("%v: %s", err, out)
	}
	p, err := sandbox.Prepare(k.spec)
	if err != nil {
		k.t.Fatal(err)
	}
	text, err := json.Marshal(tree(p.CRIU()))
	if err != nil {
		k.t.Fatal(err)
	}
	images := dump + "/images"
	mark = filepath.Join(k.t.TempDir(), "filling")
	began := time.Now()
	pid, f, eager, err := driver(k.t).RestoreLazily(k.t.Context(), "", text, images, 1<<20, mark)
	if err != nil {
		p.Abort()
		log, _ := exec.Command("grep", "-h", "Error", images+"/criu.log").Output()
		k.t.Fatalf("%v\n%s", err, log)
	}
	k.t.Logf("restored in %v, eagerly because of %q", time.Since(began), eager)
	box, err := p.Adopt(k.t.Context(), pid)
	if err != nil {
		k.t.Fatal(err)
	}
	k.box = box
	if f != nil {
		k.t.Cleanup(f.Close)
	}
	return f, mark, eager
}

// server is the process id of the one that brings memory in; 0: all is there.
func server(t *testing.T) int {
	t.Helper()
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range tasks {
		text, _ := os.ReadFile(path)
		for _, field := range strings.Fields(string(text)) {
			line, _ := os.ReadFile("/proc/" + field + "/cmdline")
			if strings.Contains(string(line), "\x00lazy-pages\x00") {
				pid, _ := strconv.Atoi(field)
				return pid
			}
		}
	}
	return 0
}

func wait(t *testing.T, f checkpoint.Filling) error {
	t.Helper()
	select {
	case <-f.Done():
		return f.Err()
	case <-time.After(2 * time.Minute):
		t.Fatal("memory does not come")
		return nil
	}
}

// lazyKernel is a kernel that was dumped and ended.
func lazyKernel(t *testing.T) (k *kernel, dump, sum string) {
	t.Helper()
	k = startKernel(t)
	k.want(memory, "True")
	sum = k.run("print(*sum())")
	if !strings.HasSuffix(sum, " True") {
		t.Fatal(sum)
	}
	dump = k.dump(checkpoint.Stay)
	k.stop()
	return k, dump, sum
}

func TestALazilyRestoredKernelHasAllOfItsMemory(t *testing.T) {
	k, dump, sum := lazyKernel(t)
	f, mark, eager := k.restoreLazily(dump)
	if f == nil {
		t.Fatalf("restored eagerly: %s", eager)
	}
	k.want("n += 1; print(n)", "1")
	k.want("print(*sum())", sum)
	if err := wait(t, f); err != nil {
		t.Fatal(err)
	}
	if busy, err := driver(t).AwaitFilled(t.Context(), mark, true); busy || err != nil {
		t.Errorf("the mark says busy %v, %v", busy, err)
	}
	// It is as after any other restore: it is saved again, and comes back again.
	dump = k.dump(checkpoint.Stay)
	k.stop()
	f, _, _ = k.restoreLazily(dump)
	if err := wait(t, f); err != nil {
		t.Fatal(err)
	}
	k.want("n += 1; print(n, *sum())", "2 "+sum)
}

// While nobody brings memory in, who needs it waits, and goes on when somebody does; when
// that is killed the kernel is ended before it reads anything else.
func TestAKernelWhoseMemoryDoesNotComeIsEnded(t *testing.T) {
	k, dump, _ := lazyKernel(t)
	var mark string
	for tries := 0; ; tries++ {
		var f checkpoint.Filling
		f, mark, _ = k.restoreLazily(dump)
		if pid := server(t); pid > 0 {
			_ = unix.Kill(pid, unix.SIGKILL) // it may have ended
		}
		err := wait(t, f)
		if err != nil && strings.Contains(err.Error(), "its memory could not be brought back") {
			break
		}
		if err != nil || tries == 20 {
			t.Fatalf("the end of who brings memory in: %v", err)
		}
		k.stop() // all was there before
	}
	select {
	case <-k.box.Done():
	case <-time.After(time.Minute):
		t.Fatal("the kernel goes on")
	}
	if busy, err := driver(t).AwaitFilled(t.Context(), mark, true); busy || err == nil {
		t.Errorf("the mark says busy %v, %v", busy, err)
	}
}

// All that a session has comes back with lazy memory, too: threads, a child, timers, sockets,
// pipes, deleted files.
func TestEverythingOfAKernelComesBackLazily(t *testing.T) {
	k := startKernel(t)
	k.want(setup, "set up")
	k.want(check, "1")
	dump := k.dump(checkpoint.Stay)
	for range 2 {
		k.stop()
		f, _, eager := k.restoreLazily(dump)
		if f == nil {
			t.Fatalf("restored eagerly: %s", eager)
		}
		k.want(check, "2")
		if err := wait(t, f); err != nil {
			t.Fatal(err)
		}
	}
}
