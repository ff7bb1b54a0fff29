package tunneltest

import (
	"context"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/tunnel"
)

// Carrier is a tunnel.Carrier in the process of the test: what an uplink does, without
// a process of its own. Start is for DialConfig.Carrier.
type Carrier struct {
	// OuterCAs are trusted for the outer TLS, in DER.
	OuterCAs [][]byte
	// Between, if not nil, may wrap the carrier's end of each connection: a hostile
	// carrier does there what it likes.
	Between func(net.Conn) net.Conn
	// Deaf accepts connections and does nothing with them, as a stopped process.
	Deaf bool

	started, lost atomic.Int32
	wg            sync.WaitGroup
}

// NewCarrier makes a Carrier whose goroutines the end of the test waits for.
func NewCarrier(t testing.TB) *Carrier {
	c := &Carrier{}
	t.Cleanup(c.wg.Wait)
	return c
}

// Started is how often Start was called, Lost how often its result was given up as
// something that hangs.
func (c *Carrier) Started() int { return int(c.started.Load()) }

// Lost is described at Started.
func (c *Carrier) Lost() int { return int(c.lost.Load()) }

// Start is for DialConfig.Carrier.
func (c *Carrier) Start(config tunnel.CarrierConfig) (tunnel.Carrier, error) {
	config.OuterCAs = c.OuterCAs
	s, err := tunnel.NewCarrierServer(config)
	if err != nil {
		return nil, err
	}
	c.started.Add(1)
	o := &oneCarrier{c: c, s: s}
	o.ctx, o.cancel = context.WithCancel(context.Background())
	return o, nil
}

type oneCarrier struct {
	c      *Carrier
	s      *tunnel.CarrierServer
	ctx    context.Context
	cancel context.CancelFunc
	once   sync.Once
}

// Open implements tunnel.Carrier.
func (o *oneCarrier) Open(context.Context) (net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "carrier")
		ends[i] = must(net.FileConn(f))
		_ = f.Close()
	}
	if o.c.Deaf {
		context.AfterFunc(o.ctx, func() { _ = ends[1].Close() })
		return ends[0], nil
	}
	theirs := ends[1]
	if o.c.Between != nil {
		theirs = o.c.Between(theirs)
	}
	o.c.wg.Go(func() { o.s.Serve(o.ctx, theirs) })
	return ends[0], nil
}

// Close implements tunnel.Carrier.
func (o *oneCarrier) Close(lost bool) {
	if lost {
		o.once.Do(func() { o.c.lost.Add(1) })
		o.cancel()
	}
}
