package api

import (
	"context"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Checkpoints saves kernels and brings them back; it writes the audit entries itself.
type Checkpoints interface {
	CheckKernel(context.Context, Caller, *posternv1.KernelCheckpointRequest) (*posternv1.CheckKernelResponse, error)
	CheckpointKernel(context.Context, Caller, *posternv1.CheckpointKernelRequest) (*posternv1.CheckpointKernelResponse, error)
	SuspendKernel(context.Context, Caller, *posternv1.KernelCheckpointRequest) (*posternv1.CheckpointKernelResponse, error)
	ResumeKernel(context.Context, Caller, *posternv1.KernelCheckpointRequest) (*posternv1.Kernel, error)
	RollbackKernel(context.Context, Caller, *posternv1.KernelCheckpointRequest) (*posternv1.Kernel, error)
	ForkKernel(context.Context, Caller, *posternv1.ForkKernelRequest) (*posternv1.ForkKernelResponse, error)
	ListCheckpoints(context.Context, Caller, *posternv1.KernelCheckpointRequest) (*posternv1.ListCheckpointsResponse, error)
	ProtectCheckpoint(context.Context, Caller, *posternv1.ProtectCheckpointRequest) (*posternv1.KernelCheckpoint, error)
	DeleteCheckpoint(context.Context, Caller, *posternv1.KernelCheckpointRequest) (*posternv1.DeleteCheckpointResponse, error)
}

// checkpoints implements KernelCheckpointService.
type checkpoints struct{ api *API }

// notSet refuses what the control plane itself fills in.
func notSet(p *posternv1.Principal) error {
	if p != nil {
		return proto.Errorf(proto.CodeInvalid, "the request names a principal: the control plane does that")
	}
	return nil
}

// CheckKernel implements KernelCheckpointService.
func (k checkpoints) CheckKernel(ctx context.Context, req *connect.Request[posternv1.KernelCheckpointRequest]) (*connect.Response[posternv1.CheckKernelResponse], error) {
	return call(ctx, k.api, func(c Caller) (*posternv1.CheckKernelResponse, error) {
		if err := notSet(req.Msg.Principal); err != nil {
			return nil, err
		}
		return k.api.cfg.Checkpoints.CheckKernel(ctx, c, req.Msg)
	})
}

// CheckpointKernel implements KernelCheckpointService.
func (k checkpoints) CheckpointKernel(ctx context.Context, req *connect.Request[posternv1.CheckpointKernelRequest]) (*connect.Response[posternv1.CheckpointKernelResponse], error) {
	return call(ctx, k.api, func(c Caller) (*posternv1.CheckpointKernelResponse, error) {
		if err := notSet(req.Msg.Principal); err != nil {
			return nil, err
		}
		return k.api.cfg.Checkpoints.CheckpointKernel(ctx, c, req.Msg)
	})
}

// SuspendKernel implements KernelCheckpointService.
func (k checkpoints) SuspendKernel(ctx context.Context, req *connect.Request[posternv1.KernelCheckpointRequest]) (*connect.Response[posternv1.CheckpointKernelResponse], error) {
	return call(ctx, k.api, func(c Caller) (*posternv1.CheckpointKernelResponse, error) {
		if err := notSet(req.Msg.Principal); err != nil {
			return nil, err
		}
		return k.api.cfg.Checkpoints.SuspendKernel(ctx, c, req.Msg)
	})
}

// ResumeKernel implements KernelCheckpointService.
func (k checkpoints) ResumeKernel(ctx context.Context, req *connect.Request[posternv1.KernelCheckpointRequest]) (*connect.Response[posternv1.Kernel], error) {
	return call(ctx, k.api, func(c Caller) (*posternv1.Kernel, error) {
		if err := notSet(req.Msg.Principal); err != nil {
			return nil, err
		}
		return k.api.cfg.Checkpoints.ResumeKernel(ctx, c, req.Msg)
	})
}

// RollbackKernel implements KernelCheckpointService.
func (k checkpoints) RollbackKernel(ctx context.Context, req *connect.Request[posternv1.KernelCheckpointRequest]) (*connect.Response[posternv1.Kernel], error) {
	return call(ctx, k.api, func(c Caller) (*posternv1.Kernel, error) {
		if err := notSet(req.Msg.Principal); err != nil {
			return nil, err
		}
		return k.api.cfg.Checkpoints.RollbackKernel(ctx, c, req.Msg)
	})
}

// ForkKernel implements KernelCheckpointService.
func (k checkpoints) ForkKernel(ctx context.Context, req *connect.Request[posternv1.ForkKernelRequest]) (*connect.Response[posternv1.ForkKernelResponse], error) {
	return call(ctx, k.api, func(c Caller) (*posternv1.ForkKernelResponse, error) {
		if err := notSet(req.Msg.Principal); err != nil {
			return nil, err
		}
		if req.Msg.NewKernelId != "" {
			return nil, proto.Errorf(proto.CodeInvalid, "the request names the new kernel: the control plane does that")
		}
		return k.api.cfg.Checkpoints.ForkKernel(ctx, c, req.Msg)
	})
}

// ListCheckpoints implements KernelCheckpointService.
func (k checkpoints) ListCheckpoints(ctx context.Context, req *connect.Request[posternv1.KernelCheckpointRequest]) (*connect.Response[posternv1.ListCheckpointsResponse], error) {
	return call(ctx, k.api, func(c Caller) (*posternv1.ListCheckpointsResponse, error) {
		if err := notSet(req.Msg.Principal); err != nil {
			return nil, err
		}
		return k.api.cfg.Checkpoints.ListCheckpoints(ctx, c, req.Msg)
	})
}

// ProtectCheckpoint implements KernelCheckpointService.
func (k checkpoints) ProtectCheckpoint(ctx context.Context, req *connect.Request[posternv1.ProtectCheckpointRequest]) (*connect.Response[posternv1.KernelCheckpoint], error) {
	return call(ctx, k.api, func(c Caller) (*posternv1.KernelCheckpoint, error) {
		if err := notSet(req.Msg.Principal); err != nil {
			return nil, err
		}
		return k.api.cfg.Checkpoints.ProtectCheckpoint(ctx, c, req.Msg)
	})
}

// DeleteCheckpoint implements KernelCheckpointService.
func (k checkpoints) DeleteCheckpoint(ctx context.Context, req *connect.Request[posternv1.KernelCheckpointRequest]) (*connect.Response[posternv1.DeleteCheckpointResponse], error) {
	return call(ctx, k.api, func(c Caller) (*posternv1.DeleteCheckpointResponse, error) {
		if err := notSet(req.Msg.Principal); err != nil {
			return nil, err
		}
		return k.api.cfg.Checkpoints.DeleteCheckpoint(ctx, c, req.Msg)
	})
}
