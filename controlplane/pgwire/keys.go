package pgwire

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"sync"
)

// Lengths of a session's secret for cancel requests, by the protocol's minor version.
const (
	secretSize    = 4  // 3.0
	longSecret    = 32 // 3.2
	maxSecret     = 256
	minCancelRest = 4 + secretSize
)

// keys find the session that a cancel request is for. They are ours: the database's
// own never leave the host.
type keys struct {
	mu sync.Mutex
	by map[uint32]*key
}

type key struct {
	pid     uint32
	secret  []byte
	session *session
}

// add makes a session's key.
func (k *keys) add(s *session, minor uint32) *key {
	size := secretSize
	if minor >= 2 {
		size = longSecret
	}
	one := &key{secret: make([]byte, size), session: s}
	rand.Read(one.secret) //nolint:errcheck // never fails, it aborts the program
	k.mu.Lock()
	defer k.mu.Unlock()
	for {
		var b [4]byte
		rand.Read(b[:])                                       //nolint:errcheck // likewise
		one.pid = binary.BigEndian.Uint32(b[:]) & (1<<31 - 1) // clients read it as signed
		if one.pid != 0 && k.by[one.pid] == nil {
			k.by[one.pid] = one
			return one
		}
	}
}

func (k *keys) remove(one *key) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.by, one.pid)
}

// find is the session of a cancel request's body; nil if there is none.
func (k *keys) find(rest []byte) *session {
	if len(rest) < minCancelRest || len(rest) > 4+maxSecret {
		return nil
	}
	k.mu.Lock()
	one := k.by[binary.BigEndian.Uint32(rest)]
	k.mu.Unlock()
	if one == nil || subtle.ConstantTimeCompare(one.secret, rest[4:]) != 1 {
		return nil
	}
	return one.session
}

// backendKeyData appends the message that tells the key.
func (k *key) backendKeyData(b []byte) []byte {
	body := binary.BigEndian.AppendUint32(nil, k.pid)
	return message(b, 'K', append(body, k.secret...)...)
}
