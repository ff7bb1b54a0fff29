//go:build realmysql

package enginetest

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/e2e/mariadbserver"
	"github.com/postern-dev/postern/proto"
)

// With the tag realmysql the suite runs on MySQL alone, which make mysql-test fetches:
// POSTERN_MYSQL is where it is.
func init() { engines = []func() (*database, error){mysql} }

var mysqlServer *mariadbserver.Server

var mysql = sync.OnceValues(func() (*database, error) {
	prefix := os.Getenv("POSTERN_MYSQL")
	if prefix == "" {
		return nil, fmt.Errorf("POSTERN_MYSQL is not set: run make mysql-test")
	}
	s, err := mariadbserver.Launch(context.Background(), mariadbserver.Options{TLS: true, MySQL: prefix})
	if err != nil {
		return nil, err
	}
	mysqlServer = s
	stops = append(stops, s.Stop)
	ctx := context.Background()
	err = s.SQL(ctx, "CREATE DATABASE shop", "CREATE TABLE shop.things (id int PRIMARY KEY, name text)",
		"INSERT INTO shop.things WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000) SELECT i, CONCAT('thing ', i) FROM n", "CREATE TABLE shop.secret_plans (a int)",
		"CREATE DATABASE numbers", "CREATE TABLE numbers.thousand AS SELECT id FROM shop.things", "SET GLOBAL log_bin_trust_function_creators = 1")
	if err != nil {
		return nil, err
	}
	if err := s.CreateUser(ctx, "reader", readerPassword, "ALL ON shop.*", "SELECT ON numbers.*"); err != nil {
		return nil, err
	}
	admin, err := s.Open("shop")
	if err != nil {
		return nil, err
	}
	admin.SetMaxIdleConns(0) // the server may be restarted
	stops = append([]func() error{admin.Close}, stops...)
	return &database{
		name: "MySQL", engine: "mysql", admin: admin, schema: "shop",
		source: sqlsession.Source{Name: "db", Engine: "mysql", DSN: s.DSN("reader", "shop"), Password: login(readerPassword)},
		series: func(n int) string {
			return fmt.Sprintf("SELECT ROW_NUMBER() OVER () AS i FROM numbers.thousand a, numbers.thousand b, numbers.thousand c LIMIT %d", n)
		},
		slow: "SELECT SLEEP(60)",
		text: func(n int) string { return fmt.Sprintf("SELECT REPEAT('x', %d)", n) },
		down: s.Down, up: func() error { return s.Restart(context.Background()) },
		kick: func() error {
			rows, err := admin.Query("SELECT ID FROM information_schema.PROCESSLIST WHERE USER = 'reader'")
			if err != nil {
				return err
			}
			defer func() { _ = rows.Close() }()
			for rows.Next() {
				var id int64
				if err := rows.Scan(&id); err != nil {
					return err
				}
				_ = s.SQL(ctx, fmt.Sprintf("KILL %d", id))
			}
			return rows.Err()
		},
	}, nil
})

// mysqlRoot is the shared MySQL as its superuser.
func mysqlRoot(t *testing.T) (*database, func(s *sqlsession.Source)) {
	t.Helper()
	db, err := mysql()
	if err != nil {
		t.Fatal(err)
	}
	return db, func(s *sqlsession.Source) {
		s.DSN, s.Password = mysqlServer.SocketDSN("root", "shop"), login(mysqlServer.Password)
	}
}

// mysqlState is everything that a statement could have changed.
func mysqlState(t *testing.T, db *sql.DB, tables ...string) string {
	t.Helper()
	return serverState(t, db, mysqlServer.Dir, append(tables, "SELECT * FROM mysql.user ORDER BY User, Host", "SELECT * FROM mysql.plugin", "SELECT * FROM mysql.component", "SELECT * FROM mysql.global_grants ORDER BY 1, 2, 3",
		"SELECT VARIABLE_NAME, VARIABLE_VALUE FROM performance_schema.global_variables WHERE VARIABLE_NAME NOT LIKE '%timestamp%' AND VARIABLE_NAME NOT LIKE 'gtid%' ORDER BY 1"))
}

