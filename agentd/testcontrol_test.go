package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
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

	"connectrpc.com/connect"
	gproto "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/proto/regkey"
	"github.com/postern-dev/postern/tunnel"
)

// testControl is a minimal control plane: a CA, one registration key, and the
// tunnels that come. It checks what a real one checks of an agent.
type testControl struct {
	t      *testing.T
	ca     *x509.Certificate
	caKey  *ecdsa.PrivateKey
	server *tunnel.Server
	web    *httptest.Server
	key    regkey.Key

	// mu guards the following.
	mu        sync.Mutex
	life      time.Duration // of the certificates that it issues
	refuse    error         // what Hello answers
	joined    bool
	active    string // the serial in use
	pending   string
	retired   map[string]bool
	hellos    []*posternv1.HelloRequest
	rejoins   int
	known     auditchain.Head // what Hello says of the agent's log
	own       auditchain.Head // what it says of the organization's
	inventory []*posternv1.SourceInfo
	current   *tunnel.Tunnel
	asking    map[*tunnel.Tunnel]int
	conns     map[net.Conn]struct{}
	attach    http.Handler  // AttachService and the bodies of chunks; may be nil
	changed   chan struct{} // closed at each change
	handlers  sync.WaitGroup
}

func newTestControl(t *testing.T) *testControl {
	t.Helper()
	c := &testControl{t: t, life: 24 * time.Hour, retired: map[string]bool{}, conns: map[net.Conn]struct{}{}, asking: map[*tunnel.Tunnel]int{}, changed: make(chan struct{})}
	c.caKey = newKey(t)
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "testcontrol"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, c.caKey.Public(), c.caKey)
	if err != nil {
		t.Fatal(err)
	}
	if c.ca, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	c.key = regkey.New(sha256.Sum256(der))
	serverKey := newKey(t)
	leaf := c.sign(&x509.Certificate{
		DNSNames: []string{"controlplane.postern.internal"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
	}, serverKey.Public())
	c.server = tunnel.NewServer(tunnel.ServerConfig{
		TLS: &tls.Config{
			Certificates: []tls.Certificate{{Certificate: [][]byte{leaf, der}, PrivateKey: serverKey}},
			ClientAuth:   tls.RequestClientCert,
		},
		Handler: c.handle,
	})
	mux := http.NewServeMux()
	mux.Handle("/tunnel", c.server)
	c.web = httptest.NewUnstartedServer(mux)
	c.web.Listener = &tracked{c.web.Listener, c}
	c.web.Start()
	t.Cleanup(func() {
		c.server.Close()
		c.web.Close()
		c.handlers.Wait()
	})
	return c
}

// tracked remembers connections, to cut them.
type tracked struct {
	net.Listener
	c *testControl
}

func (l *tracked) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		l.c.mu.Lock()
		l.c.conns[conn] = struct{}{}
		l.c.mu.Unlock()
	}
	return conn, err
}

// cut breaks every connection, as a router that dies does.
func (c *testControl) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for conn := range c.conns {
		conn.Close() //nolint:errcheck // that is the point
		delete(c.conns, conn)
	}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	if err != nil {
		panic(err) // never happens
	}
	return n
}

func (c *testControl) sign(template *x509.Certificate, pub any) []byte {
	if template.SerialNumber == nil {
		template.SerialNumber = serial()
	}
	der, err := x509.CreateCertificate(rand.Reader, template, c.ca, pub, c.caKey)
	if err != nil {
		panic(err) // never happens with good keys
	}
	return der
}

// issue signs an agent's request; mu is held.
func (c *testControl) issueLocked(csrDER []byte) ([]byte, string, error) {
	csr, err := x509.ParseCertificateRequest(csrDER)
	if err != nil {
		return nil, "", err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, "", err
	}
	template := &x509.Certificate{
		SerialNumber: serial(), NotBefore: time.Now().Add(-time.Second), NotAfter: time.Now().Add(c.life), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	return c.sign(template, csr.PublicKey), template.SerialNumber.Text(16), nil
}

type tunnelKey struct{}

// handle serves LinkService on one tunnel.
func (c *testControl) handle(t *tunnel.Tunnel) {
	c.handlers.Add(1)
	defer c.handlers.Done()
	mux := http.NewServeMux()
	mux.Handle(posternv1connect.NewLinkServiceHandler(testLink{c: c}))
	if c.attach != nil {
		mux.Handle("/", c.attach)
	}
	server := &http.Server{
		Handler: mux, ReadHeaderTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return context.WithValue(context.Background(), tunnelKey{}, t) },
	}
	c.handlers.Add(1)
	go c.follow(t)
	server.Serve(t.Listener()) //nolint:errcheck // it ends with the tunnel
	<-t.Done()
	server.Close() //nolint:errcheck // likewise
}

