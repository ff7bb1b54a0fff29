package sqlsession_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/proto"
)

// guardServer has everything in it that a statement could hide something in. Its
// superuser is the one who asks.
func guardServer(t *testing.T) *pgserver.Server {
	t.Helper()
	s, err := pgserver.Launch(t.Context(), pgserver.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	err = s.SQL(t.Context(),
		"CREATE TABLE t (id int PRIMARY KEY, name text, at timestamptz DEFAULT now())",
		"INSERT INTO t SELECT i, 'n' || i FROM generate_series(1, 10) i",
		"CREATE SEQUENCE s",
		// Each of these says that it changes nothing, and does.
		"CREATE FUNCTION evil(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN PERFORM pg_notify('evil', 'x'); PERFORM pg_advisory_lock(666); RETURN $1; END $$",
		"CREATE FUNCTION evil(t) RETURNS int LANGUAGE plpgsql STABLE AS $$ BEGIN PERFORM pg_advisory_lock(666); RETURN 1; END $$",
		"CREATE FUNCTION evil(text, text) RETURNS bool LANGUAGE plpgsql STABLE AS $$ BEGIN PERFORM pg_advisory_lock(666); RETURN true; END $$",
		"CREATE FUNCTION \"Quoted Evil\"() RETURNS int LANGUAGE plpgsql STABLE AS $$ BEGIN PERFORM pg_advisory_lock(666); RETURN 1; END $$",
		"CREATE SCHEMA app", "CREATE FUNCTION app.fine(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1 + 1'",
		"CREATE FUNCTION app.counter() RETURNS bigint LANGUAGE sql VOLATILE AS 'SELECT 1::bigint'",
		"CREATE OPERATOR === (LEFTARG = text, RIGHTARG = text, FUNCTION = evil)",
		"CREATE VIEW plain_view AS SELECT id, upper(name) AS name FROM t WHERE id > 1 ORDER BY id",
		"CREATE VIEW evil_view AS SELECT id, evil(id) FROM t",
		"CREATE VIEW evil_inside AS SELECT v.id FROM plain_view p JOIN evil_view v USING (id)",
		"CREATE VIEW builtin_view AS SELECT nextval('s')",
		"CREATE VIEW operator_view AS SELECT name === name AS same FROM t",
		"CREATE VIEW notify_view AS SELECT 1 WHERE pg_notify('a', 'b') IS NOT NULL",
		"CREATE TABLE guarded (id int)", "ALTER TABLE guarded ENABLE ROW LEVEL SECURITY", "CREATE POLICY p ON guarded USING (evil(id) > 0)",
		"CREATE DOMAIN evil_domain AS int CHECK (evil(VALUE) > 0)",
		"CREATE TABLE holder (id int, d evil_domain)", "CREATE TYPE pair AS (a int, b evil_domain)",
		"CREATE CAST (t AS int) WITH FUNCTION evil(t)",
		"CREATE AGGREGATE evil_sum(int) (SFUNC = int4pl, STYPE = int, INITCOND = '0')",
		"CREATE EXTENSION pgcrypto", "CREATE EXTENSION hstore", "CREATE EXTENSION dblink", "CREATE EXTENSION tablefunc", "CREATE EXTENSION file_fdw", "CREATE EXTENSION tsm_system_rows",
		"CREATE SERVER f FOREIGN DATA WRAPPER file_fdw", "CREATE FOREIGN TABLE program (x text) SERVER f OPTIONS (program 'echo pwned')",
		"CREATE TABLE parent (id int) PARTITION BY LIST (id)",
		"CREATE FOREIGN TABLE foreign_part PARTITION OF parent FOR VALUES IN (1) SERVER f OPTIONS (program 'echo 1')",
		"CREATE MATERIALIZED VIEW stored AS SELECT evil(1)", "SELECT pg_advisory_unlock_all()",
	)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func guardManager(t *testing.T, s *pgserver.Server, guard sqlsession.Guard) *sqlsession.Manager {
	return newManager(t, sqlsession.Config{}, sqlsession.Source{
		Name: "db", Engine: "postgres", DSN: s.DSN(pgserver.Superuser, pgserver.Superuser), Password: password(s.Password),
		ReadWrite: guard.Mode == "read-write", Guard: guard,
	})
}

// TestReadOnlyGuard: what is refused as a superuser, and what is not.
func TestReadOnlyGuard(t *testing.T) {
	s := guardServer(t)
	m := guardManager(t, s, sqlsession.Guard{Mode: "read-only", Functions: []string{"app.*"}})
	for _, sql := range []string{
		"SELECT 1", "VALUES (1), (2)", "TABLE t", "WITH x AS (SELECT * FROM t) SELECT * FROM x", "(SELECT 1) UNION (SELECT 2) ORDER BY 1", "SHOW server_version",
		"SELECT count(*), max(name), string_agg(name, ',' ORDER BY id) FILTER (WHERE id > 2) FROM t GROUP BY id % 2 HAVING count(*) > 1",
		"SELECT row_number() OVER (PARTITION BY id % 2 ORDER BY name) FROM t", "SELECT * FROM plain_view", "SELECT random(), clock_timestamp(), gen_random_uuid(), pg_sleep(0)",
		"SELECT * FROM generate_series(1, 3) WITH ORDINALITY", "SELECT * FROM t TABLESAMPLE bernoulli (50) REPEATABLE (1)", "SELECT name::varchar(3), id::numeric(10,2), at::date FROM t",
		"SELECT t.name, (t).id, (t.*)::text FROM t", "SELECT CASE id WHEN 1 THEN 'a' ELSE 'b' END, coalesce(name, ''), nullif(id, 1), greatest(id, 2) FROM t",
		"SELECT id IN (1, 2), id BETWEEN 1 AND 5, name LIKE 'n%', name ~ 'n', name SIMILAR TO 'n_', id = ANY (ARRAY[1,2]), id IS DISTINCT FROM 1 FROM t",
		"SELECT xmlelement(name a, 'b'), extract(year FROM now()), position('a' IN 'ba'), current_user, current_date, interval '1 day'", "SELECT json_build_object('a', 1) -> 'a', '[1]'::jsonb @> '1'",
		"SELECT * FROM json_to_recordset('[{\"a\":1}]') AS x(a int)", "SELECT * FROM xmltable('/a' PASSING '<a>1</a>' COLUMNS b int PATH '.')", "SELECT ARRAY(SELECT id FROM t), ROW(1, 2), (ARRAY[1,2,3])[2:3]",
		"SELECT * FROM pg_stat_activity", "SELECT * FROM information_schema.tables", "SELECT relname, pg_total_relation_size(oid) FROM pg_class LIMIT 1", "SELECT pg_get_viewdef('evil_view')",
		"SELECT a.id FROM t a JOIN t b USING (id), LATERAL (SELECT a.id) d", "SELECT digest('a', 'sha256'), gen_random_bytes(4), 'a=>1'::hstore -> 'a'", "SELECT app.fine(1), app.counter()",
		"SELECT set_config('search_path', 'app', false)", "SELECT 'x'::pg_catalog.text, pg_catalog.upper('a')", "SELECT * FROM t ORDER BY id FETCH FIRST 2 ROWS WITH TIES", "SELECT * FROM stored", "SELECT id FROM holder",
		"WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 5) SEARCH DEPTH FIRST BY n SET o SELECT * FROM r", "SELECT grouping(id) FROM t GROUP BY ROLLUP (id)", "SELECT E'\\'' || U&'\\0061' || $$a$$ || B'1'::text",
		"SELECT currval('s') WHERE false", "SELECT * FROM pg_locks", "SELECT current_setting('search_path'), version(), pg_backend_pid()", "SELECT /* ; DELETE FROM t */ 1 -- ; DELETE",
	} {
		if _, err := m.Run(t.Context(), request(sql), &bytes.Buffer{}); err != nil {
			t.Errorf("%s: %v", sql, err)
		}
	}
	for _, c := range []struct {
		sql  string
		at   string // the refusal's position is that of this text
		says string
	}{
		{"DELETE FROM t", "DELETE", "read-only"},
		{"WITH d AS (DELETE FROM t RETURNING *) SELECT * FROM d", "d AS", "DELETE"},
		{"SELECT 1 FROM (SELECT 1 WHERE EXISTS (SELECT 1)) x, t FOR UPDATE", "", "FOR UPDATE"},
		{"SELECT * FROM (SELECT * FROM t FOR SHARE) x", "", "FOR UPDATE"},
		{"SELECT * INTO copy FROM t", "", "SELECT INTO"},
		{"SELECT 1; SELECT 2", "", "more than one"},
		{"EXPLAIN ANALYZE SELECT 1", "EXPLAIN", "EXPLAIN"},
		{"COPY t TO PROGRAM 'cat'", "COPY", "COPY"},
		{"COPY (SELECT 1) TO STDOUT", "COPY", "COPY"},
		{"DO $$ BEGIN END $$", "DO", "read-only"},
		{"CALL x()", "CALL", "read-only"},
		{"BEGIN READ WRITE", "BEGIN", "transaction"},
		{"SET ROLE postgres", "SET", "session"},
		{"LOCK TABLE t", "LOCK", "LOCK"},
		{"SELECT  evil(1)", "evil", "public.evil"},
		{"SELECT 'é', \"Quoted Evil\"()", "\"Quoted", "Quoted Evil"},
		{"SELECT U&\"\\0065vil\"(1)", "U&", "evil"},
		{"SELECT public . evil (1)", "public", "evil"},
		{"SELECT postgres.public.evil(1)", "postgres.", "evil"},
		{"SELECT x.evil FROM t x", "x.evil", "evil"},
		{"SELECT (x).evil FROM t x", "", "evil"},
		{"SELECT (1).pg_cancel_backend", "", "pg_cancel_backend"},
		{"SELECT c.pg_cancel_backend FROM generate_series(1, 1) c", "c.pg", "pg_cancel_backend"},
		{"SELECT coalesce(d, '1') FROM holder", "holder", "check of the domain"},
		{"SELECT coalesce(d, NULL) FROM holder", "holder", "check of the domain"},
		{"SELECT name === 'a' FROM t", "===", "operator ==="},
		{"SELECT name OPERATOR(public.===) 'a' FROM t", "OPERATOR", "operator ==="},
		{"SELECT name === ANY (ARRAY['a']) FROM t", "===", "operator ==="},
		{"SELECT * FROM evil_view", "evil_view", "the view public.evil_view"},
		{"SELECT * FROM evil_inside", "evil_inside", "the view public.evil_view"},
		{"SELECT 1 WHERE 1 IN (SELECT id FROM evil_inside)", "evil_inside", "view"},
		{"TABLE builtin_view", "builtin_view", "nextval"},
		{"TABLE operator_view", "operator_view", "operator ==="},
		{"TABLE notify_view", "notify_view", "pg_notify"},
		{"TABLE guarded", "guarded", "row security of public.guarded"},
		{"SELECT 1::evil_domain", "evil_domain", "check of the domain"},
		{"SELECT evil_domain(1)", "evil_domain", "check of the domain"},
		{"SELECT CAST('(1,2)' AS pair)", "pair", "check of the domain"},
		{"SELECT * FROM json_populate_record(NULL::holder, '{\"d\":1}')", "holder", "domain"},
		{"SELECT json_populate_record(h, '{\"d\":1}') FROM holder h", "holder", "domain"},
		{"SELECT * FROM json_to_record('{\"d\":1}') AS x(d evil_domain)", "evil_domain", "domain"},
		{"SELECT domain_in('1', 'evil_domain'::regtype, -1)", "domain_in", "domain_in"},
		{"SELECT (t.*)::int FROM t", "", "cast"},
		{"SELECT evil_sum(id) FROM t", "evil_sum", "evil_sum"},
		{"TABLE program", "program", "foreign table"},
		{"TABLE parent", "parent", "foreign table"},
		{"SELECT nextval('s')", "nextval", "nextval"},
		{"SELECT * FROM pg_file_settings", "pg_file_settings", "files"},
		{"SELECT * FROM pg_hba_file_rules()", "pg_hba", "pg_hba_file_rules"},
		{"SELECT pg_advisory_xact_lock(1)", "pg_adv", "pg_advisory"},
		{"SELECT lo_create(0)", "lo_create", "lo_create"},
		{"SELECT txid_current()", "txid", "txid_current"},
		{"SELECT query_to_xml('DELETE FROM t', true, true, '')", "query", "query_to_xml"},
		{"SELECT table_to_xml('evil_view', true, true, '')", "table_to", "table_to_xml"},
		{"SELECT * FROM dblink('dbname=postgres', 'SELECT 1') AS x(a int)", "dblink", "dblink"},
		{"SELECT * FROM crosstab('SELECT 1') AS x(a int)", "crosstab", "crosstab"},
		{"SELECT set_config('default_transaction_read_only', 'off', false)", "set_config", "set_config"},
		{"SELECT set_config(name, '', false) FROM t", "set_config", "set_config"},
		{"SELECT pg_terminate_backend(1)", "pg_term", "pg_terminate_backend"},
		{"SELECT pg_read_file('/etc/passwd')", "pg_read", "pg_read_file"},
		{"SELECT fmgr_c_validator(1)", "fmgr", "fmgr_c_validator"},
		{"SELECT * FROM t TABLESAMPLE system_rows (1)", "", "system_rows"},
		{"SELECT id FROM t ORDER BY name USING ===", "", "==="},
	} {
		_, err := m.Run(t.Context(), request(c.sql), &bytes.Buffer{})
		var e *proto.Error
		if !errors.As(err, &e) || e.Code != proto.CodePolicyDenied {
			t.Errorf("%s: got %v, want it refused", c.sql, err)
			continue
		}
		if !strings.Contains(e.Message, c.says) || strings.Contains(e.Message, "\n") {
			t.Errorf("%s: got %q, want it to say %q", c.sql, e.Message, c.says)
		}
		if want := len([]rune(c.sql[:strings.Index(c.sql, c.at)])) + 1; c.at != "" && int(e.SQL.GetPosition()) != want {
			t.Errorf("%s: got position %d, want %d (%s)", c.sql, e.SQL.GetPosition(), want, e.Message)
		}
	}
	var locks, logged string
	conn, err := s.Connect(t.Context(), pgserver.Superuser)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if err := conn.QueryRow(t.Context(), "SELECT (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory')::text, (SELECT last_value || is_called::text FROM s)").Scan(&locks, &logged); err != nil {
		t.Fatal(err)
	}
	if locks != "0" || logged != "1false" {
		t.Errorf("afterwards: got %s advisory locks and the sequence at %s", locks, logged)
	}
}

// TestReadWriteGuard: what a read-write source refuses, with and without limits.
func TestReadWriteGuard(t *testing.T) {
	s := guardServer(t)
	if err := s.SQL(t.Context(), "CREATE TABLE app.things (id serial PRIMARY KEY, v int)", "CREATE TABLE only_public (v int)"); err != nil {
		t.Fatal(err)
	}
	guards := map[string]sqlsession.Guard{
		"free":    {Mode: "read-write"},
		"schemas": {Mode: "read-write", WriteSchemas: []string{"app", "tenant_*"}},
		"kinds":   {Mode: "read-write", WriteStatements: []string{"insert", "update"}},
		"both":    {Mode: "read-write", WriteSchemas: []string{"app"}, WriteStatements: []string{"insert", "ddl"}},
		"named":   {Mode: "read-write", Functions: []string{"pg_stat_file"}},
	}
	managers := make(map[string]*sqlsession.Manager)
	for name, guard := range guards {
		managers[name] = guardManager(t, s, guard)
	}
	for _, c := range []struct {
		guard, sql string
		says       string // "": it is allowed
	}{
		{"free", "INSERT INTO t VALUES (100)", ""},
		{"free", "SELECT evil(1), nextval('s')", ""},
		{"free", "DO $$ BEGIN END $$", ""},
		{"free", "CREATE TABLE made (id int)", ""},
		{"free", "DROP TABLE made", ""},
		{"free", "EXPLAIN DELETE FROM t", "EXPLAIN"},
		{"free", "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'", ""},
		{"free", "SELECT pg_read_file('/etc/hostname')", "pg_read_file"},
		{"free", "SELECT pg_catalog.pg_terminate_backend(0)", "pg_terminate_backend"},
		{"free", "INSERT INTO t SELECT 1 FROM pg_stat_file('/etc/passwd')", "pg_stat_file"},
		{"named", "SELECT size > 0 FROM pg_stat_file('/etc/passwd')", ""},
		{"free", "SELECT * FROM dblink('', 'SELECT 1') AS x(a int)", "dblink"},
		{"free", "ALTER SYSTEM SET work_mem = '1GB'", "ALTER SYSTEM"},
		{"free", "LOAD 'auto_explain'", "LOAD"},
		{"free", "COPY t TO '/tmp/x'", "COPY"},
		{"free", "COPY t FROM PROGRAM 'id'", "COPY"},
		{"free", "DO LANGUAGE plpython3u 'import os'", "plpython3u"},
		{"free", "CREATE FUNCTION g() RETURNS int LANGUAGE C AS 'libc', 'system'", `"c"`},
		{"free", "CREATE TABLESPACE x LOCATION '/tmp'", "tablespaces"},
		{"free", "CREATE SERVER x FOREIGN DATA WRAPPER file_fdw", "foreign"},
		{"free", "CREATE SUBSCRIPTION x CONNECTION '' PUBLICATION y", "subscription"},
		{"free", "CHECKPOINT", "CHECKPOINT"},
		{"free", "COMMIT", "transaction of its own"},
		{"free", "SELECT 1; DELETE FROM t", "more than one"},
		{"schemas", "INSERT INTO app.things (v) VALUES (1)", ""},
		{"schemas", "SELECT * FROM t", ""},
		{"schemas", "INSERT INTO app.things (v) SELECT id FROM t", ""},
		{"schemas", "INSERT INTO t VALUES (200)", "schema public"},
		{"schemas", "INSERT INTO only_public VALUES (1)", "schema public"},
		{"schemas", "WITH w AS (UPDATE t SET name = 'x' RETURNING *) INSERT INTO app.things (v) SELECT id FROM w", "schema public"},
		{"schemas", "WITH t AS (SELECT 1) DELETE FROM t", "schema public"},
		{"schemas", "MERGE INTO t USING app.things x ON t.id = x.id WHEN MATCHED THEN DELETE", "schema public"},
		{"schemas", "TRUNCATE app.things, t", "schema public"},
		{"schemas", "CREATE TABLE app.made (id int)", ""},
		{"schemas", "CREATE TABLE made (id int)", "schema public"},
		{"schemas", "CREATE TEMP TABLE made (id int)", ""},
		{"schemas", "CREATE TABLE made AS SELECT 1", "schema public"},
		{"schemas", "SELECT 1 AS a INTO made", "schema public"},
		{"schemas", "CREATE SCHEMA tenant_1", ""},
		{"schemas", "CREATE SCHEMA other", "refused"},
		{"schemas", "DROP TABLE app.made", ""},
		{"schemas", "DROP TABLE t", "schema public"},
		{"schemas", "DROP SCHEMA app", "can't be told"},
		{"schemas", "DROP TABLE app.things CASCADE", "CASCADE"},
		{"schemas", "ALTER TABLE t ADD COLUMN x int", "schema public"},
		{"schemas", "ALTER TABLE app.things SET SCHEMA public", "can't be told"},
		{"schemas", "DO $$ BEGIN DELETE FROM t; END $$", "write does not allow"},
		{"schemas", "SELECT evil(1)", "public.evil"},
		{"schemas", "SELECT query_to_xml('DELETE FROM t', true, true, '')", "query_to_xml"},
		{"schemas", "CREATE ROLE x", "can't be told"},
		{"schemas", "VACUUM t", "write does not allow"},
		{"kinds", "INSERT INTO t VALUES (300)", ""},
		{"kinds", "INSERT INTO t VALUES (300) ON CONFLICT (id) DO UPDATE SET name = 'y'", ""},
		{"kinds", "UPDATE t SET name = 'z' WHERE id = 300", ""},
		{"kinds", "DELETE FROM t", "DELETE is refused"},
		{"kinds", "WITH d AS (DELETE FROM t RETURNING id) SELECT * FROM d", "DELETE is refused"},
		{"kinds", "EXPLAIN ANALYZE DELETE FROM t", "EXPLAIN is refused"},
		{"kinds", "TRUNCATE t", "TRUNCATE is refused"},
		{"kinds", "CREATE TABLE x (a int)", "DDL is refused"},
		{"kinds", "CALL x()", "CALL is refused"},
		{"kinds", "NOTIFY x", "write does not allow"},
		{"kinds", "SELECT lo_create(0)", "lo_create"},
		{"both", "INSERT INTO app.things (v) VALUES (2)", ""},
		{"both", "INSERT INTO app.things (id, v) VALUES (1, 2) ON CONFLICT (id) DO UPDATE SET v = 3", "UPDATE is refused"},
		{"both", "UPDATE app.things SET v = 1", "UPDATE is refused"},
	} {
		r := request(c.sql)
		r.ReadWrite = true
		_, err := managers[c.guard].Run(t.Context(), r, &bytes.Buffer{})
		var e *proto.Error
		switch {
		case c.says == "" && err != nil:
			t.Errorf("%s: %s: %v", c.guard, c.sql, err)
		case c.says != "" && (!errors.As(err, &e) || e.Code != proto.CodePolicyDenied || !strings.Contains(e.Message, c.says)):
			t.Errorf("%s: %s: got %v, want it refused and to say %q", c.guard, c.sql, err, c.says)
		}
	}
}
