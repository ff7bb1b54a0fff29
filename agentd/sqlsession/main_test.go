package sqlsession_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"go.uber.org/goleak"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/e2e/leakwait"
	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// server is shared by the package's tests; those that stop a server start
// their own.
var server *pgserver.Server

// parser is shared by the package's tests: it takes a second to start, ten with
// the race detector.
var parser *sqlsession.Parser

const readerPassword = "marked-reader-password"

// TestMain serves as the SQL session's process, too, and as a parent to kill.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case sqlsession.ChildArg:
			os.Exit(sqlsession.ChildMain())
		case sqlsession.ParserArg:
			os.Exit(sqlsession.ParserMain())
		case helperHoldArg:
			os.Exit(helperHold())
		case helperParentArg:
			os.Exit(helperParent())
		}
	}
	code := 1
	if err := startServer(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		parser = sqlsession.NewParser(sqlsession.ParserConfig{})
		parser.Start()
		if err := awaitParser(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		} else {
			code = m.Run()
		}
		parser.Close()
		if err := server.Stop(); err != nil {
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

// awaitParser waits until the shared parser answers: on a busy machine it takes longer
// to start than a test waits for a statement.
func awaitParser() error {
	client, err := sqlsession.NewParserClient(parser)
	if err != nil {
		return err
	}
	defer client.Close()
	var failure error
	for range 3 { // each waits for a minute at most
		if _, failure = client.Parse(context.Background(), "SELECT 1"); failure == nil {
			return nil
		}
	}
	return failure
}

func startServer() error {
	ctx := context.Background()
	var err error
	if server, err = pgserver.Launch(ctx, pgserver.Options{Settings: map[string]string{"max_connections": "100"}}); err != nil {
		return err
	}
	if err := server.CreateRole(ctx, "reader", readerPassword); err != nil {
		return err
	}
	return server.SQL(ctx,
		"CREATE TABLE things (id int PRIMARY KEY, name text)",
		"INSERT INTO things SELECT i, 'thing ' || i FROM generate_series(1, 1000) i",
		"GRANT SELECT, INSERT, UPDATE, DELETE ON things TO reader",
		"GRANT CREATE ON SCHEMA public TO reader",
	)
}

// quietLog is a test's log, shown when it fails.
func quietLog(t testing.TB) *slog.Logger {
	var out lockedBuffer
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log:\n%s", out.String())
		}
	})
	return slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lockedBuffer) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Len()
}

// source is the shared server as a data source; change what the test needs.
func source(name string) sqlsession.Source {
	return sqlsession.Source{
		Name: name, Engine: "postgres", DSN: server.DSN("reader", pgserver.Superuser), Password: password(readerPassword), ReadWrite: true,
	}
}

func password(text string) sqlsession.PasswordFunc {
	return func(context.Context) (string, error) { return text, nil }
}

func newManager(t testing.TB, config sqlsession.Config, sources ...sqlsession.Source) *sqlsession.Manager {
	t.Helper()
	if config.Logger == nil {
		config.Logger = quietLog(t)
	}
	if config.Parser == nil {
		config.Parser = parser
	}
	m := sqlsession.New(config)
	if len(sources) == 0 {
		sources = []sqlsession.Source{source("db")}
	}
	m.SetSources(sources)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := m.Close(ctx); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return m
}

var queryNumber atomic.Int64

func request(sql string) sqlsession.Request {
	return sqlsession.Request{QueryID: fmt.Sprintf("qry_%d", queryNumber.Add(1)), Source: "db", Owner: "tok_a", SQL: sql}
}

// table is a decoded result.
type table struct {
	schema  *arrow.Schema
	rows    [][]string // ValueStr of each value; "(null)" is NULL
	batches int
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
		out.batches++
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
	var out bytes.Buffer
	outcome, err := m.Run(t.Context(), r, &out)
	if err != nil {
		t.Fatalf("%.100s: %v", r.SQL, err)
	}
	got := decode(t, out.Bytes())
	if uint64(len(got.rows)) != outcome.Rows || uint64(out.Len()) != outcome.Bytes {
		t.Fatalf("outcome says %d rows, %d bytes; got %d, %d", outcome.Rows, outcome.Bytes, len(got.rows), out.Len())
	}
	return got, outcome
}

// refuse runs a statement that must fail with a code.
func refuse(t testing.TB, m *sqlsession.Manager, r sqlsession.Request, code proto.Code) *proto.Error {
	t.Helper()
	var out bytes.Buffer
	outcome, err := m.Run(t.Context(), r, &out)
	if got := proto.CodeOf(err); got != code {
		t.Fatalf("%.100s: got %v (%v), want %v", r.SQL, got, err, code)
	}
	if outcome.Error.GetCode() != code || outcome.Error.GetMessage() == "" {
		t.Fatalf("outcome: got %v, want %v", outcome.Error, code)
	}
	return err.(*proto.Error)
}

// eventually polls until ok or the time is up.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	within(t, 2*time.Minute, what, ok)
}

func within(t testing.TB, patience time.Duration, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long for %s", what)
		}
	}
}

// one asks the shared server as superuser for one value.
func one(t testing.TB, sql string, args ...any) string {
	t.Helper()
	return oneIn(t, server, sql, args...)
}

func oneIn(t testing.TB, s *pgserver.Server, sql string, args ...any) string {
	t.Helper()
	ctx := context.Background()
	conn, err := s.Connect(ctx, pgserver.Superuser)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	var value string
	if err := conn.QueryRow(ctx, "SELECT ("+sql+")::text", args...).Scan(&value); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return value
}

func textLogger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func itoas(numbers []int) string {
	texts := make([]string, len(numbers))
	for i, n := range numbers {
		texts[i] = fmt.Sprint(n)
	}
	return strings.Join(texts, " ")
}

// createRole makes a role for one test.
func createRole(t *testing.T, name, secret string, attributes ...string) {
	t.Helper()
	if err := server.CreateRole(t.Context(), name, secret, attributes...); err != nil {
		t.Fatal(err)
	}
	cleanUp(t, "DROP ROLE "+name)
}

// cleanUp runs statements as superuser at the end of the test.
func cleanUp(t *testing.T, statements ...string) {
	t.Helper()
	t.Cleanup(func() {
		if err := server.SQL(context.Background(), statements...); err != nil {
			t.Error(err)
		}
	})
}
