package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

// pemOf encodes a certificate and its key for a role.
func pemOf(c tls.Certificate) (cert, key []byte, err error) {
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		return nil, nil, err
	}
	cert = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})
	return cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func serverTLS(c acceptorRole) (*tls.Config, error) {
	cert, err := tls.X509KeyPair(c.Cert, c.Key)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(c.ClientCA) {
		return nil, errors.New("no client CA")
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}, nil
}

// acceptorProcess starts an acceptor in a process of its own.
func acceptorProcess(ctx context.Context, ca *tunneltest.CA, set func(*acceptorRole)) (*child, string, error) {
	c := acceptorRole{ClientCA: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Cert.Raw})}
	var err error
	if c.Cert, c.Key, err = pemOf(ca.Issue(tunneltest.ServerName)); err != nil {
		return nil, "", err
	}
	set(&c)
	p, err := start(ctx, "tunnel-acceptor", c)
	if err != nil {
		return nil, "", err
	}
	var addr string
	if err := p.ask("addr", &addr); err != nil {
		p.stop()
		return nil, "", err
	}
	return p, addr, nil
}

// source is a target that sends zeros to whoever connects, until it hangs up.
func source() (addr string, stop func(), err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 256<<10)
				for {
					if _, err := c.Write(buf); err != nil {
						return
					}
				}
			}()
		}
	}()
	return ln.Addr().String(), func() { _ = ln.Close() }, nil
}

// benchForward takes bytes from a TCP port behind the agent through the control
// plane's end to a TCP client: the shape in which peers were measured.
func benchForward(ctx context.Context, o Options, r *Report) error {
	addr, stop, err := source()
	if err != nil {
		return err
	}
	defer stop()
	n, total := 5, int64(2<<30)
	if o.Short {
		n, total = 2, 1<<29
	}
	kinds := []string{"copy", "tls", "solo", "bulk"}
	cpus, speeds := map[string][]float64{}, map[string][]float64{}
	for range n {
		for _, kind := range kinds {
			x, err := forwardOnce(ctx, kind, addr, total)
			if err != nil {
				return fmt.Errorf("%s: %w", kind, err)
			}
			r.Printf("%-5s %7.0f MB/s  %5.2f CPU s/GB in both ends", kind, x.mbps(), x.cpuPerGB())
			cpus[kind] = append(cpus[kind], x.cpuPerGB())
			speeds[kind] = append(speeds[kind], x.mbps())
		}
	}
	for _, kind := range kinds[1:] {
		r.Printf("%s: %.2f times the CPU and %.2f times the rate of copying", kind, median(cpus[kind])/median(cpus["copy"]), median(speeds[kind])/median(speeds["copy"]))
	}
	r.AtMost("tunnel_forward_cpu_vs_copy", median(cpus["solo"])/median(cpus["copy"]), 2.2, "x")
	return nil
}

func forwardOnce(ctx context.Context, kind, target string, total int64) (rate, error) {
	p, err := start(ctx, "tunnel-forward", forwardRole{Kind: kind, Target: target})
	if err != nil {
		return rate{}, err
	}
	defer p.stop()
	var addr string
	if err := p.ask("addr", &addr); err != nil {
		return rate{}, err
	}
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return rate{}, err
	}
	defer c.Close()
	buf := make([]byte, 256<<10)
	if _, err := io.CopyN(io.Discard, c, 64<<20); err != nil { // warm
		return rate{}, err
	}
	if err := p.ask("addr", &addr); err != nil {
		return rate{}, err
	}
	cpu, began := p.cpu, time.Now()
	if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(c, total), buf); err != nil {
		return rate{}, err
	}
	took := time.Since(began)
	if err := p.ask("addr", &addr); err != nil {
		return rate{}, err
	}
	return rate{total, took, p.cpu - cpu}, nil
}

// benchRequestUnderBulk has the two ends in two processes, as in life.
func benchRequestUnderBulk(ctx context.Context, o Options, r *Report) error {
	ca := tunneltest.NewCA()
	p, addr, err := acceptorProcess(ctx, ca, func(c *acceptorRole) { c.ServeEcho = true })
	if err != nil {
		return err
	}
	defer p.stop()
	d, err := tunnel.Dial(ctx, tunnel.DialConfig{URL: "ws://" + addr, TLS: ca.ClientTLS("agent")})
	if err != nil {
		return err
	}
	defer d.Close(nil)
	c, err := d.Open(ctx, tunnel.Control)
	if err != nil {
		return err
	}
	length := 10 * time.Second
	if o.Short {
		length = 3 * time.Second
	}
	idle, err := echo(ctx, c, time.Millisecond, length/2)
	if err != nil {
		return err
	}
	stop, err := pump(ctx, d, 4, tunnel.Bulk)
	if err != nil {
		return err
	}
	defer stop()
	if _, err := echo(ctx, c, time.Millisecond, time.Second); err != nil {
		return err
	}
	loaded, err := echo(ctx, c, time.Millisecond, length)
	if err != nil {
		return err
	}
	r.Printf("idle: p50 %.3f p99 %.3f ms; four bulk streams: p50 %.3f p99 %.3f max %.1f ms", ms(quantile(idle, .5)), ms(quantile(idle, .99)),
		ms(quantile(loaded, .5)), ms(quantile(loaded, .99)), ms(quantile(loaded, 1)))
	r.AtMost("tunnel_request_under_bulk_p50_over_idle", ms(quantile(loaded, .5)-quantile(idle, .5)), 0.3, "ms")
	r.AtMost("tunnel_request_under_bulk_p99_over_idle", ms(quantile(loaded, .99)-quantile(idle, .99)), 5, "ms")
	return nil
}

