package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/coder/websocket"
	"github.com/hashicorp/yamux"

	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

// tunnelMeasurements are the figures of package tunnel.
var tunnelMeasurements = []measurement{
	{"tunnel_bulk", benchBulkCPU},
	{"tunnel_small_writes", benchSmallWrites},
	{"tunnel_echo_under_bulk", benchEchoUnderBulk},
	{"tunnel_long_path", benchLongPath},
	{"tunnel_forward", benchForward},
	{"tunnel_request_under_bulk", benchRequestUnderBulk},
	{"tunnel_open_echo", benchOpenEcho},
	{"tunnel_idle", benchIdle},
	{"tunnel_uplink", benchUplink},
}

// link is two ends that can open and accept streams.
type link struct {
	open   func(context.Context) (net.Conn, error)
	accept func() (net.Conn, error)
	close  func()
}

// endpoint is an acceptor on loopback and what a dialer needs.
type endpoint struct {
	ca     *tunneltest.CA
	server *tunnel.Server
	http   *http.Server
	addr   string
	up     chan *tunnel.Tunnel
	dial   tunnel.DialConfig
}

func newEndpoint(set func(*tunnel.ServerConfig)) (*endpoint, error) {
	e := &endpoint{ca: tunneltest.NewCA(), up: make(chan *tunnel.Tunnel, 16)}
	cfg := tunnel.ServerConfig{TLS: e.ca.ServerTLS(), Handler: func(t *tunnel.Tunnel) { e.up <- t }}
	if set != nil {
		set(&cfg)
	}
	e.server = tunnel.NewServer(cfg)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	e.addr = ln.Addr().String()
	e.http = &http.Server{Handler: e.server, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = e.http.Serve(ln) }()
	e.dial = tunnel.DialConfig{URL: "ws://" + e.addr, TLS: e.ca.ClientTLS("agent")}
	return e, nil
}

func (e *endpoint) close() {
	e.server.Close()
	_ = e.http.Close()
}

// pair dials the endpoint, through via if not empty.
func (e *endpoint) pair(ctx context.Context, via string) (dialer, acceptor *tunnel.Tunnel, err error) {
	cfg := e.dial
	if via != "" {
		cfg.URL = "ws://" + via
	}
	d, err := tunnel.Dial(ctx, cfg)
	if err != nil {
		return nil, nil, err
	}
	select {
	case a := <-e.up:
		return d, a, nil
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
}

// ourLink is a tunnel; streams go from dialer (agent) to acceptor.
func ourLink(class tunnel.Class) (*link, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	e, err := newEndpoint(nil)
	if err != nil {
		return nil, err
	}
	d, a, err := e.pair(ctx, "")
	if err != nil {
		return nil, err
	}
	return &link{
		open:   func(ctx context.Context) (net.Conn, error) { return d.Open(ctx, class) },
		accept: a.Listener().Accept,
		close:  func() { _ = d.Close(nil); e.close() },
	}, nil
}

// tlsPair is TLS 1.3 on bare TCP with both certificates.
func tlsPair() (client, server *tls.Conn, err error) {
	ca := tunneltest.NewCA()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	s, err := ln.Accept()
	if err != nil {
		return nil, nil, err
	}
	return secure(ca, c, s)
}

func secure(ca *tunneltest.CA, c, s net.Conn) (client, server *tls.Conn, err error) {
	client, server = tls.Client(c, ca.ClientTLS("agent")), tls.Server(s, ca.ServerTLS())
	errc := make(chan error, 1)
	go func() { errc <- server.Handshake() }()
	if err := client.Handshake(); err != nil {
		return nil, nil, err
	}
	return client, server, <-errc
}

// yamuxLink is yamux with its defaults on two connections; the window, if not 0,
// is that of the receiver.
func yamuxLink(c, s net.Conn, window uint32) (*link, error) {
	cfg := yamux.DefaultConfig()
	cfg.LogOutput = io.Discard
	if window > 0 {
		cfg.MaxStreamWindowSize = window
	}
	cs, err := yamux.Client(c, cfg)
	if err != nil {
		return nil, err
	}
	ss, err := yamux.Server(s, cfg)
	if err != nil {
		return nil, err
	}
	return &link{
		open:   func(context.Context) (net.Conn, error) { return cs.Open() },
		accept: ss.Accept,
		close:  func() { _ = cs.Close(); _ = ss.Close() },
	}, nil
}

func yamuxOnTLS() (*link, error) {
	c, s, err := tlsPair()
	if err != nil {
		return nil, err
	}
	return yamuxLink(c, s, 4<<20) // the window that the notes' probe used
}

// yamuxOnNetConn is the obvious wiring: yamux.DefaultConfig on TLS on
// websocket.NetConn.
func yamuxOnNetConn() (*link, error) {
	ctx, cancel := context.WithCancel(context.Background())
	conns := make(chan net.Conn, 1)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		cancel()
		return nil, err
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ws, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		conns <- websocket.NetConn(ctx, ws, websocket.MessageBinary)
		<-ctx.Done()
	})}
	go func() { _ = srv.Serve(ln) }()
	ws, _, err := websocket.Dial(ctx, "ws://"+ln.Addr().String(), nil)
	if err != nil {
		cancel()
		return nil, err
	}
	c, s, err := secure(tunneltest.NewCA(), websocket.NetConn(ctx, ws, websocket.MessageBinary), <-conns)
	if err != nil {
		cancel()
		return nil, err
	}
	l, err := yamuxLink(c, s, 0)
	if err != nil {
		cancel()
		return nil, err
	}
	inner := l.close
	l.close = func() { inner(); cancel(); _ = srv.Close() }
	return l, nil
}

