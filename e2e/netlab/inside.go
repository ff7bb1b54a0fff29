package netlab

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// inside runs f with the network of a namespace. f must not start goroutines
// that need it: they run on other threads. Sockets stay where they were made.
func inside(ns string, f func() error) error {
	result := make(chan error, 1)
	go func() { // on a thread of its own, that ends if it cannot go back
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			runtime.UnlockOSThread()
			result <- err
			return
		}
		defer home.Close() //nolint:errcheck // only read
		there, err := os.Open(nsPath(ns))
		if err != nil {
			runtime.UnlockOSThread()
			result <- err
			return
		}
		defer there.Close() //nolint:errcheck // only read
		if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			result <- fmt.Errorf("enter network namespace %s: %w", ns, err)
			return
		}
		err = f()
		if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back == nil {
			runtime.UnlockOSThread()
		}
		result <- err
	}()
	return <-result
}

// Dial connects to an IP address and port from within a namespace.
func Dial(ctx context.Context, ns, address string) (conn net.Conn, err error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if net.ParseIP(host) == nil {
		return nil, errors.New("netlab: no names are looked up: give an IP address")
	}
	ierr := inside(ns, func() error {
		conn, err = new(net.Dialer).DialContext(ctx, "tcp", address)
		return nil
	})
	if ierr != nil {
		return nil, ierr
	}
	return conn, err
}

// Dialer is Dial with the signature of http.Transport's DialContext.
func Dialer(ns string) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, _, address string) (net.Conn, error) { return Dial(ctx, ns, address) }
}

// Listen listens on an address within a namespace.
func Listen(ns, address string) (l net.Listener, err error) {
	ierr := inside(ns, func() error {
		l, err = net.Listen("tcp", address)
		return nil
	})
	if ierr != nil {
		return nil, ierr
	}
	return l, err
}

// ListeningTCP returns the address of every TCP socket that listens in a
// namespace, of any process, IPv4 and IPv6.
func ListeningTCP(ns string) ([]string, error) {
	var tables []string
	err := inside(ns, func() error {
		for _, name := range []string{"tcp", "tcp6"} {
			text, err := os.ReadFile("/proc/thread-self/net/" + name)
			if err != nil && !(name == "tcp6" && errors.Is(err, os.ErrNotExist)) {
				return err
			}
			tables = append(tables, string(text))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var addresses []string
	for _, table := range tables {
		found, err := listening(table)
		if err != nil {
			return nil, err
		}
		addresses = append(addresses, found...)
	}
	return addresses, nil
}

// stateListen is TCP_LISTEN in /proc/net/tcp.
const stateListen = "0A"

// listening reads /proc/net/tcp or tcp6.
func listening(table string) ([]string, error) {
	var addresses []string
	for i, line := range strings.Split(strings.TrimSpace(table), "\n") {
		fields := strings.Fields(line)
		if i == 0 || len(fields) < 4 || fields[3] != stateListen {
			continue // the heading, or something else than a listener
		}
		address, port, ok := strings.Cut(fields[1], ":")
		ip, err := hex.DecodeString(address)
		number, perr := strconv.ParseUint(port, 16, 16)
		if !ok || err != nil || perr != nil || len(ip)%4 != 0 {
			return nil, fmt.Errorf("unexpected line in /proc/net/tcp: %q", line)
		}
		for w := 0; w < len(ip); w += 4 { // words in host order, little-endian on what we run on
			ip[w], ip[w+1], ip[w+2], ip[w+3] = ip[w+3], ip[w+2], ip[w+1], ip[w]
		}
		addresses = append(addresses, net.JoinHostPort(net.IP(ip).String(), strconv.FormatUint(number, 10)))
	}
	return addresses, nil
}
