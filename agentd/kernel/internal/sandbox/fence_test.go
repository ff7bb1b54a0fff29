package sandbox

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/postern-dev/postern/e2e/pgserver"
	"golang.org/x/net/dns/dnsmessage"
)

func TestParseAllow(t *testing.T) {
	for entry, want := range map[string]string{
		"10.1.2.3:443":             "10.1.2.3/32  443",
		"10.1.2.3/8:8080":          "10.0.0.0/8  8080",
		"[fd00::1]:443":            "fd00::1/128  443",
		"[fd00::1/64]:443":         "fd00::/64  443",
		"[::ffff:10.1.2.3]:443":    "10.1.2.3/32  443",
		"Packages.Example.com.:80": "invalid Prefix packages.example.com 80",
		"10.1.2.3":                 "want ADDRESS:PORT, CIDR:PORT or NAME:PORT, IPv6 in brackets",
		"10.1.2.3:0":               "want a port from 1 to 65535",
		"10.1.2.3:http":            "want a port from 1 to 65535",
		"10.1.2.3:65536":           "want a port from 1 to 65535",
		"10.1.2.3/33:80":           "want ADDRESS:PORT, CIDR:PORT or NAME:PORT, IPv6 in brackets",
		"a b:80":                   "want ADDRESS:PORT, CIDR:PORT or NAME:PORT, IPv6 in brackets",
		":80":                      "want ADDRESS:PORT, CIDR:PORT or NAME:PORT, IPv6 in brackets",
		"*:80":                     "want ADDRESS:PORT, CIDR:PORT or NAME:PORT, IPv6 in brackets",
		"fe80::1%eth0:80":          "want ADDRESS:PORT, CIDR:PORT or NAME:PORT, IPv6 in brackets",
		"127.0.0.1:5432":           "a kernel's loopback device is its own: give another address of this host, on which the service listens too",
		"0.0.0.0/0:5432":           "a kernel's loopback device is its own: give another address of this host, on which the service listens too",
		"[::1]:5432":               "a kernel's loopback device is its own: give another address of this host, on which the service listens too",
		"localhost:5432":           "a kernel's loopback device is its own: give another address of this host, on which the service listens too",
		"198.18.3.4:1":             "198.18.0.0/15 stands for allowed names inside of kernels",
	} {
		d, err := parseAllow([]string{entry})
		got := ""
		if err != nil {
			_, got, _ = strings.Cut(err.Error(), fmt.Sprintf("allowed destination %q: ", entry))
		} else {
			got = fmt.Sprintf("%v %s %d", d[0].prefix, d[0].name, d[0].port)
		}
		if got != want {
			t.Errorf("%s: got %q, want %q", entry, got, want)
		}
	}
	if _, err := parseAllow(slices.Repeat([]string{"10.0.0.1:1"}, maxAllow+1)); err == nil {
		t.Error("too many were taken")
	}
}

func TestRules(t *testing.T) {
	allow, err := parseAllow([]string{"10.1.2.3:443", "10.8.0.0/16:8080", "[fd00::/64]:443", "169.254.169.254:80", "good.example:443"})
	if err != nil {
		t.Fatal(err)
	}
	own := func() []netip.Addr {
		return []netip.Addr{netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("fd12::2")}
	}
	for _, c := range []struct {
		to            string
		allowed, open bool
	}{
		{"10.1.2.3:443", true, true},
		{"[::ffff:10.1.2.3]:443", true, true},
		{"[64:ff9b::10.1.2.3]:443", true, true},
		{"10.1.2.3:444", false, true},
		{"10.1.2.4:443", false, true},
		{"10.8.255.255:8080", true, true},
		{"[fd00::17]:443", true, true},
		{"[fd00:0:0:1::17]:443", false, true},
		{"169.254.169.254:80", true, true}, // listed
		{"169.254.169.254:81", false, false},
		{"[::ffff:169.254.169.254]:81", false, false},
		{"[64:ff9b::169.254.169.254]:81", false, false},
		{"169.254.170.2:80", false, false},
		{"100.100.100.200:80", false, false},
		{"168.63.129.16:80", false, false},
		{"[fd00:ec2::254]:80", false, false},
		{"127.0.0.1:5432", false, false},
		{"127.8.8.8:5432", false, false},
		{"[::1]:5432", false, false},
		{"0.0.0.0:5432", false, false},
		{"[::]:5432", false, false},
		{"192.0.2.2:5432", false, false}, // the host itself
		{"[fd12::2]:5432", false, false},
		{"192.0.2.3:5432", false, true},
		{"224.0.0.1:80", false, false},
		{"[fe80::1]:80", false, false},
		{"198.18.0.1:22", false, false},
	} {
		to := netip.MustParseAddrPort(c.to)
		if got := (&rules{NetworkAllowed, allow, own}).permits(to); got != c.allowed {
			t.Errorf("allowed: %s: %v", c.to, got)
		}
		if got := (&rules{NetworkOpen, allow, own}).permits(to); got != c.open {
			t.Errorf("open: %s: %v", c.to, got)
		}
	}
	r := &rules{NetworkAllowed, allow, own}
	a, ok := r.addressOf("GOOD.example.")
	if !ok || a.String() != "198.18.0.1" {
		t.Errorf("good.example is %v, %v", a, ok)
	}
	if name, ok := r.nameAt(netip.AddrPortFrom(a, 443)); !ok || name != "good.example" {
		t.Errorf("%v is %q, %v", a, name, ok)
	}
	if _, ok := r.nameAt(netip.AddrPortFrom(a, 80)); ok {
		t.Error("another port of an allowed name")
	}
	// A name server can't make an allowed name lead to the host.
	for to, want := range map[string]bool{"203.0.113.9:443": true, "127.0.0.1:443": false, "192.0.2.2:443": false, "169.254.169.254:443": false, "169.254.169.254:80": true} {
		if got := r.permitsNamed(netip.MustParseAddrPort(to)); got != want {
			t.Errorf("an allowed name at %s: %v", to, got)
		}
	}
}

