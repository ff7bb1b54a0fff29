package main

import (
	"context"
	"net/http"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/postern-dev/postern/controlplane/api"
	"github.com/postern-dev/postern/controlplane/hub"
	"github.com/postern-dev/postern/controlplane/jupyter"
	"github.com/postern-dev/postern/controlplane/kernel"
	"github.com/postern-dev/postern/controlplane/notebook"
	"github.com/postern-dev/postern/controlplane/ratelimit"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/controlplane/token"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

var (
	_ kernel.Agent = kernelAgent{}
	_ kernel.Store = kernelStore{}
	_ api.Kernels  = kernels{}
)

// wireKernels makes what serves kernels and Jupyter's clients.
func (s *Server) wireKernels(registry prometheus.Registerer, requests *ratelimit.Limiter) {
	s.secrets = s.newSecrets()
	s.kernels = kernel.New(kernel.Config{
		Secrets: kernelSecrets{s.secrets}, Logger: s.log, Store: kernelStore{s.store}, Append: s.audit.Append,
		Operator: func(role string) bool { return token.Role(role).Includes(token.Operator) },
		Connect: func(id string) (kernel.Agent, error) {
			if s.refusing.Load() {
				return nil, errDraining
			}
			l, err := s.hub.Agent(id)
			if err != nil {
				return nil, err
			}
			return kernelAgent{l}, nil
		},
	})
	s.notebooks = notebook.New(notebook.Config{Logger: s.log, Kernels: notebookKernels{s.kernels}})
	s.jupyter = jupyter.New(jupyter.Config{
		Logger: s.log, Tokens: jupyterTokens{s.tokens}, Kernels: jupyterKernels{s.kernels}, Sessions: jupyterSessions{s.store},
		Permit: mayRunStatements, Remote: api.RemoteAddress, Requests: requests, Metrics: jupyter.NewMetrics(registry),
	})
}

// kernelAgent asks an agent for kernels. Their channels share a lane for bulk: a
// kernel is silent for hours, and then prints a gigabyte.
type kernelAgent struct{ *hub.Link }

// maxSpecs bounds the list of an agent's kernelspecs with their logos, in bytes.
const maxSpecs = 72 << 20

func (a kernelAgent) client(class tunnel.Class) posternv1connect.KernelHostServiceClient {
	return posternv1connect.NewKernelHostServiceClient(a.HTTP(class), "http://agent", connect.WithReadMaxBytes(maxSpecs))
}

// askKernels calls one of an agent's procedures.
func askKernels[Q, R any](ctx context.Context, a kernelAgent, call func(context.Context, *connect.Request[Q]) (*connect.Response[R], error), q *Q) (*R, error) {
	return unwrap(a.Link, func() (*connect.Response[R], error) {
		resp, err := call(ctx, connect.NewRequest(q))
		if connect.CodeOf(err) == connect.CodeUnimplemented {
			return nil, proto.Errorf(proto.CodeVersionMismatch, "agent %s is of a version without kernels: upgrade it", a.Name)
		}
		return resp, err
	})
}

func (a kernelAgent) ListKernelSpecs(ctx context.Context, r *posternv1.ListKernelSpecsRequest) (*posternv1.ListKernelSpecsResponse, error) {
	return askKernels(ctx, a, a.client(tunnel.Bulk).ListKernelSpecs, r)
}

func (a kernelAgent) StartKernel(ctx context.Context, r *posternv1.StartKernelRequest) (*posternv1.Kernel, error) {
	return askKernels(ctx, a, a.client(tunnel.Control).StartKernel, r)
}

func (a kernelAgent) ListKernels(ctx context.Context, r *posternv1.ListKernelsRequest) (*posternv1.ListKernelsResponse, error) {
	return askKernels(ctx, a, a.client(tunnel.Control).ListKernels, r)
}

func (a kernelAgent) GetKernel(ctx context.Context, r *posternv1.KernelRequest) (*posternv1.Kernel, error) {
	return askKernels(ctx, a, a.client(tunnel.Control).GetKernel, r)
}

func (a kernelAgent) InterruptKernel(ctx context.Context, r *posternv1.KernelRequest) (*posternv1.Kernel, error) {
	return askKernels(ctx, a, a.client(tunnel.Control).InterruptKernel, r)
}

func (a kernelAgent) RestartKernel(ctx context.Context, r *posternv1.KernelRequest) (*posternv1.Kernel, error) {
	return askKernels(ctx, a, a.client(tunnel.Control).RestartKernel, r)
}

func (a kernelAgent) StopKernel(ctx context.Context, r *posternv1.KernelRequest) (*posternv1.StopKernelResponse, error) {
	return askKernels(ctx, a, a.client(tunnel.Control).StopKernel, r)
}

func (a kernelAgent) Do(r *http.Request) (*http.Response, error) {
	resp, err := a.HTTP(tunnel.Bulk).Do(r)
	if lost := a.Err(); err != nil && lost != nil {
		return nil, lost
	}
	return resp, err
}

// kernelStore remembers kernels.
type kernelStore struct{ *store.Store }

func (s kernelStore) InsertKernel(ctx context.Context, r kernel.Row) error {
	return s.Store.InsertKernel(ctx, store.KernelRow(r))
}

func (s kernelStore) Kernel(ctx context.Context, organization, id string) (kernel.Row, error) {
	r, err := s.Store.Kernel(ctx, organization, id)
	return kernel.Row(r), err
}

func (s kernelStore) Kernels(ctx context.Context, organization, agent string) ([]kernel.Row, error) {
	rows, err := s.Store.Kernels(ctx, organization, agent)
	all := make([]kernel.Row, len(rows))
	for i, r := range rows {
		all[i] = kernel.Row(r)
	}
	return all, err
}

// kernels are the kernels for the API.
type kernels struct{ *kernel.Service }

func kernelCaller(c api.Caller) kernel.Caller {
	return kernel.Caller{Principal: c.Principal, Remote: c.Remote}
}

func (k kernels) Specs(ctx context.Context, c api.Caller, agent string) (*posternv1.ListKernelSpecsResponse, error) {
	return k.Service.Specs(ctx, kernelCaller(c), agent)
}

func (k kernels) Start(ctx context.Context, c api.Caller, r *posternv1.StartAgentKernelRequest) (*posternv1.AgentKernel, error) {
	return k.Service.Start(ctx, kernelCaller(c), kernel.Start{Agent: r.Agent, Spec: r.Spec, Environment: r.Environment, Mounts: r.Mounts, Secrets: r.Secrets})
}

func (k kernels) List(ctx context.Context, c api.Caller, agent string) (*posternv1.ListAgentKernelsResponse, error) {
	return k.Service.List(ctx, kernelCaller(c), agent)
}

func (k kernels) Get(ctx context.Context, c api.Caller, id string) (*posternv1.AgentKernel, error) {
	return k.Service.Get(ctx, kernelCaller(c), id)
}

func (k kernels) Interrupt(ctx context.Context, c api.Caller, id string) (*posternv1.AgentKernel, error) {
	return k.Service.Interrupt(ctx, kernelCaller(c), id)
}

func (k kernels) Restart(ctx context.Context, c api.Caller, id string) (*posternv1.AgentKernel, error) {
	return k.Service.Restart(ctx, kernelCaller(c), id)
}

func (k kernels) Stop(ctx context.Context, c api.Caller, id string) error {
	return k.Service.Stop(ctx, kernelCaller(c), id)
}
