package registration

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Identity is who a certificate says its holder is; see package pki.
type Identity struct {
	// Organization and Agent are ids.
	Organization, Agent string
	// Serial is the certificate's, in lower-case hex.
	Serial string
	// Expired is set for a certificate within the grace period after its end.
	Expired bool
}

// Store keeps keys, agents and certificates. Errors are codes of package proto,
// and leave nothing half done.
type Store interface {
	InsertKey(ctx context.Context, organization string, k *posternv1.Key, hash [sha256.Size]byte) error
	// KeyByID returns NOT_FOUND for an unknown key.
	KeyByID(ctx context.Context, id string) (*posternv1.Organization, *posternv1.Key, [sha256.Size]byte, error)
	// RegisterAgent takes a use of the key and records the agent and its pending
	// certificate; it sets the agent's name and labels.
	RegisterAgent(ctx context.Context, organization, keyID string, agent *posternv1.Agent,
		serial, authority string, publicKey [sha256.Size]byte, notAfter, now time.Time) error

	// IdentityState returns NOT_FOUND, AGENT_REVOKED or ORGANIZATION_DISABLED, or
	// the certificate's state, end and, if it is retired, since when.
	IdentityState(ctx context.Context, organization, agent, serial string) (state string, notAfter, retired time.Time, err error)
	InsertCertificate(ctx context.Context, organization, agent, serial, authority string, publicKey [sha256.Size]byte, notAfter, now, forget time.Time) error
	ConfirmCertificate(ctx context.Context, agent, serial string, now time.Time) (bool, error)

	GetOrganization(ctx context.Context, idOrName string) (*posternv1.Organization, error)
	FindAgent(ctx context.Context, organization, idOrName string) (*posternv1.Agent, error)
	SetAgentHello(ctx context.Context, organization string, a *posternv1.Agent, now time.Time) error
	SetAgentSources(ctx context.Context, organization, agent string, sources []*posternv1.SourceInfo) error
	AgentAuditHead(ctx context.Context, agent string) (auditchain.Head, error)
	SetAgentAuditHead(ctx context.Context, agent string, head auditchain.Head) (bool, error)
}

// CA issues certificates.
type CA interface {
	Fingerprint() [sha256.Size]byte
	// Certificates are the authorities to trust, DER.
	Certificates() [][]byte
	// IssueAgent returns INVALID for a bad request.
	IssueAgent(csr []byte, organization, agent string, now time.Time) (*x509.Certificate, error)
}

// Audit is the organizations' hash-chained log.
type Audit interface {
	Append(ctx context.Context, e auditchain.Entry) error
}

// Limiter bounds how often a key may do something; see package ratelimit.
type Limiter interface {
	// Exhausted reports that nothing is left, and takes nothing.
	Exhausted(key string) bool
	Take(key string)
}

const (
	// DefaultTolerance is how far a host's clock may be off.
	DefaultTolerance = 5 * time.Minute
	// defaultGrace is package pki's default.
	defaultGrace = 30 * 24 * time.Hour
)

// Config is what a Service needs.
type Config struct {
	Store Store
	CA    CA
	Audit Audit
	// Failures bounds failed joins for each remote address, Renewals renewals for
	// each agent; nil means no bound.
	Failures, Renewals Limiter
	// Logger is optional; nil discards.
	Logger *slog.Logger
	// Tolerance is how far a host's clock may be off; zero means DefaultTolerance.
	Tolerance time.Duration
	// Grace is how long after its end a certificate is good for rejoining; zero
	// means 30 days. It is the same as package pki's.
	Grace time.Duration
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// Service makes keys, agents and certificates, and checks identities.
type Service struct {
	cfg    Config
	log    *slog.Logger
	checks *checks
}

// New returns a service.
func New(cfg Config) *Service {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Tolerance == 0 {
		cfg.Tolerance = DefaultTolerance
	}
	if cfg.Grace == 0 {
		cfg.Grace = defaultGrace
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Service{cfg: cfg, log: cfg.Logger, checks: newChecks()}
}

// audit writes an entry about something that is done or refused already; that
// the log cannot be written does not undo it, but is an error in our own log.
func (s *Service) audit(ctx context.Context, e auditchain.Entry) {
	e.Time = s.cfg.Now()
	if err := s.cfg.Audit.Append(ctx, e); err != nil {
		s.log.ErrorContext(ctx, "audit entry lost", "action", e.Action, "target", e.Target, "err", err)
	}
}

// addressKey is what failures are counted by: an IPv4 address, or the /64 that
// one IPv6 host owns.
func addressKey(remote string) string {
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		host = remote
	}
	address, err := netip.ParseAddr(host)
	if err != nil {
		return host
	}
	if address = address.Unmap().WithZone(""); address.Is6() {
		if prefix, err := address.Prefix(64); err == nil {
			return prefix.String()
		}
	}
	return address.String()
}

func exhausted(l Limiter, key string) bool { return l != nil && l.Exhausted(key) }

func take(l Limiter, key string) {
	if l != nil {
		l.Take(key)
	}
}

// uncertain reports an error of the store that is nobody's fault: a caller gets
// it as it is.
func uncertain(err error) bool {
	switch proto.CodeOf(err) {
	case proto.CodeInternal, proto.CodeUnavailable, proto.CodeStorageFull, proto.CodeCancelled, proto.CodeTimeout:
		return true
	}
	return false
}
