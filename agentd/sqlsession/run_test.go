package sqlsession_test

import (
	"reflect"
	"testing"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestRun(t *testing.T) {
	m := newManager(t, sqlsessionConfig())
	got, outcome := query(t, m, request("SELECT id, name FROM things WHERE id < 3 ORDER BY id"))
	if want := [][]string{{"1", "thing 1"}, {"2", "thing 2"}}; !reflect.DeepEqual(got.rows, want) {
		t.Errorf("got %v, want %v", got.rows, want)
	}
	if outcome.CommandTag != "SELECT 2" {
		t.Errorf("tag: got %q, want SELECT 2", outcome.CommandTag)
	}
	got, _ = query(t, m, request("SELECT i FROM generate_series(1, 300000) i"))
	if len(got.rows) != 300000 || got.rows[299999][0] != "300000" {
		t.Errorf("got %d rows, want 300000", len(got.rows))
	}
	value := "2"
	r := request("SELECT name FROM things WHERE id = {{id}} AND :absent::text IS NULL")
	r.Parameters = []*posternv1.Parameter{{Name: "id", Value: &value}, {Name: "absent"}}
	if got, _ := query(t, m, r); !reflect.DeepEqual(got.rows, [][]string{{"thing 2"}}) {
		t.Errorf("with parameters: got %v, want thing 2", got.rows)
	}
	e := refuse(t, m, request("SELECT 'é', oops FROM things"), proto.CodeSQL)
	if e.SQL.GetSqlstate() != "42703" || e.SQL.GetPosition() != 13 {
		t.Errorf("got %v, want 42703 at 13", e.SQL)
	}
	refuse(t, m, request("INSERT INTO things VALUES (5000)"), proto.CodePolicyDenied)
	refuse(t, m, request("WITH x AS (DELETE FROM things RETURNING *) SELECT * FROM x"), proto.CodePolicyDenied)
	refuse(t, m, request("SELECT 1; SELECT 2"), proto.CodePolicyDenied)
}
