package auditchain

import (
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// PeerAction is the action of an entry in which a host keeps the head of its organization's chain, as
// the control plane told it: so that the control plane's chain cannot be cut or written anew without some host
// having another memory of it.
const PeerAction = "audit.peer"

const peerPrefix = "control plane, entry "

// PeerTarget is the target of an entry that keeps a head.
func PeerTarget(h Head) string {
	return peerPrefix + strconv.FormatUint(h.Sequence, 10) + " " + hex.EncodeToString(h.Hash[:])
}

// PeerHead is the head that an entry keeps; false if it is not one of these.
func PeerHead(e Entry) (Head, bool) {
	if e.Action != PeerAction {
		return Head{}, false
	}
	return headIn(e.Target, peerPrefix, " ")
}

// headIn reads a head out of an entry's target: prefix, number, between, hash.
func headIn(target, prefix, between string) (Head, bool) {
	rest, ok := strings.CutPrefix(target, prefix)
	number, sum, found := strings.Cut(rest, between)
	if !ok || !found {
		return Head{}, false
	}
	sequence, err := strconv.ParseUint(number, 10, 64)
	if err != nil || sequence == 0 {
		return Head{}, false
	}
	h, err := HeadOf(Entry{Sequence: sequence, Hash: sum})
	return h, err == nil
}

// HeadOf is the head that a sealed entry makes; an error if it has no hash.
func HeadOf(e Entry) (Head, error) {
	h := Head{Sequence: e.Sequence}
	raw, err := hex.DecodeString(e.Hash)
	if err != nil || len(raw) != len(h.Hash) {
		return h, fmt.Errorf("entry %d has no hash", e.Sequence)
	}
	copy(h.Hash[:], raw)
	return h, nil
}
