package child

import (
	"context"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/proto"
)

// engine is the process's one open connection to a database, of whatever kind.
// Its methods are called by main, one at a time, but for cancel, which may come
// at any time from any goroutine. What they send goes to the sink that the engine
// was opened with. An error's message fits after the name of the data source.
type engine interface {
	// about says what the process is connected to.
	about() frame.ConnectedReply
	// name is for messages, such as "PostgreSQL at 127.0.0.1:5432".
	name() string
	// run runs one statement and sends its rows: Begun once it is on its way to
	// the database, Data and Progress, perhaps Kept. It does not finish st. lost
	// means that the connection was dead before the statement was sent, so that
	// another process may try; done then holds the error alone.
	run(r *frame.RunRequest, st *statement) (done frame.DoneReply, lost bool)
	// check looks at the connection, the server and what the account may do; ok
	// tells whether the connection may be used again.
	check() (checks []frame.CheckResult, ok bool)
	// introspect sends the catalog in Page frames. After a failure the connection
	// is not used again.
	introspect(r *frame.IntrospectRequest, st *statement) *proto.Error
	// reset brings the connection back to what it was after connecting: nothing of
	// a statement reaches the next one. After an error it is not used again.
	reset() error
	// cancel asks the database to end what the connection does. It returns when
	// the database has taken note; it may come when nothing is under way. An error
	// means that it may still arrive later and hit the next statement.
	cancel(ctx context.Context) error
	// watch watches the idle connection until stop is closed, then leaves it
	// ready for use and returns nil. It returns an error as soon as the
	// connection is dead.
	watch(stop <-chan struct{}) error
	// close ends the connection.
	close()
}

// connectors open the connection of each kind of data source. r holds the
// password; nobody keeps it. parser is for the engines whose grammar it knows.
var connectors = map[string]func(ctx context.Context, r *frame.ConnectRequest, out *sink, parser pgtree.Parser) (engine, *proto.Error){
	"postgres": func(ctx context.Context, r *frame.ConnectRequest, out *sink, parser pgtree.Parser) (engine, *proto.Error) {
		s, failure := connect(ctx, r, out)
		if failure != nil {
			return nil, failure
		}
		s.parser = parser
		return s, nil
	},
	"mysql":  connectMySQL,
	"sqlite": connectSQLite,
}

// open opens the connection that a Connect frame asks for.
func open(ctx context.Context, r *frame.ConnectRequest, out *sink, parser pgtree.Parser) (engine, *proto.Error) {
	connector := connectors[r.Engine]
	if connector == nil {
		return nil, proto.Errorf(proto.CodeSourceConfig, "engine %q is not supported by this version", clean(r.Engine))
	}
	if r.Engine != "sqlite" {
		if err := forbidWriting(); err != nil {
			return nil, proto.Errorf(proto.CodeInternal, "%w", err)
		}
	}
	return connector(ctx, r, out, parser)
}
