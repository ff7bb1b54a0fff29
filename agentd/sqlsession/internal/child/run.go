package child

import (
	"context"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgguard"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgverb"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
)

const (
	// firstDelay and laterDelay are how long rows wait for more rows while
	// the database pauses.
	firstDelay = 2 * time.Millisecond
	laterDelay = 20 * time.Millisecond
	// maxLockTimeout is how long a statement waits for a lock at most.
	maxLockTimeout = 30 * time.Second
	// explicitIdle is when the server itself ends a transaction of the user's that
	// is idle: long after agentd has rolled it back.
	explicitIdle = 15 * time.Minute
	// statementName and classifyName are our prepared statements'; DISCARD ALL
	// removes them.
	statementName = "postern"
	classifyName  = "postern_class"
	// classifyPrefix makes the statement the query of a cursor, which the
	// server accepts of nothing but SELECT, VALUES, TABLE and WITH without DML.
	// The statement itself is what runs: a cursor forbids parallel plans.
	classifyPrefix = "DECLARE postern NO SCROLL CURSOR FOR\n"
)

// execution is one statement on its way.
type execution struct {
	*session
	request *frame.RunRequest
	st      *statement
	text    *sqltext.Statement
	types   []uint32 // of the arguments, 0: the server infers it
	batch   *batch
	tag     string
	masking *masking // nil: nothing is masked
	// touches tells that what the server says may quote masked values.
	touches bool
	value   *valueError
	// discreet is set where nothing of the server's words is told that may hold a
	// value.
	discreet bool
	// judgement is the verdict on the query.
	judgement pgguard.Statement
	// parameters are told of a statement that was described.
	parameters []frame.ParameterInfo
	// drained is set while, or after, another goroutine reads to the end of
	// the cycle: see stalled.
	drained chan cycleEnd

	// What follows is for sessions that stay: see interact. own tells that the
	// transaction is ours, verb what kind of statement it is, if it is one of a
	// session's; then query is the query in it, from the byte queryStart of the
	// text on, or (foreign) from an earlier text, and rewritten tells that the
	// text is not the user's.
	own        bool
	verb       *pgverb.Statement
	query      string
	queryStart int
	foreign    bool
	rewritten  bool
}

// cycleEnd is how the server's answer to Execute ended.
type cycleEnd struct {
	refusal *pgproto3.ErrorResponse
	err     error
}

// run runs one statement and sends its rows. lost means that the connection
// was dead before the statement was sent.
func (s *session) run(r *frame.RunRequest, st *statement) (done frame.DoneReply, lost bool) {
	x := &execution{session: s, request: r, st: st}
	failure, lost := x.execute()
	if lost {
		return frame.DoneReply{Error: frame.FromError(failure)}, true
	}
	if x.batch != nil {
		if failure != nil && s.sink.submitted == 0 && x.batch.total() == 0 {
			s.sink.discard()
		} else if err := x.batch.close(); err != nil && failure == nil {
			failure = proto.Errorf(proto.CodeInternal, "encode the result: %w", err)
		}
		x.waitDrained()
		done.Rows = x.batch.flushed
		if s.sink.submitted > 0 {
			x.sendKept()
		}
	}
	if r.Session {
		failure = x.settle(failure)
		done.Transaction = s.stay.status(s.wire.tx)
	}
	done.Tag = x.tag
	done.Error = frame.FromError(failure)
	done.Parameters = x.parameters
	if x.discreet || r.Guard.Mode == modeMetadata {
		return done, false // a notice is a function's own words
	}
	for _, n := range s.wire.notices {
		if x.touches {
			continue // it may be made of masked values
		}
		if x.masking != nil {
			n.Message = x.masking.texts.String(n.Message)
		}
		done.Notices = append(done.Notices, frame.Notice{
			Severity: clean(n.Severity), SQLState: clean(n.Code), Message: frame.Clip(clean(n.Message), 1<<10),
		})
	}
	return done, false
}

// sendKept sends the rows that are kept, if any are. Without them the result is
// as good.
func (x *execution) sendKept() {
	if x.batch.keep == nil {
		return
	}
	payload, err := x.batch.keep.encode(x.batch.schema)
	if err != nil || payload == nil {
		return
	}
	_ = x.sink.send(frame.Kept, payload)
}

func (x *execution) execute() (failure *proto.Error, lost bool) {
	r := x.request
	if position, is := sqltext.Laborious(r.SQL); is {
		return denied(position, "the statement is refused: PostgreSQL can't be interrupted while it reads that many comments or operators in a row"), false
	}
	if failure := x.bind(); failure != nil {
		return failure, false
	}
	switch {
	case r.Expire:
	case r.Explain != "" || len(r.Indexes) > 0:
		return x.apart(x.explain)
	case r.Guard.Mode == modeMetadata:
		return x.apart(x.describe)
	}
	if x.masking, failure = x.session.masksOf(&r.Guard); failure != nil {
		return failure, false
	}
	x.query = x.text.Text
	if r.Session {
		if done, failure, lost := x.interact(); done {
			return failure, lost
		}
	}
	if failure, lost := x.guard(); failure != nil {
		return failure, lost
	}
	x.own = !x.explicit()
	fields, failure, lost := x.prepare()
	if failure != nil {
		return failure, lost
	}
	return x.deliver(fields), false
}

