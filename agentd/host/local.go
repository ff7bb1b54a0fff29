package host

import (
	"context"
	"io"

	gproto "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

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
	outcome, _, took, err := h.execute(ctx, request, from, w)
	if outcome == nil {
		outcome = &posternv1.QueryOutcome{}
	}
	outcome.QueryId, outcome.Error = request.QueryId, proto.Detail(err)
	if outcome.Duration == nil {
		outcome.Duration = durationpb.New(took)
	}
	return outcome
}
