package store

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"slices"
	"strconv"
	"time"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/controlplane/masterkey"
	"github.com/postern-dev/postern/proto"
)

// FileKey is what the store knows of a key with which an organization's contents of files are sealed.
type FileKey struct {
	Generation int64
	Made       time.Time
	// Objects are those that it seals, the damaged ones included.
	Objects, Damaged uint64
	// Master is the master key that seals it.
	Master string
}

// NewestFileKey is the key that seals an organization's contents; NOT_FOUND if there is none yet.
func (s *Store) NewestFileKey(ctx context.Context, organization string) (generation int64, sealed []byte, err error) {
	err = s.reader().row(ctx, "SELECT generation, sealed FROM file_keys WHERE organization = ? ORDER BY generation DESC LIMIT 1", organization).Scan(&generation, &sealed)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil, proto.Errorf(proto.CodeNotFound, "the organization has no key for files yet")
	}
	return generation, sealed, s.fail(ctx, "read a key of files", err)
}

// SealedFileKey is a key of an organization's contents; NOT_FOUND, with filetree.ErrKeyReplaced, if it is gone.
func (s *Store) SealedFileKey(ctx context.Context, organization string, generation int64) (sealed []byte, err error) {
	err = s.reader().row(ctx, "SELECT sealed FROM file_keys WHERE organization = ? AND generation = ?", organization, generation).Scan(&sealed)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, &proto.Error{Code: proto.CodeNotFound, Message: "the key of generation " + strconv.FormatInt(generation, 10) + " of the organization's files is gone", Err: filetree.ErrKeyReplaced}
	}
	return sealed, s.fail(ctx, "read a key of files", err)
}

// InsertFileKey keeps a new key: the first one, or the one after the newest. ALREADY_EXISTS means that somebody else was
// first, or that older keys than the one before it are still needed.
func (s *Store) InsertFileKey(ctx context.Context, organization string, generation int64, sealed []byte, now time.Time) error {
	return s.write(ctx, "keep a key of files", func(tx handle) error {
		master, err := s.sealable(ctx, tx, sealed)
		if err != nil {
			return err
		}
		if _, err := tx.exec(ctx, "UPDATE organizations SET created = created WHERE id = ?", organization); err != nil { // one at a time
			return err
		}
		var n, newest int64
		if err := tx.row(ctx, "SELECT count(*), coalesce(max(generation), 0) FROM file_keys WHERE organization = ?", organization).Scan(&n, &newest); err != nil {
			return err
		}
		if n > 1 || newest != generation-1 {
			return proto.Errorf(proto.CodeAlreadyExists, "a rotation of the organization's key of files is under way")
		}
		_, err = tx.exec(ctx, "INSERT INTO file_keys (organization, generation, sealed, master, made) VALUES (?, ?, ?, ?, ?)", organization, generation, sealed, master, millis(now))
		return err
	})
}

// FileKeys are an organization's, the newest first.
func (s *Store) FileKeys(ctx context.Context, organization string) ([]FileKey, error) {
	rows, err := s.reader().query(ctx, `SELECT k.generation, k.made, k.sealed,
		(SELECT count(*) FROM blob_objects o WHERE o.organization = k.organization AND o.generation = k.generation),
		(SELECT count(*) FROM blob_objects o WHERE o.organization = k.organization AND o.generation = k.generation AND o.damaged = 1)
		FROM file_keys k WHERE k.organization = ? ORDER BY k.generation DESC`, organization)
	return collect(ctx, s, "list keys of files", rows, err, func(rows *sql.Rows) (FileKey, error) {
		var k FileKey
		var made, objects, damaged int64
		var sealed []byte
		err := rows.Scan(&k.Generation, &made, &sealed, &objects, &damaged)
		k.Made, k.Objects, k.Damaged, k.Master = time.UnixMilli(made).UTC(), uint64(objects), uint64(damaged), masterkey.KeyOf(sealed)
		return k, err
	})
}

// FileKeyRotations are the organizations with more than one key, at most 1000.
func (s *Store) FileKeyRotations(ctx context.Context) ([]string, error) {
	return s.texts(ctx, "SELECT organization FROM file_keys GROUP BY organization HAVING count(*) > 1 ORDER BY organization LIMIT 1000")
}

// WithoutFileKey are the organizations that have no key for files yet, at most 1000.
func (s *Store) WithoutFileKey(ctx context.Context) ([]string, error) {
	return s.texts(ctx, "SELECT id FROM organizations WHERE NOT EXISTS (SELECT 1 FROM file_keys k WHERE k.organization = organizations.id) ORDER BY id LIMIT 1000")
}

