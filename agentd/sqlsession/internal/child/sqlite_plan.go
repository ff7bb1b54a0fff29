package child

import (
	"strings"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/plandoc"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
)

const (
	// sqlitePlanPrefix asks for a plan. The text behind it was compiled by itself.
	sqlitePlanPrefix = "EXPLAIN QUERY PLAN "
	// maxSQLitePlan bounds the steps of a plan.
	maxSQLitePlan = 100_000
)

func (x *sqliteExecution) planRefused() *proto.Error {
	return planRefused("SQLite", sqltext.SQLite, x.request, "select", "values", "with", "insert", "replace", "update", "delete")
}

// plan answers with the plan of a statement that was compiled, and so judged. To make
// it SQLite compiles the statement and runs nothing of it.
func (x *sqliteExecution) plan(judged *sqliteStatement) *proto.Error {
	if strings.TrimSpace(x.text.Text) == "" || judged.explains() {
		return explainRefused()
	}
	s, _, err := x.db.prepare(sqlitePlanPrefix + x.text.Text)
	if err == nil && (s == nil || !s.explains()) {
		if s != nil {
			s.finalize()
		}
		return proto.Errorf(proto.CodeInternal, "SQLite makes no plan")
	}
	if err != nil {
		return x.failure(err)
	}
	defer s.finalize()
	if x.st.isStopped() {
		return stopError(x.st.stopReason(), x.request)
	}
	if err := x.sink.send(frame.Begun, nil); err != nil {
		return proto.Errorf(proto.CodeInternal, "%w", err)
	}
	x.begun = true
	steps, failure := x.steps(s)
	if failure != nil {
		return failure
	}
	var texts func(string) string
	if x.masking != nil {
		texts = x.masking.texts.String
	}
	root := []plandoc.Member{{Key: "Node Type", Value: "QUERY PLAN"}, {Key: "Plans", Value: steps.under(0, 0)}}
	x.done.Tag = explainTag
	x.done.Rows, failure = tellPlan(x.sink, x.request, x.st, plandoc.Encode([]any{[]plandoc.Member{{Key: "Plan", Value: root}}}, texts))
	return failure
}

// sqliteSteps are the steps of a plan, by the number of what they are under.
type sqliteSteps map[int64][]sqliteStep

type sqliteStep struct {
	id     int64
	detail string
}

// steps reads the plan: id, parent, a column that is not used, and what is done.
func (x *sqliteExecution) steps(s *sqliteStatement) (sqliteSteps, *proto.Error) {
	steps, size := sqliteSteps{}, 0
	for n := 0; ; n++ {
		more, err := s.step()
		switch {
		case err != nil:
			return nil, x.failure(err)
		case !more:
			return steps, nil
		case n == maxSQLitePlan || size > plandoc.MaxPlan:
			return nil, proto.Errorf(proto.CodeByteLimit, "the plan has more than %d steps, or %d bytes", maxSQLitePlan, plandoc.MaxPlan)
		case s.columns() != 4:
			return nil, proto.Errorf(proto.CodeInternal, "%w", plandoc.ErrGarbled)
		}
		detail := string(s.bytes(3))
		if x.request.Guard.Plans == plansStructure {
			detail = sqliteStructure(detail)
		}
		size += len(detail)
		parent := s.integer(1)
		steps[parent] = append(steps[parent], sqliteStep{s.integer(0), detail})
	}
}

// under are the steps under one, which their numbers keep from going in circles: a
// step's is larger than that of what it is under.
func (s sqliteSteps) under(parent int64, depth int) []any {
	list := []any{}
	if depth > 500 {
		return list
	}
	for _, step := range s[parent] {
		if step.id <= parent {
			continue
		}
		node := []plandoc.Member{{Key: "Node Type", Value: step.detail}}
		if inner := s.under(step.id, depth+1); len(inner) > 0 {
			node = append(node, plandoc.Member{Key: "Plans", Value: inner})
		}
		list = append(list, node)
	}
	return list
}

// sqliteStructure is a step without what may hold a literal. SQLite writes names of
// tables, indexes and columns, and ? for what they are compared with. Left out are the
// columns of what it makes for the statement, whose names may be made of expressions,
// and what virtual tables say of themselves.
func sqliteStructure(detail string) string {
	if before, after, ok := strings.Cut(detail, " VIRTUAL TABLE INDEX "); ok {
		number, _, _ := strings.Cut(after, ":")
		return before + " VIRTUAL TABLE INDEX " + number
	}
	for _, made := range []string{" AUTOMATIC ", "BLOOM FILTER "} {
		if strings.Contains(detail, made) {
			return withoutColumns(detail)
		}
	}
	if strings.Contains(detail, "'") {
		return withoutColumns(detail)
	}
	return detail
}

// withoutColumns is a step without the columns in parentheses.
func withoutColumns(detail string) string {
	before, _, _ := strings.Cut(detail, " (")
	return before
}
