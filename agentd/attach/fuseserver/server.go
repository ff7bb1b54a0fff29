package fuseserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Saved is what one server leaves to the next: the INIT request as the kernel sent it,
// and what was answered. Both are about a hundred bytes.
type Saved struct {
	Request []byte `json:"request"`
	Reply   []byte `json:"reply"`
}

// ErrOptionsChanged is returned by New when this server would answer INIT in another way
// than the one before: what was agreed upon cannot change in a connection's life.
var ErrOptionsChanged = errors.New("the options of this mount have changed: it must be unmounted and mounted anew")

// ErrGone is returned when the connection has ended: unmounted, or aborted.
var ErrGone = errors.New("the FUSE connection has ended")

const (
	// DefaultDeadline is when a request is answered with EIO, whatever its handler does.
	DefaultDeadline = 60 * time.Second
	// maxWorkers bounds the requests under way on one connection; more wait in the kernel.
	maxWorkers = 128
	// maxIdle is how many workers wait for requests.
	maxIdle = 3
	// minWrite is go-fuse's MaxWrite where Options has none.
	minWrite = 128 << 10
)

// Config is what a server needs. Dev, FS and Options are required.
type Config struct {
	// Dev is the connection's descriptor. The server takes it and closes it.
	Dev *os.File
	// FS answers; it may implement Files. Its Init method is never called; OnUnmount is called when the
	// connection has ended, not when the server stops before.
	FS fuse.RawFileSystem
	// Options go to go-fuse; every life of a connection must give the same.
	Options fuse.MountOptions
	// Saved is nil in a connection's first life.
	Saved *Saved
	// Save keeps Saved where the next server finds it, before the kernel hears anything.
	Save func(Saved) error
	// BackingFile is the path of the table of backing ids; "" is for tests.
	BackingFile string
	// Conn is told the file system's side of the connection before the first request.
	Conn func(*Conn)
	// Deadline is how long a request may take; 0: DefaultDeadline. Waiting for a lock of
	// a file may take for ever.
	Deadline time.Duration
	// SyncDeadline is how long FLUSH and FSYNC may take; 0: Deadline.
	SyncDeadline time.Duration
	// Logger hears of what goes wrong; nil: nobody.
	Logger *slog.Logger
}

// Server answers the requests of one connection.
type Server struct {
	cfg      Config
	conn     *Conn
	protocol *fuse.ProtocolServer
	logger   *slog.Logger
	buffers  *buffers
	files    Files // nil: FS is none
	pipes    pipes

	workers  sync.WaitGroup
	gone     chan struct{}
	goneOnce sync.Once
	draining atomic.Bool

	// mu guards the following.
	mu     sync.Mutex
	idle   int                  // workers that read
	total  int                  // workers
	begun  map[uint64]time.Time // requests under way
	told   map[uint64]bool      // of those, which were answered with EIO already
	failed error
}

// New begins a connection's first life, or takes over from a server that is dead: it
// must be dead, for it could eat what is sent again. It returns ErrOptionsChanged, ErrGone,
// or what went wrong; the descriptor is closed then.
func New(cfg Config) (*Server, error) {
	s, err := newServer(cfg)
	if err != nil {
		return nil, errors.Join(err, cfg.Dev.Close())
	}
	return s, nil
}

func newServer(cfg Config) (*Server, error) {
	if cfg.Deadline == 0 {
		cfg.Deadline = DefaultDeadline
	}
	if cfg.SyncDeadline == 0 {
		cfg.SyncDeadline = cfg.Deadline
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Options.Logger == nil {
		cfg.Options.Logger = slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelWarn)
		cfg.Options.Logger.SetFlags(log.Lmsgprefix)
	}
	table, err := openBackings(cfg.BackingFile, cfg.Saved == nil)
	if err != nil {
		return nil, err
	}
	conn, err := newConn(cfg.Dev, table)
	if err != nil {
		return nil, errors.Join(err, table.close())
	}
	s := &Server{
		cfg: cfg, conn: conn, logger: cfg.Logger, gone: make(chan struct{}),
		protocol: fuse.NewProtocolServer(cfg.FS, &cfg.Options),
		begun:    map[uint64]time.Time{}, told: map[uint64]bool{},
	}
	s.files, _ = cfg.FS.(Files)
	// The kernel refuses readers whose buffer is smaller than the largest WRITE.
	s.buffers = &buffers{size: (max(cfg.Options.MaxWrite, minWrite) + 8<<10 + os.Getpagesize() - 1) &^ (os.Getpagesize() - 1)}
	if err := s.begin(); err != nil {
		return nil, errors.Join(err, table.close())
	}
	return s, nil
}

