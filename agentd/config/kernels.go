package config

import (
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"gopkg.in/yaml.v3"

	"github.com/postern-dev/postern/agentd/policy"
	"github.com/postern-dev/postern/agentd/secret"
	"github.com/postern-dev/postern/proto/kernelsecret"
)

// DefaultKernelUIDBase is the first of the user ids that kernels run as.
const DefaultKernelUIDBase = 1_901_000_000

// KernelUIDs is how many user ids kernels may take from their first on.
const KernelUIDs = policy.MaxKernels + 64*policy.MaxKernelWarm + 1

// sqlUIDs is how many user ids SQL sessions may take from their first on, with the
// parser's two behind them, the uplink's and the egress processes'.
const sqlUIDs = 65_796

// Kernels is what the configuration says of Jupyter kernels.
type Kernels struct {
	policy.Kernels
	// UIDBase is the first user id that they run as.
	UIDBase uint32
}

// kernelsFile is kernels: as written.
type kernelsFile struct {
	Specs    []string `yaml:"specs"`
	SpecDirs []string `yaml:"spec_dirs"`
	Max      *int     `yaml:"max"`
	Limits   struct {
		Memory string `yaml:"memory"`
		CPUs   string `yaml:"cpus"`
		PIDs   *int64 `yaml:"pids"`
		Disk   string `yaml:"disk"`
	} `yaml:"limits"`
	Network      string   `yaml:"network"`
	NetworkAllow []string `yaml:"network_allow"`
	Environment  []string `yaml:"environment"`
	Visible      []string `yaml:"visible"`
	Idle         struct {
		After string `yaml:"after"`
		Then  string `yaml:"then"`
	} `yaml:"idle"`
	Checkpoints struct {
		CRIU     string `yaml:"criu"`
		MaxBytes string `yaml:"max_bytes"`
		Keep     *int   `yaml:"keep"`
		MaxAge   string `yaml:"max_age"`
		Lazy     string `yaml:"lazy"`
	} `yaml:"checkpoints"`
	Moves   string   `yaml:"moves"`
	Warm    *int     `yaml:"warm"`
	Journal string   `yaml:"journal"`
	UIDBase *uint32  `yaml:"uid_base"`
	Sources []string `yaml:"sources"`
	Secrets struct {
		ControlPlane string `yaml:"control_plane"`
		Vault        map[string]struct {
			Path string `yaml:"path"`
			Key  string `yaml:"key"`
		} `yaml:"vault"`
	} `yaml:"secrets"`
}

var (
	specForm     = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)
	hostForm     = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,62})(\.[A-Za-z0-9]([A-Za-z0-9-]{0,62}))*$`)
	variableForm = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,63}$`)
)

