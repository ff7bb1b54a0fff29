package sqlsession

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// MaxSQL is the longest statement in bytes.
	MaxSQL = 4 << 20
	// timeoutGrace is how long after the timeout we step in: the server's own
	// timer comes first and can say where the statement was.
	timeoutGrace = time.Second
)

// killAfter is how long a process may take to end a stopped statement. Tests
// shorten it.
var killAfter = 10 * time.Second

// run is one statement from its arrival to its end.
type run struct {
	id      string
	source  *source
	started time.Time
	rows    atomic.Uint64
	cancel  context.CancelCauseFunc // ends the waits before there is a session

	mu      sync.Mutex
	reason  frame.Reason // 0 until stopped
	session *session     // while its process has the statement
	killer  *time.Timer
}

func (r *run) running() *posternv1.RunningQuery {
	return &posternv1.RunningQuery{QueryId: r.id, Source: r.source.Name, Started: timestamppb.New(r.started), Rows: r.rows.Load()}
}

// stop cancels the statement wherever it is. Only the first reason counts.
func (r *run) stop(reason frame.Reason) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reason != 0 {
		return
	}
	r.reason = reason
	if r.session == nil {
		r.cancel(r.reasonError())
		return
	}
	r.stopSessionLocked()
}

func (r *run) stopSessionLocked() {
	s := r.session
	if err := s.send(frame.Cancel, []byte{byte(r.reason)}); err != nil {
		s.kill()
		return
	}
	r.killer = time.AfterFunc(killAfter, s.kill)
}

// reasonError is the error of a statement that its process can't tell of.
func (r *run) reasonError() *proto.Error {
	switch r.reason {
	case frame.TimedOut:
		return proto.Errorf(proto.CodeTimeout, "the statement ran longer than its limit and was cancelled")
	case frame.Draining:
		return &proto.Error{Code: proto.CodeUnavailable, Message: "the agent or its data source goes away: try again", Err: ErrClosed}
	}
	return proto.Errorf(proto.CodeCancelled, "the statement was cancelled")
}

// attach gives the statement to a session. It fails when the statement was
// stopped meanwhile.
func (r *run) attach(s *session, request *frame.RunRequest) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reason != 0 {
		return r.reasonError()
	}
	if err := s.send(frame.Run, request); err != nil {
		return err
	}
	r.session = s
	return nil
}

// detach ends the time in which stop reaches the session.
func (r *run) detach() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.session = nil
	if r.killer != nil {
		r.killer.Stop()
	}
}

func (r *run) stopped() (frame.Reason, *proto.Error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reason == 0 {
		return 0, nil
	}
	return r.reason, r.reasonError()
}

// Run runs a statement and writes its rows to w as an Arrow IPC stream: schema,
// record batches, end of stream. It returns when the statement is over.
//
// The outcome is never nil. A statement that failed has the same error in the
// outcome and as a *proto.Error; the rows before it are valid and the stream
// is well formed, unless the session's process died. When the outcome's Bytes
// are 0, nothing was written.
//
// The end of ctx cancels the statement in the database; what arrives after it
// is not written any more. w may block, which blocks the database; a blocked
// Write does not keep the database from being cancelled, but Run returns only
// after Write does, so w must fail when ctx ends.
func (m *Manager) Run(ctx context.Context, request Request, w io.Writer) (*posternv1.QueryOutcome, error) {
	started := time.Now()
	outcome := &posternv1.QueryOutcome{QueryId: request.QueryID}
	m.config.Metrics.running.Inc()
	err := m.run(ctx, started, request, w, outcome)
	m.config.Metrics.running.Dec()
	took := time.Since(started)
	outcome.Duration = durationpb.New(took)
	m.config.Metrics.seconds.Observe(took.Seconds())
	m.config.Metrics.statements.WithLabelValues(resultOf(err)).Inc()
	m.config.Metrics.rows.Add(float64(outcome.Rows))
	m.config.Metrics.bytes.Add(float64(outcome.Bytes))
	if err == nil {
		return outcome, nil
	}
	var e *proto.Error
	if !errors.As(err, &e) {
		m.log.Error("sql session failed", "source", request.Source, "query", request.QueryID, "err", err)
		e = &proto.Error{Code: proto.CodeInternal, Err: err}
	}
	outcome.Error = proto.Detail(e)
	return outcome, e
}

