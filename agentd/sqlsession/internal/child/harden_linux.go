package child

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/confine"
)

// maxFiles is how many descriptors the process may have: the socket, the
// connection, one for a cancel request, a few for DNS and the runtime.
const maxFiles = 64

// maxThreads is how many threads a process may have.
const maxThreads = 64

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
	return confine.Harden(maxFiles, maxThreads)
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
