package host

import (
	"context"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/wirestream"
)

// Actions of sessions of PostgreSQL's own protocol in the audit log; package audit
// knows them by the same names.
const (
	actionWireOpen  = "wire.open"
	actionWireClose = "wire.close"
)

// maxSettings bounds what a client asks for at startup.
const maxSettings = 64

// WireOpen is a wish for a session of PostgreSQL's own protocol that the policy
// allowed.
type WireOpen struct {
	SessionID string
	Source    string
	Principal *posternv1.Principal
	// Settings are what the client asked for at startup, name and value.
	Settings [][2]string
}

// WireOpener opens such sessions.
type WireOpener interface {
	// OpenWire connects to the database; ctx bounds that alone. Serve of what it
	// returns is called once.
	OpenWire(ctx context.Context, o WireOpen) (WireSession, error)
}

// WireSession is one session. Drain and Stop may be called at any time.
type WireSession interface {
	// Serve carries frames of package wirestream until the session ends and returns why;
	// nil: the client ended it. It calls hangup once, when nothing more goes to the
	// stream, which must then fail its reader.
	Serve(stream io.ReadWriter, log WireLog, hangup func()) error
	// Drain ends it when the database has nothing under way; Stop cancels what is.
	Drain()
	Stop()
}

// WireLog is told of what a session does; see package sqlsession.
type WireLog interface {
	Intend(statements []*posternv1.WireEvent) error
	Event(e *posternv1.WireEvent) error
}

// serveWire serves one client of PostgreSQL's protocol. The log has wire.open before
// the database is connected to.
func (h *Host) serveWire(w http.ResponseWriter, r *http.Request) {
	request, err := h.readWire(w, r)
	if err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	id := request.SessionId
	if err := h.enter(id); err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	defer h.leave(id)
	entry := auditchain.Entry{
		Actor: actor(request.Principal), Role: request.Principal.GetRole(), Source: clip(request.Source), SessionID: id,
		Verdict: "allowed", Remote: clip(request.Remote),
	}
	began := time.Now()
	log := &wireLog{h: h, entry: entry, begun: map[string]auditchain.Entry{}}
	session, err := h.openWire(r.Context(), request, entry)
	if err == nil {
		err = h.carryWire(w, id, session, log)
		log.end()
	} else {
		proto.WriteHTTPError(w, err)
	}
	entry.Action, entry.Outcome, entry.DurationMillis = actionWireClose, ending(err), time.Since(began).Milliseconds()
	entry.Rows, entry.Bytes = log.rows, log.bytes
	if err != nil {
		entry.Error = proto.Detail(err).Message
	}
	if code := proto.CodeOf(err); session == nil && (entry.Outcome == "denied" || code == proto.CodeNotFound) {
		entry.Verdict = "denied"
	}
	h.finish(entry, true)
	h.logger.Debug("wire session ended", "session", id, "source", request.Source, "duration_seconds", time.Since(began).Seconds(), "err", err)
}

func (h *Host) readWire(w http.ResponseWriter, r *http.Request) (*posternv1.WireRequest, error) {
	request, err := wirestream.ReadRequest(w, r)
	if err != nil {
		return nil, err
	}
	switch {
	case !validID(request.SessionId) || len(request.SessionId) > maxIDLength-21: // its statements' ids are longer
		return nil, proto.Errorf(proto.CodeInvalid, "the request has no good session id")
	case request.Source == "" || len(request.Source) > maxIDLength:
		return nil, proto.Errorf(proto.CodeInvalid, "the request names no data source")
	case request.Principal.GetTokenId() == "":
		return nil, proto.Errorf(proto.CodeInvalid, "the request names no principal")
	case len(request.Settings) > maxSettings:
		return nil, proto.Errorf(proto.CodeInvalid, "the request has %d settings, more than %d", len(request.Settings), maxSettings)
	}
	return request, nil
}

// openWire decides, records and connects.
func (h *Host) openWire(ctx context.Context, request *posternv1.WireRequest, entry auditchain.Entry) (WireSession, error) {
	verdict := h.cfg.Decide(&posternv1.SQLRequest{Source: request.Source, Principal: request.Principal})
	switch {
	case !verdict.Known:
		return nil, proto.Errorf(proto.CodeNotFound, "this agent has no data source %q: see postern source list", request.Source)
	case !verdict.Allowed:
		return nil, proto.Errorf(proto.CodePolicyDenied, "source %s: %s", request.Source, verdict.Reason)
	}
	if err := h.settle(); err != nil {
		return nil, err
	}
	entry.Action = actionWireOpen
	if err := h.record(entry); err != nil {
		return nil, err
	}
	open := WireOpen{SessionID: request.SessionId, Source: request.Source, Principal: request.Principal}
	for _, s := range request.Settings {
		open.Settings = append(open.Settings, [2]string{s.GetName(), s.GetValue()})
	}
	return h.cfg.Wire.OpenWire(ctx, open)
}

