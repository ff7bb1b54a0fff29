package sqlsession

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/cgroup"
	"github.com/postern-dev/postern/agentd/confine"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/proto"
)

const (
	// startTimeout bounds the start of a process and its connection.
	startTimeout = 20 * time.Second
	// connectTimeout bounds the connection to the database.
	connectTimeout = 15 * time.Second
	// resetTimeout bounds the wait for a process to be ready again.
	resetTimeout = 20 * time.Second
	// exitTimeout is how long a process may take to end by itself: it may have
	// to cancel a statement in the database.
	exitTimeout = 10 * time.Second
	// sendTimeout bounds the write of a frame: the process always reads.
	sendTimeout = 10 * time.Second
	// maxStderr bounds what is logged of a process's standard error, in lines.
	maxStderr = 50
	// socketBuffer is the wish for the socket's buffer in bytes.
	socketBuffer = 1 << 20
)

// session is one process and our end of its socket. Between its creation and
// its end it has one user at a time: a Run, the wait for its reset, or nobody
// while it is idle or warm.
type session struct {
	source *source
	login  Login  // the zero Login, unless the source has a LoginFunc
	owner  string // set once, when the process gets its first statement
	slot   int
	cmd    *exec.Cmd // nil: an agentd before us started the process
	pid    int       // 0 without cmd
	pidfd  *os.File
	stderr *os.File
	groups *cgroup.Groups // nil: it has none
	held   *held          // nil: it ends with agentd
	holds  atomic.Bool    // it was told to wait for another agentd when we are gone
	left   chan struct{}  // closed when we let it go
	conn   *net.UnixConn
	frames *frame.Reader

	writeMu sync.Mutex // held while a frame is written

	exited chan struct{} // closed when the process is gone and waited for
	state  *os.ProcessState
	// overMemory: the kernel killed it as it was over its memory limit; limit says which.
	overMemory bool
	limit      int64

	// The rest belongs to the Manager, under its mu.
	idleSince time.Time
	ready     chan struct{} // closed when a reset ends; nil unless resetting
	used      bool          // has run a statement
	pinned    bool          // belongs to one session that stays: see pinned
	dropped   bool          // can't be used any more
	unsent    bool          // the last statement was given up before it was sent
}

// spawn starts a process. The caller sends Connect.
func (m *Manager) spawn(src *source, source Source, slot int, login Login) (*session, error) {
	if err := confine.CloseOnExec(); err != nil {
		return nil, fmt.Errorf("close_range: %w", err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "sql session")
	defer func() { _ = theirs.Close() }()
	// More than the usual limit needs root; less is slower and works.
	if unix.SetsockoptInt(pair[1], unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, socketBuffer) != nil {
		_ = unix.SetsockoptInt(pair[1], unix.SOL_SOCKET, unix.SO_SNDBUF, socketBuffer)
	}
	ours := os.NewFile(uintptr(pair[0]), "sql session")
	conn, err := net.FileConn(ours)
	_ = ours.Close()
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	introducer, err := m.aside(src)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	defer func() { _ = introducer.Close() }()
	socket, held, err := m.listen(source)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	defer func() { _ = socket.Close() }()
	cmd, stderr, release, err := command(m.config.Executable, m.config.ChildArgs, theirs, introducer, socket)
	if err != nil {
		_ = conn.Close()
		held.remove()
		return nil, err
	}
	defer release()
	if m.root {
		id := uint32(m.config.UIDBase + slot)
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: id, Gid: id}
	}
	s := &session{
		source: src, login: Login{Expiring: login.Expiring, Release: login.Release}, slot: slot, cmd: cmd, conn: conn.(*net.UnixConn), frames: frame.NewReader(conn), exited: make(chan struct{}),
		stderr: stderr, held: held, left: make(chan struct{}), limit: m.config.Memory,
	}
	if s.groups, err = m.startIn(cmd, src.confinement(m.config.Executable), held); err != nil {
		_ = conn.Close()
		_ = stderr.Close()
		held.remove()
		return nil, fmt.Errorf("start the SQL session process: %w", err)
	}
	s.pid = cmd.Process.Pid
	if s.pidfd, err = openPID(s.pid); err != nil {
		_ = conn.Close()
		_ = stderr.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		s.groups.Remove()
		held.remove()
		return nil, err
	}
	m.wg.Add(2)
	go func() {
		defer m.wg.Done()
		m.drainStderr(s, stderr)
	}()
	go func() {
		defer m.wg.Done()
		m.awaitExit(s, func() {
			// The exit status says what is to be said.
			_ = cmd.Wait()
			s.state = cmd.ProcessState
		})
	}()
	return s, nil
}

// drainStderr logs what a process complains of. It never has secrets to tell.
func (m *Manager) drainStderr(s *session, stderr *os.File) {
	logLines(stderr, func(line string) {
		m.log.Warn("sql session says", "source", s.source.Name, "sql_session", s.pid, "line", line)
	})
}

// send writes one frame.
func (s *session) send(t frame.Type, payload any) error {
	b, err := frame.Encode(t, payload)
	if err != nil {
		return err
	}
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	if err := s.conn.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return err
	}
	_, err = s.conn.Write(b)
	clear(b) // it may hold a password
	return err
}

