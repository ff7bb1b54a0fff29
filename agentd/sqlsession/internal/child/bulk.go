package child

import (
	"errors"
	"io"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// bulkAfter is from how many rows on a result counts as long.
	bulkAfter = 10_000
	// bulkLow is how many bytes must wait in the socket before we are woken
	// up for them, in a long result. The server sends 8 KiB at a time, and to
	// wake up for each costs it and us more than the rows do.
	bulkLow = 128 << 10
	// bulkPause is how long less than that may wait. It is what a long result
	// may take longer at its end.
	bulkPause = 2 * time.Millisecond
)

// errQuiet is returned by fillBulk when nothing came for bulkPause.
var errQuiet = errors.New("nothing to read")

// bulkConn is how a long result is read: TCP without TLS has a low-water mark.
func bulkConn(conn net.Conn) syscall.RawConn {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}

// fillBulk is fill for a long result. It leaves the runtime's poller out and
// waits in poll(2), which heeds the low-water mark; what is below it is taken
// after bulkPause. No read deadline may be set.
func (c *wire) fillBulk() error {
	if c.r == c.w {
		c.r, c.w = 0, 0
	}
	var n int
	var failure error
	err := c.bulk.Read(func(fd uintptr) bool {
		if !c.low {
			failure = setLowWater(fd, bulkLow)
			c.low = failure == nil
		}
		if failure == nil {
			n, failure = pollRead(int(fd), c.in[c.w:])
		}
		if failure != nil && c.low {
			// Back to one byte: the runtime's poller must see every one.
			c.low = false
			failure = errors.Join(failure, setLowWater(fd, 1))
		}
		return true
	})
	c.w += n
	return errors.Join(err, failure)
}

// endBulk makes the connection fit for fill again.
func (c *wire) endBulk() error {
	if !c.low {
		return nil
	}
	c.low = false
	var failure error
	err := c.bulk.Control(func(fd uintptr) { failure = setLowWater(fd, 1) })
	return errors.Join(err, failure)
}

func setLowWater(fd uintptr, n int) error {
	return unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, n)
}

func pollRead(fd int, p []byte) (int, error) {
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	// Interrupted (the runtime's own signals) counts as the end of the pause.
	if _, err := unix.Poll(poll, int(bulkPause.Milliseconds())); err != nil && !errors.Is(err, unix.EINTR) {
		return 0, err
	}
	n, err := unix.Read(fd, p)
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		return 0, errQuiet
	case err != nil:
		return 0, err
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}
