package store

import (
	"context"
	"database/sql"
	"errors"
	"time"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// RotateToken gives a token, found by id or by name among those not revoked, another
// secret, of this hash. The secret of before is good until formerUntil, or until the token
// would have ended; one that a rotation before that left good ends. The token ends at expires from
// now on, but one without end keeps having none if endless is set. It returns the token and
// when the secret of before ends; NOT_FOUND for one that is revoked, too.
func (s *Store) RotateToken(ctx context.Context, org, idOrName string, hash [32]byte, formerUntil, expires time.Time, endless bool) (*posternv1.Token, time.Time, error) {
	var row tokenRow
	var until int64
	err := s.write(ctx, "rotate token", func(tx handle) error {
		row = tokenRow{}
		err := tx.row(ctx, `UPDATE tokens SET former_hash = hash, hash = ?,
			former_until = CASE WHEN expires < CAST(? AS BIGINT) THEN expires ELSE CAST(? AS BIGINT) END,
			expires = CASE WHEN expires IS NULL AND CAST(? AS BIGINT) = 1 THEN NULL ELSE CAST(? AS BIGINT) END
			WHERE organization = ? AND (id = ? OR name = ?) AND revoked IS NULL RETURNING `+bare(tokenColumns)+", former_until",
			hash[:], millis(formerUntil), millis(formerUntil), boolInt(endless), millis(expires),
			org, plainText(idOrName), plainText(idOrName)).Scan(append(row.into(), &until)...)
		if errors.Is(err, sql.ErrNoRows) {
			return notFound("token", idOrName)
		}
		return err
	})
	if err != nil {
		return nil, time.Time{}, err
	}
	return row.value(), time.UnixMilli(until).UTC(), nil
}

// FormerSecret returns the SHA-256 of the secret that a token had before its last rotation,
// and when it ends; zero values if there is no such token or secret.
func (s *Store) FormerSecret(ctx context.Context, id string) (hash [32]byte, until time.Time, err error) {
	var sum []byte
	var ms sql.NullInt64
	err = s.reader().row(ctx, "SELECT former_hash, former_until FROM tokens WHERE id = ?", plainText(id)).Scan(&sum, &ms)
	if errors.Is(err, sql.ErrNoRows) || err == nil && (!ms.Valid || sum == nil) {
		return hash, until, nil
	}
	if err != nil {
		return hash, until, s.fail(ctx, "look up token", err)
	}
	hash, err = array32(sum)
	return hash, time.UnixMilli(ms.Int64).UTC(), err
}
