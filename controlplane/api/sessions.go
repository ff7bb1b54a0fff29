package api

import (
	"context"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// sessions implements SessionService; a type of its own, since HostService has
// methods of the same names.
type sessions struct{ api *API }

const (
	// maxSessionIdle is the longest idle timeout of a session.
	maxSessionIdle = time.Hour
	// listSessionsTime bounds the wait for one agent's sessions, and listSessionsAtOnce
	// is how many agents are asked at a time.
	listSessionsTime   = 5 * time.Second
	listSessionsAtOnce = 16
)

// OpenSession implements SessionService.
func (s sessions) OpenSession(ctx context.Context, req *connect.Request[posternv1.OpenSQLSessionRequest]) (*connect.Response[posternv1.OpenSQLSessionResponse], error) {
	a := s.api
	return call(ctx, a, func(c Caller) (*posternv1.OpenSQLSessionResponse, error) {
		if idle := req.Msg.IdleTimeout; idle != nil && (!idle.IsValid() || idle.AsDuration() < time.Second || idle.AsDuration() > maxSessionIdle) {
			return nil, proto.Errorf(proto.CodeInvalid, "a session's idle timeout is from 1s to %s", maxSessionIdle)
		}
		agent, l, err := a.reach(ctx, c, req.Msg.Agent)
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, agentTime)
		defer cancel()
		id := proto.NewID(proto.SessionPrefix)
		resp, err := l.OpenSession(ctx, &posternv1.OpenSessionRequest{
			SessionId: id, Source: req.Msg.Source, Principal: c.Principal, IdleTimeout: req.Msg.IdleTimeout,
		})
		entry := auditchain.Entry{Action: "session.open", Agent: agent.Name, Source: req.Msg.Source, SessionID: id, Verdict: "allowed"}
		if err != nil {
			entry.Outcome, entry.Error = "failed", err.Error()
			if code := proto.CodeOf(err); code == proto.CodePolicyDenied {
				entry.Outcome, entry.Verdict = "denied", "denied"
			}
		}
		if aerr := a.audit(context.WithoutCancel(ctx), c, entry); aerr != nil {
			if err == nil {
				l.CloseSession(ctx, &posternv1.CloseSessionRequest{SessionId: id, Principal: c.Principal, Reason: "its beginning could not be recorded"}) //nolint:errcheck // it ends by its idle timeout
			}
			return nil, aerr
		}
		if err != nil {
			return nil, err
		}
		resp.Session.Agent = agent.Name
		return &posternv1.OpenSQLSessionResponse{Session: resp.Session}, nil
	})
}

// CloseSession implements SessionService.
func (s sessions) CloseSession(ctx context.Context, req *connect.Request[posternv1.CloseSQLSessionRequest]) (*connect.Response[posternv1.CloseSQLSessionResponse], error) {
	a := s.api
	return call(ctx, a, func(c Caller) (*posternv1.CloseSQLSessionResponse, error) {
		if req.Msg.SessionId == "" {
			return nil, proto.Errorf(proto.CodeInvalid, "the request names no session")
		}
		agent, l, err := a.reach(ctx, c, req.Msg.Agent)
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, agentTime)
		defer cancel()
		if _, err := l.CloseSession(ctx, &posternv1.CloseSessionRequest{SessionId: req.Msg.SessionId, Principal: c.Principal}); err != nil {
			return nil, err
		}
		err = a.audit(context.WithoutCancel(ctx), c, auditchain.Entry{Action: "session.close", Agent: agent.Name, SessionID: req.Msg.SessionId, Verdict: "allowed"})
		return &posternv1.CloseSQLSessionResponse{}, err
	})
}

// ListSessions implements SessionService.
func (s sessions) ListSessions(ctx context.Context, req *connect.Request[posternv1.ListSQLSessionsRequest]) (*connect.Response[posternv1.ListSQLSessionsResponse], error) {
	a := s.api
	return call(ctx, a, func(c Caller) (*posternv1.ListSQLSessionsResponse, error) {
		var agents []*posternv1.Agent
		if req.Msg.Agent == "" {
			var err error
			if agents, err = a.cfg.Store.ListAgents(ctx, c.Organization); err != nil {
				return nil, err
			}
		} else {
			agent, _, err := a.reach(ctx, c, req.Msg.Agent)
			if err != nil {
				return nil, err
			}
			agents = append(agents, agent)
		}
		var (
			mu     sync.Mutex
			wg     sync.WaitGroup
			resp   = &posternv1.ListSQLSessionsResponse{}
			places = make(chan struct{}, listSessionsAtOnce)
		)
		ctx, cancel := context.WithTimeout(ctx, listSessionsTime)
		defer cancel()
		for _, agent := range agents {
			l, err := a.cfg.Agents.Agent(agent.Id)
			if err != nil {
				continue // offline: its sessions go on there, or end
			}
			places <- struct{}{}
			wg.Go(func() {
				defer func() { <-places }()
				got, err := l.ListSessions(ctx, &posternv1.ListSessionsRequest{})
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					resp.Silent = append(resp.Silent, agent.Name)
					return
				}
				for _, session := range got.Sessions {
					mine := session.Principal.GetOrganization() == c.Organization && session.Principal.GetTokenId() == c.TokenId
					if mine || session.Principal.GetOrganization() == c.Organization && has(c.Role, "operator") {
						session.Agent = agent.Name
						resp.Sessions = append(resp.Sessions, session)
					}
				}
			})
		}
		wg.Wait()
		return resp, nil
	})
}
