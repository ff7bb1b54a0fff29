package tunnel_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

func TestBackoffBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := tunnel.NewBackoff(tunnel.BackoffConfig{})
		bound := 200 * time.Millisecond
		var sum, bounds time.Duration
		for i := range 400 {
			w := b.Next(errors.New("x"))
			if w < 0 || w > bound {
				t.Fatalf("wait %d is %v, bound %v", i, w, bound)
			}
			sum, bounds = sum+w, bounds+bound
			bound = min(2*bound, 30*time.Second)
		}
		if r := float64(sum) / float64(bounds); r < 0.4 || r > 0.6 {
			t.Errorf("mean wait is %.2f of the bound, want full jitter: 0.5", r)
		}
		b.Reset()
		if w := b.Next(errors.New("x")); w > 200*time.Millisecond {
			t.Errorf("after Reset: %v", w)
		}
		// While the host refuses connections the control plane is restarting.
		refused := fmt.Errorf("dial: %w", syscall.ECONNREFUSED)
		for range 100 {
			if w := b.Next(refused); w > 800*time.Millisecond {
				t.Fatalf("refused: %v", w)
			}
			time.Sleep(time.Second)
		}
		time.Sleep(10 * time.Minute)
		if w := b.Next(refused); w > 5*time.Second {
			t.Errorf("refused for long: %v", w)
		}
		// However long the restart took, the next loss is but the second failure.
		for range 20 {
			b.Reset()
			b.Next(errors.New("x"))
			for range 50 {
				b.Next(refused)
			}
			if w := b.Next(tunnel.ErrLost); w > 400*time.Millisecond {
				t.Fatalf("lost after a restart: %v", w)
			}
		}
		// A reverse proxy says the same in its own way.
		b.Reset()
		for range 50 {
			if w := b.Next(&tunnel.DialError{Step: tunnel.StepUpgrade, Status: 502, Err: errors.New("x")}); w > 800*time.Millisecond {
				t.Fatalf("bad gateway: %v", w)
			}
		}
	})
}

func TestKeepUpRetriesAndStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logged bytes.Buffer
		gone := errors.New("revoked")
		dials := 0
		var at []time.Duration
		began := time.Now()
		wake := make(chan struct{})
		err := tunnel.KeepUp(t.Context(), tunnel.BackoffConfig{
			Logger: slog.New(slog.NewTextHandler(&logged, nil)),
			Wake:   wake,
			Stop:   func(err error) bool { return errors.Is(err, gone) },
		}, func(context.Context) (*tunnel.Tunnel, error) {
			dials++
			at = append(at, time.Since(began))
			switch {
			case dials < 30:
				return nil, &tunnel.DialError{Step: tunnel.StepTCP, Target: "x", Err: errors.New("unreachable")}
			case dials == 30:
				go func() { wake <- struct{}{} }() // the network changes: no wait
				return nil, &tunnel.DialError{Step: tunnel.StepDNS, Target: "x", Err: errors.New("no name")}
			default:
				return nil, gone
			}
		}, nil)
		if !errors.Is(err, gone) || dials != 31 {
			t.Errorf("%d dials, %v", dials, err)
		}
		if at[30] != at[29] {
			t.Errorf("a wake-up waited %v", at[30]-at[29])
		}
		if n := strings.Count(logged.String(), "\n"); n != 3 {
			t.Errorf("%d log lines for 3 states:\n%s", n, logged.String())
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		stop := errors.New("stop")
		time.AfterFunc(time.Minute, func() { cancel(stop) })
		err = tunnel.KeepUp(ctx, tunnel.BackoffConfig{}, func(context.Context) (*tunnel.Tunnel, error) { return nil, errors.New("no") }, nil)
		if !errors.Is(err, stop) {
			t.Errorf("got %v", err)
		}
	})
}

