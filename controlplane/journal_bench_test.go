package main

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/controlplane/audit"
	"github.com/postern-dev/postern/controlplane/query"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// BenchmarkJournal: how many statements of PostgreSQL clients history and audit take.
func BenchmarkJournal(b *testing.B) {
	s, err := store.Open(b.Context(), store.Config{SQLitePath: filepath.Join(b.TempDir(), "db"), Logger: slog.Default(), Replica: "r"})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	if _, err := s.EnsureDefaultOrganization(b.Context(), time.Now()); err != nil {
		b.Fatal(err)
	}
	log := audit.New(audit.Config{Store: s, DefaultOrganization: store.DefaultOrganizationID})
	j := query.NewJournal(query.JournalConfig{Logger: slog.Default(), Record: recorder{s}.record, Append: queryAudit{log}.appendAll})
	e, err := j.Open(b.Context(), query.WireSession{ID: "ses", Agent: "lab", Source: "shop", Principal: &posternv1.Principal{
		Organization: store.DefaultOrganizationID, TokenId: "tok", TokenName: "ana", Role: "analyst",
	}})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		e.Event(&posternv1.WireEvent{
			StatementId: proto.NewID(proto.QueryPrefix), State: posternv1.WireEvent_STATE_ENDED, Verdict: "allowed", Rows: 1, Bytes: 77,
			Sql: fmt.Sprintf("SELECT abalance FROM pgbench_accounts WHERE aid = %d;", i), Duration: durationpb.New(200 * time.Microsecond),
		})
	}
	e.Close(nil)
	j.Close()
}
