package sqlsession_test

import (
	"bytes"
	"context"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
)

// maxResident bounds a session's memory at any result size, in KiB. The race
// detector takes several times the memory.
func maxResident() int {
	if raceEnabled {
		return 512 << 10
	}
	return 64 << 10
}

// peak is the most memory that a process has had, in KiB.
func peak(t *testing.T, pid int) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSuffix(statusOf(t, pid)["VmHWM"], " kB"))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestMemoryStaysFlat(t *testing.T) {
	s := source("db")
	s.MaxRows, s.MaxBytes = 10_000_000, 10<<30
	m := newManager(t, sqlsession.Config{Warm: -1}, s)
	var counted counter
	outcome, err := m.Run(t.Context(), request("SELECT i::int8, substr(md5(i::text), 1, 20), i * 1.5::float8, now() FROM (SELECT generate_series(1, 5000000) i) x"), &counted)
	if err != nil || outcome.Rows != 5_000_000 || uint64(counted.n) != outcome.Bytes {
		t.Fatalf("got %d rows, %d bytes, %v, want 5,000,000 and %d", outcome.Rows, counted.n, err, outcome.Bytes)
	}
	eventually(t, "one process", func() bool { return len(sessionProcesses(os.Getpid())) == 1 })
	if got := peak(t, sessionProcesses(os.Getpid())[0]); got > maxResident() {
		t.Errorf("after %d MB of rows the process had %d KiB at its peak, want at most %d", counted.n>>20, got, maxResident())
	}
	// A giant value is held once, and given back.
	if _, err := m.Run(t.Context(), request("SELECT repeat('x', 150000000), 1"), io.Discard); err != nil {
		t.Fatal(err)
	}
	pids := sessionProcesses(os.Getpid())
	if got := peak(t, pids[0]); got > maxResident()+200_000 {
		t.Errorf("with a value of 150 MB the process had %d KiB at its peak", got)
	}
	query(t, m, request("SELECT 1"))
	eventually(t, "the memory to be given back", func() bool {
		n, _ := strconv.Atoi(strings.TrimSuffix(statusOf(t, pids[0])["VmRSS"], " kB"))
		return n < maxResident()
	})
}

func TestBackPressure(t *testing.T) {
	s := source("db")
	s.MaxRows, s.MaxBytes = 1<<40, 1<<40
	m := newManager(t, sqlsession.Config{Warm: -1}, s)
	w := newGate()
	defer w.open()
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() {
		_, err := m.Run(ctx, request("SELECT repeat('x', 1000), generate_series(1, 100000000) -- pressed back"), w)
		result <- err
	}()
	state := "SELECT wait_event FROM pg_stat_activity WHERE usename = 'reader' AND query LIKE '%-- pressed back' LIMIT 1"
	// The kernel's buffers may still grow at first.
	quiet := 0
	eventually(t, "the backend to wait for its reader", func() bool {
		if quiet++; one(t, "coalesce(("+state+"), '')") != "ClientWrite" {
			quiet = 0
		}
		return quiet == 20
	})
	pid := sessionProcesses(os.Getpid())[0]
	before := peak(t, pid)
	// Nothing moves while nobody reads.
	for until := time.Now().Add(500 * time.Millisecond); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
		if got := one(t, "coalesce(("+state+"), '')"); got != "ClientWrite" {
			t.Fatalf("the backend does %q, want it to wait", got)
		}
	}
	if after := peak(t, pid); after > before+16<<10 || after > maxResident() {
		t.Errorf("the process grew from %d to %d KiB, want it flat and at most %d", before, after, maxResident())
	}
	if running := m.Running(); len(running) != 1 {
		t.Errorf("got %v, want one statement", running)
	}
	cancel()
	w.open()
	<-result
}

// TestManyStatements: no leak of descriptors, goroutines or processes over
// many statements in one session.
func TestManyStatements(t *testing.T) {
	m := newManager(t, sqlsession.Config{Warm: -1})
	query(t, m, request("SELECT 1"))
	eventually(t, "one process", func() bool { return len(sessionProcesses(os.Getpid())) == 1 })
	pid := sessionProcesses(os.Getpid())[0]
	var out bytes.Buffer
	for range 2000 {
		out.Reset()
		if _, err := m.Run(t.Context(), request("SELECT 1, 'x'"), &out); err != nil {
			t.Fatal(err)
		}
	}
	if now := sessionProcesses(os.Getpid()); len(now) != 1 || now[0] != pid {
		t.Errorf("got processes %v, want %d alone", now, pid)
	}
	if got := peak(t, pid); got > maxResident() {
		t.Errorf("the process had %d KiB at its peak, want at most %d", got, maxResident())
	}
	if got := one(t, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader'"); got != "1" {
		t.Errorf("got %s connections, want 1", got)
	}
}
