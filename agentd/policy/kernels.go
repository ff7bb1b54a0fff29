package policy

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// What holds for kernels where the configuration is silent.
const (
	DefaultKernels              = 16
	DefaultKernelMemory  uint64 = 4 << 30
	DefaultKernelCPUs           = 2.0
	DefaultKernelPIDs           = 512
	DefaultKernelDisk    uint64 = 10 << 30
	DefaultKernelJournal uint64 = 64 << 20
	DefaultKernelWarm           = 1
	// Of checkpoints.
	DefaultCheckpointBytes uint64 = 50 << 30
	DefaultCheckpointKeep         = 50
	DefaultCheckpointAge          = 30 * 24 * time.Hour
)

// The largest values that a configuration may ask for.
const (
	MaxKernels     = 1000
	MaxKernelWarm  = 16
	MaxJournal     = 64 << 30
	MinJournal     = 16 << 20
	maxEnvironment = 64
	maxValue       = 32 << 10
)

// Kernels is the checked policy of a host's Jupyter kernels. The zero value allows
// none.
type Kernels struct {
	// Enabled: the configuration has kernels.
	Enabled bool
	// Specs are the kernelspecs that may be started; nil: all that are found.
	Specs []string
	// SpecDirs are where kernelspecs are; nil: Jupyter's system directories.
	SpecDirs []string
	// Max is how many kernels there may be at once, those that wait in the pool not
	// counted.
	Max int
	// Memory, Disk (bytes), CPUs and PIDs bound each kernel.
	Memory, Disk uint64
	CPUs         float64
	PIDs         int64
	// Network is none, allowed or open; NetworkAllow lists destinations.
	Network      string
	NetworkAllow []string
	// Environment are the names of variables that who starts a kernel may set.
	Environment []string
	// Visible are paths of the host that kernels see, read only.
	Visible []string
	// IdleAfter ends kernels that nobody used for so long; 0: they are kept.
	IdleAfter time.Duration
	// IdleSuspend: they are suspended then, not stopped.
	IdleSuspend bool
	// Warm is how many kernels of each spec wait, started.
	Warm int
	// Journal bounds a kernel's journal in bytes.
	Journal uint64
	// Sources are the data sources that kernels may query; nil: none.
	Sources []string
	// Secrets is what kernels may have of them.
	Secrets KernelSecrets
	// Checkpoints is what is kept of them, and CRIU's path.
	Checkpoints Checkpoints
	// Moves is which way kernels may move between this host and others: both, in, out or
	// none.
	Moves string
}

// MayMove decides whether kernels may leave this host (out), or come to it. The reason is
// one line; empty: they may.
func (k Kernels) MayMove(out bool) (reason string) {
	switch {
	case k.Moves == "both", k.Moves == "out" && out, k.Moves == "in" && !out:
		return ""
	case out:
		return "this host lets no kernels move away: see kernels.moves in agentd.yaml"
	default:
		return "this host takes no kernels of other hosts: see kernels.moves in agentd.yaml"
	}
}

// KernelSecrets says which secrets kernels may have. The zero value allows none.
type KernelSecrets struct {
	// ControlPlane: those that users keep at the control plane.
	ControlPlane bool
	// Vault are the host's own, by the names of the variables.
	Vault map[string]VaultSecret
}

// VaultSecret is where in Vault's KV v2 engine a value is: Path is MOUNT/PATH.
type VaultSecret struct{ Path, Key string }

// KernelSecret returns why a kernel may not have a secret: one line, empty if it may.
// fromHost: the host is to read it itself.
func (k Kernels) KernelSecret(name string, fromHost bool) string {
	_, own := k.Secrets.Vault[name]
	switch {
	case !k.Enabled:
		return "kernels are off on this host: add kernels: to agentd.yaml"
	case fromHost && !own:
		return "this host has no secret of that name: add it to kernels.secrets.vault in agentd.yaml"
	case fromHost:
		return ""
	case own:
		return "this host reads that one from Vault (kernels.secrets.vault in agentd.yaml): grant it with --host, or use another name"
	case !k.Secrets.ControlPlane:
		return "this host takes no secrets from the control plane: set kernels.secrets.control_plane: allow in agentd.yaml"
	}
	return ""
}

// Checkpoints is what a host keeps of its kernels' checkpoints.
type Checkpoints struct {
	// CRIU is its program's absolute path; empty: where it is found.
	CRIU string
	// MaxBytes bounds all checkpoints of the host on disk.
	MaxBytes uint64
	// Keep is how many of each kernel are kept beside the protected, MaxAge for how long.
	Keep   int
	MaxAge time.Duration
	// Eager: kernels come back with all of their memory, never before it is there.
	Eager bool
}

// jupyterPrefix begins variables that Jupyter's own servers set for a kernel's manager.
// They mean nothing here and are left out.
const jupyterPrefix = "KERNEL_"

// StartKernel decides whether a kernel of a spec may be started with an environment, and
// returns the part of it that the kernel gets. The reason is one line.
func (k Kernels) StartKernel(spec string, environment map[string]string) (env map[string]string, reason string) {
	if reason := k.Allowed(spec); reason != "" {
		return nil, reason
	}
	if len(environment) > maxEnvironment {
		return nil, fmt.Sprintf("%d variables of the environment are more than %d", len(environment), maxEnvironment)
	}
	for name, value := range environment {
		switch {
		case strings.HasPrefix(name, jupyterPrefix):
			continue
		case !slices.Contains(k.Environment, name):
			return nil, fmt.Sprintf("variable %.64q may not be set: add it to kernels.environment in agentd.yaml", name)
		case len(value) > maxValue || strings.ContainsRune(value, 0):
			return nil, fmt.Sprintf("the value of variable %s has more than %d bytes or a NUL", name, maxValue)
		}
		if env == nil {
			env = map[string]string{}
		}
		env[name] = value
	}
	return env, ""
}

// Allowed decides whether kernels of a spec may be there at all; empty: they may.
func (k Kernels) Allowed(spec string) (reason string) {
	switch {
	case !k.Enabled:
		return "kernels are off on this host: add kernels: to agentd.yaml"
	case k.Specs != nil && !slices.Contains(k.Specs, spec):
		return fmt.Sprintf("kernelspec %.64q is not allowed: add it to kernels.specs in agentd.yaml", spec)
	}
	return ""
}
