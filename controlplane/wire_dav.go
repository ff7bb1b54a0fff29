package main

import (
	"context"
	"io"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/controlplane/api"
	"github.com/postern-dev/postern/controlplane/dav"
	"github.com/postern-dev/postern/controlplane/ratelimit"
	"github.com/postern-dev/postern/controlplane/token"
	"github.com/postern-dev/postern/controlplane/workspace"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

var (
	_ dav.Tokens = davTokens{}
	_ dav.Files  = davFiles{}
)

// newDAV makes what serves workspaces by WebDAV.
func (s *Server) newDAV(requests *ratelimit.Limiter) *dav.Server {
	return dav.New(dav.Config{
		Tokens: davTokens{s.tokens}, Files: davFiles{s.files}, Permit: mayUseFiles, Remote: api.RemoteAddress, Requests: requests,
	})
}

// mayUseFiles fails for a role that may not read files, or write them.
func mayUseFiles(p *posternv1.Principal, write bool) error {
	least := token.Viewer
	if write {
		least = token.Analyst
	}
	if token.Role(p.Role).Includes(least) {
		return nil
	}
	return proto.Errorf(proto.CodeRoleDenied, "token %s has the role %s: this needs %s", p.TokenName, p.Role, least)
}

// davTokens tells who asks.
type davTokens struct{ *token.Service }

func (t davTokens) Authenticate(ctx context.Context, bearer, remote string) (dav.Caller, error) {
	p, err := t.Service.Authenticate(ctx, bearer, remote)
	return dav.Caller{Principal: p.Principal, Remote: remote}, err
}

// davFiles asks FileService, in the caller's name.
type davFiles struct{ *workspace.Service }

func davContext(ctx context.Context, c dav.Caller) context.Context {
	return api.WithCaller(ctx, api.Caller{Principal: c.Principal, Remote: c.Remote})
}

// Workspaces implements dav.Files.
func (f davFiles) Workspaces(ctx context.Context, c dav.Caller) ([]*posternv1.Workspace, error) {
	resp, err := f.Files().ListWorkspaces(davContext(ctx, c), connect.NewRequest(&posternv1.ListWorkspacesRequest{}))
	if err != nil {
		return nil, proto.FromConnect(err)
	}
	return resp.Msg.Workspaces, nil
}

// Get implements dav.Files.
func (f davFiles) Get(ctx context.Context, c dav.Caller, name, path string) (*posternv1.FileInfo, error) {
	resp, err := f.Files().GetFile(davContext(ctx, c), connect.NewRequest(&posternv1.FileRequest{Workspace: name, Path: []byte(path)}))
	if err != nil {
		return nil, proto.FromConnect(err)
	}
	return resp.Msg, nil
}

// List implements dav.Files.
func (f davFiles) List(ctx context.Context, c dav.Caller, name, path string, take func(*posternv1.FileInfo) error) error {
	r := &posternv1.ListFilesRequest{Workspace: name, Path: []byte(path)}
	for {
		resp, err := f.Files().ListFiles(davContext(ctx, c), connect.NewRequest(r))
		if err != nil {
			return proto.FromConnect(err)
		}
		for _, info := range resp.Msg.Files {
			if err := take(info); err != nil {
				return err
			}
		}
		if r.PageToken = resp.Msg.NextPageToken; len(r.PageToken) == 0 {
			return nil
		}
	}
}

// MakeDirectory implements dav.Files.
func (f davFiles) MakeDirectory(ctx context.Context, c dav.Caller, name, path string) error {
	_, err := f.Files().MakeDirectory(davContext(ctx, c), connect.NewRequest(&posternv1.MakeDirectoryRequest{Workspace: name, Path: []byte(path)}))
	return proto.FromConnect(err)
}

// SetAttribute implements dav.Files.
func (f davFiles) SetAttribute(ctx context.Context, c dav.Caller, name, path, attribute string, change func([]byte) ([]byte, error)) error {
	return f.Service.SetAttribute(davContext(ctx, c), name, path, attribute, change)
}

// Move implements dav.Files.
func (f davFiles) Move(ctx context.Context, c dav.Caller, name, from, to string) error {
	r := &posternv1.MoveFileRequest{Workspace: name, From: []byte(from), To: []byte(to)}
	_, err := f.Files().MoveFile(davContext(ctx, c), connect.NewRequest(r))
	return proto.FromConnect(err)
}

// Remove implements dav.Files.
func (f davFiles) Remove(ctx context.Context, c dav.Caller, name, path string) error {
	r := &posternv1.RemoveFileRequest{Workspace: name, Path: []byte(path), Recursive: true}
	_, err := f.Files().RemoveFile(davContext(ctx, c), connect.NewRequest(r))
	return proto.FromConnect(err)
}

// Read implements dav.Files.
func (f davFiles) Read(ctx context.Context, c dav.Caller, name string, info *posternv1.FileInfo, from int64) (io.ReadCloser, error) {
	return f.Service.Read(davContext(ctx, c), name, string(info.Path), info.Etag, from)
}

// Write implements dav.Files.
func (f davFiles) Write(ctx context.Context, c dav.Caller, name, path string, r io.Reader) (*posternv1.FileInfo, error) {
	return f.Service.Write(davContext(ctx, c), name, path, r)
}
