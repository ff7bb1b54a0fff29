package criu

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	gocriu "github.com/checkpoint-restore/go-criu/v7"
	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/checkpoint-restore/go-criu/v7/stats"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/agentd/checkpoint/internal/snapshot"
)

// logName is CRIU's log in the image directory, removed after success.
const logName = "criu.log"

// HelperMain is the helper process; it returns the exit code.
func HelperMain() int {
	events := os.NewFile(eventsFD, "events")
	unix.CloseOnExec(eventsFD)
	in := bufio.NewReaderSize(io.LimitReader(os.Stdin, maxRequest), 64<<10)
	line, err := in.ReadBytes('\n')
	var req request
	if err == nil {
		err = json.Unmarshal(line, &req)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "criu-helper: no request:", err)
		return 2
	}
	// Whoever asked holds the other end; when they are gone nobody takes the answer.
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(3)
	}()
	h := &helper{req: req, out: json.NewEncoder(events)}
	answer := h.run()
	answer.Done = true
	if err := h.tell(answer); err != nil {
		return 3
	}
	return 0
}

type helper struct {
	gocriu.NoNotify
	req request

	mu  sync.Mutex
	out *json.Encoder

	root    int32
	copies  []*snapshot.Copy
	copying time.Duration
	copyErr error
}

func (h *helper) tell(e event) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.out.Encode(e)
}

// SetupNamespaces tells the root's process id as soon as there is one, so that the
// caller can end it if everything else fails.
func (h *helper) SetupNamespaces(pid int32) error { return h.tell(event{Born: int(pid)}) }

// PostRestore has the process id that the answer needs.
func (h *helper) PostRestore(pid int32) error {
	h.root = pid
	return nil
}

// copyFirst makes the copies' first pass, beside the running tree.
func (h *helper) copyFirst() error {
	for _, c := range h.req.Copies {
		s, err := snapshot.New(c.From, c.To, c.Max)
		if err != nil {
			return err
		}
		h.copies = append(h.copies, s)
		if _, err := s.Pass(); err != nil {
			return err
		}
	}
	return nil
}

// PostDump is called when the images are written and the tree still stands.
func (h *helper) PostDump() error {
	began := time.Now()
	for i, c := range h.copies {
		if _, err := c.Pass(); err != nil {
			h.copyErr = fmt.Errorf("copy %s: %w", h.req.Copies[i].From, err)
			return h.copyErr
		}
	}
	if h.req.Stop { // it takes effect when CRIU lets go of them, before they run a step
		for _, pid := range Tree(h.req.PID) {
			if err := unix.Kill(pid, unix.SIGSTOP); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("stop process %d: %w", pid, err)
			}
		}
	}
	h.copying = time.Since(began)
	return nil
}

func (h *helper) run() event {
	c := gocriu.MakeCriu()
	c.SetCriuPath(h.req.Criu)
	for i := range h.req.Inherit { // CRIU must inherit them; they came without close-on-exec
		if _, err := unix.FcntlInt(uintptr(firstInherited+i), unix.F_SETFD, 0); err != nil {
			return event{Failed: fmt.Sprintf("inherited file %d: %v", i, err)}
		}
	}
	if h.req.Op == opStat {
		e := event{Sizes: make([]int64, len(h.req.Stat)), Times: make([]int64, len(h.req.Stat))}
		for i, f := range h.req.Stat {
			e.Sizes[i] = -1
			if info, err := os.Lstat(f.Path); err == nil && info.Mode().IsRegular() {
				e.Sizes[i], e.Times[i] = info.Size(), info.ModTime().UnixNano()
			}
		}
		return e
	}
	if err := h.start(c); err != nil {
		return event{Failed: err.Error()}
	}
	e := h.ask(c)
	err := c.Cleanup()
	if err != nil && e.Failed == "" {
		e = event{Failed: err.Error()}
	}
	e.Killed = killed(err)
	return e
}

// ask has CRIU do what was requested.
func (h *helper) ask(c *gocriu.Criu) event {
	if h.req.Op == opVersion {
		v, err := c.GetCriuVersion()
		return event{Version: v, Failed: text(err)}
	}
	dir, err := os.Open(h.req.Images)
	if err != nil {
		return event{Failed: err.Error()}
	}
	defer dir.Close() //nolint:errcheck // it is only read
	o := h.options(dir)
	if h.req.Op == opDump {
		if err := h.copyFirst(); err != nil {
			return event{Failed: err.Error(), Copy: true, Full: full(err)}
		}
		if err := c.Dump(o, h); err != nil {
			if h.copyErr != nil {
				return event{Failed: h.copyErr.Error(), Copy: true, Full: full(h.copyErr)}
			}
			return event{Failed: err.Error()}
		}
		s := dumpStats(dir)
		s.Copying = h.copying
		return event{Stats: s}
	}
	if err := c.Restore(o, h); err != nil {
		return event{Failed: err.Error()}
	}
	r := Restored{PID: int(h.root)}
	if s, err := stats.CriuGetRestoreStats(dir); err == nil {
		r.Forking, r.Restoring = microseconds(s.GetForkingTime()), microseconds(s.GetRestoreTime())
	}
	return event{Restored: r}
}

