package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
)

const (
	// segmentBytes is when the next segment begins.
	segmentBytes = 16 << 20
	// maxBatch bounds the entries of one fsync.
	maxBatch = 256
	// queueLength bounds the appends that wait for the one being written; more
	// wait in Append.
	queueLength = 256
)

// ErrClosed is returned by Append after Close.
var ErrClosed = errors.New("the audit log is closed")

// Config holds what may be chosen; the zero value works.
type Config struct {
	Logger *slog.Logger // nil discards
	// SegmentBytes is when the next segment begins; 0 means 16 MiB.
	SegmentBytes int64
	// Fault is asked before each write and fsync ("write", "fsync", "create") and each removal ("remove");
	// its error is taken for the disk's. For tests; nil means none.
	Fault func(op string) error
	// Now is the clock of entries without a time; nil means time.Now.
	Now func() time.Time
}

// Recovery says what Open found.
type Recovery struct {
	// Torn is the file that holds a half-written last line; "" if there was none.
	Torn string
	// Begun are the "sql.begin" entries without their end, oldest first: queries
	// that were under way when the process before this one died.
	Begun []auditchain.Entry
}

// Log is an open audit log.
type Log struct {
	dir    string
	cfg    Config
	logger *slog.Logger

	requests chan *request
	closing  chan struct{}
	done     chan struct{}
	close    sync.Once

	// syncSoon wakes the committer for what AppendSoon wrote.
	syncSoon chan struct{}

	// retention is what RunRetention drops; nil: nothing.
	retention atomic.Pointer[Retention]
	// retiring guards base, the head before the first entry that is kept; it is taken first.
	retiring sync.Mutex
	base     auditchain.Head

	// mu guards the following; it is taken after writing.
	mu      sync.Mutex
	head    auditchain.Head // on stable storage
	entries uint64          // appended by this process
	bytes   int64           // of all segments
	retired uint64          // dropped by this process
	first   uint64          // the first entry that is kept; 0: it is 1

	// writing guards the following, while the disk is busy, too.
	writing sync.Mutex
	ended   bool
	file    *os.File
	segment int
	size    int64
	since   time.Time // of the segment's first entry; zero: there is none
	suspect bool      // a failed write could not be undone: reopen first
	tip     auditchain.Head
	// unsynced is the end of the file that may not be on stable storage, at most
	// maxUnsynced and an entry; generation counts how often it was emptied as a whole.
	unsynced   []byte
	generation uint64
	armed      bool // syncSoon will come
}

type request struct {
	entry auditchain.Entry
	done  chan error
}

// Open opens the log below stateDir, making it if need be.
func Open(stateDir string, cfg Config) (*Log, Recovery, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.SegmentBytes == 0 {
		cfg.SegmentBytes = segmentBytes
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	l := &Log{
		dir: Dir(stateDir), cfg: cfg, logger: cfg.Logger,
		requests: make(chan *request, queueLength), closing: make(chan struct{}), done: make(chan struct{}),
		syncSoon: make(chan struct{}, 1),
	}
	if err := os.MkdirAll(l.dir, 0o700); err != nil {
		return nil, Recovery{}, fmt.Errorf("audit log: %w", err)
	}
	recovery, err := l.recover()
	if err != nil {
		return nil, recovery, err
	}
	l.tip = l.head
	go l.commit()
	return l, recovery, nil
}

// Dir is where the log of the agent with this state directory is kept.
func Dir(stateDir string) string { return filepath.Join(stateDir, "audit") }

// Append adds an entry at the end of the chain, sets its time if it has none,
// and returns when it is on stable storage. ctx bounds the waiting alone: an
// entry that was accepted is written even if ctx ends.
func (l *Log) Append(ctx context.Context, entry auditchain.Entry) error {
	r := &request{entry: entry, done: make(chan error, 1)}
	select {
	case <-l.closing:
		return ErrClosed
	default:
	}
	select {
	case l.requests <- r:
	case <-l.closing:
		return ErrClosed
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case err := <-r.done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-l.done:
		// The committer may have served it on its way out.
		select {
		case err := <-r.done:
			return err
		default:
			return ErrClosed
		}
	}
}

// Head is the last entry on stable storage.
func (l *Log) Head() auditchain.Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head
}

// Stats says how many entries this process appended and how many bytes the
// log takes.
func (l *Log) Stats() (appended uint64, bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.entries, l.bytes
}

// Close writes what waits and closes the log.
func (l *Log) Close() error {
	l.close.Do(func() { close(l.closing) })
	<-l.done
	return nil
}

// commit is the one goroutine that writes.
func (l *Log) commit() {
	defer close(l.done)
	defer l.end()
	for {
		var batch []*request
		select {
		case r := <-l.requests:
			batch = append(batch, r)
		case <-l.syncSoon:
			l.syncLater()
			continue
		case <-l.closing:
			select {
			case r := <-l.requests:
				batch = append(batch, r)
			default:
				return
			}
		}
	collect:
		for len(batch) < maxBatch {
			select {
			case r := <-l.requests:
				batch = append(batch, r)
			default:
				break collect
			}
		}
		err := l.write(batch)
		if err != nil {
			l.logger.Error("audit entries not written", "entries", len(batch), "err", err)
		}
		for _, r := range batch {
			r.done <- err
		}
	}
}

