package main

import (
	"context"

	"github.com/postern-dev/postern/controlplane/api"
	"github.com/postern-dev/postern/controlplane/kernel"
	"github.com/postern-dev/postern/controlplane/notebook"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

var (
	_ notebook.Kernels  = notebookKernels{}
	_ notebook.Channels = notebookChannels{}
	_ api.Notebooks     = notebooks{}
)

// notebooks run for the API.
type notebooks struct{ *notebook.Service }

func notebookCaller(c api.Caller) notebook.Caller {
	return notebook.Caller{Principal: c.Principal, Remote: c.Remote}
}

func (n notebooks) RunNotebook(ctx context.Context, c api.Caller, r *posternv1.RunNotebookRequest, send func(*posternv1.NotebookEvent) error) error {
	return n.Run(ctx, notebookCaller(c), r, send)
}

func (n notebooks) SyncNotebook(ctx context.Context, c api.Caller, r *posternv1.SyncNotebookRequest, send func(*posternv1.NotebookEvent) error) error {
	return n.Sync(ctx, notebookCaller(c), r, send)
}

func (n notebooks) NotebookHistory(ctx context.Context, c api.Caller, r *posternv1.NotebookHistoryRequest) (*posternv1.NotebookHistoryResponse, error) {
	return n.History(ctx, notebookCaller(c), r)
}

// notebookKernels are the kernels for notebooks.
type notebookKernels struct{ *kernel.Service }

func kernelCallerOf(c notebook.Caller) kernel.Caller {
	return kernel.Caller{Principal: c.Principal, Remote: c.Remote}
}

func (k notebookKernels) Start(ctx context.Context, c notebook.Caller, agent, spec string, mounts []*posternv1.KernelMount) (*posternv1.AgentKernel, error) {
	return k.Service.Start(ctx, kernelCallerOf(c), kernel.Start{Agent: agent, Spec: spec, Mounts: mounts})
}

func (k notebookKernels) Get(ctx context.Context, c notebook.Caller, id string) (*posternv1.AgentKernel, error) {
	return k.Service.Get(ctx, kernelCallerOf(c), id)
}

func (k notebookKernels) Interrupt(ctx context.Context, c notebook.Caller, id string) error {
	_, err := k.Service.Interrupt(ctx, kernelCallerOf(c), id)
	return err
}

func (k notebookKernels) Restart(ctx context.Context, c notebook.Caller, id string) error {
	_, err := k.Service.Restart(ctx, kernelCallerOf(c), id)
	return err
}

func (k notebookKernels) Stop(ctx context.Context, c notebook.Caller, id string) error {
	return k.Service.Stop(ctx, kernelCallerOf(c), id)
}

func (k notebookKernels) CheckpointKernel(ctx context.Context, c notebook.Caller, r *posternv1.CheckpointKernelRequest) (*posternv1.CheckpointKernelResponse, error) {
	return k.Service.CheckpointKernel(ctx, kernelCallerOf(c), r)
}

func (k notebookKernels) RollbackKernel(ctx context.Context, c notebook.Caller, r *posternv1.KernelCheckpointRequest) error {
	_, err := k.Service.RollbackKernel(ctx, kernelCallerOf(c), r)
	return err
}

func (k notebookKernels) ResumeKernel(ctx context.Context, c notebook.Caller, r *posternv1.KernelCheckpointRequest) error {
	_, err := k.Service.ResumeKernel(ctx, kernelCallerOf(c), r)
	return err
}

func (k notebookKernels) ListCheckpoints(ctx context.Context, c notebook.Caller, r *posternv1.KernelCheckpointRequest) (*posternv1.ListCheckpointsResponse, error) {
	return k.Service.ListCheckpoints(ctx, kernelCallerOf(c), r)
}

func (k notebookKernels) Attach(ctx context.Context, c notebook.Caller, a notebook.Attach) (notebook.Channels, error) {
	channels, err := k.Service.Attach(ctx, kernelCallerOf(c), kernel.Attach(a))
	if err != nil {
		return nil, err
	}
	return notebookChannels{channels, k.Service, kernelCallerOf(c), a}, nil
}

// notebookChannels are a kernel's channels with who is at their other end.
type notebookChannels struct {
	*kernel.Channels
	kernels *kernel.Service
	caller  kernel.Caller
	attach  notebook.Attach
}

func (c notebookChannels) Retired() <-chan struct{} { return c.Channels.Retired }

func (c notebookChannels) Record(ctx context.Context, header jupyter.Header, m *posternv1.KernelMessage) error {
	return c.kernels.Record(ctx, c.caller, c.Agent, c.attach.Kernel, c.attach.Client, header, m)
}
