package tunnel_test

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

// A path that falls silent without closing anything is noticed by both ends,
// with and without streams, and never sooner than DeadAfter.
func TestSilenceIsNoticed(t *testing.T) {
	for _, busy := range []bool{false, true} {
		t.Run(map[bool]string{false: "idle", true: "busy"}[busy], func(t *testing.T) {
			h := tunneltest.NewHost(t, tunneltest.WithConfig(quick), tunneltest.WithRelay(tunneltest.RelayConfig{}))
			d, a := h.Dial(t)
			echoOn(t, a)
			if busy {
				c := open(t, d, tunnel.Bulk)
				go func() {
					for {
						if _, err := c.Write(make([]byte, 32<<10)); err != nil {
							return
						}
					}
				}()
				_, _ = io.CopyN(io.Discard, c, 1<<20)
			}
			began := time.Now()
			h.Relay.Silence()
			waitEnd(t, d, tunnel.ErrSilent)
			waitEnd(t, a, tunnel.ErrSilent)
			if took := time.Since(began); took < 400*time.Millisecond {
				t.Errorf("dead after %v, DeadAfter is 500 ms", took)
			}
		})
	}
}

// An idle tunnel lives: heartbeats are answered.
func TestIdleTunnelLives(t *testing.T) {
	d, a := tunneltest.Pair(t, tunneltest.WithConfig(quick))
	select {
	case <-d.Done():
		t.Fatalf("dialer: %v", d.Err())
	case <-a.Done():
		t.Fatalf("acceptor: %v", a.Err())
	case <-time.After(2 * time.Second): // four times DeadAfter
	}
	if d.RTT() <= 0 || a.RTT() <= 0 {
		t.Errorf("rtt %v, %v", d.RTT(), a.RTT())
	}
}

// A link of 100 kB/s under four bulk streams moves, so it is never cut, although
// heartbeats wait behind a queue for longer than DeadAfter.
func TestSlowLinkIsNotCut(t *testing.T) {
	for _, fromDialer := range []bool{true, false} {
		t.Run(map[bool]string{true: "upload", false: "download"}[fromDialer], func(t *testing.T) {
			t.Parallel()
			h := tunneltest.NewHost(t,
				tunneltest.WithConfig(func(c *tunnel.Config) { c.Heartbeat, c.DeadAfter = 250*time.Millisecond, 1500*time.Millisecond }),
				tunneltest.WithRelay(tunneltest.RelayConfig{Rate: 100_000, Delay: 20 * time.Millisecond}))
			d, a := h.Dial(t)
			if !fromDialer {
				d, a = a, d
			}
			var got atomic.Int64
			go func() {
				for {
					c, err := a.Listener().Accept()
					if err != nil {
						return
					}
					go func() {
						buf := make([]byte, 32<<10)
						for {
							n, err := c.Read(buf)
							got.Add(int64(n))
							if err != nil {
								return
							}
						}
					}()
				}
			}()
			var wg sync.WaitGroup
			for range 4 {
				c := open(t, d, tunnel.Bulk)
				wg.Go(func() {
					for {
						if _, err := c.Write(make([]byte, 64<<10)); err != nil {
							return
						}
					}
				})
			}
			select {
			case <-d.Done():
				t.Errorf("cut: %v", d.Err())
			case <-a.Done():
				t.Errorf("cut: %v", a.Err())
			case <-time.After(8 * time.Second):
			}
			if got.Load() < 100_000 {
				t.Errorf("only %d bytes arrived", got.Load())
			}
			_ = d.Close(nil)
			_ = a.Close(nil)
			wg.Wait()
		})
	}
}

