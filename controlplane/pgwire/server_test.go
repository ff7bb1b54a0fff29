package pgwire

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/controlplane/ratelimit"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func wantState(t *testing.T, err error, state string) *pgconn.PgError {
	t.Helper()
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || pg.Code != state {
		t.Fatalf("got %v, want SQLSTATE %s", err, state)
	}
	return pg
}

// TestConnect: each way to connect gets a session that answers.
func TestConnect(t *testing.T) {
	s := startServer(t)
	for _, way := range []string{
		"sslmode=disable", "sslmode=prefer", "sslmode=require", "sslmode=verify-full", "sslmode=verify-full sslnegotiation=direct",
		"sslmode=disable max_protocol_version=3.2", "sslmode=disable min_protocol_version=3.2 max_protocol_version=3.2",
	} {
		t.Run(way, func(t *testing.T) {
			c := s.connect("ana", way+" application_name=test")
			if got, err := query(t, c, "echo hello"); got != "hello" || err != nil {
				t.Errorf("got %q, %v", got, err)
			}
			if got := c.ParameterStatus("server_version"); got != "15.0" {
				t.Errorf("server_version is %q", got)
			}
			if size := len(c.SecretKey()); size != map[bool]int{true: 32, false: 4}[strings.Contains(way, "3.2")] {
				t.Errorf("the secret has %d bytes", size)
			}
			// A large result crosses TLS as well.
			results, err := c.Exec(t.Context(), "rows 50000").ReadAll()
			if err != nil || len(results[0].Rows) != 50000 {
				t.Fatalf("got %d results, %v", len(results), err)
			}
			if err := c.Close(t.Context()); err != nil {
				t.Error(err)
			}
			if how := <-s.host.ended; how != "terminated" {
				t.Errorf("the host saw %q", how)
			}
		})
	}
	r := s.host.requests[0]
	if r.Source != "shop" || r.Principal.TokenName != "ana" || r.Remote != "127.0.0.1" || len(r.Settings) != 1 || r.Settings[0].Value != "test" {
		t.Errorf("the host was asked %v", r)
	}
	s.journal.mu.Lock()
	defer s.journal.mu.Unlock()
	if len(s.journal.events) != 14 || len(s.journal.opened) != 7 || s.journal.opened[0].Application != "test" {
		t.Errorf("the journal has %d sessions, %d events", len(s.journal.opened), len(s.journal.events))
	}
	for _, why := range s.journal.closed {
		if why != nil {
			t.Errorf("a session ended with %v", why)
		}
	}
}

