package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/postern-dev/postern/agentd/cgroup"

	"golang.org/x/sys/unix"
)

// Times that a start may take, beside what its context says.
const (
	startTimeout = 60 * time.Second
	mainTimeout  = 10 * time.Second
)

// hostSide is what a kernel has on the host and outside of its tree.
type hostSide struct {
	spec    Spec
	netns   *os.File
	cgroups *cgroup.Groups
	fence   *fence
	missing []string // what this host can't hold the kernel to, beside cgroups
}

// coresTaken says whether a program of the host gets cores of kernels: it does
// unless RLIMIT_CORE is 1, which may be more than this process may set.
func coresTaken() []string {
	var have unix.Rlimit
	pattern, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	if err != nil || len(pattern) == 0 || pattern[0] != '|' || unix.Getrlimit(unix.RLIMIT_CORE, &have) != nil || have.Max > 0 || mayRaiseLimits() {
		return nil
	}
	return []string{"cores of kernels go to the program in /proc/sys/kernel/core_pattern: give agentd LimitCORE=1 or CAP_SYS_RESOURCE"}
}

// mayRaiseLimits reports whether this process has CAP_SYS_RESOURCE.
func mayRaiseLimits() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

// makeHostSide makes directories, cgroups, network namespace and fence. On an
// error nothing of it is left but directories.
func makeHostSide(spec Spec, restored bool) (h *hostSide, err error) {
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	if spec.Shown == nil {
		if spec.Shown, err = findShown(spec.Visible); err != nil {
			return nil, err
		}
	}
	h = &hostSide{spec: spec, missing: coresTaken()}
	defer func() {
		if err != nil {
			h.release()
			h = nil
		}
	}()
	if err := h.spec.makeDirs(); err != nil {
		return h, err
	}
	if h.cgroups, err = cgroup.Make(cgroup.Kernels, h.spec.ID, h.spec.Limits.groups(), restored); err != nil {
		return h, err
	}
	if h.netns, err = newNetNS(); err != nil {
		return h, err
	}
	h.fence, err = newFence(h.spec.Network, h.netns)
	return h, err
}

// release gives back what makeHostSide made.
func (h *hostSide) release() {
	h.fence.close()
	if h.netns != nil {
		_ = h.netns.Close()
	}
	h.cgroups.Remove()
}

// makeDirs makes what may be missing of the kernel's directories.
func (s *Spec) makeDirs() error {
	if err := mkdirFor(s.rootDir(), 0o700, 0, 0); err != nil {
		return err
	}
	// Others may pass through it by name inside, where only its parts are.
	if err := mkdirFor(s.PrivateDir, 0o700, 0, 0); err != nil {
		return err
	}
	for _, dir := range []string{s.RunDir, filepath.Join(s.PrivateDir, "home"), filepath.Join(s.PrivateDir, "tmp")} {
		if err := mkdirFor(dir, 0o700, s.UID, s.GID); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(s.LogFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("make the kernel's log: %w", err)
	}
	defer f.Close() //nolint:errcheck // nothing was written
	return f.Chown(int(s.UID), int(s.GID))
}

// mkdirFor makes a directory for an owner. One that is there is taken over.
func mkdirFor(path string, mode fs.FileMode, uid, gid uint32) error {
	err := os.Mkdir(path, mode)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make the kernel's directory: %w", err)
	}
	st, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return fmt.Errorf("make the kernel's directory: %s is something else", path)
	}
	return os.Chown(path, int(uid), int(gid))
}

// Start runs spec's program in a new sandbox. The context bounds the start, not
// the kernel. If the starter dies before Start returns, there is either nothing
// left that runs, or sandbox.json in StateDir names it: Find reads it. The error
// is one line; after an error nothing runs and nothing is left but directories.
func Start(ctx context.Context, spec Spec) (*Sandbox, error) {
	h, err := makeHostSide(spec, false)
	if err != nil {
		return nil, fmt.Errorf("start kernel %s: %w", spec.ID, err)
	}
	s, err := h.start(ctx)
	if err != nil {
		h.release()
		return nil, fmt.Errorf("start kernel %s: %w", spec.ID, err)
	}
	return s, nil
}

