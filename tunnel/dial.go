package tunnel

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// DialConfig is what a dialer needs.
type DialConfig struct {
	Config

	// URL of the acceptor: ws, wss, http (as ws) or https (as wss); the path
	// defaults to /tunnel.
	URL string

	// TLS is the inner, mutual TLS. Dial sets the version (1.3) and the ALPN;
	// ServerName defaults to the URL's host. A certificate given by
	// GetClientCertificate for the control lane is used for all lanes of the
	// tunnel, since the acceptor asks for the same key.
	TLS *tls.Config

	// OuterRootCAs are trusted for the outer TLS, and that of an https proxy, in
	// addition to the system's. nil means the system's alone.
	OuterRootCAs *x509.CertPool

	// Carrier, if not nil, makes what the connections beneath the inner TLS are made
	// in: another process, say, so that this one reads nothing of the network but
	// what the inner TLS has verified. Dial calls it once; the tunnel closes what it
	// returns. OuterRootCAs must be nil then, as a pool cannot leave the process:
	// the Carrier adds CarrierConfig.OuterCAs itself. nil means in this process.
	Carrier func(CarrierConfig) (Carrier, error)

	// Proxy chooses the proxy for the URL. nil means by HTTPS_PROXY, HTTP_PROXY
	// (for ws) and NO_PROXY, upper or lower case, as they are at the time of Dial.
	Proxy func(*url.URL) (*url.URL, error)

	// Header is sent with the upgrade request.
	Header http.Header

	// StepTimeout bounds each step of the dial. Default 10 s.
	StepTimeout time.Duration
}

// dialer makes the lanes of one tunnel.
type dialer struct {
	outer
	cfg     DialConfig
	inner   *tls.Config
	carrier Carrier                         // nil: the connections are made here
	cert    atomic.Pointer[tls.Certificate] // pinned by the control lane
	dialing atomic.Int32

	ctx    context.Context // ends with the tunnel; bounds lanes being dialed
	cancel context.CancelFunc
}

// Dial makes a tunnel. ctx bounds the handshake only; the tunnel lives on. The
// error is a *DialError that says which step failed and what to do.
func Dial(ctx context.Context, cfg DialConfig) (*Tunnel, error) {
	cfg.Config = cfg.Config.withDefaults()
	def(&cfg.StepTimeout, 10*time.Second)
	d, err := newDialer(cfg)
	if err != nil {
		return nil, err
	}
	var id [idSize]byte
	_, _ = rand.Read(id[:]) // never fails, see crypto/rand
	t := newTunnel(&d.cfg.Config, true, id, cfg.Logger)
	t.dialer = d
	if err := d.startCarrier(); err != nil {
		d.cancel()
		cfg.Metrics.handshakeFailed(failUpgrade)
		return nil, err
	}
	l, err := d.lane(ctx, t, Control, openerDialer, 0)
	if err != nil {
		d.cancel()
		d.endCarrier(FailedStep(err) == StepUplink)
		return nil, err
	}
	t.control = l
	t.addLane(l)
	t.metrics.tunnelUp(t.RTT())
	if err := l.startMux(); err != nil {
		t.end(err)
		t.laneEnded(l)
		return nil, &DialError{Step: StepHello, Target: d.target(), Err: err}
	}
	t.spawn(t.tickLoop)
	return t, nil
}

// tickSlots is how many slots a tick interval has; see tickLoop.
const tickSlots = 5

// tickLoop drives a dialed tunnel. Ticks keep to slots of the wall clock, so that
// the heartbeats of many agents reach the acceptor in batches: waking up costs it
// more than a heartbeat.
func (t *Tunnel) tickLoop() {
	every := t.cfg.tickEvery()
	slot := every / tickSlots * time.Duration(t.id[0]%tickSlots)
	now := time.Now()
	first := time.NewTimer(now.Truncate(every).Add(every + slot).Sub(now))
	defer first.Stop()
	select {
	case <-first.C:
	case <-t.done:
		return
	}
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	var w watch
	for {
		now := clock()
		w.tick(now, every)
		t.tick(now, w.woke)
		select {
		case <-ticker.C:
		case <-t.done:
			return
		}
	}
}

