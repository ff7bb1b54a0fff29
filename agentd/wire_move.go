package main

import (
	"context"
	"io"

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
	return checkpoint.MoveNeeds(n), err
}

func (k movedKernels) CheckMove(id string, n checkpoint.MoveNeeds) error {
	return k.d.kernels.CheckMove(id, kernel.MoveNeeds(n))
}

func (k movedKernels) CheckSaved(saved []byte) error { return k.d.kernels.CheckSaved(saved) }

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
	return k.d.kernels.Arrive(ctx, kernel.Arrival{
		ID: a.ID, Owner: a.Owner, Kernel: a.Kernel, Checkpoint: a.Checkpoint, Files: a.Files, Private: a.Private, Move: kernel.Move(a.Move),
		Environment: k.environment,
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
func (m moves) EndMove(ctx context.Context, organization, id, move string, gone bool) error {
	e, err := m.d.checkpoints.engine()
	if err != nil {
		return err
	}
	return e.EndMove(ctx, organization, id, move, gone)
}
