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
	rest, ok := strings.CutPrefix(e.Target, peerPrefix)
	number, sum, found := strings.Cut(rest, " ")
	if !ok || !found {
		return Head{}, false
	}
	var h Head
	raw, err := hex.DecodeString(sum)
	if err != nil || len(raw) != len(h.Hash) {
		return Head{}, false
	}
	copy(h.Hash[:], raw)
	h.Sequence, err = strconv.ParseUint(number, 10, 64)
	return h, err == nil && h.Sequence > 0
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