// rate is what a transfer took.
type rate struct {
	bytes   int64
	elapsed time.Duration
	cpu     time.Duration
}

func (r rate) mbps() float64     { return float64(r.bytes) / 1e6 / r.elapsed.Seconds() }
func (r rate) cpuPerGB() float64 { return r.cpu.Seconds() / (float64(r.bytes) / 1e9) }

// transfer writes total bytes in writes of size on one stream of l.
func transfer(ctx context.Context, l *link, size int, total int64) (rate, error) {
	c, err := l.open(ctx)
	if err != nil {
		return rate{}, err
	}
	defer c.Close()
	received := make(chan error, 1)
	go func() {
		s, err := l.accept()
		if err != nil {
			received <- err
			return
		}
		defer s.Close()
		buf := make([]byte, 64<<10)
		for left := total; left > 0; {
			n, err := s.Read(buf)
			if left -= int64(n); err != nil {
				received <- err
				return
			}
		}
		received <- nil
	}()
	buf := make([]byte, size)
	began, cpu := time.Now(), cpuSelf()
	for left := total; left > 0; left -= int64(size) {
		if _, err := c.Write(buf[:min(int64(size), left)]); err != nil {
			return rate{}, err
		}
	}
	select {
	case err := <-received:
		if err != nil {
			return rate{}, err
		}
	case <-ctx.Done():
		return rate{}, context.Cause(ctx)
	}
	return rate{total, time.Since(began), cpuSelf() - cpu}, nil
}

// rounds runs each maker in turn, n times, and returns the rates by name. The
// first round warms up and does not count.
func rounds(ctx context.Context, r *Report, n, size int, total int64, names []string, makers map[string]func() (*link, error)) (map[string][]rate, error) {
	out := make(map[string][]rate)
	for i := range n + 1 {
		for _, name := range names {
			l, err := makers[name]()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			amount := total
			if i == 0 {
				amount /= 8
			}
			x, err := transfer(ctx, l, size, amount)
			l.close()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			if i > 0 {
				out[name] = append(out[name], x)
				r.Printf("%-34s %7.0f MB/s  %5.2f CPU s/GB", name, x.mbps(), x.cpuPerGB())
			}
		}
	}
	return out, nil
}

func medianOf(rates []rate, f func(rate) float64) float64 {
	v := make([]float64, len(rates))
	for i, x := range rates {
		v[i] = f(x)
	}
	return median(v)
}

