package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/proto/wirestream"
)

// serveWire simulates a host: it answers each query with its text, and "sleep" when it
// is cancelled.
func (a *simulatedAgent) serveWire(w http.ResponseWriter, r *http.Request) {
	request, err := wirestream.ReadRequest(w, r)
	if err == nil && request.Source != "shop" {
		err = proto.Errorf(proto.CodeNotFound, "no data source %q", request.Source)
	}
	if err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	stream, err := wirestream.Accept(w)
	if err != nil {
		return
	}
	defer stream.Close()
	out, in := wirestream.NewWriter(stream), wirestream.NewReader(stream)
	out.Send(wirestream.Opened, &posternv1.WireOpened{})
	messages, feed := io.Pipe()
	defer messages.Close()
	go func() {
		for {
			_, err := in.Next()
			if err == nil {
				err = in.CopyData(feed)
			}
			if err != nil {
				feed.CloseWithError(err)
				return
			}
		}
	}()
	backend := pgproto3.NewBackend(messages, nil)
	for {
		m, err := backend.Receive()
		if err != nil {
			return
		}
		q, ok := m.(*pgproto3.Query)
		if !ok {
			out.Send(wirestream.End, &posternv1.WireEnd{})
			return
		}
		event := &posternv1.WireEvent{
			StatementId: proto.NewID(proto.QueryPrefix), Sql: q.String, Verdict: "allowed", State: posternv1.WireEvent_STATE_ENDED,
			Duration: durationpb.New(time.Millisecond), Rows: 1, Bytes: 10,
		}
		answer := []pgproto3.BackendMessage{
			&pgproto3.RowDescription{Fields: []pgproto3.FieldDescription{{Name: []byte("text"), DataTypeOID: 25}}},
			&pgproto3.DataRow{Values: [][]byte{[]byte(q.String)}}, &pgproto3.CommandComplete{CommandTag: []byte("SELECT 1")},
		}
		if q.String == "sleep" {
			ctx, cancel := context.WithCancelCause(r.Context())
			a.mu.Lock()
			a.cancel[event.StatementId], a.cancel[request.SessionId] = cancel, cancel
			a.mu.Unlock()
			event.State = posternv1.WireEvent_STATE_RUNNING
			out.Send(wirestream.Event, event)
			<-ctx.Done()
			event.State, event.Error = posternv1.WireEvent_STATE_ENDED, proto.Detail(context.Cause(ctx))
			answer = []pgproto3.BackendMessage{&pgproto3.ErrorResponse{Severity: "ERROR", Code: "57014", Message: "canceling statement due to user request"}}
		}
		if strings.HasPrefix(q.String, "delete") {
			event.Verdict, event.Error = "denied", &posternv1.ErrorDetail{Code: proto.CodePolicyDenied, Message: "the source is read-only"}
			answer = []pgproto3.BackendMessage{&pgproto3.ErrorResponse{Severity: "ERROR", Code: "25006", Message: "the source is read-only"}}
		}
		out.Send(wirestream.Event, event)
		var b []byte
		for _, m := range append(answer, &pgproto3.ReadyForQuery{TxStatus: 'I'}) {
			b, _ = m.Encode(b)
		}
		out.Raw(append(wirestream.AppendHeader(nil, wirestream.Data, len(b)), b...))
	}
}

func withPG(o *Options) { o.PGListen = "127.0.0.1:0" }

// pg connects as a client of PostgreSQL with a token of its own.
func (s *testServer) pg(t *testing.T, name, token, database string) (*pgconn.PgConn, error) {
	t.Helper()
	host, port, _ := net.SplitHostPort(s.PGAddr().String())
	c, err := pgconn.Connect(t.Context(), fmt.Sprintf("host=%s port=%s user=%s password=%s dbname=%s sslmode=disable", host, port, name, token, database))
	if err == nil {
		t.Cleanup(func() { c.Close(context.Background()) })
	}
	return c, err
}

func state(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code
	}
	return fmt.Sprint(err)
}

