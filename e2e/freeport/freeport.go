package freeport

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"syscall"
)

// The range is below net.ipv4.ip_local_port_range (32768 to 60999 unless somebody changed it)
// and has none of the well-known servers' ports.
const (
	lowest = 20000
	count  = 10000
	tries  = 100
)

// TCP is a port of 127.0.0.1 on which nobody listens just now, 20000 to 29999. The error is that
// of the last try.
func TCP() (int, error) {
	return find(func(address string) error {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		return l.Close()
	})
}

// UDP is the same for UDP.
func UDP() (int, error) {
	return find(func(address string) error {
		c, err := net.ListenPacket("udp", address)
		if err != nil {
			return err
		}
		return c.Close()
	})
}

// Address is 127.0.0.1 with a port of TCP's, as host:port.
func Address() (string, error) {
	port, err := TCP()
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), err
}

func find(try func(address string) error) (int, error) {
	var err error
	for range tries {
		port := lowest + rand.IntN(count)
		if err = try(net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil {
			return port, nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	return 0, fmt.Errorf("no free port of 127.0.0.1: %w", err)
}