func newDialer(cfg DialConfig) (*dialer, error) {
	u, err := parseURL(cfg.URL)
	if err != nil {
		return nil, &DialError{Step: StepConfig, Target: "url", Err: err, Hint: "set url to the control plane's address, such as https://cp.example.com"}
	}
	if cfg.TLS == nil {
		return nil, &DialError{Step: StepConfig, Target: u.Redacted(), Err: errors.New("no inner TLS configuration")}
	}
	if cfg.Carrier != nil && cfg.OuterRootCAs != nil {
		return nil, &DialError{Step: StepConfig, Target: u.Redacted(), Err: errors.New("a Carrier has outer root CAs of its own")}
	}
	d := &dialer{cfg: cfg, outer: newOuter(u, cfg.Header, cfg.StepTimeout)}
	d.roots, d.proxy = cfg.OuterRootCAs, cfg.Proxy
	d.ctx, d.cancel = context.WithCancel(context.Background())
	d.inner = cfg.TLS.Clone()
	d.inner.MinVersion, d.inner.MaxVersion = tls.VersionTLS13, 0
	d.inner.NextProtos = append([]string{ALPN}, cfg.TLS.NextProtos...) // only ALPN is ever agreed on
	d.inner.DynamicRecordSizingDisabled = true
	d.inner.ClientSessionCache = nil
	if d.inner.ServerName == "" {
		d.inner.ServerName = u.Hostname()
	}
	if get := cfg.TLS.GetClientCertificate; get != nil {
		d.inner.GetClientCertificate = func(req *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if c := d.cert.Load(); c != nil {
				return c, nil
			}
			c, err := get(req)
			if err == nil {
				d.cert.Store(c)
			}
			return c, err
		}
	}
	return d, nil
}

// attempt is one lane being dialed: whatever connection there is, is closed when
// the context ends or a step takes too long.
type attempt struct {
	ctx    context.Context
	limit  time.Duration
	timer  *time.Timer
	mu     sync.Mutex
	conn   net.Conn
	closed bool
	late   bool // a step timed out
	stop   func() bool
	told   func() // that a step begins; may be nil
	at     Step   // which one
	where  string
}

func newAttempt(ctx context.Context, limit time.Duration) *attempt {
	a := &attempt{ctx: ctx, limit: limit}
	a.timer = time.AfterFunc(limit, func() { a.abort(true) })
	a.stop = context.AfterFunc(ctx, func() { a.abort(false) })
	return a
}

func (a *attempt) abort(late bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return
	}
	a.closed, a.late = true, late
	if a.conn != nil {
		_ = a.conn.Close()
	}
}

// step starts the next step on conn, which the attempt closes if it must.
func (a *attempt) step(conn net.Conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.conn = conn; a.closed {
		_ = conn.Close()
		return
	}
	a.timer.Reset(a.limit)
	if a.told != nil {
		a.told()
	}
}

// begins says which step begins, for who waits elsewhere.
func (a *attempt) begins(step Step, target string) {
	a.at, a.where = step, target
	if a.told != nil {
		a.told()
	}
}

// setLimit changes how long each step may take.
func (a *attempt) setLimit(limit time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.limit = limit; !a.closed {
		a.timer.Reset(limit)
	}
}

func (a *attempt) isLate() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.late
}

// finish ends the attempt; false means that it was aborted.
func (a *attempt) finish() bool {
	a.timer.Stop()
	a.stop()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return false
	}
	a.closed = true
	return true
}

// err returns why a failed: the abort, if there was one, else err.
func (a *attempt) err(err error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.closed && a.late:
		return fmt.Errorf("no answer within %v: %w", a.limit, os.ErrDeadlineExceeded)
	case a.closed && context.Cause(a.ctx) != nil:
		return context.Cause(a.ctx)
	}
	return err
}

