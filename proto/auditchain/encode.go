package auditchain

import (
	"bytes"
	"encoding/json"
	"strconv"
	"unicode/utf8"
)

// Encode is e as one line of canonical JSON, without the line's end. The bytes are
// those of encoding/json without escapes for HTML: every hash of a chain
// rests on them.
func (e Entry) Encode() []byte {
	return e.append(make([]byte, 0, 512+len(e.Statement)+len(e.Error)))
}

func (e *Entry) append(b []byte) []byte {
	b = strconv.AppendUint(append(b, `{"sequence":`...), e.Sequence, 10)
	b = append(b, `,"time":"`...)
	var err error
	if b, err = e.Time.AppendText(b); err != nil {
		panic(err) // Seal and Decode see to a time within years 0 to 9999
	}
	b = append(b, '"')
	b = appendField(b, `,"organization":`, e.Organization)
	b = appendField(b, `,"actor":`, e.Actor)
	b = appendField(b, `,"role":`, e.Role)
	b = appendString(append(b, `,"action":`...), e.Action)
	b = appendField(b, `,"target":`, e.Target)
	b = appendField(b, `,"agent":`, e.Agent)
	b = appendField(b, `,"source":`, e.Source)
	b = appendField(b, `,"query_id":`, e.QueryID)
	b = appendField(b, `,"session_id":`, e.SessionID)
	b = appendField(b, `,"verdict":`, e.Verdict)
	b = appendField(b, `,"statement":`, e.Statement)
	b = appendField(b, `,"outcome":`, e.Outcome)
	b = appendField(b, `,"error":`, e.Error)
	if e.Rows != 0 {
		b = strconv.AppendUint(append(b, `,"rows":`...), e.Rows, 10)
	}
	if e.Bytes != 0 {
		b = strconv.AppendUint(append(b, `,"bytes":`...), e.Bytes, 10)
	}
	if e.DurationMillis != 0 {
		b = strconv.AppendInt(append(b, `,"duration_ms":`...), e.DurationMillis, 10)
	}
	b = appendField(b, `,"remote":`, e.Remote)
	b = appendString(append(b, `,"prev":`...), e.Prev)
	b = appendString(append(b, `,"hash":`...), e.Hash)
	return append(b, '}')
}

// appendField appends a member that is left out when it is empty.
func appendField(b []byte, name, value string) []byte {
	if value == "" {
		return b
	}
	return appendString(append(b, name...), value)
}

// appendString appends a string as encoding/json has it, which is asked where anything
// in it is no plain ASCII.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c == '"' || c == '\\' || c >= utf8.RuneSelf {
			return appendEscaped(b, s)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}

func appendEscaped(b []byte, s string) []byte {
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(s); err != nil {
		panic(err) // every string can be encoded
	}
	return append(b, bytes.TrimSuffix(out.Bytes(), []byte("\n"))...)
}
