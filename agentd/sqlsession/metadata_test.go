package sqlsession_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// canary stands in tables, and so must be in nothing that comes out in mode metadata.
const canary = "zebra4711"

// metadataManager is a superuser's data source in mode metadata, with canaries
// wherever a database may have them.
func metadataManager(t *testing.T, change func(*sqlsession.Source)) *sqlsession.Manager {
	t.Helper()
	err := server.SQL(t.Context(),
		"CREATE SCHEMA vault",
		"CREATE TYPE vault.mood AS ENUM ('fine', 'bad')",
		"CREATE TABLE vault.people (id int PRIMARY KEY, name varchar(40) NOT NULL, mail text DEFAULT 'zebra4711-default', score numeric(10,2), mood vault.mood)",
		"INSERT INTO vault.people SELECT i, 'zebra4711-name', 'zebra4711-mail', 4711.42, 'fine' FROM generate_series(1, 500) i",
		"CREATE VIEW vault.seen AS SELECT id, name FROM vault.people WHERE name <> 'zebra4711-view'",
		"CREATE FUNCTION vault.told() RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RAISE NOTICE 'zebra4711-notice'; RETURN (SELECT max(name) FROM vault.people); END $$",
		"CREATE FUNCTION vault.cried(int) RETURNS bool IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION USING MESSAGE = (SELECT max(name) FROM vault.people), ERRCODE = '42P01', HINT = 'zebra4711', DETAIL = 'zebra4711'; END $$",
		"CREATE DOMAIN vault.checked AS int CHECK (vault.cried(VALUE))",
		"CREATE TABLE vault.strict (c vault.checked[])",
		"ANALYZE vault.people",
	)
	if err != nil {
		t.Fatal(err)
	}
	cleanUp(t, "DROP SCHEMA vault CASCADE")
	src := superSource()
	if change != nil {
		change(&src)
	}
	return newManager(t, sqlsession.Config{}, src)
}

// superSource is the shared server in mode metadata, as superuser.
func superSource() sqlsession.Source {
	src := source("db")
	src.DSN, src.Password, src.ReadWrite = server.DSN(pgserver.Superuser, pgserver.Superuser), password(server.Password), false
	src.Guard.Mode = "metadata"
	return src
}

// everything is all that comes out of a statement, as one text.
func everything(stream []byte, outcome *posternv1.QueryOutcome, err error) string {
	return string(stream) + proto.EncodeOutcome(outcome) + fmt.Sprintf("%v %+v", err, outcome)
}

func TestMetadataDescribes(t *testing.T) {
	m := metadataManager(t, nil)
	tests := []struct {
		sql, columns, parameters string
	}{
		{"SELECT * FROM vault.people", "id integer no; name character varying(40) no; mail text yes; score numeric(10,2) yes; mood vault.mood yes", ""},
		{"TABLE vault.seen", "id integer yes; name character varying(40) yes", ""},
		{"VALUES (1, 'x')", "column1 integer yes; column2 text yes", ""},
		{"WITH a AS (DELETE FROM vault.people RETURNING id) SELECT * FROM a", "id integer no", ""},
		{"SELECT p.id, q.name FROM vault.people p LEFT JOIN vault.people q ON q.id = p.id + 1", "id integer yes; name character varying(40) yes", ""},
		{"SELECT count(*) AS n, :a::date AS d FROM vault.people WHERE id = {{b}} AND mood = :c", "n bigint yes; d date yes", "a date, b integer, c vault.mood"},
		{"INSERT INTO vault.people VALUES (:id, 'x')", "", "id integer"},
		{"UPDATE vault.people SET name = 'x' WHERE id = 1 RETURNING name, mail", "name character varying(40) no; mail text yes", ""},
		{"DELETE FROM vault.people", "", ""},
		{"MERGE INTO vault.people p USING vault.seen s ON p.id = s.id WHEN MATCHED THEN DELETE", "", ""},
		{"SELECT", "", ""},
		{"((SELECT 1 AS one))", "one integer yes", ""},
	}
	for _, test := range tests {
		got, outcome := query(t, m, request(test.sql))
		var columns []string
		for _, f := range got.schema.Fields() {
			sql, _ := f.Metadata.GetValue("pg.sqltype")
			nullable := "no"
			if f.Nullable {
				nullable = "yes"
			}
			columns = append(columns, f.Name+" "+sql+" "+nullable)
		}
		var parameters []string
		for _, p := range outcome.Parameters {
			parameters = append(parameters, p.Name+" "+p.Type)
		}
		if got := strings.Join(columns, "; "); got != test.columns {
			t.Errorf("%s: got columns %q, want %q", test.sql, got, test.columns)
		}
		if got := strings.Join(parameters, ", "); got != test.parameters {
			t.Errorf("%s: got parameters %q, want %q", test.sql, got, test.parameters)
		}
		if outcome.Rows != 0 || outcome.CommandTag != "DESCRIBE" {
			t.Errorf("%s: got %d rows, tag %q", test.sql, outcome.Rows, outcome.CommandTag)
		}
	}
	if n := one(t, "SELECT count(*) FROM vault.people"); n != "500" {
		t.Errorf("got %s people after it, want 500", n)
	}
}

