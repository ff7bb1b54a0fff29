package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The fence. A kernel's network namespace has a loopback device and nothing else:
// no wire leads out of it. Where the policy lets a kernel connect somewhere, routes
// in the namespace make those addresses local, a rule hands their TCP connections
// to a listener that the starter made there, and the starter dials on the host,
// after it has asked the rules again. So there is no forwarding and no address
// translation on the host, no change to its firewall, and nothing to clean up; and
// a connection of the kernel is seen by a dump as one within its namespace.
//
// It carries TCP. Names are answered by the fence itself (dns.go).

// Bounds of a fence.
const (
	// maxConnections is how many connections go out of one kernel at once; more
	// are reset. Each has two descriptors and two goroutines; bytes are spliced.
	maxConnections = 512
	dialTimeout    = 30 * time.Second
	// fencePort is where the rule hands connections to. No process of the kernel
	// can listen on it.
	fencePort = 1
)

type fence struct {
	rules  rules
	cancel context.CancelFunc
	ctx    context.Context
	wg     sync.WaitGroup
	slots  chan struct{}
	// resolver looks up allowed names; nil means the host's. A test may set it.
	resolver *net.Resolver

	mu      sync.Mutex
	closers map[io.Closer]struct{}
	closed  bool
}

// newFence sets up a kernel's network: in mode none, nothing.
func newFence(n Network, netns *os.File) (*fence, error) {
	f, err := plannedFence(n)
	if err != nil || n.Mode == NetworkNone {
		return nil, err
	}
	if err := f.open(netns); err != nil {
		f.close()
		return nil, fmt.Errorf("network %s: %w", n.Mode, err)
	}
	return f, nil
}

// plannedFence is a fence that is not open yet.
func plannedFence(n Network) (*fence, error) {
	allow, err := parseAllow(n.Allow)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &fence{
		rules: rules{mode: n.Mode, allow: allow, own: hostAddresses}, ctx: ctx, cancel: cancel,
		slots: make(chan struct{}, maxConnections), closers: map[io.Closer]struct{}{},
	}, nil
}

func (f *fence) open(netns *os.File) error {
	six, err := f.steer(netns)
	if err != nil {
		return err
	}
	addrs := []string{fmt.Sprintf("127.0.0.1:%d", fencePort)}
	if six {
		addrs = append(addrs, fmt.Sprintf("[::1]:%d", fencePort))
	}
	var listeners []net.Listener
	var names net.PacketConn
	var namesTCP net.Listener
	err = inNetNS(netns, func() error {
		config := net.ListenConfig{} // sockets are made on this thread
		for _, a := range addrs {
			l, err := config.Listen(f.ctx, "tcp", a)
			if err != nil {
				return err
			}
			f.keep(l)
			listeners = append(listeners, l)
		}
		var err error
		if names, err = config.ListenPacket(f.ctx, "udp4", resolverInside); err != nil {
			return err
		}
		f.keep(names)
		if namesTCP, err = config.Listen(f.ctx, "tcp4", resolverInside); err != nil {
			return err
		}
		f.keep(namesTCP)
		return nil
	})
	if err != nil {
		return err
	}
	for _, l := range listeners {
		f.wg.Go(func() { f.accept(l, f.relay) })
	}
	f.wg.Go(func() { f.accept(namesTCP, f.answerTCP) })
	f.wg.Go(func() { f.answerUDP(names) })
	return nil
}

// close ends the fence and every connection through it.
func (f *fence) close() {
	if f == nil {
		return
	}
	f.cancel()
	f.mu.Lock()
	f.closed = true
	for c := range f.closers {
		_ = c.Close()
	}
	f.mu.Unlock()
	f.wg.Wait()
}

// keep notes what close closes; false: it is closed already, and so is c.
func (f *fence) keep(c io.Closer) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		_ = c.Close()
		return false
	}
	f.closers[c] = struct{}{}
	return true
}

