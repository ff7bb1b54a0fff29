package sandbox

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestHierarchies(t *testing.T) {
	unified := t.TempDir()
	if err := os.WriteFile(filepath.Join(unified, "cgroup.controllers"), []byte("cpuset cpu io memory hugetlb pids\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	bare := t.TempDir()
	if err := os.WriteFile(filepath.Join(bare, "cgroup.controllers"), []byte("hugetlb\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	const head = "30 25 0:26 / "
	for _, c := range []struct {
		name, mountinfo, want string
	}{
		{"none", "", ""},
		{"v2", head + unified + " rw,relatime shared:4 - cgroup2 cgroup2 rw", unified + " v2 [cpu memory pids]"},
		{
			"v1 with two controllers in one", head + "/c/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n" + head + "/c/memory rw - cgroup cgroup rw,memory\n" + head + "/c/systemd rw - cgroup cgroup rw,name=systemd\n",
			"/c/cpu,cpuacct v1 [cpu]; /c/memory v1 [memory]",
		},
		{
			"hybrid", head + bare + " rw - cgroup2 cgroup2 rw\n" + head + `/c/pids\040here rw - cgroup cgroup rw,pids` + "\n" + head + "/d/pids rw - cgroup cgroup rw,pids\n",
			"/c/pids here v1 [pids]; " + bare + " v2 []",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []string
			for _, h := range parseHierarchies(c.mountinfo) {
				got = append(got, fmt.Sprintf("%s v%d %v", h.dir, map[bool]int{false: 1, true: 2}[h.unified], h.controllers))
			}
			if s := strings.Join(got, "; "); s != c.want {
				t.Errorf("got %q, want %q", s, c.want)
			}
		})
	}
}

// fakeCgroupfs is a directory with the control files of a group: the machines that
// run these tests need not have version 2's controllers.
func fakeCgroupfs(t *testing.T, id string, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, sub := range []string{"", cgroupParent, filepath.Join(cgroupParent, id)} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
		for _, f := range append(files, "cgroup.procs") {
			if err := os.WriteFile(filepath.Join(dir, sub, f), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

func TestLimitsOfBothVersions(t *testing.T) {
	limits := Limits{Memory: 4 << 30, CPU: 1.5, PIDs: 512}
	v1 := fakeCgroupfs(t, "k", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "cpu.cfs_period_us", "cpu.cfs_quota_us", "pids.max")
	v2 := fakeCgroupfs(t, "k", "cgroup.subtree_control", "memory.max", "memory.swap.max", "cpu.max", "pids.max", "memory.events")
	for _, c := range []struct {
		name  string
		all   []hierarchy
		files map[string]string
	}{
		{"v1", []hierarchy{{v1, false, controllers}}, map[string]string{
			v1 + "/postern-kernels/k/memory.limit_in_bytes": "4294967296", v1 + "/postern-kernels/k/memory.memsw.limit_in_bytes": "4294967296",
			v1 + "/postern-kernels/k/cpu.cfs_quota_us": "150000", v1 + "/postern-kernels/k/cpu.cfs_period_us": "100000", v1 + "/postern-kernels/k/pids.max": "512",
		}},
		{"v2", []hierarchy{{v2, true, controllers}}, map[string]string{
			v2 + "/postern-kernels/k/memory.max": "4294967296", v2 + "/postern-kernels/k/memory.swap.max": "0",
			v2 + "/postern-kernels/k/cpu.max": "150000 100000", v2 + "/postern-kernels/k/pids.max": "512",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := makeCgroupsIn(c.all, "k", limits, false)
			if len(g.lacks()) != 0 {
				t.Errorf("lacks %q", g.lacks())
			}
			for f, want := range c.files {
				if got, err := os.ReadFile(f); string(got) != want {
					t.Errorf("%s: %q, %v, want %q", f, got, err, want)
				}
			}
			if err := g.add(4711); err != nil {
				t.Fatal(err)
			}
			if got, _ := os.ReadFile(g.paths()[0]); string(got) != "4711" {
				t.Errorf("%s has %q", g.paths()[0], got)
			}
		})
	}
	g := makeCgroupsIn([]hierarchy{{v2, true, controllers}}, "k", limits, false)
	if g.oomKills() != 0 {
		t.Error("nothing was killed")
	}
	if err := os.WriteFile(v2+"/postern-kernels/k/memory.events", []byte("low 0\noom 3\noom_kill 2\noom_group_kill 0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if g.oomKills() != 2 {
		t.Errorf("%d were killed, want 2", g.oomKills())
	}
}

// TestDelegatedGroup: kernels are below the group that systemd delegated for them, its own process out of the
// way, and beside it where that could not hold them to their limits.
func TestDelegatedGroup(t *testing.T) {
	limits := Limits{Memory: 1 << 30, CPU: 1, PIDs: 64}
	for _, have := range []string{"cpuset cpu io memory pids", "cpu pids"} {
		v2 := fakeCgroupfs(t, "k", "cgroup.subtree_control", "memory.max", "memory.swap.max", "cpu.max", "pids.max", "memory.events")
		base := filepath.Join(v2, delegated)
		inside := filepath.Join(base, "postern-kernels", "k")
		for _, dir := range []string{base, filepath.Join(base, holderGroup), filepath.Dir(inside), inside} {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			for _, f := range []string{"cgroup.procs", "cgroup.subtree_control", "memory.max", "memory.swap.max", "cpu.max", "pids.max"} {
				if err := os.WriteFile(filepath.Join(dir, f), nil, 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := os.WriteFile(filepath.Join(base, "cgroup.procs"), []byte("77\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(inside, "cgroup.controllers"), []byte(have+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		all := []hierarchy{{v2, true, controllers}}
		g := makeCgroupsIn(all, "k", limits, false)
		if len(g.lacks()) != 0 || len(g.groups) != 1 {
			t.Fatalf("%q: lacks %q, %d groups", have, g.lacks(), len(g.groups))
		}
		want := inside
		if !strings.Contains(have, "memory") {
			want = filepath.Join(v2, "postern-kernels", "k")
		}
		if g.groups[0].path != want {
			t.Errorf("%q: it is in %s, want %s", have, g.groups[0].path, want)
		}
		if got, err := os.ReadFile(filepath.Join(want, "memory.max")); string(got) != "1073741824" {
			t.Errorf("%q: the limit is %q, %v", have, got, err)
		}
		if got, err := os.ReadFile(filepath.Join(base, holderGroup, "cgroup.procs")); string(got) != "77" {
			t.Errorf("%q: the unit's process is not moved: %q, %v", have, got, err)
		}
		if want == inside && all[0].found("k") != inside {
			t.Errorf("a kernel that runs is looked for in %s", all[0].found("k"))
		}
	}
}

func TestMissingControllersAreSaid(t *testing.T) {
	limits := Limits{Memory: 512 << 20, CPU: 2, PIDs: 64}
	got := makeCgroupsIn(nil, "k", limits, false).lacks()
	want := []string{
		"the memory limit of 512 MiB is not enforced: this host has no memory cgroup controller",
		"the limit of 2 CPUs is not enforced: this host has no cpu cgroup controller",
		"the limit of 64 processes holds by RLIMIT_NPROC alone: this host has no pids cgroup controller",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
	if got := makeCgroupsIn(nil, "k", Limits{PIDs: 64}, true).lacks(); len(got) != 1 || got[0] != "the limit of 64 processes is not enforced: this host has no pids cgroup controller" {
		t.Errorf("restored: %q", got)
	}
	if got := makeCgroupsIn(nil, "k", Limits{}, false).lacks(); len(got) != 0 {
		t.Errorf("without limits: %q", got)
	}
	// A controller that is there but can't be used.
	bare := fakeCgroupfs(t, "k", "memory.limit_in_bytes")
	got = makeCgroupsIn([]hierarchy{{bare, false, []string{controlMemory, controlCPU}}, {"/proc/nowhere", false, []string{controlPIDs}}}, "k", limits, false).lacks()
	if len(got) != 2 || !strings.Contains(got[0], "cpu.cfs_period_us cannot be set (no such file or directory)") || !strings.Contains(got[1], "/proc/nowhere/postern-kernels/k cannot be made") {
		t.Errorf("got %q", got)
	}
}

// groupsOf are the directories of a kernel in all hierarchies of this machine.
func groupsOf(t *testing.T, id string) []string {
	t.Helper()
	all, err := hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, h := range all {
		if _, err := os.Stat(filepath.Join(h.dir, cgroupParent, id)); err == nil {
			found = append(found, filepath.Join(h.dir, cgroupParent, id))
		}
	}
	return found
}

// needController skips nothing on CI, whose machines have the controllers.
func needController(t *testing.T, name string) {
	t.Helper()
	needRoot(t)
	all, err := hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(all, func(h hierarchy) bool { return slices.Contains(h.controllers, name) }) {
		t.Skipf("needs root of a host with the %s controller", name)
	}
}

func TestMemoryLimit(t *testing.T) {
	needController(t, controlMemory)
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
	needController(t, controlMemory)
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
	needController(t, controlPIDs)
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
	needController(t, controlPIDs)
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
	h.cgroups.failed = append(h.cgroups.failed, controlPIDs)
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
