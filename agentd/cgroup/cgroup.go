package cgroup

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

// Kind is whose groups they are; it names their directory in each hierarchy.
type Kind struct {
	parent string
	// everywhere: in the unified hierarchy too, though that holds none of the controllers.
	everywhere bool
	// stays: the directory of all groups of the kind is kept when the last one goes, until Sweep. Making it,
	// with its controllers, takes the kernel some ten milliseconds.
	stays bool
}

// Kernels are notebook kernels, SQL are the processes of SQL sessions.
var (
	Kernels = Kind{parent: "postern-kernels", everywhere: true}
	SQL     = Kind{parent: "postern-sql", stays: true}
)

// Limits bound a group. Zero means no limit.
type Limits struct {
	// Memory in bytes, without swap.
	Memory int64
	// CPU in CPUs: 1.5 is one and a half.
	CPU float64
	// PIDs is the most processes and threads at once.
	PIDs int64
}

// delegated is the group of agentd-workload.service (systemd/), in each hierarchy that systemd has it in.
const delegated = "postern.slice/postern-workload.slice/agentd-workload.service"

// holderGroup is where the process of that unit goes: a group of version 2 with groups below it may hold none.
const holderGroup = "holder"

// parentOf is where the groups of a kind are, or would be, in a hierarchy: below the delegated one if delegate is set.
func (h hierarchy) parentOf(k Kind, delegate bool) string {
	if delegate {
		return filepath.Join(h.dir, delegated, k.parent)
	}
	return filepath.Join(h.dir, k.parent)
}

func (h hierarchy) groupOf(k Kind, id string, delegate bool) string {
	return filepath.Join(h.parentOf(k, delegate), id)
}

// found is a group, wherever it was made.
func (h hierarchy) found(k Kind, id string) string {
	if path := h.groupOf(k, id, true); exists(path) {
		return path
	}
	return h.groupOf(k, id, false)
}