func benchBulkCPU(ctx context.Context, o Options, r *Report) error {
	makers := map[string]func() (*link, error){
		"yamux on TLS": yamuxOnTLS,
		"tunnel, bulk": func() (*link, error) { return ourLink(tunnel.Bulk) },
		"tunnel, solo": func() (*link, error) { return ourLink(tunnel.Solo) },
	}
	n, total := 5, int64(1<<30)
	if o.Short {
		n, total = 2, 1<<29
	}
	got, err := rounds(ctx, r, n, 64<<10, total, []string{"yamux on TLS", "tunnel, bulk", "tunnel, solo"}, makers)
	if err != nil {
		return err
	}
	r.AtMost("tunnel_bulk_cpu_vs_yamux_on_tls", medianOf(got["tunnel, bulk"], rate.cpuPerGB)/medianOf(got["yamux on TLS"], rate.cpuPerGB), 1.1, "x")
	return nil
}

func benchSmallWrites(ctx context.Context, o Options, r *Report) error {
	makers := map[string]func() (*link, error){
		"default yamux on websocket.NetConn": yamuxOnNetConn,
		"tunnel, bulk":                       func() (*link, error) { return ourLink(tunnel.Bulk) },
	}
	n, total := 3, int64(128<<20)
	if o.Short {
		n, total = 1, 32<<20
	}
	names := []string{"default yamux on websocket.NetConn", "tunnel, bulk"}
	got, err := rounds(ctx, r, n, 1<<10, total, names, makers)
	if err != nil {
		return err
	}
	r.AtLeast("tunnel_small_writes_vs_default", medianOf(got[names[1]], rate.mbps)/medianOf(got[names[0]], rate.mbps), 5, "x")
	return nil
}

// echoServe answers every stream of t with what it sends.
func echoServe(t *tunnel.Tunnel, swallow bool) {
	ln := t.Listener()
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			buf := make([]byte, 64<<10)
			for {
				n, err := c.Read(buf)
				if err != nil {
					return
				}
				if swallow && c.(tunnel.Classed).Class() != tunnel.Control {
					continue
				}
				if _, err := c.Write(buf[:n]); err != nil {
					return
				}
			}
		}()
	}
}

// echo measures round trips of 64 bytes on c for a while.
func echo(ctx context.Context, c net.Conn, pause, length time.Duration) ([]time.Duration, error) {
	buf := make([]byte, 64)
	var out []time.Duration
	for end := time.Now().Add(length); time.Now().Before(end) && ctx.Err() == nil; {
		began := time.Now()
		if _, err := c.Write(buf); err != nil {
			return out, err
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			return out, err
		}
		out = append(out, time.Since(began))
		time.Sleep(pause)
	}
	return out, nil
}

// pump writes to n streams of t until stop is called.
func pump(ctx context.Context, t *tunnel.Tunnel, n int, class tunnel.Class) (stop func(), err error) {
	var conns []net.Conn
	var wg sync.WaitGroup
	for range n {
		c, err := t.Open(ctx, class)
		if err != nil {
			return nil, err
		}
		conns = append(conns, c)
		wg.Go(func() {
			buf := make([]byte, 64<<10)
			for {
				if _, err := c.Write(buf); err != nil {
					return
				}
			}
		})
	}
	return func() {
		for _, c := range conns {
			_ = c.Close()
		}
		wg.Wait()
	}, nil
}

func benchEchoUnderBulk(ctx context.Context, o Options, r *Report) error {
	const rtt = 20 * time.Millisecond
	e, err := newEndpoint(nil)
	if err != nil {
		return err
	}
	defer e.close()
	relay, err := tunneltest.NewRelay(e.addr, tunneltest.RelayConfig{Rate: 100e6 / 8, Delay: rtt / 2, Queue: 4 << 20})
	if err != nil {
		return err
	}
	defer relay.Close()
	worst := 0.0
	for _, up := range []bool{true, false} {
		d, a, err := e.pair(ctx, relay.Addr())
		if err != nil {
			return err
		}
		name := "agent to control plane"
		if !up {
			d, a = a, d
			name = "control plane to agent"
		}
		go echoServe(a, true)
		c, err := d.Open(ctx, tunnel.Control)
		if err != nil {
			return err
		}
		length := 10 * time.Second
		if o.Short {
			length = 4 * time.Second
		}
		idle, err := echo(ctx, c, 5*time.Millisecond, 2*time.Second)
		if err != nil {
			return err
		}
		stop, err := pump(ctx, d, 4, tunnel.Bulk)
		if err != nil {
			return err
		}
		begin, err := echo(ctx, c, 5*time.Millisecond, 3*time.Second)
		if err != nil {
			return err
		}
		before := relay.Bytes()
		began := time.Now()
		loaded, err := echo(ctx, c, 5*time.Millisecond, length)
		if err != nil {
			return err
		}
		mbit := float64(relay.Bytes()-before) * 8 / 1e6 / time.Since(began).Seconds()
		stop()
		_ = d.Close(nil)
		over := ms(quantile(loaded, .99) - rtt)
		r.Printf("%s: idle p50 %.1f p99 %.1f ms; first 3 s of bulk p50 %.1f p99 %.1f max %.1f ms; then p50 %.1f p99 %.1f max %.1f ms at %.0f Mbit/s", name,
			ms(quantile(idle, .5)), ms(quantile(idle, .99)), ms(quantile(begin, .5)), ms(quantile(begin, .99)), ms(quantile(begin, 1)),
			ms(quantile(loaded, .5)), ms(quantile(loaded, .99)), ms(quantile(loaded, 1)), mbit)
		worst = max(worst, over)
	}
	r.AtMost("tunnel_echo_under_bulk_p99_over_rtt", worst, 10, "ms")
	return nil
}

