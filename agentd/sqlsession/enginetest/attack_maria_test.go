package enginetest

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
)

// mariaAttacks are statements that must change nothing, whoever runs them. Those in
// mariaHarmless may run.
var mariaAttacks = []string{
	// writing, plainly
	"INSERT INTO accounts VALUES (9, 'x', 1)", "UPDATE accounts SET amount = 0", "DELETE FROM accounts", "REPLACE INTO accounts VALUES (1, 'x', 1)", "TRUNCATE accounts",
	"LOAD DATA INFILE '/etc/passwd' INTO TABLE accounts", "LOAD DATA LOCAL INFILE '/etc/passwd' INTO TABLE accounts", "LOAD XML INFILE '/etc/passwd' INTO TABLE accounts",
	"CREATE TABLE x AS SELECT 1", "DROP TABLE accounts", "ALTER TABLE accounts ADD z INT", "RENAME TABLE accounts TO b", "CREATE INDEX i ON accounts (amount)",
	"CREATE OR REPLACE VIEW v_plain AS SELECT 1 AS a", "CREATE SEQUENCE t", "CREATE USER mallory", "GRANT ALL ON *.* TO mallory", "SET PASSWORD = PASSWORD('x')", "DROP DATABASE shop",
	"ANALYZE TABLE accounts", "OPTIMIZE TABLE accounts", "REPAIR TABLE accounts", "CHECK TABLE accounts", "FLUSH TABLES", "FLUSH PRIVILEGES", "RESET QUERY CACHE", "PURGE BINARY LOGS BEFORE NOW()",
	// behind WITH
	"WITH t AS (SELECT 1 AS a) DELETE FROM accounts WHERE id IN (SELECT a FROM t)", "WITH t AS (SELECT 1 AS a) UPDATE accounts SET amount = 0", "WITH t AS (SELECT 1) INSERT INTO accounts SELECT 9, 'x', 1",
	// several statements, and ways to end ours
	"SELECT 1; DELETE FROM accounts", "SELECT 1;;DELETE FROM accounts;", "COMMIT", "ROLLBACK", "COMMIT; DELETE FROM accounts", "START TRANSACTION READ WRITE", "BEGIN", "SET autocommit = 1", "SET SESSION TRANSACTION READ WRITE", "SET GLOBAL max_connections = 5",
	"SET STATEMENT max_statement_time = 1 FOR DELETE FROM accounts", "SET ROLE none", "SET @a = 1", "XA START 'a'", "SAVEPOINT a", "LOCK TABLES accounts WRITE", "UNLOCK TABLES", "HANDLER accounts OPEN", "USE mysql",
	// blocks and dynamic SQL
	"BEGIN NOT ATOMIC DELETE FROM accounts; END", "IF 1 THEN DELETE FROM accounts; END IF", "EXECUTE IMMEDIATE 'DELETE FROM accounts'", "PREPARE s FROM 'DELETE FROM accounts'", "CALL p_write()", "CALL shop.p_write()", "DO f_write()", "DO SLEEP(0)", "DO GET_LOCK('attack', 0)",
	// EXPLAIN and its like run things
	"EXPLAIN SELECT f_write()", "ANALYZE SELECT f_write()", "ANALYZE FORMAT=JSON DELETE FROM accounts", "EXPLAIN EXTENDED SELECT * FROM accounts", "EXPLAIN accounts", "DESCRIBE v_lock", "SHOW COLUMNS FROM v_lock", "SHOW FULL COLUMNS FROM shop.v_lock LIKE '%'", "SHOW CREATE VIEW v_lock", "SHOW INDEX FROM v_lock", "SHOW COLUMNS FROM accounts WHERE f_lock() = 1", "SHOW TABLES WHERE GET_LOCK('attack', 0)", "SHOW DATABASES WHERE f_write()", "SHOW VARIABLES WHERE f_lock()", "SHOW CREATE USER root", "SHOW EXPLAIN FOR 1", "DESCRIBE SELECT f_lock()", "DESC ANALYZE SELECT f_lock()", "SHOW TABLES LIKE 'a' INTO OUTFILE '/tmp/postern-attack'",
	// comments that are code
	"SELECT 1 /*!50000 INTO OUTFILE '/tmp/postern-attack' */", "/*!DELETE FROM accounts*/", "SELECT 1 /*M!100000 INTO OUTFILE '/tmp/postern-attack' */", "/*M!DELETE FROM accounts */", "SELECT /*!99999 1, */ f_lock()", "SELECT /*+ SET_VAR(sql_mode = 'ANSI_QUOTES') */ 1", "SELECT 1 /*!*/; DELETE FROM accounts",
	// files
	"SELECT 'x' INTO OUTFILE '/tmp/postern-attack'", "SELECT 'x' INTO DUMPFILE '/tmp/postern-attack'", "SELECT LOAD_FILE('/etc/passwd')", "SELECT * FROM accounts INTO OUTFILE '/tmp/postern-attack'", "(SELECT 1) UNION (SELECT 2) INTO OUTFILE '/tmp/postern-attack'", "SELECT 1 iNtO/**/outfile '/tmp/postern-attack'", "SELECT 1 INTO @x", "SELECT 1 FROM DUAL PROCEDURE ANALYSE()",
	"SELECT 1into outfile '/tmp/postern-attack'", "SELECT 1.into outfile '/tmp/postern-attack'", "SELECT 1e0into outfile '/tmp/postern-attack'", "SELECT 0x41into outfile '/tmp/postern-attack'", "SELECT'a'into outfile'/tmp/postern-attack'", "SELECT.1into outfile'/tmp/postern-attack'", "SELECT N'a'INTO OUTFILE '/tmp/postern-attack'", "SELECT \"a\\\" \" INTO OUTFILE \"/tmp/postern-attack\"", "SELECT 'a\\' , ' INTO OUTFILE ' , 1 INTO OUTFILE '/tmp/postern-attack",
	"SELECT 1 --x\n INTO OUTFILE '/tmp/postern-attack'", "SELECT 1 --\n INTO OUTFILE '/tmp/postern-attack'", "SELECT 1 -- x\n INTO OUTFILE '/tmp/postern-attack'", "SELECT 1 # x\n INTO OUTFILE '/tmp/postern-attack'", "SELECT 1 # x\r INTO OUTFILE '/tmp/postern-attack'", "SELECT 1 --\u00a0x INTO OUTFILE '/tmp/postern-attack'", "SELECT 1 /* /* */ INTO OUTFILE '/tmp/postern-attack' -- */",
	// locks
	"SELECT GET_LOCK('attack', 0)", "SELECT `GET_LOCK`('attack', 0)", "SELECT get_lock /**/ ('attack', 0)", "SELECT GET_LOCK\n('attack', 0)", "SELECT RELEASE_ALL_LOCKS()", "SELECT * FROM accounts FOR UPDATE", "SELECT * FROM accounts LOCK IN SHARE MODE", "SELECT * FROM (SELECT * FROM accounts FOR UPDATE) t", "SELECT * FROM accounts WHERE id = (SELECT id FROM accounts LIMIT 1 FOR UPDATE)", "SELECT 1 WHERE (SELECT GET_LOCK('attack', 0))", "SELECT {fn GET_LOCK('attack', 0)}",
	// functions of somebody's
	"SELECT f_write()", "SELECT f_lock()", "SELECT shop.f_lock()", "SELECT `shop`.`f_lock`()", "SELECT shop . f_lock ()", "SELECT `f_lock` ()", "SELECT f_global()", "SELECT f_outfile()", "SELECT `1f`()", "SELECT 1f()", "SELECT json_lock()", "SELECT `json_lock`()", "SELECT st_lock()",
	"SELECT * FROM accounts WHERE f_lock() = 1", "SELECT 1 ORDER BY f_lock()", "SELECT 1 GROUP BY f_lock()", "SELECT 1 HAVING f_lock()", "SELECT * FROM (SELECT f_lock()) t", "WITH f_lock(a) AS (SELECT 1) SELECT shop.f_lock()", "SELECT CASE WHEN f_lock() THEN 1 END", "SELECT 1 LIMIT 1 OFFSET 0 UNION SELECT f_lock()", "VALUES (f_lock())", "TABLE v_lock",
	// views that call them
	"SELECT * FROM v_lock", "SELECT * FROM shop.v_lock", "SELECT * FROM `V_LOCK`", "SELECT * FROM v_nested", "SELECT * FROM accounts JOIN v_nested", "SELECT (SELECT a FROM v_lock)", "WITH t AS (SELECT * FROM v_nested) SELECT * FROM t", "SELECT * FROM v_json", "SELECT EXISTS (SELECT * FROM v_lock)",
	"SELECT json_path()", "SELECT jsön_path()", "SELECT * FROM İview", "SELECT * FROM `i̇view`", "SELECT * FROM iview", "SELECT * FROM ÜBER", "SELECT * FROM über", "SELECT * FROM uber",
	// sequences and counters
	"SELECT NEXT VALUE FOR seq", "SELECT NEXTVAL(seq)", "SELECT SETVAL(seq, 100)", "SELECT PREVIOUS VALUE FOR seq", "SELECT seq.nextval", "SELECT NEXT/**/VALUE/**/FOR seq", "SELECT LAST_INSERT_ID(77)", "SELECT UUID_SHORT()", "SELECT @a := 1", "SELECT @a:=1 FROM accounts", "SELECT @@global.max_connections := 5",
	// others
	"SELECT BENCHMARK(10, f_lock())", "SELECT MASTER_POS_WAIT('a', 1, 1)", "SELECT MASTER_GTID_WAIT('0-1-1', 0)", "SELECT NAME_CONST('a', f_lock())", "KILL 1", "SHUTDOWN", "INSTALL SONAME 'ha_archive'", "CHANGE MASTER TO MASTER_HOST = 'x'", "SELECT DES_ENCRYPT('a')", "SELECT SYS_EXEC('id')", "HELP 'x'", "SIGNAL SQLSTATE '45000'", "GET DIAGNOSTICS @a = NUMBER",
	"SELECT ＧＥＴ_ＬＯＣＫ('attack', 0)", "SELECT \u200bGET_LOCK('attack', 0)", "\ufeffDELETE FROM accounts", "SELECT 1\x00; DELETE FROM accounts", "SELECT '\xff\\'; DELETE FROM accounts; -- '", "DELETE/**/FROM accounts", "(((DELETE FROM accounts)))", ";DELETE FROM accounts", "SELECT 'unclosed", "SELECT `unclosed", "SELECT /* unclosed",
}

