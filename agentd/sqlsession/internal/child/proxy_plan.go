package child

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgplan"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgproxy"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/proto"
)

// Plan implements pgproxy.Planner: it is execution.explain over the connection of a client
// of PostgreSQL's protocol.
func (j *wireJudge) Plan(ctx context.Context, scope pgproxy.Scope, text string, tree *pgtree.Tree, e pgproxy.Explain) ([]string, *pgproxy.Refusal) {
	refuse := func(offset int, format string, args ...any) ([]string, *pgproxy.Refusal) {
		return nil, metadataRefusal(characters(text, offset), format, args...)
	}
	calls, refusal := j.mayPlan(ctx, scope, text, tree, e)
	if refusal != nil {
		return nil, refusal
	}
	masks, refusal := wireMasks(ctx, j.masking, j.parser, scope, text, tree)
	if refusal != nil {
		return nil, refusal
	}
	hide, _ := masks.(wireHide)
	touches := hide.plan != nil && hide.plan.Touches
	if touches && e.Analyze {
		return refuse(-1, "running the statement for its plan is refused: its tables have masked columns, and what it took tells of them: ask without ANALYZE")
	}
	tell := func(err error, prefix int) *pgproxy.Refusal {
		return j.planError(err, prefix, touches || j.guard.Mode == modeMetadata)
	}
	if err := scope.Begin(); err != nil {
		return nil, tell(err, 0)
	}
	fields, err := scope.Describe(text)
	if err != nil {
		return nil, tell(err, 0)
	}
	if masks != nil {
		if _, refusal := masks.Rows(fields); refusal != nil {
			return nil, refusal
		}
	}
	if e.Analyze {
		if _, err := scope.Describe(classifyPrefix + text); err != nil {
			return refuse(-1, "the statement is refused: the server does not take it for one that only reads")
		}
	}
	rows, err := scope.Ask(ctx, fmt.Sprintf(candidatesQuery, nameArray(calls.Functions), nameArray(calls.Operators), nameArray(calls.Fields)))
	switch {
	case err != nil:
		return nil, tell(err, 0)
	case len(rows) >= maxCandidates:
		return refuse(-1, "the statement is refused: it names too many functions")
	}
	reason, offset, ok := refuseCalls(rows, calls, "the plan", j.guard.Functions, func(string) bool { return false })
	switch {
	case !ok:
		return refuse(-1, "the statement is refused: the server's answer about functions is not understood")
	case reason != "":
		return refuse(offset, "%s", reason)
	}
	return j.askPlan(scope, text, e, touches, tell)
}

// mayPlan refuses what has no plan for this source, before the server hears of it.
func (j *wireJudge) mayPlan(ctx context.Context, server pgproxy.Asker, text string, tree *pgtree.Tree, e pgproxy.Explain) (*pgplan.Statement, *pgproxy.Refusal) {
	refuse := func(offset int, format string, args ...any) (*pgplan.Statement, *pgproxy.Refusal) {
		return nil, metadataRefusal(characters(text, offset), format, args...)
	}
	if e.Analyze && j.guard.Plans != plansAnalyze {
		return refuse(-1, "EXPLAIN ANALYZE is refused: the data source's policy says plans: %s", j.guard.Plans)
	}
	calls, err := pgplan.Read(tree)
	var misread *pgplan.Refusal
	switch {
	case errors.As(err, &misread):
		return refuse(misread.Offset, "the statement is refused: %s", misread.Message)
	case err != nil:
		return refuse(-1, "the statement is refused: it is not understood")
	case calls.Kind == pgplan.Index:
		return refuse(0, "only SELECT, VALUES, TABLE, WITH, INSERT, UPDATE, DELETE and MERGE have a plan")
	case e.Analyze && (calls.Kind != pgplan.Select || calls.Writes):
		return refuse(-1, "the statement is refused: only one that reads is run for its plan: ask without ANALYZE")
	}
	if refusal := j.learnDomains(ctx, server); refusal != nil {
		return nil, refusal
	}
	if calls.Composite >= 0 && j.domains.acting != "" {
		return refuse(calls.Composite, "the statement is refused: %s", j.domains.reason())
	}
	if calls.Kind == pgplan.Select {
		// The planner may call what is behind views and operators, and ANALYZE does.
		reader := wireJudge{guard: j.guard, version: j.version, parser: j.parser}
		if _, refusal := reader.guarded(ctx, server, text, tree); refusal != nil {
			return nil, refusal
		}
	}
	return calls, nil
}

