package blob

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"time"

	"gocloud.dev/blob"
	"gocloud.dev/gcerrors"
	"golang.org/x/sync/errgroup"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/controlplane/masterkey"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
)

const (
	// parallel is how many requests one call makes of the object store at once.
	parallel = 8
	// attempts bounds how often a request is made, and firstPause is the longest wait
	// before the second; it doubles.
	attempts   = 6
	firstPause = 50 * time.Millisecond
	// requestTime bounds one attempt.
	requestTime = 2 * time.Minute
	// overhead bounds what sealing adds to a chunk, in bytes.
	overhead = 64
)

// Index remembers which chunks there are. See package store.
type Index interface {
	HoldChunks(ctx context.Context, organization string, workspace int64, hashes []filetree.Hash, now time.Time) ([]filetree.Hash, error)
	ChunkObjects(ctx context.Context, organization string, workspace int64, hashes []filetree.Hash) (map[filetree.Hash]filetree.Object, error)
	BeginUploads(ctx context.Context, keys []string, now time.Time) error
	EndUploads(ctx context.Context, organization string, workspace int64, objects []filetree.Object, now time.Time) error
	StaleObjects(ctx context.Context, organization string, newest int64, limit int) ([]filetree.Object, error)
	ReplaceObjects(ctx context.Context, organization string, was, by []filetree.Object, now, later time.Time) error
	MarkDamaged(ctx context.Context, organization string, hash filetree.Hash, key string) (current bool, err error)
	CollectChunks(ctx context.Context, before, now time.Time, limit int) (int, error)
	Garbage(ctx context.Context, now time.Time, limit int) ([]string, error)
	ForgetGarbage(ctx context.Context, keys []string) error
}

// Keys are the organizations' keys. See package filekey.
type Keys interface {
	// Newest is the key that seals.
	Newest(ctx context.Context, organization string) (generation int64, key *masterkey.DataKey, err error)
	// Of is the key of a generation; NOT_FOUND if it is gone.
	Of(ctx context.Context, organization string, generation int64) (*masterkey.DataKey, error)
	// Forget has the newest key be looked up again.
	Forget(organization string)
}

// Config is what a Store needs.
type Config struct {
	Logger *slog.Logger
	Index  Index
	Keys   Keys
	// Metrics is optional.
	Metrics *Metrics
	// Grace is how long a chunk that nothing refers to is kept; 0 means 24 hours.
	Grace time.Duration
	// Replaced is how long an object is kept after it was sealed anew as another one; 0 means 24 hours, within which
	// copies of the database and of the objects belong together.
	Replaced time.Duration
}

// Store is an open object store. Close it once.
type Store struct {
	cfg    Config
	name   string // what --blob says, without what comes after the bucket's name
	bucket bucket
	dir    *directory // nil for a bucket elsewhere
}

// bucket is what is asked of an object store. Errors are gocloud's.
type bucket interface {
	write(ctx context.Context, key string, body []byte) error
	// read reads at most len(into) bytes into it, and returns those.
	read(ctx context.Context, key string, into []byte) ([]byte, error)
	remove(ctx context.Context, key string) error
	Close() error
}

// cloud is gocloud's bucket.
type cloud struct{ *blob.Bucket }

func (c cloud) write(ctx context.Context, key string, body []byte) error {
	return withoutBucket(c.WriteAll(ctx, key, body, &blob.WriterOptions{ContentType: "application/octet-stream", DisableContentTypeDetection: true}))
}

func (c cloud) read(ctx context.Context, key string, into []byte) ([]byte, error) {
	r, err := c.NewReader(ctx, key, nil)
	if err != nil {
		return nil, withoutBucket(err)
	}
	defer r.Close() //nolint:errcheck // it was read, or not
	n, err := io.ReadFull(r, into)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil // an object that was cut off is found by its seal
	}
	return into[:n], err
}

func (c cloud) remove(ctx context.Context, key string) error {
	return withoutBucket(c.Delete(ctx, key))
}

// s3Bucket is a bucket of S3, which does not tell by itself why there is nothing to remove.
type s3Bucket struct{ cloud }

func (c s3Bucket) remove(ctx context.Context, key string) error {
	err := c.cloud.remove(ctx, key)
	if gcerrors.Code(err) == gcerrors.NotFound {
		if there, err := c.IsAccessible(ctx); err == nil && !there {
			return errNoBucket
		}
	}
	return err
}

