package pgverb

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
)

func TestParse(t *testing.T) {
	tests := []struct {
		text     string
		readOnly bool
		kind     Kind
		sql      string // "" means the text
		refused  string
		position int
	}{
		{text: "select 1", kind: None},
		{text: "begin", kind: Begin, sql: "BEGIN"},
		{text: " ; /* x */ Begin -- y\n Work;;", readOnly: true, kind: Begin, sql: "BEGIN READ ONLY"},
		{text: "START TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ WRITE DEFERRABLE", kind: Begin, sql: "BEGIN ISOLATION LEVEL SERIALIZABLE READ WRITE DEFERRABLE"},
		{text: "begin isolation level repeatable read not deferrable", readOnly: true, kind: Begin, sql: "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY NOT DEFERRABLE"},
		{text: "begin read write", readOnly: true, refused: "read-only", position: 7},
		{text: "begin read/**/only, read write", readOnly: true, refused: "read-only", position: 21},
		{text: "begin; delete from t", refused: "more than one statement", position: 6},
		{text: "begin delete from t", refused: "not understood", position: 7},
		{text: "start", refused: "too early"},
		{text: "(begin)", refused: "can't be understood"},
		{text: "commit", kind: Commit, sql: "COMMIT"},
		{text: "end transaction and no chain", kind: Commit, sql: "COMMIT"},
		{text: "commit and chain", refused: "AND CHAIN"},
		{text: "commit prepared 'x'", refused: "two-phase"},
		{text: "commit; begin", refused: "more than one"},
		{text: "rollback work", kind: Rollback, sql: "ROLLBACK"},
		{text: "abort", kind: Rollback, sql: "ROLLBACK"},
		{text: "rollback to A", kind: RollbackTo, sql: `ROLLBACK TO SAVEPOINT "a"`},
		{text: `rollback work to savepoint "A""b"`, kind: RollbackTo, sql: `ROLLBACK TO SAVEPOINT "A""b"`},
		{text: "savepoint savepoint", kind: Savepoint, sql: `SAVEPOINT "savepoint"`},
		{text: "release savepoint", kind: Release, sql: `RELEASE SAVEPOINT "savepoint"`},
		{text: "savepoint postern_x", refused: "reserved"},
		{text: "prepare transaction 'x'", refused: "two-phase"},
		{text: "set transaction isolation level serializable", readOnly: true, kind: SetTransaction, sql: "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE READ ONLY"},
		{text: "set transaction read write", readOnly: true, refused: "read-only", position: 17},
		{text: "set transaction snapshot '1'", refused: "SNAPSHOT"},
		{text: "set local transaction_read_only = off", refused: "transaction_read_only"},
		{text: "set session characteristics as transaction read write", refused: "can't be set"},
		{text: "set role admin", refused: "can't be set"},
		{text: "set local role admin", refused: "can't be set"},
		{text: "set session authorization x", refused: "can't be set"},
		{text: "set session session authorization x", refused: "can't be set"},
		{text: `set "role" to admin`, refused: "role can't be set"},
		{text: "set app.user = 'x'", refused: "can't be set"},
		{text: "set default_transaction_read_only = off", refused: "can't be set", position: 5},
		{text: "set DateStyle to ISO, DMY", kind: Set, sql: "SET SESSION datestyle TO 'iso', 'dmy'"},
		{text: "set local search_path = Shop, \"My\", '$user'", kind: Set, sql: "SET LOCAL search_path TO 'shop', 'My', '$user'"},
		{text: "set search_path = 'a'; drop table t", refused: "more than one", position: 22},
		{text: "set search_path to 'it''s'", kind: Set, sql: "SET SESSION search_path TO 'it''s'"},
		{text: "set search_path to E'\\''", refused: "not understood"},
		{text: "set search_path to pg_sleep(1)", refused: "not understood"},
		{text: "set time zone 'Europe/Berlin'", kind: Set, sql: "SET SESSION timezone TO 'Europe/Berlin'"},
		{text: "set time zone -3", kind: Set, sql: "SET SESSION timezone TO '-3'"},
		{text: "set time zone local", kind: Set, sql: "SET SESSION timezone TO DEFAULT"},
		{text: "set time zone interval '1' hour", refused: "not understood"},
		{text: "set names utf8", kind: Set, sql: "SET SESSION client_encoding TO 'utf8'"},
		{text: "set client_encoding to latin1", refused: "stays UTF8"},
		{text: "set standard_conforming_strings = off", refused: "stays on"},
		{text: "set row_security to off", refused: "stays on"},
		{text: "set enable_seqscan to default", kind: Set, sql: "SET SESSION enable_seqscan TO DEFAULT"},
		{text: "set constraints all deferred", kind: Constraints, sql: "SET CONSTRAINTS ALL DEFERRED"},
		{text: "set constraints a.b, C immediate", kind: Constraints, sql: `SET CONSTRAINTS "a"."b", "c" IMMEDIATE`},
		{text: "reset all", kind: ResetAll, sql: "RESET ALL"},
		{text: "reset role", refused: "can't be set"},
		{text: "reset session authorization", refused: "can't be set"},
		{text: "reset timezone", kind: Set, sql: "SET SESSION timezone TO DEFAULT"},
		{text: "show server_version", kind: Show, sql: `SHOW "server_version"`},
		{text: "show app.x", kind: Show, sql: `SHOW "app"."x"`},
		{text: "show all", refused: "SHOW ALL"},
		{text: "show primary_conninfo", refused: "secret"},
		{text: `show "Primary_ConnInfo"`, refused: "secret"},
		{text: "prepare q(int, numeric(3,2), text[], t.c%type) as select $1", kind: Prepare},
		{text: "prepare q(select 1); as select 1", refused: "more than one"},
		{text: "prepare postern as select 1", refused: "reserved"},
		{text: "execute q", kind: Execute, sql: `EXECUTE "q"`},
		{text: "execute q(1, -2.5, 'a''b', null, true, date '2026-01-01', '{1}'::text)", kind: Execute, sql: `EXECUTE "q"(1, -2.5, 'a''b', null, true, date '2026-01-01', '{1}'::text)`},
		{text: "execute q(pg_sleep(1))", refused: "constants", position: 11},
		{text: "execute q(1+lo_unlink(1))", refused: "not understood"},
		{text: "execute q('1'::evil)", refused: "common types"},
		{text: "execute q((select 1))", refused: "constants"},
		{text: "deallocate prepare q", kind: Deallocate, sql: `DEALLOCATE "q"`},
		{text: "deallocate all", kind: Deallocate, sql: "DEALLOCATE ALL"},
		{text: "declare c insensitive no scroll cursor without hold for select 1", kind: Declare},
		{text: "declare c cursor with hold for select 1", refused: "WITH HOLD"},
		{text: "declare c binary cursor for select 1", refused: "BINARY"},
		{text: "fetch c", kind: Fetch, sql: `FETCH FROM "c"`},
		{text: "fetch next", kind: Fetch, sql: `FETCH FROM "next"`},
		{text: "fetch 10 from c", kind: Fetch, sql: `FETCH 10 FROM "c"`},
		{text: "fetch backward all in c", kind: Fetch, sql: `FETCH BACKWARD ALL FROM "c"`},
		{text: "fetch absolute -1 from c", kind: Fetch, sql: `FETCH ABSOLUTE -1 FROM "c"`},
		{text: "move forward 3 c", kind: Move, sql: `MOVE FORWARD 3 FROM "c"`},
		{text: "fetch 1 from c; drop table t", refused: "more than one"},
		{text: "close all", kind: Close, sql: "CLOSE ALL"},
		{text: "discard temporary", kind: Discard, sql: "DISCARD TEMP"},
		{text: "lock table t in share mode", kind: Lock},
		{text: "lock table t; drop table t", refused: "more than one"},
		{text: "lock table t", readOnly: true, refused: "read-only"},
	}
	for _, test := range tests {
		t.Run(test.text, func(t *testing.T) {
			got, refusal := Parse(test.text, test.readOnly)
			if test.refused != "" {
				if refusal == nil || !strings.Contains(refusal.Message, test.refused) {
					t.Fatalf("got %+v, %v, want a refusal with %q", got, refusal, test.refused)
				}
				if test.position != 0 && refusal.Position != test.position {
					t.Errorf("got position %d, want %d", refusal.Position, test.position)
				}
				return
			}
			if refusal != nil {
				t.Fatalf("refused: %v", refusal)
			}
			if test.kind == None {
				if got != nil {
					t.Fatalf("got %+v, want nil", got)
				}
				return
			}
			want := test.sql
			if want == "" {
				want = test.text
			}
			if got.Kind != test.kind || got.SQL != want {
				t.Fatalf("got %d %q, want %d %q", got.Kind, got.SQL, test.kind, want)
			}
		})
	}
}

