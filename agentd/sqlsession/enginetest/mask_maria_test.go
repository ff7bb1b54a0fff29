package enginetest

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
)

// mysqlMaskSetUp is for the corpus on MySQL and MariaDB, in a database of its own.
var mysqlMaskSetUp = []string{
	"CREATE TABLE people (id INT PRIMARY KEY, name VARCHAR(40), ssn VARCHAR(40), notes BLOB, email VARCHAR(60), phone VARCHAR(40), salary DECIMAL(10,2), pin INT UNIQUE, born DATE, g VARCHAR(60) AS (CONCAT(ssn, '!')), kept VARCHAR(60) AS (UPPER(ssn)) STORED, FULLTEXT (ssn), KEY (ssn))",
	"INSERT INTO people (id, name, ssn, notes, email, phone, salary, pin, born) VALUES (1, 'ann', 'canary-1', 'canary', 'canary1@example.org', 'canary-12345', 704.25, 904711, '1991-02-11'), (2, 'bob', 'canary-2', NULL, 'canary2@example.org', 'canary-54321', 704.25, 904712, '1991-03-12'), (3, 'eve', NULL, NULL, NULL, NULL, NULL, NULL, NULL)",
	"CREATE TABLE things (id INT PRIMARY KEY, name VARCHAR(40), other VARCHAR(40))", "INSERT INTO things VALUES (1, 'one', 'o'), (2, 'two', 'o')",
	"CREATE VIEW v_all AS SELECT * FROM people", "CREATE VIEW v_alias AS SELECT id, ssn AS name, name AS ssn FROM people", "CREATE VIEW v_union AS SELECT name FROM people UNION ALL SELECT ssn FROM people", "CREATE VIEW v_nested AS SELECT name AS a FROM v_alias", "CREATE VIEW v_max AS SELECT MAX(ssn) AS name FROM people GROUP BY id", "CREATE ALGORITHM=TEMPTABLE VIEW v_temp AS SELECT ssn AS name, name AS ssn FROM people", "CREATE VIEW v_derived AS SELECT x AS name FROM (SELECT ssn AS x FROM people) t", "CREATE VIEW v_star AS SELECT COUNT(*) AS n, MIN(g) AS m FROM people",
	"CREATE TABLE plain (a VARCHAR(60))", "INSERT INTO plain VALUES ('canary-by-a-view''s-rule')", "CREATE VIEW v_rule AS SELECT a AS alias FROM plain",
	"CREATE TABLE pk (pin INT PRIMARY KEY, name VARCHAR(10))", "INSERT INTO pk VALUES (904733, 'x')", "CREATE TABLE `größe` (`ſsn` VARCHAR(20), name VARCHAR(20))", "INSERT INTO `größe` VALUES ('x', 'y')",
	"CREATE FUNCTION f_ssn() RETURNS VARCHAR(40) DETERMINISTIC READS SQL DATA RETURN (SELECT MAX(ssn) FROM people)", "CREATE VIEW v_f AS SELECT f_ssn() AS name",
}

