package mask

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
)

// macSize is the length of a digest in bytes.
const macSize = aes.BlockSize

// macInfo keeps the key of the digests apart from others of the same secret.
const macInfo = "postern mask aes-cmac 1"

// mac is AES-CMAC (RFC 4493, NIST SP 800-38B): a keyed hash of 128 bits that takes one
// encryption for 16 bytes of a value, where HMAC-SHA-256 takes two compressions for
// the shortest. Nothing is allocated after newMAC. Not for concurrent use.
type mac struct {
	block  cipher.Block
	k1, k2 [macSize]byte // for a last block that is whole, and for one that is not
	state  [macSize]byte
	last   [macSize]byte
	joined []byte // room for a prefix and a value, kept up to maxJoined
}

// maxJoined is how much room for prefix and value is kept, in bytes.
const maxJoined = 4 << 10

// newMAC derives the key of AES-128 from key, which may have any length.
func newMAC(key []byte) *mac {
	derived, err := hkdf.Key(sha256.New, key, nil, macInfo, 16)
	if err == nil {
		var block cipher.Block
		if block, err = aes.NewCipher(derived); err == nil {
			return newCMAC(block)
		}
	}
	panic(fmt.Sprintf("mask: the key of the hashes: %v", err)) // can't be: the sizes are right
}

func newCMAC(block cipher.Block) *mac {
	m := &mac{block: block}
	var l [macSize]byte
	block.Encrypt(l[:], l[:])
	m.k1 = double(l)
	m.k2 = double(m.k1)
	return m
}

// double multiplies by x in GF(2^128), as RFC 4493 makes its subkeys.
func double(in [macSize]byte) (out [macSize]byte) {
	hi, lo := binary.BigEndian.Uint64(in[:]), binary.BigEndian.Uint64(in[8:])
	carry := hi >> 63
	binary.BigEndian.PutUint64(out[:], hi<<1|lo>>63)
	binary.BigEndian.PutUint64(out[8:], lo<<1^carry*0x87)
	return out
}

// digest is that of prefix and value one behind the other, macSize bytes, valid until
// the next one.
func (m *mac) digest(prefix, value []byte) []byte {
	if len(prefix) > 0 {
		m.joined = append(append(m.joined[:0], prefix...), value...)
		value = m.joined
		if cap(m.joined) > maxJoined {
			m.joined = nil
		}
	}
	m.state = [macSize]byte{}
	for len(value) > macSize {
		xor(&m.state, (*[macSize]byte)(value))
		m.block.Encrypt(m.state[:], m.state[:])
		value = value[macSize:]
	}
	if len(value) == macSize {
		xor(&m.state, (*[macSize]byte)(value))
		xor(&m.state, &m.k1)
	} else {
		m.last = [macSize]byte{}
		copy(m.last[:], value)
		m.last[len(value)] = 0x80
		xor(&m.state, &m.last)
		xor(&m.state, &m.k2)
	}
	m.block.Encrypt(m.state[:], m.state[:])
	return m.state[:]
}

func xor(a, b *[macSize]byte) {
	binary.LittleEndian.PutUint64(a[:], binary.LittleEndian.Uint64(a[:])^binary.LittleEndian.Uint64(b[:]))
	binary.LittleEndian.PutUint64(a[8:], binary.LittleEndian.Uint64(a[8:])^binary.LittleEndian.Uint64(b[8:]))
}
