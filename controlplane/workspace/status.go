package workspace

import (
	"context"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"
	protobuf "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// maxReport bounds the encoded status of a mount that is kept, in bytes.
	maxReport = 256 << 10
	// askTime bounds how long one agent is waited for, and askParallel how many are asked
	// at once.
	askTime     = 5 * time.Second
	askParallel = 16
)

// ReportStatus implements AttachService.
func (h attach) ReportStatus(ctx context.Context, req *connect.Request[posternv1.ReportStatusRequest]) (*connect.Response[posternv1.ReportStatusResponse], error) {
	return answer(ctx, h.s, "report status", func(a Agent) (*posternv1.ReportStatusResponse, error) {
		if len(req.Msg.Mounts) > maxMounts {
			return nil, proto.Errorf(proto.CodeInvalid, "%d mounts: at most %d", len(req.Msg.Mounts), maxMounts)
		}
		statuses := map[string][]byte{}
		for _, m := range req.Msg.Mounts {
			if !mountID.MatchString(m.GetMountId()) {
				return nil, proto.Errorf(proto.CodeInvalid, "a mount's id has 8 to 64 letters, digits, '-' and '_'")
			}
			encoded, err := protobuf.Marshal(m)
			if err != nil {
				return nil, err
			}
			if len(encoded) > maxReport { // the numbers say enough
				m = protobuf.CloneOf(m)
				m.UnsentPaths, m.Conflicts = nil, nil
				if encoded, err = protobuf.Marshal(m); err != nil {
					return nil, err
				}
				if len(encoded) > maxReport {
					return nil, proto.Errorf(proto.CodeInvalid, "the status of mount %s has %d bytes: at most %d", m.MountId, len(encoded), maxReport)
				}
			}
			statuses[m.MountId] = encoded
		}
		return &posternv1.ReportStatusResponse{}, h.s.cfg.Store.SetMountStatus(ctx, a.Organization, a.ID, statuses, time.Now())
	})
}

// GetFileStatus implements FileService.
func (f files) GetFileStatus(ctx context.Context, req *connect.Request[posternv1.GetFileStatusRequest]) (*connect.Response[posternv1.GetFileStatusResponse], error) {
	return serve(ctx, f.s, "file status", func(c Caller) (*posternv1.GetFileStatusResponse, error) {
		name := ""
		if req.Msg.Workspace != "" {
			w, err := f.s.cfg.Store.Workspace(ctx, c.Organization, req.Msg.Workspace)
			if err != nil {
				return nil, err
			}
			name = w.Name
		}
		return f.s.status(ctx, c.Organization, name, "")
	})
}

// status is what hosts have not uploaded: what agents that are online say, and what the
// others said last.
func (s *Service) status(ctx context.Context, organization, workspace, agent string) (*posternv1.GetFileStatusResponse, error) {
	reports, err := s.cfg.Store.MountReports(ctx, organization, workspace, agent)
	if err != nil {
		return nil, err
	}
	byAgent := map[string][]filetree.MountReport{}
	var agents []string
	for _, r := range reports {
		if byAgent[r.Agent] == nil {
			agents = append(agents, r.Agent)
		}
		byAgent[r.Agent] = append(byAgent[r.Agent], r)
	}
	resp := &posternv1.GetFileStatusResponse{}
	var mu sync.Mutex
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(askParallel)
	for _, id := range agents {
		group.Go(func() error {
			mounts, silent, err := s.statusOf(gctx, organization, workspace, id, byAgent[id])
			mu.Lock()
			defer mu.Unlock()
			resp.Mounts = append(resp.Mounts, mounts...)
			if silent != "" {
				resp.Silent = append(resp.Silent, silent)
			}
			return err
		})
	}
	return resp, group.Wait()
}