// place makes a group below the delegated one, if there is one that can hold it to all its limits, and
// else beside.
func (h hierarchy) place(k Kind, id string) (group, error) {
	if base := filepath.Join(h.dir, delegated); exists(base) {
		g := group{h, h.groupOf(k, id, true)}
		if h.unified {
			h.clear(base)
		}
		if err := g.make(base); err == nil && g.complete() {
			return g, nil
		}
		_ = unix.Rmdir(g.path)
		_ = unix.Rmdir(filepath.Dir(g.path))
	}
	g := group{h, h.groupOf(k, id, false)}
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

// removeTime is how long removing a group waits for its last processes, which
// are gone but not yet forgotten.
const removeTime = 2 * time.Second

// The controllers that limits need.
const (
	Memory = "memory"
	CPU    = "cpu"
	PIDs   = "pids"
)

var controllers = []string{Memory, CPU, PIDs}

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

// unescape undoes the octal escapes of /proc/PID/mountinfo.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

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
		dir := unescape.Replace(fields[4])
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

// Groups are one kernel's, or one SQL session's, in all hierarchies. A nil one has none.
type Groups struct {
	kind Kind
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

// Make makes the groups of a kernel or session, which id names among those of its kind, with their
// limits. What can't be made is in Lacks; an error is a host that can't be read. restored: CRIU sets
// what resource limits the processes have, so none can stand in for a controller. The caller owes it a Remove.
func Make(k Kind, id string, limits Limits, restored bool) (*Groups, error) {
	all, err := hierarchies()
	if err != nil {
		return nil, err
	}
	return makeIn(all, k, id, limits, restored), nil
}

func makeIn(all []hierarchy, k Kind, id string, limits Limits, restored bool) *Groups {
	c := &Groups{kind: k, restored: restored}
	reasons := map[string]string{}
	for _, h := range all {
		if !k.needs(h, limits) {
			continue
		}
		g, err := h.place(k, id)
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

// needs tells whether a group of the kind is to be in a hierarchy.
func (k Kind) needs(h hierarchy, limits Limits) bool {
	return k.everywhere || slices.ContainsFunc(h.controllers, func(name string) bool {
		return name == Memory && limits.Memory > 0 || name == CPU && limits.CPU > 0 || name == PIDs && limits.PIDs > 0
	})
}

// note says which of the limits are not enforced, and why.
func (c *Groups) note(limits Limits, reasons map[string]string) {
	for _, l := range []struct {
		name, text string
		wanted     bool
	}{
		{Memory, "the memory limit of " + Size(limits.Memory), limits.Memory > 0},
		{CPU, fmt.Sprintf("the limit of %v CPUs", limits.CPU), limits.CPU > 0},
		{PIDs, fmt.Sprintf("the limit of %d processes", limits.PIDs), limits.PIDs > 0},
	} {
		why, found := reasons[l.name]
		if !l.wanted || found && why == "" {
			continue
		}
		if !found {
			why = "this host has no " + l.name + " cgroup controller"
		}
		c.failed = append(c.failed, l.name)
		if l.name == PIDs && !c.restored {
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
				has, _ := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
				for _, name := range g.controllers {
					if slices.Contains(strings.Fields(string(has)), name) {
						continue
					}
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
	case controller == Memory && limits.Memory > 0 && g.unified:
		files = [][2]string{{"memory.max", fmt.Sprint(limits.Memory)}}
	case controller == Memory && limits.Memory > 0:
		files = [][2]string{{"memory.limit_in_bytes", fmt.Sprint(limits.Memory)}}
	case controller == CPU && limits.CPU > 0 && g.unified:
		files = [][2]string{{"cpu.max", fmt.Sprintf("%d %d", quota, period)}}
	case controller == CPU && limits.CPU > 0:
		files = [][2]string{{"cpu.cfs_period_us", fmt.Sprint(period)}, {"cpu.cfs_quota_us", fmt.Sprint(quota)}}
	case controller == PIDs && limits.PIDs > 0:
		files = [][2]string{{"pids.max", fmt.Sprint(limits.PIDs)}}
	}
	for _, f := range files {
		if err := writeControl(g.path, f[0], f[1]); err != nil {
			return fmt.Errorf("%s cannot be set (%w)", filepath.Join(g.path, f[0]), reason(err))
		}
	}
	if controller == Memory && limits.Memory > 0 {
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

// Find finds the groups that Make made.
func Find(k Kind, id string, limits Limits) *Groups {
	c := &Groups{kind: k}
	all, err := hierarchies()
	if err != nil {
		return c
	}
	reasons := map[string]string{}
	for _, h := range all {
		if !k.needs(h, limits) {
			continue
		}
		g := group{h, h.found(k, id)}
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

// Add moves a process into the groups; what it forks is born there. The kernel may take some ten
// milliseconds for it.
func (c *Groups) Add(pid int) error {
	for _, path := range c.Paths() {
		if err := writeControl(filepath.Dir(path), filepath.Base(path), strconv.Itoa(pid)); err != nil {
			return fmt.Errorf("put the process into its cgroup: %w", err)
		}
	}
	return nil
}

// Paths are the files to write a process's id to.
func (c *Groups) Paths() []string {
	if c == nil {
		return nil
	}
	var paths []string
	for _, g := range c.groups {
		paths = append(paths, filepath.Join(g.path, "cgroup.procs"))
	}
	return paths
}

// Lacks are the limits that are not enforced, a line each.
func (c *Groups) Lacks() []string {
	if c == nil {
		return nil
	}
	return slices.Clone(c.missing)
}

// OOMKills says how many processes of the group the kernel killed for memory.
func (c *Groups) OOMKills() int {
	if c == nil {
		return 0
	}
	for _, g := range c.groups {
		if !slices.Contains(g.controllers, Memory) {
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

// Remove removes the groups, whose processes have ended.
func (c *Groups) Remove() {
	if c == nil {
		return
	}
	for _, g := range c.groups {
		removeGroup(c.kind, g.path)
	}
}

// Processes are those in the groups of a kernel or session, in no order; some may be listed more than once.
func Processes(k Kind, id string) []int {
	all, err := hierarchies()
	if err != nil {
		return nil
	}
	var pids []int
	for _, h := range all {
		list, _ := os.ReadFile(filepath.Join(h.found(k, id), "cgroup.procs"))
		for _, field := range strings.Fields(string(list)) {
			if pid, err := strconv.Atoi(field); err == nil && pid > 1 {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// Remove removes the groups of a kernel or session, whose processes have ended.
func Remove(k Kind, id string) {
	all, err := hierarchies()
	if err != nil {
		return
	}
	for _, h := range all {
		for _, delegate := range []bool{true, false} {
			if path := h.groupOf(k, id, delegate); exists(path) {
				removeGroup(k, path)
			}
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// Enforces reports whether a controller holds the processes to its limit.
func (c *Groups) Enforces(controller string) bool {
	return slices.ContainsFunc(c.groups, func(g group) bool { return slices.Contains(g.controllers, controller) }) && !slices.Contains(c.failed, controller)
}

func removeGroup(k Kind, path string) {
	for deadline := time.Now().Add(removeTime); ; time.Sleep(2 * time.Millisecond) {
		err := unix.Rmdir(path)
		if err == nil || errors.Is(err, unix.ENOENT) || time.Now().After(deadline) {
			break
		}
	}
	if !k.stays {
		_ = unix.Rmdir(filepath.Dir(path)) // if it was the last one
	}
}

// Sweep removes the groups of a kind that hold no process and whose names begin with prefix, and then
// Tidies. One that is being made at this moment may be among them: the prefix is the caller's own.
func Sweep(k Kind, prefix string) {
	k.parents(func(parent string) {
		entries, _ := os.ReadDir(parent)
		for _, e := range entries {
			if e.IsDir() && strings.HasPrefix(e.Name(), prefix) {
				_ = unix.Rmdir(filepath.Join(parent, e.Name())) // EBUSY: it is in use
			}
		}
	})
	Tidy(k)
}

// Tidy removes the directories of a kind's groups where none is left.
func Tidy(k Kind) {
	k.parents(func(parent string) { _ = unix.Rmdir(parent) })
}

// parents calls do with the directories that groups of a kind may be in.
func (k Kind) parents(do func(string)) {
	all, err := hierarchies()
	if err != nil {
		return // there are none that could be found
	}
	for _, h := range all {
		for _, delegate := range []bool{true, false} {
			do(h.parentOf(k, delegate))
		}
	}
}

// Birth says how a process is born in the groups, which takes no time, where Add does: the files to write "0" to
// in the thread that starts it, for those of version 1, and the directory for
// syscall.SysProcAttr.CgroupFD; "" is none.
func (c *Groups) Birth() (tasks []string, unified string) {
	if c == nil {
		return nil, ""
	}
	for _, g := range c.groups {
		if g.unified {
			unified = g.path
		} else {
			tasks = append(tasks, filepath.Join(g.path, "tasks"))
		}
	}
	return tasks, unified
}

// Where says what holds the processes to the limits, such as "memory by cgroup version 2".
func (c *Groups) Where() []string {
	version := map[bool]string{false: "1", true: "2"}
	var where []string
	for _, g := range c.groups {
		for _, controller := range g.controllers {
			where = append(where, controller+" by cgroup version "+version[g.unified])
		}
	}
	return where
}

// Controllers are those of Memory, CPU and PIDs that this host has.
func Controllers() ([]string, error) {
	all, err := hierarchies()
	var names []string
	for _, h := range all {
		names = append(names, h.controllers...)
	}
	return names, err
}

// FailForTest makes as if a controller could not be used.
func (c *Groups) FailForTest(controller string) { c.failed = append(c.failed, controller) }

// Size prints a size as the configuration writes it: 4GiB as "4 GiB".
func Size(n int64) string {
	for i, unit := range []string{"EiB", "PiB", "TiB", "GiB", "MiB", "KiB"} {
		if size := int64(1) << (60 - 10*i); n >= size && n%(size/1024) == 0 {
			return strconv.FormatFloat(float64(n)/float64(size), 'f', -1, 64) + " " + unit
		}
	}
	return strconv.FormatInt(n, 10) + " bytes"
}
