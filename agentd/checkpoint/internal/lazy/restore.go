package lazy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Arg follows the helper's command and makes a server of it; the image directory follows.
const Arg = "lazy-pages"

// socketName is where CRIU looks for a server, in its directory.
const socketName = "lazy-pages.socket"

// restoreFinished is CRIU's word for the end of a restore, in place of a process id: it is
// larger than any.
const restoreFinished = 0x52535446

// readyTime bounds a server's start, guardTime its answer when the tree is there.
const (
	readyTime = 30 * time.Second
	guardTime = 30 * time.Second
)

// Restore is one lazy restore, of whoever restores: Begin, then CRIU, then Restored. It
// holds a descriptor of each userfaultfd until Done is closed. Abort ends one that failed.
type Restore struct {
	mark     string
	server   *exec.Cmd
	pidfd    int // the server's: its guard has all that it had, so nothing is closed when it dies
	listener *net.UnixListener
	finished chan struct{} // closed when CRIU said that it is done, or hung up

	mu      sync.Mutex
	control int // -1: closed
	conn    net.Conn
	uffds   []int
	failed  error // of CRIU's connection
	ending  bool

	done  chan struct{}
	err   error // this and the next are valid when done is closed
	bytes int64
	took  time.Duration
	wg    sync.WaitGroup
}

// Begin starts a server for the images and listens for CRIU in their directory. self is a
// program whose command helper, followed by Arg, is Main; mark a path for the mark, which
// is made anew.
func Begin(ctx context.Context, self, helper, images, mark string) (*Restore, error) {
	if err := os.Remove(mark); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	m, err := os.OpenFile(mark, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("the mark of a lazy restore: %w", err)
	}
	defer m.Close() //nolint:errcheck // the server's to write
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "control")
	defer theirs.Close() //nolint:errcheck // the server has its own
	r := &Restore{mark: mark, control: pair[0], pidfd: -1, finished: make(chan struct{}), done: make(chan struct{})}
	r.server = exec.Command(self, helper, Arg, images)
	r.server.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "GODEBUG=containermaxprocs=0,updatemaxprocs=0", "GOMAXPROCS=2"}
	r.server.Dir = "/"
	r.server.SysProcAttr = &syscall.SysProcAttr{Setsid: true, PidFD: &r.pidfd} // it outlives who restores
	r.server.ExtraFiles = []*os.File{theirs, m}
	if err := r.server.Start(); err != nil {
		_ = unix.Close(r.control)
		return nil, fmt.Errorf("start the server of a lazy restore: %w", err)
	}
	if err := r.begin(ctx, images); err != nil {
		r.Abort()
		return nil, err
	}
	return r, nil
}

func (r *Restore) begin(ctx context.Context, images string) error {
	if r.pidfd < 0 {
		return errors.New("this system's kernel has no pidfds")
	}
	if err := r.expect(ctx, "ready", readyTime); err != nil {
		return err
	}
	dir, err := os.Open(images)
	if err != nil {
		return err
	}
	defer dir.Close() //nolint:errcheck // the socket is made
	// The path may be longer than a socket's address.
	path := fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), socketName)
	_ = os.Remove(path)
	if r.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}); err != nil {
		return fmt.Errorf("listen for CRIU: %w", err)
	}
	r.listener.SetUnlinkOnClose(false)
	name := filepath.Join(images, socketName)
	r.wg.Go(func() {
		defer close(r.finished)
		err := r.accept()
		_ = os.Remove(name)
		r.mu.Lock()
		defer r.mu.Unlock()
		r.failed = err
	})
	return nil
}

