package adversary

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// generator makes queries over the tables of testdata/types.sql, the same ones for
// the same seed. It knows the kinds of values well enough that most queries run;
// where one fails, it must fail in the same way everywhere.
type generator struct{ *rand.Rand }

func newGenerator(seed uint64) *generator {
	return &generator{rand.New(rand.NewPCG(seed, 0))}
}

func (g *generator) pick(options ...string) string { return options[g.IntN(len(options))] }

// columns of table a by the kind of their values.
var columns = map[string][]string{
	"int":  {"id", "i2", "i8", "sm"},
	"num":  {"n", "nf", "f4", "f8", "i8"},
	"text": {"t", "v", "c", "nm", "wo", "ct", "u::text"},
	"bool": {"b"},
	"time": {"ts", "tstz", "d"},
	"json": {"jb"},
	"arr":  {"ia", "i2d"},
	"rng":  {"r4", "r8", "rn", "rd", "rt", "mr", "fr"},
	"any": {
		"id", "i2", "i8", "n", "nf", "f4", "f8", "b", "t", "v", "c", "nm", "ch", "y", "u", "d", "tm", "tz", "ts", "tstz", "iv", "j", "jb", "x", "ia", "ta", "na", "i2d",
		"tsa", "da", "ba", "r4", "r8", "rn", "rd", "rt", "mr", "e", "ea", "p", "pa", "ne", "sm", "wo", "fr", "ip", "ci", "ma", "m8", "bi", "bv", "mo", "pt", "ln", "ls", "bx", "pth",
		"pg", "cr", "tv", "tq", "o", "rc", "lsn", "hs", "lt", "ct", "cu", "isb",
	},
}

// column names one of a table alias's columns.
func (g *generator) column(alias, kind string) string {
	return alias + "." + columns[kind][g.IntN(len(columns[kind]))]
}

