package shim

import (
	"context"
	"maps"
	"time"

	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/agentd/kernel/internal/zmtp"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Quiesced is how a kernel was found when its sockets were closed.
type Quiesced struct {
	// Busy: it was in the middle of a request. What it prints until it is connected
	// again is lost; its reply is not (see sweep).
	Busy bool `json:"busy"`
	// Requests were sent and not answered.
	Requests int `json:"requests"`
	// InitPID is init's process id on the host.
	InitPID int `json:"init_pid"`
	// Sequence is the newest message's.
	Sequence uint64 `json:"sequence"`
}

// Quiesce holds back what clients send, waits until the kernel has answered what it was
// sent, wait at most, and closes all sockets to it. Clients stay attached; their
// messages wait. Resume, TakeOver or Restart ends it; the journal is on the disk when it
// returns.
//
// What the kernel was given of secrets it has erased then (BeforeCheckpoint); they are put
// back with the next connection. A kernel that does not erase them is not quiesced.
func (s *Shim) Quiesce(ctx context.Context, wait time.Duration) (Quiesced, error) {
	return s.quiesce(ctx, wait, true)
}

// quiesce: without erase the processes are not to be saved.
func (s *Shim) quiesce(ctx context.Context, wait time.Duration, erase bool) (Quiesced, error) {
	s.life.Lock()
	defer s.life.Unlock()
	if err := s.usable(); err != nil {
		return Quiesced{}, err
	}
	s.mu.Lock()
	box, quiet, phase, reason := s.box, s.quiet, s.phase, s.reason
	s.mu.Unlock()
	switch {
	case box == nil:
		return Quiesced{}, proto.Errorf(proto.CodeUnavailable, "the kernel does not run%s", because(reason))
	case quiet:
		return Quiesced{}, proto.Errorf(proto.CodeUnavailable, "the kernel is being checkpointed already: try again")
	case phase == posternv1.KernelState_KERNEL_STATE_STARTING:
		return Quiesced{}, proto.Errorf(proto.CodeUnavailable, "the kernel has not answered yet: try again when it is idle")
	}
	for _, q := range s.queues {
		q.open(nil)
	}
	deadline := time.Now().Add(wait)
	for (s.hasRequests() || s.hasUndone()) && time.Now().Before(deadline) && ctx.Err() == nil {
		time.Sleep(2 * time.Millisecond)
	}
	if erase {
		if err := s.BeforeCheckpoint(ctx); err != nil {
			s.reopen()
			return Quiesced{}, err
		}
	}
	out := Quiesced{InitPID: box.PID()}
	s.mu.Lock()
	for _, r := range s.requests {
		if !r.queued {
			out.Requests++
			out.Busy = out.Busy || r.Channel == jupyter.Shell
		}
	}
	s.quiet = true
	s.mu.Unlock()
	s.setPhase(posternv1.KernelState_KERNEL_STATE_CHANGING, "checkpoint")
	s.disconnect()
	out.Sequence = s.journal.Last()
	if err := s.journal.Sync(); err != nil {
		s.logger.Error("journal not synced", "err", err)
	}
	return out, nil
}

// reopen lets clients' messages go to the kernel again.
func (s *Shim) reopen() {
	s.mu.Lock()
	var conns map[string]*zmtp.Conn
	if s.link != nil {
		conns = maps.Clone(s.link.conns)
	}
	s.mu.Unlock()
	for name, q := range s.queues {
		if conn := conns[name]; conn != nil {
			q.open(conn)
		}
	}
}

// Resume connects to the kernel again, which went on running or goes on now.
func (s *Shim) Resume() error {
	s.life.Lock()
	defer s.life.Unlock()
	s.mu.Lock()
	box, quiet := s.box, s.quiet
	s.mu.Unlock()
	if box == nil || !quiet {
		return proto.Errorf(proto.CodeInvalid, "the kernel is not quiesced")
	}
	return s.again(box)
}

// again begins a new epoch. The caller has life.
func (s *Shim) again(box *sandbox.Sandbox) error {
	s.mu.Lock()
	s.quiet = false
	s.state.Epoch++
	s.mu.Unlock()
	// A full disk must not keep a kernel from going on: see open for an epoch unsaved.
	if err := s.saveState(); err != nil {
		s.logger.Error("state not saved", "err", err)
	}
	s.connect(box)
	return nil
}

// Sandbox is the kernel's sandbox; nil when there is none.
func (s *Shim) Sandbox() *sandbox.Sandbox {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.box
}

// Suspend forgets the processes of a quiesced kernel: they are on disk, and it ends
// them. State says so before, durably.
func (s *Shim) Suspend(ctx context.Context, checkpoint string) error {
	s.life.Lock()
	defer s.life.Unlock()
	s.mu.Lock()
	quiet := s.quiet
	s.mu.Unlock()
	if !quiet {
		return proto.Errorf(proto.CodeInvalid, "the kernel is not quiesced")
	}
	if err := s.forget(ctx, checkpoint); err != nil {
		return err
	}
	s.suspended("")
	return nil
}

// forget notes that the kernel is what checkpoint is, and ends its processes. They may
// end later when it fails: see watch. The caller has life.
func (s *Shim) forget(ctx context.Context, checkpoint string) error {
	s.mu.Lock()
	before := s.state
	s.state.Suspended, s.state.Dead, s.state.Checkpoint = true, "", checkpoint
	s.mu.Unlock()
	if err := s.saveState(); err != nil {
		s.mu.Lock()
		s.state = before
		s.mu.Unlock()
		return err
	}
	return s.end(ctx)
}

// suspended tells everybody. The caller has life.
func (s *Shim) suspended(reason string) {
	s.mu.Lock()
	s.quiet = false
	s.mu.Unlock()
	s.setPhase(posternv1.KernelState_KERNEL_STATE_SUSPENDED, reason)
}

// TakeOver makes restored processes the kernel's. Those that it had must have been ended
// by Forget or Suspend. Requests that the kernel was sent after the checkpoint are
// answered in its place: the processes do not know of them.
func (s *Shim) TakeOver(box *sandbox.Sandbox, checkpoint string) error {
	s.life.Lock()
	defer s.life.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	s.mu.Lock()
	busy := s.box != nil
	s.mu.Unlock()
	if busy {
		return proto.Errorf(proto.CodeInvalid, "the kernel has processes already")
	}
	s.mu.Lock()
	s.state.Generation++
	s.state.Epoch++
	s.state.Suspended, s.state.Dead, s.state.Checkpoint = false, "", checkpoint
	s.state.Started = time.Now().UTC()
	s.quiet = false
	s.mu.Unlock()
	s.setPhase(posternv1.KernelState_KERNEL_STATE_CHANGING, "restored")
	return s.run(box)
}

// Forget ends the processes of a kernel that is quiesced or has none, to be replaced by
// TakeOver. From then on the kernel is suspended with the checkpoint, until TakeOver.
func (s *Shim) Forget(ctx context.Context, checkpoint string) error {
	s.life.Lock()
	defer s.life.Unlock()
	s.setPhase(posternv1.KernelState_KERNEL_STATE_CHANGING, "restoring")
	return s.forget(ctx, checkpoint)
}
