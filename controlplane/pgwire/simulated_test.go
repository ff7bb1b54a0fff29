package pgwire

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/ratelimit"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/wirestream"
)

// simulatedHost is a host that answers the protocol by itself, without a database:
//
//	echo TEXT   a row with the text        rows N   N rows of 60 bytes
//	sleep       until it is cancelled      begin    a transaction, until commit
//	die         ends the session's stream without a word
//	retire      57P01 by the host's own will
type simulatedHost struct {
	refuse func(*posternv1.WireRequest) error
	silent bool // never opens

	server  *httptest.Server
	client  *http.Client
	retired chan struct{}
	lost    error

	mu       sync.Mutex
	requests []*posternv1.WireRequest
	running  map[string]chan struct{} // closed to cancel, by session
	ended    chan string              // how streams ended, as the host saw it
}

func newSimulatedHost(t *testing.T) *simulatedHost {
	h := &simulatedHost{retired: make(chan struct{}), running: map[string]chan struct{}{}, ended: make(chan string, 100)}
	h.server = httptest.NewServer(h)
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", h.server.Listener.Addr().String())
	}}
	h.client = &http.Client{Transport: transport}
	t.Cleanup(func() { transport.CloseIdleConnections(); h.server.Close() })
	return h
}

func (h *simulatedHost) Do(r *http.Request) (*http.Response, error) { return h.client.Do(r) }
func (h *simulatedHost) Retired() <-chan struct{}                   { return h.retired }
func (h *simulatedHost) Err() error                                 { return h.lost }

func (h *simulatedHost) CancelQuery(_ context.Context, r *posternv1.CancelQueryRequest) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c := h.running[r.QueryId]; c != nil {
		close(c)
		delete(h.running, r.QueryId)
	}
	return nil
}

func (h *simulatedHost) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	request, err := wirestream.ReadRequest(w, r)
	if err == nil {
		h.mu.Lock()
		h.requests = append(h.requests, request)
		h.mu.Unlock()
		if h.refuse != nil {
			err = h.refuse(request)
		}
	}
	if err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	stream, err := wirestream.Accept(w)
	if err != nil {
		panic(err)
	}
	defer stream.Close()
	h.ended <- h.session(request, stream)
}

// run is closed when what the session runs from now on is cancelled.
func (h *simulatedHost) run(id string) chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.running[id] = make(chan struct{})
	return h.running[id]
}

