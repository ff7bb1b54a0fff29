package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/rowfmt"
)

const (
	// maxQuery bounds a query's text, in bytes.
	maxQuery = 1 << 20
	// cancelTime is how long Ctrl-C waits for the statement to end in order.
	cancelTime = 5 * time.Second
)

// sqlOptions are the flags of `postern sql`.
type sqlOptions struct {
	format     string
	parameters []string
	nulls      []string
	plan       explainOptions
	maxRows    uint64
	timeout    time.Duration
	file       string
	interact   bool
	idle       time.Duration
}

func (a *app) sqlCommand() *cobra.Command {
	var o sqlOptions
	cmd := &cobra.Command{
		Use:   "sql AGENT/SOURCE [QUERY|-]",
		Short: "Run a statement on a data source and print its rows",
		Long: "Runs one statement on a data source, on the agent's host, and prints the rows as they come.\n" +
			"Without QUERY, or with -, the statement is read from stdin (at most 1 MiB).\n\n" +
			"Values go into the text as :name or {{name}} and are bound, never pasted: -p name=value, --null name;\n" +
			"-p name:type=value gives the type, too. -p again, or a JSON array, is a list for IN ({{name|list}});\n" +
			"{{name|identifier}} is a table's or column's name, put into quotes.\n" +
			"Rows before an error or a limit are printed; the exit code then is not 0. Ctrl-C cancels the statement\n" +
			"in the database and waits up to 5 s for its end (exit 1).",
		Example: "  postern sql edge-1/warehouse --explain 'select * from orders where day = :day' -p day=2026-11-22\n" +
			"  postern sql edge-1/warehouse 'select * from orders where day = :day' -p day=2026-11-22\n" +
			"  postern sql edge-1/warehouse -f csv -O orders.csv < orders.sql",
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: a.completeSources,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("format") && a.output == "json" {
				o.format = "json"
			}
			if o.interact {
				return a.shell(cmd.Context(), args, o)
			}
			if o.idle != 0 {
				return usagef("--idle-timeout is for sessions: add -i")
			}
			return a.sql(cmd.Context(), args, o)
		},
	}
	flags := cmd.Flags()
	flags.StringVarP(&o.format, "format", "f", "table", "table, csv, json, ndjson, arrow or parquet")
	flags.StringArrayVarP(&o.parameters, "param", "p", nil, "a value for the text, as name=value or name:type=value (repeatable; the same name again makes a list)")
	flags.StringArrayVar(&o.nulls, "null", nil, "a NULL for the text, by name (repeatable)")
	flags.Uint64Var(&o.maxRows, "max-rows", 0, "fail beyond this many rows (0: the host's limit)")
	flags.DurationVar(&o.timeout, "timeout", 0, "cancel the statement after this time, as in 30s (0: the host's limit)")
	flags.BoolVar(&o.plan.explain, "explain", false, "the plan instead of the rows, without running the statement")
	flags.BoolVar(&o.plan.analyze, "analyze", false, "with --explain: run the statement, rolled back, for what it took")
	flags.StringArrayVar(&o.plan.indexes, "hypothetical-index", nil, "with --explain: as if this CREATE INDEX had been run (repeatable; needs hypopg)")
	flags.StringVarP(&o.file, "output-file", "O", "", "write the result to this file, whole or not at all")
	flags.BoolVarP(&o.interact, "interactive", "i", false, "open a session that stays and run statements in it, one after the other")
	flags.DurationVar(&o.idle, "idle-timeout", 0, "with -i: end the session when it is unused for so long, 1h at most (default 10m)")
	names := make([]string, 0, 6)
	for _, f := range rowfmt.Formats() {
		names = append(names, string(f))
	}
	cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions(names, cobra.ShellCompDirectiveNoFileComp)) //nolint:errcheck // fails on unknown flags alone
	return cmd
}

