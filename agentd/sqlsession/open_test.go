package sqlsession_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// openSession opens a session for an owner on a source.
func openSession(t testing.TB, m *sqlsession.Manager, owner, source string) *stay {
	t.Helper()
	s := &stay{t: t, m: m, owner: owner, source: source, id: fmt.Sprintf("ses_%d", queryNumber.Add(1)), ended: make(chan string, 1)}
	_, err := m.OpenSession(t.Context(), sqlsession.Open{
		ID: s.id, Source: source, Owner: owner, Ended: func(reason string, _ uint64) { s.ended <- reason },
	})
	if err != nil {
		t.Fatalf("open a session: %v", err)
	}
	return s
}

// stay is a session that stays, in a test.
type stay struct {
	t                 testing.TB
	m                 *sqlsession.Manager
	owner, source, id string
	ended             chan string
}

func (s *stay) request(sql string) sqlsession.Request {
	r := request(sql)
	r.Owner, r.Source, r.Session = s.owner, s.source, s.id
	r.ReadWrite = s.source != "ro"
	return r
}

// run runs a statement that must succeed; the transaction must be as told then.
func (s *stay) run(sql, transaction string) table {
	s.t.Helper()
	got, outcome := query(s.t, s.m, s.request(sql))
	if outcome.Transaction != transaction {
		s.t.Fatalf("%s: the transaction is %q, want %q", sql, outcome.Transaction, transaction)
	}
	return got
}

// value runs a statement with one value.
func (s *stay) value(sql, transaction string) string {
	s.t.Helper()
	got := s.run(sql, transaction)
	if len(got.rows) != 1 || len(got.rows[0]) == 0 {
		s.t.Fatalf("%s: got %v, want one row", sql, got.rows)
	}
	return got.rows[0][0]
}

// fails runs a statement that must fail with a code and words.
func (s *stay) fails(sql string, code proto.Code, says, transaction string) *proto.Error {
	s.t.Helper()
	outcome, err := s.m.Run(s.t.Context(), s.request(sql), new(bytes.Buffer))
	var e *proto.Error
	if !errors.As(err, &e) || e.Code != code || !strings.Contains(e.Error(), says) {
		s.t.Fatalf("%s: got %v, want %v with %q", sql, err, code, says)
	}
	if outcome.Transaction != transaction {
		s.t.Fatalf("%s: the transaction is %q, want %q", sql, outcome.Transaction, transaction)
	}
	return e
}

func (s *stay) wantEnd(says string) {
	s.t.Helper()
	select {
	case reason := <-s.ended:
		if !strings.Contains(reason, says) {
			s.t.Fatalf("the session ended as %q, want %q", reason, says)
		}
	case <-time.After(2 * time.Minute):
		s.t.Fatalf("the session has not ended")
	}
	s.fails("select 1", proto.CodeNotFound, says, "")
}

// both are the shared server as a read-write and a read-only source.
func both() []sqlsession.Source {
	ro := source("ro")
	ro.ReadWrite = false
	return []sqlsession.Source{source("db"), ro}
}

