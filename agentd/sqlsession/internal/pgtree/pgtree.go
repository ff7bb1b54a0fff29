package pgtree

import (
	"context"
	"errors"
	"sync"

	pgquery "github.com/pganalyze/pg_query_go/v6"
	"github.com/wasilibs/go-pgquery/parser"
	"google.golang.org/protobuf/proto"
)

// Tree is what the grammar makes of a text: one entry of Stmts for each
// statement. Locations in it are offsets in bytes from 0.
type Tree = pgquery.ParseResult

// Parser parses texts; it is safe for concurrent use. A text that is no SQL
// gives a *SyntaxError; any other error means that the text could not be looked
// at, and so must be refused.
type Parser interface {
	Parse(ctx context.Context, text string) (*Tree, error)
}

// SyntaxError is the grammar's complaint.
type SyntaxError struct {
	Message string
	// Position is in characters from 1; 0 is unknown.
	Position int
}

// Error implements error.
func (e *SyntaxError) Error() string { return e.Message }

// InProcess returns the parser of this process.
func InProcess() Parser { return inProcess{} }

type inProcess struct{}

// one keeps the library from starting a second parser for a second caller.
var one sync.Mutex

func (inProcess) Parse(ctx context.Context, text string) (*Tree, error) {
	one.Lock()
	raw, err := parser.ParseToProtobuf(text)
	one.Unlock()
	var complaint *parser.Error
	switch {
	case errors.As(err, &complaint):
		return nil, &SyntaxError{Message: complaint.Message, Position: complaint.Cursorpos}
	case err != nil:
		return nil, err
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	}
	tree := new(Tree)
	if err := proto.Unmarshal(raw, tree); err != nil {
		return nil, err
	}
	return tree, nil
}
