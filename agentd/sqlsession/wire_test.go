package sqlsession_test

import (
	"context"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/wirestream"
)

// wireLog keeps what a session told.
type wireLog struct {
	mu      sync.Mutex
	intents []*posternv1.WireEvent
	events  []*posternv1.WireEvent
	fail    error
}

func (l *wireLog) Intend(statements []*posternv1.WireEvent) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.intents = append(l.intents, statements...)
	return l.fail
}

func (l *wireLog) Event(e *posternv1.WireEvent) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events = append(l.events, e)
	return l.fail
}

// wireClient is a client of PostgreSQL's protocol with the control plane between.
type wireClient struct {
	t     *testing.T
	m     *sqlsession.Manager
	log   *wireLog
	front *pgproto3.Frontend
	conn  net.Conn
	ended chan error
	end   *posternv1.WireEnd
	// opened is what the host told at the start.
	opened *posternv1.WireOpened
}

func openWire(t *testing.T, m *sqlsession.Manager, id string, settings ...[2]string) *wireClient {
	t.Helper()
	w, err := m.OpenWire(t.Context(), sqlsession.WireRequest{SessionID: id, Source: "db", Settings: settings})
	if err != nil {
		t.Fatal(err)
	}
	c := &wireClient{t: t, m: m, log: &wireLog{}, ended: make(chan error, 1)}
	near, far := net.Pipe()         // the tunnel
	client, forClient := net.Pipe() // the client's connection
	c.conn, c.front = client, pgproto3.NewFrontend(client, client)
	var wait sync.WaitGroup
	go func() {
		c.ended <- w.Serve(far, c.log, func() { _ = far.Close() })
	}()
	opened := make(chan struct{})
	wait.Go(func() {
		defer func() { _ = forClient.Close() }()
		in := wirestream.NewReader(near)
		for {
			kind, err := in.Next()
			if err != nil {
				return
			}
			switch kind {
			case wirestream.Data:
				if in.CopyData(forClient) != nil {
					_, _ = io.Copy(io.Discard, near)
					return
				}
			case wirestream.Opened:
				c.opened = &posternv1.WireOpened{}
				if err := in.Message(c.opened); err != nil {
					t.Error(err)
				}
				close(opened)
			case wirestream.End:
				c.end = &posternv1.WireEnd{}
				if err := in.Message(c.end); err != nil {
					t.Error(err)
				}
			}
		}
	})
	wait.Go(func() {
		_ = wirestream.NewWriter(near).Pump(forClient, make([]byte, 64<<10))
		_ = near.Close()
	})
	<-opened
	t.Cleanup(func() {
		_ = client.Close()
		wait.Wait()
		_ = near.Close()
	})
	return c
}

// ask is the first column of a Query's rows, or its error's SQLSTATE.
func (c *wireClient) ask(sql string) string {
	c.t.Helper()
	c.front.Send(&pgproto3.Query{String: sql})
	if err := c.front.Flush(); err != nil {
		c.t.Fatal(err)
	}
	return c.answer()
}

func (c *wireClient) answer() string {
	c.t.Helper()
	var words []string
	_ = c.conn.SetReadDeadline(time.Now().Add(2 * time.Minute))
	for {
		m, err := c.front.Receive()
		if err != nil {
			return strings.Join(append(words, "EOF"), " ")
		}
		switch m := m.(type) {
		case *pgproto3.DataRow:
			words = append(words, string(m.Values[0]))
		case *pgproto3.ErrorResponse:
			words = append(words, m.Code)
		case *pgproto3.ReadyForQuery:
			return strings.Join(words, " ")
		}
	}
}

func (c *wireClient) want(sql, want string) {
	c.t.Helper()
	if got := c.ask(sql); got != want {
		c.t.Errorf("%s: got %s, want %s", sql, got, want)
	}
}

