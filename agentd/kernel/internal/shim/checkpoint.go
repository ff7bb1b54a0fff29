package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// CRIU saves and restores a kernel's processes. tree is a sandbox.CRIUSpec as JSON, path
// CRIU's program by the configuration or empty. Every call is bounded by its context and
// by a deadline of its own.
type CRIU interface {
	// DumpTree writes images and copies the directory from, as it is while the tree stands
	// still, to another one; max bounds its bytes. stay leaves the tree stopped. After an
	// error the tree runs on.
	DumpTree(ctx context.Context, path string, tree []byte, images string, stay bool, from, to string, max int64) (standstill time.Duration, err error)
	// RestoreTree returns init's process id; init is this process's child. After an error
	// nothing of it is left.
	RestoreTree(ctx context.Context, path string, tree []byte, images string) (pid int, err error)
	// RestoreLazily is RestoreTree for a tree with more than over bytes of memory that can
	// come while it runs already. filling is nil if it is all there; eager is why then, where
	// it has as much. mark is a path for a file that says how far it is. The caller must not
	// dump the tree before filling is done, and must Close it; when its Err is another than
	// nil the tree was ended.
	RestoreLazily(ctx context.Context, path string, tree []byte, images string, over int64, mark string) (pid int, filling Filling, eager string, err error)
	// AwaitFilled asks a mark of an earlier process's: busy, memory still comes; an error, but
	// the context's, says that some never will. wait has it wait until it is not busy.
	AwaitFilled(ctx context.Context, mark string, wait bool) (busy bool, err error)
	// Continue lets a tree go on that DumpTree left stopped; it does nothing to others.
	Continue(pid int)
}

// Filling is memory of a restored tree that is being brought in. Err is valid when Done is
// closed; Close lets go of it, and it goes on.
type Filling = interface {
	Done() <-chan struct{}
	Err() error
	Close()
}

// DumpOrder is what Dump is to do; the directories are absolute, those for Images and
// Private are there and empty.
type DumpOrder struct {
	CRIU       string        `json:"criu,omitempty"`
	Images     string        `json:"images"`
	Private    string        `json:"private"`
	MaxPrivate int64         `json:"max_private,omitempty"`
	Stay       bool          `json:"stay,omitempty"`
	Wait       time.Duration `json:"wait,omitempty"`
	// Timeout bounds the dump; zero means two minutes.
	Timeout time.Duration `json:"timeout,omitempty"`
	// Move is the move that the dump is for, if any: see Hold.
	Move string `json:"move,omitempty"`
}

// Dumped is what a dump came to.
type Dumped struct {
	// Kernel is what Restore needs beside the images: a Saved as JSON.
	Kernel     json.RawMessage `json:"kernel"`
	Busy       bool            `json:"busy,omitempty"`
	Standstill time.Duration   `json:"standstill"`
}

// Saved is what belongs to the saved processes and is not in their images.
type Saved struct {
	Spec    Spec          `json:"spec"`
	Key     string        `json:"key"`
	Sandbox *sandbox.Spec `json:"sandbox"`
	// Generation and Epoch go on from here on another host.
	Generation uint64 `json:"generation,omitempty"`
	Epoch      uint64 `json:"epoch,omitempty"`
}

// RestoreOrder is what Restore is to do.
type RestoreOrder struct {
	CRIU   string `json:"criu,omitempty"`
	Images string `json:"images"`
	// Private replaces the private directory by a rename; empty: it stays as it is.
	Private    string          `json:"private,omitempty"`
	Kernel     json.RawMessage `json:"kernel"`
	Checkpoint string          `json:"checkpoint"`
	// Timeout bounds the restore; zero means two minutes.
	Timeout time.Duration `json:"timeout,omitempty"`
	// Move is the move that the restore is for, if any: see Hold.
	Move string `json:"move,omitempty"`
	// Why is fork, rollback, resume or move, and SavedAt when the checkpoint was made: the
	// kernel is told.
	Why     string    `json:"why,omitempty"`
	SavedAt time.Time `json:"saved_at,omitzero"`
	// Lazy is the memory in bytes over which the kernel runs before all of it is there; 0:
	// it never does.
	Lazy int64 `json:"lazy,omitempty"`
}

const (
	criuTime = 2 * time.Minute
	// stayTime is how long a kernel that was dumped to be suspended stays stopped: then
	// who asked has died, and the kernel goes on.
	stayTime = 10 * time.Minute
)

var errRestoring = proto.Errorf(proto.CodeUnavailable, "the kernel is being restored: try again when it is done")

