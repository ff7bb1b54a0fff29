package main

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

// attachHost is an agent's side of AttachHostService: it answers, or is silent until it is let go.
type attachHost struct {
	posternv1connect.UnimplementedAttachHostServiceHandler
	silent chan struct{} // closed: it answers

	mu     sync.Mutex
	mounts []*posternv1.MountStatus
}

// Handle implements what simulatedAgent wants of kernels.
func (h *attachHost) Handle(mux *http.ServeMux) {
	mux.Handle(posternv1connect.NewAttachHostServiceHandler(h))
}

func (h *attachHost) GetAttachStatus(ctx context.Context, _ *connect.Request[posternv1.GetAttachStatusRequest]) (*connect.Response[posternv1.GetAttachStatusResponse], error) {
	select {
	case <-h.silent:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return connect.NewResponse(&posternv1.GetAttachStatusResponse{Mounts: h.mounts}), nil
}

// TestRevokeOfSilentAgents: an agent that has mounts is not cut off while it has writes that are not
// uploaded, nor, while it is attached, before it has said that it has none. Of one that is offline, what it
// said last decides.
func TestRevokeOfSilentAgents(t *testing.T) {
	s := startServer(t)
	fileClient := posternv1connect.NewFileServiceClient(as(s.token), s.url)
	if _, err := fileClient.CreateWorkspace(t.Context(), connect.NewRequest(&posternv1.CreateWorkspaceRequest{Name: "lab"})); err != nil {
		t.Fatal(err)
	}
	revoke := func(name string, force bool) error {
		_, err := posternv1connect.NewAgentServiceClient(as(s.token), s.url).RevokeAgent(t.Context(), connect.NewRequest(&posternv1.RevokeAgentRequest{Agent: name, Force: force}))
		return err
	}
	// host has a mount and has reported this many operations that are not uploaded.
	host := func(name string, ops uint64) (*attachHost, *tunnel.Tunnel) {
		t.Helper()
		h := &attachHost{silent: make(chan struct{})}
		a := newSimulatedAgent(s)
		a.kernels = h
		if err := a.register(t.Context(), s.newKey(t, s.token, 1), name); err != nil {
			t.Fatal(err)
		}
		tn := a.attach(t)
		c := posternv1connect.NewAttachServiceClient(&http.Client{Transport: tn.Transport(tunnel.Control)}, "http://controlplane")
		if _, err := c.OpenWorkspace(t.Context(), connect.NewRequest(&posternv1.OpenWorkspaceRequest{Name: "lab", MountId: "mount-of-" + name})); err != nil {
			t.Fatal(err)
		}
		h.mounts = []*posternv1.MountStatus{{MountId: "mount-of-" + name, Workspace: "lab", UnsentOps: ops}}
		if _, err := c.ReportStatus(t.Context(), connect.NewRequest(&posternv1.ReportStatusRequest{Mounts: h.mounts})); err != nil {
			t.Fatal(err)
		}
		return h, tn
	}
	refused := func(err error, want proto.Code, text string) {
		t.Helper()
		if proto.CodeOf(proto.FromConnect(err)) != want || !strings.Contains(err.Error(), text) {
			t.Errorf("got %v, want %v with %q", err, want, text)
		}
	}

	// It said that it has nothing, is attached, and does not answer now.
	h, _ := host("silent", 0)
	refused(revoke("silent", false), proto.CodeUnavailable, "could not find out")
	// It answers that it has something, then that it has nothing.
	h.mu.Lock()
	h.mounts = []*posternv1.MountStatus{{MountId: "mount-of-silent", Workspace: "lab", UnsentOps: 7}}
	h.mu.Unlock()
	close(h.silent)
	refused(revoke("silent", false), proto.CodeInvalid, "7 writes")
	h.mu.Lock()
	h.mounts[0].UnsentOps = 0
	h.mu.Unlock()
	if err := revoke("silent", false); err != nil {
		t.Errorf("one that has nothing: %v", err)
	}

	// --force does not ask.
	host("forced", 0)
	if err := revoke("forced", true); err != nil {
		t.Errorf("forced: %v", err)
	}

	// Offline: what it said last.
	for name, ops := range map[string]uint64{"away": 0, "full": 3} {
		_, tn := host(name, ops)
		tn.Close(nil)
		agents := posternv1connect.NewAgentServiceClient(as(s.token), s.url)
		eventually(t, name+" to be offline", func() error {
			r, err := agents.GetAgent(t.Context(), connect.NewRequest(&posternv1.GetAgentRequest{Agent: name}))
			if err == nil && r.Msg.Agent.Online {
				err = proto.Errorf(proto.CodeInternal, "it is online")
			}
			return err
		})
	}
	if err := revoke("away", false); err != nil {
		t.Errorf("offline, with nothing: %v", err)
	}
	refused(revoke("full", false), proto.CodeInvalid, "3 writes")
}
