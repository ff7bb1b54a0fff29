package main

import (
	"context"
	"io"
	"slices"
	"time"

	"github.com/postern-dev/postern/agentd/attach/mountd"
	"github.com/postern-dev/postern/agentd/checkpoint"
	"github.com/postern-dev/postern/agentd/host"
	"github.com/postern-dev/postern/agentd/kernel"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

var (
	_ checkpoint.Moves = movedKernels{}
	_ host.Moves       = moves{}
)

// movedKernels are the kernels as package checkpoint wants them for moves.
type movedKernels struct{ d *Daemon }

func (k movedKernels) MoveNeeds(ctx context.Context, id string) (checkpoint.MoveNeeds, error) {
	n, err := k.d.kernels.MoveNeeds(ctx, id)
	if err == nil {
		err = k.ownDirectories(n.Mounts, "they stay on it: stop the kernel and start one on the other host")
	}
	return checkpoint.MoveNeeds(n), err
}

func (k movedKernels) CheckMove(id string, n checkpoint.MoveNeeds) error {
	if err := k.d.kernels.CheckMove(id, kernel.MoveNeeds(n)); err != nil {
		return err
	}
	return k.mountable(n.Mounts)
}

func (k movedKernels) CheckSaved(saved []byte) error {
	mounts, err := kernel.SavedMounts(saved)
	if err == nil {
		err = k.mountable(mounts)
	}
	if err != nil {
		return err
	}
	return k.d.kernels.CheckSaved(saved)
}

// ownDirectories refuses mounts of what is this host's own, directories and buckets: under
// the same name another host may have something else.
func (k movedKernels) ownDirectories(mounts []*posternv1.KernelMount, what string) error {
	c := k.d.config.Load().Attachments
	for _, m := range mounts {
		if _, own := c.Bucket(m.Workspace); own {
			return proto.Errorf(proto.CodeInvalid, "the kernel has %.80s mounted, which is a bucket of agent %s (attachments.buckets): %s", m.Workspace, k.d.identity.Agent().Name, what)
		}
		if _, own := c.Bind(m.Workspace); own {
			return proto.Errorf(proto.CodeInvalid, "the kernel has %.80s mounted, which is a directory of agent %s (attachments.binds): %s", m.Workspace, k.d.identity.Agent().Name, what)
		}
	}
	return nil
}

// mountable holds the workspaces of a kernel that comes against this host's policy.
func (k movedKernels) mountable(mounts []*posternv1.KernelMount) error {
	for i := range mounts {
		if reason := decideKernelMount(k.d.config.Load().Attachments, mounts, i); reason != "" {
			return proto.Errorf(proto.CodePolicyDenied, "the kernel has workspace %.80s mounted: %s", mounts[i].Workspace, reason)
		}
	}
	return k.ownDirectories(mounts, "the kernel's is another one")
}

// Settle implements checkpoint.Moves.
func (k movedKernels) Settle(ctx context.Context, id string, patience time.Duration) error {
	now, err := k.d.kernels.Get(ctx, id)
	if err != nil {
		return err
	}
	until := time.Now().Add(patience)
	for _, m := range now.Mounts {
		// mountd knows a workspace by its holder.
		err := k.d.attach.client.Settle(ctx, m.Workspace, kernelHolder(id), max(time.Until(until), 0))
		status, serr := k.d.attach.client.Status(ctx)
		if serr != nil {
			return proto.Errorf(proto.CodeUnavailable, "kernel %s is not moved: whether what was written to workspace %s is at the control plane is not known: %v", id, m.Workspace, serr)
		}
		held := slices.ContainsFunc(status.Holders, func(h mountd.Holder) bool { return h.Workspace == m.Workspace && h.Name == kernelHolder(id) })
		for _, w := range status.Workspaces {
			if w.Workspace == m.Workspace && (err != nil || !held) && w.UnsentOps+int(w.UnsentBytes) > 0 {
				return proto.Errorf(proto.CodeUnavailable, "kernel %s is not moved: workspace %s has %d changes (%d bytes) of this host that are not at the control plane yet: try again when they are, see agentd status on agent %s",
					id, m.Workspace, w.UnsentOps, w.UnsentBytes, k.d.identity.Agent().Name)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (k movedKernels) Hold(ctx context.Context, id string, m checkpoint.HeldMove) error {
	return k.d.kernels.Hold(ctx, id, kernel.Move(m))
}

func (k movedKernels) Let(ctx context.Context, id, move string, committed bool) error {
	return k.d.kernels.Let(ctx, id, move, committed)
}

func (k movedKernels) Pack(ctx context.Context, id, move string, sent bool) (string, []string, error) {
	return k.d.kernels.Pack(ctx, id, move, sent)
}

func (k movedKernels) FileArrives(name string) bool { return kernel.FileArrives(name) }

func (k movedKernels) Moves(ctx context.Context, id string) (*checkpoint.HeldMove, string, error) {
	held, came, err := k.d.kernels.Moves(ctx, id)
	if held == nil {
		return nil, came, err
	}
	m := checkpoint.HeldMove(*held)
	return &m, came, err
}

func (k movedKernels) Held(ctx context.Context) map[string]checkpoint.HeldMove {
	out := map[string]checkpoint.HeldMove{}
	for id, m := range k.d.kernels.Held(ctx) {
		out[id] = checkpoint.HeldMove(m)
	}
	return out
}

func (k movedKernels) Arrive(ctx context.Context, a checkpoint.Arrival, place func(uid, gid uint32, private string) error) error {
	mounts, err := kernel.SavedMounts(a.Kernel)
	if err == nil {
		err = k.mountable(mounts)
	}
	if err != nil {
		return err
	}
	ready, done, err := k.d.attach.toKernel(ctx, a.ID, mounts)
	if err != nil {
		return err
	}
	defer done()
	return k.d.kernels.Arrive(ctx, kernel.Arrival{
		ID: a.ID, Owner: a.Owner, Kernel: a.Kernel, Checkpoint: a.Checkpoint, Files: a.Files, Private: a.Private, Move: kernel.Move(a.Move),
		Mounts: ready, Environment: k.environment,
	}, place)
}

// environment is what this host's policy lets through of the variables that a kernel was
// started with on another one.
func (k movedKernels) environment(spec string, given map[string]string) map[string]string {
	policy := k.d.config.Load().Kernels
	out := map[string]string{}
	for name, value := range given {
		if env, reason := policy.StartKernel(spec, map[string]string{name: value}); reason == "" {
			for name, value := range env {
				out[name] = value
			}
		}
	}
	return out
}

func (k movedKernels) Stop(ctx context.Context, id string) error { return k.d.kernels.Stop(ctx, id) }

// moves is the engine for the tunnel's requests.
type moves struct{ d *Daemon }

// may holds a direction against the policy.
func (m moves) may(out bool) error {
	if reason := m.d.config.Load().Kernels.MayMove(out); reason != "" {
		return proto.Errorf(proto.CodePolicyDenied, "%s", reason)
	}
	return nil
}

// DescribeMove implements host.Moves.
func (m moves) DescribeMove(ctx context.Context, organization, id string) (*posternv1.KernelNeeds, error) {
	e, err := m.d.checkpoints.engine()
	if err == nil {
		err = m.may(true)
	}
	if err != nil {
		return nil, err
	}
	return e.DescribeMove(ctx, organization, id)
}

// OfferMove implements host.Moves.
func (m moves) OfferMove(ctx context.Context, owner *posternv1.Principal, r *posternv1.OfferMoveRequest) (*posternv1.MoveParty, error) {
	e, err := m.d.checkpoints.engine()
	if err == nil {
		err = m.may(false)
	}
	if err != nil {
		return nil, err
	}
	return e.OfferMove(ctx, owner, r)
}

// BeginMove implements host.Moves.
func (m moves) BeginMove(ctx context.Context, organization string, r *posternv1.BeginMoveRequest) (*posternv1.BeginMoveResponse, error) {
	e, err := m.d.checkpoints.engine()
	if err == nil {
		err = m.may(true)
	}
	if err != nil {
		return nil, err
	}
	return e.BeginMove(ctx, organization, r)
}

// Export implements host.Moves.
func (m moves) Export(ctx context.Context, organization, id, move string, other io.ReadWriter) error {
	e, err := m.d.checkpoints.engine()
	if err == nil {
		err = m.may(true)
	}
	if err != nil {
		return err
	}
	return e.Export(ctx, organization, id, move, other)
}

// Receive implements host.Moves.
func (m moves) Receive(ctx context.Context, organization, id, move string, other io.ReadWriter) error {
	e, err := m.d.checkpoints.engine()
	if err == nil {
		err = m.may(false)
	}
	if err != nil {
		return err
	}
	return e.Receive(ctx, organization, id, move, other)
}

// FinishMove implements host.Moves.
func (m moves) FinishMove(ctx context.Context, organization, id, move string, forward bool) (bool, string, error) {
	e, err := m.d.checkpoints.engine()
	if err != nil {
		return false, "", err
	}
	return e.FinishMove(ctx, organization, id, move, forward)
}

// EndMove implements host.Moves.
func (m moves) EndMove(ctx context.Context, organization, id, move string, gone, unsent bool) error {
	e, err := m.d.checkpoints.engine()
	if err != nil {
		return err
	}
	return e.EndMove(ctx, organization, id, move, gone, unsent)
}