// One reader that stands still holds up nobody else, on its lane or another.
func TestStalledReaderHoldsUpNobody(t *testing.T) {
	for _, class := range classes {
		t.Run(class.String(), func(t *testing.T) {
			d, a := tunneltest.Pair(t, tunneltest.WithConfig(quick))
			accepted := make(chan io.ReadWriteCloser, 1)
			go func() {
				c, err := a.Listener().Accept()
				if err == nil {
					accepted <- c
				}
				close(accepted)
			}()
			stalled := open(t, d, class)
			var wrote atomic.Int64
			go func() {
				for {
					n, err := stalled.Write(make([]byte, 64<<10))
					if wrote.Add(int64(n)); err != nil {
						return
					}
				}
			}()
			<-accepted // and never read
			for last := int64(-1); last != wrote.Load(); time.Sleep(300 * time.Millisecond) {
				last = wrote.Load()
			}
			echoOn(t, a)
			for _, c := range classes {
				exchange(t, open(t, d, c), 500_000)
			}
			select {
			case <-time.After(time.Second): // twice DeadAfter
			case <-d.Done():
				t.Fatalf("a stalled reader ended the tunnel: %v", d.Err())
			}
		})
	}
}

func TestReplacedAndClosed(t *testing.T) {
	causes := []struct{ cause, want error }{
		{nil, tunnel.ErrPeerClosed},
		{tunnel.ErrReplaced, tunnel.ErrReplaced},
		{tunnel.ErrRevoked, tunnel.ErrRevoked},
		{tunnel.ErrDrained, tunnel.ErrDrained},
		{errors.New("secret detail"), tunnel.ErrPeerClosed},
	}
	for _, c := range causes {
		d, a := tunneltest.Pair(t)
		if err := a.Close(c.cause); err != nil {
			t.Errorf("close: %v", err)
		}
		waitEnd(t, d, c.want)
		if errors.Is(c.want, tunnel.ErrPeerClosed) && d.Err().Error() != tunnel.ErrPeerClosed.Error() {
			t.Errorf("the peer learned %q", d.Err())
		}
		if _, err := d.Open(context.Background(), tunnel.Control); err == nil {
			t.Error("open on an ended tunnel")
		}
		if _, err := d.Listener().Accept(); err == nil {
			t.Error("accept on an ended tunnel")
		}
	}
}

func TestGoAway(t *testing.T) {
	h := tunneltest.NewHost(t)
	d, a := h.Dial(t)
	echoOn(t, a)
	c := open(t, d, tunnel.Bulk)
	h.Server.GoAway(0, 300*time.Millisecond, "upgrade\nnow")
	g := <-d.GoneAway()
	if g.Reason != "upgrade now" || g.Deadline != 300*time.Millisecond {
		t.Errorf("got %+v", g)
	}
	exchange(t, c, 10_000) // goes on
	if _, err := tunnel.Dial(context.Background(), h.Dialed); tunnel.FailedStep(err) != tunnel.StepUpgrade {
		t.Errorf("dial while draining: %v", err)
	}
	waitEnd(t, d, tunnel.ErrDrained)
}

func TestStreamLimitOfThePeer(t *testing.T) {
	d, a := tunneltest.Pair(t, tunneltest.WithServer(func(c *tunnel.ServerConfig) { c.MaxStreams = 5 }))
	echoOn(t, a)
	refused := 0
	for range 8 {
		switch err := firstByte(t, d); {
		case errors.Is(err, tunnel.ErrStreamReset):
			refused++
		case err != nil:
			t.Fatal(err)
		}
	}
	if refused != 3 {
		t.Errorf("%d streams refused, want 3", refused)
	}
}

// firstByte opens a stream that stays open until the test ends and sees one byte come
// back. A refusal may arrive while Open is still at it, or at any step after it.
func firstByte(t *testing.T, d *tunnel.Tunnel) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := d.Open(ctx, tunnel.Control)
	if err != nil {
		return err
	}
	t.Cleanup(func() { _ = c.Close() })
	_, _ = c.Write([]byte("x"))
	_, err = io.ReadFull(c, make([]byte, 1))
	return err
}

func TestStreamLimitOfItsOwn(t *testing.T) {
	d, a := tunneltest.Pair(t, tunneltest.WithDial(func(c *tunnel.DialConfig) { c.MaxStreams = 8 }))
	echoOn(t, a)
	for range 8 {
		open(t, d, tunnel.Control)
	}
	if _, err := d.Open(t.Context(), tunnel.Control); !errors.Is(err, tunnel.ErrTooManyStreams) {
		t.Errorf("over the own limit: %v", err)
	}
}
