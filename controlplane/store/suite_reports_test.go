package store_test

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestReports(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		org, _ := tenants(t, s)
		joined, _, err := join(s, org, newKey(t, s, org, 1).Id, "host")
		if err != nil {
			t.Fatal(err)
		}
		agent := joined.Id
		at := func(n byte) auditchain.Head { return auditchain.Head{Sequence: uint64(n), Hash: [32]byte{n}} }
		report := func(after, through auditchain.Head, ids ...string) store.StatementReport {
			r := store.StatementReport{Organization: org, Agent: agent, After: after, Through: through}
			for _, id := range ids {
				r.Statements = append(r.Statements, store.ReportedStatement{Token: "t1", Kept: []byte("sealed " + id), Query: &posternv1.Query{
					Id: id, Agent: "host", Source: "db", TokenName: "me", Sql: "select 1", State: "done", Started: timestamppb.New(now), Duration: durationpb.New(time.Second), Rows: 3, KernelId: "k1",
				}})
			}
			return r
		}
		append1 := func(prev auditchain.Head, text string) (auditchain.Head, [][]byte) {
			e := auditchain.Entry{Time: now, Organization: org, Action: text}
			next := e.Seal(prev)
			return next, [][]byte{e.Encode()}
		}
		if got := must(s.Reported(ctx, agent))(t); got != (auditchain.Head{}) {
			t.Errorf("reported %v before the first report", got)
		}
		one, lines := append1(auditchain.Head{}, "one")
		if err := s.AppendReport(ctx, report(auditchain.Head{}, at(5), "q1", "q2"), auditchain.Head{}, lines, one); err != nil {
			t.Fatal(err)
		}
		check := func(reported, head auditchain.Head, queries int) {
			t.Helper()
			if got := must(s.Reported(ctx, agent))(t); got != reported {
				t.Errorf("reported %v, want %v", got, reported)
			}
			if got := must(s.AuditHead(ctx, org))(t); got != head {
				t.Errorf("the chain's head is %v, want %v", got, head)
			}
			if got := must(s.ListQueries(ctx, org, "t1", 0, false))(t); len(got) != queries {
				t.Errorf("%d queries, want %d", len(got), queries)
			}
		}
		check(at(5), one, 2)
		q := must(s.GetQuery(ctx, org, "t1", "q2"))(t)
		if q.KernelId != "k1" || q.State != "done" || q.Rows != 3 || q.Duration.AsDuration() != time.Second {
			t.Errorf("got %v", q)
		}
		if rows := must(s.KeptRows(ctx, org, "q1"))(t); string(rows) != "sealed q1" {
			t.Errorf("kept %q", rows)
		}
		if known := must(s.KnownQueries(ctx, []string{"q1", "q2", "q3"}))(t); fmt.Sprint(known) != "map[q1:true q2:true]" {
			t.Errorf("known: %v", known)
		}
		two, more := append1(one, "two")
		// From elsewhere than where it ends: nothing of it is written, the chain neither.
		for _, after := range []auditchain.Head{{}, at(4), {Sequence: 5, Hash: [32]byte{9}}} {
			wantCode(t, s.AppendReport(ctx, report(after, at(9), "q3"), one, more, two), proto.CodeUnavailable)
		}
		// After another entry than the chain's last: neither.
		wantCode(t, s.AppendReport(ctx, report(at(5), at(9), "q3"), auditchain.Head{Sequence: 7}, more, auditchain.Head{Sequence: 8}), proto.CodeAlreadyExists)
		check(at(5), one, 2)
		// A report without statements moves on alone.
		if err := s.AppendReport(ctx, report(at(5), at(6)), one, nil, one); err != nil {
			t.Fatal(err)
		}
		check(at(6), one, 2)
		if err := s.AppendReport(ctx, report(at(6), at(7), "q3", "q1"), one, more, two); err != nil {
			t.Fatal(err)
		}
		check(at(7), two, 3)
	})
}
