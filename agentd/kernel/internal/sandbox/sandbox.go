package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/postern-dev/postern/agentd/cgroup"

	"golang.org/x/sys/unix"
)

// ErrGone is returned by Adopt and Find when the kernel does not run any more.
var ErrGone = errors.New("the kernel does not run")

// Exit is how a kernel ended.
type Exit struct {
	// Code is the main process's exit code: 128 and the signal if one ended it,
	// -1 if nobody could see it (the kernel's starter had died).
	Code int `json:"code"`
	// Killed reports that Kill did it.
	Killed bool `json:"killed,omitempty"`
	// Reason is one line for people.
	Reason string `json:"reason"`
}

// Sandbox is a running kernel, or one that has ended.
type Sandbox struct {
	host  *hostSide
	pid   int // of init, on the host
	pidfd *os.File
	main  int // host pid of the main process

	done chan struct{} // closed when init has ended and was reaped
	exit Exit          // valid when done is closed

	detach context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	killed  bool
	over    string // why the watch killed it
	cleaned bool
}

func newSandbox(h *hostSide, pid, pidfd int) *Sandbox {
	return &Sandbox{host: h, pid: pid, pidfd: os.NewFile(uintptr(pidfd), "pidfd"), done: make(chan struct{}), detach: func() {}}
}

// run starts the goroutines that see the kernel's end and its disk use.
func (s *Sandbox) run() {
	ctx, cancel := context.WithCancel(context.Background())
	s.detach = cancel
	s.wg.Go(func() { s.reap(ctx) })
	if s.host.spec.Limits.Disk > 0 {
		s.wg.Go(func() { s.watchDisk(ctx) })
	}
}

// PID is init's process id on the host: what CRIU dumps.
func (s *Sandbox) PID() int { return s.pid }

// Main is the main process's id on the host.
func (s *Sandbox) Main() int { return s.main }

// Spec is the Spec that Start was given with what it found: keep it to adopt or
// restore the kernel.
func (s *Sandbox) Spec() Spec { return s.host.spec }

// Missing are what this host can't hold the kernel to, limits mostly, one line each.
func (s *Sandbox) Missing() []string { return append(s.host.cgroups.Lacks(), s.host.missing...) }

// OOMKills says how many of the kernel's processes were killed because all of them
// together were over the memory limit, since it was started or restored. The
// kernel itself may live on.
func (s *Sandbox) OOMKills() int { return s.host.cgroups.OOMKills() }

// Done is closed when the kernel has ended.
func (s *Sandbox) Done() <-chan struct{} { return s.done }

// Wait waits for the kernel's end. The context bounds the wait alone. After
// Close it returns ErrGone, since nobody looks any more.
func (s *Sandbox) Wait(ctx context.Context) (Exit, error) {
	select {
	case <-s.done:
		return s.exit, nil
	case <-ctx.Done():
		return Exit{}, context.Cause(ctx)
	}
}

// Interrupt sends SIGINT to the main process's group, as Jupyter does.
func (s *Sandbox) Interrupt() error {
	select {
	case <-s.done:
		return ErrGone
	default:
	}
	if s.main <= 1 {
		return ErrGone // it ended before it was seen
	}
	// The group's number can't be another's: its leader's parent is init, which
	// ends when it has reaped the leader, and with init everything.
	if err := unix.Kill(-s.main, unix.SIGINT); err != nil {
		return fmt.Errorf("interrupt the kernel: %w", err)
	}
	return nil
}

// InNetwork runs do on a thread inside the kernel's network namespace: sockets
// made there can be reached by the kernel and do not stand in the way of a dump.
// Goroutines that do starts are outside.
func (s *Sandbox) InNetwork(do func() error) error { return inNetNS(s.host.netns, do) }

// Kill ends the kernel with all its processes and waits for their end, at most
// as long as the context says; then it cleans up. It may be called twice.
func (s *Sandbox) Kill(ctx context.Context) error {
	s.mu.Lock()
	s.killed = true
	s.mu.Unlock()
	if err := s.signalInit(); err != nil {
		return err
	}
	select {
	case <-s.done:
	case <-ctx.Done():
		return fmt.Errorf("end kernel %s: %w: a process of it waits for a file system that does not answer", s.host.spec.ID, context.Cause(ctx))
	}
	s.cleanup()
	return nil
}

