package sqlsession_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/cgroup"
	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// helperHoldArg makes the test binary an agentd that holds a session until it is killed.
const helperHoldArg = "helper-hold"

// helperHold opens the session ses_held, begins a transaction in it and runs a long
// statement. DSN, password and the directory come on stdin.
func helperHold() int {
	input, err := io.ReadAll(os.Stdin)
	if err != nil {
		return 1
	}
	lines := strings.Split(string(input), "\n")
	m := sqlsession.New(sqlsession.Config{Hold: lines[2], Warm: -1})
	m.SetSources([]sqlsession.Source{{Name: "db", Engine: "postgres", DSN: lines[0], Password: password(lines[1]), ReadWrite: true}})
	ctx := context.Background()
	if _, err := m.OpenSession(ctx, sqlsession.Open{ID: "ses_held", Source: "db", Owner: "tok_a", Principal: &posternv1.Principal{TokenId: "tok_a", Role: "analyst"}}); err != nil {
		fmt.Println(err)
		return 1
	}
	for i, sql := range []string{"create temp table scratch as select 42 as i", "set time zone 'Asia/Tokyo'", "select count(*) from generate_series(1, 10000000000) held"} {
		r := request(sql)
		r.QueryID, r.Owner, r.Session, r.ReadWrite = fmt.Sprintf("held_%d", i), "tok_a", "ses_held", true
		if _, err := m.Run(ctx, r, io.Discard); err != nil {
			fmt.Println(err)
		}
	}
	return 1
}

// TestHeldThroughKill: agentd is killed while a session of its runs a statement. The
// statement is cancelled, the session goes on with the next agentd.
func TestHeldThroughKill(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command("/proc/self/exe", helperHoldArg)
	cmd.Stdin = strings.NewReader(server.DSN("reader", pgserver.Superuser) + "\n" + readerPassword + "\n" + dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // should the test fail before it does
	active := func() string {
		return one(t, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND query LIKE '%10000000000) held' AND state = 'active'")
	}
	within(t, 90*time.Second, "the statement to run", func() bool { return active() == "1" })
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()

	m := newManager(t, sqlsession.Config{Hold: dir, Warm: -1})
	var taken []sqlsession.Open
	ended := make(chan string, 1)
	n := m.Resume(func(o sqlsession.Open, lost string) func(string, uint64) {
		if lost != "" {
			t.Errorf("lost: %s", lost)
		}
		taken = append(taken, o)
		return func(reason string, _ uint64) { ended <- reason }
	})
	if n != 1 || len(taken) != 1 || taken[0].ID != "ses_held" || taken[0].Owner != "tok_a" || taken[0].Principal.GetRole() != "analyst" {
		t.Fatalf("taken up: %d, %v", n, taken)
	}
	if got := active(); got != "0" {
		t.Errorf("the statement was not cancelled: %s", got)
	}
	name := strings.TrimSuffix(filepath.Base(firstOf(t, dir, "*.json")), ".json")
	group := func() []string {
		return cgroup.Find(cgroup.SQL, sqlsession.GroupPrefix(dir)+name, cgroup.Limits{Memory: 1, PIDs: 1}).Paths()
	}
	if have, err := cgroup.Controllers(); os.Geteuid() == 0 && err == nil && slices.Contains(have, cgroup.PIDs) && len(group()) == 0 {
		t.Error("the session is in no group any more")
	}
	s := &stay{t: t, m: m, owner: "tok_a", source: "db", id: "ses_held", ended: ended}
	if got := s.value("select i from scratch", "none"); got != "42" {
		t.Errorf("the temporary table holds %s", got)
	}
	if got := s.value("show time zone", "none"); got != "Asia/Tokyo" {
		t.Errorf("the setting is %s", got)
	}
	other := request("select 1")
	other.Owner, other.Session = "tok_b", "ses_held"
	if _, err := m.Run(t.Context(), other, new(bytes.Buffer)); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("somebody else's statement: %v", err)
	}
	if err := m.CloseSession("ses_held", "tok_a", "done"); err != nil {
		t.Error(err)
	}
	s.wantEnd("done")
	eventually(t, "the session's files to be gone", func() bool { return len(files(t, dir)) == 0 })
	eventually(t, "its groups to be gone", func() bool { return len(group()) == 0 })
	eventually(t, "its connection to be gone", func() bool {
		return one(t, "SELECT count(*) FROM pg_class WHERE relname = 'scratch'") == "0"
	})
}

// firstOf is a file of dir that pattern matches.
func firstOf(t *testing.T, dir, pattern string) string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(all) == 0 {
		t.Fatalf("%s in %s: %v", pattern, dir, err)
	}
	return all[0]
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// closed ends a Manager as agentd does that is restarted.
func closed(t *testing.T, m *sqlsession.Manager) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := m.Close(ctx); err != nil {
		t.Fatal(err)
	}
}

// before is a Manager that the test closes itself.
func before(config sqlsession.Config, sources ...sqlsession.Source) *sqlsession.Manager {
	config.Parser, config.Warm = parser, -1
	m := sqlsession.New(config)
	m.SetSources(sources)
	return m
}