// statusOf is the status of one agent's mounts; silent is its name if it is online and
// does not answer.
func (s *Service) statusOf(ctx context.Context, organization, workspace, id string, reports []filetree.MountReport) (mounts []*posternv1.MountStatus, silent string, err error) {
	agent, err := s.cfg.Store.FindAgent(ctx, organization, id)
	switch {
	case proto.CodeOf(err) == proto.CodeNotFound:
		return nil, "", nil // revoked
	case err != nil:
		return nil, "", err
	}
	one, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	said, err := s.cfg.Ask(one, id, &posternv1.GetAttachStatusRequest{Workspace: workspace})
	if err == nil {
		for _, m := range said.Mounts {
			if workspace != "" && m.Workspace != workspace {
				continue
			}
			m.Agent, m.Online, m.AsOf = agent.Name, true, timestamppb.Now()
			mounts = append(mounts, m)
		}
		return mounts, "", nil
	}
	if proto.CodeOf(err) != proto.CodeAgentOffline {
		silent = agent.Name
	}
	for _, r := range reports {
		if r.Status == nil {
			continue
		}
		m := &posternv1.MountStatus{}
		if err := protobuf.Unmarshal(r.Status, m); err != nil {
			return nil, silent, err
		}
		m.Agent, m.Workspace, m.MountId, m.Online, m.AsOf = agent.Name, r.Workspace, r.Mount, false, timestamppb.New(r.Reported)
		mounts = append(mounts, m)
	}
	return mounts, silent, nil
}

// Unsent tells what an agent has not uploaded, for whoever is about to revoke it: the
// number of operations and a name of a workspace that they are of. An agent that is offline is
// judged by what it said last; one that is online, has mounts and does not answer until ctx
// ends, or within five seconds, is an error: what it said last may no longer be true.
func (s *Service) Unsent(ctx context.Context, organization, agent string) (ops uint64, workspace string, err error) {
	return s.unsent(ctx, organization, "", agent)
}

func (s *Service) unsent(ctx context.Context, organization, workspace, agent string) (ops uint64, of string, err error) {
	status, err := s.status(ctx, organization, workspace, agent)
	if err != nil {
		return 0, "", err
	}
	for _, m := range status.Mounts {
		if m.UnsentOps > 0 || m.UnsentBytes > 0 {
			ops, of = ops+max(m.UnsentOps, 1), m.Workspace
		}
	}
	if ops == 0 && len(status.Silent) > 0 {
		return 0, "", proto.Errorf(proto.CodeUnavailable, "could not find out whether agent %s has writes that are not uploaded: it has a tunnel and does not answer; try again, or use --force: what is not uploaded is then on its host alone", status.Silent[0])
	}
	return ops, of, nil
}

// DeleteWorkspace implements FileService.
func (f files) DeleteWorkspace(ctx context.Context, req *connect.Request[posternv1.DeleteWorkspaceRequest]) (*connect.Response[posternv1.DeleteWorkspaceResponse], error) {
	return serve(ctx, f.s, "delete workspace", func(c Caller) (*posternv1.DeleteWorkspaceResponse, error) {
		r := req.Msg
		w, err := f.s.cfg.Store.Workspace(ctx, c.Organization, r.Workspace)
		if err != nil {
			return nil, err
		}
		if !r.Force {
			var ops uint64
			if ops, _, err = f.s.unsent(ctx, c.Organization, w.Name, ""); err == nil && ops > 0 {
				err = proto.Errorf(proto.CodeInvalid, "hosts have %d operations on workspace %s that are not uploaded (`postern file status %s`): wait for them, or use --force to lose them", ops, w.Name, w.Name)
			}
		}
		if err == nil {
			if err = f.s.cfg.Store.DeleteWorkspace(ctx, w.Number, time.Now()); err == nil {
				f.s.bell.ring(w.Number)
			}
		}
		return &posternv1.DeleteWorkspaceResponse{}, f.s.audited(ctx, entryFor(c, "workspace.delete", w.Name, nil), err)
	})
}