// lane dials one lane and takes it through its handshake.
func (d *dialer) lane(ctx context.Context, t *Tunnel, class Class, opener uint8, token uint32) (*lane, error) {
	a := newAttempt(ctx, d.cfg.StepTimeout)
	l, derr := d.dialLane(a, t, class, opener, token)
	if !a.finish() || derr != nil {
		if derr == nil {
			derr = &DialError{Step: StepHello, Target: d.target(), Err: ErrLost}
		}
		derr.Err = a.err(derr.Err)
		a.mu.Lock()
		if a.conn != nil {
			_ = a.conn.Close()
		}
		a.mu.Unlock()
		if l != nil {
			_ = l.ws.Close()
		}
		d.cfg.Metrics.handshakeFailed(reasonOf(derr.Step))
		return nil, derr
	}
	return l, nil
}

func reasonOf(s Step) handshakeReason {
	switch s {
	case StepInnerTLS:
		return failTLS
	case StepHello:
		return failHello
	}
	return failUpgrade
}

func (d *dialer) dialLane(a *attempt, t *Tunnel, class Class, opener uint8, token uint32) (*lane, *DialError) {
	var (
		wc   *wsConn
		rtt  time.Duration
		derr *DialError
	)
	if d.carrier != nil {
		wc, rtt, derr = d.carried(a, class, t.id)
	} else {
		wc, rtt, derr = d.raise(a, class, t.id, d.cfg.TestHookConn)
	}
	if derr != nil {
		return nil, derr
	}
	tc := tls.Client(wc, d.inner)
	l := newLane(t, class, wc, tc)
	a.step(wc)
	began := time.Now()
	if err := tc.HandshakeContext(a.ctx); err != nil {
		return l, &DialError{Step: StepInnerTLS, Target: d.target(), Err: err, Hint: innerHint(err)}
	}
	rtt = min(rtt, time.Since(began))
	if p := tc.ConnectionState().NegotiatedProtocol; p != ALPN {
		return l, &DialError{Step: StepInnerTLS, Target: d.target(), Err: fmt.Errorf("the peer speaks %q, not %q", p, ALPN)}
	}
	if class != Control {
		if known := t.RTT(); known > 0 {
			rtt = min(rtt, known)
		}
	} else {
		t.live.sample(rtt)
	}

	a.step(wc)
	fail := func(err error) (*lane, *DialError) {
		e := &DialError{Step: StepHello, Target: d.target(), Err: err}
		var r *Refusal
		if errors.As(err, &r) {
			e.Refusal = r.Code
		} else if isRemoteAlert(err) {
			e.Step, e.Hint = StepInnerTLS, innerHint(err)
		}
		return l, e
	}
	h := hello{major: protocolMajor, minor: protocolMinor, id: t.id, class: class, opener: opener, rtt: rtt, token: token}
	if _, err := tc.Write(h.append(nil)); err != nil {
		return fail(err)
	}
	b, err := readMessage(tc, maxAnswer)
	if err != nil {
		return fail(err)
	}
	var ans answer
	if err := ans.decode(b); err != nil {
		return fail(err)
	}
	if ans.code != RefusedNot {
		return fail(&Refusal{Code: ans.code, Text: ans.text})
	}
	if ans.major != protocolMajor {
		return fail(fmt.Errorf("the peer speaks tunnel protocol %d.%d, this side %d.%d", ans.major, ans.minor, protocolMajor, protocolMinor))
	}
	return l, nil
}

// isRemoteAlert reports whether the peer ended the TLS connection by an alert.
// In TLS 1.3 a refused client certificate shows only after the handshake.
func isRemoteAlert(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}

func innerHint(err error) string {
	var (
		unknown *x509.UnknownAuthorityError
		invalid x509.CertificateInvalidError
		host    x509.HostnameError
	)
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "a certificate is expired or not yet valid: check this host's clock"
	case errors.As(err, &unknown), errors.As(err, new(x509.UnknownAuthorityError)), errors.As(err, &host):
		return "this is not the control plane that this host was registered with: check url"
	case isRemoteAlert(err):
		return "the control plane did not accept this host's certificate: it may be expired or revoked, register again"
	}
	return ""
}
