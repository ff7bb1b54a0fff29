package workspace

import (
	"context"
	"io"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// What servers of other protocols ask for, in place of the HTTP that FileService has beside
// it. Who asks is in the context, as for every request (Config.Caller).

// Files is FileService, to be called in this process.
func (s *Service) Files() posternv1connect.FileServiceHandler { return files{s: s} }

// Read opens a file's newest content, from byte from on; the caller closes it. It fails with
// UNAVAILABLE if that is not the content with that ETag any more.
func (s *Service) Read(ctx context.Context, workspace, path, etag string, from int64) (io.ReadCloser, error) {
	c := s.cfg.Caller(ctx)
	leave, err := s.busy.enter("user "+c.TokenId, userBulk)
	if err != nil {
		return nil, err
	}
	b, w, err := s.open(ctx, c, workspace, []byte(path), 0)
	if err == nil && b.etag != etag {
		err = proto.Errorf(proto.CodeUnavailable, "%s:%s was changed meanwhile: try again", clip(workspace), clip(path))
	}
	if err == nil {
		e := entryFor(c, "file.get", w.Name, []byte(path))
		e.Bytes = b.size
		err = s.audited(ctx, e, nil)
	}
	if err != nil {
		leave()
		return nil, err
	}
	b.at = from
	return &readCloser{body: b, leave: leave}, nil
}

type readCloser struct {
	*body
	leave func()
}

// Read implements io.Reader.
func (r *readCloser) Read(p []byte) (int, error) {
	n, err := r.body.Read(p)
	r.s.cfg.Metrics.moved("user", "out", n)
	return n, err
}

// Close implements io.Closer. It may be called once.
func (r *readCloser) Close() error {
	r.leave()
	return nil
}

// Write makes a file of all that r has, in place of what is there, in a directory that is there.
// If r fails nothing is made.
func (s *Service) Write(ctx context.Context, workspace, path string, r io.Reader) (*posternv1.FileInfo, error) {
	c := s.cfg.Caller(ctx)
	leave, err := s.busy.enter("user "+c.TokenId, userBulk)
	if err != nil {
		return nil, err
	}
	defer leave()
	w, err := s.cfg.Store.Workspace(ctx, c.Organization, workspace)
	if err != nil {
		return nil, err
	}
	p := put{path: []byte(path)}
	if p.content, err = s.receive(ctx, w, r); err != nil {
		return nil, err
	}
	return s.putFile(ctx, c, w.ID, p)
}

// SetAttribute changes an extended attribute of a file or directory in one step. change gets
// what it is, nil if there is none, and gives what it becomes, nil for none; it may be called again.
func (s *Service) SetAttribute(ctx context.Context, workspace, path, name string, change func(old []byte) ([]byte, error)) error {
	c := s.cfg.Caller(ctx)
	w, err := s.change(ctx, c, workspace, func(t *tree) error {
		n, _, err := t.find([]byte(path))
		if err != nil {
			return err
		}
		all, err := decodeXattrs(n.Xattrs)
		if err != nil {
			return err
		}
		value, err := change(all[name])
		switch {
		case err != nil:
			return err
		case value == nil:
			delete(all, name)
		case all == nil:
			all = map[string][]byte{name: value}
		default:
			all[name] = value
		}
		if n.Xattrs, err = encodeXattrs(all); err != nil {
			return err
		}
		n.Ctime = t.now.UnixNano()
		t.touch(n)
		_, err = t.done()
		return err
	})
	return s.auditChange(ctx, c, "file.attributes", w, workspace, []byte(path), err)
}
