package kernel

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Agent is a live tunnel to an agent. Its errors carry codes of package proto.
type Agent interface {
	CheckpointAgent
	MoveAgent
	ListKernelSpecs(context.Context, *posternv1.ListKernelSpecsRequest) (*posternv1.ListKernelSpecsResponse, error)
	StartKernel(context.Context, *posternv1.StartKernelRequest) (*posternv1.Kernel, error)
	ListKernels(context.Context, *posternv1.ListKernelsRequest) (*posternv1.ListKernelsResponse, error)
	GetKernel(context.Context, *posternv1.KernelRequest) (*posternv1.Kernel, error)
	InterruptKernel(context.Context, *posternv1.KernelRequest) (*posternv1.Kernel, error)
	RestartKernel(context.Context, *posternv1.KernelRequest) (*posternv1.Kernel, error)
	StopKernel(context.Context, *posternv1.KernelRequest) (*posternv1.StopKernelResponse, error)
	// Do sends the request that opens a kernel's channels; the stream belongs to the
	// caller and ends with the tunnel.
	Do(*http.Request) (*http.Response, error)
	// Retired is closed when the tunnel is to end as soon as nothing uses it.
	Retired() <-chan struct{}
}

// Row is what is remembered of a kernel.
type Row struct {
	ID string
	// Agent is the agent's id.
	Agent          string
	Owner          *posternv1.Principal
	Spec, Language string
	Started        time.Time
}

// Store remembers kernels. All is scoped by organization; what is not there is
// NOT_FOUND.
type Store interface {
	// InsertKernel leaves a row that is there already as it is.
	InsertKernel(context.Context, Row) error
	DescribeKernel(ctx context.Context, organization, id, spec, language string) error
	Kernel(ctx context.Context, organization, id string) (Row, error)
	// Kernels are those of an agent, by its id, or all.
	Kernels(ctx context.Context, organization, agent string) ([]Row, error)
	// MoveKernel notes that a kernel is on another agent, by its id; its sessions go along.
	MoveKernel(ctx context.Context, organization, id, agent string) error
	// DeleteKernel is content if the row is gone already.
	DeleteKernel(ctx context.Context, organization, id string) error

	// FindAgent finds an agent by id or name.
	FindAgent(ctx context.Context, organization, idOrName string) (*posternv1.Agent, error)
	ListAgents(ctx context.Context, organization string) ([]*posternv1.Agent, error)
}

// Caller is who asks, and from where.
type Caller struct {
	*posternv1.Principal
	Remote string
}

// Secrets gives kernels the secrets that they are granted.
type Secrets interface {
	// Started gives them to a kernel that was started just now: an error if it can't have
	// those wanted, warnings about others.
	Started(ctx context.Context, c Caller, r Row, wanted, workspaces []string) (warnings []string, err error)
	// Forked gives a fork what its original has.
	Forked(ctx context.Context, c Caller, from string, fork Row) error
	// Moved gives them to a kernel that has come to another host; what that refuses, or
	// can't take at present, is not there.
	Moved(ctx context.Context, r Row)
}

// Config is what a Service needs; all fields are required.
type Config struct {
	Secrets Secrets
	Logger  *slog.Logger
	Store   Store
	// Connect returns an agent's live tunnel, by its id; AGENT_OFFLINE if it has none.
	Connect func(agentID string) (Agent, error)
	// Append writes an audit entry durably, or fails.
	Append func(context.Context, auditchain.Entry) error
	// Operator reports whether a role may see and stop the kernels of others.
	Operator func(role string) bool
}

// Service is the control plane's side of kernels.
type Service struct {
	cfg    Config
	masks  maskers
	moving moving
}

// New returns a Service.
func New(cfg Config) *Service { return &Service{cfg: cfg} }
