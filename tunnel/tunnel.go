package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// Tunnel is one live link. Dial and Server make it.
type Tunnel struct {
	id        [idSize]byte
	isDialer  bool
	cfg       *Config // shared by all tunnels of a server
	log       *slog.Logger
	metrics   *Metrics
	dialer    *dialer  // nil on the accepting side
	anonymous bool     // the dialer showed no certificate
	server    *Server  // nil on the dialing side
	from      net.Addr // who it comes from if not its TCP connection's peer; else nil

	accepted acceptQueue
	windows  windows
	live     liveness

	inbound atomic.Int64 // streams of the peer
	opened  atomic.Int64 // streams of this side
	opening atomic.Int64 // Open calls under way
	joining atomic.Int64 // handshakes of further lanes, on the acceptor

	up   atomic.Bool // an accepted tunnel is ready for use
	done chan struct{}

	spawnMu     sync.Mutex
	spawnClosed bool
	wg          sync.WaitGroup // goroutines started by spawn

	// mu guards the following. Lock order: Tunnel.mu, lane.mu; mux.mu is taken
	// with neither held and holds neither.
	mu         sync.Mutex
	err        error
	control    *lane
	bulk       *lane        // the one that new bulk streams use; nil if none
	lanes      []*lane      // all that live, control included
	bulkWait   *laneRequest // a bulk lane being dialed
	requests   map[uint32]*laneRequest
	nextToken  uint32
	soloCount  int // solo lanes, dialed or being dialed
	transports [3]*http.Transport
	gone       *GoAway // received
	sentGoAway *time.Timer
	ticked     time.Duration // clock at the last tick
	goneCh     chan GoAway
}

func newTunnel(cfg *Config, isDialer bool, id [idSize]byte, log *slog.Logger) *Tunnel {
	t := &Tunnel{
		id: id, isDialer: isDialer, cfg: cfg, log: log, metrics: cfg.Metrics,
		done: make(chan struct{}),
	}
	t.windows.left = cfg.WindowBudget
	t.accepted.t = t
	return t
}

// ID returns the 16 random bytes, in hex, that the dialer chose.
func (t *Tunnel) ID() string { return formatID(t.id) }

// PeerState returns the inner TLS state of the control lane: the peer's
// certificates and what they were verified against.
func (t *Tunnel) PeerState() tls.ConnectionState { return t.control.tls.ConnectionState() }

// RemoteAddr returns the address of the other end of the control lane's TCP
// connection: a proxy's or load balancer's, if there is one. On the acceptor it is
// an IP address without a port if ServerConfig.RemoteIP names another.
func (t *Tunnel) RemoteAddr() net.Addr {
	if t.from != nil {
		return t.from
	}
	return t.control.ws.RemoteAddr()
}

// LocalAddr returns this end of the control lane's TCP connection.
func (t *Tunnel) LocalAddr() net.Addr { return t.control.ws.LocalAddr() }

// Done is closed when the tunnel has ended; then Err says why.
func (t *Tunnel) Done() <-chan struct{} { return t.done }

// Err returns nil while the tunnel lives, then its cause, which wraps one of
// ErrClosed, ErrPeerClosed, ErrSilent, ErrReplaced, ErrRevoked, ErrDrained,
// ErrLost, ErrProtocol, or is what Close was given.
func (t *Tunnel) Err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// RTT returns the shortest round trip seen lately on the control lane.
func (t *Tunnel) RTT() time.Duration { return t.live.minRTT() }

// Streams returns how many streams are open, of both sides.
func (t *Tunnel) Streams() int { return int(t.inbound.Load() + t.opened.Load()) }

// byeWait bounds how long Close waits for its farewell to be written.
const byeWait = 250 * time.Millisecond

// Close ends the tunnel with cause (nil means ErrClosed) and waits until its
// goroutines have ended. The peer is told whether it was replaced, revoked,
// drained or closed. All streams end in an error. It returns nil, or the earlier
// cause if the tunnel had ended before. Close must not be called from a
// goroutine that the tunnel waits for; handlers and users of streams are not.
func (t *Tunnel) Close(cause error) error {
	if cause == nil {
		cause = ErrClosed
	}
	t.mu.Lock()
	before := t.err
	t.mu.Unlock()
	if before == nil && t.control.alive() {
		text := ""
		if !errors.Is(cause, ErrClosed) {
			text = publicText(cause)
		}
		if t.control.mux.send((&message{typ: msgBye, code: uint8(byeOf(cause)), text: text}).append(nil)) == nil {
			t.control.mux.drain(byeWait)
		}
	}
	t.end(cause)
	t.spawnMu.Lock()
	t.spawnClosed = true
	t.spawnMu.Unlock()
	t.wg.Wait()
	return before
}

// publicText is what the peer may read of a cause: our own sentinels only, so
// that no wrapped detail leaves this side.
func publicText(err error) string {
	for _, known := range []error{ErrReplaced, ErrRevoked, ErrDrained} {
		if errors.Is(err, known) {
			return known.Error()
		}
	}
	return ""
}