func TestSessionKeeps(t *testing.T) {
	m := newManager(t, sqlsession.Config{}, both()...)
	cleanUp(t, "DROP TABLE IF EXISTS kept")
	a, b := openSession(t, m, "tok_a", "db"), openSession(t, m, "tok_a", "db")

	a.run("CREATE TEMP TABLE scratch (i int)", "none")
	a.run("INSERT INTO scratch VALUES (1), (2)", "none")
	if got := a.value("SELECT sum(i) FROM scratch", "none"); got != "3" {
		t.Errorf("the temporary table has %s, want 3", got)
	}
	b.fails("SELECT * FROM scratch", proto.CodeSQL, "42P01", "none")

	a.run("SET TIME ZONE 'Asia/Tokyo'", "none")
	a.run("set search_path to public, pg_temp", "none")
	if got := a.value("SELECT current_setting('TimeZone') || ' ' || current_setting('search_path')", "none"); got != "Asia/Tokyo public, pg_temp" {
		t.Errorf("the settings are %s", got)
	}
	if got := b.value("SHOW search_path", "none"); got != `"$user", public` {
		t.Errorf("another session's search_path is %s", got)
	}

	a.run("BEGIN ISOLATION LEVEL REPEATABLE READ", "open")
	a.run("CREATE TABLE kept (i int)", "open")
	a.run("SAVEPOINT one", "open")
	a.run("INSERT INTO kept VALUES (1)", "open")
	a.fails("INSERT INTO kept VALUES ('x')", proto.CodeSQL, "22P02", "failed")
	a.fails("SELECT 1", proto.CodeSQL, "25P02", "failed")
	a.run("ROLLBACK TO one", "open")
	a.run("INSERT INTO kept VALUES (7)", "open")
	b.fails("SELECT * FROM kept", proto.CodeSQL, "42P01", "none")
	a.run("COMMIT", "none")
	if got := b.value("SELECT i FROM kept", "none"); got != "7" {
		t.Errorf("committed: got %s, want 7", got)
	}

	a.run("PREPARE add (int) AS INSERT INTO kept VALUES ($1) RETURNING i", "none")
	if got := a.value("EXECUTE add(42)", "none"); got != "42" {
		t.Errorf("EXECUTE: got %s, want 42", got)
	}
	a.run("DEALLOCATE add", "none")
	a.fails("EXECUTE add(42)", proto.CodeSQL, "26000", "none")

	a.fails("DECLARE c CURSOR FOR SELECT 1", proto.CodeSQL, "25P01", "none")
	a.run("BEGIN", "open")
	r := a.request("DECLARE c SCROLL CURSOR FOR SELECT id FROM things WHERE id > {{n}} ORDER BY id")
	n := "10"
	r.Parameters = []*posternv1.Parameter{{Name: "n", Value: &n}}
	query(t, m, r)
	if got := a.run("FETCH 3 FROM c", "open"); len(got.rows) != 3 || got.rows[0][0] != "11" {
		t.Errorf("FETCH: got %v", got.rows)
	}
	a.run("MOVE FORWARD 100 FROM c", "open")
	if got := a.value("FETCH c", "open"); got != "114" {
		t.Errorf("FETCH after MOVE: got %s, want 114", got)
	}
	a.run("CLOSE c", "open")
	a.run("ROLLBACK", "none")

	// Statements one by one are as ever, and see nothing of it.
	refuse(t, m, request("BEGIN"), proto.CodePolicyDenied)
	refuse(t, m, request("SELECT * FROM scratch"), proto.CodeSQL)

	a.run("SET statement_timeout = '50ms'", "none")
	a.fails("SELECT pg_sleep(10)", proto.CodeTimeout, "50ms", "none")
	a.run("RESET statement_timeout", "none")
	a.run("DISCARD ALL", "none")
	if got := a.value("SHOW TimeZone", "none"); got == "Asia/Tokyo" {
		t.Error("DISCARD ALL left the time zone")
	}
	if err := m.CloseSession(b.id, "tok_b", "x"); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("another owner closes it: got %v, want NOT_FOUND", err)
	}
	if err := m.CloseSession(b.id, "tok_a", "closed by its owner"); err != nil {
		t.Fatal(err)
	}
	b.wantEnd("closed by its owner")
	eventually(t, "the backend to go", func() bool {
		return one(t, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'postern db' AND usename = 'reader' AND query LIKE '%kept%' AND state <> 'idle'") == "0"
	})
}

