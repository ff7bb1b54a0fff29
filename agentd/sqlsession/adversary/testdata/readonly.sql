-- What a read-only source must survive. The role is a superuser: nothing but the guard stands
-- between these statements and the server. "runs" are what people really ask: they must work.

--# runs a plain query
SELECT id, name FROM app.customers ORDER BY id
--# runs joins, aggregates, windows, ordinary functions
SELECT c.id, count(*) OVER (), sum(o.amount) FILTER (WHERE o.amount > 0), max(o.placed), coalesce(min(o.note), '-'), row_number() OVER (ORDER BY c.id) FROM app.customers c LEFT JOIN app.orders o ON o.customer = c.id GROUP BY c.id ORDER BY c.id
--# runs recursive CTE, VALUES, arrays, JSON
WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 10) SELECT i, ARRAY[i, i*2], jsonb_build_object('i', i)->>'i', generate_subscripts(ARRAY[1,2], 1) FROM n
--# runs TABLE
TABLE app.orders
--# runs VALUES
VALUES (1, 'a'), (2, 'b')
--# runs clocks and random numbers change nothing
SELECT now(), current_timestamp, clock_timestamp(), statement_timestamp(), timeofday(), random(), gen_random_uuid() IS NOT NULL, current_user, version() <> ''
--# runs text functions
SELECT upper(plain), substring(plain from 2 for 3), regexp_replace(plain, 'a', 'b', 'g'), format('%s', id), to_char(now(), 'YYYY'), string_agg(plain, ',') OVER () FROM app.customers
--# runs a harmless view
SELECT * FROM app.harmless WHERE id < 5
--# runs catalogs
SELECT relname, relkind FROM pg_class WHERE relnamespace = 'app'::regnamespace ORDER BY 1
--# runs information_schema
SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'app'
--# runs partitions
SELECT k, count(*) FROM app.parted GROUP BY ROLLUP (k)
--# runs lateral, generate_series, unnest with ordinality
SELECT * FROM generate_series(1, 3) g, LATERAL unnest(ARRAY['a', 'b']) WITH ORDINALITY u
--# runs casts and dates
SELECT '2024-01-01'::date + interval '1 month', date_trunc('day', now()), extract(epoch from now()), '1'::int::text, CAST('{1,2}' AS int[])
--# runs set operations
SELECT id FROM app.customers EXCEPT SELECT customer FROM app.orders UNION SELECT 7 INTERSECT SELECT 7 ORDER BY 1
--# runs a sample
SELECT count(*) FROM app.customers TABLESAMPLE BERNOULLI (50) REPEATABLE (1)
--# runs settings may be read
SELECT current_setting('server_version'), pg_typeof(1), pg_table_size('app.customers'), format_type(23, NULL)
--# runs full text search
SELECT to_tsvector('english', note) @@ to_tsquery('english', 'note') FROM app.orders LIMIT 1
--# runs ranges and geometry
SELECT int4range(1, 5) && int4range(3, 9), point(1, 2) <-> point(2, 3), '10.0.0.0/8'::inet >> '10.1.2.3'::inet

-- The plain ways.
--# refused DELETE
DELETE FROM app.victim
--# refused UPDATE
UPDATE app.victim SET what = 'x'
--# refused INSERT
INSERT INTO app.victim (what) VALUES ('x')
--# refused TRUNCATE
TRUNCATE app.victim CASCADE
--# refused MERGE
MERGE INTO app.victim v USING (SELECT 1 AS i) s ON v.id = s.i WHEN MATCHED THEN DELETE
--# refused DDL
CREATE TABLE app.mine (i int)
--# refused DROP
DROP TABLE app.victim
--# refused a temporary table
CREATE TEMP TABLE mine AS SELECT 1
--# refused CREATE TABLE AS
CREATE TABLE app.copied AS SELECT * FROM app.customers
--# refused SELECT INTO
SELECT * INTO app.copied FROM app.customers
--# refused SELECT INTO in a CTE's main query
WITH x AS (SELECT 1 AS i) SELECT i INTO app.copied FROM x
--# refused a materialized view
REFRESH MATERIALIZED VIEW app.mat
--# refused comments
COMMENT ON TABLE app.customers IS 'owned'
--# refused rights
GRANT ALL ON app.customers TO PUBLIC
--# refused roles
CREATE ROLE intruder SUPERUSER LOGIN PASSWORD 'x'
--# refused role settings
ALTER ROLE root SET search_path = evil
--# refused another role's password
ALTER ROLE bystander PASSWORD 'x'
--# refused database settings
ALTER DATABASE alpha SET work_mem = '1MB'
--# refused security labels
SECURITY LABEL ON TABLE app.customers IS NULL
--# refused event triggers
CREATE EVENT TRIGGER e ON ddl_command_end EXECUTE FUNCTION evil.trigger_secret()
--# refused the import of a foreign schema
IMPORT FOREIGN SCHEMA public FROM SERVER other INTO app
--# refused subscriptions
CREATE SUBSCRIPTION s CONNECTION '@OTHER@' PUBLICATION p
--# refused publications
ALTER PUBLICATION p ADD TABLE app.victim
--# refused reassigning
REASSIGN OWNED BY root TO bystander
--# refused dropping what is owned
DROP OWNED BY bystander

