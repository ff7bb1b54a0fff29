package host

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// Actions of kernels in the audit log; package audit knows them by the same names.
const (
	actionKernelStart     = "kernel.start"
	actionKernelStop      = "kernel.stop"
	actionKernelRestart   = "kernel.restart"
	actionKernelInterrupt = "kernel.interrupt"
	actionKernelAttach    = "kernel.attach"
	actionKernelExecute   = "kernel.execute"
	actionKernelRevoke    = "kernel.revoke"
)

// Kernels runs Jupyter kernels. Its errors carry codes of package proto; a kernel that
// is not there is NOT_FOUND.
type Kernels interface {
	Specs() *posternv1.ListKernelSpecsResponse
	// StartKernel returns when the kernel's processes run; environment is what of the
	// request's the policy lets through.
	StartKernel(ctx context.Context, r *posternv1.StartKernelRequest, environment map[string]string) (*posternv1.Kernel, error)
	Get(ctx context.Context, id string) (*posternv1.Kernel, error)
	List() []*posternv1.Kernel
	Interrupt(ctx context.Context, id string) (*posternv1.Kernel, error)
	Restart(ctx context.Context, id string) (*posternv1.Kernel, error)
	Stop(ctx context.Context, id string) error
	// Revoke makes the kernels of a token ask data sources for nothing any more, and
	// returns for how many that is new.
	Revoke(organization, token string) (int, error)
	// Channels opens a stream of package kernelstream, which the caller closes.
	Channels(ctx context.Context, r *posternv1.KernelChannelsRequest) (io.ReadWriteCloser, error)
}

// KernelVerdict is what the host's policy says to the start of a kernel.
type KernelVerdict struct {
	Allowed bool
	// Reason is one line, when not allowed.
	Reason string
	// Environment is what of the request's the kernel gets.
	Environment map[string]string
}

// kernelRPC is the KernelHostService.
type kernelRPC struct{ h *Host }

var _ posternv1connect.KernelHostServiceHandler = kernelRPC{}

// mine reports whether a kernel is of the one who asks. Tokens are kept apart, as their
// database sessions are.
func mine(k *posternv1.Kernel, p *posternv1.Principal) bool {
	return p.GetTokenId() != "" && k.Owner.GetTokenId() == p.GetTokenId() && k.Owner.GetOrganization() == p.GetOrganization()
}

// operates reports whether a role may see, interrupt, restart and stop others' kernels.
func operates(p *posternv1.Principal) bool {
	return p.GetRole() == "operator" || p.GetRole() == "admin"
}

// kernelFor finds a kernel for who asks. ownerOnly: others may not do it, whatever their
// role.
func (h *Host) kernelFor(ctx context.Context, id string, p *posternv1.Principal, ownerOnly bool) (*posternv1.Kernel, error) {
	if !validID(id) {
		return nil, proto.Errorf(proto.CodeInvalid, "the request has no good kernel id")
	}
	k, err := h.cfg.Kernels.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	switch {
	case mine(k, p):
		return k, nil
	case !operates(p):
		return nil, proto.Errorf(proto.CodeNotFound, "this host has no kernel %s", id)
	case ownerOnly:
		return nil, proto.Errorf(proto.CodePolicyDenied, "kernel %s is of token %s: others may see, interrupt and stop it, not use it", id, k.Owner.GetTokenName())
	}
	return k, nil
}

func kernelEntry(action, id string, p *posternv1.Principal) auditchain.Entry {
	return auditchain.Entry{Action: action, Actor: actor(p), Role: p.GetRole(), Target: clip(id), Verdict: "allowed", Outcome: "done"}
}

// note records what came of something done to a kernel. What was done stays done, should
// the log refuse.
func (h *Host) note(e auditchain.Entry, began time.Time, err error) {
	e.DurationMillis = time.Since(began).Milliseconds()
	if err != nil {
		if e.Outcome = ending(err); e.Outcome == "denied" || proto.CodeOf(err) == proto.CodeNotFound {
			e.Verdict = "denied"
		}
		e.Error = proto.Detail(err).Message
	}
	// What is refused, or gone in a moment, is not worth keeping for a log that refuses.
	h.finish(e, err == nil && e.Action != actionKernelInterrupt)
}

// ListKernelSpecs names the kernelspecs that the host offers.
func (s kernelRPC) ListKernelSpecs(context.Context, *connect.Request[posternv1.ListKernelSpecsRequest]) (*connect.Response[posternv1.ListKernelSpecsResponse], error) {
	return connect.NewResponse(s.h.cfg.Kernels.Specs()), nil
}

// StartKernel starts a kernel. The log has the intent before any process runs.
func (s kernelRPC) StartKernel(ctx context.Context, r *connect.Request[posternv1.StartKernelRequest]) (*connect.Response[posternv1.Kernel], error) {
	h, m, began := s.h, r.Msg, time.Now()
	entry := kernelEntry(actionKernelStart, m.Id, m.Principal)
	k, err := h.startKernel(ctx, m, entry)
	if err != nil {
		h.note(entry, began, err)
		return nil, proto.ConnectError(err)
	}
	h.note(entry, began, nil)
	return connect.NewResponse(k), nil
}

