package notebook

import (
	"context"
	"errors"
	"fmt"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/notebook"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// book is what is known of a notebook's kernel.
type book struct {
	// places is held by the one run that uses the kernel and what follows below it.
	places chan struct{}

	// Guarded by Service.mu.
	newest *run // the last one that came for this kernel
	used   uint64
	waits  int // runs that hold the book or wait for it
	// stale ends the cell that running leads to; nil: none runs.
	stale   context.CancelCauseFunc
	running notebook.State

	// Guarded by places.
	owner   string // the token's id
	session *notebook.Session
	mark    mark
}

// mark is what shows that somebody else has put a kernel into another state.
type mark struct {
	generation uint64
	checkpoint string
}

func markOf(k *posternv1.AgentKernel) mark {
	return mark{k.Kernel.GetGeneration(), k.Kernel.GetCheckpoint()}
}

// errStale is the cause of a cell's end when a later call does not want it any more.
var errStale = errors.New("the cell was changed while it ran")

// errSuperseded ends a run whose place a later one has taken.
var errSuperseded = errors.New("superseded")

// take makes a run the newest of a kernel, and returns the book when it is its turn. What
// runs in the kernel and is not wanted by d any more is interrupted.
func (s *Service) take(r *run, id string, d *notebook.Document) (*book, error) {
	s.mu.Lock()
	b := s.books[id]
	if b == nil {
		s.forgetLocked()
		b = &book{places: make(chan struct{}, 1)}
		s.books[id] = b
	}
	s.clock++
	b.used, b.newest = s.clock, r
	b.waits++
	if b.stale != nil && !notebook.Wanted(d.Spec, d, b.running) {
		b.stale(errStale)
	}
	s.mu.Unlock()
	select {
	case b.places <- struct{}{}:
		return b, nil
	case <-r.ctx.Done():
		s.mu.Lock()
		defer s.mu.Unlock()
		b.waits--
		return nil, context.Cause(r.ctx)
	}
}

// forgetLocked makes room for another book. Those in use stay.
func (s *Service) forgetLocked() {
	for len(s.books) >= maxBooks {
		oldest := ""
		for id, b := range s.books {
			if b.waits == 0 && (oldest == "" || b.used < s.books[oldest].used) {
				oldest = id
			}
		}
		if oldest == "" {
			return // as many as there are runs, which are fewer
		}
		delete(s.books, oldest)
	}
}

func (s *Service) giveBack(b *book) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b.waits--
	<-b.places
}

// superseded reports whether a later run waits for the book.
func (s *Service) superseded(b *book, r *run) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return b.newest != r
}

func (s *Service) kernel(c Caller, k *posternv1.AgentKernel) *kernel {
	return &kernel{kernels: s.cfg.Kernels, caller: c, id: k.Kernel.GetId(), client: "notebook-" + jupyter.NewID(), note: func(string) {}}
}

// Sync brings a kernel in step with cells.
func (s *Service) Sync(ctx context.Context, c Caller, m *posternv1.SyncNotebookRequest, send func(*posternv1.NotebookEvent) error) error {
	limit, err := timeout(m.CellTimeout)
	switch {
	case err != nil:
		return err
	case m.KernelId == "" && m.Agent == "":
		return proto.Errorf(proto.CodeInvalid, "the request names neither a kernel nor an agent for a new one")
	case m.KernelId != "" && (m.Agent != "" || m.Spec != "" || len(m.Mounts) > 0):
		return proto.Errorf(proto.CodeInvalid, "agent, spec and mounts are for a new kernel, and the request names one that is there")
	}
	return s.start(ctx, c, m.Cells, send, func(r *run) error { return s.sync(r, m, notebook.Options{Timeout: limit}) })
}

