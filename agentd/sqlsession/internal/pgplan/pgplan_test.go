package pgplan

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
)

func TestRead(t *testing.T) {
	names := func(list []Name) string {
		var out []string
		for _, n := range list {
			if n.Offset >= 0 || n.Schema != "" {
				out = append(out, fmt.Sprintf("%s@%d", n, n.Offset))
			}
		}
		return strings.Join(out, " ")
	}
	tests := []struct {
		sql, functions, operators string
		kind                      Kind
		writes                    bool
	}{
		{sql: "SELECT a.f(x) + 1 FROM b ORDER BY c USING ~<~", kind: Select, functions: "a.f@7", operators: "+@14 ~<~@42"},
		{sql: "VALUES (count(*) FILTER (WHERE g(1)) OVER (ORDER BY h()))", kind: Select, functions: "count@8 g@31 h@52"},
		{sql: "WITH d AS (DELETE FROM t RETURNING f(1)) TABLE d", kind: Select, functions: "f@35", writes: true},
		{sql: "INSERT INTO t SELECT * FROM ROWS FROM (u(), v())", kind: Insert, functions: "u@39 v@44", writes: true},
		{sql: "MERGE INTO t USING s ON f(1) WHEN MATCHED THEN UPDATE SET a = g(2)", kind: Merge, functions: "f@24 g@62", writes: true},
		{sql: `SELECT U&"\0066"(1), "F"(2)`, kind: Select, functions: "f@7 F@21"},
		{sql: "SELECT json_scalar(1)", kind: Select, functions: "json_scalar@7"},
		{sql: "SELECT 1 OPERATOR(a.@@) 2, x <= ALL (SELECT 1)", kind: Select, operators: "a.@@@9 <=@29"},
		{sql: "CREATE INDEX ON t USING gist (a, f(b)) INCLUDE (c) WHERE g(d)", kind: Index, functions: "f@33 g@57"},
	}
	for _, test := range tests {
		tree, err := pgtree.InProcess().Parse(context.Background(), test.sql)
		if err != nil {
			t.Fatalf("%s: %v", test.sql, err)
		}
		got, err := Read(tree)
		if err != nil {
			t.Errorf("%s: %v", test.sql, err)
			continue
		}
		if got.Kind != test.kind || got.Writes != test.writes || names(got.Functions) != test.functions || names(got.Operators) != test.operators {
			t.Errorf("%s: got %s, writes %v, functions %q, operators %q", test.sql, got.Kind, got.Writes, names(got.Functions), names(got.Operators))
		}
	}
}

func TestReadRefuses(t *testing.T) {
	for _, sql := range []string{
		"", "SELECT 1; SELECT 2", "EXPLAIN SELECT 1", "SELECT 1 INTO x", "WITH a AS (SELECT 1) SELECT * INTO x FROM a", "DO ''", "CALL f()",
		"CREATE UNIQUE INDEX ON t (a)", "CREATE INDEX IF NOT EXISTS i ON t (a)", "CREATE INDEX ON t (a) WITH (fillfactor = 10)",
		"CREATE TABLE a AS SELECT 1", "COPY (SELECT 1) TO STDOUT", "PREPARE a AS SELECT 1", "SHOW x", "SET x = 1", "CREATE INDEX ON t (a int4_ops (x = 1))",
	} {
		tree, err := pgtree.InProcess().Parse(context.Background(), sql)
		if err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
		var refusal *Refusal
		if got, err := Read(tree); !errors.As(err, &refusal) {
			t.Errorf("%s: got %+v, %v", sql, got, err)
		}
	}
}

