package uplink

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/confine"
	"github.com/postern-dev/postern/tunnel"
)

// Exit codes: agentd logs them.
const (
	exitDone     = 0
	exitUsage    = 2
	exitProtocol = 4
)

const (
	controlFD = 3
	// maxFiles is how many descriptors an uplink may have: two for each lane, and
	// what resolving and the runtime need.
	maxFiles = 256
	// maxThreads is how many threads all uplinks on the host may have: about eight for
	// each tunnel, of each agentd that has the same uid_base.
	maxThreads = 2048
	// heapGrowth and memoryLimit keep the heap small: what passes is in buffers that
	// are used again, so that there is little to collect. A heap beyond memoryLimit
	// (bytes) still works, at the price of more collections.
	heapGrowth  = 25
	memoryLimit = 24 << 20
)

// Main runs an uplink and returns its exit code. Call it before anything else: it
// expects descriptor 3 to be agentd's socket.
func Main() int {
	if err := giveUp(); err != nil {
		fmt.Fprintln(os.Stderr, "cannot give up privileges:", err)
		return exitUsage
	}
	debug.SetGCPercent(heapGrowth)
	debug.SetMemoryLimit(memoryLimit)
	runtime.GOMAXPROCS(min(2, runtime.GOMAXPROCS(0)))
	signal.Ignore(syscall.SIGPIPE, syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM) // agentd says when it is over
	control, err := inherited(controlFD)
	if err != nil {
		fmt.Fprintln(os.Stderr, "started without agentd's socket: this command is agentd's own")
		return exitUsage
	}
	server, err := readConfig(control)
	if err != nil {
		if errors.Is(err, io.EOF) {
			return exitDone // agentd has changed its mind
		}
		fmt.Fprintln(os.Stderr, "configuration:", err)
		return exitProtocol
	}
	return serve(control, server)
}

// giveUp is the process's own part of its confinement; agentd's is in start.
func giveUp() error {
	// Also when agentd did not come to it: a stopped uplink hears of no end of file.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_PDEATHSIG: %w", err)
	}
	if err := confine.Harden(maxFiles, maxThreads); err != nil {
		return err
	}
	if err := syscall.Setrlimit(unix.RLIMIT_FSIZE, &syscall.Rlimit{}); err != nil {
		return fmt.Errorf("RLIMIT_FSIZE: %w", err)
	}
	return confine.ForbidAllButDialing()
}

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
	control, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, os.ErrInvalid
	}
	return control, nil
}

func readConfig(control net.Conn) (*tunnel.CarrierServer, error) {
	var size [4]byte
	if _, err := io.ReadFull(control, size[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(size[:])
	if n > maxConfig {
		return nil, errors.New("too long")
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(control, b); err != nil {
		return nil, err
	}
	defer clear(b)
	var c config
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, errors.New("malformed") // the error could quote it
	}
	for name, value := range c.Environment {
		if !slices.Contains(inheritedVariables, name) {
			return nil, errors.New("a variable that is not known")
		}
		if err := os.Setenv(name, value); err != nil {
			return nil, err
		}
	}
	return tunnel.NewCarrierServer(c.CarrierConfig)
}

// serve serves connections until agentd closes the control socket.
func serve(control *net.UnixConn, server *tunnel.CarrierServer) int {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for {
		conn, err := receive(control)
		if err != nil {
			code := exitDone
			if !errors.Is(err, io.EOF) {
				fmt.Fprintln(os.Stderr, "control socket:", err)
				code = exitProtocol
			}
			// agentd has closed the lanes: what it wrote before is sent.
			late := time.AfterFunc(flushTime, cancel)
			wg.Wait()
			late.Stop()
			cancel()
			return code
		}
		wg.Go(func() { server.Serve(ctx, conn) })
	}
}

// receive takes the next connection.
func receive(control *net.UnixConn) (net.Conn, error) {
	var (
		b   [1]byte
		oob [64]byte
	)
	// Room for one descriptor: more are cut off by the kernel.
	n, oobn, _, _, err := control.ReadMsgUnix(b[:], oob[:syscall.CmsgSpace(4)])
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	messages, err := syscall.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	if b[0] != 'c' || len(messages) != 1 {
		return nil, errors.New("not as agreed")
	}
	fds, err := syscall.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, errors.New("not as agreed")
	}
	f := os.NewFile(uintptr(fds[0]), "lane")
	conn, err := net.FileConn(f)
	_ = f.Close()
	return conn, err
}
