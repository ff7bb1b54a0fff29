package main

import (
	"context"

	"github.com/postern-dev/postern/controlplane/hub"
	"github.com/postern-dev/postern/controlplane/query"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

var _ hub.Reports = (*reports)(nil)

// reports takes what agents tell of their kernels' statements.
type reports struct{ server *Server }

func (r *reports) ReportStatements(ctx context.Context, id hub.Identity, m *posternv1.ReportStatementsRequest) (*posternv1.ReportStatementsResponse, error) {
	through, err := r.server.reports.Take(ctx, id.Organization, id.Agent, m)
	if err != nil {
		return nil, err
	}
	return &posternv1.ReportStatementsResponse{Through: through.Proto()}, nil
}

// newReports makes what takes them. The history's rows are sealed by box.
func (s *Server) newReports(box query.Box, metrics *query.Metrics) *query.Reports {
	return query.NewReports(query.ReportsConfig{
		Logger: s.log, Find: s.store.FindAgent, Reported: s.store.Reported, Known: s.store.KnownQueries, Box: box, Metrics: metrics,
		Token: func(ctx context.Context, organization, id string) (*posternv1.Token, error) {
			org, token, _, err := s.store.TokenByID(ctx, id)
			if proto.CodeOf(err) == proto.CodeNotFound || err == nil && org.Id != organization {
				return nil, nil
			}
			return token, err
		},
		Kernel: func(ctx context.Context, organization, id string) (string, error) {
			row, err := s.store.Kernel(ctx, organization, id)
			if proto.CodeOf(err) == proto.CodeNotFound {
				return "", nil
			}
			return row.Owner.GetTokenId(), err
		},
		Record: s.recordReport,
	})
}

// recordReport writes history, audit and how far an agent has reported together.
func (s *Server) recordReport(ctx context.Context, r query.Report) error {
	report := store.StatementReport{Organization: r.Organization, Agent: r.Agent, After: r.After, Through: r.Through}
	var entries []auditchain.Entry
	for _, one := range r.Statements {
		report.Statements = append(report.Statements, store.ReportedStatement{Token: one.TokenID, Query: one.Query, Kept: one.Kept})
		entries = append(entries, queryAudit{s.audit}.entry(one.Entry))
	}
	return s.audit.AppendWith(ctx, r.Organization, entries, func(ctx context.Context, _ string, prev auditchain.Head, lines [][]byte, head auditchain.Head) error {
		return s.store.AppendReport(ctx, report, prev, lines, head)
	})
}
