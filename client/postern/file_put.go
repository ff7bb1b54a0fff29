package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// filePut is one `postern file put`.
type filePut struct {
	*transfer
	c        *client.Client
	up       *client.Uploader
	recurse  bool
	checksum bool
	// there is what the workspace has where a directory goes, by path.
	there map[string]*posternv1.FileInfo
	// small are files that go into one request together.
	small smallFiles
}

// smallFiles are small files of a tree that wait for a request of their own.
type smallFiles struct {
	names    []string
	what     []client.Upload
	contents [][]byte
}

func (a *app) filePutCommand() *cobra.Command {
	p := &filePut{}
	var base uint64
	cmd := &cobra.Command{
		Use: "put FILE... WORKSPACE:/path", Short: "Send files into a workspace",
		Long: `Send files into a workspace; - is stdin. A path that ends in "/" or is a directory gets the files under their
own names. The workspace and directories that are missing are made.

Content that the workspace has already is not sent again: after a broken transfer the same command goes on where
it was. With -r, files of the same size and time are taken for the same; --checksum compares contents instead.
Modes, times and symbolic links are kept.`,
		Example: "  postern file put data.parquet research:/data/\n  postern file put -r notebooks research:/\n  pg_dump shop | postern file put - research:/shop.sql",
		Args:    cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			to, err := client.ParseFilePath(args[len(args)-1])
			if err != nil {
				return &usageError{err}
			}
			return a.with(func(c *client.Client) error {
				p.c, p.up = c, c.NewUploader()
				p.transfer = a.newTransfer(cmd.Context(), false)
				defer p.line.stop()
				p.up.Progress = func(settled, sent int64) { p.bytes.Add(settled); p.sent.Add(sent) }
				var only *uint64
				if cmd.Flags().Changed("base") {
					only = &base
				}
				return p.run(args[:len(args)-1], to, strings.HasSuffix(args[len(args)-1], "/"), only)
			})
		},
		ValidArgsFunction: a.completeFiles(true),
	}
	cmd.Flags().BoolVarP(&p.recurse, "recursive", "r", false, "directories with all that is in them")
	cmd.Flags().BoolVar(&p.checksum, "checksum", false, "compare contents, not sizes and times, with what is there")
	cmd.Flags().Uint64Var(&base, "base", 0, "the `VERSION` that is replaced, 0 for none: if another is there, both are kept")
	return cmd
}

func (p *filePut) run(sources []string, to client.FilePath, into bool, base *uint64) error {
	if err := p.workspace(to.Workspace); err != nil {
		return err
	}
	target, err := p.c.GetFile(p.ctx, to)
	switch {
	case err == nil && target.Node.GetType() == posternv1.NodeType_NODE_TYPE_DIRECTORY:
		into = true
	case err == nil && (into || len(sources) > 1):
		return usagef("%s is not a directory", to)
	case err != nil && proto.CodeOf(err) != proto.CodeNotFound:
		return err
	}
	into = into || len(sources) > 1 || to.Path == "/"
	if base != nil && (into || p.recurse) {
		return usagef("--base is for one file with its full path")
	}
	for _, source := range sources {
		if err := p.source(source, to, into, base); err != nil {
			p.group.Go(func() error { return err }) // the others end
			break
		}
	}
	if err := p.wait(); err != nil {
		return err
	}
	if p.totalFiles.Load() > 1 || p.recurse {
		p.app.info("%s files, %s; %s sent, %s files were there", grouped(p.files.Load()), sizeText(uint64(p.bytes.Load())), sizeText(uint64(p.sent.Load())), grouped(p.same.Load()))
	}
	return nil
}

