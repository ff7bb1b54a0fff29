package tunnel

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"time"
)

// yamux's wire format (its spec.md): 12 bytes of header
// version, type, flags u16, stream id u32, length u32.
const (
	yamuxHeader = 12

	yamuxData   = 0
	yamuxWindow = 1
	yamuxPing   = 2
	yamuxGoAway = 3

	flagSYN = 1
	flagACK = 2
	flagFIN = 4
	flagRST = 8

	// yamuxWindowStart is the window that every yamux stream starts with.
	yamuxWindowStart = 256 << 10
	// yamuxWindowMax is the window that yamux believes in. Ours is always
	// below half of it (see flow.go), so yamux never runs out of its own.
	yamuxWindowMax = 128 << 20
)

// maxQueued bounds the link messages, resets and window updates that wait while
// the lane is stuck. A peer that makes us queue more is not reading its lane.
const maxQueued = 256 << 10

// mux stands between yamux and the inner TLS of one lane. Towards yamux it is
// the connection; it reads and rewrites yamux's frames as they pass:
//
//   - link messages are put between frames and taken out again;
//   - data is sent past yamux, whose hand-over of each frame to its send loop
//     costs more than the frame: stream.Write puts whole frames into a chunk that
//     one goroutine, started on demand, flushes, so that many small frames become
//     one TLS record and one system call; yamux itself sends only SYN, ACK, FIN;
//   - data is received past yamux as well, into the stream's inbox (receive.go),
//     where no lock is held while a frame trickles in;
//   - streams are counted, a peer's stream over the limit is reset before yamux
//     learns of it, a stray or late frame is dropped instead of logged, pings
//     (each would start a goroutine in yamux) are dropped;
//   - a FIN of the peer wakes this side's blocked writer: no half-close;
//   - bytes for a stream that this side has closed are dropped, not buffered;
//   - flow control is ours: yamux's own window updates are dropped, see flow.go.
type mux struct {
	lane  *lane
	inner io.ReadWriter // *tls.Conn in production
	wire  corker

	// Read side: used by yamux's receive loop only.
	rhdr   [yamuxHeader]byte
	rn     int     // bytes of rhdr filled
	body   uint64  // bytes of the current frame's body to come
	into   *stream // whose data the current body is; nil drops it
	msg    []byte  // payload of a link message being gathered
	msgTyp messageType
	spill  [64]byte // see Read: for callers with tiny buffers
	spillB []byte

	whdr [yamuxHeader]byte // of the frame being written by yamux's send loop
	wn   int

	mu      sync.Mutex
	cond    sync.Cond // end of a write to inner
	buf     *chunk    // whole frames to be flushed; nil when empty
	queue   []byte    // small frames that go before further data; never waits
	busy    bool      // someone is writing to inner
	waiters []*roomWaiter
	granted int // waiters that were woken and have not appended yet
	closed  bool
	streams map[uint32]*stream
	inbound int // streams opened by the peer and not yet gone
	werr    error
}

// corker is what mux needs of wire.
type corker interface {
	cork()
	uncork() error
}

func newMux(l *lane, inner io.ReadWriter, w corker) *mux {
	m := &mux{lane: l, inner: inner, wire: w, streams: make(map[uint32]*stream)}
	m.cond.L = &m.mu
	return m
}

// removeLocked forgets a stream that both sides have ended.
func (m *mux) removeLocked(s *stream) {
	if m.streams[s.id] != s {
		return
	}
	delete(m.streams, s.id)
	if s.accepted {
		m.inbound--
		m.lane.tunnel.releaseStream()
	} else {
		m.lane.tunnel.releaseOpened()
	}
	s.flow.release()
}

// Write takes yamux's frames, which are headers only: data is sent by writeData.
// It never waits for the lane.
func (m *mux) Write(p []byte) (int, error) {
	total := len(p)
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(p) > 0 {
		if m.werr != nil {
			return total - len(p), m.werr
		}
		n := copy(m.whdr[m.wn:], p)
		m.wn += n
		p = p[n:]
		if m.wn < yamuxHeader {
			break
		}
		m.wn = 0
		if m.outboundHeaderLocked() {
			if err := m.queueLocked(m.whdr[:]); err != nil {
				m.failLocked(err)
				return total - len(p), err
			}
		}
	}
	return total, m.werr
}

