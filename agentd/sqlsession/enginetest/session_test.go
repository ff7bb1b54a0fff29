package enginetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// stay is a session that stays open, in a test.
type stay struct {
	t     testing.TB
	m     *sqlsession.Manager
	id    string
	write bool
	ended chan string
}

func openSession(t testing.TB, m *sqlsession.Manager, write bool) *stay {
	t.Helper()
	s := &stay{t: t, m: m, write: write, id: fmt.Sprintf("ses_%d", number.Add(1)), ended: make(chan string, 1)}
	if _, err := m.OpenSession(t.Context(), sqlsession.Open{ID: s.id, Source: "db", Owner: "tok_a", Ended: func(reason string, _ uint64) { s.ended <- reason }}); err != nil {
		t.Fatalf("open a session: %v", err)
	}
	return s
}

func (s *stay) request(text string) sqlsession.Request {
	r := request(text)
	r.Session, r.ReadWrite = s.id, s.write
	return r
}

// run runs a statement that must succeed; the transaction must be as told then.
func (s *stay) run(text, transaction string) (table, *posternv1.QueryOutcome) {
	s.t.Helper()
	got, outcome := query(s.t, s.m, s.request(text))
	if outcome.Transaction != transaction {
		s.t.Fatalf("%s: the transaction is %q, want %q", text, outcome.Transaction, transaction)
	}
	return got, outcome
}

// value runs a statement with one value.
func (s *stay) value(text, transaction string) string {
	s.t.Helper()
	got, _ := s.run(text, transaction)
	if len(got.rows) != 1 || len(got.rows[0]) == 0 {
		s.t.Fatalf("%s: got %v, want one row", text, got.rows)
	}
	return got.rows[0][0]
}

// fails runs a statement that must fail with a code and words.
func (s *stay) fails(text string, code proto.Code, says, transaction string) {
	s.t.Helper()
	_, outcome, err := try(s.t, s.m, s.request(text))
	var e *proto.Error
	if !errors.As(err, &e) || e.Code != code || !strings.Contains(e.Error(), says) {
		s.t.Fatalf("%s: got %v, want %v with %q", text, err, code, says)
	}
	if outcome.Transaction != transaction {
		s.t.Fatalf("%s: the transaction is %q, want %q", text, outcome.Transaction, transaction)
	}
}

func (s *stay) wantEnd(says string) {
	s.t.Helper()
	select {
	case reason := <-s.ended:
		if !strings.Contains(reason, says) {
			s.t.Fatalf("the session ended as %q, want %q", reason, says)
		}
	case <-time.After(2 * time.Minute):
		s.t.Fatal("the session has not ended")
	}
}

// dialect are the phrases of sessions.
func (db *database) dialect(postgres, mysql, sqlite string) string {
	return map[string]string{"postgres": postgres, "mysql": mysql, "sqlite": sqlite}[db.engine]
}

