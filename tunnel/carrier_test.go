package tunnel_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

// carried gives dialers a Carrier.
func carried(c *tunneltest.Carrier) tunneltest.Option {
	return tunneltest.WithDial(func(d *tunnel.DialConfig) { d.Carrier = c.Start })
}

func TestCarrier(t *testing.T) {
	for _, way := range []string{"direct", "http proxy", "https proxy"} {
		t.Run(way, func(t *testing.T) {
			c := tunneltest.NewCarrier(t)
			opts := []tunneltest.Option{carried(c)}
			if way != "direct" {
				p := newConnectProxy(t, way == "https proxy")
				p.user, p.password = "alice", "s3cret:word"
				if p.TLS != nil {
					c.OuterCAs = [][]byte{p.Certificate().Raw}
				}
				opts = append(opts, tunneltest.WithDial(func(d *tunnel.DialConfig) { d.Proxy = fixedProxy(p.url("alice:s3cret:word")) }))
			}
			h := tunneltest.NewHost(t, opts...)
			d, a := h.Dial(t)
			echoOn(t, a)
			echoOn(t, d)
			for _, class := range classes {
				exchange(t, open(t, d, class), 300_000)
				exchange(t, open(t, a, class), 300_000)
			}
			if c.Started() != 1 {
				t.Errorf("%d carriers for one tunnel", c.Started())
			}
			if got, want := d.LocalAddr().String(), a.RemoteAddr().String(); way == "direct" && got != want {
				t.Errorf("the local address is %s, the acceptor sees %s", got, want)
			}
			if d.RTT() <= 0 {
				t.Error("no round trip was measured")
			}
			// A farewell still passes when the tunnel is closed.
			if err := d.Close(tunnel.ErrDrained); err != nil {
				t.Fatal(err)
			}
			waitEnd(t, a, tunnel.ErrDrained)
		})
	}
}

// The outer TLS is the carrier's too.
func TestCarrierOuterTLS(t *testing.T) {
	c := tunneltest.NewCarrier(t)
	h := tunneltest.NewHost(t, carried(c))
	front := httptest.NewUnstartedServer(h.Server)
	front.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	front.StartTLS()
	defer front.Close()
	h.Dialed.URL = "wss" + strings.TrimPrefix(front.URL, "https")
	if _, err := tunnel.Dial(t.Context(), h.Dialed); tunnel.FailedStep(err) != tunnel.StepOuterTLS {
		t.Fatalf("an unknown CA: %v", err)
	}
	c.OuterCAs = [][]byte{front.Certificate().Raw}
	d, a := h.Dial(t)
	echoOn(t, a)
	for _, class := range classes {
		exchange(t, open(t, d, class), 300_000)
	}
	h.Dialed.OuterRootCAs = h.CA.Pool
	if _, err := tunnel.Dial(t.Context(), h.Dialed); tunnel.FailedStep(err) != tunnel.StepConfig {
		t.Errorf("OuterRootCAs beside a Carrier: %v", err)
	}
}

