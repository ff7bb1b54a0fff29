package api

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// maxRequest bounds the body of a Connect request, in bytes.
const maxRequest = 1 << 20

// maxNotebook bounds the sources of a notebook's cells, in bytes.
const maxNotebook = 8 << 20

// API serves the public API. It keeps no state.
type API struct {
	cfg    Config
	routes *routes
}

// New returns the API.
func New(cfg Config) *API {
	if cfg.SignOfLife == 0 {
		cfg.SignOfLife = signOfLife
	}
	a := &API{cfg: cfg}
	mux := &routes{ServeMux: http.NewServeMux()}
	option := connect.WithHandlerOptions(
		connect.WithReadMaxBytes(maxRequest),
		connect.WithRecover(func(_ context.Context, spec connect.Spec, _ http.Header, r any) error {
			cfg.Logger.Error("panic in a request", "request", spec.Procedure, "err", r)
			return proto.ConnectError(proto.Errorf(proto.CodeInternal, "internal error: the detail is in the server's log"))
		}),
	)
	for _, service := range []func() (string, http.Handler){
		func() (string, http.Handler) { return posternv1connect.NewIdentityServiceHandler(a, option) },
		func() (string, http.Handler) { return posternv1connect.NewTokenServiceHandler(a, option) },
		func() (string, http.Handler) { return posternv1connect.NewKeyServiceHandler(a, option) },
		func() (string, http.Handler) { return posternv1connect.NewAgentServiceHandler(a, option) },
		func() (string, http.Handler) { return posternv1connect.NewSourceServiceHandler(sources{a}, option) },
		func() (string, http.Handler) { return posternv1connect.NewQueryServiceHandler(a, option) },
		func() (string, http.Handler) { return posternv1connect.NewSessionServiceHandler(sessions{a}, option) },
		func() (string, http.Handler) { return posternv1connect.NewKernelServiceHandler(kernels{a}, option) },
		func() (string, http.Handler) {
			return posternv1connect.NewKernelCheckpointServiceHandler(checkpoints{a}, option)
		},
		func() (string, http.Handler) { return posternv1connect.NewSecretServiceHandler(secrets{a}, option) },
		func() (string, http.Handler) { return posternv1connect.NewKernelMoveServiceHandler(moves{a}, option) },
		func() (string, http.Handler) {
			return posternv1connect.NewNotebookServiceHandler(notebooks{a}, option, connect.WithReadMaxBytes(maxNotebook))
		},
		func() (string, http.Handler) { return posternv1connect.NewAuditServiceHandler(a, option) },
		func() (string, http.Handler) { return posternv1connect.NewOrganizationServiceHandler(a, option) },
		func() (string, http.Handler) { return posternv1connect.NewCAServiceHandler(a, option) },
		func() (string, http.Handler) { return posternv1connect.NewMasterKeyServiceHandler(a, option) },
		func() (string, http.Handler) { return posternv1connect.NewFileKeyServiceHandler(a, option) },
	} {
		path, handler := service()
		handler = a.guarded(handler)
		mux.Handle(path, a.authenticated(func(w http.ResponseWriter, r *http.Request, c Caller) {
			if err := permit(c, r.URL.Path); err != nil {
				writeConnectError(w, r, err)
				return
			}
			handler.ServeHTTP(w, r)
		}, writeConnectError))
	}
	mux.Handle("POST /api/v1/sql/{agent}/{source}", a.authenticated(a.serveSQL, writeError))
	mux.Handle("GET /api/v1/agents/{agent}/metrics", a.authenticated(a.serveAgentMetrics, writeError))
	for path, method := range map[string]string{"/api/v1/sql/{agent}/{source}": http.MethodPost, "/api/v1/agents/{agent}/metrics": http.MethodGet} {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", method)
			plain(w, http.StatusMethodNotAllowed, r.Method+" is not understood here: use "+method)
		})
	}
	a.routeFiles(mux)
	mux.Handle("/tunnel", cfg.Tunnel)
	mux.Handle("/jupyter/", cfg.Jupyter)
	mux.Handle("/dav/", cfg.DAV)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { plain(w, http.StatusOK, "ok") })
	mux.HandleFunc("GET /readyz", a.serveReady)
	mux.Handle("GET /metrics", a.metricsHandler())
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		plain(w, http.StatusOK, "Postern control plane "+proto.Software()+". Use the postern command, or the API below /postern.v1. and /api/v1/.")
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeError(w, r, proto.Errorf(proto.CodeNotFound, "no such path: %q", r.URL.Path))
	})
	a.routes = mux
	return a
}

// bodyTime is how long a request's body may be silent. What nobody reads, the
// body of a refused request say, must have come within it altogether: without a
// limit net/http would wait for it forever.
const bodyTime = 15 * time.Second

// ServeHTTP implements http.Handler.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.ContentLength != 0 {
		body := &timedBody{ReadCloser: r.Body, control: http.NewResponseController(w)}
		body.control.SetReadDeadline(time.Now().Add(bodyTime)) //nolint:errcheck // a test's recorder knows no deadlines
		r.Body = body
	}
	a.routes.ServeHTTP(w, r)
}

// timedBody is a request's body that is being waited for only so long.
type timedBody struct {
	io.ReadCloser
	control *http.ResponseController
}

// Read implements io.Reader.
func (b *timedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	next := time.Now().Add(bodyTime)
	if err != nil { // what follows on the connection is not the body's
		next = time.Time{}
	}
	if n > 0 || errors.Is(err, io.EOF) {
		b.control.SetReadDeadline(next) //nolint:errcheck // see ServeHTTP
	}
	return n, err
}

