package main

import (
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func (a *app) caCommand() *cobra.Command {
	show := &cobra.Command{
		Use: "show", Short: "Show the control plane's certificate authorities", Example: "  postern ca show", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.CA.ShowCA(cmd.Context(), connect.NewRequest(&posternv1.ShowCARequest{}))
				if err != nil {
					return err
				}
				return printList(a, resp.Msg.Authorities, []string{"STATE", "SUBJECT", "NOT BEFORE", "NOT AFTER", "SHA-256"}, func(x *posternv1.Authority) []string {
					return []string{x.State, x.Subject, timeText(x.NotBefore), timeText(x.NotAfter), x.Fingerprint}
				})
			})
		},
	}
	status := &cobra.Command{
		Use: "status", Short: "Show how far a rotation of the certificate authority is, and who depends on the old one",
		Example: "  postern ca status\n  postern ca status -o json", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.CA.GetCAStatus(cmd.Context(), connect.NewRequest(&posternv1.GetCAStatusRequest{}))
				if err != nil {
					return err
				}
				return a.printCAStatus(resp.Msg)
			})
		},
	}
	var force bool
	rotate := &cobra.Command{
		Use: "rotate", Short: "Replace the certificate authority, with nothing ended",
		Long: `Replace the certificate authority, with nothing ended.

A new authority is made and announced, takes over after 10 seconds, and agents that are online are
asked to renew their certificates on it; those that are away do so when they come back. The old one is
dropped by itself when no agent and no registration key depends on it. The command returns at once: see
how far it is with "postern ca status". If it is run again meanwhile it changes nothing.`,
		Example: "  postern ca rotate\n  postern ca status\n  postern ca rotate --force", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.CA.RotateCA(cmd.Context(), connect.NewRequest(&posternv1.RotateCARequest{Force: force}))
				if err != nil {
					return err
				}
				return a.printCAStatus(resp.Msg)
			})
		},
	}
	rotate.Flags().BoolVar(&force, "force", false, "drop the old authority now: agents that have not renewed must register anew, and older registration keys stop working")
	return group("ca", "Show and replace the certificate authority", show, status, rotate)
}

// printCAStatus prints how far a rotation is.
func (a *app) printCAStatus(s *posternv1.CAStatus) error {
	if a.output == "json" {
		return a.printJSON(s)
	}
	text := ""
	switch s.Stage {
	case "stable":
		text = "no rotation is under way\n"
	case "announced":
		text = fmt.Sprintf("the new authority is announced, and takes over at %s\n", timeText(s.TakesOver))
	default:
		text = fmt.Sprintf("the new authority issues; %d agents and %d registration keys depend on the old one\n", s.BehindTotal, s.Keys)
	}
	if _, err := fmt.Fprint(a.stdout, text); err != nil {
		return err
	}
	if err := printList(a, s.Authorities, []string{"STATE", "SUBJECT", "NOT AFTER", "SHA-256"}, func(x *posternv1.Authority) []string {
		return []string{x.State, x.Subject, timeText(x.NotAfter), x.Fingerprint}
	}); err != nil || len(s.Behind) == 0 {
		return err
	}
	return printList(a, s.Behind, []string{"ORGANIZATION", "AGENT", "ONLINE", "LAST SEEN", "CERTIFICATE UNTIL"}, func(x *posternv1.AgentOfAuthority) []string {
		return []string{x.Organization, x.Agent, fmt.Sprint(x.Online), timeText(x.LastSeen), timeText(x.CertificateExpires)}
	})
}
