package store

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const tokenColumns = "t.id, t.name, t.role, t.created, t.expires, t.revoked, t.last_used"

type tokenRow struct {
	t                          posternv1.Token
	created                    int64
	expires, revoked, lastUsed sql.NullInt64
}

func (r *tokenRow) into() []any {
	return []any{&r.t.Id, &r.t.Name, &r.t.Role, &r.created, &r.expires, &r.revoked, &r.lastUsed}
}

func (r *tokenRow) value() *posternv1.Token {
	r.t.Created, r.t.Expires = stamp(r.created), stampOrNil(r.expires)
	r.t.Revoked, r.t.LastUsed = stampOrNil(r.revoked), stampOrNil(r.lastUsed)
	return &r.t
}

// InsertToken records a token with the SHA-256 of its secret. Its name is unique
// among the organization's tokens that are not revoked: ALREADY_EXISTS.
func (s *Store) InsertToken(ctx context.Context, org string, t *posternv1.Token, hash [32]byte) error {
	if err := checkName("token", t.Name); err != nil {
		return err
	}
	return s.write(ctx, "create token", func(tx handle) error {
		_, err := tx.exec(ctx, "INSERT INTO tokens (id, organization, name, role, hash, created, expires) VALUES (?, ?, ?, ?, ?, ?, ?)",
			t.Id, org, t.Name, t.Role, hash[:], millis(t.Created.AsTime()), optional(t.Expires))
		if isUnique(err) {
			return proto.Errorf(proto.CodeAlreadyExists, "token %q exists already: choose another name, or revoke it first", t.Name)
		}
		return err
	})
}

// TokenByID returns a token of any organization, whatever its state, for
// authentication alone.
func (s *Store) TokenByID(ctx context.Context, id string) (*posternv1.Organization, *posternv1.Token, [32]byte, error) {
	var o organizationRow
	var t tokenRow
	var hash []byte
	err := s.reader().row(ctx, "SELECT "+organizationColumns+", "+tokenColumns+`, t.hash
		FROM tokens t JOIN organizations o ON o.id = t.organization WHERE t.id = ?`, plainText(id)).
		Scan(append(append(o.into(), t.into()...), &hash)...)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil, [32]byte{}, notFound("token", id)
	}
	if err != nil {
		return nil, nil, [32]byte{}, s.fail(ctx, "look up token", err)
	}
	sum, err := array32(hash)
	return o.value(), t.value(), sum, err
}

// ListTokens lists an organization's tokens, oldest first.
func (s *Store) ListTokens(ctx context.Context, org string) ([]*posternv1.Token, error) {
	rows, err := s.reader().query(ctx, "SELECT "+tokenColumns+" FROM tokens t WHERE t.organization = ? ORDER BY t.created, t.id", org)
	return collect(ctx, s, "list tokens", rows, err, func(rows *sql.Rows) (*posternv1.Token, error) {
		var r tokenRow
		err := rows.Scan(r.into()...)
		return r.value(), err
	})
}

// RevokeToken revokes a token, found by id or by name among those not revoked.
// Revoking it again changes nothing.
func (s *Store) RevokeToken(ctx context.Context, org, idOrName string, now time.Time) (*posternv1.Token, error) {
	var r tokenRow
	err := s.write(ctx, "revoke token", func(tx handle) error {
		r = tokenRow{}
		err := tx.row(ctx, `UPDATE tokens SET revoked = coalesce(revoked, ?)
			WHERE organization = ? AND (id = ? OR (name = ? AND revoked IS NULL)) RETURNING `+bare(tokenColumns),
			millis(now), org, plainText(idOrName), plainText(idOrName)).Scan(r.into()...)
		if errors.Is(err, sql.ErrNoRows) {
			return notFound("token", idOrName)
		}
		if err != nil {
			return err
		}
		// Nobody can use its secrets any more.
		if _, err := tx.exec(ctx, "DELETE FROM secrets WHERE organization = ? AND scope = 'own' AND owner = ?", org, r.t.Id); err != nil {
			return err
		}
		_, err = tx.exec(ctx, "DELETE FROM secret_grants WHERE organization = ? AND token = ?", org, r.t.Id)
		return err
	})
	if err != nil {
		return nil, err
	}
	return r.value(), nil
}

// TokenOwner is a token and the organization that it belongs to, by their ids.
type TokenOwner struct{ Organization, Token string }

// TokensRevokedSince lists the tokens that were revoked at or after since, on any
// control plane. Ask with some overlap, since the control planes' clocks differ.
func (s *Store) TokensRevokedSince(ctx context.Context, since time.Time) ([]TokenOwner, error) {
	rows, err := s.reader().query(ctx, "SELECT organization, id FROM tokens WHERE revoked IS NOT NULL AND revoked >= ?", millis(since))
	return collect(ctx, s, "list revoked tokens", rows, err, func(rows *sql.Rows) (TokenOwner, error) {
		var t TokenOwner
		err := rows.Scan(&t.Organization, &t.Token)
		return t, err
	})
}

// TouchToken records that a token was used.
func (s *Store) TouchToken(ctx context.Context, id string, now time.Time) error {
	return s.writeRelaxed(ctx, "record a token's use", func(tx handle) error {
		_, err := tx.exec(ctx, "UPDATE tokens SET last_used = ? WHERE id = ? AND coalesce(last_used, 0) < ?", millis(now), id, millis(now))
		return err
	})
}

// CountAdmins counts an organization's admin tokens that are neither revoked nor
// expired.
func (s *Store) CountAdmins(ctx context.Context, org string, now time.Time) (int, error) {
	var n int
	err := s.reader().row(ctx, `SELECT count(*) FROM tokens
		WHERE organization = ? AND role = 'admin' AND revoked IS NULL AND (expires IS NULL OR expires > ?)`, org, millis(now)).Scan(&n)
	return n, s.fail(ctx, "count admin tokens", err)
}
