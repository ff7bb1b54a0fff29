package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/client"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func (a *app) introspectCommand() *cobra.Command {
	var schema, table string
	var refresh bool
	cmd := &cobra.Command{
		Use: "introspect AGENT/SOURCE", Short: "Show schemas, tables, columns, keys, functions, types and sequences of a data source",
		Long: "Shows what a data source holds, from the control plane's cache: a line for each table, function, type and sequence,\n" +
			"or with --table everything about those that match. Patterns: * is any text, ? any character.\n" +
			"Rows and sizes are estimates with two digits. What the host's policy hides is not there.",
		Example: "  postern source introspect edge-1/warehouse\n  postern source introspect edge-1/warehouse --table 'order*' --refresh",
		Args:    cobra.ExactArgs(1), ValidArgsFunction: a.completeSources,
		RunE: func(cmd *cobra.Command, args []string) error {
			agent, source, err := splitSource(args[0])
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				return a.introspect(cmd.Context(), c, args[0], &posternv1.IntrospectSourceRequest{Agent: agent, Source: source, Schema: schema, Table: table, Refresh: refresh})
			})
		},
	}
	cmd.Flags().StringVar(&schema, "schema", "", "only schemas whose names match this pattern")
	cmd.Flags().StringVar(&table, "table", "", "only tables, functions, types and sequences whose names match this pattern, in detail")
	cmd.Flags().BoolVar(&refresh, "refresh", false, "ask the host now instead of reading the cache")
	cmd.RegisterFlagCompletionFunc("schema", a.completeCatalog(func(r *posternv1.IntrospectSourceResponse) []string { //nolint:errcheck // fails on unknown flags alone
		var names []string
		for _, s := range r.Schemas {
			names = append(names, s.Name)
		}
		return names
	}, nil))
	cmd.RegisterFlagCompletionFunc("table", a.completeCatalog(func(r *posternv1.IntrospectSourceResponse) []string { //nolint:errcheck // likewise
		var names []string
		for _, t := range r.Tables {
			names = append(names, t.Name+"\t"+t.Kind+" of "+t.Schema)
		}
		for _, t := range r.Types {
			names = append(names, t.Name+"\t"+t.Kind+" type of "+t.Schema)
		}
		for _, q := range r.Sequences {
			names = append(names, q.Name+"\tsequence of "+q.Schema)
		}
		return names
	}, &schema))
	return cmd
}

// completeCatalog completes names from the cache.
func (a *app) completeCatalog(names func(*posternv1.IntrospectSourceResponse) []string, schema *string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
		agent, source, err := splitSource(firstOf(args...))
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return a.complete(cmd, nil, func(ctx context.Context, c *client.Client) ([]string, error) {
			r := &posternv1.IntrospectSourceRequest{Agent: agent, Source: source, NamesOnly: true, PageSize: 1000}
			if schema != nil {
				r.Schema, r.Table = *schema, prefix+"*"
			}
			resp, err := c.Sources.Introspect(ctx, connect.NewRequest(r))
			if err != nil {
				return nil, err
			}
			found := names(resp.Msg)
			for i, n := range found {
				name, what, _ := strings.Cut(n, "\t")
				found[i] = strings.TrimRight(safe(name)+"\t"+safe(what), "\t")
			}
			return found, nil
		})
	}
}

