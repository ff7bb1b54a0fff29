package store

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// ActivateAuthority makes a trusted CA the active one, and the active one trusted. It is done when
// it is active already; a CA that is retired or unknown is NOT_FOUND.
func (s *Store) ActivateAuthority(ctx context.Context, fingerprint string) error {
	return s.write(ctx, "activate a certificate authority", func(tx handle) error {
		var state string
		err := tx.row(ctx, "SELECT state FROM authorities WHERE fingerprint = ? AND state <> 'retired'", fingerprint).Scan(&state)
		switch {
		case errors.Is(err, sql.ErrNoRows):
			return notFound("certificate authority", fingerprint)
		case err != nil || state == "active":
			return err
		}
		if _, err := tx.exec(ctx, "UPDATE authorities SET state = 'trusted' WHERE state = 'active'"); err != nil {
			return err
		}
		_, err = tx.exec(ctx, "UPDATE authorities SET state = 'active' WHERE fingerprint = ? AND state = 'trusted'", fingerprint)
		return err
	})
}

// RetireAuthority ends the trust in a CA that is not active, and removes its private key. It is
// done when it is retired already.
func (s *Store) RetireAuthority(ctx context.Context, fingerprint string) error {
	return s.write(ctx, "retire a certificate authority", func(tx handle) error {
		n, err := tx.exec(ctx, "UPDATE authorities SET state = 'retired', sealed_key = ? WHERE fingerprint = ? AND state <> 'active'", []byte{}, fingerprint)
		if err == nil && n == 0 {
			return proto.Errorf(proto.CodeInvalid, "the certificate authority %s is active, or none of this control plane's", fingerprint)
		}
		return err
	})
}

// CertificateAuthority returns which CA issued an agent's certificate; empty if it is not known.
func (s *Store) CertificateAuthority(ctx context.Context, serial string) (string, error) {
	var authority sql.NullString
	err := s.reader().row(ctx, "SELECT authority FROM agent_certificates WHERE serial = ?", serial).Scan(&authority)
	if errors.Is(err, sql.ErrNoRows) {
		return "", notFound("certificate", serial)
	}
	return authority.String, s.fail(ctx, "read a certificate's authority", err)
}

// behind are agents of which the certificate in use, or the only one, is not of an authority, and
// ended after a time: later they could not come back with it anyway.
const behind = `FROM agent_certificates c JOIN agents a ON a.id = c.agent JOIN organizations o ON o.id = a.organization
	WHERE c.state <> 'retired' AND c.not_after > ? AND a.revoked IS NULL AND coalesce(c.authority, '') <> ?
	AND NOT EXISTS (SELECT 1 FROM agent_certificates d WHERE d.agent = c.agent AND d.state = 'active' AND d.serial <> c.serial)`

// AgentsBehind lists agents whose certificate is of another CA than this one and ends after a time,
// at most limit, by organization and name; and how many there are. All organizations' are in it:
// it is for those who run the installation.
func (s *Store) AgentsBehind(ctx context.Context, authority string, after time.Time, limit int) ([]*posternv1.AgentOfAuthority, uint64, error) {
	var total int64
	if err := s.reader().row(ctx, "SELECT count(DISTINCT a.id) "+behind, millis(after), authority).Scan(&total); err != nil {
		return nil, 0, s.fail(ctx, "count agents of an authority", err)
	}
	rows, err := s.reader().query(ctx, "SELECT o.name, a.name, a.id, coalesce(min(c.authority), ''), a.last_seen, max(c.not_after) "+behind+`
		GROUP BY o.name, a.name, a.id, a.last_seen ORDER BY o.name, a.name LIMIT ?`, millis(after), authority, limit)
	list, err := collect(ctx, s, "list agents of an authority", rows, err, func(rows *sql.Rows) (*posternv1.AgentOfAuthority, error) {
		var a posternv1.AgentOfAuthority
		var seen sql.NullInt64
		var end int64
		err := rows.Scan(&a.Organization, &a.Agent, &a.AgentId, &a.Authority, &seen, &end)
		a.LastSeen, a.CertificateExpires = stampOrNil(seen), stamp(end)
		return &a, err
	})
	return list, uint64(total), err
}

// UsableKeysBefore counts registration keys of all organizations that were made before a time and
// can still be used.
func (s *Store) UsableKeysBefore(ctx context.Context, before, now time.Time) (uint64, error) {
	var n int64
	err := s.reader().row(ctx, "SELECT count(*) FROM registration_keys WHERE created < ? AND expires > ? AND revoked IS NULL AND uses < max_uses",
		millis(before), millis(now)).Scan(&n)
	return uint64(n), s.fail(ctx, "count registration keys", err)
}