// mysqlAttacks is what MySQL has and MariaDB has not, besides mariaAttacks.
var mysqlAttacks = []string{
	"TABLE accounts INTO OUTFILE '/tmp/postern-attack'", "VALUES ROW(1) INTO OUTFILE '/tmp/postern-attack'", "VALUES ROW(f_write())", "VALUES ROW(f_lock()), ROW(1)", "TABLE v_lock", "TABLE accounts FOR UPDATE", "SELECT * FROM accounts FOR SHARE", "SELECT * FROM accounts FOR UPDATE OF accounts SKIP LOCKED", "SELECT * FROM accounts FOR NO KEY UPDATE", "(SELECT 1) INTERSECT (SELECT f_lock())", "SELECT * FROM LATERAL (SELECT f_lock()) t", "SELECT * FROM accounts, LATERAL (SELECT f_lock() FROM accounts) t",
	"EXPLAIN ANALYZE SELECT f_write()", "EXPLAIN ANALYZE DELETE FROM accounts", "EXPLAIN FORMAT=TREE SELECT f_lock()", "EXPLAIN FORMAT=JSON INTO @a SELECT 1", "EXPLAIN FOR CONNECTION 5", "SET PERSIST max_connections = 77", "SET PERSIST_ONLY max_connections = 77", "RESET PERSIST", "ALTER INSTANCE ROTATE INNODB MASTER KEY", "ALTER INSTANCE RELOAD TLS", "RESTART", "CLONE LOCAL DATA DIRECTORY = '/tmp/postern-attack'", "INSTALL COMPONENT 'file://component_log_sink_json'", "IMPORT TABLE FROM '/tmp/x.sdi'", "LOCK INSTANCE FOR BACKUP", "CREATE ROLE attacker", "SET DEFAULT ROLE ALL TO root", "GRANT SELECT ON *.* TO reader", "CREATE RESOURCE GROUP g TYPE = USER", "CREATE SPATIAL REFERENCE SYSTEM 4711 NAME 'x' DEFINITION 'x'",
	"SELECT /*+ SET_VAR(max_connections = 5) */ 1", "SELECT /*+ RESOURCE_GROUP(SYS_default) */ 1", "SELECT/*+SET_VAR(foreign_key_checks=0)*/1", "SELECT /*!80000 f_lock()*/", "SELECT /*!080000 f_lock()*/", "SELECT 1 /*!90000 INTO OUTFILE '/tmp/postern-attack' */",
	"SELECT WAIT_FOR_EXECUTED_GTID_SET('x', 0)", "SELECT SOURCE_POS_WAIT('a', 1, 1)", "SELECT GTID_SUBSET('a', 'b')", "SELECT service_get_write_locks('a', 'b', 1)", "SELECT group_replication_set_as_primary('x')", "SELECT keyring_key_generate('a', 'AES', 16)", "SELECT asynchronous_connection_failover_reset()", "SELECT mysql_firewall_flush_status()", "SELECT audit_log_rotate()", "SELECT sys.ps_is_account_enabled('a', 'b')", "CALL sys.execute_prepared_stmt('SELECT 1')", "CALL sys.ps_setup_enable_consumer('x')", "SELECT STATEMENT_DIGEST(f_lock())", "SELECT ROLES_GRAPHML(f_lock())", "SELECT get_lock('attack', 0) AS a", "SELECT ST_Collect(f_lock())", "SELECT JSON_TABLE(f_lock(), '$')", "SELECT * FROM JSON_TABLE(f_text_lock(), '$[*]' COLUMNS (a INT PATH '$')) t", "SELECT JSON_ARRAYAGG(f_lock()) FROM accounts", "SELECT SUM(f_lock()) OVER (ORDER BY f_lock()) FROM accounts", "SELECT * FROM accounts QUALIFY f_lock() > 0", "SELECT * FROM accounts TABLESAMPLE SYSTEM (f_lock())", "SELECT $$DELETE FROM accounts$$", "SELECT $tag$ ' $tag$, f_lock() -- '", "SELECT $$ ' $$, GET_LOCK('attack', 0), $$ ' $$",
	"SELECT 1 INTO @x", "SELECT ST_lock()", "SELECT json_lock()", "CREATE FUNCTION f_js() RETURNS INT LANGUAGE JAVASCRIPT AS $$ return 1 $$",
}