// mysqlMaskCorpus is asked as the superuser.
var mysqlMaskCorpus = []string{
	"SELECT * FROM people", "SELECT ssn, notes, pin, born FROM people", "SELECT ssn AS name FROM people", "SELECT p.ssn AS id FROM people AS p", "SELECT people.* FROM people", "SELECT shop_mask.people.ssn FROM shop_mask.people", "SELECT `ssn`, SSN, `Ssn` FROM people", "SELECT DISTINCT * FROM people", "SELECT ALL * FROM people", "SELECT SQL_NO_CACHE * FROM people", "SELECT HIGH_PRIORITY * FROM people", "SELECT STRAIGHT_JOIN * FROM people", "SELECT SQL_BUFFER_RESULT * FROM people", "SELECT /* x */ * FROM people", "SELECT things.*, people.* FROM things, people", "SELECT 1, people.* FROM people", "SELECT p . * FROM people p",
	// expressions
	"SELECT CONCAT(ssn, '') FROM people", "SELECT (ssn) FROM people", "SELECT ((ssn)) AS name FROM people", "SELECT CAST(ssn AS CHAR), CONVERT(ssn USING utf8mb4), BINARY ssn FROM people", "SELECT ssn COLLATE utf8mb4_bin FROM people", "SELECT UPPER(ssn), LOWER(ssn), HEX(ssn), QUOTE(ssn), TRIM(ssn), REPLACE(ssn, 'x', 'y'), REVERSE(ssn) FROM people", "SELECT SUBSTR(ssn, 1, 3), LEFT(ssn, 3), RIGHT(ssn, 3), MID(ssn, 2, 3) FROM people", "SELECT COALESCE(ssn, 'x'), IFNULL(ssn, name), NULLIF(ssn, 'x'), IF(1, ssn, name), CASE WHEN 1 THEN ssn ELSE name END FROM people", "SELECT MAX(ssn), MIN(ssn), GROUP_CONCAT(ssn), SUM(pin), AVG(pin) FROM people", "SELECT GREATEST(name, ssn), LEAST(name, ssn) FROM people", "SELECT ASCII(ssn), LENGTH(ssn), CHAR(ASCII(ssn)), ORD(ssn) FROM people", "SELECT JSON_ARRAY(ssn), JSON_OBJECT('a', ssn), JSON_QUOTE(ssn) FROM people", "SELECT JSON_ARRAYAGG(ssn), JSON_OBJECTAGG(name, ssn) FROM people WHERE ssn IS NOT NULL", "SELECT TO_BASE64(ssn), FROM_BASE64(TO_BASE64(ssn)), COMPRESS(ssn), AES_ENCRYPT(ssn, 'x') FROM people", "SELECT ELT(1, ssn), FIELD(ssn, 'canary-1'), EXPORT_SET(5, ssn, name), MAKE_SET(1, ssn) FROM people", "SELECT LPAD(ssn, 50, ' '), RPAD(ssn, 50, ' '), REPEAT(ssn, 2), INSERT(ssn, 1, 0, 'x'), SUBSTRING_INDEX(ssn, '-', 1) FROM people", "SELECT pin + 0, -pin, pin * 1, pin*2, ABS(pin), salary + 0, ROUND(salary, 2), FORMAT(salary, 2) FROM people", "SELECT YEAR(born), DATE_FORMAT(born, '%Y-%m-%d'), born + INTERVAL 0 DAY, TO_DAYS(born), UNIX_TIMESTAMP(born) FROM people", "SELECT ssn = 'x', ssn LIKE 'c%', ssn REGEXP 'c', ssn > name, STRCMP(ssn, name) FROM people", "SELECT REGEXP_REPLACE(ssn, 'x', 'y'), REGEXP_SUBSTR(ssn, '.*') FROM people", "SELECT ssn IS NULL, ssn FROM people", "SELECT EXTRACTVALUE(CONCAT('<a>', ssn, '</a>'), '/a') FROM people", "SELECT WEIGHT_STRING(ssn), SOUNDEX(ssn), MD5(ssn) FROM people", "SELECT INET_ATON(ssn), CRC32(ssn), CONV(ssn, 36, 10) FROM people", "SELECT DEFAULT(ssn), DEFAULT(name) FROM people", "SELECT VALUES(ssn), ssn FROM people", "SELECT MATCH (ssn) AGAINST ('canary') FROM people", "SELECT ssn 'name' FROM people", "SELECT ssn name FROM people", "SELECT 1 * 1, ssn FROM people",
	// subqueries, derived tables, CTEs, set operations
	"SELECT (SELECT ssn FROM people LIMIT 1)", "SELECT (SELECT ssn FROM people WHERE id = t.id) AS name FROM things t", "SELECT (SELECT p.ssn) AS name FROM people p", "SELECT name FROM (SELECT ssn AS name FROM people) things", "SELECT name FROM (SELECT ssn AS name FROM people LIMIT 5) things", "SELECT name FROM (SELECT DISTINCT ssn AS name FROM people) AS things", "SELECT things.name FROM (SELECT ssn AS name FROM people) AS things", "SELECT name FROM (SELECT ssn AS name FROM people) people", "SELECT a.name FROM (SELECT b.name FROM (SELECT ssn AS name FROM people) b) a", "SELECT name FROM (SELECT name FROM people UNION ALL SELECT ssn FROM people) AS things", "SELECT * FROM (SELECT ssn AS name, id FROM people) things", "SELECT things.* FROM (SELECT id, ssn AS name, name AS other FROM people) things",
	"SELECT name FROM people UNION ALL SELECT ssn FROM people", "SELECT name FROM people UNION SELECT ssn FROM people", "SELECT ssn FROM people EXCEPT SELECT name FROM people", "SELECT ssn FROM people INTERSECT SELECT ssn FROM people", "(SELECT name FROM people) UNION ALL (SELECT ssn FROM people) ORDER BY 1", "SELECT name FROM things UNION/**/ALL SELECT ssn FROM people", "(SELECT ssn FROM people)", "((SELECT ssn AS name FROM people))",
	"WITH things AS (SELECT ssn AS name FROM people) SELECT name FROM things", "WITH things AS (SELECT ssn AS name FROM people LIMIT 3) SELECT name FROM things", "WITH things AS (SELECT ssn AS name FROM people LIMIT 3) SELECT a.name, b.name FROM things a, things b", "WITH t(name) AS (SELECT ssn FROM people) SELECT name FROM t", "WITH RECURSIVE things AS (SELECT CAST(name AS CHAR(40)) AS name, 1 AS i FROM people UNION ALL SELECT p.ssn, i + 1 FROM people p, things WHERE i < 2) SELECT name FROM things", "WITH RECURSIVE t(i, c) AS (SELECT 1, CAST('' AS CHAR(100)) UNION ALL SELECT i + 1, CONCAT(c, SUBSTR((SELECT MAX(ssn) FROM people), i, 1)) FROM t WHERE i < 20) SELECT c FROM t", "WITH people AS (SELECT ssn AS name FROM people) SELECT name FROM people", "WITH things AS (SELECT * FROM people) SELECT name, ssn AS other FROM things",
	"SELECT EXISTS (SELECT 1 FROM people WHERE ssn LIKE 'c%'), (SELECT MAX(ssn) FROM people)", "SELECT name FROM things WHERE name IN (SELECT ssn FROM people)", "SELECT name, (SELECT GROUP_CONCAT(ssn) FROM people) FROM things",
	// joins
	"SELECT * FROM people NATURAL JOIN things", "SELECT ssn FROM things LEFT JOIN people USING (id)", "SELECT ssn FROM people RIGHT JOIN things USING (id)", "SELECT a.ssn, b.ssn FROM people a JOIN people b ON a.ssn = b.ssn", "SELECT x.ssn FROM people AS things JOIN people x", "SELECT ssn FROM people a JOIN people b USING (ssn)", "SELECT things.ssn AS name FROM people AS things", "SELECT things.name, things.ssn FROM people things",
	// windows and groups
	"SELECT FIRST_VALUE(ssn) OVER (ORDER BY id), LAG(ssn) OVER (ORDER BY id), NTH_VALUE(ssn, 1) OVER (ORDER BY id) FROM people", "SELECT ssn, ROW_NUMBER() OVER (ORDER BY id) FROM people", "SELECT ssn, COUNT(*) FROM people GROUP BY ssn", "SELECT ssn FROM people GROUP BY ssn WITH ROLLUP", "SELECT ssn AS name, COUNT(*) FROM people GROUP BY ssn WITH ROLLUP", "SELECT ssn AS name, name AS ssn FROM people GROUP BY ssn, name HAVING ssn > ''", "SELECT DISTINCT ssn FROM people ORDER BY ssn", "SELECT ssn name FROM people ORDER BY name", "SELECT MAX(ssn) OVER () FROM people", "SELECT MIN(ssn) AS name FROM people HAVING name > ''",
	// views
	"SELECT * FROM v_all", "SELECT name, ssn FROM v_alias", "SELECT name FROM v_alias", "SELECT * FROM v_union", "SELECT name FROM v_union", "SELECT * FROM v_nested", "SELECT a AS name FROM v_nested", "SELECT * FROM v_max", "SELECT * FROM v_temp", "SELECT name FROM v_temp", "SELECT * FROM v_derived", "SELECT name FROM V_ALIAS", "SELECT * FROM v_star", "SELECT m FROM v_star", "SELECT * FROM v_rule", "SELECT alias FROM v_rule", "SELECT UPPER(alias) FROM v_rule", "SELECT a.name FROM v_alias a JOIN v_union b ON a.id = 1", "SELECT things.name FROM v_alias AS things", "SELECT name FROM shop_mask.v_derived", "SELECT * FROM v_f", "SELECT f_ssn()", "SELECT f_ssn() AS name FROM things",
	// what else holds values
	"SELECT g FROM people", "SELECT kept, id FROM people", "SELECT g AS name FROM people", "SELECT UPPER(g) FROM people", "SELECT MAX(kept) FROM people", "SELECT _rowid FROM pk", "SELECT _rowid AS name FROM pk", "SELECT _rowid + 1 FROM pk", "SELECT * FROM pk", "SELECT pk._rowid, name FROM pk", "SELECT * FROM mysql.column_stats", "SELECT min_value, max_value FROM mysql.column_stats", "SELECT * FROM information_schema.COLUMN_STATISTICS", "SELECT HISTOGRAM FROM information_schema.column_statistics", "SELECT * FROM information_schema.PROCESSLIST", "SELECT INFO FROM information_schema.processlist", "SELECT * FROM performance_schema.events_statements_history", "SELECT SQL_TEXT FROM performance_schema.events_statements_history_long", "SELECT * FROM mysql.general_log", "SELECT * FROM information_schema.INNODB_FT_INDEX_TABLE", "SELECT WORD FROM information_schema.INNODB_FT_INDEX_CACHE", "SELECT * FROM information_schema.PROFILING", "SELECT * FROM information_schema.OPTIMIZER_TRACE", "SHOW TABLE STATUS", "SHOW INDEX FROM people", "SHOW CREATE TABLE people", "DESCRIBE people",
	"SELECT j.name FROM people, JSON_TABLE(CONCAT('[\"', ssn, '\"]'), '$[*]' COLUMNS (name VARCHAR(20) PATH '$')) AS j WHERE ssn IS NOT NULL", "SELECT things.name FROM people, JSON_TABLE(CONCAT('[\"', people.ssn, '\"]'), '$[*]' COLUMNS (name VARCHAR(20) PATH '$')) AS things WHERE people.ssn IS NOT NULL", "SELECT things.name FROM people, LATERAL (SELECT people.ssn AS name) things", "TABLE people", "SELECT name FROM (TABLE people) AS things", "SELECT a FROM (TABLE plain) AS v_rule", "SELECT * FROM (TABLE people) AS t (id, ssn, name, a, b, c, d, e, f, g, h)", "SELECT name FROM things WHERE (1, 'ann') IN (TABLE people)", "VALUES ROW((SELECT MAX(ssn) FROM people))", "VALUES ((SELECT MAX(ssn) FROM people))", "SELECT column_0 FROM (VALUES ROW((SELECT MAX(ssn) FROM people))) AS t", "SELECT name FROM (VALUES ROW((SELECT MAX(ssn) FROM people))) AS things (name)",
	// errors
	"SELECT JSON_EXTRACT('{}', ssn) FROM people", "SELECT CAST(ssn AS JSON) FROM people", "SELECT JSON_VALUE('{}', ssn) FROM people", "SELECT ST_GeomFromText(ssn) FROM people", "SELECT EXTRACTVALUE('<a/>', ssn) FROM people", "SELECT UPDATEXML('<a/>', ssn, 'x') FROM people", "SELECT 'a' REGEXP CONCAT('[', ssn) FROM people", "SELECT POW(pin, 999) FROM people", "SELECT pin * 99999999999999999 FROM people", "SELECT CAST(ssn AS SIGNED) + 9223372036854775807 FROM people", "SELECT (SELECT ssn FROM people)", "SELECT ST_X(ssn) FROM people", "SELECT CONVERT_TZ(born, ssn, ssn) FROM people", "SELECT UUID_TO_BIN(ssn) FROM people", "SELECT DATE_ADD(born, INTERVAL ssn DAY) FROM people", "SELECT JSON_OBJECT(ssn, 1, NULL, 2) FROM people", "SELECT EXP(pin) FROM people", "SELECT ~pin + pin + 18446744073709551615 FROM people", "SELECT JSON_SCHEMA_VALID(ssn, '{}') FROM people", "SELECT STR_TO_DATE(ssn, '%Y') FROM people",
	"SELECT CONCAT(ssn) FROM `#mysql50#people`", "SELECT CONCAT(name) FROM `#MySQL50#v_alias`", "SELECT CONCAT(ssn) FROM `#mysql50#shop_mask`.people", "SELECT CONCAT(ssn) FROM `people `", "SELECT CONCAT(`ssn `) FROM people",
	// one SELECT, where origins are believed
	"SELECT * FROM (people)", "SELECT p.ssn FROM (people p)", "SELECT * FROM (people JOIN things)", "SELECT name, ssn FROM people GROUP BY name, ssn WITH ROLLUP", "SELECT SQL_BIG_RESULT ssn AS name FROM people GROUP BY ssn", "SELECT ssn AS name FROM people ORDER BY RAND()", "SELECT DISTINCT ssn AS name FROM people ORDER BY name", "SELECT ssn AS name FROM people WHERE ssn = 'canary-1'", "SELECT name AS n FROM people WHERE name = ssn", "SELECT id AS ssn FROM people", "SELECT p.name, p.id FROM people p WHERE p.ssn > ''", "SELECT ssn AS name FROM people LIMIT 1", "SELECT COUNT(ssn), COUNT(DISTINCT ssn) FROM people", "SELECT -pin AS id FROM people", "SELECT !pin, ~pin FROM people", "SELECT pin AS id, id AS pin FROM people ORDER BY 1", "SELECT ssn FROM people IGNORE INDEX (ssn)", "SELECT ssn AS name FROM people FORCE INDEX (ssn) ORDER BY ssn", "SELECT MAX(ssn) AS name FROM people HAVING name IS NOT NULL", "SELECT name, ssn s FROM people HAVING s > ''", "SELECT STRAIGHT_JOIN p.ssn AS name FROM things JOIN people p", "SELECT things.name, p.ssn AS name FROM things JOIN people p", "SELECT ssn div 1 FROM people", "SELECT ssn + 0 name FROM people", "SELECT ssn XOR 1, NOT ssn FROM people", "SELECT {d '2020-01-01'}, ssn AS name FROM people", "SELECT _utf8mb4 'x', ssn name FROM people", "SELECT people.`ssn` `name` FROM `people`", "SELECT\tssn\nname\rFROM people", "SELECT p.* FROM people p, things t WHERE t.id = p.id", "SELECT 2 *\n3, ssn FROM people", "SELECT(ssn)name FROM people", "SELECT ssn name FROM people,things GROUP BY name",
	"SELECT ſsn FROM people", "SELECT ｓsn FROM people", "SELECT ssń FROM people", "SELECT `ŝsn` FROM people", "SELECT name, ssn AS `größe` FROM people", "SELECT ssn FROM `people`, `größe`",
}

