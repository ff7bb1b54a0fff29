package host

import (
	"context"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// maxPage is the most entries that ReadAudit returns at once.
const maxPage = 1000

// rpc is the HostService.
type rpc struct{ h *Host }

var _ posternv1connect.HostServiceHandler = rpc{}

// ListSources lists the data sources.
func (s rpc) ListSources(context.Context, *connect.Request[posternv1.ListSourcesRequest]) (*connect.Response[posternv1.ListSourcesResponse], error) {
	return connect.NewResponse(&posternv1.ListSourcesResponse{Sources: s.h.cfg.Sources()}), nil
}

// CheckSource says what works of a source, and leaves an entry in the log.
func (s rpc) CheckSource(ctx context.Context, r *connect.Request[posternv1.CheckSourceRequest]) (*connect.Response[posternv1.CheckSourceResponse], error) {
	h, name := s.h, r.Msg.Source
	known := false
	for _, source := range h.cfg.Sources() {
		known = known || source.Name == name
	}
	offered := r.Msg.OneTimeToken != ""
	if !known && !offered {
		return nil, proto.ConnectError(proto.Errorf(proto.CodeNotFound, "this agent has no data source %q: see postern source list", clip(name)))
	}
	select {
	case h.checks <- struct{}{}:
		defer func() { <-h.checks }()
	case <-ctx.Done():
		return nil, proto.ConnectError(context.Cause(ctx))
	}
	began := time.Now()
	if err := h.settle(); err != nil {
		return nil, proto.ConnectError(err)
	}
	var checks []*posternv1.Check
	if offered {
		ok := h.cfg.CheckOffered != nil
		if ok {
			checks, ok = h.cfg.CheckOffered(ctx, name, r.Msg.OneTimeToken)
		}
		if !ok {
			return nil, h.refuseOffer(r.Msg)
		}
	} else {
		checks = h.cfg.SQL.Check(ctx, name)
	}
	entry := auditchain.Entry{
		Action: actionCheck, Actor: actor(r.Msg.Principal), Role: r.Msg.Principal.GetRole(), Source: name, Verdict: "allowed", Outcome: "done",
		DurationMillis: time.Since(began).Milliseconds(),
	}
	for _, c := range checks {
		if c.Result == "failed" {
			entry.Outcome, entry.Error = "failed", c.Name+": "+c.Message
			break
		}
	}
	if err := h.record(entry); err != nil {
		return nil, proto.ConnectError(err)
	}
	return connect.NewResponse(&posternv1.CheckSourceResponse{Checks: checks}), nil
}

// refuseOffer records that somebody came with a token that is none.
func (h *Host) refuseOffer(r *posternv1.CheckSourceRequest) error {
	err := proto.Errorf(proto.CodePolicyDenied, "source %s is not offered with this one-time token: it was used, is older than 15 minutes, or is another's; run agentd source check --offer on the host again", clip(r.Source))
	if failed := h.record(auditchain.Entry{
		Action: actionCheck, Actor: actor(r.Principal), Role: r.Principal.GetRole(), Source: clip(r.Source), Verdict: "denied", Outcome: "denied", Error: err.Message,
	}); failed != nil {
		return proto.ConnectError(failed)
	}
	return proto.ConnectError(err)
}

// CancelQuery ends a statement.
func (s rpc) CancelQuery(_ context.Context, r *connect.Request[posternv1.CancelQueryRequest]) (*connect.Response[posternv1.CancelQueryResponse], error) {
	h := s.h
	if !validID(r.Msg.QueryId) {
		return nil, proto.ConnectError(proto.Errorf(proto.CodeInvalid, "the request has no good query id"))
	}
	found := h.cfg.SQL.Cancel(r.Msg.QueryId)
	if found {
		// It is cancelled already: a log that refuses does not stop that.
		if err := h.record(auditchain.Entry{
			Action: actionCancel, Actor: actor(r.Msg.Principal), Role: r.Msg.Principal.GetRole(), QueryID: r.Msg.QueryId, Verdict: "allowed", Outcome: "done",
		}); err != nil {
			h.logger.Error("cancellation not recorded", "query", r.Msg.QueryId, "err", err)
		}
	}
	return connect.NewResponse(&posternv1.CancelQueryResponse{Found: found}), nil
}

// HostStatus says how the host is.
func (s rpc) HostStatus(context.Context, *connect.Request[posternv1.HostStatusRequest]) (*connect.Response[posternv1.HostStatusResponse], error) {
	return connect.NewResponse(s.h.cfg.Status()), nil
}

// ReadAudit returns a page of the host's log.
func (s rpc) ReadAudit(_ context.Context, r *connect.Request[posternv1.ReadAuditRequest]) (*connect.Response[posternv1.ReadAuditResponse], error) {
	limit := int(r.Msg.Limit)
	if limit <= 0 || limit > maxPage {
		limit = maxPage
	}
	lines, err := s.h.cfg.Audit.Read(max(r.Msg.From, 1), limit)
	if err != nil {
		s.h.logger.Error("audit log not read", "err", err)
		return nil, proto.ConnectError(&proto.Error{Code: proto.CodeInternal, Message: "the host's audit log cannot be read: run agentd audit verify on the host", Err: err})
	}
	return connect.NewResponse(&posternv1.ReadAuditResponse{Entries: lines}), nil
}
