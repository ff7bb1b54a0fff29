package main

import (
	"context"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/controlplane/api"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

var _ api.Moves = kernels{}

func (a kernelAgent) moves() posternv1connect.MoveHostServiceClient {
	return posternv1connect.NewMoveHostServiceClient(a.HTTP(tunnel.Control), "http://agent", connect.WithReadMaxBytes(4<<20))
}

// askMoves calls one of an agent's procedures.
func askMoves[Q, R any](ctx context.Context, a kernelAgent, call func(context.Context, *connect.Request[Q]) (*connect.Response[R], error), q *Q) (*R, error) {
	return unwrap(a.Link, func() (*connect.Response[R], error) {
		resp, err := call(ctx, connect.NewRequest(q))
		if connect.CodeOf(err) == connect.CodeUnimplemented {
			return nil, proto.Errorf(proto.CodeVersionMismatch, "agent %s is of a version that moves no kernels: upgrade it", a.Name)
		}
		return resp, err
	})
}

func (a kernelAgent) DescribeMove(ctx context.Context, r *posternv1.MoveRequest) (*posternv1.KernelNeeds, error) {
	return askMoves(ctx, a, a.moves().DescribeMove, r)
}

func (a kernelAgent) OfferMove(ctx context.Context, r *posternv1.OfferMoveRequest) (*posternv1.MoveParty, error) {
	return askMoves(ctx, a, a.moves().OfferMove, r)
}

func (a kernelAgent) BeginMove(ctx context.Context, r *posternv1.BeginMoveRequest) (*posternv1.BeginMoveResponse, error) {
	return askMoves(ctx, a, a.moves().BeginMove, r)
}

func (a kernelAgent) FinishMove(ctx context.Context, r *posternv1.FinishMoveRequest) (*posternv1.FinishMoveResponse, error) {
	return askMoves(ctx, a, a.moves().FinishMove, r)
}

func (a kernelAgent) EndMove(ctx context.Context, r *posternv1.EndMoveRequest) (*posternv1.EndMoveResponse, error) {
	return askMoves(ctx, a, a.moves().EndMove, r)
}

// Move implements api.Moves.
func (k kernels) Move(ctx context.Context, c api.Caller, id, agent string, tell func(*posternv1.MoveKernelProgress) error) error {
	return k.Service.Move(ctx, kernelCaller(c), id, agent, tell)
}
