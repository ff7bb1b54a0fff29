package api

import (
	"context"
	"errors"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Moves moves kernels between agents; it writes the audit entries itself.
type Moves interface {
	// Move tells how far it is; an error of tell ends it.
	Move(ctx context.Context, c Caller, kernel, agent string, tell func(*posternv1.MoveKernelProgress) error) error
}

// moves implements KernelMoveService.
type moves struct{ api *API }

// MoveKernel implements KernelMoveService.
func (m moves) MoveKernel(ctx context.Context, req *connect.Request[posternv1.MoveKernelRequest], out *connect.ServerStream[posternv1.MoveKernelProgress]) error {
	err := m.api.cfg.Moves.Move(ctx, caller(ctx), req.Msg.KernelId, req.Msg.Agent, out.Send)
	if err == nil {
		return nil
	}
	if proto.CodeOf(err) == proto.CodeInternal && !errors.Is(err, context.Canceled) {
		m.api.cfg.Logger.Error("kernel not moved", "kernel", req.Msg.KernelId, "err", err)
	}
	return proto.ConnectError(err)
}
