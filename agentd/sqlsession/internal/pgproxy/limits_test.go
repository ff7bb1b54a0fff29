package pgproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// rows counts an answer's rows and returns the rest of it.
func rows(answer string) (n int, rest string) {
	var words []string
	for _, w := range strings.Fields(answer) {
		if w == "D" || w == "d" {
			n++
			continue
		}
		words = append(words, w)
	}
	return n, strings.Join(words, " ")
}

func TestLimits(t *testing.T) {
	b := start(t, false, wish{config: func(c *Config) { c.MaxRows, c.MaxBytes = 10, 10_000 }})
	check := func(sql string, wantRows int, wantRest string) {
		t.Helper()
		n, rest := rows(b.query(sql))
		if n != wantRows || rest != wantRest {
			t.Errorf("%s: %d rows and %s, want %d and %s", sql, n, rest, wantRows, wantRest)
		}
	}
	check("SELECT generate_series(1, 10)", 10, "T C(SELECT 10) Z(I)")
	check("SELECT generate_series(1, 11)", 10, "T E(54000) Z(I)")
	check("SELECT generate_series(1, 10000000)", 10, "T E(54000) Z(I)")
	check("SELECT repeat('x', 100000)", 0, "T E(54000) Z(I)")
	check("SELECT repeat('x', 3000) FROM generate_series(1, 5)", 3, "T E(54000) Z(I)")
	check("SELECT 1 FROM generate_series(1, 11); SELECT 2", 10, "T E(54000) Z(I)")
	check("COPY (SELECT generate_series(1, 11)) TO STDOUT", 10, "H E(54000) Z(I)")
	check("BEGIN", 0, "C(BEGIN) Z(T)")
	check("SELECT generate_series(1, 11)", 10, "T E(54000) Z(E)")
	check("ROLLBACK", 0, "C(ROLLBACK) Z(I)")
	check("BEGIN; DECLARE c CURSOR FOR SELECT generate_series(1, 100); FETCH 8 FROM c", 8, "C(BEGIN) C(DECLARE CURSOR) T C(FETCH 8) Z(T)")
	check("FETCH 8 FROM c", 2, "T E(54000) Z(E)") // a cursor's result is one result
	check("ROLLBACK", 0, "C(ROLLBACK) Z(I)")
	b.send(&pgproto3.Parse{Query: "SELECT generate_series(1, 11)"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Parse{Query: "SELECT 1"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Sync{})
	if n, rest := rows(b.answer()); n != 10 || rest != "1 2 E(54000) Z(I)" {
		t.Errorf("extended: %d rows and %s", n, rest)
	}
	b.send(&pgproto3.Parse{Query: "SELECT generate_series(1, 20)"}, &pgproto3.Bind{}, &pgproto3.Execute{MaxRows: 8}, &pgproto3.Execute{MaxRows: 8}, &pgproto3.Sync{})
	if n, rest := rows(b.answer()); n != 10 || rest != "1 2 s E(54000) Z(I)" {
		t.Errorf("portal: %d rows and %s", n, rest)
	}
	check("SELECT 1", 1, "T C(SELECT 1) Z(I)")
	for _, e := range b.events {
		if e.Rows > 10 {
			t.Errorf("the log has %v", e)
		}
	}
}

func TestTimeout(t *testing.T) {
	b := start(t, false, wish{config: func(c *Config) { c.Timeout = 2 * time.Second }})
	b.want("too long", b.query("SELECT pg_sleep(60)"), "T E(57014) Z(I)")
	b.want("after it", b.query("SELECT 1"), "T D C(SELECT 1) Z(I)")
	b.want("the client's wish", b.query("SET statement_timeout = 0"), "C(SET) Z(I)")
	b.want("does not widen", b.query("SELECT pg_sleep(60)"), "T E(57014) Z(I)")
	b.want("several", b.query("SELECT pg_sleep(0.8); SELECT pg_sleep(0.8); SELECT pg_sleep(0.8)"), "T D C(SELECT 1) T D C(SELECT 1) T D C(SELECT 1) Z(I)")
	if last := b.log()[0]; !strings.HasPrefix(last, "allowed|57014|") {
		t.Errorf("log: %s", last)
	}
}

func TestCancel(t *testing.T) {
	b := start(t, false, wish{})
	b.want("once the parser is there", b.query("SELECT 1"), "T D C(SELECT 1) Z(I)")
	b.send(&pgproto3.Query{String: "SELECT pg_sleep(60)"})
	running := func() (e *posternv1.WireEvent) {
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, e := range b.events {
			if e.State == posternv1.WireEvent_STATE_RUNNING {
				return e
			}
		}
		return nil
	}
	for end := time.Now().Add(time.Minute); running() == nil; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a long statement is not told of")
		}
	}
	b.proxy.Stop(frame.Cancelled, 99) // another statement's number
	var seq uint64
	if _, err := fmt.Sscanf(running().StatementId, "wire_test_%d", &seq); err != nil {
		t.Fatal(err)
	}
	b.proxy.Stop(frame.Cancelled, seq)
	b.want("cancelled", b.answer(), "T E(57014) Z(I)")
	b.proxy.Stop(frame.Cancelled, 0) // nothing runs
	b.want("after it", b.query("SELECT 1"), "T D C(SELECT 1) Z(I)")

	// A client that reads nothing stops the server; a cancel frees it all the same.
	b.send(&pgproto3.Query{String: "SELECT repeat('x', 1000) FROM generate_series(1, 3000000)"})
	// waits until the server waits for event, and goes on to: while it writes to a client that
	// takes rows it does so too, for moments.
	waits := func(event string) {
		t.Helper()
		seen := 0
		for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
			conn, err := pg.Connect(context.Background(), "postgres")
			if err != nil {
				t.Fatal(err)
			}
			var got string
			err = conn.QueryRow(context.Background(), "SELECT coalesce(wait_event, '') FROM pg_stat_activity WHERE pid = $1", b.server.PID).Scan(&got)
			_ = conn.Close(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			if got != event {
				seen = 0
			} else if seen++; seen == 10 {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("the server waits for %q, not for %q", got, event)
			}
		}
	}
	waits("ClientWrite")
	b.proxy.Stop(frame.Cancelled, 0)
	waits("ClientRead")
	n, rest := rows(b.answer())
	if n == 0 || n >= 3_000_000 || rest != "T E(57014) Z(I)" {
		t.Errorf("%d rows and %s", n, rest)
	}
	b.want("after it", b.query("SELECT 1"), "T D C(SELECT 1) Z(I)")
}

