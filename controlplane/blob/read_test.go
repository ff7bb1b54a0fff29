package blob_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/postern-dev/postern/controlplane/blob"
	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
)

// ways are both ways to read chunks.
var ways = map[string]func(k *bench, ws int64, hashes []filetree.Hash) ([][]byte, error){
	"get": func(k *bench, ws int64, hashes []filetree.Hash) ([][]byte, error) {
		return k.Get(ctx, k.org, ws, hashes)
	},
	"each": func(k *bench, ws int64, hashes []filetree.Hash) (chunks [][]byte, err error) {
		var sum, want int64
		err = k.Each(ctx, k.org, ws, hashes, func(bytes int64) { want = bytes }, func(chunk []byte) error {
			chunks = append(chunks, bytes.Clone(chunk))
			sum += int64(len(chunk))
			return nil
		})
		if err == nil && sum != want {
			k.t.Errorf("%d bytes, and %d were found", sum, want)
		}
		return chunks, err
	},
}

// TestEach: chunks come in the order asked for, more of them than are in memory at once and some
// twice, of lengths that make each use the room of longer ones.
func TestEach(t *testing.T) {
	k := open(t, storetest.SQLite(t), "", 0)
	var chunks [][]byte
	for i := range 3 * blob.Ahead {
		chunks = append(chunks, chunk([]int{filechunk.Size, 1, 5000}[i%3]))
	}
	hashes := k.put(k.a, chunks...)
	chunks, hashes = append(chunks, chunks[0], chunks[1]), append(hashes, hashes[0], hashes[1])
	for range 3 {
		got, err := ways["each"](k, k.a, hashes)
		if err != nil || !slices.EqualFunc(got, chunks, bytes.Equal) {
			t.Fatalf("%d chunks, not the %d that were stored: %v", len(got), len(chunks), err)
		}
		slices.Reverse(chunks)
		slices.Reverse(hashes)
	}
	if got, err := ways["each"](k, k.a, nil); err != nil || len(got) != 0 {
		t.Errorf("of no chunks came %d: %v", len(got), err)
	}
	_, err := ways["each"](k, k.b, hashes)
	wantCode(t, err, proto.CodeNotFound)
}

// TestEachStops: an error of who takes chunks ends it at once with that error, and so does the
// end of its context; goleak sees that nothing is read on.
func TestEachStops(t *testing.T) {
	k := open(t, storetest.SQLite(t), "", 0)
	var chunks [][]byte
	for range 3 * blob.Ahead {
		chunks = append(chunks, chunk(1000))
	}
	hashes := k.put(k.a, chunks...)
	enough := errors.New("enough")
	took := 0
	err := k.Each(ctx, k.org, k.a, hashes, func(int64) {}, func([]byte) error {
		if took++; took == 2 {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) || took != 2 {
		t.Errorf("%d chunks and error %v, want 2 and the callback's", took, err)
	}
	ending, cancel := context.WithCancel(ctx)
	defer cancel()
	took = 0
	err = k.Each(ending, k.org, k.a, hashes, func(int64) {}, func([]byte) error {
		took++
		cancel()
		return nil
	})
	if !errors.Is(err, context.Canceled) || took != 1 {
		t.Errorf("%d chunks after the context ended, and error %v", took, err)
	}
}