// outboundHeaderLocked rewrites the header that yamux wrote; false drops it.
func (m *mux) outboundHeaderLocked() bool {
	flags := binary.BigEndian.Uint16(m.whdr[2:])
	id := binary.BigEndian.Uint32(m.whdr[4:])
	if m.whdr[1] != yamuxWindow {
		return m.whdr[1] == yamuxGoAway
	}
	if flags == 0 {
		return false
	}
	s := m.streams[id]
	if flags&flagSYN != 0 && s == nil {
		s = newStream(m.lane, id, false)
		m.streams[id] = s
	}
	var grant uint32
	if s != nil && flags&(flagSYN|flagACK) != 0 && flags&(flagFIN|flagRST) == 0 {
		grant = s.flow.start()
	}
	binary.BigEndian.PutUint32(m.whdr[8:], grant)
	if s != nil && flags&(flagFIN|flagRST) != 0 {
		s.closed.Store(true)
		if s.ended.Load() || flags&flagRST != 0 {
			m.removeLocked(s)
		}
	}
	return true
}

// inlineBody is the size of a body that its writer sends itself, past the chunk,
// if nobody else is writing: one copy and one hand-over less.
const inlineBody = 16 << 10

// roomWaiter waits for its turn to append a frame.
type roomWaiter struct {
	need int
	ok   chan struct{}
}

// writeData sends one data frame of s with as much of p as its credit and the cap
// allow, and returns how much that was. 0 without an error means that there is no
// credit. Frames of several streams take turns.
func (m *mux) writeData(s *stream, p []byte, limit int) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := s.writable(); err != nil {
		return 0, err
	}
	n := int(min(int64(min(len(p), limit)), s.credit))
	if n <= 0 || m.werr != nil {
		return 0, m.werr
	}
	m.takeQueueLocked()
	need := yamuxHeader + n
	if len(m.waiters)+m.granted > 0 || !m.roomLocked(need) {
		w := &roomWaiter{need, make(chan struct{})}
		m.waiters = append(m.waiters, w)
		m.mu.Unlock()
		<-w.ok // closed by wakeLocked when there is room, or by the lane's end
		m.mu.Lock()
		m.granted--
		m.takeQueueLocked()
		if m.werr != nil {
			return 0, m.werr
		}
		if err := s.writable(); err != nil {
			m.wakeLocked()
			return 0, err
		}
		if n = int(min(int64(n), s.credit)); n <= 0 {
			m.wakeLocked()
			return 0, nil
		}
	}
	s.credit -= int64(n)
	if m.buf == nil {
		m.buf = getChunk()
	}
	hdr := appendYamux(m.buf.data[m.buf.n:m.buf.n], yamuxData, 0, s.id, uint32(n))
	m.buf.n += len(hdr)
	if n >= inlineBody && !m.busy {
		return n, m.inlineLocked(p[:n])
	}
	m.buf.append(p[:n])
	m.kickLocked()
	m.wakeLocked()
	return n, nil
}

// roomLocked reports whether a frame of that size may be appended now.
func (m *mux) roomLocked(need int) bool {
	return len(m.queue) == 0 && (m.buf == nil || m.buf.free() >= need)
}

// wakeLocked gives the next waiter its turn if there is room for it.
func (m *mux) wakeLocked() {
	for len(m.waiters) > 0 && (m.werr != nil || m.granted == 0 && m.roomLocked(m.waiters[0].need)) {
		w := m.waiters[0]
		m.waiters[0] = nil
		m.waiters = m.waiters[1:]
		m.granted++
		close(w.ok)
	}
	if len(m.waiters) == 0 {
		m.waiters = nil
	}
}

// inlineLocked writes the chunk, which ends in a header, and the body behind it.
func (m *mux) inlineLocked(body []byte) error {
	m.busy = true
	c := m.buf
	m.buf = nil
	m.mu.Unlock()
	m.wire.cork()
	_, err := m.inner.Write(c.data[:c.n])
	putChunk(c)
	if err == nil {
		_, err = m.inner.Write(body)
	}
	if uerr := m.wire.uncork(); err == nil {
		err = uerr
	}
	m.mu.Lock()
	m.busy = false
	m.failLocked(err)
	m.takeQueueLocked()
	m.wakeLocked()
	m.kickLocked()
	m.cond.Broadcast()
	return m.werr
}

// send queues whole frames of ours. It never waits for the lane.
func (m *mux) send(frame []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || m.werr != nil {
		return m.werr
	}
	if err := m.queueLocked(frame); err != nil {
		return err
	}
	m.kickLocked()
	return nil
}

