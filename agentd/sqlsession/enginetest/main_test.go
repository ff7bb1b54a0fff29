package enginetest

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	_ "github.com/jackc/pgx/v5/stdlib"
	"go.uber.org/goleak"
	_ "modernc.org/sqlite"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/e2e/leakwait"
	"github.com/postern-dev/postern/e2e/mariadbserver"
	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const readerPassword = "marked-reader-password"

// TestMain serves as the SQL session's process, too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case sqlsession.ChildArg:
			os.Exit(sqlsession.ChildMain())
		case sqlsession.ParserArg:
			os.Exit(sqlsession.ParserMain())
		}
	}
	parser = sqlsession.NewParser(sqlsession.ParserConfig{})
	parser.Start()
	code := m.Run()
	parser.Close()
	for _, stop := range stops {
		if err := stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	if code == 0 {
		leakwait.Wait()
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// parser is PostgreSQL's; the tests share it.
var parser *sqlsession.Parser

// stops end the shared servers.
var stops []func() error

// database is one engine with a database of the suite's: a table things with the
// columns id (1 to 1000) and name ("thing 1"), which the account reader may read.
type database struct {
	name   string // of the product
	engine string
	source sqlsession.Source
	// admin may do everything.
	admin *sql.DB
	// schema is where things is.
	schema string

	// Phrases of the dialect. series gives n numbers from 1; slow runs for a minute;
	// text gives a text of n characters x.
	series func(n int) string
	slow   string
	text   func(n int) string
	// down and up stop and start the server; nil if there is none.
	down, up func() error
	// kick ends all connections of the reader's; nil if there is no server. busy counts the
	// statements that the server runs for them and that have text in them.
	kick func() error
	busy func(text string) (n int, err error)
}

var postgres = sync.OnceValues(func() (*database, error) {
	s, err := pgserver.Launch(context.Background(), pgserver.Options{})
	if err != nil {
		return nil, err
	}
	stops = append(stops, s.Stop)
	ctx := context.Background()
	if err := s.CreateRole(ctx, "reader", readerPassword); err != nil {
		return nil, err
	}
	err = s.SQL(ctx, "CREATE SCHEMA shop", "GRANT USAGE, CREATE ON SCHEMA shop TO reader", "ALTER ROLE reader SET search_path = shop",
		"CREATE TABLE shop.things (id int PRIMARY KEY, name text)", "INSERT INTO shop.things SELECT i, 'thing ' || i FROM generate_series(1, 1000) i",
		"GRANT SELECT, INSERT, UPDATE, DELETE ON shop.things TO reader", "CREATE TABLE shop.secret_plans (a int)", "GRANT SELECT ON shop.secret_plans TO reader")
	if err != nil {
		return nil, err
	}
	admin, err := sql.Open("pgx", s.DSN(pgserver.Superuser, pgserver.Superuser)+" password="+s.Password)
	if err != nil {
		return nil, err
	}
	admin.SetMaxIdleConns(0) // the server may be restarted
	stops = append([]func() error{admin.Close}, stops...)
	return &database{
		name: "PostgreSQL", engine: "postgres", admin: admin, schema: "shop",
		source: sqlsession.Source{Name: "db", Engine: "postgres", DSN: s.DSN("reader", pgserver.Superuser), Password: login(readerPassword)},
		series: func(n int) string { return fmt.Sprintf("SELECT i FROM generate_series(1, %d) i", n) },
		slow:   "SELECT pg_sleep(60)",
		text:   func(n int) string { return fmt.Sprintf("SELECT repeat('x', %d)", n) },
		down:   s.Down, up: func() error { return s.Restart(context.Background()) },
		kick: func() error {
			_, err := admin.Exec("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reader'")
			return err
		},
		busy: func(text string) (n int, err error) {
			err = admin.QueryRow("SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND state = 'active' AND strpos(query, $1) > 0", text).Scan(&n)
			return n, err
		},
	}, nil
})

var mariaServer *mariadbserver.Server

var mariadb = sync.OnceValues(func() (*database, error) {
	s, err := mariadbserver.Launch(context.Background(), mariadbserver.Options{TLS: true})
	if err != nil {
		return nil, err
	}
	mariaServer = s
	stops = append(stops, s.Stop)
	ctx := context.Background()
	err = s.SQL(ctx, "CREATE DATABASE shop", "CREATE TABLE shop.things (id int PRIMARY KEY, name text)",
		"INSERT INTO shop.things SELECT seq, CONCAT('thing ', seq) FROM shop.seq_1_to_1000", "CREATE TABLE shop.secret_plans (a int)")
	if err != nil {
		return nil, err
	}
	if err := s.CreateUser(ctx, "reader", readerPassword, "ALL ON shop.*"); err != nil {
		return nil, err
	}
	admin, err := s.Open("shop")
	if err != nil {
		return nil, err
	}
	admin.SetMaxIdleConns(0) // the server may be restarted
	stops = append([]func() error{admin.Close}, stops...)
	return &database{
		name: "MariaDB", engine: "mysql", admin: admin, schema: "shop",
		source: sqlsession.Source{Name: "db", Engine: "mysql", DSN: s.DSN("reader", "shop"), Password: login(readerPassword)},
		series: func(n int) string { return fmt.Sprintf("SELECT seq FROM seq_1_to_%d", n) },
		slow:   "SELECT SLEEP(60)",
		text:   func(n int) string { return fmt.Sprintf("SELECT REPEAT('x', %d)", n) },
		down:   s.Down, up: func() error { return s.Restart(context.Background()) },
		kick: func() error { return s.SQL(ctx, "KILL USER reader") },
		busy: func(text string) (n int, err error) {
			err = admin.QueryRow("SELECT COUNT(*) FROM information_schema.processlist WHERE user = 'reader' AND INSTR(info, ?) > 0", text).Scan(&n)
			return n, err
		},
	}, nil
})

var sqlite = sync.OnceValues(func() (*database, error) {
	dir, err := os.MkdirTemp("", "postern-sqlite-")
	if err != nil {
		return nil, err
	}
	stops = append(stops, func() error { return os.RemoveAll(dir) })
	path := filepath.Join(dir, "shop.db")
	admin, err := sql.Open("sqlite", path)
	if err != nil {
		return nil, err
	}
	admin.SetMaxIdleConns(0)
	stops = append([]func() error{admin.Close}, stops...)
	for _, text := range []string{
		"CREATE TABLE things (id INTEGER PRIMARY KEY, name TEXT)", "CREATE TABLE secret_plans (a INT)",
		"INSERT INTO things WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000) SELECT i, 'thing ' || i FROM n",
	} {
		if _, err := admin.Exec(text); err != nil {
			return nil, err
		}
	}
	return &database{
		name: "SQLite", engine: "sqlite", admin: admin, schema: "main",
		source: sqlsession.Source{Name: "db", Engine: "sqlite", DSN: "path=" + path},
		series: func(n int) string {
			return fmt.Sprintf("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d) SELECT i FROM n", n)
		},
		slow: "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n",
		text: func(n int) string { return fmt.Sprintf("SELECT replace(hex(zeroblob(%d)), '00', 'x')", n) },
	}, nil
})

// engines are those that the suite runs on.
var engines = []func() (*database, error){postgres, mariadb, sqlite}

// each runs a test on every engine.
func each(t *testing.T, test func(t *testing.T, db *database)) {
	t.Helper()
	for _, open := range engines {
		db, err := open()
		if err != nil {
			t.Fatal(err)
		}
		t.Run(db.name, func(t *testing.T) { test(t, db) })
	}
}

func login(password string) sqlsession.PasswordFunc {
	return func(context.Context) (string, error) { return password, nil }
}

// open starts a Manager for the database; change changes the source.
func (db *database) open(t testing.TB, change ...func(*sqlsession.Source)) *sqlsession.Manager {
	t.Helper()
	s := db.source
	for _, c := range change {
		c(&s)
	}
	m := sqlsession.New(sqlsession.Config{Logger: slog.New(slog.NewTextHandler(writer{t}, nil)), Warm: -1, Parser: parser})
	m.SetSources([]sqlsession.Source{s})
	if db.engine == "postgres" {
		waitForParser(t, m)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := m.Close(ctx); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return m
}

// underWay waits until the server runs a statement for the reader; without a server, until
// the Manager runs something, and a little longer.
func (db *database) underWay(t testing.TB, m *sqlsession.Manager, text string) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		n := len(m.Running())
		if db.busy != nil {
			var err error
			if n, err = db.busy(text); err != nil {
				t.Fatal(err)
			}
		}
		if n > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the slow statement does not begin")
		}
	}
	if db.busy == nil {
		time.Sleep(300 * time.Millisecond)
	}
}

