package mask

import (
	"bytes"
	"encoding/json"
	"sync"

	"github.com/postern-dev/postern/proto/textmask"
)

// Pattern is a rule for what matches a regular expression inside of texts.
type Pattern struct {
	Expr string
	Rule Rule // Redact, Hash or Partial
}

// Texts masks what matches patterns. Safe for concurrent use; nil has none.
type Texts struct {
	set *textmask.Set
}

// NewTexts returns nil if there are no patterns. The error is one line.
func NewTexts(patterns []Pattern, key []byte) (*Texts, error) {
	if len(patterns) == 0 {
		return nil, nil
	}
	// Neighbours of one kind are one pass.
	var rules []textmask.Rule
	var last Rule
	for i, p := range patterns {
		if i == 0 || p.Rule != last {
			rules = append(rules, textmask.Rule{Replace: replacer(p.Rule, key)})
			last = p.Rule
		}
		r := &rules[len(rules)-1]
		r.Patterns = append(r.Patterns, p.Expr)
	}
	set, err := textmask.Compile(rules)
	if err != nil {
		return nil, err
	}
	return &Texts{set: set}, nil
}

func replacer(rule Rule, key []byte) func(dst, match []byte) []byte {
	switch rule.Kind {
	case Hash:
		macs := sync.Pool{New: func() any { return newMAC(key) }}
		return func(dst, match []byte) []byte {
			m := macs.Get().(*mac)
			defer macs.Put(m)
			return appendHash(dst, m.digest(nil, match))
		}
	case Partial:
		return func(dst, match []byte) []byte { return appendPartial(dst, match, rule.Keep) }
	}
	return nil
}

// Looks tells whether values of a type are texts that patterns are for: all
// that leaves as text except numbers, dates and the like of the server's own.
func (t *Texts) Looks(oid uint32) bool {
	if t == nil {
		return false
	}
	switch oid {
	case oidBool, 17, oidInt2, oidInt4, oidInt8, 26, 28, 29, oidFloat4, oidFloat8, oidNumeric, 1082, 1083, 1114, 1184, 1186, 1266, oidUUID, 27, 5069, 2278, 790,
		1000, 1001, 1005, 1007, 1016, 1021, 1022, 1231, 1182, 1115, 1185, 2951:
		return false
	}
	return true
}

// May tells whether a text, or many one behind the other, may have something
// that matches. JSON and XML may hide it: see Append.
func (t *Texts) May(data []byte) bool { return t != nil && t.set.May(data) }

// Append appends value, of the type oid and in text form (which of text types
// is also the binary one), without what matches; found tells whether anything
// did, else dst is as it was.
func (t *Texts) Append(dst, value []byte, oid uint32) (result []byte, found bool) {
	if t == nil {
		return dst, false
	}
	switch oid {
	case oidJSON, oidJSONB:
		return t.set.AppendJSON(dst, value)
	case oidXML:
		return t.set.AppendXML(dst, value)
	case OIDAnyText:
		if bytes.IndexByte(value, '\\') >= 0 && json.Valid(value) {
			return t.set.AppendJSON(dst, value)
		}
	}
	return t.set.Append(dst, value)
}

// Escapes tells whether values of a type can write characters in another way
// than as themselves, so that May must not be asked.
func Escapes(oid uint32) bool {
	return oid == oidJSON || oid == oidJSONB || oid == oidXML || oid == OIDAnyText
}

// OIDAnyText stands for a text, or bytes, of a database that has no types to tell JSON by:
// what is JSON and has escapes is looked at as such. It is no type of PostgreSQL's.
const OIDAnyText = 1<<32 - 2

// String is Append for a message or a statement.
func (t *Texts) String(s string) string {
	if t == nil {
		return s
	}
	return t.set.String(s)
}