func TestNames(t *testing.T) {
	allow, err := parseAllow([]string{"one.example:443", "two.example:443", "two.example:80"})
	if err != nil {
		t.Fatal(err)
	}
	r := &rules{mode: NetworkAllowed, allow: allow, own: hostAddresses}
	ask := func(name string, kind dnsmessage.Type) string {
		q := dnsmessage.Message{Header: dnsmessage.Header{ID: 77, RecursionDesired: true}, Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: kind, Class: dnsmessage.ClassINET}}}
		packed, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		reply, err := r.answer(packed)
		if err != nil {
			t.Fatal(err)
		}
		var m dnsmessage.Message
		if err := m.Unpack(reply); err != nil || m.ID != 77 || !m.Response || len(m.Questions) != 1 {
			t.Fatalf("%v: %+v", err, m)
		}
		if len(m.Answers) == 0 {
			return m.RCode.String()
		}
		return netip.AddrFrom4(m.Answers[0].Body.(*dnsmessage.AResource).A).String() //nolint:errcheck // a test
	}
	for _, c := range []struct {
		name, want string
		kind       dnsmessage.Type
	}{
		{"one.example.", "198.18.0.1", dnsmessage.TypeA},
		{"TWO.example.", "198.18.0.2", dnsmessage.TypeA},
		{"two.example.", "RCodeSuccess", dnsmessage.TypeAAAA},
		{"secret.two.example.", "RCodeNameError", dnsmessage.TypeA},
		{"example.", "RCodeNameError", dnsmessage.TypeTXT},
	} {
		if got := ask(c.name, c.kind); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
	for _, bad := range [][]byte{nil, {1}, make([]byte, 12), []byte("\x00\x4d\x81\x80\x00\x01\x00\x00\x00\x00\x00\x00")} {
		if _, err := r.answer(bad); err == nil {
			t.Errorf("%x was answered", bad)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	allow, err := parseAllow([]string{"one.example:443"})
	if err != nil {
		f.Fatal(err)
	}
	r := &rules{mode: NetworkAllowed, allow: allow, own: hostAddresses}
	q := dnsmessage.Message{Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("one.example."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
	packed, err := q.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(packed)
	f.Fuzz(func(t *testing.T, question []byte) {
		reply, err := r.answer(question)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if err := m.Unpack(reply); err != nil {
			t.Errorf("%x: %v", reply, err)
		}
	})
}

// outside is an address of this host that is not loopback: what stands for the
// rest of the world, since only rules tell it from that.
func outside(t *testing.T) netip.Addr {
	t.Helper()
	for _, a := range hostAddresses() {
		if a.Is4() && !reserved(a) {
			return a
		}
	}
	t.Fatal("this machine has no IPv4 address but loopback")
	return netip.Addr{}
}

// echo is a server on an address that answers with who called and what they said.
func echo(t *testing.T, address string) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close() //nolint:errcheck // a test
				text, _ := io.ReadAll(c)
				_, _ = fmt.Fprintf(c, "echo %d", len(text))
			}()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	return uint16(l.Addr().(*net.TCPAddr).Port) //nolint:errcheck // a test
}

// dialer is what kernels run to try connections: host, port, bytes to send.
const dialer = `
import socket, sys
for arg in sys.argv[1:]:
    host, port, size = arg.split(" ")
    try:
        with socket.create_connection((host, int(port)), 10) as s:
            s.sendall(b"x" * int(size))
            s.shutdown(socket.SHUT_WR)
            got = b""
            while True:
                more = s.recv(65536)
                if not more: break
                got += more
        print(got.decode() or "nothing")
    except OSError as e:
        print(e.strerror or e)
`

func try(t *testing.T, n Network, args ...string) []string {
	t.Helper()
	spec := testSpec(t, dialer, args...)
	spec.Network = n
	exit, out := run(t, spec)
	if exit.Code != 0 {
		t.Fatalf("%s: %s", exit.Reason, out)
	}
	return strings.Split(strings.TrimSpace(out), "\n")
}

func TestNetworks(t *testing.T) {
	needRoot(t)
	host := outside(t).String()
	public, loop := strconv.Itoa(int(echo(t, host))), strconv.Itoa(int(echo(t, "127.0.0.1")))
	const much = "8000000"
	for _, c := range []struct {
		name    string
		network Network
		to      []string
		want    []string
	}{
		{"none", Network{Mode: NetworkNone}, []string{host + " " + public + " 5", "127.0.0.1 " + loop + " 5", "169.254.169.254 80 1", "some.example 80 1"}, []string{
			"Network is unreachable", "Connection refused", "Network is unreachable", "Temporary failure in name resolution",
		}},
		{"allowed", Network{Mode: NetworkAllowed, Allow: []string{host + ":" + public}}, []string{
			host + " " + public + " " + much, host + " " + loop + " 5", "127.0.0.1 " + loop + " 5", "169.254.169.254 80 1", "some.example 80 1", "127.0.0.1 1 5",
		}, []string{
			"echo " + much, "Connection refused", "Connection refused", "Network is unreachable", "Name or service not known", "Connection reset by peer",
		}},
		{"allowed network", Network{Mode: NetworkAllowed, Allow: []string{host + "/30:" + public}}, []string{host + " " + public + " 7"}, []string{"echo 7"}},
		{"open leaves out the host", Network{Mode: NetworkOpen}, []string{
			host + " " + public + " 5", "127.0.0.1 " + loop + " 5", "169.254.169.254 80 1", "100.100.100.200 80 1", "224.0.0.1 80 1",
		}, []string{
			"Connection reset by peer", "Connection refused", "Permission denied", "Permission denied", "Permission denied",
		}},
		{"open with the host listed", Network{Mode: NetworkOpen, Allow: []string{host + ":" + public}}, []string{host + " " + public + " " + much}, []string{"echo " + much}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := try(t, c.network, c.to...)
			for i, want := range c.want {
				if i >= len(got) || !strings.Contains(got[i], want) {
					t.Errorf("%s: got %q, want %q", c.to[i], got[min(i, len(got)-1)], want)
				}
			}
		})
	}
}

// through makes a network namespace with a fence for which the host has no address
// of its own, and dials inside.
func through(t *testing.T, n Network, names ...*net.Resolver) func(network, address string) (string, error) {
	t.Helper()
	needRoot(t)
	ns, err := newNetNS()
	if err != nil {
		t.Fatal(err)
	}
	f, err := plannedFence(n)
	if err != nil {
		t.Fatal(err)
	}
	f.rules.own = func() []netip.Addr { return nil }
	for _, r := range names {
		f.resolver = r
	}
	if err := f.open(ns); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.close()
		_ = ns.Close()
	})
	return func(network, address string) (string, error) {
		var c net.Conn
		err := inNetNS(ns, func() error {
			var err error
			c, err = (&net.Dialer{}).Dial(network, address)
			return err
		})
		if err != nil {
			return "", err
		}
		defer c.Close() //nolint:errcheck // a test
		_, _ = c.Write([]byte("hello"))
		_ = c.(*net.TCPConn).CloseWrite() //nolint:errcheck // a test
		text, err := io.ReadAll(c)
		return string(text), err
	}
}

