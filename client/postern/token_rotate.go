package main

import (
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/client"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func (a *app) tokenRotateCommand() *cobra.Command {
	var life ttl
	overlap := time.Hour
	cmd := &cobra.Command{
		Use:   "rotate TOKEN",
		Short: "Give an API token, by id or name, a new secret; prints it alone on stdout, once",
		Long: `Give an API token a new secret and print the whole token alone on stdout, once. Its id, name, role,
secrets, kernels and sessions stay. The token as it was is good for --overlap, so that clients can be changed
meanwhile; what it had opened before goes on until it is closed. If a token leaked, revoke it instead.`,
		Example: "  postern token rotate notebooks --overlap 1h > token.txt",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if overlap < 0 {
				return usagef("--overlap is %s: it can't be less than nothing", overlap)
			}
			return a.with(func(c *client.Client) error {
				resp, err := c.Tokens.RotateToken(cmd.Context(), connect.NewRequest(&posternv1.RotateTokenRequest{
					Token: args[0], Overlap: durationpb.New(overlap), Ttl: life.proto(),
				}))
				if err != nil {
					return err
				}
				t := resp.Msg.GetToken()
				return a.secretOnStdout(resp.Msg.Secret, resp.Msg,
					fmt.Sprintf("token %s (%s) has a new secret, expires %s; the old one ends %s; it is shown this once", t.GetName(), t.GetId(), timeOr(t.GetExpires(), "never"), timeText(resp.Msg.GetFormerUntil())))
			})
		},
	}
	cmd.Flags().DurationVar(&overlap, "overlap", overlap, "how long the token as it was is good, at most 720h; 0s: not at all")
	cmd.Flags().Var(&life, "ttl", "how long it is valid from now on, as in 12h or 30d (default 90d, or without end as before)")
	return cmd
}
