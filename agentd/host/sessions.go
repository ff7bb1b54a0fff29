package host

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Actions of sessions in the audit log.
const (
	actionSessionOpen   = "session.open"
	actionSessionResume = "session.resume"
	actionSessionClose  = "session.close"
)

// closedByOwner is the reason of a session that its owner closed.
const closedByOwner = "closed by its owner"

// OpenSession is a wish for a session that stays open, which the policy allowed.
type OpenSession struct {
	ID, Source, Owner string
	Principal         *posternv1.Principal
	// IdleTimeout is how long it may be unused; 0 is the default.
	IdleTimeout time.Duration
	// Ended is called once when it has ended, with why and how many statements it ran.
	Ended func(reason string, statements uint64)
}

// OpenSession opens a session; the log has it before the caller does.
func (s rpc) OpenSession(ctx context.Context, r *connect.Request[posternv1.OpenSessionRequest]) (*connect.Response[posternv1.OpenSessionResponse], error) {
	session, err := s.h.openSession(ctx, r.Msg)
	if err != nil {
		return nil, proto.ConnectError(err)
	}
	return connect.NewResponse(&posternv1.OpenSessionResponse{Session: session}), nil
}

func (h *Host) openSession(ctx context.Context, r *posternv1.OpenSessionRequest) (*posternv1.SQLSession, error) {
	switch {
	case !validID(r.SessionId):
		return nil, proto.Errorf(proto.CodeInvalid, "the request has no good session id")
	case r.Source == "" || len(r.Source) > maxIDLength:
		return nil, proto.Errorf(proto.CodeInvalid, "the request names no data source")
	case r.Principal.GetTokenId() == "":
		return nil, proto.Errorf(proto.CodeInvalid, "the request names no principal")
	case r.IdleTimeout != nil && (!r.IdleTimeout.IsValid() || r.IdleTimeout.AsDuration() < 0):
		return nil, proto.Errorf(proto.CodeInvalid, "the session's idle timeout is out of range")
	}
	h.mu.Lock()
	draining := h.draining
	h.mu.Unlock()
	if draining {
		return nil, proto.Errorf(proto.CodeUnavailable, "the agent is stopping: try again when it is back")
	}
	entry := auditchain.Entry{
		Action: actionSessionOpen, Actor: actor(r.Principal), Role: r.Principal.GetRole(), Source: r.Source, SessionID: r.SessionId, Verdict: "allowed",
	}
	began := time.Now()
	session, err := h.open(ctx, r, entry)
	entry.Outcome, entry.DurationMillis = ending(err), time.Since(began).Milliseconds()
	if err != nil {
		entry.Error = proto.Detail(err).Message
	}
	if entry.Outcome == "denied" || proto.CodeOf(err) == proto.CodeNotFound {
		entry.Verdict = "denied"
	}
	if rerr := h.record(entry); rerr != nil {
		if err == nil {
			h.cfg.SQL.CloseSession(r.SessionId, owner(r.Principal), "its beginning could not be recorded") //nolint:errcheck // it is there
		}
		return nil, errors.Join(rerr, err)
	}
	return session, err
}

func (h *Host) open(ctx context.Context, r *posternv1.OpenSessionRequest, entry auditchain.Entry) (*posternv1.SQLSession, error) {
	verdict := h.cfg.Decide(&posternv1.SQLRequest{Source: r.Source, Principal: r.Principal})
	switch {
	case !verdict.Known:
		return nil, proto.Errorf(proto.CodeNotFound, "this agent has no data source %q: see postern source list", r.Source)
	case !verdict.Allowed:
		return nil, proto.Errorf(proto.CodePolicyDenied, "source %s: %s", r.Source, verdict.Reason)
	}
	if err := h.settle(); err != nil {
		return nil, err
	}
	return h.cfg.SQL.OpenSession(ctx, OpenSession{
		ID: r.SessionId, Source: r.Source, Owner: owner(r.Principal), Principal: r.Principal, IdleTimeout: r.IdleTimeout.AsDuration(),
		Ended: h.sessionEnded(entry),
	})
}

