package tunnel

import (
	"crypto/tls"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// unsentMax bounds the bytes that wait in the kernel unsent. It is not
// SO_SNDBUF, which would cap a long path's bytes in flight as well.
const unsentMax = 128 << 10

// tuneTCP sets what a lane needs on the TCP connection below conn. Errors are
// ignored: an old kernel or a connection that is no TCP works, only less well.
func tuneTCP(conn net.Conn, class Class) {
	tcp := tcpBelow(conn)
	if tcp == nil {
		return
	}
	_ = tcp.SetNoDelay(true)
	_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3})
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, unsentMax)
		// The kernel counts a closed window as no progress, so on a solo lane,
		// whose reader may pause for as long as it likes, this would cut a
		// healthy stream. Multiplexed lanes are always read.
		if class != Solo {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(20*time.Second/time.Millisecond))
		}
	})
}

// deadPath reports whether the kernel has waited for an acknowledgement of sent
// bytes for longer than limit. A peer that keeps its window closed acknowledges.
func deadPath(conn net.Conn, limit time.Duration) bool {
	tcp := tcpBelow(conn)
	if tcp == nil {
		return false
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return false
	}
	dead := false
	_ = raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		dead = err == nil && info.Unacked > 0 && time.Duration(info.Last_ack_recv)*time.Millisecond > limit
	})
	return dead
}

// unacknowledged reports whether sent bytes wait to be sent or acknowledged.
func unacknowledged(conn net.Conn) bool {
	tcp := tcpBelow(conn)
	if tcp == nil {
		return false
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return true
	}
	n := 0
	_ = raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	return err != nil || n > 0
}

func tcpBelow(conn net.Conn) *net.TCPConn {
	for {
		switch c := conn.(type) {
		case *net.TCPConn:
			return c
		case *tls.Conn:
			conn = c.NetConn()
		case interface{ NetConn() net.Conn }:
			conn = c.NetConn()
		default:
			return nil
		}
	}
}