func TestLarge(t *testing.T) {
	b := start(t, false, wish{})
	n, rest := rows(b.query("SELECT id, repeat('x', 200) FROM things, generate_series(1, 200)"))
	if n != 200_000 || rest != "T C(SELECT 200000) Z(I)" {
		t.Errorf("%d rows and %s", n, rest)
	}
	b.want("a wide value", b.query("SELECT repeat('x', 20000000)"), "T D C(SELECT 1) Z(I)")
	long := "SELECT '" + strings.Repeat("x", 900_000) + "'"
	b.want("a long text", b.query(long), "T D C(SELECT 1) Z(I)")
	b.want("too long a text", b.query(long+"||'"+strings.Repeat("y", 150_000)+"'"), "E(54000) Z(I)")
	b.send(&pgproto3.Parse{Query: "SELECT length($1::text)"}, &pgproto3.Bind{Parameters: [][]byte{[]byte(strings.Repeat("z", 5_000_000))}}, &pgproto3.Execute{}, &pgproto3.Sync{})
	b.want("a long value", b.answer(), "1 2 D C(SELECT 1) Z(I)")
	// A pipeline with more answers than any buffer holds.
	const statements = 3000
	go func() {
		out := pgproto3.NewFrontend(nil, b.client)
		for range statements {
			out.SendParse(&pgproto3.Parse{Query: "SELECT repeat('x', 2000)"})
			out.SendBind(&pgproto3.Bind{})
			out.SendExecute(&pgproto3.Execute{})
		}
		out.SendSync(&pgproto3.Sync{})
		_ = out.Flush()
	}()
	n, _ = rows(b.answer())
	if n != statements {
		t.Errorf("pipeline: %d rows, want %d", n, statements)
	}
	var all uint64
	for _, e := range b.events {
		all += e.Rows
	}
	if all < 203_000 {
		t.Errorf("the log has %d rows", all)
	}
}