// mariaHarmless must run on the same source.
var mariaHarmless = []string{
	"SELECT * FROM accounts", "SELECT * FROM v_plain", "SELECT COUNT(*), SUM(amount), GROUP_CONCAT(owner ORDER BY id SEPARATOR ';') FROM accounts", "WITH t (a) AS (SELECT id FROM accounts) SELECT * FROM t",
	"SELECT owner, ROW_NUMBER() OVER (PARTITION BY owner ORDER BY id) FROM accounts", "SELECT NOW(), UUID(), RAND(), VERSION(), DATABASE(), CURRENT_USER()", "SELECT JSON_EXTRACT('{\"a\": 1}', '$.a')",
	"SELECT 'INTO OUTFILE', \"GET_LOCK('a', 1)\" -- INTO OUTFILE", "SELECT `into` FROM (SELECT 1 AS `into`) t", "(SELECT 1) UNION ALL (SELECT 2)", "SELECT ST_AsText(ST_GeomFromText('POINT(1 2)'))", "SELECT CAST('5' AS DECIMAL(10, 2)), CONVERT('a' USING utf8mb4)",
	"SELECT REPLACE('a', 'a', 'b'), INSERT('abc', 1, 1, 'x'), TRUNCATE(1.5, 0), LEFT('abc', 1), IF(1, 2, 3)", "SELECT DATE_ADD('2024-01-01', INTERVAL 1 DAY)", "SELECT TABLE_NAME FROM information_schema.TABLES WHERE TABLE_SCHEMA = 'shop'", "SELECT @@version",
	"DESCRIBE accounts", "DESC shop.accounts owner", "SHOW CREATE TABLE accounts", "SHOW TABLES", "SHOW FULL TABLES FROM shop LIKE 'a%'", "SHOW TABLE STATUS", "SHOW TABLE STATUS FROM shop", "SHOW INDEX FROM accounts", "SHOW FULL COLUMNS FROM v_plain", "SHOW CREATE VIEW v_plain", "SHOW DATABASES", "SHOW VARIABLES LIKE 'version%'",
}