// sessionEnded records the end of a session; entry is what was recorded of its beginning.
func (h *Host) sessionEnded(entry auditchain.Entry) func(reason string, statements uint64) {
	since := time.Now()
	return func(reason string, _ uint64) {
		closed := entry
		closed.Action, closed.Outcome, closed.Error, closed.DurationMillis = actionSessionClose, "done", reason, time.Since(since).Milliseconds()
		if reason == closedByOwner {
			closed.Error = ""
		}
		h.finish(closed, true)
	}
}

// ResumeSession records that a session which an agentd before us opened is ours now, or,
// with a reason, that it is lost. It returns what is to be called when it ends.
func (h *Host) ResumeSession(o OpenSession, lost string) (ended func(reason string, statements uint64)) {
	entry := auditchain.Entry{
		Action: actionSessionResume, Actor: actor(o.Principal), Role: o.Principal.GetRole(), Source: o.Source, SessionID: o.ID, Verdict: "allowed", Outcome: "done",
	}
	ended = h.sessionEnded(entry)
	if lost != "" {
		ended(lost, 0)
		return ended
	}
	h.finish(entry, true)
	return ended
}

// CloseSession ends a session of the principal's, or all of them.
func (s rpc) CloseSession(_ context.Context, r *connect.Request[posternv1.CloseSessionRequest]) (*connect.Response[posternv1.CloseSessionResponse], error) {
	reason := clip(r.Msg.Reason)
	if reason == "" {
		reason = closedByOwner
	}
	if r.Msg.Principal.GetTokenId() == "" {
		return nil, proto.ConnectError(proto.Errorf(proto.CodeInvalid, "the request names no principal"))
	}
	who := owner(r.Msg.Principal)
	if r.Msg.SessionId == "" {
		if r.Msg.Revoked && s.h.cfg.Kernels != nil {
			if err := s.h.revokeKernels(r.Msg.Principal, reason); err != nil {
				return nil, proto.ConnectError(err)
			}
		}
		return connect.NewResponse(&posternv1.CloseSessionResponse{Closed: uint32(s.h.cfg.SQL.CloseSessions(who, reason))}), nil
	}
	if err := s.h.cfg.SQL.CloseSession(r.Msg.SessionId, who, reason); err != nil {
		return nil, proto.ConnectError(err)
	}
	return connect.NewResponse(&posternv1.CloseSessionResponse{Closed: 1}), nil
}

// revokeKernels cuts the kernels of a token off from data sources.
func (h *Host) revokeKernels(p *posternv1.Principal, reason string) error {
	n, err := h.cfg.Kernels.Revoke(p.GetOrganization(), p.GetTokenId())
	if n > 0 {
		h.finish(auditchain.Entry{
			Action: actionKernelRevoke, Actor: "control plane", Target: clip(p.GetTokenId()), Verdict: "allowed", Outcome: "done",
			Statement: fmt.Sprintf("%d kernels may use no data source any more: %s", n, reason),
		}, true)
	}
	return err
}

// ListSessions lists the sessions that are open, and whose kernels there are.
func (s rpc) ListSessions(context.Context, *connect.Request[posternv1.ListSessionsRequest]) (*connect.Response[posternv1.ListSessionsResponse], error) {
	response := &posternv1.ListSessionsResponse{Sessions: s.h.cfg.SQL.Sessions()}
	if s.h.cfg.Kernels != nil {
		seen := map[string]bool{}
		for _, k := range s.h.cfg.Kernels.List() {
			if who := owner(k.Owner); !seen[who] {
				seen[who] = true
				response.KernelOwners = append(response.KernelOwners, k.Owner)
			}
		}
	}
	return connect.NewResponse(response), nil
}