// maskCorpus asks all of a corpus; what fails by itself does not count as answered.
func maskCorpus(t *testing.T, m *sqlsession.Manager, corpus []string) {
	t.Helper()
	answered := 0
	for _, text := range corpus {
		_, err := search(t, m, request(text))
		switch code := proto.CodeOf(err); {
		case err == nil:
			answered++
		case code != proto.CodeSQL && code != proto.CodePolicyDenied:
			t.Errorf("%s: %v", text, err)
		}
	}
	if answered < len(corpus)*2/3 {
		t.Errorf("%d of %d statements were answered", answered, len(corpus))
	}
	t.Logf("%d statements, %d answered", len(corpus), answered)
}

// mysqlMasks is what stays as it is, and what a mask makes of values.
func mysqlMasks(t *testing.T, m *sqlsession.Manager) {
	t.Helper()
	got, _ := query(t, m, request("SELECT id, name, ssn, notes, email, phone, salary, pin, born FROM people ORDER BY id"))
	first, third := got.rows[0], got.rows[2]
	if first[0] != "1" || first[1] != "ann" || first[2] != "***" || first[3] != "(null)" || len(first[4]) != 26 || first[5] != "**********45" || first[7] != "(null)" || first[8] != "(null)" {
		t.Errorf("got %q", first)
	}
	if third[2] != "(null)" || third[4] != "(null)" || third[1] != "eve" {
		t.Errorf("NULL does not stay: %q", third)
	}
	if first[6] == "704.25" || !strings.HasPrefix(first[6], "6") && !strings.HasPrefix(first[6], "7") {
		t.Errorf("noise: got %q", first[6])
	}
	for text, want := range map[string]string{
		"SELECT name FROM people WHERE id = 1":                                    "ann",
		"SELECT COUNT(*), MAX(name), 2 * 3 FROM people":                           "3 eve 6",
		"SELECT name FROM people WHERE ssn = 'canary-1'":                          "ann", // the filter is allowed, the column is the table's
		"SELECT UPPER(name), 1 FROM things WHERE id = 1":                          "ONE 1",
		"SELECT name FROM things UNION ALL SELECT name FROM things":               "one two one two",
		"SELECT UPPER(name) FROM people WHERE ssn = 'canary-1'":                   "***",
		"SELECT name FROM (SELECT name FROM things) t":                            "one two",
		"SELECT t.name FROM things t JOIN people p USING (id) WHERE p.ssn > ''":   "one two",
		"SELECT name, id * 2 FROM people WHERE id = 2":                            "bob 4",
		"WITH t AS (SELECT name FROM people) SELECT name FROM t WHERE name < 'b'": "ann", // it names no masked column
	} {
		got, _ := query(t, m, request(text))
		var all []string
		for _, row := range got.rows {
			all = append(all, row...)
		}
		if strings.Join(all, " ") != want {
			t.Errorf("%s: got %q, want %q", text, all, want)
		}
	}
}

