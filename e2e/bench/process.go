package main

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// clockTick is the unit of CPU times in /proc: USER_HZ, which is 100 on Linux.
const clockTick = 10 * time.Millisecond

// cpuTime is the user and system time of a process, its ended children left out.
func cpuTime(pid int) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// The name, in parentheses, may hold spaces.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 13 {
		return 0
	}
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * clockTick
}

// endedChildren is the CPU time of a process's children that have ended.
func endedChildren(pid int) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 15 {
		return 0
	}
	user, _ := strconv.Atoi(fields[13])
	system, _ := strconv.Atoi(fields[14])
	return time.Duration(user+system) * clockTick
}

// residentMemory is a process's resident set in bytes.
func residentMemory(pid int) int64 { return procKiB(pid, "status", "VmRSS") }

// procKiB reads a line in kB out of /proc/PID/FILE.
func procKiB(pid int, file, name string) int64 {
	value := procField(fmt.Sprintf("/proc/%d/%s", pid, file), name)
	n, _ := strconv.ParseInt(strings.TrimSuffix(value, " kB"), 10, 64)
	return n << 10
}

// peak watches the resident memory of processes until stop is called, which
// returns the highest value of each, in bytes.
func peak(pids ...func() []int) (stop func() []int64) {
	done := make(chan struct{})
	highest := make([]int64, len(pids))
	var wait sync.WaitGroup
	wait.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			for i, f := range pids {
				for _, pid := range f() {
					highest[i] = max(highest[i], residentMemory(pid))
				}
			}
			select {
			case <-done:
				return
			case <-tick.C:
			}
		}
	})
	return func() []int64 {
		close(done)
		wait.Wait()
		return highest
	}
}

// median of some numbers.
func median(values []float64) float64 { return percentile(values, 50) }

// percentile by the nearest rank.
func percentile(values []float64, p int) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[min(len(sorted)-1, len(sorted)*p/100)]
}
