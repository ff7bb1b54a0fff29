package sqlsession

import (
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Bounds of sessions that stay open.
const (
	DefaultSessionIdle = 10 * time.Minute
	MaxSessionIdle     = time.Hour
	// maxEnded is how many sessions that have ended are remembered, for the sake of
	// a good answer.
	maxEnded = 1000
	// expireTimeout bounds the rollback of an idle transaction.
	expireTimeout = 30 * time.Second
)

// Open is the wish for a session that stays open.
type Open struct {
	// ID names the session; unique among those open.
	ID     string
	Source string
	// Owner is on whose behalf it is opened; Request.Owner must be the same.
	Owner string
	// Principal is told in Sessions.
	Principal *posternv1.Principal
	// IdleTimeout is how long it may be unused; 0 means DefaultSessionIdle, and more
	// than MaxSessionIdle is cut to that.
	IdleTimeout time.Duration
	// Ended is called once, when the session has ended, with a line that says why.
	// The Manager's Close waits for it. Optional.
	Ended func(reason string, statements uint64)
}

// pinned is a session that stays open: a process that belongs to it alone. Its
// fields are the Manager's, under its mu, but those set once.
type pinned struct {
	Open
	source  *source
	process *session
	opened  time.Time
	wake    chan struct{} // has an entry when watch is to look again
	done    chan struct{} // closed when it has ended

	busy        string // the statement under way; "" is none
	used        time.Time
	transaction string // I, T or E
	expired     bool   // the transaction was rolled back, and the owner does not know yet
	statements  uint64
	ending      string // why it ends after the statement under way; "" is not
	detach      bool   // it goes on without agentd after the statement under way
}

// endedSession is what is remembered of one.
type endedSession struct{ id, owner, reason string }

// OpenSession opens a session for its owner. It takes one of the source's places
// until it ends. An owner has at most Config.SessionsPerOwner of them, and those of a
// source leave one of its places to others.
func (m *Manager) OpenSession(ctx context.Context, o Open) (*posternv1.SQLSession, error) {
	if o.IdleTimeout <= 0 {
		o.IdleTimeout = DefaultSessionIdle
	}
	o.IdleTimeout = min(o.IdleTimeout, MaxSessionIdle)
	p := &pinned{Open: o, opened: time.Now(), used: time.Now(), transaction: "I", busy: "opening", wake: make(chan struct{}, 1), done: make(chan struct{})}
	src, err := m.admitSession(p)
	if err != nil {
		return nil, err
	}
	forget := func() {
		m.mu.Lock()
		delete(m.pinned, o.ID)
		m.mu.Unlock()
	}
	defer m.wg.Done()
	if err := m.place(ctx, src); err != nil {
		forget()
		return nil, err
	}
	s, _, err := m.acquire(ctx, src, "")
	if err != nil {
		forget()
		m.leave(src)
		return nil, err
	}
	m.hold(p, s)
	m.mu.Lock()
	defer m.mu.Unlock()
	s.pinned = true
	p.process, p.busy = s, ""
	m.wg.Add(1)
	go m.watch(p)
	m.config.Metrics.open.Inc()
	if p.ending != "" || src.removed || m.closed {
		reason := p.ending
		if reason == "" {
			reason = "its data source or the agent goes away"
		}
		m.endPinnedLocked(p, reason, "policy")
		return nil, proto.Errorf(proto.CodeUnavailable, "the session has ended before it was used: %s", reason)
	}
	return p.describeLocked(), nil
}

// admitSession counts the session in; the caller owes wg a Done.
func (m *Manager) admitSession(p *pinned) (*source, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	src := m.sources[p.Open.Source]
	switch {
	case m.closed:
		return nil, &proto.Error{Code: proto.CodeUnavailable, Message: "the agent is going away: try again", Err: ErrClosed}
	case src == nil:
		return nil, proto.Errorf(proto.CodeNotFound, "no data source %q on this host", p.Open.Source)
	case src.Guard.Mode == "metadata":
		return nil, proto.Errorf(proto.CodePolicyDenied, "data source %q is in mode metadata, in which no statement runs: sessions make no sense", src.Name)
	case m.pinned[p.ID] != nil:
		return nil, proto.Errorf(proto.CodeAlreadyExists, "session %s is open already", p.ID)
	}
	owned, here := 0, 0
	for _, other := range m.pinned {
		if other.Owner == p.Owner {
			owned++
		}
		if other.source == src {
			here++
		}
	}
	switch {
	case owned >= m.config.SessionsPerOwner:
		return nil, proto.Errorf(proto.CodeOverloaded, "the token has %d sessions open on this host, the most that it may have: close one", owned)
	case here >= max(1, src.Concurrency-1):
		return nil, proto.Errorf(proto.CodeOverloaded, "data source %q has %d sessions open, the most that leave a place to other statements: try again later", src.Name, here)
	}
	p.source = src
	m.pinned[p.ID] = p
	m.wg.Add(1)
	return src, nil
}

// watch ends the session when it has been idle for too long or its process is
// gone, and rolls back a transaction that is idle.
func (m *Manager) watch(p *pinned) {
	defer m.wg.Done()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-p.done:
			return
		case <-p.wake:
		case <-timer.C:
		case <-p.process.exited:
			m.mu.Lock()
			idle := p.busy == ""
			if idle {
				m.endPinnedLocked(p, "the connection to the database was lost", "lost")
			}
			m.mu.Unlock()
			if !idle {
				<-p.done // its statement finds out and ends it
			}
			return
		}
		m.mu.Lock()
		now := time.Now()
		end, rollback := p.used.Add(p.IdleTimeout), p.used.Add(m.config.IdleTransaction)
		open := p.transaction != "I" && !p.expired
		switch {
		case p.busy != "":
		case !now.Before(end):
			m.endPinnedLocked(p, fmt.Sprintf("it was idle for %s", p.IdleTimeout), "idle")
		case open && !now.Before(rollback):
			p.busy = "rolling back"
			m.mu.Unlock()
			m.expire(p)
			m.mu.Lock()
		case open && rollback.Before(end):
			timer.Reset(rollback.Sub(now))
		default:
			timer.Reset(end.Sub(now))
		}
		m.mu.Unlock()
	}
}

