package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/client"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func (a *app) workspaceCommand() *cobra.Command {
	return group("workspace", "Workspaces: named file trees that hosts can mount",
		a.workspaceListCommand(), a.workspaceShowCommand(), a.workspaceCreateCommand(), a.workspaceSetCommand(), a.workspaceRemoveCommand(), a.snapshotCommand(), a.fileKeyCommand())
}

func (a *app) workspaceListCommand() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List workspaces", Example: "  postern workspace list", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Files.ListWorkspaces(cmd.Context(), connect.NewRequest(&posternv1.ListWorkspacesRequest{}))
				if err != nil {
					return err
				}
				return printList(a, resp.Msg.Workspaces, []string{"NAME", "FILES", "SIZE", "KEPT", "QUOTA", "AGENTS", "CREATED"}, func(w *posternv1.Workspace) []string {
					return []string{w.Name, grouped(int64(w.Nodes)), sizeText(w.UsedBytes), sizeText(w.KeptBytes), quotaText(w), firstOf(strings.Join(w.Agents, ","), "all"), timeText(w.Created)}
				})
			})
		},
	}
}

func quotaText(w *posternv1.Workspace) string {
	var parts []string
	if w.QuotaBytes > 0 {
		parts = append(parts, sizeText(w.QuotaBytes))
	}
	if w.QuotaNodes > 0 {
		parts = append(parts, grouped(int64(w.QuotaNodes))+" files")
	}
	return firstOf(strings.Join(parts, ", "), "-")
}

func (a *app) showWorkspace(w *posternv1.Workspace) error {
	if a.output == "json" {
		return a.printJSON(w)
	}
	return a.printFields(
		[2]string{"id", w.Id}, [2]string{"name", w.Name}, [2]string{"created", timeText(w.Created)},
		[2]string{"files", grouped(int64(w.Nodes))}, [2]string{"size", sizeText(w.UsedBytes)},
		[2]string{"kept", sizeText(w.KeptBytes) + " with old versions, trash and snapshots"},
		[2]string{"quota", quotaText(w)}, [2]string{"agents", firstOf(strings.Join(w.Agents, ", "), "all")},
		[2]string{"versions", fmt.Sprintf("%d, for %s", w.KeepVersions, durationText(w.KeepFor))},
	)
}

func (a *app) workspaceShowCommand() *cobra.Command {
	return &cobra.Command{
		Use: "show WORKSPACE", Short: "Show a workspace's size and limits", Example: "  postern workspace show research",
		Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeWorkspaces,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Files.GetWorkspace(cmd.Context(), connect.NewRequest(&posternv1.WorkspaceRequest{Workspace: args[0]}))
				if err != nil {
					return err
				}
				return a.showWorkspace(resp.Msg)
			})
		},
	}
}

func (a *app) workspaceCreateCommand() *cobra.Command {
	return &cobra.Command{
		Use: "create WORKSPACE", Short: "Make a workspace", Example: "  postern workspace create research", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Files.CreateWorkspace(cmd.Context(), connect.NewRequest(&posternv1.CreateWorkspaceRequest{Name: args[0]}))
				if err != nil {
					return err
				}
				return a.done(resp.Msg, "%s", resp.Msg.Id)
			})
		},
	}
}

func (a *app) workspaceSetCommand() *cobra.Command {
	var quota string
	var files uint64
	var versions uint32
	var keep time.Duration
	var agents []string
	var all bool
	cmd := &cobra.Command{
		Use: "set WORKSPACE", Short: "Set a workspace's limits, and which hosts may mount it",
		Example: "  postern workspace set research --quota 50GiB --max-files 1000000\n  postern workspace set research --agent db1 --agent db2\n  postern workspace set research --keep-versions 20 --keep-for 720h",
		Args:    cobra.ExactArgs(1), ValidArgsFunction: a.completeWorkspaces,
		RunE: func(cmd *cobra.Command, args []string) error {
			r := &posternv1.UpdateWorkspaceRequest{Workspace: args[0], SetAgents: all || len(agents) > 0, Agents: agents}
			set := cmd.Flags().Changed
			if set("quota") {
				n, err := parseSize(quota)
				if err != nil {
					return &usageError{err}
				}
				r.QuotaBytes = &n
			}
			if set("max-files") {
				r.QuotaNodes = &files
			}
			if set("keep-versions") {
				r.KeepVersions = &versions
			}
			if set("keep-for") {
				r.KeepFor = durationpb.New(keep)
			}
			if r.QuotaBytes == nil && r.QuotaNodes == nil && r.KeepVersions == nil && r.KeepFor == nil && !r.SetAgents {
				return usagef("nothing to set: name a flag")
			}
			return a.with(func(c *client.Client) error {
				resp, err := c.Files.UpdateWorkspace(cmd.Context(), connect.NewRequest(r))
				if err != nil {
					return err
				}
				return a.showWorkspace(resp.Msg)
			})
		},
	}
	cmd.Flags().StringVar(&quota, "quota", "", "how large it may get, such as 50GiB; 0: no limit")
	cmd.Flags().Uint64Var(&files, "max-files", 0, "how many files and directories it may have; 0: no limit")
	cmd.Flags().Uint32Var(&versions, "keep-versions", 0, "how many older versions of each file are kept")
	cmd.Flags().DurationVar(&keep, "keep-for", 0, "how long older versions and the trash are kept")
	cmd.Flags().StringArrayVar(&agents, "agent", nil, "only the `AGENT`s named so may mount it (repeatable)")
	cmd.Flags().BoolVar(&all, "all-agents", false, "every agent of the organization may mount it")
	cmd.MarkFlagsMutuallyExclusive("agent", "all-agents")
	cmd.RegisterFlagCompletionFunc("agent", func(cmd *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) { //nolint:errcheck // fails on unknown flags alone
		return a.completeAgents(cmd, nil, typed)
	})
	return cmd
}

