package main

import (
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func (a *app) masterKeyCommand() *cobra.Command {
	status := &cobra.Command{
		Use: "status", Short: "Show the master keys, how far a rotation is, and what it waits for",
		Example: "  postern master-key status\n  postern master-key status -o json", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.MasterKeys.GetMasterKeyStatus(cmd.Context(), connect.NewRequest(&posternv1.GetMasterKeyStatusRequest{}))
				if err != nil {
					return err
				}
				return a.printMasterKeyStatus(resp.Msg)
			})
		},
	}
	rotate := &cobra.Command{
		Use: "rotate", Short: "Replace the control plane's master key, with nothing ended",
		Long: `Replace the control plane's master key, DATA/master.key, with nothing ended.

A new key is made and brought to all control planes of the installation. When all of them have it, it
seals; what the old one sealed (the CA's key, secrets, kept rows, keys of files) is sealed anew, and the
old one is taken out of the files when nothing is sealed by it. The command returns at once: see how far
it is with "postern master-key status", which also says what holds it up. If it is run again meanwhile it
changes nothing; "postern master-key cancel" calls it off as long as the new key seals nothing.

Back up DATA/master.key again when it is done. The contents of files are sealed with keys of their own:
"postern workspace key rotate".`,
		Example: "  postern master-key rotate\n  postern master-key status", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.MasterKeys.RotateMasterKey(cmd.Context(), connect.NewRequest(&posternv1.RotateMasterKeyRequest{}))
				if err != nil {
					return err
				}
				return a.printMasterKeyStatus(resp.Msg)
			})
		},
	}
	cancel := &cobra.Command{
		Use: "cancel", Short: "Call off a rotation whose new key seals nothing yet",
		Long: `Call off a rotation whose new key seals nothing yet: "postern master-key status" says "announced". The
control planes take the new key out of their files, and the old one goes on sealing.

Once the new key seals, a rotation can only go on: the command is refused, and "postern master-key
status" says what it waits for.`,
		Example: "  postern master-key cancel", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.MasterKeys.CancelMasterKeyRotation(cmd.Context(), connect.NewRequest(&posternv1.CancelMasterKeyRotationRequest{}))
				if err != nil {
					return err
				}
				return a.printMasterKeyStatus(resp.Msg)
			})
		},
	}
	return group("master-key", "Show and replace the control plane's master key", status, rotate, cancel)
}

// printMasterKeyStatus prints how far a rotation is.
func (a *app) printMasterKeyStatus(s *posternv1.MasterKeyStatus) error {
	if a.output == "json" {
		return a.printJSON(s)
	}
	var left []string
	for _, one := range s.Left {
		left = append(left, fmt.Sprintf("%s %s", grouped(int64(one.Count)), one.Kind))
	}
	rest := ""
	if len(left) > 0 {
		rest = "; sealed by others than the newest: " + strings.Join(left, ", ")
	}
	text := ""
	switch s.Stage {
	case "stable":
		text = "no rotation is under way\n"
	case "announced":
		text = fmt.Sprintf("the new key is announced, and seals from %s on, if all control planes have it\n", timeText(s.TakesOver))
	case "sealing":
		text = "the new key seals; what older ones sealed is sealed anew" + rest + "\n"
	default:
		text = "nothing is sealed by the old key any more; it goes in a moment\n"
	}
	if s.Began != nil {
		text += fmt.Sprintf("it began %s, and moved last %s\n", timeText(s.Began), timeText(s.Moved))
	}
	for _, w := range s.Waits {
		text += fmt.Sprintf("waits since %s: %s\n", timeText(w.Since), w.What)
	}
	if _, err := fmt.Fprint(a.stdout, text); err != nil {
		return err
	}
	if err := printList(a, s.Keys, []string{"KEY", "STATE", "MADE", "SINCE"}, func(k *posternv1.MasterKey) []string {
		return []string{k.Id, k.State, timeText(k.Made), timeText(k.Since)}
	}); err != nil {
		return err
	}
	return printList(a, s.Replicas, []string{"CONTROL PLANE", "HAS", "SEALS WITH", "PROBLEM"}, func(r *posternv1.MasterKeyReplica) []string {
		return []string{r.Name, firstOf(strings.Join(r.Keys, ","), "-"), firstOf(r.Active, "-"), firstOf(r.Problem, "-")}
	})
}

func (a *app) fileKeyCommand() *cobra.Command {
	status := &cobra.Command{
		Use: "status", Short: "Show the keys of the organization's files, and what each still seals",
		Example: "  postern workspace key status", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.FileKeys.GetFileKeyStatus(cmd.Context(), connect.NewRequest(&posternv1.GetFileKeyStatusRequest{}))
				if err != nil {
					return err
				}
				return a.printFileKeyStatus(resp.Msg)
			})
		},
	}
	var force bool
	rotate := &cobra.Command{
		Use: "rotate", Short: "Replace the key that seals the organization's files, with nothing ended",
		Long: `Replace the key that seals the contents of the organization's files, with nothing ended.

What is written from now on is sealed with a new key. What is there already is read, sealed anew and
written again in the background, under other names; mounts, open files, reads and writes go on. The old
key is dropped when it seals nothing any more. The command returns at once: see how far it is with
"postern workspace key status". If it is run again meanwhile it changes nothing.`,
		Example: "  postern workspace key rotate\n  postern workspace key status\n  postern workspace key rotate --force", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.FileKeys.RotateFileKey(cmd.Context(), connect.NewRequest(&posternv1.RotateFileKeyRequest{Force: force}))
				if err != nil {
					return err
				}
				return a.printFileKeyStatus(resp.Msg)
			})
		},
	}
	rotate.Flags().BoolVar(&force, "force", false, "drop the old key although damaged objects are sealed with it: a backup of them can't mend them then")
	return group("key", "The key that seals the contents of the organization's files", status, rotate)
}

// printFileKeyStatus prints how far a rotation is.
func (a *app) printFileKeyStatus(s *posternv1.FileKeyStatus) error {
	if a.output == "json" {
		return a.printJSON(s)
	}
	text := "no rotation is under way\n"
	if s.Stage == "sealing" {
		text = "the newest key seals; what older ones sealed is sealed anew\n"
	}
	if _, err := fmt.Fprint(a.stdout, text); err != nil {
		return err
	}
	return printList(a, s.Keys, []string{"KEY", "MADE", "OBJECTS", "DAMAGED", "SEALED BY MASTER KEY"}, func(k *posternv1.FileKey) []string {
		return []string{fmt.Sprint(k.Generation), timeText(k.Made), grouped(int64(k.Objects)), grouped(int64(k.Damaged)), k.MasterKey}
	})
}
