package hub

import (
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

// retireTime is how long requests on a replaced tunnel may take to end.
// That is as long as a statement may run: a host moves to a new tunnel whenever its
// certificate is renewed, and a tunnel that is dead is noticed in seconds anyway.
const retireTime = 24 * time.Hour

// hostURL stands for the agent in requests on its tunnel.
const hostURL = "http://agent"

// Link is an attached agent's tunnel, here or at another replica.
type Link struct {
	// Agent and Organization are ids, Name is the agent's name.
	Agent, Organization, Name string
	// Since is when it was attached.
	Since time.Time
	// Generation is what the directory gave it; 0 without a directory.
	Generation int64

	hub   *Hub
	peer  *peer  // nil if the tunnel is elsewhere
	place *Place // where then; else nil
	moved bool   // told to move; guarded by Hub.mu
	// retiring is closed by retire.
	retiring chan struct{}

	mu      sync.Mutex
	active  int // requests under way
	retired error
	closing bool // the tunnel is being closed, since nothing was under way
	timer   *time.Timer
	used    time.Time // of a link elsewhere: when a request began or ended last
	failed  error     // likewise: what its replica failed with last
}

func (h *Hub) newLink(p *peer, name string, generation int64) *Link {
	return &Link{Agent: p.id.Agent, Organization: p.id.Organization, Name: name, Since: time.Now(), Generation: generation, hub: h, peer: p, retiring: make(chan struct{})}
}

// Host calls the agent's HostService. Its errors are those of Connect; turn them
// with proto.FromConnect. The client is made for each use: it holds some
// KiB, and most agents are idle.
func (l *Link) Host() posternv1connect.HostServiceClient {
	control := &http.Client{Transport: l.roundTripper(tunnel.Control)}
	return posternv1connect.NewHostServiceClient(control, hostURL, connect.WithReadMaxBytes(8<<20))
}

// HTTP is a client for plain requests to the agent (URL "http://agent/…") on
// lanes of this class.
func (l *Link) HTTP(class tunnel.Class) *http.Client {
	return &http.Client{Transport: l.roundTripper(class)}
}

// RTT is the tunnel's round-trip time as last measured; 0 if it is at another replica.
func (l *Link) RTT() time.Duration {
	if l.peer == nil {
		return 0
	}
	return l.peer.tunnel.RTT()
}

// RemoteAddress is the address of the WebSocket's peer; empty if the tunnel is at another
// replica.
func (l *Link) RemoteAddress() string {
	if l.peer == nil {
		return ""
	}
	return l.peer.tunnel.RemoteAddr().String()
}

// Here reports whether the tunnel ends at this replica.
func (l *Link) Here() bool { return l.peer != nil }

// Retired is closed when the tunnel is to end as soon as no request is under way: a
// newer one takes its place, or the agent goes away. For a tunnel at another replica that
// is noticed within seconds, while requests are under way.
func (l *Link) Retired() <-chan struct{} { return l.retiring }

// Err is why the tunnel ended, as an error that says so; nil while it is up.
func (l *Link) Err() error {
	if l.peer == nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.failed
	}
	cause := l.peer.tunnel.Err()
	if cause == nil {
		return nil
	}
	return &proto.Error{
		Code:    proto.CodeAgentLost,
		Message: "the tunnel of agent " + l.Name + " ended while the request was under way: " + cause.Error(),
		Err:     cause,
	}
}

func (l *Link) roundTripper(class tunnel.Class) http.RoundTripper {
	return &counted{link: l, class: class}
}

// retire ends the tunnel as soon as no request is under way, or after retireTime. Of a
// tunnel elsewhere it only tells those who use it.
func (l *Link) retire(cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.retired != nil {
		return
	}
	l.retired = cause
	close(l.retiring)
	if l.peer == nil {
		return
	}
	if l.active == 0 {
		l.closing = true
		go l.peer.tunnel.Close(cause) //nolint:errcheck // it ends either way
		return
	}
	l.timer = time.AfterFunc(retireTime, func() { l.peer.tunnel.Close(cause) }) //nolint:errcheck // likewise
}

// begin notes a request under way; false if the tunnel is being closed, so that nothing
// may begin any more.
func (l *Link) begin() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closing {
		return false
	}
	l.active++
	l.used = time.Now()
	return true
}

func (l *Link) end() {
	l.mu.Lock()
	l.active--
	l.used = time.Now()
	last, cause := l.active == 0 && l.retired != nil && l.peer != nil, l.retired
	l.closing = l.closing || last
	l.mu.Unlock()
	if last {
		l.peer.tunnel.Close(cause) //nolint:errcheck // it ends either way
	}
}

// leaving reports whether the tunnel was retired.
func (l *Link) leaving() bool {
	select {
	case <-l.retiring:
		return true
	default:
		return false
	}
}

func (l *Link) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.timer != nil {
		l.timer.Stop()
	}
}
