package pki

import (
	"crypto/hkdf"
	"crypto/sha256"
	"log/slog"
)

// Box seals what rests in the store with a key of its own, derived from the master
// key. It prints as "redacted".
type Box struct{ key masterKey }

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
	return &Box{key: masterKey(derived)}, nil
}

// Seal encrypts and authenticates plain, and authenticates what it is about.
func (b *Box) Seal(plain []byte, about string) ([]byte, error) { return b.key.seal(plain, about) }

// Open is the reverse of Seal; it fails if anything was altered, or about is not
// the same.
func (b *Box) Open(sealed []byte, about string) ([]byte, error) { return b.key.unseal(sealed, about) }
