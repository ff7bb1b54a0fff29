-- What a source with masks must survive. Masked are: customers' email, card, salary, balance, born, tags, doc, big,
-- extra; orders' note and amount; all of schema secret; parted, guarded. Each statement runs in two worlds that
-- differ in the values of these columns alone (and in those of no other column that it reads), with
-- mask_filters: refuse, and all that comes out must be the same; then with hash, partial and noise and
-- mask_filters: equality, and no canary may come out. "runs" must work, masked.

--# runs plain columns
SELECT id, name, plain FROM app.customers ORDER BY id
--# runs a masked column beside others
SELECT id, email, plain FROM app.customers ORDER BY id
--# runs everything
SELECT * FROM app.customers ORDER BY id
--# runs everything of a join
SELECT c.*, o.id, o.note FROM app.customers c CROSS JOIN app.orders o WHERE o.id < 3 ORDER BY o.id
--# runs counts
SELECT count(*), count(email) FROM app.customers
--# runs aggregates of unmasked columns
SELECT plain, max(id), string_agg(name::text, ',') FROM app.customers GROUP BY plain ORDER BY plain
--# runs a view
SELECT * FROM app.emails ORDER BY id
--# runs a view of a view
SELECT * FROM app.emails_deep ORDER BY id
--# runs a harmless view
SELECT * FROM app.harmless ORDER BY id
--# runs an alias
SELECT email AS plain, plain AS email FROM app.customers ORDER BY id
--# runs a subquery
SELECT x.e FROM (SELECT email AS e, id FROM app.customers) x ORDER BY x.id
--# runs a CTE
WITH x AS (SELECT id, email FROM app.customers) SELECT email FROM x ORDER BY id
--# runs another table
SELECT k, g FROM (VALUES (1, 'a')) v(k, g)
--# runs a table's name as a value
SELECT c.id, c.plain FROM app.customers AS c ORDER BY c.id LIMIT 3

