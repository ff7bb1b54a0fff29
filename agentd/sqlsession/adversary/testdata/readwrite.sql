-- What a read-write source with limits must survive: write.schemas is [app], write.statements is
-- [insert, update, delete, merge]; where the reason starts with [ddl] all kinds are allowed, in app alone.
-- "runs" may change tables and sequences of app, and nothing else.

--# runs INSERT
INSERT INTO app.victim (what) VALUES ('inserted')
--# runs INSERT ... RETURNING
INSERT INTO app.victim (what) SELECT plain FROM app.customers WHERE id < 3 RETURNING id, what
--# runs INSERT ... ON CONFLICT
INSERT INTO app.victim (id, what) VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET what = excluded.what
--# runs UPDATE
UPDATE app.victim SET what = what || '!' WHERE id = 1
--# runs UPDATE ... FROM
UPDATE app.victim v SET what = c.plain FROM app.customers c WHERE c.id = v.id
--# runs DELETE
DELETE FROM app.victim WHERE id > 1000
--# runs DELETE ... USING
DELETE FROM app.victim v USING app.customers c WHERE v.id = c.id + 5000
--# runs MERGE
MERGE INTO app.victim v USING (SELECT 1 AS i) s ON v.id = s.i WHEN MATCHED THEN UPDATE SET what = 'merged' WHEN NOT MATCHED THEN INSERT (what) VALUES ('new')
--# runs DML in WITH
WITH gone AS (DELETE FROM app.victim WHERE id > 2000 RETURNING id), kept AS (INSERT INTO app.victim (what) VALUES ('cte') RETURNING id) SELECT * FROM gone, kept
--# runs reading any schema
SELECT count(*) FROM secret.ledger
--# runs writing what another schema tells
INSERT INTO app.victim (what) SELECT holder FROM secret.ledger
--# runs a serial column's default
INSERT INTO app.victim DEFAULT VALUES
--# runs an identity column
INSERT INTO app.orders (customer, amount) VALUES (1, 2.5) RETURNING id
--# runs a partitioned table
INSERT INTO app.parted VALUES ('other', 1)
--# runs reading
SELECT c.id, o.amount, now(), upper(c.plain) FROM app.customers c JOIN app.orders o ON o.customer = c.id
--# runs row locks
SELECT * FROM app.victim FOR UPDATE
--# runs [ddl] CREATE TABLE
CREATE TABLE app.fresh (id int PRIMARY KEY, what text)
--# runs [ddl] ALTER TABLE
ALTER TABLE app.fresh ADD COLUMN more int DEFAULT 5
--# runs [ddl] CREATE INDEX
CREATE INDEX fresh_what ON app.fresh (what)
--# runs [ddl] COMMENT
COMMENT ON TABLE app.fresh IS 'new'
--# runs [ddl] CREATE VIEW
CREATE VIEW app.fresh_view AS SELECT id FROM app.fresh
--# runs [ddl] TRUNCATE
TRUNCATE app.fresh
--# runs [ddl] DROP
DROP VIEW app.fresh_view
--# runs [ddl] CREATE TABLE AS
CREATE TABLE app.fresh2 AS SELECT id FROM app.customers
--# runs [ddl] DROP of two
DROP TABLE app.fresh, app.fresh2