func (a *app) introspect(ctx context.Context, c *client.Client, title string, r *posternv1.IntrospectSourceRequest) error {
	all := &posternv1.IntrospectSourceResponse{}
	for {
		resp, err := c.Sources.Introspect(ctx, connect.NewRequest(r))
		if err != nil {
			return err
		}
		m := resp.Msg
		all.Schemas, all.Tables, all.Functions = append(all.Schemas, m.Schemas...), append(all.Tables, m.Tables...), append(all.Functions, m.Functions...)
		all.Types, all.Sequences = append(all.Types, m.Types...), append(all.Sequences, m.Sequences...)
		all.Refreshed, all.Truncated = m.Refreshed, all.Truncated || m.Truncated
		if m.NextPageToken == "" {
			break
		}
		r.PageToken = m.NextPageToken
	}
	if a.output == "json" {
		return a.printCatalog(all)
	}
	a.info("%s, as of %s: %d schemas, %d tables and views, %d functions, %d types, %d sequences",
		safe(title), timeText(all.Refreshed), len(all.Schemas), len(all.Tables), len(all.Functions), len(all.Types), len(all.Sequences))
	if all.Truncated {
		a.info("the catalog is larger than the control plane keeps: some of it is missing")
	}
	if r.Table != "" {
		return a.printDetails(all)
	}
	rows := [][]string{{"SCHEMA", "NAME", "KIND", "COLUMNS", "ROWS", "SIZE", "COMMENT"}}
	for _, t := range all.Tables {
		rows = append(rows, []string{t.Schema, t.Name, t.Kind, fmt.Sprint(len(t.Columns)), rowsText(t), bytesText(t), firstOf(clip(t.Comment, 50), "-")})
	}
	for _, f := range all.Functions {
		rows = append(rows, []string{f.Schema, f.Name, f.Kind, "-", "-", "-", firstOf(clip(f.Comment, 50), "-")})
	}
	for _, t := range all.Types {
		rows = append(rows, []string{t.Schema, t.Name, t.Kind + " type", "-", "-", "-", firstOf(clip(t.Comment, 50), "-")})
	}
	for _, q := range all.Sequences {
		rows = append(rows, []string{q.Schema, q.Name, "sequence", "-", "-", "-", firstOf(clip(q.Comment, 50), "-")})
	}
	return a.printRows(rows)
}

// printCatalog prints one object; a message at a time, so that no more than one is
// held twice.
func (a *app) printCatalog(all *posternv1.IntrospectSourceResponse) error {
	out := struct {
		Refreshed string            `json:"refreshed"`
		Truncated bool              `json:"truncated"`
		Schemas   []json.RawMessage `json:"schemas"`
		Tables    []json.RawMessage `json:"tables"`
		Functions []json.RawMessage `json:"functions"`
		Types     []json.RawMessage `json:"types"`
		Sequences []json.RawMessage `json:"sequences"`
	}{Refreshed: timeText(all.Refreshed), Truncated: all.Truncated, Schemas: []json.RawMessage{}}
	for _, s := range all.Schemas {
		raw, err := json.Marshal(map[string]string{"name": s.Name, "comment": s.Comment})
		if err != nil {
			return err
		}
		out.Schemas = append(out.Schemas, raw)
	}
	var err error
	if out.Tables, err = rawList(all.Tables); err != nil {
		return err
	}
	if out.Functions, err = rawList(all.Functions); err != nil {
		return err
	}
	if out.Types, err = rawList(all.Types); err != nil {
		return err
	}
	if out.Sequences, err = rawList(all.Sequences); err != nil {
		return err
	}
	return a.printJSON(out)
}

// rawList encodes each message; without any it is an empty list.
func rawList[M gproto.Message](messages []M) ([]json.RawMessage, error) {
	out := []json.RawMessage{}
	for _, m := range messages {
		raw, err := asJSON(m)
		if err != nil {
			return nil, err
		}
		out = append(out, raw)
	}
	return out, nil
}

func rowsText(t *posternv1.CatalogTable) string {
	if t.Rows == nil {
		return "-"
	}
	return fmt.Sprintf("~%d", *t.Rows)
}

func bytesText(t *posternv1.CatalogTable) string {
	if t.Bytes == nil {
		return "-"
	}
	return "~" + sizeText(*t.Bytes)
}

