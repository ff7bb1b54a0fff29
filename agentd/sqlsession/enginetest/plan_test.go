package enginetest

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// plans is a source whose policy tells plans.
func plans(how string) func(*sqlsession.Source) {
	return func(s *sqlsession.Source) { s.Guard.Mode, s.Guard.Plans = "read-only", how }
}

func planRequest(text string) sqlsession.Request {
	r := request(text)
	r.Explain = "plan"
	return r
}

// planOf asks for a plan and returns it.
func planOf(t *testing.T, m *sqlsession.Manager, r sqlsession.Request) string {
	t.Helper()
	got, outcome := query(t, m, r)
	if outcome.CommandTag != "EXPLAIN" || outcome.Rows != 1 || len(got.rows) != 1 || len(got.rows[0]) != 1 || got.schema.Field(0).Name != "QUERY PLAN" {
		t.Fatalf("%s: got %d rows, %v", r.SQL, len(got.rows), outcome)
	}
	if kind, _ := got.schema.Field(0).Metadata.GetValue("pg.type"); kind != "json" || !json.Valid([]byte(got.rows[0][0])) {
		t.Fatalf("%s: got %s of type %q", r.SQL, got.rows[0][0], kind)
	}
	return got.rows[0][0]
}

// others are the engines but PostgreSQL, whose plans have tests of their own.
func others(t *testing.T, test func(t *testing.T, db *database)) {
	each(t, func(t *testing.T, db *database) {
		if db.engine != "postgres" {
			test(t, db)
		}
	})
}

// planCorpus holds literals with 4711 or zebra in them, as filters, limits, results,
// names that the server makes of them, sort keys and bounds; -- and the values that rows
// have (thing 7) in filters that are evaluated to make a plan.
var planCorpus = []string{
	"SELECT * FROM things WHERE id = 4711", "SELECT * FROM things WHERE id = 7", "SELECT name FROM things WHERE name = 'zebra'", "SELECT * FROM things WHERE id > 4711 AND name LIKE 'zebra%' ORDER BY name, id LIMIT 4711",
	"SELECT 4711, 'zebra'", "SELECT 'zebra' FROM things", "SELECT * FROM things WHERE 'zebra' = 'zebra' AND 4711 = 4711", "SELECT * FROM things WHERE 1 = 4711", "SELECT * FROM things WHERE id IN (4711, 47110, 471100) OR name IN ('zebra', 'zebras')",
	"SELECT a.name, COUNT(*) FROM things a JOIN things b ON a.id = b.id + 4711 WHERE b.name <> 'zebra' GROUP BY a.name HAVING COUNT(*) > 4711 ORDER BY 2 DESC", "SELECT * FROM things a LEFT JOIN things b ON a.id = b.id AND b.name = 'zebra' WHERE a.id < 4711",
	"SELECT * FROM things WHERE id = (SELECT MAX(id) FROM things WHERE name = 'zebra')", "SELECT * FROM things WHERE name = (SELECT name FROM things WHERE id = 7)", "SELECT * FROM things WHERE id IN (SELECT id FROM things WHERE name > 'zebra')", "SELECT (SELECT name FROM things WHERE id = 4711), 'zebra' FROM things WHERE EXISTS (SELECT 1 FROM things WHERE id = 4711)",
	"SELECT * FROM (SELECT DISTINCT name FROM things WHERE id <> 4711 LIMIT 47) d JOIN things t ON t.name = d.name", "SELECT * FROM (SELECT 'zebra', id FROM things GROUP BY id) d NATURAL JOIN (SELECT 'zebra', id FROM things GROUP BY id) e", "SELECT * FROM things NATURAL JOIN (SELECT 'zebra', COUNT(*) AS id FROM things GROUP BY name) d",
	"WITH d AS (SELECT 4711 AS id, 'zebra' AS name) SELECT * FROM d JOIN things t ON t.id = d.id", "WITH RECURSIVE r AS (SELECT 4711 AS n UNION ALL SELECT n + 1 FROM r WHERE n < 4719) SELECT * FROM r JOIN things ON id = n",
	"SELECT name FROM things WHERE id = 4711 UNION SELECT 'zebra' UNION ALL SELECT name FROM things WHERE name = 'zebra'", "SELECT name FROM things EXCEPT SELECT 'zebra'", "SELECT name, ROW_NUMBER() OVER (PARTITION BY CONCAT(name, 'zebra') ORDER BY id + 4711) FROM things", "SELECT * FROM things ORDER BY CONCAT(name, 'zebra')",
	"SELECT MIN(id), MAX(name) FROM things", "SELECT COUNT(*) FROM things WHERE id BETWEEN 4711 AND 47110", "SELECT CASE WHEN id = 4711 THEN 'zebra' END FROM things GROUP BY 1", "VALUES (4711, 'zebra')",
}

