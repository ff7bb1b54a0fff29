package sqlsession_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestConcurrency(t *testing.T) {
	s := source("db")
	s.Concurrency = 2
	results := make(chan error, 2)
	// full has two statements run; end cancels them.
	full := func(m *sqlsession.Manager) (end func()) {
		ctx, cancel := context.WithCancel(t.Context())
		t.Cleanup(cancel)
		for range 2 {
			go func() {
				_, err := m.Run(ctx, request("SELECT pg_sleep(60)"), io.Discard)
				results <- err
			}()
		}
		eventually(t, "two statements", func() bool {
			return one(t, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND state = 'active' AND query = 'SELECT pg_sleep(60)'") == "2"
		})
		return cancel
	}
	ended := func() {
		t.Helper()
		for range 2 {
			if err := <-results; proto.CodeOf(err) != proto.CodeCancelled {
				t.Errorf("got %v, want CANCELLED", err)
			}
		}
	}
	m := newManager(t, sqlsession.Config{QueueTimeout: 200 * time.Millisecond}, s)
	end := full(m)
	if e := refuse(t, m, request("SELECT 1"), proto.CodeOverloaded); !strings.Contains(e.Error(), "runs 2 statements") {
		t.Errorf("got %v, want the limit in it", e)
	}
	end()
	ended()
	// One that waits gets the place that becomes free.
	m = newManager(t, sqlsession.Config{QueueTimeout: 2 * time.Minute}, s)
	end = full(m)
	third := make(chan error, 1)
	r := request("SELECT 1")
	go func() {
		_, err := m.Run(t.Context(), r, io.Discard)
		third <- err
	}()
	eventually(t, "the third to wait", func() bool {
		return slices.ContainsFunc(m.Running(), func(q *posternv1.RunningQuery) bool { return q.QueryId == r.QueryID })
	})
	end()
	if err := <-third; err != nil {
		t.Errorf("the third: %v", err)
	}
	ended()
	// The same id twice.
	w := newGate()
	r = request("SELECT 1")
	go func() {
		_, err := m.Run(t.Context(), r, w)
		results <- err
	}()
	<-w.wrote
	refuse(t, m, r, proto.CodeAlreadyExists)
	w.open()
	if err := <-results; err != nil {
		t.Error(err)
	}
}

func TestManyAtOnce(t *testing.T) {
	m := newManager(t, sqlsession.Config{QueueTimeout: time.Minute})
	results := make(chan error, 60)
	for i := range cap(results) {
		go func() {
			r := request("SELECT i, repeat('x', 100) FROM generate_series(1, 20000) i")
			r.Owner = fmt.Sprintf("tok_%d", i%7)
			var out bytes.Buffer
			outcome, err := m.Run(context.Background(), r, &out)
			if err == nil && outcome.Rows != 20000 {
				err = fmt.Errorf("got %d rows, want 20000", outcome.Rows)
			}
			results <- err
		}()
	}
	for range cap(results) {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

// arrivals notes when something was written.
type arrivals struct{ times []time.Time }

func (a *arrivals) Write(p []byte) (int, error) {
	a.times = append(a.times, time.Now())
	return len(p), nil
}

func TestRowsArriveWhenTheyAreThere(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	query(t, m, request("SELECT 1"))
	a := &arrivals{}
	r := request("SELECT i, pg_sleep(0.3) FROM generate_series(1, 4) i")
	result := make(chan error, 1)
	// The server sends a row only when its own buffer of 8 KiB is full, so
	// the rows are large.
	r.SQL = "SELECT repeat('x', 9000), pg_sleep(0.3) FROM generate_series(1, 4) i"
	go func() {
		_, err := m.Run(t.Context(), r, a)
		result <- err
	}()
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	// Not all at the end: the first came at least two pauses before the last.
	if n := len(a.times); n < 4 || a.times[n-1].Sub(a.times[0]) < 500*time.Millisecond {
		t.Errorf("got %d writes over %s, want one for each row", n, a.times[len(a.times)-1].Sub(a.times[0]))
	}
}

// TestLongResultsThatPause: a long result is read in large pieces; what is
// less must still arrive, and a cancel must still work.
func TestLongResultsThatPause(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	got, _ := query(t, m, request("SELECT i, CASE WHEN i % 20000 < 5 THEN pg_sleep(0.03) END FROM generate_series(1, 60004) i"))
	if len(got.rows) != 60004 {
		t.Errorf("got %d rows, want 60004", len(got.rows))
	}
	r := request("SELECT i, repeat('x', 100), CASE WHEN i = 30001 THEN pg_sleep(60) END FROM generate_series(1, 60000) i")
	result := make(chan error, 1)
	var outcome *posternv1.QueryOutcome
	go func() {
		var err error
		outcome, err = m.Run(context.Background(), r, io.Discard)
		result <- err
	}()
	// All rows before the pause arrive but those in the server's own buffer.
	eventually(t, "the rows before the pause", func() bool {
		running := m.Running()
		return len(running) == 1 && running[0].Rows > 29000
	})
	m.Cancel(r.QueryID)
	if err := <-result; proto.CodeOf(err) != proto.CodeCancelled || outcome.Rows < 29000 {
		t.Errorf("got %d rows, %v, want about 30,000 and CANCELLED", outcome.Rows, err)
	}
	query(t, m, request("SELECT 1"))
	query(t, m, request("SELECT repeat('x', 300000), i FROM generate_series(1, 50) i"))
	query(t, m, request("SELECT CASE WHEN i = 15000 THEN repeat('x', 1000000) ELSE 'y' END FROM generate_series(1, 20000) i"))
}
