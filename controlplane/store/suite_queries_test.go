package store_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestQueries(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		org, other := tenants(t, s)
		insert := func(id, token, sql string, at time.Time) {
			t.Helper()
			q := &posternv1.Query{Id: id, Agent: "host", Source: "db", TokenName: "me", Sql: sql, State: "running", Started: timestamppb.New(at), SessionId: "ses_" + strings.Repeat(id, 90) + "\x00"}
			if err := s.InsertQuery(ctx, org, token, q); err != nil {
				t.Fatal(err)
			}
		}
		insert("q1", "t1", "select \x00 1", now)
		insert("q2", "t2", strings.Repeat("é", 40<<10), now.Add(time.Second))
		done := &posternv1.Query{
			Id: "q1", State: "failed", Duration: durationpb.New(1500 * time.Microsecond), Rows: 7, Bytes: 99,
			Error: &posternv1.ErrorDetail{Code: proto.CodeSQL, Message: "no", Sql: &posternv1.SQLErrorDetail{Sqlstate: "42601"}},
		}
		if err := s.FinishQuery(ctx, other, done); err != nil {
			t.Fatal(err)
		}
		if q := must(s.GetQuery(ctx, org, "", "q1"))(t); q.State != "running" {
			t.Errorf("another organization ended it: %v", q)
		}
		if err := s.FinishQuery(ctx, org, done); err != nil {
			t.Fatal(err)
		}
		q := must(s.GetQuery(ctx, org, "t1", "q1"))(t)
		if q.State != "failed" || q.Duration.AsDuration() != 1500*time.Microsecond || q.Rows != 7 || q.Bytes != 99 || q.Error.Sql.Sqlstate != "42601" || q.Sql != "select \uFFFD 1" || !strings.HasPrefix(q.SessionId, "ses_q1q1") || len(q.SessionId) > 100 {
			t.Errorf("got %v", q)
		}
		for _, at := range [][2]string{{other, ""}, {org, "t2"}} {
			_, err := s.GetQuery(ctx, at[0], at[1], "q1")
			wantCode(t, err, proto.CodeNotFound)
		}
		if q := must(s.GetQuery(ctx, org, "", "q2"))(t); len(q.Sql) > 66<<10 || !strings.HasSuffix(q.Sql, "bytes in all)") {
			t.Errorf("text of %d bytes kept", len(q.Sql))
		}
		if all := must(s.ListQueries(ctx, org, "", 0, false))(t); len(all) != 2 || all[0].Id != "q2" {
			t.Errorf("list: got %d", len(all))
		}
		if mine := must(s.ListQueries(ctx, org, "t1", 0, false))(t); len(mine) != 1 {
			t.Errorf("list of one token: got %d", len(mine))
		}
		if running := must(s.ListQueries(ctx, org, "", 0, true))(t); len(running) != 1 || running[0].Id != "q2" {
			t.Errorf("running: got %d", len(running))
		}
		why := &posternv1.ErrorDetail{Code: proto.CodeUnavailable, Message: "the control plane died"}
		lost := 0
		for owner, queries := range must(s.LostQueries(ctx))(t) {
			for _, q := range queries {
				lost++
				if got := must(s.GetQuery(ctx, owner, "", q.Id))(t); got.State != "running" {
					t.Errorf("lost query %v of %s is %s", q, owner, got.State)
				}
			}
		}
		if lost != 1 {
			t.Errorf("%d lost queries, want 1", lost)
		}
		if n := must(s.FailRunningQueries(ctx, why, now.Add(3*time.Second)))(t); n != 1 {
			t.Errorf("ended %d queries, want 1", n)
		}
		if q := must(s.GetQuery(ctx, org, "", "q2"))(t); q.State != "failed" || q.Error.Message != why.Message || q.Duration.AsDuration() != 2*time.Second {
			t.Errorf("got %v", q.State)
		}
		insert("old", "t1", "select 1", now.Add(-31*24*time.Hour))
		must(0, s.FinishQuery(ctx, org, &posternv1.Query{Id: "old", State: "done"}))(t)
		// By age, whatever organization the caller has in mind.
		if n := must(s.PruneQueries(ctx, "", now))(t); n != 1 {
			t.Errorf("pruned %d, want 1", n)
		}
	})
}

