package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto/kernelsecret"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// secretFlags say whose secret is meant.
type secretFlags struct {
	workspace    string
	organization bool
	host         bool
}

func (f *secretFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.workspace, "workspace", "", "the workspace's secret of that name, instead of one's own")
	cmd.Flags().BoolVar(&f.organization, "organization", false, "the organization's secret of that name, instead of one's own")
	cmd.MarkFlagsMutuallyExclusive("workspace", "organization")
}

func (f *secretFlags) ref(name string) *posternv1.SecretRef {
	r := &posternv1.SecretRef{Name: name, Workspace: f.workspace}
	switch {
	case f.workspace != "":
		r.Scope = posternv1.SecretScope_SECRET_SCOPE_WORKSPACE
	case f.organization:
		r.Scope = posternv1.SecretScope_SECRET_SCOPE_ORGANIZATION
	case f.host:
		r.Scope = posternv1.SecretScope_SECRET_SCOPE_HOST
	}
	return r
}

// secretScope is whose a secret is, for people.
func secretScope(r *posternv1.SecretRef) string {
	switch r.GetScope() {
	case posternv1.SecretScope_SECRET_SCOPE_WORKSPACE:
		return "workspace " + r.Workspace
	case posternv1.SecretScope_SECRET_SCOPE_ORGANIZATION:
		return "organization"
	case posternv1.SecretScope_SECRET_SCOPE_HOST:
		return "host"
	}
	return "own"
}

func (a *app) secretCommand() *cobra.Command {
	return group("secret", "Keep secrets for kernels, which have them as variables of their environment", a.secretSetCommand(), a.secretListCommand(), a.secretRemoveCommand(), a.secretGrantCommand())
}

func (a *app) secretSetCommand() *cobra.Command {
	var f secretFlags
	var file string
	cmd := &cobra.Command{
		Use: "set NAME", Short: "Set a secret's value, from stdin or a file; kernels that have it get the new value",
		Long: "Sets a secret: NAME becomes a variable in the environment of kernels that it is granted to.\n" +
			"The value comes from stdin or --file, never from the command line; one newline at its end is left out.\n" +
			"It has 8 to 32768 bytes of UTF-8. Secrets of workspaces and the organization are for operators to set.",
		Example: "  postern secret set API_TOKEN < token.txt\n  postern secret set DB_PASSWORD --workspace reports --file password.txt",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := kernelsecret.CheckName(args[0]); err != nil {
				return &usageError{err}
			}
			value, err := a.secretValue(file)
			if err != nil {
				return err
			}
			defer clear(value)
			if err := kernelsecret.CheckValue(args[0], value); err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				resp, err := c.Secrets.SetSecret(cmd.Context(), connect.NewRequest(&posternv1.SetSecretRequest{Ref: f.ref(args[0]), Value: value}))
				if err != nil {
					return err
				}
				a.deliveries(resp.Msg.Kernels, "kernel %s on %s has the new value")
				return a.done(resp.Msg, "secret %s (%s) is set", args[0], secretScope(resp.Msg.Secret.GetRef()))
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&file, "file", "", "file with the value (default: stdin)")
	return cmd
}

// secretValue reads a value, without one newline at its end.
func (a *app) secretValue(file string) ([]byte, error) {
	if (file == "" || file == "-") && isTerminal(a.stdin) {
		fmt.Fprint(a.stderr, "value (not shown): ") //nolint:errcheck // nobody is left to tell
		value, err := term.ReadPassword(int(a.stdin.Fd()))
		fmt.Fprintln(a.stderr) //nolint:errcheck // nobody is left to tell
		if err != nil {
			return nil, fmt.Errorf("read the value: %w", err)
		}
		return value, nil
	}
	var r io.Reader = a.stdin
	if file != "" && file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("read the value: %w", err)
		}
		defer f.Close() //nolint:errcheck // it was only read
		r = f
	}
	value, err := io.ReadAll(io.LimitReader(r, kernelsecret.MaxValue+3))
	if err != nil {
		return nil, fmt.Errorf("read the value: %w", err)
	}
	if rest, cut := bytes.CutSuffix(value, []byte("\n")); cut {
		value = bytes.TrimSuffix(rest, []byte("\r"))
	}
	return value, nil
}

// deliveries tells what became of secrets at kernels; good has a kernel's and an agent's
// name.
func (a *app) deliveries(list []*posternv1.SecretDelivery, good string) {
	if a.output == "json" {
		return
	}
	for _, d := range list {
		if d.Problem != "" {
			a.info("kernel %s on %s: %s", d.KernelId, safe(d.Agent), safe(d.Problem))
		} else {
			a.info(good, d.KernelId, safe(d.Agent))
		}
	}
}

