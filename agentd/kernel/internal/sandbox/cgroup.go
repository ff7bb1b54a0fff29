package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A kernel has a cgroup of its own in every hierarchy that holds a controller for
// one of its limits, and in the unified one, if it is there: CGROUP/postern-kernels/ID, or, where systemd has
// delegated a group for that in the slice of all workloads, below it.
// Controllers may be in version 1 hierarchies, in version 2, or in some of each.
// What a host lacks is said by lacks, and nothing else changes.

// cgroupParent is the directory of all kernels' groups, in each hierarchy.
const cgroupParent = "postern-kernels"

// delegated is the group of agentd-workload.service (systemd/), in each hierarchy that systemd has it in.
const delegated = "postern.slice/postern-workload.slice/agentd-workload.service"

// holderGroup is where the process of that unit goes: a group of version 2 with groups below it may hold none.
const holderGroup = "holder"

// groupOf is where a kernel's group is, or would be, in a hierarchy: below the delegated one if delegate is set.
func (h hierarchy) groupOf(id string, delegate bool) string {
	if delegate {
		return filepath.Join(h.dir, delegated, cgroupParent, id)
	}
	return filepath.Join(h.dir, cgroupParent, id)
}

// found is a kernel's group, wherever it was made.
func (h hierarchy) found(id string) string {
	if path := h.groupOf(id, true); exists(path) {
		return path
	}
	return h.groupOf(id, false)
}

// place makes a kernel's group below the delegated one, if there is one that can hold it to all its limits, and
// else beside.
func (h hierarchy) place(id string) (group, error) {
	if base := filepath.Join(h.dir, delegated); exists(base) {
		g := group{h, h.groupOf(id, true)}
		if h.unified {
			h.clear(base)
		}
		if err := g.make(base); err == nil && g.complete() {
			return g, nil
		}
		_ = unix.Rmdir(g.path)
		_ = unix.Rmdir(filepath.Dir(g.path))
	}
	g := group{h, h.groupOf(id, false)}
	return g, g.make(h.dir)
}

// clear moves the processes of the delegated group out of the way. What fails is seen by complete.
func (h hierarchy) clear(base string) {
	pids, _ := os.ReadFile(filepath.Join(base, "cgroup.procs"))
	if len(pids) == 0 {
		return
	}
	holder := filepath.Join(base, holderGroup)
	_ = os.Mkdir(holder, 0o755)
	for _, pid := range strings.Fields(string(pids)) {
		_ = writeControl(holder, "cgroup.procs", pid)
	}
}

// complete reports whether a group of version 2 got every controller that its hierarchy has.
func (g group) complete() bool {
	if !g.unified {
		return true
	}
	list, err := os.ReadFile(filepath.Join(g.path, "cgroup.controllers"))
	if err != nil {
		return false
	}
	have := strings.Fields(string(list))
	return !slices.ContainsFunc(g.controllers, func(name string) bool { return !slices.Contains(have, name) })
}

// cgroupRemoveTime is how long removing a group waits for its last processes, which
// are gone but not yet forgotten.
const cgroupRemoveTime = 2 * time.Second

// The controllers that limits need.
const (
	controlMemory = "memory"
	controlCPU    = "cpu"
	controlPIDs   = "pids"
)

var controllers = []string{controlMemory, controlCPU, controlPIDs}

// A hierarchy is a mounted tree of cgroups.
type hierarchy struct {
	dir     string
	unified bool
	// controllers of ours that it holds.
	controllers []string
}

// hierarchies lists those of this host that matter, version 1 first.
func hierarchies() ([]hierarchy, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseHierarchies(string(text)), nil
}

func parseHierarchies(mountinfo string) []hierarchy {
	var v1, v2 []hierarchy
	taken := map[string]bool{} // a controller is in one hierarchy, which may be mounted twice
	seen := false
	for line := range strings.Lines(mountinfo) {
		fields := strings.Fields(line)
		dash := slices.Index(fields, "-")
		if dash < 5 || dash+3 >= len(fields) {
			continue
		}
		dir := unescape(fields[4])
		switch fields[dash+1] {
		case "cgroup":
			h := hierarchy{dir: dir}
			for _, option := range strings.Split(fields[dash+3], ",") {
				if slices.Contains(controllers, option) && !taken[option] {
					taken[option] = true
					h.controllers = append(h.controllers, option)
				}
			}
			if len(h.controllers) > 0 {
				v1 = append(v1, h)
			}
		case "cgroup2":
			if seen {
				continue
			}
			seen = true
			h := hierarchy{dir: dir, unified: true}
			list, _ := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
			for _, c := range strings.Fields(string(list)) {
				if slices.Contains(controllers, c) {
					h.controllers = append(h.controllers, c)
				}
			}
			v2 = append(v2, h)
		}
	}
	return append(v1, v2...)
}

