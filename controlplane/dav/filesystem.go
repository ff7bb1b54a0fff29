package dav

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/net/webdav"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// fileSystem is what the protocol's library sees: /WORKSPACE/path. Each call belongs to a request,
// whose caller is in its context.
type fileSystem struct{ files Files }

var _ webdav.FileSystem = fileSystem{}

// split is the workspace and the path in it. The workspace is empty for "/".
func split(name string) (workspace, file string) {
	workspace, file, _ = strings.Cut(strings.TrimPrefix(path.Clean("/"+name), "/"), "/")
	return workspace, "/" + file
}

// pathError is err as the library knows it: it looks for "does not exist" alone.
func (q *request) pathError(op, name string, err error) error {
	if err == nil {
		return nil
	}
	q.note(err) //nolint:errcheck // it is returned below
	kind := err
	switch proto.CodeOf(err) {
	case proto.CodeNotFound:
		kind = fs.ErrNotExist
	case proto.CodeAlreadyExists:
		kind = fs.ErrExist
	case proto.CodeRoleDenied, proto.CodePolicyDenied:
		kind = fs.ErrPermission
	}
	return &fs.PathError{Op: op, Path: name, Err: kind}
}

var errTop = proto.Errorf(proto.CodeInvalid, "a workspace is neither made, moved nor removed by WebDAV: use `postern workspace`")

// Mkdir implements webdav.FileSystem.
func (f fileSystem) Mkdir(ctx context.Context, name string, _ os.FileMode) error {
	q := requestOf(ctx)
	workspace, file := split(name)
	if file == "/" {
		return q.pathError("mkdir", name, errTop)
	}
	return q.pathError("mkdir", name, f.files.MakeDirectory(ctx, q.caller, workspace, file))
}

// RemoveAll implements webdav.FileSystem.
func (f fileSystem) RemoveAll(ctx context.Context, name string) error {
	q := requestOf(ctx)
	workspace, file := split(name)
	if file == "/" {
		return q.pathError("remove", name, errTop)
	}
	clear(q.known)
	err := f.files.Remove(ctx, q.caller, workspace, file)
	if proto.CodeOf(err) == proto.CodeNotFound {
		return nil
	}
	return q.pathError("remove", name, err)
}

// Rename implements webdav.FileSystem.
func (f fileSystem) Rename(ctx context.Context, oldName, newName string) error {
	q := requestOf(ctx)
	workspace, from := split(oldName)
	other, to := split(newName)
	switch {
	case from == "/" || to == "/":
		return q.pathError("rename", oldName, errTop)
	case workspace != other:
		return q.pathError("rename", oldName, proto.Errorf(proto.CodeInvalid, "%s and %s are two workspaces: copy instead", workspace, other))
	}
	clear(q.known)
	return q.pathError("rename", oldName, f.files.Move(ctx, q.caller, workspace, from, to))
}

// Stat implements webdav.FileSystem.
func (f fileSystem) Stat(ctx context.Context, name string) (os.FileInfo, error) {
	info, err := f.get(ctx, name)
	if err != nil {
		return nil, err
	}
	return info, nil
}

func (f fileSystem) get(ctx context.Context, name string) (*fileInfo, error) {
	q := requestOf(ctx)
	workspace, file := split(name)
	if workspace == "" {
		return &fileInfo{name: "/", info: &posternv1.FileInfo{Node: &posternv1.Node{Type: posternv1.NodeType_NODE_TYPE_DIRECTORY, Mode: 0o555}}}, nil
	}
	clean := path.Clean("/" + name)
	if known := q.known[clean]; known != nil {
		return &fileInfo{name: path.Base(clean), info: known}, nil
	}
	info, err := f.files.Get(ctx, q.caller, workspace, file)
	if proto.CodeOf(err) == proto.CodeNotFound { // to look whether something is there is no failure
		return nil, &fs.PathError{Op: "stat", Path: name, Err: fs.ErrNotExist}
	}
	if err != nil {
		return nil, q.pathError("stat", name, err)
	}
	return &fileInfo{name: path.Base(clean), info: info}, nil
}

