package simulatedkernels

import (
	"context"
	"io"
	"net/http"
	"slices"
	"sync"

	"connectrpc.com/connect"
	gproto "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// Host is a simulated host.
type Host struct {
	posternv1connect.UnimplementedKernelHostServiceHandler

	mu      sync.Mutex
	kernels map[string]*kernel
	refuse  error
	// secrets are what kernels were given, by id.
	secrets       map[string]map[string]string
	refuseSecrets error
	streams       map[io.Closer]struct{}
	wg            sync.WaitGroup
}

// New returns a host without kernels. Close it.
func New() *Host {
	return &Host{kernels: map[string]*kernel{}, secrets: map[string]map[string]string{}, streams: map[io.Closer]struct{}{}}
}

// Handle adds the host's paths to a mux.
func (h *Host) Handle(mux *http.ServeMux) {
	mux.Handle(posternv1connect.NewKernelHostServiceHandler(h))
	mux.Handle(posternv1connect.NewSecretHostServiceHandler(secretHost{h}))
	mux.HandleFunc(kernelstream.Path, h.serveChannels)
}

// Refuse makes every start fail; nil ends that.
func (h *Host) Refuse(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refuse = err
}

// Drop cuts every stream without a word, as a lost tunnel does. The kernels go on.
func (h *Host) Drop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for c := range h.streams {
		c.Close() //nolint:errcheck // it is cut
	}
}

// Close ends kernels and streams, and waits.
func (h *Host) Close() {
	h.mu.Lock()
	for id, k := range h.kernels {
		k.stop("the host is gone")
		delete(h.kernels, id)
	}
	h.mu.Unlock()
	h.Drop()
	h.wg.Wait()
}

// Forget loses a kernel, as a host that was set up anew does.
func (h *Host) Forget(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if k := h.kernels[id]; k != nil {
		k.stop("forgotten")
		delete(h.kernels, id)
	}
}

