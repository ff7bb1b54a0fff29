package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/proto/resultstream"
	"github.com/postern-dev/postern/tunnel"
)

// run posts a statement and returns what came of it.
func (s *testServer) run(ctx context.Context, token, path, body string) (rows []byte, outcome *posternv1.QueryOutcome, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url+"/api/v1/sql/"+path, strings.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	req.Header.Set("Accept", resultstream.ContentType)
	resp, err := as(token).Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, nil, proto.ReadHTTPError(resp)
	}
	r := resultstream.NewReader(resp.Body)
	rows, err = io.ReadAll(r)
	return rows, r.Outcome(), err
}

func TestQueryThroughTheTunnel(t *testing.T) {
	s := startServer(t)
	a := joined(t, s, s.token, "host")
	payload := bytes.Repeat([]byte("row "), 1<<20)
	a.answer(func(_ context.Context, req *posternv1.SQLRequest, w io.Writer) *posternv1.QueryOutcome {
		if req.Sql != "select 1" || req.Source != "shop" || req.Principal.TokenName != "admin" || req.Principal.Role != "admin" || req.MaxRows != 7 {
			return &posternv1.QueryOutcome{Error: proto.Detail(proto.Errorf(proto.CodeInvalid, "got %v", req))}
		}
		w.Write(payload)
		return &posternv1.QueryOutcome{Rows: 5, Bytes: uint64(len(payload)), CommandTag: "SELECT 5"}
	})
	rows, outcome, err := s.run(t.Context(), s.token, "host/shop", `{"sql":"select 1","maxRows":7}`)
	if err != nil || outcome.Error != nil || outcome.Rows != 5 || !bytes.Equal(rows, payload) {
		t.Fatalf("got %d bytes, %v, %v", len(rows), outcome, err)
	}
	queries := posternv1connect.NewQueryServiceClient(as(s.token), s.url)
	q, err := queries.GetQuery(t.Context(), connect.NewRequest(&posternv1.GetQueryRequest{QueryId: outcome.QueryId}))
	if err != nil || q.Msg.Query.State != "done" || q.Msg.Query.Rows != 5 || q.Msg.Query.Sql != "select 1" {
		t.Errorf("history: %v, %v", q, err)
	}
	entries, err := posternv1connect.NewAuditServiceClient(as(s.token), s.url).ListAudit(t.Context(), connect.NewRequest(&posternv1.ListAuditRequest{Limit: 1}))
	if err != nil || !strings.Contains(string(entries.Msg.Entries[0]), outcome.QueryId) {
		t.Errorf("audit: %v, %v", entries, err)
	}
}

