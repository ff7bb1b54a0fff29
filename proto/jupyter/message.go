package jupyter

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// ProtocolVersion is what headers that we make say.
	ProtocolVersion = "5.3"
	// MaxMessage bounds a message in any form, in bytes.
	MaxMessage = 64 << 20
	// MaxHeader bounds a header or parent header in bytes.
	MaxHeader = 64 << 10
	// MaxBuffers bounds how many binary buffers a message has.
	MaxBuffers = 4096
)

// The channels of a kernel.
const (
	Shell   = "shell"
	IOPub   = "iopub"
	Stdin   = "stdin"
	Control = "control"
)

var (
	// ErrMalformed is returned for bytes that are no message.
	ErrMalformed = errors.New("malformed Jupyter message")
	// ErrTooLarge is returned for a message over MaxMessage, MaxHeader or MaxBuffers.
	ErrTooLarge = errors.New("message of Jupyter's over the limit")
	// ErrSignature is returned for a message whose signature is not that of the
	// connection's key.
	ErrSignature = errors.New("wrong signature of a Jupyter message")
)

// Header is what is understood of a header. A parent header of {} has none of it.
type Header struct {
	ID       string `json:"msg_id"`
	Session  string `json:"session"`
	Username string `json:"username"`
	Date     string `json:"date"` // as it is, ISO 8601; empty for a date in another form
	Type     string `json:"msg_type"`
	Version  string `json:"version"`
}

// ParseHeader reads a header or a parent header. Null, which some clients send as
// a parent header, and nothing at all are the empty Header.
func ParseHeader(text []byte) (Header, error) {
	var h Header
	if len(text) == 0 {
		return h, nil
	}
	if len(text) > MaxHeader {
		return h, fmt.Errorf("%w: a header of %d bytes", ErrTooLarge, len(text))
	}
	// jupyter_server's gateway client writes the date as a number.
	type plain Header
	read := struct {
		*plain
		Date json.RawMessage `json:"date"`
	}{plain: (*plain)(&h)}
	if err := json.Unmarshal(text, &read); err != nil {
		return Header{}, fmt.Errorf("%w: its header is not what the protocol says", ErrMalformed)
	}
	if len(read.Date) > 0 && read.Date[0] == '"' {
		json.Unmarshal(read.Date, &h.Date) //nolint:errcheck // it is a string
	}
	return h, nil
}

// New makes a message with a header of its own. session is the sender's id;
// content is encoded as JSON (nil: {}).
func New(channel, kind, session string, content any) (*posternv1.KernelMessage, error) {
	body := []byte("{}")
	if content != nil {
		var err error
		if body, err = json.Marshal(content); err != nil {
			return nil, err
		}
	}
	header, err := json.Marshal(Header{
		ID: NewID(), Session: session, Username: "postern", Date: time.Now().UTC().Format("2006-01-02T15:04:05.000000Z"),
		Type: kind, Version: ProtocolVersion,
	})
	if err != nil {
		return nil, err
	}
	return &posternv1.KernelMessage{Channel: channel, Header: header, ParentHeader: []byte("{}"), Metadata: []byte("{}"), Content: body}, nil
}

// NewID is a message id or a session id: a random UUID in hexadecimal.
func NewID() string {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic(err) // never happens: crypto/rand aborts the program itself
	}
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return hex.EncodeToString(b[:4]) + "-" + hex.EncodeToString(b[4:6]) + "-" + hex.EncodeToString(b[6:8]) + "-" + hex.EncodeToString(b[8:10]) + "-" + hex.EncodeToString(b[10:])
}

// Size is about what a message takes in memory, in bytes.
func Size(m *posternv1.KernelMessage) int {
	n := len(m.Channel) + len(m.Header) + len(m.ParentHeader) + len(m.Metadata) + len(m.Content)
	for _, b := range m.Buffers {
		n += len(b) + 24
	}
	return n
}

// Check holds a message that a client sent against what may be passed to a kernel:
// a channel that takes messages, a header with id and type, the dicts JSON objects,
// within the limits.
func Check(m *posternv1.KernelMessage) (Header, error) {
	switch m.GetChannel() {
	case Shell, Stdin, Control:
	default:
		return Header{}, fmt.Errorf("%w: channel %.20q takes none", ErrMalformed, m.GetChannel())
	}
	if Size(m) > MaxMessage || len(m.Buffers) > MaxBuffers {
		return Header{}, ErrTooLarge
	}
	h, err := ParseHeader(m.Header)
	if err != nil {
		return h, err
	}
	if h.ID == "" || h.Type == "" {
		return h, fmt.Errorf("%w: its header has no msg_id or no msg_type", ErrMalformed)
	}
	if _, err := ParseHeader(m.ParentHeader); err != nil {
		return h, err
	}
	for _, part := range []*[]byte{&m.ParentHeader, &m.Metadata, &m.Content} {
		if *part = dict(*part); !object(*part) {
			return h, fmt.Errorf("%w: a part of it is no JSON object", ErrMalformed)
		}
	}
	if !object(m.Header) {
		return h, fmt.Errorf("%w: its header is no JSON object", ErrMalformed)
	}
	return h, nil
}

// dict is a JSON text, {} for nothing and null.
func dict(text []byte) []byte {
	if t := bytes.TrimSpace(text); len(t) == 0 || bytes.Equal(t, []byte("null")) {
		return []byte("{}")
	}
	return text
}

func object(text []byte) bool {
	t := bytes.TrimSpace(text)
	return len(t) > 0 && t[0] == '{' && json.Valid(t)
}
