// Command controlplane is the server that people and programs talk to. Hosts
// dial it; it never dials a host and never holds a customer database's
// credentials. `controlplane serve` runs it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/clidoc"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := command().ExecuteContext(ctx)
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "controlplane:", err)
	var usage usageError
	if errors.As(err, &usage) {
		os.Exit(proto.ExitUsage)
	}
	os.Exit(proto.ExitCode(err))
}

// usageError is a mistake on the command line.
type usageError struct{ error }

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "controlplane",
		Short:         "The server that Postern's agents dial and its users talk to",
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cmd.Help() //nolint:errcheck // it only prints
			return usageError{errors.New("a command is missing")}
		},
		Args: usageArgs(cobra.NoArgs),
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(serveCommand(), drainCommand(), logLevelCommand(), masterKeyCommand(), clidoc.ManCommand(root, "8", proto.Software()), &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "controlplane", proto.Software())
			return err
		},
	})
	return root
}

// usageArgs makes a mistake in the arguments a usage error.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usageError{err}
		}
		return nil
	}
}
