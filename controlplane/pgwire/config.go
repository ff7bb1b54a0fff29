package pgwire

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net/http"
	"time"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Config is what a Server needs. All fields are required unless said otherwise.
type Config struct {
	Logger *slog.Logger
	Tokens Tokens
	// Permit fails with ROLE_DENIED for who may not run statements.
	Permit func(*posternv1.Principal) error
	// Find returns an agent of the organization by id or name, or NOT_FOUND.
	Find func(ctx context.Context, organization, agent string) (*posternv1.Agent, error)
	// Connect returns the agent's live tunnel, by the agent's id; AGENT_OFFLINE
	// if it has none.
	Connect func(agentID string) (Agent, error)
	Journal Journal
	// TLS is for clients that ask for it; ServerName and the like are theirs. Nil
	// means that there is none, and that only this machine's clients are served.
	TLS *tls.Config
	// CancelElsewhere passes a cancel request that fits no session here to other replicas,
	// and reports whether it fitted one there; optional.
	CancelElsewhere func(ctx context.Context, rest []byte) bool
	// Requests bounds the connections a second of each token, by its id; Cancels the
	// cancel requests of each address that fit no session.
	Requests Limiter
	Cancels  FailureLimiter
	// Metrics is optional.
	Metrics *Metrics
	// Limits are optional, each by itself.
	Limits Limits
}

// Limits bound what clients cost. A zero means the default.
type Limits struct {
	// Strangers is how many connections there may be before authentication. Default
	// 1024; of one address other than loopback a quarter.
	Strangers int
	// Handshake is how long a connection may take to authenticate. Default 10 s.
	Handshake time.Duration
	// Sessions, PerOrganization and PerToken are how many sessions there may be at
	// once. Defaults 4096, 2048 and 512.
	Sessions, PerOrganization, PerToken int
	// Opening is how long a host may take to open a session. Default 30 s.
	Opening time.Duration
}

func (l Limits) withDefaults() Limits {
	count := func(n *int, or int) {
		if *n == 0 {
			*n = or
		}
	}
	count(&l.Strangers, 1024)
	count(&l.Sessions, 4096)
	count(&l.PerOrganization, 2048)
	count(&l.PerToken, 512)
	if l.Handshake == 0 {
		l.Handshake = 10 * time.Second
	}
	if l.Opening == 0 {
		l.Opening = 30 * time.Second
	}
	return l
}

// Tokens knows the API tokens.
type Tokens interface {
	// AuthenticateAs returns whose token it is, if the token has this name. An unknown
	// token and one of another name are the same error, UNAUTHENTICATED;
	// RATE_LIMITED and ORGANIZATION_DISABLED otherwise. remote limits failures.
	AuthenticateAs(ctx context.Context, name, text, remote string) (Caller, error)
}

// Caller is who connects.
type Caller struct {
	*posternv1.Principal
	// Expires is zero for a token that does not.
	Expires time.Time
}

// Limiter bounds how often a key may do something; see package ratelimit.
type Limiter interface {
	// Allow takes one from what the key has left; false if there is none.
	Allow(key string) bool
}

// FailureLimiter bounds failures; see package ratelimit.
type FailureLimiter interface {
	// Exhausted reports that nothing is left, and takes nothing.
	Exhausted(key string) bool
	Take(key string)
}

// Agent is a live tunnel to an agent.
type Agent interface {
	// Do sends a request on a lane for bulk bodies.
	Do(*http.Request) (*http.Response, error)
	// CancelQuery ends what a session runs, or one statement, by its id.
	CancelQuery(context.Context, *posternv1.CancelQueryRequest) error
	// Retired is closed when another tunnel takes this one's place, or the agent
	// goes away: what is idle should end.
	Retired() <-chan struct{}
	// Err is why the tunnel ended, as an error with the code AGENT_LOST; nil while
	// it is up.
	Err() error
}

// Session is what is to be known of a session.
type Session struct {
	// ID names it on both sides.
	ID        string
	Principal *posternv1.Principal
	// AgentID is the agent's id, Agent its name.
	AgentID, Agent, Source string
	// Remote is the client's address, Application what it calls itself.
	Remote, Application string
	// Cancel asks the host to end a statement, by the statement's id, on behalf of a
	// principal.
	Cancel func(ctx context.Context, statement string, by *posternv1.Principal) error
}

// Journal keeps what sessions did.
type Journal interface {
	// Open notes that a session begins; it is durable when Open returns. Entries
	// must be closed.
	Open(ctx context.Context, s Session) (Entries, error)
}

// Entries take what one session did.
type Entries interface {
	// Event takes what the host tells of a statement. It blocks while too much waits
	// to be written.
	Event(*posternv1.WireEvent)
	// Close notes how the session ended: with nil by its client's will. Statements
	// that run end with it.
	Close(why error)
}
