-- What a source in mode metadata must survive: statements are described, never run. Each runs against
-- two databases that differ in values alone; all that comes out must be the same in both.

--# runs a query is described
SELECT id, name, email, salary, born FROM app.customers
--# runs everything
SELECT * FROM app.everything
--# runs expressions have types
SELECT count(*), max(email), sum(salary), array_agg(id), now(), tags[1], doc->>'mail', (extra).a FROM app.customers GROUP BY tags, doc, extra
--# runs a view
TABLE app.emails_deep
--# runs VALUES
VALUES (1, 'x'), (2, NULL)
--# runs an INSERT is described
INSERT INTO app.victim (what) VALUES ('x') RETURNING id, what
--# runs an UPDATE is described
UPDATE app.customers SET salary = 0 RETURNING *
--# runs a DELETE is described
DELETE FROM app.customers RETURNING email
--# runs a MERGE is described
MERGE INTO app.victim v USING app.customers c ON v.id = c.id WHEN MATCHED THEN DELETE
--# refused the catalog's estimates
SELECT relname, reltuples FROM pg_class
--# harmless catalogs may be read, where no cast of the database's own acts
SELECT relname, relkind FROM pg_class
--# runs functions' result types
SELECT * FROM evil.all_emails() e, evil.a_customer() c

-- Values of rows.
--# harmless one value
SELECT email FROM app.customers WHERE id = 1
--# harmless all values in one
SELECT string_agg(email, ',') FROM app.customers
--# harmless a row as JSON
SELECT row_to_json(c) FROM app.customers c
--# harmless a whole table as XML
SELECT table_to_xml('app.customers', true, false, '')
--# harmless a query as XML
SELECT query_to_xml('SELECT * FROM app.customers', true, false, '')
--# harmless to_jsonb
SELECT to_jsonb(c.*) FROM app.customers c
--# harmless the row itself
SELECT c FROM app.customers c
--# harmless a value as a column's name can't be
SELECT email AS "email" FROM app.customers
--# harmless a guess by WHERE
SELECT 1 FROM app.customers WHERE email = 'kanari-a1@mail.example'
--# harmless a guess by EXISTS
SELECT EXISTS (SELECT FROM app.customers WHERE email LIKE 'kanari-a%')
--# harmless a row count
SELECT count(*) FROM app.readings
--# harmless a row count by generate_series
SELECT generate_series(1, (SELECT count(*) FROM app.readings))
--# harmless a row count by LIMIT
SELECT 1 FROM app.readings LIMIT 150
--# harmless a page by ctid
SELECT * FROM app.readings WHERE ctid = '(100,1)'
--# harmless ctid ranges
SELECT max(ctid) FROM app.readings WHERE ctid > '(10,0)'
--# harmless system columns
SELECT xmin, xmax, cmin, ctid, tableoid FROM app.customers
--# harmless a sample
SELECT * FROM app.customers TABLESAMPLE SYSTEM (10)
--# harmless a set-returning function
SELECT * FROM evil.all_emails()
--# harmless a composite returning function
SELECT (evil.a_customer()).*
--# harmless functional notation
SELECT (c).sees FROM app.customers c
--# harmless a constant that is none
SELECT evil.const_leak()
--# harmless a constant as a default
INSERT INTO app.victim (what) VALUES (evil.const_leak())
--# harmless crosstab
SELECT * FROM crosstab('SELECT email, id, 1 FROM app.customers') AS t(a text, b int)
--# harmless connectby
SELECT * FROM connectby('app.customers', 'email', 'email', 'x', 0) AS t(a text, b text, c int)
--# harmless ts_stat
SELECT * FROM ts_stat('SELECT to_tsvector(email) FROM app.customers')
--# harmless dblink to itself
SELECT * FROM dblink('@SELF@', 'SELECT email FROM app.customers') AS t(e text)
--# harmless a large object
SELECT lo_get(424242)
--# harmless a server's file
SELECT pg_read_file('postgresql.conf')
--# harmless a page's bytes
SELECT get_raw_page('app.customers', 0)
--# harmless a page's items
SELECT * FROM heap_page_items(get_raw_page('app.customers', 0))
--# harmless an index's items
SELECT * FROM bt_page_items('app.customers_pkey', 1)
--# harmless the WAL
SELECT * FROM pg_get_wal_records_info('0/1000000', '0/2000000')
--# harmless a sequence's value
SELECT last_value FROM app.counter
--# harmless currval
SELECT currval('app.counter'), lastval()
--# harmless nextval
SELECT nextval('app.counter')
--# harmless pg_sequences
SELECT * FROM pg_sequences
--# harmless pg_sequence_last_value
SELECT pg_sequence_last_value('app.counter')