-- Other schemas.
--# refused INSERT elsewhere
INSERT INTO secret.ledger VALUES (2, 'x', 1)
--# refused UPDATE elsewhere
UPDATE secret.ledger SET amount = 0
--# refused DELETE elsewhere
DELETE FROM secret.ledger
--# refused MERGE elsewhere
MERGE INTO secret.ledger l USING (SELECT 1 AS i) s ON l.id = s.i WHEN MATCHED THEN DELETE
--# refused MERGE that does nothing elsewhere
MERGE INTO secret.ledger l USING (SELECT 1 AS i) s ON l.id = s.i WHEN MATCHED THEN DO NOTHING
--# refused in quotes
INSERT INTO "secret"."ledger" VALUES (2, 'x', 1)
--# refused in Unicode escapes
DELETE FROM U&"\0073ecret"."ledger"
--# refused with its database
DELETE FROM @DB@.secret.ledger
--# refused with ONLY
DELETE FROM ONLY secret.ledger
--# refused with a star
UPDATE secret.ledger * SET amount = 0
--# refused with an alias like an allowed name
UPDATE secret.ledger AS app SET amount = 0
--# refused in WITH
WITH x AS (DELETE FROM secret.ledger RETURNING *) SELECT * FROM x
--# refused in WITH before an allowed INSERT
WITH x AS (DELETE FROM secret.ledger RETURNING holder) INSERT INTO app.victim (what) SELECT holder FROM x
--# refused in WITH that nobody reads
WITH x AS (UPDATE secret.ledger SET amount = 0) INSERT INTO app.victim (what) VALUES ('x')
--# refused in WITH of a DELETE
WITH x AS (INSERT INTO secret.ledger VALUES (3, 'x', 1) RETURNING id) DELETE FROM app.victim WHERE id IN (SELECT id FROM x)
--# refused in WITH of a MERGE
WITH x AS (DELETE FROM secret.ledger RETURNING id) MERGE INTO app.victim v USING x ON v.id = x.id WHEN MATCHED THEN DELETE
--# refused recursion beside
WITH RECURSIVE r(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM r WHERE i < 2), x AS (DELETE FROM secret.ledger) SELECT * FROM r
--# refused a view over another schema's table
UPDATE app.window_to_secret SET amount = 0
--# refused INSERT through such a view
INSERT INTO app.window_to_secret VALUES (9, 'x', 1)
--# refused DELETE through such a view
DELETE FROM app.window_to_secret
--# refused a rule that writes elsewhere
INSERT INTO app.ruled VALUES (77)
--# refused a view with an INSTEAD rule that writes elsewhere
INSERT INTO app.instead VALUES (1)
--# refused a trigger that writes elsewhere
INSERT INTO app.triggered VALUES (78)
--# refused the catalog
UPDATE pg_catalog.pg_class SET relname = 'x' WHERE relname = 'customers'
--# refused the catalog without its schema
DELETE FROM pg_statistic
--# refused roles through the catalog
UPDATE pg_authid SET rolsuper = true
--# refused settings through the view
UPDATE pg_settings SET setting = '1MB' WHERE name = 'work_mem'
--# refused information_schema
INSERT INTO information_schema.sql_features VALUES ('x')
--# refused large objects through the catalog
DELETE FROM pg_largeobject
--# fails a temporary name in front: there is none
INSERT INTO pg_temp.x VALUES (1)
--# refused a table in public
INSERT INTO public.nothing_here VALUES (1)
--# refused a foreign table: it is another server
INSERT INTO app.far VALUES (2, 'x')
--# refused UPDATE of a foreign table
UPDATE app.far SET what = 'x'
--# refused DELETE of a foreign table
DELETE FROM app.far
--# refused a foreign table among children
DELETE FROM app.inherited
--# refused a view of a foreign table
UPDATE app.far_view SET what = 'x'
--# refused TRUNCATE of a foreign table
TRUNCATE app.far
--# refused reading a foreign table that runs a program
INSERT INTO app.victim (what) SELECT x FROM app.run_program

