package tunnel_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

// connectProxy is a small HTTP proxy that knows only CONNECT.
type connectProxy struct {
	*httptest.Server
	user, password string
	status         int // if not 0, answer that
	connects       atomic.Int32
	conns          sync.WaitGroup
}

func newConnectProxy(t *testing.T, tlsToo bool) *connectProxy {
	p := &connectProxy{}
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect {
			http.Error(w, "only CONNECT", http.StatusMethodNotAllowed)
			return
		}
		if p.user != "" {
			want := "Basic " + base64.StdEncoding.EncodeToString([]byte(p.user+":"+p.password))
			if r.Header.Get("Proxy-Authorization") != want {
				w.Header().Set("Proxy-Authenticate", `Basic realm="test"`)
				w.WriteHeader(http.StatusProxyAuthRequired)
				return
			}
		}
		if p.status != 0 {
			w.WriteHeader(p.status)
			return
		}
		p.connects.Add(1)
		up, err := net.Dial("tcp", r.Host)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		down, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		_, _ = io.WriteString(down, "HTTP/1.1 200 Connection established\r\nX-Proxy: yes\r\n\r\n")
		p.conns.Add(2)
		for _, c := range [][2]net.Conn{{up, down}, {down, up}} {
			go func() {
				defer p.conns.Done()
				defer c[0].Close()
				_, _ = io.Copy(c[0], c[1])
			}()
		}
	})
	p.Server = httptest.NewUnstartedServer(h)
	p.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	if tlsToo {
		p.StartTLS()
	} else {
		p.Start()
	}
	t.Cleanup(func() { p.Close(); p.conns.Wait() })
	return p
}

func (p *connectProxy) url(userinfo string) *url.URL {
	u, _ := url.Parse(p.URL)
	if userinfo != "" {
		name, password, _ := strings.Cut(userinfo, ":")
		u.User = url.UserPassword(name, password)
	}
	return u
}

func (p *connectProxy) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(p.Certificate())
	return pool
}

func TestProxy(t *testing.T) {
	for _, tlsToo := range []bool{false, true} {
		t.Run(map[bool]string{false: "http", true: "https"}[tlsToo], func(t *testing.T) {
			p := newConnectProxy(t, tlsToo)
			p.user, p.password = "alice", "s3cret:word"
			h := tunneltest.NewHost(t, tunneltest.WithDial(func(c *tunnel.DialConfig) {
				c.Proxy = fixedProxy(p.url("alice:s3cret:word"))
				if tlsToo {
					c.OuterRootCAs = p.pool()
				}
			}))
			d, a := h.Dial(t)
			echoOn(t, a)
			for _, class := range classes {
				exchange(t, open(t, d, class), 100_000)
			}
			if n := p.connects.Load(); n != 3 {
				t.Errorf("%d CONNECTs, want one for each lane", n)
			}
		})
	}
}

func fixedProxy(u *url.URL) func(*url.URL) (*url.URL, error) {
	return func(*url.URL) (*url.URL, error) { return u, nil }
}

// The environment chooses the proxy, and NO_PROXY, also as CIDR, goes past it.
func TestProxyFromEnvironment(t *testing.T) {
	p := newConnectProxy(t, false)
	// Loopback never goes through a proxy from the environment, so the proxy is
	// asked for a name that only it would resolve.
	t.Setenv("HTTP_PROXY", p.url("bob:pw").String())
	t.Setenv("NO_PROXY", "")
	p.status = http.StatusForbidden
	cfg := tunnel.DialConfig{URL: "ws://192.0.2.7:1", TLS: tunneltest.NewCA().ClientTLS("x"), StepTimeout: time.Minute}
	_, err := tunnel.Dial(t.Context(), cfg)
	var d *tunnel.DialError
	if !errors.As(err, &d) || d.Step != tunnel.StepProxy || d.Status != http.StatusForbidden {
		t.Fatalf("got %v", err)
	}
	t.Setenv("NO_PROXY", "192.0.2.0/24")
	cfg.StepTimeout = 200 * time.Millisecond // nobody answers there
	_, err = tunnel.Dial(t.Context(), cfg)
	if tunnel.FailedStep(err) != tunnel.StepTCP {
		t.Fatalf("got %v", err)
	}
}

