package e2e

import (
	"io"
	"net"
	"slices"
	"sync"
	"testing"
)

// balancer is a plain load balancer: it brings each TCP connection to the next replica
// that takes it, in turns, and knows nothing else.
type balancer struct {
	address  string
	replicas []string

	mu    sync.Mutex
	among []int // guarded by mu
	next  int
	conns map[net.Conn]struct{}
}

func newBalancer(t *testing.T, replicas ...string) *balancer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &balancer{address: l.Addr().String(), replicas: replicas, conns: map[net.Conn]struct{}{}}
	for i := range replicas {
		b.among = append(b.among, i)
	}
	var work sync.WaitGroup
	work.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() { b.serve(conn) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		b.mu.Lock()
		for conn := range b.conns {
			conn.Close()
		}
		b.mu.Unlock()
		work.Wait()
	})
	return b
}

// only has it use these replicas alone from now on.
func (b *balancer) only(among ...int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.among = among
}

func (b *balancer) serve(client net.Conn) {
	defer client.Close()
	b.mu.Lock()
	among, first := slices.Clone(b.among), b.next
	b.next++
	b.mu.Unlock()
	for i := range among {
		server, err := net.Dial("tcp", b.replicas[among[(first+i)%len(among)]])
		if err != nil {
			continue
		}
		defer server.Close()
		b.mu.Lock()
		b.conns[client], b.conns[server] = struct{}{}, struct{}{}
		b.mu.Unlock()
		done := make(chan struct{})
		go func() {
			defer close(done)
			io.Copy(server, client) //nolint:errcheck // either end may close
			server.(*net.TCPConn).CloseWrite()
		}()
		io.Copy(client, server) //nolint:errcheck // likewise
		client.Close()
		<-done
		b.mu.Lock()
		delete(b.conns, client)
		delete(b.conns, server)
		b.mu.Unlock()
		return
	}
}
