package hub

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/tunnel"
)

// Identity is who a certificate says its holder is. The zero Identity is a host
// without one.
type Identity struct {
	// Organization and Agent are ids.
	Organization, Agent string
	// Serial is the certificate's, in lower-case hex.
	Serial string
	// Expired is set for a certificate within the grace period after its end.
	Expired bool
}

// Limits of a tunnel that is not attached yet.
const (
	// joinTime is how long a tunnel without a valid certificate may live.
	joinTime = 30 * time.Second
	// helloTime is how long a member may take to say hello.
	helloTime = 10 * time.Second
)

var (
	// ErrReplaced is the cause of a tunnel's end when its agent came back with a
	// newer one.
	ErrReplaced = fmt.Errorf("a newer tunnel of the same agent is up: %w", tunnel.ErrReplaced)
	// ErrNoHello is the cause when a tunnel did not say what it wants in time.
	ErrNoHello = errors.New("said no hello in time")
	// ErrRevoked is the cause when the agent was revoked.
	ErrRevoked = fmt.Errorf("the agent was revoked: %w", tunnel.ErrRevoked)
	// ErrDisabled is the cause when its organization was disabled.
	ErrDisabled = fmt.Errorf("the organization was disabled: %w", tunnel.ErrRevoked)
	// ErrLeaving is the cause when the agent said that it goes away.
	ErrLeaving = errors.New("the agent is stopping or has moved")
	// ErrStopping is the cause when this control plane stops.
	ErrStopping = errors.New("the control plane is stopping")
)

// Hub keeps the live tunnels of this process.
type Hub struct {
	cfg    Config
	log    *slog.Logger
	server *http.Server

	mu     sync.Mutex // guards what follows; held for memory only
	agents map[string]*Link
	peers  map[*peer]struct{}
	// elsewhere are links at other replicas that are in use or were a moment ago, by agent.
	elsewhere map[string]*Link
	closed    bool
}

// New returns a hub. Close ends it.
func New(cfg Config) *Hub {
	h := &Hub{cfg: cfg, log: cfg.Logger, agents: map[string]*Link{}, peers: map[*peer]struct{}{}, elsewhere: map[string]*Link{}}
	h.server = &http.Server{
		Handler:           h.routes(),
		ReadHeaderTimeout: 20 * time.Second,
		// A kept stream holds a goroutine and its buffers; a new one costs nothing.
		IdleTimeout:    10 * time.Second,
		MaxHeaderBytes: 64 << 10,
		BaseContext: func(l net.Listener) context.Context {
			return context.WithValue(context.Background(), peerKey{}, l.(peerListener).peer)
		},
		ErrorLog: slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelDebug),
	}
	return h
}

// peer is one tunnel, attached or not.
type peer struct {
	tunnel *tunnel.Tunnel
	id     Identity
	timer  *time.Timer // ends the tunnel if it does not get on in time
	link   *Link       // set by hello; guarded by Hub.mu
}

type peerKey struct{}

// peerListener tells the shared http.Server which tunnel a stream came by.
type peerListener struct {
	net.Listener
	peer *peer
}

// Handle serves one tunnel until it ends. It is the tunnel server's handler.
func (h *Hub) Handle(t *tunnel.Tunnel) {
	id, err := h.cfg.Gate.Identify(t.PeerState())
	if err == nil && id.Agent != "" {
		err = h.admit(id, t.RemoteAddr().String())
	}
	if err != nil {
		h.log.Info("tunnel refused", "err", err, "remote", t.RemoteAddr().String())
		// The peer learns the reason from its first request, so serve it that.
		h.refuse(t, err)
		return
	}
	p := &peer{tunnel: t, id: id}
	patience := joinTime
	if id.Agent != "" && !id.Expired {
		patience = helloTime
	}
	p.timer = time.AfterFunc(patience, func() { t.Close(ErrNoHello) }) //nolint:errcheck // nothing to add
	defer p.timer.Stop()

	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		t.Close(ErrStopping) //nolint:errcheck // likewise
		return
	}
	h.peers[p] = struct{}{}
	h.mu.Unlock()

	go h.follow(p)                                      // ends with the tunnel
	err = h.server.Serve(peerListener{t.Listener(), p}) // returns when the tunnel ends
	if t.Err() == nil {
		t.Close(err) //nolint:errcheck // likewise
	}
	<-t.Done()
	h.detach(p)
}

// follow ends the tunnel of an agent that goes away as soon as what it answered
// has been read here: the agent itself cannot know when that is.
func (h *Hub) follow(p *peer) {
	select {
	case <-p.tunnel.Done():
		return
	case <-p.tunnel.GoneAway():
	}
	h.mu.Lock()
	l := p.link
	h.mu.Unlock()
	if l == nil {
		p.tunnel.Close(ErrLeaving) //nolint:errcheck // it ends either way
		return
	}
	l.retire(ErrLeaving)
}

// admit checks a peer with a certificate before its first request.
func (h *Hub) admit(id Identity, remote string) error {
	ctx, cancel := context.WithTimeout(context.Background(), helloTime)
	defer cancel()
	return h.cfg.Gate.Admit(ctx, id, remote)
}

// refuse answers every request on t with reason for a moment, then closes it.
func (h *Hub) refuse(t *tunnel.Tunnel, reason error) {
	timer := time.AfterFunc(helloTime, func() { t.Close(reason) }) //nolint:errcheck // it is refused either way
	defer timer.Stop()
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			writeConnectError(w, r, reason)
		}),
		ReadHeaderTimeout: helloTime,
		ErrorLog:          h.server.ErrorLog,
	}
	server.Serve(t.Listener()) //nolint:errcheck // it ends with the tunnel
	<-t.Done()
}

