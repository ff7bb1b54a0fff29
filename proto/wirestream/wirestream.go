package wirestream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	gproto "google.golang.org/protobuf/proto"
)

// Type is a frame's first byte.
type Type byte

// The types of frames.
const (
	Data   Type = 'd' // bytes of PostgreSQL's protocol, either way
	Opened Type = 'o' // WireOpened, once, the host's first
	Event  Type = 'e' // WireEvent
	End    Type = 'z' // WireEnd, once, the host's last
)

const (
	// HeaderSize is the length of a frame's header in bytes.
	HeaderSize = 5
	// MaxData is the largest payload of a Data frame in bytes.
	MaxData = 256 << 10
	// MaxMessage is the largest payload of every other frame in bytes.
	MaxMessage = 128 << 10
	// MaxText bounds the text of a statement in a WireEvent, in bytes; what is
	// longer is cut by who makes the event.
	MaxText = 64 << 10
	// smallBuffer is a Reader's buffer in bytes until more is there at once.
	smallBuffer = 8 << 10
)

// ErrMalformed is returned for a frame that breaks these rules; what comes after
// it can't be read.
var ErrMalformed = errors.New("malformed frame")

// AppendHeader appends the header of a frame.
func AppendHeader(b []byte, t Type, size int) []byte {
	return binary.BigEndian.AppendUint32(append(b, byte(t)), uint32(size))
}

// AppendMessage appends a whole frame; m is of the kind that t says. It fails with
// ErrMalformed when m takes more than MaxMessage.
func AppendMessage(b []byte, t Type, m gproto.Message) ([]byte, error) {
	start := len(b)
	b = AppendHeader(b, t, 0)
	b, err := gproto.MarshalOptions{}.MarshalAppend(b, m)
	if err != nil {
		return b[:start], err
	}
	size := len(b) - start - HeaderSize
	if size > MaxMessage {
		return b[:start], fmt.Errorf("%w: %q with %d bytes", ErrMalformed, byte(t), size)
	}
	binary.BigEndian.PutUint32(b[start+1:], uint32(size))
	return b, nil
}

// Writer writes frames, each with one Write. It may be used by several goroutines;
// a Write that blocks holds up the others.
type Writer struct {
	mu  sync.Mutex
	dst io.Writer
}

// NewWriter returns a Writer to dst.
func NewWriter(dst io.Writer) *Writer { return &Writer{dst: dst} }

// Raw writes whole frames that the caller has put together.
func (w *Writer) Raw(frames []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, err := w.dst.Write(frames)
	return err
}

// Send writes a frame with a message.
func (w *Writer) Send(t Type, m gproto.Message) error {
	b, err := AppendMessage(nil, t, m)
	if err != nil {
		return err
	}
	return w.Raw(b)
}

// Filled writes a Data frame of n bytes, 1 to MaxData, that stand in b behind
// HeaderSize bytes of room, which it overwrites.
func (w *Writer) Filled(b []byte, n int) error {
	b[0] = byte(Data)
	binary.BigEndian.PutUint32(b[1:], uint32(n))
	return w.Raw(b[:HeaderSize+n])
}

// Pump writes what it reads from src as Data frames, as it comes, until src ends
// (nil) or either side fails. buffer has more than HeaderSize bytes; no frame is
// longer than it.
func (w *Writer) Pump(src io.Reader, buffer []byte) error {
	buffer = buffer[:min(len(buffer), HeaderSize+MaxData)]
	for {
		n, err := src.Read(buffer[HeaderSize:])
		if n > 0 {
			if err := w.Filled(buffer, n); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// Reader reads frames.
type Reader struct {
	src  io.Reader
	buf  []byte
	r, w int
	// left is how much of the payload at hand was not read yet.
	left int
	t    Type
}

// NewReader returns a Reader from src. Its memory is 8 KiB, and up to
// HeaderSize+MaxData once that much has come at once.
func NewReader(src io.Reader) *Reader { return &Reader{src: src, buf: make([]byte, smallBuffer)} }

// Next returns the type of the next frame; what is left of the one before is
// passed over. io.EOF means that the stream ended between two frames.
func (d *Reader) Next() (Type, error) {
	for d.left > 0 {
		if _, err := d.Chunk(); err != nil {
			return 0, err
		}
	}
	for d.w-d.r < HeaderSize {
		if err := d.fill(); err != nil {
			if err == io.EOF && d.w > d.r {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
	}
	t, size := Type(d.buf[d.r]), binary.BigEndian.Uint32(d.buf[d.r+1:])
	limit := uint32(MaxMessage)
	switch t {
	case Data:
		limit = MaxData
	case Opened, Event, End:
	default:
		return 0, fmt.Errorf("%w: unknown type %#x", ErrMalformed, byte(t))
	}
	if size > limit {
		return 0, fmt.Errorf("%w: %q with %d bytes", ErrMalformed, byte(t), size)
	}
	d.r += HeaderSize
	d.left, d.t = int(size), t
	return t, nil
}

// Left is how many bytes of the payload were not read yet.
func (d *Reader) Left() int { return d.left }

// Buffered is how many bytes can be had without reading from the source: 0 is the
// moment to flush what was gathered.
func (d *Reader) Buffered() int { return d.w - d.r }

// Chunk returns some of what is left of the payload, at least one byte, valid
// until the next call; nil when nothing is left.
func (d *Reader) Chunk() ([]byte, error) {
	if d.left == 0 {
		return nil, nil
	}
	if d.w == d.r {
		if err := d.fill(); err != nil {
			return nil, unexpected(err)
		}
	}
	n := min(d.left, d.w-d.r)
	chunk := d.buf[d.r : d.r+n]
	d.r += n
	d.left -= n
	return chunk, nil
}

// CopyData writes the payload at hand to dst as it comes, without waiting for the
// whole of it.
func (d *Reader) CopyData(dst io.Writer) error {
	for d.left > 0 {
		chunk, err := d.Chunk()
		if err != nil {
			return err
		}
		if _, err := dst.Write(chunk); err != nil {
			return err
		}
	}
	return nil
}

// Message decodes the payload at hand into m.
func (d *Reader) Message(m gproto.Message) error {
	if d.t == Data || d.left > MaxMessage {
		return fmt.Errorf("%w: %q is no message", ErrMalformed, byte(d.t))
	}
	payload := make([]byte, 0, d.left)
	for d.left > 0 {
		chunk, err := d.Chunk()
		if err != nil {
			return err
		}
		payload = append(payload, chunk...)
	}
	if err := gproto.Unmarshal(payload, m); err != nil {
		return fmt.Errorf("%w: the payload of %q is not what its type says", ErrMalformed, byte(d.t))
	}
	return nil
}

// fill reads at least one byte more.
func (d *Reader) fill() error {
	if d.r == d.w {
		d.r, d.w = 0, 0
	}
	if d.w == len(d.buf) {
		d.w = copy(d.buf, d.buf[d.r:d.w])
		d.r = 0
	}
	n, err := d.src.Read(d.buf[d.w:])
	d.w += n
	if d.w == len(d.buf) && len(d.buf) < HeaderSize+MaxData {
		bigger := make([]byte, min(4*len(d.buf), HeaderSize+MaxData))
		d.w = copy(bigger, d.buf[d.r:d.w])
		d.buf, d.r = bigger, 0
	}
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
