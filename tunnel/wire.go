package tunnel

import (
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// wire is the connection beneath a lane's WebSocket: TCP, or the outer TLS.
//
// Writes: coder/websocket flushes 4 KiB at a time on the client and once per
// message; crypto/tls once per record. Between cork and uncork wire gathers all
// that into one write per 64 KiB. This is the largest single saving of CPU.
//
// Reads: on bare TCP it waits for bytes without holding a buffer, then takes a
// pooled one and reads as much as there is, so an idle lane pins nothing.
//
// Deadlines: net/http interrupts a pending Read by a deadline in the past on
// every request. coder/websocket and crypto/tls survive that only between two
// WebSocket frames, so wire follows the frames and delays a read deadline that
// falls into one until the frame is whole.
type wire struct {
	conn net.Conn
	raw  syscall.RawConn // nil if conn is neither bare TCP nor a unix socket

	rx, tx atomic.Uint64 // bytes on the connection
	rxAt   atomic.Int64  // clock when the last arrived: what liveness looks at

	// Read side; one reader at a time.
	early  []byte // read together with the HTTP header
	in     *chunk
	readFn func(fd uintptr) bool
	readN  int
	readE  error
	frames *frameTracker // nil before the WebSocket starts

	// local and remote are what the connection's own addresses stand for; nil if
	// they are those themselves.
	local, remote net.Addr

	dmu      sync.Mutex
	deadline time.Time // as asked for
	held     bool      // the connection's own deadline is maxHold until the frame ends

	wmu    sync.Mutex
	out    *chunk
	corked bool
	wrErr  error
}

func newWire(conn net.Conn) *wire {
	w := &wire{conn: conn}
	w.rxAt.Store(int64(clock()))
	switch conn.(type) {
	case *net.TCPConn, *net.UnixConn:
		if raw, err := conn.(syscall.Conn).SyscallConn(); err == nil {
			w.raw = raw
			w.readFn = w.tryRead
		}
	}
	return w
}

// startFrames tells wire that what follows, early first, are WebSocket frames.
func (w *wire) startFrames(early []byte) {
	w.early = early
	w.frames = &frameTracker{}
}

func (w *wire) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		n, err := w.read(p)
		if n > 0 {
			if w.frames != nil {
				w.frames.advance(p[:n])
			}
			return n, nil
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || w.frames == nil || w.frames.boundary() {
			return 0, err
		}
		if w.held { // the rest of the frame did not come
			return 0, errTornFrame
		}
		w.holdDeadline()
	}
}

// read reads some bytes or fails, with the deadline in force.
func (w *wire) read(p []byte) (int, error) {
	if len(w.early) > 0 {
		n := copy(p, w.early)
		if w.early = w.early[n:]; len(w.early) == 0 {
			w.early = nil
		}
		return n, nil
	}
	w.applyDeadline()
	if w.raw == nil {
		n, err := w.conn.Read(p)
		w.received(n)
		return n, err
	}
	if w.in == nil {
		if err := w.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, w.in.data[w.in.r:w.in.n])
	if w.in.r += n; w.in.r == w.in.n {
		putChunk(w.in)
		w.in = nil
	}
	return n, nil
}

// fill waits for bytes and takes what there is into w.in.
func (w *wire) fill() error {
	w.readN, w.readE = 0, nil
	if err := w.raw.Read(w.readFn); err != nil {
		return err
	}
	if w.readE != nil {
		return w.readE
	}
	w.received(w.readN)
	return nil
}

func (w *wire) received(n int) {
	if n > 0 {
		w.rx.Add(uint64(n))
		w.rxAt.Store(int64(clock()))
	}
}

// tryRead runs inside RawConn.Read: false means wait until readable.
func (w *wire) tryRead(fd uintptr) bool {
	c := getChunk()
	for {
		n, err := syscall.Read(int(fd), c.data[:chunkSize-maxFrameHeader])
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN:
			putChunk(c)
			return false
		case err != nil:
			putChunk(c)
			w.readE = os.NewSyscallError("read", err)
		case n == 0:
			putChunk(c)
			w.readE = io.EOF
		default:
			c.n, w.in, w.readN = n, c, n
		}
		return true
	}
}

// SetReadDeadline has the meaning of net.Conn, except that a deadline which
// falls into a WebSocket frame is kept until the frame is whole.
func (w *wire) SetReadDeadline(t time.Time) error {
	w.dmu.Lock()
	defer w.dmu.Unlock()
	w.deadline = t
	if w.held {
		return nil
	}
	return w.conn.SetReadDeadline(t)
}

// maxHold is how long a read deadline waits for the end of a frame; then the lane
// is broken.
const maxHold = 5 * time.Second

var errTornFrame = fmt.Errorf("%w: the rest of a frame did not come within %v", ErrLost, maxHold)

func (w *wire) holdDeadline() {
	w.dmu.Lock()
	defer w.dmu.Unlock()
	w.held = true
	_ = w.conn.SetReadDeadline(time.Now().Add(maxHold))
}

func (w *wire) applyDeadline() {
	if !w.held || (w.frames != nil && !w.frames.boundary()) { // held is written by the reader only
		return
	}
	w.dmu.Lock()
	defer w.dmu.Unlock()
	w.held = false
	_ = w.conn.SetReadDeadline(w.deadline)
}

// SetWriteDeadline is that of net.Conn. A write that times out breaks the lane.
func (w *wire) SetWriteDeadline(t time.Time) error { return w.conn.SetWriteDeadline(t) }

