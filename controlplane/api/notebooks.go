package api

import (
	"context"
	"errors"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Notebooks runs notebooks. send is called from one goroutine at a time, until the call
// returns; an error of it ends the call.
type Notebooks interface {
	RunNotebook(ctx context.Context, c Caller, r *posternv1.RunNotebookRequest, send func(*posternv1.NotebookEvent) error) error
	SyncNotebook(ctx context.Context, c Caller, r *posternv1.SyncNotebookRequest, send func(*posternv1.NotebookEvent) error) error
	NotebookHistory(ctx context.Context, c Caller, r *posternv1.NotebookHistoryRequest) (*posternv1.NotebookHistoryResponse, error)
}

// notebooks implements NotebookService.
type notebooks struct{ api *API }

// RunNotebook implements NotebookService.
func (n notebooks) RunNotebook(ctx context.Context, req *connect.Request[posternv1.RunNotebookRequest], stream *connect.ServerStream[posternv1.NotebookEvent]) error {
	return n.done(ctx, n.api.cfg.Notebooks.RunNotebook(ctx, caller(ctx), req.Msg, stream.Send))
}

// SyncNotebook implements NotebookService.
func (n notebooks) SyncNotebook(ctx context.Context, req *connect.Request[posternv1.SyncNotebookRequest], stream *connect.ServerStream[posternv1.NotebookEvent]) error {
	return n.done(ctx, n.api.cfg.Notebooks.SyncNotebook(ctx, caller(ctx), req.Msg, stream.Send))
}

// NotebookHistory implements NotebookService.
func (n notebooks) NotebookHistory(ctx context.Context, req *connect.Request[posternv1.NotebookHistoryRequest]) (*connect.Response[posternv1.NotebookHistoryResponse], error) {
	return call(ctx, n.api, func(c Caller) (*posternv1.NotebookHistoryResponse, error) {
		return n.api.cfg.Notebooks.NotebookHistory(ctx, c, req.Msg)
	})
}

// done is how a stream ends.
func (n notebooks) done(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if proto.CodeOf(err) == proto.CodeInternal && !errors.Is(err, context.Canceled) && ctx.Err() == nil {
		n.api.cfg.Logger.Error("request failed", "err", err)
	}
	return proto.ConnectError(err)
}
