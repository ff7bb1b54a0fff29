package vault

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/postern-dev/postern/agentd/secret"
)

// Reader reads one of the secrets by which agentd proves itself to Vault.
type Reader func(context.Context) (secret.Secret, error)

// Config is what a Client needs.
type Config struct {
	// Address is Vault's URL; https, or http on loopback.
	Address string
	// Namespace is Vault Enterprise's; "" is none.
	Namespace string
	// Transport is what requests go through; nil means one of the Client's own, which
	// trusts RootCAs or, if that is nil, the system's authorities.
	Transport http.RoundTripper
	RootCAs   *x509.CertPool
	// Closed is called once, at the end of Close; optional.
	Closed func()
	// Token is read at each login. Either it or RoleID and SecretID are set.
	Token Reader
	// Mount is where AppRole is; "" means approle.
	Mount    string
	RoleID   string
	SecretID Reader
	// Grace is how long a lease that nobody uses is kept for the next; 0 means
	// 2 minutes.
	Grace time.Duration
	// Logger is optional.
	Logger *slog.Logger
}

const (
	// requestTimeout bounds one request to Vault.
	requestTimeout = 10 * time.Second
	// closeTimeout bounds what Close asks of Vault altogether.
	closeTimeout = 5 * time.Second
	// maxLeases bounds the leases that are held at once.
	maxLeases = 1024
)

// Client talks to one Vault.
type Client struct {
	cfg    Config
	log    *slog.Logger
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	loggingIn sync.Mutex // held while a login is under way

	mu     sync.Mutex // guards the following
	login  *login     // nil: none, or it ended
	leases map[*lease]struct{}
	closed bool
}

// login is one token of ours.
type login struct {
	client *api.Client
	// ended is closed when the token must not be used for anything new: what
	// was made with it ends with it.
	ended   chan struct{}
	end     sync.Once
	expires atomic.Int64 // in ns of Unix time; 0: not known, or never
}

// lives sets how long the token lasts from now on.
func (l *login) lives(d time.Duration) { l.expires.Store(time.Now().Add(d).UnixNano()) }

func (l *login) over() { l.end.Do(func() { close(l.ended) }) }

func (l *login) isOver() bool {
	select {
	case <-l.ended:
		return true
	default:
		at := l.expires.Load()
		return at != 0 && time.Now().UnixNano() > at
	}
}

// New makes a Client; it asks nothing of Vault yet. Close ends it.
func New(cfg Config) *Client {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Mount == "" {
		cfg.Mount = "approle"
	}
	if cfg.Grace == 0 {
		cfg.Grace = 2 * time.Minute
	}
	c := &Client{cfg: cfg, log: cfg.Logger, leases: make(map[*lease]struct{})}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c
}

// api makes a client of the library that knows nothing of the environment.
func (c *Client) api() (*api.Client, error) {
	through := c.cfg.Transport
	if through == nil {
		transport := http.DefaultTransport.(*http.Transport).Clone()
		transport.Proxy = nil
		transport.MaxIdleConnsPerHost = 2
		transport.TLSClientConfig = &tls.Config{RootCAs: c.cfg.RootCAs, MinVersion: tls.VersionTLS12}
		through = transport
	}
	client, err := api.NewClient(&api.Config{
		Address: c.cfg.Address, HttpClient: &http.Client{Transport: through}, MaxRetries: 1, Timeout: requestTimeout, DisableRedirects: true,
	})
	if err != nil {
		return nil, err
	}
	client.ClearToken()
	client.ClearNamespace()
	if c.cfg.Namespace != "" {
		client.SetNamespace(c.cfg.Namespace)
	}
	return client, nil
}

// session returns the login in force, after a new one where there is none.
func (c *Client) session(ctx context.Context) (*login, error) {
	c.loggingIn.Lock()
	defer c.loggingIn.Unlock()
	c.mu.Lock()
	l, closed := c.login, c.closed
	c.mu.Unlock()
	if closed {
		return nil, errors.New("vault: the agent is going away")
	}
	if l != nil && !l.isOver() {
		return l, nil
	}
	client, err := c.api()
	if err != nil {
		return nil, fmt.Errorf("vault at %s: %w", c.cfg.Address, err)
	}
	l = &login{client: client, ended: make(chan struct{})}
	if c.cfg.Token != nil {
		token, err := c.cfg.Token(ctx)
		if err != nil {
			return nil, fmt.Errorf("vault's token: %w", err)
		}
		client.SetToken(token.Reveal())
		// Its owner renews it, and may replace it: it is read again soon.
		l.lives(tokenLife)
	} else if err := c.appRole(ctx, l); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errors.New("vault: the agent is going away")
	}
	c.login = l
	return l, nil
}

// tokenLife is how long a token that was read is used before it is read again.
const tokenLife = time.Minute

// appRole logs in and keeps the token alive as long as that goes.
func (c *Client) appRole(ctx context.Context, l *login) error {
	id, err := c.cfg.SecretID(ctx)
	if err != nil {
		return fmt.Errorf("vault's AppRole secret_id: %w", err)
	}
	path := "auth/" + c.cfg.Mount + "/login"
	answer, err := l.client.Logical().WriteWithContext(ctx, path, map[string]any{"role_id": c.cfg.RoleID, "secret_id": id.Reveal()})
	if err != nil {
		return c.failure("log in by AppRole", path, err)
	}
	if answer == nil || answer.Auth == nil || answer.Auth.ClientToken == "" {
		return fmt.Errorf("vault at %s: %s gave no token", c.cfg.Address, path)
	}
	l.client.SetToken(answer.Auth.ClientToken)
	life := time.Duration(answer.Auth.LeaseDuration) * time.Second
	if life <= 0 {
		return nil // it does not end
	}
	l.lives(life)
	c.goRun(func() { c.keepLogin(l, life, answer.Auth.Renewable) })
	return nil
}