// workspace makes the workspace if there is none.
func (p *filePut) workspace(name string) error {
	err := client.Slowly(p.ctx, func() error {
		_, err := p.c.Files.GetWorkspace(p.ctx, connect.NewRequest(&posternv1.WorkspaceRequest{Workspace: name}))
		return err
	})
	if proto.CodeOf(err) != proto.CodeNotFound {
		return err
	}
	if _, err = p.c.Files.CreateWorkspace(p.ctx, connect.NewRequest(&posternv1.CreateWorkspaceRequest{Name: name})); err == nil {
		p.app.info("workspace %s is made", safe(name))
	} else if proto.CodeOf(err) == proto.CodeAlreadyExists { // by somebody else, just now
		err = nil
	}
	return err
}

// source puts what one argument names.
func (p *filePut) source(name string, to client.FilePath, into bool, base *uint64) error {
	if name == "-" {
		if into {
			return usagef("stdin has no name: write the whole path, such as %s", to.Join("name"))
		}
		p.do("stdin", func(ctx context.Context) error {
			_, err := p.up.Upload(ctx, client.Upload{To: to, Base: base, Parents: true}, &countedReader{r: p.app.stdin, total: &p.total})
			return err
		})
		return nil
	}
	info, err := os.Stat(name)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		if into {
			to = to.Join(filepath.Base(name))
		}
		return p.file(name, info, to, base)
	}
	if !p.recurse {
		return usagef("%s is a directory: use -r", name)
	}
	if contents := filepath.Base(name) == "." || strings.HasSuffix(name, "/."); into && !contents {
		full, err := filepath.Abs(name)
		if err != nil {
			return err
		}
		to = to.Join(filepath.Base(full))
	}
	return p.tree(name, to)
}

// tree puts a directory and what is in it.
func (p *filePut) tree(root string, to client.FilePath) error {
	p.there = map[string]*posternv1.FileInfo{}
	err := p.c.ListFiles(p.ctx, to, true, func(f *posternv1.FileInfo) error {
		p.there[string(f.Path)] = f
		return nil
	})
	if err != nil && proto.CodeOf(err) != proto.CodeNotFound {
		return err
	}
	defer func() { p.flush(to.Workspace); p.there = nil }()
	return filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if p.ctx.Err() != nil {
			return p.ctx.Err()
		}
		at := to
		if rel, err := filepath.Rel(root, name); err == nil && rel != "." {
			at = to.Join(filepath.ToSlash(rel))
		}
		if err != nil {
			p.totalFiles.Add(1)
			return p.fail(name, err)
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) { // it went away meanwhile
			return nil
		}
		if err != nil {
			p.totalFiles.Add(1)
			return p.fail(name, err)
		}
		switch {
		case d.IsDir():
			if f := p.there[at.Path]; f.GetNode().GetType() == posternv1.NodeType_NODE_TYPE_DIRECTORY {
				return nil
			}
			return p.c.MakeDirectory(p.ctx, at)
		case d.Type()&fs.ModeSymlink != 0:
			return p.symlink(name, at)
		}
		return p.file(name, info, at, nil)
	})
}

func (p *filePut) symlink(name string, at client.FilePath) error {
	target, err := os.Readlink(name)
	if err != nil {
		p.totalFiles.Add(1)
		return p.fail(name, err)
	}
	if f := p.there[at.Path]; f.GetNode().GetType() == posternv1.NodeType_NODE_TYPE_SYMLINK && string(f.Node.Target) == target {
		p.same.Add(1)
		p.totalFiles.Add(1)
		p.files.Add(1)
		return nil
	}
	p.do(name, func(ctx context.Context) error {
		_, err := p.c.Symlink(ctx, at, target, true)
		return err
	})
	return nil
}

