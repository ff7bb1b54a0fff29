-- The tables of the generated queries: every kind of type, NULLs, ends of ranges.
CREATE EXTENSION IF NOT EXISTS hstore;
CREATE EXTENSION IF NOT EXISTS ltree;
CREATE EXTENSION IF NOT EXISTS citext;
CREATE EXTENSION IF NOT EXISTS cube;
CREATE EXTENSION IF NOT EXISTS isn;
CREATE EXTENSION IF NOT EXISTS intarray;
CREATE SCHEMA gen;
SET search_path = gen, public;
CREATE TYPE mood AS ENUM ('sad', 'so so', 'it''s "fine"');
CREATE TYPE pair AS (a int, b text);
CREATE TYPE nest AS (p pair, l int[], t timestamptz);
CREATE DOMAIN small AS int CHECK (VALUE < 1000);
CREATE DOMAIN word AS text;
CREATE TYPE floats AS RANGE (SUBTYPE = float8, SUBTYPE_DIFF = float8mi);
CREATE TABLE a (
	id int PRIMARY KEY, i2 smallint, i8 bigint, n numeric, nf numeric(12,3), f4 real, f8 double precision, b boolean,
	t text, v varchar(20), c char(6), nm name, ch "char", y bytea, u uuid,
	d date, tm time, tz timetz, ts timestamp, tstz timestamptz, iv interval,
	j json, jb jsonb, x xml, ia int[], ta text[], na numeric[], i2d int[], tsa timestamptz[], da date[], ba boolean[],
	r4 int4range, r8 int8range, rn numrange, rd daterange, rt tstzrange, mr int4multirange,
	e mood, ea mood[], p pair, pa pair[], ne nest, sm small, wo word, fr floats,
	ip inet, ci cidr, ma macaddr, m8 macaddr8, bi bit(5), bv varbit, mo money,
	pt point, ln line, ls lseg, bx box, pth path, pg polygon, cr circle,
	tv tsvector, tq tsquery, o oid, rc regclass, lsn pg_lsn, hs hstore, lt ltree, ct citext, cu cube, isb isbn13
);
INSERT INTO a SELECT i,
	(i * 4001 % 65536 - 32768)::smallint, i::bigint * 922337203685477 - 4611686018427387904, CASE i % 7 WHEN 0 THEN 'NaN' WHEN 1 THEN 'Infinity' WHEN 2 THEN '-Infinity' WHEN 3 THEN repeat('9', i)::numeric ELSE (i * 1.37)::numeric / 7 END,
	i * 3.14159, (i * 1.1)::real, CASE i % 9 WHEN 0 THEN 'NaN' WHEN 1 THEN 'Infinity' WHEN 2 THEN '-Infinity' WHEN 3 THEN '-0' ELSE i * 1e-7 END, i % 3 = 0,
	CASE i % 6 WHEN 0 THEN '' WHEN 1 THEN E'line\nbreak\ttab' WHEN 2 THEN 'quote " and '' and \' WHEN 3 THEN U&'e\0301\FEFF\202E\+01F600' ELSE 'text ' || i END, 'v' || i, 'c' || i, ('n' || i)::name, chr(65 + i % 26)::"char", decode(md5(i::text), 'hex'), md5(i::text)::uuid,
	CASE i % 8 WHEN 0 THEN 'infinity' WHEN 1 THEN '-infinity' WHEN 2 THEN '0044-03-15 BC' WHEN 3 THEN '5874897-12-31' ELSE date '2000-01-01' + i * 37 END, CASE i % 10 WHEN 0 THEN '24:00:00' ELSE time '00:00:00' + i * interval '17 min 3.000123 s' END, timetz '10:00:00+05:30' + i * interval '1 min',
	CASE i % 8 WHEN 0 THEN 'infinity' WHEN 1 THEN '-infinity' WHEN 2 THEN '0001-01-01 00:00:00 BC' ELSE timestamp '1969-12-31 23:59:59.999999' + i * interval '91 days 1.5 s' END, CASE i % 8 WHEN 1 THEN 'infinity' WHEN 2 THEN '-infinity' WHEN 3 THEN '4713-01-01 00:00:00 BC' ELSE timestamptz '1893-01-01 00:00:00+00' + i * interval '3 years 1.25 s' END,
	i * interval '1 month -2 days 3.5 seconds', ('{ "k": ' || i || ', "k":2}')::json, jsonb_build_object('n', i, 's', 't' || i, 'a', jsonb_build_array(1, NULL, 'x', 12345678901234567890.5)), ('<a n="' || i || '">&lt;</a>')::xml,
	ARRAY[i, NULL, -i], ARRAY['a,b', NULL, '', 'NULL', 'q"q', E'b\\s'], ARRAY['NaN'::numeric, i / 3.0], ARRAY[[i, 1], [NULL, 2]], ARRAY['infinity'::timestamptz, '2001-02-03 04:05:06+00'], ARRAY[date '2001-02-03' + i, 'infinity'], ARRAY[true, NULL, false],
	int4range(i, i + 10), int8range(NULL, i), numrange(i, NULL, '()'), daterange('2001-01-01', 'infinity', '[]'), tstzrange('2001-01-01 00:00:00+00', NULL), int4multirange(int4range(i, i + 2), int4range(i + 5, i + 6)),
	(ARRAY['sad', 'so so', 'it''s "fine"'])[1 + i % 3]::mood, ARRAY['sad', NULL, 'it''s "fine"']::mood[], ROW(i, 'a"b,c(d)')::pair, ARRAY[ROW(i, NULL)::pair, NULL, ROW(NULL, '')::pair], ROW(ROW(i, 'x')::pair, ARRAY[1, i], '2001-02-03 04:05:06+00')::nest, i % 1000, 'word ' || i, floats(i * 0.5, 'Infinity'),
	('10.0.' || i % 256 || '.1/24')::inet, ('10.0.' || i % 256 || '.0/24')::cidr, ('08:00:2b:01:02:' || lpad(to_hex(i % 256), 2, '0'))::macaddr, '08:00:2b:01:02:03:04:05', (i % 32)::bit(5), ((i % 128)::bit(7))::varbit, i::money / 7,
	point(i, -i / 3.0), line(point(0, i), point(1, 2)), lseg(point(0, 0), point(i, 1)), box(point(0, 0), point(i, i)), path '((0,0),(1,1),(2,0))', polygon '((0,0),(1,1),(2,0))', circle(point(i, 0), 1.5),
	to_tsvector('english', 'The fat cats number ' || i), to_tsquery('english', 'cat & !dog | rat:*'), i::oid, 'pg_class'::regclass, pg_lsn '0/16' + i, hstore('k' || i, NULL) || 'a=>"b c"', ('a.b' || i)::ltree, 'Mixed' || i, cube(ARRAY[i, 1], ARRAY[i + 1, 2]), '978-0-306-40615-7'
FROM generate_series(1, 40) i;
INSERT INTO a (id) SELECT 1000 + i FROM generate_series(1, 4) i;
CREATE TABLE b (id int, k int, g text, val numeric, f float8, at timestamptz, day date, flag boolean, arr int[], doc jsonb);
INSERT INTO b SELECT i, i % 11, (ARRAY['red', 'green', 'blue', NULL])[1 + i % 4], CASE WHEN i % 13 = 0 THEN NULL ELSE i * 1.25 - 50 END, CASE WHEN i % 17 = 0 THEN 'NaN' ELSE i / 8.0 END,
	timestamptz '2024-01-01 00:00:00+00' + i * interval '7 hours 11 min', date '2024-01-01' + i, CASE i % 3 WHEN 0 THEN true WHEN 1 THEN false END, ARRAY[i, i % 5, i % 3], jsonb_build_object('g', i % 4, 'l', jsonb_build_array(i, i + 1))
FROM generate_series(1, 120) i;
ANALYZE;
