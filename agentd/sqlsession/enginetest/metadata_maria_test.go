package enginetest

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/apache/arrow-go/v18/arrow"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/mysqlguard"
	"github.com/postern-dev/postern/proto"
)

// canary stands in tables, and so must be in nothing that comes out in mode metadata.
const canary = "zebra4711"

// metadata is the change of a source to mode metadata.
func metadata(s *sqlsession.Source) { s.Guard.Mode = "metadata" }

// told is all that comes out of a statement but its times, as one text.
func told(t testing.TB, m *sqlsession.Manager, r sqlsession.Request) (string, error) {
	t.Helper()
	var out bytes.Buffer
	outcome, err := m.Run(t.Context(), r, &out)
	if outcome != nil {
		outcome.Duration, outcome.QueryId = nil, ""
	}
	return fmt.Sprintf("%q\n%s\n%v", out.Bytes(), proto.EncodeOutcome(outcome), err), err
}

// metadataAttacks try to get a value, or a bit of one, out of a server that only
// prepares. The tables are those of metadataData.
var metadataAttacks = []string{
	// plain
	"SELECT * FROM secrets", "SELECT s FROM secrets WHERE s LIKE 'z%'", "SELECT s FROM secrets LIMIT 1", "SELECT MAX(s) FROM secrets", "SELECT COUNT(*) FROM secrets", "TABLE secrets", "VALUES ((SELECT s FROM secrets LIMIT 1))", "SELECT EXISTS (SELECT * FROM secrets WHERE s = 'zebra4711')", "(SELECT s FROM secrets) UNION (SELECT s FROM secrets)",
	// constants that shape the type
	"SELECT ROUND(1.23456789, (SELECT n FROM secrets LIMIT 1))", "SELECT ROUND(123, (SELECT -n FROM secrets LIMIT 1))", "SELECT TRUNCATE(1.23456789, (SELECT MAX(n) FROM secrets))", "SELECT FORMAT(1.5, (SELECT n FROM secrets LIMIT 1))",
	"SELECT REPEAT('x', (SELECT MAX(n) FROM secrets))", "SELECT LEFT('aaaaaaaaaaaaaaaaaaaa', (SELECT n FROM secrets LIMIT 1))", "SELECT RPAD('x', (SELECT MAX(n) FROM secrets), 'y')", "SELECT LPAD('x', (SELECT MAX(n) FROM secrets), 'y')", "SELECT SPACE((SELECT MAX(n) FROM secrets))", "SELECT SUBSTRING('aaaaaaaaaaaaaaaa', 1, (SELECT n FROM secrets LIMIT 1))",
	"SELECT STR_TO_DATE('2024-01-01', (SELECT f FROM secrets LIMIT 1))", "SELECT STR_TO_DATE('2024-01-01', CASE WHEN (SELECT s FROM secrets LIMIT 1) = 'zebra4711' THEN '%Y' ELSE '%H' END)", "SELECT FROM_UNIXTIME(1, (SELECT f FROM secrets LIMIT 1))", "SELECT DATE_FORMAT(NOW(), (SELECT f FROM secrets LIMIT 1))", "SELECT CONV('ff', (SELECT n FROM secrets LIMIT 1), 10)",
	"SELECT IF((SELECT n FROM secrets LIMIT 1) = 4711, 1, 'a')", "SELECT CASE (SELECT n FROM secrets LIMIT 1) WHEN 4711 THEN 1 ELSE 'abc' END", "SELECT COALESCE((SELECT s FROM secrets LIMIT 1), 1)", "SELECT NULLIF((SELECT n FROM secrets LIMIT 1), 4711)", "SELECT IFNULL((SELECT NULLIF(s, 'zebra4711') FROM secrets LIMIT 1), 5)", "SELECT ELT((SELECT n FROM secrets LIMIT 1), 'a', 1)", "SELECT GREATEST((SELECT s FROM secrets LIMIT 1), 'a')", "SELECT INTERVAL((SELECT n FROM secrets LIMIT 1), 1, 10, 100)",
	"SELECT MAKE_SET((SELECT n FROM secrets LIMIT 1), 'a', 'bb')", "SELECT EXPORT_SET((SELECT n FROM secrets LIMIT 1), 'y', 'n')", "SELECT TIMESTAMPADD(SECOND, (SELECT n FROM secrets LIMIT 1), '2024-01-01')", "SELECT CAST((SELECT s FROM secrets LIMIT 1) AS DATE)", "SELECT CONVERT((SELECT s FROM secrets LIMIT 1) USING latin1)", "SELECT WEIGHT_STRING((SELECT s FROM secrets LIMIT 1))",
	// errors that quote
	"SELECT EXTRACTVALUE('<a/>', CONCAT('~', (SELECT s FROM secrets LIMIT 1)))", "SELECT EXTRACTVALUE(1, CONCAT(0x7e, (SELECT MAX(s) FROM secrets)))", "SELECT UPDATEXML(1, CONCAT(0x7e, (SELECT s FROM secrets LIMIT 1)), 1)", "SELECT EXTRACTVALUE('<a/>', (SELECT x FROM secrets LIMIT 1))", "SELECT UPDATEXML('<a/>', (SELECT x FROM secrets LIMIT 1), 'b')",
	"SELECT EXP(~(SELECT n FROM secrets LIMIT 1))", "SELECT EXP((SELECT n FROM secrets LIMIT 1))", "SELECT ~0 + (SELECT n FROM secrets LIMIT 1)", "SELECT (SELECT n FROM secrets LIMIT 1) * 9223372036854775807", "SELECT 18446744073709551615 * (SELECT LENGTH(s) FROM secrets LIMIT 1)", "SELECT (SELECT * FROM secrets)", "SELECT (SELECT s FROM secrets)", "SELECT 1 = (SELECT s FROM secrets)", "SELECT (1, 2) = (SELECT s FROM secrets)",
	"SELECT JSON_EXTRACT('{}', (SELECT s FROM secrets LIMIT 1))", "SELECT JSON_EXTRACT((SELECT s FROM secrets LIMIT 1), '$.a')", "SELECT JSON_KEYS((SELECT s FROM secrets LIMIT 1))", "SELECT JSON_VALUE((SELECT s FROM secrets LIMIT 1), '$.a')", "SELECT 'a' REGEXP (SELECT x FROM secrets LIMIT 1)", "SELECT REGEXP_REPLACE('a', (SELECT x FROM secrets LIMIT 1), 'b')", "SELECT ST_GeomFromText((SELECT s FROM secrets LIMIT 1))", "SELECT ST_AsText(Polygon((SELECT s FROM secrets LIMIT 1)))", "SELECT GeometryCollection((SELECT * FROM (SELECT * FROM (SELECT s FROM secrets) a) b))", "SELECT INET6_ATON((SELECT s FROM secrets LIMIT 1))", "SELECT UUID_TO_BIN((SELECT s FROM secrets LIMIT 1))", "SELECT CONVERT_TZ('2024-01-01', (SELECT s FROM secrets LIMIT 1), 'UTC')",
	"SELECT COLUMN_GET((SELECT s FROM secrets LIMIT 1), 'a' AS CHAR)", "SELECT COLUMN_JSON((SELECT s FROM secrets LIMIT 1))", "SELECT AES_DECRYPT((SELECT s FROM secrets LIMIT 1), 'k')", "SELECT COMPRESS((SELECT s FROM secrets LIMIT 1))", "SELECT COUNT(*), CONCAT((SELECT s FROM secrets LIMIT 1), FLOOR(RAND(0) * 2)) x FROM information_schema.TABLES GROUP BY x", "SELECT * FROM (SELECT NAME_CONST((SELECT s FROM secrets LIMIT 1), 1), NAME_CONST((SELECT s FROM secrets LIMIT 1), 1)) a", "SELECT * FROM (SELECT COUNT(*), CONCAT(s, FLOOR(RAND(0) * 2)) x FROM secrets GROUP BY x) a",
	"SELECT * FROM JSON_TABLE((SELECT s FROM secrets LIMIT 1), '$[*]' COLUMNS (a INT PATH '$.a')) t", "SELECT * FROM JSON_TABLE('[]', '$[*]' COLUMNS (a INT PATH '$.a' DEFAULT '5' ON ERROR)) t, secrets",
	// conditions
	"SELECT 1 WHERE (SELECT s FROM secrets LIMIT 1) = 'zebra4711'", "SELECT 1 FROM secrets WHERE id = 1 AND s = 'zebra4711'", "SELECT id FROM secrets WHERE id = 1", "SELECT 1 FROM secrets HAVING MAX(s) = 'zebra4711'", "SELECT 1 ORDER BY (SELECT s FROM secrets LIMIT 1)", "SELECT 1 GROUP BY (SELECT s FROM secrets LIMIT 1)", "SELECT s FROM secrets ORDER BY IF((SELECT n FROM secrets LIMIT 1) = 1, id, n)", "SELECT 1 FROM secrets WHERE n IN (SELECT n FROM secrets)", "SELECT 1 FROM secrets a JOIN secrets b ON a.s = b.s AND a.n = (SELECT MAX(n) FROM secrets)", "SELECT 1 FROM secrets WHERE SLEEP((SELECT n FROM secrets LIMIT 1))", "SELECT SLEEP((SELECT n FROM secrets LIMIT 1))", "SELECT IF((SELECT n FROM secrets LIMIT 1) = 4711, SLEEP(5), 0)", "SELECT 1 LIMIT 1 OFFSET 4711",
	// derived, recursive, lateral, window
	"SELECT * FROM (SELECT s, COUNT(*) OVER () FROM secrets) t", "WITH t AS (SELECT s FROM secrets) SELECT (SELECT s FROM t LIMIT 1) FROM t", "WITH RECURSIVE t (a) AS (SELECT s FROM secrets UNION ALL SELECT CONCAT(a, 'x') FROM t WHERE LENGTH(a) < (SELECT MAX(n) FROM secrets)) SELECT * FROM t", "SELECT FIRST_VALUE(s) OVER (ORDER BY n ROWS BETWEEN UNBOUNDED PRECEDING AND 1 FOLLOWING) FROM secrets", "SELECT NTILE((SELECT n FROM secrets LIMIT 1)) OVER () FROM secrets", "SELECT NTH_VALUE(s, 4711) OVER () FROM secrets", "SELECT GROUP_CONCAT(s SEPARATOR 'zebra') FROM secrets", "SELECT s, COUNT(*) FROM secrets GROUP BY s WITH ROLLUP", "SELECT DEFAULT(d) FROM secrets", "SELECT * FROM secrets PARTITION (p0)",
	// views, functions, catalogs
	"SELECT * FROM v_secrets", "SELECT * FROM v_const", "SELECT ROUND(1.5, c) FROM v_const", "SELECT f_secret()", "SELECT ROUND(1.23456789, f_secret())", "SELECT * FROM v_function", "SELECT shop.f_secret()", "SELECT EXTRACTVALUE(1, shop.f_text())", "SELECT VIEW_DEFINITION FROM information_schema.VIEWS", "SELECT COLUMN_DEFAULT FROM information_schema.COLUMNS", "SELECT ROUTINE_DEFINITION FROM information_schema.ROUTINES", "SELECT * FROM mysql.global_priv", "SELECT * FROM information_schema.PROCESSLIST", "SELECT * FROM mysql.column_stats", "SELECT TABLE_ROWS FROM information_schema.TABLES WHERE TABLE_NAME = 'secrets'",
	// not described at all
	"EXPLAIN SELECT * FROM secrets", "ANALYZE SELECT * FROM secrets", "DESCRIBE secrets", "SHOW CREATE TABLE secrets", "SHOW CREATE VIEW v_secrets", "SHOW TABLE STATUS", "SHOW INDEX FROM secrets", "SHOW CREATE FUNCTION f_secret", "CALL p_secret()", "DO f_secret()", "INSERT INTO secrets (s) SELECT s FROM secrets", "UPDATE secrets SET s = 'a'", "DELETE FROM secrets", "SELECT s FROM secrets INTO OUTFILE '/tmp/postern-attack-m'", "SELECT s INTO @a FROM secrets", "SELECT @a := s FROM secrets", "SELECT 1; SELECT s FROM secrets", "SELECT 1 /*!, s FROM secrets */", "PREPARE p FROM 'SELECT 1'", "EXECUTE IMMEDIATE 'SELECT s FROM secrets'", "BEGIN NOT ATOMIC SELECT s FROM secrets; END", "HANDLER secrets OPEN", "SELECT LOAD_FILE('/etc/passwd')", "CHECKSUM TABLE secrets", "SELECT * FROM secrets PROCEDURE ANALYSE()", "HELP 'zebra'", "SET @a = (SELECT s FROM secrets LIMIT 1)",
	"SELECT s FROM secrets WHERE", "SELECT nope FROM secrets", "SELECT s FROM nope", "SELECT nope.s FROM secrets", "SELECT f_nope()", "SELECT s, s FROM secrets a JOIN secrets b", "SELECT 'unclosed",
}