func TestRefused(t *testing.T) {
	s := startServer(t)
	connect := func(change string) error {
		// The last of a setting counts.
		c, err := pgconn.Connect(t.Context(), s.dsn("ana", "sslmode=disable "+change))
		if err == nil {
			c.Close(t.Context())
		}
		return err
	}
	var wrongToken, wrongName *pgconn.PgError
	for name, c := range map[string]struct{ change, state, hint string }{
		"wrong token":      {"password=x", "28P01", "API token"},
		"another's name":   {"user=bob", "28P01", "API token"},
		"no database":      {"dbname=ana", "3D000", "AGENT/SOURCE"},
		"no source":        {"dbname=lab/", "3D000", "AGENT/SOURCE"},
		"unknown agent":    {"dbname=elsewhere/shop", "3D000", "AGENT/SOURCE"},
		"agent is offline": {"dbname=away/shop", "57P03", "agentd status"},
		"setting":          {"session_authorization=x", "42501", "TimeZone"},
		"options":          {"options='-c role=x'", "42501", "TimeZone"},
		"replication":      {"replication=database", "0A000", ""},
	} {
		t.Run(name, func(t *testing.T) {
			pg := wantState(t, connect(c.change), c.state)
			if !strings.Contains(pg.Hint, c.hint) || strings.Contains(pg.Message+pg.Detail+pg.Hint, "secret of") {
				t.Errorf("got %q, detail %q, hint %q", pg.Message, pg.Detail, pg.Hint)
			}
			switch name {
			case "wrong token":
				wrongToken = pg
			case "another's name":
				wrongName = pg
			}
		})
	}
	wrongName.Message = strings.ReplaceAll(wrongName.Message, "bob", "ana")
	if *wrongToken != *wrongName {
		t.Errorf("a wrong token gives %v, a wrong name %v", wrongToken, wrongName)
	}
	wantState(t, second(pgconn.Connect(t.Context(), s.dsn("view", "sslmode=disable"))), "42501")
	for code, state := range map[proto.Code]string{
		proto.CodeNotFound: "3D000", proto.CodePolicyDenied: "42501", proto.CodeOverloaded: "53300", proto.CodeSourceUnreachable: "57P03", proto.CodeInternal: "XX000",
	} {
		s.host.refuse = func(*posternv1.WireRequest) error { return proto.Errorf(code, "no, since it is %v", code) }
		pg := wantState(t, connect(""), state)
		if code != proto.CodeInternal && !strings.Contains(pg.Message, code.String()) {
			t.Errorf("got %q", pg.Message)
		}
	}
	s.host.refuse = func(*posternv1.WireRequest) error {
		return &proto.Error{Code: proto.CodeSQL, Message: "role does not exist", SQL: &posternv1.SQLErrorDetail{Sqlstate: "28000"}}
	}
	wantState(t, connect(""), "XX000") // the database's own 28000 is not the client's
	s.journal.fails = proto.Errorf(proto.CodeStorageFull, "no space is left")
	wantState(t, connect(""), "53100")
	if n := s.Sessions(); n != 0 || len(s.taken) != 0 {
		t.Errorf("%d sessions, places taken: %v", n, s.taken)
	}
}

func second[T any](_ T, err error) error { return err }

// TestPlainFromAfar: without TLS only this machine's clients are served.
func TestPlainFromAfar(t *testing.T) {
	s := startServer(t)
	near, far := net.Pipe()
	go s.accept(&remote{Conn: far})
	near.SetDeadline(time.Now().Add(time.Minute))
	body := append([]byte{0, 3, 0, 0}, pairs("user", "ana", "database", "lab/shop")...)
	near.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(body)+4)), body...))
	answer, err := io.ReadAll(near)
	if err != nil || !strings.Contains(string(answer), "C28000\x00") || !strings.Contains(string(answer), "sslmode=require") {
		t.Errorf("got %q, %v", answer, err)
	}
}

// remote is a connection from another machine.
type remote struct{ net.Conn }

func (remote) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 7} }

// TestGreetings: what may come before the startup message, byte for byte.
func TestGreetings(t *testing.T) {
	s := startServer(t, func(c *Config) { c.Limits.Handshake = time.Second })
	number := func(length, code uint32) []byte {
		return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, length), code)
	}
	for name, c := range map[string]struct {
		sends []byte
		want  string // what begins the answer; "" means that nothing is said
	}{
		"SSLRequest":           {number(8, codeTLS), "S"},
		"GSSENCRequest":        {number(8, codeGSS), "N"},
		"GSSENCRequest twice":  {append(number(8, codeGSS), number(8, codeGSS)...), "NE"},
		"HTTP":                 {[]byte("GET / HTTP/1.1\r\n\r\n"), ""},
		"SSH":                  {[]byte("SSH-2.0-OpenSSH_9.2\r\n"), ""},
		"a length of 4":        {number(4, codeTLS), ""},
		"a length of 4 GiB":    {number(1<<32-1, 3<<16), ""},
		"nothing":              {nil, ""},
		"half a length":        {[]byte{0, 0}, ""},
		"SSLRequest too long":  {append(number(9, codeTLS), 0), "E"},
		"TLS that is none":     {append(number(8, codeTLS), number(8, codeTLS)...), "S"},
		"a cancel of nothing":  {append(number(16, codeCancel), make([]byte, 8)...), ""},
		"a cancel too short":   {number(8, codeCancel), ""},
		"protocol 2":           {append(number(12, 2<<16), "u\x00\x00\x00"...), "E"},
		"a direct TLS of junk": {append([]byte{0x16, 3, 1, 0, 5}, "hello"...), "\x15"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn, err := net.Dial("tcp", s.address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(time.Minute))
			conn.Write(c.sends)
			answer, err := io.ReadAll(conn)
			var netErr net.Error
			if errors.As(err, &netErr) && netErr.Timeout() {
				t.Fatal("the connection was not closed")
			}
			if !strings.HasPrefix(string(answer), c.want) || c.want == "" && len(answer) > 0 {
				t.Errorf("got %q, want %q", answer, c.want)
			}
		})
	}
}