// answer is send for the receive loop. On a lane without streams it writes at once
// instead of starting a goroutine: nothing can be in the way there, and thousands
// of idle tunnels do little else.
func (m *mux) answer(frame []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || m.werr != nil {
		return m.werr
	}
	if m.busy || m.buf != nil || len(m.queue) > 0 || len(m.streams) > 0 {
		return m.queueLocked(frame)
	}
	m.busy = true
	m.mu.Unlock()
	_, err := m.inner.Write(frame)
	m.mu.Lock()
	m.busy = false
	m.failLocked(err)
	m.takeQueueLocked()
	m.wakeLocked()
	m.kickLocked()
	m.cond.Broadcast()
	return nil
}

func (m *mux) queueLocked(frame []byte) error {
	if len(m.queue)+len(frame) > maxQueued {
		return fmt.Errorf("%w: the peer does not read its lane", ErrProtocol)
	}
	m.queue = append(m.queue, frame...)
	m.takeQueueLocked()
	m.kickLocked()
	return nil
}

// takeQueueLocked moves the queue to the chunk as far as there is room.
func (m *mux) takeQueueLocked() {
	if len(m.queue) == 0 {
		return
	}
	if m.buf == nil {
		m.buf = getChunk()
	}
	n := m.buf.append(m.queue)
	if n == len(m.queue) {
		m.queue = nil
		return
	}
	m.queue = m.queue[n:]
}

// kickLocked starts the flusher if there is something to flush and nobody does.
func (m *mux) kickLocked() {
	if m.busy || m.buf == nil || m.buf.n == 0 || m.werr != nil {
		return
	}
	m.busy = m.lane.tunnel.spawn(m.flush)
}

func (m *mux) flush() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushLocked()
}

// flushLocked writes chunk after chunk until there is nothing left. The caller
// has set busy; flushLocked clears it.
func (m *mux) flushLocked() {
	for m.buf != nil && m.buf.n > 0 && m.werr == nil {
		c := m.buf
		m.buf = nil
		m.mu.Unlock()
		m.wire.cork()
		_, err := m.inner.Write(c.data[:c.n])
		if uerr := m.wire.uncork(); err == nil {
			err = uerr
		}
		putChunk(c)
		m.mu.Lock()
		m.failLocked(err)
		m.takeQueueLocked()
		m.wakeLocked()
	}
	m.busy = false
	m.cond.Broadcast()
}

func (m *mux) failLocked(err error) {
	if err == nil || m.werr != nil {
		return
	}
	m.werr = err
	m.wakeLocked()
	m.cond.Broadcast()
	m.lane.failAsync(lostError(err))
}

// Close is called by yamux when its loops end.
func (m *mux) Close() error {
	m.lane.fail(ErrLost)
	return nil
}

// shut ends all waiting; the wire is closed already.
func (m *mux) shut() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	m.closed = true
	if m.werr == nil {
		m.werr = io.ErrClosedPipe
	}
	for _, s := range m.streams {
		m.removeLocked(s)
		s.laneGone()
	}
	m.wakeLocked()
	m.cond.Broadcast()
}

// sendWindow grants the peer more credit for a stream.
func (m *mux) sendWindow(id, grant uint32) error {
	var b [yamuxHeader]byte
	return m.send(appendYamux(b[:0], yamuxWindow, 0, id, grant))
}

// dropIfEnded forgets a stream that this side has just closed if the peer closed
// it before.
func (m *mux) dropIfEnded(s *stream) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if s.ended.Load() {
		m.removeLocked(s)
	}
}

// drain waits until everything queued was written to the connection, at most for
// limit.
func (m *mux) drain(limit time.Duration) {
	late := false
	timer := time.AfterFunc(limit, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		late = true
		m.cond.Broadcast()
	})
	defer timer.Stop()
	m.mu.Lock()
	defer m.mu.Unlock()
	for !late && m.werr == nil && (m.busy || m.buf != nil && m.buf.n > 0 || len(m.queue) > 0) {
		m.cond.Wait()
	}
}

// find returns the stream that the filter registered for id.
func (m *mux) find(id uint32) *stream {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.streams[id]
}

// count returns the number of streams that are not yet gone on both sides.
func (m *mux) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.streams)
}

func appendYamux(b []byte, typ byte, flags uint16, id, length uint32) []byte {
	b = append(b, 0, typ)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint32(b, id)
	return binary.BigEndian.AppendUint32(b, length)
}
