package main

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

var (
	ana   = &posternv1.Principal{Organization: "org_1", TokenId: "tok_ana", TokenName: "ana", Role: "analyst"}
	ben   = &posternv1.Principal{Organization: "org_1", TokenId: "tok_ben", TokenName: "ben", Role: "analyst"}
	olive = &posternv1.Principal{Organization: "org_1", TokenId: "tok_olive", TokenName: "olive", Role: "operator"}
)

func kernels(up *tunnel.Tunnel) posternv1connect.KernelHostServiceClient {
	return posternv1connect.NewKernelHostServiceClient(&http.Client{Transport: up.Transport(tunnel.Control)}, "http://agent")
}

type tunnelDoer struct{ up *tunnel.Tunnel }

// Do implements kernelstream.Doer.
func (d tunnelDoer) Do(r *http.Request) (*http.Response, error) {
	return d.up.Transport(tunnel.Control).RoundTrip(r)
}

// cell runs code on a stream and returns the contents of what it printed.
func cell(t *testing.T, stream io.ReadWriter, code string) (id string, wait func() string) {
	t.Helper()
	m, err := jupyter.New(jupyter.Shell, "execute_request", "ana", map[string]any{"code": code, "silent": false, "allow_stdin": false, "stop_on_error": false})
	if err != nil {
		t.Fatal(err)
	}
	if err := kernelstream.NewWriter(stream).Message(m); err != nil {
		t.Fatal(err)
	}
	h, _ := jupyter.ParseHeader(m.Header)
	return h.ID, func() string { t.Helper(); return cellEnd(t, stream, h.ID) }
}

func cellEnd(t *testing.T, stream io.Reader, id string) string {
	t.Helper()
	in := kernelstream.NewReader(stream)
	var out strings.Builder
	for reply, idle := false, false; !reply || !idle; {
		f, err := in.Next()
		if err != nil {
			t.Fatalf("%v after %q", err, out.String())
		}
		m := f.GetDelivery().GetMessage()
		if m == nil {
			continue
		}
		h, _ := jupyter.ParseHeader(m.Header)
		parent, _ := jupyter.ParseHeader(m.ParentHeader)
		switch {
		case parent.ID != id:
		case h.Type == "stream" || h.Type == "error":
			out.Write(m.Content)
		case h.Type == "execute_reply":
			reply = true
		case h.Type == "status":
			idle = strings.Contains(string(m.Content), "idle")
		}
	}
	return out.String()
}

