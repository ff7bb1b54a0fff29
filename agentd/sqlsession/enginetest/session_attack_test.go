package enginetest

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
)

// sessionWords are those of mariaAttacks that are a session's business.
var sessionWords = map[string]bool{"COMMIT": true, "ROLLBACK": true, "BEGIN": true, "SET @a = 1": true, "SAVEPOINT a": true, "USE mysql": true}

// mariaSessionAttacks must be refused in a session, in a transaction and out of it.
var mariaSessionAttacks = []string{
	// settings that would undo what holds the session
	"SET SESSION TRANSACTION READ WRITE", "SET TRANSACTION READ WRITE", "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE", "SET transaction_read_only = 0", "SET SESSION transaction_read_only = OFF", "SET @@session.transaction_read_only = 0",
	"SET tx_read_only = 0", "SET @@tx_read_only = 0", "SET @@local.tx_read_only := 0", "SET SESSION tx_read_only = DEFAULT", "SET @@`tx_read_only` = 0", "SET `tx_read_only` = 0", "SET lc_time_names = 'de_DE', tx_read_only = 0", "SET @a = 1, tx_read_only = 0", "SET @a = 1, SESSION tx_read_only = 0", "SET @a = 1, @@tx_read_only = 0",
	"SET autocommit = 0", "SET autocommit = 1", "SET @@autocommit = 0", "SET AUTOCOMMIT=ON", "SET completion_type = 2", "SET SESSION completion_type = 'CHAIN'",
	"SET GLOBAL max_connections = 77", "SET @@global.max_connections = 77", "SET @@GLOBAL.max_connections := 77", "SET PERSIST max_connections = 77", "SET @@persist.max_connections = 77", "SET group_concat_max_len = 100, GLOBAL max_connections = 77", "SET @a = 1, GLOBAL max_connections = 77", "SET @a = (1), @@global.max_connections = 77",
	"SET sql_mode = 'ANSI_QUOTES'", "SET sql_mode = ANSI_QUOTES", "SET sql_mode = 'ANSI'", "SET sql_mode = 'ORACLE'", "SET sql_mode = 'STRICT_TRANS_TABLES,NO_BACKSLASH_ESCAPES'", "SET sql_mode = CONCAT(@@sql_mode, ',ANSI_QUOTES')", "SET sql_mode = DEFAULT", "SET sql_mode = 4", "SET sql_mode = ''''", "SET sql_mode = @a", "SET sql_mode = 'STRICT_TRANS_TABLES\\',ANSI_QUOTES'", "SET sql_mode = (SELECT 'ANSI_QUOTES')",
	"SET NAMES latin1", "SET NAMES gbk", "SET CHARACTER SET gbk", "SET character_set_client = gbk", "SET character_set_results = NULL", "SET collation_connection = 'gbk_chinese_ci'", "SET time_zone = '+09:00'", "SET @@time_zone = 'SYSTEM'", "SET timestamp = 1", "SET insert_id = 5", "SET last_insert_id = 77", "SET rand_seed1 = 1", "SET pseudo_thread_id = 1", "SET pseudo_slave_mode = 1",
	"SET sql_log_bin = 0", "SET sql_log_off = 1", "SET gtid_domain_id = 5", "SET server_id = 9", "SET foreign_key_checks = 0", "SET unique_checks = 0", "SET check_constraint_checks = 0", "SET session_track_schema = OFF", "SET wait_timeout = 1", "SET max_statement_time = 'x'", "SET max_statement_time = -1", "SET lock_wait_timeout = 100000", "SET lock_wait_timeout = DEFAULT", "SET innodb_lock_wait_timeout = 31", "SET secure_file_priv = ''", "SET default_storage_engine = MEMORY", "SET debug = 'd'", "SET debug_dbug = 'd'", "SET storage_engine = x", "SET optimizer_switch = 'x=on'';'", "SET optimizer_switch = 'mrr=1'", "SET lc_time_names = 'x y'",
	"SET PASSWORD = PASSWORD('x')", "SET PASSWORD FOR root@localhost = PASSWORD('x')", "SET ROLE none", "SET ROLE ALL", "SET DEFAULT ROLE none", "SET RESOURCE GROUP x", "SET STATEMENT max_statement_time = 1 FOR DELETE FROM accounts", "SET STATEMENT tx_read_only = 0 FOR SELECT 1", "SET", "SET x", "SET @", "SET @a", "SET @a =", "SET @ a = 1", "SET a := ",
	// every SELECT would lock what it reads
	"SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", "SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE", "SET transaction_isolation = 'SERIALIZABLE'", "SET tx_isolation = SERIALIZABLE", "SET @@session.tx_isolation = 'serializable'", "SET tx_isolation = 3", "START TRANSACTION ISOLATION LEVEL SERIALIZABLE",
	// ways of a variable's value
	"SET @a = (SELECT f_lock())", "SET @a = f_lock()", "SET @a = shop.f_lock()", "SET @a = GET_LOCK('attack', 0)", "SET @a = (SELECT a FROM v_lock)", "SET @a = (SELECT a FROM v_nested)", "SET @a := (SELECT 1 INTO OUTFILE '/tmp/postern-attack')", "SET @a = 1) , GLOBAL max_connections = (77", "SET @a = 1), (@@global.max_connections = 77", "SET @a = (1", "SET @a = 1)", "SET @a = NEXT VALUE FOR seq", "SET @a = NEXTVAL(seq)", "SET @a = 1; DELETE FROM accounts", "SET @a = LOAD_FILE('/etc/passwd')", "SET @a = (SELECT id FROM accounts LIMIT 1 FOR UPDATE)", "SET @a = (@b := 5)", "SET @a = 1 -- x\n, tx_read_only = 0", "SET @a = 1 /*! , GLOBAL max_connections = 77 */", "SET @a = 'x' 'y', @b = 1, @@sql_mode = 'ANSI_QUOTES'",
	"SELECT @a := f_lock()", "SELECT @a := 1", "SELECT 1 INTO @a", "SELECT id INTO @a FROM accounts LIMIT 1", "SELECT @@global.max_connections := 77",
	// transactions
	"START TRANSACTION READ WRITE", "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ WRITE", "START TRANSACTION READ ONLY, READ WRITE", "START TRANSACTION READ ONLY; DELETE FROM accounts", "BEGIN NOT ATOMIC DELETE FROM accounts; END", "BEGIN WORK; DELETE FROM accounts", "BEGIN /*! ; DELETE FROM accounts */", "COMMIT AND CHAIN", "COMMIT AND NO CHAIN RELEASE", "COMMIT RELEASE", "ROLLBACK AND CHAIN", "ROLLBACK RELEASE", "ROLLBACK; DELETE FROM accounts", "START SLAVE", "STOP SLAVE", "START REPLICA", "START ALL SLAVES",
	"XA START 'x'", "XA BEGIN 'x'", "XA END 'x'", "XA PREPARE 'x'", "XA COMMIT 'x'", "XA RECOVER", "LOCK TABLES accounts READ", "LOCK TABLES accounts WRITE", "LOCK TABLE accounts WRITE", "UNLOCK TABLES", "FLUSH TABLES WITH READ LOCK", "FLUSH TABLES accounts FOR EXPORT", "BACKUP LOCK accounts", "BACKUP STAGE START", "LOCK INSTANCE FOR BACKUP",
	// what a session could keep
	"CREATE TEMPORARY TABLE x (a INT)", "CREATE TEMPORARY TABLE x AS SELECT 1", "CREATE TEMPORARY TABLE accounts AS SELECT 1", "CREATE TEMPORARY SEQUENCE x", "DROP TEMPORARY TABLE accounts", "PREPARE s FROM 'DELETE FROM accounts'", "PREPARE s FROM @a", "EXECUTE s", "EXECUTE IMMEDIATE 'DELETE FROM accounts'", "EXECUTE IMMEDIATE @a", "DEALLOCATE PREPARE s", "HANDLER accounts OPEN", "HANDLER accounts READ FIRST", "DECLARE c CURSOR FOR SELECT 1", "DO f_lock()", "CALL p_write()", "SAVEPOINT a; DELETE FROM accounts", "SAVEPOINT 'a'", "SAVEPOINT a b", "RELEASE a", "ROLLBACK TO a b", "USE shop; DELETE FROM accounts", "USE a.b", "USE 'shop'", "USE", "USE shop mysql",
}

