package jupyter

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// Prefix is where a Server's paths begin.
	Prefix = "/jupyter/"
	// apiVersion is the version of Jupyter Server's API that is followed; some clients
	// want to read a version of jupyter_server here.
	apiVersion = "2.14.0"
	// maxBody bounds a request's body, in bytes.
	maxBody = 1 << 20
	// maxToken bounds a token's text, in bytes.
	maxToken = 4096
	// maxConnections bounds the WebSockets of one token.
	maxConnections = 64
	// retryAfter is what clients are told to wait for an agent that is away, in seconds.
	retryAfter = "2"
)

// Server serves Jupyter's clients.
type Server struct {
	cfg     Config
	mux     *http.ServeMux
	routes  []string // what mux routes, as Routes tells
	started time.Time
	ctx     context.Context // ends with Close
	stop    context.CancelFunc
	work    sync.WaitGroup

	mu     sync.Mutex // guards what follows; held for memory only
	conns  map[*conn]struct{}
	closed bool
	// read is what clients that are away had read, by token, kernel and client, and
	// order the same keys, the oldest first.
	read  map[clientKey]uint64
	order []clientKey
	// lost are clients without names that went without a word, the oldest first.
	lost []lostClient
}

// origin is what tells clients that give no session_id from each other: gateway clients,
// whose servers come back by themselves when a connection broke.
type origin struct{ token, kernel, remote, agent string }

type lostClient struct {
	from origin
	name string
	at   time.Time
}

const (
	// lostTime is how long a client without a name may take to come back, and maxLost
	// bounds how many are waited for.
	lostTime, maxLost = 2 * time.Minute, 1000
)

// nameless names a client that gives no session_id: as the one from the same place
// that was lost last, whose messages it then gets, or anew.
func (s *Server) nameless(from origin) (name string, resume bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := len(s.lost) - 1; i >= 0; i-- {
		if l := s.lost[i]; l.from == from && time.Since(l.at) < lostTime {
			s.lost = slices.Delete(s.lost, i, i+1)
			return l.name, true
		}
	}
	for c := range s.conns { // a break that is not noticed yet
		if c.from != nil && *c.from == from && c.silent() {
			return c.client, true
		}
	}
	return "ws-" + jupyter.NewID(), false
}

// clientKey names a client of a kernel.
type clientKey struct{ token, kernel, client string }

func (c *conn) key() clientKey { return clientKey{c.caller.TokenId, c.kernel, c.client} }

// maxRead bounds the clients that are away of which is known what they had read; of
// others the host knows, too.
const maxRead = 10_000

// New returns a Server. Close it.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg, mux: http.NewServeMux(), started: time.Now(), conns: map[*conn]struct{}{}, read: map[clientKey]uint64{}}
	s.ctx, s.stop = context.WithCancel(context.Background())
	for path, handle := range map[string]func(*request) error{
		"GET /api":                             s.getVersion,
		"GET /api/{$}":                         s.getVersion,
		"GET /api/status":                      s.getStatus,
		"GET /api/me":                          s.getMe,
		"GET /api/kernelspecs":                 s.getSpecs,
		"GET /api/kernelspecs/{name}":          s.getSpec,
		"GET /kernelspecs/{name}/{file}":       s.getResource,
		"GET /api/kernelspecs/{name}/{file}":   s.getResource,
		"GET /api/kernels":                     s.listKernels,
		"POST /api/kernels":                    s.startKernel,
		"GET /api/kernels/{kernel}":            s.getKernel,
		"DELETE /api/kernels/{kernel}":         s.stopKernel,
		"POST /api/kernels/{kernel}/interrupt": s.interruptKernel,
		"POST /api/kernels/{kernel}/restart":   s.restartKernel,
		"GET /api/kernels/{kernel}/channels":   s.serveChannels,
		"GET /api/sessions":                    s.listSessions,
		"POST /api/sessions":                   s.startSession,
		"GET /api/sessions/{session}":          s.getSession,
		"PATCH /api/sessions/{session}":        s.changeSession,
		"DELETE /api/sessions/{session}":       s.stopSession,
	} {
		s.routes = append(s.routes, path)
		s.mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			q := r.Context().Value(requestKey{}).(*request)
			q.w, q.r = w, r
			if err := handle(q); err != nil {
				s.fail(w, err)
			}
		})
	}
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.fail(w, proto.Errorf(proto.CodeNotFound, "an agent has kernels, kernelspecs and sessions: nothing else of a Jupyter server is there"))
	})
	return s
}

// Routes are the patterns, in net/http's words, of all that is served below an agent's path: tests
// walk them so that no new one goes without a check of who may see what behind it.
func (s *Server) Routes() []string {
	all := slices.Clone(s.routes)
	slices.Sort(all)
	return all
}