func writeConnectError(w http.ResponseWriter, r *http.Request, err error) {
	connect.NewErrorWriter().Write(w, r, proto.ConnectError(err)) //nolint:errcheck // the caller has gone
}

func writeError(w http.ResponseWriter, _ *http.Request, err error) { proto.WriteHTTPError(w, err) }

func plain(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	w.Write([]byte(text + "\n")) //nolint:errcheck // the caller has gone
}

type callerKey struct{}

// caller is who asks; only behind authenticated.
func caller(ctx context.Context) Caller { return ctx.Value(callerKey{}).(Caller) }

// authenticated finds the caller and its rate limit before next runs.
func (a *API) authenticated(next func(http.ResponseWriter, *http.Request, Caller), fail func(http.ResponseWriter, *http.Request, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := a.authenticate(r)
		if err == nil && !a.cfg.Requests.Allow(c.TokenId) {
			err = proto.Errorf(proto.CodeRateLimited, "token %s makes too many requests a second: slow down", c.TokenName)
		}
		if err != nil {
			if proto.CodeOf(err) == proto.CodeUnauthenticated {
				w.Header().Set("WWW-Authenticate", `Bearer realm="postern"`)
			}
			fail(w, r, err)
			return
		}
		next(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, c)), c)
	})
}

func (a *API) authenticate(r *http.Request) (Caller, error) {
	bearer, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok || bearer == "" {
		return Caller{}, proto.Errorf(proto.CodeUnauthenticated, "no API token: send it as \"Authorization: Bearer TOKEN\" (run `postern login`, or set POSTERN_TOKEN)")
	}
	remote := RemoteAddress(r)
	c, err := a.cfg.Tokens.Authenticate(r.Context(), strings.TrimSpace(bearer), remote)
	c.Remote = remote
	return c, err
}

// RemoteAddress is the IP address that a request comes from: the peer's, or, of a
// reverse proxy on this machine, the last one in X-Forwarded-For, which that proxy
// wrote. What stands before it, and what other peers say, anybody can have written.
func RemoteAddress(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	if ip := net.ParseIP(host); !ip.IsLoopback() {
		return host
	}
	if said := r.Header.Values("X-Forwarded-For"); len(said) > 0 {
		last := said[len(said)-1]
		if ip := net.ParseIP(strings.TrimSpace(last[strings.LastIndexByte(last, ',')+1:])); ip != nil {
			return ip.String()
		}
	}
	return host
}

func (a *API) serveReady(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
	defer cancel()
	if err := a.cfg.Ready(ctx); err != nil {
		plain(w, http.StatusServiceUnavailable, "not ready: "+proto.Detail(err).Message)
		return
	}
	plain(w, http.StatusOK, "ready")
}

// metricsHandler serves Prometheus on this machine without a token, and everybody
// else with one of an operator of the organization "default". A request that
// came through a proxy is not from this machine.
func (a *API) metricsHandler() http.Handler {
	serve := promhttp.HandlerFor(a.cfg.Gatherer, promhttp.HandlerOpts{})
	guarded := a.authenticated(func(w http.ResponseWriter, r *http.Request, c Caller) {
		err := permit(c, metrics)
		if err == nil && c.OrganizationName != defaultOrganization {
			err = errNotHere
		}
		if err != nil {
			writeError(w, r, err)
			return
		}
		serve.ServeHTTP(w, r)
	}, writeError)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ip := net.ParseIP(RemoteAddress(r))
		proxied := r.Header.Get("X-Forwarded-For") != "" || r.Header.Get("Forwarded") != "" || r.Header.Get("Via") != ""
		if ip.IsLoopback() && !proxied && r.Header.Get("Authorization") == "" {
			serve.ServeHTTP(w, r)
			return
		}
		guarded.ServeHTTP(w, r)
	})
}

// defaultOrganization is the one whose admins run the installation.
const defaultOrganization = "default"

// errNotHere hides what exists from other organizations.
var errNotHere = proto.Errorf(proto.CodeNotFound, "not found")

// guarded bounds the memory of the bodies that next reads whole; only behind authenticated.
func (a *API) guarded(next http.Handler) http.Handler {
	if a.cfg.Guard == nil {
		return next
	}
	return a.cfg.Guard(next, func(r *http.Request) string { return caller(r.Context()).Organization })
}

// call runs f for the caller and turns its result into a Connect reply.
func call[T any](ctx context.Context, a *API, f func(Caller) (*T, error)) (*connect.Response[T], error) {
	msg, err := f(caller(ctx))
	if err != nil {
		if proto.CodeOf(err) == proto.CodeInternal && !errors.Is(err, context.Canceled) {
			a.cfg.Logger.Error("request failed", "err", err)
		}
		return nil, proto.ConnectError(err)
	}
	return connect.NewResponse(msg), nil
}

// audit writes an entry for what the caller did; it fails if the entry cannot be
// kept, and then so must the request.
func (a *API) audit(ctx context.Context, c Caller, e auditchain.Entry) error {
	e.Time = time.Now()
	e.Organization, e.Actor, e.Role, e.Remote = c.Organization, "token "+c.TokenName, c.Role, c.Remote
	if e.Outcome == "" {
		e.Outcome = "done"
	}
	return a.cfg.Audit.Append(ctx, e)
}
