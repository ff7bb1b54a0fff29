package journal

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// MinBytes is the smallest ring.
	MinBytes = 1 << 20
	// MaxClients bounds the clients that are remembered; the one that was not heard of
	// for longest goes first.
	MaxClients = 128
	// MaxClient bounds a client's name in bytes.
	MaxClient = 128
	// segments is into how many the ring is cut.
	segments = 8
)

var (
	// ErrClosed is returned after Close.
	ErrClosed = errors.New("the journal is closed")
	// ErrInUse is returned by Open when another process has the directory.
	ErrInUse = errors.New("the journal is in use by another process")
)

// Config is what a journal needs.
type Config struct {
	// Dir is its directory; it is made (0700).
	Dir string
	// MaxBytes bounds it; at least MinBytes.
	MaxBytes int64
	// Logger; nil discards.
	Logger *slog.Logger
}

// Request is one that was sent to the kernel and not answered.
type Request struct {
	ID     string `json:"id"`
	Client string `json:"client"`
	// Type and Channel of the message.
	Type    string `json:"type"`
	Channel string `json:"channel"`
	// Header is the message's, which an answer repeats.
	Header json.RawMessage `json:"header,omitempty"`
	// Generation of the kernel's processes, and Epoch of the connections to them.
	Generation uint64 `json:"generation"`
	Epoch      uint64 `json:"epoch"`
}

// snapshot is what is remembered beside messages.
type snapshot struct {
	Next     uint64               `json:"next"`
	Clients  map[string]*position `json:"clients"`
	Requests map[string]Request   `json:"requests"`
}

// position is up to where a client confirmed.
type position struct {
	Confirmed uint64 `json:"confirmed"`
	// Heard orders clients by when they were heard of.
	Heard uint64 `json:"heard"`
}

// segment is one file of the ring.
type segment struct {
	index uint64
	path  string
	// first is the next sequence number when it was begun; size is what is committed.
	first uint64
	size  int64
}

// Journal is an open journal.
type Journal struct {
	cfg    Config
	logger *slog.Logger
	lock   *os.File

	// writing serialises writers; it is taken before mu.
	writing sync.Mutex
	active  *os.File
	marks   *marks
	lastErr string // of a disk that takes nothing, said once
	dirty   bool
	wrote   time.Time // last append
	synced  time.Time

	// mu guards the following; held for memory alone.
	mu     sync.Mutex
	segs   []*segment // oldest first; the last is active
	next   uint64     // sequence number of the next message
	heard  uint64
	state  snapshot
	news   chan struct{} // closed by the next append
	closed bool

	stop chan struct{}
	wg   sync.WaitGroup
}

// Recovery says what Open found.
type Recovery struct {
	// Torn is how many bytes of a half-written record were cut off.
	Torn int64
	// Skipped is how many sequence numbers are left out, since records may have been
	// lost with the power.
	Skipped uint64
	// Requests were sent and not answered.
	Requests []Request
}

// Open opens a journal and repairs its end.
func Open(cfg Config) (*Journal, Recovery, error) {
	var found Recovery
	if cfg.MaxBytes < MinBytes {
		return nil, found, fmt.Errorf("a kernel's journal of %d bytes: it takes %d at least", cfg.MaxBytes, MinBytes)
	}
	j := &Journal{cfg: cfg, logger: cfg.Logger, news: make(chan struct{}), stop: make(chan struct{}), synced: time.Now()}
	if j.logger == nil {
		j.logger = slog.New(slog.DiscardHandler)
	}
	j.state = snapshot{Clients: map[string]*position{}, Requests: map[string]Request{}}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, found, fmt.Errorf("kernel's journal: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(cfg.Dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, found, fmt.Errorf("kernel's journal: %w", err)
	}
	j.lock = lock
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = lock.Close()
		return nil, found, ErrInUse
	}
	if found, err = j.open(); err != nil {
		_ = j.closeFiles()
		return nil, found, fmt.Errorf("kernel's journal: %w", err)
	}
	for _, r := range j.state.Requests {
		found.Requests = append(found.Requests, r)
	}
	j.wg.Go(j.syncer)
	return j, found, nil
}

