package proto

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Headers and trailers of a streamed result, on the public API and inside the
// tunnel alike.
const (
	// OutcomeTrailer carries a QueryOutcome (EncodeOutcome). A body without it
	// is incomplete, however cleanly it ended.
	OutcomeTrailer = "Postern-Outcome"
	// QueryIDHeader names the query, from the first byte of the answer on.
	QueryIDHeader = "Postern-Query-Id"
	// SQLPath is where the agent serves statements inside the tunnel.
	SQLPath = "/postern/v1/sql"
	// MetricsPath is where the agent serves its metrics inside the tunnel.
	MetricsPath = "/postern/v1/metrics"
	// MaxSQLRequest bounds the body of a statement's request, in bytes.
	MaxSQLRequest = 4 << 20
)

// maxOutcome bounds an encoded outcome, in bytes; it fits any HTTP header limit.
const maxOutcome = 24 << 10

// EncodeOutcome is o as one line of ASCII JSON, at most 24 KiB: parameters and
// notices that do not fit are dropped, the first kept.
func EncodeOutcome(o *posternv1.QueryOutcome) string {
	text := encodeOutcome(o)
	if len(text) <= maxOutcome {
		return text
	}
	trimmed := &posternv1.QueryOutcome{
		QueryId: o.QueryId, Rows: o.Rows, Bytes: o.Bytes, Duration: o.Duration, CommandTag: clip(o.CommandTag, 256), RowsReported: o.RowsReported,
	}
	if o.Error != nil {
		trimmed.Error = &posternv1.ErrorDetail{Code: o.Error.Code, Message: clip(o.Error.Message, 2048)}
		if sql := o.Error.Sql; sql != nil {
			trimmed.Error.Sql = &posternv1.SQLErrorDetail{
				Sqlstate: clip(sql.Sqlstate, 16), Position: sql.Position, Hint: clip(sql.Hint, 1024), Detail: clip(sql.Detail, 1024),
			}
		}
	}
	// Parameters have at most the half of it, so that notices have room.
	for _, p := range o.Parameters {
		trimmed.Parameters = append(trimmed.Parameters, p)
		if len(encodeOutcome(trimmed)) > maxOutcome/2 {
			trimmed.Parameters = trimmed.Parameters[:len(trimmed.Parameters)-1]
			trimmed.ParametersTruncated = true
			break
		}
	}
	for _, n := range o.Notices {
		trimmed.Notices = append(trimmed.Notices, n)
		if len(encodeOutcome(trimmed)) > maxOutcome {
			trimmed.Notices = trimmed.Notices[:len(trimmed.Notices)-1]
			break
		}
	}
	return encodeOutcome(trimmed)
}

func encodeOutcome(o *posternv1.QueryOutcome) string {
	body, err := protojson.Marshal(o)
	if err != nil { // only invalid UTF-8 can do this
		body, _ = protojson.Marshal(&posternv1.QueryOutcome{Error: Detail(Errorf(CodeInternal, "the outcome could not be encoded"))})
	}
	var b strings.Builder
	for _, r := range string(body) {
		switch {
		case r < 0x7f:
			b.WriteRune(r)
		case r > 0xffff:
			r -= 0x10000
			fmt.Fprintf(&b, `\u%04x\u%04x`, 0xd800+r>>10, 0xdc00+r&0x3ff)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}

// DecodeOutcome is the reverse of EncodeOutcome.
func DecodeOutcome(text string) (*posternv1.QueryOutcome, error) {
	if text == "" {
		return nil, fmt.Errorf("the result has no outcome: it is incomplete")
	}
	if len(text) > 2*maxOutcome {
		return nil, fmt.Errorf("the outcome has %d bytes, more than %d", len(text), 2*maxOutcome)
	}
	var o posternv1.QueryOutcome
	options := protojson.UnmarshalOptions{DiscardUnknown: true}
	if err := options.Unmarshal([]byte(text), &o); err != nil {
		return nil, fmt.Errorf("the outcome is garbled: %w", err)
	}
	return &o, nil
}

// clip cuts s to at most n bytes, at a character's edge.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "..."
}
