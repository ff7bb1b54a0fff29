package proto

import (
	"crypto/rand"
	"encoding/binary"
	"time"
)

// idAlphabet is Crockford's base 32, in lower case; it sorts as its values do.
const idAlphabet = "0123456789abcdefghjkmnpqrstvwxyz"

// Prefixes of ids.
const (
	OrganizationPrefix = "org_"
	AgentPrefix        = "agt_"
	TokenPrefix        = "tok_"
	KeyPrefix          = "key_"
	QueryPrefix        = "qry_"
	SessionPrefix      = "ses_"
)

// NewID returns prefix and 26 characters of [0-9a-hjkmnp-tv-z]: 48 bits of Unix
// milliseconds, then 80 random bits (a ULID), so ids sort by time.
func NewID(prefix string) string {
	var b [16]byte
	if _, err := rand.Read(b[6:]); err != nil {
		panic(err) // never happens: crypto/rand aborts the program itself
	}
	var ms [8]byte
	binary.BigEndian.PutUint64(ms[:], uint64(time.Now().UnixMilli()))
	copy(b[:6], ms[2:])
	hi, lo := binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
	var out [26]byte
	for i := len(out) - 1; i >= 0; i-- {
		out[i] = idAlphabet[lo&31]
		lo = lo>>5 | hi<<59
		hi >>= 5
	}
	return prefix + string(out[:])
}
