package child

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/confine"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
)

const (
	// parserMemory bounds what a parser process may have of memory of its own, in
	// bytes, by RLIMIT_DATA: it needs 350 MB while it starts, up to 520 MB were
	// seen with the worst texts. RLIMIT_AS is of no use: 4 GiB of addresses are
	// reserved for the grammar's memory.
	parserMemory = 1 << 30
	// parserHeap keeps the Go heap small (bytes).
	parserHeap = 64 << 20
	// parserFiles is how many descriptors a parser process may have: one for
	// each session that asks.
	parserFiles = 8192
)

// ExitBroken is the exit code of a parser process that a text broke.
const ExitBroken = 5

// ParserMain runs a parser process and returns its exit code. Call it before
// anything else: it expects descriptor 3 to be agentd's socket.
func ParserMain() int {
	err := confine.Harden(parserFiles, maxThreads)
	if err == nil {
		err = forbidWriting()
	}
	if err == nil {
		limit := uint64(parserMemory)
		if raceDetector {
			limit *= 4
		}
		err = syscall.Setrlimit(unix.RLIMIT_DATA, &syscall.Rlimit{Cur: limit, Max: limit})
	}
	if err == nil {
		err = confine.ForbidAll()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "sql parser: cannot give up privileges:", err)
		return exitUsage
	}
	debug.SetMemoryLimit(parserHeap)
	runtime.GOMAXPROCS(min(2, runtime.GOMAXPROCS(0)))
	conn, err := inherited(SocketFD)
	if err != nil {
		fmt.Fprintln(os.Stderr, "sql parser: started without agentd's socket: this command is agentd's own")
		return exitUsage
	}
	switch err := pgtree.Serve(conn); {
	case errors.Is(err, pgtree.ErrBroken):
		// The cause may quote the statement: it is not told.
		fmt.Fprintln(os.Stderr, "sql parser: a statement was too complex: starting anew")
		return ExitBroken
	case err != nil:
		fmt.Fprintln(os.Stderr, "sql parser:", clean(err.Error()))
		return exitProtocol
	}
	return exitDone
}

// inherited returns the unix socket that the process was started with.
func inherited(fd uintptr) (*net.UnixConn, error) {
	f := os.NewFile(fd, "agentd")
	if f == nil {
		return nil, os.ErrInvalid
	}
	conn, err := net.FileConn(f)
	_ = f.Close()
	if err != nil {
		return nil, err
	}
	u, ok := conn.(*net.UnixConn)
	if !ok {
		_ = conn.Close()
		return nil, os.ErrInvalid
	}
	return u, nil
}