// expire rolls back a transaction that has been idle for too long.
func (m *Manager) expire(p *pinned) {
	ctx, cancel := context.WithTimeout(context.Background(), expireTimeout)
	defer cancel()
	r := &run{source: p.source, started: time.Now(), cancel: func(error) {}}
	request := &frame.RunRequest{SQL: "ROLLBACK", Session: true, Expire: true, TimeoutMillis: expireTimeout.Milliseconds(), MaxRows: 1, MaxBytes: 1 << 20}
	m.mu.Lock()
	request.Guard = p.source.Guard
	used := p.used
	m.mu.Unlock()
	outcome := &posternv1.QueryOutcome{}
	_, _, err := m.runIn(ctx, r, p.process, request, io.Discard, outcome)
	m.log.Info("idle transaction rolled back", "source", p.source.Name, "session", p.ID, "err", err)
	m.release(p, outcome)
	m.mu.Lock()
	p.expired = true
	p.used = used // the session's own idle time goes on
	m.mu.Unlock()
}

// runPinned runs a statement in a session that stays.
func (m *Manager) runPinned(ctx context.Context, r *run, p *pinned, request Request, run *frame.RunRequest, w io.Writer, outcome *posternv1.QueryOutcome) error {
	run.Session = true
	m.mu.Lock()
	p.statements++
	m.mu.Unlock()
	_, kept, err := m.runIn(ctx, r, p.process, run, w, outcome)
	if kept != nil && request.Kept != nil {
		kept.Total = outcome.Rows
		request.Kept(kept)
	}
	if reason := m.release(p, outcome); reason != "" {
		var e *proto.Error
		if errors.As(err, &e) {
			e.Message += "; the session has ended, and what was open in it was rolled back"
		}
	}
	return err
}

