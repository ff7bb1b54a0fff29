package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func (a *app) introspectCommand() *cobra.Command {
	var schema, table string
	var refresh bool
	cmd := &cobra.Command{
		Use: "introspect AGENT/SOURCE", Short: "Show schemas, tables, columns, keys and functions of a data source",
		Long: "Shows what a data source holds, from the control plane's cache: a line for each table and function,\n" +
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
	cmd.Flags().StringVar(&table, "table", "", "only tables and functions whose names match this pattern, in detail")
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
		all.Refreshed, all.Truncated = m.Refreshed, all.Truncated || m.Truncated
		if m.NextPageToken == "" {
			break
		}
		r.PageToken = m.NextPageToken
	}
	if a.output == "json" {
		return a.printCatalog(all)
	}
	a.info("%s, as of %s: %d schemas, %d tables and views, %d functions", safe(title), timeText(all.Refreshed), len(all.Schemas), len(all.Tables), len(all.Functions))
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
	}{Refreshed: timeText(all.Refreshed), Truncated: all.Truncated, Schemas: []json.RawMessage{}, Tables: []json.RawMessage{}, Functions: []json.RawMessage{}}
	for _, s := range all.Schemas {
		raw, err := json.Marshal(map[string]string{"name": s.Name, "comment": s.Comment})
		if err != nil {
			return err
		}
		out.Schemas = append(out.Schemas, raw)
	}
	for _, t := range all.Tables {
		raw, err := asJSON(t)
		if err != nil {
			return err
		}
		out.Tables = append(out.Tables, raw)
	}
	for _, f := range all.Functions {
		raw, err := asJSON(f)
		if err != nil {
			return err
		}
		out.Functions = append(out.Functions, raw)
	}
	return a.printJSON(out)
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
	return a.printRows(rows)
}

func commentText(text string) string {
	if text == "" {
		return ""
	}
	return "  -- " + clip(text, 200)
}
