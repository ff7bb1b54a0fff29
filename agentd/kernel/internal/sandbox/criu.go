package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/postern-dev/postern/agentd/cgroup"

	"golang.org/x/sys/unix"
)

// External is a mount that CRIU's images know by key only.
//
//	dump:    --external mnt[Inside]:Key
//	restore: --external mnt[Key]:Outside
type External struct {
	Key     string `json:"key"`
	Inside  string `json:"inside"`
	Outside string `json:"outside"`
}

// CRIUSpec is what a dump or a restore needs to know. It is plain data.
type CRIUSpec struct {
	// PID is what to dump; zero before a restore.
	PID int `json:"pid,omitempty"`
	// MainPID is the main process's id inside.
	MainPID int `json:"main_pid,omitempty"`
	// Root is for --root of a restore: a private mount that Prepare made.
	Root string `json:"root"`
	// Externals are all mounts from outside.
	Externals []External `json:"externals"`
	// Cgroups are the cgroup.procs files to write a process's id to, so that it
	// and what it restores are in the kernel's cgroups.
	Cgroups []string `json:"cgroups,omitempty"`
	// NetNSKey names the network namespace in images of before CRIU joined it; NetNSInode is
	// its inode.
	NetNSKey   string `json:"netns_key"`
	NetNSInode uint64 `json:"netns_inode"`
	// NetNSPath is the namespace, for CRIU to join before it dumps or restores. It can be
	// opened by root as long as the Sandbox or Prepared is there.
	NetNSPath string `json:"netns_path"`
}

const netNSKey = "postern-net"

// errFiltered is what stands in the way of CRIU when agentd runs behind a seccomp
// filter: it is refused other processes' filters (ptrace(2), PTRACE_SECCOMP_GET_FILTER).
var errFiltered = errors.New("agentd runs behind a seccomp filter of its unit, and CRIU would too: start agentd by the unit of its package, without agentd-sql-only.conf (docs/privileges.md)")

func (h *hostSide) criu() (CRIUSpec, error) {
	if mode, err := statusField(os.Getpid(), "Seccomp:"); err == nil && len(mode) == 1 && mode[0] != 0 {
		return CRIUSpec{}, errFiltered
	}
	at := h.spec.rootDir()
	mounts, err := h.spec.treeMounts(at)
	if err != nil {
		return CRIUSpec{}, err
	}
	c := CRIUSpec{MainPID: h.spec.MainPID, Root: at, Cgroups: h.cgroups.Paths(), NetNSKey: netNSKey}
	for _, m := range mounts {
		c.Externals = append(c.Externals, External{Key: m.key, Inside: m.inside, Outside: m.outside})
	}
	if c.NetNSInode, err = netNSInode(h.netns); err != nil {
		return CRIUSpec{}, err
	}
	c.NetNSPath = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), h.netns.Fd())
	return c, nil
}

// Checkpointing is what a dump needs to know.
func (s *Sandbox) Checkpointing() (CRIUSpec, error) {
	c, err := s.host.criu()
	c.PID = s.pid
	return c, err
}

// Prepared is everything that a kernel has on the host before CRIU restores its
// processes.
type Prepared struct {
	host *hostSide
	criu CRIUSpec
}

// Prepare makes what a restore needs: the root directory's mount, cgroups, a
// network namespace of the same shape. The spec is the one that Sandbox.Spec
// returned when the kernel was dumped, with the places of the new kernel. Either
// Adopt or Abort ends it.
func Prepare(spec Spec) (*Prepared, error) {
	if spec.MainPID == 0 || spec.Shown == nil {
		return nil, fmt.Errorf("restore kernel %s: its specification lacks main_pid or shown, which a start fills in", spec.ID)
	}
	h, err := makeHostSide(spec, true)
	if err != nil {
		return nil, fmt.Errorf("restore kernel %s: %w", spec.ID, err)
	}
	p := &Prepared{host: h}
	unmountRoot(h.spec.rootDir())
	err = h.spec.buildRoot(h.spec.rootDir())
	if err == nil {
		err = sealRoot(h.spec.rootDir())
	}
	if err == nil {
		p.criu, err = h.criu()
	}
	if err != nil {
		p.Abort()
		return nil, fmt.Errorf("restore kernel %s: %w", spec.ID, err)
	}
	return p, nil
}

// CRIU is what a restore needs to know.
func (p *Prepared) CRIU() CRIUSpec { return p.criu }

// Abort gives everything back. If CRIU left processes, Cleanup ends them.
func (p *Prepared) Abort() {
	unmountRoot(p.host.spec.rootDir())
	p.host.release()
}

// Adopt takes over what CRIU restored; pid is init's on the host. To learn the
// kernel's exit code, the process that adopts must be init's parent: with
// PR_SET_CHILD_SUBREAPER it becomes that when criu ends. After an error Abort has
// been done.
func (p *Prepared) Adopt(ctx context.Context, pid int) (*Sandbox, error) {
	s, err := p.host.adopt(ctx, pid)
	if err != nil {
		p.Abort()
		return nil, fmt.Errorf("adopt restored kernel %s: %w", p.host.spec.ID, err)
	}
	unmountRoot(p.host.spec.rootDir())
	return s, nil
}

// Adopt takes over a kernel that runs, after its starter died. pid is init's on
// the host; zero means what Find says.
func Adopt(ctx context.Context, spec Spec, pid int) (*Sandbox, error) {
	s, err := adopt(ctx, spec, pid)
	if err != nil {
		return nil, fmt.Errorf("adopt kernel %s: %w", spec.ID, err)
	}
	return s, nil
}

func adopt(ctx context.Context, spec Spec, pid int) (*Sandbox, error) {
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	found, main, err := Find(spec.StateDir)
	switch {
	case pid == 0 && err != nil:
		return nil, err
	case pid == 0:
		pid = found
	}
	if spec.MainPID == 0 && err == nil && pid == found {
		spec.MainPID = main
	}
	h := &hostSide{spec: spec, missing: coresTaken()}
	h.cgroups = cgroup.Find(cgroup.Kernels, spec.ID, spec.Limits.groups())
	if h.netns, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", pid)); err != nil {
		return nil, ErrGone
	}
	if h.fence, err = newFence(spec.Network, h.netns); err != nil {
		_ = h.netns.Close()
		return nil, err
	}
	s, err := h.adopt(ctx, pid)
	if err != nil {
		h.fence.close()
		_ = h.netns.Close()
		return nil, err
	}
	return s, nil
}

// adopt makes sure that pid is a kernel's init of this spec, and watches it.
func (h *hostSide) adopt(ctx context.Context, pid int) (*Sandbox, error) {
	pidfd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, ErrGone
	}
	if err != nil {
		return nil, fmt.Errorf("pidfd_open: %w", err)
	}
	s := newSandbox(h, pid, pidfd)
	fail := func(err error) (*Sandbox, error) {
		_ = s.pidfd.Close()
		return nil, err
	}
	numbers, err := statusField(pid, "NSpid:")
	if err != nil {
		return fail(ErrGone)
	}
	uids, err := statusField(pid, "Uid:")
	if err != nil {
		return fail(ErrGone)
	}
	if len(numbers) != 2 || numbers[1] != 1 || len(uids) == 0 || uids[0] != uint64(h.spec.UID) {
		return fail(fmt.Errorf("process %d is not the init of this kernel", pid))
	}
	if err := s.findMain(ctx); err != nil {
		return fail(err)
	}
	s.run()
	return s, nil
}
