package store

import (
	"context"
	"database/sql"
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// querier is what *sql.DB and *sql.Tx have in common.
type querier interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
	PrepareContext(ctx context.Context, query string) (*sql.Stmt, error)
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// insertBatch is how many rows one INSERT has.
const insertBatch = 100

// handle runs statements written with ? on either engine.
type handle struct {
	s *Store
	q querier
}

func (h handle) exec(ctx context.Context, query string, args ...any) (int64, error) {
	result, err := h.q.ExecContext(ctx, h.s.rebind(query), args...)
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

// insert runs "INSERT ... VALUES (?, ...)" for many rows, whose values follow each
// other: row by row where that costs no round trip, else many in one statement. tail
// follows the values.
func (h handle) insert(ctx context.Context, head string, columns int, tail string, values []any) error {
	row := "(" + strings.TrimSuffix(strings.Repeat("?, ", columns), ", ") + ")"
	if h.s.engine == sqlite {
		statement, err := h.q.PrepareContext(ctx, head+row+tail)
		if err != nil {
			return err
		}
		defer func() { _ = statement.Close() }()
		for ; len(values) > 0; values = values[columns:] {
			if _, err := statement.ExecContext(ctx, values[:columns]...); err != nil {
				return err
			}
		}
		return nil
	}
	for len(values) > 0 {
		n := min(len(values)/columns, insertBatch)
		if _, err := h.exec(ctx, head+strings.TrimSuffix(strings.Repeat(row+", ", n), ", ")+tail, values[:n*columns]...); err != nil {
			return err
		}
		values = values[n*columns:]
	}
	return nil
}

func (h handle) query(ctx context.Context, query string, args ...any) (*sql.Rows, error) {
	return h.q.QueryContext(ctx, h.s.rebind(query), args...)
}

func (h handle) row(ctx context.Context, query string, args ...any) *sql.Row {
	return h.q.QueryRowContext(ctx, h.s.rebind(query), args...)
}

// reader runs single statements outside a transaction.
func (s *Store) reader() handle { return handle{s, s.read} }

// rebind numbers the placeholders for PostgreSQL. Statements hold no ? but these.
func (s *Store) rebind(query string) string {
	if s.engine == sqlite {
		return query
	}
	if cached, ok := s.rebound.Load(query); ok {
		return cached.(string)
	}
	var b strings.Builder
	n := 0
	for i := range len(query) {
		if query[i] != '?' {
			b.WriteByte(query[i])
			continue
		}
		n++
		b.WriteByte('$')
		b.WriteString(strconv.Itoa(n))
	}
	// The cache is bounded by the number of statements in the source: the few of
	// variable length come in a handful of lengths.
	s.rebound.Store(query, b.String())
	return b.String()
}

// write runs f in a transaction that is on the disk when write returns nil.
// op names it in errors. f may run more than once.
func (s *Store) write(ctx context.Context, op string, f func(tx handle) error) error {
	return s.fail(ctx, op, s.transact(ctx, s.durable, f))
}

// writeRelaxed is write for what a power failure may take back by some moments:
// it waits for no disk. The death of this process loses nothing.
func (s *Store) writeRelaxed(ctx context.Context, op string, f func(tx handle) error) error {
	return s.fail(ctx, op, s.transact(ctx, s.relaxed, func(tx handle) error {
		if s.engine == postgres {
			if _, err := tx.exec(ctx, "SET LOCAL synchronous_commit = off"); err != nil {
				return err
			}
		}
		return f(tx)
	}))
}

// transactAttempts bounds how often a transaction that lost a race in PostgreSQL
// is run again.
const transactAttempts = 10

func (s *Store) transact(ctx context.Context, db *sql.DB, f func(tx handle) error) error {
	if s.writer != nil {
		select {
		case s.writer <- struct{}{}:
			defer func() { <-s.writer }()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	var err error
	for attempt := range transactAttempts {
		if err = s.once(ctx, db, f); !lostRace(err) {
			return err
		}
		select {
		case <-time.After(time.Duration(attempt+1) * 5 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
	return err
}

func (s *Store) once(ctx context.Context, db *sql.DB, f func(tx handle) error) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err := f(handle{s, tx}); err != nil {
		_ = tx.Rollback() // the first error is the one to tell
		return err
	}
	return tx.Commit()
}

// lostRace reports a serialization failure or a deadlock: nothing was done, and
// doing it again is safe.
func lostRace(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && (pg.Code == "40001" || pg.Code == "40P01")
}