-- Copies by other ways.
--# harmless TABLE
TABLE app.customers
--# harmless a whole row
SELECT c FROM app.customers c ORDER BY c.id
--# harmless a whole row by its star
SELECT (c).* FROM app.customers c ORDER BY c.id
--# harmless one field of a row
SELECT (c).email FROM app.customers c ORDER BY c.id
--# harmless a row of a subquery
SELECT x FROM (SELECT * FROM app.customers) x
--# harmless a field of a row of a subquery
SELECT ((x.r)).email FROM (SELECT c AS r FROM app.customers c) x
--# harmless ROW()
SELECT ROW(c.*) FROM app.customers c
--# harmless ROW() of columns
SELECT ROW(id, email) FROM app.customers
--# harmless a row as text
SELECT c::text FROM app.customers c
--# harmless an array
SELECT ARRAY[email] FROM app.customers
--# harmless an array of a subquery
SELECT ARRAY(SELECT email FROM app.customers ORDER BY id)
--# harmless an element of it
SELECT (ARRAY(SELECT email FROM app.customers ORDER BY id))[1]
--# harmless array_agg
SELECT array_agg(email ORDER BY id) FROM app.customers
--# harmless string_agg
SELECT string_agg(email, ',' ORDER BY id) FROM app.customers
--# harmless a scalar subquery
SELECT (SELECT email FROM app.customers WHERE id = 1)
--# harmless a correlated subquery
SELECT (SELECT email FROM app.customers c WHERE c.id = o.customer) FROM app.orders o
--# harmless LATERAL
SELECT l.e FROM app.customers c, LATERAL (SELECT c.email AS e) l
--# harmless LATERAL VALUES
SELECT v.x FROM app.customers c, LATERAL (VALUES (c.email)) v(x)
--# harmless a CTE, materialized
WITH x(a) AS MATERIALIZED (SELECT email FROM app.customers) SELECT a FROM x
--# harmless a CTE with new names
WITH x(plain) AS (SELECT email FROM app.customers) SELECT plain FROM x
--# harmless a recursive CTE
WITH RECURSIVE r(i, e) AS (SELECT 1, email FROM app.customers WHERE id = 1 UNION ALL SELECT i + 1, e FROM r WHERE i < 3) SELECT e FROM r
--# harmless a recursive CTE that brings it in later
WITH RECURSIVE r(i, e) AS (SELECT 1, 'x'::text UNION ALL SELECT i + 1, (SELECT email FROM app.customers c WHERE c.id = i) FROM r WHERE i < 5) SELECT e FROM r
--# harmless two CTEs of the same name at two levels
WITH x AS (SELECT 'a'::text AS email) SELECT * FROM (WITH x AS (SELECT email FROM app.customers) SELECT * FROM x) y, x
--# harmless UNION
SELECT email FROM app.customers UNION ALL SELECT 'x'
--# harmless UNION the other way round
SELECT 'x' UNION ALL SELECT email FROM app.customers
--# harmless UNION in another column's place
SELECT plain, email FROM app.customers UNION ALL SELECT email, plain FROM app.customers
--# harmless EXCEPT
SELECT email FROM app.customers EXCEPT SELECT 'x'
--# harmless INTERSECT tells whether a guess is right
SELECT email FROM app.customers INTERSECT SELECT 'kanari-a1@mail.example'
--# harmless NATURAL JOIN
SELECT * FROM app.customers NATURAL JOIN (SELECT id, email FROM app.customers) x
--# harmless JOIN USING a masked column
SELECT email FROM app.customers a JOIN app.customers b USING (email)
--# harmless JOIN USING with an alias
SELECT j.email FROM app.customers a JOIN app.customers b USING (email) AS j
--# harmless FULL JOIN USING
SELECT email FROM app.customers a FULL JOIN app.customers b USING (email)
--# harmless columns renamed by the table's alias
SELECT c3 FROM app.customers AS t(c1, c2, c3)
--# harmless columns swapped by the table's alias
SELECT plain FROM app.customers AS t(id, name, plain, email)
--# harmless columns of a join renamed
SELECT j.a3 FROM (app.customers a JOIN app.orders o ON o.customer = a.id) AS j(a1, a2, a3)
--# harmless a materialized view
SELECT * FROM app.mat
--# harmless ONLY
SELECT email FROM ONLY app.customers
--# harmless a partitioned table
SELECT * FROM app.parted
--# harmless a partition
SELECT * FROM app.parted_rest
--# harmless another schema
SELECT * FROM secret.ledger, secret.keys
--# harmless a view over it
SELECT * FROM app.window_to_secret
--# harmless a view of everything
SELECT * FROM app.everything
--# harmless a table under row security
SELECT * FROM app.guarded
--# harmless ROWS FROM
SELECT * FROM app.customers c, ROWS FROM (unnest(c.tags), generate_series(1, 2)) u
--# harmless unnest
SELECT unnest(tags) FROM app.customers
--# harmless unnest in FROM
SELECT u FROM app.customers, unnest(tags) u
--# harmless an element of an array
SELECT tags[1] FROM app.customers
--# harmless a slice of an array
SELECT tags[1:1] FROM app.customers
--# harmless a field of a composite
SELECT (extra).b FROM app.customers
--# harmless all fields of a composite
SELECT (extra).* FROM app.customers
--# harmless a field of JSON
SELECT doc->>'mail' FROM app.customers
--# harmless a path of JSON
SELECT doc #>> '{nested,1}' FROM app.customers
--# harmless a subscript of JSON
SELECT doc['mail'] FROM app.customers
--# harmless jsonb_each
SELECT e.* FROM app.customers, jsonb_each_text(doc) e
--# harmless jsonb_path_query
SELECT jsonb_path_query(doc, '$.mail') FROM app.customers
--# harmless jsonb_to_record
SELECT r.* FROM app.customers c, jsonb_to_record(c.doc) AS r(mail text)
--# harmless jsonb_populate_record
SELECT (jsonb_populate_record(NULL::app.customers, to_jsonb(c))).email FROM app.customers c
--# harmless XMLTABLE
SELECT x.* FROM app.customers c, XMLTABLE('/a' PASSING xmlelement(name a, c.email) COLUMNS e text PATH '.') x
--# harmless xmlforest
SELECT xmlforest(email, card) FROM app.customers
--# harmless xmlelement
SELECT xmlelement(name x, xmlattributes(email)) FROM app.customers
--# harmless row_to_json
SELECT row_to_json(c) FROM app.customers c
--# harmless to_jsonb
SELECT to_jsonb(c) ->> 'email' FROM app.customers c
--# harmless to_jsonb less a key
SELECT to_jsonb(c) - 'id' FROM app.customers c
--# harmless json_agg
SELECT json_agg(c) FROM app.customers c
--# harmless json_build_object
SELECT json_build_object('e', email) FROM app.customers
--# harmless jsonb_object_agg with the value as a key
SELECT jsonb_object_agg(email, id) FROM app.customers
--# harmless hstore of a row
SELECT hstore(c) FROM app.customers c
--# harmless each of hstore
SELECT (each(hstore(c))).value FROM app.customers c
--# harmless a join by equality of whole rows
SELECT a FROM app.customers a JOIN app.customers b ON a = b

