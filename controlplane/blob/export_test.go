package blob

import (
	"context"
	"errors"
	"sync/atomic"
)

// Flaky lets one request in n of the object store fail, half of them after they were done;
// a seam for tests alone. Broken tells how many failed.
func (s *Store) Flaky(n int64) (broken func() int64) {
	f := &flaky{bucket: s.bucket, n: n}
	s.bucket = f
	return f.broken.Load
}

type flaky struct {
	bucket
	n      int64
	asked  atomic.Int64
	broken atomic.Int64
}

var errFlaky = errors.New("the network is bad")

func (f *flaky) fails(do func() error) error {
	if f.asked.Add(1)%f.n != 0 {
		return do()
	}
	if f.broken.Add(1)%2 == 0 {
		if err := do(); err != nil {
			return err
		}
	}
	return errFlaky
}

func (f *flaky) write(ctx context.Context, key string, body []byte) error {
	return f.fails(func() error { return f.bucket.write(ctx, key, body) })
}

func (f *flaky) read(ctx context.Context, key string, into []byte) (b []byte, err error) {
	err = f.fails(func() error { b, err = f.bucket.read(ctx, key, into); return err })
	return b, err
}

func (f *flaky) remove(ctx context.Context, key string) error {
	return f.fails(func() error { return f.bucket.remove(ctx, key) })
}

// Failing lets every write fail with err; a seam for tests alone.
func (s *Store) Failing(err error) { s.bucket = failing{s.bucket, err} }

type failing struct {
	bucket
	err error
}

func (f failing) write(context.Context, string, []byte) error { return f.err }