// TestMetadataTellsNoValue tries to get a value out by what is evaluated before
// a statement runs, or by what the server says.
func TestMetadataTellsNoValue(t *testing.T) {
	m := metadataManager(t, nil)
	for _, sql := range []string{
		"SELECT name::int FROM vault.people",
		"SELECT vault.told()",
		"SELECT * FROM vault.people WHERE name = vault.told()",
		"SELECT '{1}'::vault.checked[]",
		"INSERT INTO vault.strict VALUES ('{1}')",
		"SELECT 1/0 FROM vault.people",
		"SELECT most_common_vals FROM pg_stats",
		"SELECT prosrc FROM pg_proc WHERE proname = 'told'",
		"SELECT pg_get_viewdef('vault.seen'::regclass)",
		"SELECT query_to_xml('select * from vault.people', true, true, '')",
		"SELECT * FROM vault.people ORDER BY vault.cried(id)",
		"SELECT xmlparse(document (SELECT name FROM vault.people LIMIT 1))",
		"TABLE vault.people", "SELECT zebra FROM vault.people", "SELECT 'x'::vault.mood", "SELECT name FROM vault.people LIMIT 'x'",
		"SELECT * INTO vault.copied FROM vault.people",
		"DO $$ BEGIN RAISE NOTICE '%', (SELECT max(name) FROM vault.people); END $$",
		"EXPLAIN ANALYZE SELECT * FROM vault.people", "SHOW all", "COPY vault.people TO STDOUT", "CALL x()", "FETCH ALL FROM c", "EXECUTE x",
		"SELECT 1; SELECT 2", "CREATE TABLE vault.x AS TABLE vault.people", "", "SELECT * FROM", "SELECT (SELECT name FROM vault.people)::int",
	} {
		var out bytes.Buffer
		outcome, err := m.Run(t.Context(), request(sql), &out)
		if all := everything(out.Bytes(), outcome, err); strings.Contains(all, canary) || outcome.Rows > 0 {
			t.Errorf("%s: a value came out: %s", sql, all)
		}
		switch proto.CodeOf(err) {
		case 0, proto.CodeSQL, proto.CodePolicyDenied, proto.CodeInvalid:
		default:
			t.Errorf("%s: was not looked at: %v", sql, err)
		}
	}
	if one(t, "SELECT count(*) FROM pg_class WHERE relname IN ('copied', 'x') AND relnamespace = 'vault'::regnamespace") != "0" {
		t.Error("a statement in mode metadata made a table")
	}
}

func TestMetadataErrors(t *testing.T) {
	m := metadataManager(t, nil)
	tests := []struct {
		sql      string
		code     proto.Code
		says     string
		position int32
	}{
		{"SELECT nam FROM vault.people", proto.CodeSQL, `column "nam" does not exist (SQLSTATE 42703, position 8)`, 8},
		{"SELECT * FROM vault.nothing", proto.CodeSQL, `relation "vault.nothing" does not exist`, 15},
		{"SELECT 'abc'::int", proto.CodeSQL, "a value in the statement is not of the type that it should be (SQLSTATE 22P02, position 8)", 8},
		{"INSERT INTO vault.strict VALUES (' {1}')", proto.CodePolicyDenied, "it is one of the domain vault.checked in an array or a row PostgreSQL runs vault.cried", 34},
		{"SELECT 1; SELECT 2", proto.CodePolicyDenied, "more than one statement", 10},
		{"VACUUM", proto.CodePolicyDenied, "VACUUM is refused: the data source tells metadata only", 0},
		{"SELECT selec FROM (", proto.CodeSQL, "syntax error at end of input", 20},
	}
	for _, test := range tests {
		e := refuse(t, m, request(test.sql), test.code)
		if !strings.Contains(e.Error(), test.says) || e.SQL.GetPosition() != test.position {
			t.Errorf("%s: got %q at %d, want %q at %d", test.sql, e, e.SQL.GetPosition(), test.says, test.position)
		}
	}
}

