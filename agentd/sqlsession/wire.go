package sqlsession

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	gproto "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgproxy"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/wirestream"
)

// How long a session of PostgreSQL's own protocol may wait for its client, where
// its Source is silent.
const (
	DefaultWireIdle              = time.Hour
	DefaultWireIdleInTransaction = 10 * time.Minute
)

// WireRequest is the wish for a session of PostgreSQL's own protocol.
type WireRequest struct {
	// SessionID names it; unique among those open. Ids of its statements begin with it.
	SessionID string
	Source    string
	// Settings are what the client asked for at startup, name and value.
	Settings [][2]string
	// Principal is told in WireSessions.
	Principal *posternv1.Principal
}

// WireLog takes what a session has to tell. It is called by one goroutine at a
// time, and an error of it ends the session: what can't be told of is not done.
type WireLog interface {
	// Intend returns when it is on stable storage that these statements, which may
	// write, are about to go to the database. An error refuses them, not the session.
	Intend(statements []*posternv1.WireEvent) error
	// Event is called before the client gets the bytes behind it.
	Event(e *posternv1.WireEvent) error
}

// Wire is a session of PostgreSQL's own protocol: a process and a database session
// for one client. OpenWire makes one; Serve must be called once, and ends it.
type Wire struct {
	manager *Manager
	request WireRequest
	source  *source
	session *session
	opened  time.Time

	// window is how much the process can take; credit has room for one: it grew.
	mu     sync.Mutex
	window int
	credit chan struct{}
	down   error

	// Under Manager.mu.
	running map[string]*posternv1.RunningQuery
	count   uint64
}

// OpenWire starts a session for a client of PostgreSQL's own protocol, which takes
// one of the source's places until it ends. ctx bounds the opening alone.
func (m *Manager) OpenWire(ctx context.Context, request WireRequest) (*Wire, error) {
	m.mu.Lock()
	src := m.sources[request.Source]
	switch {
	case m.closed:
		m.mu.Unlock()
		return nil, &proto.Error{Code: proto.CodeUnavailable, Message: "the agent is going away: try again", Err: ErrClosed}
	case src == nil:
		m.mu.Unlock()
		return nil, proto.Errorf(proto.CodeNotFound, "no data source %q on this host", request.Source)
	case m.wires[request.SessionID] != nil:
		m.mu.Unlock()
		return nil, proto.Errorf(proto.CodeAlreadyExists, "session %s is open already", request.SessionID)
	}
	source := src.Source
	w := &Wire{manager: m, request: request, source: src, opened: time.Now(), window: pgproxy.Window, credit: make(chan struct{}, 1), running: map[string]*posternv1.RunningQuery{}}
	m.wires[request.SessionID] = w
	m.wg.Add(1)
	m.mu.Unlock()
	fail := func(err error) (*Wire, error) {
		w.forget()
		return nil, err
	}
	switch {
	case source.Engine != "postgres":
		return fail(proto.Errorf(proto.CodeInvalid, "data source %q is no PostgreSQL: its engine %s has another protocol", source.Name, source.Engine))
	}
	settings, err := pgproxy.Startup(request.Settings, source.ReadWrite, source.StatementTimeout)
	if err != nil {
		return fail(proto.Errorf(proto.CodePolicyDenied, "data source %q: %w", source.Name, err))
	}
	if err := m.place(ctx, src); err != nil {
		return fail(err)
	}
	s, err := m.startWith(ctx, src, settings)
	if err == nil {
		err = s.send(frame.Wire, frame.WireRequest{
			SessionID: request.SessionID, MaxRows: source.MaxRows, MaxBytes: source.MaxBytes, ReadWrite: source.ReadWrite, Guard: source.Guard,
			TimeoutMillis: max(1, source.StatementTimeout.Milliseconds()), IdleMillis: cmp.Or(source.WireIdle, DefaultWireIdle).Milliseconds(),
			IdleInTransaction: cmp.Or(source.WireIdleInTransaction, DefaultWireIdleInTransaction).Milliseconds(),
		})
		if err != nil {
			m.drop(s)
		}
	}
	if err != nil {
		m.leave(src)
		return fail(err)
	}
	m.mu.Lock()
	w.session = s
	// What changed while it started counts.
	stale := m.closed || src.removed || !sameSource(source, src.Source)
	m.mu.Unlock()
	if stale {
		w.Drain()
	}
	m.config.Metrics.wires.Inc()
	return w, nil
}