-- Errors that could tell a value. Nothing runs, so none comes.
--# runs a division by a value
SELECT 1 / (SELECT balance - 77123449 FROM app.customers WHERE id = 1)
--# runs a cast of a value
SELECT email::int FROM app.customers
--# runs a cast of all values
SELECT string_agg(email, ',')::int FROM app.customers
--# runs a cast to a date
SELECT CAST(email AS date) FROM app.customers
--# runs a cast to an enum
SELECT email::text::app.mood FROM app.customers
--# runs a cast to regclass
SELECT email::regclass FROM app.customers
--# runs a cast to JSON
SELECT email::json FROM app.customers
--# runs a cast to XML
SELECT ('<' || email)::xml FROM app.customers
--# runs a cast to a domain
SELECT email::app.canary_domain FROM app.customers
--# runs a subquery of more than one row
SELECT (SELECT email FROM app.customers)
--# runs an overflow
SELECT salary::int2 FROM app.customers
--# runs a length that does not fit
SELECT email::varchar(2)::bit(3) FROM app.customers
--# harmless XPath
SELECT xpath('/' || email, '<a/>') FROM app.customers
--# harmless a regular expression
SELECT 'x' ~ (email || '(') FROM app.customers
--# harmless to_number
SELECT to_number(email, '999'), to_date(email, 'YYYY'), to_timestamp(email, 'YYYY') FROM app.customers
--# harmless set_config with a value in its name
SELECT set_config(email, 'x', true) FROM app.customers
--# harmless current_setting with a value in its name
SELECT current_setting(email) FROM app.customers
--# harmless encode, decode, convert
SELECT decode(email, 'hex'), convert_from(big, email) FROM app.customers
--# harmless format
SELECT format(email) FROM app.customers
--# harmless JSON path
SELECT jsonb_path_query(doc, '$.mail.double()'), doc @@ '$.mail == 1' FROM app.customers
--# harmless a function that raises
SELECT evil.leak_error(email) FROM app.customers
--# harmless a function that raises a notice
SELECT evil.leak(email) FROM app.customers
--# harmless a function that raises, in a condition
SELECT 1 FROM app.customers WHERE evil.leak(email) AND evil.leak_error(email)
--# harmless a unique violation tells the key
INSERT INTO app.customers (id, name) SELECT id, name FROM app.customers
--# harmless a check violation tells the row
UPDATE app.customers SET email = '@S@ never'
--# harmless a foreign key violation
DELETE FROM app.customers WHERE id IN (SELECT customer FROM app.orders)
--# harmless NOT NULL tells the row
UPDATE app.customers SET name = NULL
--# harmless an error's position can't tell
SELECT CASE WHEN (SELECT email FROM app.customers LIMIT 1) LIKE 'k%' THEN 1/0 ELSE 1 END
--# harmless ON CONFLICT
INSERT INTO app.customers (id, name) VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET name = app.customers.email RETURNING name

-- What the parser reads while it parses.
--# fails a literal that is no integer
SELECT 'x'::int
--# harmless a literal of a domain
SELECT 'kanari-a1@mail.example'::evil.row_dom
--# harmless literals of an array of a domain, whose check reads rows
SELECT '{kanari-a1@mail.example}'::evil.row_dom[]
--# harmless the same by CAST
SELECT CAST('{kanari-a1@mail.example,x}' AS evil.row_dom[])
--# harmless the same as a row's field
SELECT '(kanari-a1@mail.example)'::evil.row_comp
--# harmless the same as an array of rows
SELECT '{"(kanari-a1@mail.example)"}'::evil.row_comp[]
--# harmless the same as a column's value
INSERT INTO evil.row_table VALUES ('{kanari-a1@mail.example}', '(kanari-a1@mail.example)')
--# harmless the same compared with a column
SELECT 1 FROM evil.row_table WHERE a = '{kanari-a1@mail.example}'
--# harmless the same in an UPDATE
UPDATE evil.row_table SET a = '{kanari-a1@mail.example}'
--# harmless the same in UNION
SELECT a FROM evil.row_table UNION SELECT '{kanari-a1@mail.example}'
--# harmless the same in CASE
SELECT CASE WHEN true THEN a ELSE '{kanari-a1@mail.example}' END FROM evil.row_table
--# harmless the same in COALESCE
SELECT coalesce(a, '{kanari-a1@mail.example}') FROM evil.row_table
--# harmless the same as a function's argument
SELECT evil.takes_rows('{kanari-a1@mail.example}')
--# harmless the same in IN
SELECT 1 FROM evil.row_table WHERE a IN ('{kanari-a1@mail.example}', '{y}')
--# harmless the same in VALUES with a cast
VALUES ('{kanari-a1@mail.example}'::evil.row_dom[])
--# harmless the same as a range
SELECT '[1,2)'::evil.row_range
--# harmless the same as a multirange
SELECT '{[1,2)}'::evil.row_multi
--# harmless the same as a type's name before a literal
SELECT evil._row_dom '{kanari-a1@mail.example}'
--# harmless a domain that acts, in an array
SELECT '{5}'::evil.dom[]
--# harmless a domain that acts, in a row
SELECT '(5)'::evil.comp
--# harmless a domain that acts, by an INSERT
INSERT INTO evil.dom_table VALUES ('{5}')
--# harmless a domain's literal, guessed
SELECT '{x}'::app.canary_domain[]
--# runs names by regclass are names
SELECT 'app.customers'::regclass, 'lower(text)'::regprocedure, 'app.mood'::regtype
--# harmless a table's name by a value
SELECT 'kanari'::regclass
--# harmless to_regclass
SELECT to_regclass(email) FROM app.customers