func TestPlanStructure(t *testing.T) {
	others(t, func(t *testing.T, db *database) {
		m := db.open(t, plans("structure"))
		told := 0
		for _, text := range planCorpus {
			got, _, err := try(t, m, planRequest(text))
			if err != nil {
				if strings.HasPrefix(text, "VALUES") && proto.CodeOf(err) == proto.CodeSQL { // MySQL has VALUES ROW
					continue
				}
				t.Errorf("%s: %v", text, err)
				continue
			}
			plan := got.rows[0][0]
			for _, never := range []string{"4711", "zebra", "thing 7", "_condition", `"condition":`, "select #", "select "} {
				if strings.Contains(strings.ToLower(plan), never) {
					t.Errorf("%s: %q is in %s", text, never, plan)
				}
			}
			if strings.Contains(plan, "things") {
				told++
			}
			var v any
			if err := json.Unmarshal([]byte(plan), &v); err != nil {
				t.Fatal(err)
			}
			if n, ok := exact(v); !ok {
				t.Errorf("%s: %v is no power of ten in %s", text, n, plan)
			}
		}
		if told < 15 {
			t.Errorf("%d plans of %d name the table", told, len(planCorpus))
		}
		plan := planOf(t, m, planRequest("SELECT a.name FROM things a JOIN things b ON b.id = a.id WHERE a.name <> 'zebra' ORDER BY a.name"))
		want := []string{`"access_type"`, `PRIMARY`, `b`}
		if db.engine == "sqlite" {
			want = []string{"SCAN a", "SEARCH b USING INTEGER PRIMARY KEY (rowid=?)", "USE TEMP B-TREE FOR ORDER BY"}
		}
		for _, w := range want {
			if !strings.Contains(plan, w) {
				t.Errorf("got %s, want %s in it", plan, w)
			}
		}
	})
}

// exact finds a number that is not rounded, but for those of SELECTs.
func exact(v any) (float64, bool) {
	switch v := v.(type) {
	case map[string]any:
		for key, e := range v {
			if n, ok := exact(e); !ok && key != "select_id" {
				return n, false
			}
		}
	case []any:
		for _, e := range v {
			if n, ok := exact(e); !ok {
				return n, false
			}
		}
	case float64:
		return v, v == math.Pow(10, math.Round(math.Log10(v)))
	}
	return 0, true
}

