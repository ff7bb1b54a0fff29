//go:build !linux

package tunnel

import (
	"net"
	"time"
)

// tuneTCP does nothing here; the agent runs on Linux only.
func tuneTCP(net.Conn, Class) {}

func deadPath(net.Conn, time.Duration) bool { return false }

func unacknowledged(net.Conn) bool { return false }
