package host

import (
	"context"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Attachments are the workspaces that are open on this host.
type Attachments interface {
	// AttachStatus tells of each what is mounted where, and what the control plane has not
	// got; without agent, online and as_of.
	AttachStatus(ctx context.Context) ([]*posternv1.MountStatus, error)
}

// attachRPC is the AttachHostService.
type attachRPC struct{ h *Host }

// GetAttachStatus tells of one workspace, by name, or of all. An id names none that is
// known here, so the caller gets all and looks itself.
func (s attachRPC) GetAttachStatus(ctx context.Context, r *connect.Request[posternv1.GetAttachStatusRequest]) (*connect.Response[posternv1.GetAttachStatusResponse], error) {
	all, err := s.h.cfg.Attachments.AttachStatus(ctx)
	if err != nil {
		return nil, proto.ConnectError(err)
	}
	out := &posternv1.GetAttachStatusResponse{Mounts: all}
	for _, m := range all {
		if m.Workspace == r.Msg.Workspace {
			out.Mounts = []*posternv1.MountStatus{m}
		}
	}
	return connect.NewResponse(out), nil
}
