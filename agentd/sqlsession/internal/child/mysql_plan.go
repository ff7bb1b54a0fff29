package child

import (
	"context"
	"database/sql/driver"
	"errors"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/mysqlplan"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/plandoc"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
)

// mysqlPlanPrefix asks for a plan. What follows begins with SELECT, VALUES, TABLE or
// WITH, or a parenthesis: no word of EXPLAIN's own.
const mysqlPlanPrefix = "EXPLAIN FORMAT=JSON "

// planRefused is why there is no plan; nil if there may be one.
func (x *mysqlExecution) planRefused() *proto.Error {
	if x.request.Guard.Mode == modeMetadata {
		return denied(0, "plans are refused: in mode metadata they are not supported for MySQL, which runs parts of a statement to make its plan")
	}
	return planRefused(x.product(), sqltext.MySQL, x.request, "select", "values", "table", "with")
}

// explain answers with the statement's plan, as far as the policy tells plans. The
// server computes what is constant to make it, subqueries too: so the statement is
// judged as one that runs, whatever the source allows otherwise, in a transaction that
// is read only and rolled back.
func (x *mysqlExecution) explain(ctx context.Context, arguments []driver.NamedValue) (failure *proto.Error, lost bool) {
	plain := *x.request
	plain.ReadWrite = false
	r := &plain
	x.request = r
	if failure, lost := x.judge(ctx, false); failure != nil {
		return failure, lost
	}
	if x.lineage != nil {
		return denied(0, "plans are refused: the data source masks columns"), false
	}
	if err := x.begin(ctx); err != nil {
		return x.failure(err, r, x.st, x.text), isBroken(err)
	}
	prepared, err := x.conn.(driver.ConnPrepareContext).PrepareContext(ctx, mysqlPlanPrefix+x.text.Text)
	if err != nil {
		return x.failure(err, r, x.st, x.text), isBroken(err)
	}
	defer func() { _ = prepared.Close() }()
	if n := prepared.NumInput(); n != len(arguments) {
		return proto.Errorf(proto.CodeInvalid, "the statement has %d parameters, and %d values are given", n, len(arguments)), false
	}
	if x.st.isStopped() {
		return stopError(x.st.stopReason(), r), false
	}
	if err := x.sink.send(frame.Begun, nil); err != nil {
		return proto.Errorf(proto.CodeInternal, "%w", err), false
	}
	x.begun = true
	plan, err := x.askPlan(ctx, prepared, arguments)
	switch {
	case errors.Is(err, plandoc.ErrGarbled):
		return proto.Errorf(proto.CodeInternal, "%w", err), false
	case err != nil:
		return x.failure(err, r, x.st, x.text), false
	}
	var texts func(string) string
	if x.masking != nil {
		texts = x.masking.texts.String
	}
	narrow := mysqlplan.Full
	if r.Guard.Plans == plansStructure {
		narrow = mysqlplan.Structure
	}
	if plan, err = narrow(plan, texts); err != nil {
		return proto.Errorf(proto.CodeInternal, "%w", err), false
	}
	x.done.Tag = explainTag
	x.done.Rows, failure = tellPlan(x.sink, r, x.st, plan)
	return failure, false
}

// askPlan reads the one value that the server answers with.
func (x *mysqlExecution) askPlan(ctx context.Context, prepared driver.Stmt, arguments []driver.NamedValue) (plan []byte, err error) {
	rows, err := prepared.(driver.StmtQueryContext).QueryContext(ctx, arguments)
	if err != nil {
		return nil, err
	}
	defer func() {
		if closing := rows.Close(); err == nil {
			err = closing
		}
	}()
	if len(rows.Columns()) != 1 {
		return nil, plandoc.ErrGarbled
	}
	values := make([]driver.Value, 1)
	if err := rows.Next(values); err != nil {
		return nil, err
	}
	switch v := values[0].(type) {
	case []byte:
		return append([]byte{}, v...), nil
	case string:
		return []byte(v), nil
	}
	return nil, plandoc.ErrGarbled
}
