package content

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// NeedMap fetches the list of chunks if it is not known; afterwards the content is
// whole or has a map.
func (f *File) NeedMap(ctx context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.needMapLocked(ctx)
}

func (f *File) needMapLocked(ctx context.Context) error {
	for f.inFlight[-1] {
		if err := f.waitLocked(ctx); err != nil {
			return err
		}
	}
	if f.whole || f.chunks != nil {
		return nil
	}
	f.begin(-1)
	f.mu.Unlock()
	m, err := f.fetchMap(ctx)
	f.mu.Lock()
	f.end(-1)
	if err != nil {
		return err
	}
	if m == nil {
		f.whole = true
		return nil
	}
	f.chunks = m
	f.checked = nil
	return nil
}

func (f *File) begin(i int) {
	if f.inFlight == nil {
		f.inFlight = map[int]bool{}
	}
	f.inFlight[i] = true
	f.fetching++
}

func (f *File) end(i int) {
	delete(f.inFlight, i)
	f.fetching--
	f.cond.Broadcast()
}

// fetchMap fetches the list of chunks, or the content itself if it is inline: then it
// returns nil.
func (f *File) fetchMap(ctx context.Context) (*chunkMap, error) {
	name := f.store.mapPath(f.id)
	var m *chunkMap
	inline, isInline, err := f.store.cfg.Fetcher.Content(ctx, f.id, f.version, func(from, total int, size uint64, hashes [][]byte) (err error) {
		if m == nil {
			if total != Chunks(size) {
				return fmt.Errorf("content of %d bytes cannot have %d chunks", size, total)
			}
			if m, err = createMap(name, f.version, size, total); err != nil {
				return err
			}
		}
		if from+len(hashes) > total {
			return fmt.Errorf("%d chunks of %d", from+len(hashes), total)
		}
		return m.putHashes(from, hashes)
	})
	if err == nil && isInline {
		if err := f.fd.Truncate(int64(len(inline))); err != nil {
			return nil, err
		}
		_, err = f.fd.WriteAt(inline, 0)
		return nil, err
	}
	if err == nil && m == nil {
		return nil, f.fd.Truncate(0)
	}
	if err == nil {
		err = f.fd.Truncate(int64(m.size))
	}
	for i := 0; err == nil && i < m.chunks; i++ {
		var h []byte
		if h, err = m.hash(i); err == nil && (h == nil || f.doubt) {
			m.states[i] = present // a hole is here already
		}
	}
	if err == nil {
		err = m.commit(name)
	}
	if err != nil {
		if m != nil {
			m.file.Close()
			_ = os.Remove(name + ".new")
		}
		return nil, err
	}
	return m, nil
}

// waitLocked waits for the end of some fetch, or of ctx.
func (f *File) waitLocked(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.cond.Broadcast()
	})
	f.cond.Wait()
	stop()
	return ctx.Err()
}

// Ensure returns when the bytes [off, off+n) are here, and fetches ahead if they are read in order. An
// error of the context means that they did not come in time.
func (f *File) Ensure(ctx context.Context, off int64, n int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.whole {
		return nil
	}
	if err := f.needMapLocked(ctx); err != nil || f.whole {
		return err
	}
	first, last := int(off/chunkSize), int((off+max(n, 1)-1)/chunkSize)
	last = min(last, f.chunks.chunks-1)
	f.aheadLocked(first, last)
	for {
		missing, err := f.missingLocked(first, last)
		if err != nil {
			return err
		}
		if len(missing) == 0 {
			break
		}
		f.startLocked(missing)
		if err := f.waitLocked(ctx); err != nil {
			return err
		}
		for i := first; i <= last; i++ {
			if err := f.failed[i]; err != nil {
				delete(f.failed, i)
				return err
			}
		}
		if f.whole { // somebody else who waited was first
			return nil
		}
	}
	return f.completeLocked()
}

// missingLocked lists chunks that are not here, and checks those that are, once.
func (f *File) missingLocked(first, last int) ([]int, error) {
	var missing []int
	for i := first; i <= last; i++ {
		switch f.chunks.state(i) {
		case absent:
			missing = append(missing, i)
		case present:
			ok, err := f.checkLocked(i)
			if err != nil {
				return nil, err
			}
			if !ok {
				// Damaged on disk: as if it had never come.
				if err := f.chunks.set(i, absent); err != nil {
					return nil, err
				}
				missing = append(missing, i)
			}
		}
	}
	return missing, nil
}

func (f *File) checkLocked(i int) (bool, error) {
	if len(f.checked) < f.chunks.chunks {
		f.checked = append(f.checked, make([]bool, f.chunks.chunks-len(f.checked))...)
	}
	if f.checked[i] {
		return true, nil
	}
	want, err := f.chunks.hash(i)
	if err != nil {
		return false, err
	}
	buf := make([]byte, f.chunkLen(i))
	if _, err := f.fd.ReadAt(buf, int64(i)*chunkSize); err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	if want == nil {
		f.checked[i] = allZero(buf)
		if !f.checked[i] {
			f.checked[i] = f.punch(i) == nil
		}
		return f.checked[i], nil
	}
	sum := sha256.Sum256(buf)
	f.checked[i] = bytes.Equal(sum[:], want)
	return f.checked[i], nil
}

func (f *File) punch(i int) error {
	return unix.Fallocate(f.FD(), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(i)*chunkSize, f.chunkLen(i))
}

func allZero(b []byte) bool {
	for len(b) > 0 && b[0] == 0 {
		b = b[1:]
	}
	return len(b) == 0
}