-- Expressions.
--# harmless a piece
SELECT substr(email, 1, 6) FROM app.customers
--# harmless a character
SELECT ascii(substr(email, 1, 1)) FROM app.customers
--# harmless the length
SELECT length(email) FROM app.customers
--# harmless reversed
SELECT reverse(email) FROM app.customers
--# harmless in capitals
SELECT upper(email) FROM app.customers
--# harmless in base64
SELECT encode(convert_to(email, 'UTF8'), 'base64') FROM app.customers
--# harmless in hex
SELECT encode(big, 'hex') FROM app.customers
--# harmless a hash that can be looked up
SELECT md5(email) FROM app.customers
--# harmless concatenated
SELECT 'x' || email FROM app.customers
--# harmless concat
SELECT concat(plain, email), concat_ws('-', plain, card), format('%s', email) FROM app.customers
--# harmless translated
SELECT translate(email, 'abcdefghijklm', 'nopqrstuvwxyz') FROM app.customers
--# harmless cast to bytes
SELECT email::bytea FROM app.customers
--# harmless cast to name and back
SELECT email::name::text FROM app.customers
--# harmless a number plus
SELECT salary + 1, balance - 1, -balance, balance * 1.0 FROM app.customers
--# harmless a number as text
SELECT salary::text, to_char(salary, '999999999') FROM app.customers
--# harmless a number's digits
SELECT balance / 10, balance % 10 FROM app.customers
--# harmless max
SELECT max(email), min(salary), sum(balance), avg(balance) FROM app.customers
--# harmless one value's max
SELECT max(email) FROM app.customers GROUP BY id
--# harmless window functions
SELECT first_value(email) OVER (ORDER BY id), lag(email) OVER (ORDER BY id) FROM app.customers
--# harmless mode and percentiles
SELECT mode() WITHIN GROUP (ORDER BY email), percentile_disc(0.5) WITHIN GROUP (ORDER BY salary) FROM app.customers
--# harmless rank of a guess
SELECT rank('kanari-a') WITHIN GROUP (ORDER BY email) FROM app.customers
--# harmless CASE
SELECT CASE WHEN email LIKE 'kanari-a%' THEN 1 ELSE 2 END FROM app.customers
--# harmless CASE with an operand
SELECT CASE email WHEN 'kanari-a1@mail.example' THEN 'yes' ELSE 'no' END FROM app.customers
--# harmless a comparison
SELECT email > 'l', email = 'kanari-a1@mail.example', email IS NULL FROM app.customers
--# harmless NULLIF
SELECT NULLIF(email, 'kanari-a1@mail.example') IS NULL FROM app.customers
--# harmless COALESCE
SELECT coalesce(NULL, email), greatest(email, ''), least(email, 'zzz') FROM app.customers
--# harmless LIKE in the select list
SELECT email LIKE 'kanari-a%', email ~ '^k', email SIMILAR TO 'k%' FROM app.customers
--# harmless a match
SELECT regexp_matches(email, '(.*)@'), regexp_replace(email, '@.*', '') FROM app.customers
--# harmless rows by a match
SELECT regexp_split_to_table(email, '') FROM app.customers
--# harmless strpos
SELECT strpos(email, 'k'), position('-' in email) FROM app.customers
--# harmless text search
SELECT to_tsvector(email), to_tsvector(email) @@ 'kanari' FROM app.customers
--# harmless similarity by hstore
SELECT akeys(hstore(email, 'x')) FROM app.customers
--# harmless a range of a value
SELECT int4range(balance, balance + 1) FROM app.customers
--# harmless generate_series by a value
SELECT generate_series(1, length(email)) FROM app.customers
--# harmless generate_series in FROM
SELECT count(*) FROM app.customers, generate_series(1, length(email))
--# harmless repeat
SELECT length(repeat('x', length(email))) FROM app.customers
--# harmless EXISTS
SELECT EXISTS (SELECT 1 FROM app.customers WHERE email LIKE 'kanari-a%')
--# harmless IN
SELECT 'kanari-a1@mail.example' IN (SELECT email FROM app.customers)
--# harmless ANY
SELECT 'kanari-a' < ANY (SELECT email FROM app.customers)
--# harmless ALL
SELECT 'kanari-a' < ALL (SELECT email FROM app.customers)
--# harmless row comparison
SELECT (1, 'kanari-a') < (id, email) FROM app.customers
--# harmless count with a filter
SELECT count(*) FILTER (WHERE email LIKE 'kanari-a%') FROM app.customers
--# harmless count of distinct values
SELECT count(DISTINCT left(email, 8)) FROM app.customers
--# harmless count of a CASE
SELECT count(CASE WHEN email LIKE 'kanari-a%' THEN 1 END) FROM app.customers
--# harmless bool_or
SELECT bool_or(email LIKE 'kanari-a%'), every(salary > 80000000) FROM app.customers

