package main

import (
	"fmt"
	"strconv"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func (a *app) fileHistoryCommand() *cobra.Command {
	return &cobra.Command{
		Use: "history WORKSPACE:/path", Short: "List a file's versions, the newest first",
		Example: "  postern file history research:/notes.md", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeFiles(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := fileArgument(args[0])
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				resp, err := c.Files.ListFileVersions(cmd.Context(), connect.NewRequest(&posternv1.FileRequest{Workspace: p.Workspace, Path: []byte(p.Path)}))
				if err != nil {
					return err
				}
				return printList(a, resp.Msg.Versions, []string{"VERSION", "TIME", "SIZE", "BY", "BASED ON", "CHECKSUM", ""}, func(v *posternv1.FileVersion) []string {
					current := ""
					if v.Current {
						current = "current"
					}
					return []string{strconv.FormatUint(v.Version, 10), timeText(v.Created), sizeText(v.Size), v.By, numberOr(v.BaseVersion, "-"), clipped(v.Etag, 12), current}
				})
			})
		},
	}
}

func clipped(s string, n int) string { return s[:min(n, len(s))] }

func (a *app) fileRestoreCommand() *cobra.Command {
	r := &posternv1.RestoreFileRequest{}
	cmd := &cobra.Command{
		Use: "restore WORKSPACE:/path", Short: "Make an older version the newest, or bring a file back from the trash",
		Long: `With --version, make that version of the file the newest one; the others stay. Without it, bring back what was at that
path last from the trash, or with --trash-id what ` + "`postern file trash`" + ` names so. What is there now is never overwritten.`,
		Example: "  postern file restore research:/notes.md --version 12\n  postern file restore research:/old.csv",
		Args:    cobra.ExactArgs(1), ValidArgsFunction: a.completeFiles(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := fileArgument(args[0])
			if err != nil {
				return err
			}
			r.Workspace, r.Path = p.Workspace, []byte(p.Path)
			return a.with(func(c *client.Client) error {
				resp, err := c.Files.RestoreFile(cmd.Context(), connect.NewRequest(r))
				if err != nil {
					return err
				}
				return a.done(resp.Msg, "%s is restored", client.FilePath{Workspace: p.Workspace, Path: string(resp.Msg.Path)})
			})
		},
	}
	cmd.Flags().Uint64Var(&r.Version, "version", 0, "the `VERSION` that becomes the newest: see `postern file history`")
	cmd.Flags().Uint64Var(&r.TrashId, "trash-id", 0, "the `ID` of `postern file trash`, if the path alone is not clear")
	cmd.MarkFlagsMutuallyExclusive("version", "trash-id")
	return cmd
}

func (a *app) fileTrashCommand() *cobra.Command {
	var empty bool
	var remove uint64
	cmd := &cobra.Command{
		Use: "trash WORKSPACE", Short: "List what was removed from a workspace, or delete it for good",
		Example: "  postern file trash research\n  postern file trash research --delete 41\n  postern file trash research --empty",
		Args:    cobra.ExactArgs(1), ValidArgsFunction: a.completeWorkspaces,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := workspaceArgument(args[0])
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				if empty || cmd.Flags().Changed("delete") {
					resp, err := c.Files.EmptyTrash(cmd.Context(), connect.NewRequest(&posternv1.EmptyTrashRequest{Workspace: name, TrashId: remove}))
					if err != nil {
						return err
					}
					return a.done(resp.Msg, "%s entries are deleted for good", grouped(int64(resp.Msg.Entries)))
				}
				var entries []*posternv1.TrashEntry
				r := &posternv1.ListTrashRequest{Workspace: name}
				for {
					resp, err := c.Files.ListTrash(cmd.Context(), connect.NewRequest(r))
					if err != nil {
						return err
					}
					entries = append(entries, resp.Msg.Entries...)
					if r.PageToken = resp.Msg.NextPageToken; len(r.PageToken) == 0 {
						break
					}
				}
				return printList(a, entries, []string{"ID", "REMOVED", "BY", "FILES", "SIZE", "KEPT UNTIL", "PATH"}, func(t *posternv1.TrashEntry) []string {
					return []string{strconv.FormatUint(t.TrashId, 10), timeText(t.Removed), t.By, strconv.FormatUint(t.Files, 10), sizeText(t.Bytes), timeText(t.Expires), string(t.Path)}
				})
			})
		},
	}
	cmd.Flags().BoolVar(&empty, "empty", false, "delete all of it for good")
	cmd.Flags().Uint64Var(&remove, "delete", 0, "delete the entry with that `ID` for good")
	cmd.MarkFlagsMutuallyExclusive("empty", "delete")
	return cmd
}

