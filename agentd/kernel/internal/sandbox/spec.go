package sandbox

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/postern-dev/postern/agentd/cgroup"
)

// Places inside a kernel's file tree.
const (
	// RunInside is where Spec.RunDir is.
	RunInside = "/run/postern"
	// HomeInside is the kernel's home, Spec.PrivateDir/home on the host. It can be
	// written.
	HomeInside = "/home/kernel"
	// TmpInside is Spec.PrivateDir/tmp on the host. It can be written.
	TmpInside = "/tmp"
	// logInside is Spec.LogFile.
	logInside = "/run/kernel.log"
	// initInside is the init program; its content belongs to its name.
	initInside = "/.postern/init-1"
	// emptyInside is an empty directory.
	emptyInside = "/.postern/empty"
)

// Spec says what to run and where. It is plain data (JSON), durable with the
// kernel: the same Spec starts, adopts, restores and cleans up.
type Spec struct {
	// ID is the kernel's id, a UUID. It names the cgroups.
	ID string `json:"id"`
	// UID and GID are the kernel's alone: no account and no other kernel on this
	// host has them but forks of it, since CRIU restores processes with the user
	// that they had.
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
	// Argv is the program, as seen from inside, and its arguments. A name
	// without a slash is looked for in PATH of Env.
	Argv []string `json:"argv"`
	// Env is the whole environment, NAME=value; what is missing of HOME, USER,
	// LOGNAME, PATH, LANG, TMPDIR, SHELL is added.
	Env []string `json:"env"`
	// Dir is the working directory, as seen from inside; empty means the target
	// of the first of Binds, and without one the home.
	Dir string `json:"dir,omitempty"`
	// StateDir is the kernel's directory on the host, owned by root and closed to
	// others. The sandbox keeps sandbox.json and root/ in it.
	StateDir string `json:"state_dir"`
	// RunDir holds the kernel's sockets; both sides see it. It belongs to UID.
	RunDir string `json:"run_dir"`
	// PrivateDir holds home/ and tmp/, which Start makes; they are all that a
	// kernel can write but RunDir, /dev/shm and Binds. It belongs to root.
	PrivateDir string `json:"private_dir"`
	// LogFile takes what the kernel's processes print, appended. Start makes it.
	LogFile string `json:"log_file"`
	// Binds are directories of the host shown to the kernel, attachments mostly.
	Binds []Bind `json:"binds,omitempty"`
	// Visible are more paths of the host, files or directories, to be shown read
	// only where they are: interpreters outside of /usr and /opt.
	Visible []string `json:"visible,omitempty"`
	// Shown are all paths of the host that the kernel sees read only. Start fills
	// it in; a restore needs it as it was then. A path that this host lacks is an
	// empty directory.
	Shown []string `json:"shown,omitempty"`
	// MainPID is the main process's id inside. Start fills it in; Adopt needs it.
	MainPID int     `json:"main_pid,omitempty"`
	Limits  Limits  `json:"limits"`
	Network Network `json:"network"`
	// Binary is the path of agentd; empty means /proc/self/exe.
	Binary string `json:"binary,omitempty"`
}

// Bind is a directory of the host and where the kernel sees it.
type Bind struct {
	Source   string `json:"source"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"read_only,omitempty"`
	// Key is the name of the bind in CRIU's images: letters, digits and dashes,
	// the same for every restore. Empty means "bind-" and its index.
	Key string `json:"key,omitempty"`
}

// Limits bound a kernel. Zero means no limit, but for Shm and Files.
type Limits struct {
	// Memory in bytes, of all processes of the kernel together, without swap.
	Memory int64 `json:"memory,omitempty"`
	// CPU in CPUs: 1.5 is one and a half.
	CPU float64 `json:"cpu,omitempty"`
	// PIDs is the most processes and threads at once.
	PIDs int64 `json:"pids,omitempty"`
	// Disk in bytes: home, tmp, run directory and log together. It is checked
	// every second, and the kernel is ended when it is over; a single file cannot
	// grow beyond it.
	Disk int64 `json:"disk,omitempty"`
	// Shm is the size of /dev/shm in bytes, counted in Memory too; zero means half
	// of Memory, and without that 1 GiB.
	Shm int64 `json:"shm,omitempty"`
	// Files is the most descriptors of one process; zero means 65536, or what the
	// starter may have at most.
	Files uint64 `json:"files,omitempty"`
}

// groups are those that control groups enforce.
func (l Limits) groups() cgroup.Limits {
	return cgroup.Limits{Memory: l.Memory, CPU: l.CPU, PIDs: l.PIDs}
}

// minPIDs is the least that lets a kernel start.
const minPIDs = 32

// A NetworkMode says where a kernel may connect to.
type NetworkMode string

// The modes.
const (
	// NetworkNone leaves the kernel its own loopback device.
	NetworkNone NetworkMode = "none"
	// NetworkAllowed lets it connect to what Network.Allow lists.
	NetworkAllowed NetworkMode = "allowed"
	// NetworkOpen lets it connect to everything that the host reaches, but not to
	// the host itself nor to link-local addresses (the cloud's metadata): these
	// have to be in Network.Allow.
	NetworkOpen NetworkMode = "open"
)

// Network is a kernel's fence.
type Network struct {
	Mode  NetworkMode `json:"mode"`
	Allow []string    `json:"allow,omitempty"`
}