-- Beside the select list.
--# harmless WHERE
SELECT id FROM app.customers WHERE email LIKE 'kanari-a%'
--# harmless WHERE by equality
SELECT count(*) FROM app.customers WHERE email = 'nobody@mail.example'
--# harmless WHERE with a range
SELECT count(*) FROM app.customers WHERE salary BETWEEN 70000000 AND 80000000
--# harmless WHERE by a whole row
SELECT count(*) FROM app.customers c WHERE c::text LIKE '%kanari-a%'
--# harmless WHERE by a row's JSON
SELECT count(*) FROM app.customers c WHERE to_jsonb(c)->>'email' LIKE 'kanari-a%'
--# harmless WHERE through a subquery's alias
SELECT count(*) FROM (SELECT email AS plain FROM app.customers) x WHERE plain LIKE 'kanari-a%'
--# harmless WHERE through a view's alias
SELECT count(*) FROM app.emails WHERE contact LIKE 'kanari-a%'
--# harmless WHERE through a CTE
WITH x AS (SELECT email LIKE 'kanari-a%' AS hit FROM app.customers) SELECT count(*) FROM x WHERE hit
--# harmless HAVING
SELECT count(*) FROM app.customers HAVING max(email) > 'l'
--# harmless ORDER BY
SELECT id FROM app.customers ORDER BY email DESC
--# harmless ORDER BY an expression
SELECT id FROM app.customers ORDER BY length(email), md5(email)
--# harmless ORDER BY a number
SELECT id, email FROM app.customers ORDER BY 2 DESC
--# harmless ORDER BY in an aggregate
SELECT array_agg(id ORDER BY email) FROM app.customers
--# harmless ORDER BY in a window
SELECT id, row_number() OVER (ORDER BY balance) FROM app.customers
--# harmless PARTITION BY
SELECT id, count(*) OVER (PARTITION BY left(email, 8)) FROM app.customers
--# harmless GROUP BY an expression
SELECT count(*) FROM app.customers GROUP BY left(email, 9)
--# harmless DISTINCT
SELECT DISTINCT left(email, 9) FROM app.customers
--# harmless DISTINCT ON
SELECT DISTINCT ON (left(email, 9)) id FROM app.customers ORDER BY left(email, 9), id
--# harmless JOIN by LIKE
SELECT count(*) FROM app.customers c JOIN (VALUES ('kanari-a%')) v(p) ON c.email LIKE v.p
--# harmless JOIN with a guess
SELECT c.id FROM app.customers c JOIN (VALUES ('kanari-a1@mail.example')) v(g) ON c.email < v.g
--# harmless LIMIT
SELECT id FROM app.customers ORDER BY id LIMIT (SELECT length(email) FROM app.customers WHERE id = 1)
--# harmless OFFSET
SELECT id FROM app.customers ORDER BY id OFFSET (SELECT length(email) % 5 FROM app.customers WHERE id = 1)
--# harmless a window's frame
SELECT sum(id) OVER (ORDER BY id ROWS (SELECT length(email) % 3 FROM app.customers WHERE id = 1) PRECEDING) FROM app.customers
--# harmless TABLESAMPLE
SELECT count(*) FROM app.customers TABLESAMPLE BERNOULLI ((SELECT length(email) FROM app.customers WHERE id = 1)) REPEATABLE (1)
--# harmless a set-returning function in FROM
SELECT count(*) FROM generate_series(1, (SELECT length(email) FROM app.customers WHERE id = 1))
--# harmless JSON path with a variable
SELECT id FROM app.customers WHERE doc @? '$.mail ? (@ starts with "kanari-a")'
--# harmless an array's containment
SELECT id FROM app.customers WHERE tags @> ARRAY['kanari-a']
--# harmless a subscript by a value
SELECT (ARRAY['a','b','c'])[length(email) % 3] FROM app.customers