// OpenFile implements webdav.FileSystem: to read, or to write anew.
func (f fileSystem) OpenFile(ctx context.Context, name string, flag int, _ os.FileMode) (webdav.File, error) {
	q := requestOf(ctx)
	workspace, file := split(name)
	if flag&(os.O_CREATE|os.O_TRUNC) == 0 { // to read, or to change properties
		info, err := f.get(ctx, name)
		if err != nil {
			return nil, err
		}
		if info.symlink() {
			return nil, q.pathError("open", name, proto.Errorf(proto.CodeInvalid, "%s is a symbolic link, which is not followed", file))
		}
		return &reader{fileSystem: f, ctx: ctx, workspace: workspace, fileInfo: info, at: path.Clean("/" + name)}, nil
	}
	if file == "/" {
		return nil, q.pathError("create", name, errTop)
	}
	// The library wants to know now whether the directory is there.
	parent, err := f.get(ctx, path.Dir(path.Clean("/"+name)))
	if err == nil && !parent.IsDir() {
		err = &fs.PathError{Op: "create", Path: name, Err: fs.ErrNotExist}
	}
	if err != nil {
		q.noParent = errors.Is(err, fs.ErrNotExist)
		return nil, err
	}
	if there, err := f.get(ctx, name); err == nil && there.IsDir() {
		return nil, q.pathError("create", name, proto.Errorf(proto.CodeInvalid, "%s is a directory", file))
	}
	delete(q.known, path.Clean("/"+name))
	w := &writer{fileSystem: f, ctx: ctx, workspace: workspace, file: file, request: q, fileInfo: &fileInfo{name: path.Base(file), info: &posternv1.FileInfo{Node: &posternv1.Node{Type: posternv1.NodeType_NODE_TYPE_FILE, Mode: 0o644}}}}
	in, out := io.Pipe()
	w.out, w.done = out, make(chan error, 1)
	go func() {
		info, err := f.files.Write(ctx, q.caller, workspace, file, in)
		if err == nil {
			w.fileInfo.info = info
		} else {
			in.CloseWithError(err) //nolint:errcheck // it always is nil
		}
		w.done <- err
	}()
	return w, nil
}

// reader is a file or directory that is read.
type reader struct {
	fileSystem
	*fileInfo
	ctx       context.Context
	workspace string
	at        string // with the workspace, clean

	offset  int64
	content io.ReadCloser // nil: not open at offset
}

// Stat implements webdav.File.
func (r *reader) Stat() (os.FileInfo, error) { return r.fileInfo, nil }

// Write implements io.Writer; it fails.
func (r *reader) Write([]byte) (int, error) { return 0, fs.ErrPermission }

// Close implements io.Closer.
func (r *reader) Close() error {
	if r.content == nil {
		return nil
	}
	c := r.content
	r.content = nil
	return c.Close()
}

// Seek implements io.Seeker.
func (r *reader) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += r.offset
	case io.SeekEnd:
		offset += r.Size()
	}
	if offset < 0 {
		return 0, fs.ErrInvalid
	}
	if offset != r.offset {
		if err := r.Close(); err != nil {
			return 0, err
		}
		r.offset = offset
	}
	return offset, nil
}

// Read implements io.Reader.
func (r *reader) Read(p []byte) (int, error) {
	if r.IsDir() {
		return 0, fs.ErrInvalid
	}
	if r.offset >= r.Size() {
		return 0, io.EOF
	}
	if r.content == nil {
		q := requestOf(r.ctx)
		var err error
		if r.content, err = r.files.Read(r.ctx, q.caller, r.workspace, r.info, r.offset); err != nil {
			return 0, q.note(err)
		}
	}
	n, err := r.content.Read(p)
	r.offset += int64(n)
	if errors.Is(err, io.EOF) && r.offset < r.Size() {
		err = io.ErrUnexpectedEOF
	}
	if err != nil && !errors.Is(err, io.EOF) {
		requestOf(r.ctx).note(err) //nolint:errcheck // it is returned below
	}
	return n, err
}