// end closes the file.
func (l *Log) end() {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.ended = true
	if l.file == nil {
		return
	}
	if len(l.unsynced) > 0 {
		err := l.ready() // which writes them again where that is needed
		if err == nil && len(l.unsynced) > 0 {
			err = l.sync()
		}
		if err != nil {
			l.logger.Error("the last audit entries are not on stable storage", "bytes", len(l.unsynced), "err", err)
		}
	}
	l.file.Close() //nolint:errcheck // every write was synced
}

// write seals and writes a batch: all of it, or none.
func (l *Log) write(batch []*request) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	if err := l.ready(); err != nil {
		return l.coded(err)
	}
	head := l.tip
	var buf []byte
	for _, r := range batch {
		if r.entry.Time.IsZero() {
			r.entry.Time = l.cfg.Now()
		}
		head = r.entry.Seal(head)
		buf = append(append(buf, r.entry.Encode()...), '\n')
	}
	if err := l.writeSync(buf); err != nil {
		l.undo()
		return l.coded(err)
	}
	l.size += int64(len(buf))
	l.tip = head
	l.synced()
	l.mu.Lock()
	l.entries += uint64(len(batch))
	l.bytes += int64(len(buf))
	l.mu.Unlock()
	return nil
}

func (l *Log) writeSync(buf []byte) error {
	if err := l.writeOut(buf); err != nil {
		return err
	}
	if err := l.fault("fsync"); err != nil {
		return err
	}
	return unix.Fdatasync(int(l.file.Fd()))
}

func (l *Log) writeOut(buf []byte) error {
	if err := l.fault("write"); err != nil {
		// As a disk does it: part of it is there.
		l.file.Write(buf[:len(buf)/2]) //nolint:errcheck // only tests come here
		return err
	}
	_, err := l.file.Write(buf)
	return err
}

// undo removes what a failed write may have left, so that the next entry does
// not follow half a line.
func (l *Log) undo() {
	l.suspect = true
	if len(l.unsynced) > 0 {
		return // more than this write may be lost: ready does it
	}
	if err := l.file.Truncate(l.size); err != nil {
		return
	}
	if err := unix.Fdatasync(int(l.file.Fd())); err != nil {
		return
	}
	l.suspect = false
}

// ready makes sure that there is a segment to write to.
func (l *Log) ready() error {
	if l.suspect {
		// After a failed fsync the page cache is not to be trusted: through a new
		// descriptor, cut to what is known to be good.
		f, err := os.OpenFile(l.segmentPath(l.segment), os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		l.file.Close() //nolint:errcheck // it failed already
		l.file = f
		if err := l.rewrite(); err != nil {
			return fmt.Errorf("a failed write could not be undone: %w", err)
		}
	}
	if l.file != nil && l.size < l.cfg.SegmentBytes && !l.aged() {
		return nil
	}
	return l.nextSegment()
}

// aged reports whether the segment is due to be closed for its age.
func (l *Log) aged() bool {
	if l.size == 0 || l.since.IsZero() || l.keeps() == (Retention{}) {
		return false
	}
	return l.cfg.Now().Sub(l.since) >= segmentAge
}

// rewrite cuts the file to what is on stable storage and writes again what is not.
func (l *Log) rewrite() error {
	if err := l.file.Truncate(l.size - int64(len(l.unsynced))); err != nil {
		return err
	}
	var err error
	if len(l.unsynced) > 0 {
		err = l.writeSync(l.unsynced)
	} else {
		err = unix.Fdatasync(int(l.file.Fd()))
	}
	if err != nil {
		return err
	}
	l.synced()
	l.suspect = false
	return nil
}

func (l *Log) nextSegment() error {
	if err := l.fault("create"); err != nil {
		return err
	}
	if len(l.unsynced) > 0 {
		if err := l.sync(); err != nil {
			l.suspect = true
			return err
		}
	}
	next := l.segment + 1
	f, err := os.OpenFile(l.segmentPath(next), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	d, err := os.Open(l.dir)
	if err == nil {
		err = d.Sync()
		d.Close() //nolint:errcheck // it was only read
	}
	if err != nil {
		f.Close() //nolint:errcheck // nothing was written
		return err
	}
	if l.file != nil {
		l.file.Close() //nolint:errcheck // every write was synced
	}
	l.file, l.segment, l.size, l.since = f, next, 0, l.cfg.Now()
	return nil
}

func (l *Log) segmentPath(n int) string { return filepath.Join(l.dir, fmt.Sprintf("%06d.jsonl", n)) }

func (l *Log) fault(op string) error {
	if l.cfg.Fault == nil {
		return nil
	}
	return l.cfg.Fault(op)
}

// coded gives an error of the disk its code and its line.
func (l *Log) coded(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return &proto.Error{Code: proto.CodeStorageFull, Message: "the host's audit log cannot be written: no space is left in " + l.dir + " on the host", Err: err}
	}
	return &proto.Error{Code: proto.CodeInternal, Message: "the host's audit log cannot be written: see agentd's log on the host", Err: err}
}
