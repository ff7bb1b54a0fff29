package pagestore

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
	"maps"
	"slices"
	"time"

	"github.com/postern-dev/postern/proto"
)

// maxRing bounds the keys of a ring: one seals, the others are those whose data was not
// sealed anew yet.
const maxRing = 8

// keyID names a key: 8 bytes derived from it, which tell nothing of it.
type keyID [8]byte

// String is the id in 16 hexadecimal digits.
func (id keyID) String() string { return hex.EncodeToString(id[:]) }

// ringKey is one key of a Ring.
type ringKey struct {
	id   keyID
	made time.Time
	key  Key
	// first: what it sealed bears no id, since there was but one key then.
	first bool
}

// Ring is the host's keys: the newest seals, the others still open what they sealed.
// A Ring is never changed. It shows itself as "redacted".
//
// Which chunks are equal is told by keys of their own, which stay when the others are
// replaced, so that a rotation makes no chunk unknown: those hashes lie sealed in packs,
// so knowing these keys alone says nothing of contents.
type Ring struct {
	keys   []ringKey      // oldest first
	hash   Key            // of organizations that hashes does not name; unused while keys[0].first is all there is
	hashes map[string]Key // of organizations that were there before the first rotation
}

// NewRing makes a ring of one random key.
func NewRing() (*Ring, error) {
	var key Key
	if _, err := rand.Read(key[:]); err != nil {
		return nil, err
	}
	return ringOf(key, time.Now())
}

func ringOf(key Key, made time.Time) (*Ring, error) {
	id, err := idOf(key)
	if err != nil {
		return nil, err
	}
	return &Ring{keys: []ringKey{{id: id, made: made.UTC().Truncate(time.Second), key: key, first: true}}}, nil
}

func idOf(key Key) (id keyID, err error) {
	b, err := hkdf.Key(sha256.New, key[:], nil, "postern checkpoint key id", len(id))
	copy(id[:], b)
	return id, err
}

// String returns "redacted".
func (*Ring) String() string { return "redacted" }

// GoString returns "redacted".
func (*Ring) GoString() string { return "redacted" }

// LogValue returns "redacted".
func (*Ring) LogValue() slog.Value { return slog.StringValue("redacted") }

// MarshalText returns "redacted"; Encode is what makes the file.
func (*Ring) MarshalText() ([]byte, error) { return []byte("redacted"), nil }

// ringFile is a Ring on disk, once it had more than one key. Keys are base64.
type ringFile struct {
	Version int               `json:"version"` // 1
	Keys    []ringFileKey     `json:"keys"`    // oldest first
	Hash    string            `json:"hash"`
	Hashes  map[string]string `json:"hashes,omitempty"`
}

type ringFileKey struct {
	ID    string    `json:"id"`
	Made  time.Time `json:"made"`
	First bool      `json:"first,omitempty"`
	Key   string    `json:"key"`
}

// single: nothing was ever rotated.
func (r *Ring) single() bool { return len(r.keys) == 1 && r.keys[0].first }

// Encode is the ring's file: the 32 bytes of the key as long as it is the first one and
// alone, JSON after the first rotation. Whoever has it can read every checkpoint.
func (r *Ring) Encode() ([]byte, error) {
	if r.single() {
		return bytes.Clone(r.keys[0].key[:]), nil
	}
	f := ringFile{Version: 1, Hash: base64.StdEncoding.EncodeToString(r.hash[:]), Hashes: map[string]string{}}
	for _, k := range r.keys {
		f.Keys = append(f.Keys, ringFileKey{ID: k.id.String(), Made: k.made, First: k.first, Key: base64.StdEncoding.EncodeToString(k.key[:])})
	}
	for org, k := range r.hashes {
		f.Hashes[org] = base64.StdEncoding.EncodeToString(k[:])
	}
	b, err := json.MarshalIndent(f, "", "  ")
	return append(b, '\n'), err
}