func (a *app) sql(ctx context.Context, args []string, o sqlOptions) error {
	agent, source, err := splitSource(args[0])
	if err != nil {
		return err
	}
	format, err := rowfmt.ParseFormat(o.format)
	if err != nil {
		return &usageError{err}
	}
	if o.timeout < 0 {
		return usagef("--timeout %s is negative", o.timeout)
	}
	if o.file == "" && format.Binary() && isTerminal(a.stdout) {
		return usagef("%s is not fit for a terminal: write it to a file with -O FILE, or pipe it", format)
	}
	statement := &posternv1.RunSQLRequest{MaxRows: o.maxRows}
	if o.timeout > 0 {
		statement.Timeout = durationpb.New(o.timeout)
	}
	if err := o.plan.ask(statement); err != nil {
		return err
	}
	if statement.Parameters, err = parseParameters(o.parameters, o.nulls); err != nil {
		return err
	}
	if statement.Sql, err = a.queryText(args[1:]); err != nil {
		return err
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	defer c.Close()
	dst, err := a.destination(o.file)
	if err != nil {
		return err
	}
	run := &sqlRun{app: a, client: c, agent: agent, source: source, statement: statement, format: format, dst: dst}
	if err := run.do(ctx); err != nil {
		dst.discard()
		return err
	}
	return dst.commit()
}

// queryText is the statement, from the argument or stdin.
func (a *app) queryText(args []string) (string, error) {
	var text string
	switch {
	case len(args) == 1 && args[0] != "-":
		text = args[0]
	case a.tokenFile == "-":
		return "", usagef("stdin cannot hold both the token and the query: give the query as an argument")
	case len(args) == 0 && isTerminal(a.stdin):
		return "", usagef("no query: give it as an argument, or pipe it to stdin")
	default:
		body, err := io.ReadAll(io.LimitReader(a.stdin, maxQuery+1))
		if err != nil {
			return "", fmt.Errorf("read the query from stdin: %w", err)
		}
		text = string(body)
	}
	switch {
	case len(text) > maxQuery:
		return "", usagef("the query has more than 1 MiB: load data in another way, or split it")
	case strings.TrimSpace(text) == "":
		return "", usagef("the query is empty")
	case !utf8.ValidString(text):
		return "", usagef("the query is not valid UTF-8: convert it, for example with iconv")
	}
	return text, nil
}

// parseParameters reads -p name=value, -p name:type=value and --null name. The same
// name again makes a list of its values.
func parseParameters(pairs, nulls []string) ([]*posternv1.Parameter, error) {
	var list []*posternv1.Parameter
	values := map[string][]string{}
	seen := map[string]*posternv1.Parameter{}
	check := func(flag, name string) error {
		if !validName(name) {
			return usagef("%s %q: a name has letters, digits and _, and does not begin with a digit", flag, name)
		}
		return nil
	}
	for _, pair := range pairs {
		left, value, ok := strings.Cut(pair, "=")
		name, kind, _ := strings.Cut(left, ":")
		switch {
		case !ok:
			return nil, usagef("-p %q has no value: write name=value, or --null name for NULL", pair)
		case check("-p", name) != nil:
			return nil, check("-p", name)
		case strings.HasSuffix(left, ":"):
			return nil, usagef("-p %q has no type behind the colon: write name:type=value, or name=value", pair)
		case !utf8.ValidString(pair):
			return nil, usagef("parameter %q is not valid UTF-8", name)
		}
		p := seen[name]
		if p == nil {
			p = &posternv1.Parameter{Name: name, Type: kind}
			seen[name] = p
			list = append(list, p)
		} else if p.Type != kind {
			return nil, usagef("parameter %q is given twice with different types", name)
		}
		if values[name] = append(values[name], value); len(values[name]) > client.MaxListElements {
			return nil, usagef("parameter %q is given more than %d times", name, client.MaxListElements)
		}
	}
	for name, all := range values {
		value := all[0]
		if len(all) > 1 {
			encoded, err := json.Marshal(all)
			if err != nil {
				return nil, fmt.Errorf("parameter %q: %w", name, err)
			}
			value = string(encoded)
		}
		seen[name].Value = &value
	}
	for _, name := range nulls {
		if err := check("--null", name); err != nil {
			return nil, err
		}
		if seen[name] != nil {
			return nil, usagef("parameter %q is given twice: a list with NULL is written as a JSON array", name)
		}
		seen[name] = &posternv1.Parameter{Name: name}
		list = append(list, seen[name])
	}
	return list, nil
}

func validName(name string) bool {
	for i, r := range name {
		letter := r == '_' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z'
		if !letter && (i == 0 || r < '0' || r > '9') {
			return false
		}
	}
	return name != ""
}

// sqlRun is one statement under way.
type sqlRun struct {
	app           *app
	client        *client.Client
	agent, source string
	statement     *posternv1.RunSQLRequest
	format        rowfmt.Format
	dst           *destination

	// expanded is the table's form with a line for each column; quiet leaves out
	// what is said of a result on a terminal.
	expanded, quiet bool
	// outcome is how the statement ended, as far as that is known.
	outcome *posternv1.QueryOutcome

	queryID     atomic.Pointer[string]
	interrupted atomic.Bool
}

// errInterrupted ends the conversion after Ctrl-C.
var errInterrupted = errors.New("interrupted")

// do runs the statement. The end of ctx is the user's Ctrl-C: the request itself
// lives on until the statement has ended in order, or cancelTime is over.
func (r *sqlRun) do(ctx context.Context) error {
	start := time.Now()
	request, hangUp := context.WithCancel(context.WithoutCancel(ctx))
	finished := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		r.watch(ctx, finished, hangUp)
	}()
	defer func() { close(finished); <-watched; hangUp() }()

	p := startProgress(r.app, r.dst)
	defer p.stop()
	outcome, err := r.stream(request, p)
	p.stop()
	r.outcome = outcome
	for _, n := range outcome.GetNotices() {
		r.app.info("%s:  %s", safe(n.Severity), safe(n.Message))
	}
	if r.interrupted.Load() {
		return r.cancelled(outcome)
	}
	var public *proto.Error
	if errors.As(err, &public) && (public.Code == proto.CodeSQL || public.SQL.GetPosition() > 0) {
		return &statementError{err: public, text: r.statement.Sql}
	}
	if err != nil {
		return err
	}
	return r.footer(outcome, time.Since(start))
}