// check refuses a request that makes no sense.
func (request *Request) check() error {
	switch {
	case request.QueryID == "":
		return proto.Errorf(proto.CodeInvalid, "the statement has no query id")
	case len(request.SQL) > MaxSQL:
		return proto.Errorf(proto.CodeBodyTooLarge, "the statement has %d bytes, more than %d", len(request.SQL), MaxSQL)
	case !utf8.ValidString(request.SQL) || strings.Contains(request.SQL, "\x00"):
		return proto.Errorf(proto.CodeInvalid, "the statement is not UTF-8 text")
	case request.Timeout < 0:
		return proto.Errorf(proto.CodeInvalid, "a timeout of %s makes no sense", request.Timeout)
	}
	size := 0
	for _, p := range request.Parameters {
		size += len(p.GetName()) + len(p.GetValue())
		if !utf8.ValidString(p.GetValue()) || strings.Contains(p.GetValue(), "\x00") {
			return proto.Errorf(proto.CodeInvalid, "the value of parameter %q is not UTF-8 text", p.GetName())
		}
	}
	if size > MaxSQL {
		return proto.Errorf(proto.CodeBodyTooLarge, "the parameters have %d bytes, more than %d", size, MaxSQL)
	}
	return nil
}

func (m *Manager) run(ctx context.Context, started time.Time, request Request, w io.Writer, outcome *posternv1.QueryOutcome) error {
	if err := request.check(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r := &run{id: request.QueryID, started: started, cancel: cancel}
	src, err := m.enter(r, request.Source)
	if err != nil {
		return err
	}
	defer m.exit(r)
	run, err := m.limits(src, &request)
	if err != nil {
		return err
	}
	var open *pinned
	if request.Session != "" {
		if open, err = m.findPinned(&request); err != nil {
			return err
		}
	}
	unwatch := context.AfterFunc(ctx, func() {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			r.stop(frame.TimedOut)
		} else {
			r.stop(frame.Cancelled)
		}
	})
	defer unwatch()
	if open != nil {
		return m.runPinned(ctx, r, open, request, run, w, outcome)
	}
	if err := m.place(ctx, src); err != nil {
		return err
	}
	defer m.leave(src)
	for {
		s, fresh, err := m.acquire(ctx, src, request.Owner)
		if err != nil {
			return err
		}
		lost, kept, err := m.runIn(ctx, r, s, run, w, outcome)
		if kept != nil && request.Kept != nil {
			kept.Total = outcome.Rows
			request.Kept(kept)
		}
		if lost && !fresh {
			continue // an idle connection was dead: the statement was not sent
		}
		return err
	}
}

// enter counts the statement among those running. It is waited for in Close.
func (m *Manager) enter(r *run, name string) (*source, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, &proto.Error{Code: proto.CodeUnavailable, Message: "the agent is going away: try again", Err: ErrClosed}
	}
	src := m.sources[name]
	if src == nil {
		return nil, proto.Errorf(proto.CodeNotFound, "no data source %q on this host", name)
	}
	if m.running[r.id] != nil {
		return nil, proto.Errorf(proto.CodeAlreadyExists, "query %s is running already", r.id)
	}
	r.source = src
	m.running[r.id] = r
	m.wg.Add(1)
	return src, nil
}

func (m *Manager) exit(r *run) {
	m.mu.Lock()
	delete(m.running, r.id)
	m.mu.Unlock()
	m.wg.Done()
}

// limits narrows the request to what the source allows.
func (m *Manager) limits(src *source, request *Request) (*frame.RunRequest, error) {
	m.mu.Lock()
	source := src.Source
	m.mu.Unlock()
	if request.ReadWrite && !source.ReadWrite {
		return nil, proto.Errorf(proto.CodePolicyDenied, "data source %q is read-only", source.Name)
	}
	run := &frame.RunRequest{
		SQL: request.SQL, ReadWrite: request.ReadWrite, Guard: source.Guard,
		MaxRows:       narrower(source.MaxRows, request.MaxRows),
		MaxBytes:      narrower(source.MaxBytes, request.MaxBytes),
		TimeoutMillis: max(1, narrower(source.StatementTimeout, request.Timeout).Milliseconds()),
		Explain:       request.Explain, Indexes: request.HypotheticalIndexes,
	}
	if request.Kept != nil {
		run.KeepFirst, run.KeepLast = request.KeepFirst, request.KeepLast
	}
	for _, p := range request.Parameters {
		run.Parameters = append(run.Parameters, frame.Parameter{Name: p.GetName(), Value: p.Value, Type: p.GetType()})
	}
	return run, nil
}