// cgroups are one kernel's.
type cgroups struct {
	id string
	// restored: CRIU sets what resource limits there were, so none can stand in for
	// a controller.
	restored bool
	groups   []group
	// missing are limits that are not enforced, a line each.
	missing []string
	// failed are the controllers of those.
	failed []string
}

type group struct {
	hierarchy
	path string
}

// makeCgroups makes a kernel's groups with its limits. What can't be made is in
// lacks; an error is a host that can't be read.
func makeCgroups(id string, limits Limits, restored bool) (*cgroups, error) {
	all, err := hierarchies()
	if err != nil {
		return nil, err
	}
	return makeCgroupsIn(all, id, limits, restored), nil
}

func makeCgroupsIn(all []hierarchy, id string, limits Limits, restored bool) *cgroups {
	c := &cgroups{id: id, restored: restored}
	reasons := map[string]string{}
	for _, h := range all {
		g, err := h.place(id)
		if err != nil {
			for _, name := range h.controllers {
				reasons[name] = fmt.Sprintf("%s cannot be made (%v)", g.path, reason(err))
			}
			continue
		}
		c.groups = append(c.groups, g)
		for _, name := range h.controllers {
			if err := g.limit(name, limits); err != nil {
				reasons[name] = err.Error()
			} else {
				reasons[name] = "" // found and set
			}
		}
	}
	c.note(limits, reasons)
	return c
}

// note says which of the limits are not enforced, and why.
func (c *cgroups) note(limits Limits, reasons map[string]string) {
	for _, l := range []struct {
		name, text string
		wanted     bool
	}{
		{controlMemory, "the memory limit of " + Bytes(limits.Memory), limits.Memory > 0},
		{controlCPU, fmt.Sprintf("the limit of %v CPUs", limits.CPU), limits.CPU > 0},
		{controlPIDs, fmt.Sprintf("the limit of %d processes", limits.PIDs), limits.PIDs > 0},
	} {
		why, found := reasons[l.name]
		if !l.wanted || found && why == "" {
			continue
		}
		if !found {
			why = "this host has no " + l.name + " cgroup controller"
		}
		c.failed = append(c.failed, l.name)
		if l.name == controlPIDs && !c.restored {
			c.missing = append(c.missing, l.text+" holds by RLIMIT_NPROC alone: "+why)
			continue
		}
		c.missing = append(c.missing, l.text+" is not enforced: "+why)
	}
}

// reason is an error without the path that is said already.
func reason(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}

