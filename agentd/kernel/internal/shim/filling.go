package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/proto"
)

// fillingFile is the mark of a kernel that was restored lazily: see CRIU.
const fillingFile = "filling"

// What is said of a restore.
const (
	stillFilling  = "its memory is still being brought in"
	eagerlyBefore = "restored eagerly: "
)

// filling is memory of a kernel that is being brought in.
type filling struct {
	f    Filling
	box  *sandbox.Sandbox
	over chan struct{} // closed when nobody looks after it any more
}

// restoreTree restores lazily if the order says so, and eagerly otherwise.
func (s *Shim) restoreTree(ctx context.Context, o RestoreOrder, tree []byte) (pid int, f Filling, err error) {
	if err := s.unmark(ctx); err != nil {
		return 0, nil, err
	}
	if o.Lazy <= 0 {
		pid, err = s.criu.RestoreTree(ctx, o.CRIU, tree, o.Images)
		return pid, nil, err
	}
	began := time.Now()
	pid, f, eager, err := s.criu.RestoreLazily(ctx, o.CRIU, tree, o.Images, o.Lazy, filepath.Join(s.dir, fillingFile))
	if err == nil && eager != "" {
		s.logger.Warn("kernel restored eagerly", "reason", eager, "duration_seconds", time.Since(began).Seconds())
		s.mu.Lock()
		s.notice = eagerlyBefore + eager
		s.mu.Unlock()
	}
	return pid, f, err
}

// unmark forgets an earlier restore of a kernel that has no processes.
func (s *Shim) unmark(ctx context.Context) error {
	s.mu.Lock()
	one := s.filling
	s.mu.Unlock()
	if one != nil {
		select {
		case <-one.over: // at once: there is nothing to bring memory to
		case <-ctx.Done():
			return fmt.Errorf("an earlier restore does not end: %w", context.Cause(ctx))
		}
	}
	s.mu.Lock()
	s.filling, s.notice = nil, ""
	s.mu.Unlock()
	if err := os.Remove(filepath.Join(s.dir, fillingFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// fill watches memory that comes. box may be nil: its tree is gone already.
func (s *Shim) fill(box *sandbox.Sandbox, f Filling) {
	one := &filling{f: f, box: box, over: make(chan struct{})}
	s.mu.Lock()
	s.filling, s.notice = one, stillFilling
	s.mu.Unlock()
	began := time.Now()
	s.wg.Go(func() {
		defer close(one.over)
		select {
		case <-f.Done():
		case <-s.ctx.Done():
		}
		if s.ctx.Err() != nil { // the shim lets go; the next one takes it over
			f.Close()
			return
		}
		err := f.Err()
		f.Close()
		if err != nil && box != nil {
			// Whoever brought it ended the kernel; if that and its guard were killed together, we do.
			ctx, cancel := context.WithTimeout(context.Background(), killTime)
			defer cancel()
			if kerr := box.Kill(ctx); kerr != nil {
				s.logger.Error("kernel without its memory not ended", "err", kerr)
			}
		}
		if err == nil {
			s.logger.Info("all memory of the restored kernel is there, or it has ended", "duration_seconds", time.Since(began).Seconds())
			if rerr := os.Remove(filepath.Join(s.dir, fillingFile)); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
				s.logger.Error("mark of a lazy restore not removed", "err", rerr)
			}
		}
		s.mu.Lock()
		s.notice = ""
		s.mu.Unlock()
		s.signal()
	})
}

// filled is why a kernel that has ended was ended, if it was for want of its memory.
func (s *Shim) filled(box *sandbox.Sandbox) error {
	s.mu.Lock()
	one := s.filling
	s.mu.Unlock()
	if one == nil || one.box != box {
		return nil
	}
	select {
	case <-one.f.Done(): // at once: nothing is left to bring it to
		return one.f.Err()
	case <-time.After(killTime):
		s.logger.Error("who brings a kernel's memory in does not end with it")
		return nil
	case <-s.ctx.Done():
		return nil
	}
}

// lost is why a kernel died whose memory is not there.
func (s *Shim) lost(err error) string {
	s.mu.Lock()
	from := s.state.Checkpoint
	s.mu.Unlock()
	return oneLine(err.Error()) + ": it was restored from checkpoint " + from + ", roll back to that"
}

// fillTime bounds the wait for memory that comes: gigabytes take seconds.
const fillTime = 2 * time.Minute

// awaitFilled waits until a kernel has all of its memory: none can be dumped before.
func (s *Shim) awaitFilled(ctx context.Context, most time.Duration) error {
	s.mu.Lock()
	one := s.filling
	s.mu.Unlock()
	if one == nil {
		return nil
	}
	if most <= 0 || most > fillTime {
		most = fillTime
	}
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	select {
	case <-one.f.Done():
		return nil // if it never came the kernel is dead, which is found next
	case <-ctx.Done():
		return proto.Errorf(proto.CodeTimeout, "the kernel's memory is still being brought in after its restore: try again")
	case <-s.ctx.Done():
		return errStopped
	}
}

// unfilled is what an earlier shim left of a lazy restore: f is nil when all came. lost says
// that some never will.
func (s *Shim) unfilled(ctx context.Context) (f Filling, lost error) {
	if s.criu == nil {
		return nil, nil
	}
	mark := filepath.Join(s.dir, fillingFile)
	busy, err := s.criu.AwaitFilled(ctx, mark, false)
	if err != nil {
		return nil, err
	}
	if !busy {
		if err := os.Remove(mark); err != nil && !errors.Is(err, os.ErrNotExist) {
			s.logger.Error("mark of a lazy restore not removed", "err", err)
		}
		return nil, nil
	}
	o := &others{done: make(chan struct{})}
	o.ctx, o.cancel = context.WithCancel(s.ctx)
	s.wg.Go(func() {
		defer close(o.done)
		if _, err := s.criu.AwaitFilled(o.ctx, mark, true); o.ctx.Err() == nil {
			o.err = err
		}
	})
	return o, nil
}

// others is the Filling of an earlier shim's restore.
type others struct {
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}
	err    error
}

func (o *others) Done() <-chan struct{} { return o.done }
func (o *others) Err() error            { return o.err }

// Close implements Filling.
func (o *others) Close() {
	o.cancel()
	<-o.done
}
