package store

import (
	"context"
	"database/sql"
	"errors"
	"time"
)

const (
	// maxKeptBytes bounds the rows that are kept of an organization's queries, in
	// bytes; the oldest go first.
	maxKeptBytes = 256 << 20
	// pruneKeptEvery is how much may come before that is looked after.
	pruneKeptEvery = 4 << 20
)

// KeepRows keeps the sealed rows of a query of the organization. Rows that are kept
// already stay as they are, and those of a query that is gone are dropped.
func (s *Store) KeepRows(ctx context.Context, org, id string, sealed []byte, now time.Time) error {
	due := s.keptDue(org, len(sealed))
	return s.writeRelaxed(ctx, "keep a query's rows", func(tx handle) error {
		return s.keepRows(ctx, tx, org, id, sealed, now, due)
	})
}

func (s *Store) keepRows(ctx context.Context, tx handle, org, id string, sealed []byte, now time.Time, due bool) error {
	master, err := s.sealable(ctx, tx, sealed)
	if err != nil {
		return err
	}
	if _, err := tx.exec(ctx, `INSERT INTO kept_rows (query, organization, created, size, sealed, master)
		SELECT q.id, q.organization, ?, ?, ?, ? FROM queries q WHERE q.organization = ? AND q.id = ? ON CONFLICT (query) DO NOTHING`,
		millis(now), len(sealed), sealed, master, org, plainText(id)); err != nil || !due {
		return err
	}
	_, err = tx.exec(ctx, `DELETE FROM kept_rows WHERE query IN (SELECT k.query FROM
		(SELECT query, SUM(size) OVER (ORDER BY created DESC, query DESC) AS upto FROM kept_rows WHERE organization = ?) k WHERE k.upto > ?)`,
		org, s.keepBytes)
	return err
}

// keptDue counts what comes, and tells when it is time to look at the bound.
func (s *Store) keptDue(org string, size int) bool {
	s.pruneMu.Lock()
	defer s.pruneMu.Unlock()
	n, known := s.kept[org]
	n += int64(size)
	due := !known || n >= min(pruneKeptEvery, s.keepBytes/16)
	if due {
		n = 0
	}
	s.kept[org] = n
	return due
}

// KeptRows returns the sealed rows of a query of the organization; nil if none are
// kept.
func (s *Store) KeptRows(ctx context.Context, org, id string) ([]byte, error) {
	var sealed []byte
	err := s.reader().row(ctx, "SELECT sealed FROM kept_rows WHERE organization = ? AND query = ?", org, plainText(id)).Scan(&sealed)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	return sealed, s.fail(ctx, "get a query's rows", err)
}
