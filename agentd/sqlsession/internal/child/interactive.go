package child

import (
	"errors"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgverb"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// maxPrepared is how many prepared statements a session may have, and maxPreparedText
// how many bytes of text all of them.
const (
	maxPrepared     = 1000
	maxPreparedText = 8 << 20
)

const (
	stateFailedTransaction = "25P02"
	stateNoTransaction     = "25P01"
	// failTransaction puts an open transaction into the failed state: the savepoint
	// does not exist, as names with this beginning are ours.
	failTransaction = `ROLLBACK TO SAVEPOINT "postern_refused"`
)

// interactive is what a database session that stays open has beside the server's
// own state.
type interactive struct {
	// prepared are the queries of prepared statements by name: each is judged again
	// when it runs, as names may mean something else by then.
	prepared     map[string]string
	preparedText int
	// statementTimeout and lockTimeout are the user's, in milliseconds; 0 is none.
	statementTimeout, lockTimeout int64
	// expired is set when a transaction was rolled back because it was idle: the
	// user is to know before the next statement runs.
	expired bool
	// unsure tells that the last statement failed or was cancelled: the connection
	// may be dead, or another cancel request on its way.
	unsure bool
}

// explicit tells whether the statement runs in a transaction of the user's.
func (x *execution) explicit() bool { return x.request.Session && x.wire.tx != 'I' }

// interact does what only a session that stays does. done tells that the statement
// is over; else it goes on as any other, with x.query and x.verb set.
func (x *execution) interact() (done bool, failure *proto.Error, lost bool) {
	s, r := x.session, x.request
	s.remain()
	if r.Expire {
		return true, x.expire(), false
	}
	if t := s.stay.statementTimeout; t > 0 {
		r.TimeoutMillis = min(r.TimeoutMillis, t)
	}
	verb, refusal := pgverb.Parse(x.text.Text, !r.ReadWrite)
	if refusal != nil {
		return true, denied(x.text.Position(refusal.Position), "%s", refusal.Message), false
	}
	ends := verb != nil && (verb.Kind == pgverb.Commit || verb.Kind == pgverb.Rollback)
	switch {
	case s.stay.expired && ends:
		s.stay.expired = false
		x.tag = "ROLLBACK"
		return true, nil, false
	case s.stay.expired:
		return true, failedTransaction("the transaction was rolled back, as it was idle for too long: say ROLLBACK, then begin again"), false
	case x.wire.tx == 'E' && !ends && (verb == nil || verb.Kind != pgverb.RollbackTo):
		return true, failedTransaction("the transaction has failed: statements are ignored until ROLLBACK, or ROLLBACK TO a savepoint"), false
	case verb == nil:
		return false, nil, false
	}
	x.verb = verb
	switch verb.Kind {
	case pgverb.Show, pgverb.Fetch:
		x.query = ""
	case pgverb.Lock:
		if x.wire.tx == 'I' {
			return true, needsTransaction("LOCK TABLE"), false
		}
		x.query = ""
	case pgverb.Declare:
		if x.wire.tx == 'I' {
			return true, needsTransaction("DECLARE CURSOR"), false
		}
		x.query, x.queryStart = verb.Query, verb.Start
	case pgverb.Prepare:
		if len(s.stay.prepared) >= maxPrepared || s.stay.preparedText+len(verb.Query) > maxPreparedText {
			return true, proto.Errorf(proto.CodeOverloaded, "the session has too many prepared statements: drop some with DEALLOCATE"), false
		}
		x.query, x.queryStart = verb.Query, verb.Start
	case pgverb.Execute:
		query, ok := s.stay.prepared[verb.Name]
		if !ok {
			return true, sqlRefusal("26000", "prepared statement %q does not exist", verb.Name), false
		}
		x.query, x.foreign = query, true
	default:
		failure, lost := x.command(verb)
		return true, failure, lost
	}
	if verb.Kind != pgverb.Prepare && verb.Kind != pgverb.Declare && verb.Kind != pgverb.Lock {
		x.text = sqltext.Verbatim(verb.SQL)
		x.rewritten = true
	}
	return false, nil, false
}

// remain makes the session one that stays.
func (s *session) remain() {
	if s.primed {
		s.primed = false
		// Nothing of ours stays in a session that does. This goes with what is sent next.
		_ = s.wire.send(&pgproto3.Close{ObjectType: 'S', Name: calledName}, &pgproto3.Close{ObjectType: 'S', Name: plainName})
	}
	if s.stay == nil {
		s.stay = &interactive{prepared: make(map[string]string)}
	}
}

// command runs a statement that has no rows and no query in it.
func (x *execution) command(verb *pgverb.Statement) (failure *proto.Error, lost bool) {
	stay := x.session.stay
	if verb.Kind == pgverb.Set && (verb.Name == "statement_timeout" || verb.Name == "lock_timeout") {
		// Ours are set for each statement; the user's narrow them.
		if verb.Name == "statement_timeout" {
			stay.statementTimeout = verb.Millis
		} else {
			stay.lockTimeout = verb.Millis
		}
		x.tag = "SET"
		return x.answerEmpty(), false
	}
	if x.st.isStopped() {
		return stopError(x.st.stopReason(), x.request), false
	}
	if err := x.sink.send(frame.Begun, nil); err != nil {
		return proto.Errorf(proto.CodeInternal, "%w", err), false
	}
	tag := ""
	err := x.wire.send(&pgproto3.Query{String: verb.SQL})
	if err == nil {
		err = x.wire.flush()
	}
	var refusal *pgproto3.ErrorResponse
	if err == nil {
		refusal, err = x.wire.untilReady(func(t byte, body []byte) error {
			var complete pgproto3.CommandComplete
			if t == 'C' && complete.Decode(body) == nil {
				tag = clean(string(complete.CommandTag))
			}
			return nil
		})
	}
	switch {
	case err != nil && verb.Kind == pgverb.Commit:
		return proto.Errorf(proto.CodeSourceUnreachable, "the connection to PostgreSQL at %s was lost during COMMIT: whether the transaction took effect is unknown", x.network), false
	case err != nil:
		return x.broken(err), false
	case refusal != nil:
		e := *refusal
		e.Position = 0 // of a text that is not the user's
		return x.refused(&e), false
	}
	switch verb.Kind {
	case pgverb.ResetAll:
		stay.statementTimeout, stay.lockTimeout = 0, 0
	case pgverb.Deallocate:
		stay.forget(verb.Name)
	case pgverb.Discard:
		if verb.Name == "all" {
			stay.forget("")
			stay.statementTimeout, stay.lockTimeout = 0, 0
		}
	}
	x.tag = tag
	return x.answerEmpty(), false
}

// answerEmpty begins a result without columns, as any statement without rows has.
func (x *execution) answerEmpty() *proto.Error {
	x.sink.start()
	x.batch = newBatch(nil, func(uint32) string { return "" }, nil, nil, x.sink)
	return nil
}

// forget drops a prepared statement, or all of them.
func (i *interactive) forget(name string) {
	if name == "" {
		clear(i.prepared)
		i.preparedText = 0
		return
	}
	i.preparedText -= len(i.prepared[name])
	delete(i.prepared, name)
}

// expire rolls an idle transaction back.
func (x *execution) expire() *proto.Error {
	if x.wire.tx == 'I' {
		return nil
	}
	_, refusal, err := x.wire.simple("ROLLBACK")
	switch {
	case err != nil:
		return x.broken(err)
	case refusal != nil:
		return x.refused(refusal)
	}
	x.session.stay.expired = true
	return nil
}

// settle brings the transaction to where the statement's end leaves it: one of
// the user's fails with any failure, also one that the server knows nothing of;
// one of ours is over.
func (x *execution) settle(failure *proto.Error) *proto.Error {
	stay := x.session.stay
	if stay == nil {
		return failure
	}
	stay.unsure = failure != nil || x.st.isStopped()
	switch {
	case failure == nil && x.verb != nil && x.verb.Kind == pgverb.Prepare:
		stay.prepared[x.verb.Name] = x.verb.Query
		stay.preparedText += len(x.verb.Query)
	case failure == nil:
	case x.own && x.wire.tx != 'I':
		_, _, _ = x.wire.simple("ROLLBACK") //nolint:dogsled // the reset sees a dead connection
	case x.wire.tx == 'T':
		_, _, _ = x.wire.simple(failTransaction) //nolint:dogsled // an error is what it is for; the reset sees a dead connection
	}
	return failure
}

// status is the transaction's for the user: I none, T open, E failed.
func (i *interactive) status(tx byte) string {
	if i.expired {
		return "E"
	}
	return string(tx)
}

// settled is reset for a session that stays: nothing but what a late cancel request
// could still do is taken away.
func (s *session) settled() error {
	_ = s.wire.conn.SetDeadline(time.Now().Add(resetTimeout))
	s.wire.notices = s.wire.notices[:0]
	if err := s.forgetNow(); err != nil {
		return err
	}
	if s.stay.unsure {
		s.stay.unsure = false
		// In a failed transaction the server refuses it, which is as good.
		for range 2 {
			if _, refusal, err := s.wire.simple("SELECT 1"); err != nil {
				return err
			} else if refusal == nil || refusal.Code != stateQueryCanceled {
				break
			}
		}
	}
	// A function can set what SET is refused for.
	if s.wire.params["client_encoding"] != "UTF8" || s.wire.params["standard_conforming_strings"] != "on" {
		return errors.New("client_encoding or standard_conforming_strings was changed, which statements rely on")
	}
	s.wire.notices = s.wire.notices[:0]
	return s.wire.conn.SetDeadline(time.Time{})
}

func failedTransaction(message string) *proto.Error {
	return sqlRefusal(stateFailedTransaction, "%s", message)
}

func needsTransaction(what string) *proto.Error {
	return sqlRefusal(stateNoTransaction, "%s can only be used within a transaction: say BEGIN first", what)
}

// sqlRefusal is a refusal of ours that the server would have made, too.
func sqlRefusal(state, format string, args ...any) *proto.Error {
	e := proto.Errorf(proto.CodeSQL, format, args...)
	e.Message += " (SQLSTATE " + state + ")"
	e.SQL = &posternv1.SQLErrorDetail{Sqlstate: state}
	return e
}
