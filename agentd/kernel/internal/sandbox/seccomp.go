package sandbox

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The filter refuses what an unprivileged program has no business with and what
// widens the kernel's surface: namespaces of its own (with which a process
// becomes root in a small world and reaches code made for root), BPF, perf,
// keyrings, modules, mounts, handles, exotic socket families (AF_VSOCK reaches
// the hypervisor whatever the network namespace). And what CRIU can't dump, so
// that programs take another way: io_uring, userfaultfd, secret memory, Landlock.
// CRIU dumps and restores the filter itself.

// refused get EPERM.
var refused = append([]uintptr{
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY,
	unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE,
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE,
	unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR,
	unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_REBOOT, unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME,
	unix.SYS_ACCT, unix.SYS_QUOTACTL, unix.SYS_QUOTACTL_FD, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_LOOKUP_DCOOKIE,
	unix.SYS_FANOTIFY_INIT, unix.SYS_SYSLOG, unix.SYS_VHANGUP, unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME,
	unix.SYS_MOVE_PAGES, unix.SYS_MIGRATE_PAGES, unix.SYS_SETNS,
}, refusedHere...)

// absent get ENOSYS: programs fall back to something else. clone3 is among them
// because a filter can't see its flags; the C library then uses clone.
var absent = []uintptr{
	unix.SYS_CLONE3, unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	unix.SYS_USERFAULTFD, unix.SYS_MEMFD_SECRET,
	unix.SYS_LANDLOCK_CREATE_RULESET, unix.SYS_LANDLOCK_ADD_RULE, unix.SYS_LANDLOCK_RESTRICT_SELF,
}

// namespaceFlags are those of clone and unshare.
const namespaceFlags = unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWTIME

// families of sockets that may be made; of AF_NETLINK only protocol 0, which the
// C library asks for its addresses.
var families = []uint32{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6}

// offsets in struct seccomp_data.
const (
	offNumber = 0
	offArch   = 4
	offArg0   = 16
	offArg1   = 24
	offArg2   = 32
)

// seccompProgram is the filter, at most some 300 instructions.
func seccompProgram() ([]unix.SockFilter, error) {
	arch, ok := map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}[runtime.GOARCH]
	if !ok {
		return nil, fmt.Errorf("there is no seccomp filter for %s", runtime.GOARCH)
	}
	var p []unix.SockFilter
	load := func(offset uint32) {
		p = append(p, unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset})
	}
	ret := func(value uint32) { p = append(p, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: value}) }
	// unless skips the next n instructions if the test holds not; when if it does.
	unless := func(test uint16, k uint32, n uint8) {
		p = append(p, unix.SockFilter{Code: unix.BPF_JMP | test | unix.BPF_K, Jf: n, K: k})
	}
	when := func(test uint16, k uint32, n uint8) {
		p = append(p, unix.SockFilter{Code: unix.BPF_JMP | test | unix.BPF_K, Jt: n, K: k})
	}
	errno := func(e unix.Errno) uint32 { return unix.SECCOMP_RET_ERRNO | uint32(e) }

	// Programs for another architecture have other numbers: none of them.
	load(offArch)
	when(unix.BPF_JEQ, arch, 1)
	ret(errno(unix.ENOSYS))
	load(offNumber)
	if arch == unix.AUDIT_ARCH_X86_64 {
		const x32 = 0x40000000
		unless(unix.BPF_JGE, x32, 1)
		ret(errno(unix.ENOSYS))
	}
	for _, n := range refused {
		unless(unix.BPF_JEQ, uint32(n), 1)
		ret(errno(unix.EPERM))
	}
	for _, n := range absent {
		unless(unix.BPF_JEQ, uint32(n), 1)
		ret(errno(unix.ENOSYS))
	}
	// The low half of the flags is in the low half of the argument: both
	// architectures are little endian.
	for _, n := range []uintptr{unix.SYS_CLONE, unix.SYS_UNSHARE} {
		unless(unix.BPF_JEQ, uint32(n), 4)
		load(offArg0)
		unless(unix.BPF_JSET, namespaceFlags, 1)
		ret(errno(unix.EPERM))
		ret(unix.SECCOMP_RET_ALLOW)
	}
	// ioctl(TIOCSTI) types into a terminal.
	unless(unix.BPF_JEQ, unix.SYS_IOCTL, 4)
	load(offArg1)
	unless(unix.BPF_JEQ, unix.TIOCSTI, 1)
	ret(errno(unix.EPERM))
	ret(unix.SECCOMP_RET_ALLOW)
	// socket
	unless(unix.BPF_JEQ, unix.SYS_SOCKET, uint8(2*len(families)+6))
	load(offArg0)
	for _, f := range families {
		unless(unix.BPF_JEQ, f, 1)
		ret(unix.SECCOMP_RET_ALLOW)
	}
	unless(unix.BPF_JEQ, unix.AF_NETLINK, 3)
	load(offArg2)
	unless(unix.BPF_JEQ, unix.NETLINK_ROUTE, 1)
	ret(unix.SECCOMP_RET_ALLOW)
	ret(errno(unix.EAFNOSUPPORT))
	ret(unix.SECCOMP_RET_ALLOW)
	return p, nil
}

// applySeccomp puts the calling thread, which has no_new_privs, behind the filter.
func applySeccomp() error {
	program, err := seccompProgram()
	if err != nil {
		return err
	}
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&fprog)))
	runtime.KeepAlive(program)
	if errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	return nil
}
