package pgwire

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Server serves clients of PostgreSQL. All methods may be called concurrently.
type Server struct {
	cfg       Config
	limits    Limits
	log       *slog.Logger
	strangers *strangers
	keys      *keys
	work      sync.WaitGroup // connections
	// ctx is for what comes before a session; stop ends it.
	ctx    context.Context
	cancel context.CancelFunc

	mu        sync.Mutex // guards what follows
	listeners map[net.Listener]struct{}
	conns     map[net.Conn]struct{} // those without a session
	sessions  map[*session]struct{}
	taken     map[string]int // places, by organization and by token
	stopping  bool
}

// New returns a server. Serve makes it serve; Close ends it.
func New(cfg Config) *Server {
	limits := cfg.Limits.withDefaults()
	ctx, cancel := context.WithCancel(context.Background())
	return &Server{
		cfg: cfg, ctx: ctx, cancel: cancel, limits: limits, log: cfg.Logger, strangers: newStrangers(limits.Strangers),
		keys:      &keys{by: map[uint32]*key{}},
		listeners: map[net.Listener]struct{}{}, conns: map[net.Conn]struct{}{}, sessions: map[*session]struct{}{}, taken: map[string]int{},
	}
}

// ErrClosed is what Serve returns after Drain or Close.
var ErrClosed = errors.New("pgwire: the server is closed")

// Serve accepts connections until the listener fails, or Drain or Close is called.
// It closes the listener.
func (s *Server) Serve(l net.Listener) error {
	defer l.Close() //nolint:errcheck // Drain may have closed it
	s.mu.Lock()
	if s.stopping {
		s.mu.Unlock()
		return ErrClosed
	}
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	pause := time.Millisecond
	for {
		conn, err := l.Accept()
		if err != nil {
			s.mu.Lock()
			stopping := s.stopping
			s.mu.Unlock()
			if stopping {
				return ErrClosed
			}
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			// Out of descriptors, say: others may end.
			s.log.Warn("connection not accepted", "err", err)
			time.Sleep(pause)
			pause = min(2*pause, time.Second)
			continue
		}
		pause = time.Millisecond
		s.accept(conn)
	}
}

func (s *Server) accept(conn net.Conn) {
	host, loopback := peer(conn)
	who := &stranger{from: addressKey(host), leave: func() {
		s.cfg.Metrics.refused(reasonCrowd)
		abort(conn)
	}}
	s.mu.Lock()
	if s.stopping {
		s.mu.Unlock()
		abort(conn)
		return
	}
	s.work.Add(1)
	s.conns[conn] = struct{}{}
	s.mu.Unlock()
	if !s.strangers.enter(who, loopback) {
		s.cfg.Metrics.refused(reasonCrowd)
		abort(conn)
		s.forget(conn)
		s.work.Done()
		return
	}
	s.cfg.Metrics.stranger(1)
	go func() {
		defer s.work.Done()
		l := &login{server: s, raw: conn, conn: conn, host: host, loopback: loopback}
		l.admitted = sync.OnceFunc(func() {
			s.strangers.remove(who)
			s.cfg.Metrics.stranger(-1)
		})
		l.run()
	}()
}

// abort closes without waiting for anything that is still to be sent.
func abort(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetLinger(0) //nolint:errcheck // it only frees the port sooner
	}
	conn.Close() //nolint:errcheck // it is being given up
}

// forget drops a connection that has become a session, or has gone.
func (s *Server) forget(conn net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, conn)
}

// reserve takes a place for a session of this principal.
func (s *Server) reserve(p *posternv1.Principal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.stopping:
		return errStopping
	case s.taken[""] >= s.limits.Sessions:
		return fatalf(reasonLimit, stateTooManyConnections, "sorry, too many clients already: this control plane serves %d at once", s.limits.Sessions)
	case s.taken["o"+p.Organization] >= s.limits.PerOrganization:
		return fatalf(reasonLimit, stateTooManyConnections, "too many connections: an organization may have %d at once", s.limits.PerOrganization)
	case s.taken["t"+p.TokenId] >= s.limits.PerToken:
		return fatalf(reasonLimit, stateTooManyConnections, "too many connections for token %s: it may have %d at once", p.TokenName, s.limits.PerToken)
	}
	for _, place := range places(p) {
		s.taken[place]++
	}
	return nil
}

func (s *Server) release(p *posternv1.Principal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, place := range places(p) {
		if s.taken[place]--; s.taken[place] == 0 {
			delete(s.taken, place)
		}
	}
}

