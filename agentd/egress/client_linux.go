package egress

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"sync"
	"time"
)

// Arg is the first argument of an egress process by default.
const Arg = "egress"

// UIDs is how far behind sql.uid_base the egress processes' user id is: behind the uplink's.
const UIDs = 65_536 + 256 + 3

// Limits.
const (
	// maxConnections bounds the requests of a Client at once; more wait. maxIdle of their connections
	// are kept for a minute, at either end.
	maxConnections = 256
	maxIdle        = 64
	// maxHeader bounds the header of an answer, in bytes.
	maxHeader = 256 << 10
	// restartPause is between starts of a process that does not live.
	restartPause = time.Second
)

// idleTime is how long a process is kept without a request. Tests shorten it.
var idleTime = 5 * time.Minute

// Config is what a Client needs.
type Config struct {
	// Name is what it is for, such as "vault", for logs and errors.
	Name string
	// Executable is agentd's own; "" means /proc/self/exe. Args are its arguments;
	// nil means Arg alone.
	Executable string
	Args       []string
	// UID is the user and group id that the process gets when agentd is root. It must
	// not be 0 then.
	UID uint32
	// CAs are trusted beside the system's, in DER.
	CAs [][]byte
	// Proxy says which proxy to use for a URL, http or https; nil is none. It is asked once for each process.
	Proxy func(*url.URL) (*url.URL, error)
	// HeaderTime bounds the wait for an answer's header, from the request's last byte on; 0 means a minute.
	HeaderTime time.Duration
	// Logger is optional; nil discards.
	Logger *slog.Logger
}

// Client makes requests to one destination, the scheme and host of its first request, through a process
// of its own. It follows no redirect. It is safe for concurrent use.
type Client struct {
	config Config
	wg     sync.WaitGroup

	mu      sync.Mutex // guards the following; held while a process starts
	scheme  string
	host    string
	current *process // nil: none yet, or it has ended
	started time.Time
	used    time.Time
	busy    int // requests whose answers are not read to their end
	idle    *time.Timer
	closed  bool
}

var _ http.RoundTripper = (*Client)(nil)

// ErrClosed is returned after Close.
var ErrClosed = errors.New("egress: closed")

// New makes a Client; end it with Close.
func New(config Config) *Client {
	if config.Executable == "" {
		config.Executable = "/proc/self/exe"
	}
	if config.Args == nil {
		config.Args = []string{Arg}
	}
	if config.HeaderTime == 0 {
		config.HeaderTime = time.Minute
	}
	if config.Logger == nil {
		config.Logger = slog.New(slog.DiscardHandler)
	}
	config.Logger = config.Logger.With("egress", config.Name)
	return &Client{config: config}
}

// Close ends the process and what it has under way, and waits for it. It may be called more than once.
func (c *Client) Close() {
	c.mu.Lock()
	c.closed = true
	if c.idle != nil {
		c.idle.Stop()
	}
	p := c.current
	c.current = nil
	c.mu.Unlock()
	if p != nil {
		p.end()
	}
	c.wg.Wait()
}

// CloseIdleConnections closes what http.Client.CloseIdleConnections asks for.
func (c *Client) CloseIdleConnections() {
	c.mu.Lock()
	p := c.current
	c.mu.Unlock()
	if p != nil {
		p.transport.CloseIdleConnections()
	}
}

// failure is why the destination did not answer, in the words of the process.
type failure struct{ text string }

// Error implements error.
func (f *failure) Error() string { return f.text }

// RoundTrip implements http.RoundTripper.
func (c *Client) RoundTrip(r *http.Request) (*http.Response, error) {
	p, err := c.running(r.URL)
	if err != nil {
		if r.Body != nil {
			_ = r.Body.Close()
		}
		return nil, err
	}
	over := sync.OnceFunc(c.over)
	out := r.Clone(r.Context())
	if out.Host == "" {
		out.Host = r.URL.Host
	}
	out.URL.Scheme = "http" // between the two
	answer, err := p.transport.RoundTrip(out)
	if err != nil {
		over()
		if p.gone() && r.Context().Err() == nil {
			return nil, fmt.Errorf("the process that speaks with %s is gone: %w", r.URL.Host, err)
		}
		return nil, err
	}
	if escaped := answer.Header.Get(failureHeader); escaped != "" {
		_ = answer.Body.Close()
		over()
		text, err := url.QueryUnescape(escaped)
		if err != nil {
			text = "it does not say why"
		}
		return nil, &failure{oneLine(text)}
	}
	answer.Request = r
	answer.Body = &body{ReadCloser: answer.Body, over: over}
	return answer, nil
}

// running is the process for a URL, which is started if there is none. The caller owes an over.
func (c *Client) running(to *url.URL) (*process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return nil, ErrClosed
	case to.Scheme != "https" && to.Scheme != "http":
		return nil, fmt.Errorf("egress: %q is not http or https", to.Scheme)
	case c.host != "" && (c.scheme != to.Scheme || c.host != to.Host):
		return nil, fmt.Errorf("egress: this is for %s://%s alone, not for %s://%s", c.scheme, c.host, to.Scheme, to.Host)
	}
	if c.current != nil && c.current.gone() {
		c.current = nil
	}
	if c.current == nil {
		if time.Since(c.started) < restartPause {
			return nil, fmt.Errorf("the process that speaks with %s ended: agentd's log says how", to.Host)
		}
		p, err := c.start(to)
		if err != nil {
			return nil, fmt.Errorf("start the process that speaks with %s: %w", to.Host, err)
		}
		c.current, c.started, c.scheme, c.host = p, time.Now(), to.Scheme, to.Host
	}
	c.busy++
	c.used = time.Now()
	if c.idle == nil {
		c.idle = time.AfterFunc(idleTime, c.retire)
	}
	return c.current, nil
}

// over notes the end of a request.
func (c *Client) over() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.busy--
	c.used = time.Now()
}

// retire ends a process that nobody has used for idleTime.
func (c *Client) retire() {
	c.mu.Lock()
	if c.closed || c.current == nil {
		c.idle = nil
		c.mu.Unlock()
		return
	}
	if left := idleTime - time.Since(c.used); c.busy > 0 || left > 0 {
		c.idle.Reset(max(left, idleTime/8))
		c.mu.Unlock()
		return
	}
	p := c.current
	c.current, c.idle = nil, nil
	c.started = time.Time{} // it lived
	c.wg.Add(1)
	c.mu.Unlock()
	defer c.wg.Done()
	p.end()
}
