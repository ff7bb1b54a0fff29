package pgproxy

import (
	"context"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
)

func TestSimple(t *testing.T) {
	b := start(t, false, wish{})
	for _, c := range []struct{ sql, want string }{
		{"SELECT 1", "T D C(SELECT 1) Z(I)"},
		{"", "I Z(I)"},
		{" ; ", "I Z(I)"},
		{"SELECT 1; SELECT 2, 3; SELECT WHERE false", "T D C(SELECT 1) T D C(SELECT 1) T C(SELECT 0) Z(I)"},
		{"SELECT version()", "T D C(SELECT 1) Z(I)"},
		{"SELECT 1/(id-1) FROM things WHERE id = 1", "T E(22012) Z(I)"},
		{"SELECT 1; SELECT 1/0; SELECT 2", "T D C(SELECT 1) E(22012) Z(I)"},
		{"SELECT FROM FROM", "E(42601) Z(I)"},
		{"SELECT nonsense", "E(42703) Z(I)"},
		{"DELETE FROM things", "E(25006) Z(I)"},
		{"SELECT 1; DELETE FROM things", "E(25006) Z(I)"},
		{"SELECT bad_function()", "E(42501) Z(I)"},
		{"SHOW server_version", "T D C(SHOW) Z(I)"},
		{"SHOW ALL", "E(42501) Z(I)"},
		{"EXPLAIN SELECT 1", "E(42501) Z(I)"},
		{"LISTEN a", "E(42501) Z(I)"},
		{"NOTIFY a", "E(25006) Z(I)"},
		{"UNLISTEN *", "C(UNLISTEN) Z(I)"},
		{"DO $$ BEGIN END $$", "E(25006) Z(I)"},
		{"VACUUM things", "E(25006) Z(I)"},
		{"LOAD 'x'", "E(42501) Z(I)"},
		{"ALTER SYSTEM SET work_mem = 1", "E(42501) Z(I)"},
		{"DO $$ BEGIN RAISE NOTICE 'a'; END $$", "E(25006) Z(I)"},
		{"PREPARE TRANSACTION 'x'", "E(0A000) Z(I)"},
	} {
		b.want(c.sql, b.query(c.sql), c.want)
	}
	want := []string{
		"allowed|SELECT 1|SELECT 1", "allowed|SELECT 1|SELECT 1", "allowed|SELECT 1|SELECT 2, 3", "allowed|SELECT 0|SELECT WHERE false",
		"allowed|SELECT 1|SELECT version()", "allowed|22012|SELECT 1/(id-1) FROM things WHERE id = 1", "allowed|SELECT 1|SELECT 1", "allowed|22012|SELECT 1/0",
		"denied|42601|SELECT FROM FROM", "allowed|42703|SELECT nonsense", "denied|25006|DELETE FROM things", "denied|25006|SELECT 1; DELETE FROM things",
	}
	if got := b.log(); len(got) < len(want) || !reflect.DeepEqual(got[:len(want)], want) {
		t.Errorf("log:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestPosition(t *testing.T) {
	b := start(t, false, wish{})
	for sql, want := range map[string]int32{"SELECT é, bad_function()": 12, "SELECT FROM FROM": 13, "SELECT nonsense": 8, "BEGIN; SHOW all": 8} {
		b.send(&pgproto3.Query{String: sql})
		m, err := b.front.Receive()
		for ; err == nil; m, err = b.front.Receive() {
			if e, ok := m.(*pgproto3.ErrorResponse); ok && e.Position != want {
				t.Errorf("%s: position %d, want %d (%s)", sql, e.Position, want, e.Message)
			}
			if _, ok := m.(*pgproto3.ReadyForQuery); ok {
				break
			}
		}
	}
}

func TestTransactions(t *testing.T) {
	b := start(t, false, wish{})
	steps := []struct{ sql, want string }{
		{"BEGIN", "C(BEGIN) Z(T)"},
		{"SELECT count(*) FROM things", "T D C(SELECT 1) Z(T)"},
		{"DELETE FROM things", "E(25006) Z(E)"},
		{"SELECT 1", "E(25P02) Z(E)"},
		{"SELECT version()", "E(25P02) Z(E)"},
		{"COMMIT", "C(ROLLBACK) Z(I)"},
		{"START TRANSACTION ISOLATION LEVEL REPEATABLE READ, DEFERRABLE", "C(START TRANSACTION) Z(T)"},
		{"SHOW transaction_isolation", "T D C(SHOW) Z(T)"},
		{"SAVEPOINT a", "C(SAVEPOINT) Z(T)"},
		{"SELECT bad_function()", "E(42501) Z(E)"},
		{"ROLLBACK TO a", "C(ROLLBACK) Z(T)"},
		{"SELECT version()", "T D C(SELECT 1) Z(T)"},
		{"ROLLBACK", "C(ROLLBACK) Z(I)"},
		{"BEGIN READ WRITE", "E(25006) Z(I)"},
		{"BEGIN; SET TRANSACTION READ WRITE", "E(25006) Z(I)"},
		{"BEGIN", "C(BEGIN) Z(T)"},
		{"SET TRANSACTION READ WRITE", "E(25006) Z(E)"},
		{"ROLLBACK; SELECT 1", "C(ROLLBACK) T D C(SELECT 1) Z(I)"},
		{"SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE", "E(25006) Z(I)"},
		{"SET default_transaction_read_only = off", "E(42501) Z(I)"},
		{"SET transaction_read_only = off", "E(42501) Z(I)"},
		{"SELECT set_config('transaction_read_only', 'off', false)", "E(42501) Z(I)"},
		{"BEGIN; SELECT 1; COMMIT", "C(BEGIN) T D C(SELECT 1) C(COMMIT) Z(I)"},
		{"BEGIN; DECLARE c CURSOR FOR SELECT id FROM things ORDER BY id; FETCH 2 FROM c", "C(BEGIN) C(DECLARE CURSOR) T D D C(FETCH 2) Z(T)"},
		{"FETCH 3 FROM c", "T D D D C(FETCH 3) Z(T)"},
		{"MOVE 1 FROM c; CLOSE c", "C(MOVE 1) C(CLOSE CURSOR) Z(T)"},
		{"DECLARE c CURSOR FOR SELECT bad_function()", "E(42501) Z(E)"},
		{"ABORT", "C(ROLLBACK) Z(I)"},
		{"BEGIN", "C(BEGIN) Z(T)"},
		{"LOCK TABLE things IN ACCESS SHARE MODE", "C(LOCK TABLE) Z(T)"},
		{"LOCK TABLE things", "E(25006) Z(E)"},
		{"END", "C(ROLLBACK) Z(I)"},
	}
	for _, s := range steps {
		b.want(s.sql, b.query(s.sql), s.want)
	}
	b.want("read only", b.query("SHOW transaction_read_only"), "T D C(SHOW) Z(I)")
}

// TestSettings also shows that a text whose numbers differ gets a verdict of its own
// where a number counts.
func TestSettings(t *testing.T) {
	b := start(t, false, wish{settings: [][2]string{{"application_name", "bi"}, {"DateStyle", "ISO, DMY"}, {"client_encoding", "SQL_ASCII"}}})
	parameters := map[string]string{}
	for _, s := range b.opened.Parameters {
		parameters[s.Name] = s.Value
	}
	if parameters["client_encoding"] != "UTF8" || parameters["DateStyle"] != "ISO, DMY" || parameters["application_name"] != "bi" {
		t.Errorf("opened with %v", parameters)
	}
	for _, c := range []struct{ sql, want string }{
		{"SET application_name = 'x'", "C(SET) S(application_name) Z(I)"},
		{"SET TIME ZONE 'Europe/Berlin'", "C(SET) S(TimeZone) Z(I)"},
		{"SET TIME ZONE INTERVAL '1' HOUR TO MINUTE", "C(SET) S(TimeZone) Z(I)"},
		{"SET standard_conforming_strings = 1", "C(SET) Z(I)"},
		{"SET standard_conforming_strings = 0", "E(42501) Z(I)"},
		{"SET client_encoding = 'utf-8'", "C(SET) Z(I)"},
		{"SET NAMES 'latin1'", "E(42501) Z(I)"},
		{"SET statement_timeout = 0", "C(SET) Z(I)"},
		{"SET row_security = off", "C(SET) Z(I)"},
		{"SET ROLE postgres", "E(42501) Z(I)"},
		{"SET SESSION AUTHORIZATION postgres", "E(42501) Z(I)"},
		{"RESET ROLE", "E(42501) Z(I)"},
		{"SET app.tenant = 'x'", "E(42501) Z(I)"},
		{"SET session_replication_role = replica", "E(42501) Z(I)"},
		{"SET work_mem = '8GB'", "E(42501) Z(I)"},
		{"SET enable_seqscan = off", "C(SET) Z(I)"},
		{"SELECT pg_catalog.set_config('search_path', '', false)", "T D C(SELECT 1) Z(I)"},
		{"SELECT set_config('role', 'postgres', false)", "E(42501) Z(I)"},
		{"SELECT pg_catalog.set_config('bytea_output', 'hex', false) FROM pg_settings WHERE name = 'bytea_output'", "T D C(SELECT 1) Z(I)"},
		{"SELECT set_config(name, 'view, foreign-table', false) FROM pg_settings WHERE name = 'restrict_nonsystem_relation_kind'", "T D C(SELECT 1) Z(I)"},
		{"SELECT set_config(name, 'x', false) FROM pg_settings WHERE name = 'role'", "E(42501) Z(I)"},
		{"SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL;", "T D C(SELECT 1) C(CLOSE CURSOR ALL) C(UNLISTEN) C(RESET) S(application_name) S(TimeZone) Z(I)"},
		{"SET application_name = 'y'; SET TIME ZONE 'Europe/Berlin'", "C(SET) C(SET) S(application_name) S(TimeZone) Z(I)"},
		{"SET search_path = public; SELECT 1", "E(0A000) Z(I)"},
		{"SET search_path = public; SET extra_float_digits = 3", "C(SET) C(SET) Z(I)"},
		{"RESET ALL", "C(RESET) S(application_name) S(TimeZone) Z(I)"},
		{"DISCARD ALL", "C(DISCARD ALL) Z(I)"},
		{"SHOW default_transaction_read_only", "T D C(SHOW) Z(I)"},
		{"CREATE TABLE x (i int)", "E(25006) Z(I)"},
	} {
		b.want(c.sql, b.query(c.sql), c.want)
	}
	for _, pair := range [][2]string{
		{"options", "-c default_transaction_read_only=off"},
		{"default_transaction_read_only", "off"},
		{"replication", "database"},
		{"role", "postgres"},
		{"client_encoding", "LATIN1"},
		{"session_preload_libraries", "x"},
	} {
		if _, err := Startup([][2]string{pair}, false, time.Minute); err == nil {
			t.Errorf("%v was allowed at startup", pair)
		}
	}
}

func TestExtended(t *testing.T) {
	b := start(t, false, wish{})
	one := []pgproto3.FrontendMessage{&pgproto3.Parse{Query: "SELECT id FROM things WHERE id <= $1 ORDER BY id"}, &pgproto3.Bind{Parameters: [][]byte{[]byte("3")}}, &pgproto3.Describe{ObjectType: 'P'}, &pgproto3.Execute{}, &pgproto3.Sync{}}
	b.send(one...)
	b.want("one", b.answer(), "1 2 T D D D C(SELECT 3) Z(I)")
	b.send(&pgproto3.Parse{Name: "s", Query: "SELECT 1"}, &pgproto3.Describe{ObjectType: 'S', Name: "s"}, &pgproto3.Sync{})
	b.want("named", b.answer(), "1 t T Z(I)")
	b.send(&pgproto3.Bind{PreparedStatement: "s"}, &pgproto3.Execute{}, &pgproto3.Bind{PreparedStatement: "s"}, &pgproto3.Execute{}, &pgproto3.Sync{})
	b.want("pipeline", b.answer(), "2 D C(SELECT 1) 2 D C(SELECT 1) Z(I)")
	b.send(&pgproto3.Parse{Name: "s", Query: "SELECT 2"}, &pgproto3.Sync{})
	b.want("twice", b.answer(), "E(42P05) Z(I)")
	b.send(&pgproto3.Close{ObjectType: 'S', Name: "s"}, &pgproto3.Bind{PreparedStatement: "s"}, &pgproto3.Execute{}, &pgproto3.Sync{})
	b.want("closed", b.answer(), "3 E(26000) Z(I)")
	b.send(&pgproto3.Bind{PreparedStatement: "never"}, &pgproto3.Sync{})
	b.want("unknown", b.answer(), "E(26000) Z(I)")
	b.send(&pgproto3.Execute{Portal: "never"}, &pgproto3.Sync{})
	b.want("unknown portal", b.answer(), "E(34000) Z(I)")

	// Flush answers at once and keeps the cycle open.
	b.send(&pgproto3.Parse{Name: "f", Query: "SELECT 1"}, &pgproto3.Flush{})
	b.want("flush", strings.Join(b.until(func(w string) bool { return w == "1" }), " "), "1")
	b.send(&pgproto3.Bind{PreparedStatement: "f"}, &pgproto3.Execute{}, &pgproto3.Sync{})
	b.want("after flush", b.answer(), "2 D C(SELECT 1) Z(I)")

	// An error in the middle: the rest counts from Sync on.
	b.send(&pgproto3.Bind{PreparedStatement: "f"}, &pgproto3.Execute{}, &pgproto3.Parse{Query: "SELECT bad_function()"}, &pgproto3.Bind{}, &pgproto3.Execute{},
		&pgproto3.Query{String: "SELECT 5"}, &pgproto3.Sync{}, &pgproto3.Query{String: "SELECT 6"})
	b.want("refused in the middle", b.answer(), "2 D C(SELECT 1) E(42501) Z(I)")
	b.want("after it", b.answer(), "T D C(SELECT 1) Z(I)")
	b.send(&pgproto3.Parse{Query: "SELECT 1/0"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Bind{PreparedStatement: "f"}, &pgproto3.Execute{}, &pgproto3.Sync{})
	b.want("failed in the middle", b.answer(), "1 E(22012) Z(I)")

	// A question of ours in the middle of a pipeline, and behind a failure.
	b.send(&pgproto3.Bind{PreparedStatement: "f"}, &pgproto3.Execute{}, &pgproto3.Parse{Query: "SELECT version()"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Sync{})
	b.want("asked in the middle", b.answer(), "2 D C(SELECT 1) 1 2 D C(SELECT 1) Z(I)")
	b.send(&pgproto3.Parse{Query: "SELECT 1/0"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Parse{Query: "SELECT 7, version()"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Sync{})
	b.want("asked behind a failure", b.answer(), "1 E(22012) Z(I)")

	// In a transaction.
	b.want("begin", b.query("BEGIN"), "C(BEGIN) Z(T)")
	b.send(&pgproto3.Parse{Query: "DELETE FROM things"}, &pgproto3.Describe{ObjectType: 'S'}, &pgproto3.Sync{})
	b.want("refused in a transaction", b.answer(), "E(25006) Z(E)")
	b.send(&pgproto3.Parse{Query: "SELECT 1"}, &pgproto3.Sync{})
	b.want("in a failed one", b.answer(), "E(25P02) Z(E)")
	b.send(&pgproto3.Parse{Query: "ROLLBACK"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Sync{})
	b.want("rollback", b.answer(), "1 2 C(ROLLBACK) Z(I)")
	b.send(&pgproto3.Parse{Query: "BEGIN"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Sync{})
	b.want("begin", b.answer(), "1 2 C(BEGIN) Z(T)")

	// Portals.
	b.send(&pgproto3.Parse{Query: "SELECT id FROM things ORDER BY id"}, &pgproto3.Bind{DestinationPortal: "p"}, &pgproto3.Execute{Portal: "p", MaxRows: 2}, &pgproto3.Sync{})
	b.want("portal", b.answer(), "1 2 D D s Z(T)")
	b.send(&pgproto3.Execute{Portal: "p", MaxRows: 1}, &pgproto3.Close{ObjectType: 'P', Name: "p"}, &pgproto3.Sync{})
	b.want("portal again", b.answer(), "D s 3 Z(T)")
	b.want("commit", b.query("COMMIT"), "C(COMMIT) Z(I)")

	b.send(&pgproto3.Parse{Query: "SELECT 1; SELECT 2"}, &pgproto3.Sync{})
	b.want("two", b.answer(), "E(42601) Z(I)")
	b.send(&pgproto3.Parse{Query: ""}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Sync{})
	b.want("empty", b.answer(), "1 2 I Z(I)")
	b.send(&pgproto3.FunctionCall{Function: 1})
	b.want("function call", b.answer(), "E(0A000) Z(I)")
	b.send(&pgproto3.Sync{})
	b.want("sync", b.answer(), "Z(I)")
	for _, line := range b.log() {
		if strings.Contains(line, "refused by postern") {
			t.Errorf("the log has %q", line)
		}
	}
}

// TestPrepared is for prepared statements of SQL.
func TestPrepared(t *testing.T) {
	b := start(t, false, wish{})
	for _, c := range []struct{ sql, want string }{
		{"PREPARE p (int) AS SELECT $1 + 1", "C(PREPARE) Z(I)"},
		{"EXECUTE p (1)", "T D C(SELECT 1) Z(I)"},
		{"EXECUTE p (bad_function())", "E(42501) Z(I)"},
		{"PREPARE q AS SELECT bad_function()", "E(42501) Z(I)"},
		{"EXECUTE q", "E(26000) Z(I)"},
		{"PREPARE r AS DELETE FROM things", "E(25006) Z(I)"},
		{"PREPARE x AS SELECT 1; EXECUTE x", "C(PREPARE) T D C(SELECT 1) Z(I)"},
		{"DEALLOCATE p", "C(DEALLOCATE) Z(I)"},
		{"EXECUTE p (1)", "E(26000) Z(I)"},
		{"DEALLOCATE ALL", "C(DEALLOCATE ALL) Z(I)"},
		{"EXECUTE x", "E(26000) Z(I)"},
	} {
		b.want(c.sql, b.query(c.sql), c.want)
	}
	b.send(&pgproto3.Parse{Name: "w", Query: "SELECT 1"}, &pgproto3.Sync{})
	b.want("parse", b.answer(), "1 Z(I)")
	b.want("protocol's by SQL", b.query("EXECUTE w"), "T D C(SELECT 1) Z(I)")
	b.want("sql's", b.query("PREPARE v AS SELECT 2"), "C(PREPARE) Z(I)")
	b.send(&pgproto3.Bind{PreparedStatement: "v"}, &pgproto3.Execute{}, &pgproto3.Sync{})
	b.want("SQL's by the protocol", b.answer(), "2 D C(SELECT 1) Z(I)")
}

// askingJudge asks something that the server refuses.
type askingJudge struct{ testJudge }

func (j askingJudge) Judge(ctx context.Context, server Asker, text string, tree *pgtree.Tree) (Verdict, *Refusal) {
	if strings.Contains(text, "asked_in_vain") {
		_, err := server.Ask(ctx, "SELECT 1/0")
		var refusal *Refusal
		if errors.As(err, &refusal) {
			return Verdict{}, refusal
		}
		return Verdict{}, refuse(stateDenied, "it was answered: %v", err)
	}
	return j.testJudge.Judge(ctx, server, text, tree)
}

// TestAsk shows that a question leaves the client's transaction, settings and
// unnamed statement alone.
func TestAsk(t *testing.T) {
	b := start(t, false, wish{config: func(c *Config) { c.Judge = askingJudge{} }})
	b.send(&pgproto3.Parse{Query: "SELECT 5"}, &pgproto3.Sync{})
	b.want("parse", b.answer(), "1 Z(I)")
	b.send(&pgproto3.Parse{Name: "v", Query: "SELECT version()"}, &pgproto3.Sync{})
	b.want("a question", b.answer(), "1 Z(I)")
	b.send(&pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Sync{})
	b.want("the unnamed statement", b.answer(), "2 D C(SELECT 1) Z(I)")
	b.want("a failed question", b.query("SELECT asked_in_vain()"), "E(22012) Z(I)")
	b.want("begin", b.query("BEGIN"), "C(BEGIN) Z(T)")
	b.want("a setting", b.query("SET LOCAL jit = on"), "C(SET) Z(T)")
	b.want("in a transaction", b.query("SELECT version(), 2"), "T D C(SELECT 1) Z(T)")
	b.want("a failed question", b.query("SELECT asked_in_vain()"), "E(22012) Z(E)")
	b.want("rollback", b.query("ROLLBACK"), "C(ROLLBACK) Z(I)")
	b.want("begin", b.query("BEGIN"), "C(BEGIN) Z(T)")
	b.want("cursor", b.query("DECLARE c CURSOR FOR SELECT id FROM things"), "C(DECLARE CURSOR) Z(T)")
	b.want("a question", b.query("SELECT version(), 3"), "T D C(SELECT 1) Z(T)")
	b.want("the cursor lives", b.query("FETCH 1 FROM c"), "T D C(FETCH 1) Z(T)")
}

// TestOldServer: a server before PostgreSQL 14 does not tell when what makes
// transactions read only is switched off, so each cycle begins by switching it on.
func TestOldServer(t *testing.T) {
	b := start(t, false, wish{config: func(c *Config) { c.Version = 13 }})
	// What a function that the policy allows may do.
	undo := "SELECT set_config(n, v, false) FROM (VALUES ('default_transaction_read_only', 'off')) s (n, v)"
	const status = "S(default_transaction_read_only) "
	b.want("a setting", b.query(undo), "T D C(SELECT 1) "+status+"Z(I)")
	b.want("the next", b.query("SELECT 1/(current_setting('transaction_read_only') = 'on')::int"), status+"T D C(SELECT 1) Z(I)")
	b.query(undo)
	b.send(&pgproto3.Parse{Query: "SELECT 1/(current_setting('transaction_read_only') = 'on')::int"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Sync{})
	b.want("extended", b.answer(), status+"1 2 D C(SELECT 1) Z(I)")
	b.query(undo)
	b.want("several", b.query("BEGIN; SELECT 1/(current_setting('transaction_read_only') = 'on')::int; COMMIT"), status+"C(BEGIN) T D C(SELECT 1) C(COMMIT) Z(I)")
	b.want("an error", b.query("SELECT 1/0"), "E(22012) Z(I)")
	b.send(&pgproto3.Parse{Query: "SELECT 1"}, &pgproto3.Flush{})
	b.want("flushed", strings.Join(b.until(func(w string) bool { return w == "1" }), " "), "1")
	b.send(&pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Sync{})
	b.want("and on", b.answer(), "2 D C(SELECT 1) Z(I)")
}

// TestTooLong: a text that is too long to be looked at is refused, and the session
// lives on.
func TestTooLong(t *testing.T) {
	b := start(t, false, wish{})
	long := "SELECT '" + strings.Repeat("x", 3<<20) + "'"
	b.want("simple", b.query(long), "E(54000) Z(I)")
	b.send(&pgproto3.Parse{Name: "a", Query: long}, &pgproto3.Bind{PreparedStatement: "a"}, &pgproto3.Execute{}, &pgproto3.Sync{})
	b.want("extended", b.answer(), "E(54000) Z(I)")
	b.want("after it", b.query("SELECT 1"), "T D C(SELECT 1) Z(I)")
	for _, e := range b.events {
		if len(e.Sql) > 5<<10 || e.Verdict == "denied" && !strings.HasPrefix(e.Sql, "SELECT 'xxx") {
			t.Errorf("the log has %d bytes: %.60s", len(e.Sql), e.Sql)
		}
	}
}