func (s *Service) sync(r *run, m *posternv1.SyncNotebookRequest, wish notebook.Options) (err error) {
	fresh := m.KernelId == ""
	var found *posternv1.AgentKernel
	if fresh {
		found, err = s.cfg.Kernels.Start(r.ctx, r.caller, m.Agent, m.Spec, m.Mounts)
	} else {
		found, err = s.cfg.Kernels.Get(r.ctx, r.caller, m.KernelId)
	}
	if err != nil {
		return err
	}
	if owner := found.Kernel.GetOwner().GetTokenId(); owner != r.caller.TokenId {
		return proto.Errorf(proto.CodeRoleDenied, "kernel %s is of token %s: others may see, interrupt and stop it, not use it", found.Kernel.GetId(), found.Kernel.GetOwner().GetTokenName())
	}
	d := document(found.Kernel.GetSpec(), m.Cells)
	b, err := s.take(r, found.Kernel.GetId(), d)
	if err != nil {
		return err
	}
	defer s.giveBack(b)
	if s.superseded(b, r) {
		r.ended(&posternv1.NotebookEnded{Superseded: true})
		return nil
	}
	k := s.kernel(r.caller, found)
	k.plain = m.NoCheckpoints
	defer k.leave()
	o := r.watch(k)
	o.Timeout = wish.Timeout
	if fresh { // its id must not be lost with what comes
		r.began(found, 0, len(filled(m.Cells)))
	}
	if err := s.open(r, b, k, found, d, fresh); err != nil {
		b.session = nil
		if fresh {
			k.stop(r.ctx)
		}
		return err
	}
	b.session.Options, b.session.Kernel, b.session.Checkpoints = o, k, k
	if !fresh {
		keep, run := b.session.Stale(d)
		r.began(found, keep, run)
	}
	err = s.follow(r, b, d)
	s.remember(r, b, k)
	switch {
	case errors.Is(err, errSuperseded):
		r.ended(&posternv1.NotebookEnded{Superseded: true})
	case err != nil:
		return err
	default:
		failed := r.told
		steps := 0
		if b.session != nil {
			failed, steps = b.session.Failed(), len(b.session.Steps)
		}
		if failed != nil && r.told != failed { // it failed in an earlier call, and stands as it is
			again := *failed
			again.Index = filled(r.cells)[steps]
			r.failed(&again, r.cells[again.Index].GetId(), 0, "[]", 0)
		}
		r.ended(&posternv1.NotebookEnded{Ok: failed == nil})
	}
	return nil
}

// remember notes how a run leaves its kernel.
func (s *Service) remember(r *run, b *book, k *kernel) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), interruptTime)
	defer cancel()
	now, err := s.cfg.Kernels.Get(ctx, r.caller, k.id)
	if err != nil {
		b.session = nil // its checkpoints tell
		return
	}
	b.mark = markOf(now)
}

// open makes a book's session fit its kernel as it is.
func (s *Service) open(r *run, b *book, k *kernel, found *posternv1.AgentKernel, d *notebook.Document, fresh bool) error {
	anew := fresh
	switch found.Kernel.GetState() {
	case posternv1.KernelState_KERNEL_STATE_SUSPENDED:
		if err := s.cfg.Kernels.ResumeKernel(r.ctx, r.caller, &posternv1.KernelCheckpointRequest{KernelId: k.id}); err != nil {
			return fmt.Errorf("resume kernel %s: %w", k.id, err)
		}
		r.note("the kernel is back from its host's disk")
		b.session, anew = nil, true
	case posternv1.KernelState_KERNEL_STATE_DEAD:
		if err := k.Restart(r.ctx); err != nil {
			return err
		}
		b.session, anew = nil, true
	}
	// What another client went back to makes what is known here worthless.
	if b.session == nil || b.owner != r.caller.TokenId || b.session.Spec != d.Spec || markOf(found) != b.mark {
		before := b.session
		if b.owner != r.caller.TokenId {
			before = nil
		}
		b.owner, b.session = r.caller.TokenId, &notebook.Session{Spec: d.Spec}
		if !fresh && !k.plain {
			list, err := s.cfg.Kernels.ListCheckpoints(r.ctx, r.caller, &posternv1.KernelCheckpointRequest{KernelId: k.id})
			if err != nil {
				return err
			}
			b.session.Recall(d, kept(list.Checkpoints))
			carryOver(b.session, before, found.Kernel, list.Checkpoints)
		}
		b.session.Dirty = !fresh
	}
	if err := k.attach(r.ctx, false); err != nil {
		return err
	}
	if anew {
		if err := k.ready(r.ctx); err != nil {
			return err
		}
	}
	if k.plain || b.session.Base != "" || len(b.session.Steps) > 0 {
		return nil
	}
	if !fresh { // nothing is known of what ran in it
		if err := k.Restart(r.ctx); err != nil {
			return err
		}
		if err := k.ready(r.ctx); err != nil {
			return err
		}
	}
	id, err := k.Checkpoint(r.ctx, notebook.Start(d.Spec).String())
	if err != nil {
		return err
	}
	b.session.Base, b.session.Dirty = id, false
	return nil
}

