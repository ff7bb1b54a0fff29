package sqlsession

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/child"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// ChildArg is the first argument of a SQL session's process by default.
const ChildArg = "sql-session"

// ChildMain is the main of a SQL session's process; it returns the exit code.
// agentd's main calls it before anything else when os.Args[1] is ChildArg.
func ChildMain() int { return child.Main() }

// PasswordFunc reads a password; called afresh for each connection. Its error
// is shown to the caller of the statement and must hold no secret.
type PasswordFunc func(context.Context) (string, error)

// Login is a database user that is made for us and lasts for a while.
type Login struct {
	User, Password string
	// Expiring is closed when the user ends soon: idle sessions of it end then.
	Expiring <-chan struct{}
	// Release is called once, when the session that got it has ended.
	Release func()
}

// LoginFunc returns a user for a new connection. Its error is shown as a
// PasswordFunc's.
type LoginFunc func(context.Context) (Login, error)

// Source is one data source.
type Source struct {
	Name string
	// Engine is "postgres", "mysql", which is MariaDB's, too, or "sqlite".
	Engine string
	// DSN names host, database, user and TLS, never a password: see ValidateDSN.
	DSN string
	// Password is optional; nil means that the server asks for none. Login is
	// used instead of it and of the DSN's user, when it is set.
	Password PasswordFunc
	Login    LoginFunc
	// MaxRows, MaxBytes and StatementTimeout bound every statement whatever
	// the request says; 0 means DefaultMaxRows and so on.
	MaxRows          uint64
	MaxBytes         uint64
	StatementTimeout time.Duration
	// Concurrency is how many statements run at once; 0 means 8.
	Concurrency int
	// WireIdle and WireIdleInTransaction are how long a session of PostgreSQL's own
	// protocol waits for its client's next message, outside and inside of a transaction;
	// 0 means DefaultWireIdle and DefaultWireIdleInTransaction.
	WireIdle, WireIdleInTransaction time.Duration
	// ReadWrite tells whether requests may write. A request that wants to and
	// may not is refused.
	ReadWrite bool
	// Guard is what the processes enforce on each statement; a change counts
	// from the next statement on. An empty Mode means read-only, or read-write
	// with ReadWrite.
	Guard Guard
}

// Guard is the part of a source's policy that a SQL session's process
// enforces; Mask is one of its rules.
type (
	Guard = frame.Guard
	Mask  = frame.Mask
)

// What holds where a Source is silent.
const (
	DefaultMaxRows          uint64 = 1_000_000
	DefaultMaxBytes         uint64 = 1 << 30
	DefaultStatementTimeout        = 5 * time.Minute
	DefaultConcurrency             = 8
	// DefaultMemory leaves room for values of a gigabyte, which is PostgreSQL's limit and
	// of which there are up to three copies for a moment.
	DefaultMemory = 4 << 30
)

// Config is how sessions are run.
type Config struct {
	// Executable is the program to start; "" means /proc/self/exe, which is
	// ours even after an upgrade has replaced the file.
	Executable string
	// ChildArgs are its arguments; nil means ChildArg alone.
	ChildArgs []string
	// UIDBase is the first of UIDCount user and group ids that sessions get
	// when we are root, and the Manager's own Parser has two from 256
	// behind them on; 0 means 1,900,000,000 and 65,536. No account may have
	// one of them.
	UIDBase  int
	UIDCount int
	// Warm is how many connected processes without an owner are kept for each
	// source in use; 0 means 1, below 0 none.
	Warm int
	// IdleTimeout is how long a process waits for its owner's next statement;
	// 0 means 60 s. Warm ones wait ten times as long for the source's.
	IdleTimeout time.Duration
	// QueueTimeout is how long a statement waits for a place when Concurrency
	// are running; 0 means 5 s. Then it fails with OVERLOADED.
	QueueTimeout time.Duration
	// Parser parses statements; the caller ends it, after Close. nil means one of
	// the Manager's own, started with the first source.
	Parser *Parser
	// NoParser leaves the Manager without one: for checks alone, as every
	// statement is refused.
	NoParser bool
	// SessionsPerOwner is how many sessions that stay open an owner may have; 0
	// means 8.
	SessionsPerOwner int
	// IdleTransaction is how long a transaction in one may be idle before it is
	// rolled back; 0 means 5 min.
	IdleTransaction time.Duration
	// Memory bounds what a session's process takes, in bytes, by a control group of its own (package cgroup),
	// which also bounds its threads to 64; 0 means DefaultMemory. What the host has no
	// controller for is not enforced, and logged once; nothing is where we are not root.
	Memory int64
	// Hold is the directory for what sessions that stay need to outlive agentd, made
	// if it is not there: it must survive agentd and not the host. "": they end with
	// the Manager. HoldGrace is how long they wait for the next one; 0 means
	// DefaultHoldGrace.
	Hold      string
	HoldGrace time.Duration
	// Logger is optional; nil discards.
	Logger *slog.Logger
	// Metrics is optional.
	Metrics *Metrics
}

