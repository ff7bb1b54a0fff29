package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/postern-dev/postern/controlplane/masterkey"
	"github.com/postern-dev/postern/proto"
)

// States of a master key, in the order in which it has them.
const (
	// MasterAnnounced seals nothing yet: each control plane is to have it first.
	MasterAnnounced = "announced"
	// MasterActive seals; there is one.
	MasterActive = "active"
	// MasterOld opens what it sealed, which is sealed anew meanwhile.
	MasterOld = "old"
	// MasterClosed seals nothing, and nothing that it seals may be written any more.
	MasterClosed = "closed"
	// MasterRetired is gone for good.
	MasterRetired = "retired"
)

// MasterKey is what the store knows of a master key.
type MasterKey struct {
	ID, State string
	// Since is when it came into its state.
	Made, Since time.Time
}

// MasterKeys are all that there ever were, the oldest first.
func (s *Store) MasterKeys(ctx context.Context) ([]MasterKey, error) {
	rows, err := s.reader().query(ctx, "SELECT id, state, made, since FROM master_keys ORDER BY made, id")
	return collect(ctx, s, "list master keys", rows, err, func(rows *sql.Rows) (MasterKey, error) {
		var k MasterKey
		var made, since int64
		err := rows.Scan(&k.ID, &k.State, &made, &since)
		k.Made, k.Since = time.UnixMilli(made).UTC(), time.UnixMilli(since).UTC()
		return k, err
	})
}

// FirstMasterKey notes which master key seals in an installation that has not noted any; else it changes nothing.
func (s *Store) FirstMasterKey(ctx context.Context, id string, now time.Time) error {
	return s.write(ctx, "note the master key", func(tx handle) error {
		_, err := tx.exec(ctx, "INSERT INTO master_keys (id, state, made, since) SELECT ?, 'active', ?, ? WHERE NOT EXISTS (SELECT 1 FROM master_keys) ON CONFLICT DO NOTHING",
			id, millis(now), millis(now))
		return err
	})
}

// AnnounceMasterKey begins a rotation. ALREADY_EXISTS means that one is under way.
func (s *Store) AnnounceMasterKey(ctx context.Context, id string, now time.Time) error {
	return s.write(ctx, "announce a master key", func(tx handle) error {
		// The row that everybody changes first keeps a second rotation out, in PostgreSQL too.
		n, err := tx.exec(ctx, "UPDATE master_keys SET since = since WHERE state = 'active'")
		if err != nil {
			return err
		}
		var busy int
		if err := tx.row(ctx, "SELECT count(*) FROM master_keys WHERE state IN ('announced', 'old', 'closed')").Scan(&busy); err != nil {
			return err
		}
		if n != 1 || busy > 0 {
			return proto.Errorf(proto.CodeAlreadyExists, "a rotation of the master key is under way")
		}
		_, err = tx.exec(ctx, "INSERT INTO master_keys (id, state, made, since) VALUES (?, 'announced', ?, ?)", id, millis(now), millis(now))
		if isUnique(err) {
			return proto.Errorf(proto.CodeInvalid, "the master key %s was used before", id)
		}
		return err
	})
}

// ActivateMasterKey has the announced key seal from now on, and the one before be old. It reports whether it did: a
// key that is not announced any more stays as it is.
func (s *Store) ActivateMasterKey(ctx context.Context, id string, now time.Time) (done bool, err error) {
	err = s.write(ctx, "activate a master key", func(tx handle) error {
		done = false
		n, err := tx.exec(ctx, "UPDATE master_keys SET since = since WHERE id = ? AND state = 'announced'", id)
		if err != nil || n == 0 {
			return err
		}
		if _, err := tx.exec(ctx, "UPDATE master_keys SET state = 'old', since = ? WHERE state = 'active'", millis(now)); err != nil {
			return err
		}
		done = true
		_, err = tx.exec(ctx, "UPDATE master_keys SET state = 'active', since = ? WHERE id = ?", millis(now), id)
		return err
	})
	return done, err
}