var errNoCRIU = proto.Errorf(proto.CodeUnavailable, "this shim makes no checkpoints")

// Dump saves the kernel. On an error it goes on, its channels open.
func (s *Shim) Dump(ctx context.Context, o DumpOrder) (Dumped, error) {
	if s.criu == nil {
		return Dumped{}, errNoCRIU
	}
	if err := s.held(o.Move); err != nil {
		return Dumped{}, err
	}
	if err := s.awaitFilled(ctx, o.Timeout); err != nil {
		return Dumped{}, err
	}
	q, err := s.Quiesce(ctx, o.Wait)
	if err != nil {
		return Dumped{}, err
	}
	d, err := s.dump(ctx, o)
	if err != nil || !o.Stay {
		// The kernel may have died meanwhile; then nobody waits for it.
		if rerr := s.Resume(); rerr != nil && err == nil {
			err = rerr
		}
		d.Busy = q.Busy
		return d, err
	}
	s.mu.Lock()
	s.stay = time.AfterFunc(stayTime, func() {
		s.logger.Warn("kernel goes on: who suspends it did not come back")
		if err := s.GoOn(); err != nil {
			s.logger.Error("stopped kernel did not go on", "err", err)
		}
	})
	s.mu.Unlock()
	d.Busy = q.Busy
	return d, nil
}

func (s *Shim) dump(ctx context.Context, o DumpOrder) (d Dumped, err error) {
	if o.Timeout <= 0 {
		o.Timeout = criuTime
	}
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	s.mu.Lock()
	box := s.box
	saved := Saved{Spec: s.spec, Key: s.state.Key, Sandbox: s.state.Sandbox, Generation: s.state.Generation, Epoch: s.state.Epoch}
	s.mu.Unlock()
	if box == nil {
		return d, proto.Errorf(proto.CodeUnavailable, "the kernel does not run")
	}
	c, err := box.Checkpointing()
	if err != nil {
		return d, err
	}
	tree, err := json.Marshal(c)
	if err != nil {
		return d, err
	}
	if d.Kernel, err = json.Marshal(saved); err != nil {
		return d, err
	}
	d.Standstill, err = s.criu.DumpTree(ctx, o.CRIU, tree, o.Images, o.Stay, box.Spec().PrivateDir, o.Private, o.MaxPrivate)
	return d, err
}

// unstay ends the wait for who suspends; true if there was one.
func (s *Shim) unstay() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stay == nil {
		return false
	}
	s.stay.Stop()
	s.stay = nil
	return true
}

// GoOn lets a kernel go on that Dump left stopped; it does nothing to another.
func (s *Shim) GoOn() error {
	if !s.unstay() {
		return nil
	}
	if box := s.Sandbox(); box != nil {
		s.criu.Continue(box.PID())
	}
	return s.Resume()
}

// Restore puts the processes of images in the place of the kernel's, and saved private
// files in the place of its own. Before the old processes end the kernel is noted as
// suspended with the checkpoint, durably. So when the restore fails, or this process, or
// the host, it is suspended, its private files are what they were, and the next Restore
// of the checkpoint begins anew.
func (s *Shim) Restore(ctx context.Context, o RestoreOrder) error {
	if s.criu == nil {
		return errNoCRIU
	}
	if err := s.held(o.Move); err != nil {
		return err
	}
	var saved Saved
	if err := json.Unmarshal(o.Kernel, &saved); err != nil || saved.Sandbox == nil {
		return errors.Join(errors.New("restore: what was saved of the kernel can't be read"), err)
	}
	if !s.restoring.TryLock() { // an agentd that has died may have begun another
		return errRestoring
	}
	defer s.restoring.Unlock()
	if s.Sandbox() != nil {
		if _, err := s.quiesce(ctx, 0, false); err != nil {
			return err
		}
	}
	if err := s.Forget(ctx, o.Checkpoint); err != nil {
		s.settle()
		return err
	}
	box, undo, err := s.restore(ctx, o, saved)
	if err == nil {
		s.mu.Lock()
		s.state.Key = saved.Key
		s.mu.Unlock()
		if err = s.TakeOver(box, o.Checkpoint); err != nil {
			s.abandon(ctx, box)
		}
	}
	if err != nil {
		undo()
		s.life.Lock()
		defer s.life.Unlock()
		s.suspended("it could not be restored: " + oneLine(err.Error()))
		return err
	}
	if o.Private != "" {
		if err := os.RemoveAll(s.oldPrivate()); err != nil {
			s.logger.Error("private files of before a rollback not removed", "err", err)
		}
	}
	return nil
}

