package sqlsession_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"

	"github.com/apache/arrow-go/v18/arrow"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// canaries are in masked columns, and must come out of nowhere. The number is
// the salary.
var canaries = []string{"c4nary", "C4NARY", "yran4c", "8123457", "c4na"}

var maskSetUp = []string{
	"CREATE SCHEMA masked",
	`CREATE TABLE masked.people (id int PRIMARY KEY, email text, name varchar(40), salary int, pay numeric(12,2), score float8, vip bool, token uuid,
	 data jsonb, raw bytea, born date, tags text[], note text)`,
	`INSERT INTO masked.people SELECT i, 'c4nary' || i || '@example.com', 'c4nary name ' || i, 8123457, 8123457.50, 8123457.25, true, md5('c4nary' || i)::uuid,
	 '{"k": "c4nary"}', 'c4nary', '2000-01-01', '{c4nary}', 'note ' || i || ' card 4111111111111' || lpad(i::text, 3, '0') FROM generate_series(1, 50) i`,
	"INSERT INTO masked.people (id) VALUES (51)",
	"CREATE TABLE masked.orders (id int, person int, email text, total numeric)",
	"INSERT INTO masked.orders SELECT i, i, CASE WHEN i % 2 = 0 THEN 'other' ELSE 'none' END, i FROM generate_series(1, 20) i",
	"CREATE TABLE masked.plain (id int, t text, j jsonb, a text[])",
	`INSERT INTO masked.plain VALUES (1, 'call 4111111111111111 now', '{"n": 4111111111111111, "s": "4111111111111111 \u00e9"}', '{4111111111111111,x}'), (2, NULL, NULL, NULL)`,
	"CREATE VIEW masked.contacts AS SELECT id, email AS contact, upper(name) AS shouted FROM masked.people",
	"GRANT USAGE ON SCHEMA masked TO reader",
	"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA masked TO reader",
	"ANALYZE masked.people",
}

func maskSource(t *testing.T, filters string) sqlsession.Source {
	t.Helper()
	if err := server.SQL(t.Context(), maskSetUp...); err != nil {
		t.Fatal(err)
	}
	cleanUp(t, "DROP SCHEMA masked CASCADE")
	s := source("db")
	s.DSN += " search_path=masked,public"
	s.Guard = sqlsession.Guard{
		Mode: "read-write", MaskFilters: filters, MaskKey: []byte("0123456789abcdef0123456789abcdef"),
		Masks: []sqlsession.Mask{
			{Columns: []string{"people.email"}, With: "hash"},
			{Columns: []string{"people.name"}, With: "partial", Keep: 2},
			{Columns: []string{"people.salary", "people.pay", "people.score"}, With: "noise", Noise: 0.1},
			{Columns: []string{"people.vip", "people.born", "people.data", "people.raw", "people.tags"}, With: "redact"},
			{Columns: []string{"people.token"}, With: "hash"},
			{Pattern: `\b\d{13,19}\b`, With: "partial", Keep: 4},
		},
	}
	return s
}

// hashes are what the mask of that name makes, which may have any four letters in it.
var hashes = regexp.MustCompile(`[a-z2-7]{26,}`)

func hasCanary(text string) string {
	text = hashes.ReplaceAllString(text, "")
	for _, c := range canaries {
		if strings.Contains(text, c) {
			return c
		}
	}
	return ""
}

