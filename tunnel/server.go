package tunnel

import (
	"bufio"
	"context"
	"crypto/subtle"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/coder/websocket"
)

// ServerConfig is what an acceptor needs.
type ServerConfig struct {
	Config

	// TLS is the inner TLS. NewServer sets the version (1.3) and the ALPN and
	// switches session tickets off. ClientAuth is the caller's: a tunnel without
	// client certificate has no further lanes and a short life (see below).
	TLS *tls.Config

	// Admit, if not nil, is asked before a tunnel is accepted, after the inner
	// handshake. An error refuses it; a *Refusal chooses code and text, of any
	// other error the dialer learns nothing but "not admitted". It must be quick.
	Admit func(*http.Request, tls.ConnectionState) error

	// Handler is called in its own goroutine when a tunnel is up. The tunnel lives
	// on when it returns.
	Handler func(*Tunnel)

	// MaxHandshakes is how many connections may be between upgrade and hello at
	// once, MaxHandshakesPerIP how many of one address; further ones wait a
	// little, then get 503. Defaults 256 and 64.
	MaxHandshakes      int
	MaxHandshakesPerIP int

	// HandshakeTimeout bounds the inner handshake and the hello together.
	// Default 10 s.
	HandshakeTimeout time.Duration

	// RemoteIP says whose connection a request is, for MaxHandshakesPerIP and
	// Tunnel.RemoteAddr.
	// Default: the host of RemoteAddr. Behind a load balancer give one that knows
	// which forwarding header to trust.
	RemoteIP func(*http.Request) string

	// MaxAnonymous bounds the tunnels without client certificate (hosts that are
	// joining), AnonymousLife their life. Defaults 256 and 1 min.
	MaxAnonymous  int
	AnonymousLife time.Duration
}

// Server accepts tunnels: it is the http.Handler of the WebSocket endpoint.
type Server struct {
	cfg   ServerConfig
	inner *tls.Config
	gate  gate

	mu        sync.Mutex
	tunnels   map[[idSize]byte]*Tunnel
	anonymous int
	draining  bool
	closed    bool
	ticking   bool
	fresh     []ticking      // not known to tickLoop yet
	arrived   int            // tunnels since the last tidying
	wg        sync.WaitGroup // handshakes and the ticker
	closing   chan struct{}
}

// NewServer makes a server. It starts nothing until a tunnel comes.
func NewServer(cfg ServerConfig) *Server {
	cfg.Config = cfg.Config.withDefaults()
	def(&cfg.MaxHandshakes, 256)
	def(&cfg.MaxHandshakesPerIP, 64)
	def(&cfg.HandshakeTimeout, 10*time.Second)
	def(&cfg.MaxAnonymous, 256)
	def(&cfg.AnonymousLife, time.Minute)
	if cfg.RemoteIP == nil {
		cfg.RemoteIP = remoteIP
	}
	s := &Server{cfg: cfg, tunnels: make(map[[idSize]byte]*Tunnel), closing: make(chan struct{})}
	s.gate = gate{total: cfg.MaxHandshakes, perIP: cfg.MaxHandshakesPerIP, ips: make(map[string]int), waits: make(map[string]int)}
	s.inner = innerServerTLS(cfg.TLS)
	return s
}

// innerServerTLS completes the caller's configuration, also one that comes out
// of GetConfigForClient.
func innerServerTLS(c *tls.Config) *tls.Config {
	c = c.Clone()
	c.MinVersion, c.MaxVersion = tls.VersionTLS13, 0
	c.NextProtos = []string{ALPN}
	c.SessionTicketsDisabled = true
	c.DynamicRecordSizingDisabled = true
	if get := c.GetConfigForClient; get != nil {
		c.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			inner, err := get(h)
			if inner == nil || err != nil {
				return inner, err
			}
			inner = inner.Clone()
			inner.GetConfigForClient = nil
			return innerServerTLS(inner), nil
		}
	}
	return c
}

func remoteIP(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

// ServeHTTP is the endpoint: it upgrades the request, runs the handshakes and
// returns when the lane is up or refused.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	no := s.draining || s.closed
	if !no {
		s.wg.Add(1)
	}
	s.mu.Unlock()
	if no {
		w.Header().Set("Retry-After", "1")
		http.Error(w, "draining", http.StatusServiceUnavailable)
		return
	}
	defer s.wg.Done()
	leave, ok := s.enter(r)
	if !ok {
		s.cfg.Metrics.handshakeFailed(failBusy)
		w.Header().Set("Retry-After", "2")
		w.Header().Set("Connection", "close") // who floods us gets no connection to keep
		http.Error(w, "too many handshakes", http.StatusServiceUnavailable)
		return
	}
	defer leave()
	s.handshake(w, r)
}

