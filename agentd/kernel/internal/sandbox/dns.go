package sandbox

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// Names. Inside, 127.0.0.53 answers. In mode allowed it knows the names of the
// allow list and no other: each has an address of its own from 198.18.0.0/15,
// which stands for it, and the host looks the name up when a connection is made.
// So nothing is asked outside, nothing can be carried out in questions, and a name
// server can't turn an allowed name into an address of the host. In mode open
// questions go to the host's own name servers as they are.

// resolverInside is where names are asked for.
const resolverInside = "127.0.0.53:53"

// Bounds of a name server.
const (
	dnsTimeout   = 5 * time.Second
	maxQuestion  = 4096 // bytes, by UDP
	maxQuestions = 64   // at once, by UDP; more are dropped
	dnsTTL       = 60   // seconds
)

// answerUDP serves questions until close.
func (f *fence) answerUDP(c net.PacketConn) {
	busy := make(chan struct{}, maxQuestions)
	for {
		buf := make([]byte, maxQuestion)
		n, from, err := c.ReadFrom(buf)
		if f.ctx.Err() != nil {
			return
		}
		if err != nil {
			select {
			case <-f.ctx.Done():
				return
			case <-time.After(10 * time.Millisecond):
			}
			continue
		}
		select {
		case busy <- struct{}{}:
		default:
			continue
		}
		f.wg.Go(func() {
			defer func() { <-busy }()
			if reply, err := f.resolve(buf[:n], "udp"); err == nil {
				_, _ = c.WriteTo(reply, from)
			}
		})
	}
}

// answerTCP serves one connection: each message has its length before it.
func (f *fence) answerTCP(c *net.TCPConn) {
	for {
		_ = c.SetDeadline(time.Now().Add(dnsTimeout))
		question, err := readDNS(c)
		if err != nil {
			return
		}
		reply, err := f.resolve(question, "tcp")
		if err != nil {
			return
		}
		if err := writeDNS(c, reply); err != nil {
			return
		}
	}
}

func readDNS(r io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	message := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(r, message)
	return message, err
}

func writeDNS(w io.Writer, message []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...))
	return err
}

// resolve answers a question.
func (f *fence) resolve(question []byte, network string) ([]byte, error) {
	if f.rules.mode == NetworkOpen {
		return f.askHost(question, network)
	}
	return f.rules.answer(question)
}

// askHost passes a question to the host's name servers, one after another.
func (f *fence) askHost(question []byte, network string) ([]byte, error) {
	err := errors.New("this host has no name server")
	for _, server := range nameServers("/etc/resolv.conf") {
		var reply []byte
		if reply, err = askServer(f.ctx, server, question, network); err == nil {
			return reply, nil
		}
	}
	return nil, err
}

func askServer(ctx context.Context, server string, question []byte, network string) ([]byte, error) {
	d := net.Dialer{Timeout: dnsTimeout}
	c, err := d.DialContext(ctx, network, server)
	if err != nil {
		return nil, err
	}
	defer c.Close() //nolint:errcheck // it served its turn
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	_ = c.SetDeadline(time.Now().Add(dnsTimeout))
	if network == "tcp" {
		if err := writeDNS(c, question); err != nil {
			return nil, err
		}
		return readDNS(c)
	}
	if _, err := c.Write(question); err != nil {
		return nil, err
	}
	reply := make([]byte, 65535)
	n, err := c.Read(reply)
	return reply[:n], err
}

// nameServers are those of a resolv.conf, with port.
func nameServers(file string) []string {
	text, _ := os.ReadFile(file)
	var servers []string
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(fields[1]); err == nil && len(servers) < 3 {
			servers = append(servers, netip.AddrPortFrom(a, 53).String())
		}
	}
	return servers
}

// answer answers from the allow list.
func (r *rules) answer(question []byte) ([]byte, error) {
	var p dnsmessage.Parser
	header, err := p.Start(question)
	if err != nil {
		return nil, err
	}
	if header.Response {
		return nil, errors.New("not a question")
	}
	q, err := p.Question()
	if err != nil {
		return nil, err
	}
	reply := dnsmessage.Header{ID: header.ID, Response: true, RecursionDesired: header.RecursionDesired, RecursionAvailable: true}
	a, known := r.addressOf(q.Name.String())
	switch {
	case header.OpCode != 0:
		reply.RCode = dnsmessage.RCodeNotImplemented
	case !known:
		reply.RCode = dnsmessage.RCodeNameError
	}
	b := dnsmessage.NewBuilder(nil, reply)
	if err := b.StartQuestions(); err != nil {
		return nil, err
	}
	if err := b.Question(q); err != nil {
		return nil, err
	}
	if known && reply.RCode == 0 && q.Type == dnsmessage.TypeA && q.Class == dnsmessage.ClassINET {
		if err := b.StartAnswers(); err != nil {
			return nil, err
		}
		if err := b.AResource(dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: dnsTTL}, dnsmessage.AResource{A: a.As4()}); err != nil {
			return nil, err
		}
	}
	return b.Finish()
}
