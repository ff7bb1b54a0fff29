package simulatedkernels

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// Shims is a simulated host with real kernels: ipykernel in agentd's sandboxes, each
// with agentd's shim; only the manager between the tunnel and the shims is this one. It needs root.
type Shims struct {
	posternv1connect.UnimplementedKernelHostServiceHandler

	agentd, dir string

	mu      sync.Mutex
	kernels map[string]*shimmed
	streams map[io.Closer]struct{}
	next    uint32
	wg      sync.WaitGroup
}

type shimmed struct {
	dir   string
	owner *posternv1.Principal
	http  *http.Client
	cmd   *exec.Cmd
}

// NewShims returns a host that runs kernels with the agentd binary below a directory
// of root's alone. Close it.
func NewShims(agentd, dir string) *Shims {
	return &Shims{agentd: agentd, dir: dir, kernels: map[string]*shimmed{}, streams: map[io.Closer]struct{}{}}
}

// Handle adds the host's paths to a mux.
func (h *Shims) Handle(mux *http.ServeMux) {
	mux.Handle(posternv1connect.NewKernelHostServiceHandler(h))
	mux.HandleFunc(kernelstream.Path, h.serveChannels)
}

// Kernels are the ids of the kernels, in order.
func (h *Shims) Kernels() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var ids []string
	for id := range h.kernels {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// Drop cuts every stream without a word.
func (h *Shims) Drop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for c := range h.streams {
		c.Close() //nolint:errcheck // it is cut
	}
}

// Close stops the kernels and waits.
func (h *Shims) Close() {
	for _, id := range h.Kernels() {
		h.StopKernel(context.Background(), connect.NewRequest(&posternv1.KernelRequest{Id: id})) //nolint:errcheck // a test's end
	}
	h.Drop()
	h.wg.Wait()
}

// ListKernelSpecs implements KernelHostService.
func (h *Shims) ListKernelSpecs(context.Context, *connect.Request[posternv1.ListKernelSpecsRequest]) (*connect.Response[posternv1.ListKernelSpecsResponse], error) {
	return reply(&posternv1.ListKernelSpecsResponse{Default: "python3", Specs: []*posternv1.KernelSpec{{
		Name: "python3", DisplayName: "Python 3 (ipykernel)", Language: "python", InterruptMode: "signal",
	}}}, nil)
}

// StartKernel implements KernelHostService.
func (h *Shims) StartKernel(ctx context.Context, req *connect.Request[posternv1.StartKernelRequest]) (*connect.Response[posternv1.Kernel], error) {
	k, err := h.start(req.Msg)
	if err != nil {
		return reply[posternv1.Kernel](nil, proto.Errorf(proto.CodeInternal, "%v", err))
	}
	return reply(k.kernel(ctx, http.MethodGet, "/v1/kernel"))
}

func (h *Shims) start(m *posternv1.StartKernelRequest) (*shimmed, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if k := h.kernels[m.Id]; k != nil {
		return k, nil
	}
	dir := filepath.Join(h.dir, m.Id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	h.next++
	uid := 1_970_000_000 + uint32(os.Getpid()%10_000)*1000 + h.next
	owner, err := protojson.Marshal(m.Principal)
	if err != nil {
		return nil, err
	}
	spec, err := json.Marshal(dict{
		"id": m.Id, "name": "python3", "language": "python", "interrupt_mode": "signal", "owner": json.RawMessage(owner),
		"journal_bytes": 64 << 20, "created": time.Now(),
		"sandbox": dict{
			"id": m.Id, "uid": uid, "gid": uid, "network": dict{"mode": "none"},
			"argv":      []string{"/usr/bin/python3", "-m", "ipykernel_launcher", "-f", "/run/postern/connection.json", "--HistoryManager.hist_file=:memory:"},
			"state_dir": dir, "run_dir": filepath.Join(dir, "run"), "private_dir": filepath.Join(dir, "private"), "log_file": filepath.Join(dir, "log"),
		},
	})
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "spec.json"), spec, 0o600); err != nil {
		return nil, err
	}
	ready, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer ready.Close() //nolint:errcheck // it was read
	cmd := exec.Command(h.agentd, "kernel-shim", dir)
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	theirs.Close() //nolint:errcheck // the shim has its own
	if err != nil {
		return nil, err
	}
	said, err := io.ReadAll(ready)
	if string(said) != "ready" {
		cmd.Process.Kill() //nolint:errcheck // it did not start
		cmd.Wait()         //nolint:errcheck // likewise
		return nil, fmt.Errorf("the shim did not start: %s %w", said, err)
	}
	k := &shimmed{dir: dir, owner: clone(m.Principal), cmd: cmd}
	k.http = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		d, err := os.Open(dir)
		if err != nil {
			return nil, err
		}
		defer d.Close() //nolint:errcheck // it was looked at
		return (&net.Dialer{}).DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/shim.sock", d.Fd()))
	}}}
	h.kernels[m.Id] = k
	return k, nil
}