func TestQuery(t *testing.T) {
	for text, want := range map[string]string{
		"prepare q (int) as select 1 as x;":              " select 1 as x;",
		"declare c cursor for\nselect x for update":      "\nselect x for update",
		"/* as */ prepare \"as\" as/* */values (1) as z": "/* */values (1) as z",
	} {
		s, refusal := Parse(text, false)
		if refusal != nil || s.Query != want || text[s.Start:] != want {
			t.Errorf("%s: got %+v, %v, want %q", text, s, refusal, want)
		}
	}
}

func TestLimits(t *testing.T) {
	for text, want := range map[string]int64{
		"set statement_timeout = 5000": 5000, "set lock_timeout to '2s'": 2000, "set statement_timeout to '1.5 min'": 90000, "set lock_timeout = 0": 0,
		"set lock_timeout = '10us'": 1, "reset lock_timeout": 0,
	} {
		s, refusal := Parse(text, true)
		if refusal != nil || s.Millis != want {
			t.Errorf("%s: got %+v, %v, want %d", text, s, refusal, want)
		}
	}
	for _, text := range []string{"set lock_timeout = -1", "set lock_timeout = '1 year'", "set lock_timeout = 1, 2", "set lock_timeout = '99999d'"} {
		if s, refusal := Parse(text, true); refusal == nil {
			t.Errorf("%s: got %+v, want a refusal", text, s)
		}
	}
}

