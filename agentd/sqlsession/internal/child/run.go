package child

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
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

// explainRefused is for a text with the word EXPLAIN: it and its options are ours.
func explainRefused() *proto.Error {
	return denied(0, "EXPLAIN is refused: leave it out of the text, and ask for the plan with postern sql --explain (or explain in the request), which the data source's policy decides on")
}

// prepare opens the transaction, has the server parse the statement and, for a
// read-only source, say whether it only reads. All of it is one round trip.
func (x *execution) prepare() (fields []pgproto3.FieldDescription, failure *proto.Error, lost bool) {
	r, c := x.request, x.wire
	var err error
	if r.Session { // what the statement before left; a session is not reset
		err = c.send(&pgproto3.Close{ObjectType: 'S', Name: statementName}, &pgproto3.Close{ObjectType: 'S', Name: classifyName})
	}
	if err != nil {
		return nil, x.broken(err), true
	}
	err = c.send(
		&pgproto3.Query{String: x.begin(r.ReadWrite)},
		&pgproto3.Parse{Name: statementName, Query: x.text.Text, ParameterOIDs: x.types},
		&pgproto3.Describe{ObjectType: 'S', Name: statementName},
		&pgproto3.Sync{},
	)
	classify := !r.ReadWrite && x.query != "" && x.judgement.Class != pgguard.Show
	if err == nil && classify {
		err = c.send(&pgproto3.Parse{Name: classifyName, Query: classifyPrefix + x.query, ParameterOIDs: x.types}, &pgproto3.Sync{})
	}
	if err == nil {
		err = c.flush()
	}
	if err != nil {
		return nil, x.broken(err), true
	}
	held := x.own || r.ReadWrite
	refusal, err := c.untilReady(func(t byte, body []byte) error {
		var row pgproto3.DataRow
		if t == 'D' && row.Decode(body) == nil && len(row.Values) == 1 && string(row.Values[0]) == "on" {
			held = true
		}
		return nil
	})
	if err != nil || refusal != nil && isFatal(refusal) {
		return nil, x.lostError(refusal, err), true
	}
	if refusal == nil && !held {
		return nil, x.lostError(nil, fmt.Errorf("%w: a transaction that was to be read only is not", errProtocol)), true
	}
	if refusal != nil {
		// The cycles behind it are read to their ends.
		cycles := 1
		if classify {
			cycles = 2
		}
		for range cycles {
			if _, err := c.untilReady(nil); err != nil {
				return nil, x.lostError(nil, err), true
			}
		}
		return nil, x.refused(refusal), false
	}
	var parameters int
	refusal, err = c.untilReady(func(t byte, body []byte) error {
		switch t {
		case 't':
			var description pgproto3.ParameterDescription
			if err := description.Decode(body); err != nil {
				return fmt.Errorf("%w: %v", errProtocol, err)
			}
			parameters = len(description.ParameterOIDs)
		case 'T':
			var description pgproto3.RowDescription
			if err := description.Decode(body); err != nil {
				return fmt.Errorf("%w: %v", errProtocol, err)
			}
			fields = copyFields(description.Fields)
		}
		return nil
	})
	if err != nil || refusal != nil && isFatal(refusal) {
		return nil, x.lostError(refusal, err), true
	}
	if refusal != nil {
		failure = x.refused(refusal)
	} else if parameters != len(x.text.Args) {
		failure = proto.Errorf(proto.CodeInvalid, "the statement has %d parameters, and %d values are given", parameters, len(x.text.Args))
	}
	if classify {
		class, err := c.untilReady(nil)
		if err != nil || class != nil && isFatal(class) {
			return nil, x.lostError(class, err), true
		}
		if failure == nil && class != nil {
			failure = x.refusedClass(class)
		}
	}
	return fields, failure, false
}

