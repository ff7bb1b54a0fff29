package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
	"github.com/postern-dev/postern/agentd/kernel/internal/zmtp"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// dialPause is between two tries to reach a kernel's sockets.
	dialPause = 10 * time.Millisecond
	// probePause is between two questions whether the kernel is ready.
	probePause = 200 * time.Millisecond
	// busyTime is how long a kernel that is in the middle of a cell may take to hear of
	// a new subscriber.
	busyTime = time.Second
	// beatPause is between two heartbeats.
	beatPause = 5 * time.Second
	// maxAhead and maxAheadBytes bound what is read of a channel and not yet journaled.
	maxAhead      = 4096
	maxAheadBytes = 64 << 20
	// flushTime bounds the wait for the kernel to read what was sent, before the sockets
	// are closed.
	flushTime = 500 * time.Millisecond
)

// link is one set of connections to the kernel: an epoch.
type link struct {
	s      *Shim
	box    *sandbox.Sandbox
	epoch  uint64
	signer *jupyter.Signer
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	conns  map[string]*zmtp.Conn // guarded by s.mu
	// asked are our requests about secrets that await an answer, by id; guarded by s.mu.
	asked map[string]chan []byte
	probe atomic.Pointer[probe]
	beat  atomic.Int64 // unix nanoseconds of the last heartbeat's answer
}

// probe is whether the kernel has answered our questions on one set of sockets.
type probe struct {
	shell, iopub         chan struct{}
	onceShell, onceIOPub sync.Once
}

// connect begins an epoch with a kernel. It returns at once. The caller has life.
func (s *Shim) connect(box *sandbox.Sandbox) {
	c := s.connection("")
	signer, err := jupyter.NewSigner(c.SignatureScheme, c.Key)
	if err != nil {
		s.logger.Error("kernel's key of no use", "err", err) // it is ours: never
		return
	}
	l := &link{
		s: s, box: box, signer: signer,
	}
	l.ctx, l.cancel = context.WithCancel(s.ctx)
	s.AfterRestore()
	s.mu.Lock()
	l.epoch = s.state.Epoch
	s.link = l
	s.mu.Unlock()
	l.wg.Go(l.run)
}

// disconnect ends the epoch: all sockets are closed when it returns, and the kernel
// has what was sent, if it reads at all. The caller has life.
func (s *Shim) disconnect() {
	for _, q := range s.queues {
		q.open(nil)
	}
	s.mu.Lock()
	l := s.link
	s.link = nil
	s.mu.Unlock()
	if l != nil {
		s.mu.Lock()
		conns := maps.Clone(l.conns)
		s.mu.Unlock()
		before := l.accepted()
		deadline := time.Now().Add(flushTime)
		for _, conn := range conns {
			flushed(conn.Raw(), deadline)
		}
		l.cancel()
		l.wg.Wait()
		// The kernel's side has gone too: half a connection can't be dumped.
		for l.accepted() > before-len(conns) && time.Now().Before(deadline) {
			time.Sleep(time.Millisecond)
		}
	}
}

// accepted counts the connections to sockets in the run directory that the kernel holds,
// its own to itself among them.
func (l *link) accepted() int {
	select {
	case <-l.box.Done():
		return 0
	default:
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/unix", l.box.PID()))
	if err != nil {
		return 0
	}
	n := 0
	for line := range strings.Lines(string(text)) {
		// Num RefCount Protocol Flags Type St Inode Path; St 03 is connected
		f := strings.Fields(line)
		if len(f) == 8 && f[5] == "03" && strings.HasPrefix(f[7], sandbox.RunInside+"/"+socketStem+"-") {
			n++
		}
	}
	return n
}

// run connects, waits until the kernel is ready, and lets messages go. A connection
// that breaks is made anew.
func (l *link) run() {
	for l.ctx.Err() == nil {
		err := l.once()
		if l.ctx.Err() != nil {
			return
		}
		l.s.logger.Warn("connection to the kernel lost, trying again", "err", err)
		l.pause(20 * dialPause)
	}
}

func (l *link) pause(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-l.ctx.Done():
	}
}

