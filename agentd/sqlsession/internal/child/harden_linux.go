package child

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxFiles is how many descriptors the process may have: the socket, the
// connection, one for a cancel request, a few for DNS and the runtime.
const maxFiles = 64

// maxProcesses bounds threads when the process has a user id of its own. They
// are counted for the user.
const maxProcesses = 64

// harden gives up what is left to give up: no core file and no attaching
// debugger (the memory holds a password), no file of any size written, few
// descriptors. The user id, the capabilities, no_new_privs and Landlock are
// agentd's to set before the process starts.
func harden() error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(unix.RLIMIT_FSIZE, &limit); err != nil {
		return fmt.Errorf("RLIMIT_FSIZE: %w", err)
	}
	// Which engine it is for is not known yet: see forbidWriting and allowWriting.
	limit.Cur = 0
	if err := syscall.Setrlimit(unix.RLIMIT_FSIZE, &limit); err != nil {
		return fmt.Errorf("RLIMIT_FSIZE: %w", err)
	}
	return hardenFor(maxFiles)
}

// forbidWriting makes it final that no file is written.
func forbidWriting() error {
	if err := syscall.Setrlimit(unix.RLIMIT_FSIZE, &syscall.Rlimit{}); err != nil {
		return fmt.Errorf("RLIMIT_FSIZE: %w", err)
	}
	return nil
}

// allowWriting lets those files be written whose descriptors are for writing.
func allowWriting() error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(unix.RLIMIT_FSIZE, &limit); err != nil {
		return fmt.Errorf("RLIMIT_FSIZE: %w", err)
	}
	limit.Cur = limit.Max
	if err := syscall.Setrlimit(unix.RLIMIT_FSIZE, &limit); err != nil {
		return fmt.Errorf("RLIMIT_FSIZE: %w", err)
	}
	return nil
}

func hardenFor(files uint64) error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_DUMPABLE: %w", err)
	}
	limits := []struct {
		name     string
		resource int
		max      uint64
	}{
		{"RLIMIT_CORE", unix.RLIMIT_CORE, 0},
		{"RLIMIT_NOFILE", unix.RLIMIT_NOFILE, files},
		{"RLIMIT_MEMLOCK", unix.RLIMIT_MEMLOCK, 0},
		{"RLIMIT_MSGQUEUE", unix.RLIMIT_MSGQUEUE, 0},
	}
	for _, l := range limits {
		// Not unix.Setrlimit: a raised soft limit of NOFILE is restored by the
		// syscall package only for processes that it starts; there are none.
		if err := syscall.Setrlimit(l.resource, &syscall.Rlimit{Cur: l.max, Max: l.max}); err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
	}
	if syscall.Getuid() != 0 && ownUser() {
		limit := unix.Rlimit{Cur: maxProcesses, Max: maxProcesses}
		if err := unix.Setrlimit(unix.RLIMIT_NPROC, &limit); err != nil {
			return fmt.Errorf("RLIMIT_NPROC: %w", err)
		}
	}
	return nil
}

// ownUser tells whether the user id is this process's alone. agentd keeps its
// processes away from the ids of people and services.
func ownUser() bool { return syscall.Getuid() >= 1<<20 }
