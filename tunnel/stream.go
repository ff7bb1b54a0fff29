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
	maxBulkWrite    = 32 << 10
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
	read   atomic.Bool // bytes were read since the last housekeeping
	lean   atomic.Bool // its buffer was given back after the last read

	wmu sync.Mutex // one Write at a time, so that its frames stay together

	mu sync.Mutex // guards the setting of ys and of its write deadline
	ys *yamux.Stream
}

var _ net.Conn = (*stream)(nil)

func newStream(l *lane, id uint32, accepted bool) *stream {
	s := &stream{lane: l, id: id, accepted: accepted}
	s.flow.s = s
	s.flow.window, s.flow.granted = yamuxWindowStart, yamuxWindowStart
	if !accepted {
		l.tunnel.opened.Add(1)
	}
	return s
}

// attach gives the stream its yamux half.
func (s *stream) attach(ys *yamux.Stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ys = ys
	if s.ended.Load() {
		_ = ys.SetWriteDeadline(past)
	}
}

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// peerEnded notes the peer's FIN or RST and wakes a blocked writer.
func (s *stream) peerEnded(reset bool) {
	if reset {
		s.reset.Store(true)
	}
	s.ended.Store(true)
	s.wakeWriter()
}

func (s *stream) wakeWriter() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ys != nil {
		_ = s.ys.SetWriteDeadline(past)
	}
}

// laneGone is called when the lane is lost; yamux wakes readers and writers.
func (s *stream) laneGone() { s.wakeWriter() }

// Class returns the class that the opener chose.
func (s *stream) Class() Class { return s.lane.class }

// Tunnel returns the tunnel of the stream.
func (s *stream) Tunnel() *Tunnel { return s.lane.tunnel }

func (s *stream) Read(p []byte) (int, error) {
	n, err := s.ys.Read(p)
	if n > 0 {
		if !s.read.Load() {
			s.read.Store(true)
		}
		if grant := s.flow.consume(n); grant > 0 {
			_ = s.lane.mux.sendWindow(s.id, grant)
		}
	}
	if err != nil {
		err = s.mapError(err, false)
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
	total := 0
	for {
		if s.closed.Load() {
			return total, net.ErrClosed
		}
		if s.ended.Load() {
			return total, s.endError()
		}
		if len(p) == 0 {
			return total, nil
		}
		n, err := s.ys.Write(p[:min(len(p), limit)])
		total += n
		if err != nil {
			return total, s.mapError(err, true)
		}
		p = p[n:]
	}
}

func (s *stream) endError() error {
	if s.reset.Load() {
		return ErrStreamReset
	}
	return ErrPeerGone
}

// mapError turns yamux's errors into ours. yamux ends every stream of a lost
// connection in io.EOF; here EOF is only what the peer sent.
func (s *stream) mapError(err error, write bool) error {
	switch {
	case s.closed.Load():
		return net.ErrClosed
	case errors.Is(err, yamux.ErrConnectionReset):
		return ErrStreamReset
	case errors.Is(err, yamux.ErrTimeout):
		if write {
			if s.ended.Load() {
				return s.endError()
			}
			if err := s.lane.failure(); err != nil {
				return err
			}
		}
		return os.ErrDeadlineExceeded
	case err == io.EOF && s.ended.Load():
		if s.reset.Load() {
			return ErrStreamReset
		}
		return io.EOF
	}
	if lerr := s.lane.failure(); lerr != nil {
		return lerr
	}
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Close ends both directions. What was written before still reaches the peer.
// It does not wait for the lane.
func (s *stream) Close() error {
	if s.closed.Swap(true) {
		return net.ErrClosed
	}
	_ = s.ys.SetReadDeadline(past)
	s.wakeWriter()
	s.lane.mux.dropIfEnded(s)
	// yamux waits until its FIN is written, which a slow lane delays.
	if !s.lane.tunnel.spawn(func() { _ = s.ys.Close() }) {
		_ = s.ys.Close()
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
	err := s.ys.SetReadDeadline(t)
	if s.closed.Load() { // Close came between
		_ = s.ys.SetReadDeadline(past)
	}
	return err
}

// SetWriteDeadline bounds the wait for the peer's window, not that for the lane,
// which the tunnel's liveness bounds.
func (s *stream) SetWriteDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed.Load() {
		return net.ErrClosed
	}
	if s.ended.Load() || s.lane.failure() != nil {
		return nil
	}
	return s.ys.SetWriteDeadline(t)
}

// shrink gives back the memory of a stream whose reader has emptied it.
func (s *stream) shrink() {
	if s.read.Swap(false) {
		s.lean.Store(false)
		return
	}
	s.mu.Lock()
	ys := s.ys
	s.mu.Unlock()
	if ys != nil && !s.lean.Swap(true) {
		ys.Shrink()
	}
}