// agents keeps n tunnels up, as n agents would.
type agents struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
	up     atomic.Int64
}

func startAgents(n int, url string, ca *tunneltest.CA) *agents {
	ctx, cancel := context.WithCancel(context.Background())
	a := &agents{cancel: cancel}
	cfg := tunnel.DialConfig{URL: url, TLS: ca.ClientTLS("agent")} // one certificate for all saves making 5000
	for range n {
		a.wg.Go(func() {
			_ = tunnel.KeepUp(ctx, tunnel.BackoffConfig{}, func(ctx context.Context) (*tunnel.Tunnel, error) {
				return tunnel.Dial(ctx, cfg)
			}, func(ctx context.Context, t *tunnel.Tunnel) error {
				a.up.Add(1)
				defer a.up.Add(-1)
				<-ctx.Done()
				return nil
			})
		})
	}
	return a
}

func (a *agents) stop() { a.cancel(); a.wg.Wait() }

// wait until the acceptor counts n tunnels.
func waitCount(ctx context.Context, p *child, n int, limit time.Duration) (time.Duration, error) {
	began := time.Now()
	for {
		var got int
		if err := p.ask("count", &got); err != nil {
			return 0, err
		}
		if got >= n {
			return time.Since(began), nil
		}
		if time.Since(began) > limit || ctx.Err() != nil {
			return 0, fmt.Errorf("only %d of %d tunnels after %v", got, n, limit)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func benchIdle(ctx context.Context, o Options, r *Report) error {
	n := 5000
	if o.Short {
		n = 1000
	}
	ca := tunneltest.NewCA()
	set := func(addr string) func(*acceptorRole) {
		return func(c *acceptorRole) { c.Addr, c.PerIP, c.HTTPHandler = addr, 256, true }
	}
	p, addr, err := acceptorProcess(ctx, ca, set(""))
	if err != nil {
		return err
	}
	empty, err := uniqueMemory(p.pid())
	if err != nil {
		return err
	}
	a := startAgents(n, "ws://"+addr, ca)
	defer a.stop()
	took, err := waitCount(ctx, p, n, 2*time.Minute)
	if err != nil {
		return err
	}
	r.Printf("%d agents up after %.1f s", n, took.Seconds())
	if path := os.Getenv("POSTERN_BENCH_HEAP"); path != "" {
		if err := errors.Join(p.ask("profile "+path, nil), p.ask("cpuprofile "+path+".cpu", nil)); err != nil {
			return err
		}
	}
	var after bytes.Buffer
	settle := 40 * time.Second
	if o.Short {
		settle = 20 * time.Second
	}
	var cpuPercent float64
	for end := time.Now().Add(settle); time.Now().Before(end) && ctx.Err() == nil; {
		time.Sleep(10 * time.Second)
		mem, err := uniqueMemory(p.pid())
		if err != nil {
			return err
		}
		var heap string
		before := p.cpu
		if err := p.ask("heap", &heap); err != nil {
			return err
		}
		cpuPercent = (p.cpu - before).Seconds() / 10 * 100
		fmt.Fprintf(&after, "  %.1f KiB each, %.2f %% of a core; %s\n", float64(mem-empty)/1024/float64(n), cpuPercent, heap)
	}
	r.Printf("%s", bytes.TrimRight(after.Bytes(), "\n"))
	mem, err := uniqueMemory(p.pid())
	if err != nil {
		return err
	}
	if err := p.ask("cpu", nil); err != nil {
		return err
	}
	cpu := p.cpu
	const watch = 20 * time.Second
	time.Sleep(watch)
	if err := p.ask("cpu", nil); err != nil {
		return err
	}
	cpuPercent = (p.cpu - cpu).Seconds() / watch.Seconds() * 100
	r.AtMost("tunnel_idle_memory_per_agent", float64(mem-empty)/1024/float64(n), 50, "KiB")
	r.AtMost("tunnel_idle_cpu", cpuPercent, 1, "%")

	p.kill()
	time.Sleep(3 * time.Second)
	p, _, err = acceptorProcess(ctx, ca, set(addr))
	if err != nil {
		return err
	}
	if took, err = waitCount(ctx, p, n, 2*time.Minute); err != nil {
		return err
	}
	r.AtMost("tunnel_storm_back", took.Seconds(), 30, "s")
	p.kill()
	a.stop()

	worst := 0.0
	lone := startAgents(1, "ws://"+addr, ca)
	defer lone.stop()
	for i := range 5 {
		if p, _, err = acceptorProcess(ctx, ca, set(addr)); err != nil {
			return err
		}
		if took, err = waitCount(ctx, p, 1, time.Minute); err != nil {
			return err
		}
		if i > 0 {
			worst = max(worst, took.Seconds())
			r.Printf("a lone agent was back after %.2f s", took.Seconds())
		}
		time.Sleep(time.Second)
		p.kill()
		time.Sleep(3 * time.Second)
	}
	r.AtMost("tunnel_lone_back", worst, 1, "s")
	return nil
}