// file puts one regular file.
func (p *filePut) file(name string, info fs.FileInfo, at client.FilePath, base *uint64) error {
	if !info.Mode().IsRegular() {
		p.totalFiles.Add(1)
		return p.fail(name, errors.New("is neither a file, a directory nor a symbolic link: it is left out"))
	}
	p.total.Add(info.Size())
	if p.there != nil && info.Size() <= filechunk.MaxInline && !p.checksum {
		return p.add(name, info, at)
	}
	have := p.there[at.Path] // not in the worker: the next tree has another map
	p.do(name, func(ctx context.Context) error {
		there, err := p.unchanged(name, info, have)
		if err != nil {
			return err
		}
		if there {
			p.same.Add(1)
			p.bytes.Add(info.Size())
			return nil
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close() //nolint:errcheck // it was only read
		what := client.Upload{To: at, Mode: uint32(info.Mode().Perm()), ModTime: info.ModTime(), Base: base, Parents: true}
		result, err := p.up.Upload(ctx, what, f)
		if err != nil {
			return err
		}
		if c := result.Conflict; c != nil {
			return proto.Errorf(proto.CodeAlreadyExists, "%s was changed by somebody else: yours is kept as %s", at, client.FilePath{Workspace: at.Workspace, Path: string(c.KeptAs)})
		}
		if now, err := f.Stat(); err == nil && (now.Size() != info.Size() || !now.ModTime().Equal(info.ModTime())) {
			return errors.New("changed while it was read: put it again")
		}
		return nil
	})
	return nil
}

// add puts a small file of a tree with others.
func (p *filePut) add(name string, info fs.FileInfo, at client.FilePath) error {
	p.totalFiles.Add(1)
	if there, _ := p.unchanged(name, info, p.there[at.Path]); there { // sizes and times alone: no error
		p.same.Add(1)
		p.files.Add(1)
		p.bytes.Add(info.Size())
		return nil
	}
	content, err := readInline(name)
	if err != nil {
		return p.fail(name, err)
	}
	p.small.names = append(p.small.names, name)
	p.small.contents = append(p.small.contents, content)
	p.small.what = append(p.small.what, client.Upload{To: at, Mode: uint32(info.Mode().Perm()), ModTime: info.ModTime(), Parents: true})
	if len(p.small.names) == client.MaxUploadAll {
		p.flush(at.Workspace)
	}
	return nil
}

// readInline reads a file that was small when it was looked at.
func readInline(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // it was only read
	content, err := io.ReadAll(io.LimitReader(f, filechunk.MaxInline+1))
	if err == nil && len(content) > filechunk.MaxInline {
		err = errors.New("changed while it was read: put it again")
	}
	return content, err
}

// flush sends the small files that wait.
func (p *filePut) flush(workspace string) {
	batch := p.small
	p.small = smallFiles{}
	if len(batch.names) == 0 {
		return
	}
	p.group.Go(func() error {
		errs, err := p.up.UploadAll(p.ctx, workspace, batch.what, batch.contents)
		for i, name := range batch.names {
			one := err
			if err == nil {
				one = errs[i]
			}
			if one == nil {
				p.files.Add(1)
			} else if fatal := p.fail(name, one); fatal != nil {
				return fatal
			}
		}
		return nil
	})
}

// unchanged reports whether what the workspace has, f, is the file as it is.
func (p *filePut) unchanged(name string, info fs.FileInfo, f *posternv1.FileInfo) (bool, error) {
	if f.GetNode().GetType() != posternv1.NodeType_NODE_TYPE_FILE || f.Node.Size != uint64(info.Size()) {
		return false, nil
	}
	if !p.checksum {
		return f.Node.MtimeNs == info.ModTime().UnixNano() && f.Node.Mode&0o777 == uint32(info.Mode().Perm()), nil
	}
	etag, err := etagOf(name)
	return etag == f.Etag, err
}

// etagOf is the checksum of a local file.
func etagOf(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close() //nolint:errcheck // it was only read
	var names [][]byte
	var size uint64
	chunk := make([]byte, filechunk.Size)
	for {
		n, err := io.ReadFull(f, chunk)
		if n > 0 {
			names = append(names, filechunk.Name(chunk[:n]))
			size += uint64(n)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return filechunk.ETag(size, names), nil
		}
		if err != nil {
			return "", fmt.Errorf("read: %w", err)
		}
	}
}

// countedReader tells how much there is while it is read.
type countedReader struct {
	r     io.Reader
	total interface{ Add(int64) int64 }
}

// Read implements io.Reader.
func (c *countedReader) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.total.Add(int64(n))
	return n, err
}
