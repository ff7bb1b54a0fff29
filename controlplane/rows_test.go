package main

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

// reporter is an agent that reports rows.
type reporter struct {
	*simulatedAgent
	tn *tunnel.Tunnel
}

func newReporter(t *testing.T, s *testServer, token, name string) reporter {
	t.Helper()
	a := newSimulatedAgent(s)
	if err := a.register(t.Context(), s.newKey(t, token, 1), name); err != nil {
		t.Fatal(err)
	}
	return reporter{a, a.attach(t)}
}

func (r reporter) report(ctx context.Context, id string, rows *posternv1.KeptRows) error {
	_, err := linkClient(r.tn).ReportRows(ctx, connect.NewRequest(&posternv1.ReportRowsRequest{QueryId: id, Rows: rows}))
	if err != nil {
		return proto.FromConnect(err)
	}
	return nil
}

func (s *testServer) show(t *testing.T, token, id string) (*posternv1.GetQueryResponse, error) {
	t.Helper()
	resp, err := posternv1connect.NewQueryServiceClient(as(token), s.url).GetQuery(t.Context(), connect.NewRequest(&posternv1.GetQueryRequest{QueryId: id, IncludeRows: true}))
	if err != nil {
		return nil, proto.FromConnect(err)
	}
	return resp.Msg, nil
}

const canary = "canary-of-a-customer"

func keptCanary() *posternv1.KeptRows {
	return &posternv1.KeptRows{Arrow: []byte("arrow " + canary), First: 2, Last: 1, Total: 500}
}

// TestKeptRows reports rows before, beside and after the end of a statement, and
// shows them to those who may see them.
func TestKeptRows(t *testing.T) {
	s := startServer(t)
	a := newReporter(t, s, s.token, "host")
	analyst, stranger := s.newToken(t, s.token, "one", "analyst"), s.newToken(t, s.token, "two", "analyst")
	var late sync.WaitGroup
	defer late.Wait()
	for _, tt := range []struct {
		name string
		when func(id string, o *posternv1.QueryOutcome)
	}{
		{"before the end", func(id string, o *posternv1.QueryOutcome) {
			o.RowsReported = true
			if err := a.report(t.Context(), id, keptCanary()); err != nil {
				t.Error(err)
			}
		}},
		{"after the end", func(id string, o *posternv1.QueryOutcome) {
			o.RowsReported = true
			late.Go(func() {
				for s.queries.Running() > 0 {
					if t.Context().Err() != nil {
						return
					}
				}
				if err := a.report(t.Context(), id, keptCanary()); err != nil {
					t.Error(err)
				}
			})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a.answer(func(_ context.Context, req *posternv1.SQLRequest, w io.Writer) *posternv1.QueryOutcome {
				if !req.TakesRows {
					t.Error("the request takes no rows")
				}
				o := &posternv1.QueryOutcome{Rows: 500}
				tt.when(req.QueryId, o)
				return o
			})
			_, outcome, err := s.run(t.Context(), analyst, "host/shop", `{"sql":"select 1"}`)
			if err != nil || outcome.Error != nil {
				t.Fatal(outcome, err)
			}
			for _, token := range []string{analyst, s.token} {
				got, err := s.show(t, token, outcome.QueryId)
				if err != nil || got.Rows.GetTotal() != 500 || !bytes.Equal(got.Rows.GetArrow(), keptCanary().Arrow) {
					t.Fatalf("got %v, %v", got, err)
				}
			}
			if _, err := s.show(t, stranger, outcome.QueryId); proto.CodeOf(err) != proto.CodeNotFound {
				t.Errorf("another analyst: got %v", err)
			}
			if err := a.report(t.Context(), outcome.QueryId, keptCanary()); proto.CodeOf(err) != proto.CodeNotFound {
				t.Errorf("reported twice: got %v", err)
			}
			entries, err := posternv1connect.NewAuditServiceClient(as(s.token), s.url).ListAudit(t.Context(), connect.NewRequest(&posternv1.ListAuditRequest{Limit: 1}))
			if err != nil || !strings.Contains(string(entries.Msg.Entries[0]), `"query.rows"`) || !strings.Contains(string(entries.Msg.Entries[0]), outcome.QueryId) {
				t.Errorf("audit: %s, %v", entries.Msg.GetEntries(), err)
			}
		})
	}
}

