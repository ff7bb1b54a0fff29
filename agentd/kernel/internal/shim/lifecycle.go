package shim

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// start starts the kernel's processes. The caller has life.
func (s *Shim) start(ctx context.Context) error {
	var key [32]byte
	if _, err := rand.Read(key[:]); err != nil {
		return err
	}
	s.mu.Lock()
	s.state.Generation++
	s.state.Epoch++
	s.state.Key, s.state.Started, s.state.Dead, s.state.Suspended = hex.EncodeToString(key[:]), time.Now().UTC(), "", false
	s.state.Sandbox, s.state.Checkpoint = nil, ""
	s.mu.Unlock()
	if err := s.unmark(ctx); err != nil {
		return err
	}
	if err := s.saveState(); err != nil {
		return err
	}
	if err := s.writeConnection(); err != nil {
		return fmt.Errorf("connection file: %w", err)
	}
	s.setPhase(posternv1.KernelState_KERNEL_STATE_STARTING, "")
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	box, err := sandbox.Start(ctx, s.spec.Sandbox)
	if err != nil {
		return s.died(nil, "it could not be started: "+oneLine(err.Error()))
	}
	return s.run(box)
}

// run takes a sandbox that runs and connects to it.
func (s *Shim) run(box *sandbox.Sandbox) error {
	spec := box.Spec()
	s.mu.Lock()
	s.box = box
	s.state.Sandbox = &spec
	s.mu.Unlock()
	if err := s.saveState(); err != nil {
		return err
	}
	s.follow(box)
	return nil
}

// follow watches a sandbox's end and connects to it.
func (s *Shim) follow(box *sandbox.Sandbox) {
	s.wg.Go(func() { s.watch(box) })
	s.connect(box)
}

// watch waits for the kernel's end.
func (s *Shim) watch(box *sandbox.Sandbox) {
	exit, err := box.Wait(s.ctx)
	if err != nil {
		return // the shim lets go
	}
	lost := s.filled(box)
	s.life.Lock()
	defer s.life.Unlock()
	s.mu.Lock()
	current := s.box == box
	s.mu.Unlock()
	if !current {
		return // restarted, stopped or suspended
	}
	if s.state.Suspended { // it was ended, and did not end in time
		s.mu.Lock()
		s.box = nil
		s.mu.Unlock()
		box.Close()
		s.suspended("")
		return
	}
	reason := exit.Reason
	if reason == "" {
		reason = fmt.Sprintf("ended with exit code %d", exit.Code)
	}
	if lost != nil {
		reason = s.lost(lost)
	}
	if err := s.died(box, reason); err != nil {
		s.logger.Error("a kernel's end not noted", "err", err)
	}
}

// died notes that the kernel's processes have ended by themselves, and tells
// everybody. The caller has life.
func (s *Shim) died(box *sandbox.Sandbox, reason string) error {
	s.logger.Warn("kernel died", "reason", reason)
	s.disconnect()
	s.mu.Lock()
	s.box = nil
	s.state.Dead = reason
	s.mu.Unlock()
	if box != nil {
		box.Close()
	}
	err := s.saveState()
	s.flushHeld()
	s.refuseAll("the kernel died: " + reason)
	s.say("status", map[string]string{"execution_state": "dead"})
	s.setPhase(posternv1.KernelState_KERNEL_STATE_DEAD, reason)
	s.refuseAll("the kernel is dead (" + reason + "): restart it") // what came before that was known
	return err
}

// end ends the kernel's processes. The caller has life.
func (s *Shim) end(ctx context.Context) error {
	s.mu.Lock()
	box := s.box
	s.box = nil
	s.mu.Unlock()
	s.disconnect()
	if box == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, killTime)
	defer cancel()
	if err := box.Kill(ctx); err != nil {
		s.mu.Lock()
		s.box = box
		s.mu.Unlock()
		return fmt.Errorf("end the kernel: %w", err)
	}
	box.Close()
	return nil
}

// Restart ends the kernel's processes and starts them anew.
func (s *Shim) Restart(ctx context.Context) error {
	if !s.restoring.TryLock() {
		return errRestoring
	}
	defer s.restoring.Unlock()
	s.life.Lock()
	defer s.life.Unlock()
	if err := errors.Join(s.usable(), s.held("")); err != nil {
		return err
	}
	s.setPhase(posternv1.KernelState_KERNEL_STATE_CHANGING, "restarting")
	s.say("status", map[string]string{"execution_state": "restarting"})
	if err := s.end(ctx); err != nil {
		return err
	}
	s.flushHeld()
	s.refuseAll("the kernel was restarted")
	s.mu.Lock()
	s.quiet = false
	s.mu.Unlock()
	return s.start(ctx)
}

// Stop ends the kernel for good; Serve returns.
func (s *Shim) Stop(ctx context.Context) error {
	s.life.Lock()
	defer s.life.Unlock()
	if err := s.end(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	spec := s.spec.Sandbox
	first := !s.stopped
	s.stopped = true
	s.mu.Unlock()
	if err := sandbox.Cleanup(ctx, spec); err != nil {
		return fmt.Errorf("clean up after the kernel: %w", err)
	}
	if first {
		s.flushHeld()
		s.say("status", map[string]string{"execution_state": "dead"})
		s.setPhase(posternv1.KernelState_KERNEL_STATE_DEAD, "stopped")
		close(s.finished)
	}
	return nil
}

// usable: the caller has life.
func (s *Shim) usable() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return errStopped
	}
	return nil
}

// Interrupt interrupts what the kernel runs.
func (s *Shim) Interrupt() error {
	s.mu.Lock()
	box, l, mode, dead := s.box, s.link, s.spec.InterruptMode, s.state.Dead
	s.mu.Unlock()
	if box == nil {
		return proto.Errorf(proto.CodeUnavailable, "the kernel does not run%s: restart it", because(dead))
	}
	if mode != "message" {
		return box.Interrupt()
	}
	if l == nil {
		return proto.Errorf(proto.CodeUnavailable, "the kernel is not connected at present: try again")
	}
	return l.own(jupyter.Control, "interrupt_request", nil)
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return " (" + reason + ")"
}