-- Data-modifying WITH.
--# refused DELETE in WITH
WITH gone AS (DELETE FROM app.victim RETURNING *) SELECT * FROM gone
--# fails nested two deep, which PostgreSQL refuses, too
WITH a AS (WITH b AS (INSERT INTO app.victim (what) VALUES ('x') RETURNING id) SELECT * FROM b) SELECT * FROM a
--# refused not referenced at all
WITH gone AS (UPDATE app.victim SET what = 'y') SELECT 1
--# refused behind a recursive one
WITH RECURSIVE r AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM r WHERE i < 3), d AS (DELETE FROM app.victim RETURNING 1) SELECT * FROM r
--# refused before VALUES
WITH gone AS (DELETE FROM app.victim RETURNING id) VALUES (1)
--# refused before TABLE
WITH gone AS (DELETE FROM app.victim RETURNING id) TABLE gone
--# refused with SEARCH and MATERIALIZED
WITH gone AS MATERIALIZED (DELETE FROM app.victim RETURNING id) SELECT count(*) FROM gone
--# refused in parentheses
(WITH gone AS (DELETE FROM app.victim RETURNING id) SELECT * FROM gone)

-- Row locks change rows.
--# refused FOR UPDATE
SELECT * FROM app.victim FOR UPDATE
--# refused FOR KEY SHARE
SELECT * FROM app.victim FOR KEY SHARE
--# refused FOR SHARE in a subquery
SELECT * FROM (SELECT * FROM app.victim FOR SHARE) x
--# refused FOR NO KEY UPDATE in a CTE
WITH x AS (SELECT * FROM app.victim FOR NO KEY UPDATE SKIP LOCKED) SELECT * FROM x
--# refused FOR UPDATE OF
SELECT v.id FROM app.victim v, app.orders o FOR UPDATE OF v NOWAIT
--# refused in an EXISTS
SELECT 1 WHERE EXISTS (SELECT 1 FROM app.victim FOR UPDATE)
--# refused the other place that FOR UPDATE may stand
SELECT * FROM app.victim FOR UPDATE LIMIT 1

-- Statements that are not queries.
--# refused LOCK
LOCK TABLE app.victim IN ACCESS EXCLUSIVE MODE
--# refused DO
DO $$ BEGIN PERFORM pg_notify('canary_channel', 'do'); END $$
--# refused DO in another language clause order
DO LANGUAGE plpgsql $$ BEGIN COPY (SELECT 1) TO PROGRAM 'touch @DIR@/do'; END $$
--# refused CALL
CALL evil.proc()
--# refused NOTIFY
NOTIFY canary_channel, 'x'
--# refused LISTEN
LISTEN canary_channel
--# refused UNLISTEN
UNLISTEN *
--# refused COPY to a program
COPY (SELECT 1) TO PROGRAM 'touch @DIR@/copy'
--# refused COPY to a file
COPY app.customers TO '@DIR@/file'
--# refused COPY from a program
COPY app.victim (what) FROM PROGRAM 'echo x'
--# refused COPY to the client
COPY app.customers TO STDOUT
--# refused COPY from the client
COPY app.victim FROM STDIN
--# refused SET
SET search_path = evil
--# refused SET LOCAL
SET LOCAL statement_timeout = 0
--# refused SET SESSION
SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE
--# refused SET TRANSACTION
SET TRANSACTION READ WRITE
--# refused SET ROLE
SET ROLE bystander
--# refused SET SESSION AUTHORIZATION
SET SESSION AUTHORIZATION bystander
--# refused RESET
RESET ALL
--# refused SHOW is not a query: current_setting is
SHOW ALL
--# refused DISCARD
DISCARD ALL
--# refused PREPARE
PREPARE p AS DELETE FROM app.victim
--# refused EXECUTE
EXECUTE p
--# refused DEALLOCATE
DEALLOCATE ALL
--# refused DECLARE WITH HOLD
DECLARE c CURSOR WITH HOLD FOR SELECT evil.outside()
--# refused FETCH
FETCH ALL FROM c
--# refused CLOSE
CLOSE ALL
--# refused BEGIN
BEGIN READ WRITE
--# refused COMMIT
COMMIT
--# refused COMMIT AND CHAIN
COMMIT AND CHAIN
--# refused ROLLBACK
ROLLBACK
--# refused PREPARE TRANSACTION
PREPARE TRANSACTION 'left behind'
--# refused COMMIT PREPARED
COMMIT PREPARED 'left behind'
--# refused SAVEPOINT
SAVEPOINT s
--# refused ALTER SYSTEM
ALTER SYSTEM SET work_mem = '7MB'
--# refused CHECKPOINT
CHECKPOINT
--# refused VACUUM
VACUUM FULL app.victim
--# refused ANALYZE
ANALYZE app.customers
--# refused CLUSTER
CLUSTER app.customers USING customers_pkey
--# refused REINDEX
REINDEX TABLE app.customers
--# refused LOAD
LOAD 'auto_explain'
--# refused SET CONSTRAINTS
SET CONSTRAINTS ALL DEFERRED

