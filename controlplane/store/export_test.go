package store

import (
	"context"
	"database/sql"
	"fmt"
)

// Seams for tests alone.

// HasPassword is hasPassword.
var HasPassword = hasPassword

// KeepQueries replaces maxQueries.
func (s *Store) KeepQueries(n int) { s.keep = n }

// KeepWireQueries does it for statements of PostgreSQL clients.
func (s *Store) KeepWireQueries(n int) { s.keepWire = n }

// KeepBytes replaces maxKeptBytes.
func (s *Store) KeepBytes(n int64) { s.keepBytes = n }

// LimitPages makes a SQLite store full: the file may not grow beyond its present
// size and some pages.
func (s *Store) LimitPages(ctx context.Context, more int) error {
	var pages int
	if err := s.durable.QueryRowContext(ctx, "PRAGMA page_count").Scan(&pages); err != nil {
		return err
	}
	limit := fmt.Sprintf("PRAGMA max_page_count = %d", pages+more)
	if _, err := s.durable.ExecContext(ctx, limit); err != nil {
		return err
	}
	_, err := s.relaxed.ExecContext(ctx, limit)
	return err
}

// Fail is fail.
func (s *Store) Fail(ctx context.Context, op string, err error) error { return s.fail(ctx, op, err) }

// Exec runs any statement.
func (s *Store) Exec(ctx context.Context, statement string) error {
	_, err := s.durable.ExecContext(ctx, statement)
	return err
}

// Pragmas reads a setting of the durable, the relaxed and the reading
// connections.
func (s *Store) Pragmas(ctx context.Context, name string) ([3]string, error) {
	var values [3]string
	for i, db := range []*sql.DB{s.durable, s.relaxed, s.read} {
		if err := db.QueryRowContext(ctx, "PRAGMA "+name).Scan(&values[i]); err != nil {
			return values, err
		}
	}
	return values, nil
}
