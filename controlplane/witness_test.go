package main

import (
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// keep adds an entry to the agent's own chain.
func (a *simulatedAgent) keep(e auditchain.Entry) {
	a.mu.Lock()
	defer a.mu.Unlock()
	e.Time = time.Now()
	a.head = e.Seal(a.head)
	a.chain = append(a.chain, e.Encode())
}

// TestHostsAreWitnesses verifies the control plane's chain against what hosts were told of it: a chain
// that is cut, or altered and written anew, is whole by itself.
func TestHostsAreWitnesses(t *testing.T) {
	s := startServer(t)
	a := newSimulatedAgent(s)
	if err := a.register(t.Context(), s.newKey(t, s.token, 1), "host"); err != nil {
		t.Fatal(err)
	}
	tn := a.attach(t)
	hello, err := linkClient(tn).Hello(t.Context(), connect.NewRequest(&posternv1.HelloRequest{Version: proto.Version(), AuditHead: a.head.Proto()}))
	if err != nil {
		t.Fatal(err)
	}
	head, err := auditchain.HeadFromProto(hello.Msg.OrganizationAuditHead)
	if err != nil || head.Sequence == 0 {
		t.Fatalf("the host is told %v, %v", head, err)
	}
	verify := func() *posternv1.ChainReport {
		t.Helper()
		resp, err := posternv1connect.NewAuditServiceClient(as(s.token), s.url).VerifyAudit(t.Context(), connect.NewRequest(&posternv1.VerifyAuditRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		if r := resp.Msg.Reports[1]; r.Chain != "host" || !r.Ok {
			t.Fatalf("the host's: %v", r)
		}
		return resp.Msg.Reports[0]
	}
	a.keep(auditchain.Entry{Action: auditchain.PeerAction, Target: auditchain.PeerTarget(head)})
	if r := verify(); !r.Ok {
		t.Fatalf("nothing was done to it: %v", r)
	}
	gone := auditchain.Head{Sequence: head.Sequence + 100, Hash: head.Hash}
	a.keep(auditchain.Entry{Action: auditchain.PeerAction, Target: auditchain.PeerTarget(gone)})
	if r := verify(); r.Ok || !strings.Contains(r.Message, "removed") || !strings.Contains(r.Message, "agent host") {
		t.Errorf("cut: %v", r)
	}
	other := head
	other.Hash[0] ^= 1
	a.keep(auditchain.Entry{Action: auditchain.PeerAction, Target: auditchain.PeerTarget(other)})
	if r := verify(); r.Ok || !strings.Contains(r.Message, "altered") {
		t.Errorf("written anew: %v", r)
	}
}