// ParseRing is the reverse of Encode. made is when a single key was made, which its file
// does not say. Errors say nothing of what is in the file.
func ParseRing(b []byte, made time.Time) (*Ring, error) {
	if len(b) == len(Key{}) {
		return ringOf(Key(b), made)
	}
	var f ringFile
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return nil, fmt.Errorf("it has %d bytes, which are neither a key of %d nor a ring of keys", len(b), len(Key{}))
	}
	if f.Version != 1 {
		return nil, fmt.Errorf("it is a ring of keys of version %d, this agentd knows version 1", f.Version)
	}
	if len(f.Keys) == 0 || len(f.Keys) > maxRing {
		return nil, fmt.Errorf("it is a ring of %d keys, must have 1 to %d", len(f.Keys), maxRing)
	}
	r := &Ring{hashes: map[string]Key{}}
	var err error
	if r.hash, err = decodeKey(f.Hash); err != nil {
		return nil, err
	}
	for _, k := range f.Keys {
		rk := ringKey{made: k.Made, first: k.First}
		if rk.key, err = decodeKey(k.Key); err != nil {
			return nil, err
		}
		if rk.id, err = idOf(rk.key); err != nil {
			return nil, err
		}
		if rk.id.String() != k.ID {
			return nil, fmt.Errorf("its key %.16q is not the one of that id", k.ID)
		}
		r.keys = append(r.keys, rk)
	}
	for org, k := range f.Hashes {
		if r.hashes[org], err = decodeKey(k); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func decodeKey(s string) (k Key, err error) {
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil || len(b) != len(k) {
		return k, errors.New("a key in it is malformed")
	}
	return Key(b), nil
}

func (r *Ring) newest() ringKey { return r.keys[len(r.keys)-1] }

// rotated is r with a new key. organizations are all that the store has.
func (r *Ring) rotated(organizations []string) (*Ring, error) {
	if len(r.keys) >= maxRing {
		return nil, fmt.Errorf("there are %d keys that are still needed: wait until agentd has sealed anew what the old ones seal", len(r.keys))
	}
	next := &Ring{keys: slices.Clone(r.keys), hash: r.hash, hashes: maps.Clone(r.hashes)}
	if r.single() {
		if _, err := rand.Read(next.hash[:]); err != nil {
			return nil, err
		}
		next.hashes = map[string]Key{}
		for _, org := range organizations {
			k, err := deriveKeys(r.keys[0].key, org)
			if err != nil {
				return nil, err
			}
			next.hashes[org] = k.hash
		}
	}
	fresh, err := NewRing()
	if err != nil {
		return nil, err
	}
	key := fresh.keys[0]
	key.first = false
	next.keys = append(next.keys, key)
	return next, nil
}

// without is r without keys that nothing needs.
func (r *Ring) without(gone map[keyID]bool) *Ring {
	next := &Ring{hash: r.hash, hashes: r.hashes}
	for _, k := range r.keys {
		if !gone[k.id] {
			next.keys = append(next.keys, k)
		}
	}
	return next
}

// keyset is a ring's keys as derived for one organization; never changed.
type keyset struct {
	newest *keys
	byID   map[keyID]*keys
	first  *keys // of what bears no id; nil if it was dropped
}

func (r *Ring) derive(organization string) (*keyset, error) {
	set := &keyset{byID: map[keyID]*keys{}}
	hash, named := r.hashes[organization]
	for _, rk := range r.keys {
		k, err := deriveKeys(rk.key, organization)
		if err != nil {
			return nil, err
		}
		k.id, k.first = rk.id, rk.first
		switch {
		case r.single():
		case named:
			k.hash = hash
		default:
			own, err := deriveKeys(r.hash, organization)
			if err != nil {
				return nil, err
			}
			k.hash = own.hash
		}
		set.byID[k.id], set.newest = &k, &k
		if k.first {
			set.first = &k
		}
	}
	return set, nil
}

// errNoKey is wrapped, beside ErrDamaged, when what was read is sealed with a key that
// the ring has no more, or never had.
var errNoKey = errors.New("the key is not in the ring")

func noKey(what string, id keyID) error {
	return &proto.Error{
		Code:    proto.CodeInternal,
		Message: fmt.Sprintf("checkpoint store: %s is sealed with the key %s, which the file of keys does not have: put the right file back", what, id),
		Err:     errors.Join(ErrDamaged, errNoKey),
	}
}

// of returns the key that sealed something which bears id, or none if named is false;
// nil if it is not there.
func (s *keyset) of(id keyID, named bool) *keys {
	if !named {
		return s.first
	}
	return s.byID[id]
}
