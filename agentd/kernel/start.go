package kernel

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/agentd/kernel/internal/shim"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Start is a wish for a kernel that the policy allowed.
type Start struct {
	ID          string
	Spec        string
	Owner       *posternv1.Principal
	Environment map[string]string
	// Mounts are workspaces that it sees at /work/NAME; the first is its working directory.
	Mounts []Mount
}

// Mount is a workspace in a kernel.
type Mount struct {
	Workspace string
	// Source is where the host has it; it must be there again for every restore.
	Source   string
	ReadOnly bool
}

var idForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// Start starts a kernel, or takes one that waits. It returns when the kernel's processes
// run. A second call with one id is the same kernel's, if the owner is the same.
func (m *Manager) Start(ctx context.Context, r Start) (*posternv1.Kernel, error) {
	began := time.Now()
	if !idForm.MatchString(r.ID) {
		return nil, proto.Errorf(proto.CodeInvalid, "the kernel's id is no UUID")
	}
	m.mu.Lock()
	s := m.settings
	m.mu.Unlock()
	if !s.Enabled {
		return nil, proto.Errorf(proto.CodePolicyDenied, "kernels are off on this host: add kernels: to agentd.yaml")
	}
	sp, err := m.spec(s, r.Spec)
	if err != nil {
		return nil, err
	}
	owner, err := protojson.Marshal(r.Owner)
	if err != nil {
		return nil, err
	}
	trial := m.build(s, sp, s.UIDBase, r.ID, r.Environment, r.Mounts).Sandbox
	if err := trial.Validate(); err != nil {
		return nil, proto.Errorf(proto.CodeInvalid, "kernels of spec %s cannot run here: %v", sp.name, err)
	}
	m.mu.Lock()
	if k := m.kernels[r.ID]; k != nil {
		m.mu.Unlock()
		return m.again(ctx, k, r)
	}
	if len(m.kernels) >= s.Max {
		m.mu.Unlock()
		return nil, proto.Errorf(proto.CodeOverloaded, "this host has %d kernels, as many as kernels.max lets it: stop one, or raise it in agentd.yaml", s.Max)
	}
	var k *kernel
	warm := false
	if len(r.Environment) == 0 && len(r.Mounts) == 0 {
		for i, w := range m.pool {
			if w.spec.Name == sp.name && w.last != nil && w.last.State == posternv1.KernelState_KERNEL_STATE_IDLE && w.lost == "" && !w.stopping {
				k, warm = w, true
				m.pool = slices.Delete(m.pool, i, i+1)
				break
			}
		}
	}
	if k == nil {
		uid, ok := m.uidLocked(s)
		if !ok {
			m.mu.Unlock()
			return nil, proto.Errorf(proto.CodeOverloaded, "no user id is left for a kernel: raise kernels.max's range")
		}
		k = m.newKernel(filepath.Join(m.cfg.Dir, r.ID), m.build(s, sp, uid, r.ID, r.Environment, r.Mounts))
	}
	k.spec.ID, k.spec.Owner, k.spec.Created = r.ID, owner, time.Now().UTC()
	spec := k.spec
	m.kernels[r.ID] = k
	m.mu.Unlock()

	if warm {
		err = m.claim(ctx, k, spec)
	} else {
		err = m.launch(ctx, k, spec)
	}
	if err != nil {
		m.cfg.Metrics.started("failed", warm, time.Since(began))
		if !warm {
			k.failed = err
			close(k.ready)
		}
		m.forget(k)
		return nil, err
	}
	if !warm {
		close(k.ready)
	}
	m.wake()
	m.cfg.Metrics.started("done", warm, time.Since(began))
	return m.Get(ctx, r.ID)
}

