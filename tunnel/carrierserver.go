package tunnel

import (
	"context"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"sync"
	"time"
)

// CarrierServer is the other side of a Carrier: it makes the connections for the
// lanes of one tunnel, and passes their bytes on, which are the inner TLS's to it.
// It holds no more than 64 KiB of each direction of a lane, and sockets' buffers.
// It is safe for concurrent use.
type CarrierServer struct {
	outer
	quiet time.Duration
}

// NewCarrierServer makes one. Its errors show nothing of c.
func NewCarrierServer(c CarrierConfig) (*CarrierServer, error) {
	u, err := parseURL(c.URL)
	if err != nil {
		return nil, err
	}
	def(&c.StepTimeout, 10*time.Second)
	def(&c.SoloQuiet, 20*time.Second)
	s := &CarrierServer{outer: newOuter(u, c.Header, c.StepTimeout), quiet: c.SoloQuiet}
	var proxy *url.URL
	if c.Proxy != "" {
		if proxy, err = url.Parse(c.Proxy); err != nil {
			return nil, errors.New("the proxy's URL cannot be parsed")
		}
	}
	s.proxy = func(*url.URL) (*url.URL, error) { return proxy, nil }
	for i, der := range c.OuterCAs {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("outer CA %d is malformed", i)
		}
		if s.roots == nil {
			s.roots = x509.NewCertPool()
		}
		s.roots.AddCert(cert)
	}
	return s, nil
}

// requestTime is how long the request of a connection may take to come.
const requestTime = 30 * time.Second

// Serve serves one connection that a Carrier's Open has made, a unix socket, until
// either of its sides ends or ctx does. It closes conn.
func (s *CarrierServer) Serve(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer conn.Close() //nolint:errcheck // whatever came of it
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(past) })
	defer stop()
	_ = conn.SetReadDeadline(time.Now().Add(requestTime))
	class, id, err := readCarrierRequest(conn)
	if err != nil {
		return
	}
	_ = conn.SetReadDeadline(time.Time{})
	agent := newWire(conn)
	ready := make(chan *wsConn, 1)
	var wg sync.WaitGroup
	upEnded := make(chan struct{})
	wg.Go(func() {
		defer cancel()
		defer close(upEnded)
		s.up(agent, ready)
	})
	defer wg.Wait()
	defer cancel() // before the wait
	defer close(ready)

	wc, err := s.answer(ctx, conn, class, id)
	if err != nil {
		return
	}
	ready <- wc
	if class == Solo {
		wg.Go(func() { s.keepSolo(ctx, wc) })
	}
	unblock := context.AfterFunc(ctx, func() { _ = wc.wire.Close() })
	defer unblock()
	s.down(wc, agent)
	_ = wc.Close()
	// As with TCP, what arrived last can be read, and what is written to nobody is
	// no error yet: why the other side has left stands in the former.
	if half, ok := conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		_ = conn.SetReadDeadline(time.Now().Add(takeLeave))
		<-upEnded
	}
}

// takeLeave is how long a tunnel may take to close a connection whose other side has
// left.
const takeLeave = 10 * time.Second

func readCarrierRequest(conn net.Conn) (Class, [idSize]byte, error) {
	var (
		id   [idSize]byte
		size [4]byte
		r    carrierRequest
	)
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return 0, id, err
	}
	n := binary.BigEndian.Uint32(size[:])
	if n > maxCarrierRequest {
		return 0, id, ErrProtocol
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(conn, b); err != nil {
		return 0, id, err
	}
	if err := json.Unmarshal(b, &r); err != nil || r.Class > Solo || len(r.Tunnel) != 2*idSize {
		return 0, id, ErrProtocol
	}
	if _, err := hex.Decode(id[:], []byte(r.Tunnel)); err != nil {
		return 0, id, ErrProtocol
	}
	return r.Class, id, nil
}

