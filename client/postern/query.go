package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func (a *app) queryCommand() *cobra.Command {
	var limit uint32
	var running bool
	list := &cobra.Command{
		Use: "list", Short: "List queries, newest first", Example: "  postern query list --running", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Queries.ListQueries(cmd.Context(), connect.NewRequest(&posternv1.ListQueriesRequest{Limit: limit, RunningOnly: running}))
				if err != nil {
					return err
				}
				return printList(a, resp.Msg.Queries, []string{"ID", "STATE", "SOURCE", "BY", "STARTED", "DURATION", "ROWS", "SESSION", "SQL"}, func(q *posternv1.Query) []string {
					return []string{q.Id, q.State, q.Agent + "/" + q.Source, q.TokenName, timeText(q.Started), durationText(q.Duration), fmt.Sprint(q.Rows), firstOf(q.SessionId, kernelText(q.KernelId), "-"), clip(q.Sql, 60)}
				})
			})
		},
	}
	list.Flags().Uint32Var(&limit, "limit", 50, "how many, at most 1000")
	list.Flags().BoolVar(&running, "running", false, "only those under way")
	cancel := &cobra.Command{
		Use: "cancel QUERY", Short: "Cancel a query under way, by id", Example: "  postern query cancel qry_01k…", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeQueries(true),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Queries.CancelQuery(cmd.Context(), connect.NewRequest(&posternv1.CancelOrganizationQueryRequest{QueryId: args[0]}))
				if err != nil {
					return err
				}
				q := resp.Msg.GetQuery()
				return a.done(q, "query %s is %s", q.GetId(), cancelText(q.GetState()))
			})
		},
	}
	return group("query", "List, show and cancel queries", list, a.queryShowCommand(), cancel)
}

// cancelText says what became of a query that was asked to stop.
func cancelText(state string) string {
	switch state {
	case "running":
		return "being cancelled"
	case "cancelled":
		return "cancelled"
	}
	return "not running any more: " + state
}

// kernelText names the kernel that asked for a statement; "" for none.
func kernelText(id string) string {
	if id == "" {
		return ""
	}
	return "kernel " + id
}

func (a *app) showQuery(q *posternv1.Query) error {
	if a.output == "json" {
		return a.printJSON(q)
	}
	failure := ""
	if e := q.GetError(); e != nil {
		failure = e.Message
		if state := e.GetSql().GetSqlstate(); state != "" {
			failure = state + ": " + failure
		}
	}
	fields := [][2]string{
		{"id", q.GetId()},
		{"state", q.GetState()},
		{"source", q.GetAgent() + "/" + q.GetSource()},
		{"by", q.GetTokenName()},
		{"started", timeText(q.GetStarted())},
		{"duration", durationText(q.GetDuration())},
		{"rows", fmt.Sprint(q.GetRows())},
		{"bytes", fmt.Sprint(q.GetBytes())},
		{"session", q.GetSessionId()},
		{"kernel", q.GetKernelId()},
		{"error", failure},
	}
	name := "sql"
	for line := range strings.SplitSeq(strings.TrimSpace(q.GetSql()), "\n") {
		fields = append(fields, [2]string{name, line})
		name = ""
	}
	return a.printFields(fields...)
}