func TestMySQLAttacks(t *testing.T) {
	db, super := mysqlRoot(t)
	if err := mysqlServer.SQLIn(t.Context(), "shop", "CREATE TABLE accounts (id INT PRIMARY KEY, owner VARCHAR(50), amount INT)", "INSERT INTO accounts VALUES (1, 'canary', 100), (2, 'b', 200)", "CREATE TABLE journal (a INT)",
		"CREATE FUNCTION f_write() RETURNS INT BEGIN INSERT INTO journal VALUES (1); RETURN 1; END", "CREATE FUNCTION f_lock() RETURNS INT RETURN GET_LOCK('attack', 0)", "CREATE FUNCTION f_text_lock() RETURNS TEXT RETURN GET_LOCK('attack', 0)",
		"CREATE FUNCTION json_lock() RETURNS INT RETURN GET_LOCK('attack', 0)", "CREATE FUNCTION st_lock() RETURNS INT RETURN GET_LOCK('attack', 0)",
		"CREATE VIEW `İview` AS SELECT f_lock() AS a", "CREATE VIEW `ÜBER` AS SELECT f_lock() AS a", "CREATE FUNCTION `jsön_path`() RETURNS INT RETURN GET_LOCK('attack', 0)", "CREATE FUNCTION `1f`() RETURNS INT RETURN GET_LOCK('attack', 0)",
		"CREATE FUNCTION f_global() RETURNS INT BEGIN SET GLOBAL max_connections = 77; RETURN 1; END", "CREATE PROCEDURE p_write() INSERT INTO journal VALUES (1)",
		"CREATE VIEW v_lock AS SELECT f_lock() AS a", "CREATE VIEW v_nested AS SELECT a, 1 AS b FROM v_lock", "CREATE VIEW v_json AS SELECT json_lock() AS a", "CREATE VIEW v_plain AS SELECT id, UPPER(owner) AS o FROM accounts WHERE YEAR(NOW()) > 2000",
	); err != nil {
		t.Fatal(err)
	}
	m := db.open(t, super)
	tables := []string{"SELECT * FROM shop.accounts ORDER BY id", "SELECT * FROM shop.journal"}
	before := mysqlState(t, db.admin, tables...)
	for _, text := range append(append([]string{}, mariaAttacks...), mysqlAttacks...) {
		r := request(text)
		r.Timeout = 5 * time.Second
		got, _, err := try(t, m, r)
		switch code := proto.CodeOf(err); {
		case err == nil && !strings.Contains(text, "\r"): // there the rest is a comment
			t.Errorf("%q was let through: %v", text, got.rows)
		case err != nil && code != proto.CodePolicyDenied && code != proto.CodeInvalid && code != proto.CodeSQL:
			t.Errorf("%q: got %v (%v)", text, code, err)
		}
		if after := mysqlState(t, db.admin, tables...); after != before {
			t.Fatalf("%q has changed something:\n%s", text, difference(before, after))
		}
	}
	for _, text := range append(append([]string{}, mariaHarmless...), "VALUES ROW(1, 2), ROW(3, 4)", "TABLE accounts", "SELECT * FROM accounts, LATERAL (SELECT accounts.id + 1) t", "SELECT * FROM JSON_TABLE('[1]', '$[*]' COLUMNS (a INT PATH '$')) t",
		"SELECT ANY_VALUE(owner) FROM accounts", "SELECT REGEXP_LIKE('a', 'A'), UUID_TO_BIN(UUID()), BIN_TO_UUID(UUID_TO_BIN(UUID())), JSON_PRETTY('{}')") {
		if _, _, err := try(t, m, request(text)); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
	attackPlans(t, db.open(t, super, plans("full")), append(append([]string{}, mariaAttacks...), mysqlAttacks...), func() string { return mysqlState(t, db.admin, tables...) })
	// The server holds what the tokens would let through.
	refuse(t, db.open(t, super, func(s *sqlsession.Source) { s.Guard.Mode, s.Guard.Functions = "read-only", []string{"*", "*.*"} }), request("SELECT f_write()"), proto.CodePolicyDenied)
	if after := mysqlState(t, db.admin, tables...); after != before {
		t.Errorf("a listed function wrote:\n%s", difference(before, after))
	}
}

// TestMySQLSessionAttacks comes after TestMySQLAttacks, which makes what it is aimed at.
func TestMySQLSessionAttacks(t *testing.T) {
	db, super := mysqlRoot(t)
	attackSession(t, db.open(t, super), append(append([]string{}, mysqlAttacks...), mariaSessionAttacks...), "@@transaction_read_only", func() string {
		return mysqlState(t, db.admin, "SELECT * FROM shop.accounts ORDER BY id", "SELECT * FROM shop.journal")
	})
}

func TestMySQLMaskCorpus(t *testing.T) {
	db, super := mysqlRoot(t)
	source := mysqlMaskDatabase(t, db, func(ctx context.Context, name string, statements ...string) error {
		return mysqlServer.SQLIn(ctx, name, statements...)
	}, super)
	if err := mysqlServer.SQLIn(t.Context(), "shop_mask", "ANALYZE TABLE people UPDATE HISTOGRAM ON ssn, email WITH 10 BUCKETS"); err != nil {
		t.Fatal(err)
	}
	m := db.open(t, source)
	maskCorpus(t, m, mysqlMaskCorpus)
	mysqlMasks(t, m)
	mysqlMaskSession(t, db.open(t, source))
	maskCorpus(t, db.open(t, source, func(s *sqlsession.Source) { s.Guard.Functions = []string{"shop_mask.*", "f_ssn"} }), mysqlMaskCorpus)
}

// mysqlMetadataAttacks are of MySQL's own.
var mysqlMetadataAttacks = []string{
	"VALUES ROW((SELECT s FROM secrets LIMIT 1))", "SELECT * FROM secrets, LATERAL (SELECT ROUND(1.23456, secrets.n) AS r) t", "SELECT STATEMENT_DIGEST_TEXT((SELECT s FROM secrets LIMIT 1))", "SELECT JSON_SCHEMA_VALIDATION_REPORT((SELECT s FROM secrets LIMIT 1), '{}')", "SELECT JSON_VALUE('{}', '$' RETURNING CHAR(5))", "SELECT CAST((SELECT s FROM secrets LIMIT 1) AS JSON)", "SELECT ST_GeomFromGeoJSON((SELECT s FROM secrets LIMIT 1))", "SELECT GTID_SUBSET((SELECT s FROM secrets LIMIT 1), '1')", "SELECT GTID_SUBTRACT((SELECT s FROM secrets LIMIT 1), '1')", "SELECT BIN_TO_UUID((SELECT s FROM secrets LIMIT 1))", "SELECT ST_LatFromGeoHash((SELECT s FROM secrets LIMIT 1))", "SELECT ST_LongFromGeoHash((SELECT s FROM secrets LIMIT 1))", "SELECT ST_PointFromGeoHash((SELECT s FROM secrets LIMIT 1), 1)",
	"SELECT CAST(s AS UNSIGNED ARRAY) FROM secrets", "SELECT MEMBER(s) FROM secrets", "SELECT 'a' MEMBER OF ((SELECT s FROM secrets LIMIT 1))", "EXPLAIN FORMAT=TREE SELECT * FROM secrets", "EXPLAIN ANALYZE SELECT * FROM secrets", "SHOW CREATE TABLE secrets", "SELECT HISTOGRAM FROM information_schema.COLUMN_STATISTICS", "SELECT * FROM performance_schema.events_statements_history", "SELECT * FROM sys.processlist", "SELECT COALESCE((SELECT s FROM secrets LIMIT 1), (SELECT x FROM secrets LIMIT 1)) LIKE 'z%'", "SELECT 1 FROM secrets WHERE s = (SELECT MAX(s) FROM secrets) AND n BETWEEN 1 AND (SELECT 9)",
}

func TestMySQLMetadata(t *testing.T) {
	db, super := mysqlRoot(t)
	attackMetadata(t, db, super, append(append([]string{}, metadataAttacks...), mysqlMetadataAttacks...), func() string { return mysqlState(t, db.admin, "SELECT * FROM secrets") })
}

func TestMySQLMetadataListed(t *testing.T) {
	db, super := mysqlRoot(t)
	listedInMetadata(t, db, super)
}

func TestMySQLMetadataTypes(t *testing.T) {
	db, super := mysqlRoot(t)
	typesInMetadata(t, db, super)
	// MySQL says what it takes placeholders for.
	_, outcome := query(t, db.open(t, super, metadata), request("SELECT id FROM things WHERE id = {{a}} AND name = {{b}}"))
	if len(outcome.Parameters) != 2 || outcome.Parameters[0].Type != "bigint" || !strings.Contains(outcome.Parameters[1].Type, "text") && !strings.Contains(outcome.Parameters[1].Type, "char") {
		t.Errorf("got %v, want the types of two placeholders", outcome.Parameters)
	}
}

// caching_sha2_password, MySQL's own: with TLS, without (by its key), on the socket, and
// once the server has cached it.
func TestMySQLLogins(t *testing.T) {
	db, _ := mysqlRoot(t)
	for i, dsn := range []string{
		fmt.Sprintf("host=127.0.0.1 port=%d dbname=shop sslmode=disable", mysqlServer.Port), fmt.Sprintf("host=127.0.0.1 port=%d dbname=shop sslmode=verify-full sslrootcert=%s", mysqlServer.Port, mysqlServer.CAFile),
		fmt.Sprintf("host=%s dbname=shop", mysqlServer.Socket), fmt.Sprintf("host=127.0.0.1 port=%d dbname=shop", mysqlServer.Port),
	} {
		user := fmt.Sprintf("login%d", i)
		if err := mysqlServer.CreateUser(t.Context(), user, readerPassword, "SELECT ON shop.*"); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			m := db.open(t, func(s *sqlsession.Source) { s.DSN = dsn + " user=" + user })
			query(t, m, request("SELECT 1"))
			for _, c := range m.Check(t.Context(), "db") {
				if c.Result == "failed" || c.Name == "role" && c.Result != "ok" {
					t.Errorf("%s: got %v", dsn, c)
				}
			}
			if err := mysqlServer.SQL(t.Context(), "SELECT 1"); err != nil {
				t.Fatal(err)
			}
		}
		refuse(t, db.open(t, func(s *sqlsession.Source) { s.DSN, s.Password = dsn+" user="+user, login("wrong") }), request("SELECT 1"), proto.CodeSourceCredentials)
	}
}