// A failure says the same, and is the same to errors.Is and errors.As, whether the
// connection is made here or by a Carrier.
func TestCarrierErrors(t *testing.T) {
	answer := func(t *testing.T, status int, header ...string) string {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			for i := 0; i < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
			w.WriteHeader(status)
			_, _ = io.WriteString(w, "a line\nand another")
		}))
		t.Cleanup(s.Close)
		return "ws" + strings.TrimPrefix(s.URL, "http")
	}
	closed := func(t *testing.T) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return l.Addr().String()
	}
	silent := func(t *testing.T) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l.Addr().String()
	}
	proxied := func(status int, userinfo string) func(*testing.T, *tunnel.DialConfig) {
		return func(t *testing.T, d *tunnel.DialConfig) {
			p := newConnectProxy(t, false)
			p.status = status
			if status == http.StatusProxyAuthRequired {
				p.user = "alice"
			}
			d.Proxy = fixedProxy(p.url(userinfo))
		}
	}
	at := func(f func(*testing.T) string, scheme string) func(*testing.T, *tunnel.DialConfig) {
		return func(t *testing.T, d *tunnel.DialConfig) { d.URL = scheme + f(t) }
	}
	status := func(status int, header ...string) func(*testing.T, *tunnel.DialConfig) {
		return func(t *testing.T, d *tunnel.DialConfig) { d.URL = answer(t, status, header...) }
	}
	for name, c := range map[string]struct {
		step   tunnel.Step
		change func(*testing.T, *tunnel.DialConfig)
		is     error
	}{
		"dns":     {tunnel.StepDNS, func(_ *testing.T, d *tunnel.DialConfig) { d.URL = "ws://no-such-host.invalid" }, nil},
		"refused": {tunnel.StepTCP, at(closed, "ws://"), syscall.ECONNREFUSED},
		"proxy refused": {tunnel.StepProxy, func(t *testing.T, d *tunnel.DialConfig) {
			d.Proxy = fixedProxy(&url.URL{Scheme: "http", Host: closed(t)})
		}, syscall.ECONNREFUSED},
		"proxy unknown": {tunnel.StepProxy, func(_ *testing.T, d *tunnel.DialConfig) {
			d.Proxy = fixedProxy(&url.URL{Scheme: "http", Host: "no-such-host.invalid:1"})
		}, nil},
		"proxy of a kind": {tunnel.StepProxy, func(_ *testing.T, d *tunnel.DialConfig) {
			d.Proxy = fixedProxy(&url.URL{Scheme: "gopher", Host: "127.0.0.1:1"})
		}, nil},
		"proxy 407":        {tunnel.StepProxy, proxied(http.StatusProxyAuthRequired, ""), nil},
		"proxy 407, wrong": {tunnel.StepProxy, proxied(http.StatusProxyAuthRequired, "bob:hunter2"), nil},
		"proxy 403":        {tunnel.StepProxy, proxied(http.StatusForbidden, ""), nil},
		"proxy 502":        {tunnel.StepProxy, proxied(http.StatusBadGateway, ""), nil},
		"proxy malformed": {tunnel.StepProxy, func(_ *testing.T, d *tunnel.DialConfig) {
			d.Proxy = func(*url.URL) (*url.URL, error) { return nil, errors.New("http://u:hunter2@") }
		}, nil},
		"outer tls: plain":   {tunnel.StepOuterTLS, func(t *testing.T, d *tunnel.DialConfig) { d.URL = "wss" + strings.TrimPrefix(answer(t, 200), "ws") }, nil},
		"outer tls: silent":  {tunnel.StepOuterTLS, at(silent, "wss://"), os.ErrDeadlineExceeded},
		"upgrade: silent":    {tunnel.StepUpgrade, at(silent, "ws://"), os.ErrDeadlineExceeded},
		"upgrade: 404":       {tunnel.StepUpgrade, status(404), nil},
		"upgrade: 200":       {tunnel.StepUpgrade, status(200), nil},
		"upgrade: 503":       {tunnel.StepUpgrade, status(503), nil},
		"upgrade: 502":       {tunnel.StepUpgrade, status(502), nil},
		"upgrade: elsewhere": {tunnel.StepUpgrade, status(302, "Location", "https://other.example/x"), nil},
		"inner tls: no server": {tunnel.StepInnerTLS, func(_ *testing.T, d *tunnel.DialConfig) {
			d.TLS = &tls.Config{RootCAs: tunneltest.NewCA().Pool, ServerName: tunneltest.ServerName}
		}, nil},
		"inner tls: no client": {tunnel.StepInnerTLS, func(_ *testing.T, d *tunnel.DialConfig) { d.TLS.Certificates = nil }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := tunneltest.NewHost(t)
			h.Dialed.StepTimeout = 30 * time.Second // not what is looked at
			if c.is == os.ErrDeadlineExceeded {
				h.Dialed.StepTimeout = 2 * time.Second
			}
			c.change(t, &h.Dialed)
			var got [2]*tunnel.DialError
			carrier := tunneltest.NewCarrier(t)
			for i := range got {
				if i == 1 {
					h.Dialed.Carrier = carrier.Start
				}
				d, err := tunnel.Dial(t.Context(), h.Dialed)
				if err == nil {
					_ = d.Close(nil)
				}
				if !errors.As(err, &got[i]) {
					t.Fatalf("%v", err)
				}
			}
			here, there := got[0], got[1]
			if there.Step != c.step {
				t.Errorf("step %q, want %q", there.Step, c.step)
			}
			if here.Step != there.Step || here.Target != there.Target || here.Hint != there.Hint || here.Status != there.Status || here.Refusal != there.Refusal {
				t.Errorf("here  %+v\nthere %+v", here, there)
			}
			var dns *net.DNSError
			slow := errors.As(here, &dns) && dns.Timeout() // no resolver here: the text has ports
			if a, b := portless(here.Error()), portless(there.Error()); a != b && !slow {
				t.Errorf("here:  %s\nthere: %s", a, b)
			}
			if c.is != nil && !errors.Is(there, c.is) {
				t.Errorf("%v is no %v", there, c.is)
			}
			var a, b *net.DNSError
			if errors.As(here, &a) != errors.As(there, &b) || (a != nil && (a.IsNotFound != b.IsNotFound || a.Name != b.Name)) {
				t.Errorf("here %+v, there %+v", a, b)
			}
			if strings.Contains(there.Error(), "hunter2") {
				t.Errorf("a password is told: %v", there)
			}
			if carrier.Lost() != 0 {
				t.Error("the carrier was given up for it")
			}
		})
	}
}