-- Kinds of statements.
--# refused TRUNCATE
TRUNCATE app.victim
--# refused CREATE TABLE
CREATE TABLE app.mine (i int)
--# refused CREATE TABLE AS
CREATE TABLE app.mine AS SELECT 1
--# refused SELECT INTO
SELECT 1 AS i INTO app.mine
--# refused CREATE TEMP TABLE
CREATE TEMP TABLE mine (i int)
--# refused CREATE TEMP TABLE AS
CREATE TEMP TABLE mine AS SELECT 1
--# refused DROP
DROP TABLE app.victim
--# refused ALTER
ALTER TABLE app.victim ADD COLUMN more int
--# refused CREATE INDEX
CREATE INDEX ON app.victim (what)
--# refused CREATE VIEW
CREATE VIEW app.v AS SELECT 1
--# refused CREATE FUNCTION
CREATE FUNCTION app.f() RETURNS int LANGUAGE sql AS 'SELECT 1'
--# refused COMMENT
COMMENT ON TABLE app.victim IS 'x'
--# refused CALL
CALL evil.proc()
--# refused DO
DO $$ BEGIN DELETE FROM secret.ledger; END $$
--# refused GRANT
GRANT ALL ON app.victim TO PUBLIC
--# refused VACUUM
VACUUM app.victim
--# refused REFRESH
REFRESH MATERIALIZED VIEW app.mat
--# refused EXPLAIN ANALYZE of a write
EXPLAIN ANALYZE DELETE FROM secret.ledger
--# refused EXPLAIN ANALYZE of an allowed one
EXPLAIN (ANALYZE) INSERT INTO app.victim (what) VALUES ('x')
--# refused PREPARE
PREPARE p AS DELETE FROM secret.ledger
--# refused EXECUTE
EXECUTE p
--# refused DECLARE
DECLARE c CURSOR WITH HOLD FOR SELECT 1
--# refused COPY FROM
COPY secret.ledger FROM STDIN
--# refused COPY FROM a program
COPY app.victim (what) FROM PROGRAM 'echo x; touch @DIR@/program'
--# refused COPY FROM a file
COPY app.victim (what) FROM '/etc/hostname'
--# refused COPY TO a file
COPY app.victim TO '@DIR@/file'
--# refused COPY TO a program
COPY (SELECT 1) TO PROGRAM 'touch @DIR@/program'
--# refused COPY of a write
COPY (DELETE FROM secret.ledger RETURNING *) TO STDOUT
--# refused two statements
INSERT INTO app.victim (what) VALUES ('x'); DELETE FROM secret.ledger
--# refused two statements with a comment
UPDATE app.victim SET what = 'x' /* ; */; DROP TABLE app.victim --
--# refused COMMIT in front
COMMIT; DELETE FROM secret.ledger
--# refused BEGIN
BEGIN
--# refused COMMIT
COMMIT
--# refused ROLLBACK
ROLLBACK
--# refused SAVEPOINT
SAVEPOINT s
--# refused PREPARE TRANSACTION
PREPARE TRANSACTION 'x'
--# refused SET
SET search_path = secret
--# refused SET ROLE
SET ROLE bystander
--# refused RESET
RESET ALL
--# refused LISTEN
LISTEN x
--# refused NOTIFY
NOTIFY canary_channel
--# refused LOAD
LOAD 'auto_explain'
--# refused LOCK of another schema
LOCK TABLE secret.ledger IN ACCESS EXCLUSIVE MODE
--# refused ALTER SYSTEM
ALTER SYSTEM SET work_mem = '7MB'
--# refused CHECKPOINT
CHECKPOINT
--# refused SECURITY LABEL
SECURITY LABEL ON TABLE app.victim IS NULL
--# refused SET CONSTRAINTS
SET CONSTRAINTS ALL DEFERRED
--# refused REASSIGN
REASSIGN OWNED BY root TO bystander
--# refused DISCARD
DISCARD ALL

