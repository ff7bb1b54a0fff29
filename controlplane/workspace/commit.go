package workspace

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// put is a file that a user stores.
type put struct {
	path    []byte
	content content
	// symlink is a symbolic link's target; the content is then none.
	symlink []byte
	// base is the version that it replaces; nil: whatever is there.
	base    *uint64
	mode    uint32
	mtime   int64
	parents bool
}

func putOf(r *posternv1.CommitFileRequest) put {
	return put{
		path: r.Path, content: content{size: r.Size, chunks: r.Chunks, inline: r.Inline}, symlink: r.Symlink,
		base: r.BaseVersion, mode: r.Mode, mtime: r.MtimeNs, parents: r.Parents,
	}
}

// CommitFile implements FileService.
func (f files) CommitFile(ctx context.Context, req *connect.Request[posternv1.CommitFileRequest]) (*connect.Response[posternv1.FileInfo], error) {
	return serve(ctx, f.s, "commit file", func(c Caller) (*posternv1.FileInfo, error) {
		return f.s.putFile(ctx, c, req.Msg.Workspace, putOf(req.Msg))
	})
}

// putFile stores one file.
func (s *Service) putFile(ctx context.Context, c Caller, workspace string, p put) (info *posternv1.FileInfo, err error) {
	w, err := s.change(ctx, c, workspace, func(t *tree) error {
		info, err = t.put(p)
		return err
	})
	e := entryFor(c, "file.put", clip(workspace), p.path)
	if w != nil {
		e.Target = w.Name + ":" + string(p.path)
	}
	e.Bytes = p.content.size
	return info, s.audited(ctx, e, err)
}

// CommitFiles implements FileService.
func (f files) CommitFiles(ctx context.Context, req *connect.Request[posternv1.CommitFilesRequest]) (*connect.Response[posternv1.CommitFilesResponse], error) {
	return serve(ctx, f.s, "commit files", func(c Caller) (*posternv1.CommitFilesResponse, error) {
		r := req.Msg
		if len(r.Files) == 0 || len(r.Files) > maxOps {
			return nil, proto.Errorf(proto.CodeInvalid, "%d files: 1 to %d at once", len(r.Files), maxOps)
		}
		var resp *posternv1.CommitFilesResponse
		var entries []auditchain.Entry
		w, err := f.s.change(ctx, c, r.Workspace, func(t *tree) error {
			resp, entries = &posternv1.CommitFilesResponse{}, nil
			for _, one := range r.Files {
				p := putOf(one)
				info, err := t.put(p)
				if errors.Is(err, errQuota) {
					err = t.quotaError()
				}
				var coded *proto.Error
				if err != nil && (!errors.As(err, &coded) || coded.Err != nil) {
					return err
				}
				result := &posternv1.CommitFileResult{File: info}
				e := entryFor(c, "file.put", t.ws.Name, p.path)
				e.Bytes = p.content.size
				if err != nil {
					// What it changed so far, directories say, stays; the rest was not begun.
					result = &posternv1.CommitFileResult{Error: proto.Detail(err)}
					e.Outcome, e.Error = "failed", result.Error.Message
				}
				resp.Results, entries = append(resp.Results, result), append(entries, e)
			}
			return nil
		})
		if err != nil {
			return nil, f.s.auditChange(ctx, c, "file.put", w, r.Workspace, nil, err)
		}
		return resp, f.s.cfg.Append(context.WithoutCancel(ctx), entries)
	})
}

