package sqlsession_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// gate is a writer that blocks until it is opened.
type gate struct {
	opened chan struct{}
	wrote  chan struct{}
}

func newGate() *gate { return &gate{opened: make(chan struct{}), wrote: make(chan struct{})} }

func (g *gate) Write(p []byte) (int, error) {
	select {
	case <-g.wrote:
	default:
		close(g.wrote)
	}
	<-g.opened
	return len(p), nil
}

func (g *gate) waiting() bool {
	select {
	case <-g.wrote:
		return true
	default:
		return false
	}
}

func (g *gate) open() {
	select {
	case <-g.opened:
	default:
		close(g.opened)
	}
}

// failing is a writer that fails from some byte on.
type failing struct{ left int }

func (f *failing) Write(p []byte) (int, error) {
	if f.left < len(p) {
		return f.left, errors.New("the reader has gone")
	}
	f.left -= len(p)
	return len(p), nil
}

func TestCancel(t *testing.T) {
	m := newManager(t, sqlsession.Config{})
	active := func() string {
		return one(t, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND state = 'active' AND query LIKE '%cancel me%'")
	}
	ways := map[string]func(r sqlsession.Request, cancel context.CancelFunc){
		"by id":         func(r sqlsession.Request, _ context.CancelFunc) { m.Cancel(r.QueryID) },
		"by hanging up": func(_ sqlsession.Request, cancel context.CancelFunc) { cancel() },
	}
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			r := request("SELECT pg_sleep(60) -- cancel me")
			result := make(chan error, 1)
			go func() {
				_, err := m.Run(ctx, r, io.Discard)
				result <- err
			}()
			eventually(t, "the statement to run", func() bool { return active() == "1" })
			if running := m.Running(); len(running) != 1 || running[0].QueryId != r.QueryID || running[0].Source != "db" || running[0].Started == nil {
				t.Errorf("Running: got %v, want %s", running, r.QueryID)
			}
			way(r, cancel)
			if err := <-result; proto.CodeOf(err) != proto.CodeCancelled {
				t.Errorf("got %v, want CANCELLED", err)
			}
			if got := active(); got != "0" {
				t.Errorf("%s statements still run in the database, want 0", got)
			}
			// The session survives a cancel.
			query(t, m, request("SELECT 1"))
		})
	}
	t.Run("by a failing writer", func(t *testing.T) {
		_, err := m.Run(t.Context(), request("SELECT repeat('x', 100) FROM generate_series(1, 1000000) -- cancel me"), &failing{left: 3 << 20})
		if proto.CodeOf(err) != proto.CodeCancelled || active() != "0" {
			t.Errorf("got %v, %s active, want CANCELLED and none", err, active())
		}
	})
	t.Run("under a stopped reader", func(t *testing.T) {
		w := newGate()
		defer w.open()
		r := request("SELECT i, repeat('x', 1000) FROM generate_series(1, 300000) i -- cancel me")
		result := make(chan error, 1)
		var outcome *posternv1.QueryOutcome
		var out bytes.Buffer
		go func() {
			var err error
			outcome, err = m.Run(context.Background(), r, io.MultiWriter(w, &out))
			result <- err
		}()
		eventually(t, "the backend to wait for its reader", func() bool {
			return one(t, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND wait_event = 'ClientWrite'") == "1"
		})
		if !m.Cancel(r.QueryID) {
			t.Fatal("Cancel: got false, want true")
		}
		// The database is free although nobody reads.
		eventually(t, "the backend to be free", func() bool { return active() == "0" })
		w.open()
		if err := <-result; proto.CodeOf(err) != proto.CodeCancelled {
			t.Errorf("got %v, want CANCELLED", err)
		}
		// What came before is whole.
		if got := decode(t, out.Bytes()); uint64(len(got.rows)) != outcome.Rows || outcome.Rows == 0 {
			t.Errorf("got %d rows in the stream, want %d", len(got.rows), outcome.Rows)
		}
	})
	if m.Cancel("qry_unknown") {
		t.Error("Cancel of nothing: got true, want false")
	}
	t.Run("many at odd moments", func(t *testing.T) {
		for i := range 60 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*100*time.Microsecond)
			_, err := m.Run(ctx, request("SELECT i FROM generate_series(1, 2000) i -- cancel me"), io.Discard)
			cancel()
			if code := proto.CodeOf(err); err != nil && code != proto.CodeTimeout {
				t.Fatalf("got %v, want TIMEOUT or nothing", err)
			}
			query(t, m, request("SELECT 1")) // a late cancel must not hit this one
		}
	})
}
