package kernel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/agentd/kernel/internal/shim"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// The orders that a shim takes for checkpoints; see package shim.
type (
	DumpOrder    = shim.DumpOrder
	Dumped       = shim.Dumped
	RestoreOrder = shim.RestoreOrder
)

// Looked is what checkpoints need to know of a kernel.
type Looked struct {
	Kernel *posternv1.Kernel
	// InitPID is init's process id on the host; 0: it has no processes.
	InitPID    int
	PrivateDir string
	UID, GID   uint32
	// Attachments are host directories by the keys of their mounts.
	Attachments map[string]string
}

// Look finds a kernel and its processes.
func (m *Manager) Look(ctx context.Context, id string) (Looked, error) {
	k, err := m.find(ctx, id)
	if err != nil {
		return Looked{}, err
	}
	now, err := k.agent.Kernel(ctx)
	if err != nil {
		return Looked{}, proto.Errorf(proto.CodeUnavailable, "kernel %s: its shim is being replaced: try again", id)
	}
	m.mu.Lock()
	spec := k.spec.Sandbox
	m.mu.Unlock()
	l := Looked{Kernel: now, PrivateDir: spec.PrivateDir, UID: spec.UID, GID: spec.GID, Attachments: map[string]string{}}
	switch now.State {
	case posternv1.KernelState_KERNEL_STATE_DEAD, posternv1.KernelState_KERNEL_STATE_SUSPENDED:
	default:
		if l.InitPID, _, err = sandbox.Find(k.dir); err != nil && !errors.Is(err, sandbox.ErrGone) {
			return Looked{}, err
		}
	}
	for i, b := range spec.Binds {
		key := b.Key
		if key == "" {
			key = fmt.Sprintf("bind-%d", i)
		}
		l.Attachments[key] = b.Source
	}
	return l, nil
}

// Dump has a kernel saved by its shim.
func (m *Manager) Dump(ctx context.Context, id string, o DumpOrder) (d Dumped, err error) {
	o.Timeout = left(ctx, o.Wait)
	err = m.order(ctx, id, func(a *shim.Agent) error {
		d, err = a.Dump(ctx, o)
		return err
	})
	return d, err
}

// GoOn lets a kernel go on that Dump left stopped.
func (m *Manager) GoOn(ctx context.Context, id string) error {
	return m.order(ctx, id, func(a *shim.Agent) error { return a.GoOn(ctx) })
}

// Suspend ends a kernel that Dump left stopped.
func (m *Manager) Suspend(ctx context.Context, id, checkpoint string) error {
	return m.order(ctx, id, func(a *shim.Agent) error { return a.Suspend(ctx, checkpoint) })
}

// Restore puts saved processes in the place of a kernel's.
func (m *Manager) Restore(ctx context.Context, id string, o RestoreOrder) error {
	o.Timeout = left(ctx, 0)
	return m.order(ctx, id, func(a *shim.Agent) error { return a.Restore(ctx, o) })
}

// left is what remains until a context's deadline, less what else takes time; 0: it has none.
func left(ctx context.Context, less time.Duration) time.Duration {
	deadline, ok := ctx.Deadline()
	if !ok {
		return 0
	}
	return max(time.Until(deadline)-less, time.Second)
}

func (m *Manager) order(ctx context.Context, id string, do func(*shim.Agent) error) error {
	k, err := m.find(ctx, id)
	if err != nil {
		return err
	}
	if err = do(k.agent); errors.Is(err, shim.ErrNoShim) || errors.Is(err, io.EOF) {
		return proto.Errorf(proto.CodeUnavailable, "kernel %s: its shim ended in between: look how it is, and try again", id)
	}
	return err
}

// Where package checkpoint puts private files before they take the place of a kernel's, or
// become a fork's: in the kernel's directory, for a rename.
const (
	placeSuffix = ".new"
	copySuffix  = ".copy" // of a dump
	placePrefix = "fork-"
	gonePrefix  = "gone-"
)