// keepLogin renews a token until that goes no longer, and gives it up a while
// before its end, so that what was made with it can be replaced in time.
func (c *Client) keepLogin(l *login, life time.Duration, renewable bool) {
	first := life
	for {
		if !c.sleep(life*2/3, l.ended) {
			return
		}
		ctx, done := context.WithTimeout(c.ctx, requestTimeout)
		var err error
		if renewable {
			var answer *api.Secret
			if answer, err = l.client.Auth().Token().RenewSelfWithContext(ctx, int(first/time.Second)); err == nil && answer != nil && answer.Auth != nil {
				life, renewable = time.Duration(answer.Auth.LeaseDuration)*time.Second, answer.Auth.Renewable
			}
		}
		done()
		if err != nil {
			c.log.Warn("vault token not renewed: logging in again", "err", c.failure("renew the token", "auth/token/renew-self", err))
		}
		if err != nil || !renewable || life < first/3 {
			l.over()
			return
		}
		l.lives(life)
	}
}

// goRun runs f in a goroutine that Close waits for; after Close it does not.
func (c *Client) goRun(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.wg.Go(f)
	}
}

// sleep waits; false when Close or the channel, which may be nil, came first.
func (c *Client) sleep(d time.Duration, stop <-chan struct{}) bool {
	t := time.NewTimer(max(d, 100*time.Millisecond))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-stop:
	case <-c.ctx.Done():
	}
	return false
}

// ask asks with a login, and once more with a new one if Vault does not know
// the token any more.
func (c *Client) ask(ctx context.Context, what, path string, f func(*login) error) error {
	for attempt := 0; ; attempt++ {
		l, err := c.session(ctx)
		if err != nil {
			return err
		}
		err = f(l)
		var refused *api.ResponseError
		if err != nil && attempt == 0 && errors.As(err, &refused) && refused.StatusCode == http.StatusForbidden {
			l.over()
			continue
		}
		if err != nil {
			return c.failure(what, path, err)
		}
		return nil
	}
}

// failure says in one line what went wrong, where and what to do.
func (c *Client) failure(what, path string, err error) error {
	var refused *api.ResponseError
	var unreachable *url.Error
	switch {
	case errors.As(err, &refused):
		said := strings.Join(strings.Fields(strings.Join(refused.Errors, "; ")), " ")
		switch refused.StatusCode {
		case http.StatusForbidden:
			return fmt.Errorf("vault at %s refuses to %s (%s): %s: does the policy of agentd's token allow it?", c.cfg.Address, what, path, orElse(said, "permission denied"))
		case http.StatusServiceUnavailable:
			return fmt.Errorf("vault at %s is sealed or not ready: unseal it (%s)", c.cfg.Address, orElse(said, "status 503"))
		case http.StatusNotFound:
			return fmt.Errorf("vault at %s has no %s: check the path", c.cfg.Address, path)
		}
		return fmt.Errorf("vault at %s: %s (%s): status %d: %s", c.cfg.Address, what, path, refused.StatusCode, orElse(said, "no reason given"))
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("vault at %s did not answer in time", c.cfg.Address)
	case errors.As(err, &unreachable):
		return fmt.Errorf("cannot reach vault at %s: %w", c.cfg.Address, unreachable.Err)
	}
	return fmt.Errorf("vault at %s: %s (%s): %w", c.cfg.Address, what, path, err)
}

func orElse(text, other string) string {
	if text == "" {
		return other
	}
	return text
}

// KV reads one field of a secret of the KV v2 engine at mount, afresh. The
// error is one line.
func (c *Client) KV(ctx context.Context, mount, path, field string) (value secret.Secret, err error) {
	ctx, done := context.WithTimeout(ctx, requestTimeout)
	defer done()
	where := mount + "/data/" + path
	err = c.ask(ctx, "read the secret", where, func(l *login) error {
		answer, err := l.client.Logical().ReadWithContext(ctx, where)
		if err != nil {
			return err
		}
		if answer == nil {
			return &api.ResponseError{StatusCode: http.StatusNotFound}
		}
		data, ok := answer.Data["data"].(map[string]any)
		if !ok {
			return errors.New("the answer is none of the KV v2 engine: was the secret deleted, or is it KV v1?")
		}
		switch v := data[field].(type) {
		case string:
			value = secret.New(v)
		case json.Number:
			value = secret.New(v.String())
		case nil:
			return fmt.Errorf("the secret has no field %q: set field to one of its keys", field)
		default:
			return fmt.Errorf("field %q is no text", field)
		}
		if value.Reveal() == "" {
			return fmt.Errorf("field %q is empty", field)
		}
		return nil
	})
	return value, err
}

// Close revokes every lease and ends what runs; it waits for Vault for a few
// seconds at most. Leases that it could not revoke end by themselves.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	var leases []*lease
	for l := range c.leases {
		leases = append(leases, l)
	}
	c.mu.Unlock()
	c.cancel()
	c.wg.Wait()
	ctx, done := context.WithTimeout(context.Background(), closeTimeout)
	defer done()
	var wg sync.WaitGroup
	errs := make([]error, len(leases))
	for i, l := range leases {
		wg.Go(func() { errs[i] = l.revoke(ctx) })
	}
	wg.Wait()
	if c.cfg.Closed != nil {
		c.cfg.Closed()
	}
	return errors.Join(errs...)
}
