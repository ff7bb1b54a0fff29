package content

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

type unixStat = syscall.Stat_t

// ErrLost is returned when a content that only this host has is not here.
var ErrLost = errors.New("content that was not uploaded is gone from this host")

// ErrChanged is returned by Rebase for a content that is not any more what was sent.
var ErrChanged = errors.New("content was changed since it was sent")

// File is a content that is open.
type File struct {
	store   *Store
	id      uint64
	version uint64
	users   int // under store.mu
	fd      *os.File

	mu       sync.Mutex
	cond     *sync.Cond // a fetch ended
	whole    bool
	chunks   *chunkMap // nil if whole, or not known yet
	checked  []bool    // chunks that this process has checked
	inFlight map[int]bool
	fetching int
	failed   map[int]error // why the last fetch of a chunk failed; taken by who waits
	changing int           // changes of the backing file on their way: Change to done
	newName  bool          // the file was made since its directory was synced
	doubt    bool          // without a map, there may be something good here

	// A content that is not here whole changes when chunks arrive, so its times say nothing:
	// while tracked, stamp is when it was last written to.
	tracked bool
	stamp   int64

	next   int // the chunk that a reader in order reads next
	window int
}

func (f *File) open(w Want) error {
	name := f.store.Path(w.ID)
	fd, err := os.OpenFile(name, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		if w.Size == 0 {
			f.whole = true // and it has no backing file until somebody writes to it
			return nil
		}
		if w.Changed {
			return fmt.Errorf("%w: %s", ErrLost, name)
		}
		fd, err = os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		f.newName = true
		f.whole = false
	}
	if err != nil {
		return err
	}
	f.fd = fd
	if w.Size == 0 {
		f.whole = true
		if info, err := fd.Stat(); w.Changed || err == nil && info.Size() == 0 {
			return err
		}
		return fd.Truncate(0)
	}
	if f.whole {
		return nil
	}
	m, err := openMap(f.store.mapPath(w.ID))
	switch {
	case err == nil && w.Changed:
		// Of whatever version it is: chunks that are not here are the same in all since.
		f.chunks = m
	case err == nil && m.version == w.Version:
		for i, s := range m.states[:m.chunks] {
			if s == changed {
				m.states[i] = present // sent since; checked before it is used
			}
		}
		m.states = m.states[:m.chunks]
		f.chunks = m
	case w.Changed:
		fd.Close()
		return fmt.Errorf("%w: %w", ErrLost, err)
	case err == nil:
		m.file.Close()
		fallthrough
	default:
		if f.doubt = w.Doubt; f.doubt {
			return nil // what is here is checked when the hashes are
		}
		// Nothing of that version is here.
		if err := fd.Truncate(0); err != nil {
			fd.Close()
			return err
		}
		if err := fd.Truncate(int64(w.Size)); err != nil {
			fd.Close()
			return err
		}
	}
	return nil
}

func (f *File) close() {
	if f.fd != nil {
		f.fd.Close()
	}
	if f.chunks != nil {
		f.chunks.file.Close()
	}
}

// Untouched tells whether there is no backing file yet: the content is empty.
func (f *File) Untouched() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fd == nil
}

// backing returns the backing file, which it makes if needed.
func (f *File) backing() (*os.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd == nil {
		fd, err := os.OpenFile(f.store.Path(f.id), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		f.fd, f.newName = fd, true
	}
	return f.fd, nil
}

// FD is the descriptor of the backing file, valid until the File is released. It must not be
// Untouched.
func (f *File) FD() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return int(f.fd.Fd())
}

// ReadAt and WriteAt reach the backing file; see Ensure and Change.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if f.Untouched() {
		return 0, io.EOF
	}
	return f.fd.ReadAt(p, off)
}

// WriteAt writes to the backing file.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	fd, err := f.backing()
	if err != nil {
		return 0, err
	}
	defer f.written()
	return fd.WriteAt(p, off)
}

// written notes that the content was changed here.
func (f *File) written() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stamp = max(f.store.cfg.NowForTest().UnixNano(), f.stamp+1)
}

// Untrack returns the change time of the backing file of a content that has become whole,
// which is what Stat tells from then on. ok is false if it was so before.
func (f *File) Untrack() (ctime int64, ok bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.tracked || !f.whole || f.fd == nil {
		return 0, false, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.fd.Fd()), &st); err != nil {
		return 0, false, err
	}
	f.tracked = false
	return st.Ctim.Nano(), true, nil
}

// Allocate is fallocate(2).
func (f *File) Allocate(mode uint32, off, n int64) error {
	fd, err := f.backing()
	if err != nil {
		return err
	}
	defer f.written()
	return unix.Fallocate(int(fd.Fd()), mode, off, n)
}

// Stat is the backing file's, or, for a content that is not here whole, when it was last written
// to. All is 0 for one that is Untouched.
func (f *File) Stat() (size uint64, mtime, ctime int64, err error) {
	if f.Untouched() {
		return 0, 0, 0, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(f.FD(), &st); err != nil {
		return 0, 0, 0, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.tracked {
		return uint64(st.Size), f.stamp, f.stamp, nil
	}
	return uint64(st.Size), st.Mtim.Nano(), st.Ctim.Nano(), nil
}

// Blocks is what the content takes on disk, in units of 512 bytes.
func (f *File) Blocks() uint64 {
	var st unix.Stat_t
	if f.Untouched() || unix.Fstat(f.FD(), &st) != nil {
		return 0
	}
	return uint64(st.Blocks)
}

// Whole tells whether all of it is here, and without a map.
func (f *File) Whole() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.whole
}

// Sync makes the content durable, and its name.
func (f *File) Sync() error {
	if f.Untouched() {
		return nil
	}
	if err := unix.Fdatasync(f.FD()); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.chunks != nil {
		if err := unix.Fdatasync(int(f.chunks.file.Fd())); err != nil {
			return err
		}
	}
	if f.newName || f.chunks != nil {
		d, err := os.Open(filepath.Dir(f.fd.Name()))
		if err != nil {
			return err
		}
		defer d.Close()
		if err := d.Sync(); err != nil {
			return err
		}
		f.newName = false
	}
	if tell := f.store.cfg.SyncedForTest; tell != nil {
		tell(f.fd.Name())
		if f.chunks != nil {
			tell(f.store.mapPath(f.id))
		}
	}
	return nil
}

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

// chunkLen is the length of a chunk of the version.
func (f *File) chunkLen(i int) int64 {
	return min(chunkSize, int64(f.chunks.size)-int64(i)*chunkSize)
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