// begin is the text that opens the statement's transaction, with its limits.
func (x *execution) begin(readWrite bool) string {
	r := x.request
	mode, readOnly := "BEGIN READ ONLY;", ""
	if readWrite {
		mode = "BEGIN READ WRITE;"
	}
	lock := min(r.TimeoutMillis, maxLockTimeout.Milliseconds())
	// The transaction must not be ended under a client that reads slowly:
	// agentd ends it.
	idle := r.TimeoutMillis + time.Minute.Milliseconds()
	if x.stay != nil && x.stay.lockTimeout > 0 {
		lock = min(lock, x.stay.lockTimeout)
	}
	if x.explicit() {
		mode = ""
		idle = r.TimeoutMillis + explicitIdle.Milliseconds()
		if !readWrite {
			readOnly = askReadOnly
		}
	}
	return fmt.Sprintf("%sSET LOCAL statement_timeout = %d;SET LOCAL lock_timeout = %d;SET LOCAL idle_in_transaction_session_timeout = %d;%s%s",
		mode, r.TimeoutMillis, lock, idle, x.checkPeer, readOnly)
}

// askReadOnly asks whether a transaction that began earlier is what it was to be.
const askReadOnly = "SHOW transaction_read_only;"

// copyFields copies the names out of the read buffer.
func copyFields(fields []pgproto3.FieldDescription) []pgproto3.FieldDescription {
	own := make([]pgproto3.FieldDescription, len(fields))
	for i, f := range fields {
		own[i] = f
		own[i].Name = []byte(strings.ToValidUTF8(string(f.Name), "\uFFFD"))
	}
	return own
}

// refusedClass is for a statement that is right by itself but can't be the
// query of a cursor.
func (x *execution) refusedClass(e *pgproto3.ErrorResponse) *proto.Error {
	if e.Code == stateQueryCanceled || e.Code == stateUnknownParam {
		return x.refused(e)
	}
	// Behind the line that we put in front.
	position := x.queryPosition(int(e.Position) - len(classifyPrefix))
	return denied(position, "the statement is refused: the data source is read-only, which allows SELECT, VALUES, TABLE and WITH ... SELECT, and nothing in them that writes or locks")
}

func isFatal(e *pgproto3.ErrorResponse) bool {
	severity := e.SeverityUnlocalized
	if severity == "" {
		severity = e.Severity
	}
	return severity == "FATAL" || severity == "PANIC"
}

// lostError is for a connection that turned out dead before the statement ran.
func (x *execution) lostError(e *pgproto3.ErrorResponse, err error) *proto.Error {
	if e != nil {
		return sqlError(e, nil)
	}
	return x.broken(err)
}

// broken is for a connection that ended under a statement.
func (x *execution) broken(err error) *proto.Error {
	if errors.Is(err, errProtocol) {
		return proto.Errorf(proto.CodeSourceConfig, "PostgreSQL at %s: %w", x.network, err)
	}
	what := "closed the connection"
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		what = last(err)
	}
	return proto.Errorf(proto.CodeSourceUnreachable, "the connection to PostgreSQL at %s was lost: the server %s", x.network, what)
}

// refused turns the server's error into ours.
func (x *execution) refused(e *pgproto3.ErrorResponse) *proto.Error {
	if x.discreet {
		return x.reduced(e, 0)
	}
	if x.rewritten && e.Position != 0 {
		own := *e
		own.Position = 0
		e = &own
	}
	switch {
	case e.Code == stateQueryCanceled && x.st.stopReason() != 0:
		return stopError(x.st.stopReason(), x.request)
	case e.Code == stateQueryCanceled && time.Since(x.st.started) >= time.Duration(x.request.TimeoutMillis)*time.Millisecond*9/10:
		return timeoutError(x.request)
	case e.Code == stateReadOnly && !x.request.ReadWrite:
		return denied(x.text.Position(int(e.Position)), "the statement is refused: the data source is read-only: %s", clean(e.Message))
	case e.Code == stateSyntaxError && e.Routine == "exec_parse_message":
		return denied(0, "the text has more than one statement: send them one by one")
	}
	return sqlError(x.masking.scrub(e, x.touches), x.text)
}