// mysqlMaskDatabase makes the corpus' database and gives sources for it.
func mysqlMaskDatabase(t *testing.T, db *database, sql func(ctx context.Context, database string, statements ...string) error, super func(*sqlsession.Source)) func(*sqlsession.Source) {
	t.Helper()
	ctx := context.Background()
	if err := sql(ctx, "", "CREATE DATABASE shop_mask"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sql(ctx, "", "DROP DATABASE shop_mask") })
	if err := sql(ctx, "shop_mask", mysqlMaskSetUp...); err != nil {
		t.Fatal(err)
	}
	return func(s *sqlsession.Source) {
		super(s)
		s.DSN = strings.ReplaceAll(s.DSN, "dbname=shop", "dbname=shop_mask")
		maskRules(s)
		s.Guard.Masks[5].Columns = append(s.Guard.Masks[5].Columns, "pk.pin")
		s.Guard.Mode = "read-only"
	}
}

func TestMariaMaskCorpus(t *testing.T) {
	db, super := root(t)
	source := mysqlMaskDatabase(t, db, func(ctx context.Context, name string, statements ...string) error {
		return mariaServer.SQLIn(ctx, name, statements...)
	}, super)
	if err := mariaServer.SQLIn(t.Context(), "shop_mask", "ANALYZE TABLE people PERSISTENT FOR ALL"); err != nil {
		t.Fatal(err)
	}
	m := db.open(t, source)
	maskCorpus(t, m, mysqlMaskCorpus)
	mysqlMasks(t, m)
	mysqlMaskSession(t, db.open(t, source))
	// Whatever the policy lists may read what it likes: then nothing is certain.
	maskCorpus(t, db.open(t, source, func(s *sqlsession.Source) { s.Guard.Functions = []string{"shop_mask.*", "f_ssn"} }), mysqlMaskCorpus)
	for _, filters := range []string{"", "equality", "refuse"} {
		refuse(t, db.open(t, source, func(s *sqlsession.Source) { s.Guard.MaskFilters = filters }), request("SELECT 1"), proto.CodePolicyDenied)
	}
	r := request("SELECT 1")
	r.ReadWrite = true
	refuse(t, db.open(t, source, readWrite), r, proto.CodePolicyDenied)
}