func TestKeptRows(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		org, other := tenants(t, s)
		insert := func(org, id string, at time.Time) {
			t.Helper()
			must(0, s.InsertQuery(ctx, org, "t1", &posternv1.Query{Id: id, State: "running", Started: timestamppb.New(at)}))(t)
		}
		keep := func(org, id string, sealed []byte, at time.Time) {
			t.Helper()
			must(0, s.KeepRows(ctx, org, id, sealed, at))(t)
		}
		want := func(org, id string, want []byte) {
			t.Helper()
			got := must(s.KeptRows(ctx, org, id))(t)
			if !bytes.Equal(got, want) || (got == nil) != (want == nil) {
				t.Errorf("rows of %s: %d bytes, want %d", id, len(got), len(want))
			}
		}
		insert(org, "q1", now)
		want(org, "q1", nil)
		keep(org, "q1", []byte("sealed \x00\xff"), now)
		want(org, "q1", []byte("sealed \x00\xff"))
		keep(org, "q1", []byte("others"), now) // once
		want(org, "q1", []byte("sealed \x00\xff"))
		want(other, "q1", nil)
		keep(org, "gone", []byte("x"), now) // no such query
		want(org, "gone", nil)
		insert(other, "theirs", now)
		keep(org, "theirs", []byte("x"), now) // another organization's
		want(org, "theirs", nil)
		want(other, "theirs", nil)

		// They go with their query.
		insert(org, "old", now.Add(-31*24*time.Hour))
		keep(org, "old", []byte("old"), now)
		must(0, s.FinishQuery(ctx, org, &posternv1.Query{Id: "old", State: "done"}))(t)
		must(s.PruneQueries(ctx, org, now))(t)
		want(org, "old", nil)

		// And the oldest of an organization's go when there are too many bytes.
		s.KeepBytes(1600)
		insert(other, "other", now)
		keep(other, "other", bytes.Repeat([]byte("o"), 100), now.Add(-time.Hour))
		for i := range 40 {
			id := fmt.Sprint("big", i)
			insert(org, id, now.Add(time.Duration(i)*time.Second))
			keep(org, id, bytes.Repeat([]byte("x"), 100), now.Add(time.Duration(i)*time.Second))
		}
		kept := 0
		for i := range 40 {
			if rows := must(s.KeptRows(ctx, org, fmt.Sprint("big", i)))(t); rows != nil {
				kept++
			} else if kept > 0 {
				t.Errorf("query %d has no rows, an older one has", i)
			}
		}
		if kept != 16 {
			t.Errorf("rows of %d queries are kept, want 16", kept)
		}
		want(other, "other", bytes.Repeat([]byte("o"), 100))
	})
}