// expr is an expression of a kind over a's columns.
func (g *generator) expr(alias, kind string, depth int) string {
	if depth <= 0 {
		switch kind {
		case "int":
			return g.pick(g.column(alias, "int"), fmt.Sprint(g.IntN(200)-100), "NULL::int")
		case "text":
			return g.pick(g.column(alias, "text"), "'literal'", "''", "E'tab\\t'", "'ünï'")
		case "bool":
			return g.pick(alias+".b", "true", "NULL::boolean", alias+".id > 10")
		}
		return g.column(alias, kind)
	}
	e := func(kind string) string { return g.expr(alias, kind, depth-1) }
	switch kind {
	case "int":
		return g.pick(
			fmt.Sprintf("(%s + %s)", e("int"), e("int")), fmt.Sprintf("(%s - %s)", e("int"), e("int")), fmt.Sprintf("%s %% 7", g.column(alias, "int")), fmt.Sprintf("length(%s)", e("text")),
			fmt.Sprintf("coalesce(%s, 0)", e("int")), fmt.Sprintf("CASE WHEN %s THEN %s ELSE %s END", e("bool"), e("int"), e("int")), fmt.Sprintf("array_length(%s, 1)", g.column(alias, "arr")),
			fmt.Sprintf("abs(%s)", e("int")), fmt.Sprintf("(%s / nullif(%s, 0))", e("int"), e("int")), fmt.Sprintf("(SELECT count(*) FROM b WHERE b.k = %s.id)", alias), fmt.Sprintf("extract(year FROM %s.ts)", alias),
			fmt.Sprintf("(%s * %s)", e("int"), e("int")), fmt.Sprintf("strpos(%s, 'e')", e("text")), fmt.Sprintf("greatest(%s, %s)", e("int"), e("int")))
	case "num":
		return g.pick(
			fmt.Sprintf("(%s + %s)", g.column(alias, "num"), g.column(alias, "int")), fmt.Sprintf("round(%s.nf, 1)", alias), fmt.Sprintf("%s.f8 * 2", alias), fmt.Sprintf("(%s.n / 3)", alias), fmt.Sprintf("sqrt(abs(%s.nf))", alias),
			fmt.Sprintf("%s.f4 / 3", alias), fmt.Sprintf("trunc(%s.n, 2)", alias), fmt.Sprintf("least(%s.n, %s.nf)", alias, alias), fmt.Sprintf("%s::numeric", e("int")), fmt.Sprintf("%s.f8::real", alias), fmt.Sprintf("exp(%s.nf / 10)", alias))
	case "text":
		return g.pick(
			fmt.Sprintf("upper(%s)", e("text")), fmt.Sprintf("(%s || %s)", e("text"), e("text")), fmt.Sprintf("substr(%s, 2, 3)", e("text")), fmt.Sprintf("%s::text", g.column(alias, "any")),
			fmt.Sprintf("coalesce(%s, '-')", e("text")), fmt.Sprintf("replace(%s, 'e', 'E')", e("text")), fmt.Sprintf("format('%%s/%%L', %s, %s)", e("int"), e("text")), fmt.Sprintf("md5(%s)", e("text")),
			fmt.Sprintf("reverse(%s)", e("text")), fmt.Sprintf("lpad(%s, 8, '*')", e("text")), fmt.Sprintf("(%s.jb ->> 's')", alias), fmt.Sprintf("to_char(%s.ts, 'YYYY-MM-DD')", alias), fmt.Sprintf("encode(%s.y, 'base64')", alias), fmt.Sprintf("split_part(%s, ' ', 1)", e("text")),
			fmt.Sprintf("array_to_string(%s.ta, ';', 'N')", alias), fmt.Sprintf("quote_literal(%s)", e("text")), fmt.Sprintf("(%s.p).b", alias), fmt.Sprintf("translate(%s, 'aeiou', '12345')", e("text")))
	case "bool":
		return g.pick(
			fmt.Sprintf("(%s > %s)", e("int"), e("int")), fmt.Sprintf("(%s AND %s)", e("bool"), e("bool")), fmt.Sprintf("(%s OR NOT %s)", e("bool"), e("bool")), fmt.Sprintf("(%s IS NULL)", g.column(alias, "any")), fmt.Sprintf("(%s LIKE '%%e%%')", e("text")),
			fmt.Sprintf("(%s BETWEEN %s AND %s)", e("int"), e("int"), e("int")), fmt.Sprintf("(%s IN (%s, %s))", e("int"), e("int"), e("int")), fmt.Sprintf("(%s IS DISTINCT FROM %s)", e("int"), e("int")), fmt.Sprintf("EXISTS (SELECT FROM b WHERE b.id = %s)", e("int")),
			fmt.Sprintf("(%s.r4 @> %s.id)", alias, alias), fmt.Sprintf("(%s.jb ? 'n')", alias), fmt.Sprintf("(%s = ANY (%s.ia))", e("int"), alias), fmt.Sprintf("(%s.ts < %s.tstz::timestamp)", alias, alias), fmt.Sprintf("(%s ~ '^[a-m]')", e("text")),
			fmt.Sprintf("(%s.tv @@ %s.tq)", alias, alias), fmt.Sprintf("(%s.e > 'sad')", alias), fmt.Sprintf("(%s.ip << '10.0.0.0/8')", alias))
	case "time":
		return g.pick(
			fmt.Sprintf("%s.ts + interval '1 day 2 hours'", alias), fmt.Sprintf("date_trunc('month', %s.ts)", alias), fmt.Sprintf("%s.d + 1", alias), fmt.Sprintf("%s.tstz AT TIME ZONE 'UTC'", alias), fmt.Sprintf("%s.ts::date", alias), fmt.Sprintf("%s.ts::time", alias),
			fmt.Sprintf("%s.ts - %s.ts", alias, alias), fmt.Sprintf("%s.iv * 1.5", alias), fmt.Sprintf("justify_interval(%s.iv)", alias), fmt.Sprintf("%s.tm + interval '1 s'", alias), fmt.Sprintf("age(%s.ts, timestamp '2001-01-01')", alias), fmt.Sprintf("make_date(2000 + abs(%s.id %% 50), 1, 2)", alias))
	case "json":
		return g.pick(
			fmt.Sprintf("%s.jb -> 'a'", alias), fmt.Sprintf("jsonb_build_object('k', %s, 'v', %s)", e("int"), e("text")), fmt.Sprintf("to_jsonb(%s)", g.column(alias, "any")), fmt.Sprintf("row_to_json(%s.p)", alias), fmt.Sprintf("%s.jb #> '{a,2}'", alias), fmt.Sprintf("jsonb_path_query_array(%s.jb, '$.a[*]')", alias),
			fmt.Sprintf("%s.jb || '{\"z\": null}'", alias), fmt.Sprintf("to_json(%s.ta)", alias), fmt.Sprintf("json_build_array(%s, %s)", e("int"), e("bool")))
	case "arr":
		return g.pick(
			fmt.Sprintf("array_append(%s.ia, %s::int)", alias, g.pick("1", "NULL")), fmt.Sprintf("%s.ia[2:3]", alias), fmt.Sprintf("%s.ia || %s.ia", alias, alias), fmt.Sprintf("ARRAY[%s, %s]", e("int"), e("int")), fmt.Sprintf("array_remove(%s.ta, '')", alias), fmt.Sprintf("ARRAY(SELECT k FROM b WHERE b.id < %s.id ORDER BY b.id LIMIT 3)", alias),
			fmt.Sprintf("string_to_array(%s, ' ')", e("text")), fmt.Sprintf("ARRAY[%s.p, %s.p]", alias, alias), fmt.Sprintf("%s.pa[1]", alias), fmt.Sprintf("%s.tsa[1]", alias), "'[0:1]={5,6}'::int[]")
	case "rng":
		return g.pick(
			fmt.Sprintf("%s.r4 * int4range(5, 20)", alias), fmt.Sprintf("lower(%s.rn)", alias), fmt.Sprintf("range_merge(%s.mr)", alias), fmt.Sprintf("upper(%s.rt)", alias), fmt.Sprintf("isempty(%s.r8)", alias), fmt.Sprintf("%s.mr + int4multirange(int4range(1, 3))", alias), "'empty'::int4range")
	}
	return g.column(alias, "any")
}

