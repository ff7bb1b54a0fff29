package query

import (
	"context"
	"time"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// maxKeptRows bounds the first rows and the last ones that are kept of a query,
	// maxKeptBytes their Arrow stream.
	maxKeptRows  = 1000
	maxKeptBytes = 1 << 20
	// maxPlanBytes bounds the plan that is kept of a query.
	maxPlanBytes = 512 << 10
	// reportTime is how long after the end of a query its rows may still come.
	reportTime = time.Minute
	// maxReports bounds the ended queries whose rows may still come.
	maxReports = 4096
	// readPatience is how long a reader waits for rows that are on their way.
	readPatience = 5 * time.Second
)

// report stands for the rows of one query that its agent may report, once.
type report struct {
	organization, agent string
	taken               bool
	// expected is set when the agent has said that they are on their way; ended is
	// when the query did, zero while it runs.
	expected bool
	ended    time.Time
	stored   chan struct{} // closed when they are in the store, or lost
}

// expectLocked lets an agent report the rows of a query that begins.
func (r *Runner) expectLocked(id, organization, agent string) {
	r.reports[id] = &report{organization: organization, agent: agent, stored: make(chan struct{})}
}

// endedLocked is called at the end of a query; may tells whether its rows may still
// come, and expected whether the agent has said so.
func (r *Runner) endedLocked(id string, may, expected bool) {
	p := r.reports[id]
	if p == nil {
		return
	}
	now := time.Now()
	if len(r.reports)-len(r.running) > maxReports/2 {
		for other, q := range r.reports {
			if !q.ended.IsZero() && now.Sub(q.ended) > reportTime {
				delete(r.reports, other)
			}
		}
	}
	p.ended, p.expected = now, expected
	select {
	case <-p.stored:
		may = false
	default:
	}
	if !may || len(r.reports)-len(r.running) > maxReports {
		delete(r.reports, id)
	}
}

// ReportRows keeps the rows that an agent reports of a query that it was asked to
// run here, a moment ago or still. Another agent's query does not exist for it.
func (r *Runner) ReportRows(ctx context.Context, organization, agent, id string, rows *posternv1.KeptRows) error {
	if rows != nil && len(rows.Plan) > maxPlanBytes {
		return proto.Errorf(proto.CodeInvalid, "a plan of at most %d bytes is kept of a query", maxPlanBytes)
	}
	if rows == nil || rows.First > maxKeptRows || rows.Last > maxKeptRows || len(rows.Arrow) > maxKeptBytes {
		return proto.Errorf(proto.CodeInvalid, "at most %d first and %d last rows of %d bytes are kept of a query", maxKeptRows, maxKeptRows, maxKeptBytes)
	}
	r.mu.Lock()
	p := r.reports[id]
	good := p != nil && p.organization == organization && p.agent == agent && !p.taken && (p.ended.IsZero() || time.Since(p.ended) < reportTime)
	if good {
		p.taken = true
	}
	r.mu.Unlock()
	if !good {
		return proto.Errorf(proto.CodeNotFound, "no query %q of this agent waits for its rows", id)
	}
	err := r.keep(ctx, organization, id, rows)
	r.mu.Lock()
	close(p.stored)
	if !p.ended.IsZero() {
		delete(r.reports, id)
	}
	r.mu.Unlock()
	return err
}

func (r *Runner) keep(ctx context.Context, organization, id string, rows *posternv1.KeptRows) error {
	plain, err := gproto.Marshal(rows)
	if err != nil {
		return proto.Errorf(proto.CodeInvalid, "the rows cannot be encoded: %w", err)
	}
	sealed, err := r.cfg.Box.Seal(plain, RowsAbout(organization, id))
	if err != nil {
		return err
	}
	return r.cfg.History.KeepRows(ctx, organization, id, sealed, time.Now())
}

// RowsAbout is what the sealed rows of a query are bound to.
func RowsAbout(organization, id string) string { return "rows of " + organization + "/" + id }

// KeptRows returns the rows that are kept of a query of the organization; nil if
// there are none. Rows that are on their way are waited for, a moment.
func (r *Runner) KeptRows(ctx context.Context, organization, id string) (*posternv1.KeptRows, error) {
	r.mu.Lock()
	p := r.reports[id]
	wait := p != nil && p.organization == organization && (p.expected || p.taken)
	r.mu.Unlock()
	if wait {
		patience := time.NewTimer(readPatience)
		defer patience.Stop()
		select {
		case <-p.stored:
		case <-patience.C:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	sealed, err := r.cfg.History.KeptRows(ctx, organization, id)
	if err != nil || sealed == nil {
		return nil, err
	}
	plain, err := r.cfg.Box.Open(sealed, RowsAbout(organization, id))
	if err != nil {
		return nil, &proto.Error{Code: proto.CodeInternal, Message: "the rows of query " + id + " cannot be unsealed: is master.key the one of this installation?", Err: err}
	}
	rows := &posternv1.KeptRows{}
	if err := gproto.Unmarshal(plain, rows); err != nil {
		return nil, err
	}
	return rows, nil
}