// again is a second start of a kernel that is there.
func (m *Manager) again(ctx context.Context, k *kernel, r Start) (*posternv1.Kernel, error) {
	select {
	case <-k.ready:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if k.failed != nil {
		return nil, k.failed
	}
	out, err := m.Get(ctx, r.ID)
	if err != nil {
		return nil, err
	}
	if out.Owner.GetTokenId() != r.Owner.GetTokenId() || out.Owner.GetOrganization() != r.Owner.GetOrganization() {
		return nil, proto.Errorf(proto.CodeAlreadyExists, "kernel %s is another's", r.ID)
	}
	return out, nil
}

// spec finds a kernelspec; an empty name is the default one.
func (m *Manager) spec(s Settings, name string) (spec, error) {
	found, wrong := findSpecs(s.SpecDirs)
	if name == "" {
		name = "python3"
	}
	for _, sp := range found {
		if sp.name == strings.ToLower(name) {
			return sp, nil
		}
	}
	for path, err := range wrong {
		if strings.EqualFold(filepath.Base(path), name) {
			return spec{}, proto.Errorf(proto.CodeNotFound, "kernelspec %.64q cannot be used: %v", name, err)
		}
	}
	return spec{}, proto.Errorf(proto.CodeNotFound, "this host has no kernelspec %.64q: install it, or see kernels.spec_dirs in agentd.yaml", name)
}

// build is what a new kernel is.
func (m *Manager) build(s Settings, sp spec, uid uint32, slot string, env map[string]string, mounts []Mount) shim.Spec {
	out := shim.Spec{
		Name: sp.name, Language: sp.file.Language, InterruptMode: sp.file.InterruptMode, JournalBytes: s.JournalBytes, Created: time.Now().UTC(),
		Sandbox: sandbox.Spec{
			ID: slot, UID: uid, GID: uid, Argv: sp.argv(), Visible: append(sp.visible(), s.Visible...),
			Limits:  sandbox.Limits{Memory: s.Memory, CPU: s.CPUs, PIDs: s.PIDs, Disk: s.Disk},
			Network: sandbox.Network{Mode: sandbox.NetworkMode(s.Network), Allow: s.NetworkAllow},
		},
	}
	all := map[string]string{}
	for name, value := range sp.file.Env {
		all[name] = value
	}
	for name, value := range env {
		all[name] = value
	}
	for _, w := range mounts {
		sum := sha256.Sum256([]byte(w.Workspace))
		out.Sandbox.Binds = append(out.Sandbox.Binds, sandbox.Bind{
			Source: w.Source, Target: shim.WorkInside + w.Workspace, ReadOnly: w.ReadOnly, Key: "work-" + hex.EncodeToString(sum[:8]),
		})
	}
	if _, own := all["GIT_CONFIG_COUNT"]; len(mounts) > 0 && !own {
		// A workspace is not of one user: git would refuse it.
		all["GIT_CONFIG_COUNT"], all["GIT_CONFIG_KEY_0"], all["GIT_CONFIG_VALUE_0"] = "1", "safe.directory", "*"
	}
	m.bringModule(sp, &out.Sandbox, all)
	for name, value := range all {
		out.Sandbox.Env = append(out.Sandbox.Env, name+"="+value)
	}
	slices.Sort(out.Sandbox.Env)
	out.Places(filepath.Join(m.cfg.Dir, slot))
	return out
}

func (m *Manager) uidLocked(s Settings) (uint32, bool) {
	for uid := s.UIDBase; uid < s.UIDBase+s.UIDs; uid++ {
		if !m.uids[uid] {
			m.uids[uid] = true
			return uid, true
		}
	}
	return 0, false
}

// launch makes a kernel's directory and starts its shim.
func (m *Manager) launch(ctx context.Context, k *kernel, s shim.Spec) error {
	if err := os.Mkdir(k.dir, 0o700); err != nil {
		close(k.tended)
		return fmt.Errorf("kernel's directory: %w", err)
	}
	if err := shim.WriteSpec(k.dir, s); err != nil {
		close(k.tended)
		return err
	}
	if err := m.spawn(ctx, k); err != nil {
		close(k.tended)
		return proto.Errorf(proto.CodeInternal, "start the kernel: %v", err)
	}
	first, err := k.agent.Kernel(ctx)
	if err == nil && first.State == posternv1.KernelState_KERNEL_STATE_DEAD {
		err = proto.Errorf(proto.CodeUnavailable, "%s", first.Reason)
	}
	if err != nil {
		close(k.tended)
		return err
	}
	m.mu.Lock()
	k.last = first
	m.mu.Unlock()
	m.tend(k)
	return nil
}

// spawn starts a shim, which may start, adopt or find dead its kernel.
func (m *Manager) spawn(ctx context.Context, k *kernel) error {
	ctx, cancel := context.WithTimeout(ctx, spawnTime)
	defer cancel()
	secrets, err := m.secretsOf(k)
	if err != nil {
		return err
	}
	p, err := shim.SpawnWith(ctx, m.cfg.Executable, k.dir, secrets)
	if err != nil {
		return err
	}
	m.mu.Lock()
	k.process = p
	m.mu.Unlock()
	return nil
}

// claim gives a kernel of the pool to its owner.
func (m *Manager) claim(ctx context.Context, k *kernel, s shim.Spec) error {
	if err := shim.WriteSpec(k.dir, s); err != nil {
		return err
	}
	now, err := k.agent.Reread(ctx)
	if err != nil {
		return proto.Errorf(proto.CodeUnavailable, "a kernel that waited did not answer: try again (%v)", err)
	}
	m.mu.Lock()
	k.last = now
	m.mu.Unlock()
	return nil
}
