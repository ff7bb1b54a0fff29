package enginetest

import (
	"crypto/sha256"
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
)

// newSQLite makes a database with a few statements and a source for it.
func newSQLite(t *testing.T, statements ...string) (*database, *sql.DB) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "a.db")
	admin, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = admin.Close() })
	admin.SetMaxOpenConns(1)
	for _, s := range statements {
		if _, err := admin.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	return &database{engine: "sqlite", source: sqlsession.Source{Name: "db", Engine: "sqlite", DSN: "path=" + path}}, admin
}

func (db *database) path() string { return strings.TrimPrefix(db.source.DSN, "path=") }

var sqliteAttacks = []string{
	"INSERT INTO accounts VALUES (9, 'x', 1)", "UPDATE accounts SET amount = 0", "DELETE FROM accounts", "REPLACE INTO accounts VALUES (1, 'x', 1)", "DROP TABLE accounts", "CREATE TABLE x (a)", "CREATE TABLE x AS SELECT 1", "ALTER TABLE accounts ADD z", "ALTER TABLE accounts RENAME TO b",
	"CREATE INDEX i ON accounts (amount)", "CREATE VIEW v AS SELECT 1", "CREATE TRIGGER t AFTER INSERT ON accounts BEGIN SELECT 1; END", "DROP VIEW v_plain", "CREATE TEMP TABLE x (a)", "CREATE TEMP VIEW x AS SELECT 1", "CREATE TEMP TRIGGER t AFTER INSERT ON accounts BEGIN SELECT 1; END", "CREATE VIRTUAL TABLE x USING fts5(a)", "CREATE VIRTUAL TABLE x USING dbstat", "REINDEX", "ANALYZE", "VACUUM", "VACUUM INTO '/tmp/postern-attack'",
	"WITH t AS (SELECT 1) DELETE FROM accounts", "WITH t AS (SELECT 1) INSERT INTO accounts SELECT 9, 'x', 1", "INSERT INTO accounts VALUES (9, 'x', 1) RETURNING *", "UPDATE accounts SET amount = 0 RETURNING id", "DELETE FROM accounts RETURNING *", "INSERT INTO v_plain VALUES (1)",
	"SELECT 1; DELETE FROM accounts", "SELECT 1;;DELETE FROM accounts", ";DELETE FROM accounts", "-- x\nDELETE FROM accounts", "/* x */ DELETE FROM accounts", "SELECT 1; -- x\n DELETE FROM accounts", "SELECT 1; SELECT 2", "SELECT 1; garbage",
	"BEGIN", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE", "COMMIT", "END", "ROLLBACK", "SAVEPOINT a", "RELEASE a", "ROLLBACK TO a",
	"ATTACH '/etc/passwd' AS p", "ATTACH ':memory:' AS m", "ATTACH '/tmp/postern-attack' AS m", "ATTACH 'file:/tmp/postern-attack?mode=rwc' AS m", "DETACH main",
	"PRAGMA query_only = OFF", "PRAGMA query_only(0)", "PRAGMA journal_mode = WAL", "PRAGMA journal_mode(delete)", "PRAGMA user_version = 7", "PRAGMA application_id = 7", "PRAGMA writable_schema = 1", "PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA temp_store_directory = '/tmp'", "PRAGMA locking_mode = EXCLUSIVE", "PRAGMA schema_version = 9", "PRAGMA auto_vacuum = 1", "PRAGMA incremental_vacuum", "PRAGMA optimize", "PRAGMA shrink_memory", "PRAGMA hard_heap_limit = 0", "PRAGMA trusted_schema = 1", "PRAGMA encoding = 'UTF-16'", "PRAGMA main.user_version = 7", "PRAGMA data_store_directory = '/tmp'", "PRAGMA mmap_size = 100000", "PRAGMA cache_spill = 1", "PRAGMA secure_delete = 1", "PRAGMA page_size = 512", "PRAGMA case_sensitive_like = 1", "PRAGMA busy_timeout = 1", "PRAGMA foreign_keys = OFF", "SELECT * FROM pragma_user_version(7)", "SELECT * FROM pragma_journal_mode('wal')", "SELECT * FROM pragma_wal_checkpoint", "SELECT * FROM pragma_optimize",
	"SELECT load_extension('/tmp/x.so')", "SELECT load_extension('/tmp/x.so', 'init')", "SELECT fts3_tokenizer('simple', x'00')", "SELECT writefile('/tmp/postern-attack', 'x')", "SELECT readfile('/etc/passwd')", "SELECT edit('x')", "SELECT sqlite_attach('x', 'y', 'z')", "SELECT sqlite_rename_table('a')", "SELECT zipfile('x')", "SELECT * FROM fsdir('/')", "SELECT * FROM sqlite_dbpage", "UPDATE sqlite_dbpage SET data = x'00' WHERE pgno = 1", "INSERT INTO sqlite_dbpage VALUES (1, x'00')",
	"INSERT INTO sqlite_schema VALUES ('table', 'x', 'x', 0, 'CREATE TABLE x(a)')", "UPDATE sqlite_master SET sql = 'x'", "DELETE FROM sqlite_schema", "INSERT INTO words VALUES ('x')", "INSERT INTO words(words) VALUES ('rebuild')", "INSERT INTO words(words) VALUES ('optimize')", "DELETE FROM words_data", "UPDATE words_config SET v = 5", "INSERT INTO boxes VALUES (9, 1, 2, 3, 4)", "DELETE FROM boxes_node", "INSERT INTO boxes_rowid VALUES (77, 1)", "UPDATE boxes_parent SET parentnode = 5",
	"EXPLAIN SELECT 1", "EXPLAIN QUERY PLAN SELECT * FROM accounts", "EXPLAIN DELETE FROM accounts", "SELECT 'unclosed", "SELECT 1 \x00; DELETE FROM accounts", "SELECT '\xff'", "SELECT * FROM v_load", "SELECT evil FROM accounts, v_load",
}

