package host

import (
	"context"
	"io"

	gproto "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Local is told of statements that come from this host itself. Its methods must not
// block.
type Local interface {
	// Began is called before a statement's end can be in the log, Ended when it is, with
	// the error and what may be kept of the rows; both may be nil.
	Began(query string)
	Ended(query string, err *posternv1.ErrorDetail, kept *posternv1.KeptRows)
}

// RunLocal runs a statement that comes from this host itself, from a kernel, as
// one that the control plane sends: the same policy, log, limits and masks. The
// request's principal is on whose behalf; from names the asker in the log. Rows go to
// w as an Arrow IPC stream. The outcome is never nil and has the error.
func (h *Host) RunLocal(ctx context.Context, request *posternv1.SQLRequest, from string, w io.Writer) *posternv1.QueryOutcome {
	failed := func(err error) *posternv1.QueryOutcome {
		return &posternv1.QueryOutcome{QueryId: request.QueryId, Error: proto.Detail(err)}
	}
	if err := checkRequest(request); err != nil {
		return failed(err)
	}
	if n := gproto.Size(request); n > proto.MaxSQLRequest {
		return failed(proto.Errorf(proto.CodeBodyTooLarge, "the statement and its parameters take %d bytes, more than %d", n, int64(proto.MaxSQLRequest)))
	}
	if err := h.enter(request.QueryId); err != nil {
		return failed(err)
	}
	defer h.leave(request.QueryId)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(h.abort, func() { cancel(context.Cause(h.abort)) })
	defer stop()
	request.TakesRows = h.cfg.Local != nil
	var kept *posternv1.KeptRows
	var detail *posternv1.ErrorDetail
	if h.cfg.Local != nil {
		h.cfg.Local.Began(request.QueryId)
		defer func() { h.cfg.Local.Ended(request.QueryId, detail, kept) }()
	}
	outcome, kept, took, err := h.execute(ctx, request, from, w)
	detail = proto.Detail(err)
	if outcome == nil {
		outcome = &posternv1.QueryOutcome{}
	}
	outcome.QueryId, outcome.Error = request.QueryId, detail
	if outcome.Duration == nil {
		outcome.Duration = durationpb.New(took)
	}
	return outcome
}
