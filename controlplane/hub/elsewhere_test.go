package hub

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/tunnel"
)

// directory is what two hubs share.
type directory struct {
	mu         sync.Mutex
	generation int64
	at         *Hub // guarded by mu; nil: nowhere
	stale      int  // how often Find still names the tunnel before the newest
}

// side is the directory as one hub sees it.
type side struct {
	d   *directory
	hub *Hub
}

func (s *side) Attach(context.Context, Identity, string) (int64, error) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	s.d.generation++
	s.d.at = s.hub
	return s.d.generation, nil
}

func (s *side) Detach(_ Identity, generation int64) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	if s.d.generation == generation {
		s.d.at = nil
	}
}

func (s *side) Find(_ context.Context, agent string) (*Place, error) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	at, generation := s.d.at, s.d.generation
	if s.d.stale > 0 {
		s.d.stale--
		generation--
	}
	switch at {
	case nil:
		return nil, errOffline
	case s.hub:
		return nil, nil
	}
	return &Place{Organization: aMember.Organization, Agent: agent, Name: "host", Generation: generation, Open: func(ctx context.Context, class tunnel.Class) (net.Conn, error) {
		return at.Stream(ctx, agent, generation, class)
	}}, nil
}

// hubs returns two hubs of one installation.
func hubs(t *testing.T) (d *directory, one, two *Hub) {
	d = &directory{}
	var both [2]*Hub
	for i := range both {
		g := &fakeGate{id: aMember}
		s := &side{d: d}
		s.hub = New(Config{Logger: slog.New(slog.DiscardHandler), Gate: g, Joiner: g, Events: g, Directory: s})
		t.Cleanup(s.hub.Close)
		both[i] = s.hub
	}
	return d, both[0], both[1]
}

// agentAt brings the agent to a hub and has it answer every request with text.
func agentAt(t *testing.T, h *Hub, text string) *tunnel.Tunnel {
	t.Helper()
	dialer, _ := attach(t, h)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			w.WriteHeader(http.StatusOK)
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
			return
		}
		_, _ = io.WriteString(w, text)
	}), ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(dialer.Listener()) }()
	t.Cleanup(func() { _ = server.Close(); <-done })
	if _, err := call(dialer).Hello(t.Context(), connect.NewRequest(&posternv1.HelloRequest{Version: proto.Version()})); err != nil {
		t.Fatal(err)
	}
	return dialer
}

func get(t *testing.T, l *Link, path string) (*http.Response, error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	return l.HTTP(tunnel.Solo).Do(req)
}

func says(t *testing.T, l *Link, want string) {
	t.Helper()
	resp, err := get(t, l, "/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got, err := io.ReadAll(resp.Body); string(got) != want || err != nil {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
}

func TestAgentElsewhere(t *testing.T) {
	d, one, two := hubs(t)
	if _, err := two.Agent(aMember.Agent); proto.CodeOf(err) != proto.CodeAgentOffline {
		t.Errorf("got %v", err)
	}
	agentAt(t, one, "first")
	l, err := two.Agent(aMember.Agent)
	if err != nil {
		t.Fatal(err)
	}
	if l.Here() || l.Name != "host" {
		t.Errorf("got %+v", l)
	}
	says(t, l, "first")

	// It moves to the hub that asks: who still has the link from before finds it.
	agentAt(t, two, "second")
	one.Replace(aMember.Agent, 1)
	says(t, l, "second")
	// And back, found by a look-up that is out of date at first.
	agentAt(t, one, "third")
	two.Replace(aMember.Agent, 2)
	d.mu.Lock()
	d.stale = 2
	d.mu.Unlock()
	l, err = two.Agent(aMember.Agent)
	if err != nil {
		t.Fatal(err)
	}
	says(t, l, "third")
}

// TestForwardedRequestHoldsTheTunnel retires a tunnel on which another hub has a request
// under way.
func TestForwardedRequestHoldsTheTunnel(t *testing.T) {
	_, one, two := hubs(t)
	first := agentAt(t, one, "first")
	l, err := two.Agent(aMember.Agent)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := get(t, l, "/slow")
	if err != nil {
		t.Fatal(err)
	}
	one.Replace(aMember.Agent, 1)
	// Somebody else's request does not begin on it any more, but this one goes on.
	select {
	case <-first.Done():
		t.Fatal("the tunnel ended under a request")
	case <-time.After(50 * time.Millisecond):
	}
	two.Moved(map[string]int64{aMember.Agent: 2})
	select {
	case <-l.Retired():
	default:
		t.Error("who uses it is not told")
	}
	resp.Body.Close()
	select {
	case <-first.Done():
	case <-time.After(time.Minute):
		t.Error("the tunnel lives on")
	}
}

// TestLostElsewhere breaks the tunnel at the other hub.
func TestLostElsewhere(t *testing.T) {
	_, one, two := hubs(t)
	first := agentAt(t, one, "first")
	l, err := two.Agent(aMember.Agent)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := get(t, l, "/slow")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	go first.Close(errors.New("power cut")) //nolint:errcheck // it is the end
	if _, err := io.ReadAll(resp.Body); err == nil {
		t.Error("a clean end")
	}
}
