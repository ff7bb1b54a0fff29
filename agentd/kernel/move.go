package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/postern-dev/postern/agentd/kernel/internal/journal"
	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/agentd/kernel/internal/shim"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Move is why a kernel is held; see package shim.
type Move = shim.Move

// MoveNeeds is what a kernel needs of a host that it moves to.
type MoveNeeds struct {
	Spec string
	// Shown are all paths of the host that it sees, Visible those that not every kernel
	// does.
	Shown, Visible []string
	// Memory, Private and Journal are bytes; Memory is what its processes may have mapped
	// at most, and the caller's to fill in.
	Memory, Private, Journal int64
	// Mounts are the workspaces that it sees, Work where this host has them by where the
	// kernel does.
	Mounts []*posternv1.KernelMount
	Work   map[string]string
}

// MoveNeeds says what a kernel needs of another host.
func (m *Manager) MoveNeeds(ctx context.Context, id string) (MoveNeeds, error) {
	k, err := m.find(ctx, id)
	if err != nil {
		return MoveNeeds{}, err
	}
	m.mu.Lock()
	spec := k.spec
	m.mu.Unlock()
	n := MoveNeeds{Spec: spec.Name}
	st, err := shim.ReadState(k.dir)
	if err != nil {
		return n, fmt.Errorf("kernel %s: %w", id, err)
	}
	if st.Sandbox != nil {
		n.Shown = st.Sandbox.Shown
	}
	for _, path := range n.Shown {
		if !sandbox.Showable(path, nil) {
			n.Visible = append(n.Visible, path)
		}
	}
	n.Mounts, n.Work = workspacesOf(spec.Sandbox)
	names, err := shim.JournalFiles(k.dir)
	if err != nil {
		return n, err
	}
	for _, name := range names {
		if info, err := os.Stat(filepath.Join(k.dir, name)); err == nil {
			n.Journal += info.Size()
		}
	}
	err = filepath.WalkDir(spec.Sandbox.PrivateDir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // the kernel changes it meanwhile
		}
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() {
			n.Private += info.Size()
		}
		return ctx.Err()
	})
	return n, err
}

// workspacesOf are a sandbox's, and where the host has them by where the kernel does.
func workspacesOf(s sandbox.Spec) (mounts []*posternv1.KernelMount, work map[string]string) {
	for _, b := range s.Binds {
		if workspace, ok := strings.CutPrefix(b.Target, shim.WorkInside); ok {
			mounts = append(mounts, &posternv1.KernelMount{Workspace: workspace, ReadOnly: b.ReadOnly})
			if work == nil {
				work = map[string]string{}
			}
			work[b.Target] = b.Source
		}
	}
	return mounts, work
}

// SavedMounts are the workspaces of a kernel that was saved on another host (Dumped.Kernel).
func SavedMounts(kernel []byte) ([]*posternv1.KernelMount, error) {
	saved, err := shim.ReadSaved(kernel)
	if err != nil {
		return nil, proto.Errorf(proto.CodeInvalid, "%v", err)
	}
	mounts, _ := workspacesOf(*saved.Sandbox)
	return mounts, nil
}

// CheckMove refuses, in one line, a kernel that can't be on this host. kernels.moves is
// the caller's to look at, and so are its mounts.
func (m *Manager) CheckMove(id string, n MoveNeeds) error {
	if !idForm.MatchString(id) {
		return proto.Errorf(proto.CodeInvalid, "the kernel's id is no UUID")
	}
	m.mu.Lock()
	s, there, have := m.settings, m.kernels[id] != nil, len(m.kernels)
	m.mu.Unlock()
	switch {
	case !s.Enabled:
		return proto.Errorf(proto.CodePolicyDenied, "kernels are off on this host: add kernels: to agentd.yaml")
	case there:
		return proto.Errorf(proto.CodeAlreadyExists, "kernel %s is on this host already", id)
	case have >= s.Max:
		return proto.Errorf(proto.CodeOverloaded, "this host has %d kernels, as many as kernels.max lets it: stop one, or raise it in agentd.yaml", s.Max)
	case s.Offered != nil && !s.Offered(n.Spec):
		return proto.Errorf(proto.CodePolicyDenied, "this host's policy has no kernels of spec %.64q: see kernels.specs in agentd.yaml", n.Spec)
	case s.Memory > 0 && n.Memory > s.Memory:
		return proto.Errorf(proto.CodePolicyDenied, "the kernel has %d MiB of memory, and this host gives a kernel %d MiB: raise kernels.limits.memory", n.Memory>>20, s.Memory>>20)
	case s.Disk > 0 && n.Private > s.Disk:
		return proto.Errorf(proto.CodePolicyDenied, "the kernel has %d MiB of private files, and this host gives a kernel %d MiB: raise kernels.limits.disk", n.Private>>20, s.Disk>>20)
	}
	sp, err := m.spec(s, n.Spec)
	if err != nil {
		return err
	}
	if err := shows(slices.Concat(n.Shown, n.Visible), append(sp.visible(), s.Visible...)); err != nil {
		return err
	}
	for _, path := range n.Visible {
		if _, err := os.Stat(path); err != nil {
			return proto.Errorf(proto.CodeInvalid, "the kernel sees %.200q, which this host lacks", path)
		}
	}
	return nil
}

