package doctor

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

// last is the last check, as "name: result".
func (r *Report) last() string {
	c := r.Checks[len(r.Checks)-1]
	return c.Name + ": " + string(c.Result)
}

func wellFormed(t *testing.T, r *Report) {
	t.Helper()
	for _, c := range r.Checks {
		if c.Name == "" || c.Message == "" || strings.Contains(c.Message+c.Remedy, "\n") {
			t.Errorf("check %+v", c)
		}
	}
}

func TestState(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r := &Report{}
	r.State(dir)
	if r.Checks[0].Result != OK {
		t.Errorf("a good one: %+v", r.Checks)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	r = &Report{}
	r.State(dir)
	if r.Checks[0].Result != Warning || !strings.Contains(r.Checks[0].Remedy, "chmod 0700") {
		t.Errorf("an open one: %+v", r.Checks)
	}
	r = &Report{}
	r.State(filepath.Join(dir, "missing"))
	if !r.Failed() {
		t.Errorf("a missing one: %+v", r.Checks)
	}
	wellFormed(t, r)
}

func TestCertificateAndClock(t *testing.T) {
	now := time.Now()
	for _, tt := range []struct {
		from, to time.Duration
		want     Result
	}{
		{-time.Hour, 23 * time.Hour, OK},
		{-22 * time.Hour, 2 * time.Hour, Warning},
		{-25 * time.Hour, -time.Hour, Warning},
		{time.Hour, 25 * time.Hour, Failed},
	} {
		r := &Report{}
		r.Certificate(now.Add(tt.from), now.Add(tt.to), now)
		if r.Checks[0].Result != tt.want {
			t.Errorf("from %s to %s: %+v", tt.from, tt.to, r.Checks[0])
		}
		wellFormed(t, r)
	}
	for skew, want := range map[time.Duration]Result{0: OK, -time.Minute: Warning, time.Hour: Failed, -time.Hour: Failed} {
		r := &Report{}
		r.Skew(skew)
		if r.Checks[0].Result != want {
			t.Errorf("skew %s: %+v", skew, r.Checks[0])
		}
	}
}

func TestDialNamesTheStep(t *testing.T) {
	web := httptest.NewServer(http.NotFoundHandler())
	defer web.Close()
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	secure.StartTLS()
	defer secure.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := closed.Addr().String()
	closed.Close() //nolint:errcheck // only its port is wanted
	for _, tt := range []struct{ name, url, want string }{
		{"bad url", "ftp://x/tunnel", "tunnel: failed"},
		{"no such name", "ws://postern.invalid/tunnel", "dns: failed"},
		{"nothing listens", "ws://" + nobody + "/tunnel", "tcp: failed"},
		{"unknown CA", strings.Replace(secure.URL, "https", "wss", 1) + "/tunnel", "tls: failed"},
		{"no WebSocket", strings.Replace(web.URL, "http", "ws", 1) + "/tunnel", "websocket: failed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &Report{}
			r.Dial(t.Context(), tunnel.DialConfig{
				URL: tt.url, TLS: &tls.Config{InsecureSkipVerify: true}, Proxy: func(*url.URL) (*url.URL, error) { return nil, nil },
			}, false)
			if r.last() != tt.want || r.Checks[len(r.Checks)-1].Remedy == "" {
				t.Errorf("got %+v", r.Checks)
			}
			wellFormed(t, r)
		})
	}
}

func TestDialComesThrough(t *testing.T) {
	ca := tunneltest.NewCA()
	server := tunnel.NewServer(tunnel.ServerConfig{TLS: ca.ServerTLS(), Handler: func(up *tunnel.Tunnel) {
		s := &http.Server{Handler: http.NotFoundHandler(), ReadHeaderTimeout: time.Second}
		s.Serve(up.Listener()) //nolint:errcheck // it ends with the tunnel
		<-up.Done()
		s.Close() //nolint:errcheck // likewise
	}})
	defer server.Close()
	web := httptest.NewServer(server)
	defer web.Close()
	r := &Report{}
	cert := ca.Issue("agent")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r.Dial(ctx, tunnel.DialConfig{
		URL: strings.Replace(web.URL, "http", "ws", 1) + "/tunnel", Proxy: func(*url.URL) (*url.URL, error) { return nil, nil },
		TLS: &tls.Config{RootCAs: ca.Pool, ServerName: tunneltest.ServerName, Certificates: []tls.Certificate{cert}},
	}, false)
	if r.last() != "admission: ok" {
		t.Errorf("got %+v", r.Checks)
	}
}

func TestUserInRange(t *testing.T) {
	path := filepath.Join(t.TempDir(), "passwd")
	if err := os.WriteFile(path, []byte("root:x:0:0::/:/bin/sh\n# odd\nsvc:x:2005:2005::/:/bin/sh\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for base, want := range map[uint32]string{2000: "svc", 2005: "svc", 2006: "", 1995: "", 1996: "svc", 4294967290: ""} {
		if got := userInRange(path, base, 10); got != want {
			t.Errorf("from %d: got %q", base, got)
		}
	}
	r := &Report{}
	r.Sandbox(1_900_000_000, 100)
	if len(r.Checks) != 1 {
		t.Error(fmt.Sprint(r.Checks))
	}
	wellFormed(t, r)
}