// TestKernelsOutliveAgentd starts a kernel through the tunnel, kills agentd with it in
// the middle of a cell, restarts agentd, and stops it.
func TestKernelsOutliveAgentd(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for kernels' namespaces")
	}
	c := newTestControl(t)
	l := newLab(t, c, "sources: []\nkernels: {specs: [python3], warm: 0, uid_base: 1980000000, environment: [REGION]}\n")
	p := startProcess(t, l, unwatched)
	up := c.awaitHello(1)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	api := kernels(up)

	specs, err := api.ListKernelSpecs(ctx, connect.NewRequest(&posternv1.ListKernelSpecsRequest{Principal: ana}))
	if err != nil || len(specs.Msg.Specs) != 1 || specs.Msg.Default != "python3" {
		t.Fatalf("specs: %v, %v", specs, err)
	}
	for name, c := range map[string]struct {
		request *posternv1.StartKernelRequest
		want    proto.Code
	}{
		"other spec":   {&posternv1.StartKernelRequest{Id: jupyter.NewID(), Spec: "ir", Principal: ana}, proto.CodePolicyDenied},
		"variable":     {&posternv1.StartKernelRequest{Id: jupyter.NewID(), Spec: "python3", Principal: ana, Environment: map[string]string{"LD_PRELOAD": "x"}}, proto.CodePolicyDenied},
		"mounts":       {&posternv1.StartKernelRequest{Id: jupyter.NewID(), Spec: "python3", Principal: ana, Mounts: []*posternv1.KernelMount{{Workspace: "w"}}}, proto.CodePolicyDenied},
		"no id":        {&posternv1.StartKernelRequest{Spec: "python3", Principal: ana}, proto.CodeInvalid},
		"bad id":       {&posternv1.StartKernelRequest{Id: "../x", Spec: "python3", Principal: ana}, proto.CodeInvalid},
		"no principal": {&posternv1.StartKernelRequest{Id: jupyter.NewID(), Spec: "python3"}, proto.CodeInvalid},
	} {
		if _, err := api.StartKernel(ctx, connect.NewRequest(c.request)); proto.CodeOf(err) != c.want {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	id := jupyter.NewID()
	started, err := api.StartKernel(ctx, connect.NewRequest(&posternv1.StartKernelRequest{
		Id: id, Spec: "python3", Principal: ana, Environment: map[string]string{"REGION": "eu", "KERNEL_WORKING_DIR": "/x"},
	}))
	if err != nil || started.Msg.Id != id {
		t.Fatalf("start: %v, %v", started, err)
	}
	t.Cleanup(func() { endKernels(t, l.path("state/kernels")) }) // what a test that fails leaves
	request := &posternv1.KernelChannelsRequest{KernelId: id, Client: "ana", Principal: ana, Resume: true}
	stream, err := kernelstream.Dial(ctx, tunnelDoer{up}, request)
	if err != nil {
		t.Fatal(err)
	}
	_, wait := cell(t, stream, "import os; x = os.environ['REGION']; print(x)")
	if got := wait(); !strings.Contains(got, "eu") {
		t.Errorf("printed %s", got)
	}

	// Whose it is.
	if _, err := kernelstream.Dial(ctx, tunnelDoer{up}, &posternv1.KernelChannelsRequest{KernelId: id, Client: "x", Principal: ben}); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("another's attach: %v", err)
	}
	if _, err := kernelstream.Dial(ctx, tunnelDoer{up}, &posternv1.KernelChannelsRequest{KernelId: id, Client: "x", Principal: olive}); proto.CodeOf(err) != proto.CodePolicyDenied {
		t.Errorf("an operator's attach: %v", err)
	}
	if _, err := api.InterruptKernel(ctx, connect.NewRequest(&posternv1.KernelRequest{Id: id, Principal: ben})); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("another's interrupt: %v", err)
	}
	if _, err := api.StopKernel(ctx, connect.NewRequest(&posternv1.KernelRequest{Id: id, Principal: ben})); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("another's stop: %v", err)
	}
	for who, want := range map[*posternv1.Principal]int{ana: 1, ben: 0, olive: 1} {
		if list, err := api.ListKernels(ctx, connect.NewRequest(&posternv1.ListKernelsRequest{Principal: who})); err != nil || len(list.Msg.Kernels) != want {
			t.Errorf("%s lists %v, %v, want %d", who.TokenName, list, err, want)
		}
	}
	status, err := control.Ask(ctx, l.path("run"))
	if err != nil || len(status.Kernels) != 1 || status.Kernels[0].ID != id || status.Kernels[0].Token != "ana" {
		t.Errorf("status: %+v, %v", status.Kernels, err)
	}

	// Kill -9 in the middle of a cell.
	busy, _ := cell(t, stream, "import time; time.sleep(1); print('printed while agentd was away')")
	poll(t, "the cell to run", func() bool {
		k, err := api.GetKernel(ctx, connect.NewRequest(&posternv1.KernelRequest{Id: id, Principal: ana}))
		return err == nil && k.Msg.State == posternv1.KernelState_KERNEL_STATE_BUSY
	})
	p.signal(syscall.SIGKILL)
	p.cmd.Wait() //nolint:errcheck // it was killed
	_ = stream.Close()
	p = startProcess(t, l, unwatched)
	up = c.awaitHello(2)
	api = kernels(up)
	if stream, err = kernelstream.Dial(ctx, tunnelDoer{up}, request); err != nil {
		t.Fatal(err)
	}
	if got := cellEnd(t, stream, busy); !strings.Contains(got, "printed while agentd was away") {
		t.Errorf("missed: %s", got)
	}
	// A restart.
	p.signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	_ = stream.Close()
	p = startProcess(t, l, unwatched)
	up = c.awaitHello(3)
	api = kernels(up)
	if stream, err = kernelstream.Dial(ctx, tunnelDoer{up}, request); err != nil {
		t.Fatal(err)
	}
	defer stream.Close() //nolint:errcheck // it ends with the kernel
	_, wait = cell(t, stream, "print(x)")
	if got := wait(); !strings.Contains(got, "eu") {
		t.Errorf("printed %s", got)
	}
	k, err := api.GetKernel(ctx, connect.NewRequest(&posternv1.KernelRequest{Id: id, Principal: ana}))
	if err != nil || k.Msg.Generation != 1 {
		t.Errorf("kernel is %v, %v", k, err)
	}
	if _, err := api.StopKernel(ctx, connect.NewRequest(&posternv1.KernelRequest{Id: id, Principal: olive})); err != nil {
		t.Errorf("an operator's stop: %v", err)
	}
	if entries, _ := os.ReadDir(l.path("state/kernels")); len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
	p.signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	got := l.actions()
	for _, want := range []string{"kernel.start denied", "kernel.start begun", "kernel.start done", "kernel.attach done", "kernel.attach denied", "kernel.execute sent", "kernel.stop done"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %s", want, got)
		}
	}
	for _, e := range l.entries() {
		text, err := json.Marshal(e)
		if err != nil || strings.Contains(string(text), "printed while") {
			t.Errorf("the log has code: %s, %v", text, err)
		}
	}
}

func TestKernelsAreOff(t *testing.T) {
	c := newTestControl(t)
	l := newLab(t, c, "sources: []\n")
	l.start()
	defer l.stop()
	api := kernels(c.awaitHello(1))
	_, err := api.StartKernel(t.Context(), connect.NewRequest(&posternv1.StartKernelRequest{Id: jupyter.NewID(), Spec: "python3", Principal: ana}))
	if proto.CodeOf(err) != proto.CodePolicyDenied || !strings.Contains(err.Error(), "add kernels: to agentd.yaml") {
		t.Errorf("got %v", err)
	}
	specs, err := api.ListKernelSpecs(t.Context(), connect.NewRequest(&posternv1.ListKernelSpecsRequest{Principal: ana}))
	if err != nil || len(specs.Msg.Specs) != 0 {
		t.Errorf("specs: %v, %v", specs, err)
	}
}

// endKernels ends the kernels that are left in a state directory, by their shims.
func endKernels(t *testing.T, dir string) {
	t.Helper()
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		socket := filepath.Join(dir, e.Name(), "shim.sock")
		transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}}
		response, err := (&http.Client{Transport: transport, Timeout: time.Minute}).Post("http://shim/v1/stop", "", nil)
		if err != nil {
			t.Logf("kernel %s: %v", e.Name(), err)
			continue
		}
		_ = response.Body.Close()
	}
}
