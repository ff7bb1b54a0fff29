package sandbox

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/cgroup"
)

// groupsOf are the directories of a kernel in all hierarchies of this machine.
func groupsOf(t *testing.T, id string) []string {
	t.Helper()
	var found []string
	for _, path := range cgroup.Find(cgroup.Kernels, id, cgroup.Limits{}).Paths() {
		found = append(found, filepath.Dir(path))
	}
	return found
}

// needController skips nothing on CI, whose machines have the controllers.
func needController(t *testing.T, name string) {
	t.Helper()
	needRoot(t)
	have, err := cgroup.Controllers()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(have, name) {
		t.Skipf("needs root of a host with the %s controller", name)
	}
}

func TestMemoryLimit(t *testing.T) {
	needController(t, cgroup.Memory)
	spec := testSpec(t, `
import sys
data = []
while True:
    data.append(bytearray(1 << 20))
    sys.stdout.flush()`)
	spec.Limits.Memory = 64 << 20
	exit, out := run(t, spec)
	if exit.Code != 137 || exit.Reason != "killed: over its memory limit of 64 MiB" {
		t.Errorf("got %+v\n%s", exit, out)
	}
}

// A child that is over the limit dies alone, as far as the kernel's choice goes.
func TestMemoryLimitOfAChild(t *testing.T) {
	needController(t, cgroup.Memory)
	spec := testSpec(t, `
import subprocess, sys, time
p = subprocess.run([sys.executable, "-c", "x = []\nwhile True: x.append(bytearray(1 << 20))"])
print("child", p.returncode)
time.sleep(1000)`)
	spec.Limits.Memory = 64 << 20
	s := start(t, spec)
	waitFor(t, "the child's end", logHas(spec, "child -9"))
	if s.OOMKills() != 1 {
		t.Errorf("%d were killed", s.OOMKills())
	}
	if missing := s.Missing(); len(missing) != 0 {
		t.Errorf("missing %q", missing)
	}
}

func TestForkBomb(t *testing.T) {
	needController(t, cgroup.PIDs)
	spec := testSpec(t, `
import os, time
n = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(1000)
        n += 1
except BlockingIOError as e:
    print("stopped after", n, flush=True)
time.sleep(1000)`)
	spec.Limits.PIDs = 50
	s := start(t, spec)
	waitFor(t, "the bomb's end", logHas(spec, "stopped after"))
	// init and the kernel itself are counted
	if n := alive(t, spec.UID); n != 50 {
		t.Errorf("%d processes", n)
	}
	if err := s.Kill(context30(t)); err != nil {
		t.Fatal(err)
	}
	if n := alive(t, spec.UID); n != 0 {
		t.Errorf("%d processes are left", n)
	}
	if left := groupsOf(t, spec.ID); len(left) != 0 {
		t.Errorf("left: %q", left)
	}
}

// Without the controller the resource limit of the kernel's own user holds. With
// it there is none: forks of a kernel share the user, not the limit.
func TestForkBombWithoutController(t *testing.T) {
	needController(t, cgroup.PIDs)
	spec := testSpec(t, `
import resource
print(resource.getrlimit(resource.RLIMIT_NPROC)[0] == 50)`)
	spec.Limits.PIDs = 50
	if exit, out := run(t, spec); out != "False\n" {
		t.Errorf("%s: %s", exit.Reason, out)
	}
	h, err := makeHostSide(testSpec(t, `
import resource
print(resource.getrlimit(resource.RLIMIT_NPROC))`), false)
	if err != nil {
		t.Fatal(err)
	}
	h.spec.Limits.PIDs = 50
	h.cgroups.FailForTest(cgroup.PIDs)
	s, err := h.start(context30(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Wait(context30(t)); err != nil {
		t.Fatal(err)
	}
	if log, _ := os.ReadFile(h.spec.LogFile); string(log) != "(50, 50)\n" {
		t.Errorf("%s", log)
	}
	s.Close()
}

func TestGroupsAreJoinedAndRemoved(t *testing.T) {
	spec := testSpec(t, `import time; time.sleep(1000)`)
	spec.Limits = Limits{Memory: 1 << 30, CPU: 1, PIDs: 100}
	s := start(t, spec)
	groups := groupsOf(t, spec.ID)
	if len(groups) == 0 {
		t.Fatal("no groups")
	}
	c, err := s.Checkpointing()
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range groups {
		procs, err := os.ReadFile(filepath.Join(g, "cgroup.procs"))
		if err != nil || len(strings.Fields(string(procs))) != 2 {
			t.Errorf("%s holds %q, %v", g, procs, err)
		}
		if !slices.Contains(c.Cgroups, filepath.Join(g, "cgroup.procs")) {
			t.Errorf("CRIU is not told of %s: %q", g, c.Cgroups)
		}
	}
	if err := s.Kill(context30(t)); err != nil {
		t.Fatal(err)
	}
	if left := groupsOf(t, spec.ID); len(left) != 0 {
		t.Errorf("left: %q", left)
	}
}