func (f *fence) drop(c io.Closer) {
	f.mu.Lock()
	delete(f.closers, c)
	f.mu.Unlock()
	_ = c.Close()
}

// accept serves a listener until close.
func (f *fence) accept(l net.Listener, serve func(*net.TCPConn)) {
	for {
		c, err := l.Accept()
		if f.ctx.Err() != nil {
			if err == nil {
				_ = c.Close()
			}
			return
		}
		if err != nil { // out of descriptors, perhaps
			select {
			case <-f.ctx.Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
			continue
		}
		conn := c.(*net.TCPConn) //nolint:errcheck // of a TCP listener
		select {
		case f.slots <- struct{}{}:
		default:
			reset(conn)
			continue
		}
		if !f.keep(conn) {
			return
		}
		f.wg.Go(func() {
			defer func() { <-f.slots }()
			defer f.drop(conn)
			serve(conn)
		})
	}
}

// reset closes a connection so that the kernel sees "connection reset".
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// relay carries one connection of the kernel to where it wanted to go.
func (f *fence) relay(in *net.TCPConn) {
	to, err := originalDestination(in)
	if err != nil {
		reset(in)
		return
	}
	out, err := f.dial(to)
	if err != nil {
		reset(in)
		return
	}
	if !f.keep(out) {
		return
	}
	defer f.drop(out)
	done := make(chan struct{})
	go func() {
		defer close(done)
		carry(out, in)
	}()
	carry(in, out)
	<-done
}

// carry copies one direction and passes its end on.
func carry(to, from *net.TCPConn) {
	if _, err := io.Copy(to, from); err != nil {
		reset(to)
		reset(from)
		return
	}
	_ = to.CloseWrite()
}

var errFenced = errors.New("not an allowed destination")

// dial connects on the host to what the kernel asked for, if it may.
func (f *fence) dial(to netip.AddrPort) (*net.TCPConn, error) {
	permits, target := f.rules.permits, to.String()
	if name, ok := f.rules.nameAt(to); ok {
		permits, target = f.rules.permitsNamed, net.JoinHostPort(name, fmt.Sprint(to.Port()))
	} else if !permits(to) {
		return nil, errFenced
	}
	d := net.Dialer{
		Timeout:  dialTimeout,
		Resolver: f.resolver,
		// Asked of every address of a name, right before the connection is made.
		ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
			a, err := netip.ParseAddrPort(address)
			if err != nil || !permits(a) {
				return errFenced
			}
			return nil
		},
	}
	c, err := d.DialContext(f.ctx, "tcp", target)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil //nolint:errcheck // it was dialed as that
}

// originalDestination is where a connection wanted to go before the rule changed
// it (netfilter's SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST, both 80).
func originalDestination(c *net.TCPConn) (netip.AddrPort, error) {
	const originalDst = 80
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	var to netip.AddrPort
	var failed error
	err = raw.Control(func(fd uintptr) {
		if a, ok := c.LocalAddr().(*net.TCPAddr); ok && a.IP.To4() == nil {
			var sa unix.RawSockaddrInet6
			failed = getsockopt(fd, unix.SOL_IPV6, originalDst, unsafe.Pointer(&sa), unsafe.Sizeof(sa))
			to = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), swap(sa.Port))
			return
		}
		var sa unix.RawSockaddrInet4
		failed = getsockopt(fd, unix.SOL_IP, originalDst, unsafe.Pointer(&sa), unsafe.Sizeof(sa))
		to = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), swap(sa.Port))
	})
	return to, errors.Join(err, failed)
}

// swap turns network order into this machine's, which is little endian.
func swap(port uint16) uint16 { return port<<8 | port>>8 }

func getsockopt(fd uintptr, level, name int, value unsafe.Pointer, size uintptr) error {
	length := uint32(size)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, uintptr(level), uintptr(name), uintptr(value), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
