package main

import (
	"context"
	"net/http"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/controlplane/hub"
	"github.com/postern-dev/postern/controlplane/pgwire"
	"github.com/postern-dev/postern/controlplane/query"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/controlplane/token"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/tunnel"
)

// pgAgent opens sessions of PostgreSQL's protocol on an agent. They share a lane: a
// session may be idle for hours, and lanes of their own are few.
type pgAgent struct{ *hub.Link }

func (a pgAgent) Do(r *http.Request) (*http.Response, error) { return a.HTTP(tunnel.Bulk).Do(r) }

func (a pgAgent) CancelQuery(ctx context.Context, req *posternv1.CancelQueryRequest) error {
	_, err := unwrap(a.Link, func() (*connect.Response[posternv1.CancelQueryResponse], error) {
		return a.Host().CancelQuery(ctx, connect.NewRequest(req))
	})
	return err
}

// pgTokens tells who connects.
type pgTokens struct{ *token.Service }

func (t pgTokens) AuthenticateAs(ctx context.Context, name, text, remote string) (pgwire.Caller, error) {
	p, err := t.Service.AuthenticateAs(ctx, name, text, remote)
	return pgwire.Caller{Principal: p.Principal, Expires: p.Expires}, err
}

// mayRunStatements fails for roles below analyst.
func mayRunStatements(p *posternv1.Principal) error {
	if token.Role(p.Role).Includes(token.Analyst) {
		return nil
	}
	return proto.Errorf(proto.CodeRoleDenied, "token %s has the role %s: this needs %s", p.TokenName, p.Role, token.Analyst)
}

// pgJournal keeps what sessions did.
type pgJournal struct{ *query.Journal }

func (j pgJournal) Open(ctx context.Context, s pgwire.Session) (pgwire.Entries, error) {
	entries, err := j.Journal.Open(ctx, query.WireSession{
		ID: s.ID, Principal: s.Principal, Agent: s.Agent, Source: s.Source, Remote: s.Remote, Application: s.Application, Cancel: s.Cancel,
	})
	if err != nil {
		return nil, err
	}
	return entries, nil
}

// recorder writes the journal's history.
type recorder struct{ store *store.Store }

func (r recorder) record(ctx context.Context, records []query.Record) error {
	all := make([]store.QueryRecord, len(records))
	for i, one := range records {
		all[i] = store.QueryRecord{Organization: one.Organization, Token: one.TokenID, Query: one.Query, Known: one.Known}
	}
	return r.store.RecordQueries(ctx, all)
}
