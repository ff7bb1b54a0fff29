package kernelstream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"google.golang.org/protobuf/encoding/protojson"
	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// HeaderSize is the length of a frame's header in bytes.
	HeaderSize = 4
	// MaxFrame is the largest payload of a frame in bytes: a message of Jupyter's,
	// at most 64 MiB, and what is around it.
	MaxFrame = 64<<20 + 64<<10
	// step is by how much a Reader's memory is ahead of what has arrived, in bytes.
	step = 1 << 20
	// keep is the most that a Reader or Writer keeps between two frames, in bytes.
	keep = 256 << 10
)

// ErrMalformed is returned for a frame that breaks these rules; what comes after
// it can't be read.
var ErrMalformed = errors.New("malformed frame of a kernel's stream")

// Append appends a whole frame. It fails with ErrMalformed when f takes more than
// MaxFrame.
func Append(b []byte, f *posternv1.KernelFrame) ([]byte, error) {
	start := len(b)
	b = append(b, 0, 0, 0, 0)
	b, err := gproto.MarshalOptions{}.MarshalAppend(b, f)
	if err != nil {
		return b[:start], err
	}
	size := len(b) - start - HeaderSize
	if size > MaxFrame {
		return b[:start], fmt.Errorf("%w: it has %d bytes", ErrMalformed, size)
	}
	binary.BigEndian.PutUint32(b[start:], uint32(size))
	return b, nil
}

// Writer writes frames, each with one Write. It may be used by several goroutines;
// a Write that blocks holds up the others.
type Writer struct {
	mu  sync.Mutex
	dst io.Writer
	buf []byte
}

// NewWriter returns a Writer to dst. Its memory is one frame while that is
// written, and 256 KiB at most in between.
func NewWriter(dst io.Writer) *Writer { return &Writer{dst: dst} }

// Send writes frames with one Write.
func (w *Writer) Send(frames ...*posternv1.KernelFrame) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	b := w.buf[:0]
	var err error
	for _, f := range frames {
		if b, err = Append(b, f); err != nil {
			return err
		}
	}
	if cap(b) <= keep {
		w.buf = b
	} else {
		w.buf = nil
	}
	_, err = w.dst.Write(b)
	return err
}

// Raw writes whole frames that the caller has put together, see Append.
func (w *Writer) Raw(frames []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, err := w.dst.Write(frames)
	return err
}

// Message sends a client's message for the kernel.
func (w *Writer) Message(m *posternv1.KernelMessage) error {
	return w.Send(&posternv1.KernelFrame{Frame: &posternv1.KernelFrame_Send{Send: m}})
}

// Confirm sends that every delivery up to sequence has arrived.
func (w *Writer) Confirm(sequence uint64) error {
	return w.Send(&posternv1.KernelFrame{Frame: &posternv1.KernelFrame_Confirm{Confirm: sequence}})
}

// End sends why the stream ends; nil: it was asked for.
func (w *Writer) End(err error) error { return w.Send(EndFrame(err)) }

// EndFrame is the host's last frame: the code and public message of err.
func EndFrame(err error) *posternv1.KernelFrame {
	text := "{}"
	if err != nil {
		if b, merr := protojson.Marshal(proto.Detail(err)); merr == nil {
			text = string(b)
		}
	}
	return &posternv1.KernelFrame{Frame: &posternv1.KernelFrame_End{End: text}}
}

// EndError is what an end frame says: nil when the stream was to end, else a
// *proto.Error.
func EndError(f *posternv1.KernelFrame) error {
	text := f.GetEnd()
	if text == "" || text == "{}" {
		return nil
	}
	detail := &posternv1.ErrorDetail{}
	options := protojson.UnmarshalOptions{DiscardUnknown: true}
	if err := options.Unmarshal([]byte(text), detail); err != nil || detail.Code == 0 {
		return proto.Errorf(proto.CodeInternal, "the host ended the kernel's stream and did not say why in a way that is understood: is it of another version?")
	}
	return proto.FromDetail(detail)
}

// Reader reads frames. It belongs to one goroutine.
type Reader struct {
	src   io.Reader
	limit int
	buf   []byte
	r, w  int
}

// NewReader returns a Reader from src. Its memory is the frame at hand, as far as
// it has arrived, and 256 KiB at most in between.
func NewReader(src io.Reader) *Reader {
	return &Reader{src: src, limit: MaxFrame, buf: make([]byte, 8<<10)}
}

// Next reads a frame. io.EOF means that the stream ended between two frames.
func (d *Reader) Next() (*posternv1.KernelFrame, error) {
	f := &posternv1.KernelFrame{}
	payload, err := d.Raw()
	if err != nil {
		return nil, err
	}
	if err := gproto.Unmarshal(payload, f); err != nil {
		return nil, fmt.Errorf("%w: it is no KernelFrame", ErrMalformed)
	}
	if f.Frame == nil {
		return nil, fmt.Errorf("%w: it is empty or of a newer version", ErrMalformed)
	}
	return f, nil
}

// Buffered is how many bytes of further frames were read already.
func (d *Reader) Buffered() int { return d.w - d.r }

// Raw reads a frame's payload, undecoded, valid until the next call.
func (d *Reader) Raw() ([]byte, error) {
	for d.w-d.r < HeaderSize {
		if err := d.fill(HeaderSize); err != nil {
			if err == io.EOF && d.w > d.r {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	size := int64(binary.BigEndian.Uint32(d.buf[d.r:]))
	if size > int64(d.limit) {
		return nil, fmt.Errorf("%w: it has %d bytes", ErrMalformed, size)
	}
	whole := HeaderSize + int(size)
	for d.w-d.r < whole {
		if err := d.fill(whole); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	payload := d.buf[d.r+HeaderSize : d.r+whole : d.r+whole]
	d.r += whole
	return payload, nil
}

// fill reads at least one byte more of a frame of whole bytes.
func (d *Reader) fill(whole int) error {
	have := d.w - d.r
	if have == 0 {
		d.r, d.w = 0, 0
		if len(d.buf) > keep && whole <= keep {
			d.buf = make([]byte, keep)
		}
	}
	if d.r+whole > len(d.buf) || d.w == len(d.buf) {
		// Memory follows what arrives: a length alone makes nobody allocate.
		need := min(whole, have+step)
		if need > len(d.buf) {
			bigger := make([]byte, min(max(need, 2*len(d.buf)), HeaderSize+d.limit))
			copy(bigger, d.buf[d.r:d.w])
			d.buf = bigger
		} else {
			copy(d.buf, d.buf[d.r:d.w])
		}
		d.r, d.w = 0, have
	}
	n, err := d.src.Read(d.buf[d.w:])
	d.w += n
	if n > 0 {
		return nil
	}
	if err == nil {
		return io.ErrNoProgress
	}
	return err
}