// put stores a file. If it replaces another version than the caller thought, the content
// is kept beside it.
func (t *tree) put(p put) (*posternv1.FileInfo, error) {
	parts, err := splitPath(p.path)
	if err != nil {
		return nil, err
	}
	if len(parts) == 0 {
		return nil, proto.Errorf(proto.CodeInvalid, "the root of a workspace is no file")
	}
	if len(p.symlink) > 0 {
		if err := checkTarget(p.symlink); err != nil {
			return nil, err
		}
		p.content = content{}
	}
	if err := p.content.check(); err != nil {
		return nil, err
	}
	stored, err := t.stored(p.content)
	if err != nil {
		return nil, err
	}
	n, err := t.walk(parts)
	if err != nil {
		return nil, err
	}
	if n != nil && n.Type == filetree.Directory {
		return nil, proto.Errorf(proto.CodeInvalid, "%s:%s is a directory", t.ws.Name, clip(string(p.path)))
	}
	if p.mtime == 0 {
		p.mtime = t.now.UnixNano()
	}
	dir, err := t.parentFor(parts, p.parents)
	if err != nil {
		return nil, err
	}
	name := parts[len(parts)-1]
	if n != nil && (n.Type == filetree.Symlink || len(p.symlink) > 0) {
		if p.base != nil && *p.base != n.Version {
			return t.putBeside(p, dir, name, stored, parts)
		}
		// Another kind of thing takes the name; what was there goes to the trash.
		if err := t.mayCharge(1, int64(stored)); err != nil {
			return nil, err
		}
		if err := t.trash(dir.ID, name, n, t.now.UnixNano()); err != nil {
			return nil, err
		}
		n = nil
	}
	switch {
	case n == nil && (p.base == nil || *p.base == 0):
		if n, err = t.makeFile(p, dir, name, stored); err != nil {
			return nil, err
		}
	case n == nil:
		return t.putBeside(p, dir, name, stored, parts)
	case p.base == nil || *p.base == n.Version:
		if err := t.setVersion(n, p.content, n.Version, p.mtime, t.now.UnixNano()); err != nil {
			return nil, err
		}
		if p.mode != 0 && n.Mode != p.mode&modeBits {
			n.Mode = p.mode & modeBits
			t.touch(n)
		}
	default:
		same, err := t.current(n, p.content)
		if err != nil {
			return nil, err
		}
		if !same {
			return t.putBeside(p, dir, name, stored, parts)
		}
	}
	if _, err := t.done(); err != nil {
		return nil, err
	}
	return t.info(joinPath(parts), &n.Node)
}

func (t *tree) parentFor(parts [][]byte, parents bool) (*node, error) {
	above := parts[:len(parts)-1]
	if parents {
		return t.mkdir(above, true)
	}
	dir, err := t.walk(above)
	if err == nil && dir == nil {
		err = t.noSuch(joinPath(above))
	}
	if err == nil && dir.Type != filetree.Directory {
		err = proto.Errorf(proto.CodeInvalid, "%s:%s is no directory", t.ws.Name, clip(string(joinPath(above))))
	}
	return dir, err
}

// mayCharge is charge without doing it.
func (t *tree) mayCharge(nodes, bytes int64) error {
	if err := t.charge(nodes, bytes, false); err != nil {
		return err
	}
	return t.charge(-nodes, -bytes, true)
}

// makeFile makes a file or a symbolic link under a name that is free.
func (t *tree) makeFile(p put, dir *node, name []byte, stored uint64) (*node, error) {
	if err := t.keep(stored); err != nil {
		return nil, err
	}
	if err := t.charge(1, int64(stored), false); err != nil {
		return nil, err
	}
	at := t.now.UnixNano()
	row := filetree.Node{ID: t.newID(), Type: filetree.File, Mode: p.mode & modeBits, Mtime: p.mtime, Ctime: at, Btime: at}
	if row.Mode == 0 {
		row.Mode = 0o644
	}
	if len(p.symlink) > 0 {
		row.Type, row.Target, row.Size, row.Mode = filetree.Symlink, p.symlink, uint64(len(p.symlink)), 0o777
	}
	n := t.make(row)
	if err := t.link(dir.ID, name, n, at); err != nil {
		return nil, err
	}
	if row.Type == filetree.File && p.content.size > 0 {
		return n, t.addVersion(n, p.content, 0, stored)
	}
	return n, nil
}

// putBeside keeps a content whose base is not what is there under a name of its own.
func (t *tree) putBeside(p put, dir *node, name []byte, stored uint64, parts [][]byte) (*posternv1.FileInfo, error) {
	kept, err := t.freeName(dir.ID, name, "")
	if err != nil {
		return nil, err
	}
	n, err := t.makeFile(p, dir, kept, stored)
	if err != nil {
		return nil, err
	}
	if _, err := t.done(); err != nil {
		return nil, err
	}
	as := joinPath(append(parts[:len(parts)-1:len(parts)-1], kept))
	conflict := &filetree.Conflict{Seq: t.ws.Seq, Path: joinPath(parts), KeptAs: as, KeptID: n.ID, Time: t.now}
	if err := t.tx.PutConflict(t.ctx, conflict); err != nil {
		return nil, err
	}
	info, err := t.info(as, &n.Node)
	if err == nil {
		info.Conflict = protoConflict(conflict)
	}
	return info, err
}