func TestMasked(t *testing.T) {
	m := newManager(t, sqlsession.Config{}, maskSource(t, "equality"))
	r := request("SELECT id, email, name, salary, pay, score, vip, token, data, raw, born, tags, note FROM people WHERE id IN (1, 2, 51) ORDER BY id")
	var kept *posternv1.KeptRows
	r.KeepFirst, r.KeepLast, r.Kept = 10, 10, func(k *posternv1.KeptRows) { kept = k }
	got, _ := query(t, m, r)
	t.Log(got.rows)
	if len(got.rows) != 3 {
		t.Fatalf("%d rows", len(got.rows))
	}
	first := got.rows[0]
	hex := regexp.MustCompile(`^[a-z2-7]{26}$`)
	for i, want := range map[int]string{0: "1", 2: strings.Repeat("*", 11) + " 1", 6: "(null)", 8: `"***"`, 9: "(null)", 10: "(null)", 11: "(null)", 12: "note 1 card ************1001"} {
		if first[i] != want {
			t.Errorf("%s: got %q, want %q", got.schema.Field(i).Name, first[i], want)
		}
	}
	if !hex.MatchString(first[1]) || first[1] == got.rows[1][1] || len(first[7]) != 36 {
		t.Errorf("hashes: %q", first)
	}
	for i := 1; i < 13; i++ {
		if got.rows[2][i] != "(null)" {
			t.Errorf("NULL of %s became %q", got.schema.Field(i).Name, got.rows[2][i])
		}
	}
	for i, want := range map[int]arrow.Type{1: arrow.STRING, 3: arrow.INT32, 4: arrow.STRING, 5: arrow.FLOAT64, 6: arrow.BOOL, 7: arrow.STRING, 10: arrow.DATE32} {
		if got.schema.Field(i).Type.ID() != want {
			t.Errorf("%s is %v", got.schema.Field(i).Name, got.schema.Field(i).Type)
		}
	}
	var salary int
	if _, err := fmt.Sscan(first[3], &salary); err != nil || salary < 7300000 || salary > 9000000 || salary == 8123457 {
		t.Errorf("salary is %s", first[3])
	}
	if kept == nil || hasCanary(string(kept.Arrow)) != "" || kept.First != 3 {
		t.Errorf("kept: %v", kept)
	}
	// The same value has the same hash, wherever it is read.
	join, _ := query(t, m, request("SELECT contact FROM contacts WHERE contact = 'c4nary1@example.com'"))
	if len(join.rows) != 1 || join.rows[0][0] != first[1] {
		t.Errorf("through the view: %v", join.rows)
	}
	plain, _ := query(t, m, request("SELECT t, j, a FROM plain ORDER BY id"))
	if want := fmt.Sprint([][]string{{"call ************1111 now", `{"n": "************1111", "s": "************1111 é"}`, "{************1111,x}"}, {"(null)", "(null)", "(null)"}}); fmt.Sprint(plain.rows) != want {
		t.Errorf("got %v, want %s", plain.rows, want)
	}
	if !json.Valid([]byte(plain.rows[0][1])) {
		t.Error("no JSON")
	}
}

// TestMaskedRefusals are ways around the masks: each is refused, or what comes out
// holds nothing.
func TestMaskedRefusals(t *testing.T) {
	m := newManager(t, sqlsession.Config{}, maskSource(t, "equality"))
	for _, test := range []struct {
		sql      string
		position int
	}{
		{"SELECT id FROM people WHERE email LIKE 'c%'", 35},
		{"SELECT id FROM people ORDER BY email", 32},
		{"SELECT DISTINCT email FROM people", 0},
		{"SELECT email::int FROM people", 0},
		{"SELECT 'é', 1 / salary FROM people", 15},
		{"SELECT query_to_xml('select email from masked.people', true, true, '')", 8},
		{"SELECT table_to_xml('masked.people', true, true, '')", 8},
		{"SELECT count(*) FROM people WHERE salary > 100", 42},
		{"INSERT INTO orders (email) SELECT email FROM people", 0},
		{"UPDATE people SET note = email", 0},
		{"CREATE TABLE public.copied AS SELECT email FROM people", 0},
		{"CREATE VIEW public.copied AS SELECT email FROM people", 0},
		{"ALTER TABLE masked.people RENAME COLUMN email TO x", 0},
		{"DO $$ BEGIN RAISE NOTICE '%', (SELECT email FROM masked.people LIMIT 1); END $$", 0},
	} {
		r := request(test.sql)
		r.ReadWrite = !strings.HasPrefix(test.sql, "SELECT")
		e := refuse(t, m, r, proto.CodePolicyDenied)
		if c := hasCanary(e.Error() + e.Message); c != "" {
			t.Errorf("%s: %s", test.sql, e)
		}
		if test.position > 0 && !strings.Contains(e.Message, fmt.Sprintf("position %d", test.position)) {
			t.Errorf("%s: %s: want position %d", test.sql, e.Message, test.position)
		}
	}
}

// TestMaskedErrors: what the server says of a failure quotes values.
func TestMaskedErrors(t *testing.T) {
	m := newManager(t, sqlsession.Config{}, maskSource(t, "allow"))
	for _, sql := range []string{
		"SELECT email::int FROM people",
		"SELECT id FROM people WHERE email::int = 1",
		"SELECT 1 FROM people WHERE id = (SELECT email::int FROM people LIMIT 1)",
		"INSERT INTO people (id, email, name) VALUES (1, 'x', 'c4nary too long c4nary too long c4nary too long')",
		"INSERT INTO people (id, email) VALUES (1, 'c4nary')",
		"UPDATE people SET id = NULL WHERE id = 1",
		"SELECT (data->>'k')::int FROM people",
	} {
		r := request(sql)
		r.ReadWrite = !strings.HasPrefix(sql, "SELECT")
		e := refuse(t, m, r, proto.CodeSQL)
		if c := hasCanary(e.Message + e.SQL.GetHint() + e.SQL.GetDetail()); c != "" || e.SQL.GetSqlstate() == "" {
			t.Errorf("%s: %s %v", sql, e, e.SQL)
		}
	}
	e := refuse(t, m, request("SELECT '4111111111111111'::date FROM plain"), proto.CodeSQL)
	if strings.Contains(e.Message, "4111111111111111") || !strings.Contains(e.Message, "****1111") {
		t.Errorf("the pattern is not held on errors: %s", e.Message)
	}
	if e := refuse(t, m, request("SELECT nothing FROM people"), proto.CodeSQL); !strings.Contains(e.Message, "nothing") {
		t.Errorf("an error of names is not told: %s", e.Message)
	}
}