// CheckSaved refuses what was saved of a kernel on another host (Dumped.Kernel) if it would
// see here what kernels of its spec do not: paths, binds. Its workspaces are the caller's
// to look at: see SavedMounts.
func (m *Manager) CheckSaved(kernel []byte) error {
	saved, err := shim.ReadSaved(kernel)
	if err != nil {
		return proto.Errorf(proto.CodeInvalid, "%v", err)
	}
	if saved.Spec.Name == "" {
		return proto.Errorf(proto.CodeInvalid, "what was saved of the kernel names no kernelspec")
	}
	m.mu.Lock()
	s := m.settings
	m.mu.Unlock()
	sp, err := m.spec(s, saved.Spec.Name)
	if err != nil {
		return err
	}
	if err := shows(saved.Sandbox.Shown, append(sp.visible(), s.Visible...)); err != nil {
		return err
	}
	mounts, _ := workspacesOf(*saved.Sandbox)
	var workspaces []Mount
	for _, w := range mounts {
		workspaces = append(workspaces, Mount{Workspace: w.Workspace, ReadOnly: w.ReadOnly})
	}
	own := m.build(s, sp, s.UIDBase, "check", nil, workspaces).Sandbox
	for _, b := range saved.Sandbox.Binds {
		if !slices.ContainsFunc(own.Binds, func(o sandbox.Bind) bool { return o.Target == b.Target && o.ReadOnly == b.ReadOnly && o.Key == b.Key }) {
			return proto.Errorf(proto.CodeInvalid, "the kernel has %.200q mounted, which kernels of spec %s have not on this host: are both agentds of one version?", b.Target, sp.name)
		}
	}
	return nil
}

// shows refuses paths that kernels do not see here.
func shows(paths, extra []string) error {
	for _, path := range paths {
		if !sandbox.Showable(path, extra) {
			return proto.Errorf(proto.CodePolicyDenied, "the kernel sees %.200q, which this host shows to no kernel: add it to kernels.visible", path)
		}
	}
	return nil
}

// Hold keeps a kernel from everybody but the move that holds it.
func (m *Manager) Hold(ctx context.Context, id string, move Move) error {
	return m.order(ctx, id, func(a *shim.Agent) error { return a.Hold(ctx, move) })
}

// Pack makes the files of a held, suspended kernel complete, and returns its directory
// and their names in it. sent notes that the other host may have it from here on.
func (m *Manager) Pack(ctx context.Context, id, move string, sent bool) (dir string, names []string, err error) {
	k, err := m.find(ctx, id)
	if err != nil {
		return "", nil, err
	}
	if err := m.order(ctx, id, func(a *shim.Agent) error { return a.Pack(ctx, move, sent) }); err != nil {
		return "", nil, err
	}
	names, err = shim.JournalFiles(k.dir)
	return k.dir, append(names, shim.Files...), err
}

// Let ends Hold; committed notes that the kernel came here for good.
func (m *Manager) Let(ctx context.Context, id, move string, committed bool) error {
	return m.order(ctx, id, func(a *shim.Agent) error { return a.Let(ctx, move, committed) })
}

// Held are the kernels that a move holds, by id.
func (m *Manager) Held(ctx context.Context) map[string]Move {
	m.mu.Lock()
	var all []*kernel
	for _, k := range m.kernels {
		all = append(all, k)
	}
	m.mu.Unlock()
	held := map[string]Move{}
	for _, k := range all {
		if ctx.Err() != nil {
			break
		}
		if st, err := shim.ReadState(k.dir); err == nil && st.Move != nil {
			held[k.spec.ID] = *st.Move
		}
	}
	return held
}

// Moves is what moves a kernel: the one that holds it, and the id of the one that brought
// it here.
func (m *Manager) Moves(ctx context.Context, id string) (held *Move, came string, err error) {
	k, err := m.find(ctx, id)
	if err != nil {
		return nil, "", err
	}
	st, err := shim.ReadState(k.dir)
	return st.Move, st.Moved, err
}

// FileArrives reports whether name is a file that belongs to a kernel that moves.
func FileArrives(name string) bool {
	if slices.Contains(shim.Files, name) {
		return true
	}
	rest, ok := strings.CutPrefix(name, "journal/")
	return ok && journal.FileName(rest)
}