func (h *simulatedHost) session(request *posternv1.WireRequest, stream net.Conn) string {
	out := wirestream.NewWriter(stream)
	if h.silent {
		io.Copy(io.Discard, stream)
		return "silent"
	}
	out.Send(wirestream.Opened, &posternv1.WireOpened{Parameters: []*posternv1.WireSetting{{Name: "server_version", Value: "15.0"}, {Name: "client_encoding", Value: "UTF8"}}})
	in := wirestream.NewReader(stream)
	messages, feed := io.Pipe()
	go func() {
		for {
			_, err := in.Next()
			if err == nil {
				err = in.CopyData(feed)
			}
			if err != nil {
				feed.CloseWithError(err)
				return
			}
		}
	}()
	defer messages.Close()
	backend := pgproto3.NewBackend(messages, pgWriter{out})
	status := byte('I')
	for {
		m, err := backend.Receive()
		if err != nil {
			return "lost: " + err.Error()
		}
		switch m := m.(type) {
		case *pgproto3.Terminate:
			out.Send(wirestream.End, &posternv1.WireEnd{})
			return "terminated"
		case *pgproto3.Query:
			event := &posternv1.WireEvent{
				StatementId: proto.NewID(proto.QueryPrefix), Sql: m.String, Verdict: "allowed", Started: timestamppb.Now(),
				State: posternv1.WireEvent_STATE_RUNNING,
			}
			verb, rest, _ := strings.Cut(m.String, " ")
			var answer []byte
			encode := func(m pgproto3.BackendMessage) { answer, _ = m.Encode(answer) }
			switch verb {
			case "echo":
				encode(&pgproto3.RowDescription{Fields: []pgproto3.FieldDescription{{Name: []byte("echo"), DataTypeOID: 25}}})
				encode(&pgproto3.DataRow{Values: [][]byte{[]byte(rest)}})
				encode(&pgproto3.CommandComplete{CommandTag: []byte("SELECT 1")})
				event.Rows = 1
			case "rows":
				var n int
				fmt.Sscan(rest, &n)
				cancelled := h.run(request.SessionId)
				encode(&pgproto3.RowDescription{Fields: []pgproto3.FieldDescription{{Name: []byte("row"), DataTypeOID: 25}}})
				for range n {
					select {
					case <-cancelled:
						event.Error = &posternv1.ErrorDetail{Code: proto.CodeCancelled, Message: "cancelled"}
					default:
					}
					if event.Error != nil {
						break
					}
					encode(&pgproto3.DataRow{Values: [][]byte{[]byte(strings.Repeat("x", 60))}})
					if len(answer) > 100<<10 {
						if _, err := (pgWriter{out}).Write(answer); err != nil {
							return "lost: " + err.Error()
						}
						answer = answer[:0]
					}
				}
				encode(&pgproto3.CommandComplete{CommandTag: []byte("SELECT")})
				event.Rows = uint64(n)
			case "sleep":
				out.Send(wirestream.Event, event)
				<-h.run(request.SessionId)
				encode(&pgproto3.ErrorResponse{Severity: "ERROR", Code: "57014", Message: "canceling statement due to user request"})
				event.Error = &posternv1.ErrorDetail{Code: proto.CodeCancelled, Message: "cancelled"}
			case "begin", "commit":
				status = map[string]byte{"begin": 'T', "commit": 'I'}[verb]
				encode(&pgproto3.CommandComplete{CommandTag: []byte(strings.ToUpper(verb))})
			case "half": // a message that never ends
				answer = append(answer, 'D', 0, 0, 1, 0, 'x')
				pgWriter{out}.Write(answer)
				return "died"
			case "die":
				return "died"
			case "retire":
				out.Send(wirestream.End, &posternv1.WireEnd{
					Error: &posternv1.ErrorDetail{Code: proto.CodeUnavailable, Message: "the policy has changed"}, Sqlstate: "57P01",
				})
				return "retired"
			}
			event.State, event.Duration = posternv1.WireEvent_STATE_ENDED, durationpb.New(time.Millisecond)
			out.Send(wirestream.Event, event)
			encode(&pgproto3.ReadyForQuery{TxStatus: status})
			pgWriter{out}.Write(answer)
		}
	}
}

// pgWriter frames what is written.
type pgWriter struct{ w *wirestream.Writer }

func (p pgWriter) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 0; {
		n := min(len(rest), wirestream.MaxData)
		if err := p.w.Raw(append(wirestream.AppendHeader(nil, wirestream.Data, n), rest[:n]...)); err != nil {
			return 0, err
		}
		rest = rest[n:]
	}
	return len(b), nil
}

// memory is a journal that a test can look into.
type memory struct {
	mu     sync.Mutex
	fails  error
	opened []Session
	events []*posternv1.WireEvent
	closed []error
}

func (j *memory) Open(_ context.Context, s Session) (Entries, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.fails != nil {
		return nil, j.fails
	}
	j.opened = append(j.opened, s)
	return memoryEntries{j}, nil
}

type memoryEntries struct{ j *memory }

func (e memoryEntries) Event(event *posternv1.WireEvent) {
	e.j.mu.Lock()
	defer e.j.mu.Unlock()
	e.j.events = append(e.j.events, event)
}

func (e memoryEntries) Close(why error) {
	e.j.mu.Lock()
	defer e.j.mu.Unlock()
	e.j.closed = append(e.j.closed, why)
}

