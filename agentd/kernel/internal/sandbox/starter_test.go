package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func init() {
	// starter starts the kernel of a Spec on its stdin and stays.
	testPrograms["starter"] = func() {
		var spec Spec
		if err := json.NewDecoder(os.Stdin).Decode(&spec); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		if _, err := Start(context.Background(), spec); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("started")
		time.Sleep(time.Hour)
	}
}

// startStarter runs the starter as a process of its own.
func startStarter(t *testing.T, spec Spec, before ...string) (*exec.Cmd, *os.File) {
	t.Helper()
	data, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	out, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	argv := append(before, self)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "SANDBOX_TEST_PROGRAM=starter")
	cmd.Stdin = strings.NewReader(string(data))
	cmd.Stdout, cmd.Stderr = theirs, theirs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = theirs.Close()
	t.Cleanup(func() { _ = out.Close() })
	return cmd, out
}

func mountedBelow(t *testing.T, dir string) []string {
	t.Helper()
	all, err := mountPoints()
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, m := range all {
		if below(m.path, []string{dir}) {
			found = append(found, m.path)
		}
	}
	return found
}

// The starter is killed at odd moments of a start. Either the kernel's processes
// end by themselves, or sandbox.json names them; after Cleanup nothing is left.
func TestKilledStarterLeavesNothing(t *testing.T) {
	needRoot(t)
	began := time.Now()
	probeSpec := testSpec(t, `import time; time.sleep(1000)`)
	cmd, out := startStarter(t, probeSpec)
	buf := make([]byte, 64)
	if n, err := out.Read(buf); err != nil || string(buf[:n]) != "started\n" {
		t.Fatalf("%s%v", buf[:n], err)
	}
	whole := time.Since(began)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()

	found, gone := 0, 0
	for i := range 40 {
		spec := testSpec(t, `import time; time.sleep(1000)`)
		spec.Limits = Limits{Memory: 1 << 30, CPU: 1, PIDs: 64}
		cmd, _ := startStarter(t, spec)
		// Most of the time goes by before the sandbox is begun: later moments more often.
		time.Sleep(whole/4 + time.Duration(rand.Int64N(int64(whole))))
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		pid, _, err := Find(spec.StateDir)
		if err == nil {
			found++
			// It may be adopted, or be between its note and its go, and end.
			s, err := Adopt(context30(t), spec, pid)
			switch {
			case err == nil:
				if err := s.Kill(context30(t)); err != nil {
					t.Error(err)
				}
				s.Close()
			case !errors.Is(err, ErrGone) && alive(t, spec.UID) > 0:
				t.Logf("moment %d: %v", i, err)
			}
		} else {
			gone++
			waitFor(t, "the kernel's end without its starter", func() bool { return len(processesIn(t, spec.ID)) == 0 && alive(t, spec.UID) == 0 })
		}
		if err := Cleanup(context30(t), spec); err != nil {
			t.Error(err)
		}
		if n := alive(t, spec.UID); n != 0 {
			t.Errorf("moment %d: %d processes are left", i, n)
		}
		if left := groupsOf(t, spec.ID); len(left) != 0 {
			t.Errorf("moment %d: groups are left: %q", i, left)
		}
		if left := mountedBelow(t, spec.StateDir); len(left) != 0 {
			t.Errorf("moment %d: mounts are left: %q", i, left)
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("a start takes %v; of 40 kernels %d were running, %d had ended", whole, found, gone)
	if err := Cleanup(context30(t), probeSpec); err != nil {
		t.Fatal(err)
	}
	if n := alive(t, probeSpec.UID); n != 0 {
		t.Errorf("%d processes are left of a kernel whose starter died after the start", n)
	}
}

// processesIn lists the processes in a kernel's groups.
func processesIn(t *testing.T, id string) []string {
	t.Helper()
	var all []string
	for _, g := range groupsOf(t, id) {
		procs, _ := os.ReadFile(g + "/cgroup.procs")
		all = append(all, strings.Fields(string(procs))...)
	}
	return all
}

// A starter that dies after Prepare leaves a mount, which Cleanup takes away.
func TestCleanupAfterPrepare(t *testing.T) {
	spec := testSpec(t, `pass`)
	s := start(t, spec)
	if _, err := s.Wait(context30(t)); err != nil {
		t.Fatal(err)
	}
	spec = s.Spec()
	if spec.MainPID == 0 {
		spec.MainPID = 5 // it ended too fast to be seen
	}
	p, err := Prepare(spec)
	if err != nil {
		t.Fatal(err)
	}
	if left := mountedBelow(t, spec.StateDir); len(left) != 1 || left[0] != p.CRIU().Root {
		t.Errorf("mounts %q, root %q", left, p.CRIU().Root)
	}
	if err := Cleanup(context30(t), spec); err != nil {
		t.Fatal(err)
	}
	if left := mountedBelow(t, spec.StateDir); len(left) != 0 {
		t.Errorf("left: %q", left)
	}
	p.Abort()
	if _, err := Prepare(Spec{ID: "x"}); err == nil {
		t.Error("an empty specification was prepared")
	}
}

// The context bounds a start, and an end of it leaves nothing.
func TestStartEndsWithItsContext(t *testing.T) {
	for i := range 15 {
		spec := testSpec(t, `import time; time.sleep(1000)`)
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i)*2*time.Millisecond)
		s, err := Start(ctx, spec)
		cancel()
		if err == nil {
			if err := s.Kill(context30(t)); err != nil {
				t.Error(err)
			}
			s.Close()
		}
		if n := alive(t, spec.UID); n != 0 {
			t.Errorf("%d processes are left after %v", n, err)
		}
		if left := groupsOf(t, spec.ID); len(left) != 0 {
			t.Errorf("groups are left: %q after %v", left, err)
		}
	}
}

