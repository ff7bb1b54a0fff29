package api

import (
	"context"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Bounds of listings.
const (
	defaultPage = 50
	maxPage     = 1000
)

func page(wanted uint32) (int, error) {
	switch {
	case wanted == 0:
		return defaultPage, nil
	case wanted > maxPage:
		return 0, proto.Errorf(proto.CodeInvalid, "a page has at most %d entries, not %d", maxPage, wanted)
	}
	return int(wanted), nil
}

// own is the token whose queries alone the caller may see; empty for all.
func own(c Caller) string {
	if has(c.Role, "operator") {
		return ""
	}
	return c.TokenId
}

// ListQueries implements QueryService.
func (a *API) ListQueries(ctx context.Context, req *connect.Request[posternv1.ListQueriesRequest]) (*connect.Response[posternv1.ListQueriesResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.ListQueriesResponse, error) {
		limit, err := page(req.Msg.Limit)
		if err != nil {
			return nil, err
		}
		queries, err := a.cfg.Store.ListQueries(ctx, c.Organization, own(c), limit, req.Msg.RunningOnly)
		return &posternv1.ListQueriesResponse{Queries: queries}, err
	})
}

// GetQuery implements QueryService.
func (a *API) GetQuery(ctx context.Context, req *connect.Request[posternv1.GetQueryRequest]) (*connect.Response[posternv1.GetQueryResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.GetQueryResponse, error) {
		q, err := a.cfg.Store.GetQuery(ctx, c.Organization, own(c), req.Msg.QueryId)
		if err != nil || !req.Msg.IncludeRows {
			return &posternv1.GetQueryResponse{Query: q}, err
		}
		rows, err := a.cfg.Queries.KeptRows(ctx, c.Organization, q.Id)
		if err != nil || rows == nil {
			return &posternv1.GetQueryResponse{Query: q}, err
		}
		entry := auditchain.Entry{
			Action: "query.rows", Agent: q.Agent, Source: q.Source, QueryID: q.Id, Verdict: "allowed",
			Rows: uint64(rows.First) + uint64(rows.Last), Bytes: uint64(len(rows.Arrow) + len(rows.Plan)),
		}
		if err := a.audit(ctx, c, entry); err != nil {
			return nil, err
		}
		return &posternv1.GetQueryResponse{Query: q, Rows: rows}, nil
	})
}

// CancelQuery implements QueryService.
func (a *API) CancelQuery(ctx context.Context, req *connect.Request[posternv1.CancelOrganizationQueryRequest]) (*connect.Response[posternv1.CancelOrganizationQueryResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.CancelOrganizationQueryResponse, error) {
		// Somebody else's query is not there for an analyst.
		if _, err := a.cfg.Store.GetQuery(ctx, c.Organization, own(c), req.Msg.QueryId); err != nil {
			return nil, err
		}
		_, err := a.cfg.Queries.Cancel(ctx, c.Principal, req.Msg.QueryId, func(owner *posternv1.Principal) error {
			if own(c) != "" && owner.TokenId != c.TokenId {
				return errNotHere
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		if err := a.audit(ctx, c, auditchain.Entry{Action: "sql.cancel", QueryID: req.Msg.QueryId}); err != nil {
			return nil, err
		}
		q, err := a.cfg.Store.GetQuery(ctx, c.Organization, own(c), req.Msg.QueryId)
		return &posternv1.CancelOrganizationQueryResponse{Query: q}, err
	})
}
