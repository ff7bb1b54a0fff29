package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	protobuf "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// done reports a change: the object as JSON, or a sentence.
func (a *app) done(object protobuf.Message, format string, args ...any) error {
	if a.output == "json" {
		return a.printJSON(object)
	}
	_, err := fmt.Fprintln(a.stdout, safe(fmt.Sprintf(format, args...)))
	return err
}

func (a *app) agentCommand() *cobra.Command {
	list := &cobra.Command{
		Use: "list", Short: "List agents", Example: "  postern agent list", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Agents.ListAgents(cmd.Context(), connect.NewRequest(&posternv1.ListAgentsRequest{}))
				if err != nil {
					return err
				}
				return printList(a, resp.Msg.Agents, []string{"NAME", "STATE", "SOURCES", "LABELS", "LAST SEEN", "ID"}, func(g *posternv1.Agent) []string {
					return []string{g.Name, agentState(g), fmt.Sprint(len(g.Sources)), labelsText(g.Labels), timeText(g.LastSeen), g.Id}
				})
			})
		},
	}
	show := &cobra.Command{
		Use: "show AGENT", Short: "Show an agent, by id or name", Example: "  postern agent show edge-1", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeAgents,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error { return a.showAgent(cmd.Context(), c, args[0]) })
		},
	}
	var force bool
	revoke := &cobra.Command{
		Use: "revoke AGENT", Short: "Cut an agent off, by id or name; it must register anew",
		Long:    "Cut an agent off, by id or name; it must register anew. It is refused while its host has writes in workspaces that are not uploaded, unless --force.",
		Example: "  postern agent revoke edge-1", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeAgents,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Agents.RevokeAgent(cmd.Context(), connect.NewRequest(&posternv1.RevokeAgentRequest{Agent: args[0], Force: force}))
				if err != nil {
					return err
				}
				return a.done(resp.Msg.GetAgent(), "agent %s (%s) is revoked", resp.Msg.GetAgent().GetName(), resp.Msg.GetAgent().GetId())
			})
		},
	}
	revoke.Flags().BoolVar(&force, "force", false, "also if its host has writes that are not uploaded: after that they are there alone")
	return group("agent", "List, show and revoke agents", list, show, revoke)
}

func agentState(g *posternv1.Agent) string {
	switch {
	case g.Revoked != nil:
		return "revoked"
	case g.Online:
		return "online"
	}
	return "offline"
}

func (a *app) showAgent(ctx context.Context, c *client.Client, name string) error {
	resp, err := c.Agents.GetAgent(ctx, connect.NewRequest(&posternv1.GetAgentRequest{Agent: name}))
	if err != nil {
		return err
	}
	g := resp.Msg.GetAgent()
	if a.output == "json" {
		return a.printJSON(g)
	}
	rtt := ""
	if g.GetRoundTrip() != nil {
		rtt = durationText(g.RoundTrip)
	}
	fields := [][2]string{
		{"name", g.GetName()},
		{"id", g.GetId()},
		{"state", agentState(g)},
		{"labels", labelsText(g.GetLabels())},
		{"software", g.GetSoftware()},
		{"host", strings.TrimSpace(strings.Join([]string{g.GetHostname(), g.GetOs(), g.GetArch(), g.GetKernel()}, " "))},
		{"address", g.GetRemoteAddress()},
		{"round trip", rtt},
		{"registered", timeText(g.GetRegistered())},
		{"last seen", timeText(g.GetLastSeen())},
		{"certificate expires", timeText(g.GetCertificateExpires())},
	}
	if g.GetRevoked() != nil {
		fields = append(fields, [2]string{"revoked", timeText(g.Revoked)})
	}
	for _, s := range g.GetSources() {
		fields = append(fields, [2]string{"source", fmt.Sprintf("%s (%s, %s)", s.Name, s.Engine, s.Mode)})
	}
	for _, e := range g.GetLinkEvents() {
		fields = append(fields, [2]string{"link", strings.TrimSpace(fmt.Sprintf("%s %s %s", timeText(e.Time), e.State, e.Cause))})
	}
	return a.printFields(fields...)
}