func (a *app) fileConflictsCommand() *cobra.Command {
	return &cobra.Command{
		Use: "conflicts WORKSPACE", Short: "List what was changed in two places at once, and where both are kept",
		Example: "  postern file conflicts research", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeWorkspaces,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := workspaceArgument(args[0])
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				resp, err := c.Files.ListConflicts(cmd.Context(), connect.NewRequest(&posternv1.WorkspaceRequest{Workspace: name}))
				if err != nil {
					return err
				}
				return printList(a, resp.Msg.Conflicts, []string{"TIME", "AGENT", "PATH", "KEPT AS"}, func(c *posternv1.FileConflict) []string {
					return []string{nanoText(c.TimeNs), firstOf(c.Agent, "-"), string(c.Path), string(c.KeptAs)}
				})
			})
		},
	}
}

func (a *app) fileStatusCommand() *cobra.Command {
	return &cobra.Command{
		Use: "status [WORKSPACE]", Short: "Say where workspaces are mounted, and what is not yet uploaded from there",
		Long: `List where workspaces are mounted, and what lies on those hosts that is not yet in the control plane. Of a host that is
offline it is what it said last.`,
		Example: "  postern file status\n  postern file status research -o json", Args: cobra.MaximumNArgs(1), ValidArgsFunction: a.completeWorkspaces,
		RunE: func(cmd *cobra.Command, args []string) error {
			r := &posternv1.GetFileStatusRequest{}
			if len(args) > 0 {
				name, err := workspaceArgument(args[0])
				if err != nil {
					return err
				}
				r.Workspace = name
			}
			return a.with(func(c *client.Client) error {
				resp, err := c.Files.GetFileStatus(cmd.Context(), connect.NewRequest(r))
				if err != nil {
					return err
				}
				for _, name := range resp.Msg.Silent {
					a.info("agent %s is online and did not answer", safe(name))
				}
				if err := printList(a, resp.Msg.Mounts, []string{"AGENT", "WORKSPACE", "MODE", "ONLINE", "UNSENT", "SIZE", "OLDEST", "WHERE"}, func(m *posternv1.MountStatus) []string {
					mode, online := "rw", "yes"
					if m.ReadOnly {
						mode = "ro"
					}
					if !m.Online {
						online = "no, as of " + timeText(m.AsOf)
					}
					where := strings.Join(m.Targets, ", ")
					if n := len(m.Kernels); n > 0 {
						where = strings.TrimPrefix(where+fmt.Sprintf(", %d kernels", n), ", ")
					}
					return []string{m.Agent, m.Workspace, mode, online, grouped(int64(m.UnsentOps)), sizeText(m.UnsentBytes), timeText(m.OldestUnsent), firstOf(where, "-")}
				}); err != nil || a.output == "json" {
					return err
				}
				for _, m := range resp.Msg.Mounts {
					for _, path := range m.UnsentPaths {
						a.info("not yet sent: %s on %s", safe(m.Workspace+":"+string(path)), safe(m.Agent))
					}
					if m.LastError != "" {
						a.info("uploads of %s on %s stand still: %s", safe(m.Workspace), safe(m.Agent), safe(m.LastError))
					}
					for _, c := range m.Conflicts {
						a.info("conflict in %s: %s is kept as %s", safe(m.Workspace), safe(string(c.Path)), safe(string(c.KeptAs)))
					}
				}
				return nil
			})
		},
	}
}

// workspaceArgument reads WORKSPACE, also written as WORKSPACE: or WORKSPACE:/.
func workspaceArgument(text string) (string, error) {
	p, err := fileArgument(text)
	if err != nil {
		return "", err
	}
	if p.Path != "/" {
		return "", usagef("%s is a path: name the workspace alone, %s", text, p.Workspace)
	}
	return p.Workspace, nil
}
