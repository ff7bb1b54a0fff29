package sqlsession_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
)

// needRoot skips what only root can do or see.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: sessions get user ids of their own, and their /proc entries are root's to read")
	}
}

// statusOf reads /proc/PID/status.
func statusOf(t *testing.T, pid int) map[string]string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	status := make(map[string]string)
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		status[name] = strings.Join(strings.Fields(value), " ")
	}
	return status
}

func TestSandbox(t *testing.T) {
	needRoot(t)
	// A descriptor without close-on-exec, as a careless parent leaves it.
	leak, err := os.Open("/etc/shadow")
	if err != nil {
		t.Fatal(err)
	}
	defer leak.Close()
	t.Setenv("PGPASSWORD", "marked-in-environment")
	m := newManager(t, sqlsession.Config{})
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() {
		_, err := m.Run(ctx, request("SELECT pg_sleep(60)"), io.Discard)
		result <- err
	}()
	defer func() {
		cancel()
		<-result
	}()
	eventually(t, "two processes", func() bool { return len(sessionProcesses(os.Getpid())) == 2 })
	uids := make(map[string]bool)
	for _, pid := range sessionProcesses(os.Getpid()) {
		// Connected, and so past its own hardening.
		eventually(t, "the process to harden", func() bool { return strings.Contains(limitsOf(t, pid), "Max file size 0 0") })
		status := statusOf(t, pid)
		uid := strings.Fields(status["Uid"])
		if n, _ := strconv.Atoi(uid[0]); n < 1_900_000_000 || uid[1] != uid[0] || uid[2] != uid[0] || uid[3] != uid[0] || status["Gid"] != status["Uid"] {
			t.Errorf("got uid %s, gid %s, want one of its own", status["Uid"], status["Gid"])
		}
		uids[uid[0]] = true
		for name, want := range map[string]string{
			"NoNewPrivs": "1", "Groups": "", "CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000",
			"CapBnd": "0000000000000000", "CapAmb": "0000000000000000",
		} {
			if status[name] != want {
				t.Errorf("%s: got %q, want %q", name, status[name], want)
			}
		}
		// Not dumpable: the entries in /proc are root's, and the memory can't
		// be read by another process of the same user.
		info, err := os.Stat(fmt.Sprintf("/proc/%d/environ", pid))
		if err != nil {
			t.Fatal(err)
		}
		if owner := fmt.Sprintf("%+v", info.Sys()); !strings.Contains(owner, "Uid:0 ") {
			t.Errorf("/proc/%d/environ: got %s, want it owned by root", pid, owner)
		}
		limits := limitsOf(t, pid)
		for _, want := range []string{"Max core file size 0 0", "Max file size 0 0", "Max open files 64 64", "Max processes 64 64"} {
			if !strings.Contains(limits, want) {
				t.Errorf("limits: got %s, want %s", limits, want)
			}
		}
		descriptors, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range descriptors {
			target, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, d.Name()))
			switch {
			case target == "/dev/null", strings.HasPrefix(target, "socket:"), strings.HasPrefix(target, "pipe:"), strings.HasPrefix(target, "anon_inode:"):
			case strings.HasPrefix(target, "/sys/fs/cgroup/"): // the Go runtime's own
			default:
				t.Errorf("descriptor %s is %s, want none but sockets", d.Name(), target)
			}
		}
		if environ, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); len(environ) > 0 {
			t.Errorf("environment: got %q, want none", environ)
		}
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		_, rest, _ := strings.Cut(string(stat), ") ")
		if fields := strings.Fields(rest); fields[3] != strconv.Itoa(pid) {
			t.Errorf("session: got %s, want its own, %d", fields[3], pid)
		}
	}
	if len(uids) != 2 {
		t.Errorf("got user ids %v, want two different ones", uids)
	}
	// We ourselves are what we were: only the thread that forked was confined.
	tasks, _ := filepath.Glob("/proc/self/task/*/status")
	for _, path := range tasks {
		text, _ := os.ReadFile(path)
		if strings.Contains(string(text), "NoNewPrivs:\t1") {
			t.Errorf("%s: one of our own threads has no_new_privs", path)
		}
	}
}

func limitsOf(t *testing.T, pid int) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(strings.Fields(string(text)), " ")
}

