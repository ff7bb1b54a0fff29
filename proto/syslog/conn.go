package syslog

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// dialTime bounds a connection with its handshake, writeTime the sending of a message, ackTime the
	// server's kernel taking what was sent.
	dialTime  = 15 * time.Second
	writeTime = 30 * time.Second
	ackTime   = time.Minute
	// ackPoll is how often it is looked.
	ackPoll = 5 * time.Millisecond
	// datagramPause follows each datagramBurst datagrams of UDP: no more than some 5,000 a second, which
	// servers' buffers bear.
	datagramBurst = 50
	datagramPause = 10 * time.Millisecond
)

// A conn is a connection to a server.
type conn struct {
	net.Conn
	raw     syscall.Conn // below TLS
	stream  bool
	paced   bool
	sent    int
	reading sync.WaitGroup
	// gone is closed when a stream's server has hung up.
	gone chan struct{}
}

func (c *Config) dial(ctx context.Context) (*conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	network := c.Target.Network
	if network == "tls" {
		network = "tcp"
	}
	plain, err := (&net.Dialer{KeepAlive: 15 * time.Second}).DialContext(ctx, network, c.Target.Address)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", c.Target, plainError(err))
	}
	raw, ok := plain.(syscall.Conn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("connect to %s: no descriptor", c.Target), plain.Close())
	}
	out := &conn{Conn: plain, raw: raw, stream: network == "tcp", paced: network == "udp", gone: make(chan struct{})}
	if c.Target.Network == "tls" {
		config, err := c.TLS()
		if err != nil {
			return nil, errors.Join(err, plain.Close())
		}
		config = config.Clone()
		config.MinVersion = max(config.MinVersion, tls.VersionTLS12)
		if config.ServerName == "" {
			config.ServerName, _, _ = net.SplitHostPort(c.Target.Address) //nolint:errcheck // ParseTarget made it
		}
		secure := tls.Client(plain, config)
		if err := secure.HandshakeContext(ctx); err != nil {
			return nil, errors.Join(fmt.Errorf("connect to %s: %w", c.Target, err), plain.Close())
		}
		out.Conn = secure
	}
	if out.stream {
		// A server has nothing to say; what is read is the end of the connection.
		out.reading.Go(func() {
			defer close(out.gone)
			io.Copy(io.Discard, out.Conn) //nolint:errcheck // any end is the end
		})
	}
	return out, nil
}

// plainError is an error of the network without the address, which is said already.
func plainError(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// send sends a message; ctx cuts it short.
func (c *conn) send(ctx context.Context, message []byte) error {
	if err := c.SetWriteDeadline(time.Now().Add(writeTime)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	if c.stream {
		message = frame(message)
	}
	if _, err := c.Write(message); err != nil {
		return fmt.Errorf("send: %w", plainError(err))
	}
	if c.sent++; c.paced && c.sent%datagramBurst == 0 {
		time.Sleep(datagramPause)
	}
	return nil
}

// settled waits until the server's kernel has what was sent on a stream.
func (c *conn) settled(ctx context.Context) error {
	if !c.stream {
		return nil
	}
	deadline := time.Now().Add(ackTime)
	for {
		left := 0
		var err error
		raw, rerr := c.raw.SyscallConn()
		if rerr == nil {
			rerr = raw.Control(func(fd uintptr) { left, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
		}
		switch {
		case errors.Join(rerr, err) != nil:
			return fmt.Errorf("ask what the server has: %w", errors.Join(rerr, err))
		case left == 0:
			return c.alive()
		case time.Now().After(deadline):
			return fmt.Errorf("the server took nothing for %v", ackTime)
		}
		select {
		case <-time.After(ackPoll):
		case <-c.gone:
			return errHungUp
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

var errHungUp = errors.New("the server closed the connection")

// alive is errHungUp if the server has hung up, which the kernel knows before who reads does.
func (c *conn) alive() error {
	select {
	case <-c.gone:
		return errHungUp
	default:
	}
	if !c.stream {
		return nil
	}
	const established = 1 // TCP_ESTABLISHED
	state := uint8(established)
	if raw, err := c.raw.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			if info, err := unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO); err == nil {
				state = info.State
			}
		})
	}
	if state != established {
		return errHungUp
	}
	return nil
}

func (c *conn) close() {
	if c == nil {
		return
	}
	_ = c.Close()
	c.reading.Wait()
}
