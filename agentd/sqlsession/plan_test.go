package sqlsession_test

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// plansManager is metadataManager with a mode and plans.
func plansManager(t *testing.T, mode, plans string, functions ...string) *sqlsession.Manager {
	t.Helper()
	return metadataManager(t, func(s *sqlsession.Source) {
		s.Guard.Mode, s.Guard.Plans, s.Guard.Functions = mode, plans, functions
		s.ReadWrite = mode == "read-write"
	})
}

// planOf asks for a plan and returns the value of QUERY PLAN.
func planOf(t *testing.T, m *sqlsession.Manager, r sqlsession.Request) string {
	t.Helper()
	if r.Explain == "" {
		r.Explain = "plan"
	}
	got, outcome := query(t, m, r)
	if outcome.CommandTag != "EXPLAIN" || len(got.rows) != 1 || len(got.rows[0]) != 1 || got.schema.Field(0).Name != "QUERY PLAN" {
		t.Fatalf("%s: got %d rows, tag %q", r.SQL, len(got.rows), outcome.CommandTag)
	}
	if !json.Valid([]byte(got.rows[0][0])) {
		t.Fatalf("%s: got %s, which is no JSON", r.SQL, got.rows[0][0])
	}
	return got.rows[0][0]
}

func TestPlanStructure(t *testing.T) {
	const sql = "SELECT p.name, count(*) FROM vault.people p JOIN vault.people q ON q.id = p.id + 77 WHERE p.mail = 'zebra4711-mail' AND q.score > 4711.42 AND q.name <> lower('ZEBRA4711') GROUP BY p.name ORDER BY p.name"
	for _, mode := range []string{"metadata", "read-only", "read-write"} {
		t.Run(mode, func(t *testing.T) {
			m := plansManager(t, mode, "structure")
			plan := planOf(t, m, request(sql))
			for _, want := range []string{`"Relation Name":"people"`, `"Schema":"vault"`, `"Node Type":"Sort"`, `p.mail = ?::text`, `q.score > ?`, `"Sort Key":["p.name"]`} {
				if !strings.Contains(plan, want) {
					t.Errorf("got %s, want %s in it", plan, want)
				}
			}
			for _, never := range []string{"4711", "77", "Width", "Startup", "Output"} {
				if strings.Contains(plan, never) {
					t.Errorf("%q is in %s", never, plan)
				}
			}
			numbers := strings.Contains(plan, `"Plan Rows":`)
			if numbers == (mode == "metadata") {
				t.Errorf("numbers: got %v in mode %s: %s", numbers, mode, plan)
			}
		})
	}
}

func TestPlanOfAWrite(t *testing.T) {
	m := plansManager(t, "read-write", "analyze")
	plan := planOf(t, m, request("DELETE FROM vault.people WHERE id = 5"))
	if !strings.Contains(plan, `"Operation":"Delete"`) || !strings.Contains(plan, "people_pkey") {
		t.Errorf("got %s", plan)
	}
	r := request("DELETE FROM vault.people WHERE id = 5")
	r.Explain = "analyze"
	refuse(t, m, r, proto.CodePolicyDenied)
	r = request("WITH d AS (DELETE FROM vault.people RETURNING id) SELECT * FROM d")
	r.Explain = "analyze"
	refuse(t, m, r, proto.CodePolicyDenied)
	if n := one(t, "SELECT count(*) FROM vault.people"); n != "500" {
		t.Errorf("got %s people, want 500", n)
	}
}

func TestPlanFull(t *testing.T) {
	m := plansManager(t, "read-only", "full")
	r := request("SELECT * FROM vault.people WHERE id = :id")
	five := "5"
	r.Parameters = []*posternv1.Parameter{{Name: "id", Value: &five}}
	plan := planOf(t, m, r)
	for _, want := range []string{`"Index Cond":"(people.id = 5)"`, `"Plan Width"`, `"Output"`} {
		if !strings.Contains(plan, want) {
			t.Errorf("got %s, want %s in it", plan, want)
		}
	}
	r.QueryID, r.Explain = "analyzed", "analyze"
	if e := refuse(t, m, r, proto.CodePolicyDenied); !strings.Contains(e.Error(), "plans: full") {
		t.Errorf("got %q", e)
	}
}