// begin does INIT, the first time or again.
func (s *Server) begin() error {
	saved := s.cfg.Saved
	if saved == nil {
		// A server that died before it saved anything may have read it.
		if err := s.conn.resend(); err != nil && !errors.Is(err, unix.EINVAL) {
			return err
		}
		request, err := s.readInit()
		if err != nil {
			return err
		}
		reply, err := s.initReply(request)
		if err != nil {
			return err
		}
		saved = &Saved{Request: bytes.Clone(request), Reply: bytes.Clone(reply)}
		native.PutUint64(saved.Request[8:], unique(request)&^ResentBit)
		native.PutUint64(saved.Reply[8:], unique(request)&^ResentBit)
		if s.cfg.Save != nil {
			if err := s.cfg.Save(*saved); err != nil {
				return fmt.Errorf("keep the INIT request: %w", err)
			}
		}
		s.agree(saved)
		if err := s.conn.write(reply); err != nil {
			return fmt.Errorf("answer INIT: %w", err)
		}
		return nil
	}
	reply, err := s.initReply(saved.Request)
	if err != nil {
		return err
	}
	if !bytes.Equal(reply, saved.Reply) {
		return ErrOptionsChanged
	}
	s.agree(saved)
	// If the one before died between saving and answering, INIT comes again too, and is
	// answered like any request. Sent again by every successor: requests that the last
	// one had read are lost with it.
	if err := s.conn.resend(); err != nil {
		return err
	}
	if s.ended() {
		return ErrGone
	}
	return nil
}

// ended tells whether the connection is over: the kernel says so to poll alone.
func (s *Server) ended() bool {
	wait := []unix.PollFd{{Fd: int32(s.cfg.Dev.Fd()), Events: unix.POLLIN}}
	_, err := unix.Poll(wait, 0)
	return err == nil && wait[0].Revents&unix.POLLERR != 0
}

// agree makes what was negotiated count for the file system.
func (s *Server) agree(saved *Saved) {
	const flagsAt, flags2At = outHeaderSize + 12, outHeaderSize + 32
	if len(saved.Reply) >= flags2At+4 {
		flags := uint64(native.Uint32(saved.Reply[flagsAt:])) | uint64(native.Uint32(saved.Reply[flags2At:]))<<32
		s.conn.enabled = flags&fuse.CAP_PASSTHROUGH != 0
	}
	if s.cfg.Conn != nil {
		s.cfg.Conn(s.conn)
	}
}

// readInit reads the first request; the kernel sends it when the superblock is made.
func (s *Server) readInit() ([]byte, error) {
	wait := []unix.PollFd{{Fd: int32(s.cfg.Dev.Fd()), Events: unix.POLLIN}}
	for until := time.Now().Add(10 * time.Second); ; {
		if s.ended() {
			return nil, ErrGone
		}
		n, err := unix.Poll(wait, 1000)
		if err != nil && err != unix.EINTR {
			return nil, fmt.Errorf("wait for INIT: %w", err)
		}
		if n > 0 {
			break
		}
		if time.Now().After(until) {
			return nil, errors.New("the kernel sent no INIT request within 10 s: the connection is in use, or was never mounted")
		}
	}
	buf, err := s.buffers.get()
	if err != nil {
		return nil, err
	}
	defer s.buffers.put(buf)
	n, err := s.read(buf)
	if err != nil {
		return nil, err
	}
	if n < inHeaderSize || opcode(buf[:n]) != opInit {
		return nil, fmt.Errorf("the connection's first request is no INIT but %d: its saved state is missing", opcode(buf[:n]))
	}
	return bytes.Clone(buf[:n]), nil
}

func (s *Server) initReply(request []byte) ([]byte, error) {
	out := make([]byte, 512)
	n, status := s.protocol.HandleRequest([][]byte{request}, [][]byte{out})
	if !status.Ok() || n < outHeaderSize {
		return nil, fmt.Errorf("go-fuse does not take the INIT request: %v", status)
	}
	if code := int32(native.Uint32(out[4:])); code != 0 {
		return nil, fmt.Errorf("go-fuse does not speak with this kernel: error %d", -code)
	}
	return out[:n], nil
}

// Conn is the file system's side of the connection.
func (s *Server) Conn() *Conn { return s.conn }

// Serve answers requests until the connection ends (it returns ErrGone then, after
// OnUnmount), or until ctx does: then it answers what it has read, for at most a second,
// and returns nil; whatever was not answered waits for the next server. After that, and
// after any other error, the process must exit: threads that wait for requests only leave
// with it. Call it once.
func (s *Server) Serve(ctx context.Context) error {
	ticker := time.NewTicker(min(s.cfg.Deadline/4, time.Second))
	defer ticker.Stop()
	s.mu.Lock()
	s.spawnLocked()
	s.mu.Unlock()
	for {
		select {
		case <-s.gone:
			s.mu.Lock()
			err := s.failed
			s.mu.Unlock()
			if !errors.Is(err, ErrGone) {
				return err // other threads wait for requests still
			}
			s.workers.Wait()
			s.buffers.close()
			s.pipes.close()
			s.cfg.FS.OnUnmount()
			return errors.Join(err, s.close())
		case now := <-ticker.C:
			s.expire(now)
		case <-ctx.Done():
			s.drain()
			return nil
		}
	}
}

// close releases the descriptor when nobody reads any more.
func (s *Server) close() error {
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	return errors.Join(s.conn.backings.close(), s.cfg.Dev.Close())
}

