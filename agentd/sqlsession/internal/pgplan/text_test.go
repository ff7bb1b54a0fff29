package pgplan

import (
	"strings"
	"testing"
)

func TestText(t *testing.T) {
	const plan = `[{"Plan":{"Node Type":"Aggregate","Strategy":"Hashed","Partial Mode":"Simple","Parallel Aware":false,"Startup Cost":1.50,"Total Cost":2.00,"Plan Rows":7,"Plan Width":12,
		"Actual Startup Time":0.010,"Actual Total Time":0.020,"Actual Rows":7,"Actual Loops":1,"Group Key":["o.kind","o.n"],"Plans":[
		{"Node Type":"Hash Join","Parent Relationship":"Outer","Join Type":"Left","Total Cost":2,"Plan Rows":1,"Hash Cond":"(a.x = b.y)","Rows Removed by Filter":0,"Plans":[
		{"Node Type":"Index Scan","Scan Direction":"Backward","Index Name":"a_pk","Relation Name":"a","Schema":"app","Alias":"a","Index Cond":"(id < 5)"},
		{"Node Type":"Hash","Plans":[{"Node Type":"Seq Scan","Subplan Name":"InitPlan 1 (returns $0)","Parallel Aware":true,"Relation Name":"b","Alias":"z","Filter":"(n > 1)","Actual Loops":0}]}]}]},
		"Execution Time":0.5}]`
	const want = `HashAggregate  (cost=1.50..2.00 rows=7 width=12) (actual time=0.010..0.020 rows=7 loops=1)
  Group Key: o.kind, o.n
  ->  Hash Left Join  (cost=2 rows=1)
        Hash Cond: (a.x = b.y)
        ->  Index Scan Backward using a_pk on app.a
              Index Cond: (id < 5)
        ->  Hash
              InitPlan 1 (returns $0)
              ->  Parallel Seq Scan on b z  (never executed)
                    Filter: (n > 1)
Execution Time: 0.5`
	lines, err := Text([]byte(plan), true)
	if got := strings.Join(lines, "\n"); err != nil || got != want {
		t.Errorf("got %v\n%s\nwant\n%s", err, got, want)
	}
	if lines, err = Text([]byte(plan), false); err != nil || strings.Contains(strings.Join(lines, "\n"), "cost=") {
		t.Errorf("without costs: %v %q", err, lines)
	}
	for _, garbled := range []string{"", "[]", "{}", "[1]", "[{}", `[{"Plan":1}] x`} {
		if _, err := Text([]byte(garbled), true); err == nil && garbled != `[{"Plan":1}]` {
			t.Errorf("%s is a plan", garbled)
		}
	}
}