// splitSource takes AGENT/SOURCE apart.
func splitSource(text string) (agent, source string, err error) {
	agent, source, ok := strings.Cut(text, "/")
	if !ok || agent == "" || source == "" || strings.Contains(source, "/") {
		return "", "", usagef("%q is not a data source: write AGENT/SOURCE, as `postern source list` shows it", text)
	}
	return agent, source, nil
}

func (a *app) sourceCommand() *cobra.Command {
	list := &cobra.Command{
		Use: "list [AGENT]", Short: "List data sources, of all agents or one", Example: "  postern source list", Args: cobra.MaximumNArgs(1), ValidArgsFunction: a.completeAgents,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Sources.ListSources(cmd.Context(), connect.NewRequest(&posternv1.ListOrganizationSourcesRequest{Agent: firstOf(args...)}))
				if err != nil {
					return err
				}
				return printList(a, resp.Msg.Sources, []string{"SOURCE", "STATE", "ENGINE", "MODE", "PLANS", "MAX ROWS", "MAX BYTES", "TIMEOUT", "CONCURRENCY", "MASKED"}, func(s *posternv1.OrganizationSource) []string {
					state := "offline"
					if s.Online {
						state = "online"
					}
					i := s.GetSource()
					masked := "no"
					if i.GetMasked() {
						masked = "yes"
					}
					return []string{s.Agent + "/" + i.GetName(), state, i.GetEngine(), i.GetMode(), firstOf(i.GetPlans(), "off"), fmt.Sprint(i.GetMaxRows()), sizeText(i.GetMaxBytes()), durationText(i.GetStatementTimeout()), fmt.Sprint(i.GetConcurrency()), masked}
				})
			})
		},
	}
	var tokenFile string
	check := &cobra.Command{
		Use: "check AGENT/SOURCE", Short: "Check a data source on its host, step by step",
		Long: `Checks a data source on its host, step by step.

With a one-time token, which agentd source check --offer prints on the host, the
source need not be saved in the host's configuration yet.`,
		Example: "  postern source check edge-1/warehouse\n  postern source check edge-1/new --one-time-token-file -", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeSources,
		RunE: func(cmd *cobra.Command, args []string) error {
			agent, source, err := splitSource(args[0])
			if err != nil {
				return err
			}
			oneTime := ""
			if tokenFile != "" {
				secret, err := a.readToken(tokenFile)
				if err != nil {
					return err
				}
				oneTime = secret.Reveal()
			}
			return a.with(func(c *client.Client) error { return a.checkSource(cmd.Context(), c, agent, source, oneTime) })
		},
	}
	check.Flags().StringVar(&tokenFile, "one-time-token-file", "", "a file with the one-time token of a source that is not saved yet; - is standard input")
	return group("source", "List, check and introspect data sources", list, check, a.introspectCommand())
}

func (a *app) checkSource(ctx context.Context, c *client.Client, agent, source, oneTime string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	resp, err := c.Sources.CheckSource(ctx, connect.NewRequest(&posternv1.CheckOrganizationSourceRequest{Agent: agent, Source: source, OneTimeToken: oneTime}))
	if err != nil {
		return err
	}
	err = printList(a, resp.Msg.Checks, []string{"CHECK", "RESULT", "MESSAGE", "WHAT TO DO"}, func(k *posternv1.Check) []string {
		return []string{k.Name, k.Result, firstOf(k.Message, "-"), k.Remedy}
	})
	if err != nil {
		return err
	}
	failed := 0
	for _, k := range resp.Msg.Checks {
		if k.Result == "failed" {
			failed++
		}
	}
	if failed > 0 {
		return proto.Errorf(proto.CodeSourceConfig, "%s/%s: %d of %d checks failed: do what the list says and check again", agent, source, failed, len(resp.Msg.Checks))
	}
	return nil
}