func TestSessionReadOnly(t *testing.T) {
	m := newManager(t, sqlsession.Config{}, both()...)
	before := one(t, "SELECT count(*)::text || max(name) FROM things")
	s := openSession(t, m, "tok_a", "ro")
	s.run("START TRANSACTION ISOLATION LEVEL SERIALIZABLE DEFERRABLE", "open")
	if got := s.value("SHOW transaction_read_only", "open"); got != "on" {
		t.Fatalf("transaction_read_only is %s", got)
	}
	if got := s.value("SHOW transaction_isolation", "open"); got != "serializable" {
		t.Errorf("transaction_isolation is %s", got)
	}
	for _, attack := range []string{
		"DELETE FROM things", "WITH d AS (DELETE FROM things RETURNING 1) SELECT * FROM d", "SET TRANSACTION READ WRITE", "SET transaction_read_only = off",
		"SET LOCAL transaction_read_only TO off", "SELECT set_config('transaction_read_only', 'off', true)", "COMMIT; DELETE FROM things", "SELECT 1; DELETE FROM things",
		"PREPARE p AS DELETE FROM things", "DECLARE c CURSOR FOR DELETE FROM things RETURNING 1", "LOCK TABLE things", "COPY things TO STDOUT",
		"PREPARE p AS SELECT pg_terminate_backend(1)", "DECLARE c CURSOR FOR SELECT lo_unlink(1)", "SET ROLE postgres", "SET SESSION AUTHORIZATION postgres",
		"LISTEN x", "NOTIFY x", "DO $$ BEGIN DELETE FROM things; END $$", "EXPLAIN ANALYZE DELETE FROM things", "CALL p()", "SELECT * INTO x FROM things",
		"SELECT 1 FROM things FOR UPDATE",
	} {
		_, err := m.Run(t.Context(), s.request(attack), new(bytes.Buffer))
		if code := proto.CodeOf(err); code != proto.CodePolicyDenied && code != proto.CodeSQL {
			t.Errorf("%s: got %v, want a refusal", attack, err)
		}
		// Whatever it was, the transaction has failed and is still read only.
		s.fails("SELECT 1", proto.CodeSQL, "25P02", "failed")
		s.run("ROLLBACK", "none")
		if got := s.run("BEGIN", "open"); len(got.rows) != 0 {
			t.Fatal("BEGIN has rows")
		}
		if got := s.value("SHOW transaction_read_only", "open"); got != "on" {
			t.Fatalf("%s: transaction_read_only is %s", attack, got)
		}
	}
	s.run("COMMIT", "none")
	s.fails("BEGIN READ WRITE", proto.CodePolicyDenied, "position 7", "none")
	s.fails("DELETE FROM things", proto.CodePolicyDenied, "read-only", "none")
	s.fails("SET default_transaction_read_only = off", proto.CodePolicyDenied, "can't be set", "none")
	s.run("PREPARE q (int) AS SELECT $1 + 1", "none")
	if got := s.value("EXECUTE q(1)", "none"); got != "2" {
		t.Errorf("EXECUTE: got %s, want 2", got)
	}
	s.fails("PREPARE l AS SELECT 1 FROM things FOR UPDATE", proto.CodePolicyDenied, "read-only", "none")
	s.fails("EXECUTE l", proto.CodeSQL, "does not exist", "none")
	s.run("SET DateStyle = 'German'", "none")
	if got := s.value("SELECT ARRAY['2026-11-22'::date]::text", "none"); got != "{22.11.2026}" {
		t.Errorf("a setting does not stay: %s", got)
	}
	if after := one(t, "SELECT count(*)::text || max(name) FROM things"); after != before {
		t.Errorf("the table was %s and is %s", before, after)
	}
}

func TestSessionCancelKeepsIt(t *testing.T) {
	m := newManager(t, sqlsession.Config{}, both()...)
	s := openSession(t, m, "tok_a", "db")
	s.run("CREATE TEMP TABLE scratch AS SELECT 1 i", "none")
	for _, explicit := range []bool{false, true} {
		want := "none"
		if explicit {
			s.run("BEGIN", "open")
			want = "failed"
		}
		r := s.request("SELECT pg_sleep(60)")
		done := make(chan *posternv1.QueryOutcome, 1)
		go func() {
			outcome, _ := m.Run(context.Background(), r, new(bytes.Buffer))
			done <- outcome
		}()
		eventually(t, "the statement to run", func() bool {
			return one(t, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)' AND state = 'active' AND pid <> pg_backend_pid()") != "0"
		})
		s.fails("SELECT 1", proto.CodeOverloaded, "one statement at a time", "")
		if !m.Cancel(r.QueryID) {
			t.Fatal("nothing to cancel")
		}
		if outcome := <-done; outcome.Error.GetCode() != proto.CodeCancelled || outcome.Transaction != want {
			t.Fatalf("got %v, want a cancelled statement and a transaction %s", outcome, want)
		}
		if explicit {
			s.run("ROLLBACK", "none")
		}
		for range 20 { // a late cancel would hit one of these
			if got := s.value("SELECT i FROM scratch", "none"); got != "1" {
				t.Fatalf("got %s from the temporary table", got)
			}
		}
	}
	// A limit in the middle is a failure of the transaction, too.
	s.run("BEGIN", "open")
	r := s.request("SELECT generate_series(1, 100000)")
	r.MaxRows = 10
	outcome, err := m.Run(t.Context(), r, new(bytes.Buffer))
	if proto.CodeOf(err) != proto.CodeRowLimit || outcome.Transaction != "failed" || outcome.Rows != 10 {
		t.Errorf("got %v, %v, want ROW_LIMIT and a failed transaction", outcome, err)
	}
	s.run("ROLLBACK", "none")
}