-- Errors and notices that would tell.
--# harmless a cast
SELECT email::int FROM app.customers
--# harmless a cast to a date
SELECT email::date FROM app.customers
--# harmless a cast to an enum
SELECT email::app.mood FROM app.customers
--# harmless a cast to regclass
SELECT email::regclass FROM app.customers
--# harmless a cast to a domain
SELECT email::app.canary_domain FROM app.customers
--# harmless a division
SELECT 1 / (balance - 77123449) FROM app.customers
--# harmless a division in CASE
SELECT CASE WHEN email LIKE 'kanari-a%' THEN 1 / 0 ELSE 1 END FROM app.customers
--# harmless a division that nobody reads
SELECT count(*) FROM (SELECT 1 / (CASE WHEN email LIKE 'kanari-a%' THEN 0 ELSE 1 END) AS x FROM app.customers OFFSET 0) y
--# harmless a subquery of several rows
SELECT (SELECT email FROM app.customers WHERE email LIKE 'kanari-a%') IS NULL
--# harmless an overflow
SELECT salary::int2 FROM app.customers
--# harmless a bad regular expression
SELECT plain ~ (email || '(') FROM app.customers
--# harmless a setting's name
SELECT current_setting(email) FROM app.customers
--# harmless a function that raises a notice
SELECT evil.leak(email) FROM app.customers
--# harmless a function that raises an error
SELECT evil.leak_error(email) FROM app.customers
--# harmless the same in WHERE
SELECT id FROM app.customers WHERE evil.leak(email)
--# harmless decode
SELECT decode(email, 'hex') FROM app.customers
--# harmless an encoding's name
SELECT convert_from('x', email) FROM app.customers
--# harmless a timestamp
SELECT to_timestamp(email, 'YYYY'), to_number(email, '9') FROM app.customers
--# harmless a JSON that is none
SELECT email::json FROM app.customers
--# harmless XML that is none
SELECT ('<' || email)::xml FROM app.customers
--# harmless a power
SELECT power(10, length(email) * 100) FROM app.customers
--# harmless time
SELECT pg_sleep(CASE WHEN email LIKE 'kanari-a%' THEN 0.01 ELSE 0 END) FROM app.customers

