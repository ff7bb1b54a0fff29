package pgtree

import (
	"fmt"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
)

// What is parsed at most. PostgreSQL itself takes more; a text beyond is refused.
const (
	// MaxText is the longest text in bytes.
	MaxText = 4 << 20
	// MaxTree is the largest tree in bytes as it is sent: in memory it takes
	// about ten times as much while it is looked at.
	MaxTree = 6 << 20
	// maxTokens is how many words, numbers and signs a text has: more took the
	// parser seconds and hundreds of megabytes.
	maxTokens = 500_000
	// maxDepth is the deepest tree by sqltext's estimate: from about 3,400
	// levels on the parser overflows its stack.
	maxDepth = 2500
	// maxComments is how deep comments may nest: the scanner takes quadratic
	// time for them.
	maxComments = 64
)

// What a text of the small lane has at most. A token makes at most about one
// level (of three tokens, (SELECT ), three), so the stack suffices for any text; and
// it takes at most some tens of milliseconds.
const (
	smallText   = 16 << 10
	smallTokens = 2000
)

// Lane is one of the parsers; a letter on the wire.
type Lane byte

// The lanes.
const (
	Small Lane = 's'
	Large Lane = 'l'
)

// Lanes are all of them.
var Lanes = [...]Lane{Small, Large}

// String is the lane's name.
func (l Lane) String() string {
	switch l {
	case Small:
		return "small"
	case Large:
		return "large"
	}
	return "unknown"
}

// TooComplexError says why a text is not parsed at all.
type TooComplexError struct{ Reason string }

// Error implements error.
func (e *TooComplexError) Error() string { return e.Reason }

// Measure says which lane parses a text; a *TooComplexError when none does.
func Measure(text string) (Lane, error) {
	if len(text) > MaxText {
		return 0, &TooComplexError{fmt.Sprintf("the statement has %d bytes, more than the %d that are parsed: pass large values as parameters", len(text), MaxText)}
	}
	c := sqltext.Measure(text)
	switch {
	case c.Comments > maxComments:
		return 0, &TooComplexError{fmt.Sprintf("comments nest deeper than %d", maxComments)}
	case c.Tokens > maxTokens:
		return 0, &TooComplexError{fmt.Sprintf("the statement has more than %d words, numbers and signs: pass large values as parameters", maxTokens)}
	case c.Depth > maxDepth:
		return 0, &TooComplexError{"the statement nests too deep, or has too many operators in a row"}
	case len(text) <= smallText && c.Tokens <= smallTokens:
		return Small, nil
	}
	return Large, nil
}

// errTooComplex is for what turns out to be too much while it is parsed.
var errTooComplex = &TooComplexError{"the statement is too large or nests too deep to be understood"}
