package sqlsession

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/postern-dev/postern/agentd/cgroup"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// A session that stays outlives agentd, where Config.Hold names a directory: its
// process has a listening socket there from its start on, and once the session is open
// a description lies beside it. When agentd is gone, by a restart or by kill -9, the
// process cancels what it runs, waits idle with its transaction, and is taken up by the
// next agentd over that socket, on a connection that begins anew; see Manager.Resume.
//
//	HOLD/           0700
//	  NAME.sock     the process's, 0600
//	  NAME.json     holdFile, 0600; no secret is in it
//
// Processes of SQLite (agentd opens its files) and of users that Vault makes (they end
// with agentd) are not held.

const (
	// holdVersion is what the process and the agentd that takes it up must agree on.
	holdVersion = 1
	// DefaultHoldGrace is how long a process waits for the next agentd.
	DefaultHoldGrace = 2 * time.Minute
	// takeUpTimeout bounds the wait until a process is idle: it may have to cancel
	// a statement in the database first.
	takeUpTimeout = 10 * time.Second
	// maxHoldFile bounds a description, in bytes.
	maxHoldFile = 64 << 10
)

// holdFile describes a session to the next agentd.
type holdFile struct {
	Version           int
	ID, Source, Owner string
	Principal         json.RawMessage `json:",omitempty"` // protojson
	IdleTimeout       time.Duration
	Opened            time.Time
	// Slot is the process's user id above Config.UIDBase.
	Slot int
	// Rules is what the source was: see fingerprint.
	Rules string
}

// held are a process's files in the hold directory.
type held struct {
	dir, name string
	once      sync.Once
}

func (h *held) path(extension string) string { return filepath.Join(h.dir, h.name+extension) }

// remove takes the files away; nil has none.
func (h *held) remove() {
	if h == nil {
		return
	}
	h.once.Do(func() {
		_ = os.Remove(h.path(".json"))
		_ = os.Remove(h.path(".sock"))
	})
}

// mayHold tells whether the source's sessions outlive agentd.
func (m *Manager) mayHold(s Source) bool {
	return m.config.Hold != "" && s.Login == nil && s.Engine != "sqlite"
}

// listen makes the socket of a new process. socket is for the process; it is
// /dev/null, and held nil, where the source's sessions end with agentd. A directory that
// can't be written keeps no statement from running, but the log says so.
func (m *Manager) listen(s Source) (socket *os.File, h *held, err error) {
	if m.mayHold(s) {
		if socket, h, err = m.listenHeld(); err == nil {
			return socket, h, nil
		}
		m.log.Warn("open sql sessions would not outlive agentd", "err", err)
	}
	socket, err = os.Open(os.DevNull)
	return socket, nil, err
}

func (m *Manager) listenHeld() (socket *os.File, h *held, err error) {
	if err := os.MkdirAll(m.config.Hold, 0o700); err != nil {
		return nil, nil, err
	}
	h = &held{dir: m.config.Hold, name: rand.Text()}
	err = h.at(".sock", func(path string) error {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return err
		}
		l.SetUnlinkOnClose(false)
		socket, err = l.File()
		return errors.Join(err, l.Close())
	})
	if err != nil {
		h.remove()
		return nil, nil, fmt.Errorf("a socket in %s: %w", m.config.Hold, err)
	}
	return socket, h, nil
}

// at calls do with a short name of one of the files: a socket's has 107 bytes at most.
func (h *held) at(extension string, do func(path string) error) error {
	dir, err := os.Open(h.dir)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	return do(fmt.Sprintf("/proc/self/fd/%d/%s%s", dir.Fd(), h.name, extension))
}