func protoConflict(c *filetree.Conflict) *posternv1.FileConflict {
	return &posternv1.FileConflict{Path: c.Path, KeptAs: c.KeptAs, KeptId: c.KeptID, TimeNs: c.Time.UnixNano(), Agent: c.Agent}
}

// MissingFileChunks implements FileService.
func (f files) MissingFileChunks(ctx context.Context, req *connect.Request[posternv1.MissingFileChunksRequest]) (*connect.Response[posternv1.MissingChunksResponse], error) {
	return serve(ctx, f.s, "missing chunks", func(c Caller) (*posternv1.MissingChunksResponse, error) {
		w, err := f.s.cfg.Store.Workspace(ctx, c.Organization, req.Msg.Workspace)
		if err != nil {
			return nil, err
		}
		return f.s.missing(ctx, w, req.Msg.Hashes)
	})
}

// ListConflicts implements FileService.
func (f files) ListConflicts(ctx context.Context, req *connect.Request[posternv1.WorkspaceRequest]) (*connect.Response[posternv1.ListConflictsResponse], error) {
	return serve(ctx, f.s, "list conflicts", func(c Caller) (*posternv1.ListConflictsResponse, error) {
		resp := &posternv1.ListConflictsResponse{}
		_, err := f.s.read(ctx, c, req.Msg.Workspace, func(t *tree) error {
			all, err := t.tx.Conflicts(ctx, maxConflicts)
			for i := range all {
				resp.Conflicts = append(resp.Conflicts, protoConflict(&all[i]))
			}
			return err
		})
		return resp, err
	})
}

// maxConflicts bounds a list of conflicts.
const maxConflicts = 1000

// UpdateWorkspace implements FileService.
func (f files) UpdateWorkspace(ctx context.Context, req *connect.Request[posternv1.UpdateWorkspaceRequest]) (*connect.Response[posternv1.Workspace], error) {
	return serve(ctx, f.s, "update workspace", func(c Caller) (*posternv1.Workspace, error) {
		r := req.Msg
		w, err := f.s.cfg.Store.Workspace(ctx, c.Organization, r.Workspace)
		if err != nil {
			return nil, err
		}
		if err = checkUpdate(r); err == nil {
			if r.QuotaBytes != nil {
				w.QuotaBytes = *r.QuotaBytes
			}
			if r.QuotaNodes != nil {
				w.QuotaNodes = *r.QuotaNodes
			}
			if r.KeepVersions != nil {
				w.KeepVersions = *r.KeepVersions
			}
			if r.KeepFor != nil {
				w.KeepFor = r.KeepFor.AsDuration()
			}
			if r.SetAgents {
				w.Agents = r.Agents
			}
			if err = f.s.cfg.Store.SetWorkspace(ctx, w); err == nil {
				f.s.bell.ring(w.Number) // who may no longer see it is cut off
			}
		}
		return protoWorkspace(w), f.s.audited(ctx, entryFor(c, "workspace.update", w.Name, nil), err)
	})
}

// maxAgents bounds the list of agents that may mount a workspace.
const maxAgents = 1000

func checkUpdate(r *posternv1.UpdateWorkspaceRequest) error {
	switch {
	case r.QuotaBytes != nil && *r.QuotaBytes > 1<<62, r.QuotaNodes != nil && *r.QuotaNodes > 1<<62:
		return proto.Errorf(proto.CodeInvalid, "a quota of more than %d: say 0 for none", uint64(1<<62))
	case r.KeepVersions != nil && *r.KeepVersions > 100_000:
		return proto.Errorf(proto.CodeInvalid, "%d versions: at most 100000 are kept", *r.KeepVersions)
	case r.KeepFor != nil && (r.KeepFor.CheckValid() != nil || r.KeepFor.AsDuration() < 0 || r.KeepFor.AsDuration() > 100*365*24*time.Hour):
		return proto.Errorf(proto.CodeInvalid, "old versions are kept for at least 0 and at most 100 years")
	case len(r.Agents) > maxAgents:
		return proto.Errorf(proto.CodeInvalid, "%d agents: at most %d", len(r.Agents), maxAgents)
	case len(r.Agents) > 0 && !r.SetAgents:
		return proto.Errorf(proto.CodeInvalid, "agents without set_agents")
	}
	for _, name := range r.Agents {
		if name == "" || len(name) > 63 {
			return proto.Errorf(proto.CodeInvalid, "%q is no name of an agent", clip(name))
		}
	}
	return nil
}