func full(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

func (h *helper) options(dir *os.File) *rpc.CriuOpts {
	level := int32(2)
	if h.req.Verbose {
		level = 4
	}
	mode, lock := rpc.CriuCgMode_IGNORE, rpc.CriuNetworkLockMethod_SKIP
	o := &rpc.CriuOpts{
		ImagesDirFd:       proto.Int32(int32(dir.Fd())),
		LogFile:           proto.String(logName),
		LogLevel:          proto.Int32(level),
		ManageCgroupsMode: &mode,
		// Connections that the kernel's own programs have between themselves travel; those
		// that leave the tree are refused before, by the dry check. Nobody outside can send
		// into the tree's own network, so there is nothing to lock.
		TcpEstablished: proto.Bool(true),
		NetworkLock:    &lock,
		// Locks that the tree's own processes hold.
		FileLocks: proto.Bool(true),
		External:  h.req.External,
	}
	// GhostLimit is the size of deleted files that travel inside the images.
	o.GhostLimit = proto.Uint32(GhostLimit)
	if h.req.Op == opDump {
		o.Pid = proto.Int32(int32(h.req.PID))
		// CRIU's own leave-stopped leaves TCP sockets in repair mode: see PostDump.
		o.LeaveRunning = proto.Bool(h.req.LeaveRunning || h.req.Stop)
		return o
	}
	o.RstSibling = proto.Bool(true)
	if h.req.Lazy {
		o.LazyPages = proto.Bool(true)
	}
	if h.req.Root != "" {
		o.Root = proto.String(h.req.Root)
	}
	for i, key := range h.req.Inherit {
		o.InheritFd = append(o.InheritFd, &rpc.InheritFd{Key: proto.String(key), Fd: proto.Int32(int32(firstInherited + i))})
	}
	return o
}

// GhostLimit is the size in bytes up to which a deleted file that is still open travels
// inside the images.
const GhostLimit = 64 << 20

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func microseconds(n uint32) time.Duration { return time.Duration(n) * time.Microsecond }

func dumpStats(dir *os.File) DumpStats {
	s, err := stats.CriuGetDumpStats(dir)
	if err != nil {
		return DumpStats{} // figures alone: the dump is whole without them
	}
	return DumpStats{
		Freezing: microseconds(s.GetFreezingTime()), Frozen: microseconds(s.GetFrozenTime()),
		MemoryDump: microseconds(s.GetMemdumpTime()), MemoryWrite: microseconds(s.GetMemwriteTime()),
		PagesScanned: s.GetPagesScanned(), PagesWritten: s.GetPagesWritten(),
	}
}

// start starts CRIU, in the cgroups and in the network namespace that it is to be in. It
// waits for a request then, so the groups can be joined from outside: nothing of ours
// counts there. The calling goroutine keeps its thread, which is in the namespace.
func (h *helper) start(c *gocriu.Criu) error {
	if h.req.NetNS != "" {
		if err := joinNetNS(h.req.NetNS); err != nil {
			return err
		}
	}
	// Its environment, and that of what it starts.
	os.Clearenv()
	env := map[string]string{"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
	if h.req.Preload != "" {
		env["LD_PRELOAD"] = h.req.Preload
	}
	for name, value := range env {
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	before := childProcesses()
	if err := c.Prepare(); err != nil {
		return fmt.Errorf("start CRIU: %w", err)
	}
	for pid := range childProcesses() { // go-criu does not tell it
		if before[pid] {
			continue
		}
		go h.watch(pid)
		for _, procs := range h.req.Cgroups {
			if err := os.WriteFile(procs, []byte(strconv.Itoa(pid)), 0); err != nil {
				return fmt.Errorf("put CRIU into the kernel's cgroup: %w", err)
			}
		}
		return nil
	}
	return errors.New("start CRIU: it ended at once")
}

// killedTime is how long what CRIU said before it was killed may take to be read.
const killedTime = time.Second

// watch ends this process when CRIU was killed: its children may hold its socket open, so
// nobody would be told. The caller ends them.
func (h *helper) watch(pid int) {
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		const killed, dumped = 2, 3 // CLD_KILLED, CLD_DUMPED
		if err != nil || info.Code != killed && info.Code != dumped {
			return
		}
		break
	}
	time.Sleep(killedTime)
	_ = h.tell(event{Failed: errKilled.Error(), Killed: true, Done: true})
	os.Exit(1)
}

var errKilled = errors.New("CRIU was killed")

// killed reports whether CRIU, as its end says, was killed.
func killed(err error) bool {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return false
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	return ok && status.Signaled()
}

// childProcesses are this process's children.
func childProcesses() map[int]bool {
	m, self := map[int]bool{}, os.Getpid()
	for _, p := range processes() {
		if p.parent == self {
			m[p.pid] = true
		}
	}
	return m
}

// joinNetNS puts the calling thread, which starts CRIU next, into a network namespace.
func joinNetNS(path string) error {
	runtime.LockOSThread()
	ns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("the kernel's network namespace: %w", err)
	}
	defer ns.Close() //nolint:errcheck // a namespace
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("join the kernel's network namespace: %w", err)
	}
	return nil
}

// limited keeps the last bytes of what is written, for a helper's stderr.
type limited struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

const maxStderr = 8 << 10

// Write implements io.Writer; what is over the bound is dropped.
func (l *limited) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if room := maxStderr - l.buf.Len(); room > 0 {
		l.buf.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

func (l *limited) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}
