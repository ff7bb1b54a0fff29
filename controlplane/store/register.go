package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// RegisterAgent takes one use of a registration key and records the agent and
// its first certificate, all or nothing. org is the key's organization and must
// match; agent has its id, its wish for a name and its facts. On success its
// name, labels and time of registration are set: a name that is taken gets the
// first free suffix, -2, -3 and so on. The certificate is pending until it is
// used; publicKey is the SHA-256 of its SubjectPublicKeyInfo.
//
// A key that cannot be used is KEY_REVOKED, KEY_EXPIRED, KEY_USED_UP,
// ORGANIZATION_DISABLED or, if it is gone, KEY_UNKNOWN.
func (s *Store) RegisterAgent(ctx context.Context, org, keyID string, agent *posternv1.Agent,
	serial, authority string, publicKey [32]byte, notAfter, now time.Time,
) error {
	if err := checkName("agent", agent.Name); err != nil {
		return err
	}
	wish := agent.Name
	var name, labels string
	err := s.write(ctx, "register agent", func(tx handle) error {
		// The one statement that counts uses: of two that race for the last, one
		// finds uses < max_uses.
		err := tx.row(ctx, `UPDATE registration_keys SET uses = uses + 1
			WHERE id = ? AND organization = ? AND uses < max_uses AND revoked IS NULL AND expires > ?
			AND EXISTS (SELECT 1 FROM organizations o WHERE o.id = registration_keys.organization AND o.disabled IS NULL)
			RETURNING labels`, plainText(keyID), org, millis(now)).Scan(&labels)
		if errors.Is(err, sql.ErrNoRows) {
			return whyNoUse(ctx, tx, org, keyID, now)
		}
		if err != nil {
			return err
		}
		if name, err = insertAgent(ctx, tx, org, keyID, wish, labels, agent, now); err != nil {
			return err
		}
		_, err = tx.exec(ctx, `INSERT INTO agent_certificates (serial, agent, generation, state, not_after, created, public_key, authority)
			VALUES (?, ?, 1, 'pending', ?, ?, ?, ?)`, serial, agent.Id, millis(notAfter), millis(now), publicKey[:], authority)
		return err
	})
	if err != nil {
		return err
	}
	agent.Name, agent.Registered = name, stamp(millis(now))
	agent.Labels, err = decodeLabels(labels)
	return err
}

func whyNoUse(ctx context.Context, tx handle, org, keyID string, now time.Time) error {
	var r keyRow
	var disabled sql.NullInt64
	err := tx.row(ctx, "SELECT "+keyColumns+`, o.disabled FROM registration_keys k JOIN organizations o ON o.id = k.organization
		WHERE k.id = ? AND k.organization = ?`, plainText(keyID), org).Scan(append(r.into(), &disabled)...)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return proto.Errorf(proto.CodeKeyUnknown, "the control plane does not know this registration key")
	case err != nil:
		return err
	case disabled.Valid:
		return &proto.Error{Code: proto.CodeOrganizationDisabled}
	case r.revoked.Valid:
		return &proto.Error{Code: proto.CodeKeyRevoked}
	case r.expires <= millis(now):
		return &proto.Error{Code: proto.CodeKeyExpired}
	}
	return &proto.Error{Code: proto.CodeKeyUsedUp}
}

// nameAttempts bounds how often a free name is looked for: each attempt fails
// only if another transaction takes the name between our look and our insert.
const nameAttempts = 100

func insertAgent(ctx context.Context, tx handle, org, keyID, wish, labels string, a *posternv1.Agent, now time.Time) (string, error) {
	name := wish
	for range nameAttempts {
		n, err := tx.exec(ctx, `INSERT INTO agents (id, organization, name, labels, software, hostname, os, arch, kernel, remote_address, registered, key_id)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING`,
			a.Id, org, name, labels, plainText(a.Software), plainText(a.Hostname), plainText(a.Os), plainText(a.Arch), plainText(a.Kernel),
			plainText(a.RemoteAddress), millis(now), plainText(keyID))
		if err != nil || n == 1 {
			return name, err
		}
		if name, err = freeName(ctx, tx, org, wish); err != nil {
			return "", err
		}
	}
	return "", proto.Errorf(proto.CodeAlreadyExists, "no free name like %q was found: choose another with --name", wish)
}

// freeName is wish with the lowest suffix that no agent has.
func freeName(ctx context.Context, tx handle, org, wish string) (string, error) {
	const longest = 63 - len("-999999")
	base := wish
	if len(base) > longest {
		base = base[:longest]
	}
	// A name holds neither of LIKE's wildcards.
	rows, err := tx.query(ctx, "SELECT name FROM agents WHERE organization = ? AND revoked IS NULL AND name LIKE ?", org, base+"-%")
	taken := map[string]bool{wish: true}
	names, err := collect(ctx, tx.s, "list agents' names", rows, err, func(rows *sql.Rows) (string, error) {
		var name string
		err := rows.Scan(&name)
		return name, err
	})
	if err != nil {
		return "", err
	}
	for _, name := range names {
		taken[name] = true
	}
	for n := 2; ; n++ {
		if name := fmt.Sprintf("%s-%d", base, n); !taken[name] {
			return name, nil
		}
	}
}