// tidy removes what an agentd that died in the midst of a restore left in a kernel's
// directory. Its shim may be about to rename it: whoever is first has it whole.
func (m *Manager) tidy(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return // it is told where the kernel is adopted
	}
	for _, e := range entries {
		name := e.Name()
		gone := filepath.Join(dir, gonePrefix+name)
		switch {
		case strings.HasPrefix(name, gonePrefix):
			gone = filepath.Join(dir, name)
		case !strings.HasSuffix(name, placeSuffix) && !strings.HasSuffix(name, copySuffix) && !strings.HasPrefix(name, placePrefix) || !e.IsDir():
			continue
		default:
			if err := os.Rename(filepath.Join(dir, name), gone); err != nil {
				continue // its shim has it
			}
		}
		if err := os.RemoveAll(gone); err != nil {
			m.logger.Error("left-over private files not removed", "path", gone, "err", err)
		}
	}
}

// Fork makes a new kernel of saved processes, for the owner of from. place is called
// with its user before anything is restored, to give it what was saved.
func (m *Manager) Fork(ctx context.Context, id, from string, o RestoreOrder, place func(uid, gid uint32, private string) error) error {
	if !idForm.MatchString(id) {
		return proto.Errorf(proto.CodeInvalid, "the new kernel's id is no UUID")
	}
	source, err := m.find(ctx, from)
	if err != nil {
		return err
	}
	m.mu.Lock()
	s, owner := m.settings, source.spec.Owner
	switch {
	case !s.Enabled:
		m.mu.Unlock()
		return proto.Errorf(proto.CodePolicyDenied, "kernels are off on this host: add kernels: to agentd.yaml")
	case m.kernels[id] != nil:
		m.mu.Unlock()
		return proto.Errorf(proto.CodeAlreadyExists, "kernel %s is there already", id)
	case len(m.kernels) >= s.Max:
		m.mu.Unlock()
		return proto.Errorf(proto.CodeOverloaded, "this host has %d kernels, as many as kernels.max lets it: stop one, or raise it in agentd.yaml", s.Max)
	}
	uid, ok := m.uidLocked(s)
	if !ok {
		m.mu.Unlock()
		return proto.Errorf(proto.CodeOverloaded, "no user id is left for a kernel: raise kernels.max's range")
	}
	dir := filepath.Join(m.cfg.Dir, id)
	spec, state, err := shim.SpecForFork(dir, o.Kernel, id, uid, owner, o.Checkpoint)
	if err != nil {
		delete(m.uids, uid)
		m.mu.Unlock()
		return err
	}
	k := m.newKernel(dir, spec)
	m.kernels[id] = k
	m.mu.Unlock()
	if err = m.fork(ctx, k, state, o, place); err != nil {
		k.failed = err
		close(k.ready)
		m.forget(k)
		return err
	}
	close(k.ready)
	return nil
}

func (m *Manager) fork(ctx context.Context, k *kernel, state shim.State, o RestoreOrder, place func(uid, gid uint32, private string) error) (err error) {
	tending := false
	defer func() {
		if !tending {
			close(k.tended)
		}
	}()
	box := k.spec.Sandbox
	if err := place(box.UID, box.GID, o.Private); err != nil {
		return err
	}
	if err := os.Mkdir(k.dir, 0o700); err != nil {
		return fmt.Errorf("kernel's directory: %w", err)
	}
	if err := os.Rename(o.Private, box.PrivateDir); err != nil {
		return fmt.Errorf("kernel's private files: %w", err)
	}
	if err := errors.Join(os.Chown(box.PrivateDir, 0, 0), shim.WriteState(k.dir, state), shim.WriteSpec(k.dir, k.spec)); err != nil {
		return err
	}
	if err := m.spawn(ctx, k); err != nil {
		return proto.Errorf(proto.CodeInternal, "start the new kernel's shim: %v", err)
	}
	o.Private, o.Timeout = "", left(ctx, 0)
	if err := k.agent.Restore(ctx, o); err != nil {
		return err
	}
	now, err := k.agent.Kernel(ctx)
	if err != nil {
		return err
	}
	m.mu.Lock()
	k.last = now
	m.mu.Unlock()
	m.tend(k)
	tending = true
	return nil
}
