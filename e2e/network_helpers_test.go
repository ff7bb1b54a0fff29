package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/e2e/stack"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// newStack starts a control plane that lives as long as the test. What its
// processes said is shown when the test fails.
func newStack(t *testing.T, o stack.Options) *stack.Stack {
	t.Helper()
	if o.Dir = shortDir(t); o.Bin == "" {
		o.Bin = binaries(t)
	}
	s, err := stack.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, a := range s.Agents {
			if a.Process != nil {
				a.Process.Signal(syscall.SIGCONT)
			}
		}
		if s.ControlPlane != nil {
			s.ControlPlane.Signal(syscall.SIGCONT)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			showLogs(t, s)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if err := s.StartControlPlane(ctx); err != nil {
		t.Fatal(err)
	}
	return s
}

func showLogs(t *testing.T, s *stack.Stack) {
	t.Helper()
	for _, p := range append([]*stack.Process{s.ControlPlane}, agentProcesses(s)...) {
		if p != nil {
			t.Logf("--- the last lines of %s\n%s", p.Name, p.Tail(40))
		}
	}
}

func agentProcesses(s *stack.Stack) (all []*stack.Process) {
	for _, a := range s.Agents {
		all = append(all, a.Process)
	}
	return all
}

// shortDir is a temporary directory whose path leaves room for a socket's name,
// and which SQL sessions, another user's processes, may enter.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pe2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// sources is the configuration of one data source, "db", on the shared server, by
// its unix socket: a host in a network namespace reaches it too.
func sources(t *testing.T, s *stack.Stack) string {
	t.Helper()
	pg := postgres(t)
	text, err := stack.Source(s.Dir, "db", pg.SocketDSN("reader", "postgres"), readerPassword,
		"      max_rows: 100000000\n      max_bytes: 20GiB\n      statement_timeout: 10m\n      concurrency: 32\n")
	if err != nil {
		t.Fatal(err)
	}
	return "sources:\n" + text
}

// join brings an agent in and waits until it is online.
func join(t *testing.T, s *stack.Stack, name string) *stack.Agent {
	t.Helper()
	a, err := s.Join(t.Context(), name, sources(t, s))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// joinWith is join with changes to the agent before it registers.
func joinWith(t *testing.T, s *stack.Stack, name string, change func(*stack.Agent)) *stack.Agent {
	t.Helper()
	a, err := s.NewAgent(name, sources(t, s))
	if err != nil {
		t.Fatal(err)
	}
	change(a)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	key, err := s.NewKey(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(a.Register(ctx, key), a.Start(), a.Online(ctx)); err != nil {
		t.Fatal(err)
	}
	return a
}

// answers asks for a query's answer, and fails the test if it is not want.
func answers(t *testing.T, s *stack.Stack, target, sql, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	got, err := s.Postern(ctx, "sql", target, "-f", "csv", sql)
	for err != nil && strings.Contains(err.Error(), "the parser of statements is not available: try again") {
		got, err = s.Postern(ctx, "sql", target, "-f", "csv", sql) // it takes long to start on a busy machine
	}
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	if _, rows, _ := strings.Cut(strings.TrimSpace(strings.ReplaceAll(got, "\r", "")), "\n"); rows != want {
		t.Fatalf("%s: got %q, want %q", sql, rows, want)
	}
}

// api is the Go client as the admin, from the network namespace of the stack.
func api(t *testing.T, s *stack.Stack) *client.Client {
	t.Helper()
	token, err := os.ReadFile(s.TokenFile)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DialContext: (&net.Dialer{Timeout: 5 * time.Second}).DialContext}
	t.Cleanup(transport.CloseIdleConnections)
	c, err := client.New(client.Config{
		URL:        s.URL,
		Token:      client.StaticToken(client.NewSecret(strings.TrimSpace(string(token)))),
		HTTPClient: &http.Client{Transport: transport},
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// running is a query under way in a process of its own.
type running struct {
	cmd    *exec.Cmd
	done   chan struct{}
	out    strings.Builder
	err    error
	cancel context.CancelFunc
}

// start runs a statement in the background; wait for its done.
func startSQL(t *testing.T, s *stack.Stack, target, sql string) *running {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	r := &running{cmd: s.Command(ctx, "sql", target, "-f", "csv", sql), done: make(chan struct{}), cancel: cancel}
	if s.Netns != "" {
		r.cmd.Args = append([]string{"ip", "netns", "exec", s.Netns}, r.cmd.Args...)
		r.cmd.Path, r.cmd.Err = exec.LookPath("ip")
	}
	r.cmd.Stdout, r.cmd.Stderr = &r.out, &r.out
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		r.err = r.cmd.Wait()
		close(r.done)
	}()
	t.Cleanup(func() { cancel(); <-r.done })
	return r
}

// exit waits for the end and returns exit code and everything that was printed.
func (r *running) exit(t *testing.T, patience time.Duration) (int, string) {
	t.Helper()
	select {
	case <-r.done:
	case <-time.After(patience):
		t.Fatalf("the query did not end within %s", patience)
	}
	var exit *exec.ExitError
	switch {
	case r.err == nil:
		return 0, r.out.String()
	case errors.As(r.err, &exit):
		return exit.ExitCode(), r.out.String()
	}
	t.Fatal(r.err)
	return 0, ""
}

// busy is how many times longer than on a quiet machine something may take before a test
// gives up on it: what has a promise is held against what eventually returns.
const busy = 6

// eventually polls until f returns nil, and returns how long that took. The patience is for
// a quiet machine.
func eventually(t *testing.T, patience time.Duration, what string, f func() error) time.Duration {
	t.Helper()
	patience *= busy
	began := time.Now()
	for {
		err := f()
		if err == nil {
			return time.Since(began)
		}
		if time.Since(began) > patience {
			t.Fatalf("%s: not within %s: %v", what, patience, err)
		}
		time.Sleep(20 * time.Millisecond) // between polls
	}
}

// agentState is what `postern agent show` says.
func agentState(t *testing.T, s *stack.Stack, name string) (*posternv1.Agent, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	text, err := s.Postern(ctx, "agent", "show", name, "-o", "json")
	if err != nil {
		return nil, err
	}
	var state struct {
		Online     bool
		LinkEvents []struct{ State, Cause string }
	}
	if err := json.Unmarshal([]byte(text), &state); err != nil {
		return nil, err
	}
	a := &posternv1.Agent{Name: name, Online: state.Online}
	for _, e := range state.LinkEvents {
		a.LinkEvents = append(a.LinkEvents, &posternv1.LinkEvent{State: e.State, Cause: e.Cause})
	}
	return a, nil
}

// online returns an error unless the agent's state is as wanted.
func online(t *testing.T, s *stack.Stack, name string, want bool) func() error {
	return func() error {
		a, err := agentState(t, s, name)
		switch {
		case err != nil:
			return err
		case a.Online != want:
			return fmt.Errorf("online is %v", a.Online)
		}
		return nil
	}
}

// statements is the number of statements under way in the database with this text
// in them.
func statements(t *testing.T, mark string) int {
	t.Helper()
	conn, err := postgres(t).Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var n int
	err = conn.QueryRow(t.Context(), "select count(*) from pg_stat_activity where state = 'active' and pid <> pg_backend_pid() and query like '%'||$1||'%'", mark).Scan(&n)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// underWay waits until the database runs a statement with this mark.
func underWay(t *testing.T, mark string, want int) time.Duration {
	t.Helper()
	return eventually(t, 30*time.Second, "statements with "+mark, func() error {
		if n := statements(t, mark); n != want {
			return fmt.Errorf("%d run, want %d", n, want)
		}
		return nil
	})
}

// rss is a process's resident memory in bytes.
func rss(t *testing.T, pid int) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if kib, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.ParseInt(strings.Fields(kib)[0], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// connections is the number of TCP connections that a server on loopback has open,
// seen by the kernel: established, or closed by the other side only.
func connections(t *testing.T, address string) int {
	t.Helper()
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	table, err := os.ReadFile("/proc/self/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	const established, closeWait = "01", "08"
	n := 0
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if len(fields) > 3 && strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", number)) && (fields[3] == established || fields[3] == closeWait) {
			n++
		}
	}
	return n
}

// runningQuery finds the id of the query with a mark in its text.
func runningQuery(t *testing.T, list, mark string) string {
	t.Helper()
	var queries []struct{ ID, SQL, State string }
	if err := json.Unmarshal([]byte(list), &queries); err != nil {
		t.Fatalf("%v: %s", err, list)
	}
	for _, q := range queries {
		if strings.Contains(q.SQL, mark) && q.State == "running" {
			return q.ID
		}
	}
	t.Fatalf("no query with %s runs: %s", mark, list)
	return ""
}
