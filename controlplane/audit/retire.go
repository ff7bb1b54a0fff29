package audit

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
)

const (
	// LeastRetention is the shortest time that entries can be kept for.
	LeastRetention = 24 * time.Hour
	// retirePart is how many entries are dropped in one transaction at most.
	retirePart = 5000
	// retireEvery is how often it is looked whether there is something to drop.
	retireEvery = 6 * time.Hour
)

// Retire drops the entries of an organization that are older than before, oldest first,
// up to the first that is not, and returns how many. At most 5,000 are dropped
// in one transaction, with an entry that stands for them (auditchain.RetireAction): it has the number and hash
// of the last of them, so that Verify still finds whatever else is missing. The whole chain
// is verified before, so that nothing that was done to it is covered up: a
// *auditchain.BrokenError means that it does not fit, and that nothing more was dropped. What
// Config.Needed needs stays.
func (l *Log) Retire(ctx context.Context, organization string, before time.Time) (uint64, error) {
	// What does not fit here may be what another control plane drops at this moment.
	if _, n, err := l.old(ctx, organization, before, math.MaxUint64); err != nil && !IsBroken(err) || err == nil && n == 0 {
		return 0, err
	}
	kept, err := l.Verify(ctx, organization)
	if err != nil {
		return 0, err
	}
	limit := kept.Last
	if l.cfg.Needed != nil {
		needed, err := l.cfg.Needed(ctx, organization)
		if err != nil {
			return 0, err
		}
		limit = min(limit, needed)
	}
	dropped := uint64(0)
	for ctx.Err() == nil {
		n, err := l.retire(ctx, organization, before, limit)
		dropped += n
		if err != nil || n == 0 {
			return dropped, err
		}
	}
	return dropped, context.Cause(ctx)
}

// retire drops a part, nothing above limit: not the entries that it writes itself.
func (l *Log) retire(ctx context.Context, organization string, before time.Time, limit uint64) (uint64, error) {
	through, n, err := l.old(ctx, organization, before, limit)
	for range attempts {
		if !IsBroken(err) {
			break
		}
		if _, err := l.Verify(ctx, organization); err != nil {
			return 0, err
		}
		through, n, err = l.old(ctx, organization, before, limit)
	}
	if err != nil || n == 0 {
		return 0, err
	}
	entry := auditchain.Entry{
		Organization: organization, Actor: "system", Action: auditchain.RetireAction, Target: auditchain.RetireTarget(through), Outcome: "done", Rows: n,
	}
	err = l.AppendWith(ctx, organization, []auditchain.Entry{entry}, func(ctx context.Context, organization string, prev auditchain.Head, lines [][]byte, head auditchain.Head) error {
		return l.cfg.Store.RetireAudit(ctx, organization, through.Sequence, prev, lines, head)
	})
	if proto.CodeOf(err) == proto.CodeNotFound {
		return 0, nil // another control plane did it
	}
	if err != nil {
		return 0, err
	}
	return n, nil
}

// old finds the last of the oldest entries that are to be dropped, and how many they are.
func (l *Log) old(ctx context.Context, organization string, before time.Time, limit uint64) (through auditchain.Head, n uint64, err error) {
	var v auditchain.KeptVerifier
	ours := ownerMark(organization)
	for n < retirePart {
		lines, last, err := l.cfg.Store.AuditAfter(ctx, organization, v.Head().Sequence, verifyPage)
		if err != nil || len(lines) == 0 {
			return through, n, err
		}
		for _, line := range lines {
			if err := v.Add(line); err != nil {
				return through, 0, err
			}
			e, err := auditchain.Decode(line)
			if err != nil {
				return through, 0, err
			}
			if !e.Time.Before(before) || n == retirePart || e.Sequence > limit {
				return through, n, nil
			}
			if !ownedBy(line, ours) {
				return through, 0, &auditchain.BrokenError{Sequence: e.Sequence, Reason: "it was altered: it is not an entry of this organization"}
			}
			through, n = v.Head(), n+1
		}
		if last != v.Head().Sequence {
			return through, 0, &auditchain.BrokenError{Sequence: v.Head().Sequence, Reason: fmt.Sprintf("reordered: it is stored as entry %d", last)}
		}
	}
	return through, n, nil
}

// RunRetention drops what is older than age (LeastRetention at least) from all chains,
// now and every six hours, until ctx ends. A chain that does not verify is left alone and said
// in the log; so is one that cannot be read or written, until the next time.
func (l *Log) RunRetention(ctx context.Context, age time.Duration) {
	tick := time.NewTicker(retireEvery)
	defer tick.Stop()
	for {
		l.retireAll(ctx, age)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (l *Log) retireAll(ctx context.Context, age time.Duration) {
	organizations, err := l.cfg.Store.AuditOrganizations(ctx)
	if err != nil {
		if ctx.Err() == nil {
			l.cfg.Logger.Error("audit logs not retired", "err", err)
		}
		return
	}
	for _, organization := range organizations {
		n, err := l.Retire(ctx, organization, l.cfg.Now().Add(-age))
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			l.cfg.Logger.Error("audit log not retired", "organization", organization, "err", err)
		}
		if n > 0 {
			l.cfg.Logger.Info("audit entries retired", "organization", organization, "entries", n, "age", age)
		}
	}
}
