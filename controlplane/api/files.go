package api

import (
	"context"
	"net/http"

	"github.com/postern-dev/postern/proto"
)

// Files serves workspaces; its handlers find the caller by CallerOf, and write the audit
// entries themselves.
type Files interface {
	// FileHandler serves FileService.
	FileHandler() (string, http.Handler)
	// ServeFile serves GET, HEAD and PUT of /api/v1/files/{workspace}/{path...}.
	ServeFile(http.ResponseWriter, *http.Request)
	// ServeChunks serves POST /api/v1/chunks/{workspace}.
	ServeChunks(http.ResponseWriter, *http.Request)
	// ServeArchive serves GET /api/v1/archive/{workspace}/{path...}.
	ServeArchive(http.ResponseWriter, *http.Request)
	// Unsent tells how many writes an agent's host has not uploaded, by the agent's id, and a
	// workspace that they are in. An agent that is online and does not say is an error.
	Unsent(ctx context.Context, organization, agent string) (ops uint64, workspace string, err error)
}

// CallerOf is who asks, within a handler that this package called.
func CallerOf(ctx context.Context) Caller { return caller(ctx) }

// routeFiles adds what serves workspaces.
func (a *API) routeFiles(mux *routes) {
	if a.cfg.Files == nil {
		return
	}
	path, handler := a.cfg.Files.FileHandler()
	handler = a.guarded(handler)
	mux.Handle(path, a.authenticated(func(w http.ResponseWriter, r *http.Request, c Caller) {
		if err := permit(c, r.URL.Path); err != nil {
			writeConnectError(w, r, err)
			return
		}
		handler.ServeHTTP(w, r)
	}, writeConnectError))
	plainly := func(action string, serve http.HandlerFunc) http.Handler {
		return a.authenticated(func(w http.ResponseWriter, r *http.Request, c Caller) {
			if err := permit(c, action); err != nil {
				writeError(w, r, err)
				return
			}
			serve(w, r)
		}, writeError)
	}
	const one, chunks, archive = "/api/v1/files/{workspace}/{path...}", "/api/v1/chunks/{workspace}", "/api/v1/archive/{workspace}/{path...}"
	mux.Handle("GET "+archive, plainly(readFiles, a.cfg.Files.ServeArchive))
	mux.Handle("GET "+one, plainly(readFiles, a.cfg.Files.ServeFile))
	mux.Handle("PUT "+one, plainly(writeFiles, a.cfg.Files.ServeFile))
	mux.Handle("POST "+chunks, plainly(writeFiles, a.cfg.Files.ServeChunks))
	for path, methods := range map[string]string{one: "GET, HEAD, PUT", chunks: "POST", archive: "GET"} {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", methods)
			writeError(w, r, proto.Errorf(proto.CodeInvalid, "%s is not understood here: use %s", r.Method, methods))
		})
	}
}

// WithCaller makes c the caller of what is called with the context: for protocols that know callers
// by themselves.
func WithCaller(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}
