package workspace

import (
	"context"
	"encoding/hex"
	"errors"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// files implements FileService.
type files struct {
	posternv1connect.UnimplementedFileServiceHandler
	s *Service
}

var _ posternv1connect.FileServiceHandler = files{}

// serve runs f for the user that calls.
func serve[T any](ctx context.Context, s *Service, what string, f func(Caller) (*T, error)) (*connect.Response[T], error) {
	msg, err := f(s.cfg.Caller(ctx))
	if err != nil {
		return nil, s.refused(ctx, what, err)
	}
	return connect.NewResponse(msg), nil
}

// entryFor is an audit entry of what a user did to a path.
func entryFor(c Caller, action, workspace string, path []byte) auditchain.Entry {
	e := auditchain.Entry{
		Time: time.Now(), Organization: c.Organization, Actor: "token " + c.TokenName, Role: c.Role, Remote: c.Remote,
		Action: action, Target: workspace, Outcome: "done",
	}
	if path != nil {
		e.Target += ":" + string(path)
	}
	return e
}

// audited writes the entry of something that was tried.
func (s *Service) audited(ctx context.Context, e auditchain.Entry, err error) error {
	if err != nil {
		e.Outcome, e.Error = "failed", proto.Detail(err).Message
	}
	if aerr := s.cfg.Append(context.WithoutCancel(ctx), []auditchain.Entry{e}); err == nil {
		err = aerr
	}
	return err
}

func protoWorkspace(w *filetree.Workspace) *posternv1.Workspace {
	return &posternv1.Workspace{
		Id: w.ID, Name: w.Name, Created: timestamppb.New(w.Created), QuotaBytes: w.QuotaBytes, QuotaNodes: w.QuotaNodes,
		UsedBytes: w.UsedBytes, KeptBytes: w.KeptBytes, Nodes: w.Nodes, Seq: w.Seq, Agents: w.Agents,
		KeepVersions: w.KeepVersions, KeepFor: durationpb.New(w.KeepFor),
	}
}

// ListWorkspaces implements FileService.
func (f files) ListWorkspaces(ctx context.Context, _ *connect.Request[posternv1.ListWorkspacesRequest]) (*connect.Response[posternv1.ListWorkspacesResponse], error) {
	return serve(ctx, f.s, "list workspaces", func(c Caller) (*posternv1.ListWorkspacesResponse, error) {
		all, err := f.s.cfg.Store.Workspaces(ctx, c.Organization)
		resp := &posternv1.ListWorkspacesResponse{}
		for _, w := range all {
			resp.Workspaces = append(resp.Workspaces, protoWorkspace(w))
		}
		return resp, err
	})
}

// CreateWorkspace implements FileService.
func (f files) CreateWorkspace(ctx context.Context, req *connect.Request[posternv1.CreateWorkspaceRequest]) (*connect.Response[posternv1.Workspace], error) {
	return serve(ctx, f.s, "create workspace", func(c Caller) (*posternv1.Workspace, error) {
		w, err := f.s.create(ctx, c.Organization, req.Msg.Name)
		if err = f.s.audited(ctx, entryFor(c, "workspace.create", clip(req.Msg.Name), nil), err); err != nil {
			return nil, err
		}
		return protoWorkspace(w), nil
	})
}

// GetWorkspace implements FileService.
func (f files) GetWorkspace(ctx context.Context, req *connect.Request[posternv1.WorkspaceRequest]) (*connect.Response[posternv1.Workspace], error) {
	return serve(ctx, f.s, "get workspace", func(c Caller) (*posternv1.Workspace, error) {
		w, err := f.s.cfg.Store.Workspace(ctx, c.Organization, req.Msg.Workspace)
		if err != nil {
			return nil, err
		}
		return protoWorkspace(w), nil
	})
}

// read runs f on a workspace for a user.
func (s *Service) read(ctx context.Context, c Caller, workspace string, f func(*tree) error) (*filetree.Workspace, error) {
	w, err := s.cfg.Store.Workspace(ctx, c.Organization, workspace)
	if err != nil {
		return nil, err
	}
	return w, s.cfg.Store.ReadFiles(ctx, w.Organization, w.ID, func(tx filetree.Tx) error {
		return f(newTree(ctx, tx, time.Now(), "", ""))
	})
}

// change runs f on a workspace for a user, writes what it changed, and wakes who waits
// for that. f may run more than once.
func (s *Service) change(ctx context.Context, c Caller, workspace string, f func(*tree) error) (*filetree.Workspace, error) {
	w, err := s.cfg.Store.Workspace(ctx, c.Organization, workspace)
	if err != nil {
		return nil, err
	}
	err = s.cfg.Store.UpdateFiles(ctx, w.Organization, w.ID, func(tx filetree.Tx) error {
		t := newTree(ctx, tx, time.Now(), "token "+c.TokenName, "")
		t.organization = s.cfg.OrganizationNodes
		err := f(t)
		if err == nil {
			err = t.flush()
		}
		if errors.Is(err, errQuota) {
			err = t.quotaError()
		}
		return err
	})
	if err == nil {
		s.bell.ring(w.Number)
	}
	return w, err
}

// find is what lies at a path, or NOT_FOUND.
func (t *tree) find(path []byte) (*node, [][]byte, error) {
	parts, err := splitPath(path)
	if err != nil {
		return nil, nil, err
	}
	n, err := t.walk(parts)
	if err == nil && n == nil {
		err = t.noSuch(path)
	}
	return n, parts, err
}

func (t *tree) noSuch(path []byte) error {
	return proto.Errorf(proto.CodeNotFound, "%s:%s not found", t.ws.Name, clip(string(path)))
}

// info is a node for users.
func (t *tree) info(path []byte, n *filetree.Node) (*posternv1.FileInfo, error) {
	p, err := protoNode(n)
	if err != nil {
		return nil, err
	}
	info := &posternv1.FileInfo{Path: path, Node: p, Modified: timestamppb.New(time.Unix(0, n.Mtime))}
	if n.Type != filetree.File {
		return info, nil
	}
	if n.Version == 0 {
		info.Etag = filechunk.ETag(0, nil)
		return info, nil
	}
	if n.HasInline && n.Inline != nil {
		info.Etag = filechunk.ETag(n.Size, filechunk.Names(n.Inline))
		return info, nil
	}
	v, err := t.tx.Version(t.ctx, n.ID, n.Version)
	if err != nil {
		return nil, err
	}
	if v == nil {
		return nil, errors.New("a file's version is not in the store")
	}
	info.Etag = hex.EncodeToString(v.ETag[:])
	return info, nil
}

// GetFile implements FileService.
func (f files) GetFile(ctx context.Context, req *connect.Request[posternv1.FileRequest]) (*connect.Response[posternv1.FileInfo], error) {
	return serve(ctx, f.s, "get file", func(c Caller) (info *posternv1.FileInfo, err error) {
		_, err = f.s.read(ctx, c, req.Msg.Workspace, func(t *tree) error {
			n, parts, err := t.find(req.Msg.Path)
			if err == nil {
				info, err = t.info(joinPath(parts), &n.Node)
			}
			return err
		})
		return info, err
	})
}

// ListFiles implements FileService.
func (f files) ListFiles(ctx context.Context, req *connect.Request[posternv1.ListFilesRequest]) (*connect.Response[posternv1.ListFilesResponse], error) {
	return serve(ctx, f.s, "list files", func(c Caller) (resp *posternv1.ListFilesResponse, err error) {
		_, err = f.s.read(ctx, c, req.Msg.Workspace, func(t *tree) error {
			resp, err = t.list(req.Msg)
			return err
		})
		return resp, err
	})
}

// list is a page of a listing. Its token is the path of the last entry, so listings go
// on whatever changes meanwhile.
func (t *tree) list(r *posternv1.ListFilesRequest) (*posternv1.ListFilesResponse, error) {
	top, parts, err := t.find(r.Path)
	if err != nil {
		return nil, err
	}
	resp := &posternv1.ListFilesResponse{}
	if top.Type != filetree.Directory {
		info, err := t.info(joinPath(parts), &top.Node)
		if len(r.PageToken) == 0 {
			resp.Files = append(resp.Files, info)
		}
		return resp, err
	}
	var after [][]byte
	if len(r.PageToken) > 0 {
		if after, err = splitPath(r.PageToken); err != nil {
			return nil, proto.Errorf(proto.CodeInvalid, "the page token is not one of ours")
		}
	}
	l := &lister{t: t, recursive: r.Recursive, resp: resp}
	full, err := l.directory(top.ID, joinPath(parts), after)
	if err == nil && full {
		last := resp.Files[len(resp.Files)-1].Path
		prefix := joinPath(parts)
		if len(prefix) > 1 {
			last = last[len(prefix):]
		}
		resp.NextPageToken = last
	}
	return resp, err
}

// lister lists a tree in order, a directory before what is in it.
type lister struct {
	t         *tree
	recursive bool
	resp      *posternv1.ListFilesResponse
	inline    int
}

// directory lists what is in a directory after the names of after, and reports whether the
// page is full.
func (l *lister) directory(id uint64, path []byte, after [][]byte) (bool, error) {
	if len(path) > 1 {
		path = append(path[:len(path):len(path)], '/')
	}
	var name []byte
	if len(after) > 0 {
		name = after[0]
		// The last one told may be a directory with more in it.
		if l.recursive {
			n, err := l.t.lookup(id, name)
			if err != nil {
				return false, err
			}
			if n != nil && n.Type == filetree.Directory {
				if full, err := l.directory(n.ID, append(path[:len(path):len(path)], name...), after[1:]); err != nil || full {
					return full, err
				}
			}
		}
	}
	for {
		listed, err := l.t.tx.List(l.t.ctx, id, name, min(listPage-len(l.resp.Files)+1, listStep))
		if err != nil || len(listed) == 0 {
			return false, err
		}
		for i := range listed {
			if len(l.resp.Files) >= listPage || l.inline >= maxInlinePage {
				return true, nil
			}
			one := &listed[i]
			at := append(path[:len(path):len(path)], one.Name...)
			info, err := l.t.info(at, &one.Of)
			if err != nil {
				return false, err
			}
			l.resp.Files = append(l.resp.Files, info)
			l.inline += len(one.Of.Inline)
			name = one.Name
			if l.recursive && one.Of.Type == filetree.Directory {
				if full, err := l.directory(one.Of.ID, at, nil); err != nil || full {
					return full, err
				}
			}
		}
	}
}

// listStep is how many entries a listing has in memory for each level of directories.
const listStep = 500

// MakeDirectory implements FileService.
func (f files) MakeDirectory(ctx context.Context, req *connect.Request[posternv1.MakeDirectoryRequest]) (*connect.Response[posternv1.FileInfo], error) {
	return serve(ctx, f.s, "make directory", func(c Caller) (info *posternv1.FileInfo, err error) {
		r := req.Msg
		w, err := f.s.change(ctx, c, r.Workspace, func(t *tree) error {
			parts, err := splitPath(r.Path)
			if err != nil {
				return err
			}
			n, err := t.walk(parts)
			if err != nil {
				return err
			}
			if n != nil && (!r.Parents || n.Type != filetree.Directory) {
				return proto.Errorf(proto.CodeAlreadyExists, "%s:%s is there already", t.ws.Name, clip(string(r.Path)))
			}
			if n == nil {
				if n, err = t.mkdir(parts, r.Parents); err != nil {
					return err
				}
			}
			if _, err := t.done(); err != nil {
				return err
			}
			info, err = t.info(joinPath(parts), &n.Node)
			return err
		})
		return info, f.s.auditChange(ctx, c, "file.mkdir", w, r.Workspace, r.Path, err)
	})
}

// auditChange writes the entry of a change, unless it failed because the workspace is not
// there.
func (s *Service) auditChange(ctx context.Context, c Caller, action string, w *filetree.Workspace, named string, path []byte, err error) error {
	name := clip(named)
	if w != nil {
		name = w.Name
	}
	return s.audited(ctx, entryFor(c, action, name, path), err)
}

// mkdir makes a directory, and those above it if parents is set.
func (t *tree) mkdir(parts [][]byte, parents bool) (*node, error) {
	n, err := t.node(filetree.Root)
	if err != nil {
		return nil, err
	}
	for i, part := range parts {
		next, err := t.lookup(n.ID, part)
		if err != nil {
			return nil, err
		}
		switch {
		case next != nil && next.Type != filetree.Directory:
			return nil, proto.Errorf(proto.CodeInvalid, "%s:%s is no directory", t.ws.Name, clip(string(joinPath(parts[:i+1]))))
		case next == nil && !parents && i < len(parts)-1:
			return nil, t.noSuch(joinPath(parts[:i+1]))
		case next == nil:
			if err := t.charge(1, 0, false); err != nil {
				return nil, err
			}
			at := t.now.UnixNano()
			next = t.make(filetree.Node{ID: t.newID(), Type: filetree.Directory, Mode: 0o755, Mtime: at, Ctime: at, Btime: at})
			if err := t.link(n.ID, part, next, at); err != nil {
				return nil, err
			}
			if _, err := t.done(); err != nil {
				return nil, err
			}
		}
		n = next
	}
	return n, nil
}

// RemoveFile implements FileService.
func (f files) RemoveFile(ctx context.Context, req *connect.Request[posternv1.RemoveFileRequest]) (*connect.Response[posternv1.RemoveFileResponse], error) {
	return serve(ctx, f.s, "remove file", func(c Caller) (*posternv1.RemoveFileResponse, error) {
		r := req.Msg
		resp := &posternv1.RemoveFileResponse{}
		w, err := f.s.change(ctx, c, r.Workspace, func(t *tree) error {
			n, parts, err := t.find(r.Path)
			if err != nil {
				return err
			}
			if len(parts) == 0 {
				return proto.Errorf(proto.CodeInvalid, "the root of a workspace can't be removed: delete the workspace, or what is in it")
			}
			resp.Files = 1
			if n.Type == filetree.Directory {
				some, err := t.hasEntries(n.ID)
				if err != nil {
					return err
				}
				if some && !r.Recursive {
					return proto.Errorf(proto.CodeInvalid, "%s:%s is a directory that is not empty: say recursive", t.ws.Name, clip(string(r.Path)))
				}
				if _, resp.Files, _, err = t.tx.Subtree(ctx, n.ID); err != nil {
					return err
				}
			}
			parent, err := t.walk(parts[:len(parts)-1])
			if err != nil {
				return err
			}
			at := t.now.UnixNano()
			n.Ctime = at
			return t.trash(parent.ID, parts[len(parts)-1], n, at)
		})
		return resp, f.s.auditChange(ctx, c, "file.rm", w, r.Workspace, r.Path, err)
	})
}

// MoveFile implements FileService.
func (f files) MoveFile(ctx context.Context, req *connect.Request[posternv1.MoveFileRequest]) (*connect.Response[posternv1.FileInfo], error) {
	return serve(ctx, f.s, "move file", func(c Caller) (info *posternv1.FileInfo, err error) {
		r := req.Msg
		w, err := f.s.change(ctx, c, r.Workspace, func(t *tree) error {
			info, err = t.moveFile(r.From, r.To, r.Replace)
			return err
		})
		return info, f.s.auditChange(ctx, c, "file.mv", w, r.Workspace, []byte(string(r.From)+" -> "+string(r.To)), err)
	})
}

func (t *tree) moveFile(from, to []byte, replace bool) (*posternv1.FileInfo, error) {
	n, parts, err := t.find(from)
	if err != nil {
		return nil, err
	}
	target, err := splitPath(to)
	if err != nil {
		return nil, err
	}
	if len(parts) == 0 || len(target) == 0 {
		return nil, proto.Errorf(proto.CodeInvalid, "the root of a workspace can't be moved or replaced")
	}
	oldName, newName := parts[len(parts)-1], target[len(target)-1]
	oldDir, err := t.walk(parts[:len(parts)-1])
	if err != nil {
		return nil, err
	}
	newDir, err := t.walk(target[:len(target)-1])
	if err != nil {
		return nil, err
	}
	if newDir == nil || newDir.Type != filetree.Directory {
		return nil, proto.Errorf(proto.CodeNotFound, "%s:%s is no directory", t.ws.Name, clip(string(joinPath(target[:len(target)-1]))))
	}
	if err := t.mayMove(n, newDir); err != nil {
		return nil, err
	}
	there, err := t.lookup(newDir.ID, newName)
	if err != nil {
		return nil, err
	}
	at := t.now.UnixNano()
	switch {
	case there == nil:
	case there.ID == n.ID && oldDir.ID == newDir.ID && string(oldName) == string(newName):
		return t.info(joinPath(target), &n.Node)
	case !replace, there.Type == filetree.Directory:
		return nil, proto.Errorf(proto.CodeAlreadyExists, "%s:%s is there already", t.ws.Name, clip(string(to)))
	default:
		if err := t.trash(newDir.ID, newName, there, at); err != nil {
			return nil, err
		}
	}
	if err := t.unlink(oldDir.ID, oldName, n, at); err != nil {
		return nil, err
	}
	n.Ctime = at
	if err := t.link(newDir.ID, newName, n, at); err != nil {
		return nil, err
	}
	if _, err := t.done(); err != nil {
		return nil, err
	}
	return t.info(joinPath(target), &n.Node)
}