func TestOpenReachesTheWorld(t *testing.T) {
	needRoot(t)
	port := echo(t, outside(t).String())
	dial := through(t, Network{Mode: NetworkOpen})
	for range 3 {
		if got, err := dial("tcp4", fmt.Sprintf("%v:%d", outside(t), port)); err != nil || got != "echo 5" {
			t.Errorf("got %q, %v", got, err)
		}
	}
	if got, err := dial("tcp4", fmt.Sprintf("127.0.0.1:%d", fencePort)); err == nil && got != "" {
		t.Errorf("the fence's own port answers %q", got)
	}
}

func TestIPv6(t *testing.T) {
	needRoot(t)
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Logf("this machine has no IPv6: %v", err)
		return
	}
	_ = l.Close()
	i := slices.IndexFunc(hostAddresses(), func(a netip.Addr) bool { return a.Is6() && !reserved(a) })
	if i < 0 {
		return // no address to dial
	}
	host := hostAddresses()[i]
	port := echo(t, host.String())
	for _, n := range []Network{{Mode: NetworkOpen}, {Mode: NetworkAllowed, Allow: []string{netip.AddrPortFrom(host, port).String()}}} {
		dial := through(t, n)
		if got, err := dial("tcp6", netip.AddrPortFrom(host, port).String()); err != nil || got != "echo 5" {
			t.Errorf("%s: got %q, %v", n.Mode, got, err)
		}
		if got, err := dial("tcp6", "[fd00:ec2::254]:80"); err == nil && got != "" {
			t.Errorf("%s: Amazon's metadata address answers %q", n.Mode, got)
		}
	}
}

