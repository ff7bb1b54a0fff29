package lazy

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"
)

// Descriptors that the server is started with.
const (
	controlFD = 3
	markFD    = 4
)

// What the mark says.
const (
	markDone   = "done\n"
	markFailed = "failed: "
)

// message is what restorer and server say to each other, one per packet of a
// SOCK_SEQPACKET socket. Of the restorer's: space, with a userfaultfd; restored, with a
// pidfd of the tree's init. Of the server's: ready, guarded, done, failed.
type message struct {
	Kind string `json:"kind"`
	// PID is a space's process id inside.
	PID int `json:"pid,omitempty"`
	// Failed is one line.
	Failed string `json:"failed,omitempty"`
	// Bytes is what came, Took how long that took since the tree ran.
	Bytes int64         `json:"bytes,omitempty"`
	Took  time.Duration `json:"took,omitempty"`
}

const maxMessage = 4 << 10

func send(fd int, m message, pass ...int) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	var rights []byte
	if len(pass) > 0 {
		rights = unix.UnixRights(pass...)
	}
	return unix.Sendmsg(fd, b, rights, nil, unix.MSG_NOSIGNAL)
}

// errHungUp is returned when the other side is gone.
var errHungUp = errors.New("the other side is gone")

// receive takes one message and the descriptor that came with it, -1 if none did.
func receive(fd int) (m message, passed int, err error) {
	b, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4))
	n, on, _, _, err := unix.Recvmsg(fd, b, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return m, -1, err
	}
	passed = -1
	if on > 0 {
		if passed, err = oneRight(oob[:on]); err != nil {
			return m, -1, err
		}
	}
	if n == 0 {
		return m, passed, errHungUp
	}
	if err := json.Unmarshal(b[:n], &m); err != nil {
		return m, passed, err
	}
	return m, passed, nil
}

func oneRight(oob []byte) (int, error) {
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return -1, err
	}
	if len(cmsgs) != 1 {
		return -1, fmt.Errorf("%d control messages", len(cmsgs))
	}
	fds, err := unix.ParseUnixRights(&cmsgs[0])
	if err != nil {
		return -1, err
	}
	if len(fds) != 1 {
		return -1, fmt.Errorf("%d descriptors", len(fds))
	}
	return fds[0], nil
}

// Main is the server; images is the directory. It returns the exit code.
func Main(images string) int {
	debug.SetGCPercent(50)
	s := &server{control: controlFD, mark: markFD, init: -1}
	unix.CloseOnExec(controlFD)
	unix.CloseOnExec(markFD)
	if err := s.open(images); err != nil {
		s.tell(message{Kind: "failed", Failed: err.Error()})
		return 1
	}
	if err := s.run(); err != nil {
		s.fail(err)
		return 1
	}
	return 0
}

// server has everything that it holds in one table of descriptors, the guard's too.
type server struct {
	control, mark, init int // init is a pidfd; -1: the tree is not restored yet
	layout              *layout
	fill                *filler
	spaces              []*space
	buf                 [32 * msgLen]byte
	restored            time.Time
	guard               int // its process id
	self                int // a pidfd
}

func (s *server) tell(m message) {
	if s.control >= 0 {
		_ = send(s.control, m) // who restored may be gone
	}
}

func (s *server) open(images string) (err error) {
	if err := unix.Flock(s.mark, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("lock the mark: %w", err)
	}
	if s.layout, err = read(images); err != nil {
		return err
	}
	if s.fill, err = newFiller(s.layout.files); err != nil {
		return err
	}
	return send(s.control, message{Kind: "ready"})
}

// pause is how long is waited when nothing can be done: what keeps a process busy is a
// matter of microseconds.
const pause = time.Millisecond

// run serves until all is in, or nobody needs it.
func (s *server) run() error {
	for {
		progress, err := s.turn()
		if err != nil {
			return err
		}
		if s.init >= 0 && len(s.spaces) == 0 {
			return s.finish()
		}
		wait := 0
		switch {
		case s.init < 0:
			wait = -1
			if s.waiting() {
				wait = int(pause / time.Millisecond)
			}
		case !progress:
			wait = int(pause / time.Millisecond)
		}
		if err := s.poll(wait); err != nil {
			return err
		}
	}
}

func (s *server) waiting() bool {
	for _, p := range s.spaces {
		if len(p.faults) > 0 {
			return true
		}
	}
	return false
}