-- EXPLAIN is our own word, and off here.
--# refused EXPLAIN of a DELETE
EXPLAIN DELETE FROM app.victim
--# refused EXPLAIN ANALYZE of a function that acts
EXPLAIN ANALYZE SELECT evil.outside()
--# refused EXPLAIN with options
EXPLAIN (ANALYZE, COSTS OFF) DELETE FROM app.victim
--# refused EXPLAIN ANALYZE CREATE TABLE AS
EXPLAIN ANALYZE CREATE TABLE app.copied AS SELECT 1
--# refused EXPLAIN ANALYZE EXECUTE
EXPLAIN ANALYZE EXECUTE p
--# refused EXPLAIN ANALYZE REFRESH
EXPLAIN ANALYZE REFRESH MATERIALIZED VIEW app.mat
--# refused EXPLAIN folds constants: this runs the function
EXPLAIN SELECT evil.file_immutable(1)
--# refused EXPLAIN ANALYZE DECLARE
EXPLAIN ANALYZE DECLARE c CURSOR FOR SELECT evil.outside()

-- More than one statement, and things that hide one.
--# refused two statements
SELECT 1; DELETE FROM app.victim
--# refused COMMIT first
COMMIT; DELETE FROM app.victim; BEGIN
--# refused a comment between
SELECT 1 /* ; */ ; /* x */ DROP TABLE app.victim
--# refused nested comments
/* /* */ SELECT 1; */ DELETE FROM app.victim
--# refused a line comment that ends at a carriage return
SELECT 1 --DELETE
; DELETE FROM app.victim
--# refused a comment before the keyword
/**/DELETE/**/FROM/**/app.victim
--# refused a DELETE behind a dollar quote that looks open
SELECT $a$ $b$ $a$; DELETE FROM app.victim -- $b$
--# refused a DELETE behind an E string with a backslash
SELECT E'\''; DELETE FROM app.victim --'
--# refused a DELETE behind a plain string with a backslash
SELECT '\'; DELETE FROM app.victim --'
--# refused a DELETE behind U& with another escape
SELECT U&'!0027' UESCAPE '!'; DELETE FROM app.victim
--# fails the same with a quote left open
SELECT 'x; DELETE FROM app.victim
--# fails a DELETE in homoglyphs
ꓓELETE FROM app.victim
--# fails full-width letters
ＤＥＬＥＴＥ ＦＲＯＭ app.victim
--# fails a no-break space
DELETE FROM app.victim
--# fails a leading byte order mark
﻿DELETE FROM app.victim
--# harmless an empty statement before
;;; SELECT 1
--# fails nothing at all
;
--# fails a comment alone
-- nothing
--# refused an empty statement before a DELETE
; DELETE FROM app.victim
--# fails a parameter placeholder
SELECT $1
--# fails psql's own commands
\! touch @DIR@/psql
--# fails a variable without a value
SELECT :'x'