// release waits until the process is ready for the session's next statement, or
// ends the session and says why.
func (m *Manager) release(p *pinned, outcome *posternv1.QueryOutcome) (ended string) {
	s := p.process
	m.mu.Lock()
	dropped, unsent := s.dropped, s.unsent
	s.unsent = false
	if unsent {
		outcome.Transaction = p.transaction
	}
	m.mu.Unlock()
	if !dropped && !unsent {
		_ = s.conn.SetReadDeadline(time.Now().Add(resetTimeout))
		t, err := s.frames.Next()
		dropped = err != nil || t != frame.Idle || s.conn.SetReadDeadline(time.Time{}) != nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	p.busy, p.used = "", time.Now()
	p.transaction, p.expired = outcome.Transaction, p.expired && unsent
	reason, kind := p.ending, "policy"
	if dropped {
		reason, kind = "its process or its connection to the database broke off", "lost"
	}
	outcome.Transaction = transactionNames[p.transaction]
	if m.closed && !dropped && p.detach {
		m.detachLocked(p)
		return ""
	}
	if reason != "" {
		m.endPinnedLocked(p, reason, kind)
		outcome.Transaction = "ended"
		return reason
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
	return ""
}

var transactionNames = map[string]string{"I": "none", "T": "open", "E": "failed"}

// findPinned takes a session for a statement.
func (m *Manager) findPinned(request *Request) (*pinned, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pinned[request.Session]
	switch {
	case p == nil || p.Owner != request.Owner || p.Open.Source != request.Source:
		return nil, m.goneLocked(request.Session, request.Owner)
	case p.ending != "":
		return nil, proto.Errorf(proto.CodeNotFound, "session %s ends: %s", p.ID, p.ending)
	case p.busy != "":
		return nil, proto.Errorf(proto.CodeOverloaded, "session %s is busy: a session runs one statement at a time", p.ID)
	}
	p.busy = request.QueryID
	return p, nil
}

// goneLocked says that there is no such session, and why if that is known.
func (m *Manager) goneLocked(id, owner string) error {
	for _, e := range m.ended {
		if e.id == id && e.owner == owner {
			return proto.Errorf(proto.CodeNotFound, "session %s has ended: %s; what was open in it was rolled back", id, e.reason)
		}
	}
	return proto.Errorf(proto.CodeNotFound, "this token has no session %q here: it ended, or never was", clipID(id))
}

func clipID(id string) string { return frame.Clip(id, 64) }

// endPinnedLocked ends a session whose process runs nothing that anybody waits
// for. kind is for the metrics.
func (m *Manager) endPinnedLocked(p *pinned, reason, kind string) {
	if m.pinned[p.ID] != p {
		return
	}
	delete(m.pinned, p.ID)
	close(p.done)
	if m.ended = append(m.ended, endedSession{p.ID, p.Owner, reason}); len(m.ended) > maxEnded {
		m.ended = slices.Delete(m.ended, 0, len(m.ended)-maxEnded)
	}
	m.config.Metrics.open.Dec()
	m.config.Metrics.ended.WithLabelValues(kind).Inc()
	m.log.Debug("session ended", "source", p.source.Name, "session", p.ID, "reason", reason)
	p.source.active--
	p.source.wakeLocked()
	m.endLocked(p.process)
	if p.Ended != nil {
		m.wg.Add(1)
		go func() {
			defer m.wg.Done()
			p.Ended(reason, p.statements)
		}()
	}
}

// endSoonLocked ends a session now, or after its statement: at once with stop.
func (m *Manager) endSoonLocked(p *pinned, reason, kind string, stop bool) {
	if p.busy == "" {
		m.endPinnedLocked(p, reason, kind)
		return
	}
	p.ending = reason
	if r := m.running[p.busy]; r != nil && stop {
		m.wg.Add(1)
		go func() {
			defer m.wg.Done()
			r.stop(frame.Cancelled)
		}()
	}
}

// CloseSession ends a session of owner, and cancels what runs in it. NOT_FOUND if
// there is none.
func (m *Manager) CloseSession(id, owner, reason string) error {
	m.mu.Lock()
	p := m.pinned[id]
	if p == nil || p.Owner != owner {
		defer m.mu.Unlock()
		return m.goneLocked(id, owner)
	}
	m.endSoonLocked(p, reason, "closed", true)
	m.mu.Unlock()
	return nil
}

// CloseSessions ends all sessions of owner and returns how many they were.
func (m *Manager) CloseSessions(owner, reason string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for _, p := range m.pinned {
		if p.Owner == owner {
			m.endSoonLocked(p, reason, "closed", true)
			n++
		}
	}
	return n
}

// Sessions lists the sessions that are open, oldest first.
func (m *Manager) Sessions() []*posternv1.SQLSession {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []*posternv1.SQLSession
	for _, p := range m.pinned {
		if p.process != nil {
			list = append(list, p.describeLocked())
		}
	}
	slices.SortFunc(list, func(a, b *posternv1.SQLSession) int { return a.Opened.AsTime().Compare(b.Opened.AsTime()) })
	return list
}

func (p *pinned) describeLocked() *posternv1.SQLSession {
	return &posternv1.SQLSession{
		Id: p.ID, Source: p.source.Name, Principal: p.Principal, Opened: timestamppb.New(p.opened), LastUsed: timestamppb.New(p.used),
		IdleTimeout: durationpb.New(p.IdleTimeout), Transaction: transactionNames[p.transaction], Statements: p.statements, QueryId: p.busy,
	}
}

// sameSource tells whether nothing of a source changed that a session relies on.
func sameSource(a, b Source) bool {
	a.Password, b.Password, a.Login, b.Login = nil, nil, nil, nil
	return reflect.DeepEqual(a, b)
}