// printDetails prints each table as a small tree.
func (a *app) printDetails(all *posternv1.IntrospectSourceResponse) error {
	for _, t := range all.Tables {
		title := t.Kind + " " + t.Schema + "." + t.Name
		if t.Rows != nil {
			title += ", " + rowsText(t) + " rows"
		}
		if t.Bytes != nil {
			title += ", " + bytesText(t)
		}
		if p := t.PartitionOf; p != nil {
			title += ", a partition of " + p.Schema + "." + p.Name
		}
		if err := a.printRows([][]string{{title + commentText(t.Comment)}}); err != nil {
			return err
		}
		var rows [][]string
		for _, c := range t.Columns {
			var facts []string
			if c.NotNull {
				facts = append(facts, "not null")
			}
			if c.HasDefault {
				facts = append(facts, "default")
			}
			if c.Generated != "" {
				facts = append(facts, c.Generated)
			}
			rows = append(rows, []string{"  " + c.Name, c.Type, strings.Join(facts, ", ") + commentText(c.Comment)})
		}
		if err := a.printRows(rows); err != nil {
			return err
		}
		rows = nil
		for _, k := range t.Keys {
			text := "  " + k.Kind + " key " + firstOf(k.Name, "(hidden)") + " (" + strings.Join(k.Columns, ", ") + ")"
			if k.Kind == "check" || k.Kind == "exclusion" {
				text = "  " + k.Kind + " " + k.Name + " (" + strings.Join(k.Columns, ", ") + ")"
			}
			if r := k.References; r != nil {
				text += " -> " + r.Schema + "." + r.Name + " (" + strings.Join(k.ReferencedColumns, ", ") + ")"
			} else if k.ReferencesHidden {
				text += " -> (hidden)"
			}
			rows = append(rows, []string{text})
		}
		for _, i := range t.Indexes {
			text := "  index " + i.Name + " " + i.Method + " (" + strings.Join(i.Columns, ", ") + ")"
			if i.Unique {
				text += " unique"
			}
			if i.Partial {
				text += " partial"
			}
			rows = append(rows, []string{text})
		}
		for _, trigger := range t.Triggers {
			rows = append(rows, []string{"  trigger " + trigger})
		}
		if t.Truncated {
			rows = append(rows, []string{"  (more than is shown)"})
		}
		if err := a.printRows(rows); err != nil {
			return err
		}
	}
	var rows [][]string
	for _, f := range all.Functions {
		var arguments []string
		for _, g := range f.Arguments {
			text := strings.TrimSpace(g.Name + " " + g.Type)
			if g.Mode != "in" {
				text = g.Mode + " " + text
			}
			arguments = append(arguments, text)
		}
		text := f.Kind + " " + f.Schema + "." + f.Name + "(" + strings.Join(arguments, ", ") + ")"
		if f.Result != "" {
			text += " -> "
			if f.ReturnsSet {
				text += "setof "
			}
			text += f.Result
		}
		rows = append(rows, []string{text + commentText(f.Comment)})
	}
	for _, t := range all.Types {
		rows = append(rows, []string{typeText(t) + commentText(t.Comment)})
	}
	for _, q := range all.Sequences {
		text := "sequence " + q.Schema + "." + q.Name + " " + q.Type
		if o := q.Owner; o != nil {
			text += " of " + o.Schema + "." + o.Name + "." + q.OwnerColumn
		}
		rows = append(rows, []string{text + commentText(q.Comment)})
	}
	return a.printRows(rows)
}

// typeText is a type as CREATE TYPE would have it, more or less.
func typeText(t *posternv1.CatalogType) string {
	text := t.Kind + " type " + t.Schema + "." + t.Name
	var members []string
	for _, label := range t.Labels {
		members = append(members, "'"+strings.ReplaceAll(label, "'", "''")+"'")
	}
	for _, c := range t.Attributes {
		members = append(members, c.Name+" "+c.Type)
	}
	if t.Truncated {
		members = append(members, "...")
	}
	if len(members) > 0 {
		text += " (" + strings.Join(members, ", ") + ")"
	}
	if t.Base != "" {
		text += " of " + t.Base
	}
	if t.NotNull {
		text += " not null"
	}
	return text
}

func commentText(text string) string {
	if text == "" {
		return ""
	}
	return "  -- " + clip(text, 200)
}