// waitForParser waits, once, until the parser that all tests share has started: on a
// busy machine that takes longer than a statement waits. Where the source itself is at
// fault it is the test that says so.
func waitForParser(t testing.TB, m *sqlsession.Manager) {
	t.Helper()
	if parserReady {
		return
	}
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		_, err := m.Run(t.Context(), request("SELECT 1"), io.Discard)
		if code := proto.CodeOf(err); err == nil || code != proto.CodeUnavailable {
			parserReady = err == nil
			return
		}
	}
	t.Fatal("the parser of statements does not start")
}

var parserReady bool

func readWrite(s *sqlsession.Source) { s.ReadWrite = true }

type writer struct{ t testing.TB }

func (w writer) Write(p []byte) (int, error) {
	w.t.Logf("%s", bytes.TrimSpace(p))
	return len(p), nil
}

var number atomic.Int64

func request(text string) sqlsession.Request {
	return sqlsession.Request{QueryID: fmt.Sprintf("qry_%d", number.Add(1)), Source: "db", Owner: "tok_a", SQL: text}
}

func with(text string, values map[string]string) sqlsession.Request {
	r := request(text)
	for name, value := range values {
		p := &posternv1.Parameter{Name: name, Value: &value}
		if value == "NULL" {
			p.Value = nil
		}
		r.Parameters = append(r.Parameters, p)
	}
	return r
}