// mysqlMaskSession: what a session keeps is no way around.
func mysqlMaskSession(t *testing.T, m *sqlsession.Manager) {
	t.Helper()
	s := openSession(t, m, false)
	for _, text := range []string{"SET @a = (SELECT MAX(ssn) FROM people)", "SET @a = 1, @b = (SELECT name FROM v_alias LIMIT 1)", "SET @a = (SELECT MAX(g) FROM people)"} {
		if _, err := search(t, m, s.request(text)); proto.CodeOf(err) != proto.CodePolicyDenied {
			t.Errorf("%s: got %v, want POLICY_DENIED", text, err)
		}
	}
	s.run("SET @a = (SELECT MAX(name) FROM people)", "none")
	if got := s.value("SELECT @a", "none"); got != "eve" {
		t.Errorf("got %s", got)
	}
	s.run("BEGIN", "open")
	if _, err := search(t, m, s.request("SELECT * FROM people, v_alias")); err != nil {
		t.Error(err)
	}
	s.run("ROLLBACK", "none")
	for _, text := range []string{"USE performance_schema", "SELECT SQL_TEXT FROM events_statements_history", "SELECT * FROM events_statements_current", "USE mysql", "SELECT * FROM column_stats", "SELECT * FROM general_log", "USE information_schema", "SELECT INFO FROM PROCESSLIST", "SELECT * FROM shop_mask.people", "SELECT COUNT(*) FROM TABLES"} {
		if _, err := search(t, m, s.request(text)); err != nil && proto.CodeOf(err) != proto.CodeSQL && proto.CodeOf(err) != proto.CodePolicyDenied {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// The same value has the same hash on all engines.
func TestHashesAgree(t *testing.T) {
	hashes := map[string]string{}
	each(t, func(t *testing.T, db *database) {
		table := db.dialect("shop.hashed", "hashed", "hashed")
		for _, text := range []string{
			"CREATE TABLE " + table + " (t VARCHAR(40), i INT, n DECIMAL(10,2), f " + db.dialect("float8", "DOUBLE", "DOUBLE") + ", d " + db.dialect("date", "DATE", "TEXT") + ", b " + db.dialect("bytea", "BLOB", "BLOB") + ", e VARCHAR(5))",
			"INSERT INTO " + table + " VALUES ('ann@example.org', -42, 9.50, 1234567.125, '2026-11-22', " + db.dialect(`'\x00ff'`, "x'00ff'", "x'00ff'") + ", '')",
		} {
			if _, err := db.admin.Exec(text); err != nil {
				t.Fatal(err)
			}
		}
		t.Cleanup(func() { _, _ = db.admin.Exec("DROP TABLE " + table) })
		if db.engine == "postgres" {
			if _, err := db.admin.Exec("GRANT SELECT ON " + table + " TO reader"); err != nil {
				t.Fatal(err)
			}
		}
		m := db.open(t, func(s *sqlsession.Source) {
			maskRules(s)
			s.Guard.Mode, s.Guard.Masks = "read-only", []sqlsession.Mask{{Columns: []string{"hashed.*"}, With: "hash"}}
		})
		got, _ := query(t, m, request("SELECT * FROM hashed"))
		all := fmt.Sprint(got.rows)
		if len(got.rows) != 1 || len(got.rows[0][0]) != 26 || len(got.rows[0][5]) != 26 {
			t.Fatalf("got %s", all)
		}
		hashes[all] += db.name + " "
	})
	if len(hashes) != 1 {
		t.Errorf("the hashes differ: %v", hashes)
	}
}
