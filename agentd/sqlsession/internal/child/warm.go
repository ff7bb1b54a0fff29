package child

import (
	"context"
	"errors"
	"time"

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

// warm asks the catalog what a first statement would ask, for the sake of the new
// backend's caches, and has the parser process answer once. What they answer does
// not matter: the statement asks for itself.
func (s *session) warm(busy func() bool) error {
	if s.parser != nil && !busy() {
		ctx, done := context.WithTimeout(context.Background(), warmTimeout)
		_, _ = s.parser.Parse(ctx, "SELECT 1")
		done()
	}
	name := func(n string) []pgguard.Name { return []pgguard.Name{{Name: n}} }
	_ = s.wire.conn.SetDeadline(time.Now().Add(warmTimeout))
	for _, q := range []pgguard.Question{
		{Relations: name("pg_class"), Operators: name("="), Types: name("int4")},
		{Functions: name("count")},
	} {
		if busy() {
			break
		}
		all, _ := questions(q)
		var gone *lostError
		if err := s.askAll(newCatalog(), all); errors.As(err, &gone) {
			return err
		}
	}
	s.wire.notices = s.wire.notices[:0]
	return s.wire.conn.SetDeadline(time.Time{})
}