// TestMariaSessionAttacks runs the attacks in sessions of the superuser, one by one and
// in a transaction, and compares the server's state.
func TestMariaSessionAttacks(t *testing.T) {
	db, err := mariadb()
	if err != nil {
		t.Fatal(err)
	}
	setUpMaria(t)
	m := db.open(t, func(s *sqlsession.Source) {
		s.DSN, s.Password = mariaServer.SocketDSN("root", "shop"), login(mariaServer.Password)
		s.Concurrency = 4
	})
	state := func() string { return mariaState(t, db.admin, mariaServer.Dir, accountsState...) }
	s := attackSession(t, m, mariaSessionAttacks, "@@tx_read_only", state)
	// What a session may, and that it is its own.
	other := openSession(t, m, false)
	s.run("SET @a = (SELECT MAX(amount) FROM accounts), @`b c` := 'x', SESSION div_precision_increment = 9", "none")
	if got := s.value("SELECT CONCAT(@a, @`b c`, 1 / 3)", "none"); got != "200x0.333333333" {
		t.Errorf("got %s", got)
	}
	if got := other.value("SELECT @a", "none"); got != "(null)" {
		t.Errorf("another session has the variable: %s", got)
	}
	r := s.request("SET @p = {{v}}, @q = UPPER({{v}})")
	v := "it's; --"
	r.Parameters = with("", map[string]string{"v": v}).Parameters
	query(t, m, r)
	if got := s.value("SELECT CONCAT(@p, @q)", "none"); got != "it's; --IT'S; --" {
		t.Errorf("got %s", got)
	}
	s.run("USE information_schema", "none")
	if got := s.value("SELECT COUNT(*) FROM TABLES WHERE TABLE_SCHEMA = 'shop' AND TABLE_NAME = 'accounts'", "none"); got != "1" {
		// What tells of views is looked at: see judgeCatalog.
		t.Errorf("got %s", got)
	}
}