// kill ends the process at once.
func (s *session) kill() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		return
	}
	raw, err := s.pidfd.SyscallConn()
	if err == nil { // an error: it is gone, or we let it go
		_ = raw.Control(func(fd uintptr) { _ = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	}
}

// end closes the socket, which tells the process to go, and waits for it.
func (s *session) end() {
	if s.holds.Load() { // or it would wait for another agentd
		s.held.remove()
		if s.send(frame.Release, nil) != nil {
			s.kill()
		}
	}
	_ = s.conn.Close()
	select {
	case <-s.exited:
		return
	case <-time.After(exitTimeout):
	}
	s.kill()
	<-s.exited
}

// died says how the process ended, as far as that is known by now.
func (s *session) died() *proto.Error {
	select {
	case <-s.exited:
	case <-time.After(exitTimeout): // one that was killed gives back its memory first
		return proto.Errorf(proto.CodeSQLSessionDied, "the SQL session process broke off")
	}
	if s.overMemory {
		return proto.Errorf(proto.CodeSQLSessionDied, "the SQL session process was killed: over its memory limit of %s (sql.memory in agentd.yaml)", cgroup.Size(s.limit))
	}
	if s.state == nil { // not our child
		return proto.Errorf(proto.CodeSQLSessionDied, "the SQL session process ended unexpectedly")
	}
	status, ok := s.state.Sys().(syscall.WaitStatus)
	if ok && status.Signaled() {
		return proto.Errorf(proto.CodeSQLSessionDied, "the SQL session process was killed (signal %d)", int(status.Signal()))
	}
	return proto.Errorf(proto.CodeSQLSessionDied, "the SQL session process ended unexpectedly (exit status %d)", s.state.ExitCode())
}

// start starts a process and connects it to the database. ctx bounds the
// start alone.
func (m *Manager) start(ctx context.Context, src *source) (s *session, err error) {
	return m.startWith(ctx, src, nil)
}

// startWith is start for a session of PostgreSQL's own protocol, which has settings
// of its own; nil: ours.
func (m *Manager) startWith(ctx context.Context, src *source, settings map[string]string) (s *session, err error) {
	began := time.Now()
	defer func() { m.config.Metrics.started(began, err) }()
	ctx, done := context.WithTimeout(ctx, startTimeout)
	defer done()
	m.mu.Lock()
	source := src.Source
	m.mu.Unlock()
	login, err := source.credentials(ctx)
	if err != nil {
		return nil, &proto.Error{Code: proto.CodeSourceConfig, Message: fmt.Sprintf("data source %q: %s", source.Name, err), Err: err}
	}
	slot, ok := m.takeSlot()
	if !ok {
		login.release()
		return nil, proto.Errorf(proto.CodeOverloaded, "all %d places for SQL sessions are taken: try again later", m.config.UIDCount)
	}
	s, err = m.spawn(src, source, slot, login)
	if err != nil {
		m.freeSlot(slot)
		login.release()
		m.log.Error("cannot start a sql session", "source", source.Name, "err", err)
		return nil, &proto.Error{Code: proto.CodeInternal, Err: err}
	}
	m.adopt(s)
	err = s.handshake(ctx, source, login, settings)
	if err != nil {
		s.kill()
		_ = s.conn.Close()
		return nil, err
	}
	m.log.Debug("sql session started", "source", source.Name, "sql_session", s.pid, "duration_seconds", time.Since(began).Seconds())
	return s, nil
}

// credentials are those of a new connection.
func (s *Source) credentials(ctx context.Context) (login Login, err error) {
	switch {
	case s.Login != nil:
		return s.Login(ctx)
	case s.Password != nil:
		login.Password, err = s.Password(ctx)
	}
	return login, err
}

func (l Login) release() {
	if l.Release != nil {
		l.Release()
	}
}

// expiring tells whether the login ends soon.
func (l Login) expiring() bool {
	select {
	case <-l.Expiring: // never of a nil channel
		return true
	default:
		return false
	}
}

func (s *session) handshake(ctx context.Context, source Source, login Login, settings map[string]string) error {
	// The deadline wakes the read; a cancelled context does so at once.
	stop := context.AfterFunc(ctx, func() { _ = s.conn.SetReadDeadline(time.Now().Add(-time.Second)) })
	defer stop()
	err := s.send(frame.Connect, frame.ConnectRequest{
		Engine: source.Engine, DSN: source.DSN, User: login.User, Password: login.Password,
		ApplicationName: "postern " + source.Name, TimeoutMillis: connectTimeout.Milliseconds(), ReadWrite: source.ReadWrite, Settings: settings,
	})
	if err != nil {
		return s.died()
	}
	t, err := s.frames.Next()
	if ctx.Err() != nil {
		return contextError(ctx, "while connecting to the data source")
	}
	if err != nil {
		return s.died()
	}
	switch t {
	case frame.Connected:
		var reply frame.ConnectedReply
		return s.frames.JSON(&reply)
	case frame.Failed:
		var reply frame.FailedReply
		if err := s.frames.JSON(&reply); err != nil {
			return err
		}
		failure := reply.Error.Proto()
		if failure == nil {
			return s.died()
		}
		failure.Message = fmt.Sprintf("data source %q: %s", source.Name, failure.Message)
		return failure
	}
	return fmt.Errorf("%w: %q before the connection", frame.ErrMalformed, byte(t))
}

// contextError names the end of a context in our codes.
func contextError(ctx context.Context, where string) *proto.Error {
	var cause *proto.Error
	switch {
	case errors.As(context.Cause(ctx), &cause):
		return cause
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return proto.Errorf(proto.CodeTimeout, "the time limit was reached %s", where)
	}
	return proto.Errorf(proto.CodeCancelled, "the statement was cancelled %s", where)
}