-- Notifications, locks, other backends.
--# refused pg_notify
SELECT pg_notify('canary_channel', 'x')
--# refused pg_notify as a table
SELECT * FROM pg_notify('canary_channel', 'x')
--# refused pg_notify in quotes
SELECT "pg_notify"('canary_channel', 'x')
--# refused pg_notify with its schema
SELECT pg_catalog.pg_notify('canary_channel', 'x')
--# refused pg_notify with its schema in quotes and blanks
SELECT "pg_catalog" . "pg_notify" ('canary_channel', 'x')
--# refused pg_notify in Unicode escapes
SELECT U&"pg\005fnotify"('canary_channel', 'x')
--# refused pg_notify with a comment between
SELECT pg_notify/**/('canary_channel', 'x')
--# refused pg_notify in capitals
SELECT PG_NOTIFY('canary_channel', 'x')
--# refused with its database
SELECT @DB@.pg_catalog.pg_notify('canary_channel', 'x')
--# refused in ROWS FROM
SELECT * FROM ROWS FROM (generate_series(1, 2), pg_notify('canary_channel', 'x'))
--# refused in a LATERAL
SELECT 1 FROM app.customers c, LATERAL pg_notify('canary_channel', c.id::text)
--# refused in ORDER BY
SELECT 1 ORDER BY pg_notify('canary_channel', 'x')::text
--# refused in LIMIT
SELECT 1 LIMIT (SELECT 1 FROM pg_notify('canary_channel', 'x'))
--# refused in a FILTER
SELECT count(*) FILTER (WHERE pg_notify('canary_channel', 'x') IS NULL)
--# refused in a window's frame
SELECT sum(id) OVER (ORDER BY id ROWS (SELECT 1 FROM pg_notify('canary_channel', 'x')) PRECEDING) FROM app.victim
--# refused in a JOIN's condition
SELECT 1 FROM app.victim a JOIN app.victim b ON pg_notify('canary_channel', 'x') IS NOT NULL
--# refused in GROUP BY and HAVING
SELECT 1 GROUP BY 1 HAVING pg_notify('canary_channel', 'x') IS NULL
--# refused in VALUES
VALUES (pg_notify('canary_channel', 'x')::text)
--# refused in a CASE that folds away by chance only
SELECT CASE WHEN random() < 2 THEN pg_notify('canary_channel', 'x') END
--# refused in DISTINCT ON
SELECT DISTINCT ON (pg_notify('canary_channel', 'x')::text) 1
--# refused in TABLESAMPLE
SELECT 1 FROM app.victim TABLESAMPLE BERNOULLI ((SELECT 50 FROM pg_notify('canary_channel', 'x')))
--# refused in an ARRAY subquery
SELECT ARRAY(SELECT pg_notify('canary_channel', 'x')::text)
--# refused in a subscript
SELECT (ARRAY[1,2])[(SELECT 1 FROM pg_notify('canary_channel', 'x'))]
--# refused pg_notify under another name
SELECT hello('canary_channel', 'x')
--# refused advisory lock of the session
SELECT pg_advisory_lock(4711)
--# refused advisory lock of the session, tried
SELECT pg_try_advisory_lock(47, 11), pg_try_advisory_lock_shared(5)
--# refused unlocking all
SELECT pg_advisory_unlock_all()
--# refused advisory lock of the transaction: others wait for it
SELECT pg_advisory_xact_lock(4711), pg_sleep(0.01)
--# refused ending another backend
SELECT pg_terminate_backend(@SENTINEL@)
--# refused ending all others
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()
--# refused ending another backend, with a timeout by name
SELECT pg_terminate_backend(pid => @SENTINEL@, timeout => 100)
--# refused ending another backend under another name
SELECT friendly(@SENTINEL@, 0)
--# refused cancelling another's statement
SELECT pg_cancel_backend(@BUSY@)
--# refused writing another backend's memory map to the log
SELECT pg_log_backend_memory_contexts(@SENTINEL@)
--# refused functional notation
SELECT (@SENTINEL@).pg_cancel_backend
--# refused exporting a snapshot
SELECT pg_export_snapshot()
--# harmless sleeping
SELECT pg_sleep(0.01)

