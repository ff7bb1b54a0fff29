package main

import (
	"context"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func (a *app) sessionCommand() *cobra.Command {
	list := &cobra.Command{
		Use: "list [AGENT]", Short: "List SQL sessions that are open, of all agents online or one",
		Long: "Lists SQL sessions that stay open, as postern sql -i has one: those of the token, or all of them with the role operator.\n" +
			"They live on the agents' hosts: of an agent that is offline nothing is known.",
		Example: "  postern session list edge-1", Args: cobra.MaximumNArgs(1), ValidArgsFunction: a.completeAgents,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error { return a.listSessions(cmd.Context(), c, firstOf(args...)) })
		},
	}
	var agent string
	closing := &cobra.Command{
		Use: "close SESSION", Short: "Close an open SQL session of one's own, by id",
		Long: "Closes a SQL session that stays open: the statement under way is cancelled, and what is open is rolled back.\n" +
			"A session belongs to the token that opened it, and to nobody else.",
		Example: "  postern session close ses_01k…", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeSessions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error { return a.closeSession(cmd.Context(), c, agent, args[0]) })
		},
	}
	closing.Flags().StringVar(&agent, "agent", "", "the agent that has it; empty: all agents online are asked")
	closing.RegisterFlagCompletionFunc("agent", a.completeAgents) //nolint:errcheck // fails on unknown flags alone
	return group("session", "List and close open SQL sessions", list, closing)
}

func (a *app) listSessions(ctx context.Context, c *client.Client, agent string) error {
	resp, err := c.Sessions.ListSessions(ctx, connect.NewRequest(&posternv1.ListSQLSessionsRequest{Agent: agent}))
	if err != nil {
		return err
	}
	err = printList(a, resp.Msg.Sessions, []string{"ID", "SOURCE", "BY", "OPENED", "LAST USED", "IDLE TIMEOUT", "TRANSACTION", "STATEMENTS", "QUERY"}, func(s *posternv1.SQLSession) []string {
		return []string{
			s.Id, s.Agent + "/" + s.Source, s.GetPrincipal().GetTokenName(), timeText(s.Opened), timeText(s.LastUsed), durationText(s.IdleTimeout), s.Transaction,
			fmt.Sprint(s.Statements), firstOf(s.QueryId, "-"),
		}
	})
	if err != nil {
		return err
	}
	if silent := resp.Msg.Silent; len(silent) > 0 {
		return proto.Errorf(proto.CodeAgentOffline, "the list is not complete: no answer came from %s; try again", strings.Join(silent, ", "))
	}
	return nil
}

func (a *app) closeSession(ctx context.Context, c *client.Client, agent, id string) error {
	if agent == "" {
		resp, err := c.Sessions.ListSessions(ctx, connect.NewRequest(&posternv1.ListSQLSessionsRequest{}))
		if err != nil {
			return err
		}
		for _, s := range resp.Msg.Sessions {
			if s.Id == id {
				agent = s.Agent
			}
		}
		switch silent := resp.Msg.Silent; {
		case agent != "":
		case len(silent) > 0:
			return proto.Errorf(proto.CodeAgentOffline, "no session %q on the agents that answered, and no answer came from %s: try again", id, strings.Join(silent, ", "))
		default:
			return proto.Errorf(proto.CodeNotFound, "no session %q on the agents that are online: see `postern session list`", id)
		}
	}
	if _, err := c.Sessions.CloseSession(ctx, connect.NewRequest(&posternv1.CloseSQLSessionRequest{Agent: agent, SessionId: id})); err != nil {
		return err
	}
	return a.done(&posternv1.SQLSession{Id: id, Agent: agent}, "session %s is closed", id)
}

// completeSessions completes the ids of open sessions.
func (a *app) completeSessions(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, args, func(ctx context.Context, c *client.Client) ([]string, error) {
		resp, err := c.Sessions.ListSessions(ctx, connect.NewRequest(&posternv1.ListSQLSessionsRequest{}))
		if err != nil {
			return nil, err
		}
		var names []string
		for _, s := range resp.Msg.Sessions {
			names = append(names, safe(s.Id)+"\t"+safe(s.Agent+"/"+s.Source+", transaction "+s.Transaction))
		}
		return names, nil
	})
}
