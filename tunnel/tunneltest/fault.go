package tunneltest

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/postern-dev/postern/tunnel"
)

// Fault is what goes wrong on the connections beneath the WebSockets of one end.
// Kernel buffers hide stalls from tests that only disturb the network; this
// disturbs the calls themselves. Zero values leave a connection alone.
type Fault struct {
	// Class limits the fault to lanes of one class; nil means all. The accepting
	// side does not know the class yet and always says Control.
	Class *tunnel.Class

	OneByteReads    bool          // every Read returns one byte
	StallReadAfter  int64         // Reads block after this many bytes, until Close
	StallWriteAfter int64         // Writes block after this many bytes, until Close
	FailReadAfter   int64         // Reads fail after this many bytes
	ShortWrites     int           // Writes reach the connection in pieces of this size
	DelayClose      time.Duration // Close returns that much later; Read and Write end at once

	armed atomic.Bool
}

// Arm makes the byte limits count from now on: bytes before are free. Until then
// they do not apply.
func (f *Fault) Arm() { f.armed.Store(true) }

// Hook is for Config.TestHookConn.
func (f *Fault) Hook(class tunnel.Class, conn net.Conn) net.Conn {
	if f.Class != nil && *f.Class != class {
		return conn
	}
	return &faultConn{Conn: conn, f: f, closed: make(chan struct{})}
}

type faultConn struct {
	net.Conn
	f      *Fault
	rd, wr atomic.Int64
	once   sync.Once
	closed chan struct{}

	readBy, writeBy atomic.Int64 // deadlines in Unix nanoseconds; 0 is none
}

// stall waits until Close or until the deadline, which may change meanwhile.
func (c *faultConn) stall(by *atomic.Int64) error {
	ticker := time.NewTicker(2 * time.Millisecond)
	defer ticker.Stop()
	for {
		if t := by.Load(); t != 0 && time.Now().UnixNano() >= t {
			return os.ErrDeadlineExceeded
		}
		select {
		case <-c.closed:
			return net.ErrClosed
		case <-ticker.C:
		}
	}
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func (c *faultConn) SetReadDeadline(t time.Time) error {
	c.readBy.Store(nanos(t))
	return c.Conn.SetReadDeadline(t)
}

func (c *faultConn) SetWriteDeadline(t time.Time) error {
	c.writeBy.Store(nanos(t))
	return c.Conn.SetWriteDeadline(t)
}

func (c *faultConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// NetConn lets socket options reach the TCP connection.
func (c *faultConn) NetConn() net.Conn { return c.Conn }

func (c *faultConn) Read(p []byte) (int, error) {
	if c.f.OneByteReads && len(p) > 1 {
		p = p[:1]
	}
	if c.f.armed.Load() {
		if limit := c.f.StallReadAfter; limit > 0 {
			left := limit - c.rd.Load()
			if left <= 0 {
				return 0, c.stall(&c.readBy)
			}
			p = p[:min(int64(len(p)), left)]
		}
		if limit := c.f.FailReadAfter; limit > 0 {
			left := limit - c.rd.Load()
			if left <= 0 {
				_ = c.Conn.Close()
				return 0, &net.OpError{Op: "read", Net: "tcp", Err: net.ErrClosed}
			}
			p = p[:min(int64(len(p)), left)]
		}
	}
	n, err := c.Conn.Read(p)
	if c.f.armed.Load() {
		c.rd.Add(int64(n))
	}
	return n, err
}

func (c *faultConn) Write(p []byte) (int, error) {
	total := 0
	for len(p) > 0 {
		q := p
		if c.f.ShortWrites > 0 {
			q = q[:min(len(q), c.f.ShortWrites)]
		}
		if limit := c.f.StallWriteAfter; limit > 0 && c.f.armed.Load() {
			left := limit - c.wr.Load()
			if left <= 0 {
				return total, c.stall(&c.writeBy)
			}
			q = q[:min(int64(len(q)), left)]
		}
		n, err := c.Conn.Write(q)
		total += n
		if c.f.armed.Load() {
			c.wr.Add(int64(n))
		}
		if err != nil {
			return total, err
		}
		p = p[n:]
	}
	return total, nil
}

func (c *faultConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	err := c.Conn.Close()
	time.Sleep(c.f.DelayClose)
	return err
}