// A name server of the host's side that answers every question with one address.
func nameServer(t *testing.T, answer netip.Addr) *net.Resolver {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 4096)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil {
				continue
			}
			m.Response, m.Additionals = true, nil
			if m.Questions[0].Type == dnsmessage.TypeA {
				m.Answers = []dnsmessage.Resource{{
					Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Class: dnsmessage.ClassINET},
					Body:   &dnsmessage.AResource{A: answer.As4()},
				}}
			}
			if reply, err := m.Pack(); err == nil {
				_, _ = c.WriteTo(reply, from)
			}
		}
	}()
	t.Cleanup(func() {
		_ = c.Close()
		<-done
	})
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", c.LocalAddr().String())
	}}
}

func TestAllowedNames(t *testing.T) {
	needRoot(t)
	host := outside(t)
	port, loop := echo(t, host.String()), echo(t, "127.0.0.1")
	n := Network{Mode: NetworkAllowed, Allow: []string{fmt.Sprintf("good.example:%d", port), fmt.Sprintf("bad.example:%d", loop)}}
	dial := through(t, n, nameServer(t, host))
	if got, err := dial("tcp4", fmt.Sprintf("198.18.0.1:%d", port)); err != nil || got != "echo 5" {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := dial("tcp4", fmt.Sprintf("198.18.0.1:%d", loop)); err == nil && got != "" {
		t.Errorf("another port answers %q", got)
	}
	// Its name server makes it lead to the host's loopback device.
	dial = through(t, n, nameServer(t, netip.MustParseAddr("127.0.0.1")))
	if got, err := dial("tcp4", fmt.Sprintf("198.18.0.2:%d", loop)); err == nil && got != "" {
		t.Errorf("the host's loopback answers %q", got)
	}
	// And from a kernel: the resolver of the C library asks the fence.
	spec := testSpec(t, `
import socket
print(socket.gethostbyname("good.example"), socket.gethostbyname("bad.example"))
try: socket.gethostbyname("other.example")
except OSError as e: print(e.strerror)`)
	spec.Network = n
	if exit, out := run(t, spec); out != "198.18.0.1 198.18.0.2\nName or service not known\n" {
		t.Errorf("%s: %s", exit.Reason, out)
	}
}

// A database on this host: by its loopback address and by its socket.
func TestDatabaseIsOutOfReach(t *testing.T) {
	needRoot(t)
	db := pgserver.Start(t)
	code := `
import glob, os, socket, sys
port, path = int(sys.argv[1]), sys.argv[2]
for family, address in ((socket.AF_INET, ("127.0.0.1", port)), (socket.AF_INET6, ("::1", port)), (socket.AF_UNIX, path), (socket.AF_UNIX, "\0postern-test")):
    try:
        with socket.socket(family) as s:
            s.connect(address)
            print("REACHED", address)
    except OSError as e:
        print(e.strerror)
print(sorted(glob.glob("/run/*")), sorted(glob.glob("/var/run/*")), os.path.exists("/var/lib/postgresql"))`
	path := fmt.Sprintf("%s/.s.PGSQL.%d", db.Host, db.Port)
	if c, err := net.Dial("unix", path); err != nil {
		t.Fatal(err)
	} else {
		_ = c.Close()
	}
	abstract, err := net.Listen("unix", "@postern-test")
	if err != nil {
		t.Fatal(err)
	}
	defer abstract.Close() //nolint:errcheck // a test
	for _, n := range []Network{{Mode: NetworkNone}, {Mode: NetworkAllowed, Allow: []string{"203.0.113.1:443"}}, {Mode: NetworkOpen}} {
		spec := testSpec(t, code, strconv.Itoa(db.Port), path)
		spec.Network = n
		exit, out := run(t, spec)
		want := "Connection refused\nConnection refused\nNo such file or directory\nConnection refused\n['/run/kernel.log', '/run/postern'] ['/var/run/kernel.log', '/var/run/postern'] False\n"
		if out != want {
			t.Errorf("%s: %s:\n%s", n.Mode, exit.Reason, out)
		}
	}
}