// forget takes the session out of the Manager's lists.
func (w *Wire) forget() {
	w.manager.mu.Lock()
	delete(w.manager.wires, w.request.SessionID)
	w.manager.mu.Unlock()
	w.manager.wg.Done()
}

// Drain ends the session as soon as the database has nothing of it under way.
func (w *Wire) Drain() { w.tell(frame.WireDrain, nil) }

// Stop cancels what the session has under way.
func (w *Wire) Stop() { w.tell(frame.WireStop, frame.PutWireStop(frame.Draining, 0)) }

// tell sends a frame to the process, if there is one.
func (w *Wire) tell(t frame.Type, payload []byte) {
	w.manager.mu.Lock()
	s := w.session
	w.manager.mu.Unlock()
	if s == nil {
		return
	}
	var body any
	if payload != nil {
		body = payload
	}
	_ = s.send(t, body) // a process that has gone needs no telling
}

// cancel cancels a statement by its number, 0 for any; it tells whether one runs.
func (w *Wire) cancel(seq uint64) { w.tell(frame.WireStop, frame.PutWireStop(frame.Cancelled, seq)) }

// Serve carries the client's frames to the process and the process's to the client
// until the session ends, and returns how it ended; nil: the client ended it. When it
// returns everything was told to log. stream is not closed; a Read of it must fail
// once the caller closes it, which it does when Serve calls hangup.
func (w *Wire) Serve(stream io.ReadWriter, log WireLog, hangup func()) error {
	defer w.forget()
	defer w.manager.config.Metrics.wires.Dec()
	defer w.manager.leave(w.source)
	var up sync.WaitGroup
	up.Go(func() { w.toProcess(stream) })
	err := w.fromProcess(stream, log)
	w.mu.Lock()
	w.down = io.EOF
	w.mu.Unlock()
	w.poke()
	hangup()
	up.Wait()
	w.session.end()
	return err
}

func (w *Wire) poke() {
	select {
	case w.credit <- struct{}{}:
	default:
	}
}

// take waits until the process can take something, and tells how much.
func (w *Wire) take() (int, error) {
	for {
		w.mu.Lock()
		n, err := w.window, w.down
		w.mu.Unlock()
		if n > 0 || err != nil {
			return n, err
		}
		<-w.credit
	}
}

// toProcess hands on what the client sends; its end makes the process cancel what
// runs, and go.
func (w *Wire) toProcess(stream io.Reader) {
	defer func() { _ = w.session.conn.CloseWrite() }()
	in := wirestream.NewReader(stream)
	var buf []byte
	for {
		t, err := in.Next()
		if err != nil || t != wirestream.Data {
			return // nothing else is the control plane's to send
		}
		for in.Left() > 0 {
			chunk, err := in.Chunk()
			if err != nil {
				return
			}
			for len(chunk) > 0 {
				n, err := w.take()
				if err != nil {
					return
				}
				n = min(n, len(chunk))
				buf = wirestream.AppendHeader(buf[:0], wirestream.Data, n)
				buf = append(buf, chunk[:n]...)
				if w.session.sendRaw(buf) != nil {
					return
				}
				w.mu.Lock()
				w.window -= n
				w.mu.Unlock()
				chunk = chunk[n:]
			}
		}
	}
}

// sendRaw writes whole frames.
func (s *session) sendRaw(b []byte) error {
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	if err := s.conn.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return err
	}
	_, err := s.conn.Write(b)
	return err
}

// relay is what fromProcess reads: buf[sent:seen] may go to the client, buf[seen:w] was
// not looked at.
type relay struct {
	buf           []byte
	sent, seen, w int
	left          int // of the Data frame that seen is in
}