func TestPlanAnalyze(t *testing.T) {
	for _, mode := range []string{"read-only", "read-write"} {
		t.Run(mode, func(t *testing.T) {
			m := plansManager(t, mode, "analyze", "nextval")
			r := request("SELECT count(*) FROM vault.people WHERE score > 4711")
			r.Explain = "analyze"
			plan := planOf(t, m, r)
			for _, want := range []string{`"Actual Rows":500`, `"Execution Time"`, `"Shared Hit Blocks"`} {
				if !strings.Contains(plan, want) {
					t.Errorf("got %s, want %s in it", plan, want)
				}
			}
			// Even what the policy lets be called can't write.
			if err := server.SQL(t.Context(), "CREATE SEQUENCE vault.counter"); err != nil {
				t.Fatal(err)
			}
			r = request("SELECT nextval('vault.counter')")
			r.Explain = "analyze"
			refuse(t, m, r, proto.CodePolicyDenied)
			if one(t, "SELECT is_called FROM vault.counter") != "false" {
				t.Error("the sequence was moved")
			}
			// The session is as good as before.
			if plan := planOf(t, m, request("SELECT 1")); !strings.Contains(plan, "Result") {
				t.Errorf("got %s", plan)
			}
		})
	}
}

// TestPlanTellsNoValue tries to have values printed or used by the planner.
func TestPlanTellsNoValue(t *testing.T) {
	m := plansManager(t, "metadata", "structure")
	err := server.SQL(t.Context(),
		"CREATE FUNCTION vault.peek() RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT max(name) FROM vault.people'",
		"CREATE FUNCTION vault.lower(int) RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT max(name) FROM vault.people'",
		"CREATE FUNCTION vault.same(text, int) RETURNS bool IMMUTABLE LANGUAGE sql AS 'SELECT max(name) = $1 FROM vault.people'",
		"CREATE OPERATOR vault.=== (FUNCTION = vault.same, LEFTARG = text, RIGHTARG = int)",
		"CREATE VIEW vault.peeking AS SELECT vault.peek() AS p, id FROM vault.people WHERE name > vault.peek()",
		"CREATE VIEW vault.signals AS SELECT pg_terminate_backend(1) AS t FROM vault.people",
		"CREATE VIEW vault.usual AS SELECT id, upper(name) || mail || current_user AS u, score::int::text AS e7, now() - interval '1 day' > '2020-01-01' AS c,"+
			" count(*) OVER (PARTITION BY date_trunc('day', now())) AS n, coalesce(mail, to_char(now(), 'YYYY')), current_setting('a.b', true), CURRENT_DATE < now() AS d, 'a' @@ 'b' AS m, name::name AS e4,"+
			" now()::date::text AS e1, name LIKE 'x%' AS e2, extract(epoch FROM now()), row_to_json(p), array_agg(id) OVER (), now()::timestamp AS e3, '{}'::jsonb @> to_jsonb(name) AS e5, array[1]::text AS e6 FROM vault.people p",
		"CREATE TABLE vault.guarded (a text)",
		"ALTER TABLE vault.guarded ENABLE ROW LEVEL SECURITY",
		"CREATE POLICY p ON vault.guarded USING (a = vault.peek())",
		"CREATE FUNCTION vault.given(vault.people) RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT max(name) FROM vault.people'",
		"CREATE INDEX odd ON vault.people ((name || 'zebra4711-index')) WHERE mail > 'zebra4711-predicate'",
		"CREATE TABLE vault.parts (k text) PARTITION BY LIST (k)",
		"CREATE TABLE vault.part1 PARTITION OF vault.parts FOR VALUES IN ('zebra4711-part')",
	)
	if err != nil {
		t.Fatal(err)
	}
	refused := []string{
		"SELECT vault.peek()", "SELECT * FROM vault.people WHERE name = vault.peek()", "SELECT vault.told()",
		"SELECT lower(5)", "SELECT * FROM vault.signals", "SELECT 'a' OPERATOR(vault.===) 1", "SELECT * FROM vault.peeking", "SELECT * FROM vault.guarded",
		"SELECT (ROW(1, 'a', 'b', 1, 'fine')::vault.people).given", "SELECT current_setting('data_directory')",
		"SELECT * FROM vault.people WHERE length(table_to_xml('vault.people', true, true, '')::text) > id",
		"SELECT pg_get_viewdef('vault.seen')", "SELECT query_to_xml('select 1', true, true, '')", "SELECT pg_read_file('/etc/passwd')",
		"EXPLAIN SELECT 1", "SELECT 1; SELECT 2", "SELECT 1 INTO vault.x", "SET x.y = 1", "DECLARE c CURSOR FOR SELECT 1", "EXECUTE x", "VACUUM",
		"CREATE TABLE vault.x AS SELECT 1", "COPY vault.people TO STDOUT", "ANALYZE SELECT 1", "(VERBOSE) SELECT 1", "DO ''",
		"PREPARE x AS SELECT 1", "SELECT * FROM vault.people WHERE EXISTS (SELECT vault.cried(1))",
	}
	fine := []string{
		"SELECT * FROM vault.people WHERE mail LIKE 'zebra4711%' AND name = any (array['zebra4711', 'b'])",
		"SELECT * FROM vault.people WHERE mail > 'zebra4711' ORDER BY name || 'zebra4711-index'",
		"SELECT * FROM vault.usual", "SELECT * FROM pg_stat_activity", "TABLE information_schema.columns", "SELECT * FROM pg_views",
		"SELECT * FROM vault.parts WHERE k = 'zebra4711-part'", "SELECT * FROM vault.seen WHERE id BETWEEN 4711 AND 4712",
		"SELECT * FROM vault.people WHERE 'zebra4711' = 'zebra' || '4711'", "SELECT most_common_vals FROM pg_stats WHERE tablename = 'people'",
		"VALUES ('zebra4711', true, NULL)", "SELECT 'zebra4711' IS NULL, CASE WHEN name = 'zebra4711' THEN 1 END FROM vault.people",
		"WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 4711 FROM r WHERE n < 4711) SELECT * FROM r",
		"INSERT INTO vault.people (id, name) VALUES (1, 'zebra4711') ON CONFLICT (id) DO UPDATE SET name = 'zebra4711' WHERE people.name <> 'zebra4711'",
		"SELECT name, rank() OVER (PARTITION BY name ORDER BY id) FROM vault.people TABLESAMPLE bernoulli (47.11)",
		"SELECT * FROM generate_series(1, 4711) g WHERE g = (SELECT max(id) FROM vault.people WHERE name <> 'zebra4711')",
		`SELECT E'zebra4711\'', U&'zebra4711', $$zebra4711$$, B'0101', 4711e3, -4711, interval '4711 days', date '2020-01-01' + 4711, 'zebra4711'::name FROM vault.people WHERE name = E'zebra4711\\'`,
		"SELECT * FROM vault.people WHERE id = (SELECT max(id) FROM vault.people) AND mood = 'fine' AND (name, mail) > ('zebra4711', 'zebra4711')",
	}
	explain := func(sql string) (string, error) {
		r := request(sql)
		r.Explain = "plan"
		var out bytes.Buffer
		outcome, err := m.Run(t.Context(), r, &out)
		return everything(out.Bytes(), outcome, err), err
	}
	for _, sql := range refused {
		all, err := explain(sql)
		if err == nil || strings.Contains(all, canary) {
			t.Errorf("%s: got %v, %s", sql, err, all)
		}
		if code := proto.CodeOf(err); code != proto.CodePolicyDenied && code != proto.CodeSQL {
			t.Errorf("%s: was not looked at: %v", sql, err)
		}
	}
	for _, sql := range fine {
		all, err := explain(sql)
		if err != nil || strings.Contains(all, canary) || strings.Contains(all, "4711") {
			t.Errorf("%s: got %v, %s", sql, err, all)
		}
	}
	// What the policy names may be called.
	m = newManager(t, sqlsession.Config{}, func() sqlsession.Source {
		s := superSource()
		s.Guard.Mode, s.Guard.Plans, s.Guard.Functions = "read-only", "structure", []string{"vault.pe*"}
		return s
	}())
	planOf(t, m, request("SELECT vault.peek() FROM vault.peeking"))
}

