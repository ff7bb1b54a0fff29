package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/postern-dev/postern/agentd/attach/bucket"
	"github.com/postern-dev/postern/agentd/attach/bucketfs"
	"github.com/postern-dev/postern/agentd/attach/fuseserver"
	"github.com/postern-dev/postern/agentd/attach/mountd"
	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/sqlsession"
)

// bucketsDir, in attachDir, has a directory for each bucket: its cache, and what is not uploaded.
const bucketsDir = "buckets"

// bucketNames are the buckets that this host may have something unsent of.
func bucketNames(dir, file string) []string {
	c, err := config.Load(file, sqlsession.ValidateDSN)
	if err != nil {
		return nil
	}
	var out []string
	for _, b := range c.Buckets {
		if staged, err := os.ReadDir(filepath.Join(dir, bucketsDir, b.Name, "staged")); err == nil && len(staged) > 0 {
			out = append(out, b.Name)
		}
	}
	return out
}

// openBucketMount opens a bucket for mountd; found is false where the name is a workspace's.
func openBucketMount(dir, file, name string, readOnly bool, logger *slog.Logger) (w mountd.Workspace, found bool, err error) {
	c, err := config.Load(file, sqlsession.ValidateDSN)
	if err != nil {
		// A mount that is taken over must go on: what it may do, agentd decides anew with each request.
		_, replica := os.Stat(filepath.Join(dir, replicasDir, name))
		if _, serr := os.Stat(filepath.Join(dir, bucketsDir, name)); serr != nil || replica == nil {
			return nil, false, nil
		}
		c = config.Default()
	} else if _, ok := c.Attachments.Bucket(name); !ok {
		return nil, false, nil
	}
	how, _ := c.Bucket(name)
	client := bucket.Dial(filepath.Join(dir, proxySocket), name)
	logger = logger.With("bucket", name)
	dir = filepath.Join(dir, bucketsDir, name)
	b, err := bucketfs.Open(bucketfs.Config{
		Dir: dir, Name: name, Remote: client, ReadOnly: readOnly, TTL: how.TTL,
		CacheBytes: int64(c.Attachments.Cache), MaxStaged: int64(c.Attachments.Unsent), Log: logger,
	})
	if err != nil {
		client.Close()
		return nil, true, err
	}
	kept, err := os.Stat(dir)
	if err != nil {
		err = errors.Join(err, b.Close())
		client.Close()
		return nil, true, err
	}
	return &bucketMount{Bucket: b, client: client, logger: logger, dir: dir, kept: kept}, true, nil
}

// bucketMount makes a bucket what mountd asks for.
type bucketMount struct {
	*bucketfs.Bucket
	client *bucket.Client
	logger *slog.Logger
	dir    string
	kept   os.FileInfo // of dir when it was opened
}

var _ mountd.Workspace = (*bucketMount)(nil)

// Mount implements mountd.Workspace.
func (w *bucketMount) Mount(squash bool) (mountd.Mount, error) {
	options := bucketfs.Options{}
	if squash {
		options.Slot = 1
	}
	fs := w.Bucket.Mount(options)
	opts := bucketfs.MountOptions()
	return mountd.Mount{
		FS: fs, Options: opts, DefaultPermissions: !squash, SyncDeadline: bucketfs.UploadDeadline,
		SetKernel: func(_ *fuseserver.Conn, inherited bool) {
			if err := fs.Begin(inherited); err != nil {
				w.logger.Error("mount not taken over as it was", "err", err)
			}
		},
		Ended: fs.End,
	}, nil
}

// Inherit implements mountd.Workspace: the file systems learn it by themselves.
func (*bucketMount) Inherit() {}

// Fresh implements mountd.Workspace: a bucket that cannot be listed is not mounted.
func (w *bucketMount) Fresh() error {
	ctx, cancel := context.WithTimeout(context.Background(), remoteDeadline)
	defer cancel()
	w.Bucket.Fresh()
	return w.Check(ctx)
}

// Status implements mountd.Workspace.
func (w *bucketMount) Status() mountd.WorkspaceStatus {
	s := w.Bucket.Status()
	return mountd.WorkspaceStatus{
		Bucket: true, UnsentOps: s.Unsent, UnsentBytes: s.UnsentBytes, Oldest: s.Oldest, CacheBytes: s.CacheBytes, Nodes: s.Nodes,
		Hidden: s.Hidden, Connected: s.Connected, LastError: s.LastError,
	}
}

// Gone implements mountd.Workspace.
func (w *bucketMount) Gone() bool {
	now, err := os.Stat(w.dir)
	return errors.Is(err, os.ErrNotExist) || err == nil && !os.SameFile(w.kept, now)
}

// Conflicts implements mountd.Workspace: a bucket has no versions, the last writer wins.
func (*bucketMount) Conflicts() []mountd.Conflict { return nil }

// Close implements mountd.Workspace.
func (w *bucketMount) Close() error {
	err := w.Bucket.Close()
	w.client.Close()
	return err
}
