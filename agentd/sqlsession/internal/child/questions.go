package child

// The questions of introspection, fixed text but for the numbers of tables. They run
// with an empty search_path, so that every name is pg_catalog's. Nothing is told that the role has
// no right to: the catalogs themselves would tell everybody everything. None takes a lock on
// a table, so none waits for one; sizes are those of the last VACUUM or ANALYZE.
// Expressions (defaults, checks, predicates) and sources are not asked for at all.
const (
	ownSchemas = `pg_catalog.left(n.nspname::text, 3) <> 'pg_' AND n.nspname <> 'information_schema' AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')`
	// tableRights and columnRights: any will do.
	tableRights  = `'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER'`
	columnRights = `'SELECT, INSERT, UPDATE, REFERENCES'`

	schemasQuestion = `SELECT n.nspname, pg_catalog.left(pg_catalog.obj_description(n.oid, 'pg_namespace'), 1000)
 FROM pg_catalog.pg_namespace n WHERE ` + ownSchemas + ` ORDER BY n.nspname`

	relationsQuestion = `SELECT c.oid, n.nspname, c.relname, c.relkind, pg_catalog.left(pg_catalog.obj_description(c.oid, 'pg_class'), 1000), c.relnatts,
 c.reltuples::pg_catalog.float8::pg_catalog.int8,
 (c.relpages::pg_catalog.int8
  + coalesce((SELECT x.relpages FROM pg_catalog.pg_class x WHERE x.oid = c.reltoastrelid), 0)
  + coalesce((SELECT sum(x.relpages) FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid WHERE i.indrelid = c.oid), 0)
 ) * (pg_catalog.current_setting('block_size')::pg_catalog.int8 / 1024) / 8,
 pn.nspname, pc.relname,
 pc.oid IS NOT NULL AND pg_catalog.has_schema_privilege(pn.oid, 'USAGE')
  AND (pg_catalog.has_table_privilege(pc.oid, ` + tableRights + `) OR pg_catalog.has_any_column_privilege(pc.oid, ` + columnRights + `))
 FROM pg_catalog.pg_class c
 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 LEFT JOIN pg_catalog.pg_inherits h ON c.relispartition AND h.inhrelid = c.oid
 LEFT JOIN pg_catalog.pg_class pc ON pc.oid = h.inhparent
 LEFT JOIN pg_catalog.pg_namespace pn ON pn.oid = pc.relnamespace
 WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND ` + ownSchemas + `
 AND (pg_catalog.has_table_privilege(c.oid, ` + tableRights + `) OR pg_catalog.has_any_column_privilege(c.oid, ` + columnRights + `))
 ORDER BY n.nspname, c.relname`

	// An array's type is told by its elements'. col_description would be a query for each
	// column: joined, comments cost nothing.
	columnsQuestion = `SELECT a.attrelid, a.attnum, a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull, a.atthasdef, a.attidentity, a.attgenerated,
 pg_catalog.left(d.description, 1000), tn.nspname, coalesce(e.typname, t.typname)
 FROM pg_catalog.pg_attribute a
 JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
 LEFT JOIN pg_catalog.pg_type e ON e.oid = t.typelem AND t.typlen = -1
 JOIN pg_catalog.pg_namespace tn ON tn.oid = coalesce(e.typnamespace, t.typnamespace)
 LEFT JOIN pg_catalog.pg_description d ON d.objoid = a.attrelid AND d.classoid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objsubid = a.attnum
  AND d.objoid = $tables
 WHERE a.attrelid = $tables AND a.attnum > 0 AND NOT a.attisdropped
 AND (pg_catalog.has_table_privilege(a.attrelid, ` + columnRights + `) OR pg_catalog.has_column_privilege(a.attrelid, a.attnum, ` + columnRights + `))
 ORDER BY a.attrelid, a.attnum`

	keysQuestion = `SELECT k.conrelid, k.conname, k.contype, pg_catalog.array_to_json(k.conkey), fn.nspname, fc.relname,
 (SELECT pg_catalog.json_agg(fa.attname ORDER BY u.place)
  FROM pg_catalog.unnest(k.confkey) WITH ORDINALITY u (number, place)
  JOIN pg_catalog.pg_attribute fa ON fa.attrelid = k.confrelid AND fa.attnum = u.number),
 fc.oid IS NOT NULL AND pg_catalog.has_schema_privilege(fn.oid, 'USAGE')
  AND (pg_catalog.has_table_privilege(fc.oid, ` + columnRights + `)
   OR (SELECT pg_catalog.bool_and(pg_catalog.has_column_privilege(fc.oid, u.number, ` + columnRights + `)) FROM pg_catalog.unnest(k.confkey) u (number)))
 FROM pg_catalog.pg_constraint k
 LEFT JOIN pg_catalog.pg_class fc ON fc.oid = k.confrelid
 LEFT JOIN pg_catalog.pg_namespace fn ON fn.oid = fc.relnamespace
 WHERE k.conrelid = $tables AND k.contype IN ('p', 'u', 'f', 'c', 'x')
 ORDER BY k.conrelid, pg_catalog.strpos('pufcx', k.contype::pg_catalog.text), k.conname`

	indexesQuestion = `SELECT i.indrelid, x.relname, i.indisunique, m.amname, i.indpred IS NOT NULL, pg_catalog.array_to_json(i.indkey::pg_catalog.int2[]), i.indnkeyatts
 FROM pg_catalog.pg_index i
 JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid
 JOIN pg_catalog.pg_am m ON m.oid = x.relam
 WHERE i.indrelid = $tables AND i.indislive
 ORDER BY i.indrelid, x.relname`

	functionsQuestion = `SELECT n.nspname, p.proname, p.prokind, p.proretset, pg_catalog.format_type(p.prorettype, NULL), rn.nspname, coalesce(re.typname, rt.typname),
 pg_catalog.left(pg_catalog.obj_description(p.oid, 'pg_proc'), 1000),
 (SELECT pg_catalog.json_agg(pg_catalog.json_build_array(coalesce(p.proargnames[u.place], ''), coalesce(p.proargmodes[u.place]::pg_catalog.text, 'i'),
   pg_catalog.format_type(u.type, NULL), tn.nspname, coalesce(e.typname, t.typname)) ORDER BY u.place)
  FROM pg_catalog.unnest(coalesce(p.proallargtypes, p.proargtypes::pg_catalog.oid[])) WITH ORDINALITY u (type, place)
  JOIN pg_catalog.pg_type t ON t.oid = u.type
  LEFT JOIN pg_catalog.pg_type e ON e.oid = t.typelem AND t.typlen = -1
  JOIN pg_catalog.pg_namespace tn ON tn.oid = coalesce(e.typnamespace, t.typnamespace))
 FROM pg_catalog.pg_proc p
 JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
 JOIN pg_catalog.pg_type rt ON rt.oid = p.prorettype
 LEFT JOIN pg_catalog.pg_type re ON re.oid = rt.typelem AND rt.typlen = -1
 JOIN pg_catalog.pg_namespace rn ON rn.oid = coalesce(re.typnamespace, rt.typnamespace)
 WHERE ` + ownSchemas + ` AND pg_catalog.has_function_privilege(p.oid, 'EXECUTE')
 ORDER BY n.nspname, p.proname, p.oid`

	// Triggers by table; those of foreign keys are the server's own.
	triggersQuestion = `SELECT g.tgrelid, g.tgname FROM pg_catalog.pg_trigger g WHERE g.tgrelid = $tables AND NOT g.tgisinternal ORDER BY g.tgrelid, g.tgname`

	// Types that somebody made: not those of tables, and not arrays. A domain's default and
	// its checks are not asked for.
	typesQuestion = `SELECT n.nspname, t.typname, t.typtype, pg_catalog.left(pg_catalog.obj_description(t.oid, 'pg_type'), 1000), t.typnotnull,
 CASE t.typtype WHEN 'd' THEN pg_catalog.format_type(t.typbasetype, t.typtypmod) WHEN 'r' THEN pg_catalog.format_type(r.rngsubtype, NULL) END, bn.nspname, coalesce(be.typname, b.typname),
 CASE t.typtype WHEN 'e' THEN (SELECT pg_catalog.json_agg(l.enumlabel ORDER BY l.enumsortorder)
  FROM (SELECT e.enumlabel, e.enumsortorder FROM pg_catalog.pg_enum e WHERE e.enumtypid = t.oid ORDER BY e.enumsortorder LIMIT 1001) l)
 WHEN 'c' THEN (SELECT pg_catalog.json_agg(pg_catalog.json_build_array(l.attname, l.type, l.nspname, l.bare) ORDER BY l.attnum)
  FROM (SELECT a.attname, a.attnum, pg_catalog.format_type(a.atttypid, a.atttypmod) AS type, an.nspname, coalesce(ae.typname, at.typname) AS bare
   FROM pg_catalog.pg_attribute a
   JOIN pg_catalog.pg_type at ON at.oid = a.atttypid
   LEFT JOIN pg_catalog.pg_type ae ON ae.oid = at.typelem AND at.typlen = -1
   JOIN pg_catalog.pg_namespace an ON an.oid = coalesce(ae.typnamespace, at.typnamespace)
   WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum LIMIT 1001) l) END
 FROM pg_catalog.pg_type t
 JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
 LEFT JOIN pg_catalog.pg_range r ON r.rngtypid = t.oid AND t.typtype = 'r'
 LEFT JOIN pg_catalog.pg_class c ON c.oid = t.typrelid
 LEFT JOIN pg_catalog.pg_type b ON b.oid = CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE r.rngsubtype END
 LEFT JOIN pg_catalog.pg_type be ON be.oid = b.typelem AND b.typlen = -1
 LEFT JOIN pg_catalog.pg_namespace bn ON bn.oid = coalesce(be.typnamespace, b.typnamespace)
 WHERE ` + ownSchemas + ` AND (t.typtype IN ('e', 'd', 'r') OR t.typtype = 'c' AND c.relkind = 'c')
 AND pg_catalog.has_type_privilege(t.oid, 'USAGE')
 ORDER BY n.nspname, t.typname`

	// The owner is the column that a sequence was made for, if the role may know of it.
	sequencesQuestion = `SELECT n.nspname, c.relname, pg_catalog.format_type(s.seqtypid, NULL), pg_catalog.left(pg_catalog.obj_description(c.oid, 'pg_class'), 1000), o.nspname, o.relname, o.attname
 FROM pg_catalog.pg_class c
 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 JOIN pg_catalog.pg_sequence s ON s.seqrelid = c.oid
 LEFT JOIN LATERAL (SELECT tn.nspname, t.relname, a.attname FROM pg_catalog.pg_depend d
  JOIN pg_catalog.pg_class t ON t.oid = d.refobjid
  JOIN pg_catalog.pg_namespace tn ON tn.oid = t.relnamespace
  JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum = d.refobjsubid
  WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid AND d.objsubid = 0
  AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refobjsubid > 0 AND d.deptype IN ('a', 'i')
  AND pg_catalog.has_schema_privilege(tn.oid, 'USAGE')
  AND (pg_catalog.has_table_privilege(t.oid, ` + columnRights + `) OR pg_catalog.has_column_privilege(t.oid, a.attnum, ` + columnRights + `)) LIMIT 1) o ON true
 WHERE c.relkind = 'S' AND ` + ownSchemas + ` AND CASE c.relkind WHEN 'S' THEN pg_catalog.has_sequence_privilege(c.oid, 'USAGE, SELECT, UPDATE') END
 ORDER BY n.nspname, c.relname`
)
