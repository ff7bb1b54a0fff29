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

// Link is an attached agent's tunnel.
type Link struct {
	// Agent and Organization are ids, Name is the agent's name.
	Agent, Organization, Name string
	// Since is when it was attached.
	Since time.Time

	peer  *peer
	moved bool // told to move; guarded by Hub.mu
	// retiring is closed by retire.
	retiring chan struct{}

	mu      sync.Mutex
	active  int // requests under way
	retired error
	timer   *time.Timer
}

func newLink(p *peer, name string) *Link {
	return &Link{Agent: p.id.Agent, Organization: p.id.Organization, Name: name, Since: time.Now(), peer: p, retiring: make(chan struct{})}
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

// RTT is the tunnel's round-trip time as last measured.
func (l *Link) RTT() time.Duration { return l.peer.tunnel.RTT() }

// RemoteAddress is the address of the WebSocket's peer.
func (l *Link) RemoteAddress() string { return l.peer.tunnel.RemoteAddr().String() }

// Done is closed when the tunnel has ended.
func (l *Link) Done() <-chan struct{} { return l.peer.tunnel.Done() }

// Retired is closed when the tunnel is to end as soon as no request is under way: a
// newer one takes its place, or the agent goes away.
func (l *Link) Retired() <-chan struct{} { return l.retiring }

// Err is why the tunnel ended, as an error that says so; nil while it is up.
func (l *Link) Err() error {
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
	return &counted{link: l, next: l.peer.tunnel.Transport(class)}
}

// retire ends the tunnel as soon as no request is under way, or after retireTime.
func (l *Link) retire(cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.retired != nil {
		return
	}
	l.retired = cause
	close(l.retiring)
	if l.active == 0 {
		go l.peer.tunnel.Close(cause) //nolint:errcheck // it ends either way
		return
	}
	l.timer = time.AfterFunc(retireTime, func() { l.peer.tunnel.Close(cause) }) //nolint:errcheck // likewise
}

func (l *Link) begin() {
	l.mu.Lock()
	l.active++
	l.mu.Unlock()
}

func (l *Link) end() {
	l.mu.Lock()
	l.active--
	last, cause := l.active == 0 && l.retired != nil, l.retired
	l.mu.Unlock()
	if last {
		l.peer.tunnel.Close(cause) //nolint:errcheck // it ends either way
	}
}

func (l *Link) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.timer != nil {
		l.timer.Stop()
	}
}