// poll waits for something to happen, at most milliseconds, and takes what the restorer says.
func (s *server) poll(milliseconds int) error {
	fds := make([]unix.PollFd, 0, len(s.spaces)+1)
	fds = append(fds, unix.PollFd{Fd: int32(s.control), Events: unix.POLLIN}) // -1 is left out
	for _, p := range s.spaces {
		fds = append(fds, unix.PollFd{Fd: int32(p.fd), Events: unix.POLLIN})
	}
	if _, err := unix.Poll(fds, milliseconds); err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("poll: %w", err)
	}
	if err := s.reguard(); err != nil {
		return err
	}
	if fds[0].Revents == 0 {
		return nil
	}
	m, fd, err := receive(s.control)
	if err != nil {
		if s.init < 0 {
			return fmt.Errorf("the restore was given up: %w", err)
		}
		_ = unix.Close(s.control) // who restored is gone: its tree needs us still
		s.control = -1
		return nil
	}
	switch {
	case m.Kind == "space" && fd >= 0:
		lack, ok := s.layout.spaces[m.PID]
		if !ok {
			return fmt.Errorf("CRIU restores process %d, which the images lack", m.PID)
		}
		s.spaces = append(s.spaces, &space{fd: fd, lack: lack})
	case m.Kind == "restored" && fd >= 0:
		return s.watched(fd)
	default:
		return fmt.Errorf("a message %q", m.Kind)
	}
	return nil
}

// watched starts the guard: the tree runs.
func (s *server) watched(init int) error {
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return fmt.Errorf("pidfd_open: %w", err)
	}
	if s.guard, err = startGuard(self, init, s.mark); err != nil {
		return err
	}
	s.init, s.restored, s.self, s.fill.whole = init, time.Now(), self, true
	return send(s.control, message{Kind: "guarded"})
}

// reguard starts another guard if somebody killed it.
func (s *server) reguard() (err error) {
	if s.guard == 0 {
		return nil
	}
	if pid, err := unix.Wait4(s.guard, nil, unix.WNOHANG, nil); pid == 0 || errors.Is(err, unix.EINTR) {
		return nil
	}
	s.guard, err = startGuard(s.self, s.init, s.mark)
	return err
}

// turn serves everybody who waits, and then copies a part of what nobody asked for yet: of
// the oldest space that lacks something, so that forks, which mostly end soon or are other
// programs soon, come last.
func (s *server) turn() (progress bool, err error) {
	for i := 0; i < len(s.spaces); i++ {
		p := s.spaces[i]
		forks, err := p.read(s.buf[:])
		s.spaces = append(s.spaces, forks...) // they are read in this same turn
		if err != nil {
			return false, err
		}
		served, err := s.fill.serve(p)
		if err != nil && !errors.Is(err, errBusy) {
			return false, err
		}
		progress = progress || served || len(forks) > 0
	}
	if s.init < 0 {
		return progress, nil
	}
	most := inTurn
	if progress {
		most = aroundFault
	}
	filled := false
	keep := s.spaces[:0]
	for _, p := range s.spaces {
		if !p.gone && len(p.lack) > 0 && !filled {
			switch err := s.fill.put(p, p.lack[0], most); {
			case err == nil:
				filled = true
			case !errors.Is(err, errBusy):
				return false, err
			}
		}
		if p.gone || len(p.lack) == 0 && len(p.faults) == 0 && s.quiet(p) {
			_ = unix.Close(p.fd) // all is there: who waits yet looks again, and has it
			continue
		}
		keep = append(keep, p)
	}
	clear(s.spaces[len(keep):])
	s.spaces = keep
	return progress || filled, nil
}

// quiet reports whether a space has nothing to tell: a fork that is not read yet would be
// lost with it.
func (s *server) quiet(p *space) bool {
	fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 0
}

// finish is the end when all is in. From the mark on the guard ends nothing.
func (s *server) finish() error {
	if _, err := unix.Pwrite(s.mark, []byte(markDone), 0); err != nil {
		return fmt.Errorf("write the mark: %w", err)
	}
	s.endGuard()
	s.tell(message{Kind: "done", Bytes: s.fill.copied, Took: time.Since(s.restored)})
	return nil
}

func (s *server) endGuard() {
	if s.guard > 0 {
		_ = unix.Kill(s.guard, unix.SIGKILL)
		for {
			if _, err := unix.Wait4(s.guard, nil, 0, nil); !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}
}

// abandonedTime bounds how long the memory of processes is held that are to be ended.
const abandonedTime = 10 * time.Minute

// used reports whether a process is there yet that was to get memory.
func (s *server) used() bool {
	for _, p := range s.spaces {
		// Nothing is mapped at the end: it is refused as long as there is a process, and
		// otherwise because there is none.
		if err := zeroPages(p.fd, lastPages, s.fill.page); !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOSPC) {
			return true
		}
	}
	return false
}

// fail ends a tree whose memory can't be brought back. What it waits for is held until it is
// gone.
func (s *server) fail(err error) {
	_, _ = unix.Pwrite(s.mark, []byte(markFailed+err.Error()), 0)
	s.tell(message{Kind: "failed", Failed: err.Error()})
	if s.init < 0 { // who restores ends it, or who takes over from that
		for deadline := time.Now().Add(abandonedTime); time.Now().Before(deadline) && s.used(); {
			time.Sleep(20 * pause)
		}
		return
	}
	_ = unix.PidfdSendSignal(s.init, unix.SIGKILL, nil, 0)
	for {
		fds := []unix.PollFd{{Fd: int32(s.init), Events: unix.POLLIN}}
		if n, err := unix.Poll(fds, -1); n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	s.endGuard()
}
