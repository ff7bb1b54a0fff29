package confine

import (
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sockets and files are the system calls that a process has no use for which gets
// its descriptors from agentd alone, ready made.
var (
	sockets = []uint32{
		unix.SYS_SOCKET, unix.SYS_CONNECT, unix.SYS_BIND, unix.SYS_LISTEN, unix.SYS_ACCEPT, unix.SYS_ACCEPT4, unix.SYS_SENDTO, unix.SYS_SENDMMSG,
	}
	files = []uint32{unix.SYS_OPENAT, unix.SYS_OPENAT2}
)

// forbidden are the system calls that no confined process has a use for, and an
// attacker in it would: changing files, starting programs, looking into other
// processes.
var forbidden = []uint32{
	unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_MEMFD_CREATE,
	unix.SYS_EXECVE, unix.SYS_EXECVEAT, unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_KCMP,
	unix.SYS_UNLINKAT, unix.SYS_RENAMEAT2, unix.SYS_LINKAT, unix.SYS_SYMLINKAT, unix.SYS_MKDIRAT, unix.SYS_MKNODAT, unix.SYS_FCHMODAT, unix.SYS_FCHOWNAT,
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_SETNS, unix.SYS_UNSHARE, unix.SYS_FSOPEN, unix.SYS_OPEN_TREE,
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_USERFAULTFD,
	unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER, unix.SYS_PIDFD_OPEN, unix.SYS_PIDFD_GETFD,
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_KEXEC_LOAD, unix.SYS_SETUID, unix.SYS_SETGID, unix.SYS_SETRESUID, unix.SYS_SETRESGID,
}

// ForbidAll makes it final that the process opens no file and no socket, starts no
// program and looks into no other process: those system calls fail with EPERM in all
// threads from now on (seccomp(2)). A kernel without seccomp is an error: no
// supported one is.
func ForbidAll() error {
	return forbid(slices.Concat(sockets, files, filesHere, forbidden, forbiddenHere), false)
}

// ForbidAllButDialing is ForbidAll for a process that makes connections: it may open
// files, as far as it may otherwise, and sockets of IPv4 and IPv6, and no others: no
// unix socket, netlink or packet. It may not listen.
func ForbidAllButDialing() error {
	return forbid(slices.Concat([]uint32{unix.SYS_LISTEN, unix.SYS_ACCEPT, unix.SYS_ACCEPT4}, forbidden, forbiddenHere), true)
}

func forbid(calls []uint32, internetOnly bool) error {
	arch, ok := map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}[runtime.GOARCH]
	if !ok {
		return fmt.Errorf("seccomp: architecture %s is not known", runtime.GOARCH)
	}
	const (
		deny = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
		// offsets in struct seccomp_data
		atNumber, atArch, atFirst = 0, 4, 16 // the first argument's lower half: both architectures are little-endian
	)
	statement := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }
	jump := func(code uint16, k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: code, Jt: yes, Jf: no, K: k}
	}
	program := []unix.SockFilter{
		statement(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, atArch),
		jump(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, arch, 1, 0),
		statement(unix.BPF_RET|unix.BPF_K, deny), // another architecture's numbers
		statement(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, atNumber),
		// The numbers of x32 have this bit; others don't reach it.
		jump(unix.BPF_JMP|unix.BPF_JGE|unix.BPF_K, 0x40000000, 0, 1),
		statement(unix.BPF_RET|unix.BPF_K, deny),
	}
	for _, number := range calls {
		program = append(program,
			jump(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, number, 0, 1),
			statement(unix.BPF_RET|unix.BPF_K, deny))
	}
	if internetOnly {
		program = append(program,
			jump(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, unix.SYS_SOCKET, 0, 4),
			statement(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, atFirst),
			jump(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, unix.AF_INET, 2, 0),
			jump(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, unix.AF_INET6, 1, 0),
			statement(unix.BPF_RET|unix.BPF_K, deny))
	}
	program = append(program, statement(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW))
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&filter)))
	runtime.KeepAlive(program)
	if errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	return nil
}