// metadataData are two states of the same database; what is told must be the same.
var metadataData = [2][]string{
	{"DELETE FROM secrets", "INSERT INTO secrets (id, s, n, f, x) VALUES (1, 'zebra4711', 4711, '%Y-%m-%d', '/a')"},
	{"DELETE FROM secrets", "INSERT INTO secrets (id, s, n, f, x) VALUES (1, '{\"a\": [1]}', 2, '%H:%i', '~['), (2, 'POINT(1 2)', 3, '%H', '(')"},
}

func newMetadataData(t *testing.T, db *database) {
	t.Helper()
	exec := func(statements ...string) {
		for _, s := range statements {
			if _, err := db.admin.Exec(s); err != nil {
				t.Fatalf("%s: %v", s, err)
			}
		}
	}
	exec("CREATE TABLE secrets (id INT PRIMARY KEY, s VARCHAR(60) NOT NULL, n INT NOT NULL, f VARCHAR(20), x VARCHAR(20), d VARCHAR(40) DEFAULT 'zebra4711-default') COMMENT 'people'",
		"CREATE FUNCTION f_secret() RETURNS INT DETERMINISTIC READS SQL DATA RETURN (SELECT MAX(n) FROM secrets)",
		"CREATE FUNCTION f_text() RETURNS TEXT DETERMINISTIC READS SQL DATA RETURN (SELECT CONCAT('~', MAX(s)) FROM secrets)",
		"CREATE FUNCTION f_cry() RETURNS INT DETERMINISTIC READS SQL DATA BEGIN DECLARE t TEXT; SELECT CONCAT('Unknown column ''', MAX(s), ''' in ''field list''') INTO t FROM secrets; SIGNAL SQLSTATE '42S22' SET MYSQL_ERRNO = 1054, MESSAGE_TEXT = t; RETURN 1; END",
		"CREATE PROCEDURE p_secret() SELECT s FROM secrets",
		"CREATE VIEW v_secrets AS SELECT id, s, UPPER(s) AS u FROM secrets WHERE s <> 'zebra4711-view'", "CREATE VIEW v_const AS SELECT (SELECT MAX(n) FROM secrets) AS c", "CREATE VIEW v_function AS SELECT f_secret() AS a")
	t.Cleanup(func() {
		exec("DROP VIEW v_secrets, v_const, v_function", "DROP FUNCTION f_secret", "DROP FUNCTION f_text", "DROP FUNCTION f_cry", "DROP PROCEDURE p_secret", "DROP TABLE secrets")
	})
}