// planError is what is told of an error. prefix is how many characters of ours the text
// begins with.
func (j *wireJudge) planError(err error, prefix int, discreet bool) *pgproxy.Refusal {
	var server *pgproxy.ServerError
	var theirs *pgproxy.Refusal
	switch {
	case errors.As(err, &theirs):
		return theirs
	case !errors.As(err, &server):
		return &pgproxy.Refusal{SQLState: "08006", Message: "the connection to the database was lost", Code: proto.CodeSourceUnreachable}
	}
	said := decodeError(server.Body)
	at := max(0, int(said.Position)-prefix)
	if discreet {
		said = discreetError(said)
	} else {
		said = j.masking.scrub(said, false)
	}
	code := proto.CodeSQL
	if said.Code == stateQueryCanceled {
		code = proto.CodeCancelled
	}
	return &pgproxy.Refusal{SQLState: clean(said.Code), Message: clean(said.Message), Hint: clean(said.Hint), Position: at, Code: code}
}

// askPlan has the server explain the statement and tells what the policy lets out: the
// server's own lines, or ones made of its JSON.
func (j *wireJudge) askPlan(scope pgproxy.Scope, text string, e pgproxy.Explain, touches bool, tell func(error, int) *pgproxy.Refusal) ([]string, *pgproxy.Refusal) {
	narrow := j.guard.Plans == plansStructure || touches
	asked := e
	if narrow || j.masking != nil {
		asked.JSON = true
	}
	if narrow {
		asked.Verbose, asked.Buffers, asked.Summary, asked.Costs = true, false, false, true
	}
	prefix := explainPrefix(asked)
	lines, err := scope.Rows(prefix+text, pgplan.MaxPlan)
	switch {
	case err != nil:
		return nil, tell(err, len(prefix))
	case lines == nil:
		return nil, &pgproxy.Refusal{SQLState: "54000", Message: fmt.Sprintf("the plan has more than %d bytes", pgplan.MaxPlan), Code: proto.CodeByteLimit}
	case !narrow && j.masking == nil:
		return lines, nil
	}
	plan := []byte(strings.Join(lines, "\n"))
	if narrow {
		numbers := pgplan.Magnitude
		if touches || j.guard.Mode == modeMetadata {
			numbers = pgplan.NoNumbers
		}
		plan, err = pgplan.Structure(plan, numbers)
	}
	if err == nil && j.masking != nil {
		plan, err = pgplan.Check(plan, j.masking.texts.String)
	}
	if err == nil && e.JSON {
		return []string{string(plan)}, nil
	}
	if err == nil {
		lines, err = pgplan.Text(plan, e.Costs)
	}
	if err != nil {
		return nil, &pgproxy.Refusal{SQLState: "58000", Message: clean("the plan is not told: " + err.Error()), Code: proto.CodeInternal}
	}
	return lines, nil
}

// explainPrefix is EXPLAIN with options of ours.
func explainPrefix(e pgproxy.Explain) string {
	word := map[bool]string{true: "ON", false: "OFF"}
	options := []string{"COSTS " + word[e.Costs], "VERBOSE " + word[e.Verbose], "BUFFERS " + word[e.Buffers], "FORMAT " + map[bool]string{true: "JSON", false: "TEXT"}[e.JSON]}
	if e.Analyze {
		options = append(options, "ANALYZE", "TIMING "+word[e.Timing])
	}
	if e.Analyze || e.Summary {
		options = append(options, "SUMMARY "+word[e.Summary])
	}
	return "EXPLAIN (" + strings.Join(options, ", ") + ") "
}