// Readdir implements http.File. It returns all entries, whatever count is.
func (r *reader) Readdir(int) ([]os.FileInfo, error) {
	q := requestOf(r.ctx)
	var all []os.FileInfo
	take := func(name string, info *posternv1.FileInfo) error {
		if len(all) == MaxEntries {
			return proto.Errorf(proto.CodeInvalid, "%s has more than %d entries: too many for WebDAV", r.at, MaxEntries)
		}
		if info.Node.GetType() == posternv1.NodeType_NODE_TYPE_SYMLINK {
			return nil // WebDAV has none, and they are not followed
		}
		q.known[path.Join(r.at, name)] = info
		all = append(all, &fileInfo{name: name, info: info})
		return nil
	}
	if r.workspace == "" {
		workspaces, err := r.files.Workspaces(r.ctx, q.caller)
		if err != nil {
			return nil, q.note(err)
		}
		for _, w := range workspaces {
			info := &posternv1.FileInfo{Node: &posternv1.Node{Type: posternv1.NodeType_NODE_TYPE_DIRECTORY, Mode: 0o755, MtimeNs: w.Created.AsTime().UnixNano()}}
			if err := take(w.Name, info); err != nil {
				return nil, q.note(err)
			}
		}
		return all, nil
	}
	_, dir := split(r.at)
	err := r.files.List(r.ctx, q.caller, r.workspace, dir, func(info *posternv1.FileInfo) error {
		return take(path.Base(string(info.Path)), info)
	})
	return all, q.note(err)
}

// writer is a file that is written anew.
type writer struct {
	fileSystem
	*fileInfo
	ctx             context.Context
	workspace, file string
	patches         []webdav.Proppatch // of its properties, for when it is there
	request         *request
	out             *io.PipeWriter
	done            chan error
	size            int64
}

var errCutOff = errors.New("the content was cut off")

// Write implements io.Writer.
func (w *writer) Write(p []byte) (int, error) {
	n, err := w.out.Write(p)
	w.size += int64(n)
	return n, err
}

// Close commits the file, unless what it is made of was cut off: the request's body, or the file
// that is copied.
func (w *writer) Close() error {
	if err := w.request.body.err; w.request.err != nil || err != nil && !errors.Is(err, io.EOF) {
		w.out.CloseWithError(errCutOff) //nolint:errcheck // it always is nil
	} else {
		w.out.Close() //nolint:errcheck // it always is nil
	}
	if err := w.request.note(<-w.done); err != nil || len(w.patches) == 0 {
		return err
	}
	return w.request.note(w.files.SetAttribute(w.ctx, w.request.caller, w.workspace, w.file, propertiesXattr, func(old []byte) ([]byte, error) {
		return patchProperties(old, w.patches)
	}))
}

// Stat implements webdav.File.
func (w *writer) Stat() (os.FileInfo, error) { return w.fileInfo, nil } // of the library, not fileSystem's

// Read implements io.Reader; it fails.
func (w *writer) Read([]byte) (int, error) { return 0, fs.ErrPermission }

// Seek implements io.Seeker; it fails.
func (w *writer) Seek(int64, int) (int64, error) { return 0, fs.ErrInvalid }

// Readdir implements http.File; it fails.
func (w *writer) Readdir(int) ([]os.FileInfo, error) { return nil, fs.ErrInvalid }

// fileInfo is what is known of a node.
type fileInfo struct {
	name string
	info *posternv1.FileInfo
}

var _ webdav.ETager = (*fileInfo)(nil)

func (i *fileInfo) symlink() bool {
	return i.info.Node.GetType() == posternv1.NodeType_NODE_TYPE_SYMLINK
}

// Name implements fs.FileInfo.
func (i *fileInfo) Name() string { return i.name }

// Size implements fs.FileInfo.
func (i *fileInfo) Size() int64 { return int64(i.info.Node.GetSize()) }

// Mode implements fs.FileInfo.
func (i *fileInfo) Mode() fs.FileMode {
	m := fs.FileMode(i.info.Node.GetMode() & 0o777)
	if i.IsDir() {
		m |= fs.ModeDir
	}
	return m
}

// ModTime implements fs.FileInfo.
func (i *fileInfo) ModTime() time.Time { return time.Unix(0, i.info.Node.GetMtimeNs()) }

// IsDir implements fs.FileInfo.
func (i *fileInfo) IsDir() bool {
	return i.info.Node.GetType() == posternv1.NodeType_NODE_TYPE_DIRECTORY
}

// Sys implements fs.FileInfo.
func (i *fileInfo) Sys() any { return nil }

// ETag implements webdav.ETager.
func (i *fileInfo) ETag(context.Context) (string, error) {
	if i.info.Etag == "" {
		return "", webdav.ErrNotImplemented
	}
	return `"` + i.info.Etag + `"`, nil
}
