package content

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"testing"
)

// nothingToFetch is a Fetcher of a content of one chunk.
type nothingToFetch struct{ content []byte }

func (n nothingToFetch) Content(_ context.Context, _, _ uint64, chunks func(from, total int, size uint64, hashes [][]byte) error) ([]byte, bool, error) {
	sum := sha256.Sum256(n.content)
	return nil, false, chunks(0, 2, uint64(chunkSize)+1, [][]byte{sum[:], nil})
}

func (n nothingToFetch) Fetch(_ context.Context, _ [][]byte, got func(int, []byte) error) error {
	return got(0, n.content)
}

// TestRebaseWhileChanged: a content that is being written to, or was written to since it was
// sent, is no version's: chunks of it would be taken for damaged, and fetched again.
func TestRebaseWhileChanged(t *testing.T) {
	remote := bytes.Repeat([]byte{1}, int(chunkSize))
	s, err := Open(Config{Dir: t.TempDir(), Fetcher: nothingToFetch{remote}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	f, err := s.Acquire(Want{ID: 7, Version: 1, Size: uint64(chunkSize) + 1, Stamp: 5})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Release(f)
	done, err := f.Change(t.Context(), 100, 3)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(remote)
	sent := [][]byte{sum[:], nil}
	if err := f.Rebase(2, uint64(chunkSize)+1, sent, 5); !errors.Is(err, ErrChanged) {
		t.Errorf("while a write is on its way: %v", err)
	}
	if _, err := f.WriteAt([]byte("new"), 100); err != nil {
		t.Fatal(err)
	}
	done()
	if err := f.Rebase(2, uint64(chunkSize)+1, sent, 5); !errors.Is(err, ErrChanged) {
		t.Errorf("after a write: %v", err)
	}
	if _, known, err := f.Known(0, uint64(chunkSize)+1); known || err != nil {
		t.Errorf("the chunk that was written to is the version's, %v", err)
	}
	if err := f.Ensure(t.Context(), 0, 200); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 3)
	if _, err := f.ReadAt(got, 100); err != nil || string(got) != "new" {
		t.Errorf("read %q, %v", got, err)
	}
	_, _, stamp, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	copy(remote[100:], "new")
	sum = sha256.Sum256(remote)
	if err := f.Rebase(2, uint64(chunkSize)+1, [][]byte{sum[:], nil}, stamp); err != nil {
		t.Errorf("of what it is: %v", err)
	}
	if _, known, err := f.Known(0, uint64(chunkSize)+1); !known || err != nil {
		t.Errorf("after the version was sent: known %v, %v", known, err)
	}
}