var sqliteHarmless = []string{
	"SELECT * FROM accounts", "SELECT * FROM v_plain", "SELECT COUNT(*), SUM(amount), group_concat(owner, ';') FROM accounts", "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5) SELECT * FROM n", "VALUES (1), (2)",
	"SELECT owner, row_number() OVER (PARTITION BY owner ORDER BY id) FROM accounts", "SELECT date('now'), strftime('%Y', 'now'), random(), abs(-1)", "SELECT '{\"a\": 1}' ->> 'a', json_extract('{}', '$.x')", "SELECT * FROM json_each('[1, 2]')",
	"SELECT * FROM words WHERE words MATCH 'hello'", "SELECT snippet(words, 0, '<', '>', '', 5) FROM words WHERE words MATCH 'hello' ORDER BY rank", "SELECT * FROM boxes WHERE minx < 5", "SELECT * FROM pragma_table_info('accounts')", "PRAGMA table_info(accounts)", "PRAGMA user_version", "SELECT 1; -- the end", "SELECT 1;;; /* x */", "SELECT name FROM sqlite_schema",
}

func TestSQLiteAttacks(t *testing.T) {
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
	m := db.open(t)
	before := state()
	for _, text := range sqliteAttacks {
		got, _, err := try(t, m, request(text))
		code := proto.CodeOf(err)
		if err == nil {
			t.Errorf("%q was let through: %v", text, got.rows)
		} else if code != proto.CodePolicyDenied && code != proto.CodeInvalid && code != proto.CodeSQL {
			t.Errorf("%q: got %v (%v)", text, code, err)
		}
		if after := state(); after != before {
			t.Fatalf("%q has changed something: %s, was %s", text, after, before)
		}
	}
	for _, text := range sqliteHarmless {
		if _, _, err := try(t, m, request(text)); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
	attackPlans(t, db.open(t, plans("full")), sqliteAttacks, state)
	if after := state(); after != before {
		t.Errorf("reading has changed something: %s, was %s", after, before)
	}
}

// A source that may write, narrowed by the policy.
func TestSQLiteWrite(t *testing.T) {
	db, _ := newSQLite(t, "CREATE TABLE a (id INTEGER PRIMARY KEY AUTOINCREMENT, x TEXT)", "CREATE TABLE log (x)", "CREATE TRIGGER t AFTER UPDATE ON a BEGIN DELETE FROM log; END")
	write := func(text string) sqlsession.Request {
		r := request(text)
		r.ReadWrite = true
		return r
	}
	m := db.open(t, readWrite, func(s *sqlsession.Source) {
		s.Guard.Mode, s.Guard.WriteStatements = "read-write", []string{"insert", "update"}
	})
	query(t, m, write("INSERT INTO a (x) VALUES ('1')"))
	got, _ := query(t, m, write("INSERT INTO a (x) VALUES ('2') RETURNING id"))
	if len(got.rows) != 1 || got.rows[0][0] != "2" {
		t.Errorf("RETURNING: got %v", got.rows)
	}
	for _, text := range []string{
		"DELETE FROM a", "UPDATE a SET x = 'through the trigger'", "DROP TABLE a", "CREATE TABLE b (a)", "CREATE TEMP TABLE b (a)", "ATTACH '/tmp/x' AS y",
		"PRAGMA user_version = 5", "DELETE FROM sqlite_sequence", "CREATE VIRTUAL TABLE v USING fts5(a)",
	} {
		refuse(t, m, write(text), proto.CodePolicyDenied)
	}
	refuse(t, m, write("VACUUM"), proto.CodeSQL)                                       // not in a transaction
	refuse(t, m, write("INSERT INTO sqlite_schema VALUES (1,2,3,4,5)"), proto.CodeSQL) // DEFENSIVE
	all := db.open(t, readWrite)
	query(t, all, write("CREATE TABLE b (id INTEGER PRIMARY KEY AUTOINCREMENT)"))
	query(t, all, write("CREATE VIRTUAL TABLE v USING fts5(a)"))
	query(t, all, write("INSERT INTO v VALUES ('hello')"))
	query(t, all, write("UPDATE a SET x = 'now it may'"))
	query(t, all, write("DROP TABLE b"))
	query(t, all, write("ANALYZE"))
	refuse(t, all, write("CREATE VIRTUAL TABLE w USING dbstat"), proto.CodePolicyDenied)
}

// With a write-ahead log, a writer beside us or none.
func TestSQLiteLog(t *testing.T) {
	db, admin := newSQLite(t, "PRAGMA journal_mode = WAL", "CREATE TABLE a (x INT)", "INSERT INTO a VALUES (1)")
	m := db.open(t)
	read := func(want string) {
		t.Helper()
		if got, _ := query(t, m, request("SELECT COUNT(*) FROM a")); got.rows[0][0] != want {
			t.Errorf("got %v, want %s", got.rows, want)
		}
	}
	read("1")
	if _, err := admin.Exec("INSERT INTO a VALUES (2)"); err != nil {
		t.Fatal(err)
	}
	read("2")
	if err := admin.Close(); err != nil {
		t.Fatal(err)
	}
	read("2")
	// Nobody has it open, and nothing is beside it.
	other, closed := newSQLite(t, "PRAGMA journal_mode = WAL", "CREATE TABLE a (x INT)", "INSERT INTO a VALUES (1)")
	_ = closed.Close()
	m = other.open(t)
	read("1")
	again, err := sql.Open("sqlite", other.path())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = again.Close() }()
	if _, err := again.Exec("INSERT INTO a VALUES (5)"); err != nil {
		t.Fatal(err)
	}
	read("2")
}

