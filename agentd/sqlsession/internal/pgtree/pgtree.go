package pgtree

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	pgquery "github.com/pganalyze/pg_query_go/v6"
	"github.com/wasilibs/go-pgquery/parser"
	"google.golang.org/protobuf/proto"
)

// Tree is what the grammar makes of a text: one entry of Stmts for each
// statement. Locations in it are offsets in bytes from 0.
type Tree = pgquery.ParseResult

// Parser parses texts; it is safe for concurrent use. A text that is no SQL
// gives a *SyntaxError, one that is too much for the parser a
// *TooComplexError; any other error means that the text could not be looked
// at. In each case it must be refused.
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

func (inProcess) Parse(ctx context.Context, text string) (*Tree, error) {
	if _, err := Measure(text); err != nil {
		return nil, err
	}
	raw, err := parse(text)
	if err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return decode(raw)
}

// one keeps the library from starting a second parser for a second caller.
var one sync.Mutex

// errBroken is returned after the parser has failed in a way from which the
// library does not recover.
var errBroken = errors.New("the parser broke down")

// parse returns a tree as it is sent. After errBroken no call is of use.
func parse(text string) (raw []byte, err error) {
	one.Lock()
	defer one.Unlock()
	defer func() {
		if p := recover(); p != nil {
			raw, err = nil, fmt.Errorf("%w: %v", errBroken, p)
		}
	}()
	raw, err = parser.ParseToProtobuf(text)
	var complaint *parser.Error
	switch {
	case errors.As(err, &complaint) && strings.HasPrefix(complaint.Message, "memory exhausted"), err == nil && len(raw) > MaxTree:
		return nil, errTooComplex
	case errors.As(err, &complaint):
		return nil, &SyntaxError{Message: complaint.Message, Position: complaint.Cursorpos}
	}
	return raw, err
}

// decode reads a tree. One that nests deeper than the decoder goes (10,000) is
// too complex.
func decode(raw []byte) (*Tree, error) {
	tree := new(Tree)
	if err := proto.Unmarshal(raw, tree); err != nil {
		return nil, errTooComplex
	}
	return tree, nil
}
