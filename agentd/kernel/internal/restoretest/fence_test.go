package restoretest

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"

	"github.com/postern-dev/postern/agentd/checkpoint"
	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
)

// Behind a fence that lets something through: a kernel comes back, its new
// connections go where they may, and one that was open at the dump has ended.
func TestFenceAfterARestore(t *testing.T) {
	var host netip.Addr
	list, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range list {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && !n.IP.IsLoopback() && !n.IP.IsLinkLocalUnicast() {
			host = netip.AddrFrom4([4]byte(n.IP.To4()))
		}
	}
	if !host.IsValid() {
		t.Fatal("this machine has no IPv4 address but loopback")
	}
	l, err := net.Listen("tcp", netip.AddrPortFrom(host, 0).String())
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
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	for _, mode := range []sandbox.NetworkMode{sandbox.NetworkAllowed, sandbox.NetworkOpen} {
		t.Run(string(mode), func(t *testing.T) {
			k := newKernel(t)
			k.spec.Network = sandbox.Network{Mode: mode, Allow: []string{l.Addr().String()}}
			k.writeConnection()
			box, err := sandbox.Start(t.Context(), k.spec)
			if err != nil {
				t.Fatal(err)
			}
			k.box, k.spec = box, box.Spec()
			_, port, _ := net.SplitHostPort(l.Addr().String())
			k.want(fmt.Sprintf(`
import socket
def ask(s, text):
    try:
        s.sendall(text.encode()); return s.recv(100).decode() or "ended"
    except OSError as e: return e.strerror
def fresh():
    with socket.create_connection((%q, %s), 10) as s: return ask(s, "fresh")
def other():
    try:
        with socket.create_connection(("127.0.0.1", 5432), 10) as s: return "REACHED"
    except OSError as e: return e.strerror
s = socket.create_connection((%q, %s), 10)
print(ask(s, "one"), fresh(), other())`, host.String(), port, host.String(), port), "one fresh Connection refused")
			dump := k.dump(checkpoint.GoOn)
			k.want(`print(fresh(), other())`, "fresh Connection refused")
			k.stop()
			k.restore(dump)
			k.want(`print(fresh(), other(), ask(s, "two") != "two")`, "fresh Connection refused True")
		})
	}
}