// answer makes the connection and tells the Carrier's side of it.
func (s *CarrierServer) answer(ctx context.Context, conn net.Conn, class Class, id [idSize]byte) (*wsConn, error) {
	a := newAttempt(ctx, s.stepTimeout)
	a.told = func() {
		if a.at != "" {
			_ = sayCarried(conn, carrierStep, carrierStepInfo{Step: a.at, Target: oneLine(a.where, maxCarrierText)})
		}
	}
	wc, rtt, derr := s.raise(a, class, id, nil)
	if !a.finish() || derr != nil {
		if derr == nil {
			derr = &DialError{Step: StepUpgrade, Target: s.target(), Err: ErrLost}
		}
		derr.Err = a.err(derr.Err)
		a.mu.Lock()
		if a.conn != nil {
			_ = a.conn.Close()
		}
		a.mu.Unlock()
		_ = sayCarried(conn, carrierResult, carrierAnswer{Error: encodeError(derr)})
		return nil, derr
	}
	err := sayCarried(conn, carrierResult, carrierAnswer{Local: wc.LocalAddr().String(), Remote: wc.RemoteAddr().String(), RTT: rtt})
	if err != nil {
		_ = wc.Close()
		return nil, err
	}
	return wc, nil
}

func sayCarried(w io.Writer, kind byte, what any) error {
	body, err := json.Marshal(what)
	if err != nil {
		return err
	}
	b := append([]byte{kind}, byte(len(body)>>8), byte(len(body)))
	_, err = w.Write(append(b, body...))
	return err
}

// up passes what the tunnel sends on, as much as there is in one message, until the
// tunnel closes the connection.
func (s *CarrierServer) up(agent *wire, ready <-chan *wsConn) {
	first, err := agent.chunk()
	wc, ok := <-ready
	if !ok {
		putChunk(first)
		return
	}
	left := false
	for c := first; err == nil; c, err = agent.chunk() {
		if !left {
			if _, werr := wc.Write(c.data[c.r:c.n]); werr != nil {
				left = true
				// What has arrived may say why: down reads it.
				timer := time.AfterFunc(readLast, func() { _ = wc.wire.Close() })
				defer timer.Stop()
			}
		}
		putChunk(c)
	}
}

// chunk waits for bytes and returns them, at most chunkSize-maxFrameHeader; the
// caller gives the chunk back.
func (w *wire) chunk() (*chunk, error) {
	if w.raw != nil {
		if err := w.fill(); err != nil {
			return nil, err
		}
		c := w.in
		w.in = nil
		return c, nil
	}
	c := getChunk()
	n, err := w.conn.Read(c.data[:chunkSize-maxFrameHeader])
	if c.n = n; n > 0 {
		return c, nil
	}
	putChunk(c)
	if err == nil {
		err = io.ErrNoProgress
	}
	return nil, err
}

// down passes what the acceptor sends on.
func (s *CarrierServer) down(wc *wsConn, agent *wire) {
	for {
		if err := wc.await(); err != nil {
			return
		}
		c := getChunk()
		n, err := wc.Read(c.data[:])
		if n > 0 {
			_, werr := agent.conn.Write(c.data[:n])
			if err == nil {
				err = werr
			}
		}
		putChunk(c)
		if err != nil {
			return
		}
	}
}

// keepSolo does for a solo lane what tickLane does where there is no Carrier.
func (s *CarrierServer) keepSolo(ctx context.Context, wc *wsConn) {
	every := min(s.quiet/4, pathTimeout/4)
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	var pings sync.WaitGroup
	defer pings.Wait()
	var rx, tx uint64
	var quiet, stuck time.Duration
	last := clock()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := clock()
		passed := now - last
		last = now
		if r, t := wc.wire.rx.Load(), wc.wire.tx.Load(); r != rx || t != tx {
			rx, tx, quiet, stuck = r, t, 0, 0
			continue
		}
		quiet += passed
		stuck += passed
		if stuck >= pathTimeout {
			stuck = 0
			if deadPath(wc.wire.conn, pathTimeout) {
				_ = wc.wire.Close()
				return
			}
		}
		if quiet >= s.quiet && !unacknowledged(wc.wire.conn) {
			quiet = 0
			pings.Go(func() {
				ping, cancel := context.WithTimeout(ctx, pingTime)
				defer cancel()
				_ = wc.ws.Ping(ping) // ends with its time, for want of a pong
			})
		}
	}
}