// Nothing of what is told may depend on what is in the tables: not a type, not a length,
// not an error.
func TestMariaMetadataAttacks(t *testing.T) {
	db, super := root(t)
	attackMetadata(t, db, super, metadataAttacks, func() string { return mariaState(t, db.admin, mariaServer.Dir, "SELECT * FROM secrets") })
}

// attackMetadata runs statements on two states of the database, and compares.
func attackMetadata(t *testing.T, db *database, super func(*sqlsession.Source), attacks []string, state func() string) {
	t.Helper()
	newMetadataData(t, db)
	// Every function, with a value of a row at every place.
	for _, f := range mysqlguard.Harmless() {
		for _, arguments := range []string{"%s", "%s, 1", "1, %s", "%s, %s, 1", "1, %s, %[1]s", "'a', 1, 2, %s"} {
			for _, column := range []string{"x", "n"} {
				value := "(SELECT " + column + " FROM secrets WHERE id = 1)"
				attacks = append(attacks, "SELECT "+f+"("+strings.ReplaceAll(strings.ReplaceAll(arguments, "%[1]s", "%s"), "%s", value)+")")
			}
		}
	}
	var first []string
	described := 0
	for round, data := range metadataData {
		for _, s := range data {
			if _, err := db.admin.Exec(s); err != nil {
				t.Fatal(err)
			}
		}
		m := db.open(t, super, metadata)
		var before string
		if round == 0 {
			before = state()
		}
		for i, text := range attacks {
			got, err := told(t, m, request(text))
			// The text itself may hold it: then that much is told of the text.
			if strings.Contains(got, canary) && !strings.Contains(text, canary) {
				t.Errorf("%q tells the canary: %s", text, got)
			}
			if round == 0 {
				first = append(first, got)
				if err == nil {
					described++
				}
				continue
			}
			if got != first[i] {
				t.Errorf("%q tells of the data:\n%s\n%s", text, first[i], got)
			}
			if proto.CodeOf(err) == proto.CodeSourceUnreachable || proto.CodeOf(err) == proto.CodeInternal {
				t.Errorf("%q: %v", text, err)
			}
		}
		if before != "" {
			if after := state(); after != before {
				t.Errorf("something has changed:\n%s", difference(before, after))
			}
		}
	}
	if described < len(attacks)/8 { // most calls have the wrong number of arguments
		t.Errorf("only %d of %d are described at all", described, len(attacks))
	}
	t.Logf("%d statements, %d described", len(attacks), described)
}