// attackSession runs mariaAttacks and more in a session on a read-only source; readOnly
// is the server's setting of that.
func attackSession(t *testing.T, m *sqlsession.Manager, attacks []string, readOnly string, state func() string) *stay {
	t.Helper()
	s := openSession(t, m, false)
	before := state()
	var all []string
	for _, text := range append(append([]string{}, mariaAttacks...), attacks...) {
		if !sessionWords[text] {
			all = append(all, text)
		}
	}
	holds := "SELECT CONCAT(" + readOnly + ", @@autocommit, @@time_zone, @@character_set_client, @@character_set_results, LOCATE('ANSI', @@sql_mode), DATABASE())"
	held := s.value(holds, "none")
	for _, begin := range []string{"", "START TRANSACTION WITH CONSISTENT SNAPSHOT", "BEGIN"} {
		for _, text := range all {
			want := "none"
			if begin != "" {
				s.run(begin, "open")
				want = "open"
			}
			r := s.request(text)
			r.Timeout = 5 * time.Second
			got, outcome, err := try(t, m, r)
			code := proto.CodeOf(err)
			switch {
			case err == nil && !strings.Contains(text, "\r"): // there the rest is a comment
				t.Errorf("%q was let through (in %q): %v", text, begin, got.rows)
			case err != nil && code != proto.CodePolicyDenied && code != proto.CodeInvalid && code != proto.CodeSQL:
				t.Errorf("%q: got %v (%v)", text, code, err)
			}
			if outcome.Transaction != want && (outcome.Transaction != "" || code != proto.CodeInvalid) {
				t.Fatalf("%q: the transaction is %q, want %q", text, outcome.Transaction, want)
			}
			if got := s.value(holds, want); got != held {
				t.Fatalf("%q: the session is now %s, was %s", text, got, held)
			}
			if begin != "" {
				s.run("ROLLBACK", "none")
			}
		}
		if after := state(); after != before {
			t.Fatalf("something in %q has changed the server:\n%s", begin, difference(before, after))
		}
	}
	return s
}