// cancelled says how a statement ended that the user gave up.
func (r *sqlRun) cancelled(outcome *posternv1.QueryOutcome) error {
	switch {
	case outcome == nil:
		return proto.Errorf(proto.CodeCancelled, "interrupted: the statement was given up; `postern query list` says how it ended")
	case outcome.Error == nil:
		return proto.Errorf(proto.CodeCancelled, "interrupted: the statement had ended already")
	}
	return proto.Errorf(proto.CodeCancelled, "interrupted: the statement was cancelled")
}

// stream prints the rows and returns how the statement ended.
func (r *sqlRun) stream(ctx context.Context, p *progress) (*posternv1.QueryOutcome, error) {
	rows, err := r.client.SQL(ctx, r.agent, r.source, r.statement)
	if err != nil {
		return nil, err
	}
	defer rows.Close() //nolint:errcheck // what matters came with the outcome
	id := rows.QueryID()
	r.queryID.Store(&id)
	gate := &gate{w: p.writer(r.dst), run: r}
	var out io.Writer = gate
	in, count := p.reader(rows), p.rows
	var empty *emptyTable
	if r.format == rowfmt.Table {
		empty = &emptyTable{w: gate}
		out, in = empty, empty.tee(in)
		count = func(n int64) {
			empty.rows = empty.rows || n > 0
			p.rows(n)
		}
	}
	if r.statement.Explain != posternv1.Explain_EXPLAIN_UNSPECIFIED && printsPlan(r.format) {
		err = convertPlan(ctx, out, in, r.format)
	} else {
		err = rowfmt.Convert(ctx, out, in, r.format, rowfmt.Options{Rows: count, Expanded: r.expanded})
	}
	if gate.err != nil && !r.interrupted.Load() {
		return nil, r.dst.failed(gate.err)
	}
	// To the end: the outcome comes after the last row.
	_, readErr := io.Copy(io.Discard, rows)
	outcome, outcomeErr := rows.Outcome()
	if empty != nil {
		if outcomeErr == nil && err == nil && readErr == nil && outcome.GetCommandTag() == describeTag {
			err = empty.describe(outcome)
		} else if releaseErr := empty.release(); releaseErr != nil && err == nil {
			err = releaseErr
		}
		if gate.err != nil && !r.interrupted.Load() {
			return nil, r.dst.failed(gate.err)
		}
	}
	switch {
	case outcomeErr != nil:
		return outcome, outcomeErr
	case readErr != nil:
		return outcome, readErr
	case err != nil && !errors.Is(err, rowfmt.ErrNoSchema):
		return outcome, err
	}
	return outcome, nil
}

