package child

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgguard"
)

const (
	// warmDelay is how long a new session must be without a request before it warms
	// itself: one that was opened for a statement gets it sooner.
	warmDelay = 10 * time.Millisecond
	// warmTimeout bounds what the session waits for while it warms itself.
	warmTimeout = 5 * time.Second
)

// warmer is an engine whose first statement is slower than those after it.
type warmer interface {
	// warm does, in steps of a few milliseconds, what the first statement would have to do
	// first. It ends before the next step once busy tells that a request
	// waits: the step under way then is one that the request would have paid
	// for. It changes nothing that a statement sees. An error means that
	// the connection is dead.
	warm(busy func() bool) error
}

// rehearsal is the statement that a session runs to warm itself: what it does is done
// by most, and what it reads is in the server's memory.
const rehearsal = "SELECT oid, relname FROM pg_catalog.pg_class WHERE oid = 1259 LIMIT 1"

// warm does what a first statement would be the first to do, for the sake of the new
// backend's caches and of our own: the parser answers once, the questions to the
// catalog are prepared and planned, and a statement that reads one row of a catalog goes
// all the way to frames that nobody gets. What comes of it does not matter: the
// statement asks for itself.
func (s *session) warm(busy func() bool) error {
	parses := false
	if s.parser != nil && !busy() {
		ctx, done := context.WithTimeout(context.Background(), warmTimeout)
		_, err := s.parser.Parse(ctx, rehearsal)
		done()
		parses = err == nil
	}
	_ = s.wire.conn.SetDeadline(time.Now().Add(warmTimeout))
	name := func(n string) []pgguard.Name { return []pgguard.Name{{Name: n}} }
	var gone *lostError
	primed := true
	for _, q := range []pgguard.Question{
		{Relations: name("pg_class"), Operators: name("="), Types: name("int4")},
		{Functions: name("count")},
	} {
		if busy() {
			primed = false
			break
		}
		all, _ := questions(q)
		err := s.askAll(newCatalog(), all, priming)
		if errors.As(err, &gone) {
			return err
		}
		primed = primed && err == nil
	}
	s.primed = primed
	if primed && parses && !busy() {
		if err := s.rehearse(); err != nil {
			return err
		}
		s.primed = true
	}
	s.wire.notices = s.wire.notices[:0]
	return s.wire.conn.SetDeadline(time.Time{})
}

// rehearse runs the rehearsal. An error means that the connection is dead.
func (s *session) rehearse() error {
	var r frame.RunRequest
	text, err := json.Marshal(frame.RunRequest{
		SQL: rehearsal, MaxRows: 1, MaxBytes: 1 << 20, TimeoutMillis: warmTimeout.Milliseconds(), Guard: frame.Guard{Mode: pgguard.ModeReadOnly},
	})
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err != nil {
		return err
	}
	// The parser may take its time first, and is waited for no longer than warmTimeout.
	_ = s.wire.conn.SetDeadline(time.Now().Add(3 * warmTimeout))
	own := s.sink
	s.sink = newSink(nowhere{})
	defer func() {
		s.sink.close()
		s.sink, s.judged, s.masking = own, judged{}, nil
	}()
	st := newStatement(func(context.Context) error { return nil })
	defer st.finish()
	done, lost := s.run(&r, st)
	if lost {
		return done.Error.Proto()
	}
	if err := s.sink.send(frame.Done, done); err != nil {
		return err
	}
	// As after any other statement, except that the questions stay prepared.
	err = s.wire.send(
		&pgproto3.Close{ObjectType: 'S', Name: statementName}, &pgproto3.Close{ObjectType: 'S', Name: classifyName}, &pgproto3.Sync{},
	)
	if err != nil {
		return err
	}
	if err := s.wire.flush(); err != nil {
		return err
	}
	if _, err := s.wire.untilReady(nil); err != nil {
		return err
	}
	if s.wire.tx == 'I' {
		return nil
	}
	_, _, err = s.wire.simple("ROLLBACK")
	return err
}

// nowhere is a connection whose bytes nobody gets.
type nowhere struct{ net.Conn }

func (nowhere) Write(b []byte) (int, error) { return len(b), nil }
