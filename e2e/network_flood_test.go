package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/stack"
)

const (
	// floodConnections is how many strangers hold a connection open at once.
	floodConnections = 10_000
	// floodMemory bounds what one of them costs the control plane, in bytes: the
	// documented bound (docs/controlplane.md, Limits).
	floodMemory = 32 << 10
	// floodLife is how long one may last: the longest of the documented deadlines
	// for headers, bodies and handshakes (10 s, 30 s and 10 s), and some patience
	// for a machine that is busy with all of them.
	floodLife = 60 * time.Second
)

// TestTenThousandStrangers holds 10,000 connections open that never prove who
// they are. Queries go on, memory is bounded, and all of them end by themselves.
func TestTenThousandStrangers(t *testing.T) {
	raiseFiles(t, floodConnections+2000)
	s := newStack(t, stack.Options{})
	join(t, s, "host")
	answers(t, s, "host/db", "select 1", "1")
	pid := s.ControlPlane.PID()
	before, connectedBefore := rss(t, pid), connections(t, s.Listen)

	kinds := []struct{ name, send string }{
		{"say nothing", ""},
		{"half a request", "GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: "},
		{"half a body", "POST /api/v1/sql/host/db HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"},
		{"an upgrade and no more", upgrade},
		{"an upgrade and half a ClientHello", upgrade + "\x82\x85\x00\x00\x00\x00\x16\x03\x01\x02\x00"},
	}
	conns := make([]net.Conn, floodConnections)
	t.Cleanup(func() {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
	})
	began := time.Now()
	peak := before
	for i := range conns {
		kind := kinds[i%len(kinds)]
		c, err := net.Dial("tcp", s.Listen)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		conns[i] = c
		if _, err := io.WriteString(c, kind.send); err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("connection %d: %v", i, err)
		}
		if i%500 == 0 {
			peak = max(peak, rss(t, pid))
		}
	}
	opened := time.Since(began)
	answers(t, s, "host/db", "select 2", "2")
	answered := time.Since(began) - opened
	// Several at once need further lanes, and the host comes from the address that
	// floods us.
	var many sync.WaitGroup
	for range 6 {
		many.Go(func() { answers(t, s, "host/db", "select 3 from pg_sleep(0.5)", "3") })
	}
	many.Wait()
	together := time.Since(began) - opened - answered
	peak = max(peak, rss(t, pid))
	open := connections(t, s.Listen) - connectedBefore
	t.Logf("%d connections in %.1f s, %d of them open at the end; a query then took %.2f s, six at once %.2f s; memory went from %d to %d MiB",
		floodConnections, opened.Seconds(), open, answered.Seconds(), together.Seconds(), before>>20, peak>>20)
	if grown := peak - before; grown > floodConnections*floodMemory {
		t.Errorf("memory grew by %d bytes for each connection, more than %d", grown/floodConnections, floodMemory)
	}

	// Each ends by itself, whatever it was.
	var mu sync.Mutex
	lasted := map[string]time.Duration{}
	var wg sync.WaitGroup
	for i, c := range conns {
		wg.Go(func() {
			c.SetReadDeadline(time.Now().Add(floodLife))
			_, err := io.Copy(io.Discard, c)
			mu.Lock()
			defer mu.Unlock()
			name := kinds[i%len(kinds)].name
			lasted[name] = max(lasted[name], time.Since(began))
			if errors.Is(err, os.ErrDeadlineExceeded) {
				lasted[name] = -1
			}
		})
	}
	for range 5 {
		answers(t, s, "host/db", "select 3", "3")
	}
	wg.Wait()
	for _, kind := range kinds {
		if lasted[kind.name] < 0 {
			t.Errorf("connections that sent %q are still open after %s", kind.name, floodLife)
		} else {
			t.Logf("%-36s gone after %.1f s", kind.name, lasted[kind.name].Seconds())
		}
	}
	eventually(t, time.Minute, "all connections of strangers are closed", func() error {
		if n := connections(t, s.Listen); n > connectedBefore+20 {
			return fmt.Errorf("%d connections, %d before", n, connectedBefore)
		}
		return nil
	})
	answers(t, s, "host/db", "select 4", "4")
	if a, err := agentState(t, s, "host"); err != nil || !a.Online {
		t.Errorf("the agent's state: %v, %v", a, err)
	}
	if log := s.ControlPlane.Log(); strings.Count(log, "\n") > 1000 {
		t.Errorf("strangers write %d lines into the log", strings.Count(log, "\n"))
	}
}

// raiseFiles lets this process have so many files open.
func raiseFiles(t *testing.T, want uint64) {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	limit.Cur = limit.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Max < want {
		t.Fatalf("this machine allows %d open files, the test needs %d: raise the hard limit (ulimit -Hn)", limit.Max, want)
	}
}
