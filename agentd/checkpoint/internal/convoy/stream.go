package convoy

import (
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	frameSize = 64 << 10
	last      = 1 << 31
	// maxHello bounds the sender's hello in bytes.
	maxHello = 16 << 10
)

// ErrCut is returned for a stream that is cut or altered.
var ErrCut = errors.New("the stream from the other host is cut or was altered")

// sealed writes frames. Close writes the last one.
type sealed struct {
	w     io.Writer
	aead  cipher.AEAD
	count uint64
	plain []byte
	out   []byte
}

// send writes the sender's hello and returns what seals the rest, and opens answers.
func send(w io.ReadWriter, i Identity, m Move, offer *posternv1.MoveParty) (*sealed, *opened, error) {
	other, err := m.check(i, receiver, offer)
	if err != nil {
		return nil, nil, err
	}
	p, err := NewParty(m)
	if err != nil {
		return nil, nil, err
	}
	hello, err := p.hello(i, sender)
	if err != nil {
		return nil, nil, err
	}
	text, err := gproto.Marshal(hello)
	if err != nil {
		return nil, nil, err
	}
	cargo, answers, err := p.seal(other, hello.PublicKey, offer.PublicKey)
	if err != nil {
		return nil, nil, err
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...))
	return &sealed{w: w, aead: cargo, plain: make([]byte, 0, frameSize)}, &opened{r: w, aead: answers}, err
}

func (s *sealed) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		if len(s.plain) == frameSize {
			if err := s.flush(0); err != nil {
				return n - len(p), err
			}
		}
		k := min(len(p), frameSize-len(s.plain))
		s.plain = append(s.plain, p[:k]...)
		p = p[k:]
	}
	return n, nil
}

func nonce(count uint64) []byte {
	return binary.BigEndian.AppendUint64(make([]byte, 4, 12), count)
}

func (s *sealed) flush(mark uint32) error {
	s.out = binary.BigEndian.AppendUint32(s.out[:0], uint32(len(s.plain)+s.aead.Overhead())|mark)
	s.out = s.aead.Seal(s.out, nonce(s.count), s.plain, s.out[:4])
	s.count++
	s.plain = s.plain[:0]
	_, err := s.w.Write(s.out)
	return err
}

// Close writes the last frame: without it the other side takes nothing.
func (s *sealed) Close() error { return s.flush(last) }

// opened reads what sealed wrote.
type opened struct {
	r     io.Reader
	aead  cipher.AEAD
	count uint64
	buf   []byte
	plain []byte
	ended bool
}

// receive reads the sender's hello and returns what opens the rest, and seals answers.
func receive(r io.ReadWriter, i Identity, p *Party, offered []byte) (*opened, *sealed, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrCut, err)
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxHello {
		return nil, nil, proto.Errorf(proto.CodeInvalid, "the other host's hello has %d bytes", n)
	}
	text := make([]byte, n)
	if _, err := io.ReadFull(r, text); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrCut, err)
	}
	hello := &posternv1.MoveParty{}
	if err := gproto.Unmarshal(text, hello); err != nil {
		return nil, nil, proto.Errorf(proto.CodeInvalid, "the other host's hello is malformed")
	}
	other, err := p.move.check(i, sender, hello)
	if err != nil {
		return nil, nil, err
	}
	cargo, answers, err := p.seal(other, hello.PublicKey, offered)
	return &opened{r: r, aead: cargo}, &sealed{w: r, aead: answers, plain: make([]byte, 0, frameSize)}, err
}

func (o *opened) Read(p []byte) (int, error) {
	for len(o.plain) == 0 {
		if o.ended {
			return 0, io.EOF
		}
		if err := o.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, o.plain)
	o.plain = o.plain[n:]
	return n, nil
}

func (o *opened) next() error {
	var head [4]byte
	if _, err := io.ReadFull(o.r, head[:]); err != nil {
		return fmt.Errorf("%w: %w", ErrCut, err)
	}
	n := binary.BigEndian.Uint32(head[:])
	size := int(n &^ last)
	if size > frameSize+o.aead.Overhead() {
		return ErrCut
	}
	if cap(o.buf) < size {
		o.buf = make([]byte, frameSize+o.aead.Overhead())
	}
	o.buf = o.buf[:size]
	if _, err := io.ReadFull(o.r, o.buf); err != nil {
		return fmt.Errorf("%w: %w", ErrCut, err)
	}
	plain, err := o.aead.Open(o.buf[:0], nonce(o.count), o.buf, head[:])
	if err != nil {
		return ErrCut
	}
	o.count++
	o.plain, o.ended = plain, n&last != 0
	return nil
}
