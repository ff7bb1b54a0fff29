package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/stack"
)

// ownStack is a control plane whose programs and temporary files, and those of
// its agents, are in directories of their own: what it leaves is seen.
func ownStack(t *testing.T) *stack.Stack {
	t.Helper()
	bin, dir := ownBinaries(t), shortDir(t)
	if err := os.Mkdir(filepath.Join(dir, "tmp"), 0o700); err != nil {
		t.Fatal(err)
	}
	s, err := stack.New(stack.Options{Bin: bin, Dir: dir, Env: []string{"TMPDIR=" + filepath.Join(dir, "tmp")}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			showLogs(t, s)
		}
	})
	startControlPlane(t, s)
	return s
}

func startControlPlane(t *testing.T, s *stack.Stack) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if err := s.StartControlPlane(ctx); err != nil {
		t.Fatal(err)
	}
}

// joinOwn brings in an agent with this configuration and the stack's temporary
// directory.
func joinOwn(t *testing.T, s *stack.Stack, name, config string) *stack.Agent {
	t.Helper()
	a, err := s.NewAgent(name, config)
	if err != nil {
		t.Fatal(err)
	}
	a.Env = s.Env
	if err := a.Register(t.Context(), must(t, s, "key", "create")); err != nil {
		t.Fatal(err)
	}
	startAgent(t, a)
	return a
}

func startAgent(t *testing.T, a *stack.Agent) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if err := errors.Join(a.Start(), a.Online(ctx)); err != nil {
		t.Fatal(err)
	}
}

// stateFiles are what a control plane and an agent may leave behind when they
// stop; everything else is a leak.
var stateFiles = regexp.MustCompile(`^(controlplane/(admin\.token|blob\.known|controlplane\.db|controlplane\.db\.lock|lock|master\.key|replica)` +
	`|agent-[a-z0-9-]+/(agentd\.yaml|agentd\.log|state/agentd\.lock|state/audit-peer\.json|state/audit/\d{6}\.jsonl|state/identity/(agent\.json|authorities\.pem|cert\.pem|key\.pem))` +
	`|controlplane\.log|[a-z]+\.pw|config/.*)$`)

// stoppedClean stops everything and looks for what is left.
func stoppedClean(t *testing.T, s *stack.Stack, databases ...string) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if pids := processesOf(t, s.Bin); len(pids) != 0 {
		t.Errorf("processes are left: %v", pids)
	}
	for _, file := range files(t, s.Dir) {
		if !stateFiles.MatchString(file) {
			t.Errorf("%s is left", file)
		}
	}
	for _, database := range databases {
		noBackends(t, database)
	}
}

// flight is a query in a postern process whose output the test reads, or leaves.
type flight struct {
	cmd    *exec.Cmd
	out    *bufio.Reader
	pipe   io.Closer
	stderr strings.Builder
}

