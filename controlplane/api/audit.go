package api

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// ListAudit implements AuditService.
func (a *API) ListAudit(ctx context.Context, req *connect.Request[posternv1.ListAuditRequest]) (*connect.Response[posternv1.ListAuditResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.ListAuditResponse, error) {
		limit, err := page(req.Msg.Limit)
		if err != nil {
			return nil, err
		}
		if req.Msg.Agent == "" {
			lines, err := a.cfg.Audit.List(ctx, c.Organization, req.Msg.From, limit)
			return &posternv1.ListAuditResponse{Entries: lines}, err
		}
		_, l, err := a.reach(ctx, c, req.Msg.Agent)
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, agentTime)
		defer cancel()
		resp, err := l.ReadAudit(ctx, &posternv1.ReadAuditRequest{From: req.Msg.From, Limit: uint32(limit)})
		if err != nil {
			return nil, err
		}
		return &posternv1.ListAuditResponse{Entries: resp.Entries}, nil
	})
}

// VerifyAudit implements AuditService.
func (a *API) VerifyAudit(ctx context.Context, req *connect.Request[posternv1.VerifyAuditRequest]) (*connect.Response[posternv1.VerifyAuditResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.VerifyAuditResponse, error) {
		resp := &posternv1.VerifyAuditResponse{}
		if req.Msg.Agent != "" {
			agent, l, err := a.reach(ctx, c, req.Msg.Agent)
			if err != nil {
				return nil, err
			}
			resp.Reports = append(resp.Reports, a.verifyAgent(ctx, agent, l))
			return resp, nil
		}
		entries, err := a.cfg.Audit.Verify(ctx, c.Organization)
		report, err := chainReport("control plane", entries, err)
		if err != nil {
			return nil, err
		}
		resp.Reports = append(resp.Reports, report)
		agents, err := a.cfg.Store.ListAgents(ctx, c.Organization)
		if err != nil {
			return nil, err
		}
		for _, agent := range agents {
			if l, err := a.cfg.Agents.Agent(agent.Id); err == nil {
				resp.Reports = append(resp.Reports, a.verifyAgent(ctx, agent, l))
			}
		}
		return resp, nil
	})
}

// chainReport makes a report of a broken chain, and an error of anything else.
func chainReport(chain string, entries uint64, err error) (*posternv1.ChainReport, error) {
	var broken *auditchain.BrokenError
	switch {
	case err == nil:
		return &posternv1.ChainReport{Chain: chain, Entries: entries, Ok: true}, nil
	case errors.As(err, &broken):
		return &posternv1.ChainReport{Chain: chain, Entries: entries, Message: broken.Error()}, nil
	}
	return nil, err
}

// verifyAgent reads a host's whole chain page by page. It must also contain the
// head that the agent last reported: a host whose log was cut short, or written
// anew, does not.
func (a *API) verifyAgent(ctx context.Context, agent *posternv1.Agent, l LiveAgent) *posternv1.ChainReport {
	entries, err := a.walkAgent(ctx, agent, l)
	report, err := chainReport(agent.Name, entries, err)
	if err != nil {
		report = &posternv1.ChainReport{Chain: agent.Name, Entries: entries, Message: "not read to its end: " + proto.Detail(err).Message}
	}
	return report
}

func (a *API) walkAgent(ctx context.Context, agent *posternv1.Agent, l LiveAgent) (uint64, error) {
	known, err := a.cfg.Agents.AuditHead(ctx, agent.Id)
	if err != nil {
		return 0, err
	}
	v := auditchain.NewVerifier(auditchain.Head{})
	for {
		next := v.Head().Sequence + 1
		resp, err := l.ReadAudit(ctx, &posternv1.ReadAuditRequest{From: next, Limit: maxPage})
		if err != nil {
			return v.Head().Sequence, err
		}
		for _, line := range resp.Entries {
			if err := v.Add(line); err != nil {
				return v.Head().Sequence, err
			}
			if v.Head().Sequence == known.Sequence && v.Head() != known {
				return v.Head().Sequence, &auditchain.BrokenError{Sequence: known.Sequence, Reason: "it is not the entry that the host reported earlier: the log was written anew"}
			}
		}
		if len(resp.Entries) == 0 {
			break
		}
	}
	if v.Head().Sequence < known.Sequence {
		return v.Head().Sequence, &auditchain.BrokenError{
			Sequence: v.Head().Sequence + 1, Reason: fmt.Sprintf("removed: the host once reported %d entries", known.Sequence),
		}
	}
	return v.Head().Sequence, nil
}
