package masterkey

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
)

// marker begins what a key other than the first has sealed.
const marker = "PSTNKEY1"

// Sealed with the first key, a text begins with 12 random bytes: that they are the marker and the id of
// a key that the ring has happens once in 2^96 times.

// ErrUnseal is returned when something does not open.
var ErrUnseal = errors.New("it was sealed with another master key, or altered")

// NoKeyError is returned for what a key sealed that is not in the ring.
type NoKeyError struct{ ID string }

func (e *NoKeyError) Error() string {
	return fmt.Sprintf("it was sealed with the master key %s, which DATA/master.key does not have: copy the file from another control plane of this installation, or restore the one of the same age as the database", e.ID)
}

// KeyOf is the id of the key that sealed something.
func KeyOf(sealed []byte) string {
	if len(sealed) < len(marker)+idSize || string(sealed[:len(marker)]) != marker {
		return FirstID
	}
	return hex.EncodeToString(sealed[len(marker) : len(marker)+idSize])
}

// seal encrypts with AES-256-GCM: a random nonce, then the text. about is authenticated.
func (k Key) seal(plain []byte, about string) ([]byte, error) {
	aead, err := k.aead()
	if err != nil {
		return nil, err
	}
	out := make([]byte, aead.NonceSize(), aead.NonceSize()+len(plain)+aead.Overhead())
	if _, err := rand.Read(out); err != nil {
		return nil, err
	}
	return aead.Seal(out, out, plain, []byte(about)), nil
}

func (k Key) unseal(sealed []byte, about string) ([]byte, error) {
	return k.unsealInto(sealed, about, func([]byte) []byte { return nil })
}

// unsealInto is unseal, and appends to what room returns for the ciphertext.
func (k Key) unsealInto(sealed []byte, about string, room func(ciphertext []byte) []byte) ([]byte, error) {
	aead, err := k.aead()
	if err != nil {
		return nil, err
	}
	if len(sealed) < aead.NonceSize() {
		return nil, ErrUnseal
	}
	plain, err := aead.Open(room(sealed[aead.NonceSize():]), sealed[:aead.NonceSize()], sealed[aead.NonceSize():], []byte(about))
	if err != nil {
		return nil, ErrUnseal
	}
	return plain, nil
}