func TestPostgreSQLClients(t *testing.T) {
	s := startServer(t, withPG)
	agent := joined(t, s, s.token, "lab")
	ana := s.newToken(t, s.token, "ana", "analyst")
	view := s.newToken(t, s.token, "view", "viewer")
	for _, c := range []struct{ name, token, database, want string }{
		{"ana", ana, "lab/elsewhere", "3D000"},
		{"ana", ana, "other/shop", "3D000"},
		{"bob", ana, "lab/shop", "28P01"},
		{"view", view, "lab/shop", "42501"},
	} {
		if _, err := s.pg(t, c.name, c.token, c.database); state(err) != c.want {
			t.Errorf("%s to %s: got %v, want %s", c.name, c.database, err, c.want)
		}
	}
	c, err := s.pg(t, "ana", ana, agent.id+"/shop")
	if err != nil {
		t.Fatal(err)
	}
	run := func(text string) error {
		_, err := c.Exec(t.Context(), text).ReadAll()
		return err
	}
	if err := run("select 1"); err != nil {
		t.Fatal(err)
	}
	if err := run("delete from t"); state(err) != "25006" {
		t.Errorf("got %v", err)
	}
	slept := make(chan error, 1)
	go func() { slept <- run("sleep") }()

	// The history lists what runs, and it can be cancelled from there.
	queries := posternv1connect.NewQueryServiceClient(as(ana), s.url)
	list := func(running bool) []*posternv1.Query {
		resp, err := queries.ListQueries(t.Context(), connect.NewRequest(&posternv1.ListQueriesRequest{RunningOnly: running}))
		if err != nil {
			t.Fatal(err)
		}
		return resp.Msg.Queries
	}
	eventually(t, "the running statement in the history", func() error {
		if n := len(list(true)); n != 1 {
			return fmt.Errorf("%d run", n)
		}
		return nil
	})
	resp, err := queries.CancelQuery(t.Context(), connect.NewRequest(&posternv1.CancelOrganizationQueryRequest{QueryId: list(true)[0].Id}))
	if err != nil || resp.Msg.Query.State != "cancelled" {
		t.Errorf("got %v, %v", resp, err)
	}
	if err := <-slept; state(err) != "57014" {
		t.Errorf("got %v", err)
	}
	var got []string
	for _, q := range list(false) {
		got = append(got, fmt.Sprint(q.Sql, " ", q.State, " ", q.Agent, " ", q.Source, " ", q.TokenName))
	}
	if want := "sleep cancelled lab shop ana; delete from t denied lab shop ana; select 1 done lab shop ana"; strings.Join(got, "; ") != want {
		t.Errorf("history: %s, want %s", strings.Join(got, "; "), want)
	}

	// Revoking the token ends the session.
	go func() { slept <- run("sleep") }()
	eventually(t, "the statement to run", func() error {
		if n := len(list(true)); n != 1 {
			return fmt.Errorf("%d run", n)
		}
		return nil
	})
	if _, err := posternv1connect.NewTokenServiceClient(as(s.token), s.url).RevokeToken(t.Context(), connect.NewRequest(&posternv1.RevokeTokenRequest{Token: "ana"})); err != nil {
		t.Fatal(err)
	}
	if err := <-slept; state(err) != "57P01" {
		t.Errorf("got %v", err)
	}
	if _, err := s.pg(t, "ana", ana, "lab/shop"); state(err) != "28P01" {
		t.Errorf("with a revoked token: %v", err)
	}
	eventually(t, "the audit log of all", func() error {
		resp, err := posternv1connect.NewAuditServiceClient(as(s.token), s.url).ListAudit(t.Context(), connect.NewRequest(&posternv1.ListAuditRequest{Limit: 100}))
		if err != nil {
			return err
		}
		text := ""
		for _, line := range resp.Msg.Entries {
			entry, err := auditchain.Decode(line)
			if err != nil {
				return err
			}
			text += fmt.Sprintln(entry.Action, entry.Statement, entry.Outcome)
		}
		for _, want := range []string{"wire.open  ", "sql.run select 1 done", "sql.run delete from t denied", "sql.run sleep cancelled", "wire.close  failed"} {
			if !strings.Contains(text, want) {
				return fmt.Errorf("no %q in %s", want, text)
			}
		}
		return nil
	})
}

// TestPGListenNeedsTLS: tokens don't cross the network in the clear.
func TestPGListenNeedsTLS(t *testing.T) {
	o := Options{Data: t.TempDir(), Listen: "127.0.0.1:0", PGListen: "0.0.0.0:0", LogLevel: "error", LogFormat: "text"}
	s, err := NewServer(t.Context(), o, slog.New(slog.DiscardHandler))
	if err == nil {
		s.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "--tls-cert") {
		t.Errorf("got %v", err)
	}
}