func (s *Store) texts(ctx context.Context, query string) ([]string, error) {
	rows, err := s.reader().query(ctx, query)
	return collect(ctx, s, "list keys of files", rows, err, func(rows *sql.Rows) (string, error) {
		var text string
		err := rows.Scan(&text)
		return text, err
	})
}

// holdFileKeys keeps the keys of objects from being dropped until the transaction ends, or says that they are gone.
func (s *Store) holdFileKeys(ctx context.Context, tx handle, organization string, objects []filetree.Object) error {
	lock := ""
	if s.engine == postgres {
		lock = " FOR SHARE"
	}
	var seen []int64
	for _, o := range objects {
		if slices.Contains(seen, o.Generation) {
			continue
		}
		seen = append(seen, o.Generation)
		var one int
		err := tx.row(ctx, "SELECT 1 FROM file_keys WHERE organization = ? AND generation = ?"+lock, organization, o.Generation).Scan(&one)
		if errors.Is(err, sql.ErrNoRows) {
			return &proto.Error{Code: proto.CodeUnavailable, Message: "the key of the organization's files was replaced this moment: try again", Err: filetree.ErrKeyReplaced}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// StaleObjects are objects in good order that an older key of the organization seals, at most limit.
func (s *Store) StaleObjects(ctx context.Context, organization string, newest int64, limit int) ([]filetree.Object, error) {
	rows, err := s.reader().query(ctx, "SELECT hash, key, size, generation FROM blob_objects WHERE organization = ? AND generation < ? AND damaged = 0 LIMIT ?", organization, newest, limit)
	return collect(ctx, s, "list objects to be sealed anew", rows, err, func(rows *sql.Rows) (filetree.Object, error) {
		var o filetree.Object
		var hash []byte
		if err := rows.Scan(&hash, &o.Key, &o.Size, &o.Generation); err != nil {
			return o, err
		}
		var err error
		o.Hash, err = array32(hash)
		return o, err
	})
}

// ReplaceObjects puts objects of the same contents, which are durable, in the place of others; was and by go by pairs. What
// is replaced is garbage from a later time on: a backup of the database that names it stays whole until then. If an object
// is another one by now, or gone, the new one is garbage at once. UNAVAILABLE is as for EndUploads.
func (s *Store) ReplaceObjects(ctx context.Context, organization string, was, by []filetree.Object, now, later time.Time) error {
	order := make([]int, len(was))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return bytes.Compare(was[a].Hash[:], was[b].Hash[:]) })
	return s.write(ctx, "replace chunks", func(tx handle) error {
		if err := s.holdFileKeys(ctx, tx, organization, by); err != nil {
			return err
		}
		for _, i := range order {
			n, err := tx.exec(ctx, "DELETE FROM blob_uploads WHERE key = ?", by[i].Key)
			if err != nil {
				return err
			}
			if n == 0 { // it was taken for left behind, and is garbage
				continue
			}
			n, err = tx.exec(ctx, "UPDATE blob_objects SET key = ?, generation = ? WHERE organization = ? AND hash = ? AND key = ?",
				by[i].Key, by[i].Generation, organization, was[i].Hash[:], was[i].Key)
			if err != nil {
				return err
			}
			waste, since := was[i].Key, later
			if n == 0 {
				waste, since = by[i].Key, now
			}
			if _, err := tx.exec(ctx, "INSERT INTO blob_garbage (key, since) VALUES (?, ?)", waste, millis(since)); err != nil {
				return err
			}
		}
		return nil
	})
}

// DropFileKey ends a key that is not the newest, if it seals no object, and reports whether it is gone. With force
// damaged objects do not count.
func (s *Store) DropFileKey(ctx context.Context, organization string, generation int64, force bool) (done bool, err error) {
	err = s.write(ctx, "drop a key of files", func(tx handle) error {
		done = false
		// Who stores objects holds this row; what he stored is counted then.
		if _, err := tx.exec(ctx, "UPDATE file_keys SET made = made WHERE organization = ? AND generation = ?", organization, generation); err != nil {
			return err
		}
		var n int64
		but := ""
		if force {
			but = " AND damaged = 0"
		}
		if err := tx.row(ctx, "SELECT count(*) FROM blob_objects WHERE organization = ? AND generation = ?"+but, organization, generation).Scan(&n); err != nil || n > 0 {
			return err
		}
		gone, err := tx.exec(ctx, "DELETE FROM file_keys WHERE organization = ? AND generation = ? AND generation < (SELECT max(generation) FROM file_keys WHERE organization = ?)", organization, generation, organization)
		done = gone == 1
		return err
	})
	return done, err
}