// attach makes p the agent's tunnel; an older one ends. generation is the directory's.
func (h *Hub) attach(p *peer, name string, generation int64) {
	l := h.newLink(p, name, generation)
	h.mu.Lock()
	old := h.agents[p.id.Agent]
	if p.link != nil { // hello said twice on one tunnel
		h.mu.Unlock()
		return
	}
	p.link = l
	late := old != nil && old.Generation > generation
	if !late {
		h.agents[p.id.Agent] = l
	}
	online := len(h.agents)
	h.mu.Unlock()
	p.timer.Stop()
	h.cfg.Metrics.attached(online)
	switch {
	case late: // a newer one said hello while this one did
		l.retire(ErrReplaced)
		return
	case old != nil && old.peer != p:
		// The agent moves by itself (make before break) or has lost the old
		// tunnel without our knowing: requests under way get a moment to end.
		old.retire(ErrReplaced)
	}
	h.log.Info("agent attached", "agent", name, "agent_id", p.id.Agent, "remote", p.tunnel.RemoteAddr().String())
	h.cfg.Events.LinkUp(p.id, p.tunnel.RemoteAddr().String())
}

func (h *Hub) detach(p *peer) {
	h.mu.Lock()
	delete(h.peers, p)
	l := p.link
	current := l != nil && h.agents[p.id.Agent] == l
	if current {
		delete(h.agents, p.id.Agent)
	}
	online := len(h.agents)
	h.mu.Unlock()
	if l == nil {
		return
	}
	l.close()
	if h.cfg.Directory != nil {
		h.cfg.Directory.Detach(p.id, l.Generation)
	}
	cause := p.tunnel.Err()
	h.cfg.Metrics.detached(online, cause)
	if current {
		h.log.Info("agent detached", "agent", l.Name, "agent_id", p.id.Agent, "err", cause,
			"duration_seconds", time.Since(l.Since).Seconds())
		h.cfg.Events.LinkDown(p.id, cause)
	}
}

// Agent returns the link of the agent with this id, wherever its tunnel is; AGENT_OFFLINE
// if it has none.
func (h *Hub) Agent(id string) (*Link, error) {
	for try := 0; ; try++ {
		l := h.local(id)
		if l != nil && !l.leaving() {
			return l, nil
		}
		if h.cfg.Directory == nil {
			if l == nil {
				return nil, errOffline
			}
			return l, nil
		}
		there, err := h.find(id)
		switch {
		case err == nil && there != nil:
			return there, nil
		case l != nil:
			return l, nil // it works for as long as it is there
		case err != nil:
			return nil, err
		case try == comingTries:
			return nil, errOffline
		}
		time.Sleep(comingWait)
	}
}

// What is being attached here is waited for, so often and so long.
const (
	comingTries = 50
	comingWait  = 20 * time.Millisecond
)

// errOffline is returned for an agent without a tunnel.
var errOffline = proto.Errorf(proto.CodeAgentOffline, "the agent is offline: it has no tunnel to this control plane at present")

func (h *Hub) local(id string) *Link {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.agents[id]
}

// Disconnect ends the tunnels of an agent, attached or not.
func (h *Hub) Disconnect(agent string, cause error) {
	h.disconnect(func(id Identity) bool { return id.Agent == agent }, cause)
}

// DisconnectOrganization ends the tunnels of all agents of an organization.
func (h *Hub) DisconnectOrganization(organization string, cause error) {
	h.disconnect(func(id Identity) bool { return id.Organization == organization }, cause)
}

func (h *Hub) disconnect(match func(Identity) bool, cause error) {
	var matched []*peer
	h.mu.Lock()
	for p := range h.peers {
		if p.id.Agent != "" && match(p.id) {
			matched = append(matched, p)
		}
	}
	h.mu.Unlock()
	for _, p := range matched {
		p.tunnel.Close(cause) //nolint:errcheck // it ends either way
	}
}

// Online is the number of attached agents.
func (h *Hub) Online() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.agents)
}

// OnlineIDs are the ids of the attached agents.
func (h *Hub) OnlineIDs() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	ids := make([]string, 0, len(h.agents))
	for id := range h.agents {
		ids = append(ids, id)
	}
	return ids
}

// Move tells an agent to come back by a new tunnel after a while; requests under way go on. It
// reports whether the agent is here and has not been told before on its present tunnel.
func (h *Hub) Move(agent string, after time.Duration, reason string) bool {
	h.mu.Lock()
	l := h.agents[agent]
	tell := l != nil && !l.moved
	if tell {
		l.moved = true
	}
	h.mu.Unlock()
	if tell {
		l.peer.tunnel.GoAway(after, 0, reason)
	}
	return tell
}

// Drain tells every agent to move: the first after that long, the others evenly spread over
// spread; requests under way go on until deadline.
func (h *Hub) Drain(after, spread, deadline time.Duration) {
	h.mu.Lock()
	links := make([]*Link, 0, len(h.agents))
	for _, l := range h.agents {
		links = append(links, l)
	}
	h.mu.Unlock()
	for i, l := range links {
		l.peer.tunnel.GoAway(after+spread*time.Duration(i)/time.Duration(len(links)), deadline, "the control plane is restarting")
	}
}

// Close ends every tunnel. Handle calls still running return soon after.
func (h *Hub) Close() {
	h.mu.Lock()
	h.closed = true
	all := make([]*peer, 0, len(h.peers))
	for p := range h.peers {
		all = append(all, p)
	}
	h.mu.Unlock()
	for _, p := range all {
		p.tunnel.Close(ErrStopping) //nolint:errcheck // it ends either way
	}
	h.server.Close() //nolint:errcheck // its listeners are the tunnels'
}