// TestMariaSessionDeadlock: what the server rolled back by itself is told.
func TestMariaSessionDeadlock(t *testing.T) {
	db, err := mariadb()
	if err != nil {
		t.Fatal(err)
	}
	m := db.open(t, readWrite, func(s *sqlsession.Source) { s.Concurrency = 4 })
	a, b := openSession(t, m, true), openSession(t, m, true)
	a.run("BEGIN", "open")
	b.run("START TRANSACTION READ WRITE", "open")
	a.run("UPDATE things SET name = 'a' WHERE id = 1", "open")
	b.run("UPDATE things SET name = 'b' WHERE id = 2", "open")
	result := make(chan string, 2)
	for s, id := range map[*stay]int{a: 2, b: 1} {
		go func() {
			r := s.request(fmt.Sprintf("UPDATE things SET name = 'x' WHERE id = %d", id))
			outcome, err := m.Run(context.Background(), r, &strings.Builder{})
			result <- fmt.Sprintf("%v %s", proto.CodeOf(err), outcome.Transaction)
		}()
	}
	got := map[string]bool{<-result: true, <-result: true}
	if !got[fmt.Sprintf("%v open", proto.CodeOf(nil))] || !got[fmt.Sprintf("%v failed", proto.CodeSQL)] {
		t.Errorf("got %v, want one open and one that the server rolled back", got)
	}
	for _, s := range []*stay{a, b} {
		s.run("ROLLBACK", "none")
	}
	if got := a.value("SELECT COUNT(*) FROM things WHERE name LIKE 'thing %'", "none"); got != "1000" {
		t.Errorf("got %s things", got)
	}
	// DDL commits, and that is told.
	a.run("BEGIN", "open")
	_, outcome := a.run("CREATE TABLE ddl (a INT)", "none")
	if len(outcome.Notices) == 0 || !strings.Contains(outcome.Notices[0].Message, "committed the transaction") {
		t.Errorf("got notices %v", outcome.Notices)
	}
	a.run("DROP TABLE ddl", "none")
	// A procedure that turns off what statements rely on.
	for _, text := range []string{"CREATE PROCEDURE p_settings() BEGIN SET sql_mode = 'ANSI_QUOTES'; SET time_zone = '+09:00'; SET character_set_results = latin1; END", "CREATE PROCEDURE p_auto() SET autocommit = 0"} {
		if _, err := db.admin.Exec(text); err != nil {
			t.Fatal(err)
		}
	}
	defer func() {
		_, _ = db.admin.Exec("DROP PROCEDURE p_settings")
		_, _ = db.admin.Exec("DROP PROCEDURE p_auto")
	}()
	if _, outcome = a.run("CALL p_settings()", "none"); len(outcome.Notices) == 0 || !strings.Contains(outcome.Notices[0].Message, "set back") {
		t.Errorf("got notices %v", outcome.Notices)
	}
	if got := a.value(`SELECT CONCAT("größe ", @@time_zone, @@character_set_results, LOCATE('ANSI', @@sql_mode))`, "none"); got != "größe +00:00utf8mb40" {
		t.Errorf("got %s", got)
	}
	a.run("BEGIN", "open")
	a.run("UPDATE things SET name = 'auto' WHERE id = 1", "open")
	a.run("CALL p_auto()", "failed")
	a.run("ROLLBACK", "none")
	if got := a.value("SELECT CONCAT(name, @@autocommit) FROM things WHERE id = 1", "none"); got != "thing 1ON" {
		t.Errorf("got %s", got)
	}
	a.run("SET max_statement_time = 0.2", "none")
	a.fails("SELECT SLEEP(20)", proto.CodeTimeout, "200ms", "none")
	a.run("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", "none")
	a.run("SET max_statement_time = 0", "none")
	a.run("BEGIN", "open")
	a.fails("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", proto.CodeSQL, "25001", "open")
	a.fails("BEGIN", proto.CodeSQL, "25001", "open")
	a.fails("nonsense", proto.CodeSQL, "", "open") // as MySQL does, the transaction goes on
	a.run("ROLLBACK", "none")
	// READ ONLY of the user's own on a source that may write.
	a.run("START TRANSACTION READ ONLY", "open")
	a.fails("UPDATE things SET name = 'x'", proto.CodeSQL, "1792", "open")
	a.run("COMMIT", "none")
}