func (h *Host) startKernel(ctx context.Context, m *posternv1.StartKernelRequest, entry auditchain.Entry) (*posternv1.Kernel, error) {
	switch {
	case !validID(m.Id):
		return nil, proto.Errorf(proto.CodeInvalid, "the request has no good kernel id")
	case m.Principal.GetTokenId() == "":
		return nil, proto.Errorf(proto.CodeInvalid, "the request names no principal")
	case len(m.Mounts) > maxKernelMounts:
		return nil, proto.Errorf(proto.CodeInvalid, "a kernel has at most %d mounts", maxKernelMounts)
	}
	verdict := h.cfg.DecideKernel(m)
	if !verdict.Allowed {
		return nil, proto.Errorf(proto.CodePolicyDenied, "%s", verdict.Reason)
	}
	if err := h.settle(); err != nil {
		return nil, err
	}
	entry.Action, entry.Outcome, entry.Statement = actionKernelStart, "begun", clip("spec "+m.Spec+mountsText(m.Mounts))
	if err := h.record(entry); err != nil {
		return nil, err
	}
	return h.cfg.Kernels.StartKernel(ctx, m, verdict.Environment)
}

// maxKernelMounts bounds the workspaces of a kernel.
const maxKernelMounts = 16

// mountsText names a kernel's workspaces for the log.
func mountsText(mounts []*posternv1.KernelMount) string {
	text := ""
	for i, m := range mounts {
		if text += ", "; i == 0 {
			text = ", mounts "
		}
		text += m.Workspace
		if m.ReadOnly {
			text += ":ro"
		}
	}
	return text
}

// ListKernels lists the kernels of who asks; all for operators.
func (s kernelRPC) ListKernels(_ context.Context, r *connect.Request[posternv1.ListKernelsRequest]) (*connect.Response[posternv1.ListKernelsResponse], error) {
	out := &posternv1.ListKernelsResponse{}
	for _, k := range s.h.cfg.Kernels.List() {
		if mine(k, r.Msg.Principal) || operates(r.Msg.Principal) {
			out.Kernels = append(out.Kernels, k)
		}
	}
	return connect.NewResponse(out), nil
}

// GetKernel tells of one.
func (s kernelRPC) GetKernel(ctx context.Context, r *connect.Request[posternv1.KernelRequest]) (*connect.Response[posternv1.Kernel], error) {
	k, err := s.h.kernelFor(ctx, r.Msg.Id, r.Msg.Principal, false)
	if err != nil {
		return nil, proto.ConnectError(err)
	}
	return connect.NewResponse(k), nil
}

// InterruptKernel interrupts what it runs. It is never held up by the log.
func (s kernelRPC) InterruptKernel(ctx context.Context, r *connect.Request[posternv1.KernelRequest]) (*connect.Response[posternv1.Kernel], error) {
	return s.change(ctx, r.Msg, actionKernelInterrupt, s.h.cfg.Kernels.Interrupt)
}

// RestartKernel ends its processes and starts them anew.
func (s kernelRPC) RestartKernel(ctx context.Context, r *connect.Request[posternv1.KernelRequest]) (*connect.Response[posternv1.Kernel], error) {
	return s.change(ctx, r.Msg, actionKernelRestart, s.h.cfg.Kernels.Restart)
}

// StopKernel ends it.
func (s kernelRPC) StopKernel(ctx context.Context, r *connect.Request[posternv1.KernelRequest]) (*connect.Response[posternv1.StopKernelResponse], error) {
	_, err := s.change(ctx, r.Msg, actionKernelStop, func(ctx context.Context, id string) (*posternv1.Kernel, error) {
		return &posternv1.Kernel{Id: id}, s.h.cfg.Kernels.Stop(ctx, id)
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&posternv1.StopKernelResponse{}), nil
}

// change does something to a kernel and records it.
func (s kernelRPC) change(ctx context.Context, r *posternv1.KernelRequest, action string, do func(context.Context, string) (*posternv1.Kernel, error)) (*connect.Response[posternv1.Kernel], error) {
	began := time.Now()
	entry := kernelEntry(action, r.Id, r.Principal)
	k, err := s.h.kernelFor(ctx, r.Id, r.Principal, false)
	if err == nil && action != actionKernelInterrupt {
		err = s.h.settle()
	}
	if err == nil {
		k, err = do(ctx, r.Id)
	}
	s.h.note(entry, began, err)
	if err != nil {
		return nil, proto.ConnectError(err)
	}
	return connect.NewResponse(k), nil
}

// NoteKernelStopped records that the host's policy stopped a kernel.
func (h *Host) NoteKernelStopped(k *posternv1.Kernel, reason string) {
	h.finish(auditchain.Entry{Action: actionKernelStop, Actor: "host", Target: k.Id, Verdict: "allowed", Outcome: "done", Statement: reason}, true)
}

// code is what the log keeps of code that a kernel is told to run: its length and hash.
// The text stays in the control plane's log, subject to its masks; here it may hold
// secrets that nobody masks.
func code(content []byte) string {
	var c struct {
		Code string `json:"code"`
	}
	text := content
	if json.Unmarshal(content, &c) == nil {
		text = []byte(c.Code)
	}
	sum := sha256.Sum256(text)
	return fmt.Sprintf("%d bytes, sha256 %s", len(text), hex.EncodeToString(sum[:]))
}