// hold makes the process of a session that is open outlive agentd. Where that can't be
// done the session ends with agentd.
func (m *Manager) hold(p *pinned, s *session) {
	if s.held == nil {
		return
	}
	m.mu.Lock()
	rules := fingerprint(p.source.Source)
	m.mu.Unlock()
	f := holdFile{
		Version: holdVersion, ID: p.ID, Source: p.Open.Source, Owner: p.Owner, IdleTimeout: p.IdleTimeout, Opened: p.opened, Slot: s.slot, Rules: rules,
	}
	var err error
	if p.Principal != nil {
		f.Principal, err = protojson.Marshal(p.Principal)
	}
	var text []byte
	if err == nil {
		text, err = json.Marshal(f)
	}
	if err == nil { // it counts once it is whole; it need not survive the host
		err = os.WriteFile(s.held.path(".wip"), text, 0o600)
	}
	if err == nil {
		err = os.Rename(s.held.path(".wip"), s.held.path(".json"))
	}
	if err == nil {
		err = s.send(frame.Hold, frame.HoldRequest{GraceMillis: m.config.HoldGrace.Milliseconds()})
	}
	s.holds.Store(err == nil)
	if err != nil {
		m.log.Warn("a session would not outlive agentd", "source", p.Open.Source, "session", p.ID, "err", err)
		s.held.remove()
	}
}