func TestWire(t *testing.T) {
	src := source("db")
	src.ReadWrite = false
	m := newManager(t, sqlsession.Config{}, src)
	c := openWire(t, m, "wire_1", [2]string{"application_name", "bi"})
	c.want("SELECT 1", "1")
	c.want("SHOW application_name", "bi")
	c.want("SHOW transaction_read_only", "on")
	c.want("INSERT INTO things VALUES (100000, 'x')", "25006")
	c.want("SELECT pg_terminate_backend(1)", "42501")
	c.want("SELECT sum(id) FROM things", "500500")
	if got := m.WireSessions(); len(got) != 1 || got[0].SessionId != "wire_1" || got[0].Statements != 4 {
		t.Errorf("sessions are %v", got)
	}
	// A long statement is listed, and can be cancelled by its id.
	c.front.Send(&pgproto3.Query{String: "SELECT pg_sleep(60)"})
	if err := c.front.Flush(); err != nil {
		t.Fatal(err)
	}
	happens(t, func() bool { return len(m.Running()) == 1 })
	if id := m.Running()[0].QueryId; !strings.HasPrefix(id, "wire_1_") || !m.Cancel(id) {
		t.Errorf("statement %s is not there to be cancelled", id)
	}
	if got := c.answer(); got != "57014" {
		t.Errorf("cancelled: %s", got)
	}
	if m.Cancel("wire_1_999999") || !m.Cancel("wire_1") {
		t.Error("ids are taken for others")
	}
	c.want("SELECT 2", "2")
	// Five million rows' worth of bytes, in order.
	c.want("SELECT count(*) FROM (SELECT 1 FROM generate_series(1, 1000)) x", "1000")
	big := c.ask("SELECT i FROM generate_series(1, 200000) i")
	if words := strings.Fields(big); len(words) != 200000 || words[199999] != "200000" {
		t.Errorf("got %d rows", len(words))
	}
	_, err := m.OpenWire(t.Context(), sqlsession.WireRequest{SessionID: "wire_1", Source: "db"})
	if proto.CodeOf(err) != proto.CodeAlreadyExists {
		t.Errorf("the same id: %v", err)
	}
	_, err = m.OpenWire(t.Context(), sqlsession.WireRequest{SessionID: "wire_2", Source: "nothing"})
	if proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("unknown source: %v", err)
	}
	_, err = m.OpenWire(t.Context(), sqlsession.WireRequest{SessionID: "wire_2", Source: "db", Settings: [][2]string{{"options", "-c x=y"}}})
	if proto.CodeOf(err) != proto.CodePolicyDenied {
		t.Errorf("options: %v", err)
	}
	c.front.Send(&pgproto3.Terminate{})
	if err := c.front.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := <-c.ended; err != nil {
		t.Errorf("terminated: %v", err)
	}
	if len(m.WireSessions()) != 0 {
		t.Error("the session is still listed")
	}
}

// TestWireParameterTypes: the check of a domain is not run for a value either whose
// type the client gives by its number, as the statement then has no name of it.
func TestWireParameterTypes(t *testing.T) {
	err := server.SQL(t.Context(), "CREATE SCHEMA typed",
		"CREATE FUNCTION typed.acts(text) RETURNS bool LANGUAGE sql AS 'SELECT pg_advisory_lock(4711) IS NOT NULL'",
		"CREATE DOMAIN typed.acting AS text CHECK (typed.acts(VALUE))", "CREATE DOMAIN typed.around AS typed.acting[]",
		"CREATE TYPE typed.pair AS (a int, b typed.acting)", "CREATE TYPE typed.mood AS ENUM ('fine', 'bad')",
		"CREATE FUNCTION typed.pure(int) RETURNS bool LANGUAGE sql AS 'SELECT $1 > 0'", "CREATE DOMAIN typed.positive AS int CHECK (VALUE > 0)",
		"GRANT USAGE ON SCHEMA typed TO PUBLIC")
	if err != nil {
		t.Fatal(err)
	}
	cleanUp(t, "DROP SCHEMA typed CASCADE")
	for _, mode := range []string{"read-only", "metadata"} {
		src := source("db")
		src.ReadWrite, src.Guard.Mode = false, mode
		m := newManager(t, sqlsession.Config{}, src)
		c := openWire(t, m, "wire_types_"+mode)
		for _, test := range []struct{ kind, value, want string }{
			{"typed.acting", "x", "42501"},
			{"typed.acting[]", "{x}", "42501"},
			{"typed.around", "{x}", "42501"},
			{"typed.pair", "(1,x)", "42501"},
			{"typed.pair[]", `{"(1,x)"}`, "42501"},
			{"typed.mood", "fine", "1"},
			{"typed.positive", "5", "1"},
		} {
			oid := uint32(count(t, "SELECT '"+test.kind+"'::regtype::oid::int"))
			c.front.Send(&pgproto3.Parse{Query: "SELECT 1 WHERE $1 IS NOT NULL", ParameterOIDs: []uint32{oid}})
			c.front.Send(&pgproto3.Bind{Parameters: [][]byte{[]byte(test.value)}})
			c.front.Send(&pgproto3.Execute{})
			c.front.Send(&pgproto3.Sync{})
			if err := c.front.Flush(); err != nil {
				t.Fatal(err)
			}
			if got := c.answer(); got != test.want {
				t.Errorf("%s: %s: got %s, want %s", mode, test.kind, got, test.want)
			}
		}
		if n := count(t, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711"); n != 0 {
			t.Errorf("%s: a check ran", mode)
		}
	}
}

