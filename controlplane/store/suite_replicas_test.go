package store_test

import (
	"context"
	"errors"
	"maps"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestReplicasAndLinks(t *testing.T) {
	named := func(t *testing.T, cfg store.Config) *store.Store {
		cfg.Replica = "me" // without a name there are no others, and no links
		return storetest.Open(t, cfg)
	}
	for engine, open := range map[string]func(t *testing.T) *store.Store{
		"sqlite": func(t *testing.T) *store.Store {
			return named(t, store.Config{SQLitePath: filepath.Join(t.TempDir(), "postern.db")})
		},
		"postgres": func(t *testing.T) *store.Store {
			cfg, _ := storetest.PostgresConfig(t)
			return named(t, cfg)
		},
	} {
		t.Run(engine, func(t *testing.T) { testReplicasAndLinks(t, open(t)) })
	}
}

func testReplicasAndLinks(t *testing.T, s *store.Store) {
	org, other := tenants(t, s)
	agent, _, err := join(s, org, newKey(t, s, org, 1).Id, "host")
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.LinkOf(ctx, agent.Id)
	wantCode(t, err, proto.CodeNotFound)

	for range 2 {
		if err := s.BeatReplica(ctx, store.Replica{URL: "https://one:1", Started: now, Software: "v1"}); err != nil {
			t.Fatal(err)
		}
	}
	all := must(s.Replicas(ctx))(t)
	if len(all) != 1 || all[0].URL != "https://one:1" || all[0].Beat != 2 || all[0].Draining || all[0].Software != "v1" {
		t.Fatalf("got %+v", all)
	}
	first := must(s.AttachLink(ctx, agent.Id, "aa", now))(t)
	second := must(s.AttachLink(ctx, agent.Id, "bb", now.Add(time.Second)))(t)
	if first != 1 || second != 2 {
		t.Errorf("got generations %d and %d", first, second)
	}
	// The end of the older tunnel changes nothing.
	if err := s.DetachLink(ctx, agent.Id, first); err != nil {
		t.Fatal(err)
	}
	_, err = s.LinkOfTunnel(ctx, "aa")
	wantCode(t, err, proto.CodeNotFound)
	l := must(s.LinkOfTunnel(ctx, "bb"))(t)
	if l != must(s.LinkOf(ctx, agent.Id))(t) || l.Agent != agent.Id || l.Organization != org || l.Name != "host" || l.Generation != 2 {
		t.Errorf("got %+v", l)
	}
	if got := must(s.LinksOfReplica(ctx, "me"))(t); !maps.Equal(got, map[string]int64{agent.Id: 2}) {
		t.Errorf("got %v", got)
	}
	if got := must(s.OnlineElsewhere(ctx, other, []string{"me"}))(t); len(got) != 0 {
		t.Errorf("another organization's: got %v", got)
	}
	if got := must(s.OnlineElsewhere(ctx, org, []string{"you", "me"}))(t); !got[agent.Id] {
		t.Errorf("got %v", got)
	}
	if got := must(s.OnlineElsewhere(ctx, org, []string{"you"}))(t); len(got) != 0 {
		t.Errorf("got %v", got)
	}
	if err := s.DetachLink(ctx, agent.Id, second); err != nil {
		t.Fatal(err)
	}
	if got := must(s.Generations(ctx, []string{agent.Id, "agt_none"}))(t); got[agent.Id] != 0 {
		t.Errorf("got %v", got)
	}
	if third := must(s.AttachLink(ctx, agent.Id, "cc", now))(t); third != 3 {
		t.Errorf("got generation %d after a detach, want 3: they must never repeat", third)
	}
	if err := s.ForgetReplica(ctx, "me"); err != nil {
		t.Fatal(err)
	}
	if all := must(s.Replicas(ctx))(t); len(all) != 0 {
		t.Errorf("got %+v", all)
	}
}

// TestTwoReplicas opens one database twice.
func TestTwoReplicas(t *testing.T) {
	cfg, _ := storetest.PostgresConfig(t)
	cfg.Replica = "one"
	one := storetest.Open(t, cfg)
	cfg.Replica = "two"
	two := storetest.Open(t, cfg)
	org, _ := tenants(t, one)
	agent, _, err := join(one, org, newKey(t, one, org, 1).Id, "host")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []struct {
		*store.Store
		url string
	}{{one, "https://one:1"}, {two, "https://two:2"}} {
		if err := s.BeatReplica(ctx, store.Replica{URL: s.url, Started: now}); err != nil {
			t.Fatal(err)
		}
	}
	at := func(replica, url string) {
		t.Helper()
		if l := must(one.LinkOf(ctx, agent.Id))(t); l.Replica != replica || l.URL != url {
			t.Errorf("got %+v, want %s at %s", l, replica, url)
		}
	}
	must(one.AttachLink(ctx, agent.Id, "aa", now))(t)
	at("one", "https://one:1")
	must(two.AttachLink(ctx, agent.Id, "bb", now))(t)
	at("two", "https://two:2")
	if err := one.ForgetReplica(ctx, "two"); err != nil {
		t.Fatal(err)
	}
	at("", "")
	// It was not dead after all, and takes back what nobody else has got since.
	if mine, err := two.ReclaimLink(ctx, agent.Id, 2); !mine || err != nil {
		t.Errorf("got %v, %v", mine, err)
	}
	if mine, err := one.ReclaimLink(ctx, agent.Id, 1); mine || err != nil {
		t.Errorf("an older tunnel: got %v, %v", mine, err)
	}
	if l := must(one.LinkOf(ctx, agent.Id))(t); l.Replica != "two" {
		t.Errorf("got %+v", l)
	}

	// A lease is one's at a time, and free again afterwards.
	ran, err := one.Exclusively(ctx, "job", func(ctx context.Context) error {
		ran, err := two.Exclusively(ctx, "job", func(context.Context) error { return nil })
		if ran || err != nil {
			t.Errorf("both have it: %v, %v", ran, err)
		}
		ran, err = two.Exclusively(ctx, "another", func(context.Context) error { return nil })
		if !ran || err != nil {
			t.Errorf("another lease: %v, %v", ran, err)
		}
		return errors.New("its own error")
	})
	if !ran || err == nil || err.Error() != "its own error" {
		t.Errorf("got %v, %v", ran, err)
	}
	if ran, err := two.Exclusively(ctx, "job", func(context.Context) error { return nil }); !ran || err != nil {
		t.Errorf("it is not free: %v, %v", ran, err)
	}

	// What a dead replica ran, another one ends, and its own it leaves alone.
	for s, id := range map[*store.Store]string{one: "qry_one", two: "qry_two"} {
		if err := s.InsertQuery(ctx, org, "tok", &posternv1.Query{Id: id, Agent: "host", State: "running", Started: timestamppb.New(now)}); err != nil {
			t.Fatal(err)
		}
	}
	if r := must(one.RunningAt(ctx, org, "qry_two"))(t); r != "two" {
		t.Errorf("it runs at %q", r)
	}
	if lost := must(one.LostQueriesOf(ctx, "two"))(t); len(lost[org]) != 1 || lost[org][0].Id != "qry_two" {
		t.Errorf("got %v", lost)
	}
	if n := must(one.FailRunningQueriesOf(ctx, "two", &posternv1.ErrorDetail{Message: "dead"}, now))(t); n != 1 {
		t.Errorf("%d ended", n)
	}
	if r := must(one.RunningAt(ctx, org, "qry_one"))(t); r != "one" {
		t.Errorf("ours runs at %q", r)
	}
	if r := must(one.RunningAt(ctx, org, "qry_two"))(t); r != "" {
		t.Errorf("it still runs at %q", r)
	}
	if r := must(one.AskedBy(ctx, org, "qry_two"))(t); r != "two" {
		t.Errorf("asked by %q", r)
	}
}