type table struct {
	schema *arrow.Schema
	rows   [][]string // ValueStr of each value; "(null)" is NULL
}

func decode(t testing.TB, stream []byte) table {
	t.Helper()
	if len(stream) == 0 {
		return table{}
	}
	r, err := ipc.NewReader(bytes.NewReader(stream))
	if err != nil {
		t.Fatalf("decode %d bytes: %v", len(stream), err)
	}
	defer r.Release()
	out := table{schema: r.Schema()}
	for r.Next() {
		record := r.RecordBatch()
		for i := range int(record.NumRows()) {
			row := make([]string, record.NumCols())
			for j := range row {
				row[j] = record.Column(j).ValueStr(i)
			}
			out.rows = append(out.rows, row)
		}
	}
	if r.Err() != nil {
		t.Fatalf("decode: %v", r.Err())
	}
	return out
}

// query runs a statement that must succeed.
func query(t testing.TB, m *sqlsession.Manager, r sqlsession.Request) (table, *posternv1.QueryOutcome) {
	t.Helper()
	got, outcome, err := try(t, m, r)
	if err != nil {
		t.Fatalf("%.200s: %v", r.SQL, err)
	}
	return got, outcome
}

func try(t testing.TB, m *sqlsession.Manager, r sqlsession.Request) (table, *posternv1.QueryOutcome, error) {
	t.Helper()
	var out bytes.Buffer
	outcome, err := m.Run(t.Context(), r, &out)
	got := decode(t, out.Bytes())
	if outcome != nil && (uint64(len(got.rows)) != outcome.Rows || uint64(out.Len()) != outcome.Bytes) {
		t.Fatalf("%.100s: outcome says %d rows, %d bytes; got %d, %d", r.SQL, outcome.Rows, outcome.Bytes, len(got.rows), out.Len())
	}
	return got, outcome, err
}

// refuse runs a statement that must fail with a code.
func refuse(t testing.TB, m *sqlsession.Manager, r sqlsession.Request, code proto.Code) *proto.Error {
	t.Helper()
	_, outcome, err := try(t, m, r)
	if got := proto.CodeOf(err); got != code {
		t.Fatalf("%.200s: got %v (%v), want %v", r.SQL, got, err, code)
	}
	if outcome.Error.GetCode() != code || outcome.Error.GetMessage() == "" {
		t.Fatalf("outcome: got %v, want %v", outcome.Error, code)
	}
	var e *proto.Error
	errors.As(err, &e)
	return e
}