// kernel asks the shim.
func (k *shimmed) kernel(ctx context.Context, method, path string) (*posternv1.Kernel, error) {
	r, err := http.NewRequestWithContext(ctx, method, "http://shim"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := k.http.Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close() //nolint:errcheck // it is read
	if resp.StatusCode != http.StatusOK {
		return nil, proto.ReadHTTPError(resp)
	}
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	out := &posternv1.Kernel{}
	err = protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(bytes.TrimSpace(text), out)
	out.Owner = k.owner
	return out, err
}

func (h *Shims) ask(ctx context.Context, id, method, path string) (*posternv1.Kernel, error) {
	h.mu.Lock()
	k := h.kernels[id]
	h.mu.Unlock()
	if k == nil {
		return nil, proto.Errorf(proto.CodeNotFound, "kernel %q not found", id)
	}
	return k.kernel(ctx, method, path)
}

// GetKernel implements KernelHostService.
func (h *Shims) GetKernel(ctx context.Context, req *connect.Request[posternv1.KernelRequest]) (*connect.Response[posternv1.Kernel], error) {
	return reply(h.ask(ctx, req.Msg.Id, http.MethodGet, "/v1/kernel"))
}

// InterruptKernel implements KernelHostService.
func (h *Shims) InterruptKernel(ctx context.Context, req *connect.Request[posternv1.KernelRequest]) (*connect.Response[posternv1.Kernel], error) {
	return reply(h.ask(ctx, req.Msg.Id, http.MethodPost, "/v1/interrupt"))
}

// RestartKernel implements KernelHostService.
func (h *Shims) RestartKernel(ctx context.Context, req *connect.Request[posternv1.KernelRequest]) (*connect.Response[posternv1.Kernel], error) {
	return reply(h.ask(ctx, req.Msg.Id, http.MethodPost, "/v1/restart"))
}

// ListKernels implements KernelHostService.
func (h *Shims) ListKernels(ctx context.Context, _ *connect.Request[posternv1.ListKernelsRequest]) (*connect.Response[posternv1.ListKernelsResponse], error) {
	resp := &posternv1.ListKernelsResponse{}
	for _, id := range h.Kernels() {
		if k, err := h.ask(ctx, id, http.MethodGet, "/v1/kernel"); err == nil {
			resp.Kernels = append(resp.Kernels, k)
		}
	}
	return reply(resp, nil)
}

// StopKernel implements KernelHostService.
func (h *Shims) StopKernel(ctx context.Context, req *connect.Request[posternv1.KernelRequest]) (*connect.Response[posternv1.StopKernelResponse], error) {
	h.mu.Lock()
	k := h.kernels[req.Msg.Id]
	delete(h.kernels, req.Msg.Id)
	h.mu.Unlock()
	if k == nil {
		return reply[posternv1.StopKernelResponse](nil, proto.Errorf(proto.CodeNotFound, "kernel %q not found", req.Msg.Id))
	}
	_, err := k.kernel(ctx, http.MethodPost, "/v1/stop")
	done := make(chan struct{})
	go func() { defer close(done); k.cmd.Wait() }() //nolint:errcheck // it was stopped
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		k.cmd.Process.Kill() //nolint:errcheck // it hangs
		<-done
		err = errors.Join(err, errors.New("the shim did not end"))
	}
	return reply(&posternv1.StopKernelResponse{}, err)
}

func (h *Shims) serveChannels(w http.ResponseWriter, r *http.Request) {
	req, err := kernelstream.ReadRequest(w, r)
	var k *shimmed
	if err == nil {
		h.mu.Lock()
		k = h.kernels[req.KernelId]
		h.mu.Unlock()
		if k == nil {
			err = proto.Errorf(proto.CodeNotFound, "kernel %q not found", req.KernelId)
		}
	}
	if err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	shim, err := kernelstream.Dial(r.Context(), k.http, req)
	if err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	defer shim.Close() //nolint:errcheck // it is over
	conn, err := kernelstream.Accept(w)
	if err != nil {
		return
	}
	h.mu.Lock()
	h.streams[conn] = struct{}{}
	h.wg.Add(1)
	h.mu.Unlock()
	defer h.wg.Done()
	var both sync.WaitGroup
	both.Go(func() { io.Copy(shim, conn); shim.Close() }) //nolint:errcheck // one end ends both
	both.Go(func() { io.Copy(conn, shim); conn.Close() }) //nolint:errcheck // likewise
	both.Wait()
	h.mu.Lock()
	delete(h.streams, conn)
	h.mu.Unlock()
}
