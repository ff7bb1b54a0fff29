package api

import (
	"context"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// sources implements SourceService; a type of its own, since HostService has
// methods of the same names.
type sources struct{ api *API }

// ListSources implements SourceService.
func (s sources) ListSources(ctx context.Context, req *connect.Request[posternv1.ListOrganizationSourcesRequest]) (*connect.Response[posternv1.ListOrganizationSourcesResponse], error) {
	a := s.api
	return call(ctx, a, func(c Caller) (*posternv1.ListOrganizationSourcesResponse, error) {
		var agents []*posternv1.Agent
		var err error
		if req.Msg.Agent == "" {
			agents, err = a.cfg.Store.ListAgents(ctx, c.Organization)
		} else {
			var agent *posternv1.Agent
			agent, err = a.cfg.Store.GetAgent(ctx, c.Organization, req.Msg.Agent)
			agents = append(agents, agent)
		}
		if err != nil {
			return nil, err
		}
		if err := a.liveAll(ctx, c.Organization, agents...); err != nil {
			return nil, err
		}
		resp := &posternv1.ListOrganizationSourcesResponse{}
		for _, agent := range agents {
			if agent.Revoked != nil {
				continue
			}
			for _, source := range agent.Sources {
				resp.Sources = append(resp.Sources, &posternv1.OrganizationSource{Agent: agent.Name, Online: agent.Online, Source: source})
			}
		}
		return resp, nil
	})
}

// CheckSource implements SourceService.
func (s sources) CheckSource(ctx context.Context, req *connect.Request[posternv1.CheckOrganizationSourceRequest]) (*connect.Response[posternv1.CheckSourceResponse], error) {
	a := s.api
	return call(ctx, a, func(c Caller) (*posternv1.CheckSourceResponse, error) {
		agent, l, err := a.reach(ctx, c, req.Msg.Agent)
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, agentTime)
		defer cancel()
		resp, err := l.CheckSource(ctx, &posternv1.CheckSourceRequest{Source: req.Msg.Source, Principal: c.Principal, OneTimeToken: req.Msg.OneTimeToken})
		entry := auditchain.Entry{Action: "source.check", Agent: agent.Name, Source: req.Msg.Source, Verdict: "allowed"}
		if err != nil {
			entry.Outcome, entry.Error = "failed", err.Error()
		}
		if aerr := a.audit(context.WithoutCancel(ctx), c, entry); aerr != nil {
			return nil, aerr
		}
		return resp, err
	})
}

// introspectTime bounds the wait for a host that reads its database's catalog.
const introspectTime = 5 * time.Minute

// maxGlob bounds a pattern, in bytes.
const maxGlob = 256

// Introspect implements SourceService.
func (s sources) Introspect(ctx context.Context, req *connect.Request[posternv1.IntrospectSourceRequest]) (*connect.Response[posternv1.IntrospectSourceResponse], error) {
	return call(ctx, s.api, func(c Caller) (*posternv1.IntrospectSourceResponse, error) {
		if len(req.Msg.Schema) > maxGlob || len(req.Msg.Table) > maxGlob {
			return nil, proto.Errorf(proto.CodeInvalid, "a pattern has more than %d bytes", maxGlob)
		}
		ctx, cancel := context.WithTimeoutCause(ctx, introspectTime, proto.Errorf(proto.CodeTimeout, "the host did not tell its catalog in %s: it goes on in the background, ask again later", introspectTime))
		defer cancel()
		return s.api.cfg.Catalogs.Introspect(ctx, c.Principal, c.Remote, req.Msg)
	})
}
