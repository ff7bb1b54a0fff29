package pgproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
)

// pgx is a connection of pgx's to a bench, whose client is past the startup: somebody
// between them answers pgx's, then passes everything through.
func (b *bench) pgx(mode pgx.QueryExecMode) *pgx.Conn {
	b.t.Helper()
	client, greeter := socketPair(b.t)
	go func() {
		defer func() { _ = greeter.Close() }()
		back := pgproto3.NewBackend(greeter, greeter)
		if _, err := back.ReceiveStartupMessage(); err != nil {
			return
		}
		back.Send(&pgproto3.AuthenticationOk{})
		for _, s := range b.opened.Parameters {
			back.Send(&pgproto3.ParameterStatus{Name: s.Name, Value: s.Value})
		}
		back.Send(&pgproto3.BackendKeyData{SecretKey: make([]byte, 4)})
		back.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
		if back.Flush() != nil {
			return
		}
		go func() { _, _ = io.Copy(greeter, b.client) }()
		_, _ = io.Copy(b.client, greeter)
	}()
	config, err := pgx.ParseConfig("host=127.0.0.1 user=u database=d sslmode=disable")
	if err != nil {
		b.t.Fatal(err)
	}
	config.DefaultQueryExecMode = mode
	config.DialFunc = func(context.Context, string, string) (net.Conn, error) { return client, nil }
	ctx, done := context.WithTimeout(context.Background(), time.Minute)
	defer done()
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		ctx, done := context.WithTimeout(context.Background(), 5*time.Second)
		defer done()
		_ = conn.Close(ctx)
	})
	return conn
}

// TestPgxBatches sends batches of three in each of pgx's modes: each ends, the
// session goes on, and nothing of a batch with a refusal in it is carried out.
func TestPgxBatches(t *testing.T) {
	const series = "SELECT n FROM generate_series(0, 5) n"
	write := func(n int) string { return fmt.Sprintf("INSERT INTO target VALUES (%d) /* rw */", n) }
	for _, mode := range []pgx.QueryExecMode{
		pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol,
	} {
		for _, readWrite := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, read-write %t", mode, readWrite), func(t *testing.T) {
				b := start(t, readWrite, wish{})
				conn := b.pgx(mode)
				type batch struct {
					sqls []string
					want string // SQLSTATE
				}
				batches := []batch{
					{[]string{series, series, series}, ""},
					{[]string{"SELECT 1", "SELECT bad_function()", "SELECT 2"}, stateDenied},
					{[]string{"SELECT 3", "SELECT length(version())", "SELECT 4"}, ""},
					{[]string{"SELECT 5", "SELECT 1/0", "SELECT 6"}, "22012"},
				}
				if readWrite {
					batches = append(batches, batch{[]string{write(70_001), "SELECT bad_function()", write(70_002)}, stateDenied},
						batch{[]string{write(70_001), write(70_002), write(70_003)}, ""},
						batch{[]string{"DELETE FROM target WHERE id > 70000 /* rw */", series, "DELETE FROM target WHERE id > 70001 /* rw */"}, ""})
				}
				for _, one := range batches {
					ctx, done := context.WithTimeout(context.Background(), time.Minute)
					batch := &pgx.Batch{}
					for _, sql := range one.sqls {
						batch.Queue(sql)
					}
					err := conn.SendBatch(ctx, batch).Close()
					done()
					state := ""
					var failure *pgconn.PgError
					if errors.As(err, &failure) {
						state = failure.Code
					}
					if state != one.want || err != nil && failure == nil {
						t.Fatalf("%s: %v, want %q", strings.Join(one.sqls, "; "), err, one.want)
					}
				}
			})
		}
	}
}

// TestManyIntents has the log note many statements at once: none of its answers is
// lost, and one refusal is enough for none of them to run.
func TestManyIntents(t *testing.T) {
	const many = 200
	b := start(t, true, wish{})
	b.send(&pgproto3.Parse{Name: "w", Query: "DELETE FROM target WHERE false /* rw */"}, &pgproto3.Sync{})
	b.want("parse", b.answer(), "1 Z(I)")
	var messages []pgproto3.FrontendMessage
	for range many {
		messages = append(messages, &pgproto3.Bind{PreparedStatement: "w"}, &pgproto3.Execute{})
	}
	b.send(append(messages, &pgproto3.Sync{})...)
	b.want("pipeline", b.answer(), strings.Repeat("2 C(DELETE 0) ", many)+"Z(I)")
	b.want("query", b.query(strings.Repeat("DELETE FROM target WHERE false /* rw */;", many)), strings.Repeat("C(DELETE 0) ", many)+"Z(I)")
	b.mu.Lock()
	if len(b.intents) != 2*many {
		t.Errorf("%d intents, want %d", len(b.intents), 2*many)
	}
	b.refuseIntent, b.refuseOnly = &Refusal{SQLState: stateDiskFull, Message: "the log is full"}, "80002"
	b.mu.Unlock()
	insert := func(n int) string { return fmt.Sprintf("INSERT INTO target VALUES (%d) /* rw */", n) }
	b.want("one of three", b.query(insert(80_001)+";"+insert(80_002)+";"+insert(80_003)), "E(53100) Z(I)")
	messages = nil
	for n := 80_001; n <= 80_003; n++ {
		messages = append(messages, &pgproto3.Parse{Query: insert(n)}, &pgproto3.Bind{}, &pgproto3.Execute{})
	}
	b.send(append(messages, &pgproto3.Sync{})...)
	if got := b.answer(); !strings.HasSuffix(got, "E(53100) Z(I)") || strings.Contains(got, "C(") {
		t.Errorf("one of three in a pipeline: %s", got)
	}
	b.want("nothing ran", b.query("SELECT id FROM target WHERE id > 80000"), "T C(SELECT 0) Z(I)")
}
