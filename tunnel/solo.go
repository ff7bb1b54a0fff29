package tunnel

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// soloStream is the one stream of a solo lane: the inner TLS connection itself.
type soloStream struct {
	lane   *lane
	closed atomic.Bool
	ended  atomic.Bool // the peer closed it
	rmu    sync.Mutex  // held by Read, so that Close can wait for its end
	wmu    sync.Mutex
}

var _ Classed = (*soloStream)(nil)

func newSoloStream(l *lane) *soloStream { return &soloStream{lane: l} }

func (s *soloStream) Class() Class    { return Solo }
func (s *soloStream) Tunnel() *Tunnel { return s.lane.tunnel }

func (s *soloStream) Read(p []byte) (int, error) {
	if s.closed.Load() { // Close holds rmu while it lingers
		return 0, net.ErrClosed
	}
	s.rmu.Lock()
	defer s.rmu.Unlock()
	if s.closed.Load() {
		return 0, net.ErrClosed
	}
	n, err := s.lane.tls.Read(p)
	if err != nil {
		err = s.mapError(err)
	}
	return n, err
}

// Write writes p in as few calls as its size needs, see wire.
func (s *soloStream) Write(p []byte) (int, error) {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	if s.closed.Load() {
		return 0, net.ErrClosed
	}
	if s.ended.Load() {
		return 0, ErrPeerGone
	}
	s.lane.ws.wire.cork()
	n, err := s.lane.tls.Write(p)
	if uerr := s.lane.ws.wire.uncork(); err == nil {
		err = uerr
	}
	if err != nil {
		err = s.mapError(err)
	}
	return n, err
}

func (s *soloStream) mapError(err error) error {
	switch {
	case s.closed.Load():
		return net.ErrClosed
	case err == io.EOF:
		s.ended.Store(true)
		return io.EOF
	case errors.Is(err, os.ErrDeadlineExceeded):
		return os.ErrDeadlineExceeded
	}
	cause := lostError(err)
	if err == io.ErrUnexpectedEOF {
		cause = ErrLost
	}
	s.lane.endSolo(cause)
	return s.lane.failure()
}

// soloLinger is how long a closed solo lane waits for the peer to take what was
// written before and to close its side. A TCP connection closed with unread
// bytes in it is reset, which would destroy what is still under way.
const soloLinger = 5 * time.Second

// soloLingerBytes is how much a peer that does not look may send meanwhile.
const soloLingerBytes = 1 << 20

// Close ends the stream and its lane. It does not wait for the peer.
func (s *soloStream) Close() error {
	if s.closed.Swap(true) {
		return net.ErrClosed
	}
	l := s.lane
	_ = l.ws.wire.SetReadDeadline(past) // wake a Read of ours
	if !l.tunnel.spawn(func() {
		timer := time.AfterFunc(soloLinger, func() { l.fail(ErrClosed) })
		defer timer.Stop()
		_ = l.ws.wire.SetWriteDeadline(time.Now().Add(soloLinger))
		_ = l.tls.CloseWrite() // close_notify
		s.rmu.Lock()
		defer s.rmu.Unlock()
		_ = l.ws.wire.SetReadDeadline(time.Time{})
		buf := getChunk()
		for left := soloLingerBytes; left > 0; {
			n, err := l.tls.Read(buf.data[:32<<10])
			if left -= n; err != nil {
				break
			}
		}
		putChunk(buf)
		l.endSolo(ErrClosed)
	}) {
		l.endSolo(ErrClosed)
	}
	return nil
}

func (s *soloStream) LocalAddr() net.Addr  { return s.lane.ws.LocalAddr() }
func (s *soloStream) RemoteAddr() net.Addr { return s.lane.ws.RemoteAddr() }

func (s *soloStream) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

func (s *soloStream) SetReadDeadline(t time.Time) error {
	if s.closed.Load() {
		return net.ErrClosed
	}
	return s.lane.tls.SetReadDeadline(t)
}

// SetWriteDeadline ends the stream if a Write exceeds it: TLS cannot go on after
// a record that was cut.
func (s *soloStream) SetWriteDeadline(t time.Time) error {
	if s.closed.Load() {
		return net.ErrClosed
	}
	return s.lane.tls.SetWriteDeadline(t)
}

// endSolo ends a solo lane and forgets it.
func (l *lane) endSolo(cause error) {
	l.fail(cause)
	_ = l.ws.Close()
	l.tunnel.laneEnded(l)
}
