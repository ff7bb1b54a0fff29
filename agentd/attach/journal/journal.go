package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// MaxEntry is the largest payload in bytes.
const MaxEntry = 16 << 20

const (
	magic      = "PJe1"
	headerSize = 4 + 4 + 8 + 1 + 4
	// ahead is how much room on disk is kept allocated behind the end, in bytes, so that
	// a full disk is noticed before a change is made, not in the midst of it.
	ahead = 4 << 20
	// spare is what of it only ReserveLast gives: on a full disk it must still be possible to
	// remove files, and to note what was uploaded.
	spare = 1 << 20
	// zeroStep is how much is zeroed at a time, in bytes.
	zeroStep = 1 << 20
	// keptBuffer bounds the room for entries that is used again, in bytes: one for every small
	// change would be garbage that the collector has to find.
	keptBuffer = 64 << 10
)

// firstName is the first segment while it is made.
const firstName = "first"

const (
	kindEntry byte = iota + 1
	kindDump
	kindDumpEnd
)

var (
	// ErrCorrupt is returned by Open when bytes that had been synced are damaged.
	ErrCorrupt = errors.New("journal is damaged")
	// ErrBroken is returned after a write or sync failed: what is on disk is not known,
	// and nothing more is promised until the journal is opened again.
	ErrBroken = errors.New("journal could not be written")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Position is an amount of entries: Sync(p) makes those durable that were appended when
// Append returned p. The zero Position is synced already.
type Position struct {
	segment uint64
	offset  int64
}

// Place is where a payload lies on disk, for ReadAt. It is valid until the segment is
// replaced, which Begin does.
type Place struct {
	segment uint64
	offset  int64
	length  int
}

// Journal is an open journal.
type Journal struct {
	dir    string
	synced func(path string, length int64) // tests: what a loss of power leaves

	mu       sync.Mutex // guards what follows; held for writes to the page cache, not for syncs
	cond     *sync.Cond
	file     *os.File
	segment  uint64
	end      int64 // of the entries written
	room     int64 // allocated
	zeroed   int64 // the file's size: zeros from end on
	durable  int64 // of segment, synced
	begun    int64 // where the dump ended
	settled  bool  // segment's dump is durable and older segments are removed
	syncing  bool
	broken   error
	previous []string // segments to remove when this one is durable
	buf      []byte   // for the entry that is written; at most keptBuffer
}

// Open opens the journal in dir, which it makes if needed, and calls replay with every
// payload of its newest whole segment, in order, and the place where it lies. The payload is only valid
// during the call. A journal that has no entries calls replay never.
func Open(dir string, replay func(payload []byte, at Place) error) (*Journal, error) {
	return open(dir, replay, nil)
}

// OpenForTest is Open with a function that is told of each segment how much of it is
// on disk for sure: what a loss of power would leave.
func OpenForTest(dir string, replay func([]byte, Place) error, synced func(path string, length int64)) (*Journal, error) {
	return open(dir, replay, synced)
}

func open(dir string, replay func([]byte, Place) error, synced func(string, int64)) (*Journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	numbers, err := segments(dir)
	if err != nil {
		return nil, err
	}
	j := &Journal{dir: dir, synced: synced}
	j.cond = sync.NewCond(&j.mu)
	for i := len(numbers) - 1; i >= 0; i-- {
		name := j.path(numbers[i])
		whole, end, err := scan(name, numbers[i], nil)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if !whole {
			// Begin was cut short; the one before it is still there.
			if i == 0 {
				return nil, fmt.Errorf("%s: %w: its beginning is not whole and no older segment is there", name, ErrCorrupt)
			}
			if err := os.Remove(name); err != nil {
				return nil, err
			}
			continue
		}
		if _, _, err := scan(name, numbers[i], replay); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		file, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		// What is torn is cut off. Where nothing is, the room behind the end stays.
		size, err := zerosUpTo(file, end)
		if err != nil {
			file.Close()
			return nil, err
		}
		j.file, j.segment, j.end, j.room, j.zeroed = file, numbers[i], end, end, size
		for _, n := range numbers[:i] {
			j.previous = append(j.previous, j.path(n))
		}
		return j, nil
	}
	if err := j.first(); err != nil {
		return nil, err
	}
	return j, nil
}

// first begins the journal. Its first segment is whole on disk before it has its name: with nothing
// before it, one that is not whole is damage, and not the end of a process or a host.
func (j *Journal) first() error {
	name := j.path(1)
	file, err := os.OpenFile(filepath.Join(j.dir, firstName), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	w := &dumpWriter{file: file}
	if err = w.add(kindDumpEnd, nil); err == nil {
		err = w.flush()
	}
	if err == nil {
		err = file.Sync()
	}
	if err == nil {
		err = os.Rename(file.Name(), name)
	}
	if err == nil {
		err = syncDir(j.dir)
	}
	if err != nil {
		file.Close()
		return err
	}
	j.file, j.segment, j.end, j.room, j.zeroed, j.begun, j.durable, j.settled = file, 1, w.end, w.end, w.end, w.end, w.end, true
	if j.synced != nil {
		j.synced(name, w.end)
	}
	return nil
}

// zerosUpTo cuts a file off at end unless nothing but zeros is behind it, and returns its size.
func zerosUpTo(f *os.File, end int64) (size int64, err error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	buf := make([]byte, min(max(info.Size()-end, 0), 256<<10))
	for at := end; at < info.Size(); at += int64(len(buf)) {
		n, err := f.ReadAt(buf, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		for _, b := range buf[:n] {
			if b != 0 {
				return end, f.Truncate(end)
			}
		}
	}
	return info.Size(), nil
}

func segments(dir string) ([]uint64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var numbers []uint64
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), "journal-")
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(rest, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%s: not a segment of a journal; move it away", filepath.Join(dir, e.Name()))
		}
		at := len(numbers)
		for at > 0 && numbers[at-1] > n {
			at--
		}
		numbers = append(numbers[:at], append([]uint64{n}, numbers[at:]...)...)
	}
	return numbers, nil
}

