package checkpoint

import (
	"context"

	"github.com/postern-dev/postern/agentd/checkpoint/pagestore"
	"github.com/postern-dev/postern/proto"
)

// List returns the checkpoints of a kernel, oldest first, and the ids of those whose
// description is damaged. An empty kernel means all of the organization.
func (e *Engine) List(organization, kernel string) (list []Checkpoint, damaged []string) {
	list, bad := e.store.List(organization, kernel)
	for _, id := range bad {
		damaged = append(damaged, string(id))
	}
	return list, damaged
}

// Protect keeps a checkpoint from being deleted by the host's limits, or lets it be.
func (e *Engine) Protect(organization, checkpoint string, on bool) (Checkpoint, error) {
	if _, err := e.find(organization, checkpoint); err != nil {
		return Checkpoint{}, err
	}
	if err := e.store.Protect(pagestore.ID(checkpoint), on); err != nil {
		return Checkpoint{}, err
	}
	return e.store.Get(pagestore.ID(checkpoint))
}

// Delete removes a checkpoint. One that a suspended kernel is in is refused.
func (e *Engine) Delete(ctx context.Context, organization, checkpoint string) error {
	c, err := e.find(organization, checkpoint)
	if err != nil {
		return err
	}
	if k, err := e.cfg.Kernels.Look(ctx, c.Kernel); err == nil && k.Suspended && k.Checkpoint == checkpoint {
		return proto.Errorf(proto.CodeInvalid, "checkpoint %s is all that there is of kernel %s, which is suspended: resume or stop that first", checkpoint, c.Kernel)
	}
	e.spool.kept.dropCheckpoint(c.ID)
	if err := e.store.Delete(c.ID); err != nil {
		return err
	}
	e.collectSoon()
	return nil
}

// Forget removes all checkpoints of a kernel that was stopped for good. Its forks need
// none of them: each checkpoint is whole by itself.
func (e *Engine) Forget(organization, kernel string) error {
	e.spool.kept.drop(kernel)
	list, _ := e.store.List(organization, kernel)
	for _, c := range list {
		if err := e.store.Delete(c.ID); err != nil {
			return err
		}
	}
	e.collectSoon()
	return nil
}