func TestSessionEnds(t *testing.T) {
	m := newManager(t, sqlsession.Config{IdleTransaction: 2 * time.Second, SessionsPerOwner: 3}, both()...)
	t.Run("idle transaction", func(t *testing.T) {
		s := openSession(t, m, "tok_a", "db")
		cleanUp(t, "DELETE FROM things WHERE id > 1000")
		s.run("BEGIN", "open")
		s.run("INSERT INTO things VALUES (1001, 'never')", "open")
		eventually(t, "the rollback", func() bool { return m.Sessions()[0].Transaction == "failed" })
		s.fails("INSERT INTO things VALUES (1002, 'outside')", proto.CodeSQL, "idle for too long", "failed")
		s.run("COMMIT", "none")
		if got := s.value("SELECT count(*) FROM things WHERE id > 1000", "none"); got != "0" {
			t.Errorf("%s rows are there", got)
		}
		m.CloseSessions("tok_a", "done")
		s.wantEnd("done")
	})
	t.Run("idle session", func(t *testing.T) {
		s := &stay{t: t, m: m, owner: "tok_a", source: "db", id: "ses_idle", ended: make(chan string, 1)}
		if _, err := m.OpenSession(t.Context(), sqlsession.Open{ID: s.id, Source: "db", Owner: "tok_a", IdleTimeout: 300 * time.Millisecond, Ended: func(r string, _ uint64) { s.ended <- r }}); err != nil {
			t.Fatal(err)
		}
		s.wantEnd("idle for 300ms")
	})
	t.Run("killed backend", func(t *testing.T) {
		s := openSession(t, m, "tok_a", "db")
		pid := s.value("SELECT pg_backend_pid()", "none")
		one(t, "SELECT pg_terminate_backend("+pid+")")
		s.wantEnd("lost")
	})
	t.Run("killed in a statement", func(t *testing.T) {
		s := openSession(t, m, "tok_a", "db")
		s.run("BEGIN", "open")
		pid := s.value("SELECT pg_backend_pid()", "open")
		go func() {
			for {
				if one(t, "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND pid = "+pid) == "1" {
					one(t, "SELECT pg_terminate_backend("+pid+")")
					return
				}
			}
		}()
		s.fails("SELECT pg_sleep(30)", proto.CodeSQL, "the session has ended", "ended")
		s.wantEnd("broke off")
	})
	t.Run("another owner", func(t *testing.T) {
		s := openSession(t, m, "tok_a", "db")
		other := *s
		other.owner = "tok_b"
		other.fails("SELECT 1", proto.CodeNotFound, "no session", "")
		other = *s
		other.source = "ro"
		other.fails("SELECT 1", proto.CodeNotFound, "no session", "")
		m.CloseSessions("tok_a", "revoked")
		s.wantEnd("revoked")
	})
	t.Run("bounds", func(t *testing.T) {
		var all []*stay
		for range 3 {
			all = append(all, openSession(t, m, "tok_a", "db"))
		}
		_, err := m.OpenSession(t.Context(), sqlsession.Open{ID: "ses_more", Source: "db", Owner: "tok_a"})
		if proto.CodeOf(err) != proto.CodeOverloaded {
			t.Errorf("a fourth: got %v, want OVERLOADED", err)
		}
		if n := m.CloseSessions("tok_a", "over"); n != 3 {
			t.Errorf("closed %d, want 3", n)
		}
		for _, s := range all {
			s.wantEnd("over")
		}
		for range 3 {
			openSession(t, m, "tok_b", "db").value("SELECT 1", "none")
		}
		m.CloseSessions("tok_b", "over")
		if _, err := m.OpenSession(t.Context(), sqlsession.Open{ID: "x", Source: "nope", Owner: "tok_a"}); proto.CodeOf(err) != proto.CodeNotFound {
			t.Errorf("an unknown source: got %v, want NOT_FOUND", err)
		}
	})
}