// drain lets the requests under way end.
func (s *Server) drain() {
	s.draining.Store(true)
	for until := time.Now().Add(time.Second); time.Now().Before(until); time.Sleep(5 * time.Millisecond) {
		if s.Running() == 0 {
			return
		}
	}
}

// Running is the number of requests under way.
func (s *Server) Running() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.begun)
}

func (s *Server) spawnLocked() {
	s.idle++
	s.total++
	s.workers.Go(s.work)
}

// work reads and answers; whoever takes a request sees to it that somebody else reads.
func (s *Server) work() {
	in, err := s.buffers.get()
	if err == nil {
		defer s.buffers.put(in)
	}
	var out []byte
	for {
		n := 0
		if err == nil {
			n, err = s.read(in)
		}
		s.mu.Lock()
		s.idle--
		if err != nil {
			s.total--
			if !errors.Is(err, ErrGone) && s.failed == nil {
				s.failed = err
				s.logger.Error("fuse device not readable", "err", err)
			} else if s.failed == nil {
				s.failed = ErrGone
			}
			s.mu.Unlock()
			s.goneOnce.Do(func() { close(s.gone) })
			return
		}
		request := in[:n]
		op := opcode(request)
		expects := op != opForget && op != opBatchForget
		// Nobody waits for a FORGET, so the kernel may send more than can be done.
		if expects && s.idle == 0 && s.total < maxWorkers {
			s.spawnLocked()
		}
		if s.draining.Load() {
			// The next server gets it: it was read, and never answered.
			s.total--
			s.mu.Unlock()
			return
		}
		id := unique(request)
		if expects && op != opInterrupt && op != opSetLkW {
			s.begun[id] = time.Now()
			if op == opFlush || op == opFsync {
				s.begun[id] = s.begun[id].Add(s.cfg.SyncDeadline - s.cfg.Deadline)
			}
		}
		s.mu.Unlock()

		out = s.answer(request, out)

		s.mu.Lock()
		delete(s.begun, id)
		delete(s.told, id)
		if s.idle >= maxIdle {
			s.total--
			s.mu.Unlock()
			return
		}
		s.idle++
		s.mu.Unlock()
	}
}

// answer has go-fuse handle a request. out is room for replies, which it returns, perhaps
// made larger.
func (s *Server) answer(request, out []byte) []byte {
	if s.splice(request) {
		return out
	}
	need := replySize(request)
	if need > s.buffers.size {
		s.reply(refusal(unique(request), fuse.EINVAL))
		return out
	}
	reply := out
	switch {
	case need > 16<<10: // not kept by each worker
		large, err := s.buffers.get()
		if err != nil {
			s.reply(refusal(unique(request), fuse.ToStatus(unix.ENOMEM)))
			return out
		}
		defer s.buffers.put(large)
		reply = large
	case len(out) < need:
		out = make([]byte, need)
		reply = out
	}
	n, status := s.protocol.HandleRequest([][]byte{request}, [][]byte{reply[:need]})
	switch {
	case !status.Ok():
		s.reply(refusal(unique(request), status))
	case n > 0:
		s.reply(reply[:n])
	}
	return out
}

func (s *Server) reply(message []byte) {
	err := s.conn.write(message)
	switch {
	case err == nil, errors.Is(err, unix.ENODEV): // unmounted meanwhile
	case errors.Is(err, unix.ENOENT): // answered by expire, or the asker has gone
	default:
		s.logger.Error("reply not taken by the kernel", "err", err, "bytes", len(message))
		// Whoever asked must not wait for ever.
		_ = s.conn.write(refusal(unique(message), fuse.EIO))
	}
}

// expire answers what is too old, and cancels its handler.
func (s *Server) expire(now time.Time) {
	var late []uint64
	s.mu.Lock()
	for id, began := range s.begun {
		if now.Sub(began) > s.cfg.Deadline && !s.told[id] {
			s.told[id] = true
			late = append(late, id)
		}
	}
	s.mu.Unlock()
	for _, id := range late {
		s.logger.Error("request answered with EIO: its deadline has passed", "deadline_seconds", s.cfg.Deadline.Seconds())
		s.reply(refusal(id, fuse.EIO))
		var none [64]byte
		s.protocol.HandleRequest([][]byte{interruption(id)}, [][]byte{none[:]})
	}
}

// read takes one request.
func (s *Server) read(buf []byte) (int, error) {
	var n int
	var err error
	if cerr := s.conn.raw.Control(func(fd uintptr) {
		for {
			n, err = unix.Read(int(fd), buf)
			switch err {
			case unix.EINTR, unix.ENOENT: // ENOENT: whoever asked has gone
			case unix.EAGAIN: // somebody made the descriptor non-blocking
				_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
			default:
				return
			}
		}
	}); cerr != nil {
		return 0, ErrGone
	}
	switch {
	case err == unix.ENODEV || err == unix.ECONNABORTED:
		return 0, ErrGone
	case err != nil:
		return 0, fmt.Errorf("read a request: %w", err)
	case n < inHeaderSize:
		return 0, fmt.Errorf("a request of %d bytes", n)
	}
	return n, nil
}