// carryOver gives a session what an earlier one knew of a kernel that was moved to another
// host since: its checkpoints stayed behind, but for the one that it came of, which is the
// state after the last step.
func carryOver(now, before *notebook.Session, k *posternv1.Kernel, list []*posternv1.KernelCheckpoint) {
	if before == nil || before.Dirty || before.Spec != now.Spec || len(before.Steps) == 0 {
		return
	}
	last := before.Steps[len(before.Steps)-1].Checkpoint
	stayed := last != ""
	var came *posternv1.KernelCheckpoint
	for _, p := range list {
		stayed = stayed && p.Id != last
		if p.Id == k.GetCheckpoint() {
			came = p
		}
	}
	if !stayed || came == nil || came.Kind != "suspend" || came.Parent != last {
		return
	}
	now.Steps = nil
	for _, step := range before.Steps {
		now.Steps = append(now.Steps, notebook.Step{State: step.State})
	}
	now.Steps[len(now.Steps)-1].Checkpoint = came.Id
}

// kept are a kernel's checkpoints of notebooks, by their states; the newest of each.
func kept(list []*posternv1.KernelCheckpoint) map[string]string {
	kept := map[string]string{}
	for _, p := range list { // oldest first
		if state, ok := stateOf(p); ok {
			kept[state] = p.Id
		}
	}
	return kept
}

// follow takes a session step by step to a document.
func (s *Service) follow(r *run, b *book, d *notebook.Document) error {
	recalled := false
	for !b.session.Done(d) {
		if s.superseded(b, r) {
			return errSuperseded
		}
		err := s.step(r, b, d)
		var failed *notebook.CellError
		switch {
		case err == nil:
		case errors.As(err, &failed):
			r.told = failed
		case errors.Is(err, errStale):
		case proto.CodeOf(err) == proto.CodeNotFound && !recalled && r.ctx.Err() == nil:
			// A checkpoint that the host's limits removed since: with what there is.
			recalled = true
			list, lerr := s.cfg.Kernels.ListCheckpoints(r.ctx, r.caller, &posternv1.KernelCheckpointRequest{KernelId: b.session.Kernel.(*kernel).id})
			if lerr != nil {
				return err
			}
			b.session.Recall(d, kept(list.Checkpoints))
		default:
			return err
		}
	}
	return nil
}

// step is a session's next step, which a later run may cut short.
func (s *Service) step(r *run, b *book, d *notebook.Document) error {
	ctx, cancel := context.WithCancelCause(r.ctx)
	defer cancel(nil)
	if state, runs := b.session.Running(d); runs {
		s.mu.Lock()
		b.stale, b.running = cancel, state
		s.mu.Unlock()
		defer func() {
			s.mu.Lock()
			b.stale = nil
			s.mu.Unlock()
		}()
	}
	_, err := b.session.Step(ctx, d)
	if errors.Is(context.Cause(ctx), errStale) && r.ctx.Err() == nil {
		var failed *notebook.CellError
		if err != nil && !errors.As(err, &failed) {
			return errStale
		}
	}
	return err
}
