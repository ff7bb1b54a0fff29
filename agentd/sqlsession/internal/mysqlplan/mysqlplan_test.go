package mysqlplan

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/plandoc"
)

func TestStructure(t *testing.T) {
	for _, test := range []struct{ name, plan, want string }{
		{
			"MariaDB", `{"query_block": {"select_id": 1, "cost": 12.4, "having_condition": "count(0) > 42", "filesort": {"sort_key": "concat(a,'canary')", "temporary_table": {"nested_loop": [
				{"table": {"table_name": "o", "access_type": "ref", "possible_keys": ["k", "l"], "key": "k", "key_length": "5,4", "used_key_parts": ["thing"], "ref": ["const"], "rows": 47, "filtered": 12.5, "attached_condition": "a = 'canary'", "using_index": true}},
				{"table": {"table_name": "<derived2>", "access_type": "ALL", "key": "key0", "used_key_parts": ["canary"], "rows": 0}}]}}}}`,
			`{"query_block":{"select_id":1,"cost":10,"filesort":{"temporary_table":{"nested_loop":[{"table":{"table_name":"o","access_type":"ref","possible_keys":["k","l"],"key":"k","key_length":"5,4","used_key_parts":["thing"],"rows":100,"using_index":true}},{"table":{"table_name":"<derived2>","access_type":"ALL","key":"key0","rows":1}}]}}}}`,
		},
		{
			"MySQL, first format", `{"query_block": {"select_id": 1, "message": "canary", "cost_info": {"query_cost": "43.83", "data_read_per_join": "canary"}, "table": {"table_name": "d", "key": "<auto_key0>", "used_key_parts": ["canary"], "message": "const row not found", "operation": "UNION"}}}`,
			`{"query_block":{"select_id":1,"cost_info":{"query_cost":100},"table":{"table_name":"d","key":"<auto_key0>","message":"const row not found","operation":"UNION"}}}`,
		},
		{
			"MySQL, second format", `{"query": "select 'canary'", "query_plan": {"operation": "Filter: canary", "inputs": [{"ranges": ["(a = 'canary')"], "access_type": "index", "index_name": "i", "key_columns": ["a"], "estimated_rows": 1666.4, "estimated_total_cost": 0.2, "lookup_references": ["canary"]}], "limit": 4711, "access_type": "fil'ter"}, "query_type": "select"}`,
			`{"query_plan":{"inputs":[{"access_type":"index","index_name":"i","key_columns":["a"],"estimated_rows":1000,"estimated_total_cost":1}]},"query_type":"select"}`,
		},
		{"kinds that do not fit", `{"query_block": {"table": "canary", "nested_loop": 4711, "rows": "canary", "key": 4711, "using_index": "canary", "select_id": 47110, "key_length": "5 canary", "possible_keys": [4711, ["canary"], {"canary": 1}], "inputs": ["canary"]}}`, `{"query_block":{"rows":1}}`},
	} {
		got, err := Structure([]byte(test.plan), nil)
		if err != nil || string(got) != test.want {
			t.Errorf("%s: got %s, %v\nwant %s", test.name, got, err, test.want)
		}
		full, err := Full([]byte(test.plan), strings.ToUpper)
		if err != nil || !bytes.Contains(full, []byte("CANARY")) {
			t.Errorf("%s: got %s, %v", test.name, full, err)
		}
	}
	for _, garbled := range []string{"", "{}", "[]", "1", `{"query_block": 1}`, `{"query_plan": {}`, `[{"query_plan": {}}]`, `{"other": {}}`} {
		if got, err := Structure([]byte(garbled), nil); !errors.Is(err, plandoc.ErrGarbled) {
			t.Errorf("%s: got %s, %v", garbled, got, err)
		}
	}
}

// Whatever a plan holds, what Structure tells is JSON that it would tell again.
func FuzzStructure(f *testing.F) {
	f.Add([]byte(`{"query_block": {"select_id": 1, "table": {"rows": 4, "key": "<a>", "used_key_parts": ["x"]}, "nested_loop": [{"cost": "1.5"}]}}`))
	f.Add([]byte(`{"query_plan": {"inputs": [{"estimated_rows": 1e300, "access_type": "index"}], "message": "no matching row"}}`))
	f.Fuzz(func(t *testing.T, plan []byte) {
		got, err := Structure(plan, nil)
		if err != nil {
			return
		}
		again, err := Structure(got, nil)
		if err != nil || !bytes.Equal(got, again) {
			t.Fatalf("%q became %s, and then %s, %v", plan, got, again, err)
		}
	})
}