// A policy that changes ends the sessions that were opened under the old one: at
// once those that are idle, after their statement the others.
func TestSessionPolicyChange(t *testing.T) {
	sources := both()
	sources[0].Concurrency = 3
	m := newManager(t, sqlsession.Config{}, sources...)
	idle, busy := openSession(t, m, "tok_a", "db"), openSession(t, m, "tok_a", "db")
	if _, err := m.OpenSession(t.Context(), sqlsession.Open{ID: "more", Source: "db", Owner: "tok_b"}); proto.CodeOf(err) != proto.CodeOverloaded {
		t.Errorf("all places but one are taken: got %v, want OVERLOADED", err)
	}
	query(t, m, request("SELECT 1")) // there is a place for others
	r := busy.request("SELECT pg_sleep(0.5)")
	done := make(chan error, 1)
	outcome := &posternv1.QueryOutcome{}
	go func() {
		var err error
		outcome, err = m.Run(context.Background(), r, new(bytes.Buffer))
		done <- err
	}()
	eventually(t, "the statement to run", func() bool { return len(m.Running()) == 1 })
	m.SetSources(sources) // nothing has changed
	if n := len(m.Sessions()); n != 2 {
		t.Fatalf("%d sessions after a reload without a change, want 2", n)
	}
	sources = both()
	sources[0].MaxRows = 77
	m.SetSources(sources)
	idle.wantEnd("policy")
	if err := <-done; err != nil || outcome.Transaction != "ended" {
		t.Errorf("the statement under way: got %v, %v", outcome, err)
	}
	busy.wantEnd("policy")
	again := openSession(t, m, "tok_a", "ro")
	m.SetSources(sources[:1])
	if reason := <-again.ended; !strings.Contains(reason, "removed") {
		t.Errorf("the session of a removed source ended as %q", reason)
	}
}

// Many statements in one session leave nothing behind.
func TestSessionManyStatements(t *testing.T) {
	m := newManager(t, sqlsession.Config{}, both()...)
	s := openSession(t, m, "tok_a", "db")
	n := 2000
	if testing.Short() {
		n = 200
	}
	for i := range n {
		switch i % 4 {
		case 0:
			s.run("BEGIN", "open")
		case 3:
			s.run("COMMIT", "none")
		default:
			s.run("SELECT i FROM generate_series(1, 10) i", "open")
		}
	}
	if got := s.value("SELECT count(*) FROM pg_prepared_statements WHERE name NOT LIKE 'postern%'", "none"); got != "0" {
		t.Errorf("%s prepared statements are left", got)
	}
}

// Many statements in one session leave its process as large as it was.
func TestSessionMemoryStaysFlat(t *testing.T) {
	m := newManager(t, sqlsession.Config{Warm: -1}, both()...)
	s := openSession(t, m, "tok_a", "ro")
	eventually(t, "one process", func() bool { return len(sessionProcesses(os.Getpid())) == 1 })
	pid := sessionProcesses(os.Getpid())[0]
	statements := func(n int) {
		for i := range n {
			s.run(fmt.Sprintf("SELECT %d", i), "none")
		}
	}
	statements(4000) // what it remembers of texts is full by then
	before := peak(t, pid)
	n := 10_000
	if raceEnabled {
		n = 2000
	}
	statements(n)
	if after := peak(t, pid); after > before+8<<10 {
		t.Errorf("the process had %d KiB at its peak after 4,000 statements and %d after %d more", before, after, n)
	}
}

// TestSessionQuestionsInTransactions: what is asked of the catalog in a transaction of
// the user's leaves it as it was.
func TestSessionQuestionsInTransactions(t *testing.T) {
	if err := server.SQL(t.Context(), "CREATE VIEW asked AS SELECT upper(name) AS name FROM things", "GRANT SELECT ON asked TO reader"); err != nil {
		t.Fatal(err)
	}
	cleanUp(t, "DROP VIEW asked")
	m := newManager(t, sqlsession.Config{})
	s := openSession(t, m, "tok_a", "db")
	s.run("BEGIN", "open")
	s.run("SET LOCAL jit = on", "open")
	s.run("INSERT INTO things VALUES (100001, 'x')", "open")
	s.run("SAVEPOINT mine", "open")
	s.run("INSERT INTO things VALUES (100002, 'y')", "open")
	if got := s.value("SELECT count(*) FROM asked WHERE name IN ('X', 'Y')", "open"); got != "2" {
		t.Errorf("got %s rows, want the transaction's own 2", got)
	}
	if got := s.value("SHOW jit", "open"); got != "on" {
		t.Errorf("jit is %s, want the user's on", got)
	}
	s.run("ROLLBACK TO SAVEPOINT mine", "open")
	if got := s.value("SELECT count(*) FROM asked WHERE name IN ('X', 'Y') AND true", "open"); got != "1" {
		t.Errorf("got %s rows after the rollback to a savepoint, want 1", got)
	}
	s.run("ROLLBACK", "none")
	if got := s.value("SELECT count(*) FROM asked WHERE name IN ('X', 'Y') AND 1 = 1", "none"); got != "0" {
		t.Errorf("got %s rows, want none", got)
	}
}