func TestSecretsStayHidden(t *testing.T) {
	const marked = "marked-secret-7f3a"
	var log lockedBuffer
	s := source("db")
	s.Password = password(marked)
	m := newManager(t, sqlsession.Config{Logger: textLogger(&log)}, s)
	e := refuse(t, m, request("SELECT 1"), proto.CodeSourceCredentials)
	createRole(t, "marked", marked)
	s.DSN = server.DSN("marked", "postgres")
	m.SetSources([]sqlsession.Source{s})
	query(t, m, request("SELECT 1"))
	eventually(t, "a warm session", func() bool { return len(sessionProcesses(os.Getpid())) >= 2 })
	checks := m.Check(t.Context(), "db")
	texts := map[string]string{"error": fmt.Sprintf("%v %+v %v", e, e, e.Err), "log": log.String(), "checks": fmt.Sprint(checks)}
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		if _, err := strconv.Atoi(entry.Name()); err != nil {
			continue
		}
		for _, name := range []string{"environ", "cmdline"} {
			text, _ := os.ReadFile("/proc/" + entry.Name() + "/" + name)
			texts[entry.Name()+" "+name] = string(text)
		}
	}
	for where, text := range texts {
		if strings.Contains(text, marked) {
			t.Errorf("%s shows the password", where)
		}
	}
	for _, setting := range []string{"application_name", "query"} {
		if got := one(t, "SELECT string_agg("+setting+", ' ') FROM pg_stat_activity"); strings.Contains(got, marked) {
			t.Errorf("pg_stat_activity.%s shows the password", setting)
		}
	}
}

// TestLibpqEnvironmentDoesNotCount: what libpq would read must not reach a
// session.
func TestLibpqEnvironmentDoesNotCount(t *testing.T) {
	home := t.TempDir()
	if err := os.WriteFile(filepath.Join(home, ".pgpass"), []byte("*:*:*:*:"+readerPassword+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", home)
	t.Setenv("PGPASSWORD", readerPassword)
	t.Setenv("PGPASSFILE", filepath.Join(home, ".pgpass"))
	s := source("db")
	s.Password = nil
	m := newManager(t, sqlsession.Config{}, s)
	refuse(t, m, request("SELECT 1"), proto.CodeSourceCredentials)
}

func TestOwnersAreIsolated(t *testing.T) {
	// One session at most is kept, so that reuse would be seen.
	m := newManager(t, sqlsession.Config{Warm: -1})
	as := func(owner, sql string) sqlsession.Request {
		r := request(sql)
		r.Owner, r.ReadWrite = owner, true
		return r
	}
	pid := func(owner string) string {
		got, _ := query(t, m, as(owner, "SELECT pg_backend_pid()"))
		return got.rows[0][0]
	}
	first := pid("tok_a")
	if again := pid("tok_a"); again != first {
		t.Errorf("the same owner: got backend %s, want %s again", again, first)
	}
	if other := pid("tok_b"); other == first {
		t.Error("another owner got the same backend")
	}
	if a, b := pid(""), pid(""); a == b {
		t.Error("without an owner the backend was used again")
	}

	// What one statement leaves, no later one sees, not even the owner's own.
	query(t, m, as("tok_a", "SELECT set_config('application_name', 'left over', false), set_config('search_path', 'pg_catalog', false), set_config('my.own', 'x', false), set_config('statement_timeout', '1', false)"))
	query(t, m, as("tok_a", "SELECT pg_advisory_lock(42)"))
	query(t, m, as("tok_a", "CREATE TEMP TABLE things (id int)"))
	query(t, m, as("tok_a", "DO $$ BEGIN PERFORM pg_advisory_lock(43); EXECUTE 'LISTEN x'; END $$"))
	for _, owner := range []string{"tok_a", "tok_b"} {
		got, _ := query(t, m, as(owner, "SELECT current_setting('application_name'), current_setting('search_path'), coalesce(current_setting('my.own', true), ''), (SELECT count(*) FROM pg_listening_channels()), (SELECT count(*) > 900 FROM things), (SELECT count(*) FROM pg_prepared_statements WHERE name NOT LIKE 'postern%')"))
		if want := []string{"postern db", `"$user", public`, "", "0", "true", "0"}; fmt.Sprint(got.rows[0]) != fmt.Sprint(want) {
			t.Errorf("%s: got %q, want %q", owner, got.rows[0], want)
		}
	}
	if got := one(t, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"); got != "0" {
		t.Errorf("got %s advisory locks, want none", got)
	}
}