// Close lets go of the sandbox. A kernel that runs goes on; Adopt takes it over
// again. One that has ended is cleaned up after.
func (s *Sandbox) Close() {
	s.detach()
	s.wg.Wait()
	select {
	case <-s.done:
		s.cleanup()
	default:
		s.host.fence.close()
		_ = s.host.netns.Close()
	}
	_ = s.pidfd.Close()
}

// signalInit kills init, and so the whole tree.
func (s *Sandbox) signalInit() error {
	var err error
	conn, cerr := s.pidfd.SyscallConn()
	if cerr != nil {
		return nil // closed
	}
	_ = conn.Control(func(fd uintptr) { err = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end kernel %s: %w", s.host.spec.ID, err)
	}
	return nil
}

// abort ends a start that failed.
func (s *Sandbox) abort() {
	_ = s.signalInit()
	s.reap(context.Background())
	_ = os.Remove(s.host.spec.stateFile())
	_ = s.pidfd.Close()
}

// reap waits for init's end and takes its status, if it is this process's child.
func (s *Sandbox) reap(ctx context.Context) {
	conn, err := s.pidfd.SyscallConn()
	if err != nil {
		return
	}
	stop := context.AfterFunc(ctx, func() { _ = s.pidfd.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	err = conn.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		return err == nil && n > 0
	})
	if err != nil {
		return // let go
	}
	exit := Exit{Code: -1}
	var status unix.WaitStatus
	for {
		got, err := unix.Wait4(s.pid, &status, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && got == s.pid {
			exit.Code = status.ExitStatus()
			if status.Signaled() {
				exit.Code = 128 + int(status.Signal())
			}
		}
		break
	}
	s.mu.Lock()
	exit.Killed = s.killed
	over := s.over
	s.mu.Unlock()
	exit.Reason = s.reason(exit, over)
	s.exit = exit
	close(s.done)
}

// reason says in a line why the kernel ended.
func (s *Sandbox) reason(e Exit, over string) string {
	oom := s.host.cgroups.OOMKills() > 0
	limit := s.host.spec.Limits.Memory
	switch {
	case over != "":
		return over
	case e.Killed:
		return "stopped"
	case oom && limit > 0 && (e.Code == 128+int(unix.SIGKILL) || e.Code == -1):
		return "killed: over its memory limit of " + Bytes(limit)
	case e.Code == -1:
		return "ended while nobody watched"
	case e.Code == exitNoExec:
		return "ended with exit code 127: its program could not be executed"
	case e.Code > 128:
		return "killed by " + unix.SignalName(unix.Signal(e.Code-128))
	default:
		return "ended with exit code " + strconv.Itoa(e.Code)
	}
}

// Bytes prints a size as the configuration writes it: 4GiB as "4 GiB".
func Bytes(n int64) string { return cgroup.Size(n) }

// cleanup gives back what the host holds for a kernel that has ended.
func (s *Sandbox) cleanup() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cleaned {
		return
	}
	s.cleaned = true
	s.detach()
	s.host.release()
	_ = os.Remove(s.host.spec.stateFile())
	unmountRoot(s.host.spec.rootDir())
}

// state is what sandbox.json says.
type state struct {
	PID     int    `json:"pid"`
	Start   uint64 `json:"start"` // of the process, in clock ticks since boot
	Boot    string `json:"boot"`  // the boot's id
	MainPID int    `json:"main_pid"`
}

// note writes sandbox.json. It need not survive a power cut: no process does.
func (s *Sandbox) note() error {
	start, err := startTime(s.pid)
	if err != nil {
		return err
	}
	data, err := json.Marshal(state{PID: s.pid, Start: start, Boot: bootID(), MainPID: s.host.spec.MainPID})
	if err != nil {
		return err
	}
	path := s.host.spec.stateFile()
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// Find says which process is init of the kernel whose StateDir this is, and the
// main process's id inside. ErrGone: none runs.
func Find(stateDir string) (pid, mainPID int, err error) {
	data, err := os.ReadFile((&Spec{StateDir: stateDir}).stateFile())
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, ErrGone
	}
	if err != nil {
		return 0, 0, err
	}
	var st state
	if json.Unmarshal(data, &st) != nil {
		// It is not synced, and renamed when it is whole: only a power cut leaves a part of
		// it, and no process.
		return 0, 0, ErrGone
	}
	start, err := startTime(st.PID)
	if err != nil || start != st.Start || st.Boot != bootID() {
		return 0, 0, ErrGone
	}
	return st.PID, st.MainPID, nil
}

func bootID() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id))
}