func TestDialErrors(t *testing.T) {
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/moved":
			http.Redirect(w, r, "/elsewhere", http.StatusFound)
		case "/busy":
			w.WriteHeader(http.StatusServiceUnavailable)
		case "/plain":
			_, _ = io.WriteString(w, "hello")
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(plain.Close)
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	secure.StartTLS()
	t.Cleanup(secure.Close)
	mute, err := net.Listen("tcp", "127.0.0.1:0") // accepts in the kernel, says nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = mute.Close() })
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = closed.Close()
	h := tunneltest.NewHost(t)
	proxy := func(status int) func(*testing.T, *tunnel.DialConfig) {
		return func(t *testing.T, c *tunnel.DialConfig) {
			p := newConnectProxy(t, false)
			p.user, p.password = "alice", "right"
			p.status = status
			userinfo := "alice:right"
			if status == 0 {
				userinfo = "alice:wr0ng-pa55"
			}
			c.Proxy = fixedProxy(p.url(userinfo))
			c.URL = h.URL
		}
	}
	at := func(u string) func(*testing.T, *tunnel.DialConfig) {
		return func(_ *testing.T, c *tunnel.DialConfig) { c.URL = u }
	}
	cases := []struct {
		name  string
		set   func(*testing.T, *tunnel.DialConfig)
		step  tunnel.Step
		wants []string
	}{
		{"no url", at(""), tunnel.StepConfig, []string{"url"}},
		{"scheme", at("ftp://x"), tunnel.StepConfig, []string{"ftp"}},
		{"unparsable url", at("ws://user:pa55@h:xx"), tunnel.StepConfig, nil},
		{"dns", at("ws://no-such-host.invalid"), tunnel.StepDNS, []string{"no-such-host.invalid", "host name"}},
		{"refused", at("ws://" + closed.Addr().String()), tunnel.StepTCP, []string{"refused", "firewall"}},
		{"mute", at("ws://" + mute.Addr().String()), tunnel.StepUpgrade, []string{"no answer within"}},
		{"not found", at(plain.URL + "/nothing"), tunnel.StepUpgrade, []string{"404", "no tunnel endpoint"}},
		{"redirect", at(plain.URL + "/moved"), tunnel.StepUpgrade, []string{"302", "/elsewhere"}},
		{"busy", at(plain.URL + "/busy"), tunnel.StepUpgrade, []string{"503", "busy"}},
		{"no upgrade", at(plain.URL + "/plain"), tunnel.StepUpgrade, []string{"200", "load balancer"}},
		{"unknown outer CA", at(secure.URL), tunnel.StepOuterTLS, []string{"ca_file", "inspecting"}},
		{"outer TLS on a plain port", at(strings.Replace(plain.URL, "http:", "https:", 1)), tunnel.StepOuterTLS, []string{"does not speak TLS"}},
		{"outer CA given", func(_ *testing.T, c *tunnel.DialConfig) {
			c.URL, c.OuterRootCAs = secure.URL, x509.NewCertPool()
			c.OuterRootCAs.AddCert(secure.Certificate())
		}, tunnel.StepUpgrade, []string{"404"}},
		{"proxy wants credentials", proxy(0), tunnel.StepProxy, []string{"407", "credentials"}},
		{"proxy refuses credentials with the wrong code", proxy(401), tunnel.StepProxy, []string{"401", "other credentials", "407", "HTTPS_PROXY"}},
		{"proxy refuses", proxy(403), tunnel.StepProxy, []string{"403", "refuses CONNECT"}},
		{"proxy cannot reach", proxy(502), tunnel.StepProxy, []string{"502", "cannot reach"}},
		{"proxy down", func(_ *testing.T, c *tunnel.DialConfig) {
			c.URL, c.Proxy = h.URL, fixedProxy(&url.URL{Scheme: "http", Host: closed.Addr().String(), User: url.UserPassword("alice", "wr0ng-pa55")})
		}, tunnel.StepProxy, []string{"refused", "HTTPS_PROXY"}},
		{"socks proxy", func(_ *testing.T, c *tunnel.DialConfig) {
			c.URL, c.Proxy = h.URL, fixedProxy(&url.URL{Scheme: "socks5", Host: "p:1"})
		}, tunnel.StepProxy, []string{"socks5", "CONNECT"}},
		{"other CA inside", func(_ *testing.T, c *tunnel.DialConfig) {
			c.URL, c.TLS = h.URL, tunneltest.NewCA().ClientTLS("agent")
		}, tunnel.StepInnerTLS, []string{"not the control plane"}},
		{"certificate of another CA", func(_ *testing.T, c *tunnel.DialConfig) {
			c.URL, c.TLS = h.URL, h.CA.ClientTLS("agent")
			c.TLS.Certificates = []tls.Certificate{tunneltest.NewCA().Issue("agent")}
		}, tunnel.StepInnerTLS, []string{"did not accept"}},
		{"no certificate", func(_ *testing.T, c *tunnel.DialConfig) {
			c.URL, c.TLS = h.URL, h.CA.ClientTLS("agent")
			c.TLS.Certificates = nil
		}, tunnel.StepInnerTLS, []string{"certificate"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			var logged bytes.Buffer
			cfg := tunnel.DialConfig{
				Config:      tunnel.Config{Logger: slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug}))},
				TLS:         h.CA.ClientTLS("agent"),
				StepTimeout: time.Minute,
			}
			if c.name == "dns" || c.name == "mute" { // where it may come to a timeout
				cfg.StepTimeout = 500 * time.Millisecond
			}
			c.set(t, &cfg)
			tun, err := tunnel.Dial(t.Context(), cfg)
			if err == nil {
				_ = tun.Close(nil)
				t.Fatal("dialed")
			}
			if got := tunnel.FailedStep(err); got != c.step {
				t.Errorf("step = %q, want %q: %v", got, c.step, err)
			}
			for _, w := range c.wants {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not say %q", err, w)
				}
			}
			for _, secret := range []string{"wr0ng-pa55", "pa55", base64.StdEncoding.EncodeToString([]byte("alice:"))[:6]} {
				if strings.Contains(err.Error()+logged.String(), secret) {
					t.Errorf("%q holds a secret", err)
				}
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("%q is not one line", err)
			}
		})
	}
}