func benchLongPath(ctx context.Context, o Options, r *Report) error {
	e, err := newEndpoint(nil)
	if err != nil {
		return err
	}
	defer e.close()
	relay, err := start(ctx, "tunnel-relay", relayRole{Target: e.addr, Delay: 25 * time.Millisecond})
	if err != nil {
		return err
	}
	defer relay.stop()
	var addr string
	if err := relay.ask("addr", &addr); err != nil {
		return err
	}
	for _, class := range []tunnel.Class{tunnel.Bulk, tunnel.Solo} {
		var best []float64
		for range 3 {
			d, a, err := e.pair(ctx, addr)
			if err != nil {
				return err
			}
			l := &link{
				open:   func(ctx context.Context) (net.Conn, error) { return d.Open(ctx, class) },
				accept: a.Listener().Accept,
			}
			x, err := transfer(ctx, l, 64<<10, 2<<30)
			_ = d.Close(nil)
			if err != nil {
				return err
			}
			r.Printf("%-5s %7.0f MB/s, start included; tunnel's RTT %.1f ms", class, x.mbps(), ms(d.RTT()))
			best = append(best, x.mbps())
		}
		goal := 200.0
		if class == tunnel.Solo {
			goal = 400
		}
		r.AtLeast("tunnel_rtt50_"+class.String()+"_mbps", median(best), goal, "MB/s")
	}
	return nil
}

func benchOpenEcho(ctx context.Context, o Options, r *Report) error {
	e, err := newEndpoint(nil)
	if err != nil {
		return err
	}
	defer e.close()
	d, a, err := e.pair(ctx, "")
	if err != nil {
		return err
	}
	defer d.Close(nil)
	go echoServe(a, false)
	var lowest float64
	for _, parallel := range []int{1, 16} {
		const length = 3 * time.Second
		var mu sync.Mutex
		var all []time.Duration
		var first error
		var wg sync.WaitGroup
		cpu := cpuSelf()
		for range parallel {
			wg.Go(func() {
				buf := make([]byte, 64)
				for end := time.Now().Add(length); time.Now().Before(end); {
					began := time.Now()
					c, err := d.Open(ctx, tunnel.Control)
					if err == nil {
						if _, err = c.Write(buf); err == nil {
							_, err = io.ReadFull(c, buf)
						}
						_ = c.Close()
					}
					mu.Lock()
					first = errors.Join(first, err)
					all = append(all, time.Since(began))
					mu.Unlock()
					if err != nil {
						return
					}
				}
			})
		}
		wg.Wait()
		if first != nil {
			return first
		}
		perSecond := float64(len(all)) / length.Seconds()
		r.Printf("%2d at once: %.0f/s, p50 %.3f ms, p99 %.3f ms, %.0f us CPU each", parallel, perSecond, ms(quantile(all, .5)), ms(quantile(all, .99)), float64((cpuSelf()-cpu).Microseconds())/float64(len(all)))
		if lowest == 0 || perSecond < lowest {
			lowest = perSecond
		}
	}
	r.AtLeast("tunnel_open_echo", lowest, 3000, "/s")
	return nil
}
