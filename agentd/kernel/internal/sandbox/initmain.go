package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// InitArg is the first argument of the process that becomes a kernel's init.
const InitArg = "kernel-init"

// initFD is the descriptor of the socket to the starter.
const initFD = 3

// The talk between starter and init, JSON on a socket: the starter puts the
// process into its cgroups and then sends an order; init makes everything ready
// and answers; the starter notes the process and says go; init ends its side by
// executing. Either end's death before go ends the other's work.
type order struct {
	Spec Spec `json:"spec"`
	// NoGroup: no cgroup limits the number of processes.
	NoGroup bool `json:"no_group,omitempty"`
}

type answer struct {
	Error string `json:"error,omitempty"`
}

type goAhead struct {
	Go bool `json:"go"`
}

// InitMain is the process that Start starts, in namespaces of its own. It
// returns only if something failed; the code is for os.Exit.
func InitMain() int {
	runtime.LockOSThread()
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "agentd: "+InitArg+" is for agentd's own use")
		return 2
	}
	// The socket is not inherited by what follows.
	if err := unix.CloseRange(initFD, ^uint(0)>>33, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return 1
	}
	f := os.NewFile(initFD, "starter")
	conn, err := net.FileConn(f)
	_ = f.Close()
	if err != nil {
		return 1
	}
	talk, answers := json.NewDecoder(conn), json.NewEncoder(conn)
	var o order
	if err := talk.Decode(&o); err != nil {
		return 1 // the starter is gone
	}
	path, err := o.Spec.enter(o.NoGroup)
	if err != nil {
		_ = answers.Encode(answer{Error: err.Error()})
		return 1
	}
	if err := answers.Encode(answer{}); err != nil {
		return 1
	}
	var g goAhead
	if err := talk.Decode(&g); err != nil || !g.Go {
		return 1
	}
	argv := append([]string{initInside, path}, o.Spec.Argv...)
	err = o.Spec.execute(argv)
	_ = answers.Encode(answer{Error: err.Error()})
	return 1
}

// enter goes from root on the host's file tree to the kernel's user in its own.
// It returns the path of the program.
func (s *Spec) enter(noGroup bool) (string, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return "", fmt.Errorf("make mounts private: %w", err)
	}
	if err := s.enterRoot(); err != nil {
		return "", err
	}
	if err := unix.Sethostname([]byte(hostName)); err != nil {
		return "", fmt.Errorf("set the host's name: %w", err)
	}
	if err := s.openStdio(); err != nil {
		return "", err
	}
	if err := s.limit(noGroup); err != nil {
		return "", err
	}
	if err := s.drop(); err != nil {
		return "", err
	}
	unix.Umask(0o022)
	if err := os.Chdir(s.dir()); err != nil {
		return "", fmt.Errorf("working directory: %w", err)
	}
	return s.program()
}

func (s *Spec) enterRoot() error {
	at := s.rootDir()
	if err := s.buildRoot(at); err != nil {
		return err
	}
	mounts, err := s.treeMounts(at)
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if err := m.mountOn(at); err != nil {
			return err
		}
	}
	for _, m := range []struct {
		source, target, kind, data string
		flags                      uintptr
	}{
		{"proc", "/proc", "proc", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"shm", "/dev/shm", "tmpfs", fmt.Sprintf("mode=1777,size=%d", s.shm()), unix.MS_NOSUID | unix.MS_NODEV},
		{"devpts", "/dev/pts", "devpts", "newinstance,ptmxmode=0666,mode=0620", unix.MS_NOSUID | unix.MS_NOEXEC},
	} {
		if err := unix.Mount(m.source, at+m.target, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s for the kernel: %w", m.target, err)
		}
	}
	if err := os.Chdir(at); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the host's file tree: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	return sealRoot("/")
}

// openStdio replaces the first three descriptors by some from inside the tree:
// CRIU can't dump one of a mount that the kernel does not have.
func (s *Spec) openStdio() error {
	in, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/null: %w", err)
	}
	// CRIU checks the size of files at a restore, but not of those that are only
	// appended to.
	out, err := unix.Open(logInside, unix.O_WRONLY|unix.O_APPEND|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the log: %w", err)
	}
	for fd, from := range []int{in, out, out} {
		if err := unix.Dup3(from, fd, 0); err != nil {
			return err
		}
	}
	return nil
}