// A transaction, temporary tables and settings stay for their owner, and for nobody else.
func TestSessionKeeps(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		m := db.open(t, readWrite)
		a, b := openSession(t, m, true), openSession(t, m, true)
		a.run(db.dialect("CREATE TEMP TABLE scratch (i int)", "CREATE TEMPORARY TABLE scratch (i int)", "CREATE TEMP TABLE scratch (i int)"), "none")
		a.run("INSERT INTO scratch VALUES (1), (2)", "none")
		if got := a.value("SELECT SUM(i) FROM scratch", "none"); got != "3" {
			t.Errorf("the temporary table has %s, want 3", got)
		}
		b.fails("SELECT * FROM scratch", proto.CodeSQL, "scratch", "none")
		refuse(t, m, request("SELECT * FROM scratch"), proto.CodeSQL)

		set, show := db.dialect("SET extra_float_digits = 0", "SET SESSION group_concat_max_len = 77", "PRAGMA reverse_unordered_selects = on"),
			db.dialect("SHOW extra_float_digits", "SELECT @@group_concat_max_len", "PRAGMA reverse_unordered_selects")
		want := db.dialect("0", "77", "1")
		a.run(set, "none")
		if got := a.value(show, "none"); got != want {
			t.Errorf("the setting is %s, want %s", got, want)
		}
		if got := b.value(show, "none"); got == want {
			t.Error("another session has the setting")
		}

		_, outcome := a.run("BEGIN", "open")
		if outcome.CommandTag != "BEGIN" {
			t.Errorf("got tag %q", outcome.CommandTag)
		}
		a.run("INSERT INTO things VALUES (6001, 'one')", "open")
		a.run("SAVEPOINT s", "open")
		a.run("INSERT INTO things VALUES (6002, 'two')", "open")
		a.run("ROLLBACK TO SAVEPOINT s", "open")
		a.run("RELEASE SAVEPOINT s", "open")
		if db.engine != "sqlite" { // readers and a writer
			if got := b.value("SELECT COUNT(*) FROM things WHERE id > 6000", "none"); got != "0" {
				t.Errorf("another session sees %s rows before COMMIT", got)
			}
		}
		if got := a.value("SELECT COUNT(*) FROM things WHERE id > 6000", "open"); got != "1" {
			t.Errorf("the session sees %s rows of its own, want 1", got)
		}
		a.run("COMMIT", "none")
		if got := b.value("SELECT name FROM things WHERE id > 6000", "none"); got != "one" {
			t.Errorf("after COMMIT: got %s", got)
		}
		a.run("BEGIN", "open")
		a.run("DELETE FROM things WHERE id > 6000", "open")
		a.run("ROLLBACK", "none")
		if got := b.value("SELECT COUNT(*) FROM things WHERE id > 6000", "none"); got != "1" {
			t.Errorf("after ROLLBACK: got %s rows, want 1", got)
		}
		a.run("DELETE FROM things WHERE id > 6000", "none")
		a.fails("SAVEPOINT x", proto.CodeSQL, "25P01", "none")
		a.run("COMMIT", "none")

		// One by one as ever.
		r := request("BEGIN")
		r.ReadWrite = true
		refuse(t, m, r, proto.CodePolicyDenied)
		if err := m.CloseSession(b.id, "tok_b", "x"); proto.CodeOf(err) != proto.CodeNotFound {
			t.Errorf("another owner closes it: got %v, want NOT_FOUND", err)
		}
		for _, s := range []*stay{a, b} {
			if err := m.CloseSession(s.id, "tok_a", "closed by its owner"); err != nil {
				t.Fatal(err)
			}
			s.wantEnd("closed by its owner")
			s.fails("SELECT 1", proto.CodeNotFound, "closed by its owner", "")
		}
	})
}

// Cancelling ends the statement and not the session; so does a limit. Either ends a
// transaction, and nothing runs outside of it until the user says ROLLBACK.
func TestSessionCancel(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		m := db.open(t, readWrite)
		s := openSession(t, m, true)
		s.run(db.dialect("CREATE TEMP TABLE scratch (i int)", "CREATE TEMPORARY TABLE scratch (i int)", "CREATE TEMP TABLE scratch (i int)"), "none")
		s.run("INSERT INTO scratch VALUES (1)", "none")
		for _, explicit := range []bool{false, true} {
			want := "none"
			if explicit {
				s.run("BEGIN", "open")
				s.run("INSERT INTO things VALUES (7001, 'never')", "open")
				want = "failed"
			}
			r := s.request(db.slow)
			done := make(chan *posternv1.QueryOutcome, 1)
			go func() {
				outcome, _ := m.Run(context.Background(), r, new(bytes.Buffer))
				done <- outcome
			}()
			db.underWay(t, m, db.slow)
			s.fails("SELECT 1", proto.CodeOverloaded, "one statement at a time", "")
			if !m.Cancel(r.QueryID) {
				t.Fatal("nothing to cancel")
			}
			if outcome := <-done; outcome.Error.GetCode() != proto.CodeCancelled || outcome.Transaction != want {
				t.Fatalf("got %v, want a cancelled statement and a transaction %s", outcome, want)
			}
			if explicit {
				s.fails("INSERT INTO things VALUES (7002, 'outside')", proto.CodeSQL, "25P02", "failed")
				s.run("ROLLBACK", "none")
			}
			for range 20 { // a late cancel would hit one of these
				if got := s.value("SELECT i FROM scratch", "none"); got != "1" {
					t.Fatalf("got %s from the temporary table", got)
				}
			}
		}
		s.run("BEGIN", "open")
		r := s.request(db.series(100_000))
		r.MaxRows = 10
		_, outcome, err := try(t, m, r)
		if proto.CodeOf(err) != proto.CodeRowLimit || outcome.Transaction != "failed" || outcome.Rows != 10 {
			t.Errorf("got %v, %v, want ROW_LIMIT and a failed transaction", outcome, err)
		}
		s.run("COMMIT", "none")
		r = s.request("SELECT COUNT(*) FROM things a, things b, things c WHERE a.id + b.id + c.id < 0")
		r.Timeout = 500 * time.Millisecond
		if _, outcome, err := try(t, m, r); proto.CodeOf(err) != proto.CodeTimeout || outcome.Transaction != "none" {
			t.Errorf("got %v, %v, want TIMEOUT", outcome, err)
		}
		if got := s.value("SELECT COUNT(*) FROM things WHERE id > 7000", "none"); got != "0" {
			t.Errorf("%s rows are there", got)
		}
	})
}

