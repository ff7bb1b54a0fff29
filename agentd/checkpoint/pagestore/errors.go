package pagestore

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/postern-dev/postern/proto"
)

// What errors are about; test with errors.Is. All errors that users may see are
// *proto.Error with one public line.
var (
	// ErrDamaged is wrapped when something on disk is not what the store wrote:
	// altered, cut, exchanged or missing. Nothing of it is handed out.
	ErrDamaged = errors.New("damaged")
	// ErrInUse is wrapped by Open when another process has the store open.
	ErrInUse = errors.New("in use")

	errClosed   = errors.New("the checkpoint store is closed")
	errTooLarge = errors.New("the file is too large to be ours")
)

func damaged(format string, args ...any) error {
	return &proto.Error{
		Code:    proto.CodeInternal,
		Message: "checkpoint store: " + fmt.Sprintf(format, args...) + ": it was altered or damaged on disk",
		Err:     ErrDamaged,
	}
}

// inCheckpoint puts the checkpoint's id in front of what happened to it, and gives
// a full disk its code. One line, whatever a path holds.
func inCheckpoint(doing string, id ID, err error) error {
	if err == nil {
		return nil
	}
	code, what := proto.CodeInternal, err.Error()
	var perr *proto.Error
	switch {
	case contextError(err) != nil:
		code, what = proto.CodeOf(contextError(err)), "stopped"
	case isFull(err):
		code, what = proto.CodeStorageFull, "the disk is full: free space or delete checkpoints"
	case errors.As(err, &perr):
		code = perr.Code
	}
	e := proto.Errorf(code, "%s checkpoint %s: %s", doing, id, what)
	e.Err = err
	return e
}

func contextError(err error) error {
	for _, c := range []error{context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, c) {
			return c
		}
	}
	return nil
}

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

func notFound(id ID) error {
	return proto.Errorf(proto.CodeNotFound, "no checkpoint %s: see the kernel's list of checkpoints", id)
}

func invalid(format string, args ...any) error {
	return proto.Errorf(proto.CodeInvalid, format, args...)
}
