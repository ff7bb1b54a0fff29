package tunnel

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// settle is how long a change of the network is let settle before it is reported:
// a new address comes with a dozen messages.
const settle = 300 * time.Millisecond

// WatchNetwork reports changes of this host's links, addresses and routes until
// ctx ends. The channel has room for one report; it is never closed. It needs no
// rights.
func WatchNetwork(ctx context.Context) (<-chan struct{}, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	groups := uint32(unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("netlink bind: %w", err)
	}
	f := os.NewFile(uintptr(fd), "netlink")
	ch := make(chan struct{}, 1)
	stop := context.AfterFunc(ctx, func() { _ = f.Close() })
	go func() {
		defer f.Close()
		defer stop()
		buf := make([]byte, 8<<10)
		for {
			// An overrun (ENOBUFS) is a change as well.
			if _, err := f.Read(buf); err != nil && ctx.Err() != nil {
				return
			} else if err != nil {
				select {
				case <-time.After(time.Second):
				case <-ctx.Done():
					return
				}
			}
			select {
			case <-time.After(settle):
			case <-ctx.Done():
				return
			}
			_ = f.SetReadDeadline(time.Now())
			for {
				if _, err := f.Read(buf); err != nil {
					break
				}
			}
			_ = f.SetReadDeadline(time.Time{})
			select {
			case ch <- struct{}{}:
			default:
			}
		}
	}()
	return ch, nil
}
