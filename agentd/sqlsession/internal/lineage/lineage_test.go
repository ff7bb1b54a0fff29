package lineage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/goleak"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/e2e/pgserver"
)

func TestMain(m *testing.M) {
	if code := m.Run(); code != 0 {
		os.Exit(code)
	}
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

const schema = `
CREATE TABLE people (id int PRIMARY KEY, email text, name varchar(40), salary int, vip bool, note text,
  mail_lower text GENERATED ALWAYS AS (lower(email)) STORED, doubled int GENERATED ALWAYS AS (id * 2) STORED);
CREATE TABLE orders (id int, person int, email text, total numeric);
CREATE TABLE logs (id int, day date, email text) PARTITION BY RANGE (day);
CREATE TABLE logs_2020 PARTITION OF logs FOR VALUES FROM ('2020-01-01') TO ('2021-01-01');
CREATE TABLE base (id int, phone text);
CREATE TABLE derived (extra text) INHERITS (base);
CREATE SEQUENCE s;
CREATE TABLE tree (id int, parent int, label text);
CREATE SCHEMA hr;
CREATE TABLE hr.staff (id int, ssn text);
CREATE VIEW v1 AS SELECT id, email AS contact, upper(name) AS shouted, note FROM people;
CREATE VIEW v2 AS SELECT contact AS c2, shouted, id FROM v1 WHERE contact LIKE 'a%';
CREATE VIEW v3 AS WITH x AS (SELECT * FROM v2) SELECT x.*, o.total FROM x JOIN orders o ON o.person = x.id;
CREATE MATERIALIZED VIEW mv AS SELECT email, count(*) AS n FROM people GROUP BY email;
CREATE FUNCTION leak(int) RETURNS text LANGUAGE sql STABLE AS 'SELECT email FROM people WHERE id = $1';
CREATE FUNCTION leaks() RETURNS SETOF people LANGUAGE sql STABLE AS 'SELECT * FROM people';
CREATE FUNCTION allowed(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT ''x''::text';
CREATE FUNCTION domain_of(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT split_part($1, ''@'', 2)';
CREATE VIEW vf AS SELECT id, leak(id) AS l FROM people;
CREATE FUNCTION opf(int, int) RETURNS text LANGUAGE sql STABLE AS 'SELECT email FROM people WHERE id = $1 + $2';
CREATE FUNCTION lessf(int, int) RETURNS bool LANGUAGE sql STABLE AS 'SELECT EXISTS (SELECT email FROM people WHERE id = $1)';
CREATE OPERATOR ##< (LEFTARG = int, RIGHTARG = int, FUNCTION = lessf);
CREATE OPERATOR ##@ (LEFTARG = int, RIGHTARG = int, FUNCTION = opf);
INSERT INTO people VALUES (1, 'CANARY@x', 'N', 5, true, 'n');
`

// rules: 0 email, 1 salary (null), 2 phone on the parent, 3 ssn, 4 logs_2020 only on the child.
var testPolicy = Policy{
	Rules: []Rule{
		{Columns: []string{"people.email", "people.name"}},
		{Columns: []string{"people.salary", "people.vip"}, Null: true},
		{Columns: []string{"base.phone"}},
		{Columns: []string{"hr.*.ssn"}},
		{Columns: []string{"logs_2020.email"}},
	},
	Filters: FiltersEquality, Safe: []string{"domain_of"}, Functions: []string{"public.allowed"},
}

func start(t *testing.T) (*pgserver.Server, func(sql string) ([][]string, error), *pgconn.PgConn) {
	t.Helper()
	ctx := context.Background()
	server := pgserver.Start(t)
	conn, err := server.Connect(ctx, "postgres")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(ctx) })
	pg := conn.PgConn()
	if _, err := pg.Exec(ctx, schema).ReadAll(); err != nil {
		t.Fatal(err)
	}
	return server, func(sql string) ([][]string, error) {
		results, err := pg.Exec(ctx, sql).ReadAll()
		var rows [][]string
		for _, r := range results {
			for _, row := range r.Rows {
				var texts []string
				for _, v := range row {
					texts = append(texts, string(v))
				}
				rows = append(rows, texts)
			}
		}
		return rows, err
	}, pg
}

