package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
	sqlitedriver "modernc.org/sqlite"
	sqlitecode "modernc.org/sqlite/lib"

	"github.com/postern-dev/postern/proto"
)

// fail gives a database's error its code. op says what was tried; it is for the
// log, and for the text where the code has none of its own.
func (s *Store) fail(ctx context.Context, op string, err error) error {
	var coded *proto.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &coded):
		return err
	case ctx.Err() != nil:
		// SQLite says "interrupted", PostgreSQL "canceling statement".
		return fmt.Errorf("%s: %w", op, context.Cause(ctx))
	}
	cause := fmt.Errorf("%s: %w", op, err)
	switch {
	case isFull(err):
		return &proto.Error{Code: proto.CodeStorageFull, Message: "no space is left for the control plane's database: free some and try again", Err: cause}
	case isUnavailable(err):
		return &proto.Error{Code: proto.CodeUnavailable, Message: "the control plane's database does not answer: try again in a moment", Err: cause}
	}
	return cause
}

func sqliteCode(err error) int {
	var e *sqlitedriver.Error
	if errors.As(err, &e) {
		return e.Code()
	}
	return 0
}

func pgCode(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

func isFull(err error) bool {
	return sqliteCode(err)&0xff == sqlitecode.SQLITE_FULL || pgCode(err) == "53100"
}

func isUnique(err error) bool {
	switch sqliteCode(err) {
	case sqlitecode.SQLITE_CONSTRAINT_UNIQUE, sqlitecode.SQLITE_CONSTRAINT_PRIMARYKEY:
		return true
	}
	return pgCode(err) == "23505"
}

// isUnavailable reports errors that pass by themselves: a busy file, a database
// that restarts, refuses further connections or cannot be reached.
func isUnavailable(err error) bool {
	switch sqliteCode(err) & 0xff {
	case sqlitecode.SQLITE_BUSY, sqlitecode.SQLITE_LOCKED:
		return true
	}
	if code := pgCode(err); code != "" {
		return strings.HasPrefix(code, "08") || strings.HasPrefix(code, "57P0") || strings.HasPrefix(code, "28") ||
			code == "53300" || code == "40001" || code == "40P01"
	}
	var connect *pgconn.ConnectError
	var network net.Error
	return errors.As(err, &connect) || errors.As(err, &network) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, sql.ErrConnDone)
}

func notFound(what, which string) error {
	return proto.Errorf(proto.CodeNotFound, "%s %q not found", what, clip(which))
}

// clip bounds a caller's text within an error.
func clip(text string) string {
	if len(text) > 80 {
		return strings.ToValidUTF8(text[:80], "") + "…"
	}
	return text
}
