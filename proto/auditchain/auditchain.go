package auditchain

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// MaxStatement bounds Entry.Statement, in bytes; Seal cuts what is longer and
// says so in the text.
const MaxStatement = 64 << 10

// MaxLine bounds an encoded entry, in bytes. Decode refuses more.
const MaxLine = 1 << 20

// Entry is one action that touched data or changed who may. All text is free of
// secrets before it comes here.
type Entry struct {
	// Sequence is 1-based and without gaps; set by Seal.
	Sequence uint64 `json:"sequence"`
	// Time is UTC with milliseconds.
	Time time.Time `json:"time"`
	// Organization is the tenant's id.
	Organization string `json:"organization,omitempty"`
	// Actor is who: "token NAME", "agent NAME", "host", "system"; Role its role.
	Actor string `json:"actor,omitempty"`
	Role  string `json:"role,omitempty"`
	// Action is what: "sql.run", "key.create", "agent.register", ...
	Action string `json:"action"`
	// Target is what it was done to, where the fields below do not say: a key's
	// or token's id, a certificate's serial.
	Target  string `json:"target,omitempty"`
	Agent   string `json:"agent,omitempty"`
	Source  string `json:"source,omitempty"`
	QueryID string `json:"query_id,omitempty"`
	// SessionID is the session that stays open which this is about, or ran in.
	SessionID string `json:"session_id,omitempty"`
	// Verdict is the policy's: "allowed" or "denied".
	Verdict string `json:"verdict,omitempty"`
	// Statement is the query's text, at most MaxStatement bytes.
	Statement string `json:"statement,omitempty"`
	// Outcome is how it ended: "done", "failed", "cancelled", "denied"; Error the
	// public message.
	Outcome        string `json:"outcome,omitempty"`
	Error          string `json:"error,omitempty"`
	Rows           uint64 `json:"rows,omitempty"`
	Bytes          uint64 `json:"bytes,omitempty"`
	DurationMillis int64  `json:"duration_ms,omitempty"`
	// Remote is the caller's address as the writer of the log saw it.
	Remote string `json:"remote,omitempty"`
	// Prev and Hash are lower-case hex; set by Seal.
	Prev string `json:"prev"`
	Hash string `json:"hash"`
}

// Head names the last entry of a chain; the zero Head is an empty chain's.
type Head struct {
	Sequence uint64
	Hash     [sha256.Size]byte
}

// Proto is h for the wire.
func (h Head) Proto() *posternv1.AuditHead {
	if h.Sequence == 0 {
		return &posternv1.AuditHead{}
	}
	return &posternv1.AuditHead{Sequence: h.Sequence, Hash: h.Hash[:]}
}

// HeadFromProto is the reverse of Proto.
func HeadFromProto(p *posternv1.AuditHead) (Head, error) {
	if p.GetSequence() == 0 {
		return Head{}, nil
	}
	if len(p.Hash) != sha256.Size {
		return Head{}, fmt.Errorf("audit head %d has a hash of %d bytes, not %d", p.Sequence, len(p.Hash), sha256.Size)
	}
	return Head{Sequence: p.Sequence, Hash: [sha256.Size]byte(p.Hash)}, nil
}

// Seal makes e the entry after prev: it sets Sequence, Prev and Hash, makes the
// text valid UTF-8, cuts Statement and returns the new head.
func (e *Entry) Seal(prev Head) Head {
	e.Sequence = prev.Sequence + 1
	e.Time = e.Time.UTC().Truncate(time.Millisecond)
	e.Prev = hex.EncodeToString(prev.Hash[:])
	for _, s := range []*string{
		&e.Organization, &e.Actor, &e.Role, &e.Action, &e.Target, &e.Agent, &e.Source, &e.QueryID, &e.SessionID,
		&e.Verdict, &e.Statement, &e.Outcome, &e.Error, &e.Remote,
	} {
		if !utf8.ValidString(*s) {
			*s = strings.ToValidUTF8(*s, "\uFFFD")
		}
	}
	if len(e.Statement) > MaxStatement {
		n := MaxStatement
		for !utf8.RuneStart(e.Statement[n]) {
			n--
		}
		e.Statement = fmt.Sprintf("%s… (cut, %d bytes in all)", e.Statement[:n], len(e.Statement))
	}
	if len(e.Error) > MaxStatement {
		e.Error = strings.ToValidUTF8(e.Error[:MaxStatement], "")
	}
	hash := e.digest(prev.Hash)
	e.Hash = hex.EncodeToString(hash[:])
	return Head{Sequence: e.Sequence, Hash: hash}
}

func (e Entry) digest(prev [sha256.Size]byte) [sha256.Size]byte {
	e.Hash = ""
	h := sha256.New()
	h.Write(prev[:])
	h.Write(e.Encode())
	return [sha256.Size]byte(h.Sum(nil))
}

// Decode reads one line. It refuses what Encode would not have written.
func Decode(line []byte) (Entry, error) {
	var e Entry
	if len(line) > MaxLine {
		return e, fmt.Errorf("entry of %d bytes, more than %d", len(line), MaxLine)
	}
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&e); err != nil {
		return Entry{}, fmt.Errorf("not an audit entry: %w", err)
	}
	if y := e.Time.Year(); y < 1 || y > 9999 || !bytes.Equal(e.Encode(), line) {
		return Entry{}, fmt.Errorf("entry %d is not in canonical form", e.Sequence)
	}
	return e, nil
}

// BrokenError says where a chain breaks and how.
type BrokenError struct {
	// Sequence is the first entry that does not fit: the number expected there.
	Sequence uint64
	Reason   string
}

// Error says both in one line.
func (e *BrokenError) Error() string {
	return fmt.Sprintf("audit chain broken at entry %d: %s", e.Sequence, e.Reason)
}

// Verifier checks a chain entry by entry.
type Verifier struct {
	head   Head
	broken error
}

// NewVerifier returns a verifier for what follows from; the zero Head is the
// chain's beginning.
func NewVerifier(from Head) *Verifier { return &Verifier{head: from} }

// Head is the last entry that fitted.
func (v *Verifier) Head() Head { return v.head }

// Add checks the next line. After the first *BrokenError it returns the same one.
func (v *Verifier) Add(line []byte) error {
	if v.broken == nil {
		v.broken = v.add(line)
	}
	return v.broken
}

func (v *Verifier) add(line []byte) error {
	want := v.head.Sequence + 1
	e, err := Decode(line)
	if err != nil {
		return &BrokenError{want, "it was altered: " + err.Error()}
	}
	hash := e.digest(v.head.Hash)
	fits := e.Prev == hex.EncodeToString(v.head.Hash[:])
	switch {
	case e.Sequence > want:
		return &BrokenError{want, fmt.Sprintf("removed or reordered: entry %d stands in its place", e.Sequence)}
	case e.Sequence < want:
		return &BrokenError{want, fmt.Sprintf("reordered or repeated: entry %d stands in its place", e.Sequence)}
	case !fits && e.selfConsistent():
		return &BrokenError{want, "the entry before it was altered, or this one was written for another chain"}
	case !fits || e.Hash != hex.EncodeToString(hash[:]):
		return &BrokenError{want, "it was altered: its hash does not match its content"}
	}
	v.head = Head{Sequence: want, Hash: hash}
	return nil
}

// selfConsistent reports whether e's hash fits its own content and prev.
func (e Entry) selfConsistent() bool {
	prev, err := hex.DecodeString(e.Prev)
	if err != nil || len(prev) != sha256.Size {
		return false
	}
	hash := e.digest([sha256.Size]byte(prev))
	return e.Hash == hex.EncodeToString(hash[:])
}
