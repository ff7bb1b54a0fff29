package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/rowfmt"
)

// queryShowCommand shows a query of the history and, if asked, its rows.
func (a *app) queryShowCommand() *cobra.Command {
	var rows, plan bool
	var format string
	cmd := &cobra.Command{
		Use:   "show QUERY",
		Short: "Show a query, by id, and the first and last of its rows",
		Long: "Shows what the history has of a query.\n\n" +
			"With --rows its first and last rows follow, as many as the policy of its data source lets the control plane\n" +
			"keep. With -f csv, json, ndjson or arrow the rows alone are printed; what is missing between is told on stderr.\n" +
			"That somebody looked at rows is noted in the audit log.\n\n" +
			"With --plan the plan follows that the query asked for. Of a query that asked for none, the agent is asked for the\n" +
			"plan of its text as it would be now, without running it; its data source's policy decides.",
		Example: "  postern query show qry_01k…\n  postern query show qry_01k… --rows\n  postern query show qry_01k… --plan",
		Args:    cobra.ExactArgs(1), ValidArgsFunction: a.completeQueries(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := rowfmt.ParseFormat(format)
			if err != nil || f == rowfmt.Parquet {
				return usagef("unknown format %q: choose one of table, csv, json, ndjson, arrow", format)
			}
			bare := f != rowfmt.Table
			if bare && f.Binary() && isTerminal(a.stdout) {
				return usagef("%s is not fit for a terminal: pipe it", f)
			}
			if plan {
				return a.with(func(c *client.Client) error { return a.showPlan(cmd.Context(), c, args[0], f) })
			}
			rows = rows || cmd.Flags().Changed("format")
			return a.with(func(c *client.Client) error {
				resp, err := c.Queries.GetQuery(cmd.Context(), connect.NewRequest(&posternv1.GetQueryRequest{QueryId: args[0], IncludeRows: rows}))
				if err != nil {
					return err
				}
				q, kept := resp.Msg.GetQuery(), resp.Msg.GetRows()
				if len(kept.GetArrow()) == 0 {
					kept = nil // a plan
				}
				switch {
				case bare:
					return a.bareRows(cmd.Context(), q, kept, f)
				case !rows:
					return a.showQuery(q)
				case a.output == "json":
					return a.rowsAsJSON(cmd.Context(), q, kept)
				}
				if err := a.showQuery(q); err != nil {
					return err
				}
				return a.rowsAsTable(cmd.Context(), q, kept)
			})
		},
	}
	cmd.Flags().BoolVar(&rows, "rows", false, "its first and last rows, too")
	cmd.Flags().BoolVar(&plan, "plan", false, "its plan; with -f csv or json the plan alone")
	cmd.MarkFlagsMutuallyExclusive("rows", "plan")
	cmd.Flags().StringVarP(&format, "format", "f", "table", "form of the rows: table, csv, json, ndjson or arrow")
	cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"table", "csv", "json", "ndjson", "arrow"}, cobra.ShellCompDirectiveNoFileComp)) //nolint:errcheck // fails on unknown flags alone
	return cmd
}

// missing is how many rows are not kept between the first and the last.
func missing(kept *posternv1.KeptRows) uint64 {
	return kept.GetTotal() - min(kept.GetTotal(), uint64(kept.GetFirst())+uint64(kept.GetLast()))
}

// noRows says why there are no rows to show.
func noRows(q *posternv1.Query) string {
	switch q.GetState() {
	case "running":
		return "its rows are kept when it has ended"
	case "denied":
		return "no rows are kept: it was not run"
	}
	return "no rows are kept: it returned none, its data source's policy says keep_rows: off, or they were dropped to make room"
}

func (a *app) rowsAsTable(ctx context.Context, q *posternv1.Query, kept *posternv1.KeptRows) error {
	if kept == nil {
		a.info("%s", noRows(q))
		return nil
	}
	if _, err := a.stdout.WriteString("\n"); err != nil {
		return err
	}
	excerpt := rowfmt.Excerpt{After: int64(kept.First), Missing: int64(missing(kept))}
	if err := rowfmt.Convert(ctx, a.stdout, bytes.NewReader(kept.Arrow), rowfmt.Table, rowfmt.Options{Excerpt: excerpt}); err != nil {
		return err
	}
	a.tellCut(kept)
	return nil
}

func (a *app) tellCut(kept *posternv1.KeptRows) {
	if n := kept.GetCut(); n > 0 {
		a.info("values too long to be kept whole: %d; each ends with a mark", n)
	}
}

// bareRows prints the rows alone.
func (a *app) bareRows(ctx context.Context, q *posternv1.Query, kept *posternv1.KeptRows, f rowfmt.Format) error {
	if kept == nil {
		return proto.Errorf(proto.CodeNotFound, "query %s: %s", q.GetId(), noRows(q))
	}
	if err := rowfmt.Convert(ctx, a.stdout, bytes.NewReader(kept.Arrow), f, rowfmt.Options{}); err != nil {
		return err
	}
	if n := missing(kept); n > 0 {
		a.info("%s", gapText(kept, n))
	}
	a.tellCut(kept)
	return nil
}

func gapText(kept *posternv1.KeptRows, n uint64) string {
	return fmt.Sprintf("rows %d to %d of %d are not kept", uint64(kept.First)+1, uint64(kept.First)+n, kept.Total)
}

// keptJSON is what `-o json` shows of the rows; kept is null if there are none.
type keptJSON struct {
	First uint64          `json:"first"`
	Last  uint64          `json:"last"`
	Total uint64          `json:"total,string"`
	Cut   uint64          `json:"cut"`
	Rows  json.RawMessage `json:"rows"`
}

// rowsAsJSON prints query and rows as one object.
func (a *app) rowsAsJSON(ctx context.Context, q *posternv1.Query, kept *posternv1.KeptRows) error {
	facts, err := asJSON(q)
	if err != nil {
		return err
	}
	out := struct {
		Query json.RawMessage `json:"query"`
		Kept  *keptJSON       `json:"kept"`
	}{Query: facts}
	if kept != nil {
		var rows bytes.Buffer
		if err := rowfmt.Convert(ctx, &rows, bytes.NewReader(kept.Arrow), rowfmt.JSON, rowfmt.Options{}); err != nil {
			return err
		}
		out.Kept = &keptJSON{uint64(kept.First), uint64(kept.Last), kept.Total, uint64(kept.Cut), rows.Bytes()}
	}
	return a.printJSON(out)
}