// accountsState asks for what is in the tables of TestMariaAttacks.
var accountsState = []string{"SELECT * FROM shop.accounts ORDER BY id", "SELECT * FROM shop.journal", "SELECT * FROM shop.seq"}

// mariaState is everything that a statement could have changed; tables ask for what is
// in tables.
func mariaState(t *testing.T, db *sql.DB, dir string, tables ...string) string {
	t.Helper()
	return serverState(t, db, dir, append(tables, "SELECT User, Host, Priv FROM mysql.global_priv ORDER BY 1, 2", "SELECT * FROM mysql.plugin",
		"SELECT VARIABLE_NAME, GLOBAL_VALUE FROM information_schema.SYSTEM_VARIABLES WHERE VARIABLE_NAME NOT LIKE '%timestamp%' AND VARIABLE_NAME NOT LIKE 'gtid%' ORDER BY 1"))
}

// serverState is what mariaState asks of MySQL as well, and the files of the server.
func serverState(t *testing.T, db *sql.DB, dir string, questions []string) string {
	t.Helper()
	var out strings.Builder
	for _, question := range append(questions,
		"SELECT TABLE_SCHEMA, TABLE_NAME, TABLE_TYPE FROM information_schema.TABLES WHERE TABLE_SCHEMA NOT IN ('information_schema', 'performance_schema') ORDER BY 1, 2",
		"SELECT TABLE_SCHEMA, TABLE_NAME, COLUMN_NAME, COLUMN_TYPE FROM information_schema.COLUMNS WHERE TABLE_SCHEMA = 'shop' ORDER BY 1, 2, 3",
		"SELECT TABLE_NAME, VIEW_DEFINITION FROM information_schema.VIEWS WHERE TABLE_SCHEMA = 'shop' ORDER BY 1",
		"SELECT ROUTINE_NAME, ROUTINE_DEFINITION FROM information_schema.ROUTINES WHERE ROUTINE_SCHEMA = 'shop' ORDER BY 1",
		"SELECT * FROM mysql.func", "SELECT IS_FREE_LOCK('attack')", "SELECT SCHEMA_NAME FROM information_schema.SCHEMATA ORDER BY 1",
	) {
		rows, err := db.Query(question)
		if err != nil {
			t.Fatalf("%s: %v", question, err)
		}
		columns, _ := rows.Columns()
		values := make([]any, len(columns))
		for i := range values {
			values[i] = new(sql.RawBytes)
		}
		for rows.Next() {
			if err := rows.Scan(values...); err != nil {
				t.Fatal(err)
			}
			for _, v := range values {
				fmt.Fprintf(&out, "%s|", *v.(*sql.RawBytes))
			}
			out.WriteByte('\n')
		}
		_ = rows.Close()
	}
	var files []string
	for _, pattern := range []string{filepath.Join(dir, "*"), filepath.Join(dir, "data", "*"), filepath.Join(dir, "data", "shop", "*"), filepath.Join(os.TempDir(), "postern-attack*")} {
		found, _ := filepath.Glob(pattern)
		for _, f := range found {
			if !strings.Contains(f, "/data/#") { // the server's own, as it goes
				files = append(files, f)
			}
		}
	}
	sort.Strings(files)
	return out.String() + strings.Join(files, "\n")
}

