package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

func headAt(n uint64) auditchain.Head {
	return auditchain.Head{Sequence: n, Hash: sha256.Sum256([]byte(fmt.Sprint(n)))}
}

func (r reporter) statements(ctx context.Context, after, through auditchain.Head, statements ...*posternv1.KernelStatement) (uint64, error) {
	m := &posternv1.ReportStatementsRequest{After: after.Proto(), Statements: statements}
	if through.Sequence > 0 {
		m.Through = through.Proto()
	}
	resp, err := linkClient(r.tn).ReportStatements(ctx, connect.NewRequest(m))
	if err != nil {
		return 0, proto.FromConnect(err)
	}
	return resp.Msg.Through.GetSequence(), nil
}

// chain is the organization's audit chain as it is now: entries about kernels' statements.
func (s *testServer) chain(t *testing.T) []auditchain.Entry {
	t.Helper()
	client := posternv1connect.NewAuditServiceClient(as(s.token), s.url)
	resp, err := client.ListAudit(t.Context(), connect.NewRequest(&posternv1.ListAuditRequest{From: 1, Limit: 1000}))
	if err != nil {
		t.Fatal(err)
	}
	var out []auditchain.Entry
	for _, line := range resp.Msg.Entries {
		var e auditchain.Entry
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		if e.Action == "sql.run" {
			out = append(out, e)
		}
	}
	if _, err := client.VerifyAudit(t.Context(), connect.NewRequest(&posternv1.VerifyAuditRequest{})); err != nil {
		t.Errorf("the chain does not verify: %v", err)
	}
	return out
}