func TestSQLiteLockedAndReplaced(t *testing.T) {
	db, admin := newSQLite(t, "CREATE TABLE a (x INT)", "INSERT INTO a VALUES (1)")
	m := db.open(t)
	query(t, m, request("SELECT x FROM a"))
	conn, err := admin.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.ExecContext(t.Context(), "BEGIN EXCLUSIVE"); err != nil {
		t.Fatal(err)
	}
	r := request("SELECT x FROM a")
	r.Timeout = 200 * time.Millisecond
	refuse(t, m, r, proto.CodeTimeout)
	if _, err := conn.ExecContext(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	query(t, m, request("SELECT x FROM a"))

	fresh, other := newSQLite(t, "CREATE TABLE a (x INT)", "INSERT INTO a VALUES (42)")
	_ = other.Close()
	if err := os.Rename(fresh.path(), db.path()); err != nil {
		t.Fatal(err)
	}
	if got, _ := query(t, m, request("SELECT x FROM a")); got.rows[0][0] != "42" {
		t.Errorf("got %v, want the new file's", got.rows)
	}
	if err := os.Remove(db.path()); err != nil {
		t.Fatal(err)
	}
	refuse(t, m, request("SELECT x FROM a"), proto.CodeSourceUnreachable)
	if err := os.WriteFile(db.path(), []byte(strings.Repeat("no database ", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	refuse(t, m, request("SELECT x FROM a"), proto.CodeSourceConfig)
	if err := os.Remove(db.path()); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", db.path()); err != nil {
		t.Fatal(err)
	}
	e := refuse(t, m, request("SELECT x FROM a"), proto.CodeSourceUnreachable)
	if strings.Contains(e.Error(), "\n") {
		t.Errorf("got %q, want one line", e)
	}
}

func TestSQLiteTypes(t *testing.T) {
	db, _ := newSQLite(t, "CREATE TABLE a (i INT, r REAL, s VARCHAR(5), b BLOB, n DECIMAL(10,2), d DATE, untyped)",
		"INSERT INTO a VALUES (9223372036854775807, 1.5, 'ä', x'00ff', '12.50', '2024-01-01', 5), (NULL, 2, '', x'', 1e300, NULL, 6), (-1, NULL, NULL, 'text', 7, 19000, 7)",
		"CREATE TABLE mixed (i INT, s TEXT, b BLOB)", "INSERT INTO mixed VALUES (1, 'a', x'01'), ('two', 'b', x'02'), (3, x'ff', 7)")
	m := db.open(t)
	got, _ := query(t, m, request("SELECT * FROM a"))
	var types []string
	for _, f := range got.schema.Fields() {
		types = append(types, f.Type.String())
	}
	if want := "int64 float64 utf8 binary utf8 utf8 int64"; strings.Join(types, " ") != want {
		t.Errorf("got %v, want %s", types, want)
	}
	want := [][]string{
		{"9223372036854775807", "1.5", "ä", "AP8=", "12.5", "2024-01-01", "5"}, {"(null)", "2", "", "", "1e+300", "(null)", "6"}, {"-1", "(null)", "(null)", "dGV4dA==", "7", "19000", "7"},
	}
	for i := range want {
		if strings.Join(got.rows[i], "|") != strings.Join(want[i], "|") {
			t.Errorf("row %d: got %q, want %q", i, got.rows[i], want[i])
		}
	}
	for text, says := range map[string]string{
		"SELECT i FROM mixed": `column "i": row 2 holds a text, and the column is of integers`,
		"SELECT s FROM mixed": `column "s": row 3 holds a blob`,
		"SELECT b FROM mixed": `column "b": row 3 holds an integer`,
		"SELECT CASE WHEN i = 1 THEN 1 ELSE 'x' END AS c FROM mixed": `column "c": row 2 holds a text`,
		"SELECT CAST(x'ff' AS TEXT) AS c":                            "not valid UTF-8",
	} {
		if e := refuse(t, m, request(text), proto.CodeInvalid); !strings.Contains(e.Error(), says) {
			t.Errorf("%s: got %q, want %q", text, e, says)
		}
	}
	got, _ = query(t, m, request("SELECT CAST(i AS TEXT) AS i, hex(b) FROM mixed"))
	if got.rows[1][0] != "two" {
		t.Errorf("got %v", got.rows)
	}
}

// In mode metadata nothing is run.
func TestSQLiteMetadata(t *testing.T) {
	db, _ := newSQLite(t, "CREATE TABLE a (i INT, s TEXT)", "INSERT INTO a VALUES (1, 'canary')")
	m := db.open(t, func(s *sqlsession.Source) { s.Guard.Mode = "metadata" })
	got, outcome := query(t, m, request("SELECT i, s, i + 1 AS j FROM a WHERE s = {{x}}"))
	if len(got.rows) != 0 || got.schema.NumFields() != 3 || got.schema.Field(0).Type.String() != "int64" || outcome.CommandTag != "DESCRIBE" {
		t.Errorf("got %v, %v", got.schema, outcome)
	}
	refuse(t, m, request("DELETE FROM a"), proto.CodePolicyDenied)
	refuse(t, m, request("PRAGMA user_version = 4"), proto.CodePolicyDenied)
}

// Memory has a bound, and what needs more is refused by SQLite itself.
func TestSQLiteMemory(t *testing.T) {
	db, _ := newSQLite(t, "CREATE TABLE a (i INT)")
	m := db.open(t)
	refuse(t, m, request("SELECT zeroblob(300000000)"), proto.CodeSQL)
	e := refuse(t, m, request("SELECT CAST(zeroblob(200000000) AS TEXT), CAST(zeroblob(200000000) AS TEXT), CAST(zeroblob(200000000) AS TEXT)"), proto.CodeSQL)
	if !strings.Contains(e.Error(), "512 MiB") {
		t.Errorf("got %q, want the bound", e)
	}
	query(t, m, request("SELECT 1"))
}
