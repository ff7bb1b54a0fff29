package store

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// millis is t as it is stored.
func millis(t time.Time) int64 { return t.UnixMilli() }

// stamp is a stored time as it is sent.
func stamp(ms int64) *timestamppb.Timestamp { return timestamppb.New(time.UnixMilli(ms).UTC()) }

// optional is NULL for an absent time.
func optional(t *timestamppb.Timestamp) sql.NullInt64 {
	if t == nil {
		return sql.NullInt64{}
	}
	return sql.NullInt64{Int64: t.AsTime().UnixMilli(), Valid: true}
}

// stampOrNil is the reverse of optional.
func stampOrNil(ms sql.NullInt64) *timestamppb.Timestamp {
	if !ms.Valid {
		return nil
	}
	return stamp(ms.Int64)
}

func encodeLabels(labels map[string]string) string {
	if labels == nil {
		labels = map[string]string{}
	}
	text, err := json.Marshal(labels)
	if err != nil {
		panic(err) // strings always encode
	}
	return string(text)
}

func decodeLabels(text string) (map[string]string, error) {
	var labels map[string]string
	if err := json.Unmarshal([]byte(text), &labels); err != nil {
		return nil, fmt.Errorf("labels in the store: %w", err)
	}
	return labels, nil
}

// array32 checks the length that the tables check too.
func array32(b []byte) ([32]byte, error) {
	if len(b) != 32 {
		return [32]byte{}, fmt.Errorf("hash of %d bytes in the store", len(b))
	}
	return [32]byte(b), nil
}

// placeholders is "?, ?, ?".
func placeholders(n int) string {
	return strings.TrimSuffix(strings.Repeat("?, ", n), ", ")
}

// plainText makes text fit for both engines: PostgreSQL takes neither NUL nor
// invalid UTF-8.
func plainText(text string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", "\uFFFD")
}

// bare drops the one-letter aliases of a column list: SQLite's RETURNING knows no
// alias.
func bare(columns string) string {
	list := strings.Split(columns, ", ")
	for i, column := range list {
		list[i] = column[strings.IndexByte(column, '.')+1:]
	}
	return strings.Join(list, ", ")
}