// verdict is a plan in short: one word a column: clear, its rule, "redact" or
// "null".
func verdict(p *Plan) string {
	var words []string
	for _, c := range p.Columns {
		switch {
		case !c.Masked:
			words = append(words, "clear")
		case c.Plain:
			words = append(words, fmt.Sprint(c.Rule))
		case c.Null:
			words = append(words, "null")
		default:
			words = append(words, "redact")
		}
	}
	return strings.Join(words, " ")
}

func TestAnalyze(t *testing.T) {
	ctx := context.Background()
	_, query, pg := start(t)
	const refused = "refused: "
	tests := []struct{ sql, want string }{
		{"SELECT 1", "clear"},
		{"SELECT id, email, name, salary, note FROM people", "clear 0 0 1 clear"},
		{"SELECT * FROM people", "clear 0 0 1 1 clear redact clear"},
		{"SELECT p.* FROM people p", "clear 0 0 1 1 clear redact clear"},
		{"SELECT p.*, o.* FROM people p JOIN orders o ON o.person = p.id", "clear 0 0 1 1 clear redact clear clear clear clear clear"},
		{"SELECT people.email, public.people.email FROM public.people", "0 0"},
		{`SELECT "email" FROM "people" AS "Q"`, "0"},
		{"SELECT x FROM people AS p(i, x)", "0"},
		{"SELECT email x FROM people", "0"},
		{"TABLE people", "clear 0 0 1 1 clear redact clear"},
		{"SELECT people FROM people", "null"},
		{"SELECT p FROM (SELECT id, email FROM people) p", "redact"},
		{"SELECT (p).email, (p).id, (p).* FROM people p", "0 clear clear 0 0 1 1 clear redact clear"},
		{"SELECT email(p) FROM people p", "0"},
		{"SELECT id(p) FROM people p", "clear"},
		{"SELECT row(email, 1) FROM people", "redact"},
		{"SELECT (s.r).email FROM (SELECT p AS r FROM people p) s", "null"},
		{"SELECT e FROM (SELECT email AS e FROM people) s", "0"},
		{"SELECT * FROM (SELECT id, email FROM people) s(a, b)", "clear 0"},
		{"SELECT a FROM (VALUES (1)) v(a)", "clear"},
		{"VALUES ((SELECT email FROM people LIMIT 1), 1), ('x', 2)", "0 clear"},
		{"WITH x AS (SELECT email FROM people) SELECT * FROM x", "0"},
		{"WITH x(e) AS (SELECT email FROM people), y AS (SELECT e AS f FROM x) SELECT f, 1 FROM y", "0 clear"},
		{"WITH people AS (SELECT 1 AS email) SELECT email FROM people", "clear"},
		{"WITH people AS (SELECT email FROM people) SELECT email FROM people", "0"},
		{"WITH people AS (SELECT 1 AS email) SELECT email FROM public.people", "0"},
		{"WITH RECURSIVE r(n, e) AS (SELECT 1, email FROM people UNION ALL SELECT n + 1, e FROM r WHERE n < 3) SELECT * FROM r", "clear 0"},
		{"WITH RECURSIVE r(n, e) AS (SELECT 1, ''::text UNION ALL SELECT n + 1, p.email FROM r JOIN people p ON p.id = n) SELECT * FROM r", "clear 0"},
		{"WITH RECURSIVE r(a, b, c) AS (SELECT 1, ''::text, ''::text UNION ALL SELECT a + 1, p.email, b FROM r JOIN people p ON p.id = a) SELECT * FROM r", "clear 0 0"},
		{"WITH RECURSIVE b AS (SELECT * FROM a), a AS (SELECT email FROM people) SELECT * FROM b", "0"},
		{"SELECT id FROM people UNION ALL SELECT 1", "clear"},
		{"SELECT note FROM people UNION ALL SELECT email FROM people", "0"},
		{"SELECT email FROM people UNION ALL SELECT mail_lower FROM people", "redact"},
		{"SELECT email FROM people UNION SELECT note FROM people", refused + "order"},
		{"SELECT email FROM people INTERSECT SELECT 'a'", refused + "order"},
		{"SELECT id FROM people EXCEPT SELECT 1", "clear"},
		{"SELECT email FROM people JOIN orders USING (email)", "0"},
		{"SELECT * FROM orders JOIN people USING (email)", "0 clear clear clear clear 0 1 1 clear redact clear"},
		{"SELECT o.email FROM people p NATURAL JOIN orders o", "clear"},
		{"SELECT email FROM people p NATURAL JOIN orders o", "0"},
		{"SELECT j.email FROM (people p JOIN orders o USING (email)) j", "0"},
		{"SELECT u.email FROM people p JOIN orders o USING (email) AS u", "0"},
		{"SELECT p.email, x.e FROM people p, LATERAL (SELECT p.email AS e) x", "0 0"},
		{"SELECT x.e FROM people p LEFT JOIN LATERAL (SELECT upper(p.email) AS e) x ON true", "redact"},
		{"SELECT (SELECT email FROM people LIMIT 1)", "0"},
		{"SELECT (SELECT p.email) FROM people p", "0"},
		{"SELECT ARRAY(SELECT email FROM people)", "redact"},
		{"SELECT EXISTS (SELECT email FROM people WHERE email = 'x')", "clear"},
		{"SELECT EXISTS (SELECT 1 FROM people WHERE email LIKE 'x%')", refused + "another way"},
		{"SELECT 'x' IN (SELECT email FROM people)", refused + "subquery"},
		{"SELECT upper(email), email || 'x', length(email), substr(email, 1, 3), left(email, 2), md5(email) FROM people", "redact redact redact redact redact redact"},
		{"SELECT email::text, CAST(email AS varchar), email COLLATE \"C\" FROM people", "0 0 0"},
		{"SELECT email::varchar(2) FROM people", "redact"},
		{"SELECT email::int FROM people", refused + "cast"},
		{"SELECT salary + 1, salary * 12, salary / 2.0 FROM people", "null null null"},
		{"SELECT salary * 2000000 FROM people", refused + "operator *"},
		{"SELECT 1 / salary FROM people", refused + "operator /"},
		{"SELECT salary + g FROM people, generate_series(1, 3) g", refused + "operator +"},
		{"SELECT CASE WHEN email LIKE 'a%' THEN 1 ELSE 0 END FROM people", "redact"},
		{"SELECT CASE WHEN email LIKE 'a%' THEN 1 / (id - id) END FROM people", refused + "operator -"},
		{"SELECT CASE WHEN email LIKE 'a%' THEN pg_sleep(1) END FROM people", refused + "pg_sleep"},
		{"SELECT CASE WHEN email LIKE 'a%' THEN (SELECT 1 / (p.id - p.id)) END FROM people p", refused + "subquery"},
		{`SELECT email LIKE 'a\' FROM people`, refused + "operator"},
		{"SELECT repeat(email, 1000) FROM people", refused + "repeat"},
		{"SELECT coalesce(email, note), nullif(email, 'x'), greatest(email, note) FROM people", "redact redact redact"},
		{"SELECT email = 'x', email IS NULL, email > 'm', email ~~ 'a%', email IN ('a', 'b') FROM people", "redact redact redact redact redact"},
		{"SELECT to_jsonb(p), row_to_json(p), json_agg(p) OVER () FROM people p", "null null null"},
		{"SELECT json_build_object('e', email), json_agg(email), array_agg(email), string_agg(email, ','), xmlforest(email), xmlelement(name a, email) FROM people GROUP BY email", "redact redact redact redact redact redact"},
		{"SELECT count(*), count(email), count(DISTINCT email), min(email), max(salary), sum(salary), avg(salary) FROM people", "clear clear clear redact null null null"},
		{"SELECT count(CASE WHEN email LIKE 'a%' THEN 1 END) FROM people", "redact"},
		{"SELECT count(*) FILTER (WHERE email = 'x') FROM people", "clear"},
		{"SELECT count(*) FILTER (WHERE email > 'x') FROM people", refused + "another way"},
		{"SELECT string_agg(note, ',' ORDER BY email) FROM people", refused + "order"},
		{"SELECT domain_of(email), domain_of(upper(email)) FROM people", "clear redact"},
		{"SELECT count(domain_of(email)) FROM people", "clear"},
		{"SELECT allowed(note) FROM people", "clear"},
		{"SELECT leak(1)", refused + "leak"},
		{"SELECT public.leak(1)", refused + "leak"},
		{"SELECT * FROM leaks()", refused + "leaks"},
		{"SELECT 1 ##@ 0", refused + "operator"},
		{"SELECT 1 OPERATOR(public.##@) 0", refused + "operator"},
		{"SELECT query_to_xml('select * from people', true, true, '')", refused + "query_to_xml"},
		{"SELECT table_to_xml('people', true, true, '')", refused + "table_to_xml"},
		{"SELECT pg_read_file('x')", refused + "pg_read_file"},
		{"SELECT * FROM ts_stat('select email::tsvector from people')", refused + "ts_stat"},
		{"SELECT most_common_vals FROM pg_stats", "redact"},
		{"SELECT tablename, null_frac FROM pg_stats", "clear clear"},
		{"SELECT * FROM pg_stat_get_activity(NULL)", refused + "pg_stat_get_activity"},
		{"SELECT pid, query FROM pg_stat_activity", "clear redact"},
		{"SELECT relname, relkind FROM pg_class WHERE relname LIKE 'p%' ORDER BY 1", "clear clear"},
		{"SELECT table_name, column_name FROM information_schema.columns", "clear clear"},
		{"SELECT contact, shouted, note, id FROM v1", "0 redact clear clear"},
		{"SELECT * FROM v2", "0 redact clear"},
		{"SELECT * FROM v3", "0 redact clear clear"},
		{"SELECT c2 FROM v3 WHERE c2 = 'x'", "0"},
		{"SELECT c2 FROM v3 WHERE shouted = 'x'", refused + "another way"},
		{"SELECT * FROM mv", "0 clear"},
		{"SELECT id, l FROM vf", "clear redact"},
		{"SELECT email FROM logs", "4"},
		{"SELECT email FROM logs_2020", "4"},
		{"SELECT phone FROM base", "2"},
		{"SELECT phone, extra FROM derived", "2 clear"},
		{"SELECT ssn FROM hr.staff", "3"},
		{"SELECT mail_lower, doubled FROM people", "redact clear"},
		{"SELECT ctid, tableoid, xmin FROM people", "clear clear clear"},
		{"SELECT id FROM people WHERE email = 'x' OR NOT (name IN ('a', 'b')) AND email IS NOT NULL", "clear"},
		{"SELECT id FROM people WHERE vip", "clear"},
		{"SELECT id FROM people WHERE (email, name) = ('a', 'b')", "clear"},
		{"SELECT id FROM people WHERE email = ANY ('{a,b}')", "clear"},
		{"SELECT id FROM people WHERE email <> 'x' AND email IS DISTINCT FROM 'y'", "clear"},
		{"SELECT id FROM people WHERE email IN (SELECT email FROM orders)", "clear"},
		{"SELECT id FROM orders WHERE email IN (SELECT email FROM people)", "clear"},
		{"SELECT id FROM orders WHERE email NOT IN (SELECT upper(email) FROM people)", refused + "another way"},
		{"SELECT id FROM people WHERE email LIKE 'a%'", refused + "another way"},
		{"SELECT id FROM people WHERE email > 'a'", refused + "another way"},
		{"SELECT id FROM people WHERE lower(email) = 'a'", refused + "another way"},
		{"SELECT id FROM people WHERE salary BETWEEN 1 AND 2", refused + "another way"},
		{"SELECT id FROM people WHERE starts_with(email, 'a')", refused + "another way"},
		{"SELECT id FROM people WHERE (CASE WHEN email < 'm' THEN true END)", refused + "another way"},
		{"SELECT id FROM (SELECT id, substr(email, 1, 1) AS c FROM people) s WHERE c = 'a'", refused + "another way"},
		{"SELECT p.id FROM people p JOIN orders o ON o.email = p.email", "clear"},
		{"SELECT p.id FROM people p JOIN orders o ON o.email > p.email", refused + "another way"},
		{"SELECT email, count(*) FROM people GROUP BY email", "0 clear"},
		{"SELECT email, count(*) FROM people GROUP BY 1", "0 clear"},
		{"SELECT upper(email), count(*) FROM people GROUP BY 1", refused + "GROUP BY"},
		{"SELECT email, name FROM people GROUP BY GROUPING SETS ((email), (name), ())", "0 0"},
		{"SELECT g FROM generate_series(1, 1000000) g JOIN people ON salary = g", refused + "another way"},
		{"SELECT id FROM people WHERE salary IN (SELECT g FROM generate_series(1, 50000) g)", refused + "another way"},
		{"SELECT id FROM people WHERE salary = ANY (ARRAY(SELECT generate_series(1, 50000)))", refused + "another way"},
		{"SELECT id FROM people WHERE salary = ANY (ARRAY[1, 2]) AND email = ANY (string_to_array('a,b', ','))", "clear"},
		{"SELECT g FROM generate_series(1, 9) g WHERE EXISTS (SELECT 1 FROM people p WHERE p.id = 1 AND p.salary = g)", refused + "another way"},
		{"SELECT x FROM (VALUES ('a'), ('b')) v(x) JOIN people ON email = x", refused + "another way"},
		{"SELECT salary FROM people JOIN generate_series(1, 9) salary USING (salary)", refused + "makes"},
		{"SELECT max(g) FROM (SELECT salary s, NULL::int g FROM people UNION ALL SELECT g, g FROM generate_series(1, 9) g) u GROUP BY s", refused + "GROUP BY"},
		{"SELECT s FROM (SELECT salary s FROM people UNION ALL SELECT 5) u WHERE s = 5", refused + "another way"},
		{"SELECT o.id FROM (SELECT id, email AS e FROM orders) o JOIN people p ON p.email = o.e::text", "clear"},
		{"SELECT a.attnum FROM pg_attribute a JOIN people p ON p.salary = a.attnum", refused + "another way"},
		{"SELECT p.id FROM people p WHERE p.email = lower('X') || 'y' AND p.email = $1", "clear"},
		{"SELECT id FROM people ORDER BY id USING ##<", refused + "operator"},
		{"SELECT set_config('a.b', email, true), current_setting('a.b') FROM people", refused + "pass it on"},
		{"SELECT pg_try_advisory_lock(salary) FROM people", refused + "pass it on"},
		{"SELECT setval('s', salary) FROM people", refused + "pass it on"},
		{"SELECT to_jsonb(p) ->> 'email', to_jsonb(p) -> 'id' FROM people p", "null null"},
		{"WITH t AS (SELECT p FROM people p) SELECT (t.p).email, (t.p).id FROM t", "null null"},
		{"SELECT chunk_data FROM TOAST", "redact"},
		{"SELECT id FROM people ORDER BY email", refused + "order"},
		{"SELECT email FROM people ORDER BY 1", refused + "order"},
		{"SELECT id AS email FROM people ORDER BY email", "clear"},
		{"SELECT id FROM people ORDER BY id, length(email)", refused + "order"},
		{"SELECT email FROM people ORDER BY id LIMIT 5", "0"},
		{"SELECT DISTINCT email FROM people", refused + "order"},
		{"SELECT DISTINCT ON (email) id FROM people", refused + "order"},
		{"SELECT DISTINCT id FROM people", "clear"},
		{"SELECT row_number() OVER (ORDER BY email) FROM people", refused + "order"},
		{"SELECT row_number() OVER w FROM people WINDOW w AS (ORDER BY salary)", refused + "order"},
		{"SELECT row_number() OVER (PARTITION BY email ORDER BY id), first_value(email) OVER (ORDER BY id) FROM people", "clear redact"},
		{"SELECT email FROM people LIMIT (SELECT length(email) FROM people LIMIT 1)", refused + "LIMIT"},
		{"SELECT unnest(string_to_array(email, '')) FROM people", refused + "function string_to_array"},
		{"SELECT x FROM people, unnest(ARRAY[email]) x", refused + "counted"},
		{"SELECT key, value FROM people p, json_each(to_json(p))", refused + "counted"},
		{"SELECT g, email FROM people, generate_series(1, 2) g", "clear 0"},
		{"SELECT key, value, email FROM people, json_each('{\"a\":1}')", "clear clear 0"},
		{"SELECT * FROM json_to_recordset('[]') AS x(a int, b text)", "clear clear"},
		{"SELECT * FROM generate_series(1, 2) WITH ORDINALITY", "clear clear"},
		{"SELECT relid, email FROM pg_partition_ancestors('people') AS x, people", "clear 0"},
		{"SELECT * FROM people TABLESAMPLE SYSTEM (10)", "clear 0 0 1 1 clear redact clear"},
		{"SELECT * FROM xmltable('/a' PASSING '<a/>' COLUMNS b text, c int)", "clear clear"},
		{"SELECT x.b FROM people p, xmltable('/a' PASSING xmlelement(name a, p.email) COLUMNS b text) x", refused + "counted"},
		{"INSERT INTO orders (id, email) SELECT id, email FROM people", refused + "copy"},
		{"INSERT INTO orders (id, email) VALUES (1, 'x')", ""},
		{"INSERT INTO orders (id) SELECT id FROM people RETURNING id, email", "clear clear"},
		{"INSERT INTO people (id, email) SELECT 2, email FROM people RETURNING *", "clear 0 0 1 1 clear redact clear"},
		{"INSERT INTO people (id, name) VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET name = excluded.name", ""},
		{"INSERT INTO people (id, note) VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET note = people.email", refused + "copy"},
		{"UPDATE people SET note = email", refused + "copy"},
		{"UPDATE people SET email = 'x' WHERE email = 'y' RETURNING email, note", "0 clear"},
		{"UPDATE people SET (note, email) = (email, 'x')", refused + "copy"},
		{"UPDATE orders SET email = p.email FROM people p WHERE p.id = person", refused + "copy"},
		{"DELETE FROM people WHERE email LIKE 'a%'", refused + "another way"},
		{"DELETE FROM people USING orders o WHERE o.person = people.id RETURNING people.*, o.total", "clear 0 0 1 1 clear redact clear clear"},
		{"WITH d AS (DELETE FROM people RETURNING email) SELECT * FROM d", "0"},
		{"MERGE INTO orders o USING people p ON o.person = p.id WHEN MATCHED THEN UPDATE SET email = p.email", refused + "copy"},
		{"MERGE INTO orders o USING people p ON o.person = p.id WHEN MATCHED THEN DELETE", ""},
		{"CREATE TABLE copy AS SELECT email FROM people", refused + "copy"},
		{"SELECT email INTO copy FROM people", refused + "copy"},
		{"CREATE TABLE copy AS SELECT id FROM people", ""},
		{"CREATE VIEW w AS SELECT email AS x FROM people", refused + "this kind"},
		{"ALTER TABLE people RENAME email TO x", refused + "this kind"},
		{"CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'", refused + "this kind"},
		{"DO 'BEGIN END'", refused + "this kind"},
		{"COPY people TO STDOUT", refused + "this kind"},
		{"SET search_path = hr", ""},
	}
	toast, err := query("SELECT reltoastrelid::regclass FROM pg_class WHERE relname = 'people'")
	if err != nil {
		t.Fatal(err)
	}
	parser := pgtree.InProcess()
	for _, test := range tests {
		test.sql = strings.Replace(test.sql, "TOAST", toast[0][0], 1)
		t.Run(test.sql, func(t *testing.T) {
			tree, err := parser.Parse(ctx, test.sql)
			if err != nil {
				t.Fatal(err)
			}
			plan, err := Analyze(ctx, test.sql, tree.Stmts[0].Stmt, parser, SQLCatalog{Query: query}, &testPolicy)
			var refusal *Refusal
			if errors.As(err, &refusal) {
				if !strings.HasPrefix(test.want, refused) || !strings.Contains(refusal.Reason, strings.TrimPrefix(test.want, refused)) {
					t.Fatalf("refused: %s (%d); want %s", refusal.Reason, refusal.Position, test.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := verdict(plan); got != test.want {
				t.Fatalf("got %q, want %q", got, test.want)
			}
			if !plan.Known {
				return
			}
			checkAgainstServer(t, pg, test.sql, plan)
		})
	}
}

// checkAgainstServer compares a plan with what the server says of the result.
func checkAgainstServer(t *testing.T, pg *pgconn.PgConn, sql string, plan *Plan) {
	t.Helper()
	description, err := pg.Prepare(context.Background(), "", sql, nil)
	if err != nil {
		if strings.HasPrefix(sql, "MERGE") || strings.HasPrefix(sql, "INSERT") {
			return
		}
		t.Fatal(err)
	}
	if len(description.Fields) != len(plan.Columns) {
		t.Fatalf("%d columns, the server says %d", len(plan.Columns), len(description.Fields))
	}
	for i, f := range description.Fields {
		c := plan.Columns[i]
		if c.Named && c.Name != f.Name {
			t.Errorf("column %d is %q, the server says %q", i, c.Name, f.Name)
		}
		if f.TableOID != 0 && c.Relation != 0 && (f.TableOID != c.Relation || int16(f.TableAttributeNumber) != c.Number) {
			t.Errorf("column %q comes from %d.%d, the server says %d.%d", c.Name, c.Relation, c.Number, f.TableOID, f.TableAttributeNumber)
		}
		if f.TableOID != 0 {
			masked, unknown := plan.MaskedOrigin(f.TableOID, int16(f.TableAttributeNumber))
			if masked && !c.Masked {
				t.Errorf("column %q is clear and comes from a masked one", c.Name)
			}
			if unknown {
				t.Errorf("column %q comes from a relation that was not met", c.Name)
			}
		}
	}
}

func TestFilters(t *testing.T) {
	ctx := context.Background()
	_, query, _ := start(t)
	parser := pgtree.InProcess()
	for _, test := range []struct{ sql, allow, refuse string }{
		{"SELECT email FROM people", "0", "0"},
		{"SELECT id FROM people WHERE email LIKE 'a%' ORDER BY email", "clear", "refused"},
		{"SELECT id FROM people WHERE email = 'a'", "clear", "refused"},
		{"SELECT id FROM people WHERE email IS NULL", "clear", "refused"},
		{"SELECT email FROM people GROUP BY email", "0", "refused"},
		{"SELECT DISTINCT email FROM people", "0", "refused"},
		{"SELECT email::int FROM people", "redact", "refused"},
		{"SELECT rank() OVER (ORDER BY email) FROM people", "redact", "refused"},
		{"SELECT count(*) FILTER (WHERE email LIKE 'a%') FROM people", "redact", "refused"},
		{"SELECT leak(1)", "refused", "refused"},
		{"SELECT set_config('a.b', email, true) FROM people", "refused", "refused"},
		{"INSERT INTO orders (email) SELECT email FROM people", "refused", "refused"},
		{"SELECT email FROM people UNION SELECT 'a'", "0", "refused"},
	} {
		for filters, want := range map[string]string{FiltersAllow: test.allow, FiltersRefuse: test.refuse} {
			policy := testPolicy
			policy.Filters = filters
			tree, err := parser.Parse(ctx, test.sql)
			if err != nil {
				t.Fatal(err)
			}
			plan, err := Analyze(ctx, test.sql, tree.Stmts[0].Stmt, parser, SQLCatalog{Query: query}, &policy)
			got := "refused"
			if err == nil {
				got = verdict(plan)
			}
			if got != want {
				t.Errorf("%s with %s: got %s (%v), want %s", test.sql, filters, got, err, want)
			}
		}
	}
}
