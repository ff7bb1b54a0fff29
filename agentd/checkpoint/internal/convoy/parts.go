package convoy

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// maxName bounds a file's name in bytes, maxBlock a block of a checkpoint.
const (
	maxName  = 255
	maxBlock = 1 << 20
)

// Writer sends a kernel's parts.
type Writer struct{ s *sealed }

// Send begins a stream to the host that made the offer.
func Send(w io.Writer, i Identity, m Move, offer *posternv1.MoveParty) (*Writer, error) {
	s, err := send(w, i, m, offer)
	if err != nil {
		return nil, err
	}
	return &Writer{s}, nil
}

// File sends a file of exactly size bytes; what r has beyond them stays.
func (w *Writer) File(name string, size int64, r io.Reader) error {
	if name == "" || len(name) > maxName {
		return fmt.Errorf("a file's name of %d bytes", len(name))
	}
	head := binary.AppendUvarint([]byte{'F'}, uint64(len(name)))
	head = binary.AppendUvarint(append(head, name...), uint64(size))
	if _, err := w.s.Write(head); err != nil {
		return err
	}
	n, err := io.Copy(w.s, io.LimitReader(r, size))
	if err == nil && n < size {
		err = fmt.Errorf("file %s was cut while it was sent", name)
	}
	return err
}

// Checkpoint sends what export writes.
func (w *Writer) Checkpoint(export func(io.Writer) error) error {
	if _, err := w.s.Write([]byte{'C'}); err != nil {
		return err
	}
	b := bufio.NewWriterSize(blocks{w.s}, frameSize-16)
	if err := export(b); err != nil {
		return err
	}
	if err := b.Flush(); err != nil {
		return err
	}
	_, err := w.s.Write([]byte{0})
	return err
}

type blocks struct{ w io.Writer }

func (b blocks) Write(p []byte) (int, error) {
	n := 0
	for len(p) > 0 {
		k := min(len(p), maxBlock)
		if _, err := b.w.Write(binary.AppendUvarint(nil, uint64(k))); err != nil {
			return n, err
		}
		if _, err := b.w.Write(p[:k]); err != nil {
			return n, err
		}
		p, n = p[k:], n+k
	}
	return n, nil
}

// Flush sends what was gathered so far.
func (w *Writer) Flush() error { return w.s.flush(0) }

// End ends the stream: only now the other side may take what it got.
func (w *Writer) End() error {
	if _, err := w.s.Write([]byte{'E'}); err != nil {
		return err
	}
	return w.s.Close()
}

// Parts takes what arrives.
type Parts interface {
	// File must read all of r, which has size bytes.
	File(name string, size int64, r io.Reader) error
	// Checkpoint must read all of r.
	Checkpoint(r io.Reader) error
}

// Receive reads a stream for the offer that p made: offered is its public key. It
// returns nil when all of it arrived, and was the sender's.
func Receive(r io.Reader, i Identity, p *Party, take Parts) error {
	o, err := receive(r, i, p, p.key.PublicKey().Bytes())
	if err != nil {
		return err
	}
	in := bufio.NewReaderSize(o, 4<<10)
	for {
		letter, err := in.ReadByte()
		if err != nil {
			return cut(err)
		}
		switch letter {
		case 'F':
			err = file(in, take)
		case 'C':
			b := &unblock{r: in}
			if err = take.Checkpoint(b); err == nil {
				err = b.drained()
			}
		case 'E':
			if _, err := in.ReadByte(); err != io.EOF {
				return cut(err)
			}
			return nil
		default:
			return malformed()
		}
		if err != nil {
			return err
		}
	}
}

func malformed() error {
	return proto.Errorf(proto.CodeInvalid, "the stream from the other host is malformed: are both agentds of one version?")
}

// cut is an end where none is allowed.
func cut(err error) error {
	if err == nil {
		return malformed()
	}
	if err == io.EOF {
		return ErrCut
	}
	return err
}

func file(in *bufio.Reader, take Parts) error {
	n, err := binary.ReadUvarint(in)
	if err != nil {
		return cut(err)
	}
	if n == 0 || n > maxName {
		return malformed()
	}
	name := make([]byte, n)
	if _, err := io.ReadFull(in, name); err != nil {
		return cut(err)
	}
	size, err := binary.ReadUvarint(in)
	if err != nil {
		return cut(err)
	}
	if size > 1<<40 {
		return malformed()
	}
	l := &io.LimitedReader{R: in, N: int64(size)}
	if err := take.File(string(name), int64(size), l); err != nil {
		return err
	}
	if l.N != 0 {
		return ErrCut
	}
	return nil
}

// unblock reads blocks until their end.
type unblock struct {
	r     *bufio.Reader
	left  uint64
	ended bool
}

func (u *unblock) Read(p []byte) (int, error) {
	for u.left == 0 {
		if u.ended {
			return 0, io.EOF
		}
		n, err := binary.ReadUvarint(u.r)
		if err != nil {
			return 0, cut(err)
		}
		if n > maxBlock {
			return 0, malformed()
		}
		u.left, u.ended = n, n == 0
	}
	n, err := u.r.Read(p[:min(uint64(len(p)), u.left)])
	u.left -= uint64(n)
	if err == io.EOF {
		err = ErrCut
	}
	return n, err
}

// drained makes sure that nothing of the blocks is left.
func (u *unblock) drained() error {
	var b [1]byte
	n, err := u.Read(b[:])
	switch {
	case n > 0:
		return malformed()
	case err != io.EOF:
		return err
	}
	return nil
}
