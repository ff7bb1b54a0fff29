package store

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"slices"
	"time"

	"github.com/postern-dev/postern/controlplane/filetree"
	posternproto "github.com/postern-dev/postern/proto"
)

// HoldChunks notes that a workspace holds those of hashes whose objects its organization
// has in good order, at now, and returns the others, in ascending order: they must be
// stored. Together with the note nobody removes the object.
func (s *Store) HoldChunks(ctx context.Context, organization string, workspace int64, hashes []filetree.Hash, now time.Time) (missing []filetree.Hash, err error) {
	hashes = slices.Clone(hashes)
	slices.SortFunc(hashes, func(a, b filetree.Hash) int { return bytes.Compare(a[:], b[:]) })
	hashes = slices.Compact(hashes)
	err = s.write(ctx, "look for chunks", func(tx handle) error {
		missing = missing[:0]
		for _, hash := range hashes {
			var size int64
			// The touch keeps the row, in PostgreSQL, from being removed before this ends.
			err := tx.row(ctx, "UPDATE blob_objects SET damaged = damaged WHERE organization = ? AND hash = ? AND damaged = 0 RETURNING size", organization, hash[:]).Scan(&size)
			if errors.Is(err, sql.ErrNoRows) {
				missing = append(missing, hash)
				continue
			}
			if err == nil {
				err = hold(ctx, tx, organization, workspace, hash, size, now)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	return missing, err
}

// hold notes that a workspace holds a chunk whose object's row is locked or new.
func hold(ctx context.Context, tx handle, organization string, workspace int64, hash filetree.Hash, size int64, now time.Time) error {
	n, err := tx.exec(ctx, "UPDATE file_chunks SET touched = ? WHERE workspace = ? AND hash = ?", millis(now), workspace, hash[:])
	if err != nil || n > 0 {
		return err
	}
	if _, err := tx.exec(ctx, "INSERT INTO file_chunks (workspace, hash, size, refs, touched) VALUES (?, ?, ?, 0, ?)", workspace, hash[:], size, millis(now)); err != nil {
		if isUnique(err) { // somebody else, meanwhile: as good
			err = posternproto.Errorf(posternproto.CodeUnavailable, "the chunk is being stored by somebody else just now: try again")
		}
		return err
	}
	_, err = tx.exec(ctx, "UPDATE blob_objects SET holders = holders + 1 WHERE organization = ? AND hash = ?", organization, hash[:])
	return err
}

// MissingChunks are those of hashes that a workspace does not hold in good order. What
// it holds it goes on to hold for a while, even if nothing refers to it.
func (s *Store) MissingChunks(ctx context.Context, organization string, workspace int64, hashes []filetree.Hash, now time.Time) ([]filetree.Hash, error) {
	have := map[filetree.Hash]bool{}
	list := make([][]byte, len(hashes))
	for i := range hashes {
		list[i] = hashes[i][:]
	}
	var idle [][]byte
	err := batches(list, func(list [][]byte) error {
		return s.reader().each(ctx, func(scan func(...any) error) error {
			var b []byte
			var refs int64
			if err := scan(&b, &refs); err != nil {
				return err
			}
			hash, err := array32(b)
			if have[hash] = true; refs == 0 {
				idle = append(idle, b)
			}
			return err
		}, `SELECT c.hash, c.refs FROM file_chunks c JOIN blob_objects o ON o.organization = ? AND o.hash = c.hash AND o.damaged = 0
			WHERE c.workspace = ? AND c.hash IN (`+placeholders(len(list))+")", anys([]any{organization, workspace}, list)...)
	})
	if err != nil {
		return nil, s.fail(ctx, "look for chunks", err)
	}
	if len(idle) > 0 {
		err := s.writeRelaxed(ctx, "look for chunks", func(tx handle) error {
			return batches(idle, func(list [][]byte) error {
				_, err := tx.exec(ctx, "UPDATE file_chunks SET touched = ? WHERE workspace = ? AND hash IN ("+placeholders(len(list))+")", anys([]any{millis(now), workspace}, list)...)
				return err
			})
		})
		if err != nil {
			return nil, err
		}
	}
	var missing []filetree.Hash
	for _, hash := range hashes {
		if !have[hash] {
			missing = append(missing, hash)
		}
	}
	return missing, nil
}

// ChunkObjects finds the objects of chunks that a workspace holds; others are left out.
func (s *Store) ChunkObjects(ctx context.Context, organization string, workspace int64, hashes []filetree.Hash) (map[filetree.Hash]filetree.Object, error) {
	all := make(map[filetree.Hash]filetree.Object, len(hashes))
	list := make([][]byte, len(hashes))
	for i := range hashes {
		list[i] = hashes[i][:]
	}
	err := batches(list, func(list [][]byte) error {
		return s.reader().each(ctx, func(scan func(...any) error) error {
			var b []byte
			var o filetree.Object
			if err := scan(&b, &o.Key, &o.Size, &o.Generation); err != nil {
				return err
			}
			var err error
			o.Hash, err = array32(b)
			all[o.Hash] = o
			return err
		}, `SELECT c.hash, o.key, o.size, o.generation FROM file_chunks c JOIN blob_objects o ON o.organization = ? AND o.hash = c.hash
			WHERE c.workspace = ? AND c.hash IN (`+placeholders(len(list))+")", anys([]any{organization, workspace}, list)...)
	})
	return all, s.fail(ctx, "find chunks", err)
}

// BeginUploads notes that objects of these keys are about to be written: unless
// EndUploads follows they are removed some day.
func (s *Store) BeginUploads(ctx context.Context, keys []string, now time.Time) error {
	return s.write(ctx, "begin to store chunks", func(tx handle) error {
		values := make([]any, 0, 2*len(keys))
		for _, key := range keys {
			values = append(values, key, millis(now))
		}
		return tx.insert(ctx, "INSERT INTO blob_uploads (key, started) VALUES ", 2, "", values)
	})
}

// EndUploads notes that the objects are durable, and that the workspace holds them. If
// another one of the same content came first, the later object is garbage. UNAVAILABLE
// means that so much time has passed that an object was taken for left behind, or, with filetree.ErrKeyReplaced,
// that the key which sealed one is gone.
func (s *Store) EndUploads(ctx context.Context, organization string, workspace int64, objects []filetree.Object, now time.Time) error {
	objects = slices.Clone(objects)
	slices.SortFunc(objects, func(a, b filetree.Object) int { return bytes.Compare(a.Hash[:], b.Hash[:]) })
	return s.write(ctx, "store chunks", func(tx handle) error {
		if err := s.holdFileKeys(ctx, tx, organization, objects); err != nil {
			return err
		}
		for _, o := range objects {
			n, err := tx.exec(ctx, "DELETE FROM blob_uploads WHERE key = ?", o.Key)
			if err != nil {
				return err
			}
			if n == 0 {
				return posternproto.Errorf(posternproto.CodeUnavailable, "storing a chunk took too long: try again")
			}
			var key string
			var damaged bool
			err = tx.row(ctx, `INSERT INTO blob_objects (organization, hash, key, size, holders, damaged, generation) VALUES (?, ?, ?, ?, 0, 0, ?)
				ON CONFLICT (organization, hash) DO UPDATE SET size = blob_objects.size RETURNING key, damaged = 1`, organization, o.Hash[:], o.Key, o.Size, o.Generation).Scan(&key, &damaged)
			if err != nil {
				return err
			}
			if key != o.Key {
				waste := o.Key
				if damaged {
					if _, err := tx.exec(ctx, "UPDATE blob_objects SET key = ?, size = ?, generation = ?, damaged = 0 WHERE organization = ? AND hash = ?", o.Key, o.Size, o.Generation, organization, o.Hash[:]); err != nil {
						return err
					}
					waste = key
				}
				if _, err := tx.exec(ctx, "INSERT INTO blob_garbage (key, since) VALUES (?, ?)", waste, millis(now)); err != nil {
					return err
				}
			}
			if err := hold(ctx, tx, organization, workspace, o.Hash, int64(o.Size), now); err != nil {
				return err
			}
		}
		return nil
	})
}

// MarkDamaged notes that an object is not what it should be, and reports whether it is the one of that hash at all.
func (s *Store) MarkDamaged(ctx context.Context, organization string, hash filetree.Hash, key string) (current bool, err error) {
	err = s.write(ctx, "note a damaged chunk", func(tx handle) error {
		n, err := tx.exec(ctx, "UPDATE blob_objects SET damaged = 1 WHERE organization = ? AND hash = ? AND key = ?", organization, hash[:], key)
		current = n > 0
		return err
	})
	return current, err
}

// CollectChunks takes one step of collecting what nobody refers to: at most limit chunks
// that wait since before, and objects and uploads, become garbage. It returns how many
// things it did; zero: there is nothing more.
func (s *Store) CollectChunks(ctx context.Context, before, now time.Time, limit int) (int, error) {
	done := 0
	err := s.write(ctx, "collect chunks", func(tx handle) error {
		done = 0
		type idle struct {
			workspace    int64
			organization string
			hash         []byte
		}
		var chunks []idle
		err := tx.each(ctx, func(scan func(...any) error) error {
			var c idle
			err := scan(&c.workspace, &c.organization, &c.hash)
			chunks = append(chunks, c)
			return err
		}, `SELECT c.workspace, w.organization, c.hash FROM workspaces w JOIN file_chunks c ON c.workspace = w.number
			WHERE c.refs = 0 AND c.touched < ? ORDER BY c.hash LIMIT ?`, millis(before), limit)
		if err != nil {
			return err
		}
		for _, c := range chunks {
			// The object's row first, as everybody does.
			if _, err := tx.exec(ctx, "UPDATE blob_objects SET holders = holders WHERE organization = ? AND hash = ?", c.organization, c.hash); err != nil {
				return err
			}
			n, err := tx.exec(ctx, "DELETE FROM file_chunks WHERE workspace = ? AND hash = ? AND refs = 0 AND touched < ?", c.workspace, c.hash, millis(before))
			if err != nil {
				return err
			}
			if n == 0 {
				continue
			}
			if _, err := tx.exec(ctx, "UPDATE blob_objects SET holders = holders - 1 WHERE organization = ? AND hash = ?", c.organization, c.hash); err != nil {
				return err
			}
			done++
		}
		n, err := tx.exec(ctx, "INSERT INTO blob_garbage (key, since) SELECT key, ? FROM blob_uploads WHERE started < ? ON CONFLICT DO NOTHING", millis(now), millis(before))
		if err != nil {
			return err
		}
		done += int(n)
		if _, err := tx.exec(ctx, "DELETE FROM blob_uploads WHERE started < ?", millis(before)); err != nil {
			return err
		}
		var keys []any
		err = tx.each(ctx, func(scan func(...any) error) error {
			var key string
			err := scan(&key)
			keys = append(keys, key, millis(now))
			return err
		}, `DELETE FROM blob_objects WHERE (organization, hash) IN (SELECT organization, hash FROM blob_objects WHERE holders = 0 LIMIT ?) AND holders = 0 RETURNING key`, limit)
		if err != nil {
			return err
		}
		done += len(keys) / 2
		return tx.insert(ctx, "INSERT INTO blob_garbage (key, since) VALUES ", 2, "", keys)
	})
	return done, err
}

// Garbage are keys of objects to be removed by now, at most limit.
func (s *Store) Garbage(ctx context.Context, now time.Time, limit int) ([]string, error) {
	rows, err := s.reader().query(ctx, "SELECT key FROM blob_garbage WHERE since <= ? ORDER BY since LIMIT ?", millis(now), limit)
	return collect(ctx, s, "list garbage", rows, err, func(rows *sql.Rows) (string, error) {
		var key string
		err := rows.Scan(&key)
		return key, err
	})
}

// ForgetGarbage notes that objects are gone.
func (s *Store) ForgetGarbage(ctx context.Context, keys []string) error {
	return s.write(ctx, "forget garbage", func(tx handle) error {
		return batches(keys, func(keys []string) error {
			_, err := tx.exec(ctx, "DELETE FROM blob_garbage WHERE key IN ("+placeholders(len(keys))+")", anys(nil, keys)...)
			return err
		})
	})
}