// footer says what a statement without rows did, and on a terminal how many rows
// came and how fast.
func (r *sqlRun) footer(outcome *posternv1.QueryOutcome, d time.Duration) error {
	if r.format == rowfmt.Table && !r.dst.touched {
		if outcome.GetCommandTag() != "" {
			if _, err := fmt.Fprintln(r.dst, safe(outcome.CommandTag)); err != nil {
				return r.dst.failed(err)
			}
		}
		return nil
	}
	if r.format != rowfmt.Table && !r.quiet && isTerminal(r.app.stderr) {
		unit := "rows"
		if outcome.GetRows() == 1 {
			unit = "row"
		}
		r.app.info("(%d %s, %s)", outcome.GetRows(), unit, roughly(d))
	}
	return nil
}

// watch waits for Ctrl-C and then asks the control plane to cancel the query; if
// that has no effect in time, or the query has no id yet, it hangs up, which the
// control plane takes for the same.
func (r *sqlRun) watch(ctx context.Context, finished <-chan struct{}, hangUp func()) {
	select {
	case <-finished:
		return
	case <-ctx.Done():
	}
	r.interrupted.Store(true)
	deadline, cancel := context.WithTimeout(context.WithoutCancel(ctx), cancelTime)
	defer cancel()
	id := r.queryID.Load()
	if (id == nil || *id == "") && r.statement.SessionId != "" {
		id = r.idInSession(deadline)
	}
	if id == nil || *id == "" {
		hangUp()
		return
	}
	_, err := r.client.Queries.CancelQuery(deadline, connect.NewRequest(&posternv1.CancelOrganizationQueryRequest{QueryId: *id}))
	if err == nil {
		select {
		case <-finished:
			return
		case <-deadline.Done():
		}
	}
	hangUp()
}

// idInSession asks what runs in the session: an answer whose first row is not there
// has no id yet, and the session's transaction is told with its end.
func (r *sqlRun) idInSession(ctx context.Context) *string {
	resp, err := r.client.Sessions.ListSessions(ctx, connect.NewRequest(&posternv1.ListSQLSessionsRequest{Agent: r.agent}))
	if err != nil {
		return nil
	}
	for _, s := range resp.Msg.Sessions {
		if s.Id == r.statement.SessionId && s.QueryId != "" {
			return &s.QueryId
		}
	}
	return nil
}

// gate stands before the output: it remembers the first error, and closes at
// Ctrl-C.
type gate struct {
	w   io.Writer
	run *sqlRun
	err error
}

// Write implements io.Writer.
func (g *gate) Write(p []byte) (int, error) {
	if g.run.interrupted.Load() {
		return 0, errInterrupted
	}
	n, err := g.w.Write(p)
	if err != nil {
		g.err = err
	}
	return n, err
}
