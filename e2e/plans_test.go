package e2e

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/postern-dev/postern/e2e/stack"
)

// TestPlansAndMetadata asks for plans and descriptions by the real binaries, and
// looks for values where none may be.
func TestPlansAndMetadata(t *testing.T) {
	pg := database(t, "planned")
	canary := marked("canary")
	if err := pg.SQLIn(t.Context(), "planned",
		"create table people as select i as id, '"+canary+"' || i as name from generate_series(1, 5000) i",
		"alter table people add primary key (id)", "analyze people",
		"grant select, insert on people to reader",
	); err != nil {
		t.Fatal(err)
	}
	s := newStack(t, stack.Options{})
	dsn := pg.SocketDSN("reader", "planned")
	_, err := s.Join(t.Context(), "host", "sources:\n"+mustSource(t, s.Dir, "facts", dsn, "      mode: metadata\n      plans: structure\n")+
		mustSource(t, s.Dir, "quiet", dsn, "      mode: read-only\n")+
		mustSource(t, s.Dir, "all", dsn, "      mode: read-write\n      plans: analyze\n"))
	if err != nil {
		t.Fatal(err)
	}
	newest := func() string {
		t.Helper()
		return mustJSON[[]struct{ ID string }](t, s, "query", "list", "--limit", "1")[0].ID
	}

	got := must(t, s, "sql", "host/facts", "select * from people where id = :id")
	if want := "COLUMN  TYPE     NULLABLE\nid      integer  no\nname    text     yes\n\nPARAMETER  TYPE\nid         integer"; got != want {
		t.Errorf("a description: got %q, want %q", got, want)
	}
	if got := must(t, s, "sql", "host/facts", "-f", "json", "select * from people"); strings.TrimSpace(got) != "[]" {
		t.Errorf("a description in JSON: got %q", got)
	}
	if got := must(t, s, "sql", "host/facts", "-f", "csv", "select attname from pg_attribute where attrelid = 'people'::regclass and attnum > 0 order by attnum"); got != "attname\nid\nname" {
		t.Errorf("the catalog: got %q", got)
	}
	if got := must(t, s, "sql", "host/facts", "-f", "csv", "select name::int as n from people"); got != "n" {
		t.Errorf("a cast of each value: got %q", got)
	}
	postern(t, s, "sql", "host/facts", "vacuum").said(t, 3, "metadata only")
	if e := postern(t, s, "sql", "host/facts", "select prosrc from pg_proc"); e.code != 3 || !strings.Contains(e.stderr, "prosrc is not told") {
		t.Errorf("a function's source: exit code %d: %s", e.code, e.stderr)
	}

	plan := must(t, s, "sql", "host/facts", "--explain", "select * from people where name = '"+canary+"17' and id < 17")
	if !strings.Contains(plan, "on public.people") || !strings.Contains(plan, "(people.name = ?::text)") || strings.Contains(plan, canary) || strings.Contains(plan, "17") || strings.Contains(plan, "rows") {
		t.Errorf("a plan of a source in mode metadata: got\n%s", plan)
	}
	if kept := must(t, s, "query", "show", newest(), "--plan", "-f", "csv"); !strings.Contains(kept, "(people.name = ?::text)") || strings.Contains(kept, canary) {
		t.Errorf("the plan in the history: got\n%s", kept)
	}
	postern(t, s, "sql", "host/facts", "--explain", "--analyze", "select 1").said(t, 3, "plans: structure")
	postern(t, s, "sql", "host/quiet", "--explain", "select 1").said(t, 3, "plans: off")
	if e := postern(t, s, "sql", "host/quiet", "explain select 1"); e.code != 3 || !strings.Contains(e.stderr, "--explain") {
		t.Errorf("the word EXPLAIN: exit code %d: %s", e.code, e.stderr)
	}

	plan = must(t, s, "sql", "host/all", "--explain", "--analyze", "select count(*) from people where id > :id", "-p", "id=10")
	if !strings.Contains(plan, "rows=4990") || !strings.Contains(plan, "Execution Time: ") || !strings.Contains(plan, "(people.id > 10)") {
		t.Errorf("a plan that was run for: got\n%s", plan)
	}
	postern(t, s, "sql", "host/all", "--explain", "--analyze", "insert into people values (0, 'x')").said(t, 3, "only one that reads")
	if plan = must(t, s, "sql", "host/all", "--explain", "insert into people values (0, 'x')"); !strings.Contains(plan, "Insert on public.people") {
		t.Errorf("the plan of an INSERT: got\n%s", plan)
	}
	var tree []struct{ Plan map[string]any }
	if err := json.Unmarshal([]byte(must(t, s, "sql", "host/all", "--explain", "-o", "json", "select 1")), &tree); err != nil || tree[0].Plan["Node Type"] != "Result" {
		t.Errorf("a plan in JSON: got %v, %v", tree, err)
	}
	must(t, s, "sql", "host/all", "-f", "csv", "select count(*) from people")
	if now := must(t, s, "query", "show", newest(), "--plan"); !strings.Contains(now, "Aggregate") {
		t.Errorf("the plan of a query that ran: got\n%s", now)
	}
	if n := must(t, s, "sql", "host/all", "-f", "csv", "select count(*) from people"); n != "count\n5000" {
		t.Errorf("got %q people, want 5000", n)
	}
	if list := must(t, s, "audit", "list", "--agent", "host", "--limit", "100"); !strings.Contains(list, "EXPLAIN ANALYZE select count(*)") {
		t.Errorf("the host's audit log does not say that a plan was asked for:\n%s", list)
	}
}
