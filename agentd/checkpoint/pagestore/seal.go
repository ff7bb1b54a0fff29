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

	id    keyID
	first bool // what it seals bears no id
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

// named is how a magic reads where the key's id follows it.
func named(magic string) string { return magic[:len(magic)-1] + "2" }

// sealedBy reads which key sealed head, the beginning of what seal returned, and where
// its nonce begins; false if it is too short or has another magic. The id is the zero
// one if bears is false.
func sealedBy(magic string, head []byte) (id keyID, bears bool, nonceAt int, ok bool) {
	if len(head) < len(magic)+len(id) {
		return id, false, 0, false
	}
	switch string(head[:len(magic)]) {
	case magic:
		return id, false, len(magic), true
	case named(magic):
		copy(id[:], head[len(magic):])
		return id, true, len(magic) + len(id), true
	}
	return id, false, 0, false
}

// seal returns magic | nonce | sealed plain, with the key's id behind the magic unless it
// is the first. what binds it to its place.
func (k *keys) seal(magic, what string, plain []byte) []byte {
	out := make([]byte, 0, len(magic)+len(k.id)+12+len(plain)+16)
	if k.first {
		out = append(out, magic...)
	} else {
		out = append(append(out, named(magic)...), k.id[:]...)
	}
	var nonce [12]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		panic(err) // never happens: crypto/rand aborts the program itself
	}
	out = append(out, nonce[:]...)
	return k.meta.Seal(out, nonce[:], plain, []byte(magic+"\x00"+what))
}

// unseal is the reverse of seal. It returns the id of the key, too. The error is
// [errNoKey], wrapped, or one that says that text does not authenticate.
func (s *keyset) unseal(magic, what, text string, sealed []byte) ([]byte, keyID, error) {
	id, bears, at, ok := sealedBy(magic, sealed)
	if !ok || len(sealed) < at+12+sealedMore {
		return nil, id, damaged("%s does not authenticate", text)
	}
	k := s.of(id, bears)
	if k == nil {
		return nil, id, noKey(text, id)
	}
	plain, err := k.meta.Open(nil, sealed[at:at+12], sealed[at+12:], []byte(magic+"\x00"+what))
	if err != nil {
		return nil, k.id, damaged("%s does not authenticate", text)
	}
	return plain, k.id, nil
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
