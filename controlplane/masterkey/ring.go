package masterkey

import (
	"bytes"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"
)

const (
	// Size is a key's, in bytes: AES-256.
	Size = 32
	// FirstID is the id of the key that an installation was made with.
	FirstID = "1"
	// MaxRing bounds the keys of a ring.
	MaxRing = 8
	// maxFile bounds the file, in bytes.
	maxFile = 64 << 10
	idSize  = 8
)

// Key is a master key, or one derived from it. It prints as "redacted".
type Key [Size]byte

// String hides the key.
func (Key) String() string { return "redacted" }

// GoString hides the key.
func (Key) GoString() string { return "redacted" }

// LogValue hides the key.
func (Key) LogValue() slog.Value { return slog.StringValue("redacted") }

// MarshalJSON hides the key.
func (Key) MarshalJSON() ([]byte, error) { return []byte(`"redacted"`), nil }

// ringKey is one key of a Ring.
type ringKey struct {
	id   string
	made time.Time // zero of one whose file does not say
	key  Key
}

// Ring is master keys, oldest first. It is never changed, and prints as "redacted".
type Ring struct{ keys []ringKey }

// String hides the keys.
func (*Ring) String() string { return "redacted" }

// GoString hides the keys.
func (*Ring) GoString() string { return "redacted" }

// LogValue hides the keys.
func (*Ring) LogValue() slog.Value { return slog.StringValue("redacted") }

// MarshalJSON hides the keys; Encode is what makes the file.
func (*Ring) MarshalJSON() ([]byte, error) { return []byte(`"redacted"`), nil }

// NewRing is a ring of one new first key.
func NewRing() *Ring {
	var key Key
	rand.Read(key[:]) //nolint:errcheck // it never fails
	return &Ring{keys: []ringKey{{id: FirstID, key: key}}}
}

// idOf is the id of a key that is not the first.
func idOf(key Key) (string, error) {
	id, err := hkdf.Key(sha256.New, key[:], nil, "postern master key id", idSize)
	return hex.EncodeToString(id), err
}

// With is r with a key that is not the first, which it may have already, and the key's id.
func (r *Ring) With(key Key) (*Ring, string, error) {
	id, err := idOf(key)
	if err != nil || r.Has(id) {
		return r, id, err
	}
	if len(r.keys) >= MaxRing {
		return nil, "", fmt.Errorf("there are %d master keys already", len(r.keys))
	}
	next := &Ring{keys: append(slices.Clone(r.keys), ringKey{id: id, made: time.Now().UTC().Truncate(time.Second), key: key})}
	return next, id, nil
}

// WithNew is r with a new key, and its id.
func (r *Ring) WithNew() (*Ring, string, error) {
	var key Key
	rand.Read(key[:]) //nolint:errcheck // it never fails
	return r.With(key)
}

// Without is r without a key. The last one stays.
func (r *Ring) Without(id string) *Ring {
	next := &Ring{keys: slices.DeleteFunc(slices.Clone(r.keys), func(k ringKey) bool { return k.id == id })}
	if len(next.keys) == 0 {
		return r
	}
	return next
}

// union is r with the keys of another ring, in r's order and then the other's.
func (r *Ring) union(other *Ring) (*Ring, error) {
	next := &Ring{keys: slices.Clone(r.keys)}
	for _, k := range other.keys {
		have, ok := next.find(k.id)
		switch {
		case ok && have != k.key:
			return nil, errors.New("it holds another installation's first key")
		case !ok:
			next.keys = append(next.keys, k)
		}
	}
	if len(next.keys) > MaxRing {
		return nil, fmt.Errorf("there would be %d master keys, at most %d are kept", len(next.keys), MaxRing)
	}
	return next, nil
}

// IDs are the ids of the keys, oldest first.
func (r *Ring) IDs() []string {
	ids := make([]string, len(r.keys))
	for i, k := range r.keys {
		ids[i] = k.id
	}
	return ids
}

// Has reports whether a key is in the ring.
func (r *Ring) Has(id string) bool {
	_, ok := r.find(id)
	return ok
}

func (r *Ring) find(id string) (Key, bool) {
	for _, k := range r.keys {
		if k.id == id {
			return k.key, true
		}
	}
	return Key{}, false
}

// ringFile is a Ring on disk, once it had more than one key. Keys are base64.
type ringFile struct {
	Version int           `json:"version"` // 1
	Keys    []ringFileKey `json:"keys"`    // oldest first
}

type ringFileKey struct {
	ID   string     `json:"id"`
	Made *time.Time `json:"made,omitempty"`
	Key  string     `json:"key"`
}

// Encode is the ring's file: the 32 bytes of the first key as long as it is alone, else JSON. Whoever has it
// and the database has the CA and all secrets.
func (r *Ring) Encode() ([]byte, error) {
	if len(r.keys) == 1 && r.keys[0].id == FirstID {
		return bytes.Clone(r.keys[0].key[:]), nil
	}
	f := ringFile{Version: 1}
	for _, k := range r.keys {
		one := ringFileKey{ID: k.id, Key: base64.StdEncoding.EncodeToString(k.key[:])}
		if !k.made.IsZero() {
			one.Made = &k.made
		}
		f.Keys = append(f.Keys, one)
	}
	b, err := json.MarshalIndent(f, "", "  ")
	return append(b, '\n'), err
}

// Parse is the reverse of Encode. Errors say nothing of what is in the file.
func Parse(b []byte) (*Ring, error) {
	if len(b) == Size {
		return &Ring{keys: []ringKey{{id: FirstID, key: Key(b)}}}, nil
	}
	var f ringFile
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return nil, fmt.Errorf("it does not hold %d bytes, nor a ring of keys: restore it from a backup", Size)
	}
	if f.Version != 1 {
		return nil, fmt.Errorf("it is a ring of keys of version %d, this control plane knows version 1: upgrade it", f.Version)
	}
	if len(f.Keys) == 0 || len(f.Keys) > MaxRing {
		return nil, fmt.Errorf("it is a ring of %d keys, must have 1 to %d: restore it from a backup", len(f.Keys), MaxRing)
	}
	r := &Ring{}
	for _, k := range f.Keys {
		raw, err := base64.StdEncoding.DecodeString(k.Key)
		if err != nil || len(raw) != Size {
			return nil, errors.New("a key in it is malformed: restore it from a backup")
		}
		one := ringKey{id: k.ID, key: Key(raw)}
		if k.Made != nil {
			one.made = *k.Made
		}
		if one.id != FirstID {
			id, err := idOf(one.key)
			if err != nil {
				return nil, err
			}
			if id != one.id {
				return nil, fmt.Errorf("its key %.16q is not the one of that id: restore it from a backup", k.ID)
			}
		}
		if r.Has(one.id) {
			return nil, fmt.Errorf("it has the key %.16q twice: restore it from a backup", k.ID)
		}
		r.keys = append(r.keys, one)
	}
	return r, nil
}
