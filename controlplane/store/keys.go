package store

import (
	"context"
	"database/sql"
	"errors"
	"time"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const keyColumns = "k.id, k.labels, k.max_uses, k.uses, k.created, k.expires, k.revoked, k.created_by"

type keyRow struct {
	k                posternv1.Key
	labels           string
	created, expires int64
	revoked          sql.NullInt64
}

func (r *keyRow) into() []any {
	return []any{&r.k.Id, &r.labels, &r.k.MaxUses, &r.k.Uses, &r.created, &r.expires, &r.revoked, &r.k.CreatedBy}
}

func (r *keyRow) value() (*posternv1.Key, error) {
	var err error
	r.k.Labels, err = decodeLabels(r.labels)
	r.k.Created, r.k.Expires, r.k.Revoked = stamp(r.created), stamp(r.expires), stampOrNil(r.revoked)
	return &r.k, err
}

// InsertKey records a registration key with the SHA-256 of its secret.
func (s *Store) InsertKey(ctx context.Context, org string, k *posternv1.Key, hash [32]byte) error {
	return s.write(ctx, "create registration key", func(tx handle) error {
		_, err := tx.exec(ctx, `INSERT INTO registration_keys (id, organization, hash, labels, max_uses, created, expires, created_by)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?)`,
			k.Id, org, hash[:], encodeLabels(k.Labels), int64(k.MaxUses), millis(k.Created.AsTime()), millis(k.Expires.AsTime()), plainText(k.CreatedBy))
		return err
	})
}

// KeyByID returns a key of any organization, whatever its state, for joining
// alone.
func (s *Store) KeyByID(ctx context.Context, id string) (*posternv1.Organization, *posternv1.Key, [32]byte, error) {
	var o organizationRow
	var r keyRow
	var hash []byte
	err := s.reader().row(ctx, "SELECT "+organizationColumns+", "+keyColumns+`, k.hash
		FROM registration_keys k JOIN organizations o ON o.id = k.organization WHERE k.id = ?`, plainText(id)).
		Scan(append(append(o.into(), r.into()...), &hash)...)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil, [32]byte{}, notFound("registration key", id)
	}
	if err != nil {
		return nil, nil, [32]byte{}, s.fail(ctx, "look up registration key", err)
	}
	sum, err := array32(hash)
	if err != nil {
		return nil, nil, sum, err
	}
	k, err := r.value()
	return o.value(), k, sum, err
}

// ListKeys lists an organization's registration keys, oldest first.
func (s *Store) ListKeys(ctx context.Context, org string) ([]*posternv1.Key, error) {
	rows, err := s.reader().query(ctx, "SELECT "+keyColumns+" FROM registration_keys k WHERE k.organization = ? ORDER BY k.created, k.id", org)
	return collect(ctx, s, "list registration keys", rows, err, func(rows *sql.Rows) (*posternv1.Key, error) {
		var r keyRow
		if err := rows.Scan(r.into()...); err != nil {
			return nil, err
		}
		return r.value()
	})
}

// RevokeKey revokes a registration key. Revoking it again changes nothing. The
// agents that joined with it stay.
func (s *Store) RevokeKey(ctx context.Context, org, id string, now time.Time) (*posternv1.Key, error) {
	var r keyRow
	err := s.write(ctx, "revoke registration key", func(tx handle) error {
		r = keyRow{}
		err := tx.row(ctx, `UPDATE registration_keys SET revoked = coalesce(revoked, ?)
			WHERE organization = ? AND id = ? RETURNING `+bare(keyColumns), millis(now), org, plainText(id)).Scan(r.into()...)
		if errors.Is(err, sql.ErrNoRows) {
			return notFound("registration key", id)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return r.value()
}