// limit sets resource limits, for init and thus for all processes.
func (s *Spec) limit(noGroup bool) error {
	set := func(what string, resource int, value uint64) error {
		if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: value, Max: value}); err != nil {
			return fmt.Errorf("limit %s to %d: %w", what, value, err)
		}
		return nil
	}
	// One byte: no core file, and no program that takes one (core(5)). A core
	// holds everything that the kernel knows. Below a hard limit of 0 that stays,
	// without CAP_SYS_RESOURCE, and coresTaken says what it means.
	if err := set("core files", unix.RLIMIT_CORE, 1); err != nil && !errors.Is(err, unix.EPERM) {
		return err
	}
	var have unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &have); err != nil {
		return err
	}
	want := s.Limits.Files
	if want == 0 {
		want = 65536
	}
	if err := set("open files", unix.RLIMIT_NOFILE, min(want, have.Max)); err != nil {
		return err
	}
	if s.Limits.PIDs > 0 && noGroup {
		// It counts all processes of the user: the kernel's and its forks'.
		if err := unix.Getrlimit(unix.RLIMIT_NPROC, &have); err != nil {
			return err
		}
		if err := set("processes", unix.RLIMIT_NPROC, min(uint64(s.Limits.PIDs), have.Max)); err != nil {
			return err
		}
	}
	if s.Limits.Disk > 0 {
		return set("the size of a file", unix.RLIMIT_FSIZE, uint64(s.Limits.Disk))
	}
	return nil
}

// drop gives up every privilege of the calling thread, the only one that
// survives the execution, for good.
func (s *Spec) drop() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	for capability := range uintptr(64) {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // there is none of this number
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", capability, err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("drop ambient capabilities: %w", err)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); e != 0 {
		return fmt.Errorf("drop groups: %w", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(s.GID), uintptr(s.GID), uintptr(s.GID)); e != 0 {
		return fmt.Errorf("become group %d: %w", s.GID, e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(s.UID), uintptr(s.UID), uintptr(s.UID)); e != 0 {
		return fmt.Errorf("become user %d: %w", s.UID, e)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if _, _, e := unix.RawSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none[0])), 0); e != 0 {
		return fmt.Errorf("drop capabilities: %w", e)
	}
	return nil
}

// program is the absolute path of Argv[0], which the kernel's user may execute.
func (s *Spec) program() (string, error) {
	name := s.Argv[0]
	if filepath.IsAbs(name) {
		if err := unix.Access(name, unix.X_OK); err != nil {
			return "", fmt.Errorf("%s cannot be executed in the kernel's sandbox (%w): only /usr, /opt and the visible paths of the configuration are there", name, err)
		}
		return name, nil
	}
	for _, e := range s.environment() {
		list, found := strings.CutPrefix(e, "PATH=")
		if !found || strings.Contains(name, "/") {
			continue
		}
		for dir := range strings.SplitSeq(list, ":") {
			path := filepath.Join("/", dir, name)
			st, err := os.Stat(path)
			if err == nil && st.Mode().IsRegular() && unix.Access(path, unix.X_OK) == nil {
				return path, nil
			}
		}
	}
	return "", fmt.Errorf("%s is not in the PATH of the kernel's sandbox: only /usr, /opt and the visible paths of the configuration are there", name)
}

// execute becomes init. It returns only if that failed.
func (s *Spec) execute(argv []string) error {
	env := s.environment()
	argp, err := syscall.SlicePtrFromStrings(argv)
	if err != nil {
		return err
	}
	envp, err := syscall.SlicePtrFromStrings(env)
	if err != nil {
		return err
	}
	path, err := syscall.BytePtrFromString(initInside)
	if err != nil {
		return err
	}
	// The filter comes last; from here on nothing but execve happens.
	if err := applySeccomp(); err != nil {
		return err
	}
	resetSignals()
	_, _, errno := unix.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(&argp[0])), uintptr(unsafe.Pointer(&envp[0])))
	runtime.KeepAlive(argp)
	runtime.KeepAlive(envp)
	return fmt.Errorf("execute %s: %w", initInside, errno)
}

// resetSignals makes every signal's action the default and blocks none: a kernel
// started by a shell's background job would else ignore interrupts.
func resetSignals() {
	var deflt [4]uint64 // struct sigaction of both architectures: handler, flags, restorer, mask
	for n := uintptr(1); n <= 64; n++ {
		_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, n, uintptr(unsafe.Pointer(&deflt)), 0, 8, 0, 0) // SIGKILL and SIGSTOP can't be
	}
	var none uint64
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&none)), 0, 8, 0, 0)
}
