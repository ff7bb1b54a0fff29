package tunnel

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

// Frames are capped: yamux would send a whole window in one, and everything
// else on the lane would wait for it.
const (
	maxControlWrite = 16 << 10
	maxBulkWrite    = 64 << 10
)

// stream is a multiplexed stream: yamux's, with the meanings of the package
// comment put around it.
type stream struct {
	lane     *lane
	id       uint32
	accepted bool // opened by the peer
	flow     streamFlow

	closed atomic.Bool // this side closed it
	ended  atomic.Bool // the peer closed or reset it
	reset  atomic.Bool // the peer reset it

	inbox inbox
	rmu   sync.Mutex // one Read at a time

	wmu sync.Mutex // one Write at a time, so that its frames stay together

	credit int64         // bytes that the peer lets us send; guarded by mux.mu
	wake   chan struct{} // capacity 1: something changed for a writer

	ys atomic.Pointer[yamux.Stream] // opens and closes; data goes past it

	mu            sync.Mutex
	writeDeadline time.Time
}

var _ net.Conn = (*stream)(nil)

func newStream(l *lane, id uint32, accepted bool) *stream {
	s := &stream{lane: l, id: id, accepted: accepted, credit: yamuxWindowStart, wake: make(chan struct{}, 1)}
	s.flow.s = s
	s.inbox.class, s.inbox.wake = l.class, make(chan struct{}, 1)
	s.flow.window, s.flow.granted = yamuxWindowStart, yamuxWindowStart
	if !accepted {
		l.tunnel.opened.Add(1)
	}
	return s
}

// attach gives the stream its yamux half, before anybody else knows it.
func (s *stream) attach(ys *yamux.Stream) { s.ys.Store(ys) }

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// peerEnded notes the peer's FIN or RST and wakes a blocked writer.
func (s *stream) peerEnded(reset bool) {
	if reset {
		s.reset.Store(true)
		s.inbox.finish(ErrStreamReset, false)
	} else {
		s.inbox.finish(io.EOF, true)
	}
	s.ended.Store(true)
	s.wakeWriter()
}

// laneGone ends both halves in the lane's error. yamux would end the reading half
// in io.EOF; here that is only what the peer sent.
func (s *stream) laneGone() {
	s.inbox.finish(s.lane.failure(), true)
	s.wakeWriter()
}

// wakeWriter makes a blocked Write look again.
func (s *stream) wakeWriter() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Class returns the class that the opener chose.
func (s *stream) Class() Class { return s.lane.class }

// Tunnel returns the tunnel of the stream.
func (s *stream) Tunnel() *Tunnel { return s.lane.tunnel }

func (s *stream) Read(p []byte) (int, error) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	n, err := s.inbox.read(p)
	if n > 0 {
		if grant := s.flow.consume(n); grant > 0 {
			_ = s.lane.mux.sendWindow(s.id, grant)
		}
	}
	return n, err
}

func (s *stream) Write(p []byte) (int, error) {
	limit := maxBulkWrite
	if s.lane.class == Control {
		limit = maxControlWrite
	}
	s.wmu.Lock()
	defer s.wmu.Unlock()
	if len(p) == 0 {
		return 0, s.writable()
	}
	total := 0
	for len(p) > 0 {
		n, err := s.lane.mux.writeData(s, p, limit)
		total += n
		p = p[n:]
		if err != nil {
			if lerr := s.lane.failure(); lerr != nil && !s.closed.Load() {
				err = lerr
			}
			return total, err
		}
		if n == 0 {
			if err := s.waitCredit(); err != nil {
				return total, err
			}
		}
	}
	return total, nil
}

// writable is nil unless nothing more can be written.
func (s *stream) writable() error {
	switch {
	case s.closed.Load():
		return net.ErrClosed
	case s.ended.Load():
		return s.endError()
	}
	return s.lane.failure()
}

// waitCredit waits until something changed for a writer, or its deadline.
func (s *stream) waitCredit() error {
	s.mu.Lock()
	deadline := s.writeDeadline
	s.mu.Unlock()
	var late <-chan time.Time
	if !deadline.IsZero() {
		left := time.Until(deadline)
		if left <= 0 {
			return os.ErrDeadlineExceeded
		}
		timer := time.NewTimer(left)
		defer timer.Stop()
		late = timer.C
	}
	select {
	case <-s.wake:
	case <-late:
		return os.ErrDeadlineExceeded
	}
	return nil
}

func (s *stream) endError() error {
	if s.reset.Load() {
		return ErrStreamReset
	}
	return ErrPeerGone
}

// Close ends both directions. What was written before still reaches the peer.
// It does not wait for the lane.
func (s *stream) Close() error {
	if s.closed.Swap(true) {
		return net.ErrClosed
	}
	ys := s.ys.Load()
	s.inbox.finish(net.ErrClosed, false)
	s.wakeWriter()
	s.lane.mux.dropIfEnded(s)
	// yamux waits until its FIN is written, which a slow lane delays.
	if !s.lane.tunnel.spawn(func() { _ = ys.Close() }) {
		_ = ys.Close()
	}
	return nil
}

func (s *stream) LocalAddr() net.Addr  { return s.lane.tunnel.LocalAddr() }
func (s *stream) RemoteAddr() net.Addr { return s.lane.tunnel.RemoteAddr() }

func (s *stream) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

func (s *stream) SetReadDeadline(t time.Time) error {
	if s.closed.Load() {
		return net.ErrClosed
	}
	s.inbox.setDeadline(t)
	return nil
}

// SetWriteDeadline bounds the wait for the peer's window, not that for the lane,
// which the tunnel's liveness bounds.
func (s *stream) SetWriteDeadline(t time.Time) error {
	if s.closed.Load() {
		return net.ErrClosed
	}
	s.mu.Lock()
	s.writeDeadline = t
	s.mu.Unlock()
	s.wakeWriter()
	return nil
}