func TestHypotheticalIndexes(t *testing.T) {
	m := plansManager(t, "read-only", "structure")
	const sql = "SELECT * FROM vault.people WHERE score = 5"
	ask := func(sql string, indexes ...string) sqlsession.Request {
		r := request(sql)
		r.Explain, r.HypotheticalIndexes = "plan", indexes
		return r
	}
	if e := refuse(t, m, ask(sql, "CREATE INDEX ON vault.people (score)"), proto.CodeInvalid); !strings.Contains(e.Error(), "hypopg") {
		t.Errorf("without the extension: got %q", e)
	}
	if err := server.SQL(t.Context(), "CREATE EXTENSION hypopg"); err != nil {
		t.Fatalf("%v: run packaging/dev/deps.sh postgresql", err)
	}
	cleanUp(t, "DROP EXTENSION hypopg")
	if plan := planOf(t, m, ask(sql, "CREATE INDEX ON vault.people (mail)", "CREATE INDEX ON vault.people USING btree (score)")); !strings.Contains(plan, "btree_vault_people_score") {
		t.Errorf("the index is not used: %s", plan)
	}
	if plan := planOf(t, m, ask(sql)); strings.Contains(plan, "btree_vault_people_score") {
		t.Errorf("the index outlived its statement: %s", plan)
	}
	for index, code := range map[string]proto.Code{
		"CREATE UNIQUE INDEX ON vault.people (score)":              proto.CodePolicyDenied,
		"CREATE INDEX CONCURRENTLY ON vault.people (score)":        proto.CodePolicyDenied,
		"CREATE INDEX ON vault.people (score) TABLESPACE x":        proto.CodePolicyDenied,
		"CREATE INDEX ON vault.people (score) WITH (fillfactor=9)": proto.CodePolicyDenied,
		"CREATE INDEX ON vault.people (vault.cried(id))":           proto.CodePolicyDenied,
		"CREATE INDEX ON vault.people (score); DROP TABLE x":       proto.CodePolicyDenied,
		"DROP TABLE vault.people":                                  proto.CodePolicyDenied,
		"SELECT 1":                                                 proto.CodeInvalid,
		"CREATE INDEX ON vault.nothing (score)":                    proto.CodeSQL,
		"CREATE INDEX ON":                                          proto.CodeSQL,
	} {
		if e := refuse(t, m, ask(sql, index), code); !strings.Contains(e.Error(), "hypothetical index 1: ") && !strings.Contains(e.Error(), "may call vault.cried") || e.SQL.GetPosition() != 0 {
			t.Errorf("%s: got %q", index, e)
		}
	}
	if n := one(t, "SELECT count(*) FROM pg_index WHERE indrelid = 'vault.people'::regclass"); n != "1" {
		t.Errorf("got %s indexes, want 1", n)
	}
}