// names are the tokens that are known: name and text are the same.
type names map[string]Caller

func (n names) AuthenticateAs(_ context.Context, name, text, remote string) (Caller, error) {
	if c, ok := n[name]; ok && text == "secret of "+name {
		return c, nil
	}
	return Caller{}, proto.Errorf(proto.CodeUnauthenticated, "the control plane does not know this API token")
}

// testServer is a server whose one agent, "lab", is simulated.
type testServer struct {
	*Server
	t       *testing.T
	host    *simulatedHost
	journal *memory
	address string
	roots   *x509.CertPool
	caFile  string
}

func startServer(t *testing.T, change ...func(*Config)) *testServer {
	t.Helper()
	s := &testServer{t: t, host: newSimulatedHost(t), journal: &memory{}}
	principal := func(token, role string) Caller {
		return Caller{Principal: &posternv1.Principal{Organization: "org_1", TokenId: "tok_" + token, TokenName: token, Role: role}}
	}
	brief := principal("brief", "analyst")
	brief.Expires = time.Now().Add(4 * time.Second)
	cfg := Config{
		Logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
		Tokens: names{"ana": principal("ana", "analyst"), "bob": principal("bob", "analyst"), "view": principal("view", "viewer"), "brief": brief},
		Permit: func(p *posternv1.Principal) error {
			if p.Role == "viewer" {
				return proto.Errorf(proto.CodeRoleDenied, "token %s has the role viewer: this needs analyst", p.TokenName)
			}
			return nil
		},
		Find: func(_ context.Context, organization, agent string) (*posternv1.Agent, error) {
			if agent == "lab" || agent == "away" {
				return &posternv1.Agent{Id: "agt_" + agent, Name: agent}, nil
			}
			return nil, proto.Errorf(proto.CodeNotFound, "no agent %q", agent)
		},
		Connect: func(id string) (Agent, error) {
			if id != "agt_lab" {
				return nil, proto.Errorf(proto.CodeAgentOffline, "offline")
			}
			return s.host, nil
		},
		Journal: s.journal, TLS: s.certificate(), Requests: ratelimit.New(1000, 1000), Cancels: ratelimit.New(1000, 1000),
	}
	for _, f := range change {
		f(&cfg)
	}
	s.Server = New(cfg)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.address = l.Addr().String()
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-served; err != ErrClosed {
			t.Errorf("Serve: %v", err)
		}
	})
	return s
}

// certificate makes one for localhost and 127.0.0.1.
func (s *testServer) certificate() *tls.Config {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		s.t.Fatal(err)
	}
	cert, _ := x509.ParseCertificate(der)
	s.roots = x509.NewCertPool()
	s.roots.AddCert(cert)
	s.caFile = filepath.Join(s.t.TempDir(), "ca.pem")
	if err := os.WriteFile(s.caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		s.t.Fatal(err)
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{"postgresql"}}
}

// dsn is how a token connects.
func (s *testServer) dsn(user, more string) string {
	host, port, _ := net.SplitHostPort(s.address)
	return fmt.Sprintf("host=%s port=%s user=%s password='secret of %s' dbname=lab/shop sslrootcert=%s %s", host, port, user, user, s.caFile, more)
}

func (s *testServer) connect(user, more string) *pgconn.PgConn {
	s.t.Helper()
	c, err := pgconn.Connect(s.t.Context(), s.dsn(user, more))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close(context.Background()) })
	return c
}

// query runs one statement and returns its only value.
func query(t *testing.T, c *pgconn.PgConn, text string) (string, error) {
	t.Helper()
	results, err := c.Exec(t.Context(), text).ReadAll()
	if err != nil || len(results) == 0 || len(results[0].Rows) == 0 {
		return "", err
	}
	return string(results[0].Rows[0][0]), nil
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		if f() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("not within a minute: %s", what)
}