// next waits for what the server says, at most until stop says why not to.
func (r *Restore) next(stop func() error) (message, error) {
	for {
		fds := []unix.PollFd{{Fd: int32(r.control), Events: unix.POLLIN}, {Fd: int32(r.pidfd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 50)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return message{}, fmt.Errorf("poll: %w", err)
		}
		if n > 0 && fds[0].Revents != 0 {
			m, fd, err := receive(r.control)
			if fd >= 0 {
				_ = unix.Close(fd)
			}
			return m, err
		}
		if n > 0 {
			return message{}, errHungUp
		}
		if err := stop(); err != nil {
			return message{}, err
		}
	}
}

// expect waits for one message of the server's.
func (r *Restore) expect(ctx context.Context, kind string, most time.Duration) error {
	deadline := time.Now().Add(most)
	m, err := r.next(func() error {
		if time.Now().After(deadline) {
			return fmt.Errorf("it is not %s after %s", kind, most)
		}
		return context.Cause(ctx)
	})
	switch {
	case errors.Is(err, errHungUp):
		return errors.New("the process that brings memory ended")
	case err != nil:
		return fmt.Errorf("the process that brings memory: %w", err)
	case m.Kind == "failed":
		return errors.New(m.Failed)
	case m.Kind != kind:
		return fmt.Errorf("the process that brings memory says %q", m.Kind)
	}
	return nil
}

// accept takes what CRIU sends: for each process its id and a userfaultfd, a negative
// id for one that is dead, and restoreFinished.
func (r *Restore) accept() error {
	conn, err := r.listener.AcceptUnix()
	_ = r.listener.Close()
	if err != nil {
		return fmt.Errorf("CRIU did not ask for memory: %w", err)
	}
	defer conn.Close() //nolint:errcheck // it is read only
	r.mu.Lock()
	r.conn = conn
	ending := r.ending
	r.mu.Unlock()
	if ending {
		return errHungUp
	}
	for {
		var b [4]byte
		if _, err := io.ReadFull(conn, b[:]); err != nil {
			return fmt.Errorf("CRIU hung up: %w", err)
		}
		pid := int32(binary.NativeEndian.Uint32(b[:]))
		if pid == restoreFinished {
			return nil
		}
		if pid < 0 {
			continue
		}
		oob := make([]byte, unix.CmsgSpace(4))
		n, on, _, _, err := conn.ReadMsgUnix(b[:1], oob)
		if err != nil || n != 1 {
			return fmt.Errorf("CRIU hung up: %w", errors.Join(err, errHungUp))
		}
		uffd, err := oneRight(oob[:on])
		if err != nil {
			return fmt.Errorf("a userfaultfd of CRIU's: %w", err)
		}
		r.mu.Lock()
		r.uffds = append(r.uffds, uffd)
		r.mu.Unlock()
		if err := send(r.control, message{Kind: "space", PID: int(pid)}, uffd); err != nil {
			return fmt.Errorf("the process that brings memory: %w", err)
		}
	}
}

// Restored says that CRIU is done and the tree with that init runs. After an error the
// tree must be ended before Abort.
func (r *Restore) Restored(ctx context.Context, pid int) error {
	init, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("pidfd_open: %w", err)
	}
	select {
	case <-r.finished:
		r.mu.Lock()
		err = r.failed
		r.mu.Unlock()
	case <-time.After(guardTime):
		err = errors.New("CRIU did not say that it is done")
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err == nil {
		err = send(r.control, message{Kind: "restored"}, init)
	}
	if err == nil {
		err = r.expect(ctx, "guarded", guardTime)
	}
	if err != nil {
		_ = unix.Close(init)
		return err
	}
	r.wg.Go(func() {
		defer unix.Close(init) //nolint:errcheck // a pidfd
		r.end(r.hold(init))
	})
	return nil
}

// ErrLost is returned when memory can't be brought back: the tree is gone then.
var ErrLost = errors.New("its memory could not be brought back")

// errKilled is how that ends mostly.
var errKilled = fmt.Errorf("%w: the process that did it was killed", ErrLost)

// errGone is returned when the tree has ended and the server, which should see it at its next
// step, does not. goneTime is when.
var errGone = errors.New("there is nothing to bring memory to")

const goneTime = 3 * time.Second

// over is errHungUp once Close was called.
func (r *Restore) over() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ending {
		return errHungUp
	}
	return nil
}