func TestMetadataReadsTheCatalog(t *testing.T) {
	m := metadataManager(t, nil)
	tests := []struct{ sql, want string }{
		{"SELECT attname, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute WHERE attrelid = 'vault.people'::regclass AND attnum BETWEEN 1 AND 2 ORDER BY attnum", "id|integer|true;name|character varying(40)|true"},
		{"SELECT table_name, table_type FROM information_schema.tables WHERE table_schema = 'vault' ORDER BY 1", "people|BASE TABLE;seen|VIEW;strict|BASE TABLE"},
		{"SELECT column_name FROM information_schema.columns WHERE table_schema = 'vault' AND table_name = 'people' ORDER BY ordinal_position LIMIT 2", "id;name"},
		{"SELECT c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'vault' AND c.relkind = 'r' ORDER BY 1", "people;strict"},
		{"SELECT proname, pg_get_function_identity_arguments(oid) FROM pg_proc WHERE pronamespace = 'vault'::regnamespace ORDER BY 1", "cried|integer;told|"},
		{"SELECT conname, contype FROM pg_constraint WHERE conrelid = 'vault.people'::regclass", "people_pkey|p"},
		{"WITH t AS (SELECT oid, relname AS n FROM pg_class WHERE relnamespace = 'vault'::regnamespace AND relkind = 'v') SELECT n FROM t", "seen"},
	}
	for _, test := range tests {
		got, _ := query(t, m, request(test.sql))
		var rows []string
		for _, row := range got.rows {
			rows = append(rows, strings.Join(row, "|"))
		}
		if text := strings.Join(rows, ";"); text != test.want {
			t.Errorf("%s: got %s, want %s", test.sql, text, test.want)
		}
	}
	r := request("SELECT relname FROM pg_class WHERE oid = :table::regclass")
	refuse(t, m, r, proto.CodeInvalid)
	people := "vault.people"
	r = request(r.SQL)
	r.Parameters = []*posternv1.Parameter{{Name: "table", Value: &people}}
	if got, _ := query(t, m, r); len(got.rows) != 1 || got.rows[0][0] != "people" {
		t.Errorf("with a parameter: got %v", got.rows)
	}
}

