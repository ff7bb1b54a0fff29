package pgproxy

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// SQLSTATEs that we give or look for.
const (
	stateProtocol       = "08P01"
	stateDenied         = "42501"
	stateReadOnly       = "25006"
	stateUnsupported    = "0A000"
	stateSyntax         = "42601"
	stateLimit          = "54000"
	stateComplex        = "54001"
	stateCanceled       = "57014"
	stateFailed         = "25P02"
	stateEncoding       = "22021"
	stateNoStatement    = "26000"
	stateShutdown       = "57P01"
	stateIdle           = "57P05"
	stateIdleInTx       = "25P03"
	stateCannot         = "57P03"
	stateUnavailable    = "58000"
	stateDiskFull       = "53100"
	stateValue          = "22023"
	stateConnectionLost = "08006"
)

// Refusal is why a statement is not run, in the words of an ErrorResponse.
type Refusal struct {
	SQLState string
	Message  string // one line
	Hint     string
	// Position is in the client's text, in characters from 1; 0: nowhere.
	Position int
	// logged: the log has it already.
	logged bool
	// Code is for the log and the history; 0 means POLICY_DENIED.
	Code proto.Code
}

// Error implements error.
func (r *Refusal) Error() string { return r.Message }

func refuse(state, format string, args ...any) *Refusal {
	return &Refusal{SQLState: state, Message: fmt.Sprintf(format, args...)}
}

// detail is the refusal for the log and the history.
func (r *Refusal) detail() *posternv1.ErrorDetail {
	code := r.Code
	if code == 0 {
		code = proto.CodePolicyDenied
	}
	return &posternv1.ErrorDetail{Code: code, Message: r.Message, Sql: &posternv1.SQLErrorDetail{Sqlstate: r.SQLState, Position: int32(r.Position), Hint: r.Hint}}
}

// appendError appends an ErrorResponse.
func appendError(b []byte, severity string, r *Refusal) []byte {
	start := len(b)
	b = append(b, 'E', 0, 0, 0, 0)
	field := func(name byte, value string) {
		if value != "" {
			b = append(append(append(b, name), strings.ReplaceAll(value, "\x00", "")...), 0)
		}
	}
	field('S', severity)
	field('V', severity)
	field('C', r.SQLState)
	field('M', r.Message)
	field('H', r.Hint)
	if r.Position > 0 {
		field('P', strconv.Itoa(r.Position))
	}
	b = append(b, 0)
	binary.BigEndian.PutUint32(b[start+1:], uint32(len(b)-start-1))
	return b
}

// appendMessage appends a message with parts that each end in a zero byte.
func appendMessage(b []byte, t byte, parts ...string) []byte {
	start := len(b)
	b = append(b, t, 0, 0, 0, 0)
	for _, p := range parts {
		b = append(append(b, p...), 0)
	}
	binary.BigEndian.PutUint32(b[start+1:], uint32(len(b)-start-1))
	return b
}

// serverError reads what counts of an ErrorResponse's body.
func serverError(body []byte) *posternv1.ErrorDetail {
	sql := &posternv1.SQLErrorDetail{}
	message, code := "the server sent an error that can't be read", proto.CodeSQL
	for len(body) > 1 {
		name := body[0]
		end := 1
		for end < len(body) && body[end] != 0 {
			end++
		}
		value := strings.ToValidUTF8(string(body[1:end]), "\uFFFD")
		body = body[min(end+1, len(body)):]
		switch name {
		case 'C':
			sql.Sqlstate = clip(value, 16)
		case 'M':
			message = clip(strings.Join(strings.Fields(value), " "), 4<<10)
		case 'H':
			sql.Hint = clip(value, 4<<10)
		case 'P':
			n, _ := strconv.Atoi(value)
			sql.Position = int32(n)
		}
	}
	switch sql.Sqlstate {
	case stateCanceled:
		code = proto.CodeCancelled
	case stateReadOnly, stateDenied:
		code = proto.CodeSQL
	}
	return &posternv1.ErrorDetail{Code: code, Message: message, Sql: sql}
}

// cut splits a zero-terminated text off.
func cut(b []byte) (text string, rest []byte, ok bool) {
	for i, c := range b {
		if c == 0 {
			return string(b[:i]), b[i+1:], true
		}
	}
	return "", nil, false
}