func TestPlanErrors(t *testing.T) {
	m := plansManager(t, "read-only", "full")
	tests := []struct {
		sql      string
		code     proto.Code
		says     string
		position int32
	}{
		{"SELECT nam FROM vault.people", proto.CodeSQL, `column "nam" does not exist`, 8},
		{"SELECT é FROM FROM x", proto.CodeSQL, "syntax error", 15},
		{"SELECT 1 AS é, lower('x'), pg_sleep(1)", proto.CodePolicyDenied, "pg_catalog.pg_sleep", 28},
		{"SELECT 1/0", proto.CodeSQL, "division by zero", 0},
		{"EXPLAIN SELECT 1", proto.CodePolicyDenied, "--explain", 0},
	}
	for _, test := range tests {
		r := request(test.sql)
		r.Explain = "plan"
		e := refuse(t, m, r, test.code)
		if !strings.Contains(e.Error(), test.says) || e.SQL.GetPosition() != test.position {
			t.Errorf("%s: got %q at %d, want %q at %d", test.sql, e, e.SQL.GetPosition(), test.says, test.position)
		}
	}
	off := plansManagerOff(t)
	r := request("SELECT 1")
	r.Explain = "plan"
	if e := refuse(t, off, r, proto.CodePolicyDenied); !strings.Contains(e.Error(), "plans: off") {
		t.Errorf("got %q", e)
	}
	for _, mode := range []*sqlsession.Manager{m, off} {
		if e := refuse(t, mode, request("explain analyze select 1"), proto.CodePolicyDenied); !strings.Contains(e.Error(), "--explain") {
			t.Errorf("got %q", e)
		}
	}
}

