package tunnel_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

// quick makes liveness fast enough for tests.
func quick(c *tunnel.Config) {
	c.Heartbeat, c.DeadAfter, c.LaneTimeout = 50*time.Millisecond, 500*time.Millisecond, 5*time.Second
}

func waitEnd(t testing.TB, tun *tunnel.Tunnel, want error) {
	t.Helper()
	select {
	case <-tun.Done():
	case <-time.After(2 * time.Minute):
		t.Fatal("the tunnel goes on")
	}
	if err := tun.Err(); want != nil && !errors.Is(err, want) {
		t.Errorf("cause = %v, want %v", err, want)
	}
}

// harmless faults slow a tunnel down; everything must work in spite of them.
func TestHarmlessFaults(t *testing.T) {
	faults := map[string]*tunneltest.Fault{
		"one-byte reads": {OneByteReads: true},
		"short writes":   {ShortWrites: 7},
		"delayed close":  {DelayClose: 50 * time.Millisecond},
	}
	for name, f := range faults {
		for _, side := range []string{"dialer", "acceptor", "both"} {
			t.Run(name+"/"+side, func(t *testing.T) {
				d, a := tunneltest.Pair(t,
					tunneltest.WithDial(func(c *tunnel.DialConfig) {
						if side != "acceptor" {
							c.TestHookConn = f.Hook
						}
					}),
					tunneltest.WithServer(func(c *tunnel.ServerConfig) {
						if side != "dialer" {
							c.TestHookConn = f.Hook
						}
					}))
				echoOn(t, a)
				for _, class := range classes {
					exchange(t, open(t, d, class), 200_000)
				}
			})
		}
	}
}

// exchange sends n random bytes through an echoing stream and compares.
func exchange(t testing.TB, c net.Conn, n int) {
	t.Helper()
	want := make([]byte, n)
	_, _ = rand.Read(want)
	errc := make(chan error, 1)
	go func() { _, err := c.Write(want); errc <- err }()
	got := make([]byte, n)
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatalf("read: %v", err)
	}
	if err := <-errc; err != nil {
		t.Fatalf("write: %v", err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("bytes came back changed")
	}
}

// Fatal faults stop a tunnel at some byte. Every call must end, in an error and
// never in a clean EOF: open, a small echo, bulk, close. A stalled solo lane is
// indistinguishable from a reader that pauses, so there a deadline ends it.
func TestFatalFaults(t *testing.T) {
	kinds := map[string]func(n int64) *tunneltest.Fault{
		"read stalls":  func(n int64) *tunneltest.Fault { return &tunneltest.Fault{StallReadAfter: n} },
		"write stalls": func(n int64) *tunneltest.Fault { return &tunneltest.Fault{StallWriteAfter: n} },
		"read fails":   func(n int64) *tunneltest.Fault { return &tunneltest.Fault{FailReadAfter: n} },
	}
	for kind, mk := range kinds {
		for _, after := range []int64{1, 5, 64, 1000, 100_000} {
			for _, class := range classes {
				t.Run(kind+"/"+class.String(), func(t *testing.T) {
					t.Parallel()
					f := mk(after)
					d, a := tunneltest.Pair(t, tunneltest.WithConfig(quick), tunneltest.WithDial(func(c *tunnel.DialConfig) { c.TestHookConn = f.Hook }))
					echoOn(t, a)
					warm := open(t, d, class)
					exchange(t, warm, 100)
					f.Arm()
					ended := make(chan struct{})
					go func() {
						defer close(ended)
						for {
							ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
							c, err := d.Open(ctx, class)
							cancel()
							if err != nil {
								return
							}
							if class == tunnel.Solo {
								_ = c.SetDeadline(time.Now().Add(time.Second))
							}
							wrote := make(chan struct{})
							go func() { defer close(wrote); _, _ = c.Write(make([]byte, 300_000)) }()
							_, err = io.ReadFull(c, make([]byte, 300_000))
							_ = c.Close()
							<-wrote
							if err != nil {
								return
							}
						}
					}()
					<-ended
					if class == tunnel.Control {
						waitEnd(t, d, nil)
					}
					_ = d.Close(nil)
					if _, err := io.ReadAll(warm); err == nil {
						t.Error("a stream of a lost tunnel ended in a clean EOF")
					}
					if _, err := warm.Write([]byte("x")); err == nil {
						t.Error("a write to a lost tunnel succeeded")
					}
				})
			}
		}
	}
}

// A lane that is lost takes its own streams with it and no others.
func TestLaneLossFailsOnlyItsStreams(t *testing.T) {
	for _, class := range []tunnel.Class{tunnel.Bulk, tunnel.Solo} {
		t.Run(class.String(), func(t *testing.T) {
			f := &tunneltest.Fault{Class: &class, FailReadAfter: 1}
			d, a := tunneltest.Pair(t, tunneltest.WithDial(func(c *tunnel.DialConfig) { c.TestHookConn = f.Hook }))
			echoOn(t, a)
			others := make(map[tunnel.Class]net.Conn)
			for _, c := range classes {
				others[c] = open(t, d, c)
				exchange(t, others[c], 1000)
			}
			f.Arm()
			_, _ = others[class].Write([]byte("x"))
			if _, err := io.ReadAll(others[class]); err == nil {
				t.Errorf("clean EOF on the lost %v lane", class)
			}
			for c, conn := range others {
				if c != class {
					exchange(t, conn, 1000)
				}
			}
			if err := d.Err(); err != nil {
				t.Fatalf("the tunnel ended: %v", err)
			}
		})
	}
}