// CancelMasterKey retires the key that is announced, which has sealed nothing, and returns its id; empty if none is
// announced. It excludes ActivateMasterKey: whichever comes first changes the row, the other one finds it changed.
func (s *Store) CancelMasterKey(ctx context.Context, now time.Time) (id string, err error) {
	err = s.write(ctx, "call the rotation of the master key off", func(tx handle) error {
		id = ""
		err := tx.row(ctx, "UPDATE master_keys SET state = 'retired', since = ? WHERE state = 'announced' RETURNING id", millis(now)).Scan(&id)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		if err != nil {
			return err
		}
		left, err := sealedBy(ctx, tx, id)
		if err == nil && left > 0 {
			err = proto.Errorf(proto.CodeInvalid, "the master key %s has sealed %d things already: the rotation can only go on", id, left)
		}
		return err
	})
	return id, err
}

// sealedBy counts what a master key seals.
func sealedBy(ctx context.Context, tx handle, id string) (left int, err error) {
	for _, kind := range sealedKinds {
		var n int
		if err := tx.row(ctx, "SELECT count(*) FROM "+kind.table+" WHERE master = ?"+kind.but, id).Scan(&n); err != nil {
			return 0, err
		}
		left += n
	}
	return left, nil
}

// CloseMasterKey keeps what an old key seals from being written, if there is nothing of it left, and reports
// whether it is closed.
func (s *Store) CloseMasterKey(ctx context.Context, id string, now time.Time) (done bool, err error) {
	return s.endMasterKey(ctx, id, MasterOld, MasterClosed, now)
}

// RetireMasterKey ends a closed key for good, if nothing is sealed by it, and reports whether it did. If
// something is after all, by a transaction that began before the key was closed, it is old again.
func (s *Store) RetireMasterKey(ctx context.Context, id string, now time.Time) (done bool, err error) {
	return s.endMasterKey(ctx, id, MasterClosed, MasterRetired, now)
}

func (s *Store) endMasterKey(ctx context.Context, id, from, to string, now time.Time) (done bool, err error) {
	err = s.write(ctx, "end a master key", func(tx handle) error {
		done = false
		n, err := tx.exec(ctx, "UPDATE master_keys SET since = since WHERE id = ? AND state = ?", id, from)
		if err != nil || n == 0 {
			return err
		}
		left, err := sealedBy(ctx, tx, id)
		if err != nil {
			return err
		}
		state := to
		if left > 0 {
			state = MasterOld
		}
		done = left == 0
		if state == from {
			return nil
		}
		_, err = tx.exec(ctx, "UPDATE master_keys SET state = ?, since = ? WHERE id = ?", state, millis(now), id)
		return err
	})
	return done, err
}

// sealable is called in each transaction that writes what a master key sealed: after a key was closed
// nothing of it may come. It returns the key's id, for the row. UNAVAILABLE means that it is to be sealed anew.
func (s *Store) sealable(ctx context.Context, tx handle, sealed []byte) (string, error) {
	id := masterkey.KeyOf(sealed)
	var state string
	err := tx.row(ctx, "SELECT state FROM master_keys WHERE id = ?", id).Scan(&state)
	switch {
	case errors.Is(err, sql.ErrNoRows) && id == masterkey.FirstID: // an installation that never noted any
		return id, nil
	case errors.Is(err, sql.ErrNoRows):
		return "", fmt.Errorf("it is sealed with the master key %s, which this installation does not know", id)
	case err != nil:
		return "", err
	case state == MasterClosed || state == MasterRetired:
		return "", proto.Errorf(proto.CodeUnavailable, "the master key was replaced this moment: try again")
	}
	return id, nil
}

// SealedKind says what a Sealed is.
type SealedKind string

// What master keys seal.
const (
	SealedAuthority SealedKind = "authorities"
	SealedSecret    SealedKind = "secrets"
	SealedRows      SealedKind = "rows of queries"
	SealedFileKey   SealedKind = "keys of files"
)