// request is one request of a caller who is known.
type request struct {
	w     http.ResponseWriter
	r     *http.Request
	c     Caller
	agent *posternv1.Agent
	base  string // the path of the agent, without a token
}

type requestKey struct{}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer") // the path may hold a token
	agent, rest, token := splitPath(strings.TrimPrefix(r.URL.Path, Prefix))
	if agent == "" {
		s.fail(w, proto.Errorf(proto.CodeNotFound, "no agent in the path: a Jupyter server is at %sAGENT", Prefix))
		return
	}
	c, err := s.caller(r, token)
	if err == nil && !s.cfg.Requests.Allow(c.TokenId) {
		err = proto.Errorf(proto.CodeRateLimited, "token %s makes too many requests a second: slow down", c.TokenName)
	}
	if err == nil {
		err = s.cfg.Permit(c.Principal)
	}
	if err != nil {
		s.fail(w, err)
		return
	}
	q := &request{c: c, base: Prefix + url.PathEscape(agent)}
	if q.agent, err = s.cfg.Kernels.Agent(r.Context(), c, agent); err != nil {
		s.fail(w, err)
		return
	}
	inner := r.WithContext(context.WithValue(r.Context(), requestKey{}, q))
	inner.URL = &url.URL{Path: rest, RawQuery: r.URL.RawQuery}
	s.mux.ServeHTTP(w, inner)
}

// splitPath takes AGENT/api/... or AGENT/t/TOKEN/api/... apart.
func splitPath(path string) (agent, rest, token string) {
	agent, rest, _ = strings.Cut(path, "/")
	if inner, ok := strings.CutPrefix(rest, "t/"); ok {
		token, rest, _ = strings.Cut(inner, "/")
	}
	rest = "/" + strings.TrimRight(strings.TrimLeft(rest, "/"), "/")
	return agent, rest, token
}

// caller finds out whose token comes with a request. A token in the header is taken
// before one in the query, and that before one in the path.
func (s *Server) caller(r *http.Request, inPath string) (Caller, error) {
	text := ""
	for _, candidate := range []string{headerToken(r.Header.Get("Authorization")), r.URL.Query().Get("token"), inPath} {
		if candidate != "" {
			text = candidate
			break
		}
	}
	switch {
	case text == "":
		return Caller{}, proto.Errorf(proto.CodeUnauthenticated, "no API token: send it as \"Authorization: token T\" or \"Bearer T\", as ?token=T, or in the path behind /t/")
	case len(text) > maxToken:
		return Caller{}, proto.Errorf(proto.CodeUnauthenticated, "this is no API token: it is too long")
	}
	remote := s.cfg.Remote(r)
	c, err := s.cfg.Tokens.Authenticate(r.Context(), text, remote)
	c.Remote = remote
	return c, err
}

// headerToken is the token in an Authorization header of one of the kinds that
// Jupyter's clients send.
func headerToken(header string) string {
	scheme, token, ok := strings.Cut(header, " ")
	if ok && (strings.EqualFold(scheme, "bearer") || strings.EqualFold(scheme, "token")) {
		return strings.TrimSpace(token)
	}
	return ""
}

// sameSite reports whether a request is of no site, as programs' are, or of ours:
// the Host it asked for, or the one that a reverse proxy on this machine was asked for.
func sameSite(r *http.Request) bool {
	origins := r.Header.Values("Origin")
	if len(origins) == 0 {
		return true
	}
	u, err := url.Parse(origins[0])
	if err != nil || u.Host == "" || len(origins) > 1 {
		return false
	}
	if strings.EqualFold(u.Host, r.Host) {
		return true
	}
	peer, _, err := net.SplitHostPort(r.RemoteAddr)
	forwarded := r.Header.Get("X-Forwarded-Host")
	return err == nil && net.ParseIP(peer).IsLoopback() && forwarded != "" && strings.EqualFold(u.Host, forwarded)
}

// fail answers with an error as a Jupyter server does.
func (s *Server) fail(w http.ResponseWriter, err error) {
	detail := proto.Detail(err)
	status := proto.HTTPStatus(detail.Code)
	switch detail.Code {
	case proto.CodeUnauthenticated:
		status = http.StatusForbidden // what a Jupyter server says; clients look for it
	case proto.CodeAgentLost, proto.CodeVersionMismatch:
		status = http.StatusServiceUnavailable
	case proto.CodeInternal:
		if !errors.Is(err, context.Canceled) {
			s.cfg.Logger.Error("request of a Jupyter client failed", "err", err)
		}
	}
	if status == http.StatusServiceUnavailable || status == http.StatusTooManyRequests {
		w.Header().Set("Retry-After", retryAfter)
	}
	writeJSON(w, status, map[string]any{"message": detail.Message, "reason": nil})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	text, err := json.Marshal(v)
	if err != nil {
		status, text = http.StatusInternalServerError, []byte(`{"message":"internal error","reason":null}`)
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(append(text, '\n')) //nolint:errcheck // the client has gone
}

// body reads a request's JSON object; none is an empty one.
func (q *request) body(v any) error {
	text, err := io.ReadAll(http.MaxBytesReader(q.w, q.r.Body, maxBody))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return proto.Errorf(proto.CodeBodyTooLarge, "the request has more than %d bytes", maxBody)
	case err != nil:
		return proto.Errorf(proto.CodeInvalid, "the request did not arrive whole")
	case len(strings.TrimSpace(string(text))) == 0:
		return nil
	}
	if err := json.Unmarshal(text, v); err != nil {
		return proto.Errorf(proto.CodeInvalid, "the request is not the JSON that Jupyter's API wants")
	}
	return nil
}

