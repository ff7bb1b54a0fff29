package main

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/e2e/simulatedkernels"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// kernelHost is an agent with simulated kernels.
func kernelHost(t *testing.T, s *testServer, name string) (*simulatedAgent, *simulatedkernels.Host) {
	t.Helper()
	host := simulatedkernels.New()
	t.Cleanup(host.Close)
	a := newSimulatedAgent(s)
	a.kernels = host
	if err := a.register(t.Context(), s.newKey(t, s.token, 1), name); err != nil {
		t.Fatal(err)
	}
	return a, host
}

// audited are the entries of an action in the organization's chain, oldest first.
func audited(t *testing.T, s *testServer, action string) []auditchain.Entry {
	t.Helper()
	resp, err := posternv1connect.NewAuditServiceClient(as(s.token), s.url).ListAudit(t.Context(), connect.NewRequest(&posternv1.ListAuditRequest{Limit: 200}))
	if err != nil {
		t.Fatal(err)
	}
	var all []auditchain.Entry
	for _, raw := range resp.Msg.Entries {
		var e auditchain.Entry
		if err := json.Unmarshal(raw, &e); err != nil {
			t.Fatal(err)
		}
		if e.Action == action {
			all = append(all, e)
		}
	}
	slices.SortFunc(all, func(a, b auditchain.Entry) int { return int(a.Sequence) - int(b.Sequence) })
	return all
}

func wantKernelCode(t *testing.T, err error, want proto.Code) {
	t.Helper()
	if got := proto.CodeOf(err); got != want {
		t.Fatalf("got %v (%v), want %v", got, err, want)
	}
}