// item is a select list's item.
func (g *generator) item(alias string) string {
	kind := g.pick("int", "num", "text", "bool", "time", "json", "arr", "rng", "any", "any", "any")
	return g.expr(alias, kind, g.IntN(3))
}

func (g *generator) items(alias string, n int) string {
	list := make([]string, n)
	for i := range list {
		list[i] = g.item(alias)
		if g.IntN(3) == 0 {
			list[i] += fmt.Sprintf(" AS c%d", i)
		}
	}
	return strings.Join(list, ", ")
}

func (g *generator) where(alias string) string {
	if g.IntN(3) == 0 {
		return ""
	}
	return " WHERE " + g.expr(alias, "bool", 1+g.IntN(2))
}

// aggregate is over b.
func (g *generator) aggregate() string {
	return g.pick("count(*)", "sum(val)", "avg(val)", "min(at)", "max(day)", "count(DISTINCT k)", "bool_and(flag)", "string_agg(g, ',' ORDER BY id)", "array_agg(k ORDER BY id)", "jsonb_agg(val ORDER BY id)", "sum(id) FILTER (WHERE flag)",
		"percentile_cont(0.5) WITHIN GROUP (ORDER BY id)", "mode() WITHIN GROUP (ORDER BY k)", "stddev(id)", "var_pop(val)", "bit_or(k)", "every(flag)", "json_object_agg(id, g ORDER BY id)", "max(arr)", "range_agg(int4range(id, id + 1))", "corr(id, k)", "array_agg(DISTINCT g)")
}

func (g *generator) window() string {
	over := g.pick("PARTITION BY g ORDER BY id", "ORDER BY k, id", "PARTITION BY k % 3 ORDER BY at DESC, id", "ORDER BY id ROWS BETWEEN 2 PRECEDING AND 1 FOLLOWING", "PARTITION BY flag ORDER BY id RANGE BETWEEN 3 PRECEDING AND CURRENT ROW", "ORDER BY id GROUPS BETWEEN 1 PRECEDING AND 1 FOLLOWING EXCLUDE CURRENT ROW")
	return g.pick("row_number()", "rank()", "dense_rank()", "lag(val) ", "lead(at, 2)", "first_value(g)", "last_value(day)", "sum(val)", "ntile(4)", "cume_dist()", "nth_value(id, 2)", "array_agg(id)", "percent_rank()") + " OVER (" + over + ")"
}

