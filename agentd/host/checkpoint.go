package host

import (
	"context"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// Actions of checkpoints in the audit log; package audit knows them by the same names.
const (
	actionKernelCheckpoint  = "kernel.checkpoint"
	actionKernelSuspend     = "kernel.suspend"
	actionKernelResume      = "kernel.resume"
	actionKernelRollback    = "kernel.rollback"
	actionKernelFork        = "kernel.fork"
	actionCheckpointProtect = "kernel.checkpoint.protect"
	actionCheckpointDelete  = "kernel.checkpoint.delete"
)

// Checkpoints saves kernels and brings them back; everything within one organization.
// Its errors carry codes of package proto. What was begun is finished, whoever hangs up.
type Checkpoints interface {
	CheckKernel(ctx context.Context, organization, kernel string) ([]*posternv1.KernelObstacle, error)
	SaveKernel(ctx context.Context, organization string, r *posternv1.CheckpointKernelRequest) (*posternv1.CheckpointKernelResponse, error)
	SuspendKernel(ctx context.Context, organization, kernel string) (*posternv1.CheckpointKernelResponse, error)
	ResumeKernel(ctx context.Context, organization, kernel string) error
	RollbackKernel(ctx context.Context, organization, kernel, checkpoint string) error
	// ForkKernel returns the checkpoint that id was made of.
	ForkKernel(ctx context.Context, organization, kernel, checkpoint, id string) (string, error)
	ListCheckpoints(organization, kernel string) (list []*posternv1.KernelCheckpoint, damaged []string)
	ProtectCheckpoint(organization, kernel, checkpoint string, on bool) (*posternv1.KernelCheckpoint, error)
	DeleteCheckpoint(ctx context.Context, organization, kernel, checkpoint string) error
}

// checkpointRPC is the CheckpointHostService. Checkpoints are of who started the kernel
// alone: they hold all that it knows.
type checkpointRPC struct{ h *Host }

var _ posternv1connect.CheckpointHostServiceHandler = checkpointRPC{}

// checkpointDo finds the kernel for its owner, does something to it and records it;
// action is empty for what only looks.
func checkpointDo[R any](ctx context.Context, h *Host, id, about, action string, p *posternv1.Principal, do func(ctx context.Context, organization string) (*R, error)) (*connect.Response[R], error) {
	began := time.Now()
	entry := kernelEntry(action, id, p)
	if about != "" {
		entry.Statement = "checkpoint " + clip(about)
	}
	_, err := h.kernelFor(ctx, id, p, true)
	if err == nil && action != "" {
		err = h.settle()
	}
	var r *R
	if err == nil {
		if action != "" {
			ctx = context.WithoutCancel(ctx)
		}
		r, err = do(ctx, p.GetOrganization())
	}
	if action != "" {
		h.note(entry, began, err)
	}
	if err != nil {
		return nil, proto.ConnectError(err)
	}
	return connect.NewResponse(r), nil
}

// CheckKernel names what stands in a checkpoint's way.
func (s checkpointRPC) CheckKernel(ctx context.Context, r *connect.Request[posternv1.KernelCheckpointRequest]) (*connect.Response[posternv1.CheckKernelResponse], error) {
	return checkpointDo(ctx, s.h, r.Msg.KernelId, "", "", r.Msg.Principal, func(ctx context.Context, organization string) (*posternv1.CheckKernelResponse, error) {
		found, err := s.h.cfg.Checkpoints.CheckKernel(ctx, organization, r.Msg.KernelId)
		return &posternv1.CheckKernelResponse{Obstacles: found}, err
	})
}

// CheckpointKernel saves a kernel, which goes on.
func (s checkpointRPC) CheckpointKernel(ctx context.Context, r *connect.Request[posternv1.CheckpointKernelRequest]) (*connect.Response[posternv1.CheckpointKernelResponse], error) {
	return checkpointDo(ctx, s.h, r.Msg.KernelId, "", actionKernelCheckpoint, r.Msg.Principal, func(ctx context.Context, organization string) (*posternv1.CheckpointKernelResponse, error) {
		return s.h.cfg.Checkpoints.SaveKernel(ctx, organization, r.Msg)
	})
}

// SuspendKernel saves a kernel and ends its processes.
func (s checkpointRPC) SuspendKernel(ctx context.Context, r *connect.Request[posternv1.KernelCheckpointRequest]) (*connect.Response[posternv1.CheckpointKernelResponse], error) {
	return checkpointDo(ctx, s.h, r.Msg.KernelId, "", actionKernelSuspend, r.Msg.Principal, func(ctx context.Context, organization string) (*posternv1.CheckpointKernelResponse, error) {
		return s.h.cfg.Checkpoints.SuspendKernel(ctx, organization, r.Msg.KernelId)
	})
}

// ResumeKernel brings a suspended kernel back.
func (s checkpointRPC) ResumeKernel(ctx context.Context, r *connect.Request[posternv1.KernelCheckpointRequest]) (*connect.Response[posternv1.Kernel], error) {
	return checkpointDo(ctx, s.h, r.Msg.KernelId, "", actionKernelResume, r.Msg.Principal, func(ctx context.Context, organization string) (*posternv1.Kernel, error) {
		if err := s.h.cfg.Checkpoints.ResumeKernel(ctx, organization, r.Msg.KernelId); err != nil {
			return nil, err
		}
		return s.h.cfg.Kernels.Get(ctx, r.Msg.KernelId)
	})
}

// RollbackKernel puts a kernel back to a checkpoint.
func (s checkpointRPC) RollbackKernel(ctx context.Context, r *connect.Request[posternv1.KernelCheckpointRequest]) (*connect.Response[posternv1.Kernel], error) {
	return checkpointDo(ctx, s.h, r.Msg.KernelId, r.Msg.CheckpointId, actionKernelRollback, r.Msg.Principal, func(ctx context.Context, organization string) (*posternv1.Kernel, error) {
		if err := s.h.cfg.Checkpoints.RollbackKernel(ctx, organization, r.Msg.KernelId, r.Msg.CheckpointId); err != nil {
			return nil, err
		}
		return s.h.cfg.Kernels.Get(ctx, r.Msg.KernelId)
	})
}

// ForkKernel makes a second kernel. The host's policy decides on it as on a start.
func (s checkpointRPC) ForkKernel(ctx context.Context, r *connect.Request[posternv1.ForkKernelRequest]) (*connect.Response[posternv1.ForkKernelResponse], error) {
	m := r.Msg
	return checkpointDo(ctx, s.h, m.KernelId, m.CheckpointId, actionKernelFork, m.Principal, func(ctx context.Context, organization string) (*posternv1.ForkKernelResponse, error) {
		k, err := s.h.cfg.Kernels.Get(ctx, m.KernelId)
		if err != nil {
			return nil, err
		}
		if verdict := s.h.cfg.DecideKernel(&posternv1.StartKernelRequest{Id: m.NewKernelId, Spec: k.Spec, Principal: m.Principal}); !verdict.Allowed {
			return nil, proto.Errorf(proto.CodePolicyDenied, "%s", verdict.Reason)
		}
		checkpoint, err := s.h.cfg.Checkpoints.ForkKernel(ctx, organization, m.KernelId, m.CheckpointId, m.NewKernelId)
		if err != nil {
			return nil, err
		}
		k, err = s.h.cfg.Kernels.Get(ctx, m.NewKernelId)
		return &posternv1.ForkKernelResponse{Kernel: k, CheckpointId: checkpoint}, err
	})
}

// ListCheckpoints lists a kernel's checkpoints.
func (s checkpointRPC) ListCheckpoints(ctx context.Context, r *connect.Request[posternv1.KernelCheckpointRequest]) (*connect.Response[posternv1.ListCheckpointsResponse], error) {
	return checkpointDo(ctx, s.h, r.Msg.KernelId, "", "", r.Msg.Principal, func(_ context.Context, organization string) (*posternv1.ListCheckpointsResponse, error) {
		list, damaged := s.h.cfg.Checkpoints.ListCheckpoints(organization, r.Msg.KernelId)
		return &posternv1.ListCheckpointsResponse{Checkpoints: list, Damaged: damaged}, nil
	})
}

// ProtectCheckpoint keeps a checkpoint, or lets it be deleted by the host's limits.
func (s checkpointRPC) ProtectCheckpoint(ctx context.Context, r *connect.Request[posternv1.ProtectCheckpointRequest]) (*connect.Response[posternv1.KernelCheckpoint], error) {
	return checkpointDo(ctx, s.h, r.Msg.KernelId, r.Msg.CheckpointId, actionCheckpointProtect, r.Msg.Principal, func(_ context.Context, organization string) (*posternv1.KernelCheckpoint, error) {
		return s.h.cfg.Checkpoints.ProtectCheckpoint(organization, r.Msg.KernelId, r.Msg.CheckpointId, r.Msg.On)
	})
}

// DeleteCheckpoint removes a checkpoint.
func (s checkpointRPC) DeleteCheckpoint(ctx context.Context, r *connect.Request[posternv1.KernelCheckpointRequest]) (*connect.Response[posternv1.DeleteCheckpointResponse], error) {
	return checkpointDo(ctx, s.h, r.Msg.KernelId, r.Msg.CheckpointId, actionCheckpointDelete, r.Msg.Principal, func(ctx context.Context, organization string) (*posternv1.DeleteCheckpointResponse, error) {
		return &posternv1.DeleteCheckpointResponse{}, s.h.cfg.Checkpoints.DeleteCheckpoint(ctx, organization, r.Msg.KernelId, r.Msg.CheckpointId)
	})
}

// NoteKernelSuspended records that the host's policy suspended a kernel.
func (h *Host) NoteKernelSuspended(k *posternv1.Kernel, reason string) {
	h.finish(auditchain.Entry{Action: actionKernelSuspend, Actor: "host", Target: k.Id, Verdict: "allowed", Outcome: "done", Statement: reason}, true)
}
