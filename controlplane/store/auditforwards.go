package store

import (
	"context"
	"database/sql"
	"errors"

	"github.com/postern-dev/postern/proto/auditchain"
)

// AuditForwarded is up to which entry a destination has an organization's chain; zero: nothing.
func (s *Store) AuditForwarded(ctx context.Context, destination, org string) (auditchain.Head, error) {
	var sequence int64
	var hash []byte
	err := s.reader().row(ctx, "SELECT sequence, hash FROM audit_forwards WHERE destination = ? AND organization = ?", destination, org).Scan(&sequence, &hash)
	if errors.Is(err, sql.ErrNoRows) {
		return auditchain.Head{}, nil
	}
	if err != nil {
		return auditchain.Head{}, s.fail(ctx, "read how far the audit log was forwarded", err)
	}
	sum, err := array32(hash)
	return auditchain.Head{Sequence: uint64(sequence), Hash: sum}, err
}

// SetAuditForwarded records that.
func (s *Store) SetAuditForwarded(ctx context.Context, destination, org string, h auditchain.Head) error {
	return s.write(ctx, "record how far the audit log was forwarded", func(tx handle) error {
		_, err := tx.exec(ctx, `INSERT INTO audit_forwards (destination, organization, sequence, hash) VALUES (?, ?, ?, ?)
			ON CONFLICT (destination, organization) DO UPDATE SET sequence = excluded.sequence, hash = excluded.hash`,
			destination, org, int64(h.Sequence), h.Hash[:])
		return err
	})
}

// AuditWaiting are the ids of the organizations of whose chains a destination lacks something.
func (s *Store) AuditWaiting(ctx context.Context, destination string) ([]string, error) {
	rows, err := s.reader().query(ctx, `SELECT h.organization FROM audit_heads h
		LEFT JOIN audit_forwards f ON f.organization = h.organization AND f.destination = ?
		WHERE f.hash IS NULL OR f.hash <> h.hash ORDER BY h.organization`, destination)
	return collect(ctx, s, "read how far the audit logs were forwarded", rows, err, func(rows *sql.Rows) (string, error) {
		var one string
		err := rows.Scan(&one)
		return one, err
	})
}
