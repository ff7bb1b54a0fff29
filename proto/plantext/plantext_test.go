package plantext

import (
	"strings"
	"testing"
)

func TestLines(t *testing.T) {
	tests := []struct{ name, plan, want string }{
		{"full", `[{"Plan":{"Node Type":"Aggregate","Strategy":"Hashed","Partial Mode":"Simple","Parallel Aware":false,"Startup Cost":1.50,"Total Cost":2.5,"Plan Rows":3,"Plan Width":4,"Group Key":["a","b"],"Plans":[
			{"Node Type":"Hash Join","Parent Relationship":"Outer","Join Type":"Left","Startup Cost":0,"Total Cost":1,"Plan Rows":1,"Plan Width":1,"Hash Cond":"(p.id = q.id)","Plans":[
			{"Node Type":"Index Scan","Scan Direction":"Backward","Index Name":"i","Relation Name":"people","Schema":"vault","Alias":"p","Startup Cost":0,"Total Cost":1,"Plan Rows":1,"Plan Width":1,"Actual Startup Time":0.1,"Actual Total Time":0.2,"Actual Rows":7,"Actual Loops":1,"Rows Removed by Filter":3,"Shared Hit Blocks":0},
			{"Node Type":"Bitmap Index Scan","Index Name":"j","Actual Rows":0,"Actual Loops":0}]},
			{"Node Type":"Result","Subplan Name":"InitPlan 1","Parent Relationship":"InitPlan"}]},"Planning Time":0.5,"Execution Time":1.5}]`, `
HashAggregate  (cost=1.50..2.5 rows=3 width=4)
  Group Key: a, b
  ->  Hash Left Join  (cost=0..1 rows=1 width=1)
        Hash Cond: (p.id = q.id)
        ->  Index Scan Backward using i on vault.people p  (cost=0..1 rows=1 width=1) (actual time=0.1..0.2 rows=7 loops=1)
              Rows Removed by Filter: 3
        ->  Bitmap Index Scan on j (never executed)
  InitPlan 1
    ->  Result
Planning Time: 0.5 ms
Execution Time: 1.5 ms`},
		{"structure", `[{"Plan":{"Node Type":"ModifyTable","Operation":"Update","Relation Name":"t","Alias":"t","Total Cost":100,"Plan Rows":10,"Plans":[{"Node Type":"Seq Scan","Parallel Aware":true,"Relation Name":"t","Alias":"x\ny","Filter":"(a = ?)"}]}}]`, `
Update on t  (cost about 100, rows about 10)
  ->  Parallel Seq Scan on t x y
        Filter: (a = ?)`},
		{"SQLite", `[{"Plan":{"Node Type":"QUERY PLAN","Plans":[{"Node Type":"SCAN a"},{"Node Type":"SCALAR SUBQUERY 1","Plans":[{"Node Type":"SEARCH b USING INDEX i (x=?)"}]}]}}]`, `
QUERY PLAN
  ->  SCAN a
  ->  SCALAR SUBQUERY 1
        ->  SEARCH b USING INDEX i (x=?)`},
		{"MySQL", `{"query_block":{"select_id":1,"nested_loop":[{"table":{"table_name":"a\nb","possible_keys":["x","y"],"using_index":true,"rows":10}},{"table":{}},{}],"empty":[],"n":null,"mixed":[1,[2,[3]],{"k":"v"}]}}`, `
query_block:
  select_id: 1
  nested_loop:
    - table:
        table_name: a b
        possible_keys: x, y
        using_index: true
        rows: 10
    - table:
  empty:
  n: null
  mixed: 1
    -: 2
      -: 3
    - k: v`},
	}
	for _, test := range tests {
		got, err := Lines([]byte(test.plan))
		if err != nil || "\n"+strings.Join(got, "\n") != test.want {
			t.Errorf("%s: got %v\n%s\nwant%s", test.name, err, strings.Join(got, "\n"), test.want)
		}
	}
	for _, garbled := range []string{"", "{}", "[]", "[1]", "[{}]", `[{"Plan":`, strings.Repeat("[", 3000)} {
		if got, err := Lines([]byte(garbled)); err == nil {
			t.Errorf("%.20s: got %q", garbled, got)
		}
	}
}

// FuzzLines looks for a text that breaks it.
func FuzzLines(f *testing.F) {
	f.Add([]byte(`[{"Plan":{"Node Type":"Result","Plans":[{"Node Type":"Seq Scan"}]}}]`))
	f.Fuzz(func(t *testing.T, plan []byte) {
		lines, err := Lines(plan)
		for _, line := range lines {
			if strings.ContainsAny(line, "\n\r") || err != nil {
				t.Fatalf("%q: %v", line, err)
			}
		}
	})
}
