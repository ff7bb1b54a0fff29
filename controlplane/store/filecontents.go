package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/postern-dev/postern/controlplane/filetree"
)

const versionColumns = "node, version, base, size, stored, created, author, etag, segments, inline"

func scanVersion(scan func(...any) error) (*filetree.Version, error) {
	v := &filetree.Version{}
	var created int64
	var etag, segments []byte
	if err := scan(&v.Node, &v.Version, &v.Base, &v.Size, &v.Stored, &created, &v.By, &etag, &segments, &v.Inline); err != nil {
		return nil, err
	}
	v.Created = time.UnixMilli(created).UTC()
	var err error
	if v.ETag, err = array32(etag); err != nil {
		return nil, err
	}
	v.Segments, err = splitHashes(segments)
	return v, err
}

func splitHashes(b []byte) ([]filetree.Hash, error) {
	if len(b)%sha256.Size != 0 {
		return nil, fmt.Errorf("list of hashes of %d bytes in the store", len(b))
	}
	all := make([]filetree.Hash, 0, len(b)/sha256.Size)
	for ; len(b) > 0; b = b[sha256.Size:] {
		all = append(all, filetree.Hash(b[:sha256.Size]))
	}
	return all, nil
}

// Version implements filetree.Tx.
func (t *fileTx) Version(ctx context.Context, node, version uint64) (*filetree.Version, error) {
	v, err := scanVersion(t.h.row(ctx, "SELECT "+versionColumns+" FROM file_versions WHERE workspace = ? AND node = ? AND version = ?", t.w.Number, node, version).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	return v, err
}

// Versions implements filetree.Tx.
func (t *fileTx) Versions(ctx context.Context, node uint64) ([]filetree.Version, error) {
	var all []filetree.Version
	err := t.h.each(ctx, func(scan func(...any) error) error {
		v, err := scanVersion(scan)
		if err == nil {
			all = append(all, *v)
		}
		return err
	}, "SELECT "+versionColumns+" FROM file_versions WHERE workspace = ? AND node = ? ORDER BY version DESC", t.w.Number, node)
	return all, err
}

// PutVersion implements filetree.Tx.
func (t *fileTx) PutVersion(ctx context.Context, v *filetree.Version, lists map[filetree.Hash][]byte) error {
	var segments []byte
	for _, hash := range v.Segments {
		segments = append(segments, hash[:]...)
	}
	var inline any
	if v.Inline != nil {
		inline = v.Inline
		t.w.KeptBytes += uint64(len(v.Inline))
	}
	if _, err := t.h.exec(ctx, "INSERT INTO file_versions (workspace, "+versionColumns+") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
		t.w.Number, v.Node, v.Version, v.Base, v.Size, v.Stored, millis(v.Created), plainText(v.By), v.ETag[:], null(segments), inline); err != nil {
		return err
	}
	t.w.KeptRows++
	for _, hash := range v.Segments {
		var refs int64
		err := t.h.row(ctx, `INSERT INTO file_segments (workspace, hash, chunks, refs) VALUES (?, ?, ?, 1)
			ON CONFLICT (workspace, hash) DO UPDATE SET refs = file_segments.refs + 1 RETURNING refs`, t.w.Number, hash[:], lists[hash]).Scan(&refs)
		if err != nil {
			return err
		}
		if refs > 1 {
			continue
		}
		if err := t.refer(ctx, lists[hash], 1); err != nil {
			return err
		}
	}
	return nil
}

// refer adds to the references of the chunks of a list; each counts once.
func (t *fileTx) refer(ctx context.Context, list []byte, by int64) error {
	hashes, err := distinct(list)
	if err != nil {
		return err
	}
	return batches(hashes, func(hashes [][]byte) error {
		return t.h.each(ctx, func(scan func(...any) error) error {
			var refs int64
			var size uint64
			if err := scan(&refs, &size); err != nil {
				return err
			}
			switch {
			case refs < 0:
				return errors.New("a chunk in the store has fewer references than it should")
			case by > 0 && refs == by:
				t.w.KeptBytes += size
			case by < 0 && refs == 0:
				t.w.KeptBytes -= min(size, t.w.KeptBytes)
			}
			return nil
		}, "UPDATE file_chunks SET refs = refs + ? WHERE workspace = ? AND hash IN ("+placeholders(len(hashes))+") RETURNING refs, size", anys([]any{by, t.w.Number}, hashes)...)
	})
}

// distinct are the hashes of a list, without holes and repetitions.
func distinct(list []byte) ([][]byte, error) {
	hashes, err := splitHashes(list)
	if err != nil {
		return nil, err
	}
	seen := map[filetree.Hash]bool{{}: true}
	var all [][]byte
	for i := range hashes {
		if !seen[hashes[i]] {
			seen[hashes[i]] = true
			all = append(all, hashes[i][:])
		}
	}
	return all, nil
}

// Segment implements filetree.Tx.
func (t *fileTx) Segment(ctx context.Context, hash filetree.Hash) ([]byte, error) {
	var list []byte
	err := t.h.row(ctx, "SELECT chunks FROM file_segments WHERE workspace = ? AND hash = ?", t.w.Number, hash[:]).Scan(&list)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, errors.New("a file's list of chunks is not in the store")
	}
	return list, err
}