func (j *Journal) open() (Recovery, error) {
	var found Recovery
	entries, err := os.ReadDir(j.cfg.Dir)
	if err != nil {
		return found, err
	}
	j.next = 1
	for _, e := range entries {
		var index uint64
		if n, err := fmt.Sscanf(e.Name(), "%d.seg", &index); n != 1 || err != nil || !strings.HasSuffix(e.Name(), ".seg") {
			continue
		}
		j.segs = append(j.segs, &segment{index: index, path: filepath.Join(j.cfg.Dir, e.Name())})
	}
	sort.Slice(j.segs, func(a, b int) bool { return j.segs[a].index < j.segs[b].index })
	for i, s := range j.segs {
		torn, err := j.scan(s)
		if err != nil {
			return found, err
		}
		if torn > 0 && i < len(j.segs)-1 {
			// In the middle it is damage, not a crash; what follows is still good.
			j.logger.Warn("damaged segment of a kernel's journal, the rest of it is left out", "file", s.path, "bytes", torn)
		}
		found.Torn += torn
		if torn > 0 {
			if err := os.Truncate(s.path, s.size); err != nil {
				return found, err
			}
		}
	}
	if j.marks, err = openMarks(filepath.Join(j.cfg.Dir, sequenceFile)); err != nil {
		return found, err
	}
	if at := j.marks.start(j.next); at > j.next {
		found.Skipped = at - j.next
		j.next = at
	}
	if err := j.marks.reserve(j.next); err != nil {
		return found, err
	}
	for _, s := range j.segs {
		if s.first == 0 { // nothing whole in it
			s.first = j.next
		}
	}
	// A new segment begins with a snapshot; what is known need not be read twice.
	return found, j.roll()
}