-- Functions that write elsewhere, or outside of the transaction.
--# refused a function that runs its argument
SELECT evil.run('DELETE FROM secret.ledger')
--# refused the same in an allowed statement
INSERT INTO app.victim (what) VALUES (evil.run('DELETE FROM secret.ledger RETURNING holder'))
--# refused the same in a condition
UPDATE app.victim SET what = 'x' WHERE evil.run('DELETE FROM secret.ledger RETURNING 1') IS NULL
--# refused the same in RETURNING
DELETE FROM app.victim WHERE id = 99999 RETURNING evil.run('DELETE FROM secret.ledger RETURNING holder')
--# refused the same in MERGE's action
MERGE INTO app.victim v USING (SELECT 1 AS i) s ON v.id = s.i WHEN MATCHED THEN UPDATE SET what = evil.run('DELETE FROM secret.ledger RETURNING holder')
--# refused the same in ON CONFLICT
INSERT INTO app.victim (id, what) VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET what = evil.run('DELETE FROM secret.ledger RETURNING holder')
--# refused dblink
SELECT dblink_exec('@SELF@', 'DELETE FROM secret.ledger')
--# refused dblink to another server
SELECT dblink_exec('@OTHER@', 'DELETE FROM there')
--# refused dblink in a default
INSERT INTO app.computed (id) VALUES (1)
--# refused a program in a function
SELECT evil.program()
--# refused lo_unlink
SELECT lo_unlink(424242)
--# refused lo_export
SELECT lo_export(424242, '@DIR@/lo')
--# refused setval elsewhere
SELECT setval('app.counter', 1) FROM pg_sequence, secret.keys WHERE evil.outside() = 1
--# refused ending another backend
SELECT pg_terminate_backend(@SENTINEL@)
--# refused cancelling another's statement
SELECT pg_cancel_backend(@BUSY@)
--# refused writing a file
SELECT pg_file_write('@DIR@/x', 'x', false)
--# refused reading a file
SELECT pg_read_file('/etc/passwd')
--# refused reload
SELECT pg_reload_conf()
--# refused a slot
SELECT pg_create_physical_replication_slot('canary', true)
--# harmless set_config, which the reset takes back
SELECT set_config('search_path', 'secret', false)
--# refused set_config of the role
SELECT set_config('role', 'bystander', true)
--# refused pg_notify
SELECT pg_notify('canary_channel', 'x')
--# refused statistics
SELECT pg_stat_reset()
--# refused an advisory lock of the session
SELECT pg_advisory_lock(1)
--# refused query_to_xml
SELECT query_to_xml('DELETE FROM secret.ledger RETURNING *', true, false, '')
--# refused crosstab
SELECT * FROM crosstab('DELETE FROM secret.ledger RETURNING holder, holder, holder') AS t(a text, b text)
--# refused ts_stat
SELECT * FROM ts_stat('WITH x AS (DELETE FROM secret.ledger RETURNING holder) SELECT to_tsvector(holder) FROM x')
--# refused pg_surgery
SELECT heap_force_kill('secret.ledger'::regclass, ARRAY['(0,1)']::tid[])
--# refused an operator
UPDATE app.victim SET what = 'x' WHERE id @@@ 1
--# refused a cast
UPDATE app.victim SET what = 'x' WHERE id = (5::evil.shape).x
--# refused an aggregate
INSERT INTO app.victim (what) SELECT evil.agg(id)::text FROM app.customers
--# refused a domain's check
INSERT INTO app.victim (what) VALUES (5::evil.dom::text)
--# refused a domain in an array's literal
INSERT INTO app.victim (what) VALUES ('{5}'::evil.dom[]::text)
--# refused a domain's literal of a column
UPDATE evil.dom_table SET a = '{5}'
--# refused a domain's literal in a condition
DELETE FROM app.victim WHERE id = (SELECT 1 FROM evil.dom_table WHERE a = '{5}')
--# refused a domain's literal in COALESCE
INSERT INTO app.victim (what) SELECT coalesce(a, '{5}')::text FROM evil.dom_table
--# refused a view with a trap
INSERT INTO app.victim (what) SELECT x::text FROM app.trap_column
--# refused lower(varchar) in public
UPDATE app.victim SET what = lower(name) FROM app.customers c WHERE c.id = app.victim.id
--# refused a field that is a function
INSERT INTO app.victim (what) SELECT c.of_customer::text FROM app.customers c

