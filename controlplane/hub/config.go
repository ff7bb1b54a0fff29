package hub

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"time"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/tunnel"
)

// Config is what a hub needs. All fields but Metrics, Members and Directory are required.
type Config struct {
	Logger  *slog.Logger
	Gate    Gate
	Joiner  Joiner
	Rows    Rows
	Reports Reports
	Events  Events
	Metrics *Metrics
	// Guard is optional: it bounds the memory of the bodies of procedures' requests, by the peer that
	// asks; see package budget.
	Guard func(next http.Handler, peer func(*http.Request) string) http.Handler
	// Members is optional: what else agents may ask for on their tunnels.
	Members Members
	// Directory is optional: where agents are that are not here. nil: nowhere.
	Directory Directory
}

// Directory is what several control planes know together of where agents are.
type Directory interface {
	// Attach notes that an agent's newest tunnel is here and returns its generation:
	// the highest one is right. The agent hears nothing before Attach returns, and a
	// request for it finds it here from then on, at whatever replica.
	Attach(ctx context.Context, id Identity, tunnelID string) (generation int64, err error)
	// Detach notes that this tunnel has ended. It must not block.
	Detach(id Identity, generation int64)
	// Find returns where the newest tunnel of an agent is, AGENT_OFFLINE if it has none. nil
	// means here, in a moment: Attach has returned or is about to.
	Find(ctx context.Context, agent string) (*Place, error)
}

// Place is where an agent's tunnel is.
type Place struct {
	// Organization and Agent are ids, Name is the agent's name.
	Organization, Agent, Name string
	Generation                int64
	Since                     time.Time
	// Open opens a stream on the tunnel; ctx bounds the opening. AGENT_OFFLINE means
	// that it is not there any more, and nothing was sent.
	Open func(ctx context.Context, class tunnel.Class) (net.Conn, error)
}

// Members serves attached agents beyond LinkService. MemberOf tells its handler who asks.
type Members interface {
	http.Handler
	// Serves reports whether a path is among what it serves.
	Serves(path string) bool
}

// Member is an attached agent.
type Member struct {
	// Organization and Agent are ids, Name is the agent's name.
	Organization, Agent, Name string
}

// Gate decides who a peer is and whether it may go on. Its errors carry codes of
// package proto. All methods may be called at any time from any goroutine.
type Gate interface {
	// Identify reads the identity out of a finished handshake; the zero Identity
	// for a peer without a certificate.
	Identify(tls.ConnectionState) (Identity, error)
	// Admit checks a tunnel that has just come up and notes that its certificate
	// has been used; older ones of the same agent retire.
	Admit(ctx context.Context, id Identity, remote string) error
	// CheckIdentity fails if the agent was revoked, its certificate retired, or
	// its organization disabled. It is called for every request.
	CheckIdentity(context.Context, Identity) error
}

// Joiner makes agents and certificates.
type Joiner interface {
	Register(ctx context.Context, req *posternv1.RegisterRequest, remote string) (*posternv1.RegisterResponse, error)
	Renew(ctx context.Context, id Identity, req *posternv1.RenewRequest, remote string) (*posternv1.RenewResponse, error)
	// Hello notes what a member says of itself and returns its name, its
	// organization's name and the newest audit head of its chain that is known.
	Hello(ctx context.Context, id Identity, req *posternv1.HelloRequest) (*posternv1.HelloResponse, error)
	UpdateInventory(ctx context.Context, id Identity, sources []*posternv1.SourceInfo) error
}

// Rows takes the rows of statements that agents were asked to run.
type Rows interface {
	// ReportRows returns NOT_FOUND for a statement that this agent was not asked to
	// run, or whose rows are there already.
	ReportRows(ctx context.Context, id Identity, queryID string, rows *posternv1.KeptRows) error
}

// Reports takes what agents tell of the statements that their kernels asked for.
type Reports interface {
	// ReportStatements returns up to where all is recorded. It may be called again with
	// what it has taken already.
	ReportStatements(ctx context.Context, id Identity, r *posternv1.ReportStatementsRequest) (*posternv1.ReportStatementsResponse, error)
}

// Events is told of links that come and go. Calls must not block.
type Events interface {
	LinkUp(id Identity, remote string)
	LinkDown(id Identity, cause error)
}