-- Settings.
--# harmless set_config for the session, which the reset takes back
SELECT set_config('search_path', 'evil', false)
--# refused set_config for the transaction
SELECT set_config('statement_timeout', '0', true)
--# refused set_config in a subquery that nobody reads
SELECT 1 WHERE (SELECT set_config('transaction_read_only', 'off', true)) = 'off'
--# refused set_config through pg_settings' rule is an UPDATE
UPDATE pg_settings SET setting = '1MB' WHERE name = 'work_mem'
--# refused set_config and then a write
WITH a AS MATERIALIZED (SELECT set_config('transaction_read_only', 'off', false)) SELECT nextval('app.counter') FROM a
--# refused reload
SELECT pg_reload_conf()
--# refused rotate the log
SELECT pg_rotate_logfile()
--# refused set_config of the role
SELECT set_config('role', 'bystander', false)
--# refused set_config of session_authorization
SELECT set_config('session_authorization', 'bystander', false)
--# refused set_config in a view
SELECT * FROM app.trap_config
--# refused setseed: the next random numbers of the session
SELECT setseed(0.5)

-- Sequences and transaction ids.
--# refused nextval
SELECT nextval('app.counter')
--# refused setval
SELECT setval('app.counter', 1)
--# refused setval with is_called
SELECT setval('app.counter', 5, false)
--# refused nextval by oid
SELECT nextval('app.counter'::regclass::oid)
--# harmless lastval
SELECT lastval()
--# refused a transaction id
SELECT txid_current()
--# refused its new name
SELECT pg_current_xact_id()
--# harmless only if there is one
SELECT txid_current_if_assigned(), pg_current_xact_id_if_assigned(), pg_current_snapshot()

-- Large objects.
--# refused lo_creat
SELECT lo_creat(-1)
--# refused lo_create
SELECT lo_create(0)
--# refused lo_unlink
SELECT lo_unlink(424242)
--# refused lo_put
SELECT lo_put(424242, 0, 'x')
--# refused lo_from_bytea
SELECT lo_from_bytea(0, 'x')
--# refused lo_import
SELECT lo_import('/etc/hostname')
--# refused lo_export
SELECT lo_export(424242, '@DIR@/lo')
--# refused writing through a descriptor
SELECT lowrite(lo_open(424242, 131072), 'overwritten')
--# refused truncating through a descriptor
SELECT lo_truncate(lo_open(424242, 131072), 0)
--# refused lo_unlink of all
SELECT lo_unlink(oid) FROM pg_largeobject_metadata
--# refused the lo extension's own
SELECT lo_oid(424242), lo_unlink(lo_oid(424242))
--# harmless reading one
SELECT lo_get(424242)

-- Files and programs.
--# refused reading a server's file
SELECT pg_read_file('/etc/passwd')
--# refused reading a server's file as bytes
SELECT pg_read_binary_file('PG_VERSION')
--# refused listing a server's directory
SELECT pg_ls_dir('/')
--# refused listing with its other names
SELECT * FROM pg_ls_waldir()
--# refused a file's status
SELECT * FROM pg_stat_file('postgresql.conf')
--# refused adminpack's write
SELECT pg_file_write('@DIR@/adminpack', 'x', false)
--# refused adminpack's write in the data directory
SELECT pg_file_write('canary', 'x', false)
--# refused adminpack's rename
SELECT pg_file_rename('pg_ident.conf', 'pg_ident.old')
--# refused adminpack's unlink
SELECT pg_file_unlink('pg_ident.conf')
--# refused adminpack's sync
SELECT pg_file_sync('PG_VERSION')
--# refused a foreign table that runs a program
SELECT * FROM app.run_program
--# refused a view of one
SELECT * FROM app.run_program_view
--# refused one joined in
SELECT 1 FROM app.customers c JOIN app.run_program p ON true
--# harmless a foreign table that reads a file
SELECT * FROM app.a_file

-- Other servers.
--# refused dblink
SELECT * FROM dblink('@OTHER@', 'SELECT 1') AS t(i int)
--# refused dblink that writes here
SELECT dblink_exec('@SELF@', 'INSERT INTO app.victim (what) VALUES (''self'')')
--# refused dblink in two steps
SELECT dblink_connect('c', '@SELF@'), dblink_exec('c', 'DELETE FROM app.victim')
--# refused dblink_send_query
SELECT dblink_connect('d', '@SELF@'), dblink_send_query('d', 'DELETE FROM app.victim')
--# refused dblink_open
SELECT dblink_connect('@SELF@'), dblink_open('c', 'SELECT 1')
--# refused postgres_fdw: a foreign table
SELECT * FROM app.far
--# refused a view of a foreign table
SELECT * FROM app.far_view
--# refused a foreign table among a table's children
SELECT * FROM app.inherited
--# refused closing connections
SELECT postgres_fdw_disconnect_all()