func TestQueryErrors(t *testing.T) {
	s := startServer(t)
	a := joined(t, s, s.token, "host")
	viewer := s.newToken(t, s.token, "looker", "viewer")
	for _, tt := range []struct {
		name, token, path, body string
		answer                  *posternv1.QueryOutcome
		want                    proto.Code
	}{
		{name: "no token", path: "host/shop", body: `{"sql":"x"}`, want: proto.CodeUnauthenticated},
		{name: "bad token", token: "pst1_nonsense", path: "host/shop", body: `{"sql":"x"}`, want: proto.CodeUnauthenticated},
		{name: "viewer", token: viewer, path: "host/shop", body: `{"sql":"x"}`, want: proto.CodeRoleDenied},
		{name: "unknown agent", token: s.token, path: "nohost/shop", body: `{"sql":"x"}`, want: proto.CodeNotFound},
		{name: "no JSON", token: s.token, path: "host/shop", body: `select 1`, want: proto.CodeInvalid},
		{name: "unknown field", token: s.token, path: "host/shop", body: `{"sql":"x","sudo":true}`, want: proto.CodeInvalid},
		{name: "empty", token: s.token, path: "host/shop", body: `{"sql":"  "}`, want: proto.CodeInvalid},
		{name: "format", token: s.token, path: "host/shop?format=xls", body: `{"sql":"x"}`, want: proto.CodeInvalid},
		{name: "too large", token: s.token, path: "host/shop", body: `{"sql":"` + strings.Repeat("x", proto.MaxSQLRequest) + `"}`, want: proto.CodeBodyTooLarge},
		{
			name: "refused by policy", token: s.token, path: "host/shop", body: `{"sql":"x"}`, want: proto.CodePolicyDenied,
			answer: &posternv1.QueryOutcome{Error: &posternv1.ErrorDetail{Code: proto.CodePolicyDenied, Message: "no"}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a.answer(func(context.Context, *posternv1.SQLRequest, io.Writer) *posternv1.QueryOutcome { return tt.answer })
			_, outcome, err := s.run(t.Context(), tt.token, tt.path, tt.body)
			if outcome != nil {
				err = proto.FromDetail(outcome.Error)
			}
			if proto.CodeOf(err) != tt.want {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

// TestAgentLost cuts the tunnel in the middle of a result.
func TestAgentLost(t *testing.T) {
	s := startServer(t)
	a := newSimulatedAgent(s)
	if err := a.register(t.Context(), s.newKey(t, s.token, 1), "host"); err != nil {
		t.Fatal(err)
	}
	tn := a.attach(t)
	a.answer(func(ctx context.Context, _ *posternv1.SQLRequest, w io.Writer) *posternv1.QueryOutcome {
		w.Write([]byte("some rows"))
		w.(http.Flusher).Flush()
		tn.Close(errors.New("the power went"))
		<-ctx.Done()
		return &posternv1.QueryOutcome{}
	})
	_, outcome, err := s.run(t.Context(), s.token, "host/shop", `{"sql":"x"}`)
	if outcome.GetError() != nil { // the first rows came before the cut
		err = proto.FromDetail(outcome.Error)
	}
	if proto.CodeOf(err) != proto.CodeAgentLost {
		t.Fatalf("got %v, %v", outcome, err)
	}
	eventually(t, "the agent to count as offline", func() error {
		_, _, err := s.run(t.Context(), s.token, "host/shop", `{"sql":"x"}`)
		if proto.CodeOf(err) == proto.CodeAgentOffline && strings.Contains(err.Error(), "host") {
			return nil
		}
		return fmt.Errorf("got %v", err)
	})
}

func TestCancel(t *testing.T) {
	s := startServer(t)
	a := joined(t, s, s.token, "host")
	ann, bob := s.newToken(t, s.token, "ann", "analyst"), s.newToken(t, s.token, "bob", "analyst")
	started := make(chan string, 1)
	a.answer(func(ctx context.Context, req *posternv1.SQLRequest, _ io.Writer) *posternv1.QueryOutcome {
		started <- req.QueryId
		<-ctx.Done()
		return &posternv1.QueryOutcome{Rows: 3, Error: proto.Detail(context.Cause(ctx))}
	})
	ended := make(chan *posternv1.QueryOutcome, 1)
	go func() {
		_, outcome, _ := s.run(context.Background(), ann, "host/shop", `{"sql":"x"}`)
		ended <- outcome
	}()
	id := <-started
	request := func() *connect.Request[posternv1.CancelOrganizationQueryRequest] {
		return connect.NewRequest(&posternv1.CancelOrganizationQueryRequest{QueryId: id})
	}
	_, err := posternv1connect.NewQueryServiceClient(as(bob), s.url).CancelQuery(t.Context(), request())
	if proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("somebody else's query: got %v, want NOT_FOUND", err)
	}
	resp, err := posternv1connect.NewQueryServiceClient(as(ann), s.url).CancelQuery(t.Context(), request())
	if err != nil || resp.Msg.Query.State != "cancelled" {
		t.Errorf("got %v, %v", resp, err)
	}
	if outcome := <-ended; outcome.GetError().GetCode() != proto.CodeCancelled || outcome.Rows != 3 {
		t.Errorf("got %v", outcome)
	}
}

// TestHangUp wants the agent to notice that the client has gone.
func TestHangUp(t *testing.T) {
	s := startServer(t)
	a := joined(t, s, s.token, "host")
	started, gone := make(chan string, 1), make(chan struct{})
	a.answer(func(ctx context.Context, req *posternv1.SQLRequest, _ io.Writer) *posternv1.QueryOutcome {
		started <- req.QueryId
		<-ctx.Done()
		close(gone)
		return &posternv1.QueryOutcome{}
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.run(ctx, s.token, "host/shop", `{"sql":"x"}`) }()
	id := <-started
	cancel()
	<-done
	select {
	case <-gone:
	case <-time.After(time.Minute):
		t.Fatal("the agent was not told")
	}
	eventually(t, "the history to say so", func() error {
		q, err := s.store.GetQuery(t.Context(), "org_default", "", id)
		if err == nil && q.State != "cancelled" {
			err = fmt.Errorf("state %s", q.State)
		}
		return err
	})
}

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waiting for %s: %v", what, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestStanding tries every LinkService procedure without a certificate.
func TestStanding(t *testing.T) {
	s := startServer(t)
	a := newSimulatedAgent(s)
	tn, err := a.dial(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tn.Close(nil)
	c := linkClient(tn)
	_, err = c.Hello(t.Context(), connect.NewRequest(&posternv1.HelloRequest{Version: proto.Version()}))
	if proto.CodeOf(err) != proto.CodeUnauthenticated {
		t.Errorf("hello: got %v", err)
	}
	for name, err := range map[string]error{
		"renew":     second(c.Renew(t.Context(), connect.NewRequest(&posternv1.RenewRequest{}))),
		"rejoin":    second(c.Rejoin(t.Context(), connect.NewRequest(&posternv1.RenewRequest{}))),
		"inventory": second(c.UpdateInventory(t.Context(), connect.NewRequest(&posternv1.UpdateInventoryRequest{}))),
	} {
		if proto.CodeOf(err) != proto.CodeUnauthenticated {
			t.Errorf("%s: got %v", name, err)
		}
	}
	resp, err := (&http.Client{Transport: tn.Transport(tunnel.Control)}).Get("http://controlplane/metrics")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("another path: %s", resp.Status)
	}
}

func second[T any](_ T, err error) error { return err }

func TestKeyErrors(t *testing.T) {
	s := startServer(t)
	a := newSimulatedAgent(s)
	if err := a.register(t.Context(), wrongKey(), "x"); proto.CodeOf(err) != proto.CodeKeyUnknown {
		t.Errorf("unknown key: %v", err)
	}
	key := s.newKey(t, s.token, 1)
	late := func(r *posternv1.RegisterRequest) { r.HostTime.Seconds += 3600 }
	if err := a.register(t.Context(), key, "x", late); proto.CodeOf(err) != proto.CodeClockSkew {
		t.Errorf("clock: %v", err)
	}
	old := func(r *posternv1.RegisterRequest) { r.Version.Major = 9 }
	if err := a.register(t.Context(), key, "x", old); proto.CodeOf(err) != proto.CodeVersionMismatch {
		t.Errorf("version: %v", err)
	}
	if err := a.register(t.Context(), key, "x"); err != nil {
		t.Errorf("the key was burnt by refused attempts: %v", err)
	}
	if err := a.register(t.Context(), key, "x"); proto.CodeOf(err) != proto.CodeKeyUsedUp {
		t.Errorf("used up: %v", err)
	}
}

// TestRevokeCutsTheTunnel also wants the agent to stay out.
func TestRevokeCutsTheTunnel(t *testing.T) {
	s := startServer(t)
	a := newSimulatedAgent(s)
	if err := a.register(t.Context(), s.newKey(t, s.token, 1), "host"); err != nil {
		t.Fatal(err)
	}
	tn := a.attach(t)
	c := posternv1connect.NewAgentServiceClient(as(s.token), s.url)
	if _, err := c.RevokeAgent(t.Context(), connect.NewRequest(&posternv1.RevokeAgentRequest{Agent: "host"})); err != nil {
		t.Fatal(err)
	}
	select {
	case <-tn.Done():
	case <-time.After(time.Minute):
		t.Fatal("the tunnel is still there")
	}
	again, err := a.dial(t.Context(), []tls.Certificate{a.cert})
	if err == nil {
		defer again.Close(nil)
		err = a.hello(t.Context(), again)
	}
	if proto.CodeOf(err) != proto.CodeAgentRevoked {
		t.Errorf("came back with %v", err)
	}
}

func TestNewestTunnelWins(t *testing.T) {
	s := startServer(t)
	a := newSimulatedAgent(s)
	if err := a.register(t.Context(), s.newKey(t, s.token, 1), "host"); err != nil {
		t.Fatal(err)
	}
	first := a.attach(t)
	a.answer(func(context.Context, *posternv1.SQLRequest, io.Writer) *posternv1.QueryOutcome {
		return &posternv1.QueryOutcome{Rows: 1}
	})
	a.attach(t)
	select {
	case <-first.Done():
	case <-time.After(time.Minute):
		t.Fatal("the old tunnel is still there")
	}
	if _, outcome, err := s.run(t.Context(), s.token, "host/shop", `{"sql":"x"}`); err != nil || outcome.Error != nil {
		t.Errorf("got %v, %v", outcome, err)
	}
}

// TestOtherOrganizations tries everything that names an object with a token of
// another organization: nothing may show that it exists.
func TestOtherOrganizations(t *testing.T) {
	s := startServer(t)
	a := joined(t, s, s.token, "host")
	a.answer(func(context.Context, *posternv1.SQLRequest, io.Writer) *posternv1.QueryOutcome {
		return &posternv1.QueryOutcome{Rows: 1}
	})
	_, outcome, err := s.run(t.Context(), s.token, "host/shop", `{"sql":"x"}`)
	if err != nil {
		t.Fatal(err)
	}
	key := s.newKey(t, s.token, 1)
	orgs := posternv1connect.NewOrganizationServiceClient(as(s.token), s.url)
	org, err := orgs.CreateOrganization(t.Context(), connect.NewRequest(&posternv1.CreateOrganizationRequest{Name: "other"}))
	if err != nil {
		t.Fatal(err)
	}
	other := as(org.Msg.AdminToken)
	ctx := t.Context()
	agentsOf := posternv1connect.NewAgentServiceClient(other, s.url)
	queriesOf := posternv1connect.NewQueryServiceClient(other, s.url)
	auditOf := posternv1connect.NewAuditServiceClient(other, s.url)
	sourcesOf := posternv1connect.NewSourceServiceClient(other, s.url)
	orgsOf := posternv1connect.NewOrganizationServiceClient(other, s.url)
	for _, name := range []string{"host", a.id} {
		_, _, sqlErr := s.run(ctx, org.Msg.AdminToken, name+"/shop", `{"sql":"x"}`)
		for what, err := range map[string]error{
			"run":          sqlErr,
			"get agent":    second(agentsOf.GetAgent(ctx, connect.NewRequest(&posternv1.GetAgentRequest{Agent: name}))),
			"revoke agent": second(agentsOf.RevokeAgent(ctx, connect.NewRequest(&posternv1.RevokeAgentRequest{Agent: name}))),
			"sources":      second(sourcesOf.ListSources(ctx, connect.NewRequest(&posternv1.ListOrganizationSourcesRequest{Agent: name}))),
			"check":        second(sourcesOf.CheckSource(ctx, connect.NewRequest(&posternv1.CheckOrganizationSourceRequest{Agent: name, Source: "shop"}))),
			"agent audit":  second(auditOf.ListAudit(ctx, connect.NewRequest(&posternv1.ListAuditRequest{Agent: name}))),
			"verify":       second(auditOf.VerifyAudit(ctx, connect.NewRequest(&posternv1.VerifyAuditRequest{Agent: name}))),
			"query":        second(queriesOf.GetQuery(ctx, connect.NewRequest(&posternv1.GetQueryRequest{QueryId: outcome.QueryId}))),
			"cancel":       second(queriesOf.CancelQuery(ctx, connect.NewRequest(&posternv1.CancelOrganizationQueryRequest{QueryId: outcome.QueryId}))),
			"revoke key":   second(posternv1connect.NewKeyServiceClient(other, s.url).RevokeKey(ctx, connect.NewRequest(&posternv1.RevokeKeyRequest{KeyId: key.ID}))),
			"revoke token": second(posternv1connect.NewTokenServiceClient(other, s.url).RevokeToken(ctx, connect.NewRequest(&posternv1.RevokeTokenRequest{Token: strings.Split(s.token, "_")[1]}))),
			"rotate token": second(posternv1connect.NewTokenServiceClient(other, s.url).RotateToken(ctx, connect.NewRequest(&posternv1.RotateTokenRequest{Token: strings.Split(s.token, "_")[1]}))),
			"list orgs":    second(orgsOf.ListOrganizations(ctx, connect.NewRequest(&posternv1.ListOrganizationsRequest{}))),
			"disable org":  second(orgsOf.SetOrganizationDisabled(ctx, connect.NewRequest(&posternv1.SetOrganizationDisabledRequest{Organization: "default", Disabled: true}))),
		} {
			if proto.CodeOf(err) != proto.CodeNotFound {
				t.Errorf("%s of %s: got %v, want NOT_FOUND", what, name, err)
			}
		}
	}
	if list, err := agentsOf.ListAgents(ctx, connect.NewRequest(&posternv1.ListAgentsRequest{})); err != nil || len(list.Msg.Agents) != 0 {
		t.Errorf("agents: %v, %v", list, err)
	}

	// Disabled, its token and keys stop working.
	theirs := s.newKey(t, org.Msg.AdminToken, 1)
	if _, err := orgs.SetOrganizationDisabled(ctx, connect.NewRequest(&posternv1.SetOrganizationDisabledRequest{Organization: "other", Disabled: true})); err != nil {
		t.Fatal(err)
	}
	if _, err := agentsOf.ListAgents(ctx, connect.NewRequest(&posternv1.ListAgentsRequest{})); proto.CodeOf(err) != proto.CodeOrganizationDisabled {
		t.Errorf("a disabled organization's token: %v", err)
	}
	if err := newSimulatedAgent(s).register(ctx, theirs, "x"); proto.CodeOf(err) != proto.CodeOrganizationDisabled {
		t.Errorf("a disabled organization's key: %v", err)
	}
}

func TestVerifyAudit(t *testing.T) {
	s := startServer(t)
	a := newSimulatedAgent(s)
	if err := a.register(t.Context(), s.newKey(t, s.token, 1), "host"); err != nil {
		t.Fatal(err)
	}
	a.log(8)
	a.attach(t) // reports the head
	c := posternv1connect.NewAuditServiceClient(as(s.token), s.url)
	verify := func() map[string]*posternv1.ChainReport {
		resp, err := c.VerifyAudit(t.Context(), connect.NewRequest(&posternv1.VerifyAuditRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		reports := map[string]*posternv1.ChainReport{}
		for _, r := range resp.Msg.Reports {
			reports[r.Chain] = r
		}
		return reports
	}
	if r := verify(); !r["control plane"].Ok || r["control plane"].Entries == 0 || !r["host"].Ok || r["host"].Entries != 8 {
		t.Errorf("got %v", r)
	}
	// Hosts retire the beginning with an entry that stands for it; nothing more, and nothing
	// that they have not reported.
	retire := func(drop, through uint64) *posternv1.ChainReport {
		t.Helper()
		a.mu.Lock()
		chain, head := a.chain, a.head
		if through > 0 {
			last, err := auditchain.Decode(chain[through-1])
			if err != nil {
				t.Fatal(err)
			}
			h, err := auditchain.HeadOf(last)
			if err != nil {
				t.Fatal(err)
			}
			e := auditchain.Entry{Time: time.Now(), Action: auditchain.RetireAction, Target: auditchain.RetireTarget(h)}
			a.head = e.Seal(a.head)
			a.chain = append(slices.Clip(chain), e.Encode())
		}
		a.retired = drop
		a.mu.Unlock()
		r := verify()["host"]
		a.mu.Lock()
		a.chain, a.head, a.retired = chain, head, 0
		a.mu.Unlock()
		return r
	}
	if r := retire(3, 3); !r.Ok || r.Entries != 6 || !strings.Contains(r.Message, "from entry 4 on: those before were retired") {
		t.Errorf("retired: got %v", r)
	}
	if r := retire(4, 3); r.Ok || !strings.Contains(r.Message, "no entry retires") {
		t.Errorf("more than was retired: got %v", r)
	}
	if r := retire(3, 0); r.Ok || !strings.Contains(r.Message, "no entry retires") {
		t.Errorf("dropped: got %v", r)
	}
	a.log(3) // not reported
	if r := retire(10, 10); r.Ok || !strings.Contains(r.Message, "retired entries up to 10, of which it had reported 8") {
		t.Errorf("retired before it was reported: got %v", r)
	}
	a.mu.Lock()
	cut := a.chain
	a.chain = cut[:6]
	a.mu.Unlock()
	if r := verify()["host"]; r.Ok || !strings.Contains(r.Message, "8 entries") {
		t.Errorf("cut: got %v", r)
	}
	a.mu.Lock()
	a.chain, a.head = nil, auditchain.Head{}
	a.mu.Unlock()
	a.log(9)
	if r := verify()["host"]; r.Ok || !strings.Contains(r.Message, "anew") {
		t.Errorf("written anew: got %v", r)
	}
}

func TestProbes(t *testing.T) {
	s := startServer(t)
	joined(t, s, s.token, "host")
	for path, want := range map[string]string{
		"/healthz": "ok", "/readyz": "ready", "/metrics": "controlplane_agents_online 1", "/": "Postern",
	} {
		resp, err := http.Get(s.url + path)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != 200 || !strings.Contains(string(body), want) {
			t.Errorf("%s: %s %.100s", path, resp.Status, body)
		}
	}
	req, _ := http.NewRequest(http.MethodGet, s.url+"/metrics", nil)
	req.Header.Set("X-Forwarded-For", "192.0.2.1")
	resp, err := http.DefaultClient.Do(req)
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("metrics through a proxy: %v, %v", resp, err)
	}
	resp.Body.Close()
	resp, err = as(s.token).Get(s.url + "/api/v1/agents/host/metrics")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if string(body) != "agentd_up 1\n" {
		t.Errorf("agent's metrics: %s %s", resp.Status, body)
	}
}

// TestDrain stops while a query runs: it ends well, and new ones are refused.
func TestDrain(t *testing.T) {
	s := startServer(t, func(o *Options) { o.DrainTimeout = 20 * time.Second })
	a := joined(t, s, s.token, "host")
	started, finish := make(chan struct{}), make(chan struct{})
	a.answer(func(context.Context, *posternv1.SQLRequest, io.Writer) *posternv1.QueryOutcome {
		close(started)
		<-finish
		return &posternv1.QueryOutcome{Rows: 1}
	})
	ended := make(chan *posternv1.QueryOutcome, 1)
	go func() {
		_, outcome, _ := s.run(context.Background(), s.token, "host/shop", `{"sql":"x"}`)
		ended <- outcome
	}()
	<-started
	drained := make(chan struct{})
	go func() { defer close(drained); s.drain() }()
	eventually(t, "new statements to be refused", func() error {
		if !s.draining.Load() {
			return errors.New("not draining yet")
		}
		return nil
	})
	if s.ready(t.Context()) == nil {
		t.Error("still ready")
	}
	close(finish)
	if outcome := <-ended; outcome == nil || outcome.Error != nil {
		t.Errorf("the query under way: %v", outcome)
	}
	<-drained
}

// TestKilledControlPlane finds a query that an earlier life left running.
func TestKilledControlPlane(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	s := startServer(t, func(o *Options) { o.Data = dir })
	q := &posternv1.Query{Id: proto.NewID(proto.QueryPrefix), Agent: "host", Source: "shop", TokenName: "admin", Sql: "select 1", State: "running"}
	if err := s.store.InsertQuery(t.Context(), "org_default", "tok_x", q); err != nil {
		t.Fatal(err)
	}
	if err := recoverQueries(t.Context(), s.store, s.audit, s.log, s.replica); err != nil {
		t.Fatal(err)
	}
	got, err := s.store.GetQuery(t.Context(), "org_default", "", q.Id)
	if err != nil || got.State != "failed" || got.Error.GetCode() != proto.CodeUnavailable {
		t.Errorf("got %v, %v", got, err)
	}
	lines, err := s.audit.List(t.Context(), "org_default", 0, 10)
	if err != nil || len(lines) != 1 || !strings.Contains(string(lines[0]), q.Id) || !strings.Contains(string(lines[0]), "died") {
		t.Errorf("audit: %s, %v", lines, err)
	}
	if info, err := os.Stat(filepath.Join(dir, "admin.token")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("admin.token: %v, %v", info, err)
	}
}

func TestOneControlPlaneOnOneDirectory(t *testing.T) {
	s := startServer(t)
	o := s.options
	o.Listen = "127.0.0.1:0"
	_, err := NewServer(t.Context(), o, s.log)
	if err == nil || !strings.Contains(err.Error(), "another control plane") {
		t.Errorf("got %v", err)
	}
}
