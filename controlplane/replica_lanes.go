package main

import (
	"context"
	"net"
	"net/http"
	"time"

	"github.com/postern-dev/postern/controlplane/api"
	"github.com/postern-dev/postern/controlplane/peer"
	"github.com/postern-dev/postern/controlplane/store"
)

// passed are the lanes of one tunnel that this replica passes on.
type passed struct {
	link  store.Link
	lanes int
}

// tunnelEndpoint serves agents' WebSockets: further lanes of a tunnel that another replica
// has are passed on to that one.
func (s *Server) tunnelEndpoint() http.Handler {
	if s.replicas == nil {
		return s.tunnels
	}
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		id, here := s.tunnels.Joins(q)
		switch {
		case here:
		case id != "" && s.replicas.passLane(w, q, id):
			return
		case id == "" && s.draining.Load():
			w.Header().Set("Retry-After", "1")
			http.Error(w, "draining", http.StatusServiceUnavailable)
			return
		}
		s.tunnels.ServeHTTP(w, q)
	})
}

// passLane hands a lane's connection to the replica that has its tunnel; false if there is
// none, and then nothing was done.
func (r *replicas) passLane(w http.ResponseWriter, q *http.Request, id string) bool {
	select {
	case r.lanes <- struct{}{}:
	default:
		return false // the tunnel's server says no in its own words
	}
	link, conn, err := r.openLane(q, id)
	<-r.lanes
	if err != nil {
		r.server.log.Debug("lane not passed on", "tunnel", id, "err", err)
		return false
	}
	client, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		conn.Close() //nolint:errcheck // nothing was said on it
		return false
	}
	r.mu.Lock()
	if r.passed[id] == nil {
		r.passed[id] = &passed{link: link}
	}
	r.passed[id].lanes++
	r.mu.Unlock()
	defer func() {
		client.Close() //nolint:errcheck // both ends are done with
		conn.Close()   //nolint:errcheck // likewise
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.passed[id].lanes--; r.passed[id].lanes == 0 {
			delete(r.passed, id)
		}
	}()
	q.Header.Del("X-Forwarded-For")
	if err := q.Write(conn); err != nil {
		return true
	}
	peer.Join(conn, client, buffered.Reader)
	return true
}

func (r *replicas) openLane(q *http.Request, id string) (store.Link, net.Conn, error) {
	l, err := r.server.store.LinkOfTunnel(q.Context(), id)
	if err != nil {
		return l, nil, err
	}
	if l.URL == "" || l.Replica == r.server.replica {
		return l, nil, errNowhere
	}
	conn, err := r.client.Lane(q.Context(), l.URL, api.RemoteAddress(q))
	return l, conn, err
}

// moveLanes has agents whose lanes are passed on here make new tunnels, and waits until the
// old lanes have ended, or ctx has.
func (r *replicas) moveLanes(ctx context.Context) {
	r.mu.Lock()
	links := make([]store.Link, 0, len(r.passed))
	for _, one := range r.passed {
		links = append(links, one.link)
	}
	r.mu.Unlock()
	for _, l := range links {
		if _, err := r.ask(ctx, l.URL, callMove, moveCall{l.Agent, l.Generation}); err != nil {
			r.server.log.Warn("agent with lanes through this replica not asked to move", "agent", l.Name, "err", err)
		}
	}
	for ctx.Err() == nil {
		r.mu.Lock()
		left := len(r.passed)
		r.mu.Unlock()
		if left == 0 {
			return
		}
		pause(ctx, 20*time.Millisecond)
	}
}
