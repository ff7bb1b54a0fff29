package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/client"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

var roles = []string{"admin", "operator", "analyst", "viewer"}

// ttl is a flag of type time.Duration that knows days too: 90d.
type ttl struct{ d time.Duration }

// Set implements pflag.Value.
func (t *ttl) Set(text string) error {
	if days, ok := strings.CutSuffix(text, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err != nil || n == 0 {
			return fmt.Errorf("write days as in 30d")
		}
		t.d = time.Duration(n) * 24 * time.Hour
		return nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 {
		return fmt.Errorf("write a duration as in 90m, 12h or 30d")
	}
	t.d = d
	return nil
}

// String implements pflag.Value.
func (t *ttl) String() string {
	if t.d == 0 {
		return ""
	}
	return t.d.String()
}

// Type implements pflag.Value.
func (*ttl) Type() string { return "duration" }

func (t *ttl) proto() *durationpb.Duration {
	if t.d == 0 {
		return nil
	}
	return durationpb.New(t.d)
}

// secretOnStdout prints a new secret alone on stdout, or all as JSON.
func (a *app) secretOnStdout(secret string, all any, info string) error {
	if a.output == "json" {
		return a.printJSON(all)
	}
	a.info("%s", safe(info))
	_, err := fmt.Fprintln(a.stdout, secret)
	return err
}

func (a *app) tokenCommand() *cobra.Command {
	var role string
	var life ttl
	create := &cobra.Command{
		Use:     "create [NAME]",
		Short:   "Make an API token; prints it alone on stdout, once",
		Example: "  postern token create notebooks --role analyst --ttl 30d",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !slices.Contains(roles, role) {
				return usagef("--role is %q: choose one of %s", role, strings.Join(roles, ", "))
			}
			return a.with(func(c *client.Client) error {
				resp, err := c.Tokens.CreateToken(cmd.Context(), connect.NewRequest(&posternv1.CreateTokenRequest{
					Name: firstOf(args...), Role: role, Ttl: life.proto(),
				}))
				if err != nil {
					return err
				}
				t := resp.Msg.GetToken()
				return a.secretOnStdout(resp.Msg.Secret, resp.Msg,
					fmt.Sprintf("token %s (%s), role %s, expires %s; it is shown this once", t.GetName(), t.GetId(), t.GetRole(), timeOr(t.GetExpires(), "never")))
			})
		},
	}
	create.Flags().StringVar(&role, "role", "", "admin, operator, analyst or viewer (required)")
	create.Flags().Var(&life, "ttl", "how long it is valid, as in 12h or 30d (default 90d)")
	create.RegisterFlagCompletionFunc("role", cobra.FixedCompletions(roles, cobra.ShellCompDirectiveNoFileComp)) //nolint:errcheck // fails on unknown flags alone
	list := &cobra.Command{
		Use: "list", Short: "List API tokens", Example: "  postern token list", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Tokens.ListTokens(cmd.Context(), connect.NewRequest(&posternv1.ListTokensRequest{}))
				if err != nil {
					return err
				}
				return printList(a, resp.Msg.Tokens, []string{"ID", "NAME", "ROLE", "CREATED", "EXPIRES", "LAST USED", "REVOKED"}, func(t *posternv1.Token) []string {
					return []string{t.Id, t.Name, t.Role, timeText(t.Created), timeOr(t.Expires, "never"), timeOr(t.LastUsed, "never"), timeText(t.Revoked)}
				})
			})
		},
	}
	revoke := &cobra.Command{
		Use: "revoke TOKEN", Short: "Revoke an API token, by id or name", Example: "  postern token revoke notebooks", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Tokens.RevokeToken(cmd.Context(), connect.NewRequest(&posternv1.RevokeTokenRequest{Token: args[0]}))
				if err != nil {
					return err
				}
				return a.done(resp.Msg.GetToken(), "token %s (%s) is revoked", resp.Msg.GetToken().GetName(), resp.Msg.GetToken().GetId())
			})
		},
	}
	return group("token", "Make, list, rotate and revoke API tokens", create, list, a.tokenRotateCommand(), revoke)
}

func (a *app) keyCommand() *cobra.Command {
	var life ttl
	var uses uint32
	var labels []string
	create := &cobra.Command{
		Use:     "create",
		Short:   "Make a registration key for hosts; prints it alone on stdout, once",
		Example: "  postern key create --ttl 1h --uses 1 --label site=lab | ssh host agentd register --url https://cp.example.com --key-file -",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			set, err := parseLabels(labels)
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				resp, err := c.Keys.CreateKey(cmd.Context(), connect.NewRequest(&posternv1.CreateKeyRequest{Ttl: life.proto(), MaxUses: uses, Labels: set}))
				if err != nil {
					return err
				}
				k := resp.Msg.GetKey()
				return a.secretOnStdout(resp.Msg.Secret, resp.Msg,
					fmt.Sprintf("key %s for %d host(s), expires %s, labels %s; it is shown this once: give it to `agentd register --key-file`", k.GetId(), k.GetMaxUses(), timeText(k.GetExpires()), labelsText(k.GetLabels())))
			})
		},
	}
	create.Flags().Var(&life, "ttl", "how long it is valid, as in 90m or 30d (default 1h)")
	create.Flags().Uint32Var(&uses, "uses", 1, "how many hosts may join with it")
	create.Flags().StringArrayVar(&labels, "label", nil, "label of the hosts that join with it, as name=value (repeatable)")
	list := &cobra.Command{
		Use: "list", Short: "List registration keys", Example: "  postern key list", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Keys.ListKeys(cmd.Context(), connect.NewRequest(&posternv1.ListKeysRequest{}))
				if err != nil {
					return err
				}
				return printList(a, resp.Msg.Keys, []string{"ID", "USES", "LABELS", "CREATED", "EXPIRES", "REVOKED", "BY"}, func(k *posternv1.Key) []string {
					return []string{k.Id, fmt.Sprintf("%d/%d", k.Uses, k.MaxUses), labelsText(k.Labels), timeText(k.Created), timeText(k.Expires), timeText(k.Revoked), k.CreatedBy}
				})
			})
		},
	}
	revoke := &cobra.Command{
		Use: "revoke KEY", Short: "Revoke a registration key, by id", Example: "  postern key revoke uqhrycvruuybyonm", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Keys.RevokeKey(cmd.Context(), connect.NewRequest(&posternv1.RevokeKeyRequest{KeyId: args[0]}))
				if err != nil {
					return err
				}
				return a.done(resp.Msg.GetKey(), "key %s is revoked", resp.Msg.GetKey().GetId())
			})
		},
	}
	return group("key", "Make, list and revoke registration keys", create, list, revoke)
}

func parseLabels(pairs []string) (map[string]string, error) {
	set := make(map[string]string, len(pairs))
	for _, pair := range pairs {
		name, value, ok := strings.Cut(pair, "=")
		if !ok || name == "" {
			return nil, usagef("--label is %q: write name=value", pair)
		}
		if _, twice := set[name]; twice {
			return nil, usagef("--label %s is given twice", name)
		}
		set[name] = value
	}
	return set, nil
}
