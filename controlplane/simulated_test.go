package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/proto/regkey"
	"github.com/postern-dev/postern/proto/wirestream"
	"github.com/postern-dev/postern/tunnel"
)

// testServer is a running control plane with its API's clients.
type testServer struct {
	*Server
	url   string
	token string
}

func startServer(t *testing.T, change ...func(*Options)) *testServer {
	t.Helper()
	o := Options{Data: filepath.Join(t.TempDir(), "data"), Listen: "127.0.0.1:0", DrainTimeout: 5 * time.Second, LogLevel: "error", LogFormat: "text"}
	for _, f := range change {
		f(&o)
	}
	s, err := NewServer(t.Context(), o, slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("control plane: %v", err)
		}
		http.DefaultClient.CloseIdleConnections()
	})
	t.Cleanup(stop)
	text, err := os.ReadFile(filepath.Join(o.Data, "admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	return &testServer{Server: s, url: "http://" + s.Addr().String(), token: strings.TrimSpace(string(text))}
}

// as is an HTTP client with a token.
func as(token string) *http.Client { return &http.Client{Transport: bearer(token)} }

type bearer string

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	if b != "" {
		r.Header.Set("Authorization", "Bearer "+string(b))
	}
	return http.DefaultTransport.RoundTrip(r)
}

// newToken makes a token of the organization that token belongs to.
func (s *testServer) newToken(t *testing.T, token, name, role string) string {
	t.Helper()
	c := posternv1connect.NewTokenServiceClient(as(token), s.url)
	resp, err := c.CreateToken(t.Context(), connect.NewRequest(&posternv1.CreateTokenRequest{Name: name, Role: role}))
	if err != nil {
		t.Fatal(err)
	}
	return resp.Msg.Secret
}

func (s *testServer) newKey(t *testing.T, token string, uses uint32) regkey.Key {
	t.Helper()
	c := posternv1connect.NewKeyServiceClient(as(token), s.url)
	resp, err := c.CreateKey(t.Context(), connect.NewRequest(&posternv1.CreateKeyRequest{MaxUses: uses, Labels: map[string]string{"site": "lab"}}))
	if err != nil {
		t.Fatal(err)
	}
	key, err := regkey.Parse(resp.Msg.Secret)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// simulatedAgent speaks an agent's side of the protocol; its statements are
// answered by a function.
type simulatedAgent struct {
	posternv1connect.UnimplementedHostServiceHandler
	server *testServer
	cert   tls.Certificate
	roots  *x509.CertPool
	id     string
	name   string

	mu     sync.Mutex
	sql    http.HandlerFunc
	cancel map[string]context.CancelCauseFunc
	chain  [][]byte
	head   auditchain.Head
	// retired is how many entries at the beginning of the chain it drops.
	retired uint64

	kernels interface{ Handle(*http.ServeMux) } // nil: none
}

func (a *simulatedAgent) dial(ctx context.Context, certs []tls.Certificate) (*tunnel.Tunnel, error) {
	return tunnel.Dial(ctx, tunnel.DialConfig{
		URL: a.server.url, TLS: &tls.Config{RootCAs: a.roots, Certificates: certs, ServerName: "controlplane.postern.internal"},
	})
}

func linkClient(tn *tunnel.Tunnel) posternv1connect.LinkServiceClient {
	return posternv1connect.NewLinkServiceClient(&http.Client{Transport: tn.Transport(tunnel.Control)}, "http://controlplane")
}

func newSimulatedAgent(s *testServer) *simulatedAgent {
	a := &simulatedAgent{server: s, roots: x509.NewCertPool(), cancel: map[string]context.CancelCauseFunc{}}
	for _, der := range s.ca.Certificates() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			panic(err)
		}
		a.roots.AddCert(c)
	}
	return a
}

// register joins with a key.
func (a *simulatedAgent) register(ctx context.Context, key regkey.Key, name string, change ...func(*posternv1.RegisterRequest)) error {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, private)
	if err != nil {
		return err
	}
	tn, err := a.dial(ctx, nil)
	if err != nil {
		return err
	}
	defer tn.Close(nil) //nolint:errcheck // it was only for this
	req := &posternv1.RegisterRequest{
		KeyId: key.ID, KeySecret: key.Secret[:], Csr: csr, Name: name, HostTime: timestamppb.Now(), Version: proto.Version(),
		Host: &posternv1.HostFacts{Hostname: name, Os: "linux"},
	}
	for _, f := range change {
		f(req)
	}
	resp, err := linkClient(tn).Register(ctx, connect.NewRequest(req))
	if err != nil {
		return proto.FromConnect(err)
	}
	a.id, a.name = resp.Msg.AgentId, resp.Msg.Name
	a.cert = tls.Certificate{Certificate: [][]byte{resp.Msg.Certificate}, PrivateKey: private}
	return nil
}