-- [ddl] Everything in app, nothing elsewhere.
--# refused [ddl] CREATE TABLE elsewhere
CREATE TABLE secret.mine (i int)
--# refused [ddl] CREATE TABLE without a schema
CREATE TABLE mine (i int)
--# refused [ddl] CREATE TABLE AS elsewhere
CREATE TABLE secret.mine AS SELECT 1
--# refused [ddl] SELECT INTO elsewhere
SELECT 1 AS i INTO secret.mine
--# refused [ddl] DROP elsewhere
DROP TABLE secret.ledger
--# refused [ddl] DROP of one here and one elsewhere
DROP TABLE app.doomed, secret.ledger
--# refused [ddl] DROP SCHEMA
DROP SCHEMA secret CASCADE
--# refused [ddl] DROP of the allowed schema itself
DROP SCHEMA app CASCADE
--# refused [ddl] ALTER SCHEMA
ALTER SCHEMA secret RENAME TO app2
--# refused [ddl] CREATE SCHEMA with tables
CREATE SCHEMA intruder CREATE TABLE t (i int)
--# refused [ddl] ALTER elsewhere
ALTER TABLE secret.ledger ADD COLUMN x int
--# refused [ddl] moving a table out
ALTER TABLE app.doomed SET SCHEMA secret
--# refused [ddl] moving a table in
ALTER TABLE secret.ledger SET SCHEMA app
--# refused [ddl] TRUNCATE elsewhere
TRUNCATE secret.ledger
--# refused [ddl] TRUNCATE of both
TRUNCATE app.doomed, secret.ledger
--# refused [ddl] CREATE INDEX elsewhere
CREATE INDEX ON secret.ledger (holder)
--# refused [ddl] CREATE TRIGGER elsewhere
CREATE TRIGGER t BEFORE INSERT ON secret.ledger FOR EACH ROW EXECUTE FUNCTION evil.trigger_secret()
--# refused [ddl] CREATE TRIGGER that runs another schema's function
CREATE TRIGGER t2 BEFORE INSERT ON app.victim FOR EACH ROW EXECUTE FUNCTION evil.trigger_secret()
--# refused [ddl] CREATE RULE that writes elsewhere
CREATE RULE r2 AS ON INSERT TO app.victim DO ALSO DELETE FROM secret.ledger
--# refused [ddl] CREATE FUNCTION that could do anything
CREATE FUNCTION app.anything() RETURNS int LANGUAGE plpgsql AS $$ BEGIN DELETE FROM secret.ledger; RETURN 1; END $$
--# refused [ddl] CREATE FUNCTION in C
CREATE FUNCTION app.system(text) RETURNS int LANGUAGE c AS '/lib/x86_64-linux-gnu/libc.so.6', 'system'
--# refused [ddl] CREATE FUNCTION of an internal one
CREATE FUNCTION app.kill(int, bigint) RETURNS boolean LANGUAGE internal AS 'pg_terminate_backend'
--# refused [ddl] CREATE PROCEDURE
CREATE PROCEDURE app.p() LANGUAGE plpgsql AS $$ BEGIN COMMIT; END $$
--# refused [ddl] CREATE EXTENSION
CREATE EXTENSION isn SCHEMA app
--# refused [ddl] DROP EXTENSION
DROP EXTENSION dblink CASCADE
--# refused [ddl] CREATE LANGUAGE
CREATE LANGUAGE plperlu
--# refused [ddl] CREATE ROLE
CREATE ROLE intruder SUPERUSER
--# refused [ddl] ALTER ROLE
ALTER ROLE root PASSWORD 'x'
--# refused [ddl] DROP ROLE
DROP ROLE bystander
--# refused [ddl] GRANT of a role
GRANT bystander TO member
--# refused [ddl] GRANT elsewhere
GRANT ALL ON ALL TABLES IN SCHEMA secret TO PUBLIC
--# refused [ddl] ALTER DEFAULT PRIVILEGES
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO PUBLIC
--# refused [ddl] ALTER OWNER
ALTER TABLE app.doomed OWNER TO bystander
--# refused [ddl] CREATE DATABASE
CREATE DATABASE intruder
--# refused [ddl] ALTER DATABASE
ALTER DATABASE alpha SET work_mem = '1MB'
--# refused [ddl] CREATE TABLESPACE
CREATE TABLESPACE t LOCATION '@DIR@'
--# refused [ddl] CREATE SERVER
CREATE SERVER s2 FOREIGN DATA WRAPPER postgres_fdw
--# refused [ddl] ALTER SERVER
ALTER SERVER other OPTIONS (SET host 'elsewhere')
--# refused [ddl] CREATE USER MAPPING
CREATE USER MAPPING FOR root SERVER other
--# refused [ddl] CREATE FOREIGN TABLE that runs a program
CREATE FOREIGN TABLE app.program (x text) SERVER files OPTIONS (program 'touch @DIR@/ddl')
--# refused [ddl] IMPORT FOREIGN SCHEMA
IMPORT FOREIGN SCHEMA public FROM SERVER other INTO app
--# refused [ddl] CREATE EVENT TRIGGER
CREATE EVENT TRIGGER e ON ddl_command_end EXECUTE FUNCTION evil.trigger_secret()
--# refused [ddl] CREATE PUBLICATION
CREATE PUBLICATION p2 FOR ALL TABLES
--# refused [ddl] CREATE SUBSCRIPTION
CREATE SUBSCRIPTION s CONNECTION '@OTHER@' PUBLICATION p WITH (connect = false)
--# refused [ddl] CREATE CAST
CREATE CAST (text AS int) WITH INOUT AS IMPLICIT
--# refused [ddl] CREATE OPERATOR elsewhere
CREATE OPERATOR public.### (LEFTARG = int, RIGHTARG = int, FUNCTION = int4eq)
--# refused [ddl] CREATE POLICY elsewhere
CREATE POLICY x ON secret.ledger USING (true)
--# refused [ddl] DROP POLICY elsewhere
ALTER TABLE secret.ledger ENABLE ROW LEVEL SECURITY
--# refused [ddl] COMMENT elsewhere
COMMENT ON TABLE secret.ledger IS 'x'
--# refused [ddl] COMMENT on a database
COMMENT ON DATABASE alpha IS 'x'
--# refused [ddl] COMMENT on a role
COMMENT ON ROLE bystander IS 'x'
--# refused [ddl] DO
DO $$ BEGIN DELETE FROM secret.ledger; END $$
--# refused [ddl] CALL elsewhere
CALL evil.proc()
--# refused [ddl] ALTER SYSTEM
ALTER SYSTEM SET work_mem = '7MB'
--# fails [ddl] attaching another schema's table
ALTER TABLE app.parted ATTACH PARTITION secret.keys FOR VALUES IN ('z')
--# refused [ddl] inheriting from another schema's table
CREATE TABLE app.child () INHERITS (secret.ledger)
--# refused [ddl] CREATE STATISTICS elsewhere
CREATE STATISTICS secret.s ON holder, amount FROM secret.ledger
--# refused [ddl] CREATE SEQUENCE elsewhere
CREATE SEQUENCE secret.s
--# fails [ddl] ALTER SEQUENCE owned elsewhere
ALTER SEQUENCE app.counter OWNED BY secret.ledger.id
--# refused [ddl] CREATE TYPE elsewhere
CREATE TYPE secret.t AS (a int)
--# refused [ddl] CREATE DOMAIN with a check that acts
CREATE DOMAIN app.acting AS int CHECK (evil.outside() = 1)
--# refused [ddl] a default that acts
ALTER TABLE app.victim ALTER what SET DEFAULT evil.run('DELETE FROM secret.ledger RETURNING holder')
--# refused [ddl] an index whose expression acts
CREATE INDEX ON app.victim ((evil.file_immutable(id)))
--# refused [ddl] USING that acts
ALTER TABLE app.victim ALTER what TYPE text USING evil.run('DELETE FROM secret.ledger RETURNING holder')
--# refused [ddl] a generated column that acts
ALTER TABLE app.victim ADD COLUMN g int GENERATED ALWAYS AS (evil.file_immutable(id)) STORED
--# refused [ddl] CREATE TABLE AS with a function that acts
CREATE TABLE app.mine AS SELECT evil.outside() AS x
--# refused [ddl] REFRESH CONCURRENTLY of nothing elsewhere
REFRESH MATERIALIZED VIEW secret.nothing
--# refused [ddl] REINDEX of the system
REINDEX SYSTEM alpha
--# refused [ddl] CLUSTER of all
CLUSTER
--# refused [ddl] VACUUM of all
VACUUM
--# refused [ddl] a security definer function changed
ALTER FUNCTION evil.run(text) SECURITY DEFINER
--# refused [ddl] DROP OWNED
DROP OWNED BY bystander CASCADE
