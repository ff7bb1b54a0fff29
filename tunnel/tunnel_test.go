package tunnel_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

var classes = []tunnel.Class{tunnel.Control, tunnel.Bulk, tunnel.Solo}

// echoOn answers every stream of t with what it sends, until the tunnel ends.
func echoOn(t testing.TB, tun *tunnel.Tunnel) {
	t.Helper()
	done := make(chan struct{})
	t.Cleanup(func() { _ = tun.Close(nil); <-done })
	go func() {
		defer close(done)
		ln := tun.Listener()
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(struct{ io.Writer }{c}, c)
			}()
		}
	}()
}

func open(t testing.TB, tun *tunnel.Tunnel, class tunnel.Class) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c, err := tun.Open(ctx, class)
	if err != nil {
		t.Fatalf("open %v: %v", class, err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestEcho(t *testing.T) {
	for _, fromDialer := range []bool{true, false} {
		for _, class := range classes {
			t.Run(fmt.Sprintf("%v/dialer=%v", class, fromDialer), func(t *testing.T) {
				d, a := tunneltest.Pair(t)
				if !fromDialer {
					d, a = a, d
				}
				echoOn(t, a)
				c := open(t, d, class)
				if got := c.(tunnel.Classed).Class(); got != class {
					t.Errorf("class = %v, want %v", got, class)
				}
				for _, n := range []int{1, 100, 4096, 70_000, 1 << 20} {
					want := make([]byte, n)
					_, _ = rand.Read(want)
					errc := make(chan error, 1)
					go func() { _, err := c.Write(want); errc <- err }()
					got := make([]byte, n)
					if _, err := io.ReadFull(c, got); err != nil {
						t.Fatalf("read %d: %v", n, err)
					}
					if err := <-errc; err != nil {
						t.Fatal(err)
					}
					if sha256.Sum256(got) != sha256.Sum256(want) {
						t.Fatalf("%d bytes came back changed", n)
					}
				}
			})
		}
	}
}

func TestHTTP(t *testing.T) {
	for _, fromDialer := range []bool{true, false} {
		for _, class := range classes {
			t.Run(fmt.Sprintf("%v/dialer=%v", class, fromDialer), func(t *testing.T) {
				d, a := tunneltest.Pair(t)
				if !fromDialer {
					d, a = a, d
				}
				srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					n, _ := io.Copy(io.Discard, r.Body)
					fmt.Fprintf(w, "%d ", n)
					_, _ = w.Write(make([]byte, 300_000))
				})}
				served := make(chan struct{})
				go func() { defer close(served); _ = srv.Serve(a.Listener()) }()
				defer func() { _ = srv.Close(); <-served }()
				client := &http.Client{Transport: d.Transport(class)}
				for i := range 20 {
					resp, err := client.Post("http://peer/x", "text/plain", &io.LimitedReader{R: zeros{}, N: int64(i * 10_000)})
					if err != nil {
						t.Fatal(err)
					}
					b, err := io.ReadAll(resp.Body)
					_ = resp.Body.Close()
					if err != nil || len(b) < 300_000 {
						t.Fatalf("body: %d bytes, %v", len(b), err)
					}
				}
			})
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestCloseEndsBothDirections(t *testing.T) {
	for _, class := range classes {
		t.Run(class.String(), func(t *testing.T) {
			d, a := tunneltest.Pair(t)
			c := open(t, d, class)
			if _, err := c.Write([]byte("last words")); err != nil {
				t.Fatal(err)
			}
			s, err := a.Listener().Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(s)
			if err != nil || string(got) != "last words" {
				t.Fatalf("got %q, %v", got, err)
			}
			deadline := time.Now().Add(20 * time.Second)
			for {
				if _, err := s.Write(make([]byte, 64<<10)); err != nil {
					break
				}
				if time.Now().After(deadline) {
					t.Fatal("writes to a stream that the peer closed go on")
				}
			}
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
				t.Errorf("read after close: %v", err)
			}
		})
	}
}