// sqliteSessionAttacks must be refused in a session on a read-only source.
var sqliteSessionAttacks = []string{
	"BEGIN IMMEDIATE", "BEGIN EXCLUSIVE TRANSACTION", "BEGIN CONCURRENT", "BEGIN; DELETE FROM accounts", "COMMIT; DELETE FROM accounts", "END; DELETE FROM accounts", "ROLLBACK; DELETE FROM accounts", "SAVEPOINT a; DELETE FROM accounts", "SAVEPOINT", "SAVEPOINT a b", "RELEASE", "ROLLBACK TO", "SAVEPOINT 'a", "SAVEPOINT 5",
	"PRAGMA query_only = OFF", "PRAGMA query_only(0)", "PRAGMA recursive_triggers = on", "PRAGMA defer_foreign_keys = on", "PRAGMA case_sensitive_like = (SELECT 1)", "PRAGMA case_sensitive_like = 5", "PRAGMA temp_store = FILE", "PRAGMA temp_store_directory = '/tmp'", "PRAGMA locking_mode = EXCLUSIVE", "PRAGMA main.locking_mode = EXCLUSIVE", "PRAGMA writable_schema = ON", "PRAGMA ignore_check_constraints = 1", "PRAGMA legacy_alter_table = 1", "PRAGMA journal_mode = MEMORY", "PRAGMA journal_mode = OFF", "PRAGMA synchronous = 0", "PRAGMA read_uncommitted = 1", "PRAGMA cache_size = 1000000", "PRAGMA analysis_limit = 5", "PRAGMA trusted_schema = 1", "PRAGMA cell_size_check = 0", "PRAGMA foreign_keys = OFF",
	"CREATE TEMP TABLE s (a)", "CREATE TEMP TABLE s AS SELECT * FROM accounts", "CREATE TABLE temp.s (a)", "CREATE TEMP VIEW s AS SELECT 1", "CREATE TEMP TRIGGER t AFTER INSERT ON main.accounts BEGIN DELETE FROM main.accounts; END", "INSERT INTO temp.sqlite_schema VALUES (1, 2, 3, 4, 5)", "CREATE VIRTUAL TABLE temp.x USING fts5(a)", "ATTACH '' AS s", "ATTACH ':memory:' AS s", "VACUUM",
}