// settle is for a kernel that could not be noted as suspended: it goes on, if it runs.
func (s *Shim) settle() {
	s.mu.Lock()
	box, suspended, dead := s.box, s.state.Suspended, s.state.Dead
	s.mu.Unlock()
	switch {
	case suspended: // it is about to end; see watch
	case box != nil:
		s.criu.Continue(box.PID())
		if err := s.Resume(); err != nil {
			s.logger.Error("kernel does not go on", "err", err)
		}
	default:
		s.setPhase(posternv1.KernelState_KERNEL_STATE_DEAD, dead)
	}
}

// abandon ends a restored kernel that could not be noted as such: on the disk it is
// suspended.
func (s *Shim) abandon(ctx context.Context, box *sandbox.Sandbox) {
	s.life.Lock()
	defer s.life.Unlock()
	s.disconnect()
	s.mu.Lock()
	s.state.Suspended, s.box = true, nil
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killTime)
	defer cancel()
	if err := box.Kill(ctx); err != nil {
		s.logger.Error("restored kernel not ended", "err", err)
	}
	box.Close()
}

// recover finishes what a shim that ended in the midst of a restore or of a suspend
// left: of a suspended kernel no process may be there, and of the private directory one
// alone. The caller has life.
func (s *Shim) recover(ctx context.Context) error {
	if !s.state.Suspended {
		return os.RemoveAll(s.oldPrivate())
	}
	spec := s.spec.Sandbox
	if s.state.Sandbox != nil {
		spec = s.placed(*s.state.Sandbox)
	}
	ctx, cancel := context.WithTimeout(ctx, killTime)
	defer cancel()
	if err := sandbox.Cleanup(ctx, spec); err != nil {
		return err
	}
	if _, err := os.Lstat(s.oldPrivate()); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return s.putBack(spec.PrivateDir)
}

func (s *Shim) oldPrivate() string { return filepath.Join(s.dir, privateDir+".old") }

// putBack makes the private directory again what it was before a restore.
func (s *Shim) putBack(private string) error {
	return errors.Join(os.RemoveAll(private), os.Rename(s.oldPrivate(), private))
}

// restore does it; undo puts the private directory back.
func (s *Shim) restore(ctx context.Context, o RestoreOrder, saved Saved) (box *sandbox.Sandbox, undo func(), err error) {
	undo = func() {}
	if o.Timeout <= 0 {
		o.Timeout = criuTime
	}
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	spec := s.placed(*saved.Sandbox)
	if o.Private != "" {
		old := s.oldPrivate()
		if err := os.RemoveAll(old); err != nil {
			return nil, undo, err
		}
		if err := os.Rename(spec.PrivateDir, old); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, undo, err
		}
		undo = func() {
			if err := s.putBack(spec.PrivateDir); err != nil {
				s.logger.Error("private files not put back after a failed restore", "err", err)
			}
		}
		if err := errors.Join(os.Rename(o.Private, spec.PrivateDir), os.Chown(spec.PrivateDir, 0, 0)); err != nil {
			return nil, undo, err
		}
	}
	p, err := sandbox.Prepare(spec)
	if err != nil {
		return nil, undo, err
	}
	tree, err := json.Marshal(p.CRIU())
	if err != nil {
		p.Abort()
		return nil, undo, err
	}
	if err := writeRestored(spec, o); err != nil {
		p.Abort()
		return nil, undo, fmt.Errorf("tell the kernel that it is restored: %w", err)
	}
	pid, filling, err := s.restoreTree(ctx, o, tree)
	if err != nil {
		p.Abort()
		return nil, undo, err
	}
	box, err = p.Adopt(ctx, pid)
	if err != nil {
		err = errors.Join(err, sandbox.Cleanup(context.WithoutCancel(ctx), spec))
	}
	if filling != nil {
		s.fill(box, filling)
	}
	return box, undo, err
}

// placed is a sandbox as it was saved, in this kernel's places, for its user, behind its
// limits and its fence: those may have changed since.
func (s *Shim) placed(was sandbox.Spec) sandbox.Spec {
	s.mu.Lock()
	own := s.spec.Sandbox
	s.mu.Unlock()
	was.ID, was.UID, was.GID, was.Limits, was.Network, was.Binary = own.ID, own.UID, own.GID, own.Limits, own.Network, own.Binary
	was.StateDir, was.RunDir, was.PrivateDir, was.LogFile = own.StateDir, own.RunDir, own.PrivateDir, own.LogFile
	for i := range was.Binds {
		for _, b := range own.Binds {
			if b.Target == was.Binds[i].Target {
				was.Binds[i].Source = b.Source
			}
		}
	}
	return was
}

