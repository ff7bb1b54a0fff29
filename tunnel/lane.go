package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

// acceptBacklog is how many opened and not yet acknowledged streams a lane has
// room for; the opener waits at the same number, so it is never exceeded.
const acceptBacklog = 128

// lane is one connection of a tunnel.
type lane struct {
	tunnel *Tunnel
	class  Class
	ws     *wsConn
	tls    *tls.Conn
	mux    *mux           // nil on a solo lane
	yamux  *yamux.Session // nil on a solo lane
	opens  chan struct{}  // bounds OpenStream calls under way

	lastRx uint64 // by the tunnel's tick: rx counted so far
	lastTx uint64
	idle   time.Duration // by the tick: how long a bulk lane had no stream
	stuck  time.Duration // by the tick: how long a solo lane moved no byte
	quiet  time.Duration // by the tick: the same, since the last ping

	heardRx uint64 // by checkBulk: the lane's own liveness
	silent  time.Duration
	asked   bool

	counted              sync.Mutex // guards the bytes that metrics know of
	countedRx, countedTx uint64

	done chan struct{}

	mu       sync.Mutex
	err      error
	retiring bool // opens no more streams
}

func newLane(t *Tunnel, class Class, ws *wsConn, tc *tls.Conn) *lane {
	l := &lane{tunnel: t, class: class, ws: ws, tls: tc, done: make(chan struct{})}
	if class != Solo {
		l.mux = newMux(l, tc, ws.wire)
	}
	return l
}

// startMux puts yamux on the lane and starts to accept.
func (l *lane) startMux() error {
	l.opens = make(chan struct{}, acceptBacklog)
	cfg := &yamux.Config{
		AcceptBacklog:          acceptBacklog,
		EnableKeepAlive:        false,                     // ours: liveness.go
		KeepAliveInterval:      time.Hour,                 // must be set
		ConnectionWriteTimeout: 10 * 365 * 24 * time.Hour, // a lane that moves is never cut; one that does not dies by liveness
		MaxStreamWindowSize:    yamuxWindowMax,
		StreamOpenTimeout:      0, // would close the whole lane
		StreamCloseTimeout:     0, // would cut a slow reader after 5 minutes
		Logger:                 log.New(yamuxLog{l.tunnel.log, l.class}, "", 0),
	}
	var err error
	if l.tunnel.isDialer {
		l.yamux, err = yamux.Client(l.mux, cfg)
	} else {
		l.yamux, err = yamux.Server(l.mux, cfg)
	}
	if err != nil {
		return err
	}
	if !l.tunnel.spawn(l.acceptLoop) {
		l.fail(ErrClosed)
		_ = l.yamux.Close()
		return ErrClosed
	}
	return nil
}

// openerOdd reports whether the ids of streams opened by this side are odd.
func (l *lane) openerOdd() bool { return l.tunnel.isDialer }

// acceptLoop hands accepted streams to the listener. It waits for nothing but
// the lane. It is also the lane's last goroutine: it cleans up.
func (l *lane) acceptLoop() {
	for {
		ys, err := l.yamux.AcceptStream()
		if err != nil {
			break
		}
		s := l.mux.find(ys.StreamID())
		if s == nil { // reset by the peer meanwhile
			_ = ys.Close()
			continue
		}
		s.attach(ys)
		l.tunnel.metrics.streamOpened(l.class, true)
		l.tunnel.accepted.push(s)
	}
	l.fail(ErrLost)
	_ = l.yamux.Close()
	_ = l.ws.Close()
	l.tunnel.laneEnded(l)
}

// open opens a stream; ctx bounds the opening.
func (l *lane) open(ctx context.Context) (net.Conn, error) {
	select {
	case l.opens <- struct{}{}:
	case <-l.done:
		return nil, l.failure()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	type result struct {
		s   *stream
		err error
	}
	// yamux's OpenStream knows no context and may wait for a slow lane.
	ch := make(chan result, 1)
	if !l.tunnel.spawn(func() {
		defer func() { <-l.opens }()
		ys, err := l.yamux.OpenStream()
		if err != nil {
			if lerr := l.failure(); lerr != nil {
				err = lerr
			}
			ch <- result{nil, err}
			return
		}
		s := l.mux.find(ys.StreamID())
		if s == nil { // refused by the peer already, or the lane is gone
			_ = ys.Close()
			err = l.failure()
			if err == nil {
				err = ErrStreamReset
			}
			ch <- result{nil, err}
			return
		}
		s.attach(ys)
		ch <- result{s, nil}
	}) {
		<-l.opens
		return nil, l.tunnel.closedError()
	}
	select {
	case r := <-ch:
		if r.err != nil {
			return nil, r.err
		}
		l.tunnel.metrics.streamOpened(l.class, false)
		return r.s, nil
	case <-ctx.Done():
		l.tunnel.spawn(func() {
			if r := <-ch; r.s != nil {
				_ = r.s.Close()
			}
		})
		return nil, context.Cause(ctx)
	}
}

// fail ends the lane: it closes the connection and wakes everybody. It waits
// for nothing.
func (l *lane) fail(cause error) {
	l.mu.Lock()
	if l.err != nil {
		l.mu.Unlock()
		return
	}
	l.err = cause
	close(l.done)
	l.mu.Unlock()
	_ = l.ws.wire.Close()
	if l.mux != nil {
		l.mux.shut()
	}
	if l.class == Control {
		l.tunnel.end(cause)
	}
}

// readLast is how long the reader has, when a write failed, to find in what has
// arrived why the peer closed.
const readLast = 100 * time.Millisecond

// failAsync is fail for a writer that holds a lock which fail takes.
func (l *lane) failAsync(cause error) {
	if !l.tunnel.spawn(func() {
		timer := time.NewTimer(readLast)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-l.done:
		}
		l.fail(cause)
	}) {
		_ = l.ws.wire.Close()
	}
}

// failure is nil while the lane lives.
func (l *lane) failure() error {
	l.mu.Lock()
	cause := l.err
	l.mu.Unlock()
	if cause == nil {
		return nil
	}
	if terr := l.tunnel.Err(); terr != nil {
		cause = terr
	}
	return &laneError{class: l.class, cause: cause}
}

func (l *lane) alive() bool {
	select {
	case <-l.done:
		return false
	default:
		return true
	}
}

// send queues a link message on a multiplexed lane.
func (l *lane) send(m *message) error {
	var b [64]byte
	return l.mux.send(m.append(b[:0]))
}

// lostError classifies an error of a connection.
func lostError(err error) error {
	switch {
	case err == nil:
		return ErrLost
	case errors.Is(err, ErrProtocol), errors.Is(err, ErrLost):
		return err
	case errors.Is(err, net.ErrClosed):
		return ErrLost
	}
	return fmt.Errorf("%w: %w", ErrLost, err)
}

// yamuxLog gives yamux's log lines to slog. Most are of interest only to who
// debugs the tunnel: errors of the connection are reported by the tunnel itself.
type yamuxLog struct {
	log   *slog.Logger
	class Class
}

func (y yamuxLog) Write(p []byte) (int, error) {
	y.log.Debug("yamux", "lane", y.class.String(), "text", oneLine(strings.TrimSpace(string(p)), 200))
	return len(p), nil
}
