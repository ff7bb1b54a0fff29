package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/e2e/stack"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// ended is a command that has ended.
type ended struct {
	code           int
	stdout, stderr string
}

// finish runs a command to its end, which comes within a minute.
func finish(t *testing.T, cmd *exec.Cmd) ended {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	timer := time.AfterFunc(time.Minute, func() {
		if cmd.Process != nil {
			cmd.Process.Kill() //nolint:errcheck // it may just have ended
		}
	})
	defer timer.Stop()
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return ended{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// said fails the test unless the command ended with this code and one line on
// standard error that has all these texts in it.
func (e ended) said(t *testing.T, code int, texts ...string) {
	t.Helper()
	if e.code != code {
		t.Errorf("exit code %d, want %d; standard error: %s", e.code, code, e.stderr)
	}
	if strings.Count(e.stderr, "\n") != 1 || !strings.HasSuffix(e.stderr, "\n") {
		t.Errorf("standard error is not one line: %q", e.stderr)
	}
	for _, text := range texts {
		if !strings.Contains(e.stderr, text) {
			t.Errorf("standard error has no %q: %s", text, e.stderr)
		}
	}
}

// run runs a postern command as the admin.
func postern(t *testing.T, s *stack.Stack, args ...string) ended {
	t.Helper()
	return finish(t, s.Command(t.Context(), args...))
}

// must is the standard output of a postern command that has to succeed.
func must(t *testing.T, s *stack.Stack, args ...string) string {
	t.Helper()
	e := postern(t, s, args...)
	if e.code != 0 {
		t.Fatalf("postern %s: exit code %d: %s", strings.Join(args, " "), e.code, e.stderr)
	}
	return strings.TrimSpace(e.stdout)
}

// mustJSON decodes what a postern command prints with -o json.
func mustJSON[T any](t *testing.T, s *stack.Stack, args ...string) T {
	t.Helper()
	var v T
	text := must(t, s, append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("postern %s: %v in %.200s", strings.Join(args, " "), err, text)
	}
	return v
}

// auditEntries are the entries of the control plane's log, or with an agent's
// name of that host's.
func auditEntries(t *testing.T, s *stack.Stack, agent string) []auditchain.Entry {
	t.Helper()
	args := []string{"audit", "list", "--from", "1", "--limit", "1000"}
	if agent != "" {
		args = append(args, "--agent", agent)
	}
	return mustJSON[[]auditchain.Entry](t, s, args...)
}

// newEntries are those that came after the first n.
func newEntries(t *testing.T, s *stack.Stack, agent string, n int) []auditchain.Entry {
	t.Helper()
	all := auditEntries(t, s, agent)
	if len(all) < n {
		t.Fatalf("the log has shrunk from %d to %d entries", n, len(all))
	}
	return all[n:]
}

// auditVerifies checks the chains of the control plane and of its agents, the
// latter both through the control plane and on the host itself.
func auditVerifies(t *testing.T, s *stack.Stack) {
	t.Helper()
	if e := postern(t, s, "audit", "verify"); e.code != 0 {
		t.Errorf("postern audit verify: exit code %d\n%s%s", e.code, e.stdout, e.stderr)
	}
	for _, a := range s.Agents {
		if _, err := os.Stat(filepath.Join(a.StateDir(), "audit", "000001.jsonl")); err != nil {
			continue // it never joined
		}
		if e := finish(t, a.Command(t.Context(), "audit", "verify", "--state", a.StateDir())); e.code != 0 {
			t.Errorf("agentd audit verify: exit code %d\n%s%s", e.code, e.stdout, e.stderr)
		}
	}
}

// processesOf are the living processes whose program is in a directory.
func processesOf(t *testing.T, dir string) []int {
	t.Helper()
	var pids []int
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		// An agentd's SQL session runs /proc/self/exe; the link names the file.
		if exe, err := os.Readlink(filepath.Join("/proc", e.Name(), "exe")); err == nil && filepath.Dir(strings.TrimSuffix(exe, " (deleted)")) == dir {
			pids = append(pids, pid)
		}
	}
	return pids
}

// noOthers waits until the only processes of a stack's directory of programs are
// those that the stack started and their children: nothing was orphaned. The
// stack has programs of its own (see ownBinaries).
func noOthers(t *testing.T, s *stack.Stack) {
	t.Helper()
	eventually(t, time.Minute, "no orphans", func() error {
		known := map[int]bool{}
		for _, p := range append([]*stack.Process{s.ControlPlane}, agentProcesses(s)...) {
			if p != nil && p.Running() {
				known[p.PID()] = true
				for _, child := range p.Children() {
					known[child] = true
				}
			}
		}
		for _, pid := range processesOf(t, s.Bin) {
			if !known[pid] {
				cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
				return fmt.Errorf("process %d (%q) is nobody's", pid, bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '}))
			}
		}
		return nil
	})
}

// ownBinaries gives a stack programs in a directory of its own, so that its
// processes are told from those of tests that ran before.
func ownBinaries(t *testing.T) string {
	t.Helper()
	from, dir := binaries(t), shortDir(t)
	entries, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.Link(filepath.Join(from, e.Name()), filepath.Join(dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// files lists a directory and all beneath it, relative to it.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			name, _ := filepath.Rel(dir, path)
			all = append(all, name)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // gone meanwhile, or never there
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(all)
	return all
}

// database is a fresh database of the shared server with the role reader in it,
// and a table "items" of ten rows that reader may change.
func database(t *testing.T, name string) *pgserver.Server {
	t.Helper()
	pg := postgres(t)
	if err := pg.CreateDatabase(t.Context(), name, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pg.SQL(context.WithoutCancel(t.Context()), "DROP DATABASE "+name+" WITH (FORCE)"); err != nil {
			t.Error(err)
		}
	})
	if err := pg.SQLIn(t.Context(), name,
		"create table items (id int primary key, name text not null)",
		"insert into items select i, 'item ' || i from generate_series(1, 10) i",
		"grant select, insert, update, delete on items to reader",
		"create sequence runs", "grant usage on sequence runs to reader",
	); err != nil {
		t.Fatal(err)
	}
	return pg
}

// value asks the database itself, as the superuser, for one value as text.
func value(t *testing.T, database, sql string) string {
	t.Helper()
	conn, err := postgres(t).Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var text *string
	if err := conn.QueryRow(t.Context(), "select ("+sql+")::text").Scan(&text); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	if text == nil {
		return ""
	}
	return *text
}

// items is a digest of the table that database made.
func items(t *testing.T, database string) string {
	t.Helper()
	return value(t, database, "select count(*) || ' ' || md5(string_agg(id || name, ',' order by id)) from items")
}

// backends is how many connections the role reader has to a database.
func backends(t *testing.T, database string) int {
	t.Helper()
	n, err := strconv.Atoi(value(t, "postgres", "select count(*) from pg_stat_activity where usename = 'reader' and datname = '"+database+"'"))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// noBackends waits until the role reader has no connection to a database.
func noBackends(t *testing.T, database string) {
	t.Helper()
	eventually(t, time.Minute, "no backend is left", func() error {
		if n := backends(t, database); n != 0 {
			return fmt.Errorf("%d are", n)
		}
		return nil
	})
}

// mustSource is a data source in YAML, under "sources:".
func mustSource(t *testing.T, dir, name, dsn, policy string) string {
	t.Helper()
	text, err := stack.Source(dir, name, dsn, readerPassword, policy)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// smallDisk mounts a file system of its own with this many bytes at a directory,
// for the length of the test.
func smallDisk(t *testing.T, dir string, size int) {
	t.Helper()
	needRoot(t)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0700", size)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// needRoot skips a test that has to mount or to look into others' processes.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts file systems or reads other users' processes")
	}
}

// fillDisk takes all the space below a directory; free gives it back.
func fillDisk(t *testing.T, dir string) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 64 << 10; size > 0; {
		if _, err := f.Write(make([]byte, size)); errors.Is(err, unix.ENOSPC) {
			size /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// allEntries are all entries of a log, however many: see auditEntries.
func allEntries(t *testing.T, s *stack.Stack, agent string) []auditchain.Entry {
	t.Helper()
	var all []auditchain.Entry
	for {
		args := []string{"audit", "list", "--from", strconv.Itoa(len(all) + 1), "--limit", "1000"}
		if agent != "" {
			args = append(args, "--agent", agent)
		}
		page := mustJSON[[]auditchain.Entry](t, s, args...)
		if len(page) == 0 {
			return all
		}
		all = append(all, page...)
	}
}

// asked are the entries of a log without those of looks at what its data sources hold:
// nobody asked for them, and they come when they come.
func asked(t *testing.T, s *stack.Stack, agent string) []auditchain.Entry {
	t.Helper()
	return slices.DeleteFunc(allEntries(t, s, agent), func(e auditchain.Entry) bool { return strings.HasPrefix(e.Action, "source.introspect") })
}

// ends are the outcomes of each query, by its id, as a log has them.
func ends(t *testing.T, s *stack.Stack, agent string) map[string][]string {
	t.Helper()
	found := map[string][]string{}
	for _, e := range allEntries(t, s, agent) {
		if e.Action == "sql.run" || e.Action == "sql.lost" {
			found[e.QueryID] = append(found[e.QueryID], e.Outcome)
		}
	}
	return found
}

// insert runs insertion(n) and returns the query's id once it is acknowledged.
func insert(ctx context.Context, c *client.Client, n int) (string, error) {
	rows, err := c.SQL(ctx, "host", "db", &posternv1.RunSQLRequest{Sql: insertion(n)})
	if err != nil {
		return "", err
	}
	defer rows.Close()
	if _, err := io.Copy(io.Discard, rows); err != nil {
		return "", err
	}
	outcome, err := rows.Outcome()
	if err != nil {
		return "", err
	}
	return outcome.GetQueryId(), nil
}

// localEntries are the lines of a host's log, read on the host.
func localEntries(t *testing.T, a *stack.Agent) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(a.StateDir(), "audit", "000001.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

// fetch gets a page of the control plane's with a token.
func fetch(t *testing.T, url, token string) (body []byte) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	eventually(t, time.Minute, url, func() error { // who asks for much must wait
		response, err := c.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, err = io.ReadAll(response.Body)
		if response.StatusCode == http.StatusTooManyRequests {
			return errors.New(response.Status)
		}
		if err != nil || response.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s, %v", url, response.Status, err)
		}
		return nil
	})
	return body
}