// A function that the policy lists may run while the server prepares; what it says in an
// error is not told all the same.
func TestMariaMetadataListed(t *testing.T) {
	db, super := root(t)
	listedInMetadata(t, db, super)
}

func listedInMetadata(t *testing.T, db *database, super func(*sqlsession.Source)) {
	t.Helper()
	newMetadataData(t, db)
	for _, s := range metadataData[0] {
		if _, err := db.admin.Exec(s); err != nil {
			t.Fatal(err)
		}
	}
	m := db.open(t, super, metadata, func(s *sqlsession.Source) { s.Guard.Functions = []string{"f_*", "shop.f_*"} })
	for _, text := range []string{
		"SELECT f_cry()", "SELECT ROUND(1.234567, f_cry())", "SELECT EXTRACTVALUE(1, f_text())", "SELECT * FROM v_function", "SELECT REPEAT('x', f_cry())",
		"SELECT f_text()", "SELECT ROUND(1.23456789, f_secret())", "SELECT 1 WHERE f_cry()", "SELECT 1 LIKE f_cry()", "SELECT CONVERT(f_text() USING latin1)", "SELECT UPDATEXML('<a/>', f_text(), f_cry())",
	} {
		if got, _ := told(t, m, request(text)); strings.Contains(got, canary) || strings.Contains(got, "4711") {
			t.Errorf("%q tells a value: %s", text, got)
		}
	}
}