// TestDirectTLSNeedsALPN as PostgreSQL 17 has it.
func TestDirectTLSNeedsALPN(t *testing.T) {
	s := startServer(t)
	conn, err := tls.Dial("tcp", s.address, &tls.Config{RootCAs: s.roots})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	answer, err := io.ReadAll(conn)
	if err != nil || !strings.Contains(string(answer), "ALPN") {
		t.Errorf("got %q, %v", answer, err)
	}
}

func TestCancel(t *testing.T) {
	s := startServer(t)
	for _, way := range []string{"sslmode=disable", "sslmode=require", "sslmode=disable min_protocol_version=3.2 max_protocol_version=3.2"} {
		c := s.connect("ana", way)
		done := make(chan error, 1)
		go func() { done <- second(query(t, c, "sleep")) }()
		id := s.lastSession()
		eventually(t, "the statement runs", func() bool { s.host.mu.Lock(); defer s.host.mu.Unlock(); return s.host.running[id] != nil })
		if err := c.CancelRequest(t.Context()); err != nil {
			t.Error(err)
		}
		wantState(t, <-done, "57014")
		if got, err := query(t, c, "echo still here"); got != "still here" || err != nil {
			t.Errorf("after the cancel: %q, %v", got, err)
		}
	}
}

func (s *testServer) lastSession() string {
	s.t.Helper()
	var id string
	eventually(s.t, "a session", func() bool {
		s.host.mu.Lock()
		defer s.host.mu.Unlock()
		if n := len(s.host.requests); n > 0 {
			id = s.host.requests[n-1].SessionId
		}
		return id != ""
	})
	return id
}

