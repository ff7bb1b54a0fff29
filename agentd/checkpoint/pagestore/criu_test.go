package pagestore

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
)

// counting is a process with 24 MiB of memory that adds one to a number in a file,
// again and again, and changes a little of its memory each time.
const counting = `
import os, time
memory = bytearray(os.urandom(8 << 20)) + bytearray(b"0123456789abcdef" * (1 << 20))
check = sum(memory[::4096])
n = 0
while True:
    n += 1
    memory[(n * 4096 + 1) % len(memory)] = n % 256
    ok = sum(memory[::4096]) == check
    fd = os.open("count", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, b"%d %d\n" % (n, ok))
    os.close(fd)
    time.sleep(0.01)
`

// lastCount is the last number in the file, and whether memory was as it should be.
func lastCount(t *testing.T, dir string) (n int, ok bool) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "count"))
	if err != nil {
		return 0, true
	}
	lines := strings.Split(string(b), "\n")
	if len(lines) < 2 {
		return 0, true
	}
	var sound int
	if _, err := fmt.Sscanf(lines[len(lines)-2], "%d %d", &n, &sound); err != nil {
		t.Fatal(err)
	}
	return n, sound == 1
}

func waitCount(t *testing.T, dir string, more func(n int) bool) int {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		n, ok := lastCount(t, dir)
		if !ok {
			t.Fatal("the process's memory is not what it was")
		}
		if more(n) {
			return n
		}
		if time.Now().After(deadline) {
			t.Fatalf("the process stands at %d", n)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func criu(t *testing.T, path, images string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, append(args, "-D", images, "-o", "criu.log", "-v1")...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		log, _ := os.ReadFile(filepath.Join(images, "criu.log")) //nolint:errcheck // for the message
		t.Fatalf("criu %s: %v\n%s%s", args[0], err, out.Bytes(), log)
	}
	os.Remove(filepath.Join(images, "criu.log")) //nolint:errcheck // not part of the images
}

// TestRealImages dumps a process twice with CRIU, stores both, and lets CRIU restore
// the first from what the store wrote out.
func TestRealImages(t *testing.T) {
	path := criutest.Path(t)
	// A process that CRIU restores and that ends must be reaped by somebody: by us.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	dir, src := t.TempDir(), t.TempDir()
	cmd := exec.Command("/usr/bin/python3", "-c", counting)
	cmd.Dir = src
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: 0}
	log, err := os.OpenFile(filepath.Join(src, "log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() //nolint:errcheck // a test's
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	alive := true
	kill := func() {
		if alive {
			alive = false
			cmd.Process.Kill() //nolint:errcheck // it may be gone
			cmd.Wait()         //nolint:errcheck // killed
		}
	}
	defer kill()
	pid := strconv.Itoa(cmd.Process.Pid)
	waitCount(t, src, func(n int) bool { return n > 3 })

	s := openStore(t, dir)
	first, second := t.TempDir(), t.TempDir()
	beforeDump, _ := lastCount(t, src)
	criu(t, path, first, "dump", "-t", pid, "--leave-running")
	atDump, _ := lastCount(t, src)
	one, st := mustPut(t, s, meta("k1"), first)
	if st.Written > st.Size*8/10 {
		t.Errorf("the first takes %d of %d bytes: nothing compressed?", st.Written, st.Size)
	}
	waitCount(t, src, func(n int) bool { return n > atDump+5 })
	criu(t, path, second, "dump", "-t", pid, "--leave-running")
	m := meta("k1")
	m.Parent = one.ID
	two, st := mustPut(t, s, m, second)
	t.Logf("the second dump: %d bytes, %d new, %d written", st.Size, st.New, st.Written)
	if st.Written > st.Size*8/100 {
		t.Errorf("the second takes %d of %d bytes", st.Written, st.Size)
	}
	kill()
	before, _ := lastCount(t, src)

	mustRestore(t, s, two.ID, second)
	criu(t, path, restored(t, s, one.ID), "restore", "-d")
	defer func() {
		syscall.Kill(cmd.Process.Pid, syscall.SIGKILL)      //nolint:errcheck // the restored process: it has the same pid
		syscall.Wait4(cmd.Process.Pid, nil, 0, nil)         //nolint:errcheck // it is our child now
		unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) //nolint:errcheck // as before
	}()
	// It counts on from the first dump, below where the killed one had come to.
	back := waitCount(t, src, func(n int) bool { return n != before })
	if back > before || back <= beforeDump {
		t.Errorf("it goes on from %d; dumped between %d and %d, killed at %d", back, beforeDump, atDump, before)
	}
	waitCount(t, src, func(n int) bool { return n > back+3 && n < before+1000 })
}
