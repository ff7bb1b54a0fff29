package pgproxy

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/e2e/pgserver"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/wirestream"
)

// bench is agentd and the control plane for one Proxy: what the client writes goes to
// Feed, Data frames go to the client.
type bench struct {
	t      testing.TB
	proxy  *Proxy
	server *pgconn.HijackedConn
	// client is the client's end of its connection.
	client net.Conn
	front  *pgproto3.Frontend
	opened *posternv1.WireOpened
	ran    chan error

	mu      sync.Mutex
	events  []*posternv1.WireEvent
	intents []*posternv1.WireEvent
	end     *posternv1.WireEnd
	// refuseIntent answers intents, of statements with refuseOnly in them.
	refuseIntent *Refusal
	refuseOnly   string
}

type wish struct {
	config func(*Config)
	// settings of the client's startup.
	settings [][2]string
}

func socketPair(t testing.TB) (net.Conn, net.Conn) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range pair {
		f := os.NewFile(uintptr(fd), "pair")
		if conns[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
	}
	return conns[0], conns[1]
}

// start starts a Proxy on a connection of its own.
func start(t testing.TB, readWrite bool, w wish) *bench {
	t.Helper()
	ctx, done := context.WithTimeout(context.Background(), 2*time.Minute)
	defer done()
	config, err := pgconn.ParseConfig(pg.DSN(pgserver.Superuser, pgserver.Superuser))
	if err != nil {
		t.Fatal(err)
	}
	config.Password = pg.Password
	c := Config{
		SessionID: "wire_test", Version: 15, Parser: pgtree.InProcess(), Judge: testJudge{}, ReadWrite: readWrite,
		Guard: frame.Guard{Mode: "read-only"}, MaxRows: 1_000_000, MaxBytes: 1 << 30, Timeout: time.Minute,
		Idle: time.Minute, IdleInTransaction: time.Minute,
	}
	if readWrite {
		c.Guard.Mode = "read-write"
	}
	if w.config != nil {
		w.config(&c)
	}
	settings, err := Startup(w.settings, readWrite, c.Timeout)
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range settings {
		config.RuntimeParams[name] = value
	}
	conn, err := pgconn.ConnectConfig(ctx, config)
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.SyncConn(ctx); err != nil {
		t.Fatal(err)
	}
	hijacked, err := conn.Hijack()
	if err != nil {
		t.Fatal(err)
	}
	canceler, err := pgconn.Construct(hijacked)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, server: hijacked, ran: make(chan error, 1)}
	agentd, child := socketPair(t)
	c.Server, c.Parameters, c.Cancel, c.Agentd = hijacked.Conn, hijacked.ParameterStatuses, canceler.CancelRequest, child
	b.proxy = New(c)
	ours, theirs := socketPair(t)
	b.client = ours
	b.front = pgproto3.NewFrontend(ours, ours)
	credits := make(chan int, 1<<10)
	var wait sync.WaitGroup
	opened := make(chan struct{})
	wait.Go(func() { b.fromProxy(agentd, theirs, credits, opened) })
	wait.Go(func() { b.toProxy(theirs, credits) })
	go func() {
		err := b.proxy.Run()
		_ = child.Close()
		b.ran <- err
	}()
	<-opened
	t.Cleanup(func() {
		_ = ours.Close()
		select {
		case err := <-b.ran:
			if err != nil && b.end == nil {
				t.Errorf("run: %v", err)
			}
		case <-time.After(time.Minute):
			t.Error("the proxy does not end")
		}
		wait.Wait()
		_ = agentd.Close()
		_ = hijacked.Conn.Close()
	})
	return b
}

func (b *bench) fromProxy(agentd, client net.Conn, credits chan<- int, opened chan struct{}) {
	defer close(credits)
	defer func() { _ = client.Close() }()
	// The frames of package wirestream and two of our own.
	head := make([]byte, 5)
	buf := make([]byte, wirestream.MaxData)
	for {
		if _, err := io.ReadFull(agentd, head); err != nil {
			return
		}
		n := int(binary.BigEndian.Uint32(head[1:]))
		if n > len(buf) {
			b.t.Errorf("a frame %q of %d bytes", head[0], n)
			return
		}
		if _, err := io.ReadFull(agentd, buf[:n]); err != nil {
			return
		}
		r := wirestream.NewReader(io.MultiReader(strings.NewReader(string(head)), strings.NewReader(string(buf[:n]))))
		switch t := wirestream.Type(head[0]); t {
		case wirestream.Data:
			if _, err := client.Write(buf[:n]); err != nil {
				_, _ = io.Copy(io.Discard, agentd)
				return
			}
		case Credit:
			credits <- int(binary.BigEndian.Uint32(buf))
		case Intent, wirestream.Event:
			head[0] = byte(wirestream.Event)
			r = wirestream.NewReader(io.MultiReader(strings.NewReader(string(head)), strings.NewReader(string(buf[:n]))))
			e := &posternv1.WireEvent{}
			if _, err := r.Next(); err != nil || r.Message(e) != nil {
				b.t.Errorf("a garbled event: %v", err)
			}
			b.mu.Lock()
			if t == Intent {
				b.intents = append(b.intents, e)
			} else {
				b.events = append(b.events, e)
			}
			refusal := b.refuseIntent
			if !strings.Contains(e.Sql, b.refuseOnly) {
				refusal = nil
			}
			b.mu.Unlock()
			if t == Intent {
				b.proxy.Ack(refusal)
			}
		case wirestream.Opened:
			b.opened = &posternv1.WireOpened{}
			if _, err := r.Next(); err != nil || r.Message(b.opened) != nil {
				b.t.Errorf("a garbled frame: %v", err)
			}
			close(opened)
		case wirestream.End:
			end := &posternv1.WireEnd{}
			if _, err := r.Next(); err != nil || r.Message(end) != nil {
				b.t.Errorf("a garbled frame: %v", err)
			}
			b.mu.Lock()
			b.end = end
			b.mu.Unlock()
		default:
			b.t.Errorf("a frame of type %q", head[0])
		}
	}
}

