package child

import (
	"io"
	"slices"
	"strings"

	"github.com/apache/arrow-go/v18/arrow"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
)

// Plans of engines without a parser that we would trust: on SQLite nothing of a
// statement runs to make one, on MySQL what may run is judged as if all of it ran.

// planRefused holds what is asked for against the policy, and against what is
// certain for an engine. verbs are the words that a statement with a plan begins with.
func planRefused(product string, d *sqltext.Dialect, r *frame.RunRequest, verbs ...string) *proto.Error {
	switch {
	case len(r.Indexes) > 0:
		return proto.Errorf(proto.CodeInvalid, "hypothetical indexes are for PostgreSQL, and the data source is %s", product)
	case r.Explain == explainAnalyze:
		return denied(0, "running a statement for its plan is refused: it is not supported for %s; ask without --analyze", product)
	case columnMasks(&r.Guard):
		return denied(0, "plans are refused: the data source masks columns, and what a plan on %s tells of them is not certain", product)
	}
	if failure := plansAllow(r); failure != nil {
		return failure
	}
	switch word := strings.ToLower(sqltext.FirstWord(d, r.SQL)); {
	case word == "explain" || word == "analyze" || word == "describe" || word == "desc":
		return explainRefused()
	case !slices.Contains(verbs, word):
		last := len(verbs) - 1
		return denied(0, "only %s and %s have a plan on %s", strings.ToUpper(strings.Join(verbs[:last], ", ")), strings.ToUpper(verbs[last]), product)
	}
	return nil
}

// planInTransaction is the answer in a session whose transaction is open.
func planInTransaction() *proto.Error {
	return proto.Errorf(proto.CodeInvalid, "the plan of a statement is told outside of a transaction alone: say COMMIT or ROLLBACK first")
}

// tellPlan answers with a plan in JSON: one row of one column.
func tellPlan(out *sink, r *frame.RunRequest, st *statement, plan []byte) (rows uint64, failure *proto.Error) {
	plain := *r
	plain.KeepFirst, plain.KeepLast = 0, 0 // it is kept as a plan
	f := newFeed(out, &plain, st, []field{{
		name: "QUERY PLAN", layout: layoutText, arrow: arrow.BinaryTypes.String, notNull: true, meta: []string{"pg.type", "json", "pg.typmod", "-1"},
	}}, &planCursor{plan: plan})
	if err := f.run(); err != nil {
		failure = proto.Errorf(proto.CodeInternal, "%w", err)
	} else if reason := st.stopReason(); reason != 0 {
		failure = stopError(reason, r)
	}
	if rows, failure = f.end(failure); failure != nil {
		return rows, failure
	}
	if r.KeepFirst+r.KeepLast > 0 && len(plan) <= frame.MaxPlan {
		// A longer one is only not kept: the answer is as good.
		if err := out.send(frame.Plan, plan); err != nil {
			return rows, proto.Errorf(proto.CodeInternal, "%w", err)
		}
	}
	return rows, nil
}

// planCursor is a result of one text.
type planCursor struct{ plan []byte }

func (c *planCursor) next(cells []cell) error {
	if c.plan == nil {
		return io.EOF
	}
	cells[0], c.plan = cell{text: c.plan}, nil
	return nil
}

func (c *planCursor) rest() error { return nil }