-- Functions that take SQL.
--# refused query_to_xml
SELECT query_to_xml('SELECT evil.outside()', true, false, '')
--# refused query_to_xml_and_xmlschema
SELECT query_to_xml_and_xmlschema('SELECT pg_notify(''canary_channel'', ''x'')', true, false, '')
--# refused table_to_xml of a view with a trap
SELECT table_to_xml('app.trap_column', true, false, '')
--# refused schema_to_xml
SELECT schema_to_xml('app', true, false, '')
--# refused database_to_xml
SELECT database_to_xml(true, false, '')
--# refused cursor_to_xml
SELECT cursor_to_xml('held', 1, true, false, '') FROM evil.ref()
--# refused ts_stat
SELECT * FROM ts_stat('SELECT to_tsvector(evil.run(''SELECT evil.outside()''))')
--# refused ts_rewrite with a query
SELECT ts_rewrite('a'::tsquery, 'SELECT ''a''::tsquery, to_tsquery(evil.run(''SELECT evil.outside()''))')
--# refused crosstab
SELECT * FROM crosstab('SELECT ''a'', ''b'', evil.outside()') AS t(a text, b int)
--# refused connectby
SELECT * FROM connectby('app.trap_column', 'id', 'id', '1', 0) AS t(a int, b int, c int)
--# refused normal_rand is harmless, crosstab2 not
SELECT * FROM crosstab2('SELECT ''a''::text, ''b''::text, evil.outside()::text')
--# refused xpath_table
SELECT * FROM xpath_table('id', 'what', 'app.victim', '/a', 'evil.outside() = 1') AS t(a int, b text)
--# refused a function that runs its argument
SELECT evil.run('DELETE FROM app.victim')
--# refused dblink_build_sql_delete
SELECT dblink_build_sql_delete('app.victim', '1', 1, '{1}'), dblink_get_connections()

-- Functions of the database's own that act.
--# refused in SQL
SELECT evil.notify_any()
--# refused declared stable
SELECT evil.notify_stable()
--# refused declared immutable
SELECT evil.file_immutable(1)
--# refused declared immutable, in a condition that is folded while planning
SELECT 1 WHERE false AND evil.file_immutable(1) = 1
--# refused a program
SELECT evil.program()
--# refused a transaction of its own
SELECT evil.outside()
--# refused polymorphic
SELECT evil.outside('x'::text)
--# refused as a field
SELECT c.of_customer FROM app.customers c
--# refused as a field of a row in brackets
SELECT (c).of_customer FROM app.customers c
--# refused as a field of a subquery's row
SELECT (x.r).of_customer FROM (SELECT c AS r FROM app.customers c) x
--# refused as a table
SELECT * FROM evil.rows()
--# refused in the select list, set returning
SELECT evil.rows()
--# refused a default of an argument
SELECT evil.with_default()
--# refused variadic
SELECT evil.variadic(1, 2, 3)
--# refused security definer
SELECT evil.definer()
--# refused with a SET clause
SELECT evil.config_clause()
--# refused with an SQL standard body
SELECT evil.begin_atomic()
--# refused set_config inside
SELECT evil.poison()
--# refused a procedure is no function
SELECT evil.proc()
--# refused a trigger function
SELECT evil.trigger_secret()
--# refused a refcursor
SELECT evil.ref()

-- The same behind views.
--# refused a view's column
SELECT * FROM app.trap_column
--# refused a view's column that is not asked for
SELECT id FROM app.trap_column
--# refused a view's condition
SELECT * FROM app.trap_where
--# refused views over views
SELECT count(*) FROM app.trap_deep
--# refused a view with LATERAL
SELECT * FROM app.trap_lateral
--# refused a view with one of PostgreSQL's own
SELECT * FROM app.trap_builtin
--# refused a view with a large object
SELECT * FROM app.trap_lo
--# refused a view that locks
TABLE app.trap_lock
--# refused a view with a CTE
SELECT * FROM app.trap_cte
--# refused a view with an aggregate
SELECT * FROM app.trap_agg
--# refused a view with subqueries
SELECT 1 FROM app.trap_sub
--# refused a view with CASE
SELECT * FROM app.trap_case
--# refused a view with an operator
SELECT * FROM app.trap_operator
--# refused a view in a subquery in a CTE
WITH x AS (SELECT (SELECT max(id) FROM app.trap_where)) SELECT * FROM x