func TestDialEndsWithItsContext(t *testing.T) {
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	_, err = tunnel.Dial(ctx, tunnel.DialConfig{URL: "ws://" + mute.Addr().String(), TLS: tunneltest.NewCA().ClientTLS("x")})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// The outer TLS of a load balancer and ours inside it.
func TestOuterTLS(t *testing.T) {
	h := tunneltest.NewHost(t)
	lb := httptest.NewUnstartedServer(h.Server)
	lb.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	lb.StartTLS()
	t.Cleanup(lb.Close)
	cfg := h.Dialed
	cfg.URL = lb.URL
	cfg.OuterRootCAs = x509.NewCertPool()
	cfg.OuterRootCAs.AddCert(lb.Certificate())
	d, err := tunnel.Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close(nil)
	echoOn(t, <-h.Accepted())
	for _, class := range classes {
		exchange(t, open(t, d, class), 300_000)
	}
}

func TestRefusals(t *testing.T) {
	t.Run("admit", func(t *testing.T) {
		var no error
		h := tunneltest.NewHost(t, tunneltest.WithServer(func(c *tunnel.ServerConfig) {
			c.Admit = func(*http.Request, tls.ConnectionState) error { return no }
		}))
		for _, c := range []struct {
			err  error
			code tunnel.RefusalCode
			text string
		}{
			{&tunnel.Refusal{Code: tunnel.RefusedNotAdmitted, Text: "organization acme is disabled"}, tunnel.RefusedNotAdmitted, "organization acme is disabled"},
			{errors.New("internal detail"), tunnel.RefusedNotAdmitted, "not admitted"},
			{&tunnel.Refusal{Code: tunnel.RefusedLimit, Text: strings.Repeat("x", 2000)}, tunnel.RefusedLimit, "xxx"},
		} {
			no = c.err
			_, err := tunnel.Dial(t.Context(), h.Dialed)
			var d *tunnel.DialError
			if !errors.As(err, &d) || d.Step != tunnel.StepHello || d.Refusal != c.code || !strings.Contains(err.Error(), c.text) || strings.Contains(err.Error(), "detail") {
				t.Errorf("got %v", err)
			}
		}
	})
	t.Run("another key cannot join", func(t *testing.T) {
		h := tunneltest.NewHost(t)
		other := false
		cfg := h.Dialed
		cfg.TLS = h.CA.ClientTLS("agent")
		certs := [2]tls.Certificate{h.CA.Issue("agent"), h.CA.Issue("agent")}
		cfg.TLS.Certificates = nil
		asked := 0
		cfg.TLS.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			asked++
			if other {
				return &certs[1], nil
			}
			return &certs[0], nil
		}
		d, err := tunnel.Dial(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close(nil)
		echoOn(t, <-h.Accepted())
		other = true // renewed meanwhile: the lanes of this tunnel keep the old one
		exchange(t, open(t, d, tunnel.Bulk), 1000)
		if asked != 1 {
			t.Errorf("asked %d times for the certificate", asked)
		}
	})
	t.Run("no certificate, no lanes", func(t *testing.T) {
		h := tunneltest.NewHost(t, tunneltest.WithServer(func(c *tunnel.ServerConfig) {
			c.MaxAnonymous, c.AnonymousLife = 1, 500*time.Millisecond
		}))
		h.Server.Close()
		ca := tunneltest.NewCA()
		inner := ca.ServerTLS()
		inner.ClientAuth = tls.VerifyClientCertIfGiven
		h = tunneltest.NewHost(t, tunneltest.WithServer(func(c *tunnel.ServerConfig) {
			c.TLS, c.MaxAnonymous, c.AnonymousLife = inner, 1, 3*time.Second // it is to live for all that comes
		}))
		cfg := h.Dialed
		cfg.TLS = ca.ClientTLS("x")
		cfg.TLS.Certificates = nil
		d, err := tunnel.Dial(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close(nil)
		a := <-h.Accepted()
		echoOn(t, a)
		exchange(t, open(t, d, tunnel.Control), 1000)
		for _, class := range []tunnel.Class{tunnel.Bulk, tunnel.Solo} {
			if _, err := d.Open(t.Context(), class); err == nil {
				t.Errorf("a %v lane without certificate", class)
			}
			if _, err := a.Open(t.Context(), class); err == nil {
				t.Errorf("a %v lane without certificate", class)
			}
		}
		_, err = tunnel.Dial(t.Context(), cfg)
		var de *tunnel.DialError
		if !errors.As(err, &de) || de.Refusal != tunnel.RefusedLimit {
			t.Errorf("second anonymous tunnel: %v", err)
		}
		waitEnd(t, d, tunnel.ErrDrained)
	})
}

// Connections that never finish their handshake hold neither a place for long
// nor up those that do.
func TestHandshakeFlood(t *testing.T) {
	h := tunneltest.NewHost(t, tunneltest.WithServer(func(c *tunnel.ServerConfig) {
		c.MaxHandshakes, c.MaxHandshakesPerIP, c.HandshakeTimeout = 8, 8, 300*time.Millisecond
	}))
	d, a := h.Dial(t)
	echoOn(t, a)
	const flood = 200
	var wg sync.WaitGroup
	var refused, cut atomic.Int32
	for range flood {
		wg.Go(func() {
			c, err := net.Dial("tcp", strings.TrimPrefix(h.URL, "ws://"))
			if err != nil {
				return
			}
			defer c.Close()
			_, _ = io.WriteString(c, "GET /tunnel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
			_ = c.SetReadDeadline(time.Now().Add(time.Minute))
			br := bufio.NewReader(c)
			resp, err := http.ReadResponse(br, nil)
			if err != nil {
				return
			}
			if resp.StatusCode == http.StatusServiceUnavailable {
				refused.Add(1)
				return
			}
			if _, err := io.ReadAll(br); !errors.Is(err, context.DeadlineExceeded) {
				cut.Add(1)
			}
		})
	}
	exchange(t, open(t, d, tunnel.Control), 10_000)
	wg.Wait()
	if refused.Load()+cut.Load() != flood || refused.Load() == 0 || cut.Load() < 8 {
		t.Errorf("%d refused, %d cut of %d", refused.Load(), cut.Load(), flood)
	}
	d2, err := tunnel.Dial(t.Context(), h.Dialed)
	if err != nil {
		t.Fatalf("after the flood: %v", err)
	}
	_ = d2.Close(nil)
}
