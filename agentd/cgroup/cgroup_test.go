package cgroup

import (
	"crypto/rand"
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
	for _, sub := range []string{"", Kernels.parent, filepath.Join(Kernels.parent, id)} {
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
			g := makeIn(c.all, Kernels, "k", limits, false)
			if len(g.Lacks()) != 0 {
				t.Errorf("lacks %q", g.Lacks())
			}
			for f, want := range c.files {
				if got, err := os.ReadFile(f); string(got) != want {
					t.Errorf("%s: %q, %v, want %q", f, got, err, want)
				}
			}
			if err := g.Add(4711); err != nil {
				t.Fatal(err)
			}
			if got, _ := os.ReadFile(g.Paths()[0]); string(got) != "4711" {
				t.Errorf("%s has %q", g.Paths()[0], got)
			}
		})
	}
	g := makeIn([]hierarchy{{v2, true, controllers}}, Kernels, "k", limits, false)
	if g.OOMKills() != 0 {
		t.Error("nothing was killed")
	}
	if err := os.WriteFile(v2+"/postern-kernels/k/memory.events", []byte("low 0\noom 3\noom_kill 2\noom_group_kill 0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if g.OOMKills() != 2 {
		t.Errorf("%d were killed, want 2", g.OOMKills())
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
		g := makeIn(all, Kernels, "k", limits, false)
		if len(g.Lacks()) != 0 || len(g.groups) != 1 {
			t.Fatalf("%q: lacks %q, %d groups", have, g.Lacks(), len(g.groups))
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
		if want == inside && all[0].found(Kernels, "k") != inside {
			t.Errorf("a kernel that runs is looked for in %s", all[0].found(Kernels, "k"))
		}
	}
}

func TestMissingControllersAreSaid(t *testing.T) {
	limits := Limits{Memory: 512 << 20, CPU: 2, PIDs: 64}
	got := makeIn(nil, Kernels, "k", limits, false).Lacks()
	want := []string{
		"the memory limit of 512 MiB is not enforced: this host has no memory cgroup controller",
		"the limit of 2 CPUs is not enforced: this host has no cpu cgroup controller",
		"the limit of 64 processes holds by RLIMIT_NPROC alone: this host has no pids cgroup controller",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
	if got := makeIn(nil, Kernels, "k", Limits{PIDs: 64}, true).Lacks(); len(got) != 1 || got[0] != "the limit of 64 processes is not enforced: this host has no pids cgroup controller" {
		t.Errorf("restored: %q", got)
	}
	if got := makeIn(nil, Kernels, "k", Limits{}, false).Lacks(); len(got) != 0 {
		t.Errorf("without limits: %q", got)
	}
	// A controller that is there but can't be used.
	bare := fakeCgroupfs(t, "k", "memory.limit_in_bytes")
	got = makeIn([]hierarchy{{bare, false, []string{Memory, CPU}}, {"/proc/nowhere", false, []string{PIDs}}}, Kernels, "k", limits, false).Lacks()
	if len(got) != 2 || !strings.Contains(got[0], "cpu.cfs_period_us cannot be set (no such file or directory)") || !strings.Contains(got[1], "/proc/nowhere/postern-kernels/k cannot be made") {
		t.Errorf("got %q", got)
	}
}

// TestSweep: what a previous life left goes, and nothing of another agentd's, which may be about to use it.
func TestSweep(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes control groups")
	}
	limits := Limits{Memory: 1 << 30, PIDs: 64}
	prefix := "sweep" + rand.Text() + "-"
	mine, err := Make(SQL, prefix+"mine", limits, false)
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Remove()
	other, err := Make(SQL, "other"+prefix, limits, false)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Remove()
	Sweep(SQL, prefix)
	if left := Find(SQL, prefix+"mine", limits).Paths(); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	if have, made := Find(SQL, "other"+prefix, limits).Paths(), other.Paths(); !slices.Equal(have, made) {
		t.Errorf("of another's %q there are %q", made, have)
	}
}