// SpecForFork is what a new kernel's directory needs to be restored into: spec.json with
// its places, and a shim.json that says suspended.
func SpecForFork(dir string, kernel json.RawMessage, id string, uid uint32, owner json.RawMessage, checkpoint string) (Spec, State, error) {
	var saved Saved
	if err := json.Unmarshal(kernel, &saved); err != nil || saved.Sandbox == nil {
		return Spec{}, State{}, errors.Join(errors.New("fork: what was saved of the kernel can't be read"), err)
	}
	spec := saved.Spec
	spec.ID, spec.Owner, spec.Created = id, owner, time.Now().UTC()
	spec.Sandbox = *saved.Sandbox
	spec.Sandbox.ID, spec.Sandbox.UID, spec.Sandbox.GID = id, uid, uid
	spec.Places(dir)
	placed := spec.Sandbox
	// A restart of it begins with what its processes began with, in its own places.
	return spec, State{Suspended: true, Checkpoint: checkpoint, Key: saved.Key, Sandbox: &placed}, nil
}

// WriteState writes shim.json; only for a directory that no shim has.
func WriteState(dir string, st State) error { return writeJSON(filepath.Join(dir, stateFile), st) }

// serveCheckpoints adds the paths of checkpoints.
func (s *Shim) serveCheckpoints(mux *http.ServeMux) {
	handle(s, mux, "/v1/dump", func(ctx context.Context, o DumpOrder) (any, error) {
		d, err := s.Dump(context.WithoutCancel(ctx), o)
		if err == nil && o.Stay && ctx.Err() != nil { // who was to suspend it is gone
			err = errors.Join(context.Cause(ctx), s.GoOn())
		}
		return d, err
	})
	handle(s, mux, "/v1/restore", func(ctx context.Context, o RestoreOrder) (any, error) {
		return struct{}{}, s.Restore(context.WithoutCancel(ctx), o)
	})
	handle(s, mux, "/v1/goon", func(context.Context, struct{}) (any, error) { return struct{}{}, s.GoOn() })
	handle(s, mux, "/v1/suspend", func(ctx context.Context, o suspendOrder) (any, error) {
		ctx = context.WithoutCancel(ctx)
		if !s.unstay() {
			return nil, proto.Errorf(proto.CodeUnavailable, "the kernel went on before its checkpoint was stored: try again")
		}
		err := s.Suspend(ctx, o.Checkpoint)
		if err != nil {
			s.settle()
		}
		return struct{}{}, err
	})
}

type suspendOrder struct {
	Checkpoint string `json:"checkpoint"`
}

// handle serves a request with a JSON body. The context ends when who asked hangs up; what
// was begun is finished all the same.
func handle[T any](s *Shim, mux *http.ServeMux, path string, do func(context.Context, T) (any, error)) {
	mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
		var o T
		err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxSpec)).Decode(&o)
		if err != nil {
			proto.WriteHTTPError(w, proto.Errorf(proto.CodeInvalid, "%s: %v", path, err))
			return
		}
		answer, err := do(r.Context(), o)
		if err != nil {
			s.logger.Warn("request failed", "path", path, "err", err)
			proto.WriteHTTPError(w, public(err))
			return
		}
		writeAnswer(w, answer)
	})
}

// Dump, Restore, GoOn and Suspend are the shim's; see there.
func (a *Agent) Dump(ctx context.Context, o DumpOrder) (d Dumped, err error) {
	err = a.order(ctx, "/v1/dump", o, &d)
	return d, err
}

// Restore puts the processes of images in the place of the kernel's.
func (a *Agent) Restore(ctx context.Context, o RestoreOrder) error {
	return a.order(ctx, "/v1/restore", o, nil)
}

// GoOn lets a kernel go on that Dump left stopped.
func (a *Agent) GoOn(ctx context.Context) error { return a.order(ctx, "/v1/goon", struct{}{}, nil) }

// Suspend ends a kernel that Dump left stopped.
func (a *Agent) Suspend(ctx context.Context, checkpoint string) error {
	return a.order(ctx, "/v1/suspend", suspendOrder{checkpoint}, nil)
}

func (a *Agent) order(ctx context.Context, path string, body, into any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	answer, err := a.askWith(ctx, http.MethodPost, path, text)
	if err == nil && into != nil {
		err = json.Unmarshal(answer, into)
	}
	return err
}