// A unit with LimitCORE=0 is a hard limit, below which nobody without
// CAP_SYS_RESOURCE comes.
func TestStarterWithoutCores(t *testing.T) {
	spec := testSpec(t, `import resource; print(resource.getrlimit(resource.RLIMIT_CORE), flush=True); import time; time.sleep(1000)`)
	cmd, out := startStarter(t, spec, "/bin/sh", "-c", `ulimit -Hc 0 && exec "$0"`)
	buf := make([]byte, 200)
	if n, err := out.Read(buf); err != nil || string(buf[:n]) != "started\n" {
		t.Fatalf("%s%v", buf[:n], err)
	}
	want := "(0, 0)"
	if mayRaiseLimits() {
		want = "(1, 1)"
	}
	waitFor(t, want, logHas(spec, want))
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// A fork of a kernel has its user. What ends the one leaves the other alone.
func TestCleanupLeavesForksAlone(t *testing.T) {
	one := testSpec(t, `import time; print("ready"); time.sleep(1000)`)
	two := testSpec(t, `import time; print("ready"); time.sleep(1000)`)
	two.UID, two.GID = one.UID, one.GID
	s := start(t, two)
	cmd, out := startStarter(t, one)
	buf := make([]byte, 64)
	if n, err := out.Read(buf); err != nil || string(buf[:n]) != "started\n" {
		t.Fatalf("%s%v", buf[:n], err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	// Not even its note helps to find it.
	if err := os.Remove(one.stateFile()); err != nil {
		t.Fatal(err)
	}
	for _, g := range groupsOf(t, one.ID) {
		for _, pid := range processesIn(t, one.ID) {
			_ = os.WriteFile(filepath.Join(filepath.Dir(filepath.Dir(g)), "cgroup.procs"), []byte(pid), 0o644)
		}
	}
	if n := alive(t, one.UID); n != 4 {
		t.Fatalf("%d processes, want two kernels and their inits", n)
	}
	if err := Cleanup(context30(t), one); err != nil {
		t.Fatal(err)
	}
	if n := alive(t, one.UID); n != 2 {
		t.Errorf("%d processes, want a kernel and its init", n)
	}
	select {
	case <-s.Done():
		t.Error("the fork ended")
	default:
	}
}

// The next starter makes the fence again.
func TestFenceIsMadeAgain(t *testing.T) {
	needRoot(t)
	host := outside(t)
	port := echo(t, host.String())
	for _, n := range []Network{{Mode: NetworkAllowed, Allow: []string{fmt.Sprintf("%v:%d", host, port)}}, {Mode: NetworkOpen, Allow: []string{fmt.Sprintf("%v:%d", host, port)}}} {
		spec := testSpec(t, `
import socket, sys, time
while True:
    try:
        with socket.create_connection((sys.argv[1], int(sys.argv[2])), 10) as s:
            s.shutdown(socket.SHUT_WR)
            said = s.recv(100).decode()
    except OSError as e: said = e.strerror
    print(said)
    time.sleep(0.02)`, host.String(), fmt.Sprint(port))
		spec.Network = n
		cmd, _ := startStarter(t, spec)
		waitFor(t, "a connection", logHas(spec, "echo 0"))
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		waitFor(t, "no connection", logHas(spec, "Connection refused"))
		if err := os.Truncate(spec.LogFile, 0); err != nil {
			t.Fatal(err)
		}
		s, err := Adopt(context30(t), spec, 0)
		if err != nil {
			t.Fatal(err)
		}
		waitFor(t, "a connection again", logHas(spec, "echo 0"))
		if err := s.Kill(context30(t)); err != nil {
			t.Error(err)
		}
		s.Close()
	}
}
