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
		{"INSERT INTO vault.strict VALUES ('{1}')", proto.CodeSQL, "the reason is not told, as it may hold data (SQLSTATE 42P01", 34},
		{"SELECT 1; SELECT 2", proto.CodePolicyDenied, "more than one statement", 0},
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
