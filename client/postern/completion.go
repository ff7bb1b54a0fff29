package main

import (
	"context"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// completionTime bounds what a press of the tab key may cost.
const completionTime = 2 * time.Second

func (a *app) completionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "completion SHELL",
		Short: "Print the completion script for bash, zsh or fish",
		Long: "Prints a script that completes commands, flags, and the names of agents, data sources, queries and kernels.\n\n" +
			"bash:  source <(postern completion bash)\n" +
			"zsh:   postern completion zsh > \"${fpath[1]}/_postern\"\n" +
			"fish:  postern completion fish | source",
		Example:   "  source <(postern completion bash)",
		ValidArgs: []string{"bash", "zsh", "fish"},
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch args[0] {
			case "zsh":
				return cmd.Root().GenZshCompletion(a.stdout)
			case "fish":
				return cmd.Root().GenFishCompletion(a.stdout, true)
			}
			return cmd.Root().GenBashCompletionV2(a.stdout, true)
		},
	}
}

// complete asks the control plane for names; what goes wrong gives none.
func (a *app) complete(cmd *cobra.Command, args []string, f func(context.Context, *client.Client) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	const directive = cobra.ShellCompDirectiveNoFileComp
	if len(args) > 0 || a.tokenFile == "-" {
		return nil, directive
	}
	c, err := a.client()
	if err != nil {
		return nil, directive
	}
	defer c.Close()
	parent := cmd.Context()
	if parent == nil {
		parent = context.Background()
	}
	ctx, cancel := context.WithTimeout(parent, completionTime)
	defer cancel()
	names, err := f(ctx, c)
	if err != nil {
		return nil, directive
	}
	return names, directive
}

func (a *app) completeAgents(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, args, func(ctx context.Context, c *client.Client) ([]string, error) {
		resp, err := c.Agents.ListAgents(ctx, connect.NewRequest(&posternv1.ListAgentsRequest{}))
		if err != nil {
			return nil, err
		}
		var names []string
		for _, g := range resp.Msg.Agents {
			if g.Revoked == nil {
				names = append(names, safe(g.Name)+"\t"+agentState(g))
			}
		}
		return names, nil
	})
}

func (a *app) completeSources(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, args, func(ctx context.Context, c *client.Client) ([]string, error) {
		resp, err := c.Sources.ListSources(ctx, connect.NewRequest(&posternv1.ListOrganizationSourcesRequest{}))
		if err != nil {
			return nil, err
		}
		var names []string
		for _, s := range resp.Msg.Sources {
			names = append(names, safe(s.Agent+"/"+s.GetSource().GetName())+"\t"+safe(s.GetSource().GetEngine()+" "+s.GetSource().GetMode()))
		}
		return names, nil
	})
}

func (a *app) completeKernels(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, args, func(ctx context.Context, c *client.Client) ([]string, error) {
		resp, err := c.Kernels.ListKernels(ctx, connect.NewRequest(&posternv1.ListAgentKernelsRequest{}))
		if err != nil {
			return nil, err
		}
		var names []string
		for _, k := range resp.Msg.Kernels {
			names = append(names, safe(k.Kernel.GetId())+"\t"+safe(k.Agent+" "+k.Kernel.GetSpec()+" "+kernelState(k)))
		}
		return names, nil
	})
}

// completeSpecs completes --spec for the agent that is named already.
func (a *app) completeSpecs(agent func(args []string) string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		return a.complete(cmd, nil, func(ctx context.Context, c *client.Client) ([]string, error) {
			resp, err := c.Kernels.ListKernelSpecs(ctx, connect.NewRequest(&posternv1.ListAgentKernelSpecsRequest{Agent: agent(args)}))
			if err != nil {
				return nil, err
			}
			var names []string
			for _, s := range resp.Msg.Specs {
				names = append(names, safe(s.Name)+"\t"+safe(s.DisplayName))
			}
			return names, nil
		})
	}
}

func (a *app) completeQueries(running bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		return a.complete(cmd, args, func(ctx context.Context, c *client.Client) ([]string, error) {
			resp, err := c.Queries.ListQueries(ctx, connect.NewRequest(&posternv1.ListQueriesRequest{RunningOnly: running}))
			if err != nil {
				return nil, err
			}
			var names []string
			for _, q := range resp.Msg.Queries {
				names = append(names, safe(q.Id)+"\t"+safe(q.State+" "+clip(q.Sql, 40)))
			}
			return names, nil
		})
	}
}
