package sandbox

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// fenceTable is the name of the tables in a kernel's network namespace.
const fenceTable = "postern"

var (
	any4 = netip.MustParsePrefix("0.0.0.0/0")
	any6 = netip.MustParsePrefix("::/0")
)

// steer makes what leads connections to the fence's listener: routes that make
// allowed addresses local, so that all others are unreachable at once, and a rule
// that redirects TCP to the listener. It may be done again in a namespace that has
// them. It reports whether there is IPv6.
func (f *fence) steer(netns *os.File) (six bool, err error) {
	routes, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{NetNS: int(netns.Fd())})
	if err != nil {
		return false, fmt.Errorf("rtnetlink: %w", err)
	}
	defer routes.Close() //nolint:errcheck // it is a socket
	filter, err := nftables.New(nftables.WithNetNSFd(int(netns.Fd())), nftables.AsLasting())
	if err != nil {
		return false, fmt.Errorf("nftables: %w", err)
	}
	defer filter.CloseLasting() //nolint:errcheck // it is a socket
	six = hasIPv6(netns)
	families := []nftables.TableFamily{nftables.TableFamilyIPv4}
	if six {
		families = append(families, nftables.TableFamilyIPv6)
	}
	for _, r := range f.routes(six) {
		if err := addRoute(routes, r); err != nil {
			return six, err
		}
	}
	for _, family := range families {
		// Made, taken away and made again: the same whether it was there or not.
		table := &nftables.Table{Name: fenceTable, Family: family}
		filter.AddTable(table)
		filter.DelTable(table)
		filter.AddTable(table)
		chain := filter.AddChain(&nftables.Chain{
			Name: "output", Table: table, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest,
		})
		for _, rule := range f.redirects(family) {
			filter.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: rule})
		}
	}
	if err := filter.Flush(); err != nil {
		return six, fmt.Errorf("nftables: %w (the system's kernel needs nf_tables with nat and redir)", err)
	}
	return six, nil
}

func hasIPv6(netns *os.File) bool {
	return inNetNS(netns, func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd) //nolint:errcheck // nothing was written
		var sa unix.SockaddrInet6
		sa.Addr[15] = 1
		return unix.Bind(fd, &sa) // fails where IPv6 is switched off
	}) == nil
}

// A route of the namespace: local, or prohibited.
type route struct {
	to   netip.Prefix
	kind uint8
}

// routes makes local what is allowed; in mode open all, but for what never is,
// which the system then refuses by itself ("Permission denied").
func (f *fence) routes(six bool) []route {
	var all []route
	add := func(p netip.Prefix, kind uint8) {
		if p.Addr().Is6() && !six {
			return
		}
		all = append(all, route{p, kind})
	}
	if f.rules.mode == NetworkOpen {
		add(any4, unix.RTN_LOCAL)
		add(any6, unix.RTN_LOCAL)
		for _, p := range never {
			if p != loopback4 && p != loopback6 && p != named {
				add(p, unix.RTN_PROHIBIT)
			}
		}
	}
	for _, d := range f.rules.allow {
		if d.name == "" {
			add(d.prefix, unix.RTN_LOCAL)
		}
	}
	for _, name := range f.rules.names() {
		if a, ok := f.rules.addressOf(name); ok {
			add(netip.PrefixFrom(a, 32), unix.RTN_LOCAL)
		}
	}
	return all
}

// addRoute puts a route into the namespace's local table, replacing an equal one.
func addRoute(c *netlink.Conn, r route) error {
	// struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
	message := make([]byte, 12)
	message[0] = unix.AF_INET
	if r.to.Addr().Is6() {
		message[0] = unix.AF_INET6
	}
	message[1] = uint8(r.to.Bits())
	message[4], message[5], message[6], message[7] = unix.RT_TABLE_LOCAL, unix.RTPROT_STATIC, unix.RT_SCOPE_HOST, r.kind
	e := netlink.NewAttributeEncoder()
	if r.to.Bits() > 0 {
		e.Bytes(unix.RTA_DST, r.to.Addr().AsSlice())
	}
	if r.kind == unix.RTN_LOCAL {
		e.Uint32(unix.RTA_OIF, 1) // lo is the first device of every namespace
	} else {
		message[6] = unix.RT_SCOPE_UNIVERSE
	}
	attributes, err := e.Encode()
	if err != nil {
		return err
	}
	_, err = c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_NEWROUTE, Flags: netlink.Request | netlink.Acknowledge | netlink.Create | netlink.Replace},
		Data:   append(message, attributes...),
	})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("route to %v: %w", r.to, err)
	}
	return nil
}

// redirects are the rules that hand connections to the listener: one for each
// destination, or one for all but the kernel's own loopback addresses.
func (f *fence) redirects(family nftables.TableFamily) [][]expr.Any {
	six := family == nftables.TableFamilyIPv6
	var rules [][]expr.Any
	if f.rules.mode == NetworkOpen {
		own := loopback4
		if six {
			own = loopback6
		}
		return append(rules, redirect(tcp(), address(own, expr.CmpOpNeq)))
	}
	for _, d := range f.rules.allow {
		prefix := d.prefix
		if d.name != "" {
			a, ok := f.rules.addressOf(d.name)
			if !ok {
				continue
			}
			prefix = netip.PrefixFrom(a, 32)
		}
		if prefix.Addr().Is6() == six {
			rules = append(rules, redirect(tcp(), address(prefix, expr.CmpOpEq), port(d.port)))
		}
	}
	return rules
}

// redirect is a rule: when all of it matches, redirect to the fence's port.
func redirect(matches ...[]expr.Any) []expr.Any {
	var rule []expr.Any
	for _, m := range matches {
		rule = append(rule, m...)
	}
	return append(
		rule,
		&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(fencePort)},
		&expr.Redir{RegisterProtoMin: 1},
	)
}

func tcp() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
	}
}

// address matches the destination address.
func address(p netip.Prefix, op expr.CmpOp) []expr.Any {
	offset, length := uint32(16), uint32(4) // of the IPv4 header
	if p.Addr().Is6() {
		offset, length = 24, 16
	}
	mask := make([]byte, length)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: length, Mask: mask, Xor: make([]byte, length)},
		&expr.Cmp{Op: op, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}
}

// port matches the destination port.
func port(n uint16) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, n)},
	}
}