// Write writes p, or gathers it while the wire is corked.
func (w *wire) Write(p []byte) (int, error) {
	w.wmu.Lock()
	defer w.wmu.Unlock()
	if w.wrErr != nil {
		return 0, w.wrErr
	}
	if !w.corked && w.out == nil {
		return w.writeLocked(p)
	}
	for rest := p; len(rest) > 0; {
		if w.out == nil {
			w.out = getChunk()
		}
		n := w.out.append(rest)
		if rest = rest[n:]; w.out.free() == 0 {
			if err := w.flushLocked(); err != nil {
				return len(p) - len(rest), err
			}
		}
	}
	return len(p), nil
}

// writeFrame writes a frame's header and payload, masked with key unless that is
// nil, in one piece: nothing of another writer comes between.
func (w *wire) writeFrame(hdr, p, key []byte) (int, error) {
	w.wmu.Lock()
	defer w.wmu.Unlock()
	if w.wrErr != nil {
		return 0, w.wrErr
	}
	if w.out == nil {
		w.out = getChunk()
	}
	if w.out.free() < len(hdr) {
		if err := w.flushLocked(); err != nil {
			return 0, err
		}
		w.out = getChunk()
	}
	w.out.append(hdr)
	for done := 0; done < len(p); {
		if w.out == nil {
			w.out = getChunk()
		}
		c := w.out
		n := min(c.free(), len(p)-done)
		if key == nil {
			copy(c.data[c.n:], p[done:done+n])
		} else {
			maskInto(c.data[c.n:c.n+n], p[done:done+n], key, done)
		}
		c.n += n
		if done += n; c.free() == 0 {
			if err := w.flushLocked(); err != nil {
				return done, err
			}
		}
	}
	if w.corked {
		return len(p), nil
	}
	return len(p), w.flushLocked()
}

// maskBlock is how many bytes are masked at a time.
const maskBlock = 1 << 10

// maskInto copies p, which starts at offset of its frame, masked to dst. It is not
// inlined so that its block does not widen the stacks of idle receive loops, which
// write pongs.
//
//go:noinline
func maskInto(dst, p, key []byte, offset int) {
	var pattern [maskBlock]byte
	for i := range key {
		pattern[i] = key[(offset+i)%len(key)]
	}
	for n := len(key); n < min(maskBlock, len(p)); n *= 2 {
		copy(pattern[n:], pattern[:n])
	}
	for len(p) > 0 { // blocks start at multiples of the key's length
		n := subtle.XORBytes(dst, p[:min(len(p), maskBlock)], pattern[:])
		dst, p = dst[n:], p[n:]
	}
}

func (w *wire) cork() {
	w.wmu.Lock()
	w.corked = true
	w.wmu.Unlock()
}

func (w *wire) uncork() error {
	w.wmu.Lock()
	defer w.wmu.Unlock()
	w.corked = false
	return w.flushLocked()
}

func (w *wire) flushLocked() error {
	if w.out == nil {
		return w.wrErr
	}
	c := w.out
	w.out = nil
	defer putChunk(c)
	if w.wrErr == nil && c.n > 0 {
		_, _ = w.writeLocked(c.data[:c.n])
	}
	return w.wrErr
}

func (w *wire) writeLocked(p []byte) (int, error) {
	n, err := w.conn.Write(p)
	w.tx.Add(uint64(n))
	if err != nil {
		w.wrErr = err
	}
	return n, err
}

// Close closes the connection; it unblocks Read and Write. It does not take leave
// of an outer TLS, which could wait for a full socket.
func (w *wire) Close() error {
	if tc, ok := w.conn.(*tls.Conn); ok {
		return tc.NetConn().Close()
	}
	return w.conn.Close()
}

// LocalAddr and RemoteAddr are those of the TCP connection.
func (w *wire) LocalAddr() net.Addr {
	if w.local != nil {
		return w.local
	}
	return w.conn.LocalAddr()
}

func (w *wire) RemoteAddr() net.Addr {
	if w.remote != nil {
		return w.remote
	}
	return w.conn.RemoteAddr()
}

func (w *wire) SetDeadline(t time.Time) error {
	return errors.Join(w.SetReadDeadline(t), w.SetWriteDeadline(t))
}

// frameTracker follows RFC 6455 frames (section 5.2) as their bytes pass.
type frameTracker struct {
	hdr  [14]byte
	n    int    // bytes of the header seen
	left uint64 // bytes of the payload to come
}

// boundary reports whether the bytes seen end exactly at the end of a frame.
func (f *frameTracker) boundary() bool { return f.n == 0 && f.left == 0 }

func (f *frameTracker) advance(p []byte) {
	for len(p) > 0 {
		if f.left > 0 {
			n := min(f.left, uint64(len(p)))
			f.left -= n
			p = p[n:]
			continue
		}
		f.hdr[f.n] = p[0]
		f.n++
		p = p[1:]
		if f.n < 2 {
			continue
		}
		need, l7 := 2, int(f.hdr[1]&0x7f)
		switch l7 {
		case 126:
			need += 2
		case 127:
			need += 8
		}
		ext := need
		if f.hdr[1]&0x80 != 0 {
			need += 4
		}
		if f.n < need {
			continue
		}
		f.left = uint64(l7)
		if l7 > 125 {
			f.left = 0
			for _, b := range f.hdr[2:ext] {
				f.left = f.left<<8 | uint64(b)
			}
		}
		f.n = 0
	}
}
