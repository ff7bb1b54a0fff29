package kernel

import (
	"context"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// CheckpointAgent is what an agent does with checkpoints, see CheckpointHostService.
type CheckpointAgent interface {
	CheckKernel(context.Context, *posternv1.KernelCheckpointRequest) (*posternv1.CheckKernelResponse, error)
	CheckpointKernel(context.Context, *posternv1.CheckpointKernelRequest) (*posternv1.CheckpointKernelResponse, error)
	SuspendKernel(context.Context, *posternv1.KernelCheckpointRequest) (*posternv1.CheckpointKernelResponse, error)
	ResumeKernel(context.Context, *posternv1.KernelCheckpointRequest) (*posternv1.Kernel, error)
	RollbackKernel(context.Context, *posternv1.KernelCheckpointRequest) (*posternv1.Kernel, error)
	ForkKernel(context.Context, *posternv1.ForkKernelRequest) (*posternv1.ForkKernelResponse, error)
	ListCheckpoints(context.Context, *posternv1.KernelCheckpointRequest) (*posternv1.ListCheckpointsResponse, error)
	ProtectCheckpoint(context.Context, *posternv1.ProtectCheckpointRequest) (*posternv1.KernelCheckpoint, error)
	DeleteCheckpoint(context.Context, *posternv1.KernelCheckpointRequest) (*posternv1.DeleteCheckpointResponse, error)
}

// checkpointTime bounds an operation that copies a kernel's memory: the agent has closer
// bounds, by its size.
const checkpointTime = 15 * time.Minute

// passOn asks the agent that has a kernel, for who owns it, and records it unless action
// is empty.
func passOn[Q, R any](ctx context.Context, s *Service, c Caller, id, checkpoint, action string, limit time.Duration, q *Q, do func(Agent, context.Context, *Q) (*R, error)) (*R, error) {
	row, agent, l, err := s.reach(ctx, c, id, true)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	r, err := do(l, ctx, q)
	if err != nil && s.unheld(ctx, row, l, err) {
		if row, agent, l, err = s.reach(ctx, c, id, true); err == nil {
			r, err = do(l, ctx, q)
		}
	}
	if action != "" {
		aerr := s.audit(ctx, c, action, agent, id, err, func(e *auditchain.Entry) { e.Statement = about(checkpoint, r) })
		if err == nil {
			err = aerr
		}
	}
	if err != nil {
		if checkpoint == "" { // else it may be the checkpoint that is not there
			err = s.gone(ctx, row, err)
		}
		return nil, err
	}
	return r, nil
}

// about names the checkpoint that an entry is about.
func about(checkpoint string, r any) string {
	switch r := r.(type) {
	case *posternv1.CheckpointKernelResponse:
		checkpoint = r.GetCheckpoint().GetId()
	case *posternv1.ForkKernelResponse:
		return "checkpoint " + r.GetCheckpointId() + ", new kernel " + r.GetKernel().GetId()
	}
	if checkpoint == "" {
		return ""
	}
	return "checkpoint " + checkpoint
}

// CheckKernel asks what stands in the way of a checkpoint.
func (s *Service) CheckKernel(ctx context.Context, c Caller, r *posternv1.KernelCheckpointRequest) (*posternv1.CheckKernelResponse, error) {
	r.Principal = c.Principal
	return passOn(ctx, s, c, r.KernelId, "", "", time.Minute, r, Agent.CheckKernel)
}

// CheckpointKernel saves a kernel, which goes on.
func (s *Service) CheckpointKernel(ctx context.Context, c Caller, r *posternv1.CheckpointKernelRequest) (*posternv1.CheckpointKernelResponse, error) {
	r.Principal = c.Principal
	return passOn(ctx, s, c, r.KernelId, "", "kernel.checkpoint", checkpointTime, r, Agent.CheckpointKernel)
}

// SuspendKernel saves a kernel and ends its processes.
func (s *Service) SuspendKernel(ctx context.Context, c Caller, r *posternv1.KernelCheckpointRequest) (*posternv1.CheckpointKernelResponse, error) {
	r.Principal = c.Principal
	return passOn(ctx, s, c, r.KernelId, "", "kernel.suspend", checkpointTime, r, Agent.SuspendKernel)
}

// ResumeKernel brings a suspended kernel back.
func (s *Service) ResumeKernel(ctx context.Context, c Caller, r *posternv1.KernelCheckpointRequest) (*posternv1.Kernel, error) {
	r.Principal = c.Principal
	return passOn(ctx, s, c, r.KernelId, "", "kernel.resume", checkpointTime, r, Agent.ResumeKernel)
}

// RollbackKernel puts a kernel back to a checkpoint.
func (s *Service) RollbackKernel(ctx context.Context, c Caller, r *posternv1.KernelCheckpointRequest) (*posternv1.Kernel, error) {
	if r.CheckpointId == "" {
		return nil, proto.Errorf(proto.CodeInvalid, "the request names no checkpoint")
	}
	r.Principal = c.Principal
	return passOn(ctx, s, c, r.KernelId, r.CheckpointId, "kernel.rollback", checkpointTime, r, Agent.RollbackKernel)
}

// ForkKernel makes a second kernel, which belongs to the caller, on the same agent.
func (s *Service) ForkKernel(ctx context.Context, c Caller, r *posternv1.ForkKernelRequest) (*posternv1.ForkKernelResponse, error) {
	row, _, l, err := s.reach(ctx, c, r.KernelId, true)
	if err != nil {
		return nil, err
	}
	fork := Row{ID: newID(), Agent: row.Agent, Owner: c.Principal, Spec: row.Spec, Language: row.Language, Started: time.Now()}
	if err := s.cfg.Store.InsertKernel(ctx, fork); err != nil {
		return nil, err
	}
	r.Principal, r.NewKernelId = c.Principal, fork.ID
	resp, err := passOn(ctx, s, c, r.KernelId, r.CheckpointId, "kernel.fork", checkpointTime, r, Agent.ForkKernel)
	if err != nil {
		s.undo(ctx, c, l, fork, err, false)
		return nil, err
	}
	if err := s.cfg.Secrets.Forked(ctx, c, r.KernelId, fork); err != nil {
		s.undo(ctx, c, l, fork, err, true)
		return nil, err
	}
	return resp, nil
}

// ListCheckpoints lists a kernel's checkpoints.
func (s *Service) ListCheckpoints(ctx context.Context, c Caller, r *posternv1.KernelCheckpointRequest) (*posternv1.ListCheckpointsResponse, error) {
	r.Principal = c.Principal
	return passOn(ctx, s, c, r.KernelId, "", "", agentTime, r, Agent.ListCheckpoints)
}

// ProtectCheckpoint keeps a checkpoint, or lets it be deleted by the host's limits.
func (s *Service) ProtectCheckpoint(ctx context.Context, c Caller, r *posternv1.ProtectCheckpointRequest) (*posternv1.KernelCheckpoint, error) {
	if r.CheckpointId == "" {
		return nil, proto.Errorf(proto.CodeInvalid, "the request names no checkpoint")
	}
	r.Principal = c.Principal
	return passOn(ctx, s, c, r.KernelId, r.CheckpointId, "kernel.checkpoint.protect", agentTime, r, Agent.ProtectCheckpoint)
}

// DeleteCheckpoint removes a checkpoint.
func (s *Service) DeleteCheckpoint(ctx context.Context, c Caller, r *posternv1.KernelCheckpointRequest) (*posternv1.DeleteCheckpointResponse, error) {
	if r.CheckpointId == "" {
		return nil, proto.Errorf(proto.CodeInvalid, "the request names no checkpoint")
	}
	r.Principal = c.Principal
	return passOn(ctx, s, c, r.KernelId, r.CheckpointId, "kernel.checkpoint.delete", startTime, r, Agent.DeleteCheckpoint)
}
