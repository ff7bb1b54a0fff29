package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

// Identity is the host's. Its methods are called by one goroutine at a time,
// but for Credential and Validity.
type Identity interface {
	// Credential is what to dial with: the next pair, if there is one.
	Credential() (config *tls.Config, notAfter time.Time, next bool)
	// Validity is that of the current certificate.
	Validity() (notBefore, notAfter time.Time)
	// Request makes a new key and returns the request for its certificate.
	Request() (csr []byte, err error)
	// Accept keeps the answer as the next pair.
	Accept(certificate []byte, authorities [][]byte) error
	// Promote makes the next pair the current one, Discard drops it.
	Promote() error
	Discard() error
	// SetAuthorities replaces the CAs to trust.
	SetAuthorities(authorities [][]byte) error
}

// Config is what a Keeper needs.
type Config struct {
	Logger *slog.Logger // nil discards
	// URL of the tunnel endpoint: wss://cp.example.com/tunnel.
	URL string
	// Proxy and Carrier are the tunnel's; may be nil.
	Proxy    func(*url.URL) (*url.URL, error)
	Carrier  func(tunnel.CarrierConfig) (tunnel.Carrier, error)
	Tunnel   tunnel.Config
	Identity Identity
	// Handler answers what the control plane asks.
	Handler http.Handler
	// Hello makes the first request of each tunnel.
	Hello func() *posternv1.HelloRequest
	// Welcome is told the answer; optional.
	Welcome func(*posternv1.HelloResponse)
	// Changed is told each change of state, from one goroutine at a time; optional.
	Changed func(State)
	// Renewed is told that a new certificate is in use; optional.
	Renewed func()
	// Wake ends a wait at once and has a live tunnel probed: the network changed.
	Wake <-chan struct{}
	// Backoff is how failures are spaced; its zero values are tunnel's defaults.
	Backoff tunnel.BackoffConfig
	// HelloTimeout bounds each call to the control plane. Default 15 s.
	HelloTimeout time.Duration
	// DrainFor is how long the streams of a tunnel whose place was taken may go
	// on. Default 24 h, the longest statement.
	DrainFor time.Duration
}

// State is what the link is like.
type State struct {
	// Up tells whether a tunnel is up; Since when it is so.
	Up    bool
	Since time.Time
	// Cause is why it is down, one line; Code the error's.
	Cause string
	Code  proto.Code
	// Attempts are the dials since it was up last.
	Attempts int
	// URL of the tunnel endpoint.
	URL string
	// What follows is known while it is up.
	TunnelID  string
	RoundTrip time.Duration
	Streams   int
	Remote    string
	// PeerSoftware and Minor are the control plane's, and the version spoken.
	PeerSoftware string
	Minor        uint32
	// Skew is this host's clock minus the control plane's, as of the hello.
	Skew time.Duration
}

// Keeper keeps a link up.
type Keeper struct {
	cfg    Config
	logger *slog.Logger
	kick   chan struct{} // renew now; capacity 1, more are the same

	sessions []*session // all that may still live; Run's own

	// mu guards the following; held for memory alone.
	mu       sync.Mutex
	state    State
	current  *session
	draining bool
	told     string // the kind of failure that was logged last
}

// New makes a Keeper; Run starts it.
func New(cfg Config) *Keeper {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.HelloTimeout == 0 {
		cfg.HelloTimeout = 15 * time.Second
	}
	if cfg.DrainFor == 0 {
		cfg.DrainFor = 24 * time.Hour
	}
	if cfg.Backoff.StableAfter == 0 {
		cfg.Backoff.StableAfter = 10 * time.Second
	}
	return &Keeper{
		cfg: cfg, logger: cfg.Logger, kick: make(chan struct{}, 1),
		state: State{Since: time.Now(), URL: cfg.URL, Cause: "not dialed yet"},
	}
}

// State is what the link is like now.
func (k *Keeper) State() State {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.state
	if k.current == nil || !s.Up {
		return s
	}
	if err := k.current.t.Err(); err != nil { // Run has not come to it yet
		return State{Since: time.Now(), URL: s.URL, Cause: lost(err).Error(), Code: codeOf(lost(err)), Skew: s.Skew}
	}
	s.RoundTrip = k.current.t.RTT()
	s.Streams = k.current.t.Streams()
	return s
}