var mariaIsSetUp bool

// setUpMaria makes what the attacks are aimed at, once.
func setUpMaria(t *testing.T) {
	t.Helper()
	if mariaIsSetUp {
		return
	}
	mariaIsSetUp = true
	ctx := context.Background()
	err := mariaServer.SQLIn(ctx, "shop", "CREATE TABLE accounts (id INT PRIMARY KEY, owner VARCHAR(50), amount INT)", "INSERT INTO accounts VALUES (1, 'canary', 100), (2, 'b', 200)",
		"CREATE TABLE journal (a INT)", "CREATE SEQUENCE seq",
		"CREATE FUNCTION f_write() RETURNS INT BEGIN INSERT INTO journal VALUES (1); RETURN 1; END",
		"CREATE FUNCTION f_lock() RETURNS INT RETURN GET_LOCK('attack', 0)",
		"CREATE FUNCTION json_lock() RETURNS INT RETURN GET_LOCK('attack', 0)",
		"CREATE FUNCTION st_lock() RETURNS INT RETURN GET_LOCK('attack', 0)",
		"CREATE VIEW `İview` AS SELECT f_lock() AS a", "CREATE VIEW `ÜBER` AS SELECT f_lock() AS a",
		"CREATE FUNCTION `jsön_path`() RETURNS INT RETURN GET_LOCK('attack', 0)",
		"CREATE FUNCTION `1f`() RETURNS INT RETURN GET_LOCK('attack', 0)",
		"CREATE FUNCTION f_global() RETURNS INT BEGIN SET GLOBAL max_connections = 77; RETURN 1; END",
		"CREATE FUNCTION f_outfile() RETURNS INT BEGIN DECLARE a INT; SELECT 1 INTO OUTFILE '/tmp/postern-attack-f'; RETURN 1; END",
		"CREATE PROCEDURE p_write() INSERT INTO journal VALUES (1)",
		"CREATE VIEW v_lock AS SELECT f_lock() AS a", "CREATE VIEW v_nested AS SELECT a, 1 AS b FROM v_lock", "CREATE VIEW v_json AS SELECT json_lock() AS a", "CREATE VIEW v_plain AS SELECT id, UPPER(owner) AS o FROM accounts WHERE YEAR(NOW()) > 2000")
	if err != nil {
		t.Fatal(err)
	}
}

