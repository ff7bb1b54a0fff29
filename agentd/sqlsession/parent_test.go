package sqlsession_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/e2e/pgserver"
)

// helperParentArg makes the test binary a parent that is killed.
const helperParentArg = "helper-parent"

// helperParent runs a long statement in a Manager until it is killed. The
// data source comes on stdin: DSN and password.
func helperParent() int {
	input, err := io.ReadAll(os.Stdin)
	if err != nil {
		return 1
	}
	dsn, secret, _ := strings.Cut(string(input), "\n")
	m := sqlsession.New(sqlsession.Config{})
	m.SetSources([]sqlsession.Source{{Name: "db", Engine: "postgres", DSN: dsn, Password: password(secret)}})
	// No pause in it at which the server would notice a lost connection.
	_, err = m.Run(context.Background(), request("SELECT count(*) FROM generate_series(1, 10000000000) i, generate_series(1, 1000) orphan"), io.Discard)
	fmt.Println(err)
	return 1
}

func TestKilledParentLeavesNothing(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", helperParentArg)
	cmd.Stdin = strings.NewReader(server.DSN("reader", pgserver.Superuser) + "\n" + readerPassword)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // should the test fail before it does
	backends := func(state string) string {
		return one(t, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND query LIKE '%orphan%'"+state)
	}
	// It starts a parser of its own, which takes ten seconds with the race detector.
	within(t, 90*time.Second, "the statement to run and a warm session to wait", func() bool {
		return backends(" AND state = 'active'") == "1" && len(sessionProcesses(cmd.Process.Pid)) == 2
	})
	processes := sessionProcesses(cmd.Process.Pid)
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	eventually(t, "the processes to be gone", func() bool {
		for _, pid := range processes {
			if running(pid) {
				return false
			}
		}
		return true
	})
	eventually(t, "the backend to be gone", func() bool { return backends("") == "0" })
}

// running tells whether a process exists and is no zombie (whose parent, when
// ours is dead, may be slow to look).
func running(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(rest, "Z")
}

// sessionProcesses returns the SQL session processes of a parent.
func sessionProcesses(parent int) []int {
	var pids []int
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		_, rest, _ := strings.Cut(string(stat), ") ")
		fields := strings.Fields(rest)
		if len(fields) > 1 && fields[1] == strconv.Itoa(parent) && strings.Contains(string(cmdline), "\x00"+sqlsession.ChildArg) && fields[0] != "Z" {
			pids = append(pids, pid)
		}
	}
	return pids
}
