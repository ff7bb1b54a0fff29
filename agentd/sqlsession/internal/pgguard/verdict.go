package pgguard

import (
	"context"

	pgquery "github.com/pganalyze/pg_query_go/v6"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
)

// Modes of frame.Guard.
const (
	ModeMetadata  = "metadata"
	ModeReadOnly  = "read-only"
	ModeReadWrite = "read-write"
)

// Class is the kind of a statement.
type Class string

// The classes of statements. Those from Begin to Discard are about the
// transaction or the session: they are refused outside of one that stays.
const (
	Select   Class = "select" // VALUES, TABLE and WITH ... SELECT too
	Insert   Class = "insert"
	Update   Class = "update"
	Delete   Class = "delete"
	Merge    Class = "merge"
	Truncate Class = "truncate"
	Call     Class = "call"
	Do       Class = "do"
	DDL      Class = "ddl" // CREATE, ALTER, DROP, COMMENT, GRANT, ...
	Maintain Class = "maintain"
	CopyOut  Class = "copy to"
	CopyIn   Class = "copy from"
	Explain  Class = "explain"
	Show     Class = "show"
	Lock     Class = "lock"
	Notify   Class = "notify"

	Begin      Class = "begin" // START TRANSACTION too
	Commit     Class = "commit"
	Rollback   Class = "rollback"
	Savepoint  Class = "savepoint"
	Release    Class = "release"
	RollbackTo Class = "rollback to"
	SetTx      Class = "set transaction"
	Set        Class = "set"
	Reset      Class = "reset"
	Prepare    Class = "prepare"
	Execute    Class = "execute"
	Deallocate Class = "deallocate"
	Declare    Class = "declare"
	Fetch      Class = "fetch" // MOVE too
	Close      Class = "close"
	Listen     Class = "listen"
	Unlisten   Class = "unlisten"
	Discard    Class = "discard"
)

// Input is what is to be decided.
type Input struct {
	Tree *pgtree.Tree
	// Text is what Tree was made of.
	Text  string
	Guard *frame.Guard
	// Version is the server's major version, such as 15.
	Version int
	// Session allows what concerns a session that stays: transactions, cursors,
	// prepared statements, settings; and several statements in a text.
	Session bool
	// CopyOut allows COPY ... TO STDOUT.
	CopyOut  bool
	Resolver Resolver
}

// Verdict is what was allowed.
type Verdict struct {
	Statements []Statement
}

// Statement is one statement of a text.
type Statement struct {
	Class Class
	// Node is its tree.
	Node *pgquery.Node
	// Start and End are where it stands in the text, in bytes; End is behind
	// the last.
	Start, End int
	// Relations are those that are named in it, the names of its own WITH among
	// them; Functions those that it calls by name.
	Relations []Relation
	Functions []Function
	// Writes tells that it may change data or the database's schema.
	Writes bool
	// Changes tells that names may mean something else after it: what was
	// resolved before it does not count any more.
	Changes bool
}

// Relation is a table or view that a statement names.
type Relation struct {
	Schema, Name string // Schema is "" when it is not named
	Write        bool
	// Location is the offset in bytes, -1 if unknown.
	Location int
}

// Function is a function that a statement calls.
type Function struct {
	Schema, Name string
	Location     int
}

// Refusal says why a text must not run.
type Refusal struct {
	// Reason is one line, for the end of "the statement is refused: ".
	Reason string
	// Position is in characters of Input.Text from 1; 0 is unknown.
	Position int
	// Unknown tells that it is refused because it is not understood.
	Unknown bool
	// Err is set when the question could not be answered at all: it is no
	// refusal then.
	Err error
}

// Question is what must be known of the server's catalog. Names are as the
// grammar has them: folded, without quotes.
type Question struct {
	Functions []Name
	Operators []Name
	Types     []Name
	Relations []Name
	// Casts are the names of all types that are named, PostgreSQL's own too.
	Casts []string
	// Deep counts the columns of relations among the types that are named: the
	// statement may make values of them.
	Deep bool
}

// Name is a name with its schema, "" when there is none.
type Name struct{ Schema, Name string }

// Resolver answers questions from the server's catalog.
type Resolver interface {
	Resolve(ctx context.Context, q Question) (*Catalog, error)
}

// Catalog is the answer: what names may mean, and what is behind them.
type Catalog struct {
	// Functions are the candidates of each name that is asked for.
	Functions map[Name][]Proc
	// Hidden are those that a statement may call without naming them: through
	// operators, types, views and row security.
	Hidden []Hidden
	// Relations are what the names stand for; a name that is missing is none.
	Relations map[Name]RelationFacts
	// CurrentSchema is where CREATE without a schema creates.
	CurrentSchema string
}

// Proc is one function of the server.
type Proc struct {
	OID          uint32
	Schema, Name string
	// Volatility is pg_proc's: i, s or v; Kind f, a, w or p.
	Volatility, Kind byte
	// Extension tells that it belongs to an extension.
	Extension bool
	// One tells that it can be called with one argument, Row that this may be
	// a row: then x.name can call it.
	One, Row bool
}

// Hidden is a function and through what it would be called, such as
// "view public.v" or "operator ===".
type Hidden struct {
	Proc
	Via string
	// Name is the name in the question that led to it.
	From Name
}

// RelationFacts is what a relation is.
type RelationFacts struct {
	OID          uint32
	Schema, Name string
	Kind         byte // pg_class.relkind
	// Beyond is what it is that may write elsewhere when it is written to (a view,
	// a table with a trigger, ...); "" if nothing does.
	Beyond string
}
