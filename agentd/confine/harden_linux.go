package confine

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// Harden gives up, in a process that starts, what is left to give up: no core file
// and no attaching debugger (the memory holds a secret), files descriptors at most, and
// threads threads if its user id is none of people's and services': they are counted
// for the user, so processes that share an id share them. The user id, the capabilities, no_new_privs and Landlock are agentd's to set before the
// process starts.
func Harden(files, threads uint64) error {
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
		limit := unix.Rlimit{Cur: threads, Max: threads}
		if err := unix.Setrlimit(unix.RLIMIT_NPROC, &limit); err != nil {
			return fmt.Errorf("RLIMIT_NPROC: %w", err)
		}
	}
	return nil
}

// ownUser tells whether the user id is this process's alone. agentd keeps its
// processes away from the ids of people and services.
func ownUser() bool { return syscall.Getuid() >= 1<<20 }
