package main

import (
	"log/slog"

	"golang.org/x/sys/unix"
)

// harden keeps the process's memory, which has the CA's key and the database's
// password, out of core files and away from debuggers of the same user.
func harden(log *slog.Logger) {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		log.Warn("core files not switched off", "err", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		log.Warn("memory not hidden from debuggers", "err", err)
	}
}