// TestMaskedLimit: masks that make texts longer keep to max_bytes.
func TestMaskedLimit(t *testing.T) {
	s := maskSource(t, "equality")
	s.Guard.Masks = []sqlsession.Mask{{Columns: []string{"people.email"}, With: "hash"}, {Pattern: `x`, With: "hash"}}
	m := newManager(t, sqlsession.Config{}, s)
	for _, sql := range []string{"SELECT repeat('x', 200) FROM generate_series(1, 2000)", "SELECT p.email FROM people p, generate_series(1, 2000)"} {
		r := request(sql)
		r.MaxBytes = 100_000
		var out bytes.Buffer
		outcome, err := m.Run(context.Background(), r, &out)
		if proto.CodeOf(err) != proto.CodeByteLimit || out.Len() > 100_000 || outcome.Rows == 0 {
			t.Errorf("%s: %v, %d bytes, %d rows", sql, err, out.Len(), outcome.Rows)
		}
		decode(t, out.Bytes())
	}
}

// generator makes random statements over the masked tables.
type generator struct {
	*rand.Rand
	depth int
}

func (g *generator) pick(options ...string) string { return options[g.IntN(len(options))] }

func (g *generator) expr(alias string) string {
	g.depth++
	defer func() { g.depth-- }()
	column := alias + "." + g.pick("email", "name", "id", "note", "salary", "data", "vip", "pay", "tags")
	if g.depth > 3 {
		return column
	}
	switch g.IntN(16) {
	case 0:
		return "upper(" + g.expr(alias) + "::text)"
	case 1:
		return "(" + g.expr(alias) + " || " + g.expr(alias) + "::text)"
	case 2:
		return "CASE WHEN " + g.condition(alias) + " THEN " + g.expr(alias) + "::text ELSE 'x' END"
	case 3:
		return "coalesce(" + g.expr(alias) + "::text, 'y')"
	case 4:
		return "to_jsonb(" + alias + ")"
	case 5:
		return "(SELECT " + g.expr("q") + " FROM people q WHERE " + g.condition("q") + " LIMIT 1)"
	case 6:
		return alias
	case 7:
		return "row(" + g.expr(alias) + ", 1)"
	case 8:
		return "ARRAY[" + g.expr(alias) + "::text]"
	case 9:
		return "reverse(" + g.expr(alias) + "::text)"
	case 10:
		return "json_build_object('k', " + g.expr(alias) + ")"
	case 11:
		return "substr(" + g.expr(alias) + "::text, 1, 4)"
	case 12:
		return "first_value(" + g.expr(alias) + ") OVER (PARTITION BY " + alias + ".id)"
	case 13:
		return "(" + alias + ")." + g.pick("email", "name", "id")
	}
	return column
}

func (g *generator) condition(alias string) string {
	switch g.IntN(7) {
	case 0:
		return alias + ".email = 'c4nary1@example.com'"
	case 1:
		return alias + ".id < " + fmt.Sprint(g.IntN(60))
	case 2:
		return alias + ".email IS NOT NULL"
	case 3:
		return alias + ".email LIKE 'c%'"
	case 4:
		return "EXISTS (SELECT 1 FROM people z WHERE z.id = " + alias + ".id)"
	case 5:
		return alias + ".salary > 10"
	}
	return "true"
}

func (g *generator) from(alias string) string {
	g.depth++
	defer func() { g.depth-- }()
	const columns = "id, email, name, note, salary, data, vip, pay, tags"
	switch g.IntN(7) {
	case 0:
		return "(SELECT * FROM people) " + alias
	case 1:
		return "(SELECT " + columns + " FROM people UNION ALL SELECT " + columns + " FROM people) " + alias
	case 2:
		return "(SELECT p.* FROM people p JOIN orders o ON o.person = p.id) " + alias
	case 3:
		return "(WITH w AS (SELECT " + columns + " FROM people) SELECT * FROM w) " + alias
	case 4:
		return "(SELECT id, contact, shouted, 'n', 1, '{}'::jsonb, true, 1.0, '{}'::text[] FROM contacts) " + alias + "(" + columns + ")"
	case 5:
		return "orders o2, LATERAL (SELECT * FROM people p2 WHERE p2.id = o2.person) " + alias
	}
	return "people " + alias
}

