package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/rowfmt"
)

// usageError is a command line that makes no sense.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// report prints err as one line (a SQL error as a few) and returns the exit code.
func (a *app) report(ctx context.Context, err error) int {
	if err == nil {
		return proto.ExitDone
	}
	// The reader of our output has gone (| head): it has seen what it wanted.
	if errors.Is(err, syscall.EPIPE) {
		return proto.ExitFailed
	}
	var usage *usageError
	if errors.As(err, &usage) {
		text := safe(message(err))
		if !strings.Contains(text, "`") { // it gives advice of its own otherwise
			text += fmt.Sprintf(": see `%s --help`", firstOf(a.command, "postern"))
		}
		fmt.Fprintf(a.stderr, "postern: %s\n", text) //nolint:errcheck // nobody is left to tell
		return proto.ExitUsage
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = proto.Errorf(proto.CodeCancelled, "interrupted")
	}
	var sql *statementError
	if errors.As(err, &sql) {
		fmt.Fprint(a.stderr, "postern: "+sql.render()) //nolint:errcheck // nobody is left to tell
		return proto.ExitCode(err)
	}
	fmt.Fprintf(a.stderr, "postern: %s\n", safe(message(err))) //nolint:errcheck // nobody is left to tell
	return proto.ExitCode(err)
}

// message is what a person should read of err.
func message(err error) string {
	var public *proto.Error
	if errors.As(err, &public) {
		return public.Error()
	}
	var ce *connect.Error
	if errors.As(err, &ce) {
		if errors.As(proto.FromConnect(ce), &public) {
			return public.Error()
		}
		return ce.Message()
	}
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
		return "no answer in time: try again"
	}
	return err.Error()
}

// safe makes text of others fit for a terminal, on one line.
func safe(s string) string {
	text, _ := rowfmt.Safe(strings.ReplaceAll(s, "\n", " "))
	return text
}
