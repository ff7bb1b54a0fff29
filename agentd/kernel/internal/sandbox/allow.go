package sandbox

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// A destination is one entry of Network.Allow: ADDRESS:PORT, CIDR:PORT or
// NAME:PORT; an IPv6 address or prefix stands in brackets.
type destination struct {
	prefix netip.Prefix // invalid if name is set
	name   string       // lowercase, without the last dot
	port   uint16
}

// maxAllow bounds Network.Allow: each entry is a route and a rule.
const maxAllow = 256

// parseAllow reads Network.Allow. An error is one line that quotes the entry.
func parseAllow(entries []string) ([]destination, error) {
	if len(entries) > maxAllow {
		return nil, fmt.Errorf("%d allowed destinations: want at most %d", len(entries), maxAllow)
	}
	var all []destination
	for _, entry := range entries {
		d, err := parseDestination(entry)
		if err != nil {
			return nil, fmt.Errorf("allowed destination %q: %w", entry, err)
		}
		all = append(all, d)
	}
	return all, nil
}

func parseDestination(entry string) (destination, error) {
	host, portText, err := net.SplitHostPort(entry)
	if err != nil {
		return destination{}, errors.New("want ADDRESS:PORT, CIDR:PORT or NAME:PORT, IPv6 in brackets")
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil || port == 0 {
		return destination{}, errors.New("want a port from 1 to 65535")
	}
	d := destination{port: uint16(port)}
	if a, err := netip.ParseAddr(host); err == nil && a.Zone() == "" {
		d.prefix = netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen())
	} else if p, err := netip.ParsePrefix(host); err == nil {
		d.prefix = p.Masked()
	} else if validName(host) {
		d.name = strings.ToLower(strings.TrimSuffix(host, "."))
	} else {
		return destination{}, errors.New("want ADDRESS:PORT, CIDR:PORT or NAME:PORT, IPv6 in brackets")
	}
	if d.name == "localhost" || strings.HasSuffix(d.name, ".localhost") || d.prefix.IsValid() && d.prefix.Overlaps(loopback4) || d.prefix.IsValid() && d.prefix.Overlaps(loopback6) {
		return destination{}, errors.New("a kernel's loopback device is its own: give another address of this host, on which the service listens too")
	}
	if d.prefix.IsValid() && d.prefix.Overlaps(named) {
		return destination{}, fmt.Errorf("%v stands for allowed names inside of kernels", named)
	}
	return d, nil
}

func validName(name string) bool {
	name = strings.TrimSuffix(name, ".")
	if name == "" || len(name) > 253 {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || strings.Trim(strings.ToLower(label), "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return false
		}
	}
	return true
}

// Addresses with a meaning of their own.
var (
	loopback4 = netip.MustParsePrefix("127.0.0.0/8")
	loopback6 = netip.MustParsePrefix("::1/128")
	// named holds the addresses that stand for allowed names inside: RFC 2544's,
	// which no network uses.
	named = netip.MustParsePrefix("198.18.0.0/15")
	// never are what the host alone may reach, unless it is listed: itself,
	// link-local addresses and what clouds tell their machines secrets on.
	never = []netip.Prefix{
		loopback4, loopback6, named,
		netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("::/128"),
		netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10"),
		netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("255.255.255.255/32"), netip.MustParsePrefix("ff00::/8"),
		netip.MustParsePrefix("fd00:ec2::/32"),      // Amazon
		netip.MustParsePrefix("fd20:ce::254/128"),   // Google
		netip.MustParsePrefix("100.100.100.200/32"), // Alibaba
		netip.MustParsePrefix("192.0.0.192/32"),     // Oracle
		netip.MustParsePrefix("168.63.129.16/32"),   // Azure
	}
	nat64 = netip.MustParsePrefix("64:ff9b::/96")
)

// plain is an address without the wrappings that IPv6 has for IPv4.
func plain(a netip.Addr) netip.Addr {
	a = a.Unmap().WithZone("")
	if b := a.As16(); a.Is6() && nat64.Contains(a) {
		return netip.AddrFrom4([4]byte(b[12:]))
	}
	return a
}

// rules are a fence's: pure, but for the list of the host's own addresses.
type rules struct {
	mode  NetworkMode
	allow []destination
	// own lists the host's addresses; a test may replace it.
	own func() []netip.Addr
}

// permits reports whether a kernel may connect to an address.
func (r *rules) permits(to netip.AddrPort) bool {
	a := plain(to.Addr())
	for _, d := range r.allow {
		if d.name == "" && d.port == to.Port() && d.prefix.Contains(a) {
			return true
		}
	}
	return r.mode == NetworkOpen && !reserved(a) && !slices.Contains(r.own(), a)
}

// permitsNamed reports whether a connection to an allowed name may go to an
// address that the name has.
func (r *rules) permitsNamed(to netip.AddrPort) bool {
	a := plain(to.Addr())
	return r.permits(to) || !reserved(a) && !slices.Contains(r.own(), a)
}

func reserved(a netip.Addr) bool {
	return !a.IsValid() || slices.ContainsFunc(never, func(p netip.Prefix) bool { return p.Contains(a) })
}

// names are the allowed names, each once, in the order of their addresses.
func (r *rules) names() []string {
	var names []string
	for _, d := range r.allow {
		if d.name != "" && !slices.Contains(names, d.name) {
			names = append(names, d.name)
		}
	}
	return names
}

// addressOf is what stands for a name inside.
func (r *rules) addressOf(name string) (netip.Addr, bool) {
	i := slices.Index(r.names(), strings.ToLower(strings.TrimSuffix(name, ".")))
	if i < 0 {
		return netip.Addr{}, false
	}
	return netip.AddrFrom4([4]byte{198, 18, byte((i + 1) >> 8), byte(i + 1)}), true
}

// nameAt is the allowed name that an address inside stands for.
func (r *rules) nameAt(to netip.AddrPort) (string, bool) {
	for _, d := range r.allow {
		if d.name == "" || d.port != to.Port() {
			continue
		}
		if a, ok := r.addressOf(d.name); ok && a == to.Addr() {
			return d.name, true
		}
	}
	return "", false
}

// hostAddresses are the addresses of this host's interfaces.
func hostAddresses() []netip.Addr {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	var own []netip.Addr
	for _, a := range list {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				own = append(own, ip.Unmap())
			}
		}
	}
	return own
}