// Run keeps the link up until ctx ends, then closes every tunnel and waits for
// the requests that they carry to end.
func (k *Keeper) Run(ctx context.Context) {
	defer k.closeAll()
	backoff := tunnel.NewBackoff(k.cfg.Backoff)
	failures := 0
	for ctx.Err() == nil {
		t, welcome, err := k.dial(ctx)
		if err == nil {
			failures = 0
			next := k.adopt(t, welcome)
			err = k.stay(ctx, next, backoff)
			if err == nil {
				continue // a planned move: dial the next while this one works
			}
		}
		if ctx.Err() == nil && k.leaving() {
			<-ctx.Done() // the last tunnel is gone: no other is wanted
		}
		if ctx.Err() != nil {
			return
		}
		failures++
		k.failed(err)
		k.wait(ctx, pause(backoff, err, failures))
	}
}

func (k *Keeper) leaving() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.draining
}

// slow codes are those that only a person can mend. They are asked again all
// the same: revocations are lifted, versions upgraded.
func slow(code proto.Code) (first, most time.Duration) {
	switch code {
	case proto.CodeAgentRevoked:
		return 30 * time.Second, 30 * time.Second
	case proto.CodeVersionMismatch, proto.CodeOrganizationDisabled, proto.CodeIdentityExpired,
		proto.CodeUnauthenticated, proto.CodeWrongControlPlane:
		return 5 * time.Second, 5 * time.Minute
	}
	return 0, 0
}

// pause is how long to wait after the nth failure in a row.
func pause(backoff *tunnel.Backoff, err error, n int) time.Duration {
	d := backoff.Next(err)
	first, most := slow(proto.CodeOf(err))
	if first == 0 {
		return d
	}
	bound := min(most, first<<min(n-1, 10))
	return bound/2 + jitter(bound/2)
}

// wait waits for d, or for a sign that waiting longer makes no sense: the network
// changed, or the tunnel that was to be left is gone before the next is there.
func (k *Keeper) wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	var gone <-chan struct{}
	if k.current != nil && k.current.t.Err() == nil { // Run alone sets it
		gone = k.current.t.Done()
	}
	select {
	case <-timer.C:
	case <-gone:
	case <-k.cfg.Wake:
	case <-ctx.Done():
	}
}

// stay keeps a tunnel until it is lost (an error) or the next one shall be
// dialed (nil): the control plane goes away, or a renewed certificate waits for
// its proof.
func (k *Keeper) stay(ctx context.Context, s *session, backoff *tunnel.Backoff) error {
	stable := time.NewTimer(k.cfg.Backoff.StableAfter)
	defer stable.Stop()
	renew := time.NewTimer(k.renewIn())
	defer renew.Stop()
	try := 0
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.t.Done():
			return lost(s.t.Err())
		case <-stable.C:
			backoff.Reset()
		case <-k.cfg.Wake:
			s.t.Probe()
		case g := <-s.t.GoneAway():
			k.logger.Info("control plane going away, moving", "reason", g.Reason, "duration_seconds", g.ReconnectAfter.Seconds())
			k.wait(ctx, g.ReconnectAfter)
			return nil
		case <-k.kick:
			renew.Reset(0)
		case <-renew.C:
			if err := k.renew(ctx, s.t); err == nil {
				return nil
			} else if ctx.Err() == nil && s.t.Err() == nil {
				try++
				again := k.renewAgainIn(try)
				k.logger.Warn("identity not renewed, retrying", "err", err, "duration_seconds", again.Seconds())
				renew.Reset(again)
			}
		}
	}
}

// lost says why a tunnel that was up ended.
func lost(err error) error {
	switch {
	case errors.Is(err, tunnel.ErrRevoked):
		return &proto.Error{Code: proto.CodeAgentRevoked, Message: "the agent was revoked: register it again with a new key", Err: err}
	case errors.Is(err, tunnel.ErrReplaced):
		return &proto.Error{Code: proto.CodeUnavailable, Message: "another tunnel took this one's place: is a second agentd running with a copy of this identity?", Err: err}
	case err == nil:
		return tunnel.ErrClosed
	}
	return err
}