// carryWire takes the stream over and carries the session.
func (h *Host) carryWire(w http.ResponseWriter, id string, session WireSession, log *wireLog) error {
	h.mu.Lock()
	h.wires[id] = session
	draining := h.draining
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.wires, id)
	}()
	conn, err := wirestream.Accept(w)
	if err != nil {
		// The session must be served to end.
		gone := &goneStream{}
		_ = session.Serve(gone, log, func() {})
		return proto.Errorf(proto.CodeInternal, "the stream of a session could not be taken over: %w", err)
	}
	var once sync.Once
	hangup := func() { once.Do(func() { _ = conn.Close() }) }
	defer hangup()
	stop := context.AfterFunc(h.abort, func() {
		session.Drain()
		session.Stop()
		_ = conn.SetDeadline(time.Now().Add(time.Second)) // a client that does not read
	})
	defer stop()
	if draining {
		session.Drain()
	}
	return session.Serve(conn, log, hangup)
}

// goneStream is a stream whose other end has gone.
type goneStream struct{}

func (*goneStream) Read([]byte) (int, error)  { return 0, io.EOF }
func (*goneStream) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// wireLog writes what a session does into the host's log. It is called by one
// goroutine at a time.
type wireLog struct {
	h     *Host
	entry auditchain.Entry
	// begun are statements whose beginning is in the log and whose end is not, as the
	// entries that end them if nothing better is told.
	begun map[string]auditchain.Entry
	rows  uint64
	bytes uint64
}

func (l *wireLog) statement(e *posternv1.WireEvent, action string) auditchain.Entry {
	entry := l.entry
	entry.Action, entry.QueryID, entry.Statement = action, e.StatementId, e.Sql
	if e.Verdict == "denied" {
		entry.Verdict = "denied"
	}
	return entry
}

// Intend implements WireLog. The entries share one fsync where the log can do that.
func (l *wireLog) Intend(statements []*posternv1.WireEvent) error {
	errs := make([]error, len(statements))
	var wait sync.WaitGroup
	for i, e := range statements {
		entry := l.statement(e, actionBegin)
		if len(statements) == 1 {
			errs[i] = l.h.record(entry)
			continue
		}
		wait.Go(func() { errs[i] = l.h.record(entry) })
	}
	wait.Wait()
	var failed error
	for i, err := range errs {
		if err != nil {
			failed = err // the others are not sent either, and end with the session
			continue
		}
		l.begin(statements[i])
	}
	return failed
}

func (l *wireLog) begin(e *posternv1.WireEvent) {
	lost := l.statement(e, actionRun)
	lost.Outcome, lost.Error = "failed", "the session ended while the statement was under way: whether it had finished is not known"
	l.begun[e.StatementId] = lost
}

// end ends what is left when the session has ended.
func (l *wireLog) end() {
	for _, entry := range l.begun {
		l.h.finish(entry, true)
	}
}

// Event implements WireLog.
func (l *wireLog) Event(e *posternv1.WireEvent) error {
	if e.State != posternv1.WireEvent_STATE_ENDED {
		if _, there := l.begun[e.StatementId]; there {
			return nil
		}
		if err := l.h.recordSoon(l.statement(e, actionBegin)); err != nil {
			return err
		}
		l.begin(e)
		return nil
	}
	entry := l.statement(e, actionRun)
	entry.Rows, entry.Bytes, entry.DurationMillis = e.Rows, e.Bytes, e.Duration.AsDuration().Milliseconds()
	entry.Outcome = "done"
	if e.Error != nil {
		entry.Outcome, entry.Error = ending(proto.FromDetail(e.Error)), e.Error.Message
	}
	if entry.Verdict == "denied" {
		entry.Outcome = "denied"
	}
	l.rows += e.Rows
	l.bytes += e.Bytes
	l.h.cfg.Metrics.queryEnded(entry.Outcome, &posternv1.QueryOutcome{Rows: e.Rows, Bytes: e.Bytes}, e.Duration.AsDuration())
	err := l.h.recordSoon(entry)
	if _, begun := l.begun[e.StatementId]; begun && err != nil {
		l.h.finish(entry, true) // it is kept until it can be written
	}
	delete(l.begun, e.StatementId)
	return err
}

// recordSoon is record for what may be lost with the power, see package audit.
func (h *Host) recordSoon(e auditchain.Entry) error {
	if e.Agent == "" && h.cfg.Agent != nil {
		e.Agent, e.Organization = h.cfg.Agent()
	}
	return h.cfg.Audit.AppendSoon(context.Background(), e)
}