// Arrival is a kernel that comes from another host.
type Arrival struct {
	ID    string
	Owner *posternv1.Principal
	// Kernel is what Dumped.Kernel was, Checkpoint what it is in.
	Kernel     []byte
	Checkpoint string
	// Files is a directory with its journal and waiting messages, Private one with its
	// private files, on the same file system as Config.Dir: both are moved.
	Files, Private string
	Move           Move
	// Mounts are its workspaces, ready to be mounted.
	Mounts []Mount
	// Environment filters the environment that it was started with by the host's policy.
	Environment func(spec string, environment map[string]string) map[string]string
}

// Arrive makes a suspended kernel that its move holds. place is called with its user,
// before it is there, to give it what was saved.
func (m *Manager) Arrive(ctx context.Context, a Arrival, place func(uid, gid uint32, private string) error) error {
	m.mu.Lock()
	s := m.settings
	m.mu.Unlock()
	owner, err := protojson.Marshal(a.Owner)
	if err != nil {
		return err
	}
	if err := m.CheckSaved(a.Kernel); err != nil {
		return err
	}
	saved, err := shim.ReadSaved(a.Kernel)
	if err != nil {
		return err
	}
	n := MoveNeeds{Spec: saved.Spec.Name, Shown: saved.Sandbox.Shown}
	if err := m.CheckMove(a.ID, n); err != nil {
		return err
	}
	sp, err := m.spec(s, n.Spec)
	if err != nil {
		return err
	}
	var env map[string]string
	if a.Environment != nil {
		env = a.Environment(n.Spec, given(saved.Spec.Sandbox.Env, sp.file.Env))
	}
	m.mu.Lock()
	uid, ok := m.uidLocked(s)
	if !ok || m.kernels[a.ID] != nil {
		m.mu.Unlock()
		return proto.Errorf(proto.CodeOverloaded, "no user id is left for a kernel: raise kernels.max's range")
	}
	// A name of its own on this host, as kernels of the pool have: whoever tries two agentds
	// on one machine would else have two with the same cgroups.
	slot := jupyter.NewID()
	dir := filepath.Join(m.cfg.Dir, slot)
	spec := m.build(s, sp, uid, slot, env, a.Mounts)
	spec.ID, spec.Owner, spec.Created = a.ID, owner, saved.Spec.Created
	if err := spec.Sandbox.Validate(); err != nil {
		delete(m.uids, uid)
		m.mu.Unlock()
		return proto.Errorf(proto.CodeInvalid, "kernels of spec %s cannot run here: %v", sp.name, err)
	}
	k := m.newKernel(dir, spec)
	m.kernels[a.ID] = k
	m.mu.Unlock()
	state := shim.StateForArrival(saved, spec, a.Checkpoint, a.Move)
	if err = m.arrive(ctx, k, state, a, place); err != nil {
		k.failed = err
		close(k.ready)
		m.forget(k)
		return err
	}
	close(k.ready)
	return nil
}

func (m *Manager) arrive(ctx context.Context, k *kernel, state shim.State, a Arrival, place func(uid, gid uint32, private string) error) (err error) {
	tending := false
	defer func() {
		if !tending {
			close(k.tended)
		}
	}()
	box := k.spec.Sandbox
	if err := place(box.UID, box.GID, a.Private); err != nil {
		return err
	}
	if err := os.Mkdir(k.dir, 0o700); err != nil {
		return fmt.Errorf("kernel's directory: %w", err)
	}
	// Agentd listens in it before the restore.
	if err := errors.Join(os.Mkdir(box.RunDir, 0o700), os.Chown(box.RunDir, int(box.UID), int(box.GID))); err != nil {
		return fmt.Errorf("kernel's run directory: %w", err)
	}
	if err := os.Rename(a.Private, box.PrivateDir); err != nil {
		return fmt.Errorf("kernel's private files: %w", err)
	}
	entries, err := os.ReadDir(a.Files)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Rename(filepath.Join(a.Files, e.Name()), filepath.Join(k.dir, e.Name())); err != nil {
			return fmt.Errorf("kernel's journal: %w", err)
		}
	}
	// spec.json comes last: without it the directory is none of a kernel.
	if err := errors.Join(os.Chown(box.PrivateDir, 0, 0), shim.WriteState(k.dir, state), shim.WriteSpec(k.dir, k.spec)); err != nil {
		return err
	}
	if err := m.spawn(ctx, k); err != nil {
		return proto.Errorf(proto.CodeInternal, "start the kernel's shim: %v", err)
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

// given is what of an environment its kernelspec did not say.
func given(env []string, spec map[string]string) map[string]string {
	out := map[string]string{}
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		if _, of := spec[name]; !of && name != "POSTERN_SOCKET" && name != "PYTHONPATH" {
			out[name] = value
		}
	}
	return out
}