-- Catalogs that hold values: described like any table, never read.
--# harmless most common values
SELECT most_common_vals, histogram_bounds, most_common_freqs FROM pg_stats WHERE tablename = 'customers'
--# harmless statistics underneath
SELECT stavalues1, stavalues2 FROM pg_statistic
--# harmless extended statistics
SELECT * FROM pg_stats_ext_exprs
--# harmless defaults
SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef
--# harmless check constraints
SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
--# harmless view definitions
SELECT definition FROM pg_views
--# harmless pg_get_viewdef
SELECT pg_get_viewdef('app.literal_view'::regclass)
--# harmless function sources
SELECT prosrc FROM pg_proc WHERE proname = 'holds'
--# harmless pg_get_functiondef
SELECT pg_get_functiondef('app.holds'::regproc)
--# harmless arguments' defaults
SELECT pg_get_function_arguments('app.defaults'::regproc)
--# harmless index predicates
SELECT pg_get_indexdef('app.partial'::regclass)
--# harmless partition bounds
SELECT pg_get_expr(relpartbound, oid) FROM pg_class
--# harmless partition constraints
SELECT pg_get_partition_constraintdef('app.parted_one'::regclass)
--# harmless rules
SELECT pg_get_ruledef(oid) FROM pg_rewrite
--# harmless triggers
SELECT pg_get_triggerdef(oid) FROM pg_trigger
--# harmless domains' checks
SELECT check_clause FROM information_schema.check_constraints
--# harmless domains' defaults
SELECT typdefault FROM pg_type
--# harmless columns' defaults
SELECT column_default FROM information_schema.columns
--# harmless routines' sources
SELECT routine_definition FROM information_schema.routines
--# harmless views' sources
SELECT view_definition FROM information_schema.views
--# harmless policies
SELECT qual FROM pg_policies
--# harmless comments
SELECT obj_description('app.customers'::regclass), col_description('app.customers'::regclass, 1)
--# harmless enum labels
SELECT enum_range(NULL::app.mood)
--# harmless others' statements
SELECT query FROM pg_stat_activity
--# harmless statements of the past
SELECT query, calls, rows FROM pg_stat_statements
--# harmless settings
SELECT name, setting FROM pg_settings
--# harmless foreign servers' passwords
SELECT umoptions FROM pg_user_mappings
--# harmless password hashes
SELECT rolpassword FROM pg_authid
--# harmless table sizes
SELECT pg_relation_size('app.readings'), pg_total_relation_size('app.readings')
--# harmless numbers of rows
SELECT n_live_tup, n_tup_ins, seq_tup_read FROM pg_stat_user_tables
--# harmless estimates of rows
SELECT reltuples, relpages FROM pg_class WHERE relname = 'readings'
--# harmless privileges
SELECT has_table_privilege('app.customers', 'SELECT'), has_column_privilege('app.customers', 'email', 'SELECT')
--# harmless buffers
SELECT count(*) FROM pg_buffercache
--# harmless dead rows
SELECT * FROM pgstattuple('app.readings')
--# harmless pg_visibility
SELECT * FROM pg_visibility_map('app.readings')
--# harmless timing
SELECT pg_sleep(CASE WHEN (SELECT email FROM app.customers WHERE id = 1) LIKE 'kanari-a%' THEN 2 ELSE 0 END)
--# harmless timing by work
SELECT count(*) FROM app.readings a, app.readings b, app.readings c