// roll begins a segment. The caller has writing, or is open.
func (j *Journal) roll() error {
	j.mu.Lock()
	index := uint64(1)
	if n := len(j.segs); n > 0 {
		index = j.segs[n-1].index + 1
	}
	j.state.Next = j.next
	text, err := json.Marshal(j.state)
	first := j.next
	j.mu.Unlock()
	if err != nil {
		return err
	}
	s := &segment{index: index, path: filepath.Join(j.cfg.Dir, fmt.Sprintf("%010d.seg", index)), first: first}
	f, err := os.OpenFile(s.path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	for _, p := range pieces(first-1, kindSnapshot, "", [][]byte{text}) {
		n, err := f.Write(p)
		s.size += int64(n)
		if err != nil {
			return errors.Join(err, f.Close(), os.Remove(s.path))
		}
	}
	if j.active != nil {
		if j.dirty {
			_ = unix.Fdatasync(int(j.active.Fd())) // a power cut is all that it is for
		}
		_ = j.active.Close()
	}
	j.active = f
	j.mu.Lock()
	j.segs = append(j.segs, s)
	j.mu.Unlock()
	j.evict(0)
	return nil
}

// evict removes the oldest segments until more bytes fit, and never the active one.
func (j *Journal) evict(more int64) {
	for {
		j.mu.Lock()
		var total int64
		for _, s := range j.segs {
			total += s.size
		}
		if total+more <= j.cfg.MaxBytes || len(j.segs) <= 1 {
			j.mu.Unlock()
			return
		}
		old := j.segs[0]
		j.segs = j.segs[1:]
		j.mu.Unlock()
		if err := os.Remove(old.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			j.logger.Error("old segment of a kernel's journal not removed", "file", old.path, "err", err)
		}
	}
}

// Append keeps a message of the kernel for client ("": everybody) and returns its
// sequence number. The message is on its way to the disk when it returns; one that
// could not be kept has a number all the same, and readers see a gap there.
func (j *Journal) Append(client string, m *posternv1.KernelMessage) (uint64, error) {
	return j.append(client, encode(m))
}

// Skip takes a sequence number for a message that is not kept: readers see a gap.
func (j *Journal) Skip() (uint64, error) { return j.append("", nil) }

func (j *Journal) append(client string, payload [][]byte) (uint64, error) {
	j.writing.Lock()
	defer j.writing.Unlock()
	if j.active == nil {
		return 0, ErrClosed
	}
	j.mu.Lock()
	sequence := j.next
	j.mu.Unlock()
	if err := j.marks.reserve(sequence); err != nil {
		j.complain(err)
	}
	kept := payload != nil
	if kept {
		kept = j.write(pieces(sequence, kindMessage, client, payload))
	}
	if !kept {
		j.marks.drop(sequence)
	}
	j.mu.Lock()
	j.next = sequence + 1
	j.wakeLocked()
	j.mu.Unlock()
	return sequence, nil
}

func (j *Journal) complain(err error) {
	if text := err.Error(); text != j.lastErr {
		j.lastErr = text
		j.logger.Error("kernel's journal cannot be written, its messages are lost to clients that are away", "dir", j.cfg.Dir, "err", err)
	}
}

// write writes a record and commits it; false: it is not kept.
func (j *Journal) write(record [][]byte) bool {
	var size int64
	for _, p := range record {
		size += int64(len(p))
	}
	if size > j.cfg.MaxBytes {
		return false
	}
	j.mu.Lock()
	s := j.segs[len(j.segs)-1]
	full := s.size+size > j.cfg.MaxBytes/segments
	j.mu.Unlock()
	if full {
		if err := j.roll(); err != nil {
			// The old one goes on: better too long than lost.
			j.evict(j.cfg.MaxBytes / segments)
			if err := j.roll(); err != nil {
				j.complain(err)
			}
		}
		j.mu.Lock()
		s = j.segs[len(j.segs)-1]
		j.mu.Unlock()
	}
	j.evict(size)
	if s.size+size > j.cfg.MaxBytes {
		return false // the active one alone is full, and none could be begun
	}
	for try := 0; ; try++ {
		err := j.writeAt(s, record)
		if err == nil {
			break
		}
		j.mu.Lock()
		older := len(j.segs) > 1
		j.mu.Unlock()
		if full := errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT); full && older && try == 0 {
			j.evict(j.cfg.MaxBytes) // whatever is older gives its room
			continue
		}
		j.complain(err)
		return false
	}
	j.lastErr = ""
	j.dirty, j.wrote = true, time.Now()
	j.mu.Lock()
	s.size += size
	j.mu.Unlock()
	return true
}

// writeAt writes a record behind what is committed.
func (j *Journal) writeAt(s *segment, record [][]byte) error {
	at := s.size
	for _, p := range record {
		n, err := j.active.WriteAt(p, at)
		at += int64(n)
		if err != nil {
			_ = j.active.Truncate(s.size) // what is left over would be cut off at the next start
			return err
		}
	}
	return nil
}

func (j *Journal) wakeLocked() {
	close(j.news)
	j.news = make(chan struct{})
}

// note writes a record that is no message.
func (j *Journal) note(kind byte, client string, payload []byte) {
	j.mu.Lock()
	sequence := j.next - 1
	j.mu.Unlock()
	if j.active != nil {
		j.write(pieces(sequence, kind, client, [][]byte{payload}))
	}
}

// Confirm remembers that everything up to sequence has arrived at client. It never
// goes back.
func (j *Journal) Confirm(client string, sequence uint64) {
	if client == "" || len(client) > MaxClient {
		return
	}
	j.writing.Lock()
	defer j.writing.Unlock()
	j.mu.Lock()
	sequence = min(sequence, j.next-1)
	p := j.positionLocked(client)
	news := sequence > p.Confirmed
	if news {
		p.Confirmed = sequence
	}
	j.mu.Unlock()
	if news {
		j.note(kindConfirm, client, binary.LittleEndian.AppendUint64(nil, sequence))
	}
}

// positionLocked finds a client, or makes one that confirmed nothing.
func (j *Journal) positionLocked(client string) *position {
	j.heard++
	p := j.state.Clients[client]
	if p == nil {
		p = &position{}
		if len(j.state.Clients) >= MaxClients {
			oldest := ""
			for name, q := range j.state.Clients {
				if oldest == "" || q.Heard < j.state.Clients[oldest].Heard {
					oldest = name
				}
			}
			delete(j.state.Clients, oldest)
		}
		j.state.Clients[client] = p
	}
	p.Heard = j.heard
	return p
}