func TestEnds(t *testing.T) {
	for name, c := range map[string]struct {
		config func(*Config)
		do     func(*bench)
		want   string
	}{
		"terminate": {nil, func(b *bench) { b.send(&pgproto3.Terminate{}) }, "EOF"},
		"idle":      {func(c *Config) { c.Idle = 100 * time.Millisecond }, func(*bench) {}, "F(57P05) EOF"},
		"idle in a transaction": {func(c *Config) { c.IdleInTransaction = 100 * time.Millisecond }, func(b *bench) {
			b.want("begin", b.query("BEGIN"), "C(BEGIN) Z(T)")
		}, "F(25P03) EOF"},
		"drain":           {nil, func(b *bench) { b.proxy.Drain() }, "F(57P01) EOF"},
		"unknown message": {nil, func(b *bench) { b.raw("!\x00\x00\x00\x04") }, "F(08P01) EOF"},
		"a length of 0":   {nil, func(b *bench) { b.raw("Q\x00\x00\x00\x00") }, "F(08P01) EOF"},
		"a huge text":     {nil, func(b *bench) { b.raw("Q\x7f\xff\xff\xff") }, "F(08P01) EOF"},
		"no end of text":  {nil, func(b *bench) { b.raw("Q\x00\x00\x00\x05a") }, "F(08P01) EOF"},
		"text behind it":  {nil, func(b *bench) { b.raw("Q\x00\x00\x00\x07a\x00b") }, "F(08P01) EOF"},
		"half a Parse":    {nil, func(b *bench) { b.raw("P\x00\x00\x00\x06\x00\x00") }, "F(08P01) EOF"},
		"a password":      {nil, func(b *bench) { b.raw("p\x00\x00\x00\x05\x00") }, "F(08P01) EOF"},
		"killed by the server": {nil, func(b *bench) {
			if err := pg.SQL(context.Background(), fmt.Sprintf("SELECT pg_terminate_backend(%d)", b.server.PID)); err != nil {
				b.t.Error(err)
			}
		}, "F(57P01) EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			b := start(t, false, wish{config: c.config})
			c.do(b)
			b.want("end", strings.Join(b.until(func(w string) bool { return w == "EOF" }), " "), c.want)
			b.mu.Lock()
			defer b.mu.Unlock()
			if b.end == nil || c.want != "EOF" && (!b.end.Told || !strings.Contains(c.want, b.end.Sqlstate)) {
				t.Errorf("end is %v", b.end)
			}
		})
	}
}

func (b *bench) raw(bytes string) {
	b.t.Helper()
	if _, err := b.client.Write([]byte(bytes)); err != nil {
		b.t.Fatal(err)
	}
}

func TestCopyOut(t *testing.T) {
	b := start(t, false, wish{})
	for _, c := range []struct{ sql, want string }{
		{"COPY (SELECT generate_series(1, 3)) TO STDOUT", "H d d d c C(COPY 3) Z(I)"},
		{"COPY things TO STDOUT (FORMAT csv, HEADER)", ""},
		{"COPY (SELECT bad_function()) TO STDOUT", "E(42501) Z(I)"},
		{"COPY (DELETE FROM things RETURNING id) TO STDOUT", "E(25006) Z(I)"},
		{"COPY things TO '/tmp/x'", "E(42501) Z(I)"},
		{"COPY things TO PROGRAM 'cat'", "E(42501) Z(I)"},
		{"COPY things FROM STDIN", "E(25006) Z(I)"},
	} {
		n, rest := rows(b.query(c.sql))
		if c.want == "" {
			if n != 1001 || rest != "H c C(COPY 1000) Z(I)" {
				t.Errorf("%s: %d rows and %s", c.sql, n, rest)
			}
			continue
		}
		wantRows, wantRest := rows(c.want)
		if n != wantRows || rest != wantRest {
			t.Errorf("%s: %d rows and %s, want %s", c.sql, n, rest, c.want)
		}
	}
}