// follow closes a tunnel that was told to go away when nothing runs on it.
func (c *testControl) follow(t *tunnel.Tunnel) {
	defer c.handlers.Done()
	select {
	case <-t.Done():
		return
	case <-t.GoneAway():
	}
	for {
		c.mu.Lock()
		n, changed := c.asking[t], c.changed
		c.mu.Unlock()
		if n == 0 {
			t.Close(nil) //nolint:errcheck // it ends either way
			return
		}
		select {
		case <-t.Done():
			return
		case <-changed:
		}
	}
}

// begin counts a request on a tunnel until end.
func (c *testControl) begin(t *tunnel.Tunnel) (end func()) {
	c.mu.Lock()
	c.asking[t]++
	c.mu.Unlock()
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.asking[t]--
		close(c.changed)
		c.changed = make(chan struct{})
	}
}

// testLink is the LinkService.
type testLink struct {
	posternv1connect.UnimplementedLinkServiceHandler
	c *testControl
}

func tunnelOf(ctx context.Context) *tunnel.Tunnel { return ctx.Value(tunnelKey{}).(*tunnel.Tunnel) }

func peerCertificate(ctx context.Context) *x509.Certificate {
	certs := tunnelOf(ctx).PeerState().PeerCertificates
	if len(certs) == 0 {
		return nil
	}
	return certs[0]
}

func (s testLink) Register(ctx context.Context, r *connect.Request[posternv1.RegisterRequest]) (*connect.Response[posternv1.RegisterResponse], error) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case r.Msg.KeyId != c.key.ID || subtle.ConstantTimeCompare(r.Msg.KeySecret, c.key.Secret[:]) != 1:
		return nil, proto.ConnectError(proto.Errorf(proto.CodeKeyUnknown, "the registration key is unknown"))
	case c.joined:
		return nil, proto.ConnectError(proto.Errorf(proto.CodeKeyUsedUp, "the registration key has no uses left: make a new one"))
	}
	der, serial, err := c.issueLocked(r.Msg.Csr)
	if err != nil {
		return nil, proto.ConnectError(err)
	}
	c.joined, c.active = true, serial
	return connect.NewResponse(&posternv1.RegisterResponse{
		AgentId: "agt_test", Name: r.Msg.Name, Organization: "default", Certificate: der, Authorities: [][]byte{c.ca.Raw},
	}), nil
}

func (s testLink) member(ctx context.Context, expired bool) error {
	cert := peerCertificate(ctx)
	switch {
	case cert == nil || cert.CheckSignatureFrom(s.c.ca) != nil:
		return proto.Errorf(proto.CodeUnauthenticated, "a host without a certificate may only register")
	case time.Now().After(cert.NotAfter) != expired:
		return proto.Errorf(proto.CodeIdentityExpired, "the agent's certificate has expired: it must rejoin before anything else")
	case s.c.retired[cert.SerialNumber.Text(16)]:
		return proto.Errorf(proto.CodeUnauthenticated, "the certificate was replaced by a newer one")
	}
	return nil
}

func (s testLink) trade(ctx context.Context, csr []byte, expired bool) (*connect.Response[posternv1.RenewResponse], error) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := s.member(ctx, expired); err != nil {
		return nil, proto.ConnectError(err)
	}
	der, serial, err := c.issueLocked(csr)
	if err != nil {
		return nil, proto.ConnectError(err)
	}
	c.pending = serial
	return connect.NewResponse(&posternv1.RenewResponse{Certificate: der, Authorities: [][]byte{c.ca.Raw}}), nil
}

func (s testLink) Renew(ctx context.Context, r *connect.Request[posternv1.RenewRequest]) (*connect.Response[posternv1.RenewResponse], error) {
	return s.trade(ctx, r.Msg.Csr, false)
}

