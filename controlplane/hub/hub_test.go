package hub

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeGate knows one agent.
type fakeGate struct {
	id    Identity
	admit error
	check error
}

func (g *fakeGate) Identify(tls.ConnectionState) (Identity, error) { return g.id, nil }
func (g *fakeGate) Admit(context.Context, Identity, string) error  { return g.admit }
func (g *fakeGate) CheckIdentity(context.Context, Identity) error  { return g.check }
func (g *fakeGate) LinkUp(Identity, string)                        {}
func (g *fakeGate) LinkDown(Identity, error)                       {}
func (g *fakeGate) UpdateInventory(context.Context, Identity, []*posternv1.SourceInfo) error {
	return nil
}

func (g *fakeGate) Register(context.Context, *posternv1.RegisterRequest, string) (*posternv1.RegisterResponse, error) {
	return &posternv1.RegisterResponse{AgentId: "agt_new"}, nil
}

func (g *fakeGate) Renew(context.Context, Identity, *posternv1.RenewRequest, string) (*posternv1.RenewResponse, error) {
	return &posternv1.RenewResponse{}, nil
}

func (g *fakeGate) Hello(context.Context, Identity, *posternv1.HelloRequest) (*posternv1.HelloResponse, error) {
	return &posternv1.HelloResponse{Name: "host"}, nil
}

// attach makes a pair of tunnel ends, the acceptor's served by h.
func attach(t *testing.T, h *Hub) (dialer, acceptor *tunnel.Tunnel) {
	t.Helper()
	dialer, acceptor = tunneltest.Pair(t)
	done := make(chan struct{})
	go func() { defer close(done); h.Handle(acceptor) }()
	t.Cleanup(func() { dialer.Close(nil); acceptor.Close(nil); <-done })
	return dialer, acceptor
}

func call(tn *tunnel.Tunnel) posternv1connect.LinkServiceClient {
	return posternv1connect.NewLinkServiceClient(&http.Client{Transport: tn.Transport(tunnel.Control)}, "http://controlplane")
}

func newHub(t *testing.T, g *fakeGate) *Hub {
	h := New(Config{Logger: slog.New(slog.DiscardHandler), Gate: g, Joiner: g, Events: g})
	t.Cleanup(h.Close)
	return h
}

var aMember = Identity{Organization: "org_1", Agent: "agt_1", Serial: "01"}

func TestStandings(t *testing.T) {
	expired := aMember
	expired.Expired = true
	for _, tt := range []struct {
		name                                   string
		id                                     Identity
		register, rejoin, renew, hello, update proto.Code // 0: allowed
	}{
		{"stranger", Identity{}, 0, proto.CodeUnauthenticated, proto.CodeUnauthenticated, proto.CodeUnauthenticated, proto.CodeUnauthenticated},
		{"lapsed", expired, proto.CodeIdentityExpired, 0, proto.CodeIdentityExpired, proto.CodeIdentityExpired, proto.CodeIdentityExpired},
		{"member", aMember, proto.CodeInvalid, proto.CodeInvalid, 0, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tn, _ := attach(t, newHub(t, &fakeGate{id: tt.id}))
			c, ctx := call(tn), t.Context()
			check := func(what string, want proto.Code, err error) {
				if got := proto.CodeOf(err); got != want {
					t.Errorf("%s: got %v (%v), want %v", what, got, err, want)
				}
			}
			version := proto.Version()
			_, err := c.Register(ctx, connect.NewRequest(&posternv1.RegisterRequest{Version: version}))
			check("register", tt.register, err)
			_, err = c.Rejoin(ctx, connect.NewRequest(&posternv1.RenewRequest{}))
			check("rejoin", tt.rejoin, err)
			_, err = c.Renew(ctx, connect.NewRequest(&posternv1.RenewRequest{}))
			check("renew", tt.renew, err)
			_, err = c.Hello(ctx, connect.NewRequest(&posternv1.HelloRequest{Version: version}))
			check("hello", tt.hello, err)
			_, err = c.UpdateInventory(ctx, connect.NewRequest(&posternv1.UpdateInventoryRequest{}))
			check("update inventory", tt.update, err)
		})
	}
}

// TestEveryRequestIsChecked revokes an agent whose tunnel is up.
func TestEveryRequestIsChecked(t *testing.T) {
	g := &fakeGate{id: aMember}
	tn, _ := attach(t, newHub(t, g))
	hello := connect.NewRequest(&posternv1.HelloRequest{Version: proto.Version()})
	if _, err := call(tn).Hello(t.Context(), hello); err != nil {
		t.Fatal(err)
	}
	g.check = proto.Errorf(proto.CodeAgentRevoked, "revoked")
	if _, err := call(tn).Renew(t.Context(), connect.NewRequest(&posternv1.RenewRequest{})); proto.CodeOf(err) != proto.CodeAgentRevoked {
		t.Errorf("got %v", err)
	}
}

// TestRefusedTunnelSaysWhy wants the reason to reach the agent.
func TestRefusedTunnelSaysWhy(t *testing.T) {
	h := newHub(t, &fakeGate{id: aMember, admit: proto.Errorf(proto.CodeAgentRevoked, "revoked")})
	tn, _ := attach(t, h)
	_, err := call(tn).Hello(t.Context(), connect.NewRequest(&posternv1.HelloRequest{Version: proto.Version()}))
	if proto.CodeOf(err) != proto.CodeAgentRevoked {
		t.Errorf("got %v", err)
	}
	if h.Online() != 0 {
		t.Error("it is online")
	}
}

// TestReplacedTunnelFinishes wants a request on the old tunnel to end in peace.
func TestReplacedTunnelFinishes(t *testing.T) {
	h := newHub(t, &fakeGate{id: aMember})
	old, _ := attach(t, h)
	release := make(chan struct{})
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusOK)
		http.NewResponseController(w).Flush()
		<-release
		io.WriteString(w, "whole")
	})}
	served := make(chan struct{})
	go func() { defer close(served); server.Serve(old.Listener()) }()
	t.Cleanup(func() { server.Close(); <-served })
	hello := connect.NewRequest(&posternv1.HelloRequest{Version: proto.Version()})
	if _, err := call(old).Hello(t.Context(), hello); err != nil {
		t.Fatal(err)
	}
	l, err := h.Agent("agt_1")
	if err != nil {
		t.Fatal(err)
	}
	resp, err := l.HTTP(tunnel.Bulk).Get(hostURL + "/")
	if err != nil {
		t.Fatal(err)
	}
	fresh, _ := attach(t, h)
	if _, err := call(fresh).Hello(t.Context(), hello); err != nil {
		t.Fatal(err)
	}
	if now, err := h.Agent("agt_1"); err != nil || now == l {
		t.Fatalf("the newest tunnel is not the agent's: %v", err)
	}
	close(release)
	body, err := io.ReadAll(resp.Body)
	if err != nil || string(body) != "whole" {
		t.Errorf("got %q, %v", body, err)
	}
	resp.Body.Close()
	select {
	case <-old.Done():
	case <-time.After(time.Minute):
		t.Error("the old tunnel outlived its last request")
	}
	if h.Online() != 1 {
		t.Errorf("%d online", h.Online())
	}
}

func TestCauseLabel(t *testing.T) {
	for want, err := range map[string]error{
		"replaced": fmt.Errorf("x: %w", ErrReplaced), "stopping": ErrStopping, "revoked": ErrDisabled,
		"silent": fmt.Errorf("x: %w", tunnel.ErrSilent), "lost": errors.New("x"),
	} {
		if got := causeLabel(err); got != want {
			t.Errorf("%v: got %q, want %q", err, got, want)
		}
	}
}