// TestWireQueries: the statements of PostgreSQL clients have a history of their own,
// which is read together with the other one.
func TestWireQueries(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		org, other := tenants(t, s)
		record := func(id, token, state string, at time.Time, known bool) store.QueryRecord {
			q := &posternv1.Query{Id: id, Agent: "host", Source: "db", TokenName: "me", Sql: "select \x00 " + id, State: state, Started: timestamppb.New(at), SessionId: "wire_" + id}
			if state != "running" {
				q.Duration, q.Rows, q.Bytes = durationpb.New(time.Millisecond), 3, 30
			}
			return store.QueryRecord{Organization: org, Token: token, Query: q, Known: known}
		}
		failed := record("w3", "t2", "failed", now.Add(2*time.Second), false)
		failed.Query.Error = &posternv1.ErrorDetail{Code: proto.CodeSQL, Message: "no"}
		stranger := record("w1", "t1", "done", now, true)
		stranger.Organization = other
		if err := s.RecordQueries(ctx, []store.QueryRecord{
			record("w1", "t1", "running", now, false), record("w2", "t1", "done", now.Add(time.Second), false), failed,
			record("w2", "t9", "failed", now, false), // an id that is taken
			stranger,                                 // another organization's end
			record("w2", "t1", "failed", now, true),  // it has ended
		}); err != nil {
			t.Fatal(err)
		}
		if err := s.InsertQuery(ctx, org, "t1", record("q1", "t1", "running", now.Add(1500*time.Millisecond), false).Query); err != nil {
			t.Fatal(err)
		}
		if q := must(s.GetQuery(ctx, org, "", "w2"))(t); q.SessionId != "wire_w2" {
			t.Errorf("got %v, want its session", q)
		}
		list := func(token string, limit int, running bool) string {
			var ids []string
			for _, q := range must(s.ListQueries(ctx, org, token, limit, running))(t) {
				ids = append(ids, q.Id+" "+q.State)
			}
			return strings.Join(ids, ", ")
		}
		for _, c := range []struct{ got, want string }{
			{list("", 0, false), "w3 failed, q1 running, w2 done, w1 running"},
			{list("", 2, false), "w3 failed, q1 running"},
			{list("t1", 0, false), "q1 running, w2 done, w1 running"},
			{list("", 0, true), "q1 running, w1 running"},
		} {
			if c.got != c.want {
				t.Errorf("got %s, want %s", c.got, c.want)
			}
		}
		if q := must(s.GetQuery(ctx, org, "t2", "w3"))(t); q.Error.GetMessage() != "no" || q.Rows != 3 || q.Sql != "select \uFFFD w3" || q.Duration.AsDuration() != time.Millisecond {
			t.Errorf("got %v", q)
		}
		for _, at := range [][2]string{{other, ""}, {org, "t1"}} {
			_, err := s.GetQuery(ctx, at[0], at[1], "w3")
			wantCode(t, err, proto.CodeNotFound)
		}
		if err := s.RecordQueries(ctx, []store.QueryRecord{record("w1", "t1", "cancelled", now, true)}); err != nil {
			t.Fatal(err)
		}
		if q := must(s.GetQuery(ctx, org, "", "w1"))(t); q.State != "cancelled" {
			t.Errorf("got %v", q)
		}
		if err := s.RecordQueries(ctx, []store.QueryRecord{record("w4", "t1", "running", now, false)}); err != nil {
			t.Fatal(err)
		}
		if lost := must(s.LostQueries(ctx))(t); len(lost[org]) != 2 {
			t.Errorf("lost: %v", lost)
		}
		if n := must(s.FailRunningQueries(ctx, &posternv1.ErrorDetail{Code: proto.CodeUnavailable}, now.Add(time.Second)))(t); n != 2 {
			t.Errorf("ended %d, want 2", n)
		}
		if q := must(s.GetQuery(ctx, org, "", "w4"))(t); q.State != "failed" || q.Duration.AsDuration() != time.Second || !q.Started.AsTime().Equal(now.Truncate(time.Microsecond)) {
			t.Errorf("got %v", q)
		}

		if err := s.RecordQueries(ctx, []store.QueryRecord{record("a1", "t1", "done", now.Add(-31*24*time.Hour), false)}); err != nil {
			t.Fatal(err)
		}
		if n := must(s.PruneQueries(ctx, "", now))(t); n != 1 {
			t.Errorf("pruned %d, want the old one", n)
		}

		// Far more than are kept push out the oldest, of their own kind.
		s.KeepWireQueries(100)
		for i := range 10 {
			var many []store.QueryRecord
			for j := range 70 {
				many = append(many, record(fmt.Sprintf("x%02d%02d", i, j), "t1", "done", now.Add(time.Minute), false))
			}
			if err := s.RecordQueries(ctx, many); err != nil {
				t.Fatal(err)
			}
		}
		if n := len(must(s.ListQueries(ctx, org, "", 1000, false))(t)); n < 101 || n > 272 {
			t.Errorf("%d queries are kept, want 100 or somewhat more", n)
		}
		if q := must(s.GetQuery(ctx, org, "", "q1"))(t); q == nil {
			t.Error("another query was pushed out")
		}
	})
}
