package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"time"

	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

func init() {
	roles["tunnel-relay"] = play(newRelayRole)
	roles["tunnel-forward"] = play(newForwardRole)
	roles["tunnel-acceptor"] = play(newAcceptorRole)
}

// relayRole is a tunneltest.Relay in a process of its own.
type relayRole struct {
	Target string
	Rate   int
	Delay  time.Duration
	Queue  int // 0: 1 MiB
}

type relayRunning struct{ *tunneltest.Relay }

func newRelayRole(c relayRole) (part, error) {
	r, err := tunneltest.NewRelay(c.Target, tunneltest.RelayConfig{Rate: c.Rate, Delay: c.Delay, Queue: c.Queue})
	return relayRunning{r}, err
}

func (r relayRunning) do(string) (any, error) { return r.Addr(), nil }
func (r relayRunning) close()                 { r.Close() }

// forwardRole forwards a TCP port to a target by two ends with a link between
// them: both in one process, whose CPU is then that of the link's two ends.
type forwardRole struct {
	Kind   string // between the ends: copy is bare TCP, tls TLS 1.3; bulk or solo a tunnel
	Target string
}

type forwarding struct {
	ln   net.Listener
	stop []func()
}

func newForwardRole(c forwardRole) (part, error) {
	f := &forwarding{}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	f.ln = ln
	// The far end connects a stream with the target.
	far := func(s net.Conn) {
		t, err := net.Dial("tcp", c.Target)
		if err != nil {
			_ = s.Close()
			return
		}
		splice(s, t)
	}
	var open func(context.Context) (net.Conn, error)
	switch c.Kind {
	case "copy", "tls":
		ca := tunneltest.NewCA()
		inner, outer := ca.ClientTLS("agent"), ca.ServerTLS()
		inner.DynamicRecordSizingDisabled, outer.DynamicRecordSizingDisabled = true, true
		mid, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		f.stop = append(f.stop, func() { _ = mid.Close() })
		go func() {
			for {
				s, err := mid.Accept()
				if err != nil {
					return
				}
				if c.Kind == "tls" {
					s = tls.Server(s, outer)
				}
				go far(s)
			}
		}()
		open = func(context.Context) (net.Conn, error) {
			s, err := net.Dial("tcp", mid.Addr().String())
			if err == nil && c.Kind == "tls" {
				s = tls.Client(s, inner)
			}
			return s, err
		}
	default:
		class := tunnel.Bulk
		if c.Kind == "solo" {
			class = tunnel.Solo
		}
		e, err := newEndpoint(nil)
		if err != nil {
			return nil, err
		}
		d, a, err := e.pair(context.Background(), "")
		if err != nil {
			return nil, err
		}
		f.stop = append(f.stop, func() { _ = d.Close(nil); e.close() })
		go func() {
			for {
				s, err := d.Listener().Accept()
				if err != nil {
					return
				}
				go far(s)
			}
		}()
		open = func(ctx context.Context) (net.Conn, error) { return a.Open(ctx, class) }
	}
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				s, err := open(context.Background())
				if err != nil {
					_ = conn.Close()
					return
				}
				splice(conn, s)
			}()
		}
	}()
	return f, nil
}

// splice copies both ways with a plain buffer: no splice(2), which would not be
// available to anything that encrypts.
func splice(a, b net.Conn) {
	var wg sync.WaitGroup
	for _, c := range [][2]net.Conn{{a, b}, {b, a}} {
		wg.Go(func() {
			_, _ = io.CopyBuffer(struct{ io.Writer }{c[0]}, struct{ io.Reader }{c[1]}, make([]byte, 64<<10))
			_ = a.Close()
			_ = b.Close()
		})
	}
	wg.Wait()
}

func (f *forwarding) do(string) (any, error) { return f.ln.Addr().String(), nil }

func (f *forwarding) close() {
	_ = f.ln.Close()
	for _, s := range f.stop {
		s()
	}
}

// acceptorRole is a control plane's end in a process of its own.
type acceptorRole struct {
	Addr        string // to listen on; empty is any
	Cert, Key   []byte // PEM of the inner TLS
	ClientCA    []byte // PEM
	ServeEcho   bool   // answer streams: control ones are echoed, others swallowed
	PerIP       int
	HTTPHandler bool // keep an http.Server on each tunnel's listener, as controlplane does
}

type acceptor struct {
	server *tunnel.Server
	http   *http.Server
	addr   string
	last   time.Time
	mu     sync.Mutex
}

func newAcceptorRole(c acceptorRole) (part, error) {
	a := &acceptor{}
	cfg, err := serverTLS(c)
	if err != nil {
		return nil, err
	}
	a.server = tunnel.NewServer(tunnel.ServerConfig{
		TLS: cfg, MaxHandshakesPerIP: c.PerIP,
		Handler: func(t *tunnel.Tunnel) {
			a.mu.Lock()
			a.last = time.Now()
			a.mu.Unlock()
			if c.ServeEcho {
				echoServe(t, true)
			}
			if c.HTTPHandler {
				srv := &http.Server{Handler: http.NotFoundHandler()}
				_ = srv.Serve(t.Listener())
			}
		},
	})
	if c.Addr == "" {
		c.Addr = "127.0.0.1:0"
	}
	ln, err := net.Listen("tcp", c.Addr)
	if err != nil {
		return nil, err
	}
	a.addr = ln.Addr().String()
	a.http = &http.Server{Handler: a.server, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = a.http.Serve(ln) }()
	return a, nil
}

func (a *acceptor) do(cmd string) (any, error) {
	cmd, arg, _ := strings.Cut(cmd, " ")
	switch cmd {
	case "addr":
		return a.addr, nil
	case "count":
		return len(a.server.Tunnels()), nil
	case "cpu":
		return nil, nil
	case "profile": // for whoever looks into the figure; not asked for by it
		runtime.GC()
		f, err := os.Create(arg)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		return nil, pprof.WriteHeapProfile(f)
	case "cpuprofile": // likewise
		f, err := os.Create(arg)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return nil, err
		}
		time.Sleep(10 * time.Second)
		pprof.StopCPUProfile()
		return nil, nil
	case "heap":
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return fmt.Sprintf("heap %d KiB in %d, idle %d, released %d, stacks %d, next GC %d, goroutines %d, collections %d",
			m.HeapAlloc>>10, m.HeapInuse>>10, m.HeapIdle>>10, m.HeapReleased>>10, m.StackInuse>>10, m.NextGC>>10, runtime.NumGoroutine(), m.NumGC), nil
	}
	return nil, errors.New("unknown command")
}

func (a *acceptor) close() {
	_ = a.http.Close()
	a.server.Close()
}
