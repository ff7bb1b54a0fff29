package jupyter

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"sync"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Scheme is the only signature scheme that is spoken; ipykernel's and
// jupyter_client's default.
const Scheme = "hmac-sha256"

// maxIdentities bounds the routing frames in front of a message.
const maxIdentities = 16

var delimiter = []byte("<IDS|MSG>")

// Signer signs and checks messages on ZeroMQ with the key of a connection.
type Signer struct {
	key  []byte
	pool sync.Pool
}

// NewSigner makes a Signer. An empty key means that messages are not signed, as
// Jupyter has it.
func NewSigner(scheme, key string) (*Signer, error) {
	if key != "" && scheme != Scheme {
		return nil, fmt.Errorf("signature scheme %.40q is not spoken: use %s", scheme, Scheme)
	}
	s := &Signer{key: []byte(key)}
	s.pool.New = func() any { return hmac.New(sha256.New, s.key) }
	return s, nil
}

// sign is the signature in hexadecimal over the four dicts; empty without a key.
func (s *Signer) sign(dicts [4][]byte) []byte {
	if len(s.key) == 0 {
		return nil
	}
	h, _ := s.pool.Get().(hash.Hash)
	defer s.pool.Put(h)
	h.Reset()
	for _, d := range dicts {
		h.Write(d)
	}
	var sum [sha256.Size]byte
	return hex.AppendEncode(make([]byte, 0, 2*sha256.Size), h.Sum(sum[:0]))
}

// Frames are the frames of m on ZeroMQ, with routing identities (of a ROUTER's
// peer, or a PUB's topic) in front. They share m's memory.
func (s *Signer) Frames(identities [][]byte, m *posternv1.KernelMessage) [][]byte {
	dicts := [4][]byte{dict(m.Header), dict(m.ParentHeader), dict(m.Metadata), dict(m.Content)}
	frames := make([][]byte, 0, len(identities)+6+len(m.Buffers))
	frames = append(frames, identities...)
	frames = append(frames, delimiter, s.sign(dicts), dicts[0], dicts[1], dicts[2], dicts[3])
	return append(frames, m.Buffers...)
}

// Message reads the frames of a message on ZeroMQ and checks its signature. The
// message has no channel. It shares the frames' memory.
func (s *Signer) Message(frames [][]byte) (identities [][]byte, m *posternv1.KernelMessage, err error) {
	at := -1
	for i, f := range frames {
		if i > maxIdentities {
			break
		}
		if bytes.Equal(f, delimiter) {
			at = i
			break
		}
	}
	if at < 0 {
		return nil, nil, fmt.Errorf("%w: it has no delimiter", ErrMalformed)
	}
	rest := frames[at+1:]
	if len(rest) < 5 {
		return nil, nil, fmt.Errorf("%w: %d frames after the delimiter, not 5", ErrMalformed, len(rest))
	}
	if len(rest)-5 > MaxBuffers {
		return nil, nil, fmt.Errorf("%w: %d buffers", ErrTooLarge, len(rest)-5)
	}
	size := 0
	for _, f := range frames {
		size += len(f)
	}
	if size > MaxMessage {
		return nil, nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, size)
	}
	if len(s.key) > 0 && !hmac.Equal(rest[0], s.sign([4][]byte{rest[1], rest[2], rest[3], rest[4]})) {
		return nil, nil, ErrSignature
	}
	m = &posternv1.KernelMessage{Header: rest[1], ParentHeader: rest[2], Metadata: rest[3], Content: rest[4]}
	if len(rest) > 5 {
		m.Buffers = rest[5:]
	}
	return frames[:at], m, nil
}