// typeNames asks for the names of types that pgTypes does not have.
func (x *execution) typeNames(fields []pgproto3.FieldDescription) (func(uint32) string, *proto.Error) {
	names := make(map[uint32]string)
	var unknown []string
	for _, f := range fields {
		if _, ok := pgTypes[f.DataTypeOID]; ok {
			continue
		}
		if _, ok := names[f.DataTypeOID]; !ok {
			names[f.DataTypeOID] = strconv.FormatUint(uint64(f.DataTypeOID), 10)
			unknown = append(unknown, names[f.DataTypeOID])
		}
	}
	name := func(oid uint32) string { return names[oid] }
	if len(unknown) == 0 {
		return name, nil
	}
	// Every name is qualified: the statement's search_path is not trusted.
	rows, refusal, err := x.wire.simple("SELECT t.oid, n.nspname, t.typname FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n" +
		" ON n.oid OPERATOR(pg_catalog.=) t.typnamespace WHERE t.oid OPERATOR(pg_catalog.=) ANY ('{" + strings.Join(unknown, ",") + "}'::pg_catalog.oid[])")
	if err != nil {
		return nil, x.broken(err)
	}
	if refusal != nil {
		return nil, x.refused(refusal)
	}
	for _, row := range rows {
		if len(row) != 3 {
			continue
		}
		oid, _ := strconv.ParseUint(row[0], 10, 32)
		full := row[2]
		if row[1] != "pg_catalog" {
			full = row[1] + "." + row[2]
		}
		names[uint32(oid)] = full
	}
	return name, nil
}

func (x *execution) sendExecute() error {
	bound := make([][]byte, len(x.text.Args))
	for i, a := range x.text.Args {
		if a.Text != nil {
			bound[i] = append([]byte{}, *a.Text...) // an empty text is not NULL
		}
	}
	err := x.wire.send(
		&pgproto3.Bind{PreparedStatement: statementName, Parameters: bound, ResultFormatCodes: x.batch.formats()},
		&pgproto3.Execute{},
		&pgproto3.Sync{},
	)
	if err != nil {
		return err
	}
	return x.wire.flush()
}

// stream takes the rows until the server is done with the statement.
func (x *execution) stream() cycleEnd {
	c, b := x.wire, x.batch
	var refusal *pgproto3.ErrorResponse
	for {
		if x.drained != nil {
			return x.waitDrained()
		}
		if err := x.ready(5); err != nil {
			if refusal != nil {
				return cycleEnd{refusal, nil}
			}
			return cycleEnd{nil, err}
		}
		if x.drained != nil {
			continue
		}
		if c.in[c.r] == 'D' {
			if err := x.row(); err != nil {
				return cycleEnd{refusal, err}
			}
			continue
		}
		t, body, err := c.one()
		if err != nil {
			if refusal != nil {
				return cycleEnd{refusal, nil}
			}
			return cycleEnd{nil, err}
		}
		switch t {
		case 0: // an aside
		case 'Z':
			return cycleEnd{refusal, nil}
		case 'E':
			refusal = decodeError(body)
		case 'C':
			var complete pgproto3.CommandComplete
			if complete.Decode(body) == nil {
				x.tag = clean(string(complete.CommandTag))
			}
		case 'G', 'W':
			if err := c.send(&pgproto3.CopyFail{Message: "COPY is not supported"}, &pgproto3.Sync{}); err != nil {
				return cycleEnd{refusal, err}
			}
			if err := c.flush(); err != nil {
				return cycleEnd{refusal, err}
			}
		case '2', 'n', 'I', 's', 'H', 'c', 'd':
		default:
			return cycleEnd{refusal, fmt.Errorf("%w: message %q", errProtocol, t)}
		}
		if b.full() {
			if err := b.flush(); err != nil {
				return cycleEnd{refusal, err}
			}
		}
	}
}