// make makes the group, and passes controllers down to it where that is needed.
func (g group) make(base string) error {
	parent := filepath.Dir(g.path)
	for range 3 { // somebody may remove the empty parent in between
		if err := os.Mkdir(parent, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if g.unified {
			for _, dir := range []string{base, parent} {
				for _, name := range g.controllers {
					// What fails here is seen when the limit is set.
					_ = writeControl(dir, "cgroup.subtree_control", "+"+name)
				}
			}
		}
		err := os.Mkdir(g.path, 0o755)
		if err == nil || errors.Is(err, fs.ErrExist) {
			return nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return fs.ErrNotExist
}

// cpuPeriod is the time in which a group may use its share of the CPUs.
const cpuPeriod = 100 * time.Millisecond

// limit sets the limit that a controller enforces.
func (g group) limit(controller string, limits Limits) error {
	quota := max(int64(limits.CPU*float64(cpuPeriod.Microseconds())), 1000)
	period := cpuPeriod.Microseconds()
	var files [][2]string
	switch {
	case controller == controlMemory && limits.Memory > 0 && g.unified:
		files = [][2]string{{"memory.max", fmt.Sprint(limits.Memory)}}
	case controller == controlMemory && limits.Memory > 0:
		files = [][2]string{{"memory.limit_in_bytes", fmt.Sprint(limits.Memory)}}
	case controller == controlCPU && limits.CPU > 0 && g.unified:
		files = [][2]string{{"cpu.max", fmt.Sprintf("%d %d", quota, period)}}
	case controller == controlCPU && limits.CPU > 0:
		files = [][2]string{{"cpu.cfs_period_us", fmt.Sprint(period)}, {"cpu.cfs_quota_us", fmt.Sprint(quota)}}
	case controller == controlPIDs && limits.PIDs > 0:
		files = [][2]string{{"pids.max", fmt.Sprint(limits.PIDs)}}
	}
	for _, f := range files {
		if err := writeControl(g.path, f[0], f[1]); err != nil {
			return fmt.Errorf("%s cannot be set (%w)", filepath.Join(g.path, f[0]), reason(err))
		}
	}
	if controller == controlMemory && limits.Memory > 0 {
		// No swap beyond the limit. A host without accounting for swap lacks the file.
		name, value := "memory.memsw.limit_in_bytes", fmt.Sprint(limits.Memory)
		if g.unified {
			name, value = "memory.swap.max", "0"
		}
		if err := writeControl(g.path, name, value); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s cannot be set (%w)", filepath.Join(g.path, name), reason(err))
		}
	}
	return nil
}

// writeControl writes to a control file, which is there.
func writeControl(dir, name, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// findCgroups are the groups that a running kernel has.
func findCgroups(id string, limits Limits) *cgroups {
	c := &cgroups{id: id}
	all, err := hierarchies()
	if err != nil {
		return c
	}
	reasons := map[string]string{}
	for _, h := range all {
		g := group{h, h.found(id)}
		_, err := os.Stat(g.path)
		if err == nil {
			c.groups = append(c.groups, g)
		}
		for _, name := range h.controllers {
			reasons[name] = ""
			if err != nil {
				reasons[name] = g.path + " is gone"
			}
		}
	}
	c.note(limits, reasons)
	return c
}

// add moves a process into the groups; what it forks is born there.
func (c *cgroups) add(pid int) error {
	for _, path := range c.paths() {
		if err := writeControl(filepath.Dir(path), filepath.Base(path), strconv.Itoa(pid)); err != nil {
			return fmt.Errorf("put the kernel into its cgroup: %w", err)
		}
	}
	return nil
}

// paths are the files to write a process's id to.
func (c *cgroups) paths() []string {
	if c == nil {
		return nil
	}
	var paths []string
	for _, g := range c.groups {
		paths = append(paths, filepath.Join(g.path, "cgroup.procs"))
	}
	return paths
}

// lacks are the limits that are not enforced, a line each.
func (c *cgroups) lacks() []string {
	if c == nil {
		return nil
	}
	return slices.Clone(c.missing)
}

// oomKills says how many processes of the group the kernel killed for memory.
func (c *cgroups) oomKills() int {
	if c == nil {
		return 0
	}
	for _, g := range c.groups {
		if !slices.Contains(g.controllers, controlMemory) {
			continue
		}
		name := "memory.oom_control"
		if g.unified {
			name = "memory.events"
		}
		text, _ := os.ReadFile(filepath.Join(g.path, name))
		for line := range strings.Lines(string(text)) {
			if count, found := strings.CutPrefix(line, "oom_kill "); found {
				n, _ := strconv.Atoi(strings.TrimSpace(count))
				return n
			}
		}
	}
	return 0
}

// remove removes the groups, whose processes have ended.
func (c *cgroups) remove() {
	if c == nil {
		return
	}
	for _, g := range c.groups {
		removeGroup(g.path)
	}
}

// groupProcesses are the processes in a kernel's groups.
func groupProcesses(id string) []int {
	all, err := hierarchies()
	if err != nil {
		return nil
	}
	var pids []int
	for _, h := range all {
		list, _ := os.ReadFile(filepath.Join(h.found(id), "cgroup.procs"))
		for _, field := range strings.Fields(string(list)) {
			if pid, err := strconv.Atoi(field); err == nil && pid > 1 {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// removeCgroups removes a kernel's groups, whose processes have ended.
func removeCgroups(id string) {
	all, err := hierarchies()
	if err != nil {
		return
	}
	for _, h := range all {
		for _, delegate := range []bool{true, false} {
			if path := h.groupOf(id, delegate); exists(path) {
				removeGroup(path)
			}
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// enforces reports whether a controller holds the kernel to its limit.
func (c *cgroups) enforces(controller string) bool {
	return slices.ContainsFunc(c.groups, func(g group) bool { return slices.Contains(g.controllers, controller) }) && !slices.Contains(c.failed, controller)
}

func removeGroup(path string) {
	for deadline := time.Now().Add(cgroupRemoveTime); ; time.Sleep(2 * time.Millisecond) {
		err := unix.Rmdir(path)
		if err == nil || errors.Is(err, unix.ENOENT) || time.Now().After(deadline) {
			break
		}
	}
	_ = unix.Rmdir(filepath.Dir(path)) // if it was the last one
}