func plansManagerOff(t *testing.T) *sqlsession.Manager {
	s := superSource()
	s.ReadWrite, s.Guard.Mode, s.Guard.Plans = true, "read-write", "off"
	return newManager(t, sqlsession.Config{}, s)
}

// TestPlanCancelled cancels a statement that runs for its plan.
func TestPlanCancelled(t *testing.T) {
	m := plansManager(t, "read-only", "analyze")
	ctx, cancel := context.WithCancel(t.Context())
	r := request("SELECT count(*) FROM generate_series(1, 1000000000000)")
	r.Explain = "analyze"
	ended := make(chan error, 1)
	go func() {
		_, err := m.Run(ctx, r, &bytes.Buffer{})
		ended <- err
	}()
	eventually(t, "the statement to run", func() bool {
		return one(t, "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'EXPLAIN%1000000000000%'") == "1"
	})
	cancel()
	if err := <-ended; proto.CodeOf(err) != proto.CodeCancelled {
		t.Errorf("got %v", err)
	}
	eventually(t, "the backend to be free", func() bool {
		return one(t, "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'EXPLAIN%1000000000000%'") == "0"
	})
}

// TestPlansInASession asks for plans in a session that stays, between its own
// statements.
func TestPlansInASession(t *testing.T) {
	m := plansManager(t, "read-write", "full")
	s := openSession(t, m, "tok_a", "db")
	s.run("CREATE TEMP TABLE mine (a int)", "none")
	r := s.request("SELECT * FROM mine WHERE a = 4711")
	if plan := planOf(t, m, r); !strings.Contains(plan, `"Relation Name":"mine"`) {
		t.Errorf("got %s", plan)
	}
	s.run("BEGIN", "open")
	s.run("INSERT INTO mine VALUES (1)", "open")
	r = s.request("SELECT * FROM mine")
	r.Explain = "plan"
	refuse(t, m, r, proto.CodeInvalid)
	s.run("ROLLBACK", "none")
	if n := s.value("SELECT count(*) FROM mine", "none"); n != "0" {
		t.Errorf("got %s rows, want 0", n)
	}
}

// TestPlansOfMaskedColumns looks at what the plans of a source with masks tell.
func TestPlansOfMaskedColumns(t *testing.T) {
	m := metadataManager(t, func(s *sqlsession.Source) {
		s.Guard.Mode, s.Guard.Plans, s.Guard.MaskFilters, s.Guard.MaskKey = "read-only", "analyze", "equality", bytes.Repeat([]byte{7}, 32)
		s.Guard.Masks = []sqlsession.Mask{{Columns: []string{"vault.people.mail"}, With: "hash"}, {Pattern: `zebra\d+`, With: "redact"}}
	})
	// The domain's check calls a function of the database's own.
	refuse(t, m, request("SELECT c FROM vault.strict WHERE c::text = 'zebra4711'"), proto.CodePolicyDenied)
	plan := planOf(t, m, request("SELECT relname FROM pg_class WHERE relname::text = 'zebra4711'"))
	if strings.Contains(plan, canary) || !strings.Contains(plan, `"Plan Rows"`) || !strings.Contains(plan, `"Output"`) {
		t.Errorf("without masked columns: got %s", plan)
	}
	plan = planOf(t, m, request("SELECT mail FROM vault.people WHERE mail = 'zebra4711-mail'"))
	if strings.Contains(plan, canary) || strings.Contains(plan, "Rows") || !strings.Contains(plan, "mail = ?") {
		t.Errorf("with masked columns: got %s", plan)
	}
	for _, sql := range []string{"SELECT id FROM vault.people WHERE mail > 'a'", "SELECT id FROM vault.people ORDER BY mail"} {
		r := request(sql)
		r.Explain = "plan"
		refuse(t, m, r, proto.CodePolicyDenied)
	}
	r := request("SELECT id FROM vault.people WHERE mail = 'a'")
	r.Explain = "analyze"
	if e := refuse(t, m, r, proto.CodePolicyDenied); !strings.Contains(e.Error(), "masked") {
		t.Errorf("got %q", e)
	}
}