// sealedKinds are the tables of what is sealed, with the column of it and the primary key. Rows of an authority
// that is retired have no key any more.
var sealedKinds = []struct {
	kind              SealedKind
	table, id, sealed string
	about             string // columns of organization, scope, owner and name
	but               string
	step              int // how many are read at once
}{
	{step: 100, kind: SealedAuthority, table: "authorities", id: "fingerprint", sealed: "sealed_key", about: "'', '', '', ''", but: " AND length(sealed_key) > 0"},
	{step: 100, kind: SealedSecret, table: "secrets", id: "id", sealed: "sealed", about: "organization, scope, owner, name"},
	{step: 100, kind: SealedFileKey, table: "file_keys", id: "organization || '/' || generation", sealed: "sealed", about: "organization, '', '', CAST(generation AS TEXT)"},
	{step: 8, kind: SealedRows, table: "kept_rows", id: "query", sealed: "sealed", about: "organization, '', '', ''"},
}

// Sealed is something that a master key has sealed.
type Sealed struct {
	Kind SealedKind
	// ID is a fingerprint, a secret's or a query's id, or a text that stands for a key of files.
	ID string
	// Organization, Scope, Owner and Name are those of a secret; rows of a query have the first. A key of files
	// has the first, and its generation as a name.
	Organization, Scope, Owner, Name string
	Sealed                           []byte
}

// SealedByOthers counts what other master keys than one seal, by kind.
func (s *Store) SealedByOthers(ctx context.Context, id string) (map[SealedKind]uint64, error) {
	counts := map[SealedKind]uint64{}
	for _, kind := range sealedKinds {
		var n int64
		// Two ranges, which an index serves where "<>" is a walk through everything.
		if err := s.reader().row(ctx, "SELECT (SELECT count(*) FROM "+kind.table+" WHERE master < ?"+kind.but+") + (SELECT count(*) FROM "+kind.table+" WHERE master > ?"+kind.but+")", id, id).Scan(&n); err != nil {
			return nil, s.fail(ctx, "count what master keys seal", err)
		}
		counts[kind.kind] = uint64(n)
	}
	return counts, nil
}

// StaleSealed lists what other master keys than one seal, of each kind some: at most 600 small ones, and
// 16 queries' rows of 1.5 MiB each.
//
// skip leaves out so many of each kind that were seen before and can't be sealed anew.
func (s *Store) StaleSealed(ctx context.Context, id string, skip int) ([]Sealed, error) {
	var all []Sealed
	for _, kind := range sealedKinds {
		for _, side := range []string{"<", ">"} {
			rows, err := s.reader().query(ctx, "SELECT "+kind.id+", "+kind.about+", "+kind.sealed+" FROM "+kind.table+" WHERE master "+side+" ?"+kind.but+" LIMIT ? OFFSET ?", id, kind.step, skip)
			some, err := collect(ctx, s, "list what master keys seal", rows, err, func(rows *sql.Rows) (Sealed, error) {
				x := Sealed{Kind: kind.kind}
				err := rows.Scan(&x.ID, &x.Organization, &x.Scope, &x.Owner, &x.Name, &x.Sealed)
				return x, err
			})
			if err != nil {
				return nil, err
			}
			all = append(all, some...)
		}
	}
	return all, nil
}

// ReplaceSealed puts what was sealed anew in the place of what it was; was and now go by pairs. What somebody has
// replaced or removed meanwhile stays.
func (s *Store) ReplaceSealed(ctx context.Context, was []Sealed, now [][]byte) error {
	return s.write(ctx, "seal anew", func(tx handle) error {
		for i, x := range was {
			id, err := s.sealable(ctx, tx, now[i])
			if err != nil {
				return err
			}
			for _, kind := range sealedKinds {
				if kind.kind != x.Kind {
					continue
				}
				set := ""
				if kind.kind == SealedRows {
					set = fmt.Sprintf(", size = %d", len(now[i]))
				}
				if _, err := tx.exec(ctx, "UPDATE "+kind.table+" SET "+kind.sealed+" = ?, master = ?"+set+" WHERE "+kind.id+" = ? AND "+kind.sealed+" = ?", now[i], id, x.ID, x.Sealed); err != nil {
					return err
				}
			}
		}
		return nil
	})
}
