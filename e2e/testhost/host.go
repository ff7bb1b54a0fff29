package testhost

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// bootTimeout bounds a boot; on a busy machine one takes half a minute.
	bootTimeout = 4 * time.Minute
	// offTimeout is how long the host may take to power off before it is killed.
	offTimeout = 2 * time.Minute
)

// Config says what host to boot.
type Config struct {
	// Name is the host's: 1 to 30 of a-z, 0-9 and -. Hosts that run at once need
	// different ones.
	Name string
	// Suite is Debian's: bookworm or trixie.
	Suite string
	// Dir will hold the host; it must exist, and be empty or of an earlier host.
	Dir string
	// Devices are bound into the host beside the usual ones: /dev/fuse, say.
	Devices []string
}

// Host is a running host, or one that is powered off.
type Host struct {
	Config
	pid    int // of systemd-nspawn; 0: it is off
	leader int // of the host's first process
	exited chan struct{}
	groups []string
}

var validName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,29}$`)

// Boot unpacks and boots a host, and returns when systemd has started everything.
// ctx bounds the boot alone. The caller destroys the host, also after an error of
// anything that comes later; after an error of Boot nothing is left but c.Dir.
func Boot(ctx context.Context, c Config) (*Host, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("testhost: needs root")
	}
	if !validName.MatchString(c.Name) {
		return nil, fmt.Errorf("testhost: bad name %q", c.Name)
	}
	tar, err := base(ctx, c.Suite)
	if err != nil {
		return nil, fmt.Errorf("testhost: %w", err)
	}
	h := &Host{Config: c}
	if err := os.MkdirAll(h.Root(), 0o755); err != nil {
		return nil, err
	}
	if out, err := exec.CommandContext(ctx, "tar", "-xpf", tar, "-C", h.Root()).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("testhost: unpack: %w: %s", err, lastLines(out, 3))
	}
	// An identity of its own, and no look-up of names outside.
	for name, text := range map[string]string{"etc/machine-id": "", "etc/hostname": c.Name + "\n", "etc/hosts": "127.0.0.1 localhost " + c.Name + "\n", "etc/resolv.conf": ""} {
		if err := h.WriteFile("/"+name, []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	if err := h.Start(ctx); err != nil {
		return nil, errors.Join(err, h.Destroy())
	}
	return h, nil
}

// Root is where the host's root file system is seen from outside. Write there only
// while the host is off, or below directories that nothing inside mounts over.
func (h *Host) Root() string { return filepath.Join(h.Dir, "root") }

// Console is what the host said while it booted and after.
func (h *Host) Console() string {
	text, err := os.ReadFile(filepath.Join(h.Dir, "console.log"))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// WriteFile writes a file of the host's, from outside, with its directories.
func (h *Host) WriteFile(path string, text []byte, mode fs.FileMode) error {
	at := filepath.Join(h.Root(), path)
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		return err
	}
	if err := os.RemoveAll(at); err != nil { // a link that leads out, say
		return err
	}
	if err := os.WriteFile(at, text, mode); err != nil {
		return err
	}
	return os.Chmod(at, mode)
}

// Start boots the host if it is off, and waits until systemd has started everything.
func (h *Host) Start(ctx context.Context) error {
	if h.pid != 0 {
		return nil
	}
	ctx, done := context.WithTimeout(ctx, bootTimeout)
	defer done()
	if err := h.makeGroups(); err != nil {
		return err
	}
	console, err := os.Create(filepath.Join(h.Dir, "console.log"))
	if err != nil {
		return err
	}
	defer func() { _ = console.Close() }()
	args := []string{
		"-q", "-D", h.Root(), "-M", h.Name, "--boot", "--register=no", "--keep-unit", "--console=pipe",
		"--capability=all", "--drop-capability=CAP_SYS_MODULE", "--private-network", "--resolv-conf=off", "--timezone=off",
	}
	for _, d := range h.Devices {
		args = append(args, "--bind="+d)
	}
	// nspawn makes its host's groups in the one that it is in, so it goes into ours
	// first, in every hierarchy.
	script := `for g in $GROUPS_OF_HOST; do echo $$ >"$g/cgroup.procs" || exit 1; done; unset GROUPS_OF_HOST; exec systemd-nspawn "$@"`
	cmd := exec.Command("/bin/sh", append([]string{"-c", script, "sh"}, args...)...)
	cmd.Env = append(os.Environ(), "GROUPS_OF_HOST="+strings.Join(h.groups, " "),
		// CRIU and agentd need a pure cgroup v2, a writable /proc/sys and no seccomp filter.
		"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1", "SYSTEMD_NSPAWN_API_VFS_WRITABLE=1", "SYSTEMD_SECCOMP=0")
	cmd.Stdout, cmd.Stderr = console, console
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("testhost: systemd-nspawn: %w", err)
	}
	h.pid, h.exited = cmd.Process.Pid, make(chan struct{})
	go func(exited chan struct{}) {
		_ = cmd.Wait() // it says what is wrong on the console
		close(exited)
	}(h.exited)
	if err := h.await(ctx); err != nil {
		return errors.Join(fmt.Errorf("testhost: %s does not boot: %w: %s", h.Name, err, lastLines([]byte(h.Console()), 10)), h.off(false))
	}
	return nil
}

// await waits for systemd inside.
func (h *Host) await(ctx context.Context) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-h.exited:
			return errors.New("systemd-nspawn ended")
		case <-tick.C:
		}
		// Looked up each time: nspawn's first child is only a step on the way to it.
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", h.pid, h.pid))
		fields := strings.Fields(string(text))
		if err != nil || len(fields) == 0 {
			continue
		}
		if h.leader, err = strconv.Atoi(fields[0]); err != nil {
			continue
		}
		if _, err := h.Run(ctx, "test", "-S", "/run/systemd/private"); err == nil {
			break
		}
	}
	// Degraded is up, too: what failed is the test's to judge.
	out, err := h.Run(ctx, "systemctl", "is-system-running", "--wait")
	if state := strings.TrimSpace(out); state != "running" && state != "degraded" {
		return fmt.Errorf("systemd says %q: %w", state, err)
	}
	return nil
}

// Command is a command inside, as root, with nothing of our environment. Its input
// and output are the caller's.
func (h *Host) Command(ctx context.Context, argv ...string) *exec.Cmd {
	args := []string{
		"-t", strconv.Itoa(h.leader), "-a", "env", "-i", "-C", "/", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root", "LANG=C.UTF-8", "TERM=dumb", "SYSTEMD_PAGER=", "SYSTEMD_COLORS=0", "DEBIAN_FRONTEND=noninteractive",
	}
	cmd := exec.CommandContext(ctx, "nsenter", append(args, argv...)...)
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// ExitError is a command inside that failed.
type ExitError struct {
	Argv           []string
	Code           int
	Stdout, Stderr string
}

func (e *ExitError) Error() string {
	return fmt.Sprintf("%s: exit %d: %s", strings.Join(e.Argv, " "), e.Code, strings.TrimSpace(e.Stderr+"\n"+lastLines([]byte(e.Stdout), 5)))
}

// Run runs a command inside to its end and returns its standard output. One that
// fails is an *ExitError.
func (h *Host) Run(ctx context.Context, argv ...string) (string, error) {
	return h.Feed(ctx, "", argv...)
}

// Feed is Run with standard input.
func (h *Host) Feed(ctx context.Context, stdin string, argv ...string) (string, error) {
	cmd := h.Command(ctx, argv...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = &ExitError{Argv: argv, Code: exit.ExitCode(), Stdout: out.String(), Stderr: errs.String()}
	}
	return out.String(), err
}

// Shell is Run of a script by the host's /bin/sh, which stops at what fails.
func (h *Host) Shell(ctx context.Context, script string) (string, error) {
	return h.Run(ctx, "/bin/sh", "-euc", script)
}

// Copy copies a file of this machine into the running host.
func (h *Host) Copy(ctx context.Context, from, to string, mode fs.FileMode) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	cmd := h.Command(ctx, "/bin/sh", "-euc", `mkdir -p "$(dirname "$1")"; rm -f "$1"; cat >"$1"; chmod "$2" "$1"`, "sh", to, strconv.FormatUint(uint64(mode.Perm()), 8))
	cmd.Stdin = f
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("copy %s: %w: %s", to, err, lastLines(out, 3))
	}
	return nil
}

// Kill sends a signal to a process of the host, by its id inside.
func (h *Host) Kill(ctx context.Context, pid int, signal string) error {
	_, err := h.Run(ctx, "kill", "-"+signal, strconv.Itoa(pid))
	return err
}

// PowerOff shuts the host down as its power button would; Start boots it again.
func (h *Host) PowerOff() error { return h.off(true) }

// Destroy ends the host and deletes it. It may be called again.
func (h *Host) Destroy() error {
	err := h.off(false)
	if rerr := removeTree(h.Root()); err == nil {
		err = rerr
	}
	return err
}

func (h *Host) off(gently bool) error {
	if h.pid == 0 {
		return h.removeGroups()
	}
	if h.leader != 0 && gently {
		_ = unix.Kill(h.leader, syscall.Signal(34+4)) // SIGRTMIN+4: power off
		select {
		case <-h.exited:
		case <-time.After(offTimeout):
		}
	}
	select {
	case <-h.exited:
	default:
		// nspawn first: it would wait for what it started.
		_ = unix.Kill(h.pid, unix.SIGKILL)
		<-h.exited
	}
	for _, g := range h.groups { // everything that is left, in v2's: v1 has no such file
		f, err := os.OpenFile(filepath.Join(g, "cgroup.kill"), os.O_WRONLY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			_, err = f.WriteString("1")
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			return fmt.Errorf("testhost: kill what is left: %w", err)
		}
	}
	h.pid, h.leader = 0, 0
	_ = os.Remove("/run/systemd/nspawn/propagate/" + h.Name)
	return h.removeGroups()
}

// makeGroups makes the host's cgroups: in v2, and in v1's name=systemd if there is one.
func (h *Host) makeGroups() error {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	h.groups = nil
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 4 || (f[2] != "cgroup2" && (f[2] != "cgroup" || !strings.Contains(f[3], "name=systemd"))) {
			continue
		}
		g := filepath.Join(f[1], "postern-testhost-"+h.Name)
		if slices.Contains(h.groups, g) {
			continue
		}
		if err := os.Mkdir(g, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		h.groups = append(h.groups, g)
	}
	if len(h.groups) == 0 {
		return errors.New("testhost: no cgroup2 is mounted here")
	}
	return nil
}

// removeGroups removes them, once the last process inside is forgotten.
func (h *Host) removeGroups() error {
	var last error
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		last = nil
		for _, g := range h.groups {
			var dirs []string
			_ = filepath.WalkDir(g, func(p string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, p)
				}
				return nil // gone meanwhile
			})
			slices.Reverse(dirs)
			for _, d := range dirs {
				if err := unix.Rmdir(d); err != nil && !errors.Is(err, unix.ENOENT) {
					last = fmt.Errorf("testhost: cgroup %s: %w", d, err)
				}
			}
		}
		if last == nil || time.Now().After(end) {
			h.groups = nil
			return last
		}
	}
}

// removeTree deletes a root file system, and nothing that is mounted below it.
func removeTree(dir string) error {
	if out, err := exec.Command("rm", "-rf", "--one-file-system", dir).CombinedOutput(); err != nil {
		return fmt.Errorf("testhost: %w: %s", err, lastLines(out, 3))
	}
	return nil
}