// TestCancelGuessing: who guesses keys is soon not heard any more, and a wrong
// secret cancels nothing.
func TestCancelGuessing(t *testing.T) {
	s := startServer(t, func(c *Config) { c.Cancels = ratelimit.New(1e-6, 3) })
	c := s.connect("ana", "sslmode=disable")
	done := make(chan error, 1)
	go func() { done <- second(query(t, c, "sleep")) }()
	id := s.lastSession()
	eventually(t, "the statement runs", func() bool { s.host.mu.Lock(); defer s.host.mu.Unlock(); return s.host.running[id] != nil })
	for range 3 {
		rest := append(binary.BigEndian.AppendUint32(nil, c.PID()), 0, 0, 0, 0)
		s.cancelRequest(rest, "127.0.0.1")
	}
	rest := append(binary.BigEndian.AppendUint32(nil, c.PID()), c.SecretKey()...)
	s.cancelRequest(rest, "127.0.0.1")
	select {
	case err := <-done:
		t.Fatalf("the statement ended: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	s.cancelRequest(rest, "192.0.2.1")
	wantState(t, <-done, "57014")
}

// TestEnds: each way in which a session may end from outside.
func TestEnds(t *testing.T) {
	t.Run("token revoked", func(t *testing.T) {
		s := startServer(t)
		busy, other := s.connect("ana", "sslmode=require"), s.connect("bob", "sslmode=disable")
		done := make(chan error, 1)
		go func() { done <- second(query(t, busy, "sleep")) }()
		eventually(t, "the statement runs", func() bool { s.host.mu.Lock(); defer s.host.mu.Unlock(); return len(s.host.running) == 1 })
		s.CutToken("tok_ana")
		pg := wantState(t, <-done, "57P01")
		if !strings.Contains(pg.Message, "revoked") {
			t.Errorf("got %q", pg.Message)
		}
		if got, err := query(t, other, "echo x"); got != "x" || err != nil {
			t.Errorf("another token's session: %q, %v", got, err)
		}
		// The host was asked to cancel, and told how it ended.
		eventually(t, "the session's end", func() bool { return s.Sessions() == 1 })
		s.journal.mu.Lock()
		defer s.journal.mu.Unlock()
		last := s.journal.events[len(s.journal.events)-1]
		if last.Sql == "echo x" {
			last = s.journal.events[len(s.journal.events)-2]
		}
		if last.State != posternv1.WireEvent_STATE_ENDED || last.Error.GetCode() != proto.CodeCancelled || s.journal.closed[0] == nil {
			t.Errorf("the journal has %v, %v", s.journal.events, s.journal.closed)
		}
	})
	t.Run("token expired", func(t *testing.T) {
		s := startServer(t)
		c := s.connect("brief", "sslmode=disable")
		wantState(t, second(query(t, c, "sleep")), "57P01")
	})
	t.Run("organization disabled", func(t *testing.T) {
		s := startServer(t)
		c := s.connect("ana", "sslmode=disable")
		s.CutOrganization("org_1")
		eventually(t, "the session's end", func() bool { return s.Sessions() == 0 })
		wantState(t, second(query(t, c, "echo x")), "57P01")
	})
	t.Run("agent lost", func(t *testing.T) {
		s := startServer(t)
		c := s.connect("ana", "sslmode=disable")
		wantState(t, second(query(t, c, "die")), "08006")
	})
	t.Run("agent lost within a message", func(t *testing.T) {
		s := startServer(t)
		c := s.connect("ana", "sslmode=disable")
		var pg *pgconn.PgError
		if _, err := query(t, c, "half"); err == nil || errors.As(err, &pg) {
			t.Errorf("got %v, want a broken connection", err)
		}
	})
	t.Run("by the host", func(t *testing.T) {
		s := startServer(t)
		c := s.connect("ana", "sslmode=disable")
		pg := wantState(t, second(query(t, c, "retire")), "57P01")
		if !strings.Contains(pg.Message, "policy") {
			t.Errorf("got %q", pg.Message)
		}
	})
	t.Run("tunnel replaced", func(t *testing.T) {
		s := startServer(t)
		idle, inside := s.connect("ana", "sslmode=disable"), s.connect("ana", "sslmode=disable")
		if _, err := query(t, inside, "begin"); err != nil {
			t.Fatal(err)
		}
		close(s.host.retired)
		eventually(t, "the idle one's end", func() bool { return s.Sessions() == 1 })
		wantState(t, second(query(t, idle, "echo x")), "57P01")
		if got, err := query(t, inside, "echo x"); got != "x" || err != nil {
			t.Errorf("within a transaction: %q, %v", got, err)
		}
		if _, err := query(t, inside, "commit"); err != nil {
			t.Errorf("commit: %v", err)
		}
		eventually(t, "the other's end", func() bool { return s.Sessions() == 0 })
	})
	t.Run("client hangs up", func(t *testing.T) {
		s := startServer(t)
		c := s.connect("ana", "sslmode=disable")
		asked := make(chan struct{})
		go func() {
			defer close(asked)
			query(t, c, "sleep") //nolint:errcheck // its connection breaks
		}()
		defer func() { <-asked }() // before the connection is closed in order, by another goroutine
		eventually(t, "the statement runs", func() bool { s.host.mu.Lock(); defer s.host.mu.Unlock(); return len(s.host.running) == 1 })
		c.Conn().Close()
		if how := <-s.host.ended; how != "terminated" {
			t.Errorf("the host saw %q", how)
		}
		eventually(t, "the session's end", func() bool { return s.Sessions() == 0 })
		s.journal.mu.Lock()
		defer s.journal.mu.Unlock()
		if n := len(s.journal.events); n != 2 || s.journal.events[1].Error.GetCode() != proto.CodeCancelled {
			t.Errorf("the journal has %v", s.journal.events)
		}
	})
}

func TestDrain(t *testing.T) {
	s := startServer(t)
	idle, busy := s.connect("ana", "sslmode=disable"), s.connect("ana", "sslmode=disable")
	done := make(chan error, 1)
	go func() { done <- second(query(t, busy, "sleep")) }()
	eventually(t, "the statement runs", func() bool { s.host.mu.Lock(); defer s.host.mu.Unlock(); return len(s.host.running) == 1 })
	drained := make(chan error, 1)
	go func() { drained <- s.Drain(t.Context()) }()
	eventually(t, "the idle one's end", func() bool { return s.Sessions() == 1 })
	wantState(t, second(query(t, idle, "echo x")), "57P01")
	if _, err := net.Dial("tcp", s.address); err == nil {
		t.Error("it still listens")
	}
	select {
	case err := <-done:
		t.Fatalf("the running statement ended: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	s.host.mu.Lock()
	for id, c := range s.host.running {
		close(c)
		delete(s.host.running, id)
	}
	s.host.mu.Unlock()
	wantState(t, <-done, "57014") // its own end; then it is idle
	if err := <-drained; err != nil {
		t.Error(err)
	}
}

// TestLimits: places are counted, and come back.
func TestLimits(t *testing.T) {
	s := startServer(t, func(c *Config) { c.Limits = Limits{Sessions: 4, PerOrganization: 3, PerToken: 2} })
	first := s.connect("ana", "sslmode=disable")
	s.connect("ana", "sslmode=disable")
	wantState(t, second(pgconn.Connect(t.Context(), s.dsn("ana", "sslmode=disable"))), "53300")
	s.connect("bob", "sslmode=disable")
	wantState(t, second(pgconn.Connect(t.Context(), s.dsn("bob", "sslmode=disable"))), "53300")
	first.Close(t.Context())
	eventually(t, "a place", func() bool { return s.Sessions() == 2 })
	s.connect("ana", "sslmode=disable")
}

// TestSlowHost: one that never opens the session is given up.
func TestSlowHost(t *testing.T) {
	s := startServer(t, func(c *Config) { c.Limits.Opening = 300 * time.Millisecond })
	s.host.silent = true
	pg := wantState(t, second(pgconn.Connect(t.Context(), s.dsn("ana", "sslmode=disable"))), "57P03")
	if !strings.Contains(pg.Message, "300ms") {
		t.Errorf("got %q", pg.Message)
	}
}

// TestSlowReader: who reads nothing holds up its host and can still cancel and be cut.
func TestSlowReader(t *testing.T) {
	s := startServer(t)
	c := s.connect("ana", "sslmode=require")
	frontend := c.Frontend()
	frontend.SendQuery(&pgproto3.Query{String: "rows 5000000"})
	if err := frontend.Flush(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	if err := c.CancelRequest(t.Context()); err != nil {
		t.Error(err)
	}
	id := s.lastSession()
	eventually(t, "the cancel to arrive", func() bool { s.host.mu.Lock(); defer s.host.mu.Unlock(); return s.host.running[id] == nil })
	s.CutToken("tok_ana")
	eventually(t, "the session's end", func() bool { return s.Sessions() == 0 })
}

// TestFlood: strangers that say nothing keep nobody out, and leave nothing behind.
func TestFlood(t *testing.T) {
	s := startServer(t, func(c *Config) { c.Limits.Strangers = 32 })
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	for range 500 {
		c, err := net.Dial("tcp", s.address)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	eventually(t, "no more strangers than may be", func() bool { s.strangers.mu.Lock(); defer s.strangers.mu.Unlock(); return s.strangers.count <= 32 })
	var work sync.WaitGroup
	for range 20 {
		work.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			c, err := pgconn.Connect(ctx, s.dsn("ana", "sslmode=disable"))
			if err != nil {
				t.Errorf("a member is kept out: %v", err)
				return
			}
			c.Close(ctx)
		})
	}
	work.Wait()
}