// deliver runs the statement that the server has parsed, sends its rows and ends
// its transaction.
func (x *execution) deliver(fields []pgproto3.FieldDescription) *proto.Error {
	r := x.request
	hidden, failure := x.hide(fields)
	if failure != nil {
		return failure
	}
	types, failure := x.typeNames(fields)
	if failure != nil {
		return failure
	}
	x.sink.start()
	x.batch = newBatch(fields, types, hidden, x.masking, x.sink)
	x.batch.limit, x.batch.exceeded = r.MaxBytes, func() { x.st.stop(byteLimit) }
	x.batch.keep = newKeeper(x.batch.columns, r.KeepFirst, r.KeepLast)
	if x.st.isStopped() {
		return stopError(x.st.stopReason(), r)
	}
	if err := x.sink.send(frame.Begun, nil); err != nil {
		return proto.Errorf(proto.CodeInternal, "%w", err)
	}
	if err := x.sendExecute(); err != nil {
		return x.broken(err)
	}
	x.sink.wait = x.stalled
	end := x.stream()
	x.sink.wait = nil
	if err := x.wire.endBulk(); err != nil && end.err == nil {
		end.err = err
	}
	if x.batch.hides && end.err == nil {
		// Masked rows may turn out too long: that is known before the verdict.
		if err := x.batch.flush(); err != nil {
			end.err = err
		}
	}
	if failure := x.verdict(end); failure != nil {
		return failure
	}
	return x.commit()
}

// apart runs what has a transaction of its own, which is rolled back, also in a
// session that stays.
func (x *execution) apart(f func() (*proto.Error, bool)) (failure *proto.Error, lost bool) {
	if !x.request.Session {
		return f()
	}
	x.session.remain()
	switch {
	case x.session.stay.expired || x.wire.tx == 'E':
		return failedTransaction("the transaction has failed: say ROLLBACK first"), false
	case x.explicit():
		return proto.Errorf(proto.CodeInvalid, "the plan of a statement, or its description, is told outside of a transaction alone: say COMMIT or ROLLBACK first"), false
	}
	x.own = true
	failure, lost = f()
	if failure == nil && x.wire.tx != 'I' {
		if _, _, err := x.wire.simple("ROLLBACK"); err != nil {
			return x.broken(err), false
		}
	}
	return failure, lost
}

// guard judges the query, before anything of it reaches the database. lost means
// that the connection turned out dead.
func (x *execution) guard() (failure *proto.Error, lost bool) {
	if x.verb != nil {
		x.session.judged.changed() // it may set what names mean
		if x.query == "" {
			return nil, false
		}
	}
	if sqltext.FirstKeyword(x.query) == "" {
		return proto.Errorf(proto.CodeInvalid, "the statement is empty"), false
	}
	g := x.request.Guard
	switch {
	case !x.request.ReadWrite && g.Mode == pgguard.ModeReadWrite:
		g.Mode = pgguard.ModeReadOnly // asked for
	case x.request.ReadWrite && g.Mode != pgguard.ModeReadWrite:
		return denied(0, "the statement is refused: the data source is read-only"), false
	}
	ctx, done := context.WithTimeout(context.Background(), time.Duration(x.request.TimeoutMillis)*time.Millisecond)
	defer done()
	judged := make(chan struct{})
	defer close(judged)
	go func() {
		select {
		case <-x.st.stopped:
			done()
		case <-judged:
		}
	}()
	verdict, failure, lost := x.judge(ctx, x.query, &g, x.queryPosition)
	if reason := x.st.stopReason(); failure != nil && !lost && reason != 0 {
		return stopError(reason, x.request), false
	}
	if failure == nil && len(verdict.Statements) == 1 {
		x.judgement = verdict.Statements[0]
	}
	return failure, lost
}

// queryPosition turns a position in the query into that in the user's text.
func (x *execution) queryPosition(position int) int {
	switch {
	case position <= 0, x.foreign, x.rewritten:
		return 0
	case x.verb != nil:
		position += utf8.RuneCountInString(x.text.Text[:x.queryStart])
	}
	return x.text.Position(position)
}

// commit makes a read-write statement's changes last.
func (x *execution) commit() *proto.Error {
	switch {
	case !x.own:
		return nil
	case !x.request.ReadWrite && !x.request.Session:
		return nil
	case !x.request.ReadWrite:
		if _, _, err := x.wire.simple("ROLLBACK"); err != nil {
			return x.broken(err)
		}
		return nil
	}
	_, refusal, err := x.wire.simple("COMMIT")
	if err != nil {
		return proto.Errorf(proto.CodeSourceUnreachable, "the connection to PostgreSQL at %s was lost during COMMIT: whether the statement took effect is unknown", x.network)
	}
	if refusal != nil {
		return sqlError(x.masking.scrub(refusal, x.touches), nil)
	}
	return nil
}
