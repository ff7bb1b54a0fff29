package store

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/postern-dev/postern/proto"
)

// States of an agent's certificate. A new one is pending until it is used; then
// it becomes active and all before it are retired.
const (
	CertificatePending = "pending"
	CertificateActive  = "active"
	CertificateRetired = "retired"
)

// maxPending bounds an agent's certificates that were issued and never used: the
// oldest beyond it are retired.
const maxPending = 8

// IdentityState returns the state of an agent's certificate, when it ends, and
// when it was retired, if it was. ORGANIZATION_DISABLED and AGENT_REVOKED are
// errors; an agent, organization and serial that do not belong together are
// NOT_FOUND.
func (s *Store) IdentityState(ctx context.Context, org, agent, serial string) (state string, notAfter, retired time.Time, err error) {
	var end int64
	var disabled, revoked, gone sql.NullInt64
	err = s.reader().row(ctx, `SELECT c.state, c.not_after, c.retired, o.disabled, a.revoked FROM agent_certificates c
		JOIN agents a ON a.id = c.agent JOIN organizations o ON o.id = a.organization
		WHERE c.serial = ? AND a.id = ? AND o.id = ?`, serial, agent, org).Scan(&state, &end, &gone, &disabled, &revoked)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return "", notAfter, retired, notFound("agent", agent)
	case err != nil:
		return "", notAfter, retired, s.fail(ctx, "check an agent's identity", err)
	case disabled.Valid:
		return "", notAfter, retired, &proto.Error{Code: proto.CodeOrganizationDisabled}
	case revoked.Valid:
		return "", notAfter, retired, &proto.Error{Code: proto.CodeAgentRevoked}
	}
	if gone.Valid {
		retired = time.UnixMilli(gone.Int64).UTC()
	}
	return state, time.UnixMilli(end).UTC(), retired, nil
}

// InsertCertificate records a further certificate of an agent, pending. The
// agent must not be revoked (AGENT_REVOKED) and belong to org (NOT_FOUND).
// authority is the fingerprint of the one that issued it.
// Certificates that expired before forget are forgotten.
func (s *Store) InsertCertificate(ctx context.Context, org, agent, serial, authority string, publicKey [32]byte, notAfter, now, forget time.Time) error {
	return s.write(ctx, "record a certificate", func(tx handle) error {
		var revoked sql.NullInt64
		// Takes the row's lock in PostgreSQL, so that generations do not collide.
		err := tx.row(ctx, "UPDATE agents SET key_id = key_id WHERE id = ? AND organization = ? RETURNING revoked", agent, org).Scan(&revoked)
		switch {
		case errors.Is(err, sql.ErrNoRows):
			return notFound("agent", agent)
		case err != nil:
			return err
		case revoked.Valid:
			return &proto.Error{Code: proto.CodeAgentRevoked}
		}
		var generation int64
		if err := tx.row(ctx, "SELECT coalesce(max(generation), 0) + 1 FROM agent_certificates WHERE agent = ?", agent).Scan(&generation); err != nil {
			return err
		}
		if _, err := tx.exec(ctx, `INSERT INTO agent_certificates (serial, agent, generation, state, not_after, created, public_key, authority)
			VALUES (?, ?, ?, 'pending', ?, ?, ?, ?)`, serial, agent, generation, millis(notAfter), millis(now), publicKey[:], authority); err != nil {
			return err
		}
		if _, err := tx.exec(ctx, `UPDATE agent_certificates SET state = 'retired', retired = ? WHERE agent = ? AND state = 'pending'
			AND generation <= ?`, millis(now), agent, generation-maxPending); err != nil {
			return err
		}
		_, err = tx.exec(ctx, "DELETE FROM agent_certificates WHERE agent = ? AND state = 'retired' AND not_after < ?", agent, millis(forget))
		return err
	})
}

// ConfirmCertificate makes a pending certificate active and retires all that
// were issued before it. It reports whether it changed anything: an active one
// is confirmed already, a retired one cannot be.
func (s *Store) ConfirmCertificate(ctx context.Context, agent, serial string, now time.Time) (bool, error) {
	var changed bool
	err := s.write(ctx, "confirm a certificate", func(tx handle) error {
		changed = false
		// As above: one confirmation of an agent at a time.
		if _, err := tx.exec(ctx, "UPDATE agents SET key_id = key_id WHERE id = ?", agent); err != nil {
			return err
		}
		var generation int64
		var state string
		err := tx.row(ctx, "SELECT generation, state FROM agent_certificates WHERE serial = ? AND agent = ?", serial, agent).Scan(&generation, &state)
		if errors.Is(err, sql.ErrNoRows) {
			return notFound("certificate", serial)
		}
		if err != nil || state != CertificatePending {
			return err
		}
		if _, err := tx.exec(ctx, "UPDATE agent_certificates SET state = 'retired', retired = ? WHERE agent = ? AND state <> 'retired' AND generation < ?", millis(now), agent, generation); err != nil {
			return err
		}
		n, err := tx.exec(ctx, "UPDATE agent_certificates SET state = 'active' WHERE serial = ? AND state = 'pending'", serial)
		changed = n == 1
		return err
	})
	return changed, err
}
