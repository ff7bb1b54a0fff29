package workspace

import (
	"archive/tar"
	"archive/zip"
	"context"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"path"
	"strings"
	"time"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
)

// ServeArchive serves GET /api/v1/archive/{workspace}/{path...}?format=tar|zip: a tree as
// one file, made while it is sent. Each file is as it is when its turn comes.
func (s *Service) ServeArchive(w http.ResponseWriter, r *http.Request) {
	c := s.cfg.Caller(r.Context())
	leave, err := s.busy.enter("user "+c.TokenId, userBulk)
	if err == nil {
		defer leave()
		err = s.archive(w, r, c)
	}
	if err != nil {
		s.fail(w, r, "send an archive", err)
	}
}

// archiver writes entries in one of the formats.
type archiver interface {
	// add writes an entry; content is nil for what has none.
	add(name string, n *filetree.Node, content io.Reader) error
	Close() error
}

func (s *Service) archive(w http.ResponseWriter, r *http.Request, c Caller) error {
	format := r.URL.Query().Get("format")
	if format == "" {
		format = "tar"
	}
	if format != "tar" && format != "zip" {
		return proto.Errorf(proto.CodeInvalid, "format=%q: there are tar and zip", clip(format))
	}
	var top filetree.Node
	ws, err := s.read(r.Context(), c, r.PathValue("workspace"), func(t *tree) error {
		n, _, err := t.find(filePath(r))
		if err == nil {
			top = n.Node
		}
		return err
	})
	if err != nil {
		return err
	}
	base := path.Base(string(filePath(r)))
	if base == "/" {
		base = ws.Name
	}
	e := entryFor(c, "file.archive", ws.Name, filePath(r))
	if err := s.audited(r.Context(), e, nil); err != nil {
		return err
	}
	h := w.Header()
	h.Set("Content-Type", map[string]string{"tar": "application/x-tar", "zip": "application/zip"}[format])
	h.Set("Content-Disposition", `attachment; filename="`+plainName(base)+"."+format+`"`)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	var a archiver = &zipper{zip.NewWriter(w)}
	if format == "tar" {
		a = &tarrer{w: tar.NewWriter(w), first: map[uint64]string{}}
	}
	err = s.pack(r.Context(), ws, base, &top, a)
	if err == nil {
		err = a.Close()
	}
	if err != nil {
		if r.Context().Err() == nil {
			s.cfg.Logger.Warn("archive not sent whole", "workspace", ws.ID, "err", err)
		}
		panic(http.ErrAbortHandler) // the reader must not take this for the end
	}
	return nil
}

// plainName is a name that is safe within a header's quotes.
func plainName(name string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' || r == '"' || r == '\\' {
			return '_'
		}
		return r
	}, name)
}

// pack writes a node and all that is below it. It has a page of a directory in memory for
// each level.
func (s *Service) pack(ctx context.Context, ws *filetree.Workspace, name string, n *filetree.Node, a archiver) error {
	if n.Type != filetree.Directory {
		return s.packOne(ctx, ws, name, n, a)
	}
	if err := a.add(name+"/", n, nil); err != nil {
		return err
	}
	var after []byte
	for {
		var listed []filetree.Listed
		if err := s.cfg.Store.ReadFiles(ctx, ws.Organization, ws.ID, func(tx filetree.Tx) (err error) {
			listed, err = tx.List(ctx, n.ID, after, listStep)
			return err
		}); err != nil {
			return err
		}
		if len(listed) == 0 {
			return nil
		}
		for i := range listed {
			one := &listed[i]
			if err := s.pack(ctx, ws, name+"/"+string(one.Name), &one.Of, a); err != nil {
				return err
			}
		}
		after = listed[len(listed)-1].Name
	}
}

func (s *Service) packOne(ctx context.Context, ws *filetree.Workspace, name string, n *filetree.Node, a archiver) error {
	if n.Type != filetree.File {
		return a.add(name, n, nil)
	}
	b := &body{s: s, ctx: ctx, ws: ws, chunks: map[uint64][]byte{}}
	err := s.cfg.Store.ReadFiles(ctx, ws.Organization, ws.ID, func(tx filetree.Tx) error {
		t := newTree(ctx, tx, time.Now(), "", "")
		now, err := t.node(n.ID)
		if err != nil || now == nil {
			return err
		}
		*n = now.Node
		return b.load(t, n, 0)
	})
	if err != nil || b.etag == "" { // removed since its directory was listed
		return err
	}
	return a.add(name, n, b)
}

// tarrer writes PAX archives. Other names of a file are hard links.
type tarrer struct {
	w *tar.Writer
	// first are the names of files with several, by node; at most maxHardLinks.
	first map[uint64]string
}

const maxHardLinks = 100_000

func (a *tarrer) add(name string, n *filetree.Node, content io.Reader) error {
	h := &tar.Header{Name: name, Mode: int64(n.Mode), Uid: int(n.UID), Gid: int(n.GID), ModTime: time.Unix(0, n.Mtime), Format: tar.FormatPAX}
	xattrs, err := decodeXattrs(n.Xattrs)
	if err != nil {
		return err
	}
	for name, value := range xattrs {
		if !strings.ContainsAny(name, "=\x00") && !strings.Contains(string(value), "\x00") {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords["SCHILY.xattr."+name] = string(value)
		}
	}
	switch n.Type {
	case filetree.Directory:
		h.Typeflag = tar.TypeDir
	case filetree.Symlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, string(n.Target)
	default:
		h.Typeflag, h.Size = tar.TypeReg, int64(n.Size)
		if n.Links > 1 {
			if first := a.first[n.ID]; first != "" {
				h.Typeflag, h.Size, h.Linkname, content = tar.TypeLink, 0, first, nil
			} else if len(a.first) < maxHardLinks {
				a.first[n.ID] = name
			}
		}
	}
	if err := a.w.WriteHeader(h); err != nil {
		return fmt.Errorf("%q: %w", clip(name), err)
	}
	if content == nil {
		return nil
	}
	_, err = io.Copy(a.w, content)
	return err
}

func (a *tarrer) Close() error { return a.w.Close() }

// zipper writes zip archives, with the modes and links that unzip understands.
type zipper struct{ w *zip.Writer }

func (a *zipper) add(name string, n *filetree.Node, content io.Reader) error {
	h := &zip.FileHeader{Name: name, Modified: time.Unix(0, n.Mtime).UTC(), Method: zip.Deflate}
	h.SetMode(osMode(n))
	if n.Type != filetree.File {
		h.Method = zip.Store
	}
	w, err := a.w.CreateHeader(h)
	if err != nil {
		return err
	}
	switch {
	case n.Type == filetree.Symlink:
		_, err = w.Write(n.Target)
	case content != nil:
		_, err = io.Copy(w, content)
	}
	return err
}

func (a *zipper) Close() error { return a.w.Close() }

func osMode(n *filetree.Node) fs.FileMode {
	mode := fs.FileMode(n.Mode & 0o777)
	if n.Mode&0o1000 != 0 {
		mode |= fs.ModeSticky
	}
	switch n.Type {
	case filetree.Directory:
		mode |= fs.ModeDir
	case filetree.Symlink:
		mode |= fs.ModeSymlink
	}
	return mode
}
