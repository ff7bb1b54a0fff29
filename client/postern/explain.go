package main

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/plantext"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/rowfmt"
)

// maxPlan bounds a plan in bytes; an agent sends 8 MiB at most.
const maxPlan = 64 << 20

// explainOptions are the flags that ask for a plan.
type explainOptions struct {
	explain, analyze bool
	indexes          []string
}

// ask puts them into the statement.
func (o explainOptions) ask(statement *posternv1.RunSQLRequest) error {
	switch {
	case o.analyze && len(o.indexes) > 0:
		return usagef("--hypothetical-index is for a plan without --analyze: a statement that runs can't use it")
	case o.analyze:
		statement.Explain = posternv1.Explain_EXPLAIN_ANALYZE
	case o.explain || len(o.indexes) > 0:
		statement.Explain = posternv1.Explain_EXPLAIN_PLAN
	}
	statement.HypotheticalIndexes = o.indexes
	return nil
}

// printsPlan tells whether a plan in this format is printed by printPlan. In the
// others it is a row with one column.
func printsPlan(f rowfmt.Format) bool {
	return f == rowfmt.Table || f == rowfmt.CSV || f == rowfmt.JSON
}

// convertPlan reads a result that holds a plan and prints it.
func convertPlan(ctx context.Context, w io.Writer, r io.Reader, f rowfmt.Format) error {
	var out limited
	if err := rowfmt.Convert(ctx, &out, r, rowfmt.JSON, rowfmt.Options{MaxMessage: maxPlan}); err != nil {
		return err
	}
	plan, err := planIn(out.Bytes())
	if err != nil || plan == nil { // it failed: the outcome says why
		return err
	}
	return printPlan(w, plan, f)
}

// limited is a buffer of at most maxPlan bytes.
type limited struct{ bytes.Buffer }

// Write implements io.Writer.
func (l *limited) Write(p []byte) (int, error) {
	if l.Len()+len(p) > maxPlan {
		return 0, fmt.Errorf("the plan has more than %d MiB", maxPlan>>20)
	}
	return l.Buffer.Write(p)
}

// printPlan prints a plan in JSON as a tree, as lines of CSV, or as it is.
func printPlan(w io.Writer, plan []byte, f rowfmt.Format) error {
	if f == rowfmt.JSON {
		var out bytes.Buffer
		if err := json.Indent(&out, plan, "", "  "); err != nil {
			return proto.Errorf(proto.CodeInternal, "the agent sent a plan that is not JSON")
		}
		out.WriteByte('\n')
		_, err := w.Write(out.Bytes())
		return err
	}
	lines, err := plantext.Lines(plan)
	if err != nil {
		return proto.Errorf(proto.CodeInternal, "the agent sent a plan that cannot be read: ask for it with -f json")
	}
	if f == rowfmt.CSV {
		c := csv.NewWriter(w)
		_ = c.Write([]string{"QUERY PLAN"}) // the error sticks
		for _, line := range lines {
			_ = c.Write([]string{line})
		}
		c.Flush()
		return c.Error()
	}
	var out strings.Builder
	for _, line := range lines {
		out.WriteString(safe(line))
		out.WriteByte('\n')
	}
	_, err = io.WriteString(w, out.String())
	return err
}

// showPlan shows a query with its plan: the one that it asked for, or else that of
// its text as it is now.
func (a *app) showPlan(ctx context.Context, c *client.Client, id string, f rowfmt.Format) error {
	if !printsPlan(f) {
		return usagef("a plan is printed as table, csv or json")
	}
	resp, err := c.Queries.GetQuery(ctx, connect.NewRequest(&posternv1.GetQueryRequest{QueryId: id, IncludeRows: true}))
	if err != nil {
		return err
	}
	q, plan := resp.Msg.GetQuery(), resp.Msg.GetRows().GetPlan()
	kept := len(plan) > 0
	if !kept {
		if plan, err = a.planNow(ctx, c, q); err != nil {
			return err
		}
	}
	switch {
	case f == rowfmt.Table && a.output == "json":
		facts, err := asJSON(q)
		if err != nil {
			return err
		}
		return a.printJSON(struct {
			Query json.RawMessage `json:"query"`
			Plan  json.RawMessage `json:"plan"`
			Kept  bool            `json:"kept"`
		}{facts, plan, kept})
	case f == rowfmt.Table:
		if err := a.showQuery(q); err != nil {
			return err
		}
		if _, err := a.stdout.WriteString("\n"); err != nil {
			return err
		}
	}
	if !kept {
		a.info("the plan is that of its text as it would be now")
	}
	return printPlan(a.stdout, plan, f)
}

// planNow asks the agent for the plan of a query's text.
func (a *app) planNow(ctx context.Context, c *client.Client, q *posternv1.Query) ([]byte, error) {
	statement := &posternv1.RunSQLRequest{Sql: q.GetSql(), Explain: posternv1.Explain_EXPLAIN_PLAN}
	rows, err := c.SQL(ctx, q.GetAgent(), q.GetSource(), statement)
	if err != nil {
		return nil, err
	}
	defer rows.Close() //nolint:errcheck // what matters came with the outcome
	var out limited
	err = rowfmt.Convert(ctx, &out, rows, rowfmt.JSON, rowfmt.Options{MaxMessage: maxPlan})
	if _, readErr := io.Copy(io.Discard, rows); readErr != nil {
		return nil, readErr
	}
	if _, outcomeErr := rows.Outcome(); outcomeErr != nil {
		return nil, outcomeErr
	}
	if err != nil {
		return nil, err
	}
	return planIn(out.Bytes())
}

// planIn is the plan in a result in JSON; nil if it has no row.
func planIn(result []byte) ([]byte, error) {
	var rows []map[string]json.RawMessage
	if err := json.Unmarshal(result, &rows); err != nil || len(rows) > 1 {
		return nil, proto.Errorf(proto.CodeInternal, "the agent sent a plan that cannot be read")
	}
	if len(rows) == 0 {
		return nil, nil
	}
	return rows[0]["QUERY PLAN"], nil
}
