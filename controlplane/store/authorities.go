package store

import (
	"context"
	"crypto/x509"
	"database/sql"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// InsertAuthority records a CA and its sealed private key. There is at most one
// in state "active": a second is ALREADY_EXISTS.
func (s *Store) InsertAuthority(ctx context.Context, fingerprint string, certificate, sealedKey []byte, state string, now time.Time) error {
	return s.write(ctx, "record a certificate authority", func(tx handle) error {
		master, err := s.sealable(ctx, tx, sealedKey)
		if err != nil {
			return err
		}
		_, err = tx.exec(ctx, "INSERT INTO authorities (fingerprint, certificate, sealed_key, state, created, master) VALUES (?, ?, ?, ?, ?, ?)",
			fingerprint, certificate, sealedKey, state, millis(now), master)
		if isUnique(err) {
			return proto.Errorf(proto.CodeAlreadyExists, "there is an active certificate authority already")
		}
		return err
	})
}

// ListAuthorities lists the CAs that are active or trusted: the active one
// first, then the newest.
func (s *Store) ListAuthorities(ctx context.Context) ([]*posternv1.Authority, error) {
	rows, err := s.reader().query(ctx, `SELECT fingerprint, certificate, state FROM authorities WHERE state IN ('active', 'trusted')
		ORDER BY state, created DESC, fingerprint`)
	return collect(ctx, s, "list certificate authorities", rows, err, func(rows *sql.Rows) (*posternv1.Authority, error) {
		var a posternv1.Authority
		var der []byte
		if err := rows.Scan(&a.Fingerprint, &der, &a.State); err != nil {
			return nil, err
		}
		certificate, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("authority %s in the store: %w", a.Fingerprint, err)
		}
		a.Subject = certificate.Subject.String()
		a.NotBefore, a.NotAfter = stamp(millis(certificate.NotBefore)), stamp(millis(certificate.NotAfter))
		a.Certificate = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
		return &a, nil
	})
}

// SealedAuthorityKey returns a CA's sealed private key.
func (s *Store) SealedAuthorityKey(ctx context.Context, fingerprint string) ([]byte, error) {
	var key []byte
	err := s.reader().row(ctx, "SELECT sealed_key FROM authorities WHERE fingerprint = ?", fingerprint).Scan(&key)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, notFound("certificate authority", fingerprint)
	}
	return key, s.fail(ctx, "read a certificate authority's key", err)
}
