package tunnel_test

import (
	"net"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

// impatient is a connection that ends when it is silent, as behind nginx.
type impatient struct {
	net.Conn
	mu    sync.Mutex
	timer *time.Timer
	after time.Duration
}

func newImpatient(conn net.Conn, after time.Duration) net.Conn {
	return &impatient{Conn: conn, after: after, timer: time.AfterFunc(after, func() { _ = conn.Close() })}
}

func (c *impatient) moved(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n > 0 && c.timer.Stop() {
		c.timer.Reset(c.after)
	}
}

func (c *impatient) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.moved(n)
	return n, err
}

func (c *impatient) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.moved(n)
	return n, err
}

func (c *impatient) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.timer.Stop()
	return c.Conn.Close()
}

// The same where a Carrier makes the connection: it is the one that pings.
func TestCarrierKeepsSilentStreamsOpen(t *testing.T) {
	const patience = time.Second
	c := tunneltest.NewCarrier(t)
	d, a := tunneltest.Pair(t, carried(c), tunneltest.WithDial(func(c *tunnel.DialConfig) { c.SoloQuiet = 100 * time.Millisecond }), tunneltest.WithServer(func(c *tunnel.ServerConfig) {
		c.SoloQuiet = time.Hour
		c.TestHookConn = func(_ tunnel.Class, conn net.Conn) net.Conn { return newImpatient(conn, patience) }
	}), tunneltest.WithConfig(func(c *tunnel.Config) { c.Heartbeat = 80 * time.Millisecond }))
	echoOn(t, a)
	conn := open(t, d, tunnel.Solo)
	exchange(t, conn, 1000)
	time.Sleep(2 * patience) // the silence itself
	exchange(t, conn, 1000)
}

// A stream that is in use and silent outlives what ends silent connections on the
// way, whatever its class.
func TestSilentStreamsAreKeptOpen(t *testing.T) {
	const patience = time.Second // more than DeadAfter, when a bulk lane is asked
	for _, class := range classes {
		t.Run(class.String(), func(t *testing.T) {
			d, a := tunneltest.Pair(t, tunneltest.WithConfig(func(c *tunnel.Config) {
				c.Heartbeat, c.DeadAfter, c.SoloQuiet = 80*time.Millisecond, 400*time.Millisecond, 100*time.Millisecond
			}), tunneltest.WithDial(func(c *tunnel.DialConfig) {
				c.TestHookConn = func(_ tunnel.Class, conn net.Conn) net.Conn { return newImpatient(conn, patience) }
			}))
			echoOn(t, a)
			conn := open(t, d, class)
			exchange(t, conn, 1000)
			time.Sleep(3 * patience) // the silence itself
			exchange(t, conn, 1000)
			if err := d.Err(); err != nil {
				t.Errorf("the tunnel ended: %v", err)
			}
		})
	}
}