// Joins tells of a request for the endpoint whether it is for a further lane of a tunnel,
// the tunnel's id in hex, and whether that tunnel is up here. Several servers behind one
// load balancer pass on to each other what is not theirs.
func (s *Server) Joins(r *http.Request) (id string, here bool) {
	b, err := hex.DecodeString(r.Header.Get(tunnelHeader))
	if err != nil || len(b) != idSize {
		return "", false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return formatID([idSize]byte(b)), s.tunnels[[idSize]byte(b)] != nil
}

// maxJoining is how many further lanes of one tunnel may be in their handshakes
// beside those that the gate lets in.
const maxJoining = 8

// enter takes a place for a handshake. A lane of a tunnel that is up has places of
// its own: who floods the gate must not keep the tunnels from moving data.
func (s *Server) enter(r *http.Request) (leave func(), ok bool) {
	var id [idSize]byte
	if b, err := hex.DecodeString(r.Header.Get(tunnelHeader)); err == nil && len(b) == idSize {
		copy(id[:], b)
		s.mu.Lock()
		t := s.tunnels[id]
		s.mu.Unlock()
		if t != nil && !t.anonymous {
			if t.joining.Add(1) <= maxJoining {
				return func() { t.joining.Add(-1) }, true
			}
			t.joining.Add(-1)
		}
	}
	ip := s.cfg.RemoteIP(r)
	return func() { s.gate.leave(ip) }, s.gate.enter(r.Context(), ip)
}

// hijacker gives coder/websocket a connection with small buffers: those of
// net/http are 4 KiB each and would be pinned for the life of the lane.
type hijacker struct {
	http.ResponseWriter
	hook func(Class, net.Conn) net.Conn
	wire *wire
}

func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(h.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	early := make([]byte, rw.Reader.Buffered())
	if _, err := rw.Reader.Read(early); len(early) > 0 && err != nil {
		_ = conn.Close()
		return nil, nil, err
	}
	tuneTCP(conn, Control)
	if h.hook != nil {
		conn = h.hook(Control, conn)
	}
	h.wire = newWire(conn)
	h.wire.startFrames(early)
	return h.wire, bufio.NewReadWriter(bufio.NewReaderSize(h.wire, 256), bufio.NewWriterSize(h.wire, 32)), nil
}

// handshake runs what comes after the HTTP request.
func (s *Server) handshake(w http.ResponseWriter, r *http.Request) {
	h := &hijacker{ResponseWriter: w, hook: s.cfg.TestHookConn}
	ws, err := websocket.Accept(h, r, &websocket.AcceptOptions{
		InsecureSkipVerify: true, // no cookies here: who comes is told by the inner certificate
		CompressionMode:    websocket.CompressionDisabled,
		OnPingReceived:     ignorePing,
	})
	if err != nil {
		s.cfg.Metrics.handshakeFailed(failUpgrade)
		return
	}
	wc := newWSConn(ws, h.wire, false)
	timer := time.AfterFunc(s.cfg.HandshakeTimeout, func() { _ = h.wire.Close() })
	stop := context.AfterFunc(closingContext{s.closing}, func() { _ = h.wire.Close() })
	reason, err := s.accept(r, wc, func() bool { stop(); return timer.Stop() })
	if err == nil {
		return
	}
	if !timer.Stop() && reason != failRefused {
		reason = failTimeout
	}
	stop()
	_ = wc.Close()
	s.cfg.Metrics.handshakeFailed(reason)
	s.cfg.Logger.Debug("handshake failed", "remote", r.RemoteAddr, "reason", string(reason), "err", err)
}

// accept takes the connection from the inner TLS handshake to a lane. up is to
// be called when the handshake's deadline no longer counts.
func (s *Server) accept(r *http.Request, wc *wsConn, up func() bool) (handshakeReason, error) {
	tc := tls.Server(wc, s.inner)
	if err := tc.HandshakeContext(context.Background()); err != nil {
		return failTLS, err
	}
	state := tc.ConnectionState()
	if state.NegotiatedProtocol != ALPN {
		return failALPN, errors.New("no ALPN")
	}
	b, err := readMessage(tc, maxHello)
	if err != nil {
		if errors.Is(err, ErrProtocol) {
			refuse(tc, RefusedMalformed, "malformed hello")
		}
		return failHello, err
	}
	var he hello
	if len(b) > 0 && b[0] != protocolMajor {
		refuse(tc, RefusedVersion, "this control plane speaks tunnel protocol 1")
		return failRefused, errors.New("version")
	}
	if err := he.decode(b); err != nil {
		refuse(tc, RefusedMalformed, "malformed hello")
		return failHello, err
	}
	if he.class == Control {
		return s.acceptTunnel(r, wc, tc, &he, state, up)
	}
	return s.acceptLane(wc, tc, &he, state, up)
}

// farewell is how long a refused dialer has to read why.
const farewell = time.Second

func refuse(tc *tls.Conn, code RefusalCode, text string) {
	_ = tc.SetDeadline(time.Now().Add(farewell))
	a := answer{major: protocolMajor, minor: protocolMinor, code: code, text: text}
	if _, err := tc.Write(a.append(nil)); err != nil {
		return
	}
	_ = tc.CloseWrite()
	// Closing with unread bytes would reset the connection before the answer is read.
	var b [256]byte
	for {
		if _, err := tc.Read(b[:]); err != nil {
			return
		}
	}
}

func (s *Server) yes(tc *tls.Conn) error {
	a := answer{major: protocolMajor, minor: protocolMinor, maxStreams: uint32(s.cfg.MaxStreams)}
	_, err := tc.Write(a.append(nil))
	return err
}

func (s *Server) acceptTunnel(r *http.Request, wc *wsConn, tc *tls.Conn, he *hello, state tls.ConnectionState, up func() bool) (handshakeReason, error) {
	if s.cfg.Admit != nil {
		if err := s.cfg.Admit(r, state); err != nil {
			var no *Refusal
			if !errors.As(err, &no) || no.Code == RefusedNot {
				no = &Refusal{Code: RefusedNotAdmitted, Text: "not admitted"}
			}
			refuse(tc, no.Code, no.Text)
			return failRefused, err
		}
	}
	t := newTunnel(&s.cfg.Config, false, he.id, s.cfg.Logger)
	t.server = s
	if ip := s.cfg.RemoteIP(r); ip != remoteIP(r) {
		if parsed := net.ParseIP(ip); parsed != nil {
			t.from = &net.IPAddr{IP: parsed}
		}
	}
	l := newLane(t, Control, wc, tc)
	t.control = l
	t.live.sample(he.rtt)
	anonymous := len(state.PeerCertificates) == 0
	s.mu.Lock()
	code := RefusedNot
	switch {
	case s.draining || s.closed:
		code = RefusedDraining
	case s.tunnels[he.id] != nil:
		code = RefusedMalformed
	case anonymous && s.anonymous >= s.cfg.MaxAnonymous:
		code = RefusedLimit
	default:
		s.tunnels[he.id] = t
		if anonymous {
			s.anonymous++
			t.anonymous = true
		}
	}
	s.mu.Unlock()
	if code != RefusedNot {
		refuse(tc, code, map[RefusalCode]string{RefusedDraining: "draining", RefusedMalformed: "tunnel id in use", RefusedLimit: "too many hosts are joining"}[code])
		return failRefused, errors.New(code.String())
	}
	t.addLane(l)
	t.metrics.tunnelUp(he.rtt)
	err := s.yes(tc)
	if !up() && err == nil {
		err = os.ErrDeadlineExceeded
	}
	if err == nil {
		err = l.startMux()
	}
	if err != nil {
		t.end(lostError(err))
		t.laneEnded(l)
		return failHello, err
	}
	if anonymous {
		timer := time.AfterFunc(s.cfg.AnonymousLife, func() { _ = t.Close(ErrDrained) })
		context.AfterFunc(closingContext{t.done}, func() { timer.Stop() })
	}
	t.up.Store(true)
	s.startTicking(t)
	if s.cfg.Handler != nil {
		go s.cfg.Handler(t)
	}
	return "", nil
}

// maxBulkLanes bounds the bulk lanes of a tunnel; one is in use, others end.
const maxBulkLanes = 4

func (s *Server) acceptLane(wc *wsConn, tc *tls.Conn, he *hello, state tls.ConnectionState, up func() bool) (handshakeReason, error) {
	s.mu.Lock()
	t := s.tunnels[he.id]
	s.mu.Unlock()
	no := func(code RefusalCode, text string) (handshakeReason, error) {
		refuse(tc, code, text)
		return failRefused, errors.New(text)
	}
	if t == nil || t.Err() != nil {
		return no(RefusedUnknown, "no such tunnel")
	}
	if !sameIdentity(state, t.PeerState()) {
		return no(RefusedIdentity, "the lane's certificate is not the tunnel's")
	}
	if he.class == Solo && !t.reserveSolo(he.opener, he.token) || he.class == Bulk && t.countLanes(Bulk) >= maxBulkLanes {
		return no(RefusedLimit, "too many lanes")
	}
	l := newLane(t, he.class, wc, tc)
	if he.class == Solo {
		tuneTCP(wc.wire.conn, Solo)
	}
	err := s.yes(tc)
	if !up() && err == nil {
		err = os.ErrDeadlineExceeded
	}
	if err == nil {
		err = t.joined(l, he.opener, he.token)
	}
	if err != nil {
		if he.class == Solo && he.opener == openerDialer {
			t.mu.Lock()
			t.soloCount--
			t.mu.Unlock()
		}
		return failHello, err
	}
	return "", nil
}

// sameIdentity reports whether both handshakes proved the same key. Without a
// certificate there is nothing to compare.
func sameIdentity(a, b tls.ConnectionState) bool {
	if len(a.PeerCertificates) == 0 || len(b.PeerCertificates) == 0 {
		return false
	}
	x, y := a.PeerCertificates[0].RawSubjectPublicKeyInfo, b.PeerCertificates[0].RawSubjectPublicKeyInfo
	return subtle.ConstantTimeCompare(x, y) == 1
}

func (t *Tunnel) countLanes(c Class) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := 0
	for _, l := range t.lanes {
		if l.class == c {
			n++
		}
	}
	return n
}

