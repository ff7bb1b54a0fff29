-- The values: @S@, @N@ and @D@ differ from world to world, everything else is the same.
INSERT INTO app.customers
SELECT i, 'name ' || i, '@S@' || i || '@mail.example', lpad('@N@', 12, '4') || lpad(i::text, 4, '0'), @N@ + i, @N@ - i, date '@D@' + i, 'ok',
	ARRAY['@S@', 'tag' || i], jsonb_build_object('mail', '@S@' || i, 'nested', jsonb_build_array('x', '@S@')), 'plain ' || i, convert_to('@S@', 'UTF8'), ROW(@N@, '@S@')::app.pair
FROM generate_series(1, 20) i;
INSERT INTO app.orders (customer, amount, note, placed) SELECT 1 + i % 20, @N@ + i, '@S@ note ' || i, timestamptz '@D@ 00:00:00+00' FROM generate_series(1, 60) i;
INSERT INTO app.victim (what) VALUES ('untouched');
INSERT INTO app.doomed SELECT i, 'doomed' FROM generate_series(1, 50) i;
INSERT INTO secret.ledger VALUES (1, '@S@', @N@);
INSERT INTO secret.keys VALUES ('key', '@S@');
INSERT INTO app.parted VALUES ('@S@', @N@);
INSERT INTO app.guarded VALUES (1, '@S@');
INSERT INTO app.readings SELECT i, @N@ FROM generate_series(1, @ROWS@) i;
ALTER TABLE app.customers ADD CONSTRAINT literal CHECK (email <> '@S@ never');
ALTER TABLE app.customers ALTER plain SET DEFAULT '@S@ default';
CREATE FUNCTION app.holds() RETURNS text LANGUAGE sql AS $$ SELECT '@S@ source'::text $$;
CREATE VIEW app.literal_view AS SELECT '@S@ view'::text AS v WHERE 1 < @N@;
CREATE FUNCTION app.defaults(a text DEFAULT '@S@ argument') RETURNS text LANGUAGE sql AS $$ SELECT $1 $$;
CREATE INDEX partial ON app.orders (id) WHERE note <> '@S@ predicate';
CREATE TABLE app.parted_one PARTITION OF app.parted FOR VALUES IN ('@S@ bound');
CREATE DOMAIN app.canary_domain AS text CHECK (VALUE <> '@S@ domain');
CREATE DOMAIN app.default_domain AS text DEFAULT '@S@ domain default';
CREATE RULE literal_rule AS ON UPDATE TO app.ruled DO ALSO DELETE FROM app.victim WHERE what = '@S@ rule';
ALTER SEQUENCE app.counter RESTART @N@;
ANALYZE;
REFRESH MATERIALIZED VIEW app.mat;
