package client

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path"
	"strconv"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// partName is where a content lies beside name until all of it has come.
func partName(name, etag string) string {
	sum := sha256.Sum256([]byte(name))
	return path.Join(path.Dir(name), fmt.Sprintf(".postern-%x-%.12s.part", sum[:8], etag))
}

// Content is one content of a file.
type Content struct {
	Path FilePath
	// Version is 0 for the newest.
	Version uint64
	Size    uint64
	// ETag is what filechunk.ETag makes of it.
	ETag string
	// Inline is the content itself, if it came along; nil: it did not.
	Inline []byte
}

// ContentOf tells a file's content: of that version, or of the newest if it is 0.
func (c *Client) ContentOf(ctx context.Context, p FilePath, version uint64) (Content, error) {
	if version == 0 {
		info, err := c.GetFile(ctx, p)
		if err != nil {
			return Content{}, err
		}
		return ContentIn(p, info)
	}
	resp, err := c.Files.ListFileVersions(ctx, connect.NewRequest(&posternv1.FileRequest{Workspace: p.Workspace, Path: []byte(p.Path)}))
	if err != nil {
		return Content{}, err
	}
	for _, v := range resp.Msg.Versions {
		if v.Version == version {
			return Content{Path: p, Version: version, Size: v.Size, ETag: v.Etag}, nil
		}
	}
	return Content{}, proto.Errorf(proto.CodeNotFound, "%s has no version %d: see `postern file history`", p, version)
}

// ContentIn is the newest content that info, of a listing, tells of; it fails for what is no file.
func ContentIn(p FilePath, info *posternv1.FileInfo) (Content, error) {
	switch info.GetNode().GetType() {
	case posternv1.NodeType_NODE_TYPE_FILE:
		what := Content{Path: p, Size: info.Node.Size, ETag: info.Etag}
		if info.Node.HasInline && uint64(len(info.Node.Inline)) == what.Size {
			what.Inline = info.Node.Inline
		}
		return what, nil
	case posternv1.NodeType_NODE_TYPE_DIRECTORY:
		return Content{}, proto.Errorf(proto.CodeInvalid, "%s is a directory", p)
	case posternv1.NodeType_NODE_TYPE_SYMLINK:
		return Content{}, proto.Errorf(proto.CodeInvalid, "%s is a symbolic link, which is not followed", p)
	}
	return Content{}, proto.Errorf(proto.CodeInvalid, "%s is no file", p)
}

// read writes the content to w from byte from on, which begins a chunk. It goes on where it was when
// the connection is lost.
func (c *Client) read(ctx context.Context, what Content, from uint64, w io.Writer) error {
	if what.Inline != nil {
		_, err := w.Write(what.Inline[min(from, what.Size):])
		return err
	}
	query := url.Values{}
	if what.Version != 0 {
		query.Set("version", strconv.FormatUint(what.Version, 10))
	}
	address := c.filesURL("files", what.Path, query)
	return again(ctx, func(moved func()) error {
		if from == what.Size {
			return nil
		}
		header := http.Header{"If-Match": {`"` + what.ETag + `"`}, "Range": {fmt.Sprintf("bytes=%d-", from)}}
		resp, err := c.send(ctx, http.MethodGet, address, header, nil)
		if err != nil {
			return err
		}
		defer resp.Body.Close() //nolint:errcheck // it was only read
		if resp.StatusCode != http.StatusPartialContent && from > 0 {
			return fmt.Errorf("%s: the control plane does not answer with a part of a file", what.Path)
		}
		n, err := io.Copy(w, io.LimitReader(resp.Body, int64(what.Size-from)))
		from += uint64(n)
		if n > 0 {
			moved()
		}
		var local *fs.PathError
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.As(err, &local): // our own disk
			return err
		case err != nil || from < what.Size:
			return fmt.Errorf("%s: the connection was lost after %d of %d bytes: %w", what.Path, from, what.Size, io.ErrUnexpectedEOF)
		}
		return nil
	})
}

// summer finds the names of the chunks of what is written to it.
type summer struct {
	names  [][]byte
	chunk  []byte
	size   uint64
	report func(int64)
}

