package main

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/agentd/attach/mountd"
	"github.com/postern-dev/postern/agentd/host"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

const (
	// reportEvery is how often the control plane is told of unsent writes while there are some.
	reportEvery = time.Minute
	reportTime  = 10 * time.Second
)

// attachedHost is what the control plane may ask of mounts.
type attachedHost struct{ daemon *Daemon }

var _ host.Attachments = attachedHost{}

// AttachStatus implements host.Attachments.
func (h attachedHost) AttachStatus(ctx context.Context) ([]*posternv1.MountStatus, error) {
	a := h.daemon.attach
	if a == nil {
		return nil, proto.Errorf(proto.CodeUnavailable, "agentd is starting: try again")
	}
	ctx, cancel := context.WithTimeout(ctx, askMountd)
	defer cancel()
	s, err := a.client.Status(ctx)
	switch {
	case err == nil:
		return a.mountStatus(ctx, s), nil
	case !h.daemon.config.Load().Attachments.Enabled:
		return nil, nil // nothing is mounted, and nothing unsent is known of
	}
	return nil, err
}

// mountStatus is what mountd says of itself, for the control plane.
func (a *attachments) mountStatus(ctx context.Context, s mountd.Status) []*posternv1.MountStatus {
	out := []*posternv1.MountStatus{}
	for _, w := range s.Workspaces {
		if w.Bucket {
			continue // it is none of the control plane's
		}
		m := &posternv1.MountStatus{
			Workspace: w.Workspace, ReadOnly: w.ReadOnly, UnsentOps: uint64(max(w.UnsentOps, 0)), UnsentBytes: uint64(max(w.UnsentBytes, 0)),
			CachedBytes: uint64(max(w.CacheBytes, 0)), LastError: w.LastError,
		}
		if id, err := os.ReadFile(filepath.Join(a.client.Dir, replicasDir, w.Workspace+".id")); err == nil {
			m.MountId = strings.TrimSpace(string(id))
		}
		if d, err := a.details(ctx, w); err == nil {
			m.UnsentPaths = d.Unsent
			for _, c := range d.Conflicts {
				m.Conflicts = append(m.Conflicts, &posternv1.FileConflict{Path: c.Path, KeptAs: c.KeptAs, TimeNs: c.TimeNs})
			}
		}
		if !w.Oldest.IsZero() {
			m.OldestUnsent = timestamppb.New(w.Oldest)
		}
		for _, h := range s.Holders {
			if h.Workspace != w.Workspace {
				continue
			}
			if dir, ok := strings.CutPrefix(h.Name, "host:"); ok {
				m.Targets = append(m.Targets, dir)
			} else if id, ok := strings.CutPrefix(h.Name, "kernel:"); ok {
				m.Kernels = append(m.Kernels, id)
			}
		}
		out = append(out, m)
	}
	return out
}

// details asks what a status counts, if it counts anything.
func (a *attachments) details(ctx context.Context, w mountd.MountedStatus) (mountd.Details, error) {
	if w.UnsentOps == 0 && w.Conflicts == 0 {
		return mountd.Details{}, nil
	}
	return a.client.Details(ctx, w.Workspace)
}

// report tells the control plane what is not sent: when that began or ended, every minute
// in between, and once after the start.
func (a *attachments) report(ctx context.Context, s mountd.Status) {
	unsent := false
	for _, w := range s.Workspaces {
		unsent = unsent || !w.Bucket && (w.UnsentOps > 0 || w.UnsentBytes > 0)
	}
	due := !a.reported || unsent != a.unsent || unsent && time.Since(a.told) >= reportEvery
	if !due || a.daemon.link == nil {
		return
	}
	t, err := a.daemon.link.Transport(false)
	if err != nil {
		return // told when the link is up
	}
	ctx, cancel := context.WithTimeout(ctx, reportTime)
	defer cancel()
	client := posternv1connect.NewAttachServiceClient(&http.Client{Transport: t}, "http://controlplane")
	if _, err := client.ReportStatus(ctx, connect.NewRequest(&posternv1.ReportStatusRequest{Mounts: a.mountStatus(ctx, s)})); err != nil {
		if proto.CodeOf(err) != proto.CodeInternal && connect.CodeOf(err) != connect.CodeUnimplemented {
			return // again at the next look
		}
		a.daemon.logger.Debug("control plane does not take the state of mounts", "err", err)
	}
	a.reported, a.unsent, a.told = true, unsent, time.Now()
}