// end ends the tunnel without waiting.
func (t *Tunnel) end(cause error) {
	t.mu.Lock()
	if t.err != nil {
		t.mu.Unlock()
		return
	}
	t.err = cause // first of all: lanes notice when the carrier ends, and that is no cause
	t.mu.Unlock()
	if t.dialer != nil && errors.Is(cause, ErrSilent) {
		t.dialer.endCarrier(true) // before anybody dials again: it may be what hangs
	}
	t.mu.Lock()
	close(t.done)
	lanes := append([]*lane(nil), t.lanes...)
	requests := t.requests
	t.requests = nil
	transports := t.transports
	if t.sentGoAway != nil {
		t.sentGoAway.Stop()
	}
	t.mu.Unlock()

	for _, l := range lanes {
		l.fail(cause)
	}
	for _, r := range requests {
		r.finish(nil, t.closedError())
	}
	t.accepted.end()
	for _, tr := range transports {
		if tr != nil {
			tr.CloseIdleConnections()
		}
	}
	if t.dialer != nil {
		t.dialer.cancel()
		t.dialer.endCarrier(false)
	}
	t.metrics.tunnelEnded(cause)
	t.log.Debug("tunnel ended", "err", cause)
	if t.server != nil {
		t.server.forget(t)
	}
}

// closedError is what calls on an ended tunnel return.
func (t *Tunnel) closedError() error {
	if err := t.Err(); err != nil {
		return err
	}
	return ErrClosed
}

// spawn starts f in a goroutine that Close waits for. It returns false, and does
// not run f, if the tunnel is past that.
func (t *Tunnel) spawn(f func()) bool {
	t.spawnMu.Lock()
	if t.spawnClosed {
		t.spawnMu.Unlock()
		return false
	}
	t.wg.Add(1)
	t.spawnMu.Unlock()
	go func() {
		defer t.wg.Done()
		f()
	}()
	return true
}

// admitStream counts a stream of the peer unless it is one too many.
func (t *Tunnel) admitStream() bool {
	if t.inbound.Add(1) > int64(t.cfg.MaxStreams) {
		t.inbound.Add(-1)
		return false
	}
	return true
}

func (t *Tunnel) releaseStream() { t.inbound.Add(-1) }
func (t *Tunnel) releaseOpened() { t.opened.Add(-1) }

// addLane takes a lane into the tunnel; false if the tunnel has ended.
func (t *Tunnel) addLane(l *lane) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil {
		return false
	}
	t.lanes = append(t.lanes, l)
	t.metrics.laneUp(l.class)
	return true
}

// laneEnded forgets a lane.
func (t *Tunnel) laneEnded(l *lane) {
	t.mu.Lock()
	found := false
	for i, x := range t.lanes {
		if x == l {
			t.lanes = append(t.lanes[:i], t.lanes[i+1:]...)
			found = true
			break
		}
	}
	if t.bulk == l {
		t.bulk = nil
	}
	if found && l.class == Solo {
		t.soloCount--
	}
	t.mu.Unlock()
	if found {
		t.metrics.laneDown(l.class)
		t.metrics.moved(l)
	}
	if l.class != Control {
		t.log.Debug("lane ended", "lane", l.class.String(), "err", l.err)
	}
}

// received handles a link message; it runs in the lane's receive loop and waits
// for nothing.
func (l *lane) received(m *message) error {
	t := l.tunnel
	switch m.typ {
	case msgPing:
		if t.live.mayPong() {
			var b [32]byte
			return l.mux.answer((&message{typ: msgPong, nonce: m.nonce}).append(b[:0]))
		}
	case msgPong:
		if rtt := t.live.pong(m.nonce); rtt > 0 {
			t.windows.measure(rtt, t.live.minRTT())
		}
	case msgRetire:
		if l.class == Bulk {
			l.peerRetires()
		}
	}
	if l.class != Control {
		return nil
	}
	switch m.typ {
	case msgOpenLane:
		if t.isDialer {
			t.dialRequested(m.token, m.class)
		}
	case msgLaneFailed:
		if !t.isDialer {
			t.requestFailed(m.token, &Refusal{Code: RefusalCode(m.code), Text: m.text})
		}
	case msgGoAway:
		t.receivedGoAway(GoAway{ReconnectAfter: m.reconnectAfter, Deadline: m.deadline, Reason: m.text})
	case msgBye:
		t.end(byeCode(m.code).cause(m.text))
	}
	return nil
}

// Open opens a stream to the peer; ctx bounds the opening, not the stream. It
// returns at once on the control lane; for Bulk and Solo a lane may have to be
// dialed first, by the peer if this is the accepting side. A Solo for which
// there is no lane becomes a Bulk.
func (t *Tunnel) Open(ctx context.Context, class Class) (net.Conn, error) {
	if err := t.Err(); err != nil {
		return nil, err
	}
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	if class > Solo {
		class = Bulk
	}
	if t.opened.Load()+t.opening.Add(1) > int64(t.cfg.MaxStreams) {
		t.opening.Add(-1)
		return nil, ErrTooManyStreams
	}
	defer t.opening.Add(-1)
	if class == Solo {
		conn, err := t.openSolo(ctx)
		if err == nil || context.Cause(ctx) != nil || t.Err() != nil {
			return conn, err
		}
		t.log.Debug("no solo lane, using bulk", "err", err)
		class = Bulk
	}
	if class == Control {
		return t.control.open(ctx)
	}
	for attempt := 0; ; attempt++ {
		l, err := t.bulkLane(ctx)
		if err != nil {
			return nil, err
		}
		conn, err := l.open(ctx)
		if err == nil || attempt == 2 || l.alive() || context.Cause(ctx) != nil || t.Err() != nil {
			return conn, err
		}
	}
}