func (c Config) withDefaults() Config {
	if c.Executable == "" {
		c.Executable = "/proc/self/exe"
	}
	if c.ChildArgs == nil {
		c.ChildArgs = []string{ChildArg}
	}
	if c.UIDBase == 0 {
		c.UIDBase = 1_900_000_000
	}
	if c.UIDCount == 0 {
		c.UIDCount = 65_536
	}
	if c.Warm == 0 {
		c.Warm = 1
	}
	c.Warm = max(c.Warm, 0)
	if c.IdleTimeout == 0 {
		c.IdleTimeout = time.Minute
	}
	if c.QueueTimeout == 0 {
		c.QueueTimeout = 5 * time.Second
	}
	if c.SessionsPerOwner == 0 {
		c.SessionsPerOwner = 8
	}
	if c.IdleTransaction == 0 {
		c.IdleTransaction = 5 * time.Minute
	}
	if c.Memory == 0 {
		c.Memory = DefaultMemory
	}
	if c.HoldGrace == 0 {
		c.HoldGrace = DefaultHoldGrace
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = NewMetrics(nil)
	}
	return c
}

func (s Source) withDefaults() Source {
	if s.MaxRows == 0 {
		s.MaxRows = DefaultMaxRows
	}
	if s.MaxBytes == 0 {
		s.MaxBytes = DefaultMaxBytes
	}
	if s.StatementTimeout == 0 {
		s.StatementTimeout = DefaultStatementTimeout
	}
	if s.Concurrency == 0 {
		s.Concurrency = DefaultConcurrency
	}
	if s.Guard.Mode == "" {
		s.Guard.Mode = "read-only"
		if s.ReadWrite {
			s.Guard.Mode = "read-write"
		}
	}
	return s
}

// ValidateDSN checks a data source's engine and connection string without
// connecting. The error is one line and shows no password.
func ValidateDSN(engine, dsn string) error {
	var err error
	switch engine {
	case "postgres":
		_, err = child.ParseDSN(dsn)
	case "mysql":
		_, err = child.ParseMySQLDSN(dsn)
	case "sqlite":
		_, err = child.ParseSQLiteDSN(dsn)
	default:
		return fmt.Errorf("engine %q is none of postgres, mysql, sqlite", engine)
	}
	return err
}

// Request is one statement. Zero limits mean the source's; larger ones are cut
// to them.
type Request struct {
	// QueryID names the statement for Cancel; unique among those running.
	QueryID string
	Source  string
	// Owner is on whose behalf it runs. Processes are kept for an owner's next
	// statement; "" means that none is.
	Owner string
	// Session is one that OpenSession opened for Owner on Source; "" is none.
	Session    string
	SQL        string
	Parameters []*posternv1.Parameter
	MaxRows    uint64
	MaxBytes   uint64
	Timeout    time.Duration
	// ReadWrite runs the statement in a transaction that may write and is
	// committed; else the server holds the transaction read-only and it is
	// rolled back.
	ReadWrite bool
	// Explain asks for the statement's plan in place of its rows: "plan" without
	// running it, "analyze" with what running it took. HypotheticalIndexes are
	// CREATE INDEX statements as if which the plan is; at most 20.
	Explain             string
	HypotheticalIndexes []string
	// KeepFirst and KeepLast are how many of the first and last rows Kept is
	// called with, once, before Run returns, if the statement has rows; also
	// when it ends early. Both 0: it is not called.
	KeepFirst, KeepLast int
	Kept                func(*posternv1.KeptRows)
}

// narrower returns the smaller of a limit and a wish; 0 is no wish.
func narrower[T ~uint64 | ~int64](limit, wish T) T {
	if wish <= 0 {
		return limit
	}
	return min(limit, wish)
}