// keep runs KeepUp against h until the test ends and reports each tunnel.
func keep(t *testing.T, h *tunneltest.Host, use func(context.Context, *tunnel.Tunnel) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = tunnel.KeepUp(ctx, tunnel.BackoffConfig{Min: 5 * time.Millisecond, Max: 50 * time.Millisecond, StableAfter: 100 * time.Millisecond},
			func(ctx context.Context) (*tunnel.Tunnel, error) { return tunnel.Dial(ctx, h.Dialed) }, use)
	}()
	t.Cleanup(func() { cancel(); <-done })
}

func TestKeepUpAfterLoss(t *testing.T) {
	h := tunneltest.NewHost(t, tunneltest.WithConfig(quick), tunneltest.WithRelay(tunneltest.RelayConfig{}))
	keep(t, h, func(ctx context.Context, tun *tunnel.Tunnel) error { <-ctx.Done(); return nil })
	next := func() *tunnel.Tunnel {
		select {
		case a := <-h.Accepted():
			return a
		case <-time.After(time.Minute):
			t.Fatal("no tunnel")
			return nil
		}
	}
	a := next()
	h.Relay.Cut()
	waitEnd(t, a, tunnel.ErrLost)
	a = next()
	h.Relay.Silence()
	waitEnd(t, a, tunnel.ErrSilent)
	h.Relay.Resume()
	a = next()
	_ = a.Close(tunnel.ErrReplaced)
	next()
}

// On a go-away the next tunnel is up before the old one ends, and the old one's
// streams finish.
func TestKeepUpMovesBeforeItBreaks(t *testing.T) {
	h := tunneltest.NewHost(t)
	var streams atomic.Int32
	keep(t, h, func(ctx context.Context, tun *tunnel.Tunnel) error {
		for {
			c, err := tun.Listener().Accept()
			if err != nil {
				return nil
			}
			streams.Add(1)
			go func(c net.Conn) {
				defer c.Close()
				b := make([]byte, 4)
				for {
					n, err := c.Read(b)
					if err != nil {
						return
					}
					_, _ = c.Write(b[:n])
				}
			}(c)
		}
	})
	old := <-h.Accepted()
	c := open(t, old, tunnel.Control)
	exchange(t, c, 4)
	old.GoAway(0, time.Minute, "upgrade")
	fresh := <-h.Accepted()
	exchange(t, open(t, fresh, tunnel.Control), 4)
	exchange(t, c, 4)
	if old.Err() != nil {
		t.Fatalf("the old tunnel ended with a stream on it: %v", old.Err())
	}
	_ = c.Close()
	waitEnd(t, old, tunnel.ErrReplaced)
	if fresh.Err() != nil {
		t.Error(fresh.Err())
	}
}

func TestWatchNetworkEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	ch, err := tunnel.WatchNetwork(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if ch == nil {
		t.Fatal("no channel")
	}
	cancel()
}

// While the control plane restarts, an agent asks often, also through proxies.
func TestAbsentServersAreAskedOften(t *testing.T) {
	refused := &tunnel.DialError{Step: tunnel.StepTCP, Err: syscall.ECONNREFUSED}
	for _, tc := range []struct {
		name  string
		err   error
		often bool
	}{
		{"refused", refused, true},
		{"no server behind a reverse proxy", &tunnel.DialError{Step: tunnel.StepUpgrade, Status: 502}, true},
		{"no server behind a proxy", &tunnel.DialError{Step: tunnel.StepProxy, Status: 503}, true},
		{"no server behind tinyproxy", &tunnel.DialError{Step: tunnel.StepProxy, Status: 500}, true},
		{"overloaded", &tunnel.DialError{Step: tunnel.StepUpgrade, Status: 503}, false},
		{"wrong credentials for the proxy", &tunnel.DialError{Step: tunnel.StepProxy, Status: 407}, false},
		{"silence", &tunnel.DialError{Step: tunnel.StepTCP, Err: os.ErrDeadlineExceeded}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := tunnel.NewBackoff(tunnel.BackoffConfig{})
			var longest time.Duration
			for range 200 {
				longest = max(longest, b.Next(tc.err))
			}
			if often := longest < time.Second; often != tc.often {
				t.Errorf("it waits up to %s", longest)
			}
		})
	}
}