func (p *problems) kernels(in file, c *Config, at func(...any) int, there bool) {
	if !there {
		return
	}
	k := in.Kernels
	line := func(keys ...any) int { return at(append([]any{"kernels"}, keys...)...) }
	out := &c.Kernels
	out.Enabled = true
	out.Specs, out.SpecDirs, out.Environment, out.Visible = k.Specs, k.SpecDirs, k.Environment, k.Visible
	for i, name := range k.Specs {
		if !specForm.MatchString(name) {
			p.add(line("specs", i), "kernels.specs: %q is no name of a kernelspec", name)
		}
	}
	for key, list := range map[string][]string{"spec_dirs": k.SpecDirs, "visible": k.Visible} {
		for i, path := range list {
			if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
				p.add(line(key, i), "kernels.%s: %q is no clean absolute path", key, path)
			}
		}
	}
	for i, name := range k.Sources {
		switch {
		case slices.Contains(k.Sources[:i], name):
			p.add(line("sources", i), "kernels.sources: %q is there twice", name)
		case !slices.ContainsFunc(in.Sources, func(s source) bool { return s.Name == name }):
			p.add(line("sources", i), "kernels.sources: there is no data source %q in sources", name)
		}
	}
	out.Sources = k.Sources
	for i, name := range k.Environment {
		if !variableForm.MatchString(name) {
			p.add(line("environment", i), "kernels.environment: %q is no name of a variable", name)
		}
	}
	whole := func(key string, v *int, low, high int, into *int) {
		if v == nil {
			return
		}
		if *v < low || *v > high {
			p.add(line(key), "kernels.%s: %d is not between %d and %d", key, *v, low, high)
		}
		*into = *v
	}
	whole("max", k.Max, 1, policy.MaxKernels, &out.Max)
	whole("warm", k.Warm, 0, policy.MaxKernelWarm, &out.Warm)
	size := func(text string, low, high uint64, into *uint64, keys ...any) {
		if text == "" {
			return
		}
		n, err := policy.ParseSize(text)
		switch {
		case err != nil:
			p.add(line(keys...), "kernels.%v: %v", keys[len(keys)-1], err)
		case n < low || n > high:
			p.add(line(keys...), "kernels.%v: %s is not between %d and %d bytes", keys[len(keys)-1], text, low, high)
		}
		*into = n
	}
	size(k.Limits.Memory, 128<<20, 1<<50, &out.Memory, "limits", "memory")
	size(k.Limits.Disk, 16<<20, 1<<60, &out.Disk, "limits", "disk")
	size(k.Journal, policy.MinJournal, policy.MaxJournal, &out.Journal, "journal")
	if text := k.Limits.CPUs; text != "" {
		n, err := strconv.ParseFloat(text, 64)
		if err != nil || !(n >= 0.1 && n <= 1024) {
			p.add(line("limits", "cpus"), "kernels.limits.cpus: %q is not a number between 0.1 and 1024", text)
		}
		out.CPUs = n
	}
	if n := k.Limits.PIDs; n != nil {
		if *n < 32 || *n > 1<<22 {
			p.add(line("limits", "pids"), "kernels.limits.pids: %d is not between 32 and 4194304", *n)
		}
		out.PIDs = *n
	}
	switch k.Network {
	case "":
	case "none", "allowed", "open":
		out.Network = k.Network
	default:
		p.add(line("network"), "kernels.network: %q is none of none, allowed, open", k.Network)
	}
	switch k.Moves {
	case "":
	case "both", "in", "out", "none":
		out.Moves = k.Moves
	default:
		p.add(line("moves"), "kernels.moves: %q is none of both, in, out, none", k.Moves)
	}
	out.NetworkAllow = k.NetworkAllow
	if len(k.NetworkAllow) > 0 && out.Network == "none" {
		p.add(line("network_allow"), "kernels.network_allow: it means nothing with network: none: set network: allowed")
	}
	for i, text := range k.NetworkAllow {
		if !destination(text) {
			p.add(line("network_allow", i), "kernels.network_allow: %q is none of HOST:PORT, ADDRESS:PORT, NETWORK/BITS:PORT, such as 10.1.2.3:443 or 10.0.0.0/8:8080", text)
		}
	}
	switch k.Idle.Then {
	case "", "stop", "suspend":
		if k.Idle.After != "" && k.Idle.Then == "" {
			p.add(line("idle"), "kernels.idle: it does not say what then: set then: stop or then: suspend")
		}
	case "keep":
	default:
		p.add(line("idle", "then"), "kernels.idle.then: %q is none of stop, suspend, keep", k.Idle.Then)
	}
	if text := k.Idle.After; text != "" {
		d, err := time.ParseDuration(text)
		switch {
		case err != nil:
			p.add(line("idle", "after"), "kernels.idle.after: %q is not a duration such as 30m or 8h", text)
		case d < time.Minute:
			p.add(line("idle", "after"), "kernels.idle.after: %s is less than 1m", d)
		}
		if k.Idle.Then == "stop" || k.Idle.Then == "suspend" {
			out.IdleAfter, out.IdleSuspend = d, k.Idle.Then == "suspend"
		}
	} else if k.Idle.Then == "stop" || k.Idle.Then == "suspend" {
		p.add(line("idle"), "kernels.idle: it does not say after what time: set after: 8h")
	}
	p.kernelSecrets(k, in.Vault.Address != "", out, line)
	ck := k.Checkpoints
	if ck.CRIU != "" && (!filepath.IsAbs(ck.CRIU) || filepath.Clean(ck.CRIU) != ck.CRIU) {
		p.add(line("checkpoints", "criu"), "kernels.checkpoints.criu: %q is no clean absolute path", ck.CRIU)
	}
	out.Checkpoints.CRIU = ck.CRIU
	size(ck.MaxBytes, 64<<20, 1<<60, &out.Checkpoints.MaxBytes, "checkpoints", "max_bytes")
	if ck.Keep != nil {
		if *ck.Keep < 1 || *ck.Keep > 100_000 {
			p.add(line("checkpoints", "keep"), "kernels.checkpoints.keep: %d is not between 1 and 100000", *ck.Keep)
		}
		out.Checkpoints.Keep = *ck.Keep
	}
	if text := ck.MaxAge; text != "" {
		d, err := days(text)
		if err != nil || d < time.Hour {
			p.add(line("checkpoints", "max_age"), "kernels.checkpoints.max_age: %q is not a time of 1h or more, such as 12h or 30d", text)
		}
		out.Checkpoints.MaxAge = d
	}
	switch ck.Lazy {
	case "", "auto":
	case "off":
		out.Checkpoints.Eager = true
	default:
		p.add(line("checkpoints", "lazy"), "kernels.checkpoints.lazy: %q is not auto or off", ck.Lazy)
	}
	if base := k.UIDBase; base != nil {
		if *base < 1000 || *base > 4_294_900_000 {
			p.add(line("uid_base"), "kernels.uid_base: %d is not between 1000 and 4294900000", *base)
		}
		out.UIDBase = *base
	}
	if a, b := int64(c.SQL.UIDBase), int64(out.UIDBase); a < b+KernelUIDs && b < a+sqlUIDs {
		p.add(line("uid_base"), "kernels.uid_base: the %d users from %d on meet the %d of sql.uid_base: kernels and SQL sessions must not share users", KernelUIDs, out.UIDBase, sqlUIDs)
	}
}

