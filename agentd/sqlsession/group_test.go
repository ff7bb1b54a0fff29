package sqlsession_test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/cgroup"
	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
)

// hasControllers tells whether this host can hold sessions to their limits. Where it can't, it wants that
// to be said.
func hasControllers(t *testing.T) bool {
	t.Helper()
	needRoot(t)
	have, err := cgroup.Controllers()
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(have, cgroup.Memory) && slices.Contains(have, cgroup.PIDs) {
		return true
	}
	if _, lacks, err := sqlsession.Limits(); len(lacks) == 0 || err != nil {
		t.Errorf("controllers %q, missing limits %q, %v", have, lacks, err)
	}
	return false
}

// groupOf is the directory below that of all sessions' groups which a process is in, by one
// controller or by version 2.
func groupOf(t *testing.T, pid int, controller string) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if slices.Contains(strings.Split(parts[1], ","), controller) || parts[1] == "" {
			if dir, name := filepath.Split(parts[2]); strings.HasSuffix(dir, "/postern-sql/") {
				return name
			}
		}
	}
	return ""
}

// TestGroups: each session's process is in a control group of its own, with limits, which is
// gone with the session.
func TestGroups(t *testing.T) {
	if !hasControllers(t) {
		return
	}
	m := newManager(t, sqlsession.Config{Warm: 1, Memory: 1 << 30})
	query(t, m, request("SELECT 1"))
	eventually(t, "two processes", func() bool { return len(sessionProcesses(os.Getpid())) == 2 })
	names := map[string]bool{}
	for _, pid := range sessionProcesses(os.Getpid()) {
		name := groupOf(t, pid, cgroup.Memory)
		if name == "" || name != groupOf(t, pid, cgroup.PIDs) {
			text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
			t.Fatalf("it is not in a group of its own: %s", text)
		}
		names[name] = true
		g := cgroup.Find(cgroup.SQL, name, cgroup.Limits{Memory: 1, PIDs: 1})
		if lacks := g.Lacks(); len(lacks) > 0 {
			t.Errorf("missing %q", lacks)
		}
		set := map[string]string{}
		for _, path := range g.Paths() {
			if got := read(t, path); got != fmt.Sprint(pid) {
				t.Errorf("%s holds %q, want %d", path, got, pid)
			}
			for _, file := range []string{"memory.max", "memory.limit_in_bytes", "pids.max"} {
				if text, err := os.ReadFile(filepath.Join(filepath.Dir(path), file)); err == nil {
					set[strings.Split(file, ".")[0]] = strings.TrimSpace(string(text))
				}
			}
		}
		if set["memory"] != "1073741824" || set["pids"] != "64" {
			t.Errorf("limits: %v", set)
		}
	}
	if len(names) != 2 {
		t.Errorf("got groups %v, want two", names)
	}
	if own := groupOf(t, os.Getpid(), cgroup.Memory); own != "" {
		t.Errorf("we ourselves are in %s", own)
	}
	m.SetSources(nil)
	for name := range names {
		eventually(t, "the groups to be removed", func() bool { return len(cgroup.Find(cgroup.SQL, name, cgroup.Limits{Memory: 1, PIDs: 1}).Paths()) == 0 })
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

// TestOverMemory: what takes more than its limit is one failed statement, which says so.
func TestOverMemory(t *testing.T) {
	if !hasControllers(t) {
		return
	}
	limit, size := int64(128<<20), 150_000_000
	if raceEnabled { // the process alone takes more
		limit, size = 320<<20, 400_000_000
	}
	m := newManager(t, sqlsession.Config{Warm: -1, Memory: limit})
	mine, other := request(fmt.Sprintf("SELECT repeat('x', %d)", size)), request("SELECT 1")
	mine.Owner, other.Owner = "tok_a", "tok_b"
	query(t, m, other)
	_, err := m.Run(t.Context(), mine, io.Discard)
	if proto.CodeOf(err) != proto.CodeSQLSessionDied || !strings.Contains(err.Error(), "over its memory limit of "+cgroup.Size(limit)+" (sql.memory in agentd.yaml)") {
		t.Errorf("got %v", err)
	}
	query(t, m, other)
	mine.SQL = "SELECT 2"
	query(t, m, mine)
}
