package blob

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"

	"gocloud.dev/gcerrors"
	"golang.org/x/sync/errgroup"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
)

// Get returns the chunks of these hashes, in the same order, that a workspace holds.
// NOT_FOUND means that it does not hold one of them, UNAVAILABLE that the object store did
// not answer, INTERNAL that an object was altered or is gone. At most 256 are had at once.
func (s *Store) Get(ctx context.Context, organization string, workspace int64, hashes []filetree.Hash) ([][]byte, error) {
	r, err := s.reader(ctx, organization, workspace, hashes)
	if err != nil {
		return nil, err
	}
	chunks := make([][]byte, len(hashes))
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(parallel)
	for i, hash := range hashes {
		group.Go(func() error {
			chunk, err := r.read(gctx, r.objects[hash], make([]byte, r.objects[hash].Size+overhead+1), true)
			chunks[i] = chunk
			return err
		})
	}
	return chunks, group.Wait()
}

// Ahead is how many chunks one call of Each has in memory at most.
const Ahead = 8

// room is a sealed chunk, and one byte by which one that is too long is told.
type room [filechunk.Size + overhead + 1]byte

var rooms = sync.Pool{New: func() any { return new(room) }}

// Each is Get for who sends chunks on: it calls found with the sum of their lengths, before
// anything is read, then each with one after the other, while the next are read. A chunk is each's until it
// returns. It has the errors of Get, and those of each. Chunks are not hashed: a seal that opens
// says whose hash it was given when the chunk was hashed, and who they are sent to hashes each.
func (s *Store) Each(ctx context.Context, organization string, workspace int64, hashes []filetree.Hash, found func(bytes int64), each func(chunk []byte) error) error {
	r, err := s.reader(ctx, organization, workspace, hashes)
	if err != nil {
		return err
	}
	var bytes int64
	for _, hash := range hashes {
		bytes += int64(r.objects[hash].Size)
	}
	found(bytes)
	ctx, cancel := context.WithCancel(ctx)
	type reading struct {
		room  *room
		chunk []byte
		err   error
		done  chan struct{}
	}
	var line []*reading // in order; the first is wanted next
	defer func() {
		cancel()
		for _, one := range line {
			<-one.done
			rooms.Put(one.room)
		}
	}()
	next := 0
	for range hashes {
		// One of them is being sent while the others are read.
		for ; next < len(hashes) && len(line) < Ahead; next++ {
			one, o := &reading{room: rooms.Get().(*room), done: make(chan struct{})}, r.objects[hashes[next]]
			line = append(line, one)
			go func() { // waited for above or below
				defer close(one.done)
				one.chunk, one.err = r.read(ctx, o, one.room[:int(o.Size)+overhead+1], false)
			}()
		}
		one := line[0]
		<-one.done
		if one.err == nil {
			one.err = ctx.Err()
		}
		if one.err == nil {
			one.err = each(one.chunk)
		}
		if one.err != nil {
			return one.err
		}
		line = line[1:]
		rooms.Put(one.room)
	}
	return nil
}

// reader reads chunks that a workspace holds.
type reader struct {
	store        *Store
	organization string
	workspace    int64
	objects      map[filetree.Hash]filetree.Object
}

// reader finds the objects of chunks.
func (s *Store) reader(ctx context.Context, organization string, workspace int64, hashes []filetree.Hash) (*reader, error) {
	objects, err := s.cfg.Index.ChunkObjects(ctx, organization, workspace, hashes)
	if err != nil {
		return nil, err
	}
	for _, hash := range hashes {
		o, ok := objects[hash]
		if !ok {
			return nil, proto.Errorf(proto.CodeNotFound, "this workspace has no chunk %x", hash[:8])
		}
		if o.Size == 0 || o.Size > filechunk.Size {
			return nil, proto.Errorf(proto.CodeInternal, "the index has chunk %x with %d bytes: at most %d are possible", hash[:8], o.Size, filechunk.Size)
		}
	}
	return &reader{s, organization, workspace, objects}, nil
}

// read reads an object into a buffer that has room for it sealed and one byte more, and
// opens it there; hashed: what it holds is hashed, too.
func (r *reader) read(ctx context.Context, o filetree.Object, into []byte, hashed bool) (chunk []byte, err error) {
	s := r.store
	for range keyAttempts {
		if chunk, err = s.read(ctx, r.organization, o, into, hashed); !errors.Is(err, errLost) {
			return chunk, err
		}
		// It may have been sealed anew since it was looked for.
		again, aerr := s.cfg.Index.ChunkObjects(ctx, r.organization, r.workspace, []filetree.Hash{o.Hash})
		if aerr != nil {
			return nil, aerr
		}
		next, ok := again[o.Hash]
		if !ok || next.Key == o.Key || next.Size != o.Size {
			break
		}
		o = next
	}
	return nil, s.damaged(ctx, r.organization, o, err)
}

// errLost is wrapped by errors that say that an object is not what it should be.
var errLost = errors.New("object lost")

// read reads an object into a buffer that has room for it sealed and one byte more, and
// opens it there; hashed: what it holds is hashed, too. An errLost says that it is damaged, or
// another one by now.
func (s *Store) read(ctx context.Context, organization string, o filetree.Object, into []byte, hashed bool) ([]byte, error) {
	key, err := s.cfg.Keys.Of(ctx, organization, o.Generation)
	if errors.Is(err, filetree.ErrKeyReplaced) {
		return nil, fmt.Errorf("%w: its key is gone", errLost)
	}
	if err != nil {
		return nil, err
	}
	var sealed []byte
	err = s.try(ctx, "read", func(ctx context.Context) (err error) {
		sealed, err = s.bucket.read(ctx, o.Key, into)
		return err
	})
	if gcerrors.Code(err) == gcerrors.NotFound {
		return nil, fmt.Errorf("%w: its object is gone", errLost)
	}
	if err != nil {
		return nil, storeError("read", err)
	}
	chunk, err := key.OpenInPlace(sealed, about(o.Hash))
	if err != nil || len(chunk) != int(o.Size) || hashed && sha256.Sum256(chunk) != o.Hash {
		return nil, fmt.Errorf("%w: its object was altered", errLost)
	}
	return chunk, nil
}