// hold holds what it has until the server is done. If that dies it ends the tree first.
func (r *Restore) hold(init int) error {
	var gone time.Time
	m, err := r.next(func() error {
		switch {
		case !ended(init):
			return r.over()
		case gone.IsZero():
			gone = time.Now()
		case time.Since(gone) > goneTime:
			return errGone
		}
		return r.over()
	})
	switch {
	case errors.Is(err, errGone):
		_ = r.server.Process.Kill()
		_ = r.server.Wait()
		return nil
	case err == nil && m.Kind == "done":
		r.bytes, r.took = m.Bytes, m.Took
		_ = r.server.Wait()
		return nil
	case r.over() != nil:
		return errHungUp
	case err == nil:
		err = fmt.Errorf("%w: %s", ErrLost, oneLine(m.Failed))
	default:
		// It may have died when all was in, and before it said so. The guard knows.
		for deadline := time.Now().Add(guardTime); ; time.Sleep(awaitPause / 4) {
			busy, lost := Busy(r.mark)
			if !busy && lost == nil {
				_ = r.server.Wait()
				return nil
			}
			if !busy || ended(init) || time.Now().After(deadline) {
				break
			}
		}
		err = errKilled
	}
	_ = unix.PidfdSendSignal(init, unix.SIGKILL, nil, 0)
	for { // a process that waits for a file system that does not answer takes its time
		fds := []unix.PollFd{{Fd: int32(init), Events: unix.POLLIN}}
		n, perr := unix.Poll(fds, 200)
		if n > 0 || perr != nil && !errors.Is(perr, unix.EINTR) {
			break
		}
		if r.over() != nil {
			return err
		}
	}
	_ = r.server.Wait()
	return err
}

// ended reports whether a pidfd's process has.
func ended(pidfd int) bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0)
	return err == nil && n > 0
}

func (r *Restore) end(err error) {
	r.mu.Lock()
	for _, fd := range append(r.uffds, r.control, r.pidfd) {
		_ = unix.Close(fd)
	}
	r.uffds, r.control = nil, -1
	r.mu.Unlock()
	r.err = err
	close(r.done)
}

// Done is closed when all memory is in, or the tree is gone, or after Close.
func (r *Restore) Done() <-chan struct{} { return r.done }

// Err is nil when all memory is in or nobody needs it any more, ErrLost when the tree was
// ended; valid when Done is closed.
func (r *Restore) Err() error { return r.err }

// Filled is how much came and how long it took since the tree ran; valid when Done is closed.
func (r *Restore) Filled() (bytes int64, took time.Duration) { return r.bytes, r.took }

// Close lets go: the server and its guard go on without this process. It may be called
// after the end, and twice.
func (r *Restore) Close() {
	r.mu.Lock()
	r.ending = true
	r.mu.Unlock()
	<-r.done
	r.wg.Wait()
}

// Abort ends a restore for which Restored was not called, or failed; the tree must be gone.
func (r *Restore) Abort() {
	r.mu.Lock()
	r.ending = true
	if r.conn != nil {
		_ = r.conn.Close()
	}
	r.mu.Unlock()
	if r.listener != nil {
		_ = r.listener.Close()
	}
	_ = r.server.Process.Kill()
	_ = r.server.Wait()
	r.wg.Wait()
	r.end(errHungUp)
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// awaitPause is between two looks at a mark.
const awaitPause = 20 * time.Millisecond

// Busy reports whether a mark is a server's that is at work. lost is ErrLost when there was
// one and it did not finish.
func Busy(mark string) (busy bool, lost error) {
	f, err := os.Open(mark)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close() //nolint:errcheck // it is only read
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	} else if err != nil {
		return false, fmt.Errorf("lock %s: %w", mark, err)
	}
	b := make([]byte, maxMessage)
	n, _ := f.Read(b)
	switch text := string(b[:n]); {
	case text == markDone:
		return false, nil
	case strings.HasPrefix(text, markFailed):
		return false, fmt.Errorf("%w: %s", ErrLost, oneLine(strings.TrimPrefix(text, markFailed)))
	}
	return false, errKilled
}

// Await waits until nobody works for a mark.
func Await(ctx context.Context, mark string) error {
	for {
		busy, err := Busy(mark)
		if !busy {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(awaitPause):
		}
	}
}
