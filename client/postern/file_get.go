package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// fileGet is one `postern file get`.
type fileGet struct {
	*transfer
	c        *client.Client
	version  uint64
	recurse  bool
	checksum bool
	archive  string
}

func (a *app) fileGetCommand() *cobra.Command {
	g := &fileGet{}
	cmd := &cobra.Command{
		Use: "get WORKSPACE:/path [FILE]", Short: "Get files out of a workspace",
		Long: `Get a file, or a directory with -r. Without FILE it goes into the current directory under its own name; - is stdout.
A file is replaced when all of it has come and its checksum is right. After a broken transfer the same command goes on
where it was. With -r, files of the same size and time are left as they are; --checksum compares contents instead.
Modes, times and symbolic links are kept; nothing is written outside of FILE, whatever is in the workspace.`,
		Example: "  postern file get research:/data/x.parquet\n  postern file get -r research:/notebooks backup\n  postern file get research:/ --format tar - | zstd > research.tar.zst",
		Args:    cobra.RangeArgs(1, 2), ValidArgsFunction: a.completeFiles(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			from, err := client.ParseFilePath(args[0])
			if err != nil {
				return &usageError{err}
			}
			to := firstOf(append(args[1:], ".")...)
			switch {
			case g.archive != "" && g.archive != "tar" && g.archive != "zip":
				return usagef("unknown format %q: choose tar or zip", g.archive)
			case g.archive != "" && (g.version != 0 || g.recurse || g.checksum):
				return usagef("--format goes with none of -r, --version and --checksum")
			}
			return a.with(func(c *client.Client) error {
				g.c = c
				g.transfer = a.newTransfer(cmd.Context(), to == "-" && isTerminal(a.stdout))
				defer g.line.stop()
				if g.archive != "" {
					return g.getArchive(from, to)
				}
				return g.run(from, to)
			})
		},
	}
	cmd.Flags().BoolVarP(&g.recurse, "recursive", "r", false, "a directory with all that is in it")
	cmd.Flags().BoolVar(&g.checksum, "checksum", false, "compare contents, not sizes and times, with what is there")
	cmd.Flags().Uint64Var(&g.version, "version", 0, "an older `VERSION` of a file: see `postern file history`")
	cmd.Flags().StringVar(&g.archive, "format", "", "one archive of a file or directory: tar or zip")
	cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"tar", "zip"}, cobra.ShellCompDirectiveNoFileComp)) //nolint:errcheck // fails on unknown flags alone
	return cmd
}

func (g *fileGet) run(from client.FilePath, to string) error {
	info, err := g.c.GetFile(g.ctx, from)
	if err != nil && (g.version == 0 || proto.CodeOf(err) != proto.CodeNotFound) {
		return err
	}
	if info.GetNode().GetType() == posternv1.NodeType_NODE_TYPE_DIRECTORY {
		switch {
		case !g.recurse:
			return usagef("%s is a directory: use -r, or --format tar", from)
		case to == "-":
			return usagef("a directory can't go to stdout: use --format tar")
		}
		return g.tree(from, to)
	}
	if info.GetNode().GetType() == posternv1.NodeType_NODE_TYPE_SYMLINK {
		return proto.Errorf(proto.CodeInvalid, "%s is a symbolic link to %q, which is not followed", from, info.Node.Target)
	}
	what, err := g.c.ContentOf(g.ctx, from, g.version)
	if err != nil {
		return err
	}
	g.total.Add(int64(what.Size))
	if to == "-" {
		g.do(from.String(), func(ctx context.Context) error {
			return g.c.ReadContent(ctx, what, g.line.writer(g.app.stdout), g.moved)
		})
		return g.wait()
	}
	dir, name, err := place(to, from.Base())
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // nothing is written to it
	node := info.GetNode()
	if g.version != 0 {
		node = nil // its times and mode are the newest's
	}
	g.do(from.String(), func(ctx context.Context) error { return g.c.Download(ctx, what, root, name, node, g.moved) })
	return g.wait()
}

func (g *fileGet) moved(n int64) { g.bytes.Add(n) }

// place is the directory and name that FILE means for something with that name.
func place(to, name string) (dir, base string, err error) {
	info, err := os.Stat(to)
	switch {
	case err == nil && info.IsDir():
		if name == "" {
			return to, ".", nil
		}
		return to, name, nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return "", "", err
	case err != nil && strings.HasSuffix(to, "/"):
		return "", "", fmt.Errorf("%s: no such directory", to)
	}
	return filepath.Dir(to), filepath.Base(to), nil
}