func TestPlanFull(t *testing.T) {
	others(t, func(t *testing.T, db *database) {
		var kept *posternv1.KeptRows
		m := db.open(t, plans("full"))
		r := planRequest("SELECT name FROM things WHERE name = 'zebra' AND id > {{low}} ORDER BY name")
		low := "4711"
		r.Parameters = []*posternv1.Parameter{{Name: "low", Value: &low, Type: "int8"}}
		r.KeepFirst, r.KeepLast = 5, 5
		r.Kept = func(k *posternv1.KeptRows) { kept = k }
		plan := planOf(t, m, r)
		if db.engine == "mysql" && (!strings.Contains(plan, "zebra") || !strings.Contains(plan, "4711")) {
			t.Errorf("got %s, want the conditions", plan)
		}
		if string(kept.GetPlan()) != plan || kept.First != 0 {
			t.Errorf("kept %v, want the plan", kept)
		}
		for _, text := range planCorpus[:20] {
			planOf(t, m, planRequest(text))
		}
		// Patterns hold in what is told.
		masked := db.open(t, plans("full"), func(s *sqlsession.Source) {
			s.Guard.Masks, s.Guard.MaskKey = []sqlsession.Mask{{Pattern: "zebra[0-9]*", With: "redact"}}, make([]byte, 32)
		})
		if plan := planOf(t, masked, planRequest("SELECT * FROM things zebra9 WHERE name = 'zebra77'")); strings.Contains(plan, "zebra") || !strings.Contains(plan, "***") {
			t.Errorf("got %s, want zebra masked", plan)
		}
		// The session goes on as before.
		if got, _ := query(t, m, request("SELECT name FROM things WHERE id = 3")); got.rows[0][0] != "thing 3" {
			t.Errorf("got %v", got.rows)
		}
	})
}

func TestPlanRefusals(t *testing.T) {
	others(t, func(t *testing.T, db *database) {
		m := db.open(t, plans("full"))
		deny := func(m *sqlsession.Manager, r sqlsession.Request, code proto.Code, says string) {
			t.Helper()
			if e := refuse(t, m, r, code); !strings.Contains(e.Error(), says) || strings.Contains(e.Error(), "\n") {
				t.Errorf("%s: got %v, want %q", r.SQL, e, says)
			}
		}
		deny(db.open(t, plans("off")), planRequest("SELECT 1"), proto.CodePolicyDenied, "plans: off")
		analyze := planRequest("SELECT 1")
		analyze.Explain = "analyze"
		deny(m, analyze, proto.CodePolicyDenied, "ask without --analyze")
		deny(db.open(t, plans("analyze")), request("SELECT 1"), proto.CodePolicyDenied, "plans: analyze")
		index := planRequest("SELECT 1")
		index.HypotheticalIndexes = []string{"CREATE INDEX ON things (name)"}
		deny(m, index, proto.CodeInvalid, "hypothetical indexes are for PostgreSQL")
		for _, text := range []string{"EXPLAIN SELECT 1", "explain query plan select 1", "/* x */ EXPLAIN FORMAT=JSON SELECT 1", "(EXPLAIN SELECT 1)"} {
			deny(m, planRequest(text), proto.CodePolicyDenied, "EXPLAIN is refused")
			deny(m, request(text), proto.CodePolicyDenied, "")
		}
		for _, text := range []string{"CREATE TABLE x (a INT)", "DROP TABLE things", "ANALYZE", "SHOW TABLES", "PRAGMA table_info(things)", "BEGIN", "SET @a = 1", "FORMAT=TREE SELECT 1", "FOR CONNECTION 1", "things"} {
			if e := refuse(t, m, planRequest(text), proto.CodePolicyDenied); strings.Contains(e.Error(), "\n") {
				t.Errorf("%s: got %v", text, e)
			}
		}
		for _, text := range []string{"SELECT 1; SELECT 2", "SELECT 1; DROP TABLE things", "SELECT nothing_harmless(1)", "SELECT LOAD_FILE('/etc/passwd')", "SELECT load_extension('x')"} {
			if _, _, err := try(t, m, planRequest(text)); proto.CodeOf(err) != proto.CodePolicyDenied && proto.CodeOf(err) != proto.CodeSQL {
				t.Errorf("%s: got %v", text, err)
			}
		}
		if e := refuse(t, m, planRequest("SELECT 'é', 1 +\n + FROM things"), proto.CodeSQL); e.SQL.GetPosition() != 20 {
			t.Errorf("got %v, want position 20", e)
		}
		refuse(t, m, planRequest("SELECT name FROM things WHERE id = {{id}}"), proto.CodeInvalid)
		refuse(t, m, planRequest(""), proto.CodePolicyDenied)
		deny(db.open(t, plans("full"), func(s *sqlsession.Source) {
			s.Guard.Masks, s.Guard.MaskKey, s.Guard.MaskFilters = []sqlsession.Mask{{Columns: []string{"things.name"}, With: "redact"}}, make([]byte, 32), "allow"
		}), planRequest("SELECT id FROM things"), proto.CodePolicyDenied, "masks columns")
		metadata := db.open(t, plans("structure"), func(s *sqlsession.Source) { s.Guard.Mode = "metadata" })
		if db.engine == "mysql" {
			deny(metadata, planRequest("SELECT id FROM things"), proto.CodePolicyDenied, "in mode metadata")
		} else {
			planOf(t, metadata, planRequest("SELECT id FROM things WHERE name = 'zebra'"))
		}
		tiny := planRequest("SELECT * FROM things")
		tiny.MaxBytes = 10
		refuse(t, m, tiny, proto.CodeByteLimit)
	})
}