-- Operators, casts, aggregates, domains.
--# refused an operator
SELECT 1 @@@ 2
--# refused an operator by its full name
SELECT 1 OPERATOR(public.@@@) 2
--# refused a prefix operator
SELECT @!@ 5
--# refused an operator with ANY
SELECT 1 @@@ ANY (ARRAY[1, 2])
--# refused an operator with ALL and a subquery
SELECT 1 @@@ ALL (SELECT id FROM app.victim)
--# fails ORDER BY USING, which wants an ordering operator
SELECT what FROM app.victim ORDER BY what USING <<<<
--# refused a cast
SELECT 5::evil.shape
--# refused a cast, spelled out
SELECT CAST(id AS evil.shape) FROM app.victim
--# fails a cast as a function's name
SELECT evil.shape(5)
--# refused an implicit cast to text
SELECT evil.to_shape(1)::text || 'x'
--# refused an aggregate
SELECT evil.agg(id) FROM app.victim
--# refused an aggregate with a final function
SELECT evil.agg_final(id) FROM app.victim
--# refused an aggregate as a window function
SELECT innocent(id) OVER () FROM app.victim
--# refused a domain's check
SELECT 5::evil.dom
--# refused a domain over a domain
SELECT '5'::evil.dom_over
--# refused a domain in a composite
SELECT ROW(5)::evil.comp
--# refused a domain in an array
SELECT '{1,2}'::evil.dom[]
--# refused a domain of a column, whose check the parser runs for a literal
SELECT 1 FROM evil.dom_table WHERE a = '{5}'
--# refused the same as a function's argument
SELECT evil.takes_rows('{x}')
--# refused the same in COALESCE
SELECT coalesce(a, '{5}') FROM evil.dom_table
--# refused a domain in a row's literal
SELECT '(5)'::evil.comp
--# refused a domain by json_populate_record
SELECT * FROM jsonb_populate_record(NULL::evil.comp, '{"d": 5}')
--# refused a domain by jsonb_to_record
SELECT * FROM jsonb_to_record('{"d": 5}') AS x(d evil.dom)
--# refused a domain by XMLTABLE
SELECT * FROM XMLTABLE('/a' PASSING '<a>5</a>' COLUMNS d evil.dom PATH '.')
--# fails an operator class that is not the type's own
SELECT 1 FROM app.victim ORDER BY id USING OPERATOR(evil.<~)

-- Names that are found before PostgreSQL's own.
--# refused [shadow] count() found before PostgreSQL's own
SELECT count() FROM app.customers
--# refused [shadow] now()
SELECT now()
--# refused [shadow] an operator on numbers
SELECT 1 + 2
--# refused lower(varchar) in public is the better match
SELECT lower(name) FROM app.customers
--# refused length(varchar)
SELECT length(name) FROM app.customers
--# refused left(varchar, int)
SELECT left(name, 2) FROM app.customers
--# refused [shadow] an operator on varchar
SELECT name || name FROM app.customers
--# refused [shadow] an equality on varchar
SELECT 1 FROM app.customers WHERE name = 'x'::varchar
--# refused [shadow] an equality in IN
SELECT 1 FROM app.customers WHERE name IN ('x'::varchar, 'y'::varchar)
--# harmless [shadow] an equality by USING
SELECT 1 FROM app.customers a JOIN app.customers b USING (name)
--# harmless [shadow] NULLIF
SELECT NULLIF(name, 'x'::varchar) FROM app.customers
--# harmless [shadow] CASE with an operand
SELECT CASE name WHEN 'x'::varchar THEN 1 END FROM app.customers
--# harmless [shadow] IS DISTINCT FROM
SELECT name IS DISTINCT FROM 'x'::varchar FROM app.customers
--# harmless [shadow] row comparison
SELECT (name, 1) = ('x'::varchar, 1) FROM app.customers

