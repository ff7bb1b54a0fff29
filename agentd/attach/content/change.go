package content

import (
	"context"
	"errors"
)

// ErrChanged is returned by Rebase for a content that is not any more what was sent.
var ErrChanged = errors.New("content was changed since it was sent")

// Change must be called before [off, off+n) is written to: it fetches what of the chunks at
// both ends is not overwritten, and notes that they are this host's now. done must be called, once,
// when it was written to: until then the content is no version's.
func (f *File) Change(ctx context.Context, off, n int64) (done func(), err error) {
	if f.Whole() || n <= 0 {
		return func() {}, nil
	}
	if err := f.NeedMap(ctx); err != nil {
		return nil, err
	}
	first, last := off/chunkSize, (off+n-1)/chunkSize
	for _, i := range []int64{first, last} {
		if off <= i*chunkSize && off+n >= (i+1)*chunkSize {
			continue
		}
		if err := f.Ensure(ctx, i*chunkSize, 1); err != nil {
			return nil, err
		}
	}
	return f.mark(int(first), int(last)+1)
}

// mark notes that chunks [from, to) are this host's, and that they are being changed until done.
func (f *File) mark(from, to int) (done func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.whole {
		for i := from; i < to; i++ {
			if f.chunks.state(i) != changed || i >= len(f.chunks.states) {
				if err := f.chunks.set(i, changed); err != nil {
					return nil, err
				}
			}
		}
	}
	f.changing++
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.changing--
	}, nil
}

// Truncate sets the size.
func (f *File) Truncate(ctx context.Context, size int64) error {
	if f.Untouched() {
		if size == 0 {
			return nil
		}
		if _, err := f.backing(); err != nil {
			return err
		}
	}
	old, _, _, err := f.Stat()
	if err != nil {
		return err
	}
	f.mu.Lock()
	whole := f.whole
	f.mu.Unlock()
	if !whole && size == 0 {
		f.mu.Lock()
		for f.fetching > 0 {
			if err := f.waitLocked(ctx); err != nil {
				f.mu.Unlock()
				return err
			}
		}
		if f.chunks != nil {
			f.chunks.file.Close()
			f.chunks = nil
		}
		f.whole = true
		f.mu.Unlock()
		err := f.fd.Truncate(0)
		f.written()
		return err
	}
	if !whole {
		// The chunk at the cut is not the version's any more, and those behind it are gone.
		from, to := min(size, int64(old)), max(size, int64(old))
		if from%chunkSize != 0 {
			done, err := f.Change(ctx, from, 1)
			if err != nil {
				return err
			}
			defer done()
		}
		if err := f.NeedMap(ctx); err != nil {
			return err
		}
		f.mu.Lock()
		known := 0
		if f.chunks != nil {
			known = len(f.chunks.states)
		}
		f.mu.Unlock()
		done, err := f.mark(int((from+chunkSize-1)/chunkSize), min(Chunks(uint64(to)), known))
		if err != nil {
			return err
		}
		defer done()
	}
	err = f.fd.Truncate(size)
	f.written() // before it is done
	return err
}

// Known tells a chunk's hash if it is as the version has it, so that it need not be read. size is
// the content's now.
func (f *File) Known(i int, size uint64) (hash []byte, ok bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.whole || f.chunks == nil || i >= f.chunks.chunks || f.chunks.state(i) == changed || f.chunkLen(i) != min(chunkSize, int64(size)-int64(i)*chunkSize) {
		return nil, false, nil
	}
	hash, err = f.chunks.hash(i)
	return hash, err == nil, err
}

// Rebase says that the content as Stat told its change time is a version, of these chunks. It
// returns ErrChanged, and does nothing, if the content was changed since, or is being changed.
func (f *File) Rebase(version, size uint64, hashes [][]byte, stamp int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.whole && (f.changing > 0 || f.tracked && f.stamp != stamp) {
		return ErrChanged
	}
	if f.version = version; f.whole || f.chunks == nil {
		return nil
	}
	old, name := f.chunks, f.store.mapPath(f.id)
	m, err := createMap(name, version, size, len(hashes))
	if err != nil {
		return err
	}
	if err = m.putHashes(0, hashes); err == nil {
		for i := range m.states {
			if m.states[i] = present; old.state(i) == absent {
				m.states[i] = absent
			}
		}
		err = m.commit(name)
	}
	if err != nil {
		m.file.Close()
		return err
	}
	old.file.Close()
	f.chunks, f.checked = m, nil
	return nil
}
