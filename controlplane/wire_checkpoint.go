package main

import (
	"context"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/controlplane/api"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

var _ api.Checkpoints = kernels{}

func (a kernelAgent) checkpoints() posternv1connect.CheckpointHostServiceClient {
	return posternv1connect.NewCheckpointHostServiceClient(a.HTTP(tunnel.Control), "http://agent", connect.WithReadMaxBytes(maxCheckpoints))
}

// maxCheckpoints bounds the list of a kernel's checkpoints, in bytes.
const maxCheckpoints = 16 << 20

// askCheckpoints calls one of an agent's procedures.
func askCheckpoints[Q, R any](ctx context.Context, a kernelAgent, call func(context.Context, *connect.Request[Q]) (*connect.Response[R], error), q *Q) (*R, error) {
	return unwrap(a.Link, func() (*connect.Response[R], error) {
		resp, err := call(ctx, connect.NewRequest(q))
		if connect.CodeOf(err) == connect.CodeUnimplemented {
			return nil, proto.Errorf(proto.CodeVersionMismatch, "agent %s is of a version without checkpoints: upgrade it", a.Name)
		}
		return resp, err
	})
}

func (a kernelAgent) CheckKernel(ctx context.Context, r *posternv1.KernelCheckpointRequest) (*posternv1.CheckKernelResponse, error) {
	return askCheckpoints(ctx, a, a.checkpoints().CheckKernel, r)
}

func (a kernelAgent) CheckpointKernel(ctx context.Context, r *posternv1.CheckpointKernelRequest) (*posternv1.CheckpointKernelResponse, error) {
	return askCheckpoints(ctx, a, a.checkpoints().CheckpointKernel, r)
}

func (a kernelAgent) SuspendKernel(ctx context.Context, r *posternv1.KernelCheckpointRequest) (*posternv1.CheckpointKernelResponse, error) {
	return askCheckpoints(ctx, a, a.checkpoints().SuspendKernel, r)
}

func (a kernelAgent) ResumeKernel(ctx context.Context, r *posternv1.KernelCheckpointRequest) (*posternv1.Kernel, error) {
	return askCheckpoints(ctx, a, a.checkpoints().ResumeKernel, r)
}

func (a kernelAgent) RollbackKernel(ctx context.Context, r *posternv1.KernelCheckpointRequest) (*posternv1.Kernel, error) {
	return askCheckpoints(ctx, a, a.checkpoints().RollbackKernel, r)
}

func (a kernelAgent) ForkKernel(ctx context.Context, r *posternv1.ForkKernelRequest) (*posternv1.ForkKernelResponse, error) {
	return askCheckpoints(ctx, a, a.checkpoints().ForkKernel, r)
}

func (a kernelAgent) ListCheckpoints(ctx context.Context, r *posternv1.KernelCheckpointRequest) (*posternv1.ListCheckpointsResponse, error) {
	return askCheckpoints(ctx, a, a.checkpoints().ListCheckpoints, r)
}

func (a kernelAgent) ProtectCheckpoint(ctx context.Context, r *posternv1.ProtectCheckpointRequest) (*posternv1.KernelCheckpoint, error) {
	return askCheckpoints(ctx, a, a.checkpoints().ProtectCheckpoint, r)
}

func (a kernelAgent) DeleteCheckpoint(ctx context.Context, r *posternv1.KernelCheckpointRequest) (*posternv1.DeleteCheckpointResponse, error) {
	return askCheckpoints(ctx, a, a.checkpoints().DeleteCheckpoint, r)
}

func (k kernels) CheckKernel(ctx context.Context, c api.Caller, r *posternv1.KernelCheckpointRequest) (*posternv1.CheckKernelResponse, error) {
	return k.Service.CheckKernel(ctx, kernelCaller(c), r)
}

func (k kernels) CheckpointKernel(ctx context.Context, c api.Caller, r *posternv1.CheckpointKernelRequest) (*posternv1.CheckpointKernelResponse, error) {
	return k.Service.CheckpointKernel(ctx, kernelCaller(c), r)
}

func (k kernels) SuspendKernel(ctx context.Context, c api.Caller, r *posternv1.KernelCheckpointRequest) (*posternv1.CheckpointKernelResponse, error) {
	return k.Service.SuspendKernel(ctx, kernelCaller(c), r)
}

func (k kernels) ResumeKernel(ctx context.Context, c api.Caller, r *posternv1.KernelCheckpointRequest) (*posternv1.Kernel, error) {
	return k.Service.ResumeKernel(ctx, kernelCaller(c), r)
}

func (k kernels) RollbackKernel(ctx context.Context, c api.Caller, r *posternv1.KernelCheckpointRequest) (*posternv1.Kernel, error) {
	return k.Service.RollbackKernel(ctx, kernelCaller(c), r)
}

func (k kernels) ForkKernel(ctx context.Context, c api.Caller, r *posternv1.ForkKernelRequest) (*posternv1.ForkKernelResponse, error) {
	return k.Service.ForkKernel(ctx, kernelCaller(c), r)
}

func (k kernels) ListCheckpoints(ctx context.Context, c api.Caller, r *posternv1.KernelCheckpointRequest) (*posternv1.ListCheckpointsResponse, error) {
	return k.Service.ListCheckpoints(ctx, kernelCaller(c), r)
}

func (k kernels) ProtectCheckpoint(ctx context.Context, c api.Caller, r *posternv1.ProtectCheckpointRequest) (*posternv1.KernelCheckpoint, error) {
	return k.Service.ProtectCheckpoint(ctx, kernelCaller(c), r)
}

func (k kernels) DeleteCheckpoint(ctx context.Context, c api.Caller, r *posternv1.KernelCheckpointRequest) (*posternv1.DeleteCheckpointResponse, error) {
	return k.Service.DeleteCheckpoint(ctx, kernelCaller(c), r)
}
