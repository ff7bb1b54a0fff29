package lazy

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// guardState is what the guard works with, prepared before it is there.
type guardState struct {
	fds  [2]unix.PollFd // pidfds: of the server, of the tree's init
	mask uint64
	mark uintptr
	said [1]byte // the mark's first byte
}

// startGuard starts the guard, a child that shares this process's table of descriptors. It
// waits for the end of this process, ends init's tree then, unless the mark says that all is in,
// and lets go of the descriptors when that is gone. It ends by itself when init does.
//
// The child has a copy of this process's memory and one thread, and no Go runtime that
// works: all it does is below, with plain system calls, no signal but SIGKILL reaches it.
func startGuard(server, init, mark int) (pid int, err error) {
	g := &guardState{fds: [2]unix.PollFd{{Fd: int32(server), Events: unix.POLLIN}, {Fd: int32(init), Events: unix.POLLIN}}, mask: ^uint64(0), mark: uintptr(mark)}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var old uint64
	if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&g.mask)), uintptr(unsafe.Pointer(&old)), 8, 0, 0); errno != 0 {
		return 0, fmt.Errorf("block signals: %w", errno)
	}
	child, errno := cloneGuard(g)
	_, _, merr := unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&old)), 0, 8, 0, 0)
	runtime.KeepAlive(g)
	if errno != 0 || merr != 0 {
		return 0, fmt.Errorf("start the guard: %w", max(errno, merr))
	}
	return int(child), nil
}

//go:noinline
//go:norace
//go:nosplit
func cloneGuard(g *guardState) (pid uintptr, errno unix.Errno) {
	pid, _, errno = unix.RawSyscall6(unix.SYS_CLONE, unix.CLONE_FILES|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 || pid != 0 {
		return pid, errno
	}
	for {
		n, _, _ := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&g.fds[0])), 2, 0, 0, 0, 0)
		if int(n) <= 0 {
			continue
		}
		if g.fds[1].Revents != 0 {
			break
		}
		if g.fds[0].Revents != 0 {
			unix.RawSyscall6(unix.SYS_PREAD64, g.mark, uintptr(unsafe.Pointer(&g.said[0])), 1, 0, 0, 0)
			if g.said[0] == markDone[0] {
				break
			}
			unix.RawSyscall6(unix.SYS_PIDFD_SEND_SIGNAL, uintptr(g.fds[1].Fd), uintptr(unix.SIGKILL), 0, 0, 0, 0)
			g.fds[0].Fd = -1 // ppoll leaves it out
			g.fds[0].Revents = 0
		}
	}
	for {
		unix.RawSyscall6(unix.SYS_EXIT_GROUP, 0, 0, 0, 0, 0, 0)
	}
}
