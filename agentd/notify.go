package main

import (
	"fmt"
	"net"
	"os"
	"time"
)

// How long systemd is waited for until it takes a message. The socket holds few (10 where
// net.unix.max_dgram_qlen is not raised), and whoever started us may read none: without a
// bound the daemon would stand still, deaf to SIGTERM too. A sign of life that is not
// taken is followed by the next.
const (
	notifyTime   = 5 * time.Second
	watchdogTime = time.Second
)

const watchdogState = "WATCHDOG=1"

// notifySystemd sends state, lines of sd_notify(3), to the socket that systemd named in the
// environment; without one it does nothing. It is safe for concurrent use and takes
// notifyTime at most.
func notifySystemd(state string) error {
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	defer conn.Close() //nolint:errcheck // what was written is systemd's
	patience := notifyTime
	if state == watchdogState {
		patience = watchdogTime
	}
	if err := conn.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	if _, err := conn.Write([]byte(state)); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}