func (h *hostSide) start(ctx context.Context) (*Sandbox, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	pid, pidfd, conn, err := h.clone()
	if err != nil {
		return nil, err
	}
	defer conn.Close() //nolint:errcheck // its job is done
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	s := newSandbox(h, pid, pidfd)
	if err := h.command(ctx, s, conn); err != nil {
		s.abort()
		return nil, err
	}
	// One that has ended already says so by Wait.
	if err := s.findMain(ctx); err != nil && !errors.Is(err, ErrGone) {
		s.abort()
		return nil, err
	}
	s.run()
	return s, nil
}

// command leads the new process through its start.
func (h *hostSide) command(ctx context.Context, s *Sandbox, conn net.Conn) error {
	told := func(err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("the sandbox ended while it was set up: %w", err)
	}
	if err := h.cgroups.Add(s.pid); err != nil {
		return err
	}
	talk, answers := json.NewEncoder(conn), json.NewDecoder(conn)
	if err := talk.Encode(order{Spec: h.spec, NoGroup: !h.cgroups.Enforces(cgroup.PIDs)}); err != nil {
		return told(err)
	}
	var a answer
	if err := answers.Decode(&a); err != nil {
		return told(err)
	}
	if a.Error != "" {
		return errors.New(a.Error)
	}
	if err := s.note(); err != nil {
		return err
	}
	if err := talk.Encode(goAhead{Go: true}); err != nil {
		return told(err)
	}
	switch err := answers.Decode(&a); {
	case errors.Is(err, io.EOF):
		return nil // it executed
	case err != nil:
		return told(err)
	default:
		return errors.New(a.Error)
	}
}

// clone starts the process that becomes init, in its namespaces.
func (h *hostSide) clone() (pid, pidfd int, conn net.Conn, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, 0, nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "init"), os.NewFile(uintptr(pair[1]), "starter")
	defer ours.Close()   //nolint:errcheck // FileConn has its own
	defer theirs.Close() //nolint:errcheck // the child has its own
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, 0, nil, err
	}
	defer null.Close() //nolint:errcheck // the child has its own
	// What agentd's runtime says when init breaks down before it has its own log.
	log, err := os.OpenFile(h.spec.LogFile, os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW, 0)
	if err != nil {
		return 0, 0, nil, err
	}
	defer log.Close() //nolint:errcheck // the child has its own
	conn, err = net.FileConn(ours)
	if err != nil {
		return 0, 0, nil, err
	}
	binary := h.spec.Binary
	if binary == "" {
		binary = "/proc/self/exe"
	}
	pidfd = -1
	err = inNetNS(h.netns, func() error {
		p, err := os.StartProcess(binary, []string{"agentd", InitArg}, &os.ProcAttr{
			Dir:   "/",
			Env:   []string{"GODEBUG=containermaxprocs=0,updatemaxprocs=0", "GOMAXPROCS=1", "GOTRACEBACK=none"},
			Files: []*os.File{null, log, log, theirs},
			Sys: &syscall.SysProcAttr{
				Setsid:     true,
				Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
			},
		})
		if err != nil {
			return fmt.Errorf("start the sandbox: %w", err)
		}
		pid = p.Pid
		// It is our child and not waited for: the number is still its own.
		pidfd, err = unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
		if err != nil {
			_ = p.Kill()
			_, _ = p.Wait()
			return fmt.Errorf("pidfd_open: %w (Linux 5.10 or later is needed)", err)
		}
		return p.Release()
	})
	if err != nil {
		_ = conn.Close()
		return 0, 0, nil, err
	}
	return pid, pidfd, conn, nil
}