// TestHeldThroughRestart: a planned restart leaves an open transaction alone, several
// times.
func TestHeldThroughRestart(t *testing.T) {
	dir := t.TempDir()
	config := sqlsession.Config{Hold: dir}
	m := before(config, source("db"))
	s := openSession(t, m, "tok_a", "db")
	s.run("begin", "open")
	s.run("create temp table counted as select 0 as n", "open")
	for i := 1; i <= 3; i++ {
		closed(t, m)
		select {
		case reason := <-s.ended:
			t.Fatalf("the session ended: %s", reason)
		default:
		}
		var next *sqlsession.Manager
		if i == 3 {
			next = newManager(t, config)
		} else {
			next = before(config, source("db"))
		}
		if n := next.Resume(func(o sqlsession.Open, lost string) func(string, uint64) {
			if o.ID != s.id || lost != "" {
				t.Errorf("got %v, lost: %q", o, lost)
			}
			return func(r string, _ uint64) { s.ended <- r }
		}); n != 1 {
			t.Fatalf("restart %d: %d sessions are open", i, n)
		}
		m, s.m = next, next
		if list := m.Sessions(); len(list) != 1 || list[0].Transaction != "open" || list[0].Statements == 0 {
			t.Errorf("sessions: %v", list)
		}
		s.run("update counted set n = n + 1", "open")
	}
	if got := s.value("select n from counted", "open"); got != "3" {
		t.Errorf("the transaction holds %s", got)
	}
	s.run("commit", "none")
	if err := m.CloseSession(s.id, s.owner, "done"); err != nil {
		t.Error(err)
	}
	s.wantEnd("done")
}

// TestHeldEnds: what a session must not outlive.
func TestHeldEnds(t *testing.T) {
	changed := source("db")
	changed.MaxRows = 7
	for name, tt := range map[string]struct {
		sources []sqlsession.Source
		grace   time.Duration
		spoil   func(t *testing.T, dir string)
		says    string
	}{
		"its source is gone":         {sources: []sqlsession.Source{source("other")}, says: "removed or changed"},
		"its source's rules changed": {sources: []sqlsession.Source{changed}, says: "policy"},
		"nobody came in time": {grace: 50 * time.Millisecond, says: "did not outlive", spoil: func(t *testing.T, _ string) {
			t.Helper()
			gone(t)
		}},
		"its process was killed": {says: "did not outlive", spoil: func(t *testing.T, _ string) {
			t.Helper()
			one(t, "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'reader'")
			gone(t)
		}},
		"another version": {says: "version", spoil: func(t *testing.T, dir string) {
			t.Helper()
			edit(t, dir, "Version", 99)
		}},
		"a slot that is not ours": {says: "user ids", spoil: func(t *testing.T, dir string) {
			t.Helper()
			edit(t, dir, "Slot", -3)
			one(t, "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'reader'")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			m := before(sqlsession.Config{Hold: dir, HoldGrace: tt.grace}, source("db"))
			s := openSession(t, m, "tok_a", "db")
			s.run("create temp table heldends as select 1", "none")
			closed(t, m)
			if tt.spoil != nil {
				tt.spoil(t, dir)
			}
			if tt.sources == nil {
				tt.sources = []sqlsession.Source{source("db")}
			}
			m = newManager(t, sqlsession.Config{Hold: dir}, tt.sources...)
			var why string
			if n := m.Resume(func(_ sqlsession.Open, lost string) func(string, uint64) { why = lost; return nil }); n != 0 || !strings.Contains(why, tt.says) {
				t.Errorf("%d sessions are open, lost: %q", n, why)
			}
			if left := files(t, dir); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
			s.m = m
			if _, err := m.Run(t.Context(), s.request("select 1"), new(bytes.Buffer)); proto.CodeOf(err) != proto.CodeNotFound || (tt.sources[0].Name == "db" && !strings.Contains(err.Error(), why)) {
				t.Errorf("the next statement: %v", err)
			}
			gone(t)
		})
	}
}

// gone waits until no session of TestHeldEnds has a connection.
func gone(t *testing.T) {
	t.Helper()
	eventually(t, "the session's connection to be gone", func() bool {
		return one(t, "SELECT count(*) FROM pg_class WHERE relname = 'heldends'") == "0"
	})
}

// edit changes a description.
func edit(t *testing.T, dir, key string, value any) {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil || len(all) != 1 {
		t.Fatalf("descriptions: %v, %v", all, err)
	}
	text, err := os.ReadFile(all[0])
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), readerPassword) {
		t.Error("the description holds the password")
	}
	f := map[string]any{}
	if err := json.Unmarshal(text, &f); err != nil {
		t.Fatal(err)
	}
	f[key] = value
	if text, err = json.Marshal(f); err == nil {
		err = os.WriteFile(all[0], text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestHoldImpossible: where nothing can be held, statements and sessions run as ever.
func TestHoldImpossible(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m := before(sqlsession.Config{Hold: filepath.Join(file, "below"), Logger: quietLog(t)}, source("db"))
	s := openSession(t, m, "tok_a", "db")
	s.run("begin", "open")
	closed(t, m)
	if reason := <-s.ended; reason != "agentd stopped" {
		t.Errorf("it ended as %q", reason)
	}
}
