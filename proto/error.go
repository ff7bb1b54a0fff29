package proto

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Error is an error with a code. Its message is public: one line that says
// what, where and what to do, without secrets. Err is the cause for logs; it is
// never sent.
type Error struct {
	Code    Code
	Message string
	SQL     *posternv1.SQLErrorDetail
	Err     error
}

// Errorf makes an Error whose message is public. A %w operand becomes its cause,
// so only wrap what may be shown.
func Errorf(code Code, format string, args ...any) *Error {
	wrapped := fmt.Errorf(format, args...)
	return &Error{Code: code, Message: oneLine(wrapped.Error()), Err: errors.Unwrap(wrapped)}
}

// Error returns the public message.
func (e *Error) Error() string {
	if e.Message == "" {
		return PublicMessage(e.Code)
	}
	return e.Message
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// CodeOf returns the code that err carries, here or after it has crossed a
// Connect call; UNSPECIFIED for nil, CANCELLED and TIMEOUT for the context's
// errors, INTERNAL for what has no code.
func CodeOf(err error) Code {
	if err == nil {
		return posternv1.ErrorCode_ERROR_CODE_UNSPECIFIED
	}
	if e, ok := asError(err); ok {
		return e.Code
	}
	switch {
	case errors.Is(err, context.Canceled):
		return CodeCancelled
	case errors.Is(err, context.DeadlineExceeded):
		return CodeTimeout
	}
	return CodeInternal
}

func asError(err error) (*Error, bool) {
	var e *Error
	if errors.As(err, &e) {
		return e, true
	}
	var ce *connect.Error
	if errors.As(err, &ce) {
		if e, ok := FromConnect(ce).(*Error); ok {
			return e, true
		}
	}
	return nil, false
}

// Detail is what may be sent of err: its code and public message. The text of an
// error without a code stays here.
func Detail(err error) *posternv1.ErrorDetail {
	if err == nil {
		return nil
	}
	if e, ok := asError(err); ok {
		return &posternv1.ErrorDetail{Code: e.Code, Message: e.Error(), Sql: e.SQL}
	}
	code := CodeOf(err)
	return &posternv1.ErrorDetail{Code: code, Message: PublicMessage(code)}
}

// FromDetail is the reverse of Detail; nil for nil.
func FromDetail(d *posternv1.ErrorDetail) *Error {
	if d == nil {
		return nil
	}
	return &Error{Code: d.Code, Message: oneLine(d.Message), SQL: d.Sql}
}

// ConnectError wraps what may be sent of err for a Connect reply.
func ConnectError(err error) *connect.Error {
	detail := Detail(err)
	ce := connect.NewError(ConnectCode(detail.Code), errors.New(detail.Message))
	if d, derr := connect.NewErrorDetail(detail); derr == nil {
		ce.AddDetail(d)
	}
	return ce
}

// FromConnect turns the error of a Connect call into an *Error, where the peer
// sent one; other errors (no connection, say) come back as they are.
func FromConnect(err error) error {
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return err
	}
	for _, d := range ce.Details() {
		value, derr := d.Value()
		if derr != nil {
			continue
		}
		if detail, ok := value.(*posternv1.ErrorDetail); ok {
			return FromDetail(detail)
		}
	}
	if !connect.IsWireError(err) {
		return err
	}
	code := CodeInternal
	switch ce.Code() {
	case connect.CodeInvalidArgument:
		code = CodeInvalid
	case connect.CodeUnauthenticated:
		code = CodeUnauthenticated
	case connect.CodePermissionDenied:
		code = CodeRoleDenied
	case connect.CodeNotFound, connect.CodeUnimplemented:
		code = CodeNotFound
	case connect.CodeUnavailable:
		code = CodeUnavailable
	case connect.CodeResourceExhausted:
		code = CodeBodyTooLarge
	case connect.CodeCanceled:
		code = CodeCancelled
	case connect.CodeDeadlineExceeded:
		code = CodeTimeout
	}
	return &Error{Code: code, Message: oneLine(ce.Message())}
}

// maxErrorBody bounds what is read of a peer's error, in bytes.
const maxErrorBody = 64 << 10

// WriteHTTPError answers with err's status and its detail as JSON. Nothing may
// have been written before.
func WriteHTTPError(w http.ResponseWriter, err error) {
	detail := Detail(err)
	body, merr := protojson.Marshal(detail)
	if merr != nil {
		body = []byte(`{"code":"ERROR_CODE_INTERNAL"}`)
	}
	h := w.Header()
	h.Del("Content-Length")
	h.Del("Trailer")
	h.Set("Content-Type", "application/json")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(HTTPStatus(detail.Code))
	w.Write(append(body, '\n')) //nolint:errcheck // the peer has gone; nothing is left to tell it
}

// ReadHTTPError reads the error of a response whose status is not 2xx. A body
// that is not ours (a proxy's page) becomes one line with the status.
func ReadHTTPError(r *http.Response) error {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxErrorBody))
	if err != nil {
		return fmt.Errorf("read the error of status %s: %w", r.Status, err)
	}
	var detail posternv1.ErrorDetail
	media, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if media == "application/json" && json.Valid(body) {
		options := protojson.UnmarshalOptions{DiscardUnknown: true}
		if options.Unmarshal(body, &detail) == nil && detail.Code != 0 {
			return FromDetail(&detail)
		}
	}
	code := CodeInternal
	for candidate, m := range mappings {
		if m.http == r.StatusCode && (code == CodeInternal || candidate < code) {
			code = candidate
		}
	}
	return &Error{Code: code, Message: fmt.Sprintf("%s answered %s, and not as a Postern server does: check the URL", hostOf(r), r.Status)}
}

func hostOf(r *http.Response) string {
	if r.Request != nil && r.Request.URL != nil {
		return r.Request.URL.Host
	}
	return "the server"
}

// oneLine folds line breaks and control characters, so that an error is one line
// wherever it is printed.
func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }), " ")
}