func fly(t *testing.T, s *stack.Stack, target, sql string) *flight {
	t.Helper()
	f := &flight{cmd: s.Command(context.Background(), "sql", target, "-f", "csv", sql)}
	f.cmd.Stderr = &f.stderr
	out, err := f.cmd.StdoutPipe()
	if err == nil {
		err = f.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	f.out, f.pipe = bufio.NewReader(out), out
	t.Cleanup(func() {
		f.cmd.Process.Kill() //nolint:errcheck // it has ended, if all is well
		f.cmd.Wait()         //nolint:errcheck // likewise
	})
	return f
}

// rows reads lines until n have come.
func (f *flight) rows(t *testing.T, n int) {
	t.Helper()
	for i := range n {
		if _, err := f.out.ReadString('\n'); err != nil {
			t.Fatalf("line %d: %v: %s", i+1, err, f.stderr.String())
		}
	}
}

// land waits for the end, and returns how long it took.
func (f *flight) land(t *testing.T) (ended, time.Duration) {
	t.Helper()
	began := time.Now()
	timer := time.AfterFunc(30*time.Second, func() { f.cmd.Process.Kill() })
	defer timer.Stop()
	io.Copy(io.Discard, f.out) //nolint:errcheck // the end is what counts
	f.cmd.Wait()               //nolint:errcheck // the exit code says it
	return ended{code: f.cmd.ProcessState.ExitCode(), stderr: f.stderr.String()}, time.Since(began)
}

// TestKill kills each process with SIGKILL at several points of a query. The query
// ends with an error that says what died; what died comes back and serves; both
// audit chains verify and tell of the query; nothing is left over.
func TestKill(t *testing.T) {
	pg := database(t, "killing")
	s := ownStack(t)
	a := joinOwn(t, s, "host", "sql: {warm: 0}\nsources:\n"+
		mustSource(t, s.Dir, "db", pg.SocketDSN("reader", "killing"), "      max_rows: 100000000\n      max_bytes: 20GiB\n"))
	answers(t, s, "host/db", "select count(*) from items", "10")

	victims := []struct {
		name   string
		code   int
		says   []string // before the first row, later
		kill   func(t *testing.T)
		revive func(t *testing.T)
	}{
		{
			"SQL session", 1,
			[]string{"the SQL session process was killed (signal 9)", "the SQL session process was killed (signal 9)"},
			func(t *testing.T) {
				children := a.Process.ChildrenNamed("sql-session")
				if len(children) != 1 {
					t.Fatalf("agentd has %d children, want 1: the SQL session", len(children))
				}
				if err := syscall.Kill(children[0], syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			},
			func(*testing.T) {},
		},
		{
			"agentd", 5,
			[]string{"agent host", "agent host"},
			func(*testing.T) { a.Process.Kill() },
			func(t *testing.T) { startAgent(t, a) },
		},
		{
			"control plane", 1,
			[]string{"it closed the connection", "the control plane went away while the result was under way"},
			func(*testing.T) { s.ControlPlane.Kill() },
			func(t *testing.T) {
				time.Sleep(time.Second) // down for a moment, so that agentd has to try more than once
				startControlPlane(t, s)
				took := eventually(t, time.Minute, "agentd is back", online(t, s, "host", true))
				t.Logf("agentd was back %.2f s after the control plane was ready", took.Seconds())
			},
		},
	}
	phases := []struct {
		name, sql string
		rows      int
	}{
		{"idle", "", 0},
		{"before the first row", "select pg_sleep(60)", 0},
		{"in the middle", "select i, repeat('x', 100) from generate_series(1, 20000000) i", 1000},
		{"at the end", "select i, case when i = 30000 then pg_sleep(60)::text end from generate_series(1, 30000) i", 29000},
	}
	for _, v := range victims {
		for i, p := range phases {
			t.Run(v.name+" "+p.name, func(t *testing.T) {
				answers(t, s, "host/db", "select 40 + 2", "42")
				ours, theirs := len(auditEntries(t, s, "")), len(auditEntries(t, s, "host"))
				mark := fmt.Sprintf("/* kill %s %d */", v.name, i)
				if p.sql == "" {
					v.kill(t)
				} else {
					f := fly(t, s, "host/db", p.sql+" "+mark)
					f.rows(t, p.rows)
					underWay(t, mark, 1)
					v.kill(t)
					end, took := f.land(t)
					end.said(t, v.code, "postern: ", v.says[min(i-1, 1)])
					t.Logf("after %.2f s: %s", took.Seconds(), strings.TrimSpace(end.stderr))
					took = underWay(t, mark, 0)
					t.Logf("gone from the database after %.2f s", took.Seconds())
				}
				v.revive(t)
				eventually(t, time.Minute, "a query works again", func() error {
					if e := postern(t, s, "sql", "host/db", "-f", "csv", "select count(*) from items"); e.code != 0 {
						return errors.New(e.stderr)
					}
					return nil
				})
				noOthers(t, s)
				auditVerifies(t, s)
				if p.sql == "" {
					return
				}
				// Both sides say how it ended: badly, and once.
				for agent, since := range map[string]int{"": ours, "host": theirs} {
					var ends []string
					for _, e := range newEntries(t, s, agent, since) {
						if strings.Contains(e.Statement, mark) && (e.Action == "sql.run" || e.Action == "sql.lost") {
							ends = append(ends, e.Action+" "+e.Outcome+": "+e.Error)
							if e.Outcome != "failed" && e.Outcome != "cancelled" {
								t.Errorf("the log of %q says %s of a query that was killed", agent, e.Outcome)
							}
						}
					}
					if len(ends) != 1 {
						t.Errorf("the log of %q has %d ends of the query, want 1: %v", agent, len(ends), ends)
					}
				}
			})
		}
	}
	stoppedClean(t, s, "killing")
}

// TestKillUnderLoad kills processes at random while writes are under way. No write
// that was acknowledged is lost, in the database or in either audit log.
func TestKillUnderLoad(t *testing.T) {
	pg := database(t, "load")
	s := ownStack(t)
	a := joinOwn(t, s, "host", "sources:\n"+mustSource(t, s.Dir, "db", pg.SocketDSN("reader", "load"), "      mode: read-write\n"))
	c := api(t, s)
	var (
		mu    sync.Mutex
		done  = map[int]string{} // acknowledged, by number: the query's id
		tries int
		group sync.WaitGroup
	)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	for worker := range 4 {
		group.Go(func() {
			for n := worker + 1000; ctx.Err() == nil; n += 4 {
				id, err := insert(ctx, c, n)
				mu.Lock()
				tries++
				if err == nil {
					done[n] = id
				}
				mu.Unlock()
				if err != nil {
					time.Sleep(20 * time.Millisecond) // it is down: no busy loop
				}
			}
		})
	}
	acknowledged := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(done)
	}
	for range 5 {
		for victim := range 3 {
			// Only when the last victim is back and work goes on.
			now := acknowledged()
			eventually(t, time.Minute, "work goes on", func() error {
				if acknowledged() < now+20 {
					return fmt.Errorf("%d writes since", acknowledged()-now)
				}
				return nil
			})
			time.Sleep(rand.N(50 * time.Millisecond)) // any moment
			switch victim {
			case 0:
				for _, child := range a.Process.Children() {
					syscall.Kill(child, syscall.SIGKILL) //nolint:errcheck // it may just have ended
				}
			case 1:
				a.Process.Kill()
				startAgent(t, a)
			case 2:
				s.ControlPlane.Kill()
				startControlPlane(t, s)
				eventually(t, time.Minute, "agentd is back", online(t, s, "host", true))
			}
		}
	}
	stop()
	group.Wait()
	t.Logf("%d of %d writes were acknowledged", len(done), tries)
	auditVerifies(t, s)
	noOthers(t, s)

	conn, err := pg.Connect(t.Context(), "load")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	rows, err := conn.Query(t.Context(), "select id from items where id >= 1000")
	if err != nil {
		t.Fatal(err)
	}
	there := map[int]bool{}
	for rows.Next() {
		var id int
		if err := rows.Scan(&id); err != nil {
			t.Fatal(err)
		}
		there[id] = true
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	ours, theirs := ends(t, s, ""), ends(t, s, "host")
	for n, id := range done {
		if !there[n] {
			t.Errorf("write %d was acknowledged and is not in the database", n)
		}
		for side, log := range map[string]map[string][]string{"control plane": ours, "host": theirs} {
			if got := log[id]; len(got) != 1 || got[0] != "done" {
				t.Errorf("write %d was acknowledged; the log of the %s says %v", n, side, got)
			}
		}
	}
	// What was not acknowledged may have been done all the same, but never without
	// a trace on the host.
	begun := map[string]bool{}
	for _, e := range allEntries(t, s, "host") {
		if e.Action == "sql.begin" {
			begun[e.Statement] = true
		}
	}
	for n := range there {
		if !begun[insertion(n)] {
			t.Errorf("write %d is in the database and not in the host's log", n)
		}
	}
	conn.Close(t.Context()) //nolint:errcheck // closed twice is fine
	stoppedClean(t, s, "load")
}

func insertion(n int) string { return fmt.Sprintf("insert into items values (%d, 'under load')", n) }

// TestFullDiskOfTheHost fills the disk of a host's audit log: what can't be
// audited isn't run, and says so; with room again it is.
func TestFullDiskOfTheHost(t *testing.T) {
	needRoot(t)
	pg := database(t, "hostfull")
	s := ownStack(t)
	a, err := s.NewAgent("host", "sources:\n"+mustSource(t, s.Dir, "db", pg.SocketDSN("reader", "hostfull"), "      mode: read-write\n"))
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(a.StateDir(), "audit")
	smallDisk(t, log, 256<<10)
	if err := a.Register(t.Context(), must(t, s, "key", "create")); err != nil {
		t.Fatal(err)
	}
	startAgent(t, a)
	run := func() ended { return postern(t, s, "sql", "host/db", "-f", "csv", "select nextval('runs')") }
	if e := run(); e.code != 0 {
		t.Fatal(e.stderr)
	}
	free := fillDisk(t, log)
	// The log's last block has room for a few entries, but not for this one's.
	postern(t, s, "sql", "host/db", "select nextval('runs') -- "+strings.Repeat("x", 6000)).said(t, 1, "no space is left in "+log)
	if ran := value(t, "hostfull", "select last_value from runs"); ran != "1" {
		t.Errorf("a statement that could not be audited was run: the sequence is at %s", ran)
	}
	ran := 1
	for ; ; ran++ {
		e := run()
		if e.code != 0 {
			e.said(t, 1, "postern: ", "the host's audit log cannot be written: no space is left in "+log)
			break
		}
		if ran > 40 {
			t.Fatal("no query was refused")
		}
	}
	// One that began with room for its beginning alone may have run.
	did := value(t, "hostfull", "select last_value from runs")
	for range 3 {
		run().said(t, 1, "no space is left")
	}
	if now := value(t, "hostfull", "select last_value from runs"); now != did {
		t.Errorf("the database did %s statements while they were refused, and %s before", now, did)
	}
	// Looking is refused as well as soon as it would leave an entry; the agent
	// itself stays.
	if e := postern(t, s, "source", "check", "host/db"); e.code == 0 {
		t.Error("a check without an entry: it worked")
	}
	if err := online(t, s, "host", true)(); err != nil {
		t.Error(err)
	}
	free()
	if e := run(); e.code != 0 {
		t.Errorf("with room again: exit code %d: %s", e.code, e.stderr)
	}
	auditVerifies(t, s)
	begun, begins := map[string]bool{}, 0
	for _, e := range auditEntries(t, s, "host") {
		switch e.Action {
		case "sql.begin":
			begun[e.QueryID] = true
			begins++
		case "sql.run":
			delete(begun, e.QueryID)
		}
	}
	if len(begun) != 0 {
		t.Errorf("%d statements have no end in the host's log", len(begun))
	}
	if ran := value(t, "hostfull", "select last_value from runs"); ran != strconv.Itoa(begins) {
		t.Errorf("the database did %s statements, and %d began in the host's log", ran, begins)
	}
	stop(t, a.Process)
}

// TestFullDiskOfTheControlPlane fills the disk of its data directory: one clear
// line, no query that leaves no trace, and all works again with room.
func TestFullDiskOfTheControlPlane(t *testing.T) {
	needRoot(t)
	pg := database(t, "cpfull")
	s, err := stack.New(stack.Options{Bin: ownBinaries(t), Dir: shortDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	smallDisk(t, s.DataDir(), 4<<20)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			showLogs(t, s)
		}
	})
	startControlPlane(t, s)
	joinOwn(t, s, "host", "sources:\n"+mustSource(t, s.Dir, "db", pg.SocketDSN("reader", "cpfull"), "      mode: read-write\n"))
	run := func() ended { return postern(t, s, "sql", "host/db", "-f", "csv", "select nextval('runs')") }
	if e := run(); e.code != 0 {
		t.Fatal(e.stderr)
	}
	free := fillDisk(t, s.DataDir())
	for ran := 0; ; ran++ {
		e := run()
		if e.code != 0 {
			e.said(t, 1, "postern: ", "no space is left for the control plane's database: free some and try again")
			break
		}
		if ran > 300 {
			t.Fatal("no query was refused")
		}
	}
	did := value(t, "cpfull", "select last_value from runs")
	for range 3 {
		run().said(t, 1, "no space is left for the control plane's database")
		postern(t, s, "key", "create").said(t, 1, "no space is left for the control plane's database")
	}
	if now := value(t, "cpfull", "select last_value from runs"); now != did {
		t.Errorf("the database did %s statements while they were refused, and %s before", now, did)
	}
	if err := online(t, s, "host", true)(); err != nil {
		t.Error(err)
	}
	free()
	if e := run(); e.code != 0 {
		t.Errorf("with room again: exit code %d: %s", e.code, e.stderr)
	}
	auditVerifies(t, s)
	stop(t, s.Agents[0].Process)
	stop(t, s.ControlPlane)
}

func stop(t *testing.T, p *stack.Process) {
	t.Helper()
	if err := p.Stop(40 * time.Second); err != nil {
		t.Error(err)
	}
}