func (a *app) secretListCommand() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List secrets and who has them; never values", Example: "  postern secret list", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Secrets.ListSecrets(cmd.Context(), connect.NewRequest(&posternv1.ListSecretsRequest{}))
				if err != nil {
					return err
				}
				return printList(a, resp.Msg.Secrets, []string{"NAME", "SCOPE", "OWNER", "CHANGED", "BY", "GRANTED TO"}, func(s *posternv1.Secret) []string {
					var to []string
					for _, g := range s.Grants {
						if g.KernelId != "" {
							to = append(to, "kernel "+g.KernelId)
						} else {
							to = append(to, "all of "+g.TokenName)
						}
					}
					return []string{s.Ref.GetName(), secretScope(s.Ref), firstOf(s.OwnerName, "-"), timeOr(s.Changed, "-"), firstOf(s.ChangedBy, "-"), firstOf(strings.Join(to, ", "), "-")}
				})
			})
		},
	}
}

func (a *app) secretRemoveCommand() *cobra.Command {
	var f secretFlags
	cmd := &cobra.Command{
		Use: "rm NAME", Short: "Remove a secret; kernels that have it lose it", Example: "  postern secret rm API_TOKEN", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Secrets.RemoveSecret(cmd.Context(), connect.NewRequest(&posternv1.RemoveSecretRequest{Ref: f.ref(args[0])}))
				if err != nil {
					return err
				}
				a.deliveries(resp.Msg.Kernels, "kernel %s on %s has it no more")
				return a.done(resp.Msg, "secret %s is removed", args[0])
			})
		},
	}
	f.add(cmd)
	return cmd
}

func (a *app) secretGrantCommand() *cobra.Command {
	var f secretFlags
	var all, remove bool
	var kernel, token string
	cmd := &cobra.Command{
		Use: "grant NAME [KERNEL]", Short: "Give a secret to a kernel, or to all kernels of a token",
		Long: "Gives a secret to a kernel, to all of one's own (--all) or, for operators, to all of another token (--token),\n" +
			"those that run and those to come. With --remove it takes the grant back.\n" +
			"NAME is one's own secret; else, for operators, the organization's; else, for one kernel, what its host reads from Vault under that name.",
		Example: "  postern secret grant API_TOKEN 01a20249-8294-70e3-b8c2-6b2fc9eebe2f\n  postern secret grant API_TOKEN --all\n  postern secret grant DB_PASSWORD --organization --token ana",
		Args:    cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 2 {
				if kernel != "" {
					return usagef("the kernel is given twice, as %s and by --kernel", args[1])
				}
				kernel = args[1]
			}
			given := 0
			for _, yes := range []bool{kernel != "", all, token != ""} {
				if yes {
					given++
				}
			}
			if given != 1 {
				return usagef("name one: a kernel, --all or --token TOKEN")
			}
			return a.with(func(c *client.Client) error {
				resp, err := c.Secrets.GrantSecret(cmd.Context(), connect.NewRequest(&posternv1.GrantSecretRequest{
					Ref: f.ref(args[0]), KernelId: kernel, All: all, Token: token, Remove: remove,
				}))
				if err != nil {
					return err
				}
				if remove {
					a.deliveries(resp.Msg.Kernels, "kernel %s on %s is up to date")
					return a.done(resp.Msg, "the grant of secret %s (%s) is taken back", args[0], secretScope(resp.Msg.Ref))
				}
				a.deliveries(resp.Msg.Kernels, "kernel %s on %s has it")
				return a.done(resp.Msg, "secret %s (%s) is granted", args[0], secretScope(resp.Msg.Ref))
			})
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVar(&f.host, "host", false, "the secret that hosts read from Vault under that name")
	cmd.MarkFlagsMutuallyExclusive("workspace", "organization", "host")
	cmd.Flags().StringVar(&kernel, "kernel", "", "the kernel, as an argument names it, too")
	cmd.Flags().BoolVar(&all, "all", false, "all of one's own kernels, those to come too")
	cmd.Flags().StringVar(&token, "token", "", "all kernels of a token, by id or name")
	cmd.Flags().BoolVar(&remove, "remove", false, "take the grant back")
	cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		if len(args) == 1 {
			return a.completeKernels(cmd, nil, toComplete)
		}
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return cmd
}