func (g *generator) statement() string {
	g.depth = 0
	var list []string
	for range 1 + g.IntN(3) {
		list = append(list, g.expr("a"))
	}
	sql := "SELECT " + strings.Join(list, ", ") + " FROM " + g.from("a") + " WHERE " + g.condition("a")
	switch g.IntN(8) {
	case 0:
		sql = "SELECT * FROM (" + sql + " LIMIT 5) outside"
	case 1:
		sql = "SELECT outside FROM (" + sql + " LIMIT 5) outside"
	case 2:
		sql = "SELECT json_agg(outside), count(*) FROM (" + sql + ") outside"
	case 3:
		sql = "WITH c AS MATERIALIZED (" + sql + ") SELECT * FROM c"
	case 4:
		sql += " ORDER BY 1"
	}
	return sql
}

// TestCanary: no random statement gets a masked value out, whatever becomes of
// it.
func TestCanary(t *testing.T) {
	for _, filters := range []string{"equality", "allow", "refuse"} {
		t.Run(filters, func(t *testing.T) {
			m := newManager(t, sqlsession.Config{}, maskSource(t, filters))
			g := &generator{Rand: rand.New(rand.NewPCG(7, uint64(len(filters))))}
			verdicts := map[proto.Code]int{}
			for range 400 {
				sql := g.statement()
				r := request(sql)
				var kept *posternv1.KeptRows
				r.KeepFirst, r.KeepLast, r.Kept, r.MaxRows = 5, 5, func(k *posternv1.KeptRows) { kept = k }, 200
				var out bytes.Buffer
				outcome, err := m.Run(t.Context(), r, &out)
				verdicts[proto.CodeOf(err)]++
				text := out.String() + string(kept.GetArrow()) + outcome.String()
				if err != nil {
					text += err.Error()
				}
				if c := hasCanary(text); c != "" {
					t.Fatalf("%s came out of %s", c, sql)
				}
				if proto.CodeOf(err) == proto.CodeInternal || proto.CodeOf(err) == proto.CodeUnavailable {
					t.Fatalf("%s: %v", sql, err)
				}
			}
			t.Log(verdicts)
			if verdicts[0] < 20 {
				t.Errorf("only %d statements ran", verdicts[0])
			}
		})
	}
}

// TestMaskedSession: what only a session that stays can do.
func TestMaskedSession(t *testing.T) {
	m := newManager(t, sqlsession.Config{}, maskSource(t, "equality"))
	s := openSession(t, m, "tok_a", "db")
	s.run("PREPARE p(text) AS SELECT email, $1 FROM people WHERE id = 1", "none")
	if got := s.run("EXECUTE p('x')", "none"); len(got.rows) != 1 || len(got.rows[0][0]) != 26 || got.rows[0][1] != "x" {
		t.Errorf("got %v", got.rows)
	}
	s.run("PREPARE own(text) AS SELECT $1", "none")
	s.fails("EXECUTE own(query_to_xml('select email from masked.people', true, true, ''))", proto.CodePolicyDenied, "", "none")
	s.run("CREATE TEMP TABLE mine AS SELECT id, note FROM people", "none")
	s.fails("CREATE TEMP TABLE his AS SELECT id, email FROM people", proto.CodePolicyDenied, "copy", "none")
	s.fails("CREATE TEMP VIEW his AS SELECT id, email AS x FROM people", proto.CodePolicyDenied, "refused", "none")
	s.run("BEGIN", "open")
	s.run("DECLARE c CURSOR FOR SELECT id, note FROM people ORDER BY id", "open")
	if got := s.run("FETCH 1 FROM c", "open"); len(got.rows) != 1 || got.rows[0][1] != "note 1 card ************1001" {
		t.Errorf("got %v", got.rows)
	}
	s.fails("DECLARE d CURSOR FOR SELECT email FROM people", proto.CodePolicyDenied, "cursor", "failed")
	s.run("ROLLBACK", "none")
	// Another table under the same name.
	s.run("CREATE TEMP TABLE people (email text)", "none")
	if got := s.value("SELECT count(email) FROM people", "none"); got != "0" {
		t.Errorf("got %s", got)
	}
	if got := s.run("SELECT email FROM masked.people WHERE id = 1", "none"); len(got.rows[0][0]) != 26 {
		t.Errorf("got %v", got.rows)
	}
}
