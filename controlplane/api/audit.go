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
			w := &witness{api: a, organization: c.Organization}
			resp.Reports = append(resp.Reports, a.verifyAgent(ctx, agent, l, w))
			if w.wrong != nil {
				resp.Reports = append(resp.Reports, &posternv1.ChainReport{Chain: "control plane", Entries: w.wrong.Sequence - 1, Message: w.wrong.Error()})
			}
			return resp, nil
		}
		kept, err := a.cfg.Audit.Verify(ctx, c.Organization)
		report, err := chainReport("control plane", kept, err)
		if err != nil {
			return nil, err
		}
		resp.Reports = append(resp.Reports, report)
		agents, err := a.cfg.Store.ListAgents(ctx, c.Organization)
		if err != nil {
			return nil, err
		}
		w := &witness{api: a, organization: c.Organization}
		for _, agent := range agents {
			if l, err := a.cfg.Agents.Agent(agent.Id); err == nil {
				resp.Reports = append(resp.Reports, a.verifyAgent(ctx, agent, l, w))
			}
		}
		if report.Ok && w.wrong != nil {
			report.Ok, report.Message = false, w.wrong.Error()
		}
		return resp, nil
	})
}

// chainReport makes a report of a broken chain, and an error of anything else.
func chainReport(chain string, kept auditchain.Kept, err error) (*posternv1.ChainReport, error) {
	var broken *auditchain.BrokenError
	switch {
	case err == nil:
		return &posternv1.ChainReport{Chain: chain, Entries: kept.Entries(), Ok: true, Message: kept.String()}, nil
	case errors.As(err, &broken):
		return &posternv1.ChainReport{Chain: chain, Entries: kept.Entries(), Message: broken.Error()}, nil
	}
	return nil, err
}

// verifyAgent reads a host's whole chain page by page. It must also contain the
// head that the agent last reported: a host whose log was cut short, or written
// anew, does not.
func (a *API) verifyAgent(ctx context.Context, agent *posternv1.Agent, l LiveAgent, w *witness) *posternv1.ChainReport {
	kept, err := a.walkAgent(ctx, agent, l, w)
	for range retiredMeanwhile {
		// The host may have retired entries between two pages.
		var broken *auditchain.BrokenError
		if !errors.As(err, &broken) || kept.First == 0 {
			break
		}
		page, rerr := l.ReadAudit(ctx, &posternv1.ReadAuditRequest{From: 1, Limit: 1})
		if rerr != nil || len(page.Entries) == 0 {
			break
		}
		if e, derr := auditchain.Decode(page.Entries[0]); derr != nil || e.Sequence <= kept.First {
			break
		}
		kept, err = a.walkAgent(ctx, agent, l, w)
	}
	report, err := chainReport(agent.Name, kept, err)
	if err != nil {
		report = &posternv1.ChainReport{Chain: agent.Name, Entries: kept.Entries(), Message: "not read to its end: " + proto.Detail(err).Message}
	}
	return report
}

// retiredMeanwhile is how often a host's chain is read anew because its beginning was retired while it was read.
const retiredMeanwhile = 5

func (a *API) walkAgent(ctx context.Context, agent *posternv1.Agent, l LiveAgent, w *witness) (auditchain.Kept, error) {
	known, err := a.cfg.Agents.AuditHead(ctx, agent.Id)
	if err != nil {
		return auditchain.Kept{}, err
	}
	var v auditchain.KeptVerifier
	for {
		next := v.Head().Sequence + 1
		resp, err := l.ReadAudit(ctx, &posternv1.ReadAuditRequest{From: next, Limit: maxPage})
		if err != nil {
			return v.Kept(), err
		}
		for _, line := range resp.Entries {
			if err := v.Add(line); err != nil {
				return v.Kept(), err
			}
			if v.Head().Sequence == known.Sequence && v.Head() != known {
				return v.Kept(), &auditchain.BrokenError{Sequence: known.Sequence, Reason: "it is not the entry that the host reported earlier: the log was written anew"}
			}
			if err := w.hear(ctx, agent.Name, line); err != nil {
				return v.Kept(), err
			}
		}
		if len(resp.Entries) == 0 {
			break
		}
	}
	kept := v.Kept()
	if v.Head().Sequence < known.Sequence {
		return kept, &auditchain.BrokenError{
			Sequence: v.Head().Sequence + 1, Reason: fmt.Sprintf("removed: the host once reported %d entries", known.Sequence),
		}
	}
	if err := v.End(); err != nil {
		return kept, err
	}
	// A host retires only what the control plane has said it knows.
	if kept.First > known.Sequence+1 {
		return kept, &auditchain.BrokenError{
			Sequence: known.Sequence + 1, Reason: fmt.Sprintf("removed: the host retired entries up to %d, of which it had reported %d", kept.First-1, known.Sequence),
		}
	}
	return kept, nil
}

// witness compares the control plane's chain with what hosts were told of it: an entry that was removed, or
// that was altered with all that follow it written anew, does not fit what some host's chain says.
type witness struct {
	api          *API
	organization string
	// wrong is the first of the control plane's entries that does not fit.
	wrong *auditchain.BrokenError
}

// hear takes an entry of a host's chain that has been verified. The error is of reading the control plane's.
func (w *witness) hear(ctx context.Context, agent string, line []byte) error {
	e, err := auditchain.Decode(line)
	if err != nil {
		return err // it was verified: this does not happen
	}
	told, ok := auditchain.PeerHead(e)
	if !ok || w.wrong != nil && w.wrong.Sequence <= told.Sequence {
		return nil
	}
	wrong := func(reason string) {
		w.wrong = &auditchain.BrokenError{Sequence: told.Sequence, Reason: fmt.Sprintf("%s; the host of agent %s was told of it on %s", reason, agent, e.Time.UTC().Format("2006-01-02 15:04:05 UTC"))}
	}
	lines, err := w.api.cfg.Audit.List(ctx, w.organization, told.Sequence, 1)
	if err != nil {
		return err
	}
	if len(lines) == 0 {
		wrong("it was removed")
		return nil
	}
	ours, err := auditchain.Decode(lines[0])
	switch head, herr := auditchain.HeadOf(ours); {
	case err != nil || herr != nil:
		wrong("it was altered")
	case head.Sequence > told.Sequence: // that far back is retired; what follows is verified by itself
	case head != told:
		wrong("it was altered, or the log was written anew")
	}
	return nil
}
