package sqlsession_test

import (
	"fmt"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
)

// awaitWarm waits until a session of the source that nobody has used has warmed
// itself and is quiet.
func awaitWarm(t *testing.T, source string) {
	t.Helper()
	eventually(t, "a warm session", func() bool {
		return one(t, `SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND state = 'idle' AND query = 'ROLLBACK'
 AND state_change < clock_timestamp() - interval '300 ms'`, "postern "+source) == "1"
	})
}

// TestWarmSessionJudgesAnew tells that what a session asked while it warmed itself
// decides nothing: what names mean is asked when the statement comes.
func TestWarmSessionJudgesAnew(t *testing.T) {
	s := source("warmed")
	s.ReadWrite = false
	m := newManager(t, sqlsession.Config{Warm: 1}, s)
	as := func(owner, sql string) sqlsession.Request {
		r := request(sql)
		r.Owner, r.Source = owner, "warmed"
		return r
	}
	query(t, m, as("first", "SELECT 1"))
	awaitWarm(t, "warmed")
	const primed = "SELECT count(*) FROM pg_prepared_statements WHERE name IN ('postern_called', 'postern_plain')"
	if got, _ := query(t, m, as("primed", primed)); got.rows[0][0] != "2" {
		t.Errorf("a warm session has prepared %s of our questions, want 2", got.rows[0][0])
	}
	if got, _ := query(t, m, as("primed", primed+" ")); got.rows[0][0] != "0" {
		t.Errorf("after a statement %s of our questions are prepared, want none", got.rows[0][0])
	}
	awaitWarm(t, "warmed")
	err := server.SQL(t.Context(),
		"CREATE FUNCTION warm_acts() RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN 1; END'",
		"CREATE VIEW warm_view AS SELECT warm_acts()", "GRANT SELECT ON warm_view TO reader",
		"CREATE TABLE warm_new (id int)", "INSERT INTO warm_new VALUES (7)", "GRANT SELECT ON warm_new TO reader",
	)
	cleanUp(t, "DROP VIEW warm_view", "DROP FUNCTION warm_acts", "DROP TABLE warm_new")
	if err != nil {
		t.Fatal(err)
	}
	refuse(t, m, as("view", "SELECT * FROM warm_view"), proto.CodePolicyDenied)
	for i, sql := range []string{"SELECT warm_acts()", "SELECT id FROM warm_new"} {
		awaitWarm(t, "warmed")
		r := as(fmt.Sprint("new", i), sql)
		if i == 0 {
			refuse(t, m, r, proto.CodePolicyDenied)
			continue
		}
		if got, _ := query(t, m, r); len(got.rows) != 1 || got.rows[0][0] != "7" {
			t.Errorf("%s: got %v, want 7", sql, got.rows)
		}
	}
}

// TestWarmSessionThatStays tells that a session that stays has nothing of what it prepared
// while it was warm.
func TestWarmSessionThatStays(t *testing.T) {
	s := source("warmstay")
	m := newManager(t, sqlsession.Config{Warm: 1}, s)
	r := request("SELECT 1")
	r.Source = "warmstay"
	query(t, m, r)
	awaitWarm(t, "warmstay")
	open := openSession(t, m, "tok_b", "warmstay")
	if got := open.value("SELECT count(*) FROM pg_prepared_statements WHERE name IN ('postern_called', 'postern_plain')", "none"); got != "0" {
		t.Errorf("%s of our questions are left, want none", got)
	}
	if got := open.value("SELECT count(*) FROM things", "none"); got != "1000" {
		t.Errorf("got %s rows, want 1000", got)
	}
}
