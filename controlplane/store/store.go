package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// Config says where the metadata is. Exactly one of SQLitePath and PostgresDSN
// is set.
type Config struct {
	// SQLitePath is the database file; made with mode 0600 if absent.
	SQLitePath string
	// PostgresDSN is a postgres:// URL or key=value pairs, without a password.
	PostgresDSN string
	// PasswordFile holds PostgreSQL's password; optional. It is read afresh for
	// every new connection, so the password can be changed while we run.
	PasswordFile string
	// MaxConns bounds the connections to PostgreSQL; zero means 16.
	MaxConns int
	// Replica names this control plane process among those that share the store;
	// it must survive a restart. Empty is a name too: that of the only one.
	Replica string
	// HistoryAge is how long queries and their rows are kept; zero means
	// DefaultHistoryAge.
	HistoryAge time.Duration
	// Logger is optional; nil discards.
	Logger *slog.Logger
}

// engine is what differs between the databases.
type engine int

const (
	sqlite engine = iota
	postgres
)

// String is the engine's name for people.
func (e engine) String() string {
	if e == postgres {
		return "postgres"
	}
	return "sqlite"
}

// Store is an open metadata store. Close it once.
type Store struct {
	engine engine
	log    *slog.Logger
	// replica marks the queries of this process.
	replica string
	read    *sql.DB
	// durable syncs every commit to the disk; relaxed survives the death of this
	// process but may lose the last moments in a power failure. With PostgreSQL
	// both are read.
	durable, relaxed *sql.DB
	// writer holds one place: SQLite has one writer at a time. nil for PostgreSQL.
	writer chan struct{}

	rebound sync.Map // statement with ? -> statement with $1

	age     time.Duration // Config.HistoryAge
	keep    int           // queries kept of an organization: maxQueries but in tests
	pruneMu sync.Mutex
	inserts int // queries inserted since the last pruning; guarded by pruneMu
	// keepBytes is maxKeptBytes but in tests; kept counts the bytes of rows since
	// the last pruning, by organization; guarded by pruneMu.
	keepBytes int64
	kept      map[string]int64
	// keepWire is maxWireQueries but in tests; wire counts statements of PostgreSQL
	// clients since the last pruning, by organization; guarded by pruneMu.
	keepWire int
	wire     map[string]int
}

// Open opens the store, checks that it may be used and brings its tables up to
// date. ctx bounds the opening alone. A store that a newer control plane has
// migrated is refused.
func Open(ctx context.Context, cfg Config) (s *Store, err error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.HistoryAge == 0 {
		cfg.HistoryAge = DefaultHistoryAge
	}
	switch {
	case cfg.SQLitePath != "" && cfg.PostgresDSN != "":
		return nil, errors.New("open the metadata store: both SQLite and PostgreSQL were given: choose one")
	case cfg.SQLitePath != "":
		s, err = openSQLite(ctx, cfg)
	case cfg.PostgresDSN != "":
		s, err = openPostgres(ctx, cfg)
	default:
		return nil, errors.New("open the metadata store: neither a SQLite file nor a PostgreSQL address was given")
	}
	if err != nil {
		return nil, err
	}
	s.age = cfg.HistoryAge
	return s, nil
}

// Engine is "sqlite" or "postgres".
func (s *Store) Engine() string { return s.engine.String() }

// Ping reports whether the store answers; for readiness checks.
func (s *Store) Ping(ctx context.Context) error {
	var one int
	err := s.read.QueryRowContext(ctx, "SELECT 1").Scan(&one)
	return s.fail(ctx, "ping the metadata store", err)
}

// Close closes all connections, after the statements that are running.
func (s *Store) Close() error {
	var errs []error
	for i, db := range []*sql.DB{s.relaxed, s.durable, s.read} {
		if db != nil && (i == 2 || db != s.read) {
			errs = append(errs, db.Close())
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close the metadata store: %w", err)
	}
	return nil
}