func (b *bench) toProxy(client net.Conn, credits <-chan int) {
	defer b.proxy.Hangup()
	window := Window
	buf := make([]byte, 32<<10)
	for {
		for window < len(buf) {
			n, ok := <-credits
			if !ok {
				return
			}
			window += n
		}
		n, err := client.Read(buf)
		if n > 0 {
			window -= n
			if err := b.proxy.Feed(buf[:n]); err != nil {
				b.t.Errorf("feed: %v", err)
			}
		}
		if err != nil {
			return
		}
	}
}

// send sends messages as one piece.
func (b *bench) send(messages ...pgproto3.FrontendMessage) {
	b.t.Helper()
	for _, m := range messages {
		b.front.Send(m)
	}
	if err := b.front.Flush(); err != nil {
		b.t.Fatalf("send: %v", err)
	}
}

// answer is what came up to ReadyForQuery, one word each: 1 2 3 t T n D C(tag) I s
// E(code) N S(name) G H d c Z(status).
func (b *bench) answer() string {
	b.t.Helper()
	return strings.Join(b.until(func(word string) bool { return strings.HasPrefix(word, "Z") }), " ")
}

func (b *bench) until(last func(word string) bool) []string {
	b.t.Helper()
	var words []string
	_ = b.client.SetReadDeadline(time.Now().Add(2 * time.Minute))
	for {
		m, err := b.front.Receive()
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return append(words, "EOF")
			}
			b.t.Fatalf("after %v: %v", words, err)
		}
		word := ""
		switch m := m.(type) {
		case *pgproto3.ParseComplete:
			word = "1"
		case *pgproto3.BindComplete:
			word = "2"
		case *pgproto3.CloseComplete:
			word = "3"
		case *pgproto3.ParameterDescription:
			word = "t"
		case *pgproto3.RowDescription:
			word = "T"
		case *pgproto3.NoData:
			word = "n"
		case *pgproto3.DataRow:
			word = "D"
		case *pgproto3.CommandComplete:
			word = "C(" + string(m.CommandTag) + ")"
		case *pgproto3.EmptyQueryResponse:
			word = "I"
		case *pgproto3.PortalSuspended:
			word = "s"
		case *pgproto3.ErrorResponse:
			word = "E(" + m.Code + ")"
			if m.Severity == "FATAL" {
				word = "F(" + m.Code + ")"
			}
		case *pgproto3.NoticeResponse:
			word = "N"
		case *pgproto3.ParameterStatus:
			word = "S(" + m.Name + ")"
		case *pgproto3.CopyInResponse:
			word = "G"
		case *pgproto3.CopyOutResponse:
			word = "H"
		case *pgproto3.CopyData:
			word = "d"
		case *pgproto3.CopyDone:
			word = "c"
		case *pgproto3.NotificationResponse:
			word = "A"
		case *pgproto3.ReadyForQuery:
			word = "Z(" + string(m.TxStatus) + ")"
		default:
			b.t.Fatalf("unexpected %T", m)
		}
		words = append(words, word)
		if last(word) {
			return words
		}
	}
}

// query is a Query's answer.
func (b *bench) query(sql string) string {
	b.t.Helper()
	b.send(&pgproto3.Query{String: sql})
	return b.answer()
}

// want fails the test unless the answer is this.
func (b *bench) want(what, got, want string) {
	b.t.Helper()
	if got != want {
		b.t.Errorf("%s: got %s, want %s", what, got, want)
	}
}

// log is what the log has: "verdict rows tag|code text" a statement that ended.
func (b *bench) log() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var lines []string
	for _, e := range b.events {
		if e.State != posternv1.WireEvent_STATE_ENDED {
			continue
		}
		end := e.CommandTag
		if e.Error != nil {
			end = e.Error.GetSql().GetSqlstate()
		}
		lines = append(lines, e.Verdict+"|"+end+"|"+e.Sql)
	}
	return lines
}

// testJudge allows what only selects, but for a function, and asks the server when a
// statement calls another.
type testJudge struct{}

func (testJudge) Judge(ctx context.Context, server Asker, text string, tree *pgtree.Tree) (Verdict, *Refusal) {
	s := tree.Stmts[0].Stmt.String()
	if i := strings.Index(text, "bad_function"); i >= 0 {
		return Verdict{}, &Refusal{SQLState: stateDenied, Message: "bad_function is refused", Position: i + 1}
	}
	if strings.Contains(text, "version()") {
		rows, err := server.Ask(ctx, "SELECT provolatile FROM pg_proc WHERE proname = $1", "version")
		var refusal *Refusal
		if errors.As(err, &refusal) {
			return Verdict{}, refusal
		}
		if err != nil || len(rows) != 1 || rows[0][0] != "s" {
			return Verdict{}, refuse(stateDenied, "version() is unknown: %v %v", rows, err)
		}
	}
	reads := tree.Stmts[0].Stmt.GetSelectStmt() != nil && !strings.Contains(s, "into_clause") && !strings.Contains(s, "locking_clause") &&
		!strings.Contains(s, "insert_stmt") && !strings.Contains(s, "delete_stmt") && !strings.Contains(s, "update_stmt")
	if !reads && !strings.Contains(text, "/* rw */") {
		return Verdict{}, refuse(stateReadOnly, "only SELECT is allowed")
	}
	return Verdict{Reads: reads}, nil
}
