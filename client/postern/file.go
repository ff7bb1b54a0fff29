package main

import (
	"context"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	protobuf "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func (a *app) fileCommand() *cobra.Command {
	return group("file", "Files in workspaces",
		a.filePutCommand(), a.fileGetCommand(), a.fileCatCommand(), a.fileListCommand(), a.fileMakeDirectoryCommand(), a.fileMoveCommand(), a.fileRemoveCommand(),
		a.fileHistoryCommand(), a.fileRestoreCommand(), a.fileTrashCommand(), a.fileConflictsCommand(), a.fileStatusCommand())
}

// fileArgument reads WORKSPACE:/path.
func fileArgument(text string) (client.FilePath, error) {
	p, err := client.ParseFilePath(text)
	if err != nil {
		return p, &usageError{err}
	}
	return p, nil
}

func (a *app) fileCatCommand() *cobra.Command {
	var version uint64
	cmd := &cobra.Command{
		Use: "cat WORKSPACE:/path", Short: "Print a file's content",
		Example: "  postern file cat research:/README.md", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeFiles(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := fileArgument(args[0])
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				what, err := c.ContentOf(cmd.Context(), p, version)
				if err != nil {
					return err
				}
				return c.ReadContent(cmd.Context(), what, a.stdout, nil)
			})
		},
	}
	cmd.Flags().Uint64Var(&version, "version", 0, "an older `VERSION`: see `postern file history`")
	return cmd
}

func (a *app) fileListCommand() *cobra.Command {
	var long, recursive bool
	cmd := &cobra.Command{
		Use: "ls WORKSPACE[:/path]", Short: "List files",
		Example: "  postern file ls research\n  postern file ls -lr research:/data", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeFiles(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := fileArgument(args[0])
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error { return a.listFiles(cmd.Context(), c, p, long, recursive) })
		},
	}
	cmd.Flags().BoolVarP(&long, "long", "l", false, "with mode, size and time")
	cmd.Flags().BoolVarP(&recursive, "recursive", "r", false, "with all that is below")
	return cmd
}

func (a *app) listFiles(ctx context.Context, c *client.Client, p client.FilePath, long, recursive bool) error {
	info, err := c.GetFile(ctx, p)
	if err != nil {
		return err
	}
	list, names := []*posternv1.FileInfo{}, []string{}
	prefix := strings.TrimSuffix(p.Path, "/") + "/"
	add := func(f *posternv1.FileInfo, name string) {
		if f.Node.GetType() == posternv1.NodeType_NODE_TYPE_DIRECTORY {
			name += "/"
		}
		list, names = append(list, f), append(names, name)
	}
	if info.Node.GetType() == posternv1.NodeType_NODE_TYPE_DIRECTORY {
		err = c.ListFiles(ctx, p, recursive, func(f *posternv1.FileInfo) error {
			add(f, strings.TrimPrefix(string(f.Path), prefix))
			return nil
		})
	} else {
		add(info, p.Base())
	}
	if err != nil {
		return err
	}
	if a.output == "json" {
		return printList(a, list, nil, nil)
	}
	if !long {
		for _, name := range names {
			if _, err := fmt.Fprintln(a.stdout, safe(name)); err != nil {
				return err
			}
		}
		return nil
	}
	i := 0
	return printList(a, list, []string{"MODE", "SIZE", "MODIFIED", "VERSION", "NAME"}, func(f *posternv1.FileInfo) []string {
		n, name := f.Node, names[i]
		i++
		if n.GetType() == posternv1.NodeType_NODE_TYPE_SYMLINK {
			name += " -> " + string(n.Target)
		}
		return []string{modeText(n), strconv.FormatUint(n.GetSize(), 10), time.Unix(0, n.GetMtimeNs()).UTC().Format(time.RFC3339), numberOr(n.GetVersion(), "-"), name}
	})
}

// modeText is a mode as ls prints it.
func modeText(n *posternv1.Node) string {
	m := fs.FileMode(n.GetMode() & 0o777)
	switch n.GetType() {
	case posternv1.NodeType_NODE_TYPE_DIRECTORY:
		m |= fs.ModeDir
	case posternv1.NodeType_NODE_TYPE_SYMLINK:
		m |= fs.ModeSymlink
	}
	return m.String()
}

func numberOr(n uint64, other string) string {
	if n == 0 {
		return other
	}
	return strconv.FormatUint(n, 10)
}

func (a *app) fileMakeDirectoryCommand() *cobra.Command {
	var parents bool
	cmd := &cobra.Command{
		Use: "mkdir WORKSPACE:/path", Short: "Make a directory",
		Example: "  postern file mkdir -p research:/data/2026", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeFiles(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := fileArgument(args[0])
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				r := &posternv1.MakeDirectoryRequest{Workspace: p.Workspace, Path: []byte(p.Path), Parents: parents}
				resp, err := c.Files.MakeDirectory(cmd.Context(), connect.NewRequest(r))
				if err != nil {
					return err
				}
				return a.quiet(resp.Msg)
			})
		},
	}
	cmd.Flags().BoolVarP(&parents, "parents", "p", false, "with the directories above it; no error if it is there")
	return cmd
}