func TestMariaMetadataDescribes(t *testing.T) {
	db, super := root(t)
	newMetadataData(t, db)
	for _, secure := range []bool{false, true} {
		m := db.open(t, super, metadata, func(s *sqlsession.Source) {
			if secure {
				s.DSN = fmt.Sprintf("host=127.0.0.1 port=%d user=reader dbname=shop sslmode=verify-full sslrootcert=%s", mariaServer.Port, mariaServer.CAFile)
				s.Password = login(readerPassword)
			}
		})
		for _, test := range []struct {
			text, want string
		}{
			{"SELECT id, s, n FROM secrets", "id int32 int(11) NOT NULL, s utf8 varchar(60) NOT NULL, n int32 int(11) NOT NULL"},
			{"SELECT f, n + 1 AS m, CONCAT(s, 'x') AS c, NULL AS z, 1.50 AS d FROM secrets WHERE id = {{id}}", "f utf8 varchar(20), m int64 bigint, c utf8 varchar, z utf8 null, d utf8 decimal"},
			{"SELECT a.id, b.id AS other FROM secrets a LEFT JOIN secrets b ON a.id = b.n", "id int32 int(11), other int32 int(11)"},
			{"SELECT id, MAX(n) AS m FROM secrets", "id int32 int(11), m int32 int"},
			{"SELECT id, u FROM v_secrets", "id int32 int(11), u utf8 varchar"},
			{"SELECT id FROM secrets UNION SELECT NULL", "id int32 int"},
			{"SELECT NOW() AS a, CURDATE() AS b, 1e0 AS c, x'00' AS d", "a timestamp[us] datetime, b date32 date, c float64 double, d binary varbinary"},
		} {
			got, outcome := query(t, m, request(test.text))
			var columns []string
			for _, f := range got.schema.Fields() {
				c := f.Name + " " + f.Type.String() + " " + meta(f, "mysql.sqltype")
				if !f.Nullable {
					c += " NOT NULL"
				}
				columns = append(columns, c)
			}
			if all := strings.Join(columns, ", "); all != test.want || len(got.rows) != 0 || outcome.CommandTag != "DESCRIBE" {
				t.Errorf("%s: got %s (%v), want %s", test.text, all, outcome, test.want)
			}
		}
		_, outcome := query(t, m, request("SELECT id FROM secrets WHERE id = {{id}} AND s = :name"))
		var names []string
		for _, p := range outcome.Parameters {
			names = append(names, p.Name)
		}
		if strings.Join(names, " ") != "id name" {
			t.Errorf("got parameters %v, want id and name", outcome.Parameters)
		}
		for text, want := range map[string]string{
			"SELECT nope FROM secrets":  "there is no column nope (error 1054, SQLSTATE 42S22)",
			"SELECT s FROM nope":        "there is no table nope (error 1146, SQLSTATE 42S02)",
			"SELECT s FRUM secrets x":   "a syntax error (error 1064, SQLSTATE 42000, position 15)",
			"SELECT f_nope() FROM nope": "the function f_nope is refused",
		} {
			if _, _, err := try(t, m, request(text)); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: got %v, want %q", text, err, want)
			}
		}
		refuse(t, m, request("SELECT 1; SELECT 2"), proto.CodePolicyDenied)
	}
}