// A plan of a statement that writes runs nothing, and a session's transaction is none of
// a plan's.
func TestPlanOfAWriteAndInASession(t *testing.T) {
	others(t, func(t *testing.T, db *database) {
		m := db.open(t, readWrite, func(s *sqlsession.Source) { s.Guard.Mode, s.Guard.Plans = "read-write", "structure" })
		write := func(text string) sqlsession.Request {
			r := planRequest(text)
			r.ReadWrite = true
			return r
		}
		planOf(t, m, write("SELECT * FROM things"))
		for _, text := range []string{"DELETE FROM things WHERE id = 4711", "UPDATE things SET name = 'zebra' WHERE id > 4711", "INSERT INTO things SELECT id + 4711, 'zebra' FROM things"} {
			if db.engine == "mysql" {
				refuse(t, m, write(text), proto.CodePolicyDenied)
			} else if plan := planOf(t, m, write(text)); strings.Contains(plan, "4711") || strings.Contains(plan, "zebra") {
				t.Errorf("%s: got %s", text, plan)
			}
		}
		if got, _ := query(t, m, request("SELECT COUNT(*), MAX(id) FROM things")); got.rows[0][0] != "1000" || got.rows[0][1] != "1000" {
			t.Errorf("a plan has changed something: %v", got.rows)
		}
		s := openSession(t, m, true)
		explain := func(text string) (table, error) {
			r := s.request(text)
			r.Explain = "plan"
			got, _, err := try(t, m, r)
			return got, err
		}
		if got, err := explain("SELECT * FROM things WHERE id = 4711"); err != nil || len(got.rows) != 1 || strings.Contains(got.rows[0][0], "4711") {
			t.Errorf("got %v, %v", got.rows, err)
		}
		s.run("BEGIN", "open")
		if _, err := explain("SELECT * FROM things"); proto.CodeOf(err) != proto.CodeInvalid || !strings.Contains(err.Error(), "outside of a transaction") {
			t.Errorf("got %v", err)
		}
		s.run("SELECT 1", "open")
		s.run("ROLLBACK", "none")
		if _, err := explain("BEGIN"); proto.CodeOf(err) != proto.CodePolicyDenied {
			t.Errorf("got %v", err)
		}
		s.run("SELECT 1", "none")
	})
}

// attackPlans asks for the plan of each attack: none may have an effect. state is
// everything that one could change.
func attackPlans(t *testing.T, m *sqlsession.Manager, attacks []string, state func() string) {
	t.Helper()
	before := state()
	for _, text := range attacks {
		r := planRequest(text)
		r.Timeout = 5 * time.Second
		got, _, err := try(t, m, r)
		if code := proto.CodeOf(err); err == nil && !strings.Contains(text, "\r") && !strings.Contains(text, "FROM pragma_") { // such a pragma acts when it is read
			t.Errorf("the plan of %q was let through: %v", text, got.rows)
		} else if err != nil && code != proto.CodePolicyDenied && code != proto.CodeInvalid && code != proto.CodeSQL {
			t.Errorf("the plan of %q: got %v (%v)", text, code, err)
		}
		if after := state(); after != before {
			t.Fatalf("the plan of %q has changed something:\n%s", text, difference(before, after))
		}
	}
}
