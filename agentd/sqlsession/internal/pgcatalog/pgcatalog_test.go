package pgcatalog

import (
	"context"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
)

func TestJudge(t *testing.T) {
	const (
		other   = "not the catalog"
		runs    = "runs"
		refused = "refused"
	)
	for sql, want := range map[string]string{
		"SELECT 1": other, "SELECT * FROM people": other, "SELECT c.relname FROM pg_class c, people": other, "WITH x AS (SELECT 1) TABLE x": other,
		"SELECT prosrc FROM public.pg_proc": other,

		"SELECT relname FROM pg_class": runs, "SELECT c.relname FROM pg_catalog.pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace": runs,
		"SELECT table_name FROM information_schema.tables":                                                             runs,
		"TABLE information_schema.tables":                                                                              runs,
		"SELECT count(*) FROM pg_class":                                                                                runs,
		"WITH t AS (SELECT oid FROM pg_class) SELECT t.oid FROM t":                                                     runs,
		"SELECT attname FROM pg_attribute WHERE attname = 'prosrc'":                                                    runs,
		"SELECT k FROM pg_index i, unnest(i.indkey) k":                                                                 runs,
		"SELECT * FROM pg_namespace":                                                                                   runs,
		"SELECT (SELECT n.nspname FROM pg_namespace n WHERE n.oid = c.relnamespace), relkind FROM pg_class c":          runs,
		"WITH t AS (SELECT proname FROM pg_proc) SELECT * FROM t":                                                      runs,
		"WITH t AS (SELECT * FROM pg_proc) SELECT * FROM t":                                                            refused,
		"WITH t AS (SELECT 1) SELECT * FROM t, pg_proc":                                                                refused,
		"SELECT * FROM (SELECT proname FROM pg_proc) x":                                                                runs,
		"SELECT * FROM (SELECT proname FROM pg_proc) x JOIN (SELECT relname FROM pg_class) y ON x.proname = y.relname": runs,
		"SELECT s.r FROM (SELECT oid AS r FROM pg_proc) s, pg_class r":                                                 runs,
		"SELECT * FROM (SELECT proname FROM pg_proc) x, pg_proc":                                                       refused,
		"SELECT x.* FROM (SELECT proname FROM pg_proc) x":                                                              refused,
		"SELECT (SELECT p.*) FROM pg_proc p":                                                                           refused,
		"SELECT * FROM (TABLE pg_proc) x":                                                                              refused,
		"SELECT pg_catalog.pg_proc FROM pg_proc":                                                                       refused,
		"SELECT postgres.pg_catalog.pg_proc FROM pg_proc":                                                              refused,
		"SELECT * FROM pg_get_keywords()":                                                                              other,
		"SELECT prosrc FROM pg_proc":                                                                                   refused,
		"SELECT 1 FROM pg_proc WHERE prosrc LIKE '%x%'":                                                                refused,
		"SELECT p.prosrc FROM pg_proc p":                                                                               refused,
		`SELECT p."prosrc" FROM pg_proc p`:                                                                             refused,
		`SELECT U&"pros\0072c" FROM pg_proc p`:                                                                         refused,
		"SELECT (p).prosrc FROM pg_proc p":                                                                             refused,
		"SELECT * FROM pg_proc":                                                                                        refused,
		"TABLE pg_proc":                                                                                                refused,
		"SELECT p.* FROM pg_proc p":                                                                                    refused,
		"SELECT p FROM pg_proc p":                                                                                      refused,
		"SELECT pg_proc FROM pg_proc":                                                                                  refused,
		"SELECT pg_catalog.pg_proc FROM pg_catalog.pg_proc":                                                            refused,
		"SELECT row_to_json(p) FROM pg_proc p":                                                                         refused,
		"SELECT x FROM (SELECT * FROM pg_proc) x":                                                                      refused,
		"SELECT x FROM (SELECT prosrc FROM pg_proc) AS x(a)":                                                           refused,
		"SELECT 1 FROM pg_proc NATURAL JOIN (SELECT 'a' AS b) x":                                                       refused,
		"SELECT 1 FROM pg_proc JOIN (SELECT 'a') x(prosrc) USING (prosrc)":                                             refused,
		"SELECT reltuples FROM pg_class":                                                                               refused,
		"SELECT column_default FROM information_schema.columns":                                                        refused,
		"SELECT * FROM information_schema.columns":                                                                     refused,
		"SELECT * FROM pg_stats":                                                                                       refused,
		"SELECT * FROM pg_stat_activity":                                                                               refused,
		"SELECT * FROM pg_authid":                                                                                      refused,
		"SELECT * FROM pg_catalog.pg_settings":                                                                         refused,
		"SELECT setting FROM pg_catalog.pg_settings WHERE name='max_index_keys'":                                       runs,
		"SELECT setting FROM pg_settings WHERE name = 'config_file'":                                                   refused,
		"SELECT setting FROM pg_settings WHERE name = 'max_index_keys' OR true":                                        refused,
		"SELECT setting FROM pg_settings WHERE name <> 'max_index_keys'":                                               refused,
		"SELECT setting FROM pg_settings WHERE 'max_index_keys' = name":                                                refused,
		"SELECT boot_val AS setting FROM pg_settings WHERE name = 'max_index_keys'":                                    refused,
		"SELECT setting FROM pg_settings, pg_class WHERE name = 'max_index_keys'":                                      refused,
		"SELECT setting FROM pg_settings WHERE name = 'max_index_keys' UNION SELECT setting FROM pg_settings":          refused,
		"SELECT setting FROM pg_settings WHERE name = 'max_index_keys' ORDER BY 1":                                     refused,
		"SELECT (SELECT setting FROM pg_settings WHERE name = 'max_index_keys')":                                       refused,
		"SELECT setting FROM pg_settings s(setting, name) WHERE name = 'max_index_keys'":                               refused,
		"SELECT setting FROM pg_settings WHERE name OPERATOR(pg_catalog.=) 'max_index_keys'":                           refused,
		"SELECT setting FROM pg_settings":                                                                              refused,
		"SELECT relname FROM pg_class, pg_stats":                                                                       refused,
		"SELECT relname FROM pg_class WHERE EXISTS (SELECT FROM pg_stats)":                                             refused,
		"SELECT umoptions FROM pg_user_mappings":                                                                       refused,
		"SELECT * FROM information_schema.user_mapping_options":                                                        refused,
		"WITH pg_stats AS (SELECT relname FROM pg_class) SELECT most_common_vals FROM pg_stats":                        refused,
		"SELECT relname FROM pg_class FOR UPDATE":                                                                      refused,
		"SELECT relname FROM pg_class UNION SELECT prosrc FROM pg_proc":                                                refused,
		"SELECT relname FROM pg_class ORDER BY reltuples":                                                              refused,
		"SELECT relname FROM pg_class TABLESAMPLE bernoulli (1) WHERE (SELECT prosrc FROM pg_proc LIMIT 1) > ''":       refused,
	} {
		tree, err := pgtree.InProcess().Parse(context.Background(), sql)
		if err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
		v := Judge(tree)
		got := other
		switch {
		case v.Catalog && v.Reason == "":
			got = runs
		case v.Reason != "":
			got = refused
		}
		if got != want {
			t.Errorf("%s: %s, want %s (%s)", sql, got, want, v.Reason)
		}
	}
}