// portless drops what differs between two connections: the port of this side.
func portless(s string) string {
	before, after, found := strings.Cut(s, "127.0.0.1:")
	if !found {
		return s
	}
	after = strings.TrimLeft(after, "0123456789")
	return before + "127.0.0.1" + portless(after)
}

// A carrier that does not answer is given up as one that hangs, before anybody could
// dial again, and so is one that fell silent under a tunnel.
func TestCarrierHangs(t *testing.T) {
	t.Run("at the dial", func(t *testing.T) {
		c := tunneltest.NewCarrier(t)
		c.Deaf = true
		h := tunneltest.NewHost(t, carried(c))
		h.Dialed.StepTimeout = 100 * time.Millisecond
		_, err := tunnel.Dial(t.Context(), h.Dialed)
		if tunnel.FailedStep(err) != tunnel.StepUplink || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%v", err)
		}
		if c.Lost() != 1 {
			t.Error("it was not given up")
		}
	})
	t.Run("later", func(t *testing.T) {
		c := tunneltest.NewCarrier(t)
		stop := make(chan struct{})
		var stopped atomic.Bool
		c.Between = func(conn net.Conn) net.Conn { return &stopping{Conn: conn, stop: stop, stopped: &stopped} }
		h := tunneltest.NewHost(t, carried(c), tunneltest.WithConfig(quick))
		d, _ := h.Dial(t)
		stopped.Store(true)
		waitEnd(t, d, tunnel.ErrSilent)
		if c.Lost() != 1 {
			t.Error("it was not given up")
		}
		close(stop)
	})
}

// stopping is a connection whose bytes wait while it is stopped.
type stopping struct {
	net.Conn
	stop    chan struct{}
	stopped *atomic.Bool
}

func (s *stopping) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if s.stopped.Load() {
		<-s.stop
	}
	return n, err
}

func (s *stopping) Write(p []byte) (int, error) {
	if s.stopped.Load() {
		<-s.stop
	}
	return s.Conn.Write(p)
}

// A hostile carrier changes, repeats, injects and leaves out what passes: a cut link
// is all it gets, nothing that was not said arrives, and the next tunnel works.
func TestHostileCarrier(t *testing.T) {
	for _, way := range []string{"up", "down"} {
		for _, deed := range []string{"flip", "repeat", "inject", "drop", "reflect"} {
			t.Run(deed+" "+way, func(t *testing.T) {
				t.Parallel()
				c := tunneltest.NewCarrier(t)
				deeds := &hostile{deed: deed, up: way == "up"}
				c.Between = deeds.between
				h := tunneltest.NewHost(t, carried(c), tunneltest.WithConfig(quick))
				d, a := h.Dial(t)
				echoOn(t, a)
				conn := open(t, d, tunnel.Control)
				exchange(t, conn, 5000)
				deeds.armed.Store(true)
				sent := strings.Repeat("these words and no others ", 4000)
				go func() {
					_, _ = io.WriteString(conn, sent) // fails when the link is cut
				}()
				got, err := io.ReadAll(io.LimitReader(conn, int64(len(sent))))
				if !strings.HasPrefix(sent, string(got)) {
					t.Fatalf("what arrived was never said: %q", got)
				}
				if err == nil && len(got) == len(sent) {
					t.Fatal("nothing was changed: the test is at fault")
				}
				select {
				case <-d.Done():
				case <-time.After(time.Minute):
					t.Fatal("the tunnel lives on")
				}
				_ = a.Close(nil)
				deeds.armed.Store(false)
				d2, a2 := h.Dial(t)
				echoOn(t, a2)
				exchange(t, open(t, d2, tunnel.Control), 5000)
			})
		}
	}
}

// hostile does its deed, once it is armed, to what passes one way.
type hostile struct {
	deed  string
	up    bool
	armed atomic.Bool
}

func (h *hostile) between(conn net.Conn) net.Conn { return &hostileConn{Conn: conn, h: h} }