// What a role may do counts when the role is active at login, and the check says so.
func TestMySQLRoles(t *testing.T) {
	db, _ := mysqlRoot(t)
	if err := mysqlServer.SQL(t.Context(), "CREATE ROLE writers", "GRANT SELECT, INSERT, DELETE ON shop.* TO writers", "CREATE USER member IDENTIFIED BY '"+readerPassword+"'", "GRANT writers TO member", "SET DEFAULT ROLE writers TO member"); err != nil {
		t.Fatal(err)
	}
	m := db.open(t, func(s *sqlsession.Source) { s.DSN = mysqlServer.DSN("member", "shop") })
	query(t, m, request("SELECT COUNT(*) FROM things"))
	refuse(t, m, request("DELETE FROM things"), proto.CodePolicyDenied)
	for _, c := range m.Check(t.Context(), "db") {
		if c.Name == "role" && (c.Result != "warning" || !strings.Contains(c.Message, "DELETE")) {
			t.Errorf("got %v, want a warning of what the role may do", c)
		}
	}
}

// Modes of the server's that change how texts are cut are dropped.
func TestMySQLModes(t *testing.T) {
	db, super := mysqlRoot(t)
	if err := mysqlServer.SQL(t.Context(), "SET GLOBAL sql_mode = 'ANSI,NO_BACKSLASH_ESCAPES,PIPES_AS_CONCAT'"); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = mysqlServer.SQL(context.Background(), "SET GLOBAL sql_mode = DEFAULT") }()
	m := db.open(t, super)
	got, _ := query(t, m, request(`SELECT "a\"b", 'c\'d', 'e' || 'f'`))
	if strings.Join(got.rows[0], "|") != `a"b|c'd|ef` {
		t.Errorf("got %v", got.rows)
	}
	refuse(t, m, request(`SELECT "a" , ' \' , GET_LOCK("x", 0) , ' '`), proto.CodePolicyDenied)
}

func TestMySQLShow(t *testing.T) {
	db, super := mysqlRoot(t)
	showsCatalog(t, db, super)
}

func TestMySQLTLS(t *testing.T) {
	db, _ := mysqlRoot(t)
	m := db.open(t, func(s *sqlsession.Source) {
		s.DSN = fmt.Sprintf("host=localhost port=%d user=reader dbname=shop sslrootcert=%s", mysqlServer.Port, mysqlServer.CAFile)
	})
	query(t, m, request("SELECT 1"))
	for _, c := range m.Check(t.Context(), "db") {
		if c.Name == "tls" && !strings.Contains(c.Message, "certificate verified") {
			t.Errorf("got %v", c)
		}
	}
}
