package api

import (
	"context"

	"connectrpc.com/connect"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Kernels starts and stops kernels on agents; it writes the audit entries itself.
type Kernels interface {
	Specs(ctx context.Context, c Caller, agent string) (*posternv1.ListKernelSpecsResponse, error)
	Start(ctx context.Context, c Caller, r *posternv1.StartAgentKernelRequest) (*posternv1.AgentKernel, error)
	// List is of one agent, by id or name, or of all.
	List(ctx context.Context, c Caller, agent string) (*posternv1.ListAgentKernelsResponse, error)
	Get(ctx context.Context, c Caller, kernel string) (*posternv1.AgentKernel, error)
	Interrupt(ctx context.Context, c Caller, kernel string) (*posternv1.AgentKernel, error)
	Restart(ctx context.Context, c Caller, kernel string) (*posternv1.AgentKernel, error)
	Stop(ctx context.Context, c Caller, kernel string) error
}

// kernels implements KernelService; a type of its own, since others have methods of
// the same names.
type kernels struct{ api *API }

// ListKernelSpecs implements KernelService.
func (k kernels) ListKernelSpecs(ctx context.Context, req *connect.Request[posternv1.ListAgentKernelSpecsRequest]) (*connect.Response[posternv1.ListKernelSpecsResponse], error) {
	return call(ctx, k.api, func(c Caller) (*posternv1.ListKernelSpecsResponse, error) {
		return k.api.cfg.Kernels.Specs(ctx, c, req.Msg.Agent)
	})
}

// StartKernel implements KernelService.
func (k kernels) StartKernel(ctx context.Context, req *connect.Request[posternv1.StartAgentKernelRequest]) (*connect.Response[posternv1.AgentKernel], error) {
	return call(ctx, k.api, func(c Caller) (*posternv1.AgentKernel, error) { return k.api.cfg.Kernels.Start(ctx, c, req.Msg) })
}

// ListKernels implements KernelService.
func (k kernels) ListKernels(ctx context.Context, req *connect.Request[posternv1.ListAgentKernelsRequest]) (*connect.Response[posternv1.ListAgentKernelsResponse], error) {
	return call(ctx, k.api, func(c Caller) (*posternv1.ListAgentKernelsResponse, error) {
		return k.api.cfg.Kernels.List(ctx, c, req.Msg.Agent)
	})
}

// GetKernel implements KernelService.
func (k kernels) GetKernel(ctx context.Context, req *connect.Request[posternv1.AgentKernelRequest]) (*connect.Response[posternv1.AgentKernel], error) {
	return call(ctx, k.api, func(c Caller) (*posternv1.AgentKernel, error) {
		return k.api.cfg.Kernels.Get(ctx, c, req.Msg.KernelId)
	})
}

// InterruptKernel implements KernelService.
func (k kernels) InterruptKernel(ctx context.Context, req *connect.Request[posternv1.AgentKernelRequest]) (*connect.Response[posternv1.AgentKernel], error) {
	return call(ctx, k.api, func(c Caller) (*posternv1.AgentKernel, error) {
		return k.api.cfg.Kernels.Interrupt(ctx, c, req.Msg.KernelId)
	})
}

// RestartKernel implements KernelService.
func (k kernels) RestartKernel(ctx context.Context, req *connect.Request[posternv1.AgentKernelRequest]) (*connect.Response[posternv1.AgentKernel], error) {
	return call(ctx, k.api, func(c Caller) (*posternv1.AgentKernel, error) {
		return k.api.cfg.Kernels.Restart(ctx, c, req.Msg.KernelId)
	})
}

// StopKernel implements KernelService.
func (k kernels) StopKernel(ctx context.Context, req *connect.Request[posternv1.AgentKernelRequest]) (*connect.Response[posternv1.StopKernelResponse], error) {
	return call(ctx, k.api, func(c Caller) (*posternv1.StopKernelResponse, error) {
		return &posternv1.StopKernelResponse{}, k.api.cfg.Kernels.Stop(ctx, c, req.Msg.KernelId)
	})
}
