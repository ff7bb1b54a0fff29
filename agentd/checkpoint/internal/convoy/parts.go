package convoy

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
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
type Writer struct {
	s *sealed
	o *opened
}

// Send begins a stream to the host that made the offer, and returns that host's greeting.
func Send(w io.ReadWriter, i Identity, m Move, offer *posternv1.MoveParty) (*Writer, []byte, error) {
	s, o, err := send(w, i, m, offer)
	if err != nil {
		return nil, nil, err
	}
	out := &Writer{s, o}
	greeting, err := out.Answer()
	return out, greeting, err
}

// Answer waits for the other host's next answer, at most 64 KiB.
func (w *Writer) Answer() ([]byte, error) {
	if err := w.o.next(); err != nil {
		return nil, err
	}
	return bytes.Clone(w.o.plain), nil
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

// Checkpoint sends what export writes; flush has all of that sent so far. older: it is not
// what the kernel is now. An older one whose export fails with an error that skip knows is
// cut short, which the other side notices; what follows is not.
func (w *Writer) Checkpoint(older bool, export func(w io.Writer, flush func() error) error, skip func(error) bool) error {
	letter := byte('C')
	if older {
		letter = 'H'
	}
	if _, err := w.s.Write([]byte{letter}); err != nil {
		return err
	}
	b := bufio.NewWriterSize(blocks{w.s}, frameSize-16)
	err := export(b, func() error {
		if err := b.Flush(); err != nil {
			return err
		}
		return w.s.flush(0)
	})
	if err != nil && (!older || !skip(err)) {
		return err
	}
	if err := b.Flush(); err != nil {
		return err
	}
	_, err = w.s.Write([]byte{0})
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
	// Checkpoint must read all of r; answer answers what is in it. older: it is not what the
	// kernel is now. An older one for which it returns ErrSkip is passed over.
	Checkpoint(r io.Reader, older bool, answer func([]byte) error) error
}

// ErrSkip is what Parts.Checkpoint returns for an older checkpoint that is left out.
var ErrSkip = errors.New("left out")

// Receive reads a stream for the offer that p made: offered is its public key. It
// returns nil when all of it arrived, and was the sender's. greeting is the first answer.
func Receive(r io.ReadWriter, i Identity, p *Party, greeting []byte, take Parts) error {
	o, s, err := receive(r, i, p, p.key.PublicKey().Bytes())
	if err != nil {
		return err
	}
	answer := func(b []byte) error {
		if len(b) > frameSize {
			return fmt.Errorf("an answer of %d bytes", len(b))
		}
		s.plain = append(s.plain[:0], b...)
		return s.flush(0)
	}
	if err := answer(greeting); err != nil {
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
		case 'C', 'H':
			b := &unblock{r: in}
			err = take.Checkpoint(b, letter == 'H', answer)
			if letter == 'H' && errors.Is(err, ErrSkip) {
				_, err = io.Copy(io.Discard, b)
			}
			if err == nil {
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