// runIn runs the statement in a session, and keeps or ends the session. lost
// means that its connection was dead before the statement was sent.
func (m *Manager) runIn(ctx context.Context, r *run, s *session, request *frame.RunRequest, w io.Writer, outcome *posternv1.QueryOutcome) (lost bool, kept *posternv1.KeptRows, err error) {
	if err := r.attach(s, request); err != nil {
		var e *proto.Error
		if errors.As(err, &e) && s.pinned {
			m.mu.Lock()
			s.unsent = true
			m.mu.Unlock()
			return false, nil, e
		}
		m.drop(s)
		if errors.As(err, &e) {
			return false, nil, e
		}
		return true, nil, s.died()
	}
	timer := time.AfterFunc(time.Duration(request.TimeoutMillis)*time.Millisecond+timeoutGrace, func() { r.stop(frame.TimedOut) })
	defer timer.Stop()
	begun, reply, failed, err := m.copyFrames(ctx, r, s, w, outcome, &kept)
	r.detach()
	switch {
	case err != nil:
		m.drop(s)
		if reason, stopped := r.stopped(); reason != 0 {
			return false, nil, stopped
		}
		if errors.Is(err, frame.ErrMalformed) {
			return false, nil, err
		}
		// A process that ended before the statement went to the database is
		// replaced. Begun may have been lost with the process, so that is not
		// certain; then only what changes nothing is tried again.
		died := s.died()
		return !begun && (!request.ReadWrite || s.exitedIdle()), nil, died
	case failed != nil:
		m.drop(s)
		e := failed.Error.Proto()
		if e == nil {
			e = s.died()
		}
		e.Message = fmt.Sprintf("data source %q: %s", r.source.Name, e.Message)
		if reason, stopped := r.stopped(); reason != 0 {
			return false, nil, stopped
		}
		return failed.Lost, nil, e
	}
	if s.pinned {
		outcome.Transaction = reply.Transaction
	} else {
		m.recycle(s)
	}
	outcome.Rows = reply.Rows
	outcome.CommandTag = reply.Tag
	for _, n := range reply.Notices {
		outcome.Notices = append(outcome.Notices, &posternv1.Notice{Severity: n.Severity, Sqlstate: n.SQLState, Message: n.Message})
	}
	for _, p := range reply.Parameters {
		outcome.Parameters = append(outcome.Parameters, &posternv1.ParameterInfo{Name: p.Name, Type: p.Type})
	}
	if reply.Error != nil {
		return false, kept, reply.Error.Proto()
	}
	return false, kept, nil
}

// exitedIdle tells whether the process ended because the database closed its
// connection while it was idle.
func (s *session) exitedIdle() bool {
	select {
	case <-s.exited:
		return s.state != nil && s.state.ExitCode() == exitDatabase
	default:
		return false
	}
}

// exitDatabase is the process's exit code for a lost idle connection; see
// package child.
const exitDatabase = 3

// drop ends a session that can't be used any more.
func (m *Manager) drop(s *session) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s.dropped = true
	m.endLocked(s)
}

// copyFrames copies the result to w until the process says how it ended. begun
// tells whether the statement is known to have gone to the database.
func (m *Manager) copyFrames(ctx context.Context, r *run, s *session, w io.Writer, outcome *posternv1.QueryOutcome, kept **posternv1.KeptRows) (begun bool, done *frame.DoneReply, failed *frame.FailedReply, err error) {
	broken := false
	for {
		t, err := s.frames.Next()
		if err != nil {
			return begun, nil, nil, err
		}
		switch t {
		case frame.Begun:
			begun = true
		case frame.Data:
			for s.frames.Left() > 0 {
				chunk, err := s.frames.Chunk()
				if err != nil {
					return begun, nil, nil, err
				}
				if broken || ctx.Err() != nil {
					continue // nobody wants it: the process is being stopped
				}
				n, err := w.Write(chunk)
				outcome.Bytes += uint64(n)
				if err != nil {
					broken = true
					r.stop(frame.Cancelled)
				}
			}
		case frame.Progress:
			chunk, err := s.frames.Chunk()
			if err != nil {
				return begun, nil, nil, err
			}
			r.rows.Store(frame.ProgressRows(chunk))
		case frame.Kept:
			payload, err := s.frames.Bytes()
			if err != nil {
				return begun, nil, nil, err
			}
			rows := &posternv1.KeptRows{}
			if rows.First, rows.Last, rows.Cut, rows.Arrow, err = frame.KeptRows(payload); err != nil {
				return begun, nil, nil, err
			}
			*kept = rows
		case frame.Plan:
			payload, err := s.frames.Bytes()
			if err != nil {
				return begun, nil, nil, err
			}
			*kept = &posternv1.KeptRows{Plan: payload}
		case frame.Done:
			var reply frame.DoneReply
			if err := s.frames.JSON(&reply); err != nil {
				return begun, nil, nil, err
			}
			return begun, &reply, nil, nil
		case frame.Failed:
			var reply frame.FailedReply
			if err := s.frames.JSON(&reply); err != nil {
				return begun, nil, nil, err
			}
			return begun, nil, &reply, nil
		default:
			return begun, nil, nil, fmt.Errorf("%w: %q during a statement", frame.ErrMalformed, byte(t))
		}
	}
}