// TestMetadataHidesInTheCatalog tries to have the catalog tell data.
func TestMetadataHidesInTheCatalog(t *testing.T) {
	m := metadataManager(t, nil)
	err := server.SQL(t.Context(),
		"CREATE TABLE vault.many (a int DEFAULT length('zebra4711-expression'), b text CHECK (b <> 'zebra4711-check'), c text GENERATED ALWAYS AS ('zebra4711-generated') STORED)",
		"CREATE INDEX ON vault.many ((b || 'zebra4711-index')) WHERE b > 'zebra4711-where'",
		"ALTER TABLE vault.many ADD COLUMN d text DEFAULT 'zebra4711-missing'",
		"CREATE FUNCTION vault.defaults(a text DEFAULT 'zebra4711-argument') RETURNS int LANGUAGE sql SET application_name = 'zebra4711-set' AS 'SELECT 1 -- zebra4711-source'",
		"CREATE TABLE vault.by_list (k text) PARTITION BY LIST (k)", "CREATE TABLE vault.by_list_1 PARTITION OF vault.by_list FOR VALUES IN ('zebra4711-bound')",
		"CREATE FUNCTION vault.whole(pg_catalog.pg_proc) RETURNS text LANGUAGE sql AS 'SELECT $1.prosrc'",
		"CREATE FUNCTION vault.length(oid) RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT max(name) FROM vault.people'",
		"CREATE VIEW vault.pg_class AS SELECT name AS relname FROM vault.people",
		"CREATE DOMAIN vault.known AS text DEFAULT 'zebra4711-domain' CHECK (VALUE <> 'zebra4711-known')",
	)
	if err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{
		"SELECT prosrc FROM pg_proc", "SELECT * FROM pg_proc", "SELECT p FROM pg_proc p", "SELECT p.whole FROM pg_proc p", "SELECT vault.whole(p) FROM pg_proc p",
		"SELECT p.row_to_json FROM pg_proc p", "SELECT p.to_jsonb FROM pg_proc AS p", "SELECT p.text FROM pg_proc p", "SELECT p.array_agg FROM pg_proc p", "SELECT p::text FROM pg_proc p",
		"SELECT x.to_json FROM (SELECT prosrc FROM pg_proc) x", "SELECT json_agg(p) FROM pg_proc p", "SELECT count(p.*) FROM pg_proc p",
		"SELECT pg_get_functiondef(oid) FROM pg_proc", "SELECT pg_get_function_arguments(oid) FROM pg_proc WHERE proname = 'defaults'", "SELECT pg_get_function_sqlbody(oid) FROM pg_proc",
		"SELECT pg_get_constraintdef(oid) FROM pg_constraint", "SELECT pg_get_indexdef(indexrelid) FROM pg_index", "SELECT pg_get_viewdef(oid) FROM pg_class", "SELECT pg_get_partkeydef(oid) FROM pg_class",
		"SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef", "SELECT adbin FROM pg_attrdef", "SELECT relpartbound FROM pg_class", "SELECT attmissingval FROM pg_attribute",
		"SELECT typdefault FROM pg_type", "SELECT proconfig FROM pg_proc", "SELECT proargdefaults FROM pg_proc", "SELECT column_default FROM information_schema.columns",
		"SELECT generation_expression FROM information_schema.columns", "SELECT routine_definition FROM information_schema.routines", "SELECT parameter_default FROM information_schema.parameters",
		"SELECT view_definition FROM information_schema.views", "SELECT check_clause FROM information_schema.check_constraints", "SELECT domain_default FROM information_schema.domains",
		"SELECT most_common_vals FROM pg_stats", "SELECT stavalues1 FROM pg_statistic", "SELECT query FROM pg_stat_activity", "SELECT rolpassword FROM pg_authid", "SELECT passwd FROM pg_shadow",
		"SELECT definition FROM pg_views", "SELECT indexdef FROM pg_indexes", "SELECT ev_action FROM pg_rewrite", "SELECT reltuples FROM pg_class", "SELECT n_live_tup FROM pg_stat_user_tables",
		"SELECT relname FROM vault.pg_class", "SELECT length(oid) FROM pg_class", "SELECT vault.length(oid) FROM pg_class", "SELECT vault.told() FROM pg_class",
		"SELECT table_to_xml('vault.people', true, true, '') FROM pg_class", "SELECT query_to_xml('table vault.people', true, true, '') FROM pg_class", "SELECT pg_read_file('PG_VERSION') FROM pg_class",
		"SELECT pg_relation_size(oid) FROM pg_class", "SELECT current_setting('application_name') FROM pg_class", "SELECT last_value FROM pg_sequences",
		"SELECT relname::int FROM pg_class", "SELECT relname, (SELECT name FROM vault.people LIMIT 1) FROM pg_class",
		"SELECT lo_get(oid) FROM pg_class", "SELECT pg_sleep(60) FROM pg_class", "SELECT relname FROM pg_class FOR UPDATE",
		"WITH people AS (SELECT 1) SELECT relname, x.name FROM pg_class, (SELECT name FROM vault.people) x",
		"WITH a AS (SELECT relname FROM pg_class), b AS (DELETE FROM vault.people RETURNING name) SELECT * FROM a, b",
		"SELECT pg_notify('a', relname) FROM pg_class", "SELECT nextval('vault.s') FROM pg_class", "SELECT set_config('a.b', relname, false) FROM pg_class",
		"SELECT a FROM vault.many", "SELECT 1 FROM pg_class WHERE 1 / (oid::int - oid::int) > 0", "SELECT dumped FROM pg_stat_statements",
	} {
		var out bytes.Buffer
		outcome, err := m.Run(t.Context(), request(sql), &out)
		if all := everything(out.Bytes(), outcome, err); strings.Contains(all, canary) || outcome.Rows > 0 {
			t.Errorf("%s: it was told: %.300s", sql, all)
		}
		switch proto.CodeOf(err) {
		case 0, proto.CodeSQL, proto.CodePolicyDenied, proto.CodeInvalid:
		default:
			t.Errorf("%s: was not looked at: %v", sql, err)
		}
	}
	if n := one(t, "SELECT count(*) FROM vault.people"); n != "500" {
		t.Errorf("got %s people, want 500", n)
	}
}