// Write implements io.Writer.
func (s *summer) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		n := min(len(rest), filechunk.Size-len(s.chunk))
		s.chunk = append(s.chunk, rest[:n]...)
		rest = rest[n:]
		if len(s.chunk) == filechunk.Size {
			s.end()
		}
	}
	s.size += uint64(len(p))
	if s.report != nil {
		s.report(int64(len(p)))
	}
	return len(p), nil
}

func (s *summer) end() {
	if len(s.chunk) > 0 {
		s.names = append(s.names, filechunk.Name(s.chunk))
		s.chunk = s.chunk[:0]
	}
}

func (s *summer) etag() string {
	s.end()
	return filechunk.ETag(s.size, s.names)
}

// ReadContent writes a content to w, and fails if it is not what the control plane says it is:
// then what was written is of no use. Progress is told of bytes; nil: nobody.
func (c *Client) ReadContent(ctx context.Context, what Content, w io.Writer, progress func(int64)) error {
	sum := &summer{report: progress}
	if err := c.read(ctx, what, 0, io.MultiWriter(w, sum)); err != nil {
		return err
	}
	return what.check(sum)
}

func (w Content) check(sum *summer) error {
	if got := sum.etag(); got != w.ETag {
		return fmt.Errorf("%s is damaged on its way: checksum %.12s, want %.12s: get it again", w.Path, got, w.ETag)
	}
	return nil
}

// Download puts a content into dir under that name, which may have several parts; a file of that name is
// replaced when all of it has come and its checksum is right. What came of it before it was cut off lies beside
// it, as .postern-*.part, and is not asked for again. Dir is never left, whatever links are in it.
func (c *Client) Download(ctx context.Context, what Content, dir *os.Root, name string, node *posternv1.Node, progress func(int64)) error {
	part := partName(name, what.ETag)
	err := c.fill(ctx, what, dir, part, progress)
	if err != nil {
		if info, statErr := dir.Lstat(part); statErr == nil && info.Size() == 0 {
			err = errors.Join(err, dir.Remove(part)) // it would save nothing
		}
		return err
	}
	if node != nil {
		err = errors.Join(dir.Chmod(part, fs.FileMode(node.Mode&0o777)), dir.Chtimes(part, nodeTime(node), nodeTime(node)))
	}
	if err == nil {
		err = dir.Rename(part, name)
	}
	return err
}

// fill makes part what the content is.
func (c *Client) fill(ctx context.Context, what Content, dir *os.Root, part string, progress func(int64)) error {
	f, err := dir.OpenFile(part, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // closed with its error below
	sum := &summer{report: progress}
	have, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	// What is there was perhaps never written out: it is summed up as it is, and if it is wrong
	// the whole is gotten anew.
	have = int64(min(uint64(have), what.Size) / filechunk.Size * filechunk.Size)
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if _, err := io.CopyN(sum, f, have); err != nil {
		return err
	}
	if err := f.Truncate(have); err != nil {
		return err
	}
	out := &sparse{f: f, off: have}
	err = c.read(ctx, what, uint64(have), io.MultiWriter(out, sum))
	if err = errors.Join(err, out.end()); err != nil {
		return err
	}
	if err := what.check(sum); err != nil {
		if have == 0 {
			return errors.Join(err, f.Truncate(0))
		}
		if err := f.Truncate(0); err != nil {
			return err
		}
		if progress != nil {
			progress(-int64(sum.size))
		}
		return c.fill(ctx, what, dir, part, progress)
	}
	return f.Close()
}

// Archive writes a file or directory to w as one archive, "tar" or "zip". Its end is the archive's own:
// what was cut off is no whole archive, and an error.
func (c *Client) Archive(ctx context.Context, p FilePath, format string, w io.Writer) error {
	resp, err := c.send(ctx, http.MethodGet, c.filesURL("archive", p, url.Values{"format": {format}}), nil, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close() //nolint:errcheck // it was only read
	_, err = io.Copy(w, resp.Body)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return proto.Errorf(proto.CodeUnavailable, "%s: the archive was cut off: get it again", p)
	}
	return err
}