-- Functions that read by themselves, and places that hold copies.
--# harmless a function that returns all
SELECT * FROM evil.all_emails()
--# harmless a function that returns a row
SELECT (evil.a_customer()).email
--# harmless a function of a row
SELECT sees(c) FROM app.customers c
--# harmless functional notation
SELECT c.sees FROM app.customers c
--# harmless functional notation in brackets
SELECT (c).sees FROM app.customers c
--# harmless a constant
SELECT evil.const_leak()
--# harmless a function that runs its argument
SELECT evil.run('SELECT max(email) FROM app.customers')
--# harmless a cursor
SELECT evil.ref()
--# harmless query_to_xml
SELECT query_to_xml('SELECT email FROM app.customers', true, false, '')
--# harmless table_to_xml
SELECT table_to_xml('app.customers', true, false, '')
--# harmless ts_stat
SELECT * FROM ts_stat('SELECT to_tsvector(email) FROM app.customers')
--# harmless crosstab
SELECT * FROM crosstab('SELECT id, email, email FROM app.customers') AS t(a int, b text)
--# harmless connectby
SELECT * FROM connectby('app.customers', 'email', 'email', 'x', 0) AS t(a text, b text, c int)
--# harmless dblink
SELECT * FROM dblink('@SELF@', 'SELECT email FROM app.customers') AS t(e text)
--# harmless a foreign table
SELECT * FROM app.far
--# harmless statistics
SELECT most_common_vals, histogram_bounds FROM pg_stats WHERE schemaname = 'app'
--# harmless statistics underneath
SELECT stavalues1, stavalues2, stavalues3 FROM pg_statistic
--# harmless statistics as text
SELECT s::text FROM pg_stats s WHERE schemaname = 'app'
--# harmless extended statistics
SELECT * FROM pg_stats_ext
--# harmless statistics through a function of PostgreSQL's own
SELECT pg_catalog.array_to_string(most_common_vals::text::text[], ',') FROM pg_stats WHERE attname = 'note'
--# harmless other sessions
SELECT query FROM pg_stat_activity WHERE pid = @BUSY@
--# harmless other sessions by the function underneath
SELECT query FROM pg_stat_get_activity(NULL)
--# harmless one other session
SELECT pg_stat_get_backend_activity(s) FROM pg_stat_get_backend_idset() s
--# harmless pages
SELECT t_data FROM heap_page_items(get_raw_page('app.customers', 0))
--# harmless a page itself
SELECT get_raw_page('app.customers', 0)
--# harmless an index's page
SELECT data FROM bt_page_items('app.customers_pkey', 1)
--# harmless tuple data split
SELECT tuple_data_split('app.customers'::regclass, t_data, t_infomask, t_infomask2, t_bits) FROM heap_page_items(get_raw_page('app.customers', 0))
--# harmless the WAL
SELECT block_ref FROM pg_get_wal_records_info((pg_current_wal_flush_lsn() - 100000)::pg_lsn, pg_current_wal_flush_lsn())
--# harmless files of the server
SELECT pg_read_binary_file(pg_relation_filepath('app.customers'))
--# harmless a large object
SELECT lo_get(424242)
--# harmless a partition's bound
SELECT k FROM app.parted_one
--# harmless logical decoding
SELECT * FROM pg_logical_slot_peek_changes('x', NULL, NULL)
--# harmless dead rows' locks
SELECT * FROM pgrowlocks('app.customers')
--# harmless dblink's helpers
SELECT dblink_build_sql_insert('app.customers', '1', 1, '{1}', '{1}')
--# harmless currtid
SELECT currtid2('app.customers', '(0,1)')
--# harmless the trigger's text
SELECT email FROM app.customers WHERE id = 1 FOR UPDATE

