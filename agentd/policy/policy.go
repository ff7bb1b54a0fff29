package policy

import (
	"fmt"
	"slices"
	"time"
)

// Mode is how far statements may go on a data source.
type Mode string

// The modes of DESIGN.md.
const (
	// ModeMetadata tells what a statement would return, and does not run it.
	ModeMetadata  Mode = "metadata"
	ModeReadOnly  Mode = "read-only"
	ModeReadWrite Mode = "read-write"
)

// Plans is how much of a statement's plan may be told.
type Plans string

// The kinds of plans.
const (
	PlansOff       Plans = "off"
	PlansStructure Plans = "structure" // nodes, tables, indexes; no literals, powers of ten for numbers
	PlansFull      Plans = "full"      // as the database tells it
	PlansAnalyze   Plans = "analyze"   // full, and the statement may be run for it
)

// What holds where the configuration is silent.
const (
	DefaultMaxRows          uint64 = 1_000_000
	DefaultMaxBytes         uint64 = 1 << 30
	DefaultStatementTimeout        = 5 * time.Minute
	DefaultConcurrency             = 8

	DefaultClientIdle              = time.Hour
	DefaultClientIdleInTransaction = 10 * time.Minute
)

// The largest values that a configuration may ask for.
const (
	MaxStatementTimeout = 24 * time.Hour
	MaxConcurrency      = 256
	MaxClientIdle       = 7 * 24 * time.Hour
)

// Source is the checked policy of one data source. The zero value allows
// nothing.
type Source struct {
	Mode Mode
	// MaxRows and MaxBytes (of the Arrow stream) cut a result; at least 1.
	MaxRows  uint64
	MaxBytes uint64
	// StatementTimeout ends a statement in the database; above 0.
	StatementTimeout time.Duration
	// Concurrency is how many statements may run at once; at least 1.
	Concurrency int
	// ClientIdle and ClientIdleInTransaction are how long a client of PostgreSQL's own
	// protocol may be silent, outside and inside of a transaction; above 0.
	ClientIdle, ClientIdleInTransaction time.Duration
	// KeepFirst and KeepLast are how many of the first and last rows of each
	// result the control plane may keep with its history; both 0: none.
	KeepFirst, KeepLast int
	// Hide is what introspection leaves out.
	Hide Hide
	// Plans is how much of a statement's plan may be told.
	Plans Plans
	// Functions are globs (NAME or SCHEMA.NAME) of functions that may be called
	// although the mode would refuse them.
	Functions []string
	// Write narrows a read-write source.
	Write Write
	// Masks hide values before they leave the SQL session; the first rule that
	// covers a column counts. MaskFilters is how masked columns may be used
	// beside the result, SafeFunctions are those whose value may be told
	// although they were given a masked one.
	Masks         []Mask
	MaskFilters   Filters
	SafeFunctions []string
}

// Request is what somebody asks of a source. A zero limit means the source's.
type Request struct {
	MaxRows  uint64
	MaxBytes uint64
	Timeout  time.Duration
	// Plan asks for the statement's plan in place of its rows; Analyze for one that
	// it is run for.
	Plan, Analyze bool
}

// Verdict is the answer: Reason says in one line why not when Allowed is
// false; the rest is what to enforce when it is true.
type Verdict struct {
	Allowed  bool
	Reason   string
	MaxRows  uint64
	MaxBytes uint64
	Timeout  time.Duration
	// ReadWrite tells whether the statement may write.
	ReadWrite bool
	// KeepFirst and KeepLast are the source's.
	KeepFirst, KeepLast int
}

// Default is the policy of a source that declares none.
func Default() Source {
	return Source{
		Mode:             ModeReadOnly,
		MaxRows:          DefaultMaxRows,
		MaxBytes:         DefaultMaxBytes,
		StatementTimeout: DefaultStatementTimeout,
		Concurrency:      DefaultConcurrency,
		ClientIdle:       DefaultClientIdle, ClientIdleInTransaction: DefaultClientIdleInTransaction,
		KeepFirst:   DefaultKeepRows,
		KeepLast:    DefaultKeepRows,
		Plans:       PlansOff,
		MaskFilters: FiltersEquality,
	}
}

// Decide holds a request against a source's policy. The limits of the verdict
// are the smaller of the source's and the request's.
func Decide(source Source, request Request) Verdict {
	verdict := Verdict{
		MaxRows:  narrower(source.MaxRows, request.MaxRows),
		MaxBytes: narrower(source.MaxBytes, request.MaxBytes),
		Timeout:  narrower(source.StatementTimeout, request.Timeout),

		KeepFirst: source.KeepFirst, KeepLast: source.KeepLast,
	}
	switch {
	case request.Timeout < 0:
		return Verdict{Reason: fmt.Sprintf("a timeout of %s makes no sense", request.Timeout)}
	case source.MaxRows == 0 || source.MaxBytes == 0 || source.StatementTimeout <= 0 || source.Concurrency < 1:
		return Verdict{Reason: "the data source's policy has no limits: it allows nothing"}
	}
	switch {
	case (request.Plan || request.Analyze) && !slices.Contains([]Plans{PlansStructure, PlansFull, PlansAnalyze}, source.Plans):
		return Verdict{Reason: "plans are refused: the data source's policy says plans: off"}
	case request.Analyze && source.Plans != PlansAnalyze:
		return Verdict{Reason: fmt.Sprintf("running a statement for its plan is refused: the data source's policy says plans: %s", source.Plans)}
	}
	switch source.Mode {
	case ModeMetadata, ModeReadOnly:
	case ModeReadWrite:
		verdict.ReadWrite = true
	default:
		return Verdict{Reason: fmt.Sprintf("mode %q of the data source's policy is not supported by this version", source.Mode)}
	}
	verdict.Allowed = true
	return verdict
}

// narrower returns the smaller limit; a zero wish is no wish.
func narrower[T ~uint64 | ~int64](limit, wish T) T {
	if wish == 0 {
		return limit
	}
	return min(limit, wish)
}