// quiet prints an object as JSON if that was asked for, and nothing otherwise.
func (a *app) quiet(object protobuf.Message) error {
	if a.output == "json" {
		return a.printJSON(object)
	}
	return nil
}

func (a *app) fileMoveCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "mv WORKSPACE:/from WORKSPACE:/to", Short: "Rename or move a file or directory within a workspace",
		Long:    "Rename or move a file or directory within a workspace; into TO if that is a directory. Its versions go along.",
		Example: "  postern file mv research:/draft.ipynb research:/final.ipynb", Args: cobra.ExactArgs(2), ValidArgsFunction: a.completeFiles(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			from, err := fileArgument(args[0])
			if err != nil {
				return err
			}
			to, err := fileArgument(args[1])
			if err != nil {
				return err
			}
			if from.Workspace != to.Workspace {
				return usagef("%s and %s are two workspaces: use `postern file get` and `put`", from.Workspace, to.Workspace)
			}
			return a.with(func(c *client.Client) error {
				there, err := c.GetFile(cmd.Context(), to)
				switch {
				case err == nil && there.Node.GetType() == posternv1.NodeType_NODE_TYPE_DIRECTORY && from.Path != to.Path:
					to = to.Join(from.Base())
				case err == nil && strings.HasSuffix(args[1], "/"):
					return usagef("%s is not a directory", to)
				case err != nil && proto.CodeOf(err) != proto.CodeNotFound:
					return err
				}
				r := &posternv1.MoveFileRequest{Workspace: from.Workspace, From: []byte(from.Path), To: []byte(to.Path), Replace: force}
				resp, err := c.Files.MoveFile(cmd.Context(), connect.NewRequest(r))
				if err != nil {
					return err
				}
				return a.quiet(resp.Msg)
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "replace a file that is there; it goes into the trash")
	return cmd
}

func (a *app) fileRemoveCommand() *cobra.Command {
	var recursive bool
	cmd := &cobra.Command{
		Use: "rm WORKSPACE:/path...", Short: "Put files into the trash",
		Long:    "Put files, or directories with -r, into the workspace's trash: `postern file trash` lists it, `postern file restore` brings them back.",
		Example: "  postern file rm research:/old.csv\n  postern file rm -r research:/tmp", Args: cobra.MinimumNArgs(1), ValidArgsFunction: a.completeFiles(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			var paths []client.FilePath
			for _, arg := range args {
				p, err := fileArgument(arg)
				if err != nil {
					return err
				}
				if p.Path == "/" {
					return usagef("%s is the whole workspace: use `postern workspace rm`", p)
				}
				paths = append(paths, p)
			}
			return a.with(func(c *client.Client) error {
				all := &posternv1.RemoveFileResponse{}
				for _, p := range paths {
					r := &posternv1.RemoveFileRequest{Workspace: p.Workspace, Path: []byte(p.Path), Recursive: recursive}
					resp, err := c.Files.RemoveFile(cmd.Context(), connect.NewRequest(r))
					if proto.CodeOf(err) == proto.CodeInvalid && !recursive {
						return usagef("%s: use -r", strings.TrimSuffix(message(err), ": say recursive"))
					}
					if err != nil {
						return err
					}
					all.Files += resp.Msg.Files
				}
				return a.quiet(all)
			})
		},
	}
	cmd.Flags().BoolVarP(&recursive, "recursive", "r", false, "directories with all that is in them")
	return cmd
}

// completeFiles completes WORKSPACE:/path; with local, files of this machine, too.
func (a *app) completeFiles(local bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
		names, _ := a.complete(cmd, nil, func(ctx context.Context, c *client.Client) ([]string, error) {
			if !strings.Contains(typed, ":") {
				resp, err := c.Files.ListWorkspaces(ctx, connect.NewRequest(&posternv1.ListWorkspacesRequest{}))
				var names []string
				for _, w := range workspacesOf(resp) {
					names = append(names, safe(w.Name)+":/")
				}
				return names, err
			}
			p, err := client.ParseFilePath(typed[:strings.LastIndexAny(typed, "/:")+1])
			if err != nil {
				return nil, err
			}
			var names []string
			err = c.ListFiles(ctx, p, false, func(f *posternv1.FileInfo) error {
				name := p.Workspace + ":" + string(f.Path)
				if f.Node.GetType() == posternv1.NodeType_NODE_TYPE_DIRECTORY {
					name += "/"
				}
				if safe(name) == name {
					names = append(names, name)
				}
				if len(names) == maxCompletions {
					return errEnough
				}
				return nil
			})
			if err == errEnough { //nolint:errorlint // our own
				err = nil
			}
			return names, err
		})
		directive := cobra.ShellCompDirectiveNoSpace
		if !local || strings.Contains(typed, ":") {
			directive |= cobra.ShellCompDirectiveNoFileComp
		}
		return names, directive
	}
}

// maxCompletions bounds what a press of the tab key lists.
const maxCompletions = 1000

var errEnough = fmt.Errorf("enough")

func workspacesOf(r *connect.Response[posternv1.ListWorkspacesResponse]) []*posternv1.Workspace {
	if r == nil {
		return nil
	}
	return r.Msg.Workspaces
}