// failed records a failure and logs the first of its kind.
func (k *Keeper) failed(err error) {
	k.mu.Lock()
	if k.current != nil && k.current.t.Err() == nil {
		kind := "next " + kindOf(err)
		again := k.told == kind
		k.told = kind
		k.mu.Unlock()
		if !again {
			k.logger.Warn("next tunnel not up, retrying with the old one still there", "err", err)
		}
		return
	}
	was := k.state
	now := State{Since: was.Since, URL: k.cfg.URL, Cause: err.Error(), Code: codeOf(err), Attempts: was.Attempts + 1, Skew: was.Skew}
	if was.Up || was.Attempts == 0 {
		now.Since = time.Now()
	}
	if was.Up {
		now.Attempts = 0
	}
	k.state = now
	kind := kindOf(err)
	changed := was.Up || k.told != kind
	k.told = kind
	k.mu.Unlock()
	if !changed {
		return
	}
	level := slog.LevelWarn
	if first, _ := slow(now.Code); first > 0 {
		level = slog.LevelError
	}
	k.logger.Log(context.Background(), level, "link down, retrying", "err", err)
	if k.cfg.Changed != nil {
		k.cfg.Changed(now)
	}
}

// kindOf tells failures apart for the log: by code and step, for the text may
// name another port each time.
func kindOf(err error) string {
	kind := codeOf(err).String()
	var d *tunnel.DialError
	if errors.As(err, &d) {
		kind += fmt.Sprintf(" %s %d %v", d.Step, d.Status, d.Refusal)
	}
	return kind
}

// codeOf is UNAVAILABLE for what has no code: the network.
func codeOf(err error) proto.Code {
	var e *proto.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return proto.CodeUnavailable
}

// Renew asks for a new certificate now rather than when it is due.
func (k *Keeper) Renew() {
	select {
	case k.kick <- struct{}{}:
	default: // asked already
	}
}

// Client is the control plane's end of the tunnel that is up; AGENT_OFFLINE if
// there is none.
func (k *Keeper) Client() (posternv1connect.LinkServiceClient, error) {
	return k.ClientFor(0)
}

// ClientFor is Client for a request of so many bytes: small ones take the lane of control.
func (k *Keeper) ClientFor(size int) (posternv1connect.LinkServiceClient, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.current == nil || k.current.t.Err() != nil {
		return nil, proto.Errorf(proto.CodeAgentOffline, "the link to the control plane is down")
	}
	if size > smallReport {
		return clientOn(k.current.t, tunnel.Bulk), nil
	}
	return client(k.current.t), nil
}

// Transport is the way to the control plane by the tunnel that is up, for bodies large or
// small; AGENT_OFFLINE if there is none. It serves one request: the next one may have to
// take another tunnel.
func (k *Keeper) Transport(bulk bool) (http.RoundTripper, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.current == nil || k.current.t.Err() != nil {
		return nil, proto.Errorf(proto.CodeAgentOffline, "the link to the control plane is down")
	}
	if bulk {
		return k.current.t.Transport(tunnel.Bulk), nil
	}
	return k.current.t.Transport(tunnel.Control), nil
}

func client(t *tunnel.Tunnel) posternv1connect.LinkServiceClient {
	return clientOn(t, tunnel.Control)
}

func clientOn(t *tunnel.Tunnel, class tunnel.Class) posternv1connect.LinkServiceClient {
	return posternv1connect.NewLinkServiceClient(&http.Client{Transport: t.Transport(class)}, "http://controlplane")
}

// tunnelKey is where a request's context has the tunnel that it came through.
type tunnelKey struct{}

// smallReport is what may go on the control lane, where nothing big is to stand
// in the way, in bytes.
const smallReport = 32 << 10

// ReportRows tells the control plane of the rows of a statement that it may keep.
// ctx is of the request that brought the statement: the answer goes to the process
// that asked, also while the link moves to another one.
func ReportRows(ctx context.Context, r *posternv1.ReportRowsRequest) error {
	t, ok := ctx.Value(tunnelKey{}).(*tunnel.Tunnel)
	if !ok {
		return proto.Errorf(proto.CodeInternal, "the statement came through no tunnel")
	}
	class := tunnel.Control
	if len(r.GetRows().GetArrow()) > smallReport {
		class = tunnel.Bulk
	}
	if _, err := clientOn(t, class).ReportRows(ctx, connect.NewRequest(r)); err != nil {
		return proto.FromConnect(err)
	}
	return nil
}