// once is one set of sockets.
func (l *link) once() (err error) {
	var conns []*zmtp.Conn
	var mu sync.Mutex
	closeAll := func() {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range conns {
			_ = c.Close()
		}
	}
	defer closeAll()
	broken := make(chan error, 8)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer closeAll()
	stop := context.AfterFunc(l.ctx, closeAll)
	defer stop()
	c := l.s.connection("")
	set := map[string]*zmtp.Conn{}
	for _, e := range []struct {
		channel string
		kind    zmtp.Kind
		port    int
	}{
		{jupyter.IOPub, zmtp.Sub, c.IOPubPort},
		{jupyter.Shell, zmtp.Dealer, c.ShellPort},
		{jupyter.Control, zmtp.Dealer, c.ControlPort},
		{jupyter.Stdin, zmtp.Dealer, c.StdinPort},
		{"hb", zmtp.Req, c.HeartbeatPort},
	} {
		conn, err := l.dial(e.kind, e.port)
		if err != nil {
			return err
		}
		mu.Lock()
		conns = append(conns, conn)
		mu.Unlock()
		set[e.channel] = conn
	}
	if l.ctx.Err() != nil {
		return context.Cause(l.ctx)
	}
	l.probe.Store(&probe{shell: make(chan struct{}), iopub: make(chan struct{})})
	l.s.mu.Lock()
	l.conns = set
	l.s.mu.Unlock()
	for _, channel := range []string{jupyter.IOPub, jupyter.Shell, jupyter.Control, jupyter.Stdin} {
		conn := set[channel]
		wg.Go(func() { broken <- l.receive(channel, conn) })
	}
	wg.Go(func() { broken <- l.beats(set["hb"]) })
	ready := make(chan struct{})
	gone := make(chan struct{})
	defer close(gone)
	wg.Go(func() {
		if l.ready(set) {
			l.bringFirst(&wg, gone)
			close(ready)
		}
	})
	for {
		select {
		case err = <-broken:
		case <-l.ctx.Done():
			err = context.Cause(l.ctx)
		case <-ready:
			ready = nil
			for name, q := range l.s.queues {
				q.open(set[name])
			}
			continue
		}
		break
	}
	for _, q := range l.s.queues {
		q.open(nil)
	}
	return err
}

// dial connects to a socket of the kernel's and waits until it is there.
func (l *link) dial(kind zmtp.Kind, port int) (*zmtp.Conn, error) {
	identity := "postern-" + l.s.dirName()
	for {
		raw, err := l.reach(port)
		if err == nil {
			ctx, cancel := context.WithTimeout(l.ctx, 5*time.Second)
			var conn *zmtp.Conn
			conn, err = zmtp.New(ctx, raw, kind, identity, jupyter.MaxMessage)
			cancel()
			if err == nil {
				return conn, nil
			}
			if errors.Is(err, zmtp.ErrProtocol) {
				return nil, err
			}
		}
		if l.ctx.Err() != nil {
			return nil, context.Cause(l.ctx)
		}
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, context.DeadlineExceeded) {
			return nil, err
		}
		l.pause(dialPause)
	}
}

func (s *Shim) dirName() string { return filepath.Base(s.dir) }

// reach connects to a socket in the run directory, which the kernel can write: it must
// be a socket of the kernel's own user, not a link to one of the host's. The socket is
// made in the kernel's network namespace, so that none of it is outside when CRIU looks.
func (l *link) reach(port int) (net.Conn, error) {
	l.s.mu.Lock()
	spec := l.s.spec.Sandbox
	l.s.mu.Unlock()
	fd, err := unix.Open(filepath.Join(spec.RunDir, socketName(port)), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd) //nolint:errcheck // it was only looked at
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK || st.Uid != spec.UID {
		return nil, fmt.Errorf("%s is no socket of the kernel's: is the kernel hostile?", socketName(port))
	}
	var conn net.Conn
	err = l.box.InNetwork(func() error {
		var err error
		conn, err = (&net.Dialer{Timeout: 5 * time.Second}).DialContext(l.ctx, "unix", "/proc/self/fd/"+strconv.Itoa(fd))
		return err
	})
	return conn, err
}

// own sends a message of our own.
func (l *link) own(channel, kind string, content any) error {
	m, err := jupyter.New(channel, kind, l.s.self, content)
	if err != nil {
		return err
	}
	l.s.mu.Lock()
	conn := l.conns[channel]
	l.s.mu.Unlock()
	if conn == nil {
		return errors.New("the kernel is not connected at present")
	}
	return conn.Send(l.signer.Frames(nil, m))
}

