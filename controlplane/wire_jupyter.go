package main

import (
	"context"
	"time"

	"github.com/postern-dev/postern/controlplane/jupyter"
	"github.com/postern-dev/postern/controlplane/kernel"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/controlplane/token"
	jupyterproto "github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

var (
	_ jupyter.Tokens   = jupyterTokens{}
	_ jupyter.Kernels  = jupyterKernels{}
	_ jupyter.Channels = jupyterChannels{}
	_ jupyter.Sessions = jupyterSessions{}
)

// jupyterTokens tells who connects.
type jupyterTokens struct{ *token.Service }

func (t jupyterTokens) Authenticate(ctx context.Context, bearer, remote string) (jupyter.Caller, error) {
	p, err := t.Service.Authenticate(ctx, bearer, remote)
	return jupyter.Caller{Principal: p.Principal, Expires: p.Expires, Remote: remote}, err
}

// jupyterKernels are the kernels for Jupyter's clients.
type jupyterKernels struct{ *kernel.Service }

func jupyterCaller(c jupyter.Caller) kernel.Caller {
	return kernel.Caller{Principal: c.Principal, Remote: c.Remote}
}

func (k jupyterKernels) Agent(ctx context.Context, c jupyter.Caller, idOrName string) (*posternv1.Agent, error) {
	return k.Service.Agent(ctx, jupyterCaller(c), idOrName)
}

func (k jupyterKernels) Where(ctx context.Context, c jupyter.Caller, id string) (string, error) {
	return k.Service.Where(ctx, jupyterCaller(c), id)
}

func (k jupyterKernels) Specs(ctx context.Context, c jupyter.Caller, agent string) (*posternv1.ListKernelSpecsResponse, error) {
	return k.Service.Specs(ctx, jupyterCaller(c), agent)
}

func (k jupyterKernels) Start(ctx context.Context, c jupyter.Caller, agent, spec string, environment map[string]string) (*posternv1.AgentKernel, error) {
	return k.Service.Start(ctx, jupyterCaller(c), kernel.Start{Agent: agent, Spec: spec, Environment: environment})
}

func (k jupyterKernels) List(ctx context.Context, c jupyter.Caller, agent string) (*posternv1.ListAgentKernelsResponse, error) {
	return k.Service.List(ctx, jupyterCaller(c), agent)
}

func (k jupyterKernels) Get(ctx context.Context, c jupyter.Caller, id string) (*posternv1.AgentKernel, error) {
	return k.Service.Get(ctx, jupyterCaller(c), id)
}

func (k jupyterKernels) Interrupt(ctx context.Context, c jupyter.Caller, id string) (*posternv1.AgentKernel, error) {
	return k.Service.Interrupt(ctx, jupyterCaller(c), id)
}

func (k jupyterKernels) Restart(ctx context.Context, c jupyter.Caller, id string) (*posternv1.AgentKernel, error) {
	return k.Service.Restart(ctx, jupyterCaller(c), id)
}

func (k jupyterKernels) Stop(ctx context.Context, c jupyter.Caller, id string) error {
	return k.Service.Stop(ctx, jupyterCaller(c), id)
}

func (k jupyterKernels) Attach(ctx context.Context, c jupyter.Caller, a jupyter.Attach) (jupyter.Channels, error) {
	channels, err := k.Service.Attach(ctx, jupyterCaller(c), kernel.Attach(a))
	if err != nil {
		return nil, err
	}
	return jupyterChannels{channels, k.Service, jupyterCaller(c), a}, nil
}

// jupyterChannels are a kernel's channels with who is at their other end.
type jupyterChannels struct {
	*kernel.Channels
	kernels *kernel.Service
	caller  kernel.Caller
	attach  jupyter.Attach
}

func (c jupyterChannels) Retired() <-chan struct{} { return c.Channels.Retired }

func (c jupyterChannels) Record(ctx context.Context, header jupyterproto.Header, m *posternv1.KernelMessage) error {
	return c.kernels.Record(ctx, c.caller, c.Agent, c.attach.Kernel, c.attach.Client, header, m)
}

// jupyterSessions keeps sessions in the store.
type jupyterSessions struct{ *store.Store }

func (s jupyterSessions) PutSession(ctx context.Context, owner *posternv1.Principal, agent string, one jupyter.Session) error {
	return s.PutKernelSession(ctx, owner, agent, store.KernelSession(one), time.Now())
}

func (s jupyterSessions) Sessions(ctx context.Context, owner *posternv1.Principal, agent string) ([]jupyter.Session, error) {
	all, err := s.KernelSessions(ctx, owner, agent)
	sessions := make([]jupyter.Session, len(all))
	for i, one := range all {
		sessions[i] = jupyter.Session(one)
	}
	return sessions, err
}

func (s jupyterSessions) DeleteSession(ctx context.Context, owner *posternv1.Principal, agent, id string) error {
	return s.DeleteKernelSession(ctx, owner, agent, id)
}