func (k Key) aead() (cipher.AEAD, error) {
	block, err := aes.NewCipher(k[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// derive is the key of a purpose, or k itself for none.
func (k Key) derive(purpose string) (Key, error) {
	if purpose == "" {
		return k, nil
	}
	return k.expand("postern box: " + purpose)
}

func (k Key) expand(info string) (Key, error) {
	b, err := hkdf.Key(sha256.New, k[:], nil, info, Size)
	if err != nil {
		return Key{}, err
	}
	return Key(b), nil
}

// Box seals for one purpose: what one purpose's box has sealed no other one opens. It prints as "redacted".
type Box struct {
	keys    *Keys
	purpose string
}

// String hides the keys.
func (*Box) String() string { return "redacted" }

// GoString hides the keys.
func (*Box) GoString() string { return "redacted" }

// LogValue hides the keys.
func (*Box) LogValue() slog.Value { return slog.StringValue("redacted") }

// MarshalJSON hides the keys.
func (*Box) MarshalJSON() ([]byte, error) { return []byte(`"redacted"`), nil }

// Box returns the box for a purpose. An empty one is the CA's own.
func (k *Keys) Box(purpose string) *Box { return &Box{k, purpose} }

// Seal encrypts and authenticates plain with the key that seals at present, and authenticates what it is about.
func (b *Box) Seal(plain []byte, about string) ([]byte, error) {
	s := b.keys.now.Load()
	key, ok := s.ring.find(s.active)
	if !ok {
		return nil, &NoKeyError{s.active}
	}
	derived, err := key.derive(b.purpose)
	if err != nil {
		return nil, err
	}
	sealed, err := derived.seal(plain, about)
	if err != nil || s.active == FirstID {
		return sealed, err
	}
	id, err := hex.DecodeString(s.active)
	if err != nil {
		return nil, err
	}
	return bytes.Join([][]byte{[]byte(marker), id, sealed}, nil), nil
}

// Open is the reverse of Seal, for every key of the ring; it fails if anything was altered, or about is not the
// same. A NoKeyError says that the ring lacks the key.
func (b *Box) Open(sealed []byte, about string) ([]byte, error) {
	ring := b.keys.now.Load().ring
	id, text := KeyOf(sealed), sealed
	if id != FirstID {
		text = sealed[len(marker)+idSize:]
	}
	key, ok := ring.find(id)
	if !ok {
		return nil, &NoKeyError{id}
	}
	derived, err := key.derive(b.purpose)
	if err != nil {
		return nil, err
	}
	return derived.unseal(text, about)
}

// Reseal opens what any key of the ring has sealed and seals it with the one that seals at present.
func (b *Box) Reseal(sealed []byte, about string) ([]byte, error) {
	plain, err := b.Open(sealed, about)
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	return b.Seal(plain, about)
}

// DataKey seals and names much that is not sealed with a master key directly. It prints as "redacted".
type DataKey struct{ key, names Key }

// DataKeySize is how long DataKey.Bytes is.
const DataKeySize = 2 * Size

// NewDataKey makes a random one.
func NewDataKey() *DataKey {
	d := &DataKey{}
	rand.Read(d.key[:])   //nolint:errcheck // it never fails
	rand.Read(d.names[:]) //nolint:errcheck // it never fails
	return d
}

// ParseDataKey is the reverse of Bytes.
func ParseDataKey(b []byte) (*DataKey, error) {
	if len(b) != DataKeySize {
		return nil, fmt.Errorf("a data key of %d bytes, must have %d", len(b), DataKeySize)
	}
	return &DataKey{key: Key(b[:Size]), names: Key(b[Size:])}, nil
}

// FirstDataKey is the data key of a purpose that is derived from the first master key: versions that knew but
// one master key kept it nowhere. It is a NoKeyError if that one is not in the ring any more.
func (k *Keys) FirstDataKey(purpose string) (*DataKey, error) {
	first, ok := k.now.Load().ring.find(FirstID)
	if !ok {
		return nil, &NoKeyError{FirstID}
	}
	var d DataKey
	var err error
	if d.key, err = first.derive(purpose); err != nil {
		return nil, err
	}
	d.names, err = first.expand("postern names: " + purpose)
	return &d, err
}

// String hides the key.
func (*DataKey) String() string { return "redacted" }

// GoString hides the key.
func (*DataKey) GoString() string { return "redacted" }

// LogValue hides the key.
func (*DataKey) LogValue() slog.Value { return slog.StringValue("redacted") }

// MarshalJSON hides the key.
func (*DataKey) MarshalJSON() ([]byte, error) { return []byte(`"redacted"`), nil }

// Bytes are the key itself, to be sealed.
func (d *DataKey) Bytes() []byte { return append(bytes.Clone(d.key[:]), d.names[:]...) }

// Seal encrypts and authenticates plain, and authenticates what it is about.
func (d *DataKey) Seal(plain []byte, about string) ([]byte, error) { return d.key.seal(plain, about) }

// Open is the reverse of Seal; it fails if anything was altered, or about is not the same.
func (d *DataKey) Open(sealed []byte, about string) ([]byte, error) {
	return d.key.unseal(sealed, about)
}

// OpenInPlace is Open, and needs no memory: what it returns is a part of sealed, which it
// overwrites, whether it fails or not.
func (d *DataKey) OpenInPlace(sealed []byte, about string) ([]byte, error) {
	return d.key.unsealInto(sealed, about, func(ciphertext []byte) []byte { return ciphertext[:0] })
}

// Name is a keyed hash (HMAC-SHA256) of something, in lower-case hex: without the key nobody can tell
// what it is the name of.
func (d *DataKey) Name(of []byte) string {
	mac := hmac.New(sha256.New, d.names[:])
	mac.Write(of)
	return hex.EncodeToString(mac.Sum(nil))
}