// ready asks until the kernel answers on shell and we hear it on iopub. Then requests
// that were lost are known, too.
func (l *link) ready(set map[string]*zmtp.Conn) bool {
	began := time.Now()
	asked := 0
	tick := time.NewTicker(dialPause)
	defer tick.Stop()
	last := time.Time{}
	p := l.probe.Load()
	shell, iopub := p.shell, p.iopub
	busy := l.s.hasRequests()
	for shell != nil || iopub != nil {
		if time.Since(last) >= probePause {
			// A kernel in the middle of a cell answers on control, if at all.
			if asked < 3 || !busy {
				if err := l.send(set[jupyter.Shell], jupyter.Shell); err != nil {
					return false
				}
			}
			if busy {
				if err := l.send(set[jupyter.Control], jupyter.Control); err != nil {
					return false
				}
			}
			asked++
			last = time.Now()
		}
		select {
		case <-shell:
			shell = nil
		case <-iopub:
			iopub = nil
			if busy {
				shell = nil // it hears us; its answer on shell comes after the cell
			}
		case <-tick.C:
			if busy && time.Since(began) > busyTime {
				shell, iopub = nil, nil
			}
		case <-l.ctx.Done():
			return false
		}
	}
	l.s.kernelReady(l)
	return true
}

func (l *link) send(conn *zmtp.Conn, channel string) error {
	m, err := jupyter.New(channel, "kernel_info_request", l.s.self, nil)
	if err != nil {
		return err
	}
	return conn.Send(l.signer.Frames(nil, m))
}

// beats sends heartbeats.
func (l *link) beats(conn *zmtp.Conn) error {
	for {
		if err := conn.Send([][]byte{[]byte("postern")}); err != nil {
			return err
		}
		if _, err := conn.Recv(); err != nil {
			return err
		}
		l.beat.Store(time.Now().UnixNano())
		l.pause(beatPause)
		if l.ctx.Err() != nil {
			return context.Cause(l.ctx)
		}
	}
}

// send is the goroutine that passes a channel's messages on to the kernel.
func (s *Shim) send(channel string, q *queue) {
	for {
		m, conn, ok := q.take()
		if !ok {
			return
		}
		s.mu.Lock()
		l := s.link
		s.mu.Unlock()
		if l == nil {
			q.done(m, conn, true)
			continue
		}
		s.note(m, l.epoch)
		err := conn.Send(l.signer.Frames(nil, m))
		q.done(m, conn, err != nil)
		if err != nil && !strings.Contains(err.Error(), "closed") {
			s.logger.Debug("message not sent, it waits", "channel", channel, "err", err)
		}
	}
}

// receive takes what the kernel says on a channel. It reads ahead of the journal, up to
// maxAhead messages and maxAheadBytes: ZeroMQ drops what a subscriber does not take in
// time, and a disk may stall.
func (l *link) receive(channel string, conn *zmtp.Conn) error {
	type item struct {
		m    *posternv1.KernelMessage // nil: one was left out
		size int64
	}
	items := make(chan item, maxAhead)
	room := semaphore.NewWeighted(maxAheadBytes)
	ctx, cancel := context.WithCancelCause(l.ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(items)
	put := func(m *posternv1.KernelMessage) error {
		i := item{m: m}
		if m != nil {
			i.size = min(int64(jupyter.Size(m)), maxAheadBytes)
		}
		if err := room.Acquire(ctx, i.size); err != nil {
			return context.Cause(ctx)
		}
		select {
		case items <- i:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	wg.Go(func() {
		for i := range items {
			var err error
			if i.m == nil {
				_, err = l.s.journal.Skip()
			} else {
				err = l.s.received(l, i.m)
			}
			room.Release(i.size)
			if err != nil {
				cancel(err)
				_ = conn.Close()
				for range items { // nothing is kept any more
				}
				return
			}
		}
	})
	if channel == jupyter.IOPub {
		conn.Large = func(before [][]byte, _ int64, body io.Reader) (bool, error) { return l.splitStream(before, body, put) }
	}
	for {
		frames, err := conn.Recv()
		if errors.Is(err, zmtp.ErrTaken) {
			continue
		}
		if errors.Is(err, zmtp.ErrTooLarge) {
			l.s.logger.Warn("message of the kernel left out", "channel", channel, "err", err)
			if err := put(nil); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		_, m, err := l.signer.Message(frames)
		if err != nil {
			l.s.dropped(channel, err)
			continue
		}
		m.Channel = channel
		if err := put(m); err != nil {
			return err
		}
	}
}

func (s *Shim) dropped(channel string, err error) {
	s.mu.Lock()
	s.drops++
	n := s.drops
	s.mu.Unlock()
	if n&(n-1) == 0 { // 1, 2, 4, 8 ...: a kernel can't fill the log
		s.logger.Warn("messages of the kernel dropped", "channel", channel, "count", n, "err", err)
	}
}

// flushed waits until the kernel has read what was sent on a connection.
func flushed(conn net.Conn, deadline time.Time) bool {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return true
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return true
	}
	for {
		left := 0
		if err := raw.Control(func(fd uintptr) { left, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }); err != nil || left == 0 {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(time.Millisecond)
	}
}
