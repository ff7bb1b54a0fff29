package child

import (
	"errors"
	"io"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/proto"
)

// explainRefused is for a text with the word EXPLAIN: it and its options are ours.
func explainRefused() *proto.Error {
	return denied(0, "EXPLAIN is refused: leave it out of the text, and ask for the plan with postern sql --explain (or explain in the request), which the data source's policy decides on")
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
