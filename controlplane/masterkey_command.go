package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/controlplane/masterkey"
	"github.com/postern-dev/postern/proto"
)

// masterKeyCommand changes files of master keys that the control plane cannot write, such as secrets of Kubernetes.
func masterKeyCommand() *cobra.Command {
	list := &cobra.Command{
		Use: "list FILE", Short: "List the ids of the keys in a file, the oldest first", Example: "  controlplane master-key list /var/lib/postern/master.key", Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			keys, err := masterkey.Open(args[0])
			if err != nil {
				return err
			}
			for _, id := range keys.IDs() {
				if _, err := fmt.Fprintln(cmd.OutOrStdout(), id); err != nil {
					return err
				}
			}
			return nil
		},
	}
	add := &cobra.Command{
		Use: "add FILE", Short: "Add a new key to a file, and print its id", Example: "  controlplane master-key add master.key", Args: usageArgs(cobra.ExactArgs(1)),
		Long: `Add a new key to a file, and print its id. It seals nothing: bring the file to all control planes of the
installation, and run "postern master-key rotate", which takes the key that is there.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := masterkey.AddTo(args[0])
			if err != nil {
				return proto.Errorf(proto.CodeInvalid, "%w", err)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), id)
			return err
		},
	}
	remove := &cobra.Command{
		Use: "remove FILE KEY", Short: "Take a key out of a file", Example: "  controlplane master-key remove master.key 1", Args: usageArgs(cobra.ExactArgs(2)),
		Long: `Take a key out of a file, for good. Do so only with one that "postern master-key status" calls retired: what
another one has sealed is lost without it.`,
		RunE: func(_ *cobra.Command, args []string) error {
			if err := masterkey.RemoveFrom(args[0], args[1]); err != nil {
				return proto.Errorf(proto.CodeInvalid, "%w", err)
			}
			return nil
		},
	}
	cmd := &cobra.Command{
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cmd.Help() //nolint:errcheck // it only prints
			return usageError{errors.New("a command is missing")}
		},
		Use: "master-key", Short: "Look at and change a file of master keys, without a control plane",
		Long: `Look at and change a file of master keys, without a control plane. "postern master-key rotate" replaces the
master key by itself where the control plane can write DATA/master.key; these commands are for files that it can't
write, such as secrets of Kubernetes.`,
	}
	cmd.AddCommand(list, add, remove)
	return cmd
}
