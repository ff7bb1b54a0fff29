package enginetest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession"
)

// counter counts what is written to it.
type counter int

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// children are the session processes of this one.
func children(t *testing.T) (pids []int) {
	t.Helper()
	found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range found {
		text, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(text), "\x00"+sqlsession.ChildArg) {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if statusOf(t, pid)["PPid"] == strconv.Itoa(os.Getpid()) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func statusOf(t *testing.T, pid int) map[string]string {
	t.Helper()
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	status := map[string]string{}
	for _, line := range strings.Split(string(text), "\n") {
		name, value, _ := strings.Cut(line, ":")
		status[name] = strings.Join(strings.Fields(value), " ")
	}
	return status
}

// memoryOf is a line of /proc/PID/status in kB.
func memoryOf(t *testing.T, pid int, line string) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSuffix(statusOf(t, pid)[line], " kB"))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// The processes of all engines have given up what they do not need.
func TestSandbox(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		m := db.open(t)
		query(t, m, request("SELECT 1"))
		pids := children(t)
		if len(pids) != 1 {
			t.Fatalf("got processes %v, want one", pids)
		}
		status := statusOf(t, pids[0])
		want := map[string]string{"NoNewPrivs": "1", "CapEff": "0000000000000000", "CapPrm": "0000000000000000"}
		if db.engine == "sqlite" {
			want["Seccomp"] = "2"
		}
		for line, value := range want {
			if status[line] != value {
				t.Errorf("%s: got %q, want %q", line, status[line], value)
			}
		}
		limits, _ := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pids[0]))
		for _, line := range strings.Split(string(limits), "\n") {
			if f := strings.Fields(line); strings.HasPrefix(line, "Max file size") && (f[3] == "0") == (db.engine == "sqlite") {
				t.Errorf("got %q", line)
			}
		}
		if os.Geteuid() == 0 && (strings.HasPrefix(status["Uid"], "0 ") || status["Groups"] != "") {
			t.Errorf("it runs as %s, groups %s", status["Uid"], status["Groups"])
		}
		// Of descriptors it has none for the database's file that it could write to.
		links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pids[0]))
		for _, link := range links {
			target, _ := os.Readlink(link)
			if !strings.HasSuffix(target, ".db") {
				continue
			}
			info, _ := os.ReadFile(strings.Replace(link, "/fd/", "/fdinfo/", 1))
			if flags := strings.Fields(strings.SplitAfter(string(info), "flags:")[1])[0]; flags[len(flags)-1] != '0' {
				t.Errorf("%s is open with flags %s", target, flags)
			}
		}
	})
}