// What is described has the types that it has when it runs.
func TestMariaMetadataTypes(t *testing.T) {
	db, super := root(t)
	typesInMetadata(t, db, super)
}

func typesInMetadata(t *testing.T, db *database, super func(*sqlsession.Source)) {
	t.Helper()
	if _, err := db.admin.Exec("CREATE TABLE every (a TINYINT, b TINYINT UNSIGNED, c SMALLINT, d SMALLINT UNSIGNED, e MEDIUMINT, f MEDIUMINT UNSIGNED, g INT, h INT UNSIGNED, i BIGINT, j BIGINT UNSIGNED, k BOOL, l YEAR, m BIT(8), n FLOAT, o DOUBLE, " +
		"p DECIMAL(30,10), q DATE, r DATETIME(6), s TIMESTAMP NULL, t TIME(6), u CHAR(5), v5 VARCHAR(5), w LONGTEXT, x ENUM('a','b'), y SET('a','b','c'), z JSON, aa BINARY(3), ab BLOB, ac VARBINARY(5), ad TINYTEXT, ae MEDIUMBLOB, af GEOMETRY, ag TEXT, ah TINYBLOB)"); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = db.admin.Exec("DROP TABLE every") }()
	described, _ := query(t, db.open(t, super, metadata), request("SELECT *, a + 1, p * 2, CONCAT(v5, 'a'), NOW(), 1 = 1, UUID(), x'00' FROM every"))
	run, _ := query(t, db.open(t, super), request("SELECT *, a + 1, p * 2, CONCAT(v5, 'a'), NOW(), 1 = 1, UUID(), x'00' FROM every"))
	for i, f := range run.schema.Fields() {
		d := described.schema.Field(i)
		if d.Name != f.Name || !arrow.TypeEqual(d.Type, f.Type) || meta(d, "mysql.type") != meta(f, "mysql.type") || meta(d, "pg.type") != meta(f, "pg.type") {
			t.Errorf("%s: described as %v, runs as %v", f.Name, d, f)
		}
	}
}

func meta(f arrow.Field, key string) string {
	value, _ := f.Metadata.GetValue(key)
	return value
}