// kernelSecrets reads kernels.secrets.
func (p *problems) kernelSecrets(k kernelsFile, vault bool, out *Kernels, line func(...any) int) {
	switch k.Secrets.ControlPlane {
	case "", "deny":
	case "allow":
		out.Secrets.ControlPlane = true
	default:
		p.add(line("secrets", "control_plane"), "kernels.secrets.control_plane: %q is none of allow, deny", k.Secrets.ControlPlane)
	}
	if len(k.Secrets.Vault) > 0 && !vault {
		p.add(line("secrets", "vault"), "kernels.secrets.vault: there is no vault in this configuration: add vault: {address: ..., ...}")
	}
	for name, v := range k.Secrets.Vault {
		if err := kernelsecret.CheckName(name); err != nil {
			p.add(line("secrets", "vault", name), "kernels.secrets.vault: %v", err)
		}
		if v.Key == "" {
			v.Key = "value"
		}
		ref := secret.Ref{Vault: &secret.VaultRef{KV: v.Path, Field: v.Key}}
		if err := ref.Validate(); err != nil {
			p.add(line("secrets", "vault", name), "kernels.secrets.vault.%s: %q is no path of Vault's KV engine such as secret/team/token", name, v.Path)
		}
		if out.Secrets.Vault == nil {
			out.Secrets.Vault = map[string]policy.VaultSecret{}
		}
		out.Secrets.Vault[name] = policy.VaultSecret{Path: v.Path, Key: v.Key}
	}
}

// hasKey reports whether the file has a key at its top, whatever its value.
func hasKey(root *yaml.Node, key string) bool {
	if root == nil || root.Kind != yaml.MappingNode {
		return false
	}
	for i := 0; i+1 < len(root.Content); i += 2 {
		if root.Content[i].Value == key {
			return true
		}
	}
	return false
}

// destination reports whether a text is HOST:PORT, ADDRESS:PORT or NETWORK/BITS:PORT.
func destination(text string) bool {
	host, port, err := net.SplitHostPort(text)
	n, perr := strconv.Atoi(port)
	if err != nil || perr != nil || n < 1 || n > 65535 {
		return false
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	if _, err := netip.ParsePrefix(host); err == nil {
		return true
	}
	return hostForm.MatchString(host)
}

// days reads a duration that may be in days: 30d.
func days(text string) (time.Duration, error) {
	if n, ok := strings.CutSuffix(text, "d"); ok {
		v, err := strconv.ParseUint(n, 10, 16)
		return time.Duration(v) * 24 * time.Hour, err
	}
	return time.ParseDuration(text)
}

// defaultKernels holds where the file says nothing but kernels:.
func defaultKernels() Kernels {
	return Kernels{UIDBase: DefaultKernelUIDBase, Kernels: policy.Kernels{
		Max: policy.DefaultKernels, Memory: policy.DefaultKernelMemory, CPUs: policy.DefaultKernelCPUs, PIDs: policy.DefaultKernelPIDs,
		Disk: policy.DefaultKernelDisk, Network: "none", Warm: policy.DefaultKernelWarm, Moves: "both", Journal: policy.DefaultKernelJournal,
		Checkpoints: policy.Checkpoints{MaxBytes: policy.DefaultCheckpointBytes, Keep: policy.DefaultCheckpointKeep, MaxAge: policy.DefaultCheckpointAge},
	}}
}