const relayBuffer = 256<<10 + 2*wirestream.HeaderSize

// fromProcess hands on what the process sends: whole runs of frames as they are. The
// log hears of statements first.
func (w *Wire) fromProcess(stream io.Writer, log WireLog) error {
	conn := w.session.conn
	r := &relay{buf: make([]byte, 16<<10)}
	broken := false // the client has gone; the log has not
	flush := func() {
		if r.seen > r.sent && !broken {
			if _, err := stream.Write(r.buf[r.sent:r.seen]); err != nil {
				broken = true
				_ = conn.CloseWrite()
			}
		}
		r.sent = r.seen
	}
	var end *posternv1.WireEnd
	lost := func(err error) error {
		r.seen = r.sent
		failure := &proto.Error{Code: proto.CodeSQLSessionDied, Message: "the SQL session process broke off"}
		if err == nil || errors.Is(err, io.EOF) {
			failure = w.session.died()
		}
		var told *proto.Error
		if errors.As(err, &told) {
			failure = told
		}
		if r.left == 0 && !broken {
			b, err := wirestream.AppendMessage(nil, wirestream.End, &posternv1.WireEnd{Error: proto.Detail(failure), Sqlstate: "58000"})
			if err == nil {
				_, _ = stream.Write(b)
			}
		}
		w.session.kill()
		return failure
	}
	var intents []*posternv1.WireEvent
	for end == nil {
		progress, size, err := w.look(r, log, &intents, flush, &end)
		if err != nil {
			flush()
			return lost(err)
		}
		if progress {
			continue
		}
		if len(intents) > 0 {
			w.intend(log, intents)
			intents = nil
		}
		flush()
		r.room(size)
		n, err := conn.Read(r.buf[r.w:])
		r.w += n
		if n == 0 {
			if err == nil {
				err = io.ErrNoProgress
			}
			return lost(err)
		}
	}
	flush()
	if end.Error == nil {
		return nil
	}
	return proto.FromDetail(end.Error)
}

// room makes it possible to read more; a frame of size bytes has to fit.
func (r *relay) room(size int) {
	b := r.buf
	if r.w == len(b) && len(b) < relayBuffer { // a long result
		b = make([]byte, min(4*len(b), relayBuffer))
	}
	if size > len(b) {
		b = make([]byte, relayBuffer)
	}
	if len(b) != len(r.buf) || r.sent == r.w || r.sent+size > len(b) || r.w == len(b) {
		r.w = copy(b, r.buf[r.sent:r.w])
		r.seen -= r.sent
		r.sent, r.buf = 0, b
	}
}

// look takes what is whole in the buffer; progress is false when more has to be read:
// size bytes from sent on, at least.
func (w *Wire) look(r *relay, log WireLog, intents *[]*posternv1.WireEvent, flush func(), end **posternv1.WireEnd) (progress bool, size int, _ error) {
	have := r.w - r.seen
	if r.left > 0 {
		n := min(r.left, have)
		r.left -= n
		r.seen += n
		return n > 0, 0, nil
	}
	if have < wirestream.HeaderSize {
		return false, wirestream.HeaderSize, nil
	}
	t, size := wirestream.Type(r.buf[r.seen]), int(binary.BigEndian.Uint32(r.buf[r.seen+1:]))
	limit := wirestream.MaxMessage
	if t == wirestream.Data {
		limit = wirestream.MaxData
	}
	if size > limit {
		return false, 0, fmt.Errorf("%w: %q with %d bytes", frame.ErrMalformed, byte(t), size)
	}
	if t == wirestream.Data {
		r.seen += wirestream.HeaderSize
		r.left = size
		return true, 0, nil
	}
	whole := wirestream.HeaderSize + size
	if have < whole {
		return false, whole, nil
	}
	payload := r.buf[r.seen+wirestream.HeaderSize : r.seen+whole]
	// Frames that are not for the control plane are left out.
	omit := func() {
		flush()
		r.seen += whole
		r.sent = r.seen
	}
	switch t {
	case wirestream.Opened:
		r.seen += whole
	case wirestream.Event, pgproxy.Intent:
		e := &posternv1.WireEvent{}
		if err := gproto.Unmarshal(payload, e); err != nil {
			return false, 0, fmt.Errorf("%w: %q", frame.ErrMalformed, byte(t))
		}
		if t == pgproxy.Intent {
			omit()
			*intents = append(*intents, e)
			return true, 0, nil
		}
		if err := w.event(log, e); err != nil {
			return false, 0, err
		}
		r.seen += whole
	case pgproxy.Credit:
		if size != 4 {
			return false, 0, fmt.Errorf("%w: %q", frame.ErrMalformed, byte(t))
		}
		n := int(binary.BigEndian.Uint32(payload))
		omit()
		w.mu.Lock()
		w.window = min(w.window+n, pgproxy.Window)
		w.mu.Unlock()
		w.poke()
	case wirestream.End:
		e := &posternv1.WireEnd{}
		if err := gproto.Unmarshal(payload, e); err != nil {
			return false, 0, fmt.Errorf("%w: %q", frame.ErrMalformed, byte(t))
		}
		r.seen += whole
		*end = e
	default:
		return false, 0, fmt.Errorf("%w: unknown type %#x", frame.ErrMalformed, byte(t))
	}
	return true, 0, nil
}