// startTime is field 22 of /proc/PID/stat.
func startTime(pid int) (uint64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, ErrGone
	}
	_, rest, _ := strings.Cut(string(text[max(0, strings.LastIndexByte(string(text), ')')):]), " ")
	fields := strings.Fields(rest)
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return 0, ErrGone
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// findMain finds the main process: after a start init's only child, after a
// restore the one whose number inside is MainPID.
func (s *Sandbox) findMain(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, mainTimeout)
	defer cancel()
	for {
		main, inside, err := findChild(s.pid, s.host.spec.MainPID)
		if err == nil {
			s.main, s.host.spec.MainPID = main, inside
			return s.note()
		}
		if _, gone := startTime(s.pid); gone != nil {
			return ErrGone
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("find the kernel's main process: %w", err)
		case <-time.After(time.Millisecond):
		}
	}
}

// findChild finds the child of init that has the number inside, or any if that
// is zero.
func findChild(init, inside int) (pid, ns int, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", init, init))
	if err != nil {
		return 0, 0, err
	}
	for _, field := range strings.Fields(string(text)) {
		child, err := strconv.Atoi(field)
		if err != nil {
			return 0, 0, err
		}
		numbers, err := statusField(child, "NSpid:")
		if err != nil || len(numbers) != 2 {
			continue
		}
		if inside == 0 || int(numbers[1]) == inside {
			return child, int(numbers[1]), nil
		}
	}
	return 0, 0, errors.New("init has no such child")
}

// statusField reads a line of numbers of /proc/PID/status.
func statusField(pid int, name string) ([]uint64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		rest, found := strings.CutPrefix(line, name)
		if !found {
			continue
		}
		var numbers []uint64
		for _, f := range strings.Fields(rest) {
			n, err := strconv.ParseUint(f, 10, 64)
			if err != nil {
				return nil, err
			}
			numbers = append(numbers, n)
		}
		return numbers, nil
	}
	return nil, fmt.Errorf("/proc/%d/status has no %s", pid, name)
}

// Cleanup ends what is left of a kernel that nobody holds, and removes its mounts
// and cgroups; directories stay. It is for agentd's start and may be called again.
func Cleanup(ctx context.Context, spec Spec) error {
	if err := spec.Validate(); err != nil {
		return err
	}
	killed := map[int]uint64{}
	for {
		left, err := spec.killLeft(killed)
		if err != nil {
			return err
		}
		if left == 0 {
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("clean up kernel %s: %d processes do not end: %w", spec.ID, left, context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
	cgroup.Remove(cgroup.Kernels, spec.ID)
	unmountRoot(spec.rootDir())
	_ = os.Remove(spec.stateFile())
	return nil
}

// killLeft kills what is left of a kernel and says how many processes that were,
// zombies not counted: init, by sandbox.json; what is in its cgroups, whoever it
// belongs to; and what runs as its user and sees its run directory, since forks of a
// kernel share the user. What it kills it adds to killed, with its start time: a process that
// ends has no root any more, by which it was found, and is still there for a moment.
func (s *Spec) killLeft(killed map[int]uint64) (int, error) {
	left := map[int]bool{}
	for pid, started := range killed {
		if now, err := startTime(pid); err == nil && now == started {
			left[pid] = true
		}
	}
	if pid, _, err := Find(s.StateDir); err == nil {
		left[pid] = true
	}
	for _, pid := range cgroup.Processes(cgroup.Kernels, s.ID) {
		left[pid] = true
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	run, runErr := os.Stat(s.RunDir)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || runErr != nil {
			continue
		}
		uids, err := statusField(pid, "Uid:")
		if err != nil || !slices.Contains(uids, uint64(s.UID)) {
			continue
		}
		// A directory of the sandbox's own: nothing on the way can hang.
		if seen, err := os.Stat(fmt.Sprintf("/proc/%d/root%s", pid, RunInside)); err == nil && os.SameFile(seen, run) {
			left[pid] = true
		}
	}
	n := 0
	for pid := range left {
		started, err := startTime(pid)
		if err != nil || pid == os.Getpid() {
			continue // a zombie, which is its parent's to reap
		}
		if unix.Kill(pid, unix.SIGKILL) == nil {
			killed[pid] = started
			n++
		}
	}
	return n, nil
}

// unmountRoot takes away the mount that Prepare made, if it is there.
func unmountRoot(dir string) {
	for range 8 {
		if unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) != nil {
			return
		}
	}
}
