package child

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// SQLSTATEs that mean something to us.
const (
	stateQueryCanceled   = "57014"
	stateReadOnly        = "25006"
	stateSyntaxError     = "42601"
	stateUnknownParam    = "42P18"
	stateAdminShutdown   = "57P01"
	stateCannotConnect   = "57P03"
	stateTooMany         = "53300"
	stateNoDatabase      = "3D000"
	stateInvalidPassword = "28P01"
	stateInvalidAuth     = "28000"
	stateNotSupported    = "0A000"
	stateNotInRepertoire = "22021"
)

// connectError says why there is no connection. where is host:port or the
// socket's path. The causes never hold the password: the DSN has none, and
// pgconn puts none into its errors.
func connectError(err error, where string) *proto.Error {
	var (
		refusal *pgconn.PgError
		dns     *net.DNSError
		op      *net.OpError
		unknown x509.UnknownAuthorityError
		name    x509.HostnameError
		invalid x509.CertificateInvalidError
		record  tls.RecordHeaderError
		verify  *tls.CertificateVerificationError
	)
	switch {
	case errors.As(err, &refusal):
		code := proto.CodeSourceUnreachable
		switch refusal.Code {
		case stateInvalidPassword, stateInvalidAuth:
			code = proto.CodeSourceCredentials
		case stateNoDatabase:
			code = proto.CodeSourceConfig
		case stateTooMany:
			code = proto.CodeOverloaded
		}
		return &proto.Error{
			Code: code, Err: err,
			Message: fmt.Sprintf("PostgreSQL at %s refused the connection: %s (SQLSTATE %s)", where, clean(refusal.Message), refusal.Code),
		}
	case errors.As(err, &verify), errors.As(err, &unknown), errors.As(err, &name), errors.As(err, &invalid):
		return proto.Errorf(proto.CodeSourceConfig, "TLS with PostgreSQL at %s: %s: check sslmode and sslrootcert", where, last(err))
	case errors.As(err, &record), strings.Contains(err.Error(), "server refused TLS connection"):
		return proto.Errorf(proto.CodeSourceConfig, "PostgreSQL at %s does not speak TLS: check sslmode", where)
	case errors.As(err, &dns):
		return proto.Errorf(proto.CodeSourceUnreachable, "PostgreSQL at %s: cannot resolve %s: %s", where, dns.Name, dns.Err)
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &op) && op.Timeout():
		return proto.Errorf(proto.CodeSourceUnreachable, "PostgreSQL at %s did not answer in time", where)
	case errors.As(err, &op) && op.Op == "dial":
		return proto.Errorf(proto.CodeSourceUnreachable, "cannot reach PostgreSQL at %s: %s", where, last(op.Err))
	}
	return proto.Errorf(proto.CodeSourceConfig, "what answers at %s is no PostgreSQL server that we understand: %s", where, last(err))
}

// last is the innermost text of an error, on one line.
func last(err error) string {
	for {
		if joined, ok := err.(interface{ Unwrap() []error }); ok && len(joined.Unwrap()) > 0 {
			err = joined.Unwrap()[0]
			continue
		}
		next := errors.Unwrap(err)
		if next == nil {
			return clean(err.Error())
		}
		err = next
	}
}

// clean puts a text of the server's on one line of valid UTF-8.
func clean(text string) string {
	return frame.Clip(strings.Join(strings.Fields(strings.ToValidUTF8(text, "\uFFFD")), " "), 4<<10)
}

// sqlError turns the server's refusal of the statement into ours.
func sqlError(e *pgproto3.ErrorResponse, text *sqltext.Statement) *proto.Error {
	position := 0
	if text != nil {
		position = text.Position(int(e.Position))
	}
	message := clean(e.Message)
	if e.Code == stateUnknownParam && text != nil {
		if _, after, ok := strings.Cut(message, "parameter $"); ok {
			digits := after[:len(after)-len(strings.TrimLeft(after, "0123456789"))]
			if n, err := strconv.Atoi(digits); err == nil && n >= 1 && n <= len(text.Args) {
				name := text.Args[n-1].Name
				message = strings.Replace(message, "parameter $"+digits, fmt.Sprintf("parameter {{%s}}: cast it, as in {{%s}}::text, or give its type", name, name), 1)
			}
		}
	}
	full := fmt.Sprintf("the database refused the statement: %s (SQLSTATE %s", message, e.Code)
	if position > 0 {
		full += fmt.Sprintf(", position %d", position)
	}
	return &proto.Error{
		Code: proto.CodeSQL, Message: full + ")",
		SQL: &posternv1.SQLErrorDetail{Sqlstate: clean(e.Code), Position: int32(position), Hint: clean(e.Hint), Detail: clean(e.Detail)},
	}
}

// denied is a refusal by the host's policy, at a position of the user's text
// (0: unknown).
func denied(position int, format string, args ...any) *proto.Error {
	e := proto.Errorf(proto.CodePolicyDenied, format, args...)
	if position > 0 {
		e.Message = fmt.Sprintf("%s (position %d)", e.Message, position)
		e.SQL = &posternv1.SQLErrorDetail{Position: int32(position)}
	}
	return e
}

// stopError says why a statement was stopped.
func stopError(reason frame.Reason, r *frame.RunRequest) *proto.Error {
	undone := ""
	if r.ReadWrite {
		undone = "; the statement was rolled back"
	}
	switch reason {
	case frame.TimedOut:
		return timeoutError(r)
	case frame.Draining:
		return proto.Errorf(proto.CodeUnavailable, "the agent or its data source goes away: try again%s", undone)
	case rowLimit:
		return proto.Errorf(proto.CodeRowLimit, "the result has more than %d rows: the first %d were delivered%s; ask for fewer, or raise the limit", r.MaxRows, r.MaxRows, undone)
	case byteLimit:
		return proto.Errorf(proto.CodeByteLimit, "the result has more than %d bytes: the rows that fit were delivered%s; ask for less, or raise the limit", r.MaxBytes, undone)
	}
	return proto.Errorf(proto.CodeCancelled, "the statement was cancelled%s", undone)
}

func timeoutError(r *frame.RunRequest) *proto.Error {
	timeout := time.Duration(r.TimeoutMillis) * time.Millisecond
	return proto.Errorf(proto.CodeTimeout, "the statement ran longer than its limit of %s and was cancelled", timeout)
}
