package api

import (
	"net/http"
	"slices"
)

// routes is a ServeMux that can tell what it routes.
type routes struct {
	*http.ServeMux
	patterns []string
}

// Handle is ServeMux's.
func (r *routes) Handle(pattern string, handler http.Handler) {
	r.patterns = append(r.patterns, pattern)
	r.ServeMux.Handle(pattern, handler)
}

// HandleFunc is ServeMux's.
func (r *routes) HandleFunc(pattern string, handler func(http.ResponseWriter, *http.Request)) {
	r.Handle(pattern, http.HandlerFunc(handler))
}

// Routes are the patterns, in net/http's words, of all that is served, in order: tests walk them
// so that no new one goes without a check of who may see what behind it.
func (a *API) Routes() []string {
	all := slices.Clone(a.routes.patterns)
	slices.Sort(all)
	return all
}
