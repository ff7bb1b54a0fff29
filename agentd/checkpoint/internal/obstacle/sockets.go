package obstacle

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

func socketInode(link string) (uint64, bool) {
	s, ok := strings.CutPrefix(link, "socket:[")
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(strings.TrimSuffix(s, "]"), 10, 64)
	return n, err == nil
}

// socket is a TCP socket of the kernel's network namespace.
type socket struct {
	local, remote netip.AddrPort
	state         uint8
}

// States of TCP, as the socket tables have them.
const (
	tcpEstablished = 1
	tcpTimeWait    = 6
	tcpClose       = 7
	tcpListen      = 10
)

// readSockets reads the TCP tables of a process's network namespace. A table that can't
// be read is empty: CRIU refuses what is missed.
func readSockets(pid int) map[uint64]socket {
	all := map[uint64]socket{}
	for _, name := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, name))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			if len(f) < 10 || f[0] == "sl" {
				continue
			}
			inode, err := strconv.ParseUint(f[9], 10, 64)
			if err != nil || inode == 0 {
				continue
			}
			state, err := strconv.ParseUint(f[3], 16, 8)
			if err != nil {
				continue
			}
			all[inode] = socket{local: address(f[1]), remote: address(f[2]), state: uint8(state)}
		}
	}
	return all
}

// address reads 0100007F:1F90, the words of the address in the machine's byte order.
func address(s string) netip.AddrPort {
	a, p, _ := strings.Cut(s, ":")
	raw, err := hex.DecodeString(a)
	port, perr := strconv.ParseUint(p, 16, 16)
	if err != nil || perr != nil || len(raw) != 4 && len(raw) != 16 {
		return netip.AddrPort{}
	}
	for i := 0; i < len(raw); i += 4 {
		binary.BigEndian.PutUint32(raw[i:], binary.NativeEndian.Uint32(raw[i:]))
	}
	addr, _ := netip.AddrFromSlice(raw)
	return netip.AddrPortFrom(addr.Unmap(), uint16(port))
}

func (f *finder) socket(p *process, d descriptor, inode uint64) {
	if s, ok := f.sockets[inode]; ok {
		f.tcp(p, s)
		return
	}
	u, ok := f.peers[inode]
	if !ok || u.peer == 0 || f.inodes[uint64(u.peer)] {
		return
	}
	other := f.peers[uint64(u.peer)]
	for _, own := range f.own {
		if under(u.name, own) || under(other.name, own) {
			return
		}
	}
	name := u.name
	if name == "" {
		name = other.name
	}
	if name == "" { // the other end is of the host's network namespace
		name = f.outside(u.peer)
	}
	if statement(name) {
		f.add(p, "socket", "a statement of %%sql or postern.sql that is under way", "wait for its end, or interrupt the cell")
		return
	}
	if name == "" {
		name = fmt.Sprintf("descriptor %d", d.fd)
	}
	f.add(p, "socket", "a unix socket ("+name+") connected to a process outside the kernel", "close it")
}

// outside is the name of a socket of this process's own network namespace, the host's; ""
// if it has none.
func (f *finder) outside(inode uint32) string {
	if f.host == nil {
		f.host, _ = unixPeers(os.Getpid()) // without it the obstacle is named by its descriptor
		if f.host == nil {
			f.host = map[uint64]unixSocket{}
		}
	}
	return f.host[uint64(inode)].name
}

// sqlSocket is what agentd calls the socket that it answers kernels' statements on. It is
// bound through the descriptor of a kernel's run directory.
const sqlSocket = "sql.sock"

// statement reports whether a socket's name is that of agentd's for statements. A connection is
// there for as long as a statement runs, and no longer.
func statement(name string) bool {
	return path.Base(name) == sqlSocket && (path.Dir(name) == "/run/postern" || strings.HasPrefix(name, "/proc/self/fd/"))
}

func under(name, dir string) bool {
	return name != "" && (name == dir || strings.HasPrefix(name, dir+"/"))
}

func (f *finder) tcp(p *process, s socket) {
	switch s.state {
	case tcpListen, tcpClose, tcpTimeWait:
		return
	}
	for inode, other := range f.sockets { // both ends in the tree: it travels
		if other.local == s.remote && other.remote == s.local && f.inodes[inode] {
			return
		}
	}
	what := "a TCP connection to " + s.remote.String()
	if s.state != tcpEstablished {
		what = "a TCP connection to " + s.remote.String() + " that is being opened or closed"
	}
	f.add(p, "socket", what, "close it (a database connection, a download): the other end can't be saved with it")
}

// unixSocket is what sock_diag tells.
type unixSocket struct {
	name string
	peer uint32
}

// maxUnix bounds the sockets that are looked at.
const maxUnix = 100_000

// unixPeers lists the unix sockets of a process's network namespace by inode, by
// sock_diag(7) on a thread that is inside it for the purpose.
func unixPeers(pid int) (map[uint64]unixSocket, error) {
	type result struct {
		all map[uint64]unixSocket
		err error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // the thread is not used again: it ends with the goroutine
		all, err := diagnose(pid)
		done <- result{all, err}
	}()
	r := <-done
	return r.all, r.err
}

func diagnose(pid int) (map[uint64]unixSocket, error) {
	ns, err := unix.Open(fmt.Sprintf("/proc/%d/ns/net", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(ns) //nolint:errcheck // a namespace
	if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd) //nolint:errcheck // it answered
	timeout := unix.Timeval{Sec: 5}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return nil, err
	}
	// struct nlmsghdr, struct unix_diag_req: see linux/unix_diag.h
	const (
		sockDiagByFamily             = 20
		showName, showPeer           = 1, 4
		attrName, attrPeer           = 0, 2
		headerLen, messageLen        = 16, 16
		requestLen                   = 24
		allStates             uint32 = ^uint32(0)
	)
	req := make([]byte, headerLen+requestLen)
	ne := binary.NativeEndian
	ne.PutUint32(req[0:], uint32(len(req)))
	ne.PutUint16(req[4:], sockDiagByFamily)
	ne.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	req[16] = unix.AF_UNIX
	ne.PutUint32(req[20:], allStates)
	ne.PutUint32(req[28:], showName|showPeer)
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	all := map[uint64]unixSocket{}
	buf := make([]byte, 64<<10)
	for len(all) < maxUnix {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return nil, err
		}
		for b := buf[:n]; len(b) >= headerLen; {
			size, kind := int(ne.Uint32(b)), ne.Uint16(b[4:])
			if size < headerLen || size > len(b) {
				return all, nil
			}
			switch kind {
			case unix.NLMSG_DONE:
				return all, nil
			case unix.NLMSG_ERROR:
				return nil, fmt.Errorf("sock_diag: error %d", int32(ne.Uint32(b[headerLen:])))
			}
			if m := b[headerLen:size]; len(m) >= messageLen {
				inode := ne.Uint32(m[4:])
				var u unixSocket
				for a := m[messageLen:]; len(a) >= 4; {
					l, t := int(ne.Uint16(a)), ne.Uint16(a[2:])
					if l < 4 || l > len(a) {
						break
					}
					switch t {
					case attrName:
						u.name = strings.TrimRight(strings.ReplaceAll(string(a[4:l]), "\x00", "@"), "@")
					case attrPeer:
						if l >= 8 {
							u.peer = ne.Uint32(a[4:])
						}
					}
					a = a[min(len(a), (l+3)&^3):]
				}
				all[uint64(inode)] = u
			}
			b = b[min(len(b), (size+3)&^3):]
		}
	}
	return all, nil
}