func TestKernelsOfAnAgent(t *testing.T) {
	s := startServer(t)
	a, host := kernelHost(t, s, "edge")
	tn := a.attach(t)
	ctx := t.Context()
	ana := s.newToken(t, s.token, "ana", "analyst")
	bob := s.newToken(t, s.token, "bob", "analyst")
	eve := s.newToken(t, s.token, "eve", "viewer")
	of := func(token string) posternv1connect.KernelServiceClient {
		return posternv1connect.NewKernelServiceClient(as(token), s.url)
	}

	specs, err := of(ana).ListKernelSpecs(ctx, connect.NewRequest(&posternv1.ListAgentKernelSpecsRequest{Agent: "edge"}))
	if err != nil || len(specs.Msg.Specs) != 1 || specs.Msg.Default != "python3" {
		t.Fatalf("specs: %v, %v", specs, err)
	}
	_, err = of(eve).StartKernel(ctx, connect.NewRequest(&posternv1.StartAgentKernelRequest{Agent: "edge"}))
	wantKernelCode(t, err, proto.CodeRoleDenied)
	_, err = of(ana).StartKernel(ctx, connect.NewRequest(&posternv1.StartAgentKernelRequest{Agent: "nowhere"}))
	wantKernelCode(t, err, proto.CodeNotFound)
	_, err = of(ana).StartKernel(ctx, connect.NewRequest(&posternv1.StartAgentKernelRequest{Agent: "edge", Spec: "julia"}))
	wantKernelCode(t, err, proto.CodeInvalid)
	host.Refuse(proto.Errorf(proto.CodePolicyDenied, "kernels are off: add kernels: to agentd.yaml"))
	_, err = of(ana).StartKernel(ctx, connect.NewRequest(&posternv1.StartAgentKernelRequest{Agent: "edge"}))
	wantKernelCode(t, err, proto.CodePolicyDenied)
	host.Refuse(nil)
	if list, err := of(ana).ListKernels(ctx, connect.NewRequest(&posternv1.ListAgentKernelsRequest{})); err != nil || len(list.Msg.Kernels) != 0 {
		t.Fatalf("after refused starts: %v, %v", list, err)
	}

	started, err := of(ana).StartKernel(ctx, connect.NewRequest(&posternv1.StartAgentKernelRequest{Agent: "edge", Environment: map[string]string{"KERNEL_X": "1"}}))
	if err != nil {
		t.Fatal(err)
	}
	id := started.Msg.Kernel.Id
	if len(id) != 36 || id[14] != '7' || started.Msg.Agent != "edge" || started.Msg.Kernel.Spec != "python3" || host.Environment(id)["KERNEL_X"] != "1" {
		t.Fatalf("started %v", started.Msg)
	}
	request := connect.NewRequest(&posternv1.AgentKernelRequest{KernelId: id})

	// Its owner has it, a neighbour does not, an operator may look and stop.
	if got, err := of(ana).GetKernel(ctx, request); err != nil || !got.Msg.Online || got.Msg.Kernel.Owner.TokenName != "ana" {
		t.Fatalf("get: %v, %v", got, err)
	}
	for name, f := range map[string]func(context.Context, *connect.Request[posternv1.AgentKernelRequest]) (*connect.Response[posternv1.AgentKernel], error){
		"get": of(bob).GetKernel, "interrupt": of(bob).InterruptKernel, "restart": of(bob).RestartKernel,
	} {
		if _, err := f(ctx, request); proto.CodeOf(err) != proto.CodeNotFound {
			t.Errorf("a neighbour's %s: got %v, want NOT_FOUND", name, err)
		}
	}
	_, err = of(bob).StopKernel(ctx, request)
	wantKernelCode(t, err, proto.CodeNotFound)
	if _, err := of(s.token).GetKernel(ctx, request); err != nil {
		t.Errorf("an operator's get: %v", err)
	}
	_, err = of(s.token).RestartKernel(ctx, request)
	wantKernelCode(t, err, proto.CodeRoleDenied)
	if list, err := of(bob).ListKernels(ctx, connect.NewRequest(&posternv1.ListAgentKernelsRequest{})); err != nil || len(list.Msg.Kernels) != 0 {
		t.Errorf("a neighbour sees %v, %v", list, err)
	}
	if _, err := of(ana).InterruptKernel(ctx, request); err != nil {
		t.Error(err)
	}
	if got, err := of(ana).RestartKernel(ctx, request); err != nil || got.Msg.Kernel.Generation != 2 {
		t.Errorf("restart: %v, %v", got, err)
	}

	// While the agent is away the kernel is not gone.
	tn.Close(nil) //nolint:errcheck // it is to end
	<-tn.Done()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		_, err = of(ana).GetKernel(ctx, request)
		if proto.CodeOf(err) == proto.CodeAgentOffline {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("of an agent that is away: got %v, want AGENT_OFFLINE", err)
		}
	}
	list, err := of(ana).ListKernels(ctx, connect.NewRequest(&posternv1.ListAgentKernelsRequest{Agent: "edge"}))
	if err != nil || len(list.Msg.Kernels) != 1 || list.Msg.Kernels[0].Online || list.Msg.Kernels[0].Kernel.Id != id || list.Msg.Kernels[0].Kernel.Spec != "python3" {
		t.Fatalf("list of an agent that is away: %v, %v", list, err)
	}
	a.attach(t)
	if _, err := of(ana).GetKernel(ctx, request); err != nil {
		t.Fatalf("after the agent came back: %v", err)
	}

	// A kernel that this control plane has never heard of is found, whoever's it is.
	if err := s.store.DeleteKernel(ctx, started.Msg.Kernel.Owner.Organization, id); err != nil {
		t.Fatal(err)
	}
	if list, err := of(ana).ListKernels(ctx, connect.NewRequest(&posternv1.ListAgentKernelsRequest{Agent: "edge"})); err != nil || len(list.Msg.Kernels) != 1 || !list.Msg.Kernels[0].Online {
		t.Fatalf("list: %v, %v", list, err)
	}
	if _, err := of(ana).GetKernel(ctx, request); err != nil {
		t.Fatalf("a kernel that was found: %v", err)
	}

	if _, err := of(ana).StopKernel(ctx, request); err != nil {
		t.Fatal(err)
	}
	_, err = of(ana).GetKernel(ctx, request)
	wantKernelCode(t, err, proto.CodeNotFound)
	if n := len(host.Kernels()); n != 0 {
		t.Errorf("the host still has %d kernels", n)
	}

	starts := audited(t, s, "kernel.start")
	var outcomes []string
	for _, e := range starts {
		outcomes = append(outcomes, e.Outcome)
		if e.Actor != "token ana" || e.Agent != "edge" {
			t.Errorf("audit entry %+v", e)
		}
	}
	if got := strings.Join(outcomes, " "); got != "failed denied done" {
		t.Errorf("starts in the audit log: %s", got)
	}
	for _, action := range []string{"kernel.stop", "kernel.interrupt", "kernel.restart"} {
		if all := audited(t, s, action); len(all) != 1 || all[0].Target != id || all[0].Outcome != "done" {
			t.Errorf("%s in the audit log: %+v", action, all)
		}
	}
}

// TestAgentWithoutKernels is one of a version before them.
func TestAgentWithoutKernels(t *testing.T) {
	s := startServer(t)
	joined(t, s, s.token, "old")
	c := posternv1connect.NewKernelServiceClient(as(s.token), s.url)
	_, err := c.StartKernel(t.Context(), connect.NewRequest(&posternv1.StartAgentKernelRequest{Agent: "old"}))
	wantKernelCode(t, err, proto.CodeVersionMismatch)
	list, err := c.ListKernels(t.Context(), connect.NewRequest(&posternv1.ListAgentKernelsRequest{}))
	if err != nil || len(list.Msg.Kernels) != 0 {
		t.Errorf("list: %v, %v", list, err)
	}
}
