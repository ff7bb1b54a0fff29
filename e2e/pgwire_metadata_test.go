package e2e

import (
	"errors"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// definitions hold literals: what psql shows of them is not for a source in mode
// metadata.
var definitions = []string{
	`create table defaults (id serial primary key, word text default 'kanari', n int check (n <> 771234), unique (word, n))`,
	`create index defaults_word on defaults (lower(word)) where n > 771234`,
	`create view sight as select id from customers where name <> 'kanari'`,
	`create function secret(x text default 'kanari') returns text language sql as $$select 'kanari'$$`,
	`create table parts (k text) partition by list (k)`, `create table part_one partition of parts for values in ('kanari')`,
	`create domain word as text default 'kanari' check (value <> 'kanari')`,
	`create policy words on defaults using (word <> 'kanari')`,
	`create rule old as on delete to defaults where old.word = 'kanari' do instead nothing`,
	`create statistics numbers on id, (n + 771234) from defaults`,
}

// TestPGWireMetadata: clients look around on a source that shows metadata only.
func TestPGWireMetadata(t *testing.T) {
	e := newEndpoint(t, "wiremeta", append(shop[:len(shop):len(shop)], definitions...), "      mode: metadata\n")
	t.Run("psql", func(t *testing.T) {
		psql := func(env []string, commands string) string {
			out, err := runClient(t, env, commands, "psql", "-X", "-q", "-P", "pager=off")
			if err != nil {
				t.Errorf("%s: %v", commands, err)
			}
			return out
		}
		lines := func(commands string) string { return strings.ReplaceAll(strings.TrimSpace(commands), " ", "\n") + "\n" }
		out := psql(e.env("shop"), lines(`\d \d+ \dt \dt+ \dv \di \di+ \ds \dm \dE \dn \dn+ \df \df+ \da \dT \dT+ \dD \do \dp \ddp \dC \dc \dO \dL \dA \dAc \dAf \dAo \dAp \dx \db`)+
			lines(`\des \det \deu \dew \dF \dFd \dFp \dFt \du \dRp \dRs \dX \dy \l \dP \dd \z`))
		if strings.Contains(out, "ERROR") || strings.Contains(out, "kanari") || strings.Contains(out, "771234") {
			t.Errorf("got %s", out)
		}
		// Where nothing is hidden all is as on the database itself.
		same := lines(`\dt \dv \di \dn+ \dT \du \l`) + "\\d customers\n\\d orders_customer\n\\d totals\n\\df twice\n"
		if out, direct := psql(e.env("shop"), same), psql(e.direct(), same); out != direct {
			t.Errorf("got\n%s\nand on the database itself\n%s", out, direct)
		}
		for command, want := range map[string][]string{
			`\d+ defaults`: {
				`not null | (hidden)`, `"defaults_pkey" PRIMARY KEY, btree (id)`, `"defaults_word" (hidden)`, `"defaults_word_n_key" UNIQUE CONSTRAINT, btree (word, n)`,
				`"defaults_n_check" CHECK (hidden)`, `POLICY "words"`,
			},
			`\d orders`: {`"orders_customer_fkey" FOREIGN KEY (customer) REFERENCES customers(id)`}, `\d+ sight`: {"View definition:\n(hidden)"},
			`\d+ parts`: {"Partitions: part_one (hidden)"}, `\dD`: {"(hidden) | CHECK (hidden)"}, `\sf secret`: {"(hidden)"}, `\dt+`: {"| heap "},
		} {
			out := psql(e.env("shop"), command+"\n")
			for _, part := range want {
				if !strings.Contains(out, part) {
					t.Errorf("%s: no %q in\n%s", command, part, out)
				}
			}
			if strings.Contains(out, "kanari") || strings.Contains(out, "771234") {
				t.Errorf("%s tells: %s", command, out)
			}
		}
		out, err := runClient(t, e.env("shop"), "select id, amount from orders \\gdesc\n\\dconfig\ntable orders;\nselect 1 as one;\n", "psql", "-X", "-q", "-A")
		if err != nil || !strings.Contains(out, "id|integer\namount|numeric(12,2)") || strings.Count(out, "ERROR:") != 2 || !strings.HasSuffix(out, "one\n1\n(1 row)\n") {
			t.Errorf("got %v\n%s", err, out)
		}
	})
	t.Run("drivers", func(t *testing.T) {
		c := e.connect(t, "shop", "")
		for name, sql := range jdbcQueries {
			rows, err := c.Query(t.Context(), sql)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			n := 0
			for rows.Next() {
				n++
				for _, v := range rows.RawValues() {
					if strings.Contains(string(v), "kanari") {
						t.Errorf("%s tells %q", name, v)
					}
				}
			}
			if rows.Err() != nil || n == 0 {
				t.Errorf("%s: %d rows, %v", name, n, rows.Err())
			}
		}
		var kind string
		if err := c.QueryRow(t.Context(), "SELECT t.typname FROM pg_catalog.pg_type t WHERE t.oid = $1", 23).Scan(&kind); err != nil || kind != "int4" {
			t.Errorf("a parameter: %s, %v", kind, err)
		}
		described, err := c.Prepare(t.Context(), "order", "SELECT id, kind FROM orders WHERE at > $1")
		if err != nil || len(described.Fields) != 2 || len(described.ParamOIDs) != 1 || described.ParamOIDs[0] != 1184 {
			t.Errorf("described as %v, %v", described, err)
		}
		if described, err = c.Prepare(t.Context(), "insert", "INSERT INTO orders (id, amount) VALUES ($1, $2) RETURNING kind"); err != nil || len(described.ParamOIDs) != 2 || len(described.Fields) != 1 {
			t.Errorf("an INSERT is described as %v, %v", described, err)
		}
		for sql, want := range map[string]string{
			"SELECT id FROM orders": "42501", "SELECT count(*) FROM pg_stats": "42501", "INSERT INTO orders (id) VALUES (1)": "42501", "SELECT nothing FROM pg_class": "42703",
			"SELECT relname FROM pg_class WHERE reltuples > 1000": "42501", "EXPLAIN SELECT 1": "42501", "COPY orders TO STDOUT": "42501", "SELECT relname FROM pg_class WHERE pg_get_viewdef(oid) LIKE '%k%'": "42501",
		} {
			_, err := c.Exec(t.Context(), sql, pgx.QueryExecModeSimpleProtocol)
			var refused *pgconn.PgError
			if !errors.As(err, &refused) || refused.Code != want {
				t.Errorf("%s: %v, want %s", sql, err, want)
			}
		}
		var one int
		if err := c.QueryRow(t.Context(), "SELECT 1").Scan(&one); err != nil || one != 1 {
			t.Errorf("after them: %v", err)
		}
	})
}

// jdbcQueries are what the methods of JDBC's DatabaseMetaData ask, as driver 42.5 has it.
var jdbcQueries = map[string]string{
	"getTables": `SELECT NULL AS TABLE_CAT, n.nspname AS TABLE_SCHEM, c.relname AS TABLE_NAME,  CASE n.nspname ~ '^pg_' OR n.nspname = 'information_schema'  WHEN true THEN CASE
		WHEN n.nspname = 'pg_catalog' OR n.nspname = 'information_schema' THEN CASE c.relkind   WHEN 'r' THEN 'SYSTEM TABLE'   WHEN 'v' THEN 'SYSTEM VIEW'   ELSE NULL   END  ELSE NULL  END
		WHEN false THEN CASE c.relkind  WHEN 'r' THEN 'TABLE'  WHEN 'p' THEN 'PARTITIONED TABLE'  WHEN 'v' THEN 'VIEW'  ELSE NULL  END  ELSE NULL  END  AS TABLE_TYPE, d.description AS REMARKS,
		'' as TYPE_CAT, '' as TYPE_SCHEM, '' as TYPE_NAME, '' AS SELF_REFERENCING_COL_NAME, '' AS REF_GENERATION  FROM pg_catalog.pg_namespace n, pg_catalog.pg_class c
		LEFT JOIN pg_catalog.pg_description d ON (c.oid = d.objoid AND d.objsubid = 0  and d.classoid = 'pg_class'::regclass)  WHERE c.relnamespace = n.oid AND n.nspname LIKE 'public' ORDER BY TABLE_TYPE,TABLE_SCHEM,TABLE_NAME`,
	"getColumns": `SELECT * FROM (SELECT n.nspname,c.relname,a.attname,a.atttypid,a.attnotnull OR (t.typtype = 'd' AND t.typnotnull) AS attnotnull,a.atttypmod,a.attlen,t.typtypmod,
		row_number() OVER (PARTITION BY a.attrelid ORDER BY a.attnum) AS attnum, nullif(a.attidentity, '') as attidentity,nullif(a.attgenerated, '') as attgenerated,
		pg_catalog.pg_get_expr(def.adbin, def.adrelid) AS adsrc,dsc.description,t.typbasetype,t.typtype  FROM pg_catalog.pg_namespace n  JOIN pg_catalog.pg_class c ON (c.relnamespace = n.oid)
		JOIN pg_catalog.pg_attribute a ON (a.attrelid=c.oid)  JOIN pg_catalog.pg_type t ON (a.atttypid = t.oid)  LEFT JOIN pg_catalog.pg_attrdef def ON (a.attrelid=def.adrelid AND a.attnum = def.adnum)
		LEFT JOIN pg_catalog.pg_description dsc ON (c.oid=dsc.objoid AND a.attnum = dsc.objsubid)  LEFT JOIN pg_catalog.pg_class dc ON (dc.oid=dsc.classoid AND dc.relname='pg_class')
		LEFT JOIN pg_catalog.pg_namespace dn ON (dc.relnamespace=dn.oid AND dn.nspname='pg_catalog')  WHERE c.relkind in ('r','p','v','f','m') and a.attnum > 0 AND NOT a.attisdropped  AND c.relname LIKE 'defaults') c
		WHERE true ORDER BY nspname,c.relname,attnum`,
	"getPrimaryKeys": `SELECT        result.TABLE_CAT,        result.TABLE_SCHEM,        result.TABLE_NAME,        result.COLUMN_NAME,        result.KEY_SEQ,        result.PK_NAME FROM      (SELECT NULL AS TABLE_CAT,
		n.nspname AS TABLE_SCHEM,   ct.relname AS TABLE_NAME, a.attname AS COLUMN_NAME,   (information_schema._pg_expandarray(i.indkey)).n AS KEY_SEQ, ci.relname AS PK_NAME,
		information_schema._pg_expandarray(i.indkey) AS KEYS, a.attnum AS A_ATTNUM FROM pg_catalog.pg_class ct   JOIN pg_catalog.pg_attribute a ON (ct.oid = a.attrelid)   JOIN pg_catalog.pg_namespace n ON (ct.relnamespace = n.oid)
		JOIN pg_catalog.pg_index i ON ( a.attrelid = i.indrelid)   JOIN pg_catalog.pg_class ci ON (ci.oid = i.indexrelid) WHERE true  AND ct.relname = 'orders' AND i.indisprimary  ) result
		where  result.A_ATTNUM = (result.KEYS).x  ORDER BY result.table_name, result.pk_name, result.key_seq`,
	"getIndexInfo": `SELECT     tmp.TABLE_CAT,     tmp.TABLE_SCHEM,     tmp.TABLE_NAME,     tmp.NON_UNIQUE,     tmp.INDEX_QUALIFIER,     tmp.INDEX_NAME,     tmp.TYPE,     tmp.ORDINAL_POSITION,
		trim(both '"' from pg_catalog.pg_get_indexdef(tmp.CI_OID, tmp.ORDINAL_POSITION, false)) AS COLUMN_NAME,   CASE tmp.AM_NAME     WHEN 'btree' THEN CASE tmp.I_INDOPTION[tmp.ORDINAL_POSITION - 1] & 1::smallint
		WHEN 1 THEN 'D'       ELSE 'A'     END     ELSE NULL   END AS ASC_OR_DESC,     tmp.CARDINALITY,     tmp.PAGES,     tmp.FILTER_CONDITION FROM (SELECT NULL AS TABLE_CAT, n.nspname AS TABLE_SCHEM,   ct.relname AS TABLE_NAME,
		NOT i.indisunique AS NON_UNIQUE,   NULL AS INDEX_QUALIFIER, ci.relname AS INDEX_NAME,   CASE i.indisclustered     WHEN true THEN 1    ELSE CASE am.amname       WHEN 'hash' THEN 2      ELSE 3    END   END AS TYPE,
		(information_schema._pg_expandarray(i.indkey)).n AS ORDINAL_POSITION,   ci.reltuples AS CARDINALITY,   ci.relpages AS PAGES,   pg_catalog.pg_get_expr(i.indpred, i.indrelid) AS FILTER_CONDITION,   ci.oid AS CI_OID,
		i.indoption AS I_INDOPTION,   am.amname AS AM_NAME FROM pg_catalog.pg_class ct   JOIN pg_catalog.pg_namespace n ON (ct.relnamespace = n.oid)   JOIN pg_catalog.pg_index i ON (ct.oid = i.indrelid)
		JOIN pg_catalog.pg_class ci ON (ci.oid = i.indexrelid)   JOIN pg_catalog.pg_am am ON (ci.relam = am.oid) WHERE true  AND ct.relname = 'defaults') AS tmp ORDER BY NON_UNIQUE, TYPE, INDEX_NAME, ORDINAL_POSITION`,
	"getTypeInfo": `SELECT t.typname,t.oid FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON (t.typnamespace = n.oid)  WHERE n.nspname  != 'pg_toast' AND
		(t.typrelid = 0 OR (SELECT c.relkind = 'c' FROM pg_catalog.pg_class c WHERE c.oid = t.typrelid))`,
	"type of a column": `SELECT typinput='pg_catalog.array_in'::regproc as is_array, typtype, typname, pg_type.oid   FROM pg_catalog.pg_type   LEFT JOIN (select ns.oid as nspoid, ns.nspname, r.r
		from pg_namespace as ns           join ( select s.r, (current_schemas(false))[s.r] as nspname                    from generate_series(1, array_upper(current_schemas(false), 1)) as s(r) ) as r          using ( nspname )        ) as sp
		ON sp.nspoid = typnamespace  WHERE pg_type.oid = 23  ORDER BY sp.r, pg_type.oid DESC`,
	"getSchemas": `SELECT nspname AS TABLE_SCHEM, NULL AS TABLE_CATALOG FROM pg_catalog.pg_namespace  WHERE nspname <> 'pg_toast' AND (nspname !~ '^pg_temp_'  OR nspname = (pg_catalog.current_schemas(true))[1]) ORDER BY TABLE_SCHEM`,
	"getImportedKeys": `SELECT NULL::text AS PKTABLE_CAT, pkn.nspname AS PKTABLE_SCHEM, pkc.relname AS PKTABLE_NAME, pka.attname AS PKCOLUMN_NAME, NULL::text AS FKTABLE_CAT, fkn.nspname AS FKTABLE_SCHEM, fkc.relname AS FKTABLE_NAME,
		fka.attname AS FKCOLUMN_NAME, pos.n AS KEY_SEQ, CASE con.confupdtype  WHEN 'c' THEN 0 WHEN 'n' THEN 2 WHEN 'd' THEN 4 WHEN 'r' THEN 1 WHEN 'p' THEN 1 WHEN 'a' THEN 3 ELSE NULL END AS UPDATE_RULE, con.conname AS FK_NAME, pkic.relname AS PK_NAME
		FROM  pg_catalog.pg_namespace pkn, pg_catalog.pg_class pkc, pg_catalog.pg_attribute pka,  pg_catalog.pg_namespace fkn, pg_catalog.pg_class fkc, pg_catalog.pg_attribute fka,  pg_catalog.pg_constraint con,
		pg_catalog.generate_series(1, 32) pos(n),  pg_catalog.pg_class pkic WHERE pkn.oid = pkc.relnamespace AND pkc.oid = pka.attrelid AND pka.attnum = con.confkey[pos.n] AND con.confrelid = pkc.oid
		AND fkn.oid = fkc.relnamespace AND fkc.oid = fka.attrelid AND fka.attnum = con.conkey[pos.n] AND con.conrelid = fkc.oid  AND con.contype = 'f'  AND (pkic.relkind = 'i' OR pkic.relkind = 'I')  AND pkic.oid = con.conindid
		AND fkc.relname = 'orders' ORDER BY pkn.nspname,pkc.relname, con.conname,pos.n`,
}