// attach dials, says hello and serves until the test or the tunnel ends.
func (a *simulatedAgent) attach(t *testing.T) *tunnel.Tunnel {
	t.Helper()
	tn, err := a.dial(t.Context(), []tls.Certificate{a.cert})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(posternv1connect.NewHostServiceHandler(a))
	mux.HandleFunc(proto.SQLPath, a.serveSQL)
	mux.HandleFunc(wirestream.Path, a.serveWire)
	mux.HandleFunc(proto.MetricsPath, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "agentd_up 1\n") })
	if a.kernels != nil {
		a.kernels.Handle(mux)
	}
	server := &http.Server{Handler: mux}
	served := make(chan struct{})
	go func() { defer close(served); server.Serve(tn.Listener()) }()
	t.Cleanup(func() { tn.Close(nil); server.Close(); <-served })
	if err := a.hello(t.Context(), tn); err != nil {
		t.Fatal(err)
	}
	return tn
}

func (a *simulatedAgent) hello(ctx context.Context, tn *tunnel.Tunnel) error {
	a.mu.Lock()
	head := a.head
	a.mu.Unlock()
	_, err := linkClient(tn).Hello(ctx, connect.NewRequest(&posternv1.HelloRequest{
		Version: proto.Version(), Features: proto.Features(), HostTime: timestamppb.Now(), AuditHead: head.Proto(),
		Sources: []*posternv1.SourceInfo{{Name: "shop", Engine: "postgres", Mode: "read-only"}},
	}))
	if err != nil {
		return proto.FromConnect(err)
	}
	return nil
}

func (a *simulatedAgent) serveSQL(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	f := a.sql
	a.mu.Unlock()
	f(w, r)
}

// answer sets how statements are answered: the function writes rows and returns
// the outcome. ctx ends when the query is cancelled.
func (a *simulatedAgent) answer(f func(ctx context.Context, req *posternv1.SQLRequest, w io.Writer) *posternv1.QueryOutcome) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sql = func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		var req posternv1.SQLRequest
		if err == nil {
			err = gproto.Unmarshal(body, &req)
		}
		if err != nil {
			proto.WriteHTTPError(w, err)
			return
		}
		ctx, cancel := context.WithCancelCause(r.Context())
		defer cancel(nil)
		a.mu.Lock()
		a.cancel[req.QueryId] = cancel
		a.mu.Unlock()
		w.Header().Set("Trailer", proto.OutcomeTrailer)
		w.WriteHeader(http.StatusOK)
		http.NewResponseController(w).Flush()
		w.Header().Set(proto.OutcomeTrailer, proto.EncodeOutcome(f(ctx, &req, w)))
	}
}

func (a *simulatedAgent) CancelQuery(_ context.Context, req *connect.Request[posternv1.CancelQueryRequest]) (*connect.Response[posternv1.CancelQueryResponse], error) {
	a.mu.Lock()
	cancel, found := a.cancel[req.Msg.QueryId]
	a.mu.Unlock()
	if found {
		cancel(proto.Errorf(proto.CodeCancelled, "cancelled by %s", req.Msg.Principal.TokenName))
	}
	return connect.NewResponse(&posternv1.CancelQueryResponse{Found: found}), nil
}

func (a *simulatedAgent) CheckSource(context.Context, *connect.Request[posternv1.CheckSourceRequest]) (*connect.Response[posternv1.CheckSourceResponse], error) {
	return connect.NewResponse(&posternv1.CheckSourceResponse{Checks: []*posternv1.Check{{Name: "reachable", Result: "ok"}}}), nil
}

func (a *simulatedAgent) ReadAudit(_ context.Context, req *connect.Request[posternv1.ReadAuditRequest]) (*connect.Response[posternv1.ReadAuditResponse], error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	resp := &posternv1.ReadAuditResponse{}
	for i := max(req.Msg.From, a.retired+1); i <= uint64(len(a.chain)) && len(resp.Entries) < 3; i++ {
		resp.Entries = append(resp.Entries, a.chain[i-1])
	}
	return connect.NewResponse(resp), nil
}

// log adds n entries to the agent's own chain.
func (a *simulatedAgent) log(n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for range n {
		e := auditchain.Entry{Time: time.Now(), Action: "sql.run"}
		a.head = e.Seal(a.head)
		a.chain = append(a.chain, e.Encode())
	}
}

// joined is an agent that has registered and is attached.
func joined(t *testing.T, s *testServer, token, name string) *simulatedAgent {
	t.Helper()
	a := newSimulatedAgent(s)
	if err := a.register(t.Context(), s.newKey(t, token, 1), name); err != nil {
		t.Fatal(err)
	}
	a.attach(t)
	return a
}

// wrongKey is a key of another control plane's.
func wrongKey() regkey.Key { return regkey.New(sha256.Sum256([]byte("another"))) }
