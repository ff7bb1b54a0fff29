package api

import (
	"context"
	"io"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// agentTime bounds a short request to an agent.
const agentTime = 30 * time.Second

// live adds what only the tunnel knows.
func (a *API) live(agent *posternv1.Agent) {
	l := a.cfg.Agents.Here(agent.Id)
	if l == nil {
		return
	}
	agent.Online = true
	agent.RemoteAddress = l.RemoteAddress()
	agent.RoundTrip = durationpb.New(l.RTT())
}

// liveAll does it for some agents of an organization, and says of those with a tunnel to
// another replica that they are online.
func (a *API) liveAll(ctx context.Context, organization string, agents ...*posternv1.Agent) error {
	elsewhere, err := a.cfg.Agents.Elsewhere(ctx, organization)
	for _, agent := range agents {
		agent.Online = elsewhere[agent.Id]
		a.live(agent)
	}
	return err
}

// reach returns an agent of the caller's organization and its tunnel.
func (a *API) reach(ctx context.Context, c Caller, name string) (*posternv1.Agent, LiveAgent, error) {
	agent, err := a.cfg.Store.GetAgent(ctx, c.Organization, name)
	if err != nil {
		return nil, nil, err
	}
	l, err := a.cfg.Agents.Agent(agent.Id)
	if err != nil {
		return agent, nil, proto.Errorf(proto.CodeOf(err), "agent %s is offline: it has no tunnel at present; see `agentd status` on its host", agent.Name)
	}
	return agent, l, nil
}

// ListAgents implements AgentService.
func (a *API) ListAgents(ctx context.Context, _ *connect.Request[posternv1.ListAgentsRequest]) (*connect.Response[posternv1.ListAgentsResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.ListAgentsResponse, error) {
		agents, err := a.cfg.Store.ListAgents(ctx, c.Organization)
		if err == nil {
			err = a.liveAll(ctx, c.Organization, agents...)
		}
		return &posternv1.ListAgentsResponse{Agents: agents}, err
	})
}

// GetAgent implements AgentService.
func (a *API) GetAgent(ctx context.Context, req *connect.Request[posternv1.GetAgentRequest]) (*connect.Response[posternv1.GetAgentResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.GetAgentResponse, error) {
		agent, err := a.cfg.Store.GetAgent(ctx, c.Organization, req.Msg.Agent)
		if err != nil {
			return nil, err
		}
		if err := a.liveAll(ctx, c.Organization, agent); err != nil {
			return nil, err
		}
		return &posternv1.GetAgentResponse{Agent: agent}, nil
	})
}

// unsentTime bounds how long a host may take to say what it has not uploaded.
const unsentTime = 2 * time.Second

// mayRevoke refuses to cut off a host whose writes would then be there alone. A host that is
// offline is judged by what it said last; one that is online and does not say is not cut off.
func (a *API) mayRevoke(ctx context.Context, c Caller, idOrName string) error {
	agent, err := a.cfg.Store.GetAgent(ctx, c.Organization, idOrName)
	if err != nil || agent.Revoked != nil || a.cfg.Files == nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, unsentTime)
	defer cancel()
	ops, workspace, err := a.cfg.Files.Unsent(limited, c.Organization, agent.Id)
	switch {
	case err != nil && limited.Err() != nil && ctx.Err() == nil:
		return proto.Errorf(proto.CodeUnavailable, "could not find out within %s whether agent %s has writes that are not uploaded: try again, or use --force: what is not uploaded is then on its host alone", unsentTime, agent.Name)
	case err != nil:
		return err
	}
	if ops > 0 {
		return proto.Errorf(proto.CodeInvalid, "agent %s has %d writes, in workspace %s, that are not uploaded: wait for them (postern file status), or use --force: then they are on its host alone", agent.Name, ops, workspace)
	}
	return nil
}

// RevokeAgent implements AgentService.
func (a *API) RevokeAgent(ctx context.Context, req *connect.Request[posternv1.RevokeAgentRequest]) (*connect.Response[posternv1.RevokeAgentResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.RevokeAgentResponse, error) {
		if !req.Msg.Force {
			if err := a.mayRevoke(ctx, c, req.Msg.Agent); err != nil {
				return nil, err
			}
		}
		agent, err := a.cfg.Store.RevokeAgent(ctx, c.Organization, req.Msg.Agent, time.Now())
		if err != nil {
			return nil, err
		}
		a.cfg.Agents.Disconnect(agent.Id)
		if err := a.audit(ctx, c, auditchain.Entry{Action: "agent.revoke", Agent: agent.Name, Target: agent.Id}); err != nil {
			return nil, err
		}
		return &posternv1.RevokeAgentResponse{Agent: agent}, nil
	})
}

// serveAgentMetrics hands on an agent's own metrics.
func (a *API) serveAgentMetrics(w http.ResponseWriter, r *http.Request, c Caller) {
	err := permit(c, agentMetrics)
	var l LiveAgent
	if err == nil {
		_, l, err = a.reach(r.Context(), c, r.PathValue("agent"))
	}
	if err != nil {
		writeError(w, r, err)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), agentTime)
	defer cancel()
	resp, err := l.Get(ctx, proto.MetricsPath)
	if err != nil {
		writeError(w, r, err)
		return
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end or not
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	w.WriteHeader(resp.StatusCode)
	io.Copy(w, io.LimitReader(resp.Body, maxAgentMetrics)) //nolint:errcheck // the caller has gone
}

// maxAgentMetrics bounds what an agent may answer with, in bytes.
const maxAgentMetrics = 4 << 20
