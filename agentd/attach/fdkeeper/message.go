package fdkeeper

import (
	"errors"
	"time"
)

const (
	// SocketName is the keeper's socket in its directory.
	SocketName = "keeper.sock"
	// MaxBlob bounds a connection's blob, in bytes.
	MaxBlob = 32 << 10
	// MaxEntries bounds the connections that a keeper holds.
	MaxEntries = 512
	// maxName bounds a connection's name: [a-z0-9-] alone.
	maxName = 64

	// callTime bounds each call but a claim.
	callTime = 20 * time.Second
)

// The kinds of messages. Answers have none.
const (
	opClaim   = "claim"   // -> names; waits until the server before is dead
	opFetch   = "fetch"   // name -> minor, blob, [dev]
	opPut     = "put"     // name, minor, blob, [dev, tree]
	opUpdate  = "update"  // name, blob
	opServing = "serving" // name: it is answered from now on
	opClone   = "clone"   // name, readonly -> [tree]; for everybody
	opDrop    = "drop"    // name
	opBeat    = "beat"    // the server lives
	opOpening = "opening" // the server lives, and is on its way to serve what it has claimed
	opList    = "list"    // -> names; for everybody
	opRenew   = "renew"   // command: start a new server of this program; for everybody
)

type message struct {
	Op       string   `json:"op,omitempty"`
	Name     string   `json:"name,omitempty"`
	Minor    uint32   `json:"minor,omitempty"`
	Blob     []byte   `json:"blob,omitempty"`
	ReadOnly bool     `json:"readonly,omitempty"`
	Command  []string `json:"command,omitempty"`
	Names    []string `json:"names,omitempty"`
	Error    string   `json:"error,omitempty"`
	NotFound bool     `json:"not_found,omitempty"`
}

// ErrUnknown is returned for a name that the keeper does not hold.
var ErrUnknown = errors.New("the keeper holds no such connection")

func validName(name string) bool {
	if name == "" || len(name) > maxName {
		return false
	}
	for _, c := range []byte(name) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}
