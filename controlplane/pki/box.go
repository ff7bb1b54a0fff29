package pki

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
)

// Box seals what rests in the store with a key of its own, derived from the master
// key. It prints as "redacted".
type Box struct{ key, names masterKey }

// String hides the key.
func (Box) String() string { return "redacted" }

// GoString hides the key.
func (Box) GoString() string { return "redacted" }

// LogValue hides the key.
func (Box) LogValue() slog.Value { return slog.StringValue("redacted") }

// MarshalJSON hides the key.
func (Box) MarshalJSON() ([]byte, error) { return []byte(`"redacted"`), nil }

// Box returns the box for a purpose. What one purpose's box has sealed no other
// one opens, and none of them the CA's key.
func (a *Authority) Box(purpose string) (*Box, error) {
	derived, err := hkdf.Key(sha256.New, a.master[:], nil, "postern box: "+purpose, masterKeySize)
	if err != nil {
		return nil, err
	}
	names, err := hkdf.Key(sha256.New, a.master[:], nil, "postern names: "+purpose, masterKeySize)
	if err != nil {
		return nil, err
	}
	return &Box{key: masterKey(derived), names: masterKey(names)}, nil
}

// Seal encrypts and authenticates plain, and authenticates what it is about.
func (b *Box) Seal(plain []byte, about string) ([]byte, error) { return b.key.seal(plain, about) }

// Open is the reverse of Seal; it fails if anything was altered, or about is not
// the same.
func (b *Box) Open(sealed []byte, about string) ([]byte, error) { return b.key.unseal(sealed, about) }

// OpenInPlace is Open, and needs no memory: what it returns is a part of sealed, which it
// overwrites, whether it fails or not.
func (b *Box) OpenInPlace(sealed []byte, about string) ([]byte, error) {
	return b.key.unsealInto(sealed, about, func(ciphertext []byte) []byte { return ciphertext[:0] })
}

// Name is a keyed hash (HMAC-SHA256) of something, in lower-case hex: without the master
// key nobody can tell what it is the name of.
func (b *Box) Name(of []byte) string {
	mac := hmac.New(sha256.New, b.names[:])
	mac.Write(of)
	return hex.EncodeToString(mac.Sum(nil))
}
