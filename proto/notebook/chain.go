package notebook

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
)

// State names the state of a kernel by what ran on it: the kernelspec and the
// sources of the code cells, in order. Equal states come of equal sources alone.
type State [sha256.Size]byte

// String is the state in lower-case hex, short enough for a label: 32 characters.
func (s State) String() string { return hex.EncodeToString(s[:16]) }

// Start is the state of a kernel on which nothing ran yet.
func Start(spec string) State { return sha256.Sum256([]byte("postern notebook 1\x00" + spec)) }

// Then is the state after one more cell.
func (s State) Then(source string) State {
	h := sha256.New()
	h.Write(s[:])
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(source)))
	h.Write(n[:])
	h.Write([]byte(source))
	return State(h.Sum(nil))
}

// Chain is the states of a document's code cells: element i is the state before the
// i-th of them, the last one the state after all.
func Chain(spec string, sources []string) []State {
	states := make([]State, 0, len(sources)+1)
	states = append(states, Start(spec))
	for _, source := range sources {
		states = append(states, states[len(states)-1].Then(source))
	}
	return states
}

// Common is how many code cells from the top two chains have in common.
func Common(a, b []State) int {
	n := 0
	for n+1 < len(a) && n+1 < len(b) && a[n+1] == b[n+1] {
		n++
	}
	if len(a) == 0 || len(b) == 0 || a[0] != b[0] {
		return 0
	}
	return n
}
