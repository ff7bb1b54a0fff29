package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/agentd/checkpoint"
	"github.com/postern-dev/postern/agentd/host"
	"github.com/postern-dev/postern/agentd/kernel"
	"github.com/postern-dev/postern/agentd/policy"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

var (
	_ checkpoint.Kernels = savedKernels{}
	_ host.Checkpoints   = checkpoints{}
)

// openCheckpoints opens the store. Where it can't be opened kernels run without
// checkpoints, and every call that needs one says why. A host that never had kernels gets
// none.
func (d *Daemon) openCheckpoints(k policy.Kernels) {
	c, state := k.Checkpoints, d.state
	if abs, err := filepath.Abs(state); err == nil {
		state = abs
	}
	if _, err := os.Stat(filepath.Join(state, "checkpoints")); !k.Enabled && errors.Is(err, fs.ErrNotExist) {
		d.checkpoints.set(nil, errors.New("kernels were off when agentd started: restart it"))
		return
	}
	engine, err := checkpoint.Open(checkpoint.Config{
		State: state, Kernels: savedKernels{d.kernels, c.CRIU, lazyOver(c)}, Driver: checkpoint.NewDriver(c.CRIU), Logger: d.logger,
		Moves: movedKernels{d}, Identity: d.identity, Agent: func() string { return d.identity.Agent().AgentID },
		MaxBytes: int64(c.MaxBytes), Keep: c.Keep, MaxAge: c.MaxAge,
	})
	if err != nil {
		d.logger.Error("no checkpoints: their store can't be opened", "err", err)
	}
	d.checkpoints.set(engine, err)
}

// suspendIdle suspends a kernel that nobody uses, by the host's policy.
func (d *Daemon) suspendIdle(ctx context.Context, k *posternv1.Kernel) error {
	e, err := d.checkpoints.engine()
	if err != nil {
		return err
	}
	_, err = e.Suspend(ctx, k.Owner.GetOrganization(), k.Id)
	return err
}

// savedKernels are the kernels as package checkpoint wants them.
type savedKernels struct {
	m    *kernel.Manager
	criu string // its path by the configuration
	lazy int64  // see lazyOver
}

// lazyAbove is how much memory a kernel has that comes back before all of it does, in bytes:
// docs/performance.md has what both ways take.
const lazyAbove = 256 << 20

// lazyOver is the memory over which kernels are restored lazily; 0: none is.
func lazyOver(c policy.Checkpoints) int64 {
	if c.Eager {
		return 0
	}
	return lazyAbove
}

func (s savedKernels) Look(ctx context.Context, id string) (checkpoint.Kernel, error) {
	l, err := s.m.Look(ctx, id)
	if err != nil {
		return checkpoint.Kernel{}, err
	}
	return checkpoint.Kernel{
		Held: l.Kernel.Move != nil,
		ID:   id, Organization: l.Kernel.Owner.GetOrganization(), Running: l.InitPID > 0, InitPID: l.InitPID,
		Suspended:  l.Kernel.State == posternv1.KernelState_KERNEL_STATE_SUSPENDED,
		Checkpoint: l.Kernel.Checkpoint, Started: l.Kernel.Started.AsTime(), PrivateDir: l.PrivateDir, UID: l.UID, GID: l.GID, Attachments: l.Attachments,
	}, nil
}

func (s savedKernels) Dump(ctx context.Context, id string, o checkpoint.DumpOrder) (checkpoint.Dumped, error) {
	d, err := s.m.Dump(ctx, id, kernel.DumpOrder{CRIU: s.criu, Images: o.Images, Private: o.Private, MaxPrivate: o.MaxPrivate, Stay: o.Stay, Wait: o.Wait, Move: o.Move})
	return checkpoint.Dumped{Kernel: d.Kernel, Busy: d.Busy, Standstill: d.Standstill}, err
}

func (s savedKernels) GoOn(ctx context.Context, id string) error { return s.m.GoOn(ctx, id) }

func (s savedKernels) Suspend(ctx context.Context, id, checkpoint string) error {
	return s.m.Suspend(ctx, id, checkpoint)
}

func (s savedKernels) order(o checkpoint.RestoreOrder) kernel.RestoreOrder {
	return kernel.RestoreOrder{CRIU: s.criu, Images: o.Images, Private: o.Private, Kernel: o.Kernel, Checkpoint: o.Checkpoint, Move: o.Move, Why: o.Why, SavedAt: o.SavedAt, Lazy: s.lazy}
}

func (s savedKernels) Restore(ctx context.Context, id string, o checkpoint.RestoreOrder) error {
	return s.m.Restore(ctx, id, s.order(o))
}

func (s savedKernels) Fork(ctx context.Context, id, from string, o checkpoint.RestoreOrder, place func(uid, gid uint32, private string) error) error {
	return s.m.Fork(ctx, id, from, s.order(o), place)
}

// engineBox holds the engine once it is open.
type engineBox struct {
	mu  sync.Mutex
	e   *checkpoint.Engine
	why string // there is none
}

// checkpoints is the engine for the tunnel's requests.
type checkpoints struct{ *engineBox }

// engine returns it, or why there is none.
func (b *engineBox) engine() (*checkpoint.Engine, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.e == nil {
		return nil, proto.Errorf(proto.CodeUnavailable, "this host makes no checkpoints: %s", firstText(b.why, "agentd is starting"))
	}
	return b.e, nil
}

