package main

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"strings"

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
	var rows []map[string]json.RawMessage
	if err := json.Unmarshal(out.Bytes(), &rows); err != nil || len(rows) > 1 {
		return proto.Errorf(proto.CodeInternal, "the agent sent a plan that cannot be read")
	}
	if len(rows) == 0 {
		return nil // it failed: the outcome says why
	}
	return printPlan(w, rows[0]["QUERY PLAN"], f)
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
