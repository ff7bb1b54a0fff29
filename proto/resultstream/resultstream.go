package resultstream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// ContentType is the media type of such a body.
const ContentType = "application/vnd.postern.result"

// The kinds of frames.
const (
	kindQuery     = 'Q'
	kindData      = 'D'
	kindKeepAlive = 'K'
	kindOutcome   = 'O'
)

const (
	headSize = 4
	// dataSize is how many bytes of rows are in hand at once.
	dataSize = 128 << 10
	// maxSmall bounds the payload of every frame but 'D', in bytes.
	maxSmall = 64 << 10
)

var buffers = sync.Pool{New: func() any { b := make([]byte, headSize+dataSize); return &b }}

// Sink is where a Writer writes: an HTTP response. Its methods are never called
// at the same time.
type Sink interface {
	io.Writer
	// Begin is called once, before the first byte; SetQueryID at most once,
	// before Begin.
	Begin()
	SetQueryID(id string)
	// Flush sends on what was written.
	Flush() error
}

// Writer writes the body. Begin on it is put off until there is something to
// say, so that an error that comes soon can still be an HTTP status. Close must be
// called.
type Writer struct {
	every time.Duration

	mu    sync.Mutex // guards what follows, and the sink
	sink  Sink
	timer *time.Timer
	began bool
	ended bool
	fresh bool // something was written since the timer was set
	err   error
}

// NewWriter returns a Writer that is never silent for longer than twice a
// duration.
func NewWriter(sink Sink, every time.Duration) *Writer {
	w := &Writer{sink: sink, every: every}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.timer = time.AfterFunc(every, w.beat)
	return w
}

// beat runs at least once in every duration.
func (w *Writer) beat() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return
	}
	if !w.fresh {
		w.writeLocked(frame(kindKeepAlive, nil))
	}
	w.fresh = false
	w.timer.Reset(w.every)
}

// writeLocked sends whole frames on.
func (w *Writer) writeLocked(p []byte) {
	if !w.began {
		w.began = true
		w.sink.Begin()
	}
	if w.err != nil {
		return
	}
	w.fresh = true
	if _, w.err = w.sink.Write(p); w.err == nil {
		w.err = w.sink.Flush()
	}
}

func frame(kind byte, payload []byte) []byte {
	return append(putHead(make([]byte, headSize, headSize+len(payload)), kind, len(payload)), payload...)
}

func putHead(p []byte, kind byte, length int) []byte {
	binary.BigEndian.PutUint32(p, uint32(kind)<<24|uint32(length))
	return p
}

// QueryID tells the reader the query's id: by the sink, or in the body if that
// has begun.
func (w *Writer) QueryID(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.ended:
	case w.began:
		w.writeLocked(frame(kindQuery, []byte(id)))
	default:
		w.sink.SetQueryID(id)
	}
}

// ReadFrom implements io.ReaderFrom: it sends each piece on as soon as it is
// there. The error is src's or the sink's.
func (w *Writer) ReadFrom(src io.Reader) (int64, error) {
	buffer := buffers.Get().(*[]byte)
	defer buffers.Put(buffer)
	b := *buffer
	var total int64
	for {
		n, err := src.Read(b[headSize:])
		if n > 0 {
			total += int64(n)
			w.mu.Lock()
			w.writeLocked(putHead(b, kindData, n)[:headSize+n])
			broken := w.err
			w.mu.Unlock()
			if broken != nil {
				return total, &SinkError{broken}
			}
		}
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// SinkError is ReadFrom's error when the sink failed, not the source.
type SinkError struct{ Err error }

// Error implements error.
func (e *SinkError) Error() string { return e.Err.Error() }

// Unwrap returns the sink's error.
func (e *SinkError) Unwrap() error { return e.Err }

// End writes how the statement ended. Nothing is written afterwards.
func (w *Writer) End(o *posternv1.QueryOutcome) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return
	}
	w.writeLocked(frame(kindOutcome, []byte(proto.EncodeOutcome(o))))
	w.closeLocked()
}

// Close ends the signs of life. Without End before it the body is incomplete.
func (w *Writer) Close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closeLocked()
}

func (w *Writer) closeLocked() {
	w.ended = true
	w.timer.Stop()
}

// Stop is Close if nothing has been written: it reports true if so, and the sink
// is the caller's again.
func (w *Writer) Stop() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.began {
		return false
	}
	w.closeLocked()
	return true
}

// Reader reads the rows out of a body; its Outcome comes after them.
type Reader struct {
	src     io.Reader
	left    int // bytes of the data frame under way
	head    [headSize]byte
	queryID string
	outcome *posternv1.QueryOutcome
	err     error
}

// NewReader returns a Reader of a body.
func NewReader(src io.Reader) *Reader { return &Reader{src: src} }

// Read implements io.Reader. io.EOF means that the outcome is there; a body that
// ends without one is io.ErrUnexpectedEOF.
func (r *Reader) Read(p []byte) (int, error) {
	for r.left == 0 && r.err == nil {
		r.err = r.next()
	}
	if r.err != nil {
		return 0, r.err
	}
	if len(p) > r.left {
		p = p[:r.left]
	}
	n, err := r.src.Read(p)
	r.left -= n
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	} else if err != nil && r.left > 0 {
		r.err = io.ErrUnexpectedEOF
	}
	if n > 0 {
		return n, nil
	}
	return n, r.err
}

// next reads frames up to one with data in it.
func (r *Reader) next() error {
	if _, err := io.ReadFull(r.src, r.head[:]); err != nil {
		return unexpected(err)
	}
	word := binary.BigEndian.Uint32(r.head[:])
	kind, length := byte(word>>24), int(word&0xffffff)
	if kind == kindData {
		r.left = length
		return nil
	}
	if length > maxSmall {
		return fmt.Errorf("a frame of kind %q has %d bytes, more than %d", kind, length, maxSmall)
	}
	payload := make([]byte, length)
	if _, err := io.ReadFull(r.src, payload); err != nil {
		return unexpected(err)
	}
	switch kind {
	case kindQuery:
		r.queryID = string(payload)
	case kindOutcome:
		outcome, err := proto.DecodeOutcome(string(payload))
		if err != nil {
			return err
		}
		r.outcome = outcome
		return io.EOF
	}
	return nil
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Outcome is how the statement ended, after Read has returned io.EOF; else nil.
func (r *Reader) Outcome() *posternv1.QueryOutcome { return r.outcome }

// QueryID is the query's id if the body has told it so far; else empty.
func (r *Reader) QueryID() string { return r.queryID }
