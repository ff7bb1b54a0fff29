package criu

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// processStat is what /proc/PID/stat tells.
type processStat struct {
	pid, parent, group int
	state              byte
}

// readStat reads /proc/PID/stat, which never waits for the process; false if it is gone.
func readStat(pid int) (processStat, bool) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return processStat{}, false
	}
	// The name in parentheses may hold anything.
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return processStat{}, false
	}
	fields := strings.Fields(string(b[i+1:]))
	if len(fields) < 3 {
		return processStat{}, false
	}
	s := processStat{pid: pid, state: fields[0][0]}
	s.parent, _ = strconv.Atoi(fields[1])
	s.group, _ = strconv.Atoi(fields[2])
	return s, true
}

func processes() []processStat {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close() //nolint:errcheck // it is only read
	names, _ := dir.Readdirnames(-1)
	var all []processStat
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if s, ok := readStat(pid); ok {
			all = append(all, s)
		}
	}
	return all
}

// groupAlive reports whether a process group has a process that is no zombie.
func groupAlive(group int) bool {
	for _, p := range processes() {
		if p.group == group && p.state != 'Z' && p.state != 'X' {
			return true
		}
	}
	return false
}

// Tree returns the host's process ids of a process and all its descendants, parents
// first; none if it is gone.
func Tree(root int) []int {
	children := map[int][]int{}
	there := false
	for _, p := range processes() {
		children[p.parent] = append(children[p.parent], p.pid)
		there = there || p.pid == root
	}
	if !there {
		return nil
	}
	tree := []int{root}
	for i := 0; i < len(tree); i++ {
		tree = append(tree, children[tree[i]]...)
	}
	return tree
}

// stopped returns the processes of a tree that are stopped.
func stopped(root int) map[int]bool {
	m := map[int]bool{}
	for _, pid := range Tree(root) {
		if s, ok := readStat(pid); ok && s.state == 'T' {
			m[pid] = true
		}
	}
	return m
}

// thaw lets run what a failed dump left stopped and was not so before. A tracer's death
// releases its tasks by itself; this is for what the kernel makes of signals in between.
func thaw(root int, before map[int]bool) {
	for pid := range stopped(root) {
		if !before[pid] {
			_ = unix.Kill(pid, unix.SIGCONT)
		}
	}
}

// waitStopped waits until every process of a tree stands still; false after the grace
// time. SIGSTOP was sent while CRIU held all threads, so none runs a step in between;
// it only takes them a moment to get there.
func waitStopped(root int) bool {
	for deadline := time.Now().Add(grace); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		running := false
		for _, pid := range Tree(root) {
			if s, ok := readStat(pid); ok && s.state != 'T' && s.state != 'Z' && s.state != 'X' {
				running = true
			}
		}
		if !running {
			return true
		}
	}
	return false
}