func (a *app) auditCommand() *cobra.Command {
	var limit uint32
	var from uint64
	var agent string
	list := &cobra.Command{
		Use: "list", Short: "List audit entries, newest first, or ascending with --from", Example: "  postern audit list --limit 20", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Audit.ListAudit(cmd.Context(), connect.NewRequest(&posternv1.ListAuditRequest{From: from, Limit: limit, Agent: agent}))
				if err != nil {
					return err
				}
				return a.printAudit(resp.Msg.Entries)
			})
		},
	}
	list.Flags().Uint32Var(&limit, "limit", 50, "how many, at most 1000")
	list.Flags().Uint64Var(&from, "from", 0, "ascending from this sequence number")
	list.Flags().StringVar(&agent, "agent", "", "this agent's own log instead of the control plane's")
	list.RegisterFlagCompletionFunc("agent", a.completeAgents) //nolint:errcheck // fails on unknown flags alone
	var file string
	verify := &cobra.Command{
		Use: "verify", Short: "Verify the hash chains; exit 1 if one is broken",
		Long: `Verify the hash chains: the control plane's, that of each agent that is online, and each against what the other side
remembers of it. Exit 1 if one is broken, with the first entry that was removed, altered or reordered.`,
		Example: "  postern audit verify\n  postern audit verify --file audit.jsonl", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if file != "" {
				if agent != "" {
					return &usageError{errors.New("--file and --agent do not go together")}
				}
				return a.verifyExport(file)
			}
			return a.with(func(c *client.Client) error { return a.verifyAudit(cmd.Context(), c, agent) })
		},
	}
	verify.Flags().StringVar(&agent, "agent", "", "only this agent's chain")
	verify.Flags().StringVar(&file, "file", "", "verify JSON lines of postern audit export instead; - is standard input")
	verify.RegisterFlagCompletionFunc("agent", a.completeAgents) //nolint:errcheck // fails on unknown flags alone
	return group("audit", "Read and verify the audit log", list, verify, a.auditExport())
}

// printAudit prints entries a line each; as JSON it leaves their bytes as they
// are, since the hashes are over them.
func (a *app) printAudit(lines [][]byte) error {
	if a.output == "json" {
		out := []byte{'['}
		for i, line := range lines {
			if !json.Valid(line) {
				return proto.Errorf(proto.CodeInternal, "the control plane sent an audit entry that is not JSON: run `postern audit verify`")
			}
			if i > 0 {
				out = append(out, ',')
			}
			out = append(append(out, '\n'), line...)
		}
		if len(lines) > 0 {
			out = append(out, '\n')
		}
		_, err := a.stdout.Write(append(out, ']', '\n'))
		return err
	}
	rows := [][]string{{"SEQ", "TIME", "ACTOR", "ACTION", "ON", "VERDICT", "OUTCOME", "ROWS", "STATEMENT"}}
	for _, line := range lines {
		e, err := auditchain.Decode(line)
		if err != nil {
			return proto.Errorf(proto.CodeInternal, "the control plane sent an audit entry that cannot be read: %w: run `postern audit verify`", err)
		}
		on := firstOf(e.Target, e.QueryID)
		if e.Agent != "" || e.Source != "" {
			on = e.Agent
			if e.Source != "" {
				on += "/" + e.Source
			}
		}
		count := "-"
		if e.Action == "sql.run" {
			count = fmt.Sprint(e.Rows)
		}
		rows = append(rows, []string{
			fmt.Sprint(e.Sequence), e.Time.UTC().Format(time.RFC3339), firstOf(e.Actor, "-"), e.Action, firstOf(on, "-"),
			firstOf(e.Verdict, "-"), firstOf(e.Outcome, "-"), count, firstOf(clip(e.Statement, 60), clip(e.Error, 60)),
		})
	}
	return a.printRows(rows)
}

func (a *app) verifyAudit(ctx context.Context, c *client.Client, agent string) error {
	resp, err := c.Audit.VerifyAudit(ctx, connect.NewRequest(&posternv1.VerifyAuditRequest{Agent: agent}))
	if err != nil {
		return err
	}
	return a.reportChains(resp.Msg.Reports)
}

// reportChains prints reports; an error if one is of a broken chain.
func (a *app) reportChains(reports []*posternv1.ChainReport) error {
	broken := 0
	err := printList(a, reports, []string{"CHAIN", "ENTRIES", "RESULT", "MESSAGE"}, func(r *posternv1.ChainReport) []string {
		result := "ok"
		if !r.Ok {
			result = "broken"
		}
		return []string{r.Chain, fmt.Sprint(r.Entries), result, r.Message}
	})
	if err != nil {
		return err
	}
	for _, r := range reports {
		if !r.Ok {
			broken++
		}
	}
	if broken > 0 {
		return proto.Errorf(proto.CodeInternal, "%d of %d audit chains did not verify: keep the logs as they are and find out why", broken, len(reports))
	}
	return nil
}