// ready makes n bytes available. While the database pauses, rows that wait
// are sent on.
func (x *execution) ready(n int) error {
	c := x.wire
	if c.w-c.r >= n {
		return nil
	}
	c.room(n)
	for c.w-c.r < n {
		if c.bulk != nil && x.batch.flushed > bulkAfter && !x.st.isStopped() {
			err := c.fillBulk()
			if err == nil {
				c.room(n)
				continue
			}
			if !errors.Is(err, errQuiet) {
				return err
			}
		}
		armed := x.batch.rows > 0 && !x.st.isStopped()
		if armed {
			delay := laterDelay
			if x.batch.first {
				delay = firstDelay
			}
			if err := c.conn.SetReadDeadline(time.Now().Add(delay)); err != nil {
				return err
			}
		}
		err := c.fill()
		if armed {
			if err := c.conn.SetReadDeadline(time.Time{}); err != nil {
				return err
			}
		}
		if armed && errors.Is(err, os.ErrDeadlineExceeded) {
			if err = x.batch.flush(); err == nil && x.drained != nil {
				return nil // somebody else reads now
			}
		}
		if err != nil {
			return err
		}
		c.room(n)
	}
	return nil
}

// row takes one DataRow, or passes over it when no more rows are wanted.
func (x *execution) row() error {
	c, b := x.wire, x.batch
	_, size, err := c.header()
	if err != nil {
		return err
	}
	if !x.st.isStopped() {
		switch {
		case b.total() >= x.request.MaxRows:
			x.st.stop(rowLimit)
		case size >= giantRow:
			if !b.fits(x.request.MaxBytes, size, nil) {
				x.st.stop(byteLimit)
				break
			}
			if err := b.flush(); err != nil || x.drained != nil {
				return err
			}
			c.r += 5
			if err := x.taken(b.addFrom(c, size)); err != nil {
				return err
			}
			return b.flush()
		default:
			if err := x.ready(5 + size); err != nil || x.drained != nil {
				return err
			}
			body := c.in[c.r+5 : c.r+5+size]
			if !b.fits(x.request.MaxBytes, size, body) {
				x.st.stop(byteLimit)
				break
			}
			c.r += 5 + size
			if err := x.taken(b.add(body)); err != nil {
				return err
			}
			if b.full() {
				return b.flush()
			}
			return nil
		}
	}
	return c.skip(5 + size)
}

// taken looks at how a row was taken: a value that can't be held stops the
// statement, and the rows before it stay good.
func (x *execution) taken(err error) error {
	if errors.As(err, &x.value) {
		x.st.stop(badValue)
		return nil
	}
	return err
}

// stalled is called when the result's reader is slow and the sink has no free
// buffer. If the statement is stopped meanwhile, the database is freed at
// once: a backend that waits for us to read sees no cancel.
func (x *execution) stalled(free <-chan []byte) []byte {
	if x.drained == nil {
		select {
		case b := <-free:
			return b
		case <-x.st.stopped:
		}
		x.drained = make(chan cycleEnd, 1)
		if err := x.wire.endBulk(); err != nil {
			x.drained <- cycleEnd{nil, err}
			return <-free
		}
		go func() {
			refusal, err := x.wire.untilReady(nil)
			x.drained <- cycleEnd{refusal, err}
		}()
	}
	return <-free
}

// waitDrained waits for the goroutine of stalled, if there is one.
func (x *execution) waitDrained() cycleEnd {
	if x.drained == nil {
		return cycleEnd{}
	}
	end := <-x.drained
	x.drained <- end
	return end
}

// verdict says what is wrong with a statement whose cycle has ended.
func (x *execution) verdict(end cycleEnd) *proto.Error {
	switch reason := x.st.stopReason(); {
	case end.err != nil:
		return x.broken(end.err)
	case x.value != nil:
		return proto.Errorf(proto.CodeInvalid, "%w", x.value)
	case end.refusal != nil:
		return x.refused(end.refusal)
	case reason != 0:
		// The statement was over before the cancel arrived: its rows are not
		// complete all the same.
		return stopError(reason, x.request)
	case x.wire.tx == 'I':
		return denied(0, "the statement ended its own transaction")
	}
	return nil
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
