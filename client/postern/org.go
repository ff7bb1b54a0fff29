package main

import (
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func (a *app) orgCommand() *cobra.Command {
	create := &cobra.Command{
		Use: "create NAME", Short: "Make an organization; prints its first admin token alone on stdout, once", Example: "  postern org create acme > acme.token", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Organizations.CreateOrganization(cmd.Context(), connect.NewRequest(&posternv1.CreateOrganizationRequest{Name: args[0]}))
				if err != nil {
					return err
				}
				o := resp.Msg.GetOrganization()
				return a.secretOnStdout(resp.Msg.AdminToken, resp.Msg, fmt.Sprintf("organization %s (%s) with its first admin token; it is shown this once", o.GetName(), o.GetId()))
			})
		},
	}
	list := &cobra.Command{
		Use: "list", Short: "List organizations", Example: "  postern org list", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Organizations.ListOrganizations(cmd.Context(), connect.NewRequest(&posternv1.ListOrganizationsRequest{}))
				if err != nil {
					return err
				}
				return printList(a, resp.Msg.Organizations, []string{"ID", "NAME", "STATE", "CREATED"}, func(o *posternv1.Organization) []string {
					return []string{o.Id, o.Name, organizationState(o), timeText(o.Created)}
				})
			})
		},
	}
	set := func(use, short string, disabled bool) *cobra.Command {
		return &cobra.Command{
			Use: use + " ORGANIZATION", Short: short, Example: "  postern org " + use + " acme", Args: cobra.ExactArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				return a.with(func(c *client.Client) error {
					resp, err := c.Organizations.SetOrganizationDisabled(cmd.Context(), connect.NewRequest(&posternv1.SetOrganizationDisabledRequest{Organization: args[0], Disabled: disabled}))
					if err != nil {
						return err
					}
					o := resp.Msg.GetOrganization()
					return a.done(o, "organization %s (%s) is %s", o.GetName(), o.GetId(), organizationState(o))
				})
			},
		}
	}
	return group("org", "Make, list, disable and enable organizations",
		create, list, set("disable", "Cut an organization off: its agents, tokens and keys", true), set("enable", "Let a disabled organization back in", false))
}

func organizationState(o *posternv1.Organization) string {
	if o.GetDisabled() {
		return "disabled"
	}
	return "enabled"
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Show this command's version", Example: "  postern version", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if a.output == "json" {
				return a.printJSON(map[string]string{"version": proto.Software(), "protocol": fmt.Sprintf("%d.%d", proto.ProtocolMajor, proto.ProtocolMinor)})
			}
			_, err := fmt.Fprintf(a.stdout, "postern %s, protocol %d.%d\n", proto.Software(), proto.ProtocolMajor, proto.ProtocolMinor)
			return err
		},
	}
}