func (s testLink) Rejoin(ctx context.Context, r *connect.Request[posternv1.RenewRequest]) (*connect.Response[posternv1.RenewResponse], error) {
	s.c.mu.Lock()
	s.c.rejoins++
	s.c.mu.Unlock()
	return s.trade(ctx, r.Msg.Csr, true)
}

func (s testLink) Hello(ctx context.Context, r *connect.Request[posternv1.HelloRequest]) (*connect.Response[posternv1.HelloResponse], error) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := s.member(ctx, false); err != nil {
		return nil, proto.ConnectError(err)
	}
	if c.refuse != nil {
		return nil, proto.ConnectError(c.refuse)
	}
	serial := peerCertificate(ctx).SerialNumber.Text(16)
	if serial != c.active {
		c.retired[c.active] = true
		c.active = serial
	}
	c.hellos = append(c.hellos, r.Msg)
	c.current = tunnelOf(ctx)
	close(c.changed)
	c.changed = make(chan struct{})
	return connect.NewResponse(&posternv1.HelloResponse{
		Version: proto.Version(), Features: proto.Features(), AgentId: "agt_test", Name: "renamed", Organization: "default",
		ServerTime: timestamppb.Now(), Authorities: [][]byte{c.ca.Raw}, KnownAuditHead: c.known.Proto(), OrganizationAuditHead: c.own.Proto(),
	}), nil
}

func (s testLink) UpdateInventory(_ context.Context, r *connect.Request[posternv1.UpdateInventoryRequest]) (*connect.Response[posternv1.UpdateInventoryResponse], error) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.c.inventory = r.Msg.Sources
	close(s.c.changed)
	s.c.changed = make(chan struct{})
	return connect.NewResponse(&posternv1.UpdateInventoryResponse{}), nil
}

// await waits until ok, which is asked at each change with mu held.
func (c *testControl) await(what string, ok func() bool) {
	c.t.Helper()
	deadline := time.After(2 * time.Minute)
	for {
		c.mu.Lock()
		done, changed := ok(), c.changed
		c.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			c.t.Fatalf("waited too long for %s", what)
		}
	}
}

// awaitHello waits until n hellos were said, and returns the tunnel of the last.
func (c *testControl) awaitHello(n int) *tunnel.Tunnel {
	c.t.Helper()
	c.await(fmt.Sprintf("hello %d", n), func() bool { return len(c.hellos) >= n })
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.current
}

func (c *testControl) setRefuse(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refuse = err
}

// result is a statement's answer.
type result struct {
	rows    []byte
	outcome *posternv1.QueryOutcome
	err     error
}

// ask runs a statement over a tunnel.
func (c *testControl) ask(ctx context.Context, t *tunnel.Tunnel, id, source, sql string) result {
	for try := 1; ; try++ {
		// On a busy machine the parser of statements may take longer to start than a
		// statement waits for it.
		r := c.askOnce(ctx, t, id, source, sql)
		if try == 3 || proto.CodeOf(r.err) != proto.CodeUnavailable || !strings.Contains(r.err.Error(), "parser of statements") {
			return r
		}
	}
}

func (c *testControl) askOnce(ctx context.Context, t *tunnel.Tunnel, id, source, sql string) result {
	defer c.begin(t)()
	body, err := gproto.Marshal(&posternv1.SQLRequest{
		QueryId: id, Source: source, Sql: sql, Principal: &posternv1.Principal{Organization: "default", TokenId: "tok_1", TokenName: "test", Role: "analyst"},
	})
	if err != nil {
		return result{err: err}
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://agent"+proto.SQLPath, bytes.NewReader(body))
	if err != nil {
		return result{err: err}
	}
	response, err := t.Transport(tunnel.Bulk).RoundTrip(r)
	if err != nil {
		return result{err: err}
	}
	defer response.Body.Close() //nolint:errcheck // read to its end
	if response.StatusCode != http.StatusOK {
		return result{err: proto.ReadHTTPError(response)}
	}
	rows, err := io.ReadAll(response.Body)
	if err != nil {
		return result{rows: rows, err: err}
	}
	o, err := proto.DecodeOutcome(response.Trailer.Get(proto.OutcomeTrailer))
	if err == nil && o.Error != nil {
		err = proto.FromDetail(o.Error)
	}
	return result{rows, o, err}
}

// keyFile writes the registration key to a file.
func (c *testControl) keyFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, []byte(c.key.Encode()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