// parseSize reads bytes, with a unit of KiB, MiB, GiB or TiB if any.
func parseSize(text string) (uint64, error) {
	number, shift := text, 0
	for i, unit := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if rest, ok := strings.CutSuffix(text, unit); ok {
			number, shift = rest, 10*(i+1)
		}
	}
	n, err := strconv.ParseUint(strings.TrimSpace(number), 10, 64)
	if err != nil || n > (1<<62)>>shift {
		return 0, fmt.Errorf("%q is no size: write bytes, or a number with KiB, MiB, GiB or TiB", text)
	}
	return n << shift, nil
}

func (a *app) workspaceRemoveCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "rm WORKSPACE", Short: "Delete a workspace for good, with its versions, trash and snapshots",
		Long:    "Delete a workspace for good, with its versions, trash and snapshots. It is refused while a host has writes that are not uploaded, unless --force.",
		Example: "  postern workspace rm scratch", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeWorkspaces,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Files.DeleteWorkspace(cmd.Context(), connect.NewRequest(&posternv1.DeleteWorkspaceRequest{Workspace: args[0], Force: force}))
				if err != nil {
					return err
				}
				return a.done(resp.Msg, "workspace %s is deleted", args[0])
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also if hosts have writes in it that are not uploaded: they are lost")
	return cmd
}

func (a *app) snapshotCommand() *cobra.Command {
	var path string
	create := &cobra.Command{
		Use: "create WORKSPACE NAME", Short: "Keep the workspace as it is now, and print the snapshot's id", Example: "  postern workspace snapshot create research before-cleanup",
		Args: cobra.ExactArgs(2), ValidArgsFunction: a.completeWorkspaces,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Files.CreateSnapshot(cmd.Context(), connect.NewRequest(&posternv1.CreateSnapshotRequest{Workspace: args[0], Name: args[1]}))
				if err != nil {
					return err
				}
				return a.done(resp.Msg, "%s", resp.Msg.Id)
			})
		},
	}
	list := &cobra.Command{
		Use: "list WORKSPACE", Short: "List a workspace's snapshots", Example: "  postern workspace snapshot list research",
		Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeWorkspaces,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Files.ListSnapshots(cmd.Context(), connect.NewRequest(&posternv1.WorkspaceRequest{Workspace: args[0]}))
				if err != nil {
					return err
				}
				return printList(a, resp.Msg.Snapshots, []string{"ID", "NAME", "CREATED", "BY", "FILES", "SIZE"}, func(s *posternv1.WorkspaceSnapshot) []string {
					return []string{s.Id, s.Name, timeText(s.Created), s.By, grouped(int64(s.Nodes)), sizeText(s.Bytes)}
				})
			})
		},
	}
	restore := &cobra.Command{
		Use: "restore WORKSPACE SNAPSHOT", Short: "Put a workspace, or what is below --path, back to a snapshot",
		Long:    "Put a workspace, or what is below --path, back to a snapshot. What is removed goes into the trash, what is overwritten stays as an older version.",
		Example: "  postern workspace snapshot restore research before-cleanup --path /data",
		Args:    cobra.ExactArgs(2), ValidArgsFunction: a.completeWorkspaces,
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := fileArgument(args[0] + ":" + path)
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				resp, err := c.Files.RestoreSnapshot(cmd.Context(), connect.NewRequest(&posternv1.RestoreSnapshotRequest{Workspace: args[0], Snapshot: args[1], Path: []byte(p.Path)}))
				if err != nil {
					return err
				}
				return a.done(resp.Msg, "%s files are restored, %s removed", grouped(int64(resp.Msg.Restored)), grouped(int64(resp.Msg.Removed)))
			})
		},
	}
	restore.Flags().StringVar(&path, "path", "/", "only what is below it")
	remove := &cobra.Command{
		Use: "rm WORKSPACE SNAPSHOT", Short: "Delete a snapshot", Example: "  postern workspace snapshot rm research before-cleanup",
		Args: cobra.ExactArgs(2), ValidArgsFunction: a.completeWorkspaces,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(c *client.Client) error {
				resp, err := c.Files.DeleteSnapshot(cmd.Context(), connect.NewRequest(&posternv1.SnapshotRequest{Workspace: args[0], Snapshot: args[1]}))
				if err != nil {
					return err
				}
				return a.done(resp.Msg, "snapshot %s is deleted", args[1])
			})
		},
	}
	return group("snapshot", "Snapshots of whole workspaces", create, list, restore, remove)
}

func (a *app) completeWorkspaces(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, args, func(ctx context.Context, c *client.Client) ([]string, error) {
		resp, err := c.Files.ListWorkspaces(ctx, connect.NewRequest(&posternv1.ListWorkspacesRequest{}))
		if err != nil {
			return nil, err
		}
		var names []string
		for _, w := range resp.Msg.Workspaces {
			names = append(names, safe(w.Name)+"\t"+grouped(int64(w.Nodes))+" files, "+sizeText(w.UsedBytes))
		}
		return names, nil
	})
}

// nanoText is a time in nanoseconds since 1970, in UTC to the second.
func nanoText(ns int64) string { return time.Unix(0, ns).UTC().Format(time.RFC3339) }