// Validate looks at everything that can be wrong without looking at the host.
// Its error is one line that names the field.
func (s *Spec) Validate() error {
	if !validID(s.ID) {
		return fmt.Errorf("kernel id %q: want letters, digits and dashes", s.ID)
	}
	if s.UID == 0 || s.GID == 0 || s.UID == ^uint32(0) || s.GID == ^uint32(0) {
		return errors.New("a kernel's user and group must not be root's")
	}
	if len(s.Argv) == 0 || s.Argv[0] == "" {
		return errors.New("argv is empty")
	}
	for name, path := range map[string]string{"state_dir": s.StateDir, "run_dir": s.RunDir, "private_dir": s.PrivateDir, "log_file": s.LogFile} {
		if !cleanAbs(path) || path == "/" {
			return fmt.Errorf("%s %q: want a clean absolute path", name, path)
		}
	}
	if s.Dir != "" && !cleanAbs(s.Dir) {
		return fmt.Errorf("working directory %q: want a clean absolute path", s.Dir)
	}
	for _, text := range append(append([]string(nil), s.Argv...), s.Env...) {
		if strings.ContainsRune(text, 0) {
			return errors.New("argv and environment must not hold NUL")
		}
	}
	for _, e := range s.Env {
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" {
			return errors.New("an entry of the environment is not NAME=value")
		}
	}
	for _, v := range append(append([]string(nil), s.Visible...), s.Shown...) {
		if !cleanAbs(v) || v == "/" {
			return fmt.Errorf("visible path %q: want a clean absolute path, and not /", v)
		}
		if taken(v) {
			return fmt.Errorf("visible path %q: it is the kernel's own", v)
		}
	}
	keys := map[string]bool{}
	for i, b := range s.Binds {
		if !cleanAbs(b.Source) || !cleanAbs(b.Target) || b.Target == "/" {
			return fmt.Errorf("bind of %q at %q: want clean absolute paths", b.Source, b.Target)
		}
		if taken(b.Target) {
			return fmt.Errorf("bind at %q: the place is the kernel's own", b.Target)
		}
		for _, other := range s.Binds[:i] {
			// The inner one would be put on what the kernel can rename.
			if below(b.Target, []string{other.Target}) || below(other.Target, []string{b.Target}) {
				return fmt.Errorf("binds at %q and %q: one lies in the other", b.Target, other.Target)
			}
		}
		key := b.key(i)
		if !validID(key) || keys[key] {
			return fmt.Errorf("bind at %q: key %q: want letters, digits and dashes, each key once", b.Target, key)
		}
		keys[key] = true
	}
	l := s.Limits
	if l.Memory < 0 || l.CPU < 0 || l.PIDs < 0 || l.Disk < 0 || l.Shm < 0 {
		return errors.New("a limit is negative")
	}
	if l.PIDs > 0 && l.PIDs < minPIDs {
		return fmt.Errorf("a limit of %d processes and threads: want %d or more, ipykernel alone has a dozen", l.PIDs, minPIDs)
	}
	switch s.Network.Mode {
	case NetworkNone, NetworkAllowed, NetworkOpen:
	default:
		return fmt.Errorf("network %q: want none, allowed or open", s.Network.Mode)
	}
	return nil
}

func (b Bind) key(index int) string {
	if b.Key != "" {
		return b.Key
	}
	return fmt.Sprintf("bind-%d", index)
}

// taken reports whether a path inside is one of those that the sandbox makes.
func taken(path string) bool {
	for _, own := range []string{"/proc", "/dev", "/run", "/sys", HomeInside, TmpInside, "/var/tmp", "/.postern"} {
		if path == own || strings.HasPrefix(path, own+"/") {
			return true
		}
	}
	return false
}

func cleanAbs(path string) bool {
	return filepath.IsAbs(path) && filepath.Clean(path) == path && !strings.ContainsRune(path, 0)
}

func validID(id string) bool {
	if id == "" || len(id) > 64 || id[0] == '-' {
		return false
	}
	for _, r := range id {
		if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' {
			return false
		}
	}
	return true
}

// dir is the working directory inside.
func (s *Spec) dir() string {
	switch {
	case s.Dir != "":
		return s.Dir
	case len(s.Binds) > 0:
		return s.Binds[0].Target
	default:
		return HomeInside
	}
}

// environment is Env with what is missing.
func (s *Spec) environment() []string {
	have := map[string]bool{}
	for _, e := range s.Env {
		name, _, _ := strings.Cut(e, "=")
		have[name] = true
	}
	env := append([]string(nil), s.Env...)
	for _, d := range [][2]string{
		{"HOME", HomeInside},
		{"USER", userName},
		{"LOGNAME", userName},
		{"PATH", "/usr/local/bin:/usr/bin:/bin"},
		{"LANG", "C.UTF-8"},
		{"TMPDIR", TmpInside},
		{"SHELL", "/bin/sh"},
	} {
		if !have[d[0]] {
			env = append(env, d[0]+"="+d[1])
		}
	}
	return env
}

// userName is the kernel's user in its own /etc/passwd.
const userName = "kernel"

func (s *Spec) rootDir() string   { return filepath.Join(s.StateDir, "root") }
func (s *Spec) stateFile() string { return filepath.Join(s.StateDir, "sandbox.json") }

// shm is the size of /dev/shm in bytes.
func (s *Spec) shm() int64 {
	switch {
	case s.Limits.Shm > 0:
		return s.Limits.Shm
	case s.Limits.Memory > 0:
		return s.Limits.Memory / 2
	default:
		return 1 << 30
	}
}