-- Statements that are not described.
--# refused EXPLAIN
EXPLAIN SELECT * FROM app.customers WHERE email = 'x'
--# refused EXPLAIN ANALYZE
EXPLAIN ANALYZE SELECT * FROM app.customers
--# refused EXPLAIN with every option
EXPLAIN (ANALYZE, VERBOSE, BUFFERS, FORMAT JSON) SELECT evil.const_leak()
--# refused EXPLAIN that folds a constant
EXPLAIN (VERBOSE) SELECT evil.const_leak()
--# refused COPY
COPY app.customers TO STDOUT
--# refused COPY of a query
COPY (SELECT * FROM app.customers) TO STDOUT WITH CSV
--# refused COPY to a program
COPY app.customers TO PROGRAM 'cat > @DIR@/stolen'
--# refused DO
DO $$ BEGIN RAISE NOTICE '%', (SELECT max(email) FROM app.customers); END $$
--# refused CALL
CALL evil.proc()
--# refused PREPARE
PREPARE p AS SELECT * FROM app.customers
--# refused EXECUTE
EXECUTE p
--# refused DECLARE
DECLARE c CURSOR FOR SELECT * FROM app.customers
--# refused FETCH
FETCH ALL FROM c
--# refused CREATE TABLE AS
CREATE TABLE app.copied AS SELECT * FROM app.customers
--# harmless SELECT INTO is described, too
SELECT * INTO app.copied FROM app.customers
--# refused CREATE FUNCTION
CREATE FUNCTION app.f() RETURNS text LANGUAGE sql AS 'SELECT max(email) FROM app.customers'
--# refused CREATE DOMAIN
CREATE DOMAIN app.probe AS text CHECK (VALUE <> 'x')
--# refused CREATE TEMP TABLE
CREATE TEMP TABLE x (a evil.row_dom[] DEFAULT '{kanari-a1@mail.example}')
--# refused ALTER TABLE that checks values
ALTER TABLE app.customers ADD CONSTRAINT probe CHECK (email NOT LIKE 'kanari-a%')
--# refused SHOW
SHOW ALL
--# refused SET
SET client_min_messages = debug5
--# refused LISTEN
LISTEN canary_channel
--# refused LOCK
LOCK TABLE app.customers
--# refused ANALYZE
ANALYZE VERBOSE app.customers
--# refused VACUUM
VACUUM VERBOSE app.customers
--# refused CREATE INDEX
CREATE UNIQUE INDEX ON app.customers (email)
--# refused TRUNCATE
TRUNCATE app.customers
--# refused REFRESH
REFRESH MATERIALIZED VIEW app.mat
--# refused two statements
SELECT 1; SELECT email FROM app.customers
--# refused a second one that is hidden
SELECT 1 /* ; */ ; EXPLAIN SELECT 1 --
--# refused COMMIT
COMMIT
--# refused BEGIN
BEGIN
--# refused NOTIFY
NOTIFY canary_channel, 'x'
--# refused SET TRANSACTION
SET TRANSACTION SNAPSHOT '00000003-0000001B-1'
--# refused COMMENT
COMMENT ON TABLE app.customers IS 'x'
--# refused ALTER SYSTEM
ALTER SYSTEM SET log_statement = 'all'
--# refused IMPORT
IMPORT FOREIGN SCHEMA public FROM SERVER other INTO app

-- Names that are not there, and other errors of the parser.
--# fails a column that is not there
SELECT emial FROM app.customers
--# fails a table that is not there
SELECT * FROM app.customer
--# fails a function that is not there
SELECT app.nothing(1)
--# fails a type that is not there
SELECT 1::app.nothing
--# fails an operator that is not there
SELECT email + 1 FROM app.customers
--# fails a syntax error
SELEC 1
--# fails an ambiguous column
SELECT id FROM app.customers, app.orders
--# fails an aggregate in WHERE
SELECT 1 FROM app.customers WHERE count(*) > 1
--# fails a literal of an enum that is not there
SELECT 'kanari'::app.mood
--# fails a literal that is no date
SELECT DATE 'kanari'
--# fails a literal that is no number
SELECT numeric 'x'
--# fails JSON that is none
SELECT '{kanari'::jsonb
--# fails a literal of a row that is none
SELECT 'x'::app.pair
--# fails a setting that is none as a type modifier
SELECT 'x'::varchar(0)
--# harmless 1,700 placeholders
SELECT {{a}}::text
--# harmless a placeholder compared with a column
SELECT 1 FROM app.customers WHERE email = {{guess}}
--# harmless postgres_fdw asks nobody to describe
SELECT * FROM app.far
--# harmless file_fdw either
SELECT * FROM app.run_program
--# harmless a join with both
SELECT * FROM app.far, app.a_file, app.inherited
