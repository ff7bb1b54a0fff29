package enginetest

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestMariaShow(t *testing.T) {
	db, super := root(t)
	showsCatalog(t, db, super)
}

// showsCatalog holds that SHOW and DESCRIBE tell what the server tells, less what the
// policy hides, and in mode metadata less what may be a value.
func showsCatalog(t *testing.T, db *database, super func(*sqlsession.Source)) {
	t.Helper()
	for _, s := range []string{
		"CREATE DATABASE hr", "CREATE TABLE hr.people (id INT)", "CREATE TABLE shown (id INT PRIMARY KEY, s VARCHAR(20) DEFAULT 'zebra4711', KEY by_s (s)) COMMENT 'c'", "CREATE TABLE shown_secret (a INT)",
		"INSERT INTO shown (id, s) VALUES (1, 'zebra4711'), (2, 'b')", "CREATE VIEW shown_view AS SELECT id FROM shown WHERE s <> 'zebra4711'",
	} {
		if _, err := db.admin.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	defer func() { _, _ = db.admin.Exec("DROP DATABASE hr; DROP VIEW shown_view; DROP TABLE shown, shown_secret") }()
	hide := func(s *sqlsession.Source) { s.Guard.Hide = []string{"HR", "shop.*_secret"} }
	names := func(got table) []string {
		var out []string
		for _, row := range got.rows {
			out = append(out, row[0])
		}
		return out
	}
	m := db.open(t, super, hide)
	got, _ := query(t, m, request("SHOW DATABASES"))
	if all := names(got); slices.Contains(all, "hr") || !slices.Contains(all, "shop") {
		t.Errorf("got %v, want shop and not hr", all)
	}
	got, _ = query(t, m, request("show full tables like 'shown%'"))
	if want := [][]string{{"shown", "BASE TABLE"}, {"shown_view", "VIEW"}}; !reflect.DeepEqual(got.rows, want) {
		t.Errorf("got %v, want %v", got.rows, want)
	}
	got, _ = query(t, m, request("SHOW TABLE STATUS LIKE 'shown%'"))
	if all := names(got); !reflect.DeepEqual(all, []string{"shown", "shown_view"}) {
		t.Errorf("got %v", all)
	}
	got, _ = query(t, m, request("DESCRIBE shown"))
	if len(got.rows) != 2 || got.rows[1][0] != "s" || got.rows[1][4] != "zebra4711" || got.schema.Field(0).Name != "Field" {
		t.Errorf("got %v %v", got.schema, got.rows)
	}
	got, _ = query(t, m, with("DESC {{t|identifier}} s", map[string]string{"t": "shown"}))
	if len(got.rows) != 1 || got.rows[0][0] != "s" {
		t.Errorf("got %v", got.rows)
	}
	got, _ = query(t, m, request("SHOW CREATE TABLE shown"))
	if len(got.rows) != 1 || !strings.Contains(got.rows[0][1], "zebra4711") {
		t.Errorf("got %v", got.rows)
	}
	got, _ = query(t, m, request("SHOW INDEX FROM shown"))
	if len(got.rows) != 2 {
		t.Errorf("got %v", got.rows)
	}
	query(t, m, request("SHOW CREATE VIEW shown_view"))
	refuse(t, m, request("DESCRIBE nope"), proto.CodeSQL)
	for _, text := range []string{"SHOW TABLES FROM hr", "SHOW TABLES FROM Hr", "DESCRIBE hr.people", "DESC Hr.nothing", "SHOW CREATE TABLE shown_secret", "SHOW INDEX FROM shop.shown_secret", "SHOW COLUMNS FROM SHOWN_SECRET", "SHOW TABLE STATUS IN hr", "SHOW COLUMNS FROM shop.people FROM hr", "SHOW GRANTS", "SHOW TABLES WHERE 1"} {
		refuse(t, m, request(text), proto.CodePolicyDenied)
	}
	// On a source that may write the same holds of the questions that are understood.
	writing := db.open(t, super, hide, readWrite)
	r := request("SHOW TABLES LIKE 'shown%'")
	r.ReadWrite = true
	got, _ = query(t, writing, r)
	if all := names(got); !reflect.DeepEqual(all, []string{"shown", "shown_view"}) {
		t.Errorf("got %v", all)
	}
	// Mode metadata tells no values.
	described := db.open(t, super, hide, metadata)
	for _, text := range []string{"SHOW DATABASES", "SHOW TABLES", "SHOW FULL COLUMNS FROM shown", "DESCRIBE shown", "SHOW INDEX FROM shown", "DESC shown_view", "DESCRIBE shown 'zebra%'"} {
		out, err := told(t, described, request(text))
		if err != nil || strings.Contains(out, canary) && !strings.Contains(text, "zebra") {
			t.Errorf("%s: got %v: %s", text, err, out)
		}
	}
	got, _ = query(t, described, request("SHOW INDEX FROM shown"))
	for i, f := range got.schema.Fields() {
		if f.Name == "Cardinality" && (got.rows[0][i] != "(null)" || got.rows[1][i] != "(null)") {
			t.Errorf("got %v, want no numbers of values", got.rows)
		}
	}
	for _, text := range []string{"SHOW CREATE TABLE shown", "SHOW CREATE VIEW shown_view", "SHOW TABLE STATUS", "SHOW VARIABLES", "DESCRIBE hr.people", "SHOW STATUS"} {
		refuse(t, described, request(text), proto.CodePolicyDenied)
	}
	e := refuse(t, described, request("DESCRIBE nope"), proto.CodeSQL)
	if !strings.Contains(e.Error(), "there is no table nope") {
		t.Errorf("got %v", e)
	}
}

// MariaDB calls functions that are declared deterministic when it prepares a view, and so
// when it only tells of one.
func TestMariaFolding(t *testing.T) {
	db, super := root(t)
	for _, s := range []string{
		"CREATE FUNCTION f_fold() RETURNS INT DETERMINISTIC RETURN GET_LOCK('fold', 0)", "CREATE VIEW v_fold AS SELECT ROUND(1.5, f_fold()) AS a",
		"CREATE FUNCTION f_varying() RETURNS INT RETURN 1", "CREATE VIEW v_varying AS SELECT ROUND(1.5, f_varying()) AS a",
	} {
		if _, err := db.admin.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	drop := func(views string) {
		if _, err := db.admin.Exec("DROP VIEW IF EXISTS " + views); err != nil {
			t.Fatal(err)
		}
	}
	defer func() { _, _ = db.admin.Exec("DROP VIEW v_varying; DROP FUNCTION f_fold; DROP FUNCTION f_varying") }()
	defer drop("v_fold")
	free := func(after string) {
		t.Helper()
		var is int
		// The server notices after a moment that a connection is gone.
		for deadline := time.Now().Add(time.Minute); is != 1; time.Sleep(10 * time.Millisecond) {
			if err := db.admin.QueryRow("SELECT IS_FREE_LOCK('fold')").Scan(&is); err != nil {
				t.Fatal(err)
			}
			if is != 1 && time.Now().After(deadline) {
				t.Fatalf("%s: the lock is held", after)
			}
		}
	}
	free("the view was made")
	catalog := []string{
		"SELECT COLUMN_NAME FROM information_schema.COLUMNS", "SELECT COLUMN_NAME FROM `INFORMATION_SCHEMA`.columns WHERE TABLE_NAME = 'v_fold'", "SELECT * FROM information_schema.TABLES", "SHOW TABLE STATUS", "SELECT 1 FROM (SELECT 1 FROM information_schema.STATISTICS) t",
		"SELECT * FROM sys.schema_auto_increment_columns", "SHOW TABLE STATUS LIKE 'v_fold'",
	}
	of := []string{"DESCRIBE v_fold", "SHOW FULL COLUMNS FROM v_fold", "SHOW INDEX FROM v_fold", "SHOW CREATE VIEW v_fold", "SELECT 1 FROM v_fold WHERE FALSE"}
	for _, mode := range []string{"read-only", "metadata"} {
		m := db.open(t, super, func(s *sqlsession.Source) { s.Guard.Mode = mode })
		for _, text := range append(slices.Clone(catalog), of...) {
			refuse(t, m, request(text), proto.CodePolicyDenied)
			free(text)
		}
		query(t, m, request("SHOW FULL TABLES"))
	}
	// Where the policy lists the function, or introspection looks at all views, what it left
	// goes with the connection, while the session's process lives on.
	m := db.open(t, super, func(s *sqlsession.Source) { s.Guard.Mode, s.Guard.Functions = "read-only", []string{"shop.f_fold"} })
	query(t, m, request("DESCRIBE v_fold"))
	free("DESCRIBE of a listed function's view")
	if err := m.Introspect(t.Context(), sqlsession.Introspection{Source: "db"}, func(*posternv1.CatalogPage) error { return nil }); err != nil {
		t.Error(err)
	}
	free("introspection")
	drop("v_fold")
	time.Sleep(2100 * time.Millisecond) // for as long the list of views is believed
	m = db.open(t, super)
	for _, text := range catalog {
		query(t, m, request(text))
	}
}