// event tells the log, and keeps the list of what runs.
func (w *Wire) event(log WireLog, e *posternv1.WireEvent) error {
	if err := log.Event(e); err != nil {
		return err
	}
	m := w.manager
	ended := e.State == posternv1.WireEvent_STATE_ENDED
	m.mu.Lock()
	if ended {
		delete(w.running, e.StatementId)
		w.count++
	} else {
		w.running[e.StatementId] = &posternv1.RunningQuery{QueryId: e.StatementId, Source: w.request.Source, Started: e.Started}
	}
	m.mu.Unlock()
	if ended {
		m.config.Metrics.wireEnded(e)
	}
	return nil
}

// intend has the log note what may write and tells the process whether it may.
func (w *Wire) intend(log WireLog, statements []*posternv1.WireEvent) {
	err := log.Intend(statements)
	for range statements {
		if err == nil {
			_ = w.session.send(frame.WireAck, nil)
			continue
		}
		var told *proto.Error
		if !errors.As(err, &told) {
			told = proto.Errorf(proto.CodeInternal, "the host's log cannot be written: see agentd's log on the host")
		}
		_ = w.session.send(frame.WireAck, frame.FromError(told))
	}
}

// wireOfLocked finds the session that an id names, or that has the statement which it
// names; seq is the statement's number, 0 for the session's id.
func (m *Manager) wireOfLocked(id string) (w *Wire, seq uint64) {
	if w := m.wires[id]; w != nil {
		return w, 0
	}
	if i := strings.LastIndexByte(id, '_'); i > 0 {
		if n, err := strconv.ParseUint(id[i+1:], 10, 64); err == nil && n > 0 {
			return m.wires[id[:i]], n
		}
	}
	return nil, 0
}

// WireSessions lists the sessions of PostgreSQL's own protocol, oldest first.
func (m *Manager) WireSessions() []*posternv1.WireSession {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []*posternv1.WireSession
	for _, w := range m.wires {
		if w.session == nil {
			continue // it is being opened
		}
		list = append(list, &posternv1.WireSession{
			SessionId: w.request.SessionID, Source: w.request.Source, Principal: w.request.Principal, Opened: timestamppb.New(w.opened),
			Statements: w.count, Running: uint32(len(w.running)),
		})
	}
	slices.SortFunc(list, func(a, b *posternv1.WireSession) int { return a.Opened.AsTime().Compare(b.Opened.AsTime()) })
	return list
}

// drainWiresLocked ends the sessions of a source (nil: all) soon.
func (m *Manager) drainWiresLocked(src *source, stop bool) {
	for _, w := range m.wires {
		if src != nil && w.source != src {
			continue
		}
		m.wg.Add(1)
		go func() {
			defer m.wg.Done()
			w.Drain()
			if stop {
				w.Stop()
			}
		}()
	}
}