func TestSQLiteSessionAttacks(t *testing.T) {
	db, admin := newSQLite(t, "CREATE TABLE accounts (id INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT, amount INT)", "INSERT INTO accounts VALUES (1, 'canary', 100), (2, 'b', 200)",
		"CREATE VIEW v_plain AS SELECT id, upper(owner) AS o FROM accounts", "CREATE VIEW v_load AS SELECT load_extension('/tmp/x.so') AS evil", "CREATE TRIGGER v_in INSTEAD OF INSERT ON v_plain BEGIN DELETE FROM accounts; END",
		"CREATE VIRTUAL TABLE words USING fts5(a)", "INSERT INTO words VALUES ('hello world')", "CREATE VIRTUAL TABLE boxes USING rtree(id, minx, maxx, miny, maxy)", "INSERT INTO boxes VALUES (1, 1, 2, 3, 4)")
	_ = admin.Close()
	state := func() string {
		t.Helper()
		content, err := os.ReadFile(db.path())
		if err != nil {
			t.Fatal(err)
		}
		files, _ := filepath.Glob(filepath.Join(filepath.Dir(db.path()), "*"))
		more, _ := filepath.Glob(filepath.Join(os.TempDir(), "postern-attack*"))
		return fmt.Sprintf("%x %v %v", sha256.Sum256(content), files, more)
	}
	words := map[string]bool{"BEGIN": true, "COMMIT": true, "END": true, "ROLLBACK": true, "SAVEPOINT a": true, "RELEASE a": true, "ROLLBACK TO a": true, "PRAGMA case_sensitive_like = 1": true}
	s := openSession(t, db.open(t), false)
	before := state()
	for _, begin := range []string{"", "BEGIN"} {
		for _, text := range append(append([]string{}, sqliteAttacks...), sqliteSessionAttacks...) {
			if words[text] {
				continue
			}
			want := "none"
			if begin != "" {
				s.run(begin, "open")
				want = "open"
			}
			got, outcome, err := try(t, s.m, s.request(text))
			code := proto.CodeOf(err)
			if err == nil {
				t.Errorf("%q was let through: %v", text, got.rows)
			} else if code != proto.CodePolicyDenied && code != proto.CodeInvalid && code != proto.CodeSQL {
				t.Errorf("%q: got %v (%v)", text, code, err)
			}
			if outcome.Transaction != want && (outcome.Transaction != "" || code != proto.CodeInvalid) {
				t.Fatalf("%q: the transaction is %q, want %q", text, outcome.Transaction, want)
			}
			if got := s.value("SELECT COUNT(*) FROM sqlite_temp_schema", want); got != "0" {
				t.Fatalf("%q has made something temporary", text)
			}
			if after := state(); after != before {
				t.Fatalf("%q has changed something: %s, was %s", text, after, before)
			}
			if begin != "" {
				s.run("ROLLBACK", "none")
			}
		}
	}
	s.run("BEGIN DEFERRED TRANSACTION", "open")
	s.run("SAVEPOINT \"a \"\"b\"", "open")
	s.run("SELECT COUNT(*) FROM accounts", "open")
	s.run("ROLLBACK TRANSACTION TO SAVEPOINT \"a \"\"b\"", "open")
	s.run("END TRANSACTION", "none")
	s.run("PRAGMA case_sensitive_like = on", "none")
	if got := s.value("SELECT 'a' LIKE 'A'", "none"); got != "0" {
		t.Errorf("the setting does not stay: %s", got)
	}
}

// A session on a source that may write keeps to what the policy lists, temporary objects
// apart; they reach nothing of it.
func TestSQLiteSessionWrite(t *testing.T) {
	db, _ := newSQLite(t, "CREATE TABLE a (id INTEGER PRIMARY KEY, x TEXT)", "INSERT INTO a VALUES (1, 'x')", "CREATE TABLE log (x)")
	m := db.open(t, readWrite, func(s *sqlsession.Source) {
		s.Guard.Mode, s.Guard.WriteStatements = "read-write", []string{"insert"}
	})
	s := openSession(t, m, true)
	s.run("CREATE TEMP TABLE t (i INT)", "none")
	s.run("INSERT INTO t VALUES (1), (2)", "none")
	s.run("UPDATE t SET i = i + 1", "none")
	s.run("DELETE FROM temp.t WHERE i = 2", "none")
	s.run("CREATE TEMP TRIGGER tr AFTER INSERT ON main.log BEGIN DELETE FROM main.a; END", "none")
	for _, text := range []string{"INSERT INTO log VALUES (1)", "DELETE FROM a", "UPDATE a SET x = 'y'", "CREATE TABLE b (a)", "DROP TABLE a", "ALTER TABLE a ADD z", "CREATE INDEX i ON a (x)", "PRAGMA user_version = 5", "ATTACH ':memory:' AS y"} {
		if _, _, err := try(t, m, s.request(text)); proto.CodeOf(err) != proto.CodePolicyDenied {
			t.Errorf("%s: got %v, want POLICY_DENIED", text, err)
		}
	}
	s.run("DROP TRIGGER tr", "none")
	s.run("BEGIN IMMEDIATE", "open")
	s.run("INSERT INTO log VALUES (1)", "open")
	s.fails("INSERT INTO a VALUES (1, 'twice')", proto.CodeSQL, "UNIQUE", "open")
	s.run("COMMIT", "none")
	if got := s.value("SELECT (SELECT COUNT(*) FROM log) || (SELECT SUM(i) FROM t)", "none"); got != "13" {
		t.Errorf("got %s", got)
	}
}