// Kernels are the ids of the kernels, in order.
func (h *Host) Kernels() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var ids []string
	for id := range h.kernels {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// Environment is what a kernel was started with.
func (h *Host) Environment(id string) map[string]string {
	if k := h.kernel(id); k != nil {
		return k.environment
	}
	return nil
}

// Ran is what a kernel ran, cell by cell.
func (h *Host) Ran(id string) []string {
	k := h.kernel(id)
	if k == nil {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.ran)
}

// Confirmed is what a client has confirmed.
func (h *Host) Confirmed(id, client string) uint64 {
	k := h.kernel(id)
	if k == nil {
		return 0
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if c := k.clients[client]; c != nil {
		return c.confirmed
	}
	return 0
}

// Sequence is the number of a kernel's newest message.
func (h *Host) Sequence(id string) uint64 {
	k := h.kernel(id)
	if k == nil {
		return 0
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.sequence
}

func (h *Host) kernel(id string) *kernel {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.kernels[id]
}

func reply[T any](m *T, err error) (*connect.Response[T], error) {
	if err != nil {
		return nil, proto.ConnectError(err)
	}
	return connect.NewResponse(m), nil
}

// ListKernelSpecs implements KernelHostService.
func (h *Host) ListKernelSpecs(context.Context, *connect.Request[posternv1.ListKernelSpecsRequest]) (*connect.Response[posternv1.ListKernelSpecsResponse], error) {
	return reply(&posternv1.ListKernelSpecsResponse{Default: "python3", Specs: []*posternv1.KernelSpec{{
		Name: "python3", DisplayName: "Simulated 3", Language: "python", MetadataJson: `{"metadata":{"debugger":true}}`, InterruptMode: "signal",
		Resources: map[string][]byte{"logo-64x64.png": []byte("\x89PNG\r\n\x1a\nlogo")},
	}}}, nil)
}

// StartKernel implements KernelHostService.
func (h *Host) StartKernel(_ context.Context, req *connect.Request[posternv1.StartKernelRequest]) (*connect.Response[posternv1.Kernel], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := req.Msg
	if h.refuse != nil {
		return reply[posternv1.Kernel](nil, h.refuse)
	}
	if m.Spec != "" && m.Spec != "python3" {
		return reply[posternv1.Kernel](nil, proto.Errorf(proto.CodeInvalid, "the host offers no kernelspec %q: it has python3", m.Spec))
	}
	k := h.kernels[m.Id]
	if k == nil {
		k = newKernel(m)
		h.kernels[m.Id] = k
		h.wg.Go(k.run)
	}
	return reply(k.describe(), nil)
}

func (h *Host) with(r *posternv1.KernelRequest, f func(*kernel) (*posternv1.Kernel, error)) (*connect.Response[posternv1.Kernel], error) {
	k := h.kernel(r.Id)
	if k == nil {
		return reply[posternv1.Kernel](nil, proto.Errorf(proto.CodeNotFound, "kernel %q not found", r.Id))
	}
	return reply(f(k))
}

// GetKernel implements KernelHostService.
func (h *Host) GetKernel(_ context.Context, req *connect.Request[posternv1.KernelRequest]) (*connect.Response[posternv1.Kernel], error) {
	return h.with(req.Msg, func(k *kernel) (*posternv1.Kernel, error) { return k.describe(), nil })
}

// InterruptKernel implements KernelHostService.
func (h *Host) InterruptKernel(_ context.Context, req *connect.Request[posternv1.KernelRequest]) (*connect.Response[posternv1.Kernel], error) {
	return h.with(req.Msg, func(k *kernel) (*posternv1.Kernel, error) {
		select {
		case k.interrupts <- struct{}{}:
		default:
		}
		return k.describe(), nil
	})
}

// RestartKernel implements KernelHostService.
func (h *Host) RestartKernel(_ context.Context, req *connect.Request[posternv1.KernelRequest]) (*connect.Response[posternv1.Kernel], error) {
	return h.with(req.Msg, func(k *kernel) (*posternv1.Kernel, error) {
		k.mu.Lock()
		k.generation++
		k.count = 0
		k.dead = ""
		k.mu.Unlock()
		return k.describe(), nil
	})
}

// StopKernel implements KernelHostService.
func (h *Host) StopKernel(_ context.Context, req *connect.Request[posternv1.KernelRequest]) (*connect.Response[posternv1.StopKernelResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	k := h.kernels[req.Msg.Id]
	if k == nil {
		return reply[posternv1.StopKernelResponse](nil, proto.Errorf(proto.CodeNotFound, "kernel %q not found", req.Msg.Id))
	}
	k.stop("it was stopped")
	delete(h.kernels, req.Msg.Id)
	return reply(&posternv1.StopKernelResponse{}, nil)
}

// ListKernels implements KernelHostService.
func (h *Host) ListKernels(context.Context, *connect.Request[posternv1.ListKernelsRequest]) (*connect.Response[posternv1.ListKernelsResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	resp := &posternv1.ListKernelsResponse{}
	for _, k := range h.kernels {
		resp.Kernels = append(resp.Kernels, k.describe())
	}
	return reply(resp, nil)
}

func (h *Host) serveChannels(w http.ResponseWriter, r *http.Request) {
	req, err := kernelstream.ReadRequest(w, r)
	if err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	k := h.kernel(req.KernelId)
	if k == nil {
		proto.WriteHTTPError(w, proto.Errorf(proto.CodeNotFound, "kernel %q not found", req.KernelId))
		return
	}
	conn, err := kernelstream.Accept(w)
	if err != nil {
		return
	}
	h.mu.Lock()
	h.streams[conn] = struct{}{}
	h.wg.Add(1)
	h.mu.Unlock()
	defer h.wg.Done()
	k.serve(conn, req)
	conn.Close() //nolint:errcheck // it is over
	h.mu.Lock()
	delete(h.streams, conn)
	h.mu.Unlock()
}

func clone(p *posternv1.Principal) *posternv1.Principal {
	return gproto.Clone(p).(*posternv1.Principal)
}

var now = timestamppb.Now
