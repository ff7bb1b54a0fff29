package main

import (
	"context"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/agentd/host"
	"github.com/postern-dev/postern/agentd/kernel"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// kernelRunner makes the kernels what the host asks for.
type kernelRunner struct {
	*kernel.Manager
	checkpoints *engineBox
	daemon      *Daemon
}

var _ host.Kernels = kernelRunner{}

// StartKernel implements host.Kernels.
func (r kernelRunner) StartKernel(ctx context.Context, m *posternv1.StartKernelRequest, environment map[string]string) (*posternv1.Kernel, error) {
	mounts, done, err := r.daemon.attach.toKernel(ctx, m.Id, m.Mounts)
	if err != nil {
		return nil, err
	}
	defer done()
	return r.Manager.Start(ctx, kernel.Start{ID: m.Id, Spec: m.Spec, Owner: m.Principal, Environment: environment, Mounts: mounts})
}

// Stop implements host.Kernels: a kernel's checkpoints go with it.
func (r kernelRunner) Stop(ctx context.Context, id string) error {
	k, err := r.Manager.Get(ctx, id)
	if err == nil {
		if len(k.Mounts) > 0 { // a fork of it may not hold its mounts yet
			_ = r.daemon.attach.look(ctx)
		}
		err = r.Manager.Stop(ctx, id)
	}
	if err != nil {
		return err
	}
	if e, eerr := r.checkpoints.engine(); eerr == nil {
		return e.Forget(k.Owner.GetOrganization(), id)
	}
	return nil
}

// kernelsDir and modulesDir are where kernels, and what they import, are in the state
// directory.
const (
	kernelsDir = "kernels"
	modulesDir = "python"
)

// kernelSQL answers kernels' statements: through the host, like the control plane's.
type kernelSQL struct{ daemon *Daemon }

// RunLocal implements kernel.SQL.
func (s kernelSQL) RunLocal(ctx context.Context, r *posternv1.SQLRequest, from string, w io.Writer) *posternv1.QueryOutcome {
	return s.daemon.host.RunLocal(ctx, r, from, w)
}

// LocalSources implements kernel.SQL.
func (s kernelSQL) LocalSources() []kernel.LocalSource {
	c := s.daemon.config.Load()
	out := []kernel.LocalSource{}
	for _, source := range c.Sources {
		if slices.Contains(c.Kernels.Sources, source.Name) {
			p := source.Policy
			out = append(out, kernel.LocalSource{Name: source.Name, Engine: source.Engine, Mode: string(p.Mode), Masked: len(p.Masks) > 0})
		}
	}
	return out
}

// newKernels makes the manager of kernels; openKernels adopts what runs.
func (d *Daemon) newKernels() *kernel.Manager {
	metrics := kernel.NewMetrics(d.registry)
	dir := filepath.Join(d.state, kernelsDir)
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	m := kernel.New(kernel.Config{
		Dir: dir, Executable: d.Executable, Logger: d.logger, Metrics: metrics,
		SQL: standingSQL{kernelSQL{d}, d.standing}, ModuleDir: filepath.Join(filepath.Dir(dir), modulesDir),
		SecretsKeyFile: filepath.Join(filepath.Dir(dir), secretsKeyFile), ReadSecret: kernelSecrets{d}.ReadSecret, SecretsChanged: d.noteSecrets,
	})
	metrics.Register(m)
	return m
}

// setKernels makes the configuration count for kernels.
func (d *Daemon) setKernels(c *config.Config) {
	k := c.Kernels
	d.kernels.Set(kernel.Settings{
		Enabled: k.Enabled, SpecDirs: k.SpecDirs, Offered: func(spec string) bool { return k.Allowed(spec) == "" },
		Max: k.Max, Memory: int64(k.Memory), Disk: int64(k.Disk), CPUs: k.CPUs, PIDs: k.PIDs, Network: k.Network, NetworkAllow: k.NetworkAllow,
		Visible: k.Visible, IdleAfter: k.IdleAfter, IdleSuspend: k.IdleSuspend, Warm: k.Warm, JournalBytes: int64(k.Journal),
		SecretAllowed: k.KernelSecret, UIDBase: d.kernelUIDs, UIDs: config.KernelUIDs - 1, // the last one is doctor's
	})
}

// decideKernel holds the start of a kernel against the policy.
func (d *Daemon) decideKernel(r *posternv1.StartKernelRequest) host.KernelVerdict {
	spec := strings.ToLower(r.Spec)
	if spec == "" {
		spec = "python3"
	}
	c := d.config.Load()
	env, reason := c.Kernels.StartKernel(spec, r.Environment)
	for i := 0; i < len(r.Mounts) && reason == ""; i++ {
		reason = decideKernelMount(c.Attachments, r.Mounts, i)
	}
	return host.KernelVerdict{Allowed: reason == "", Reason: reason, Environment: env}
}

// kernelStatus is for commands on this host.
func (d *Daemon) kernelStatus() []control.Kernel {
	out := []control.Kernel{}
	for _, k := range d.kernels.List() {
		out = append(out, control.Kernel{
			ID: k.Id, Spec: k.Spec, State: strings.ToLower(strings.TrimPrefix(k.State.String(), "KERNEL_STATE_")), Reason: k.Reason,
			Token: k.Owner.GetTokenName(), Started: k.Started.AsTime(), LastActivity: k.LastActivity.AsTime(), Connections: int(k.Connections), Generation: k.Generation,
		})
	}
	return out
}
