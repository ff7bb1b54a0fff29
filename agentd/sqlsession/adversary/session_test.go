package adversary

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	posternproto "github.com/postern-dev/postern/proto"
)

// sessionAttacks are for sessions that stay open alone.
var sessionAttacks = []string{
	"BEGIN; SET TRANSACTION READ WRITE; DELETE FROM app.people; COMMIT",
	"BEGIN READ WRITE", "START TRANSACTION READ ONLY, READ WRITE", "begin /* */ read /* */ write", "BEGIN ISOLATION LEVEL SERIALIZABLE READ WRITE",
	"SET TRANSACTION READ WRITE", "SET transaction_read_only = off", "SET LOCAL transaction_read_only TO 'off'", `SET "transaction_read_only" = off`,
	`SET U&"transaction\005fread_only" = off`, "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE", "SET default_transaction_read_only = off",
	"RESET default_transaction_read_only", "RESET transaction_read_only", "RESET ALL", "DISCARD ALL", "SET SESSION AUTHORIZATION DEFAULT", "SET ROLE NONE", "RESET ROLE",
	"SELECT set_config('transaction_read_only', 'off', true)", "SELECT set_config('default_transaction_read_only', 'off', false)",
	"SELECT pg_catalog.set_config('role', 'postgres', false)", "SELECT set_config('client_encoding', 'SQL_ASCII', false)",
	"COMMIT AND CHAIN", "ROLLBACK AND CHAIN", "COMMIT PREPARED 'x'", "PREPARE TRANSACTION 'x'", "SET TRANSACTION SNAPSHOT '00000003-0000001B-1'",
	"PREPARE a AS DELETE FROM app.people", "PREPARE a AS WITH d AS (DELETE FROM app.people RETURNING 1) SELECT * FROM d", "PREPARE a AS SELECT pg_notify('x', 'y')",
	"PREPARE a AS SELECT 1; DELETE FROM app.people", "PREPARE postern AS SELECT 1", `PREPARE "postern_class" AS SELECT 1`,
	"EXECUTE a(pg_notify('x', 'y'))", "EXECUTE a((SELECT pg_advisory_lock(1)))", "EXECUTE a('x'::regclass)", "DEALLOCATE postern",
	"DECLARE a CURSOR FOR DELETE FROM app.people RETURNING 1", "DECLARE a CURSOR WITH HOLD FOR SELECT pg_advisory_lock(1)", "DECLARE a CURSOR FOR SELECT nextval('app.seq')",
	"DECLARE a CURSOR FOR SELECT 1 FOR UPDATE", "DECLARE a CURSOR FOR SELECT pg_advisory_lock(42)", "FETCH ALL FROM a; DELETE FROM app.people",
	"LOCK TABLE app.people", "LISTEN x", "UNLISTEN *", "NOTIFY x, 'y'", "SAVEPOINT a; DELETE FROM app.people", "SAVEPOINT postern_refused", "RELEASE a; COMMIT",
	"SET search_path = 'x', pg_sleep(1)", "SET search_path = E'a\\'b'", "SET TIME ZONE INTERVAL '1' HOUR TO MINUTE", "SET session_replication_role = replica", "SET row_security = off",
	"SET local_preload_libraries = 'x'", "SET log_statement = 'all'", "SET lo_compat_privileges = on", "SET zero_damaged_pages = on", "SET app.tenant = '1'", "SHOW ALL",
	"SHOW primary_conninfo", "ALTER SYSTEM SET work_mem = '1GB'", "CREATE TEMP TABLE t (i int)", "SELECT 1 INTO TEMP t", "COPY (SELECT 1) TO PROGRAM 'true'", "DO $$ BEGIN PERFORM pg_notify('x', 'y'); END $$",
}

// TestReadOnlySessions: what a session that stays can do beside, transactions,
// prepared statements, cursors and settings, opens no way around the mode either.
func TestReadOnlySessions(t *testing.T) {
	w := sharedWorld(t)
	m, log := newManager(t, w.source(roleRoot, roleRoot, alpha, sqlsession.Guard{Mode: "read-only"}))
	warm.Do(func() { waitForParser(t, m, roleRoot) })
	s := &sessionWorld{t: t, m: m}
	s.open()
	before, err := w.snapshot(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	var attacks []string
	// Each statement of the corpus is tried in four ways.
	for _, a := range corpus(t, "testdata/readonly.sql") {
		if a.expect == refused {
			attacks = append(attacks, w.fill(a.sql, alpha))
		}
	}
	for i, sql := range append(slices.Clone(sessionAttacks), attacks...) {
		s.run(sql)
		s.run("BEGIN")
		s.run(sql)
		s.run("COMMIT")
		first, _, _ := strings.Cut(strings.TrimLeft(sql, " (\t\n"), " ")
		if slices.Contains([]string{"select", "with", "values", "table", "insert", "update", "delete", "merge"}, strings.ToLower(first)) {
			s.run("PREPARE attack AS " + sql)
			s.run("EXECUTE attack")
			s.run("BEGIN")
			s.run("DECLARE attack CURSOR FOR " + sql)
			s.run("FETCH ALL FROM attack")
			s.run("COMMIT")
			s.run("DEALLOCATE attack")
		}
		s.run("ROLLBACK")
		found, after, err := w.changed(t.Context(), before)
		if err != nil {
			t.Fatalf("after %s: %v", clip(sql), err)
		}
		if len(found) > 0 {
			t.Errorf("%d: %s\n-> changed: %s", i, clip(sql), strings.Join(found, "\n-> "))
			w.repair(t, found)
			s.open()
			if after, err = w.snapshot(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
		}
		before = after
		// Whatever was set, a transaction is still what it must be.
		s.run("BEGIN")
		if s.run("INSERT INTO pg_catalog.pg_description VALUES (1, 1, 1, 'x')") == nil {
			t.Fatalf("%s: the session writes now", clip(sql))
		}
		s.run("ROLLBACK")
		log.take()
	}
	if s.ran == 0 {
		t.Error("no statement worked")
	}
}

// sessionWorld is a session that is opened again when an attack has ended it.
type sessionWorld struct {
	t   *testing.T
	m   *sqlsession.Manager
	id  string
	ran int
}

func (s *sessionWorld) open() {
	s.t.Helper()
	if s.id != "" {
		s.m.CloseSessions("tok_adversary", "again")
	}
	s.id = queryID()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		_, err := s.m.OpenSession(s.t.Context(), sqlsession.Open{ID: s.id, Source: roleRoot, Owner: "tok_adversary"})
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatal(err)
		}
	}
}

func (s *sessionWorld) run(sql string) error {
	s.t.Helper()
	var out bytes.Buffer
	outcome, err := s.m.Run(s.t.Context(), sqlsession.Request{
		QueryID: queryID(), Source: roleRoot, Owner: "tok_adversary", SQL: sql, Session: s.id, Timeout: 2 * time.Second,
	}, &out)
	if err == nil {
		s.ran++
	}
	if outcome.Transaction == "ended" || posternproto.CodeOf(err) == posternproto.CodeNotFound {
		s.open()
	}
	return err
}
