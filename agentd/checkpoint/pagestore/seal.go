package pagestore

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"log/slog"
)

// Key is the host's key for checkpoints, 32 random bytes that never leave the host.
// It shows itself as "redacted".
type Key [32]byte

// String returns "redacted".
func (Key) String() string { return "redacted" }

// GoString returns "redacted".
func (Key) GoString() string { return "redacted" }

// LogValue returns "redacted".
func (Key) LogValue() slog.Value { return slog.StringValue("redacted") }

// MarshalText returns "redacted".
func (Key) MarshalText() ([]byte, error) { return []byte("redacted"), nil }

// keys are an organization's, derived from the host's.
type keys struct {
	hash [32]byte // HMAC-SHA256: which chunks are equal
	pack [32]byte // HKDF input for each pack's key
	meta cipher.AEAD
}

func deriveKeys(host Key, organization string) (keys, error) {
	var k keys
	for _, d := range []struct {
		label string
		to    []byte
	}{
		{"postern checkpoint hash", k.hash[:]},
		{"postern checkpoint pack", k.pack[:]},
	} {
		b, err := hkdf.Key(sha256.New, host[:], nil, d.label+"\x00"+organization, 32)
		if err != nil {
			return k, err
		}
		copy(d.to, b)
	}
	meta, err := hkdf.Key(sha256.New, host[:], nil, "postern checkpoint meta\x00"+organization, 32)
	if err != nil {
		return k, err
	}
	k.meta, err = newGCM(meta)
	return k, err
}

func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// packKey is the key of one pack file: salt is random and new for each writing, so
// segment numbers serve as nonces.
func (k *keys) packKey(id packID, salt []byte) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, k.pack[:], salt, "pack\x00"+id.String(), 32)
	if err != nil {
		return nil, err
	}
	return newGCM(key)
}

func counterNonce(n uint64) []byte {
	var nonce [12]byte
	binary.BigEndian.PutUint64(nonce[4:], n)
	return nonce[:]
}

// seal returns magic | nonce | sealed plain. what binds it to its place.
func (k *keys) seal(magic, what string, plain []byte) []byte {
	out := make([]byte, 0, len(magic)+12+len(plain)+16)
	out = append(out, magic...)
	var nonce [12]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		panic(err) // never happens: crypto/rand aborts the program itself
	}
	out = append(out, nonce[:]...)
	return k.meta.Seal(out, nonce[:], plain, []byte(magic+"\x00"+what))
}

// unseal is the reverse of seal; false if it is not what seal made for this place.
func (k *keys) unseal(magic, what string, sealed []byte) ([]byte, bool) {
	head := len(magic) + 12
	if len(sealed) < head+16 || string(sealed[:len(magic)]) != magic {
		return nil, false
	}
	plain, err := k.meta.Open(nil, sealed[len(magic):head], sealed[head:], []byte(magic+"\x00"+what))
	return plain, err == nil
}

// chunkHash says which chunks are equal, to those who have the organization's key.
type chunkHash [16]byte

// deadChunk stands in a pack's list of hashes for a chunk that was dropped.
var deadChunk chunkHash

// hasher makes chunk hashes; not for concurrent use.
type hasher struct {
	mac hash.Hash
	sum [sha256.Size]byte
}

func newHasher(k *keys) *hasher { return &hasher{mac: hmac.New(sha256.New, k.hash[:])} }

func (h *hasher) hash(chunk []byte) chunkHash {
	h.mac.Reset()
	h.mac.Write(chunk) //nolint:errcheck // never fails
	c := chunkHash(h.mac.Sum(h.sum[:0])[:16])
	if c == deadChunk {
		c[0] = 1 // once in 2^128
	}
	return c
}