func (b *engineBox) set(e *checkpoint.Engine, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.e, b.why = e, ""
	if err != nil {
		b.e, b.why = nil, err.Error()
	}
}

func (b *engineBox) close() error {
	e, err := b.engine()
	if err != nil {
		return nil //nolint:nilerr // there is none
	}
	b.set(nil, errors.New("agentd is being stopped"))
	return e.Close()
}

func firstText(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func told(c checkpoint.Checkpoint) *posternv1.KernelCheckpoint {
	return &posternv1.KernelCheckpoint{
		Id: string(c.ID), KernelId: c.Kernel, Parent: string(c.Parent), Label: c.Label, Cell: c.Cell, Kind: c.Kind,
		Time: timestamppb.New(c.Time), Protected: c.Protected, Size: uint64(c.Size), Stored: uint64(c.Written),
	}
}

func toldSaved(s checkpoint.Saved, err error) (*posternv1.CheckpointKernelResponse, error) {
	if err != nil {
		return nil, err
	}
	return &posternv1.CheckpointKernelResponse{Checkpoint: told(s.Checkpoint), Standstill: durationpb.New(s.Standstill), Busy: s.Busy}, nil
}

// CheckKernel implements host.Checkpoints.
func (c checkpoints) CheckKernel(ctx context.Context, organization, id string) ([]*posternv1.KernelObstacle, error) {
	e, err := c.engine()
	if err != nil {
		return nil, err
	}
	found, err := e.Check(ctx, organization, id)
	var out []*posternv1.KernelObstacle
	for _, o := range found {
		out = append(out, &posternv1.KernelObstacle{Kind: o.Kind, Pid: int32(o.PID), Name: o.Name, What: o.What, Remedy: o.Remedy})
	}
	return out, err
}

// SaveKernel implements host.Checkpoints.
func (c checkpoints) SaveKernel(ctx context.Context, organization string, r *posternv1.CheckpointKernelRequest) (*posternv1.CheckpointKernelResponse, error) {
	e, err := c.engine()
	if err != nil {
		return nil, err
	}
	return toldSaved(e.Save(ctx, organization, r.KernelId, checkpoint.Label{Label: r.Label, Cell: r.Cell, Protected: r.Protected, Wait: r.Wait.AsDuration()}))
}

// SuspendKernel implements host.Checkpoints.
func (c checkpoints) SuspendKernel(ctx context.Context, organization, id string) (*posternv1.CheckpointKernelResponse, error) {
	e, err := c.engine()
	if err != nil {
		return nil, err
	}
	return toldSaved(e.Suspend(ctx, organization, id))
}

// ResumeKernel implements host.Checkpoints.
func (c checkpoints) ResumeKernel(ctx context.Context, organization, id string) error {
	e, err := c.engine()
	if err != nil {
		return err
	}
	return e.Resume(ctx, organization, id)
}

// RollbackKernel implements host.Checkpoints.
func (c checkpoints) RollbackKernel(ctx context.Context, organization, id, checkpoint string) error {
	e, err := c.engine()
	if err != nil {
		return err
	}
	return e.Rollback(ctx, organization, id, checkpoint)
}

// ForkKernel implements host.Checkpoints.
func (c checkpoints) ForkKernel(ctx context.Context, organization, from, checkpoint, id string) (string, error) {
	e, err := c.engine()
	if err != nil {
		return "", err
	}
	return e.Fork(ctx, organization, from, checkpoint, id)
}

// ListCheckpoints implements host.Checkpoints.
func (c checkpoints) ListCheckpoints(organization, id string) (out []*posternv1.KernelCheckpoint, damaged []string) {
	e, err := c.engine()
	if err != nil {
		return nil, nil
	}
	list, damaged := e.List(organization, id)
	for _, c := range list {
		out = append(out, told(c))
	}
	return out, damaged
}

// ofKernel refuses a checkpoint of another kernel.
func ofKernel(e *checkpoint.Engine, organization, id, wanted string) error {
	list, damaged := e.List(organization, id)
	for _, c := range list {
		if string(c.ID) == wanted {
			return nil
		}
	}
	for _, d := range damaged { // its kernel can't be told
		if d == wanted {
			return nil
		}
	}
	return proto.Errorf(proto.CodeNotFound, "kernel %s has no checkpoint %.64q", id, wanted)
}

// ProtectCheckpoint implements host.Checkpoints.
func (c checkpoints) ProtectCheckpoint(organization, id, wanted string, on bool) (*posternv1.KernelCheckpoint, error) {
	e, err := c.engine()
	if err == nil {
		err = ofKernel(e, organization, id, wanted)
	}
	if err != nil {
		return nil, err
	}
	p, err := e.Protect(organization, wanted, on)
	if err != nil {
		return nil, err
	}
	return told(p), nil
}

// DeleteCheckpoint implements host.Checkpoints.
func (c checkpoints) DeleteCheckpoint(ctx context.Context, organization, id, wanted string) error {
	e, err := c.engine()
	if err == nil {
		err = ofKernel(e, organization, id, wanted)
	}
	if err != nil {
		return err
	}
	return e.Delete(ctx, organization, wanted)
}