// Close closes the object store.
func (s *Store) Close() error {
	if err := s.bucket.Close(); err != nil {
		return fmt.Errorf("close the object store: %w", err)
	}
	return nil
}

// about is what a sealed chunk says it is.
func about(hash filetree.Hash) string { return "chunk " + hex.EncodeToString(hash[:]) }

// Put stores chunks for a workspace and returns their hashes, in the same order; they are
// durable then. Each has 1 byte to 1 MiB. UNAVAILABLE means that the object store did not
// do it in several attempts, STORAGE_FULL that it has no space left; then nothing is held
// against trying again.
func (s *Store) Put(ctx context.Context, organization string, workspace int64, chunks [][]byte) ([]filetree.Hash, error) {
	hashes := make([]filetree.Hash, len(chunks))
	where := make(map[filetree.Hash]int, len(chunks))
	for i, chunk := range chunks {
		if len(chunk) == 0 || len(chunk) > filechunk.Size {
			return nil, proto.Errorf(proto.CodeInvalid, "a chunk has %d bytes: it must have 1 to %d", len(chunk), filechunk.Size)
		}
		hashes[i] = sha256.Sum256(chunk)
		where[hashes[i]] = i
	}
	missing, err := s.cfg.Index.HoldChunks(ctx, organization, workspace, hashes, time.Now())
	if err != nil {
		return nil, err
	}
	if len(missing) == 0 {
		return hashes, nil
	}
	for range keyAttempts {
		var objects []filetree.Object
		objects, err = s.upload(ctx, organization, missing, parallel, func(_ context.Context, i int) ([]byte, error) { return chunks[where[missing[i]]], nil })
		if err == nil {
			err = s.cfg.Index.EndUploads(ctx, organization, workspace, objects, time.Now())
		}
		if !errors.Is(err, filetree.ErrKeyReplaced) {
			break
		}
		s.cfg.Keys.Forget(organization)
	}
	return hashes, err
}

// keyAttempts bounds how often something is done with the newest key, of which another may have come meanwhile.
const keyAttempts = 3