func TestWireEnds(t *testing.T) {
	src := source("db")
	m := newManager(t, sqlsession.Config{}, src)
	t.Run("the client goes while a statement runs", func(t *testing.T) {
		c := openWire(t, m, "wire_1")
		c.front.Send(&pgproto3.Query{String: "SELECT pg_sleep(60)"})
		if err := c.front.Flush(); err != nil {
			t.Fatal(err)
		}
		happens(t, func() bool { return len(m.Running()) == 1 })
		_ = c.conn.Close()
		if err := <-c.ended; err != nil {
			t.Errorf("got %v", err)
		}
		last := c.log.events[len(c.log.events)-1]
		if last.State != posternv1.WireEvent_STATE_ENDED || last.Error.GetCode() != proto.CodeCancelled || len(m.Running()) != 0 {
			t.Errorf("the log ends with %v", last)
		}
		if n := count(t, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)%' AND pid <> pg_backend_pid() AND state = 'active'"); n != 0 {
			t.Errorf("%d statements run on in the database", n)
		}
	})
	t.Run("the policy changes", func(t *testing.T) {
		c := openWire(t, m, "wire_2")
		c.want("BEGIN", "")
		changed := src
		changed.MaxRows = 7
		m.SetSources([]sqlsession.Source{changed})
		if got := c.answer(); got != "57P01 EOF" {
			t.Errorf("got %s", got)
		}
		if err := <-c.ended; proto.CodeOf(err) != proto.CodeUnavailable {
			t.Errorf("ended with %v", err)
		}
		if !c.end.GetTold() || c.end.Sqlstate != "57P01" {
			t.Errorf("end is %v", c.end)
		}
	})
	t.Run("the log fails", func(t *testing.T) {
		c := openWire(t, m, "wire_3")
		c.want("SELECT 1", "1")
		c.log.mu.Lock()
		c.log.fail = proto.Errorf(proto.CodeStorageFull, "the log is full")
		c.log.mu.Unlock()
		c.want("INSERT INTO things VALUES (100001, 'x')", "53100")
		c.want("SELECT 2 FROM things LIMIT 0", "53100")
		c.want("SHOW ALL", "EOF") // its refusal can't be told of
		if err := <-c.ended; proto.CodeOf(err) != proto.CodeStorageFull {
			t.Errorf("ended with %v", err)
		}
		if n := count(t, "SELECT count(*) FROM things WHERE id = 100001"); n != 0 {
			t.Error("it was written")
		}
	})
	t.Run("the source goes away", func(t *testing.T) {
		c := openWire(t, m, "wire_4")
		c.front.Send(&pgproto3.Query{String: "SELECT pg_sleep(60)"})
		if err := c.front.Flush(); err != nil {
			t.Fatal(err)
		}
		happens(t, func() bool { return len(m.Running()) == 1 })
		m.SetSources(nil)
		if got := c.answer(); got != "57014" && got != "57014 57P01 EOF" {
			t.Errorf("got %s", got)
		}
		<-c.ended
		m.SetSources([]sqlsession.Source{src})
	})
	t.Run("the manager closes", func(t *testing.T) {
		m := sqlsession.New(sqlsession.Config{Parser: parser, ChildArgs: []string{sqlsession.ChildArg}, Logger: quietLog(t)})
		m.SetSources([]sqlsession.Source{src})
		c := openWire(t, m, "wire_5")
		ctx, done := context.WithTimeout(t.Context(), time.Minute)
		defer done()
		go func() { _, _ = io.Copy(io.Discard, c.conn) }()
		if err := m.Close(ctx); err != nil {
			t.Error(err)
		}
		<-c.ended
	})
}

func happens(t *testing.T, ready func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !ready(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not happen")
		}
	}
}

// count asks the server itself.
func count(t *testing.T, sql string) (n int) {
	t.Helper()
	conn, err := server.Connect(t.Context(), pgserver.Superuser)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	if err := conn.QueryRow(t.Context(), sql).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestWireIdle: how long a client may be silent is the source's to say.
func TestWireIdle(t *testing.T) {
	src := source("db")
	src.WireIdle, src.WireIdleInTransaction = 3*time.Second, 100*time.Millisecond
	m := newManager(t, sqlsession.Config{}, src)
	c := openWire(t, m, "wire_idle")
	c.want("SELECT 1", "1")
	if got := c.answer(); got != "57P05 EOF" {
		t.Errorf("idle: %s", got)
	}
	c = openWire(t, m, "wire_idle_tx")
	c.want("BEGIN", "")
	if got := c.answer(); got != "25P03 EOF" {
		t.Errorf("idle in a transaction: %s", got)
	}
}