// TestKeptRowsRefused: an agent reports only what it was asked to run, and nothing
// over the bounds; a report that is refused or lost does not hurt the statement.
func TestKeptRowsRefused(t *testing.T) {
	s := startServer(t)
	a, b := newReporter(t, s, s.token, "host"), newReporter(t, s, s.token, "other")
	var id string
	a.answer(func(ctx context.Context, req *posternv1.SQLRequest, _ io.Writer) *posternv1.QueryOutcome {
		id = req.QueryId
		large, many := keptCanary(), keptCanary()
		large.Arrow = make([]byte, 1<<20)
		many.Last = 1001
		for name, got := range map[string]error{
			"another agent": b.report(ctx, id, keptCanary()),
			"no such query": a.report(ctx, "qry_none", keptCanary()),
		} {
			if proto.CodeOf(got) != proto.CodeNotFound {
				t.Errorf("%s: got %v", name, got)
			}
		}
		for name, got := range map[string]error{"too large": a.report(ctx, id, large), "too many": a.report(ctx, id, many), "none": a.report(ctx, id, nil)} {
			if got == nil {
				t.Errorf("%s: no error", name)
			}
		}
		return &posternv1.QueryOutcome{Rows: 1}
	})
	_, outcome, err := s.run(t.Context(), s.token, "host/shop", `{"sql":"select 1"}`)
	if err != nil || outcome.Error != nil {
		t.Fatal(outcome, err)
	}
	if got, err := s.show(t, s.token, id); err != nil || got.Rows != nil {
		t.Errorf("got %v, %v", got, err)
	}
	if err := a.report(t.Context(), id, keptCanary()); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("long after a statement that promised none: got %v", err)
	}
}

// TestKeptRowsOfHungUp: the client hangs up, and the agent notices later.
func TestKeptRowsOfHungUp(t *testing.T) {
	s := startServer(t)
	a := newReporter(t, s, s.token, "host")
	ended := make(chan string, 1)
	ctx, hangUp := context.WithCancelCause(t.Context())
	a.answer(func(ctx context.Context, req *posternv1.SQLRequest, _ io.Writer) *posternv1.QueryOutcome {
		hangUp(errors.New("enough"))
		<-ctx.Done()
		ended <- req.QueryId
		return &posternv1.QueryOutcome{RowsReported: true}
	})
	if _, _, err := s.run(ctx, s.token, "host/shop", `{"sql":"select 1"}`); err == nil {
		t.Fatal("no error")
	}
	id := <-ended
	if err := a.report(t.Context(), id, keptCanary()); err != nil {
		t.Fatal(err)
	}
	if got, err := s.show(t, s.token, id); err != nil || got.Rows.GetTotal() != 500 {
		t.Errorf("got %v, %v", got, err)
	}
}

// TestKeptRowsAreSealed searches the store's files for what was kept, and moves the
// sealed rows of one query to another.
func TestKeptRowsAreSealed(t *testing.T) {
	s := startServer(t)
	a := newReporter(t, s, s.token, "host")
	var ids []string
	a.answer(func(ctx context.Context, req *posternv1.SQLRequest, _ io.Writer) *posternv1.QueryOutcome {
		if err := a.report(ctx, req.QueryId, keptCanary()); err != nil {
			t.Error(err)
		}
		ids = append(ids, req.QueryId)
		return &posternv1.QueryOutcome{RowsReported: true}
	})
	for range 2 {
		if _, _, err := s.run(t.Context(), s.token, "host/shop", `{"sql":"select 1"}`); err != nil {
			t.Fatal(err)
		}
	}
	files, err := filepath.Glob(filepath.Join(s.options.Data, "controlplane.db*"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(content, []byte(canary)) {
			t.Errorf("%s holds the rows in the clear", file)
		}
	}
	db, err := sql.Open("sqlite", files[0])
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close() //nolint:errcheck // it was only for this
	if _, err := db.ExecContext(t.Context(), "UPDATE kept_rows SET sealed = (SELECT sealed FROM kept_rows WHERE query = ?) WHERE query = ?", ids[0], ids[1]); err != nil {
		t.Fatal(err)
	}
	if got, err := s.show(t, s.token, ids[0]); err != nil || !bytes.Contains(got.Rows.GetArrow(), []byte(canary)) {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := s.show(t, s.token, ids[1]); proto.CodeOf(err) != proto.CodeInternal {
		t.Errorf("rows of another query: got %v", err)
	}
}
