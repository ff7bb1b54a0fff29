package pgwire

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/postern-dev/postern/proto"
)

// SQLSTATEs of PostgreSQL's errcodes that are used here.
const (
	stateConnectionFailure  = "08006"
	stateRejected           = "08004"
	stateProtocolViolation  = "08P01"
	stateNotSupported       = "0A000"
	stateInvalidParameter   = "22023"
	stateInvalidAuth        = "28000"
	stateInvalidPassword    = "28P01"
	stateInvalidCatalog     = "3D000"
	statePrivilege          = "42501"
	stateDiskFull           = "53100"
	stateTooManyConnections = "53300"
	stateConfigurationLimit = "53400"
	stateQueryCanceled      = "57014"
	stateAdminShutdown      = "57P01"
	stateCannotConnectNow   = "57P03"
	stateInternal           = "XX000"
)

// fatal is why a connection ends, as its client is told. reason is the metric's
// label, from a closed list.
type fatal struct {
	state, message, detail, hint string
	reason                       string
}

// Error returns the message.
func (f *fatal) Error() string { return f.message }

func fatalf(reason, state, format string, args ...any) *fatal {
	return &fatal{reason: reason, state: state, message: fmt.Sprintf(format, args...)}
}

// with adds a hint.
func (f *fatal) with(hint string) *fatal {
	f.hint = hint
	return f
}

// sqlstates are those of the errors with which hosts and the control plane refuse.
var sqlstates = map[proto.Code]string{
	proto.CodeInvalid:              stateInvalidParameter,
	proto.CodeRoleDenied:           statePrivilege,
	proto.CodePolicyDenied:         statePrivilege,
	proto.CodeNotFound:             stateInvalidCatalog,
	proto.CodeAgentOffline:         stateCannotConnectNow,
	proto.CodeAgentLost:            stateConnectionFailure,
	proto.CodeCancelled:            stateQueryCanceled,
	proto.CodeTimeout:              stateCannotConnectNow,
	proto.CodeBodyTooLarge:         stateInvalidParameter,
	proto.CodeRateLimited:          stateConfigurationLimit,
	proto.CodeOverloaded:           stateTooManyConnections,
	proto.CodeUnavailable:          stateCannotConnectNow,
	proto.CodeSourceUnreachable:    stateCannotConnectNow,
	proto.CodeSourceCredentials:    stateRejected,
	proto.CodeSourceConfig:         stateRejected,
	proto.CodeSQLSessionDied:       stateConnectionFailure,
	proto.CodeOrganizationDisabled: stateInvalidAuth,
	proto.CodeVersionMismatch:      stateNotSupported,
	proto.CodeAgentRevoked:         stateCannotConnectNow,
	proto.CodeStorageFull:          stateDiskFull,
}

// explain turns an error into what the client is told; the text of one without a
// code stays here. A SQLSTATE of the database's stands, but for those of class 28,
// which the client would take for a wrong token of its own.
func explain(reason string, err error) *fatal {
	var f *fatal
	if errors.As(err, &f) {
		return f
	}
	d := proto.Detail(err)
	f = &fatal{reason: reason, state: sqlstates[d.Code], message: d.Message}
	if f.state == "" {
		f.state = stateInternal
	}
	if s := d.Sql; s != nil {
		f.detail, f.hint = s.Detail, s.Hint
		if len(s.Sqlstate) == 5 && s.Sqlstate[:2] != "28" {
			f.state = s.Sqlstate
		}
	}
	return f
}

// encode is the ErrorResponse.
func (f *fatal) encode() []byte {
	b := append(make([]byte, 0, 64+len(f.message)+len(f.detail)+len(f.hint)), 'E', 0, 0, 0, 0)
	field := func(kind byte, text string) {
		if text != "" {
			b = cstring(append(b, kind), text)
		}
	}
	field('S', "FATAL")
	field('V', "FATAL")
	field('C', f.state)
	field('M', f.message)
	field('D', f.detail)
	field('H', f.hint)
	return seal(append(b, 0), 0)
}

// cstring appends text and a zero byte; a zero within ends it early.
func cstring(b []byte, text string) []byte {
	for i := range len(text) {
		if text[i] == 0 {
			text = text[:i]
			break
		}
	}
	return append(append(b, text...), 0)
}

// seal sets the length of the message that begins at start and ends with b.
func seal(b []byte, start int) []byte {
	binary.BigEndian.PutUint32(b[start+1:], uint32(len(b)-start-1))
	return b
}

// message appends a whole message with this body.
func message(b []byte, kind byte, body ...byte) []byte {
	b = binary.BigEndian.AppendUint32(append(b, kind), uint32(len(body)+4))
	return append(b, body...)
}

// parameter appends a ParameterStatus.
func parameter(b []byte, name, value string) []byte {
	start := len(b)
	return seal(cstring(cstring(append(b, 'S', 0, 0, 0, 0), name), value), start)
}
