package dav

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/webdav"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Server serves WebDAV's clients.
type Server struct {
	cfg Config

	mu    sync.Mutex        // guards locks, for memory only
	locks map[string]*locks // by organization
}

// New returns a Server.
func New(cfg Config) *Server {
	return &Server{cfg: cfg, locks: map[string]*locks{}}
}

// request is what is known of one request; it travels in its context.
type request struct {
	caller Caller
	// err is the first error of Files: the protocol's library tells clients little of it.
	err error
	// body is whether the request's body was cut off.
	body *body
	// noParent is whether a file was to be made in a directory that is not there.
	noParent bool
	// known are nodes that a listing told of, so that a PROPFIND asks once for a directory.
	known map[string]*posternv1.FileInfo
}

type requestKey struct{}

func requestOf(ctx context.Context) *request { return ctx.Value(requestKey{}).(*request) }

// note keeps err for the response.
func (q *request) note(err error) error {
	if err != nil && q.err == nil {
		q.err = err
	}
	return err
}

// body notes whether it came to its end.
type body struct {
	io.ReadCloser
	err error
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.err = err
	}
	return n, err
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", "sandbox") // a file is data, whatever a browser makes of it
	h.Set("Cache-Control", "private, no-cache")
	caller, err := s.authenticate(r)
	if err == nil && !s.cfg.Requests.Allow(caller.TokenId) {
		err = proto.Errorf(proto.CodeRateLimited, "too many requests of this token: try again in a second")
	}
	if err == nil {
		err = s.cfg.Permit(caller.Principal, writes(r.Method))
	}
	if err != nil {
		fail(w, err)
		return
	}
	if r.Method == "PROPFIND" && r.Header.Get("Depth") != "0" && r.Header.Get("Depth") != "1" {
		// RFC 4918, 9.1: a server may refuse to list all that is below.
		h.Set("Content-Type", `application/xml; charset="utf-8"`)
		w.WriteHeader(http.StatusForbidden)
		io.WriteString(w, `<?xml version="1.0" encoding="utf-8"?><D:error xmlns:D="DAV:"><D:propfind-finite-depth/></D:error>`) //nolint:errcheck // the client has gone
		return
	}
	q := &request{caller: caller, body: &body{ReadCloser: r.Body}, known: map[string]*posternv1.FileInfo{}}
	if r.Method != http.MethodPut {
		q.body.ReadCloser = http.MaxBytesReader(w, r.Body, maxBody)
	}
	r = r.WithContext(context.WithValue(r.Context(), requestKey{}, q))
	r.Body = q.body
	handler := webdav.Handler{
		Prefix: strings.TrimSuffix(Prefix, "/"), FileSystem: fileSystem{s.cfg.Files}, LockSystem: s.locksOf(caller.Organization),
	}
	handler.ServeHTTP(&response{ResponseWriter: w, request: q}, r)
}

// writes reports whether a method changes something.
func writes(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodOptions, "PROPFIND":
		return false // the library reads at POST
	}
	return true
}

// authenticate finds the caller by its token: the password of any user, or a bearer.
func (s *Server) authenticate(r *http.Request) (Caller, error) {
	_, token, basic := r.BasicAuth()
	if !basic {
		var bearer bool
		scheme, rest, _ := strings.Cut(r.Header.Get("Authorization"), " ")
		if token, bearer = strings.TrimSpace(rest), strings.EqualFold(scheme, "Bearer"); !bearer {
			token = ""
		}
	}
	if token == "" || len(token) > maxToken {
		return Caller{}, proto.Errorf(proto.CodeUnauthenticated, "no API token: give one as password, with any user name")
	}
	return s.cfg.Tokens.Authenticate(r.Context(), token, s.cfg.Remote(r))
}

// fail answers a request that does not reach WebDAV.
func fail(w http.ResponseWriter, err error) {
	if proto.CodeOf(err) == proto.CodeUnauthenticated {
		w.Header().Set("WWW-Authenticate", `Basic realm="Postern: an API token as password", charset="UTF-8"`)
	}
	http.Error(w, message(err), status(err))
}

// message is what a client may read of err.
func message(err error) string {
	var public *proto.Error
	if errors.As(err, &public) {
		return public.Error()
	}
	return proto.PublicMessage(proto.CodeOf(err))
}

// status is the status for err. WebDAV has some of its own.
func status(err error) int {
	if proto.CodeOf(err) == proto.CodeStorageFull {
		return http.StatusInsufficientStorage
	}
	return proto.HTTPStatus(proto.CodeOf(err))
}

// response tells clients why: the library makes 404 and 405 of most errors.
type response struct {
	http.ResponseWriter
	request *request
	ended   bool
}

// Unwrap lets http.ResponseController through.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (w *response) WriteHeader(code int) {
	err := w.request.err
	if code == http.StatusInternalServerError && w.request.noParent {
		code = http.StatusConflict // of LOCK, as RFC 4918, 9.10.6, has it; the library has none of its own for it
	}
	if code < 400 || err == nil || code == http.StatusConflict || code == http.StatusLocked || proto.CodeOf(err) == proto.CodeAlreadyExists {
		w.ResponseWriter.WriteHeader(code)
		return
	}
	w.ended = true
	fail(w.ResponseWriter, err)
}

// Write implements io.Writer.
func (w *response) Write(p []byte) (int, error) {
	if w.ended {
		return len(p), nil
	}
	return w.ResponseWriter.Write(p)
}

func (s *Server) locksOf(organization string) *locks {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.locks[organization]
	if l == nil {
		l = &locks{inner: webdav.NewMemLS(), held: map[string]time.Time{}}
		s.locks[organization] = l
	}
	return l
}