// forget is called by a tunnel that ended.
func (s *Server) forget(t *Tunnel) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tunnels[t.id] == t {
		delete(s.tunnels, t.id)
		if t.anonymous {
			s.anonymous--
		}
	}
}

// Tunnels returns the tunnels that live.
func (s *Server) Tunnels() []*Tunnel {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*Tunnel, 0, len(s.tunnels))
	for _, t := range s.tunnels {
		if t.up.Load() {
			out = append(out, t)
		}
	}
	return out
}

// all returns the tunnels that live or are coming up.
func (s *Server) all() []*Tunnel {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.tunnels))
}

// GoAway tells all tunnels to move and refuses new ones. Each dialer is given
// its own delay, spread evenly over reconnectAfter, so that they do not come all
// at once. After deadline, if not 0, what is left ends with ErrDrained.
func (s *Server) GoAway(reconnectAfter, deadline time.Duration, reason string) {
	s.mu.Lock()
	s.draining = true
	s.mu.Unlock()
	all := s.Tunnels()
	for i, t := range all {
		t.GoAway(reconnectAfter*time.Duration(i)/time.Duration(len(all)), deadline, reason)
	}
}

// Shutdown refuses new tunnels and waits until those there are have ended or ctx
// has; then it closes the rest with ErrDrained. Call GoAway before.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.draining = true
	s.mu.Unlock()
	var err error
	for _, t := range s.Tunnels() {
		select {
		case <-t.Done():
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	s.shut(ErrDrained)
	return err
}

// Close ends all tunnels with ErrClosed and waits for what the server started,
// handlers excepted.
func (s *Server) Close() { s.shut(ErrClosed) }

func (s *Server) shut(cause error) {
	s.mu.Lock()
	first := !s.closed
	s.closed = true
	if first {
		close(s.closing)
	}
	s.mu.Unlock()
	var wg sync.WaitGroup
	for _, t := range s.all() {
		wg.Go(func() { _ = t.Close(cause) })
	}
	wg.Wait()
	s.wg.Wait()
}

// closingContext is a context that ends with a channel.
type closingContext struct{ done <-chan struct{} }

func (closingContext) Deadline() (time.Time, bool) { return time.Time{}, false }
func (c closingContext) Done() <-chan struct{}     { return c.done }
func (closingContext) Value(any) any               { return nil }
func (c closingContext) Err() error {
	select {
	case <-c.done:
		return context.Canceled
	default:
		return nil
	}
}