// TestKernelStatements reports statements of kernels, again and again, and looks for them
// in history and audit.
func TestKernelStatements(t *testing.T) {
	s := startServer(t)
	a := newReporter(t, s, s.token, "host")
	analyst, stranger := s.newToken(t, s.token, "one", "analyst"), s.newToken(t, s.token, "two", "analyst")
	var owner *posternv1.Token
	tokens, err := posternv1connect.NewTokenServiceClient(as(s.token), s.url).ListTokens(t.Context(), connect.NewRequest(&posternv1.ListTokensRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range tokens.Msg.Tokens {
		if one.Name == "one" {
			owner = one
		}
	}
	// As an agent says them that lies about the name.
	who := &posternv1.Principal{Organization: "elsewhere", TokenId: owner.Id, TokenName: "somebody", Role: "admin"}
	ended := time.Now().Add(-3 * 24 * time.Hour).Truncate(time.Second)
	statement := func(id string, change func(*posternv1.KernelStatement)) *posternv1.KernelStatement {
		one := &posternv1.KernelStatement{
			QueryId: id, KernelId: "018f0000-0000-7000-8000-000000000001", Source: "shop", Principal: who, Sql: "select " + id, Verdict: "allowed", State: "done",
			Ended: timestamppb.New(ended), Duration: durationpb.New(1500 * time.Millisecond), Rows: 7, Bytes: 99,
		}
		if change != nil {
			change(one)
		}
		return one
	}
	none := auditchain.Head{}
	if at, err := a.statements(t.Context(), none, none); err != nil || at != 0 {
		t.Fatalf("an agent that told nothing is at %d, %v", at, err)
	}
	first := []*posternv1.KernelStatement{
		statement("qry_k1", func(k *posternv1.KernelStatement) { k.Kept = keptCanary() }),
		statement("qry_k2", func(k *posternv1.KernelStatement) {
			k.Verdict, k.State, k.Error = "denied", "denied", &posternv1.ErrorDetail{Code: proto.CodePolicyDenied, Message: "not here"}
		}),
		statement("qry_k3", func(k *posternv1.KernelStatement) {
			k.State, k.Principal = "failed", &posternv1.Principal{TokenId: "tok_nobody", TokenName: "gone"}
		}),
	}
	for range 3 { // the answer was lost twice
		if at, err := a.statements(t.Context(), none, headAt(10), first...); err != nil || at != 10 {
			t.Fatalf("through %d, %v", at, err)
		}
	}
	// After a restore from a backup of the agent's place alone, ids tell.
	if at, err := a.statements(t.Context(), headAt(10), headAt(12), first[0], statement("qry_k4", nil)); err != nil || at != 12 {
		t.Fatalf("through %d, %v", at, err)
	}
	// What does not go on from there changes nothing.
	if at, err := a.statements(t.Context(), headAt(11), headAt(20), statement("qry_no", nil)); err != nil || at != 12 {
		t.Errorf("through %d, %v", at, err)
	}
	for name, bad := range map[string]*posternv1.KernelStatement{
		"no id":     statement("", nil),
		"no kernel": statement("qry_b", func(k *posternv1.KernelStatement) { k.KernelId = "" }),
		"no time":   statement("qry_b", func(k *posternv1.KernelStatement) { k.Ended = nil }),
	} {
		if _, err := a.statements(t.Context(), headAt(12), headAt(20), bad); proto.CodeOf(err) != proto.CodeInvalid {
			t.Errorf("%s: got %v", name, err)
		}
	}
	list := func(token string) []*posternv1.Query {
		resp, err := posternv1connect.NewQueryServiceClient(as(token), s.url).ListQueries(t.Context(), connect.NewRequest(&posternv1.ListQueriesRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		return resp.Msg.Queries
	}
	if all, mine, others := list(s.token), list(analyst), list(stranger); len(all) != 4 || len(mine) != 3 || len(others) != 0 {
		t.Errorf("the operator sees %d, the owner %d, a stranger %d statements", len(all), len(mine), len(others))
	}
	got, err := s.show(t, analyst, "qry_k1")
	if err != nil {
		t.Fatal(err)
	}
	q := got.Query
	if q.KernelId != first[0].KernelId || q.TokenName != "one" || q.Agent != "host" || q.Source != "shop" || q.State != "done" || q.Rows != 7 || q.Bytes != 99 || q.Sql != "select qry_k1" ||
		q.Duration.AsDuration() != 1500*time.Millisecond || !q.Started.AsTime().Equal(ended.Add(-1500*time.Millisecond)) || !bytes.Equal(got.Rows.GetArrow(), keptCanary().Arrow) {
		t.Errorf("got %v", got)
	}
	if got, err := s.show(t, analyst, "qry_k2"); err != nil || got.Query.State != "denied" || got.Query.Error.GetMessage() != "not here" {
		t.Errorf("got %v, %v", got, err)
	}
	if got, err := s.show(t, s.token, "qry_k3"); err != nil || got.Query.State != "failed" || got.Query.TokenName != "gone" {
		t.Errorf("got %v, %v", got, err)
	}
	seen := map[string]int{}
	for _, e := range s.chain(t) {
		seen[e.QueryID]++
		if e.Target != "kernel "+first[0].KernelId || e.Agent != "host" || !strings.Contains(e.Remote, "ended "+ended.UTC().Format(time.RFC3339)) {
			t.Errorf("audit: %+v", e)
		}
		if e.QueryID == "qry_k1" && (e.Actor != "token one" || e.Role != "analyst" || e.Rows != 7 || e.Statement != "select qry_k1" || e.Verdict != "allowed") ||
			e.QueryID == "qry_k2" && (e.Verdict != "denied" || e.Error != "not here") {
			t.Errorf("audit: %+v", e)
		}
	}
	if len(seen) != 4 || seen["qry_k1"] != 1 || seen["qry_k2"] != 1 || seen["qry_k3"] != 1 || seen["qry_k4"] != 1 {
		t.Errorf("the audit chain has %v", seen)
	}
}

// TestKernelStatementsOnceForMany sends the same report many times at once.
func TestKernelStatementsOnceForMany(t *testing.T) {
	s := startServer(t)
	a := newReporter(t, s, s.token, "host")
	for round := range uint64(5) {
		var statements []*posternv1.KernelStatement
		for i := range 20 {
			statements = append(statements, &posternv1.KernelStatement{
				QueryId: fmt.Sprintf("qry_%d_%d", round, i), KernelId: "k", Source: "shop", Sql: "select 1", Verdict: "allowed", State: "done", Ended: timestamppb.Now(),
			})
		}
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if at, err := a.statements(t.Context(), headOf(round), headAt(round+1), statements...); err != nil || at != round+1 {
					t.Errorf("through %d, %v", at, err)
				}
			})
		}
		wg.Wait()
	}
	if n := len(s.chain(t)); n != 100 {
		t.Errorf("the audit chain has %d statements, want 100", n)
	}
}

func headOf(n uint64) auditchain.Head {
	if n == 0 {
		return auditchain.Head{}
	}
	return headAt(n)
}