// aheadLocked fetches behind what is read now, twice as far each time that reading goes
// on where it was expected.
func (f *File) aheadLocked(first, last int) {
	switch {
	case first == f.next || first == f.next-1:
		if last >= f.next {
			f.window = min(max(2*f.window, 2), f.store.cfg.ReadAhead)
		}
	default:
		f.window = 0
	}
	f.next = last + 1
	if f.window == 0 {
		return
	}
	var missing []int
	for i := last + 1; i <= last+f.window && i < f.chunks.chunks; i++ {
		if f.chunks.state(i) == absent && !f.inFlight[i] {
			missing = append(missing, i)
		}
	}
	// Half a window at a time, so that requests are large.
	if len(missing) >= max(1, f.window/2) || last+f.window >= f.chunks.chunks {
		f.startLocked(missing)
	}
}

// batch is how many chunks one request asks for.
const batch = 4

// startLocked fetches chunks in the background, some at a time.
func (f *File) startLocked(chunks []int) {
	for len(chunks) > 0 {
		var take []int
		for len(chunks) > 0 && len(take) < batch {
			if !f.inFlight[chunks[0]] {
				take = append(take, chunks[0])
				f.begin(chunks[0])
			}
			chunks = chunks[1:]
		}
		if len(take) == 0 {
			return
		}
		f.store.wg.Go(func() {
			f.fetch(take)
			f.store.fetched(f)
		})
	}
}

// stall is how long a fetch may bring nothing before it is given up.
const stall = 30 * time.Second

func (f *File) fetch(chunks []int) {
	ctx, cancel := context.WithCancelCause(f.store.ctx)
	defer cancel(nil)
	timer := time.AfterFunc(stall, func() { cancel(fmt.Errorf("no bytes for %v", stall)) })
	defer timer.Stop()
	var err error
	got := 0
	select {
	case f.store.slots <- struct{}{}:
		got, err = f.fetchSome(ctx, chunks, timer)
		if more := f.store.cfg.MakeRoom; more != nil && errors.Is(err, unix.ENOSPC) && more(int64(len(chunks))*chunkSize) {
			var n int
			n, err = f.fetchSome(ctx, chunks[got:], timer)
			got += n
		}
		<-f.store.slots
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err == nil && got < len(chunks) {
		err = io.ErrUnexpectedEOF
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, i := range chunks[got:] {
		if f.failed == nil {
			f.failed = map[int]error{}
		}
		f.failed[i] = err
		f.end(i)
	}
}

// wanted are the hashes and lengths of chunks: taken at once, for Rebase may put another map in
// place while they come. What is not here has the same hash in both.
func (f *File) wanted(chunks []int) (hashes [][]byte, lengths []int64, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.chunks == nil {
		return nil, nil, fmt.Errorf("node %d is here whole", f.id)
	}
	for _, c := range chunks {
		hash, err := f.chunks.hash(c)
		if err != nil {
			return nil, nil, err
		}
		hashes, lengths = append(hashes, hash), append(lengths, f.chunkLen(c))
	}
	return hashes, lengths, nil
}

func (f *File) fetchSome(ctx context.Context, chunks []int, timer *time.Timer) (got int, err error) {
	hashes, lengths, err := f.wanted(chunks)
	if err != nil {
		return 0, err
	}
	err = f.store.cfg.Fetcher.Fetch(ctx, hashes, func(i int, content []byte) error {
		timer.Reset(stall)
		if i != got {
			return fmt.Errorf("chunk %d came out of order", i)
		}
		sum := sha256.Sum256(content)
		if !bytes.Equal(sum[:], hashes[i]) || int64(len(content)) != lengths[i] {
			return fmt.Errorf("chunk %d of node %d does not have the content that its hash says", chunks[i], f.id)
		}
		if err := f.arrived(chunks[i], content); err != nil {
			return err
		}
		got++
		return nil
	})
	return got, err
}

// arrived writes a chunk, unless it was written to here meanwhile.
func (f *File) arrived(i int, content []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.chunks != nil && f.chunks.state(i) == absent {
		if _, err := f.fd.WriteAt(content, int64(i)*chunkSize); err != nil {
			return err
		}
		if err := f.chunks.set(i, present); err != nil {
			return err
		}
		if len(f.checked) < f.chunks.chunks {
			f.checked = append(f.checked, make([]bool, f.chunks.chunks-len(f.checked))...)
		}
		f.checked[i] = true
	}
	delete(f.failed, i)
	f.end(i)
	return nil
}

// completeLocked forgets the map when every chunk is here and checked.
func (f *File) completeLocked() error {
	if f.fetching > 0 {
		return nil
	}
	for i, s := range f.chunks.states {
		if s == absent || s == present && (i >= len(f.checked) || !f.checked[i]) {
			return nil
		}
	}
	name := f.chunks.file.Name()
	f.chunks.file.Close()
	f.chunks, f.checked, f.whole = nil, nil, true
	// Whoever opens it again knows from the replica's journal, or makes a new map.
	_ = name
	return nil
}

// EnsureAll returns when everything is here.
func (f *File) EnsureAll(ctx context.Context) error {
	if err := f.NeedMap(ctx); err != nil {
		return err
	}
	for !f.Whole() {
		f.mu.Lock()
		n := f.chunks.chunks
		f.mu.Unlock()
		for i := 0; i < n && !f.Whole(); i += 16 {
			if err := f.Ensure(ctx, int64(i)*chunkSize, 16*chunkSize); err != nil {
				return err
			}
		}
		f.mu.Lock()
		if !f.whole && f.chunks != nil {
			for f.fetching > 0 {
				if err := f.waitLocked(ctx); err != nil {
					f.mu.Unlock()
					return err
				}
			}
			if err := f.completeLocked(); err != nil {
				f.mu.Unlock()
				return err
			}
		}
		f.mu.Unlock()
	}
	return nil
}