func places(p *posternv1.Principal) []string {
	return []string{"", "o" + p.Organization, "t" + p.TokenId}
}

// errStopping is what new clients get, and idle ones, while the server stops.
var errStopping = fatalf(reasonUnavailable, stateCannotConnectNow, "this control plane is stopping").with("connect again")

// add makes a session known; false if the server stops.
func (s *Server) add(one *session) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false
	}
	delete(s.conns, one.raw)
	s.sessions[one] = struct{}{}
	s.cfg.Metrics.session(1)
	return true
}

func (s *Server) remove(one *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, one)
	s.cfg.Metrics.session(-1)
}

// Sessions is the number of sessions.
func (s *Server) Sessions() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.sessions)
}

// match returns the sessions for which f is true.
func (s *Server) match(f func(*session) bool) []*session {
	s.mu.Lock()
	defer s.mu.Unlock()
	var matched []*session
	for one := range s.sessions {
		if f(one) {
			matched = append(matched, one)
		}
	}
	return matched
}

// CutToken ends the sessions of a token at once: it was revoked.
func (s *Server) CutToken(id string) {
	s.cut(func(p *posternv1.Principal) bool { return p.TokenId == id }, "the API token was revoked")
}

// CutOrganization ends the sessions of an organization at once: it was disabled.
func (s *Server) CutOrganization(id string) {
	s.cut(func(p *posternv1.Principal) bool { return p.Organization == id }, "the organization was disabled")
}

func (s *Server) cut(whose func(*posternv1.Principal) bool, why string) {
	for _, one := range s.match(func(one *session) bool { return whose(one.info.Principal) }) {
		go one.finish(fatalf(reasonRefused, stateAdminShutdown, "terminating connection: %s", why))
	}
}

// Drain stops listening and ends each session as soon as it is idle and in no
// transaction; it returns when all have ended, or with ctx's error.
func (s *Server) Drain(ctx context.Context) error {
	s.stop()
	done := make(chan struct{})
	go func() { s.work.Wait(); close(done) }()
	for _, one := range s.match(func(*session) bool { return true }) {
		one.endWhenIdle(&fatal{state: stateAdminShutdown, message: "terminating connection: this control plane is stopping", hint: "connect again"})
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// stop ends listening, and connections that are no sessions yet.
func (s *Server) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopping = true
	s.cancel()
	for l := range s.listeners {
		l.Close() //nolint:errcheck // it is done with
	}
	clear(s.listeners)
	for conn := range s.conns {
		conn.Close() //nolint:errcheck // likewise
	}
}

// Close ends everything at once and waits for it.
func (s *Server) Close() {
	s.stop()
	for _, one := range s.match(func(*session) bool { return true }) {
		go func() {
			one.finish(&fatal{state: stateAdminShutdown, message: "terminating connection: this control plane is stopping", hint: "connect again"})
			one.stream.Close() //nolint:errcheck // there is no time to hear how it ended
		}()
	}
	s.work.Wait()
}

// cancelTime bounds a cancel request's way to the host.
const cancelTime = 5 * time.Second

// cancelRequest serves a CancelRequest; what came of it the client is not told.
func (s *Server) cancelRequest(rest []byte, host string) {
	from := addressKey(host)
	if s.cfg.Cancels.Exhausted(from) {
		s.cfg.Metrics.cancel("limited")
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), cancelTime)
	defer cancel()
	if s.CancelKey(ctx, rest) {
		return
	}
	if s.cfg.CancelElsewhere != nil && len(rest) >= minCancelRest && s.cfg.CancelElsewhere(ctx, rest) {
		s.cfg.Metrics.cancel("forwarded")
		return
	}
	s.cfg.Cancels.Take(from)
	s.cfg.Metrics.cancel("unknown")
}

// CancelKey ends what the session runs that the body of a CancelRequest is for: process
// and secret as that session's client was told. It reports whether there is such a
// session here.
func (s *Server) CancelKey(ctx context.Context, rest []byte) bool {
	one := s.keys.find(rest)
	if one == nil {
		return false
	}
	if err := one.cancel(ctx, one.info.ID, one.info.Principal); err != nil {
		s.cfg.Metrics.cancel("failed")
		s.log.Info("cancel request not passed on", "session", one.info.ID, "agent", one.info.Agent, "err", err)
		return true
	}
	s.cfg.Metrics.cancel("sent")
	return true
}

// newSessionID names a session; it is a query's name in form, as the host's
// CancelQuery takes both.
func newSessionID() string { return proto.NewID(proto.QueryPrefix) }