// fingerprint is the same for sources that sameSource takes for the same, also after an
// upgrade that adds fields which the source does not use.
func fingerprint(s Source) string {
	fields := map[string]any{}
	for f, v := range reflect.ValueOf(s).Fields() {
		if f.Type.Kind() != reflect.Func && !v.IsZero() {
			fields[f.Name] = v.Interface()
		}
	}
	text, err := json.Marshal(fields) // names in order; Guard leaves out what is not set
	if err != nil {
		return "" // no field has a type that can't be marshalled; "" is never found again
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// detachLocked lets go of a session's process, which goes on without us.
func (m *Manager) detachLocked(p *pinned) {
	if m.pinned[p.ID] != p {
		return
	}
	delete(m.pinned, p.ID)
	close(p.done)
	m.config.Metrics.open.Dec()
	m.log.Info("session goes on without agentd", "source", p.source.Name, "session", p.ID, "grace", m.config.HoldGrace)
	s := p.process
	delete(m.sessions, s)
	s.letGo()
}

// letGo ends our part of a process that goes on.
func (s *session) letGo() {
	close(s.left)
	_ = s.conn.Close()
	_ = s.stderr.Close()
	_ = s.pidfd.Close()
}

// Resume takes up the sessions of an agentd that is gone, after SetSources and before
// anything else. resumed is called for each of them, also for one that is lost: it gets
// the session and why it is lost ("" if it is not), and returns its Ended. It returns
// how many sessions are open; the time that it takes is bounded.
func (m *Manager) Resume(resumed func(o Open, lost string) func(reason string, statements uint64)) (open int) {
	if m.config.Hold == "" {
		return 0
	}
	files, _ := filepath.Glob(filepath.Join(m.config.Hold, "*.json"))
	var wg sync.WaitGroup
	results := make([]bool, len(files))
	for i, file := range files {
		h := &held{dir: m.config.Hold, name: strings.TrimSuffix(filepath.Base(file), ".json")}
		wg.Go(func() { results[i] = m.takeUp(h, resumed) })
	}
	wg.Wait()
	claimed := map[string]bool{}
	for i, ok := range results {
		if ok {
			open++
			claimed[strings.TrimSuffix(filepath.Base(files[i]), ".json")] = true
		}
	}
	// What is left belonged to processes that ended with their agentd.
	entries, _ := os.ReadDir(m.config.Hold)
	for _, e := range entries {
		if name, _, _ := strings.Cut(e.Name(), "."); !claimed[name] {
			_ = os.Remove(filepath.Join(m.config.Hold, e.Name()))
		}
	}
	if m.root {
		cgroup.Sweep(cgroup.SQL, groupPrefix(m.config.Hold))
	}
	return open
}

// takeUp takes one session up.
func (m *Manager) takeUp(h *held, resumed func(Open, string) func(string, uint64)) bool {
	f, principal, err := h.read()
	if err != nil {
		m.log.Warn("a session of the agentd before is lost: its description can't be read", "err", err)
		h.remove()
		return false
	}
	o := Open{ID: f.ID, Source: f.Source, Owner: f.Owner, Principal: principal, IdleTimeout: f.IdleTimeout}
	p, lost := m.claim(o, f)
	var s *session
	free := false // nobody uses the slot
	if lost == "" {
		var reply frame.ResumedReply
		if s, reply, err = m.connect(h, p.source, f.Slot); err != nil {
			free = errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist)
			lost = "its process did not outlive the agentd before"
			m.log.Warn("session lost", "source", o.Source, "session", o.ID, "err", err)
		} else {
			p.used = time.Now().Add(-time.Duration(reply.IdleMillis) * time.Millisecond)
			if reply.Statements == 0 {
				p.used = f.Opened
			}
			p.transaction, p.statements = reply.Transaction, reply.Statements
			if transactionNames[p.transaction] == "" {
				p.transaction = "E"
			}
		}
	} else if f.Slot >= 0 && f.Slot < len(m.slots) {
		if other, _, cerr := m.connect(h, p.source, f.Slot); cerr == nil {
			other.end() // it is waiting for somebody
		}
	}
	ended := resumed(o, lost)
	m.mu.Lock()
	defer m.mu.Unlock()
	if lost != "" {
		h.remove()
		m.unclaimLocked(p)
		if free {
			m.slots[f.Slot] = false
		}
		if m.ended = append(m.ended, endedSession{o.ID, o.Owner, lost}); len(m.ended) > maxEnded {
			m.ended = m.ended[1:]
		}
		m.config.Metrics.ended.WithLabelValues("lost").Inc()
		return false
	}
	p.Ended = ended
	p.process, p.busy = s, ""
	m.sessions[s] = true
	m.config.Metrics.sessions.Set(float64(len(m.sessions)))
	m.config.Metrics.open.Inc()
	m.wg.Add(1)
	go m.watch(p)
	m.log.Info("session taken up", "source", o.Source, "session", o.ID, "transaction", transactionNames[p.transaction])
	return true
}

// read reads a description.
func (h *held) read() (f holdFile, principal *posternv1.Principal, err error) {
	file, err := os.Open(h.path(".json"))
	if err != nil {
		return f, nil, err
	}
	defer func() { _ = file.Close() }()
	text, err := io.ReadAll(io.LimitReader(file, maxHoldFile))
	if err == nil {
		err = json.Unmarshal(text, &f)
	}
	if err == nil && len(f.Principal) > 0 {
		principal = &posternv1.Principal{}
		err = protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(f.Principal, principal)
	}
	if err == nil && f.ID == "" {
		err = errors.New("it names no session")
	}
	return f, principal, err
}

// claim takes the session's place, its slot and its id, or says why it ends. p has a
// source in any case.
func (m *Manager) claim(o Open, f holdFile) (p *pinned, lost string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	src := m.sources[o.Source]
	p = &pinned{
		Open: o, source: src, opened: f.Opened, used: time.Now(), transaction: "I", busy: "opening", wake: make(chan struct{}, 1), done: make(chan struct{}),
	}
	if f.Slot >= 0 && f.Slot < len(m.slots) {
		m.slots[f.Slot] = true // whatever becomes of it: the process may still be there
	} else {
		lost = "agentd's range of user ids changed"
	}
	switch {
	case lost != "":
	case f.Version != holdVersion:
		lost = "this version of agentd can't take up sessions of the one before"
	case src == nil:
		lost = "its data source was removed or changed"
	case !m.mayHold(src.Source) || f.Rules == "" || fingerprint(src.Source) != f.Rules:
		lost = "the policy of its data source changed"
	case m.pinned[o.ID] != nil:
		lost = "another session has its name"
	}
	if src == nil {
		p.source = &source{Source: Source{Name: o.Source}}
		return p, lost
	}
	if lost == "" {
		m.pinned[o.ID] = p
		src.active++
	}
	return p, lost
}

// unclaimLocked gives back what claim took.
func (m *Manager) unclaimLocked(p *pinned) {
	if m.pinned[p.ID] == p {
		delete(m.pinned, p.ID)
		p.source.active--
		p.source.wakeLocked()
	}
}

// connect takes up the process behind h.
func (m *Manager) connect(h *held, src *source, slot int) (s *session, reply frame.ResumedReply, err error) {
	var conn *net.UnixConn
	err = h.at(".sock", func(path string) error {
		conn, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		return err
	})
	if err != nil {
		return nil, reply, err
	}
	pidfd, err := m.greet(conn, slot)
	if err != nil {
		_ = conn.Close()
		return nil, reply, err
	}
	s = &session{
		source: src, slot: slot, conn: conn, frames: frame.NewReader(conn), exited: make(chan struct{}), left: make(chan struct{}),
		pidfd: pidfd, held: h, pinned: true, used: true, limit: m.config.Memory, groups: cgroup.Find(cgroup.SQL, m.groupOf(h), m.groupLimits()),
	}
	s.holds.Store(true)
	if t, ferr := s.frames.Next(); ferr != nil {
		err = ferr
	} else if t != frame.Resumed {
		err = fmt.Errorf("%w: %q instead of how it is", frame.ErrMalformed, byte(t))
	} else {
		err = s.frames.JSON(&reply)
	}
	if err = errors.Join(err, conn.SetDeadline(time.Time{})); err != nil {
		s.kill()
		_ = conn.Close()
		_ = pidfd.Close()
		return nil, reply, err
	}
	m.wg.Go(func() { m.awaitExit(s, nil) })
	return s, reply, nil
}

// greet says who we are, gives the process the way to the parser, and returns what
// the process is ended with. The kernel says which process it is.
func (m *Manager) greet(conn *net.UnixConn, slot int) (pidfd *os.File, err error) {
	if err := conn.SetDeadline(time.Now().Add(takeUpTimeout)); err != nil {
		return nil, err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	passing := func(on int) error {
		var serr error
		err := raw.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, on) })
		return errors.Join(err, serr)
	}
	if err := passing(1); err != nil {
		return nil, err
	}
	introducer, err := m.introducer()
	if err != nil {
		return nil, err
	}
	_, _, err = conn.WriteMsgUnix([]byte{frame.TakeUp}, syscall.UnixRights(int(introducer.Fd())), nil)
	_ = introducer.Close()
	if err != nil {
		return nil, err
	}
	var b [1]byte
	oob := make([]byte, syscall.CmsgSpace(syscall.SizeofUcred))
	n, oobn, _, _, err := conn.ReadMsgUnix(b[:], oob)
	if err != nil {
		return nil, err
	}
	if n != 1 || b[0] != frame.Taken {
		return nil, errors.New("it does not know how it is taken up")
	}
	messages, err := syscall.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		return nil, errors.Join(errors.New("the kernel does not say who it is"), err)
	}
	who, err := syscall.ParseUnixCredentials(&messages[0])
	if err != nil {
		return nil, err
	}
	if want := m.config.UIDBase + slot; m.root && int(who.Uid) != want {
		return nil, fmt.Errorf("it runs as user %d instead of %d", who.Uid, want)
	}
	if err := passing(0); err != nil {
		return nil, err
	}
	return openPID(int(who.Pid))
}

// openPID is a descriptor of a process that becomes readable when that ends.
func openPID(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("pidfd_open: %w", err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// awaitExit waits for the end of a process, unless we let it go. reap, if not nil,
// takes its exit status.
func (m *Manager) awaitExit(s *session, reap func()) {
	raw, err := s.pidfd.SyscallConn()
	if err == nil {
		err = raw.Read(func(fd uintptr) bool {
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(poll, 0)
			return n > 0 || (err != nil && !errors.Is(err, unix.EINTR))
		})
	}
	select {
	case <-s.left:
		return
	default:
	}
	if err != nil && !errors.Is(err, fs.ErrClosed) {
		m.log.Error("a sql session's process is not watched", "err", err)
	}
	if reap != nil {
		reap()
	}
	_ = s.pidfd.Close()
	s.ended()
	close(s.exited)
	s.held.remove()
	s.groups.Remove()
	s.login.release()
	m.gone(s)
}