// query makes one. Most are the kind that people write, some the kind that nobody does.
func (g *generator) query() string {
	aggregates := func() string {
		list := make([]string, 1+g.IntN(4))
		for i := range list {
			list[i] = g.aggregate()
		}
		return strings.Join(list, ", ")
	}
	n := 1 + g.IntN(5)
	switch g.IntN(14) {
	case 0, 1, 2:
		return "SELECT " + g.items("a", n) + " FROM a" + g.where("a")
	case 3:
		return fmt.Sprintf("SELECT %s FROM a %s a2 ON %s", g.items("a", n), g.pick("JOIN a", "LEFT JOIN a", "FULL JOIN a", "RIGHT JOIN a"), g.pick("a.id = a2.id", "a.id = a2.id + 3", "a.id = a2.id AND a.i2 < a2.i8"))
	case 4:
		return fmt.Sprintf("SELECT %s, %s FROM b GROUP BY %s", g.pick("k", "g", "flag", "k % 3"), aggregates(), g.pick("1", "1", "k, g, flag"))
	case 5:
		group := g.pick("ROLLUP (g, flag)", "CUBE (g, flag)", "GROUPING SETS ((g), (flag), ())", "g, ROLLUP (flag)")
		return "SELECT g, flag, GROUPING(g), " + aggregates() + " FROM b GROUP BY " + group + g.pick("", " HAVING count(*) > 3")
	case 6:
		return "SELECT id, " + g.window() + ", " + g.window() + " FROM b" + g.pick("", " WHERE flag", " WHERE val > 0")
	case 7:
		return fmt.Sprintf("WITH x AS %s (SELECT id, %s AS v FROM a%s), y AS (SELECT id, count(*) AS n FROM x GROUP BY id) SELECT x.*, y.n FROM x JOIN y USING (id)", g.pick("", "MATERIALIZED", "NOT MATERIALIZED"), g.item("a"), g.where("a"))
	case 8:
		return fmt.Sprintf("SELECT %s FROM a%s %s SELECT %s FROM a%s", g.expr("a", "text", 1), g.where("a"), g.pick("UNION", "UNION ALL", "EXCEPT", "INTERSECT", "EXCEPT ALL"), g.expr("a", "text", 1), g.where("a"))
	case 9:
		return fmt.Sprintf("SELECT a.id, l.* FROM a, LATERAL (SELECT b.id, b.g, %s FROM b WHERE b.k = a.id %% 11 ORDER BY b.id LIMIT %d) l", g.pick("b.val", "b.at", "b.doc", "a.n"), 1+g.IntN(3))
	case 10:
		return fmt.Sprintf("WITH RECURSIVE r(i, p) AS (SELECT %d, ARRAY[0] UNION ALL SELECT i + 1, p || i FROM r WHERE i < %d) SELECT r.*, b.g FROM r LEFT JOIN b ON b.id = r.i", g.IntN(3), 5+g.IntN(20))
	case 11:
		return fmt.Sprintf("SELECT %s FROM a%s ORDER BY a.id %s LIMIT %d OFFSET %d", g.items("a", n), g.where("a"), g.pick("", "DESC", "DESC NULLS LAST"), g.IntN(20), g.IntN(5))
	case 12:
		return g.pick(
			"SELECT DISTINCT ON (k) k, id, g, at FROM b ORDER BY k, id",
			"SELECT * FROM (VALUES (1, 'a', NULL), (2, NULL, 3.5), (NULL, '', -1)) v(x, y, z)",
			"SELECT * FROM a WHERE id = "+fmt.Sprint(g.IntN(45)),
			"TABLE b",
			"SELECT a FROM a ORDER BY id LIMIT 3",
			"SELECT b, b.* FROM b WHERE k = "+fmt.Sprint(g.IntN(11)),
			"SELECT jsonb_array_elements(doc -> 'l'), unnest(arr), generate_series(1, 2) FROM b WHERE id < 9",
			"SELECT * FROM ROWS FROM (generate_series(1, 3), unnest(ARRAY['a', NULL])) WITH ORDINALITY",
			"SELECT * FROM jsonb_to_recordset('[{\"a\": 1, \"b\": \"x\"}, {\"a\": null}]') AS x(a int, b text)",
			"SELECT * FROM XMLTABLE('/r/i' PASSING '<r><i n=\"1\">x</i><i n=\"2\"/></r>' COLUMNS n int PATH '@n', v text PATH '.')",
			"SELECT * FROM json_each('{\"a\": 1, \"b\": {\"c\": []}}')",
			"SELECT FROM a LIMIT 3",
			"SELECT id, id, id AS \"a,b\"\"c\" FROM a WHERE false",
		)
	}
	return fmt.Sprintf("SELECT q.*, %s FROM (SELECT %s, a.* FROM a%s) q(z) JOIN b ON b.id = q.id", g.pick("b.g", "b.doc", "b.arr", "b.at"), g.item("a"), g.where("a"))
}
