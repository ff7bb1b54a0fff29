package hub

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/tunnel"
)

const (
	// findTime bounds asking the directory.
	findTime = 5 * time.Second
	// keepUnused is how long a link elsewhere is remembered after its last request.
	keepUnused = time.Minute
	// maxAsked bounds the agents of Elsewhere.
	maxAsked = 1000
)

// join attaches a tunnel that has said a good hello, in the directory first.
func (h *Hub) join(ctx context.Context, p *peer, name string) error {
	h.mu.Lock()
	again := p.link != nil
	h.mu.Unlock()
	var generation int64
	if h.cfg.Directory != nil && !again {
		var err error
		if generation, err = h.cfg.Directory.Attach(ctx, p.id, p.tunnel.ID()); err != nil {
			return err
		}
	}
	h.attach(p, name, generation)
	return nil
}

// find returns the link of an agent at another replica; nil if it is being attached here.
func (h *Hub) find(id string) (*Link, error) {
	ctx, cancel := context.WithTimeout(context.Background(), findTime)
	defer cancel()
	place, err := h.cfg.Directory.Find(ctx, id)
	if err != nil || place == nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.elsewhere[id]
	if l != nil && l.Generation == place.Generation && !l.leaving() {
		return l, nil
	}
	if l != nil {
		l.retire(ErrReplaced)
	}
	l = &Link{
		Agent: place.Agent, Organization: place.Organization, Name: place.Name, Since: place.Since, Generation: place.Generation,
		hub: h, place: place, retiring: make(chan struct{}), used: time.Now(),
	}
	h.elsewhere[id] = l
	return l, nil
}

// Elsewhere are the agents, at most 1000, whose tunnels at other replicas are in use here.
// Moved takes the answer to where they are.
func (h *Hub) Elsewhere() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var ids []string
	for id, l := range h.elsewhere {
		if l.unused(keepUnused) {
			delete(h.elsewhere, id)
			continue
		}
		if len(ids) < maxAsked {
			ids = append(ids, id)
		}
	}
	return ids
}

func (l *Link) unused(since time.Duration) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.active == 0 && time.Since(l.used) > since
}

// Moved tells the newest generations of agents at other replicas, 0 for one that has no
// tunnel: links to older ones retire, so that what is idle moves.
func (h *Hub) Moved(generations map[string]int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for id, newest := range generations {
		// Without a tunnel there is nowhere to move to; what was under way breaks by itself.
		if l := h.elsewhere[id]; l != nil && newest > l.Generation {
			l.retire(ErrReplaced)
			delete(h.elsewhere, id)
		}
	}
}

// Generations are those of the tunnels here that did not retire, by agent.
func (h *Hub) Generations() map[string]int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := make(map[string]int64, len(h.agents))
	for id, l := range h.agents {
		if !l.leaving() {
			all[id] = l.Generation
		}
	}
	return all
}

// Replace retires the tunnel of this generation: the agent has a newer one at another
// replica.
func (h *Hub) Replace(agent string, generation int64) {
	if l := h.local(agent); l != nil && l.Generation == generation {
		l.retire(ErrReplaced)
	}
}

// MoveGeneration asks an agent, if its tunnel of this generation is here, to have another one: the
// way of some of its lanes is about to end. What is under way on the old one goes on.
func (h *Hub) MoveGeneration(agent string, generation int64) {
	if l := h.local(agent); l != nil && l.Generation == generation {
		l.peer.tunnel.GoAway(0, 0, "a replica of the control plane that passes on lanes is restarting")
	}
}

// Local returns the link of an agent whose tunnel is here; nil if it is not.
func (h *Hub) Local(id string) *Link { return h.local(id) }

// Settled reports whether every tunnel here was retired: no agent needs this replica.
func (h *Hub) Settled() bool { return len(h.Generations()) == 0 }

// Busy reports whether a request is under way on a tunnel here.
func (h *Hub) Busy() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for p := range h.peers {
		if l := p.link; l != nil && l.requests() > 0 {
			return true
		}
	}
	return false
}

func (l *Link) requests() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.active
}

// Stream opens a stream on the tunnel of an agent that is here, of that generation, for
// another replica; AGENT_OFFLINE if there is none. It counts as a request under way until
// it is closed.
func (h *Hub) Stream(ctx context.Context, agent string, generation int64, class tunnel.Class) (net.Conn, error) {
	l := h.local(agent)
	if l == nil || l.Generation != generation || !l.begin() {
		return nil, proto.Errorf(proto.CodeAgentOffline, "the agent's tunnel is not at this replica any more")
	}
	conn, err := l.peer.tunnel.Open(ctx, class)
	if err != nil {
		l.end()
		if l.peer.tunnel.Err() != nil { // nothing was sent: it may be elsewhere by now
			return nil, proto.Errorf(proto.CodeAgentOffline, "the agent's tunnel has just ended")
		}
		return nil, err
	}
	return &endingConn{Conn: conn, end: sync.OnceFunc(l.end)}, nil
}

// endingConn tells when it is closed.
type endingConn struct {
	net.Conn
	end func()
}

func (c *endingConn) Close() error {
	err := c.Conn.Close()
	c.end()
	return err
}

// dial opens a stream at the agent's replica. A solo lane would be dialed anew for each request
// there, so a lane for bulk is used instead.
func (l *Link) dial(ctx context.Context, class tunnel.Class) (net.Conn, error) {
	if class == tunnel.Solo {
		class = tunnel.Bulk
	}
	conn, err := l.place.Open(ctx, class)
	switch {
	case err == nil:
		return &watchedConn{Conn: conn, link: l}, nil
	case proto.CodeOf(err) == proto.CodeAgentOffline:
		return nil, errMoved
	case context.Cause(ctx) != nil:
		return nil, context.Cause(ctx)
	case proto.CodeOf(err) == proto.CodeUnavailable:
		err = l.fail(proto.CodeUnavailable, "the control plane's replica with the tunnel of agent "+l.Name+" does not answer: the agent comes back by itself within seconds, try again", err)
	}
	return nil, err
}

func (l *Link) fail(code proto.Code, message string, cause error) error {
	err := &proto.Error{Code: code, Message: message, Err: cause}
	l.mu.Lock()
	l.failed = err
	l.mu.Unlock()
	return err
}

// watchedConn notes why a stream broke that nobody closed here.
type watchedConn struct {
	net.Conn
	link   *Link
	mu     sync.Mutex
	closed bool
}

func (c *watchedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		c.mu.Lock()
		closed := c.closed
		c.mu.Unlock()
		if !closed {
			_ = c.link.fail(proto.CodeAgentLost, "the tunnel of agent "+c.link.Name+", or the control plane's replica that has it, ended while the request was under way", err)
		}
	}
	return n, err
}

func (c *watchedConn) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	return c.Conn.Close()
}