func TestPlannable(t *testing.T) {
	tests := []struct {
		c     Candidate
		globs []string
		want  bool
	}{
		{Candidate{"pg_catalog", "abs", true, "i", ""}, nil, true},
		{Candidate{"pg_catalog", "now", true, "s", ""}, nil, true},
		{Candidate{"pg_catalog", "table_to_xml", true, "s", ""}, nil, false},
		{Candidate{"pg_catalog", "pg_read_file", true, "v", ""}, nil, false},
		{Candidate{"app", "now", false, "i", ""}, nil, false},
		{Candidate{"app", "now", false, "i", ""}, []string{"now"}, true},
		{Candidate{"app", "report", false, "v", ""}, []string{"app.rep*"}, true},
		{Candidate{"other", "report", false, "v", ""}, []string{"app.rep*"}, false},
		{Candidate{"public", "citext_eq", false, "i", "citext"}, nil, true},
		{Candidate{"public", "gen_salt", false, "v", "pgcrypto"}, nil, false},
		{Candidate{"public", "crosstab", false, "s", "tablefunc"}, nil, false},
	}
	for _, test := range tests {
		if got := test.c.Plannable(test.globs); got != test.want {
			t.Errorf("%+v with %q: got %v, want %v", test.c, test.globs, got, test.want)
		}
	}
}

const serverPlan = `[{"Plan": {"Node Type": "Limit", "Startup Cost": 0.28, "Total Cost": 8.3, "Plan Rows": 1, "Plan Width": 42,
 "Output": ["'canary'::text"], "Unknown Member": "canary", "Plans": [{"Node Type": "Index Scan", "Index Name": "i", "Relation Name": "t",
 "Total Cost": 12345.6, "Plan Rows": 4711, "Index Cond": "(t.a = 'ca''nary'::text)", "Filter": "((b > 4711) AND (NOT (SubPlan 1)) AND c IS NOT NULL AND d = true)",
 "Rows Removed by Filter": 4711, "Grouping Sets": [{"Group Keys": [["a", "b + 4711"]]}], "Remote SQL": "SELECT canary"}]}, "Planning Time": 0.4711, "Settings": {"a": "canary"}}]`

func TestStructure(t *testing.T) {
	got, err := Structure([]byte(serverPlan), NoNumbers)
	want := `[{"Plan":{"Node Type":"Limit","Plans":[{"Node Type":"Index Scan","Index Name":"i","Relation Name":"t","Index Cond":"(t.a = ?::text)","Filter":"((b > ?) AND (NOT (SubPlan 1)) AND c IS NOT NULL AND d = ?)","Grouping Sets":[{"Group Keys":[["a","b + ?"]]}]}]}}]`
	if err != nil || string(got) != want {
		t.Errorf("got %s, %v\nwant %s", got, err, want)
	}
	got, err = Structure([]byte(serverPlan), Magnitude)
	if err != nil || !strings.Contains(string(got), `"Total Cost":10000,"Plan Rows":10000`) || !strings.Contains(string(got), `"Total Cost":10,"Plan Rows":1,`) || strings.Contains(string(got), "4711") {
		t.Errorf("got %s, %v", got, err)
	}
	got, err = Check([]byte(serverPlan), func(s string) string { return strings.ReplaceAll(s, "canary", "***") })
	if err != nil || strings.Contains(string(got), "canary") || !strings.HasPrefix(string(got), `[{"Plan":{"Node Type":"Limit","Startup Cost":0.28`) {
		t.Errorf("got %s, %v", got, err)
	}
}

func TestGarbledPlans(t *testing.T) {
	for _, plan := range []string{"", "{}", "[]", "[1]", `[{"Plan": 1}]`, `[{"Plan": {}}`, strings.Repeat("[", 5000), `[{"Plan": {}}] x`, strings.Repeat(" ", MaxPlan+1)} {
		if got, err := Structure([]byte(plan), Magnitude); err == nil {
			t.Errorf("%.30s: got %s", plan, got)
		}
	}
}

// FuzzStructure looks for plans that break it, or come out as what is no plan.
func FuzzStructure(f *testing.F) {
	f.Add([]byte(serverPlan))
	f.Add([]byte(`[{"Plan":{"Filter":"'\\"}}]`))
	f.Fuzz(func(t *testing.T, plan []byte) {
		got, err := Structure(plan, Magnitude)
		if err != nil {
			return
		}
		if again, err := Structure(got, Magnitude); err != nil {
			t.Fatalf("%s: is no plan itself: %v, %s", got, err, again)
		}
	})
}
