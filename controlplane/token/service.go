package token

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	defaultTTL = 90 * 24 * time.Hour
	maxTTL     = 10 * 365 * 24 * time.Hour
	// touchEvery is how exact a token's last use is.
	touchEvery = time.Minute
	// touchTimeout bounds the record of a use; a request does not fail for it.
	touchTimeout = 2 * time.Second
)

// Store keeps the tokens. Errors are codes of package proto.
type Store interface {
	// InsertToken returns ALREADY_EXISTS for a name that another token has which
	// is not revoked.
	InsertToken(ctx context.Context, organization string, t *posternv1.Token, hash [sha256.Size]byte) error
	// TokenByID returns NOT_FOUND for an unknown one, and one of any state else.
	TokenByID(ctx context.Context, id string) (*posternv1.Organization, *posternv1.Token, [sha256.Size]byte, error)
	RevokeToken(ctx context.Context, organization, idOrName string, now time.Time) (*posternv1.Token, error)
	// RotateToken replaces a token's secret: see store.Store.
	RotateToken(ctx context.Context, organization, idOrName string, hash [sha256.Size]byte, formerUntil, expires time.Time, endless bool) (*posternv1.Token, time.Time, error)
	// FormerSecret returns what a token's secret was before its last rotation, and until when
	// it is good; zero values if there is none.
	FormerSecret(ctx context.Context, id string) ([sha256.Size]byte, time.Time, error)
	TouchToken(ctx context.Context, id string, now time.Time) error
	CountAdmins(ctx context.Context, organization string, now time.Time) (int, error)
	EnsureDefaultOrganization(ctx context.Context, now time.Time) (*posternv1.Organization, error)
}

// Limiter bounds failures; see package ratelimit.
type Limiter interface {
	// Exhausted reports that nothing is left, and takes nothing.
	Exhausted(key string) bool
	Take(key string)
}

