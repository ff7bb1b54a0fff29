package pgwire

import (
	"net"
	"net/netip"
	"sync"
)

// strangers are the connections that have not authenticated. When there are too
// many, the address with the most of them loses its oldest, so that a flood from one
// place keeps nobody else out.
type strangers struct {
	most, perAddress int

	mu    sync.Mutex
	count int
	by    map[string][]*stranger // oldest first; no empty ones
}

type stranger struct {
	from string
	// leave ends the connection; it must not block.
	leave func()
}

func newStrangers(most int) *strangers {
	return &strangers{most: most, perAddress: max(1, most/4), by: map[string][]*stranger{}}
}

// enter lets one in, at the expense of another if it must be; false if its own
// address has too many. Loopback may have as many as there are: behind a proxy on this
// machine everybody comes from there.
func (s *strangers) enter(one *stranger, loopback bool) bool {
	var out *stranger
	s.mu.Lock()
	defer func() {
		s.mu.Unlock()
		if out != nil {
			out.leave()
		}
	}()
	if !loopback && len(s.by[one.from]) >= s.perAddress {
		return false
	}
	if s.count >= s.most {
		most := one.from
		for from, all := range s.by {
			if len(all) > len(s.by[most]) {
				most = from
			}
		}
		if len(s.by[most]) == 0 {
			return false
		}
		out = s.by[most][0]
		s.removeLocked(out)
	}
	s.by[one.from] = append(s.by[one.from], one)
	s.count++
	return true
}

// remove forgets one that has authenticated, or has gone. It may be called twice.
func (s *strangers) remove(one *stranger) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.removeLocked(one)
}

func (s *strangers) removeLocked(one *stranger) {
	all := s.by[one.from]
	for i, other := range all {
		if other != one {
			continue
		}
		s.count--
		if len(all) == 1 {
			delete(s.by, one.from)
			return
		}
		copy(all[i:], all[i+1:])
		all[len(all)-1] = nil
		s.by[one.from] = all[:len(all)-1]
		return
	}
}

// peer is the address of a connection's other end, without port, and whether it is
// this machine.
func peer(conn net.Conn) (host string, loopback bool) {
	address, err := netip.ParseAddrPort(conn.RemoteAddr().String())
	if err != nil {
		return conn.RemoteAddr().String(), false
	}
	ip := address.Addr().Unmap()
	return ip.WithZone("").String(), ip.IsLoopback()
}

// addressKey is what strangers are counted by: an IPv4 address, or the /64 that one
// IPv6 host owns.
func addressKey(host string) string {
	ip, err := netip.ParseAddr(host)
	if err != nil || ip.Is4() {
		return host
	}
	if prefix, err := ip.Prefix(64); err == nil {
		return prefix.String()
	}
	return host
}