-- [rw] Copies by writing; the source is read-write.
--# refused [rw] INSERT ... SELECT
INSERT INTO app.victim (what) SELECT email FROM app.customers
--# refused [rw] INSERT of an expression
INSERT INTO app.victim (what) VALUES ((SELECT left(email, 3) FROM app.customers WHERE id = 1))
--# refused [rw] INSERT of a whole row
INSERT INTO app.victim (what) SELECT c::text FROM app.customers c
--# refused [rw] UPDATE from a masked column
UPDATE app.victim v SET what = c.email FROM app.customers c WHERE c.id = v.id
--# refused [rw] UPDATE of an unmasked column of the same table
UPDATE app.customers SET plain = email
--# refused [rw] UPDATE with a subquery
UPDATE app.victim SET what = (SELECT max(email) FROM app.customers)
--# refused [rw] MERGE
MERGE INTO app.victim v USING app.customers c ON v.id = c.id WHEN MATCHED THEN UPDATE SET what = c.email
--# refused [rw] ON CONFLICT
INSERT INTO app.customers (id, name) VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET plain = app.customers.email
--# refused [rw] CREATE TABLE AS
CREATE TABLE app.stolen AS SELECT email FROM app.customers
--# refused [rw] SELECT INTO
SELECT email INTO app.stolen FROM app.customers
--# refused [rw] CREATE VIEW
CREATE VIEW app.stolen AS SELECT email FROM app.customers
--# refused [rw] CREATE MATERIALIZED VIEW
CREATE MATERIALIZED VIEW app.stolen AS SELECT email FROM app.customers
--# refused [rw] CREATE FUNCTION
CREATE FUNCTION app.stolen() RETURNS text LANGUAGE sql AS 'SELECT max(email) FROM app.customers'
--# refused [rw] renaming the column
ALTER TABLE app.customers RENAME email TO contact
--# refused [rw] renaming the table
ALTER TABLE app.customers RENAME TO people
--# refused [rw] moving the table
ALTER TABLE app.customers SET SCHEMA public
--# refused [rw] a generated column
ALTER TABLE app.customers ADD COLUMN copy text GENERATED ALWAYS AS (email) STORED
--# refused [rw] a default
ALTER TABLE app.victim ALTER what SET DEFAULT evil.const_leak()
--# refused [rw] a trigger
CREATE TRIGGER t AFTER UPDATE ON app.customers FOR EACH ROW EXECUTE FUNCTION evil.trigger_secret()
--# refused [rw] a rule
CREATE RULE r9 AS ON UPDATE TO app.customers DO ALSO INSERT INTO app.victim (what) VALUES (old.email)
--# refused [rw] DO
DO $$ BEGIN INSERT INTO app.victim (what) SELECT email FROM app.customers; END $$
--# refused [rw] CALL
CALL evil.proc()
--# refused [rw] COPY TO STDOUT
COPY app.customers TO STDOUT
--# refused [rw] COPY TO a program
COPY (SELECT email FROM app.customers) TO PROGRAM 'cat > @DIR@/stolen'
--# refused [rw] attaching it as a partition or child
ALTER TABLE app.customers INHERIT app.victim
--# refused [rw] CREATE TABLE that inherits
CREATE TABLE app.stolen () INHERITS (app.customers)
--# refused [rw] a subscription or publication
CREATE PUBLICATION stolen FOR TABLE app.customers
--# refused [rw] a policy
CREATE POLICY p9 ON app.customers USING (evil.leak(email))
--# harmless [rw] RETURNING
DELETE FROM app.customers WHERE id = -1 RETURNING email, upper(email)
--# harmless [rw] RETURNING what a constraint says
INSERT INTO app.customers (id, name, email) VALUES (1, 'x', 'y') RETURNING email
--# harmless [rw] a check that tells the row
UPDATE app.customers SET name = NULL WHERE id = 1
--# harmless [rw] a check that tells another row
UPDATE app.customers SET id = 2 WHERE id = 1
--# harmless [rw] a write whose condition tells
DELETE FROM app.victim WHERE EXISTS (SELECT FROM app.customers WHERE email LIKE 'kanari-b%')
--# harmless [rw] EXPLAIN ANALYZE
EXPLAIN ANALYZE SELECT * FROM app.customers WHERE email = 'x'
--# harmless [rw] DECLARE
DECLARE c CURSOR FOR SELECT email FROM app.customers