func (s *Server) getVersion(q *request) error {
	writeJSON(q.w, http.StatusOK, map[string]string{"version": apiVersion})
	return nil
}

func (s *Server) getStatus(q *request) error {
	list, err := s.mine(q)
	if err != nil {
		return err
	}
	last, connections := s.started, uint32(0)
	for _, k := range list {
		connections += k.Connections
		if at := k.LastActivity.AsTime(); at.After(last) {
			last = at
		}
	}
	writeJSON(q.w, http.StatusOK, map[string]any{
		"started": timeText(s.started), "last_activity": timeText(last), "connections": connections, "kernels": len(list),
	})
	return nil
}

func (s *Server) getMe(q *request) error {
	name := q.c.TokenName
	writeJSON(q.w, http.StatusOK, map[string]any{
		"identity": map[string]any{
			"username": name, "name": name, "display_name": name, "initials": string([]rune(name + " ")[:1]), "avatar_url": nil, "color": nil,
		},
		"permissions": map[string][]string{"kernels": {"read", "write", "execute"}, "kernelspecs": {"read"}, "sessions": {"read", "write"}},
	})
	return nil
}

// timeText is a time as Jupyter's servers write it.
func timeText(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000000Z") }

// CutToken ends the WebSockets of a token at once: it was revoked.
func (s *Server) CutToken(id string) {
	s.cut(func(c *conn) bool { return c.caller.TokenId == id }, proto.Errorf(proto.CodeUnauthenticated, "the API token was revoked"))
}

// CutOrganization ends the WebSockets of an organization at once: it was disabled.
func (s *Server) CutOrganization(id string) {
	s.cut(func(c *conn) bool { return c.caller.Organization == id }, proto.Errorf(proto.CodeOrganizationDisabled, "the organization is disabled"))
}

func (s *Server) cut(whose func(*conn) bool, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		if whose(c) {
			c.cancel(why)
		}
	}
}

// Connections is how many WebSockets are open.
func (s *Server) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// errClosing is why WebSockets end with the control plane; clients come back.
var errClosing = proto.Errorf(proto.CodeUnavailable, "the control plane is restarting: connect again")

// Close ends every WebSocket and waits for them. Kernels go on.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cut(func(*conn) bool { return true }, errClosing)
	s.work.Wait()
	s.stop()
}

// add admits a WebSocket; remove ends that. A newer one of the same client takes the
// place of the older, which is closed.
func (s *Server) add(c *conn) error {
	s.mu.Lock()
	var older *conn
	n := 0
	for other := range s.conns {
		if other.caller.TokenId != c.caller.TokenId {
			continue
		}
		n++
		if other.kernel == c.kernel && other.client == c.client {
			older = other
		}
	}
	switch {
	case s.closed:
		s.mu.Unlock()
		return errClosing
	case n >= maxConnections && older == nil:
		s.mu.Unlock()
		return proto.Errorf(proto.CodeOverloaded, "token %s has %d WebSockets open: close some", c.caller.TokenName, n)
	}
	s.conns[c] = struct{}{}
	s.work.Add(1)
	s.mu.Unlock()
	s.cfg.Metrics.connection(1)
	if older != nil {
		older.cancel(errReplaced)
		<-older.done
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// What the older one has confirmed may not have arrived when the host is asked.
	c.written.Store(s.read[c.key()])
	return nil
}

func (s *Server) remove(c *conn) {
	s.mu.Lock()
	delete(s.conns, c)
	if key := c.key(); c.confirmed > 0 {
		if _, known := s.read[key]; !known {
			s.order = append(s.order, key)
		}
		s.read[key] = c.confirmed
		if len(s.order) > maxRead {
			delete(s.read, s.order[0])
			s.order = s.order[1:]
		}
	}
	if c.from != nil && c.broke.Load() {
		s.lost = append(s.lost, lostClient{*c.from, c.client, time.Now()})
		if len(s.lost) > maxLost {
			s.lost = s.lost[1:]
		}
	}
	s.mu.Unlock()
	close(c.done)
	s.cfg.Metrics.connection(-1)
	s.work.Done()
}