// upload writes chunks as new objects, sealed with the newest key, and makes them durable: BeginUploads has been
// called for them then. atOnce of them are in memory at a time, but for those that chunk has anyway. One of which
// chunk returns nothing is left out, and has no size.
func (s *Store) upload(ctx context.Context, organization string, hashes []filetree.Hash, atOnce int, chunk func(ctx context.Context, i int) ([]byte, error)) ([]filetree.Object, error) {
	generation, key, err := s.cfg.Keys.Newest(ctx, organization)
	if err != nil {
		return nil, err
	}
	objects, keys := make([]filetree.Object, len(hashes)), make([]string, len(hashes))
	for i, hash := range hashes {
		keys[i] = newKey(organization, key.Name(hash[:]))
		objects[i] = filetree.Object{Hash: hash, Key: keys[i], Generation: generation}
	}
	if err := s.cfg.Index.BeginUploads(ctx, keys, time.Now()); err != nil {
		return nil, err
	}
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for i := range objects {
		group.Go(func() error {
			plain, err := chunk(gctx, i)
			if err != nil {
				return err
			}
			if len(plain) == 0 {
				return nil
			}
			objects[i].Size = uint32(len(plain))
			sealed, err := key.Seal(plain, about(objects[i].Hash))
			if err != nil {
				return err
			}
			return s.write(gctx, keys[i], sealed)
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	if s.dir != nil {
		written := make([]string, 0, len(keys))
		for _, o := range objects {
			if o.Size > 0 {
				written = append(written, o.Key)
			}
		}
		if err := s.dir.sync(written); err != nil {
			return nil, storeError("write", err)
		}
	}
	return objects, nil
}

// newKey is "v1/ORGANIZATION/ab/abcdef….random".
func newKey(organization, name string) string {
	var random [8]byte
	rand.Read(random[:]) //nolint:errcheck // it never fails
	return "v1/" + organization + "/" + name[:2] + "/" + name + "." + hex.EncodeToString(random[:])
}

func (s *Store) write(ctx context.Context, key string, sealed []byte) error {
	return s.try(ctx, "write", func(ctx context.Context) error {
		return s.bucket.write(ctx, key, sealed)
	})
}

// damaged notes that an object is lost, so that whoever stores the chunk next mends it.
func (s *Store) damaged(ctx context.Context, organization string, o filetree.Object, lost error) error {
	why := strings.TrimPrefix(lost.Error(), errLost.Error()+": ")
	current, err := s.cfg.Index.MarkDamaged(context.WithoutCancel(ctx), organization, o.Hash, o.Key)
	if err != nil {
		s.cfg.Logger.Warn("damaged chunk not noted", "object", o.Key, "err", err)
	}
	if current || err != nil {
		s.cfg.Metrics.damage()
		s.cfg.Logger.Error("chunk damaged", "object", o.Key, "organization", organization, "err", why)
	}
	return &proto.Error{
		Code:    proto.CodeInternal,
		Message: fmt.Sprintf("chunk %x is damaged in the control plane's object store (%s): store the file again, or restore that object from a backup", o.Hash[:8], why),
	}
}

// try makes a request of the object store, again if it fails for a reason that may pass.
func (s *Store) try(ctx context.Context, what string, request func(context.Context) error) error {
	pause := firstPause
	var err error
	for attempt := range attempts {
		if attempt > 0 {
			s.cfg.Metrics.retry(what)
			select {
			case <-time.After(time.Duration(mathrand.Int64N(int64(pause)) + 1)):
			case <-ctx.Done():
				return ctx.Err()
			}
			pause *= 2
		}
		one, cancel := context.WithTimeout(ctx, requestTime)
		began := time.Now()
		err = request(one)
		cancel()
		s.cfg.Metrics.request(what, err, time.Since(began))
		if err == nil || ctx.Err() != nil {
			return err
		}
		switch gcerrors.Code(err) {
		case gcerrors.NotFound, gcerrors.InvalidArgument, gcerrors.PermissionDenied, gcerrors.Unimplemented:
			return storeErrorUnlessNotFound(what, err)
		}
		if isFull(err) {
			break
		}
	}
	return storeErrorUnlessNotFound(what, err)
}

func storeErrorUnlessNotFound(what string, err error) error {
	if err == nil || gcerrors.Code(err) == gcerrors.NotFound {
		return err
	}
	return storeError(what, err)
}

// storeError says that the object store is at fault; the detail is for the log.
func storeError(what string, err error) error {
	var coded *proto.Error
	if errors.As(err, &coded) || errors.Is(err, context.Canceled) {
		return err
	}
	if isFull(err) {
		return &proto.Error{Code: proto.CodeStorageFull, Message: "no space is left in the control plane's object store: free some and try again", Err: err}
	}
	return &proto.Error{Code: proto.CodeUnavailable, Message: "the control plane's object store did not " + what + " a chunk: try again in a moment", Err: err}
}

const (
	// collectStep bounds what one transaction of a collection does.
	collectStep = 200
	// DefaultGrace is how long a chunk that nothing refers to is kept.
	DefaultGrace = 24 * time.Hour
)

// Collect removes what nobody refers to any more, in bounded steps, until there is nothing
// left or ctx ends. It may be stopped at any point, and run by several processes at once.
// It returns how many objects it removed.
func (s *Store) Collect(ctx context.Context) (int, error) {
	grace := s.cfg.Grace
	if grace == 0 {
		grace = DefaultGrace
	}
	for {
		now := time.Now()
		n, err := s.cfg.Index.CollectChunks(ctx, now.Add(-grace), now, collectStep)
		if err != nil {
			return 0, err
		}
		if n == 0 {
			break
		}
	}
	removed := 0
	for range math.MaxInt32 {
		keys, err := s.cfg.Index.Garbage(ctx, time.Now(), collectStep)
		if err != nil || len(keys) == 0 {
			return removed, err
		}
		group, gctx := errgroup.WithContext(ctx)
		group.SetLimit(parallel)
		for _, key := range keys {
			group.Go(func() error {
				err := s.try(gctx, "delete", func(ctx context.Context) error { return s.bucket.remove(ctx, key) })
				if gcerrors.Code(err) == gcerrors.NotFound {
					err = nil
				}
				return err
			})
		}
		if err := group.Wait(); err != nil {
			return removed, err
		}
		if s.dir != nil {
			if err := s.dir.syncRemoved(keys); err != nil {
				return removed, storeError("delete", err)
			}
		}
		if err := s.cfg.Index.ForgetGarbage(ctx, slices.Clone(keys)); err != nil {
			return removed, err
		}
		removed += len(keys)
		s.cfg.Metrics.collected(len(keys))
	}
	return removed, nil
}
