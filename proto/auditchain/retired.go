package auditchain

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"strconv"
	"time"
)

// RetireAction is the action of an entry that stands for the chain's beginning, which was
// or is about to be dropped because of its age. It is an entry like any other: whoever
// drops more than it names, or without one, breaks the chain.
const RetireAction = "audit.retire"

const retirePrefix = "entries up to "

var retireMark = []byte(`"action":"` + RetireAction + `"`)

// RetireTarget is the target of an entry that retires everything up to h, h included.
func RetireTarget(h Head) string {
	return retirePrefix + strconv.FormatUint(h.Sequence, 10) + ", hash " + hex.EncodeToString(h.Hash[:])
}

// RetiredHead is the last entry that e retires; false if it retires none.
func RetiredHead(e Entry) (Head, bool) {
	if e.Action != RetireAction {
		return Head{}, false
	}
	h, ok := headIn(e.Target, retirePrefix, ", hash ")
	return h, ok && h.Sequence < e.Sequence
}

// Before is the head that an entry says it follows: of the entry before it.
func Before(e Entry) (Head, error) {
	if e.Sequence == 0 {
		return Head{}, fmt.Errorf("entry 0 of an audit chain, which begins with 1")
	}
	h, err := HeadOf(Entry{Sequence: e.Sequence - 1, Hash: e.Prev})
	if err != nil {
		return h, fmt.Errorf("entry %d does not say what it follows", e.Sequence)
	}
	return h, nil
}

// KeptVerifier checks a chain whose beginning may have been retired: what is there must
// fit, and an entry in it must stand for everything that is not. The zero value is ready.
// It keeps no entries.
type KeptVerifier struct {
	v      *Verifier
	first  uint64
	before Head
	// stands is the newest entry that retires something, and for what; by and at say which.
	stands Head
	by     uint64
	at     time.Time
	broken error
}

// Add checks the next line. After the first *BrokenError it returns the same one.
func (k *KeptVerifier) Add(line []byte) error {
	if k.broken == nil {
		k.broken = k.add(line)
	}
	return k.broken
}

func (k *KeptVerifier) add(line []byte) error {
	if k.v == nil {
		e, err := Decode(line)
		if err != nil {
			return &BrokenError{1, "it was altered: " + err.Error()}
		}
		before, err := Before(e)
		if err != nil {
			return &BrokenError{1, "it was altered: " + err.Error()}
		}
		if e.Sequence == 1 {
			before = Head{}
		}
		k.v, k.first, k.before = NewVerifier(before), e.Sequence, before
	}
	if err := k.v.Add(line); err != nil {
		return err
	}
	if !bytes.Contains(line, retireMark) {
		return nil
	}
	e, err := Decode(line)
	if err != nil {
		return err // it was verified: this does not happen
	}
	h, ok := RetiredHead(e)
	if !ok {
		return nil // the words stood elsewhere in it
	}
	if h.Sequence == k.before.Sequence && h != k.before {
		return &BrokenError{k.first, fmt.Sprintf("it does not follow the entry that entry %d retires", e.Sequence)}
	}
	if h.Sequence >= k.stands.Sequence {
		k.stands, k.by, k.at = h, e.Sequence, e.Time
	}
	return nil
}

// Head is the last entry that fitted.
func (k *KeptVerifier) Head() Head {
	if k.v == nil {
		return Head{}
	}
	return k.v.Head()
}

// End is to be called after the last entry: a *BrokenError if something is missing at the
// beginning that no entry stands for.
func (k *KeptVerifier) End() error {
	if k.broken == nil && k.first > 1 && k.stands.Sequence < k.before.Sequence {
		k.broken = &BrokenError{k.stands.Sequence + 1, fmt.Sprintf("removed: what is kept begins with entry %d, and no entry retires those before it", k.first)}
	}
	return k.broken
}

// Kept says what was checked.
func (k *KeptVerifier) Kept() Kept {
	kept := Kept{First: k.first, Last: k.Head().Sequence}
	if k.first > 1 {
		kept.RetiredBy, kept.RetiredAt = k.by, k.at
	}
	return kept
}

// Kept is the part of a chain that is there.
type Kept struct {
	// First and Last are sequence numbers; both are 0 where there is no entry.
	First, Last uint64
	// RetiredBy is the entry that stands for what is not there, if First is above 1.
	RetiredBy uint64
	RetiredAt time.Time
}

// Entries is how many there are.
func (k Kept) Entries() uint64 {
	if k.First == 0 || k.Last < k.First {
		return 0
	}
	return k.Last - k.First + 1
}

// String says from where on there are entries, if not from the beginning: else it is empty.
func (k Kept) String() string {
	if k.First <= 1 {
		return ""
	}
	return fmt.Sprintf("from entry %d on: those before were retired on %s (entry %d)", k.First, k.RetiredAt.UTC().Format("2006-01-02 15:04:05 UTC"), k.RetiredBy)
}