func (j *Journal) path(segment uint64) string {
	return filepath.Join(j.dir, "journal-"+strconv.FormatUint(segment, 10))
}

// Reserve makes room on disk for n more bytes of payloads. It returns ENOSPC, and nothing has
// happened, when there is none.
func (j *Journal) Reserve(n int) error { return j.reserve(n, spare) }

// ReserveLast is Reserve for what makes room elsewhere or must not fail: it may use the last
// MiB of a full disk, which Reserve leaves.
func (j *Journal) ReserveLast(n int) error { return j.reserve(n, 0) }

func (j *Journal) reserve(n int, leave int64) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.broken != nil {
		return j.broken
	}
	need := j.end + int64(n) + 16*headerSize + leave
	if need <= j.room {
		j.zeroLocked(need)
		return nil
	}
	err := unix.Fallocate(int(j.file.Fd()), unix.FALLOC_FL_KEEP_SIZE, j.end, need-j.end+ahead)
	if err == nil {
		j.room = need + ahead
		j.zeroLocked(need)
		return nil
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	// Perhaps there is just enough.
	if errors.Is(err, unix.ENOSPC) && unix.Fallocate(int(j.file.Fd()), unix.FALLOC_FL_KEEP_SIZE, j.end, need-j.end) == nil {
		j.room = need
		return nil
	}
	return err
}

// zeroLocked writes zeros where entries will be written, up to need at least, of what is allocated.
// To sync an entry that makes the file longer, or that is the first in its blocks, the file system
// has to commit what it knows of the file as well, at twice the cost and more; over zeros it is only data.
// Replay ends at them. That they could not be written changes nothing else.
func (j *Journal) zeroLocked(need int64) {
	if need <= j.zeroed {
		return
	}
	to := min(need+zeroStep, j.room)
	for from := max(j.zeroed, j.end); from < to; from = j.zeroed {
		n := min(to-from, int64(len(zeros)))
		if _, err := j.file.WriteAt(zeros[:n], from); err != nil {
			return
		}
		j.zeroed = from + n
	}
}

var zeros [256 << 10]byte

// Append writes an entry of one payload and returns the position to Sync. It returns where the payload lies, too.
func (j *Journal) Append(payload []byte) (Position, Place, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.broken != nil {
		return Position{}, Place{}, j.broken
	}
	at := j.end
	if err := j.writeLocked(kindEntry, payload); err != nil {
		return Position{}, Place{}, err
	}
	return Position{j.segment, j.end}, Place{j.segment, at + headerSize, len(payload)}, nil
}

func (j *Journal) writeLocked(kind byte, payload []byte) error {
	if len(payload) > MaxEntry {
		return fmt.Errorf("journal entry of %d bytes: at most %d", len(payload), MaxEntry)
	}
	n := headerSize + len(payload)
	buf := j.buf
	if n > len(buf) {
		if buf = make([]byte, n); n <= keptBuffer {
			j.buf = buf
		}
	}
	buf = buf[:n]
	putHeader(buf, kind, j.durable, payload)
	if _, err := j.file.WriteAt(buf, j.end); err != nil {
		j.broken = fmt.Errorf("%w: %w", ErrBroken, err)
		return j.broken
	}
	j.end += int64(len(buf))
	return nil
}