// FuzzParse checks that what is written anew is one statement, whose first word
// is that of its kind, and that a read-only source never gets more.
func FuzzParse(f *testing.F) {
	for _, text := range []string{
		"begin read write", "set search_path = 'a', b", "execute q(1, 'x')", "fetch 1 from c", "rollback to x", "set constraints a deferred",
		"show x", "prepare q as select 1", "declare c cursor for select 1", "reset all", "start transaction isolation level serializable",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if !utf8.ValidString(text) || strings.Contains(text, "\x00") {
			return // refused before
		}
		s, refusal := Parse(text, true)
		if refusal != nil && (refusal.Position < 1 || refusal.Position > utf8.RuneCountInString(text)+1) {
			t.Fatalf("%q: position %d", text, refusal.Position)
		}
		if s == nil || s.Kind == Prepare || s.Kind == Declare {
			return
		}
		again, refusal := Parse(s.SQL, true)
		if refusal != nil || again.Kind != s.Kind || again.SQL != s.SQL {
			t.Fatalf("%q became %q, which becomes %+v, %v", text, s.SQL, again, refusal)
		}
		for token := range sqltext.Tokens(s.SQL) {
			if token.Text == ";" || token.Kind == sqltext.Word && strings.EqualFold(token.Text, "write") {
				t.Fatalf("%q became %q", text, s.SQL)
			}
		}
		if s.Kind == Begin && !strings.Contains(s.SQL, "READ ONLY") {
			t.Fatalf("%q became %q", text, s.SQL)
		}
	})
}