-- Maintenance that is not transactional.
--# refused statistics
SELECT pg_stat_reset()
--# refused shared statistics
SELECT pg_stat_reset_shared('bgwriter')
--# refused one table's statistics
SELECT pg_stat_reset_single_table_counters('app.customers'::regclass)
--# refused SLRU statistics
SELECT pg_stat_reset_slru(NULL)
--# refused statistics under another name
SELECT total('wal')
--# refused pg_stat_statements
SELECT pg_stat_statements_reset()
--# refused a WAL message
SELECT pg_logical_emit_message(false, 'canary', 'x')
--# refused a WAL message in the transaction
SELECT pg_logical_emit_message(true, 'canary', 'x')
--# refused a WAL segment
SELECT pg_switch_wal()
--# refused a restore point
SELECT pg_create_restore_point('canary')
--# refused a physical slot
SELECT pg_create_physical_replication_slot('canary', true)
--# refused a logical slot
SELECT pg_create_logical_replication_slot('canary', 'pgoutput')
--# refused a temporary slot
SELECT pg_create_physical_replication_slot('canary_temp', true, true)
--# refused dropping slots
SELECT pg_drop_replication_slot('canary')
--# refused an origin
SELECT pg_replication_origin_create('canary')
--# refused a backup
SELECT pg_backup_start('canary', true)
--# refused promotion
SELECT pg_promote(false)
--# refused BRIN maintenance
SELECT brin_summarize_new_values('app.doomed_brin')
--# refused BRIN desummarizing
SELECT brin_desummarize_range('app.doomed_brin', 0)
--# refused GIN maintenance
SELECT gin_clean_pending_list('app.orders_gin')
--# refused pg_surgery kills rows
SELECT heap_force_kill('app.doomed'::regclass, ARRAY['(0,1)']::tid[])
--# refused pg_surgery freezes rows
SELECT heap_force_freeze('app.doomed'::regclass, ARRAY['(0,2)']::tid[])
--# refused the visibility map
SELECT pg_truncate_visibility_map('app.doomed')
--# refused collations
SELECT pg_import_system_collations('pg_catalog')
--# refused extension configuration
SELECT pg_extension_config_dump('app.customers', '')
--# harmless prewarming
SELECT pg_prewarm('app.customers')
--# harmless reading pages
SELECT lp, t_xmin FROM heap_page_items(get_raw_page('app.customers', 0))
--# harmless sizes
SELECT pg_total_relation_size('app.customers'), pg_database_size(current_database()), pg_relation_filepath('app.customers')
--# refused binary upgrade functions
SELECT binary_upgrade_set_next_pg_authid_oid(99999::oid)
--# harmless input functions
SELECT int4in('5'), textin('x')

-- What only looks like trouble.
--# harmless the catalog's own name in a text
SELECT 'pg_terminate_backend(1)', $$DELETE FROM app.victim$$ AS "drop table"
--# runs keywords as names
SELECT 1 AS delete, 2 AS update, 3 AS "set"
--# runs a function's name as a column
SELECT id AS pg_notify, (SELECT max(id) FROM app.customers) AS dblink FROM app.customers
--# runs many parentheses
SELECT ((((((((((1))))))))))
--# runs comments everywhere
SELECT /* a */ 1 /* b /* c */ */ -- d
--# runs a trailing semicolon
SELECT 1;
--# runs GROUPING SETS, ordered-set and hypothetical-set aggregates
SELECT customer, GROUPING(customer), percentile_cont(0.5) WITHIN GROUP (ORDER BY amount), rank(3) WITHIN GROUP (ORDER BY amount) FROM app.orders GROUP BY GROUPING SETS ((customer), ())
--# runs extensions' harmless functions
SELECT 'a=>1'::hstore -> 'a', 'Tom'::citext = 'tom', 'a.b'::ltree @> 'a.b.c', digest('x', 'sha256'), ARRAY[1,2] & ARRAY[2]
--# runs numbers
SELECT 2 ^ 10, sqrt(2::numeric), round(2.5), power(2, 3), ln(10), mod(7, 3), width_bucket(5, 0, 10, 5), greatest(1, 2), least(1, 2), 7 / 2, 7 % 2
--# runs JSON
SELECT jsonb_agg(x), jsonb_object_agg(k, x), jsonb_path_query_array('[1,2]', '$[*] ? (@ > 1)') FROM (VALUES ('a', 1), ('b', 2)) v(k, x)

-- Row security and other places.
--# harmless a policy with a trap: superusers pass by it
SELECT * FROM app.guarded
--# harmless a huge series, cut by the limits
SELECT i FROM generate_series(1, 100000000) i
--# harmless a cross join that would take for ever
SELECT count(*) FROM generate_series(1, 100000) a, generate_series(1, 100000) b
--# harmless memory
SELECT length(repeat('x', 100000000))
--# harmless an endless recursion
WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r) SELECT count(*) FROM r
--# harmless a regular expression that takes its time
SELECT repeat('a', 2000) ~ '^(a+)+$' AND repeat('a', 1000) || 'b' ~ '^(a|aa)+$'