// tree gets a directory and what is in it.
func (g *fileGet) tree(from client.FilePath, to string) error {
	dir, name, err := place(to, from.Base())
	if err != nil {
		return err
	}
	to = filepath.Join(dir, name)
	if err := os.MkdirAll(to, 0o777); err != nil {
		return err
	}
	root, err := os.OpenRoot(to)
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // nothing is written to it
	prefix := strings.TrimSuffix(from.Path, "/") + "/"
	type late struct {
		name string
		node *posternv1.Node
	}
	var links, directories []late // after the files: nothing is written through a link, or into a directory that is read-only
	err = g.c.ListFiles(g.ctx, from, true, func(f *posternv1.FileInfo) error {
		rel, below := strings.CutPrefix(string(f.Path), prefix)
		if !below || !fs.ValidPath(strings.ToValidUTF8(rel, "_")) || rel == "." || strings.ContainsRune(rel, 0) {
			return proto.Errorf(proto.CodeInvalid, "the control plane names %q below %s: it is refused", f.Path, from)
		}
		switch f.Node.GetType() {
		case posternv1.NodeType_NODE_TYPE_DIRECTORY:
			directories = append(directories, late{rel, f.Node})
			return root.MkdirAll(rel, 0o777)
		case posternv1.NodeType_NODE_TYPE_SYMLINK:
			links = append(links, late{rel, f.Node})
		case posternv1.NodeType_NODE_TYPE_FILE:
			g.file(from, f, root, rel)
		default:
			g.totalFiles.Add(1)
			return g.fail(string(f.Path), fmt.Errorf("is of a kind that this postern does not know (%d)", f.Node.GetType()))
		}
		return nil
	})
	if err != nil {
		g.group.Go(func() error { return err })
	}
	if err := g.group.Wait(); err != nil {
		return err
	}
	for _, l := range links {
		g.totalFiles.Add(1)
		if err := putLink(root, l.name, string(l.node.Target)); err != nil {
			if err := g.fail(l.name, err); err != nil {
				return err
			}
			continue
		}
		g.files.Add(1)
	}
	for i := len(directories) - 1; i >= 0; i-- {
		if err := root.Chmod(directories[i].name, fs.FileMode(directories[i].node.Mode&0o777)); err != nil {
			return err
		}
	}
	if err := g.wait(); err != nil {
		return err
	}
	g.app.info("%s files, %s; %s files were there", grouped(g.files.Load()), sizeText(uint64(g.bytes.Load())), grouped(g.same.Load()))
	return nil
}

// file gets one file of a tree.
func (g *fileGet) file(from client.FilePath, f *posternv1.FileInfo, root *os.Root, name string) {
	g.total.Add(int64(f.Node.Size))
	what, err := client.ContentIn(client.FilePath{Workspace: from.Workspace, Path: string(f.Path)}, f)
	g.do(name, func(ctx context.Context) error {
		if err != nil {
			return err
		}
		if local, err := root.Lstat(name); err == nil && local.Mode().IsRegular() && local.Size() == int64(f.Node.Size) {
			same := local.ModTime().UnixNano() == f.Node.MtimeNs
			if g.checksum {
				etag, err := etagOf(filepath.Join(root.Name(), name))
				if err != nil {
					return err
				}
				same = etag == f.Etag
			}
			if same {
				g.same.Add(1)
				g.moved(local.Size())
				return nil
			}
		}
		return g.c.Download(ctx, what, root, name, f.Node, g.moved)
	})
}

// putLink makes a symbolic link; one that is there is replaced, a file is not.
func putLink(root *os.Root, name, target string) error {
	if have, err := root.Readlink(name); err == nil {
		if have == target {
			return nil
		}
		if err := root.Remove(name); err != nil {
			return err
		}
	}
	return root.Symlink(target, name)
}

// getArchive gets one tar or zip file.
func (g *fileGet) getArchive(from client.FilePath, to string) error {
	copyTo := func(w io.Writer) error {
		g.do(from.String(), func(ctx context.Context) error {
			return g.c.Archive(ctx, from, g.archive, io.MultiWriter(w, writerFunc(func(p []byte) (int, error) {
				g.moved(int64(len(p)))
				g.total.Add(int64(len(p)))
				return len(p), nil
			})))
		})
		return g.wait()
	}
	if to == "-" {
		if isTerminal(g.app.stdout) {
			return usagef("an archive is nothing for a terminal: name a file")
		}
		return copyTo(g.app.stdout)
	}
	dir, name, err := place(to, firstOf(from.Base(), from.Workspace)+"."+g.archive)
	if err != nil {
		return err
	}
	name = path.Join(dir, name)
	f, err := os.CreateTemp(dir, ".postern-*.part")
	if err != nil {
		return err
	}
	err = errors.Join(copyTo(f), f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		os.Remove(f.Name()) //nolint:errcheck // the other error says more
	}
	return err
}