type hostileConn struct {
	net.Conn
	h    *hostile
	mu   sync.Mutex
	kept []byte // the last piece, of either way
	left []byte // to be read next
	done bool   // the deed, of those that need doing once
}

// does returns what passes instead of p.
func (c *hostileConn) does(p []byte) []byte {
	kept := c.kept
	c.kept = append([]byte(nil), p...)
	if !c.h.armed.Load() {
		return p
	}
	if c.done {
		return p
	}
	c.done = true
	switch c.h.deed {
	case "flip":
		p = append([]byte(nil), p...)
		p[len(p)/2] ^= 1
	case "repeat":
		p = append(append([]byte(nil), p...), p...)
	case "inject":
		p = append([]byte{23, 3, 3, 0, 32, 'g', 'i', 'v', 'e', ' ', 'm', 'e', ' ', 't', 'h', 'e', ' ', 'k', 'e', 'y', 's', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, p...)
	case "drop":
		p = p[:0]
	case "reflect": // what went the other way comes back
		p = append(kept, p...)
	}
	return p
}

func (c *hostileConn) Read(p []byte) (int, error) {
	c.mu.Lock()
	if len(c.left) > 0 {
		n := copy(p, c.left)
		c.left = c.left[n:]
		c.mu.Unlock()
		return n, nil
	}
	c.mu.Unlock()
	n, err := c.Conn.Read(p)
	if err != nil || n == 0 {
		return n, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.h.up {
		c.kept = append([]byte(nil), p[:n]...)
		return n, nil
	}
	out := c.does(p[:n])
	if len(out) == 0 {
		c.mu.Unlock()
		n, err = c.Conn.Read(p)
		c.mu.Lock()
		return n, err
	}
	n = copy(p, out)
	c.left = append([]byte(nil), out[n:]...)
	return n, nil
}

func (c *hostileConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	out := p
	if c.h.up {
		c.kept = append([]byte(nil), p...)
	} else {
		out = c.does(p)
	}
	c.mu.Unlock()
	if _, err := c.Conn.Write(out); err != nil {
		return 0, err
	}
	return len(p), nil
}

// What a carrier says of a failure is bounded, one line, of its own steps, and claims
// nothing of the control plane.
func TestCarrierLies(t *testing.T) {
	for name, c := range map[string]struct {
		answer string
		step   tunnel.Step
	}{
		"an inner step":   {`{"error":{"step":"inner tls","target":"x","text":"the certificate was revoked"}}`, tunnel.StepUplink},
		"a hello":         {`{"error":{"step":"hello","target":"x","text":"not admitted"}}`, tunnel.StepUplink},
		"no step":         {`{"error":{}}`, tunnel.StepUplink},
		"a wild status":   {`{"error":{"step":"tcp","status":-7,"text":"x"}}`, tunnel.StepUplink},
		"no JSON":         {`revoked`, tunnel.StepUplink},
		"lines":           {`{"error":{"step":"tcp","target":"a\nb","text":"c\nd\u001b[2J","hint":"` + strings.Repeat("x", 5000) + `"}}`, tunnel.StepTCP},
		"success, then 0": {`{"remote":"not an address\n","local":"` + strings.Repeat("y", 5000) + `","rtt":-5}`, tunnel.StepInnerTLS},
	} {
		t.Run(name, func(t *testing.T) {
			h := tunneltest.NewHost(t)
			var wg sync.WaitGroup
			defer wg.Wait()
			h.Dialed.Carrier = func(tunnel.CarrierConfig) (tunnel.Carrier, error) {
				return liar(func() net.Conn {
					ours, theirs := net.Pipe()
					wg.Go(func() {
						defer theirs.Close()
						go io.Copy(io.Discard, theirs) //nolint:errcheck // until it is closed
						_, _ = theirs.Write(append([]byte{2, byte(len(c.answer) >> 8), byte(len(c.answer))}, c.answer...))
						_, _ = theirs.Write(make([]byte, 5))
					})
					return ours
				}), nil
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			_, err := tunnel.Dial(ctx, h.Dialed)
			if tunnel.FailedStep(err) != c.step {
				t.Errorf("step %q, want %q: %v", tunnel.FailedStep(err), c.step, err)
			}
			if text := err.Error(); len(text) > 2000 || strings.ContainsAny(text, "\n\x1b") {
				t.Errorf("%q", text)
			}
		})
	}
}

type liar func() net.Conn

func (l liar) Open(context.Context) (net.Conn, error) { return l(), nil }
func (l liar) Close(bool)                             {}