// What a mode forbids stays forbidden in a session, also inside a transaction.
func TestSessionReadOnly(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		s := openSession(t, db.open(t), false)
		for _, begin := range []string{"", "BEGIN"} {
			for _, attack := range []string{
				"DELETE FROM things", "INSERT INTO things VALUES (8001, 'x')", "CREATE TABLE more (a int)", "DROP TABLE things", "BEGIN; DELETE FROM things", "COMMIT; DELETE FROM things",
				db.dialect("CREATE TEMP TABLE s (i int)", "CREATE TEMPORARY TABLE s (i int)", "CREATE TEMP TABLE s (i int)"),
				db.dialect("SET transaction_read_only = off", "SET SESSION TRANSACTION READ WRITE", "PRAGMA query_only = off"),
				db.dialect("BEGIN READ WRITE", "START TRANSACTION READ WRITE", "BEGIN IMMEDIATE"),
			} {
				if begin != "" {
					s.run(begin, "open")
				}
				_, _, err := try(t, s.m, s.request(attack))
				if code := proto.CodeOf(err); code != proto.CodePolicyDenied && code != proto.CodeSQL {
					t.Errorf("%s %s: got %v, want a refusal", begin, attack, err)
				}
				if begin != "" {
					s.run("ROLLBACK", "none")
				}
			}
		}
		if got := s.value("SELECT COUNT(*) FROM things", "none"); got != "1000" {
			t.Errorf("got %s things, want 1000", got)
		}
	})
	each(t, func(t *testing.T, db *database) {
		m := db.open(t, metadata)
		_, err := m.OpenSession(t.Context(), sqlsession.Open{ID: "ses_m", Source: "db", Owner: "tok_a"})
		if proto.CodeOf(err) != proto.CodePolicyDenied {
			t.Errorf("mode metadata: got %v, want POLICY_DENIED", err)
		}
	})
}

func TestSessionEnds(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		source := db.source
		source.ReadWrite = true
		m := sqlsession.New(sqlsession.Config{Warm: -1, Parser: parser, IdleTransaction: 2 * time.Second, SessionsPerOwner: 2})
		m.SetSources([]sqlsession.Source{source})
		t.Cleanup(func() { _ = m.Close(context.Background()) })
		if db.engine == "postgres" {
			waitForParser(t, m)
		}
		s := openSession(t, m, true)
		s.run("BEGIN", "open")
		s.run("INSERT INTO things VALUES (9001, 'never')", "open")
		for deadline := time.Now().Add(2 * time.Minute); m.Sessions()[0].Transaction != "failed"; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the idle transaction was not rolled back")
			}
		}
		s.fails("INSERT INTO things VALUES (9002, 'outside')", proto.CodeSQL, "idle for too long", "failed")
		s.run("COMMIT", "none")
		if got := s.value("SELECT COUNT(*) FROM things WHERE id > 9000", "none"); got != "0" {
			t.Errorf("%s rows are there", got)
		}
		openSession(t, m, true)
		if _, err := m.OpenSession(t.Context(), sqlsession.Open{ID: "more", Source: "db", Owner: "tok_a"}); proto.CodeOf(err) != proto.CodeOverloaded {
			t.Errorf("a third: got %v, want OVERLOADED", err)
		}
		if db.kick != nil {
			if err := db.kick(); err != nil {
				t.Fatal(err)
			}
			s.wantEnd("lost")
			s.fails("SELECT 1", proto.CodeNotFound, "lost", "")
		}
		m.CloseSessions("tok_a", "over")
		s = openSession(t, m, true)
		s.run("BEGIN", "open")
		if db.kick != nil {
			result := make(chan error, 1)
			r := s.request(db.slow)
			go func() {
				_, err := m.Run(context.Background(), r, new(bytes.Buffer))
				result <- err
			}()
			db.underWay(t, m, db.slow)
			if err := db.kick(); err != nil {
				t.Fatal(err)
			}
			if err := <-result; err == nil || !strings.Contains(err.Error(), "the session has ended") {
				t.Errorf("killed in a statement: got %v", err)
			}
			s.wantEnd("broke off")
		}
		m.CloseSessions("tok_a", "over")
		id := fmt.Sprintf("ses_%d", number.Add(1))
		ended := make(chan string, 1)
		if _, err := m.OpenSession(t.Context(), sqlsession.Open{ID: id, Source: "db", Owner: "tok_a", IdleTimeout: 300 * time.Millisecond, Ended: func(reason string, _ uint64) { ended <- reason }}); err != nil {
			t.Fatal(err)
		}
		(&stay{t: t, m: m, id: id, ended: ended}).wantEnd("idle for 300ms")
	})
}
