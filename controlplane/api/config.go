package api

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/postern-dev/postern/proto/auditchain"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Config is what the API needs. All fields are required unless said otherwise.
type Config struct {
	Logger      *slog.Logger
	Tokens      Tokens
	Keys        Keys
	Store       Store
	Agents      Agents
	Queries     Queries
	Catalogs    Catalogs
	Kernels     Kernels
	Notebooks   Notebooks
	Checkpoints Checkpoints
	// Files is optional: without it there are no workspaces.
	Files      Files
	Secrets    Secrets
	Moves      Moves
	Audit      Audit
	CA         CA
	Rotation   Rotation
	MasterKeys MasterKeys
	FileKeys   FileKeys
	Gatherer   prometheus.Gatherer
	// Tunnel serves the WebSocket endpoint, /tunnel.
	Tunnel http.Handler
	// DAV serves WebDAV's clients, below /dav/; it knows callers by itself.
	DAV http.Handler
	// Jupyter serves Jupyter's clients, below /jupyter/; it knows callers by itself.
	Jupyter http.Handler
	// Ready returns nil when this process can serve, else why not.
	Ready func(context.Context) error
	// Guard is optional: it bounds the memory of the bodies of procedures' requests, by the organization
	// that asks; see package budget.
	Guard func(next http.Handler, peer func(*http.Request) string) http.Handler
	// Requests bounds the requests of each token, by its id.
	Requests Limiter
	// SignOfLife is how often a silent result says that it goes on, to clients
	// that read package resultstream; 0 means 15 s.
	SignOfLife time.Duration
}

// Limiter bounds how often a key may do something; see package ratelimit.
type Limiter interface {
	// Allow takes one from what the key has left; false if there is none.
	Allow(key string) bool
}

// Caller is who asks.
type Caller struct {
	*posternv1.Principal
	OrganizationName string
	// Expires is zero for a token that does not.
	Expires time.Time
	// Remote is the address the request came from.
	Remote string
}

// Tokens knows the API tokens.
type Tokens interface {
	// Authenticate returns whose token it is, or UNAUTHENTICATED, RATE_LIMITED
	// or ORGANIZATION_DISABLED. remote limits failures.
	Authenticate(ctx context.Context, bearer, remote string) (Caller, error)
	// Create makes a token and returns its text, which is not stored.
	Create(ctx context.Context, organization, name, role string, ttl time.Duration) (*posternv1.Token, string, error)
	Revoke(ctx context.Context, organization, idOrName string) (*posternv1.Token, error)
	// Rotate gives a token a new secret, whose text it returns, with the time until which the
	// one of before is good. A ttl of 0 is 90 days, or without end as before.
	Rotate(ctx context.Context, organization, idOrName string, overlap, ttl time.Duration) (*posternv1.Token, string, time.Time, error)
}

// Keys makes registration keys.
type Keys interface {
	Create(ctx context.Context, organization string, ttl time.Duration, uses uint32, labels map[string]string, by string) (*posternv1.Key, string, error)
}

// Store is the part of the metadata store that the API reads and writes itself.
type Store interface {
	ListTokens(ctx context.Context, organization string) ([]*posternv1.Token, error)
	ListKeys(ctx context.Context, organization string) ([]*posternv1.Key, error)
	RevokeKey(ctx context.Context, organization, id string, now time.Time) (*posternv1.Key, error)
	ListAgents(ctx context.Context, organization string) ([]*posternv1.Agent, error)
	GetAgent(ctx context.Context, organization, idOrName string) (*posternv1.Agent, error)
	RevokeAgent(ctx context.Context, organization, idOrName string, now time.Time) (*posternv1.Agent, error)
	ListQueries(ctx context.Context, organization, tokenID string, limit int, runningOnly bool) ([]*posternv1.Query, error)
	GetQuery(ctx context.Context, organization, tokenID, id string) (*posternv1.Query, error)
	CreateOrganization(ctx context.Context, name string, now time.Time) (*posternv1.Organization, error)
	ListOrganizations(ctx context.Context) ([]*posternv1.Organization, error)
	SetOrganizationDisabled(ctx context.Context, idOrName string, disabled bool, now time.Time) (*posternv1.Organization, error)
}

// LiveAgent is an agent's tunnel as the API uses it.
type LiveAgent interface {
	CheckSource(context.Context, *posternv1.CheckSourceRequest) (*posternv1.CheckSourceResponse, error)
	ReadAudit(context.Context, *posternv1.ReadAuditRequest) (*posternv1.ReadAuditResponse, error)
	OpenSession(context.Context, *posternv1.OpenSessionRequest) (*posternv1.OpenSessionResponse, error)
	CloseSession(context.Context, *posternv1.CloseSessionRequest) (*posternv1.CloseSessionResponse, error)
	ListSessions(context.Context, *posternv1.ListSessionsRequest) (*posternv1.ListSessionsResponse, error)
	// Get fetches a path from the agent, over its tunnel.
	Get(ctx context.Context, path string) (*http.Response, error)
	RTT() time.Duration
	RemoteAddress() string
}

// Agents are the tunnels.
type Agents interface {
	// Agent returns AGENT_OFFLINE for one without a tunnel.
	Agent(id string) (LiveAgent, error)
	// Here is Agent for one whose tunnel ends at this replica; nil for all others.
	Here(id string) LiveAgent
	// Elsewhere tells which agents of an organization have a tunnel to another replica.
	Elsewhere(ctx context.Context, organization string) (map[string]bool, error)
	// AuditHead is the newest head of the agent's chain that it has reported.
	AuditHead(ctx context.Context, id string) (auditchain.Head, error)
	Disconnect(id string)
	DisconnectOrganization(id string)
}

// Result is a statement's rows under way; Finish must be called.
type Result interface {
	QueryID() string
	// Read reads the Arrow IPC stream; io.EOF means that the agent said how the
	// statement ended.
	Read([]byte) (int, error)
	Finish(broke error) *posternv1.QueryOutcome
}

// Queries runs statements.
type Queries interface {
	Start(ctx context.Context, c Caller, agent, source string, statement *posternv1.RunSQLRequest) (Result, error)
	// Cancel reports whether such a query ran.
	Cancel(ctx context.Context, by *posternv1.Principal, id string, may func(owner *posternv1.Principal) error) (bool, error)
	// KeptRows are the first and last rows of a query; nil if none are kept.
	KeptRows(ctx context.Context, organization, id string) (*posternv1.KeptRows, error)
}

// Catalogs knows what data sources hold.
type Catalogs interface {
	Introspect(ctx context.Context, p *posternv1.Principal, remote string, r *posternv1.IntrospectSourceRequest) (*posternv1.IntrospectSourceResponse, error)
}

// Audit is the hash chain of each organization.
type Audit interface {
	Append(ctx context.Context, e auditchain.Entry) error
	// List returns lines: ascending from a sequence number, or the newest first
	// if from is 0.
	List(ctx context.Context, organization string, from uint64, limit int) ([][]byte, error)
	// Verify returns the number of entries and nil, or what is wrong.
	Verify(ctx context.Context, organization string) (auditchain.Kept, error)
}

// CA shows the authorities.
type CA interface {
	Authorities(ctx context.Context) ([]*posternv1.Authority, error)
}