// Register makes client known, as one to which everything up to sequence has
// arrived; one that is known stays where it is.
func (j *Journal) Register(client string, sequence uint64) {
	if _, known := j.Confirmed(client); !known {
		j.mu.Lock()
		j.positionLocked(client)
		j.mu.Unlock()
		j.Confirm(client, sequence)
	}
}

// Confirmed is up to where a client confirmed; false: it is not known.
func (j *Journal) Confirmed(client string) (uint64, bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	p := j.state.Clients[client]
	if p == nil {
		return 0, false
	}
	return p.Confirmed, true
}

// Sent remembers a request; Answered forgets it.
func (j *Journal) Sent(r Request) {
	text, err := json.Marshal(r)
	if err != nil {
		return // its header was JSON when it came
	}
	j.writing.Lock()
	defer j.writing.Unlock()
	j.mu.Lock()
	j.state.Requests[r.ID] = r
	j.mu.Unlock()
	j.note(kindSent, "", text)
}

// Answered forgets a request; false: there was none.
func (j *Journal) Answered(id string) bool {
	j.mu.Lock()
	_, there := j.state.Requests[id]
	j.mu.Unlock()
	if !there {
		return false
	}
	j.writing.Lock()
	defer j.writing.Unlock()
	j.mu.Lock()
	delete(j.state.Requests, id)
	j.mu.Unlock()
	j.note(kindAnswered, "", []byte(id))
	return true
}

// Last is the newest sequence number; 0: none.
func (j *Journal) Last() uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.next - 1
}

// Bytes is what the ring takes on the disk.
func (j *Journal) Bytes() int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	var n int64
	for _, s := range j.segs {
		n += s.size
	}
	return n
}

// Sync returns when everything appended survives a loss of power.
func (j *Journal) Sync() error {
	j.writing.Lock()
	defer j.writing.Unlock()
	return j.syncWriting()
}

func (j *Journal) syncWriting() error {
	if j.active == nil || !j.dirty {
		return nil
	}
	j.dirty, j.synced = false, time.Now()
	if err := unix.Fdatasync(int(j.active.Fd())); err != nil {
		j.dirty = true
		return fmt.Errorf("kernel's journal: %w", err)
	}
	return nil
}

// syncer syncs when nothing came for a second, and every five seconds.
func (j *Journal) syncer() {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-j.stop:
			return
		case <-tick.C:
		}
		j.writing.Lock()
		due := j.dirty && (time.Since(j.wrote) >= time.Second || time.Since(j.synced) >= 5*time.Second)
		var f *os.File
		if due {
			// Writers go on meanwhile: on a descriptor of its own.
			if fd, err := unix.FcntlInt(j.active.Fd(), unix.F_DUPFD_CLOEXEC, 0); err == nil {
				f = os.NewFile(uintptr(fd), j.active.Name())
			}
			j.dirty, j.synced = false, time.Now()
		}
		j.writing.Unlock()
		if f != nil {
			if err := unix.Fdatasync(int(f.Fd())); err != nil {
				j.logger.Warn("kernel's journal not synced", "err", err)
			}
			_ = f.Close()
		}
	}
}

// Close syncs and closes; readers return ErrClosed.
func (j *Journal) Close() error {
	j.mu.Lock()
	if j.closed {
		j.mu.Unlock()
		return nil
	}
	j.closed = true
	j.wakeLocked()
	j.mu.Unlock()
	close(j.stop)
	j.wg.Wait()
	j.writing.Lock()
	defer j.writing.Unlock()
	return errors.Join(j.syncWriting(), j.closeFiles())
}

func (j *Journal) closeFiles() error {
	var errs []error
	if j.active != nil {
		errs = append(errs, j.active.Close())
		j.active = nil
	}
	if j.marks != nil {
		errs = append(errs, j.marks.close())
	}
	return errors.Join(append(errs, j.lock.Close())...)
}
