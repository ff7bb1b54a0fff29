package confine

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// landlockPaths are what a process with a network may read: what the dynamic
// loader, the resolver and TLS need. It may write nothing.
var landlockPaths = []string{"/etc", "/usr", "/lib", "/lib32", "/lib64", "/run/systemd/resolve", "/run/resolvconf", "/var/lib/ca-certificates"}

// loaderPaths are what the dynamic loader needs, where there is one; for a
// process that needs nothing else.
var loaderPaths = []string{"/usr/lib", "/usr/lib64", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache"}

// portDNS is what a process with a network may connect to: DNS over TCP.
const portDNS = 53

// Confinement is what one process gets.
type Confinement struct {
	Executable string
	Ports      []uint16 // it may connect to, beside DNS's; nil leaves connecting free
	Readable   []string // files and directories beside the system's, such as sslrootcert
	// Offline leaves no port to connect to, not even DNS, and no files but what
	// the program itself needs.
	Offline bool
	// Tasks are files of control groups of version 1 to be born in: the thread that starts the process enters
	// them. For version 2 there is syscall.SysProcAttr.CgroupFD.
	Tasks []string
	// Ended, if not nil, is closed when the process has ended. Until then the thread
	// that started it stays, and with it what SysProcAttr.Pdeathsig waits for: that
	// counts from the thread's end, not the parent's.
	Ended <-chan struct{}
}

// Start starts cmd from a thread that has given up what the process
// shall not have, and that ends afterwards. Child processes inherit
// no_new_privs, the capability bounding set and the Landlock domain from the
// thread that forks them, and these can't be given back. The runtime never
// clones a thread for others from one that is locked to a goroutine.
func Start(cmd *exec.Cmd, c Confinement) error {
	result := make(chan error, 1)
	var onThread func()
	onThread = func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread can't end. Hold it while another one works.
			done := make(chan struct{})
			go func() {
				defer close(done)
				onThread()
			}()
			<-done
			runtime.UnlockOSThread()
			return
		}
		if err := c.confineThread(); err != nil {
			result <- err
			return
		}
		err := cmd.Start()
		result <- err
		if err == nil && c.Ended != nil {
			<-c.Ended
		}
		// Not unlocked: the thread ends with the goroutine.
	}
	go onThread()
	return <-result
}

func (c Confinement) confineThread() error {
	for _, path := range c.Tasks {
		if err := os.WriteFile(path, []byte("0"), 0); err != nil { // 0: this thread
			return fmt.Errorf("enter the control group: %w", err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	// EPERM: not root, so there is nothing to drop. EINVAL: the last one.
	for capability := range 64 {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(capability), 0, 0, 0); err != nil {
			break
		}
	}
	_ = unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
	err := c.landlock()
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil // an older kernel, or turned off: one layer less
	}
	return err
}

// landlock restricts the calling thread (landlock(7)); what the kernel's
// version does not know is left out.
func (c Confinement) landlock() error {
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return errno
	}
	const (
		readFile = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_READ_FILE
		readDir  = readFile | unix.LANDLOCK_ACCESS_FS_READ_DIR
	)
	attr := unix.LandlockRulesetAttr{
		// Version 1: everything from EXECUTE to MAKE_SYM.
		Access_fs: unix.LANDLOCK_ACCESS_FS_MAKE_SYM<<1 - 1,
	}
	size := unsafe.Sizeof(attr.Access_fs)
	if abi >= 2 {
		attr.Access_fs |= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if abi >= 3 {
		attr.Access_fs |= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	if abi >= 4 {
		attr.Access_net = unix.LANDLOCK_ACCESS_NET_BIND_TCP
		if c.Ports != nil || c.Offline {
			attr.Access_net |= unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
		}
		size += unsafe.Sizeof(attr.Access_net)
	}
	if abi >= 6 {
		attr.Scoped = unix.LANDLOCK_SCOPE_SIGNAL
		if c.Offline {
			attr.Scoped |= unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
		}
		size += unsafe.Sizeof(attr.Scoped)
	}
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), size, 0)
	if errno != 0 {
		return fmt.Errorf("landlock_create_ruleset: %w", errno)
	}
	ruleset := int(fd)
	defer func() { _ = unix.Close(ruleset) }()
	paths, ports := landlockPaths, append([]uint16{portDNS}, c.Ports...)
	if c.Offline {
		paths, ports = loaderPaths, nil
	}
	for _, path := range paths {
		if err := allowPath(ruleset, path, readDir); err != nil {
			return err
		}
	}
	if err := allowPath(ruleset, c.Executable, readFile); err != nil {
		return err
	}
	for _, path := range c.Readable {
		if err := allowPath(ruleset, path, readDir); err != nil {
			return err
		}
	}
	if attr.Access_net&unix.LANDLOCK_ACCESS_NET_CONNECT_TCP != 0 {
		for _, port := range ports {
			if err := allowPort(ruleset, port); err != nil {
				return err
			}
		}
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(ruleset), 0, 0); errno != 0 {
		return fmt.Errorf("landlock_restrict_self: %w", errno)
	}
	return nil
}

// allowPath allows access beneath a path; one that is not there is left out.
func allowPath(ruleset int, path string, access uint64) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("landlock: open %s: %w", path, err)
	}
	defer func() { _ = unix.Close(fd) }()
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return err
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		access &^= unix.LANDLOCK_ACCESS_FS_READ_DIR
	}
	rule := unix.LandlockPathBeneathAttr{Allowed_access: access, Parent_fd: int32(fd)}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(ruleset), unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&rule)), 0, 0, 0)
	if errno != 0 {
		return fmt.Errorf("landlock_add_rule %s: %w", path, errno)
	}
	return nil
}

func allowPort(ruleset int, port uint16) error {
	const ruleNetPort = 2 // LANDLOCK_RULE_NET_PORT, struct landlock_net_port_attr
	rule := struct{ access, port uint64 }{unix.LANDLOCK_ACCESS_NET_CONNECT_TCP, uint64(port)}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(ruleset), ruleNetPort, uintptr(unsafe.Pointer(&rule)), 0, 0, 0)
	if errno != 0 {
		return fmt.Errorf("landlock_add_rule port %d: %w", port, errno)
	}
	return nil
}

// CloseOnExec makes sure that no descriptor that we were started with reaches
// a child.
func CloseOnExec() error {
	return unix.CloseRange(3, ^uint(0)>>33, unix.CLOSE_RANGE_CLOEXEC)
}