func TestReadWrite(t *testing.T) {
	b := start(t, true, wish{})
	b.want("insert", b.query("INSERT INTO target VALUES (1) /* rw */"), "C(INSERT 0 1) Z(I)")
	b.want("begin", b.query("BEGIN READ WRITE"), "C(BEGIN) Z(T)")
	b.want("insert", b.query("INSERT INTO target VALUES (2) /* rw */"), "C(INSERT 0 1) Z(T)")
	b.want("refused", b.query("SELECT bad_function()"), "E(42501) Z(E)")
	b.want("commit", b.query("COMMIT"), "C(ROLLBACK) Z(I)")
	// A refusal undoes the pipeline's own transaction.
	b.send(&pgproto3.Parse{Query: "INSERT INTO target VALUES (3) /* rw */"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Parse{Query: "SELECT bad_function()"}, &pgproto3.Sync{})
	b.want("pipeline", b.answer(), "1 2 C(INSERT 0 1) E(42501) Z(I)")
	b.send(&pgproto3.Query{String: "COPY target FROM STDIN /* rw */"})
	b.want("copy", strings.Join(b.until(func(w string) bool { return w == "G" || strings.HasPrefix(w, "Z") }), " "), "G")
	b.send(&pgproto3.CopyData{Data: []byte("10\n11\n")}, &pgproto3.CopyData{Data: []byte("12\n")}, &pgproto3.CopyDone{})
	b.want("copied", b.answer(), "C(COPY 3) Z(I)")
	b.send(&pgproto3.Query{String: "COPY target FROM STDIN /* rw */"}, &pgproto3.CopyData{Data: []byte("20\n")}, &pgproto3.CopyFail{Message: "no"})
	b.want("copy given up", b.answer(), "G E(57014) Z(I)")
	b.send(&pgproto3.Query{String: "COPY target FROM STDIN /* rw */"}, &pgproto3.CopyData{Data: []byte("nonsense\n")}, &pgproto3.CopyData{Data: []byte("31\n")})
	got := strings.Join(b.until(func(w string) bool { return strings.HasPrefix(w, "Z") }), " ")
	b.want("copy refused", got, "G E(22P02) Z(I)")
	b.send(&pgproto3.CopyData{Data: []byte("32\n")}, &pgproto3.CopyDone{}, &pgproto3.Query{String: "SELECT count(*) FROM target"})
	b.want("what is left of it is dropped", b.answer(), "T D C(SELECT 1) Z(I)")
	b.send(&pgproto3.Parse{Query: "COPY target FROM STDIN /* rw */"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Sync{}, &pgproto3.CopyData{Data: []byte("40\n")}, &pgproto3.CopyDone{}, &pgproto3.Sync{})
	b.want("extended copy", b.answer(), "1 2 G C(COPY 1) Z(I)")

	var ids string
	conn, err := pg.Connect(context.Background(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	if err := conn.QueryRow(context.Background(), "SELECT string_agg(id::text, ',' ORDER BY id) FROM target").Scan(&ids); err != nil || ids != "1,10,11,12,40" {
		t.Errorf("the table has %s (%v)", ids, err)
	}
	b.mu.Lock()
	if len(b.intents) < 6 {
		t.Errorf("%d intents", len(b.intents))
	}
	b.refuseIntent = &Refusal{SQLState: stateDiskFull, Message: "the log is full"}
	b.mu.Unlock()
	b.want("no log", b.query("INSERT INTO target VALUES (50) /* rw */"), "E(53100) Z(I)")
	b.send(&pgproto3.Parse{Query: "INSERT INTO target VALUES (51) /* rw */"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Sync{})
	b.want("no log, extended", b.answer(), "E(53100) Z(I)")
	b.want("reading goes on", b.query("SELECT 1 FROM target WHERE id >= 50"), "T C(SELECT 0) Z(I)")
	b.want("notify", b.query("LISTEN a"), "C(LISTEN) Z(I)")
}

// TestSlowCopyIn: a COPY FROM STDIN that takes longer than a moment is told of, and goes
// on; so does the session when the server refuses what comes later.
func TestSlowCopyIn(t *testing.T) {
	b := start(t, true, wish{})
	b.want("a table", b.query("CREATE TEMP TABLE slow (i int) /* rw */"), "C(CREATE TABLE) Z(I)")
	b.send(&pgproto3.Query{String: "COPY slow FROM STDIN /* rw */"}, &pgproto3.CopyData{Data: []byte("1\n")})
	time.Sleep(3 * moment)
	b.send(&pgproto3.CopyData{Data: []byte("2\n")})
	time.Sleep(3 * moment)
	b.send(&pgproto3.CopyDone{})
	b.want("slow", b.answer(), "G C(COPY 2) Z(I)")
	b.send(&pgproto3.Query{String: "COPY slow FROM STDIN /* rw */"}, &pgproto3.CopyData{Data: []byte("3\n")})
	time.Sleep(3 * moment)
	b.send(&pgproto3.CopyData{Data: []byte("nonsense\n")}, &pgproto3.CopyDone{})
	b.want("refused", b.answer(), "G E(22P02) Z(I)")
	b.want("after it", b.query("SELECT count(*) FROM slow"), "T D C(SELECT 1) Z(I)")
	b.mu.Lock()
	defer b.mu.Unlock()
	running := 0
	for _, e := range b.events {
		if strings.HasPrefix(e.Sql, "COPY") && e.State == posternv1.WireEvent_STATE_RUNNING {
			running++
		}
	}
	if running != 2 {
		t.Errorf("%d were told of while they ran", running)
	}
}

// FuzzClient sends whatever bytes as a client would: the proxy ends the session or
// answers, and never panics or hangs.
func FuzzClient(f *testing.F) {
	encode := func(messages ...pgproto3.FrontendMessage) []byte {
		var b []byte
		for _, m := range messages {
			var err error
			if b, err = m.Encode(b); err != nil {
				f.Fatal(err)
			}
		}
		return b
	}
	f.Add(encode(&pgproto3.Query{String: "SELECT 1"}))
	f.Add(encode(&pgproto3.Parse{Name: "s", Query: "SELECT $1::int"}, &pgproto3.Bind{PreparedStatement: "s", Parameters: [][]byte{[]byte("1")}}, &pgproto3.Describe{ObjectType: 'P'}, &pgproto3.Execute{}, &pgproto3.Close{ObjectType: 'S', Name: "s"}, &pgproto3.Sync{}))
	f.Add(encode(&pgproto3.Query{String: "BEGIN; DECLARE c CURSOR FOR SELECT 1; FETCH c"}, &pgproto3.Query{String: "DELETE FROM things"}, &pgproto3.Query{String: "ROLLBACK"}))
	f.Add(encode(&pgproto3.Query{String: "COPY (SELECT 1) TO STDOUT"}, &pgproto3.CopyData{Data: []byte("x")}, &pgproto3.Flush{}, &pgproto3.FunctionCall{Function: 5}, &pgproto3.Terminate{}))
	f.Add([]byte("B\x00\x00\x00\x09\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, in []byte) {
		b := start(t, false, wish{config: func(c *Config) {
			c.Timeout, c.Idle, c.IdleInTransaction = time.Second, 50*time.Millisecond, 50*time.Millisecond
		}})
		go func() {
			_, _ = b.client.Write(in)
		}()
		_ = b.client.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := io.Copy(io.Discard, b.client); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the session does not end: %v", err)
		}
	})
}
