package jupyter

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"time"

	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Caller is who asks.
type Caller struct {
	*posternv1.Principal
	// Expires is zero for a token that does not.
	Expires time.Time
	// Remote is the address the request came from.
	Remote string
}

// Tokens knows the API tokens.
type Tokens interface {
	// Authenticate returns whose token it is, or UNAUTHENTICATED, RATE_LIMITED or
	// ORGANIZATION_DISABLED. remote limits failures.
	Authenticate(ctx context.Context, bearer, remote string) (Caller, error)
}

// Kernels are the kernels of the caller's organization; what it may not know of is
// NOT_FOUND.
type Kernels interface {
	// Agent finds an agent that is not revoked, by id or name, online or not.
	Agent(ctx context.Context, c Caller, idOrName string) (*posternv1.Agent, error)
	// Where is the id of the agent that has a kernel.
	Where(ctx context.Context, c Caller, kernel string) (agentID string, err error)
	Specs(ctx context.Context, c Caller, agent string) (*posternv1.ListKernelSpecsResponse, error)
	Start(ctx context.Context, c Caller, agent, spec string, environment map[string]string) (*posternv1.AgentKernel, error)
	List(ctx context.Context, c Caller, agent string) (*posternv1.ListAgentKernelsResponse, error)
	Get(ctx context.Context, c Caller, kernel string) (*posternv1.AgentKernel, error)
	Interrupt(ctx context.Context, c Caller, kernel string) (*posternv1.AgentKernel, error)
	Restart(ctx context.Context, c Caller, kernel string) (*posternv1.AgentKernel, error)
	Stop(ctx context.Context, c Caller, kernel string) error
	// Attach opens a kernel's channels. ctx bounds the opening alone.
	Attach(ctx context.Context, c Caller, a Attach) (Channels, error)
}

// Attach asks for a kernel's channels for a client.
type Attach struct {
	Kernel, Client string
	// Resume asks for what the client has not confirmed or, of a host that does not know
	// the client, for what comes after the message After.
	Resume bool
	After  uint64
	// Again says that the client was attached before and lost its stream.
	Again bool
}

// Channels are a kernel's channels: a stream of package kernelstream.
type Channels interface {
	io.ReadWriteCloser
	// Retired is closed when the stream is to be opened anew.
	Retired() <-chan struct{}
	// Record writes the audit entry of a message, if it needs one, before it is sent.
	Record(ctx context.Context, header jupyter.Header, m *posternv1.KernelMessage) error
}

// Session is a notebook's path and its kernel.
type Session struct {
	ID, Kernel, Path, Name, Type string
}

// Sessions keeps sessions, each token's on an agent, by the agent's id, for itself.
// They go with their kernel.
type Sessions interface {
	PutSession(ctx context.Context, owner *posternv1.Principal, agent string, s Session) error
	Sessions(ctx context.Context, owner *posternv1.Principal, agent string) ([]Session, error)
	DeleteSession(ctx context.Context, owner *posternv1.Principal, agent, id string) error
}

// Limiter bounds how often a key may do something; see package ratelimit.
type Limiter interface {
	Allow(key string) bool
}

// Config is what a Server needs. All fields are required but Metrics.
type Config struct {
	Logger   *slog.Logger
	Tokens   Tokens
	Kernels  Kernels
	Sessions Sessions
	// Permit fails for a caller whose role does not allow to use kernels.
	Permit func(*posternv1.Principal) error
	// Remote is the address that a request comes from.
	Remote func(*http.Request) string
	// Requests bounds the requests of each token, by its id.
	Requests Limiter
	Metrics  *Metrics
}