func putHeader(buf []byte, kind byte, durable int64, payload []byte) {
	copy(buf, magic)
	binary.LittleEndian.PutUint32(buf[4:], uint32(len(payload)))
	binary.LittleEndian.PutUint64(buf[8:], uint64(durable))
	buf[16] = kind
	copy(buf[headerSize:], payload)
	sum := crc32.Update(crc32.Checksum(buf[4:17], castagnoli), castagnoli, payload)
	binary.LittleEndian.PutUint32(buf[17:], sum)
}

// Sync returns when everything up to p is on disk. Many may wait for one fdatasync.
func (j *Journal) Sync(p Position) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	for {
		if j.broken != nil {
			return j.broken
		}
		if p.segment < j.segment && j.settled || p.segment == j.segment && p.offset <= j.durable && j.settled || p == (Position{}) {
			return nil
		}
		if j.syncing {
			j.cond.Wait()
			continue
		}
		j.syncLocked()
	}
}

// syncLocked syncs the current segment, without the lock meanwhile. A segment that was
// just begun holds all of those before it.
func (j *Journal) syncLocked() {
	j.syncing = true
	file, end, settled, segment := j.file, j.end, j.settled, j.segment
	j.mu.Unlock()
	err := unix.Fdatasync(int(file.Fd()))
	if err == nil && !settled {
		err = syncDir(j.dir)
	}
	j.mu.Lock()
	j.syncing = false
	j.cond.Broadcast()
	if err != nil {
		// What fsync did not write is lost, and a second one would not say so.
		j.broken = fmt.Errorf("%w: %w", ErrBroken, err)
		return
	}
	j.durable = end
	if j.synced != nil {
		j.synced(j.path(segment), end)
	}
	if !settled {
		j.settled = true
		for _, name := range j.previous {
			_ = os.Remove(name)
		}
		j.previous = nil
	}
}

// End is the position of all that is in the journal: what Open replayed may be in the page cache only, if it
// was the process that ended.
func (j *Journal) End() Position {
	j.mu.Lock()
	defer j.mu.Unlock()
	return Position{j.segment, j.end}
}

// Size tells how many bytes the journal has grown since its dump.
func (j *Journal) Size() int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.end - j.begun
}

// Begin starts a new segment with what dump adds, and later Appends go there. Nobody may
// append meanwhile: the caller holds the lock of what it dumps. Older segments stay until
// the next Sync. An error of a dump leaves the journal as it was.
func (j *Journal) Begin(dump func(add func(payload []byte) error) error) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	for j.syncing {
		j.cond.Wait()
	}
	if j.broken != nil {
		return j.broken
	}
	number := j.segment + 1
	name := j.path(number)
	file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	w := &dumpWriter{file: file}
	err = dump(func(payload []byte) error { return w.add(kindDump, payload) })
	if err == nil {
		err = w.add(kindDumpEnd, nil)
	}
	if err == nil {
		err = w.flush()
	}
	if err != nil {
		file.Close()
		_ = os.Remove(name)
		return err
	}
	if j.file != nil {
		j.previous = append(j.previous, j.path(j.segment))
		j.file.Close()
	}
	j.file, j.segment, j.end, j.room, j.zeroed, j.begun = file, number, w.end, w.end, w.end, w.end
	j.durable, j.settled = 0, false
	return nil
}

type dumpWriter struct {
	file *os.File
	buf  []byte
	end  int64
}

func (w *dumpWriter) add(kind byte, payload []byte) error {
	if len(payload) > MaxEntry {
		return fmt.Errorf("journal entry of %d bytes: at most %d", len(payload), MaxEntry)
	}
	at := len(w.buf)
	w.buf = append(w.buf, make([]byte, headerSize+len(payload))...)
	putHeader(w.buf[at:], kind, 0, payload)
	if len(w.buf) >= 1<<20 {
		return w.flush()
	}
	return nil
}

func (w *dumpWriter) flush() error {
	_, err := w.file.WriteAt(w.buf, w.end)
	w.end += int64(len(w.buf))
	w.buf = w.buf[:0]
	return err
}

// ReadAt reads a payload again.
func (j *Journal) ReadAt(at Place) ([]byte, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if at.segment != j.segment {
		return nil, fmt.Errorf("segment %d of the journal is gone", at.segment)
	}
	buf := make([]byte, at.length)
	_, err := j.file.ReadAt(buf, at.offset)
	return buf, err
}

// Close syncs and closes the journal.
func (j *Journal) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	for j.syncing {
		j.cond.Wait()
	}
	if j.file == nil {
		return nil
	}
	if j.broken == nil {
		j.syncLocked()
	}
	err := j.broken
	if cerr := j.file.Close(); err == nil {
		err = cerr
	}
	j.file = nil
	if j.broken == nil {
		j.broken = fmt.Errorf("%w: closed", ErrBroken)
	}
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