// Chunks implements filetree.Tx.
func (t *fileTx) Chunks(ctx context.Context, hashes []filetree.Hash) (map[filetree.Hash]uint32, error) {
	all := make(map[filetree.Hash]uint32, len(hashes))
	list := make([][]byte, len(hashes))
	for i := range hashes {
		list[i] = hashes[i][:]
	}
	err := batches(list, func(hashes [][]byte) error {
		return t.h.each(ctx, func(scan func(...any) error) error {
			var b []byte
			var size uint32
			if err := scan(&b, &size); err != nil {
				return err
			}
			hash, err := array32(b)
			all[hash] = size
			return err
		}, "SELECT hash, size FROM file_chunks WHERE workspace = ? AND hash IN ("+placeholders(len(hashes))+")", anys([]any{t.w.Number}, hashes)...)
	})
	return all, err
}

// VersionTimes implements filetree.Tx.
func (t *fileTx) VersionTimes(ctx context.Context, node uint64) (versions []uint64, times []time.Time, err error) {
	err = t.h.each(ctx, func(scan func(...any) error) error {
		var version uint64
		var created int64
		err := scan(&version, &created)
		versions, times = append(versions, version), append(times, time.UnixMilli(created).UTC())
		return err
	}, "SELECT version, created FROM file_versions WHERE workspace = ? AND node = ? ORDER BY version", t.w.Number, node)
	return versions, times, err
}

// DropVersions implements filetree.Tx.
func (t *fileTx) DropVersions(ctx context.Context, node uint64, versions ...uint64) error {
	if len(versions) == 0 {
		var err error
		if versions, _, err = t.VersionTimes(ctx, node); err != nil {
			return err
		}
	}
	for _, version := range versions {
		var segments, inline []byte
		err := t.h.row(ctx, `DELETE FROM file_versions WHERE workspace = ? AND node = ? AND version = ?
			AND NOT EXISTS (SELECT 1 FROM file_node_history h WHERE h.workspace = file_versions.workspace AND h.id = file_versions.node AND h.version = file_versions.version)
			RETURNING segments, inline`, t.w.Number, node, version).Scan(&segments, &inline)
		if errors.Is(err, sql.ErrNoRows) {
			continue
		}
		if err != nil {
			return err
		}
		t.w.KeptBytes -= min(uint64(len(inline)), t.w.KeptBytes)
		t.fewerRows(1)
		hashes, err := splitHashes(segments)
		if err != nil {
			return err
		}
		for _, hash := range hashes {
			if err := t.releaseSegment(ctx, hash); err != nil {
				return err
			}
		}
	}
	return nil
}

// fewerRows counts rows that are gone.
func (t *fileTx) fewerRows(n int) { t.w.KeptRows -= min(uint64(n), t.w.KeptRows) }

func (t *fileTx) releaseSegment(ctx context.Context, hash filetree.Hash) error {
	var refs int64
	if err := t.h.row(ctx, "UPDATE file_segments SET refs = refs - 1 WHERE workspace = ? AND hash = ? RETURNING refs", t.w.Number, hash[:]).Scan(&refs); err != nil {
		return err
	}
	if refs > 0 {
		return nil
	}
	var list []byte
	if err := t.h.row(ctx, "DELETE FROM file_segments WHERE workspace = ? AND hash = ? RETURNING chunks", t.w.Number, hash[:]).Scan(&list); err != nil {
		return err
	}
	return t.refer(ctx, list, -1)
}