// Config is what a Service needs.
type Config struct {
	Store Store
	// Failures bounds failed attempts for each remote address; nil means no bound.
	Failures Limiter
	// Logger is optional; nil discards.
	Logger *slog.Logger
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// Principal is whose token it is.
type Principal struct {
	*posternv1.Principal
	OrganizationName string
	// Expires is zero for a token that does not.
	Expires time.Time
	// Remote is the address that the token came from.
	Remote string
}

// Service makes, checks and revokes tokens.
type Service struct {
	cfg   Config
	log   *slog.Logger
	cache *cache
}

// New returns a service.
func New(cfg Config) *Service {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Service{cfg: cfg, log: cfg.Logger, cache: newCache()}
}

// Create makes a token and returns its text, which is shown once. A name of ""
// is made up, a ttl of 0 means 90 days.
func (s *Service) Create(ctx context.Context, organization, name, role string, ttl time.Duration) (*posternv1.Token, string, error) {
	if ttl == 0 {
		ttl = defaultTTL
	}
	if ttl < time.Second || ttl > maxTTL {
		return nil, "", proto.Errorf(proto.CodeInvalid, "a token lives from 1 s to %d days, not %s", int(maxTTL.Hours()/24), ttl)
	}
	return s.create(ctx, organization, name, role, NewText(), timestamppb.New(s.cfg.Now().Add(ttl)))
}

func (s *Service) create(ctx context.Context, organization, name, role string, text Text, expires *timestamppb.Timestamp) (*posternv1.Token, string, error) {
	if _, err := ParseRole(role); err != nil {
		return nil, "", err
	}
	if name == "" {
		name = "token-" + madeUp()
	}
	t := &posternv1.Token{Id: text.ID, Name: name, Role: role, Created: timestamppb.New(s.cfg.Now()), Expires: expires}
	if err := s.cfg.Store.InsertToken(ctx, organization, t, text.Hash()); err != nil {
		return nil, "", err
	}
	return t, text.Encode(), nil
}

// madeUp is 8 characters of a name.
func madeUp() string {
	var b [5]byte
	rand.Read(b[:]) //nolint:errcheck // never fails, it aborts the program
	return encoding.EncodeToString(b[:])
}

// Revoke revokes a token, found by id or name. This process refuses it at once,
// others within five seconds.
func (s *Service) Revoke(ctx context.Context, organization, idOrName string) (*posternv1.Token, error) {
	t, err := s.cfg.Store.RevokeToken(ctx, organization, idOrName, s.cfg.Now())
	if err == nil {
		s.cache.forget()
	}
	return t, err
}

// Forget drops what was kept of tokens that proved good; call it after an
// organization was disabled in this process.
func (s *Service) Forget() { s.cache.forget() }

// Authenticate tells whose token it is. remote is the caller's address as we see
// it. UNAUTHENTICATED if it is malformed, unknown, revoked or expired,
// ORGANIZATION_DISABLED, RATE_LIMITED after too many failures from the address;
// a token that was good within the last five seconds is served even then.
func (s *Service) Authenticate(ctx context.Context, text, remote string) (Principal, error) {
	now := s.cfg.Now()
	key := sha256.Sum256([]byte(text))
	if p, ok := s.cache.get(key, now); ok && !ended(p.Expires, now) {
		p.Remote = remote
		return p, nil
	}
	from := addressKey(remote)
	if s.cfg.Failures != nil && s.cfg.Failures.Exhausted(from) {
		return Principal{}, rateLimited(from)
	}
	generation := s.cache.generation()
	p, err := s.look(ctx, text, now)
	if err != nil {
		switch proto.CodeOf(err) {
		case proto.CodeUnauthenticated, proto.CodeOrganizationDisabled:
			if s.cfg.Failures != nil {
				s.cfg.Failures.Take(from)
			}
		}
		return Principal{}, err
	}
	s.cache.put(key, p, now, generation)
	p.Remote = remote
	return p, nil
}

// AuthenticateAs is Authenticate for a client that also says the token's name, as
// clients of PostgreSQL must. A token of another name and an unknown token are the same
// error, and count alike.
func (s *Service) AuthenticateAs(ctx context.Context, name, text, remote string) (Principal, error) {
	p, err := s.Authenticate(ctx, text, remote)
	if err != nil {
		return Principal{}, err
	}
	if subtle.ConstantTimeCompare([]byte(p.TokenName), []byte(name)) == 1 {
		return p, nil
	}
	from := addressKey(remote)
	if s.cfg.Failures != nil {
		if s.cfg.Failures.Exhausted(from) {
			return Principal{}, rateLimited(from)
		}
		s.cfg.Failures.Take(from)
	}
	return Principal{}, unknown()
}

func rateLimited(from string) error {
	return proto.Errorf(proto.CodeRateLimited, "too many requests without a valid API token from %s: try again in a minute", from)
}

const another = "ask an admin for another (`postern token create`)"

func unknown() error {
	return proto.Errorf(proto.CodeUnauthenticated, "the control plane does not know this API token: check that it is one of this control plane's, or %s", another)
}

// look asks the store. An unknown id and a wrong secret are the same error and
// take the same time; who has the secret learns more.
func (s *Service) look(ctx context.Context, text string, now time.Time) (Principal, error) {
	token, err := Parse(text)
	if err != nil {
		return Principal{}, err
	}
	org, t, want, err := s.cfg.Store.TokenByID(ctx, token.ID)
	if err != nil && proto.CodeOf(err) != proto.CodeNotFound {
		return Principal{}, err
	}
	got := token.Hash()
	good := subtle.ConstantTimeCompare(got[:], want[:]) == 1 && err == nil
	var until time.Time // of a secret that was replaced
	if !good {
		former, end, ferr := s.cfg.Store.FormerSecret(ctx, token.ID)
		if ferr != nil {
			return Principal{}, ferr
		}
		good = subtle.ConstantTimeCompare(got[:], former[:]) == 1 && err == nil && !end.IsZero()
		until = end
	}
	switch {
	case !good:
		return Principal{}, unknown()
	case t.Revoked != nil:
		return Principal{}, proto.Errorf(proto.CodeUnauthenticated, "API token %s was revoked on %s: %s", t.Name, at(t.Revoked), another)
	case ended(until, now):
		return Principal{}, proto.Errorf(proto.CodeUnauthenticated, "API token %s was rotated, and this secret of it ended on %s: use the new one, or ask an admin for another (`postern token rotate`)", t.Name, at(timestamppb.New(until)))
	case t.Expires != nil && ended(t.Expires.AsTime(), now):
		return Principal{}, proto.Errorf(proto.CodeUnauthenticated, "API token %s expired on %s: %s", t.Name, at(t.Expires), another)
	case org.Disabled:
		return Principal{}, proto.Errorf(proto.CodeOrganizationDisabled, "organization %s is disabled", org.Name)
	}
	if t.LastUsed == nil || now.Sub(t.LastUsed.AsTime()) > touchEvery {
		s.touch(ctx, t, now)
	}
	p := Principal{
		Principal:        &posternv1.Principal{Organization: org.Id, TokenId: t.Id, TokenName: t.Name, Role: t.Role},
		OrganizationName: org.Name,
	}
	if t.Expires != nil {
		p.Expires = t.Expires.AsTime()
	}
	if !until.IsZero() && (p.Expires.IsZero() || until.Before(p.Expires)) {
		p.Expires = until
	}
	return p, nil
}

func (s *Service) touch(ctx context.Context, t *posternv1.Token, now time.Time) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), touchTimeout)
	defer cancel()
	if err := s.cfg.Store.TouchToken(ctx, t.Id, now); err != nil {
		s.log.WarnContext(ctx, "token's last use not recorded", "token", t.Name, "err", err)
	}
}

func ended(expires, now time.Time) bool { return !expires.IsZero() && !now.Before(expires) }

func at(t *timestamppb.Timestamp) string { return t.AsTime().UTC().Format("2006-01-02 15:04:05 UTC") }

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