func TestMariaAttacks(t *testing.T) {
	db, err := mariadb()
	if err != nil {
		t.Fatal(err)
	}
	setUpMaria(t)
	super := db.open(t, func(s *sqlsession.Source) {
		s.DSN = mariaServer.SocketDSN("root", "shop")
		s.Password = login(mariaServer.Password)
	})
	before := mariaState(t, db.admin, mariaServer.Dir, accountsState...)
	for _, text := range mariaAttacks {
		r := request(text)
		r.Timeout = 5 * time.Second
		got, _, err := try(t, super, r)
		code := proto.CodeOf(err)
		switch {
		case err == nil && !strings.Contains(text, "\r"): // there the rest is a comment
			t.Errorf("%q was let through: %v", text, got.rows)
		case err != nil && code != proto.CodePolicyDenied && code != proto.CodeInvalid && code != proto.CodeSQL:
			t.Errorf("%q: got %v (%v)", text, code, err)
		}
		if after := mariaState(t, db.admin, mariaServer.Dir, accountsState...); after != before {
			t.Fatalf("%q has changed something:\n%s", text, difference(before, after))
		}
	}
	for _, text := range mariaHarmless {
		if _, _, err := try(t, super, request(text)); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
	// An identifier that a value gives is looked at like any other.
	refuse(t, super, with("SELECT * FROM {{t|identifier}}", map[string]string{"t": "v_nested"}), proto.CodePolicyDenied)
	refuse(t, super, with("DESCRIBE {{t|identifier}}", map[string]string{"t": "v_nested"}), proto.CodePolicyDenied)
	refuse(t, super, with("SELECT {{f|identifier}} ()", map[string]string{"f": "f_lock"}), proto.CodePolicyDenied)
	query(t, super, with("SELECT * FROM {{t|identifier}}", map[string]string{"t": "v_plain"}))
	if after := mariaState(t, db.admin, mariaServer.Dir, accountsState...); after != before {
		t.Errorf("an identifier has changed something:\n%s", difference(before, after))
	}
	attackPlans(t, db.open(t, plans("full"), func(s *sqlsession.Source) {
		s.DSN, s.Password = mariaServer.SocketDSN("root", "shop"), login(mariaServer.Password)
	}), mariaAttacks, func() string { return mariaState(t, db.admin, mariaServer.Dir, accountsState...) })
	// What the policy lists may be called; a new connection takes the lock away again.
	listed := db.open(t, func(s *sqlsession.Source) {
		s.DSN, s.Password = mariaServer.SocketDSN("root", "shop"), login(mariaServer.Password)
		s.Guard.Mode, s.Guard.Functions = "read-only", []string{"shop.f_lock", "f_lock"}
	})
	query(t, listed, request("SELECT * FROM v_nested"))
	query(t, listed, request("SELECT 1"))
	if after := mariaState(t, db.admin, mariaServer.Dir, accountsState...); after != before {
		t.Errorf("a lock outlived its statement:\n%s", difference(before, after))
	}
	// The server holds what the tokens would let through.
	refuse(t, db.open(t, func(s *sqlsession.Source) {
		s.DSN, s.Password = mariaServer.SocketDSN("root", "shop"), login(mariaServer.Password)
		s.Guard.Mode, s.Guard.Functions = "read-only", []string{"*", "*.*"}
	}), request("SELECT f_write()"), proto.CodePolicyDenied)
	if after := mariaState(t, db.admin, mariaServer.Dir, accountsState...); after != before {
		t.Errorf("a listed function wrote:\n%s", difference(before, after))
	}
}

// difference is the lines that are in one of two texts alone.
func difference(a, b string) string {
	in := map[string]int{}
	for _, line := range strings.Split(a, "\n") {
		in[line]--
	}
	for _, line := range strings.Split(b, "\n") {
		in[line]++
	}
	var out []string
	for line, n := range in {
		if n != 0 {
			out = append(out, fmt.Sprintf("%+d %.200s", n, line))
		}
	}
	sort.Strings(out)
	return strings.Join(out, "\n")
}
