package peer

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/controlplane/pki"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
)

// installation is the TLS of one installation's control planes.
func installation(t *testing.T) *tls.Config {
	t.Helper()
	a, err := pki.Open(t.Context(), pki.Config{Store: storetest.SQLite(t), MasterKeyFile: filepath.Join(t.TempDir(), "master.key")})
	if err != nil {
		t.Fatal(err)
	}
	config, err := a.PeerTLS()
	if err != nil {
		t.Fatal(err)
	}
	return config
}

// serve starts a server and returns its URL.
func serve(t *testing.T, cfg Config) (*Server, string) {
	t.Helper()
	cfg.Logger = slog.New(slog.DiscardHandler)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(cfg)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-done })
	return s, "https://" + l.Addr().String()
}

func client(t *testing.T, config *tls.Config) *Client {
	c := NewClient(config, nil)
	t.Cleanup(c.Close)
	return c
}

// echo is an agent whose streams say what they hear.
func echo(_ context.Context, agent string, generation int64, class string) (net.Conn, error) {
	if agent != "agt_1" || generation != 7 || class != "bulk" {
		return nil, proto.Errorf(proto.CodeAgentOffline, "no such tunnel here")
	}
	near, far := net.Pipe()
	go func() {
		_, _ = io.Copy(far, far)
		_ = far.Close()
	}()
	return near, nil
}

func TestStreams(t *testing.T) {
	config := installation(t)
	_, base := serve(t, Config{TLS: config, Stream: echo})
	c := client(t, config)
	conn, err := c.Stream(t.Context(), base, "agt_1", 7, "bulk")
	if err != nil {
		t.Fatal(err)
	}
	// More than all windows together, so that a missing grant would stop it.
	const size = 8 << 20
	sum := sha256.New()
	sent := make(chan error, 1)
	go func() {
		_, err := io.CopyN(io.MultiWriter(conn, sum), rand.Reader, size)
		sent <- err
	}()
	got := sha256.New()
	if n, err := io.CopyN(got, conn, size); n != size || err != nil {
		t.Fatalf("got %d bytes, %v", n, err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if string(got.Sum(nil)) != string(sum.Sum(nil)) {
		t.Error("other bytes came back")
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	for _, wrong := range []struct {
		agent      string
		generation int64
	}{{"agt_2", 7}, {"agt_1", 6}} {
		if _, err := c.Stream(t.Context(), base, wrong.agent, wrong.generation, "bulk"); proto.CodeOf(err) != proto.CodeAgentOffline {
			t.Errorf("%v: got %v", wrong, err)
		}
	}
}

// TestAStreamNobodyReadsStopsNoOther fills one stream's window and uses another one.
func TestAStreamNobodyReadsStopsNoOther(t *testing.T) {
	config := installation(t)
	_, base := serve(t, Config{TLS: config, Stream: func(_ context.Context, agent string, _ int64, _ string) (net.Conn, error) {
		near, far := net.Pipe()
		if agent == "talks" {
			go func() {
				_, _ = io.Copy(far, rand.Reader) // until it is closed
			}()
		} else {
			go func() { _, _ = io.Copy(far, far); _ = far.Close() }()
		}
		return near, nil
	}})
	c := client(t, config)
	for range 4 {
		stuck, err := c.Stream(t.Context(), base, "talks", 1, "bulk")
		if err != nil {
			t.Fatal(err)
		}
		defer stuck.Close()
	}
	conn, err := c.Stream(t.Context(), base, "echoes", 1, "bulk")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for range 100 {
		if _, err := conn.Write([]byte("ping")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestACutStreamIsNoEnd wants an error, not io.EOF, when the tunnel broke.
func TestACutStreamIsNoEnd(t *testing.T) {
	config := installation(t)
	_, base := serve(t, Config{TLS: config, Stream: func(context.Context, string, int64, string) (net.Conn, error) { return &broken{}, nil }})
	conn, err := client(t, config).Stream(t.Context(), base, "agt_1", 1, "bulk")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got, err := io.ReadAll(conn); err == nil {
		t.Errorf("got %q and a clean end", got)
	}
}

// broken is a stream that says a word and breaks.
type broken struct {
	net.Conn
	said bool
}

func (b *broken) Read(p []byte) (int, error) {
	if b.said {
		return 0, errors.New("the tunnel is lost")
	}
	b.said = true
	return copy(p, "half a"), nil
}
func (b *broken) Write(p []byte) (int, error) { return len(p), nil }
func (b *broken) Close() error                { return nil }

// TestStrangers wants nobody without the master key to get anywhere.
func TestStrangers(t *testing.T) {
	ours := installation(t)
	_, base := serve(t, Config{TLS: ours, Stream: echo})
	nobody := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	for name, config := range map[string]*tls.Config{"another installation": installation(t), "no certificate": nobody} {
		_, err := client(t, config).Stream(t.Context(), base, "agt_1", 7, "bulk")
		if proto.CodeOf(err) != proto.CodeUnavailable {
			t.Errorf("%s: got %v", name, err)
		}
	}
	// Its certificate, which everybody sees, with another key.
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := ours.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	stolen := nobody.Clone()
	stolen.Certificates = []tls.Certificate{{Certificate: theirs.Certificate, PrivateKey: key}}
	if _, err := client(t, stolen).Stream(t.Context(), base, "agt_1", 7, "bulk"); proto.CodeOf(err) != proto.CodeUnavailable {
		t.Errorf("a stolen certificate: got %v", err)
	}
	// And a replica does not believe a server that lacks it.
	_, fake := serve(t, Config{TLS: installation(t), Stream: echo})
	if _, err := client(t, ours).Stream(t.Context(), fake, "agt_1", 7, "bulk"); proto.CodeOf(err) != proto.CodeUnavailable {
		t.Errorf("a false replica: got %v", err)
	}
}

func TestLanesAndCalls(t *testing.T) {
	config := installation(t)
	_, base := serve(t, Config{
		TLS: config, Stream: echo,
		Lanes: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.URL.Path+" "+r.RemoteAddr) }),
		Call: func(_ context.Context, name string, body []byte) ([]byte, error) {
			if name == "fails" {
				return nil, proto.Errorf(proto.CodeNotFound, "nothing there")
			}
			return []byte(name + ":" + string(body)), nil
		},
	})
	c := client(t, config)
	conn, err := c.Lane(t.Context(), base, "192.0.2.7")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "GET /tunnel HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if err != nil || !strings.HasSuffix(string(got), "/tunnel 192.0.2.7:0") {
		t.Errorf("got %q, %v", got, err)
	}
	conn.Close()
	if got, err := c.Call(t.Context(), base, "works", []byte("x")); string(got) != "works:x" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := c.Call(t.Context(), base, "fails", nil); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("got %v", err)
	}
	if _, err := c.Call(t.Context(), base, "works", make([]byte, MaxCall+1)); err == nil {
		t.Error("a call without bound was sent")
	}
}

// TestOpeningEndsWithItsContext has a peer that never answers.
func TestOpeningEndsWithItsContext(t *testing.T) {
	config := installation(t)
	began, left := make(chan struct{}), make(chan struct{})
	_, base := serve(t, Config{TLS: config, Stream: func(ctx context.Context, _ string, _ int64, _ string) (net.Conn, error) {
		close(began)
		<-ctx.Done()
		close(left)
		return nil, context.Cause(ctx)
	}})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		<-began
		cancel()
	}()
	if _, err := client(t, config).Stream(ctx, base, "agt_1", 1, "bulk"); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	select {
	case <-left:
	case <-time.After(time.Minute):
		t.Error("the peer still tries")
	}
}
