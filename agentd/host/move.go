package host

import (
	"context"
	"io"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/kernelmove"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// actionKernelMove is each step of a move in the audit log; package audit knows it by the
// same name. The statement says which.
const actionKernelMove = "kernel.move"

// Moves moves kernels to and from other hosts: see MoveHostService. Its errors carry codes
// of package proto. What was begun is finished, whoever hangs up, but for the streams.
type Moves interface {
	DescribeMove(ctx context.Context, organization, kernel string) (*posternv1.KernelNeeds, error)
	OfferMove(ctx context.Context, owner *posternv1.Principal, r *posternv1.OfferMoveRequest) (*posternv1.MoveParty, error)
	BeginMove(ctx context.Context, organization string, r *posternv1.BeginMoveRequest) (*posternv1.BeginMoveResponse, error)
	// Export sends, and reads the other host's answers; Receive the other way round.
	Export(ctx context.Context, organization, kernel, move string, other io.ReadWriter) error
	Receive(ctx context.Context, organization, kernel, move string, other io.ReadWriter) error
	FinishMove(ctx context.Context, organization, kernel, move string, forward bool) (committed bool, reason string, err error)
	EndMove(ctx context.Context, organization, kernel, move string, gone, unsent bool) error
}

// serveMoves adds what moves need.
func (h *Host) serveMoves() {
	path, handler := posternv1connect.NewMoveHostServiceHandler(moveRPC{h}, connect.WithReadMaxBytes(4<<20))
	h.mux.Handle(path, handler)
	h.mux.HandleFunc("POST "+kernelmove.Export.Path(), h.serveExport)
	h.mux.HandleFunc("POST "+kernelmove.Import.Path(), h.serveImport)
}

// moveRPC is the MoveHostService.
type moveRPC struct{ h *Host }

var _ posternv1connect.MoveHostServiceHandler = moveRPC{}

// checkMove looks at a request's form; the kernel need not be here.
func checkMove(m *posternv1.MoveRequest) error {
	switch {
	case !validID(m.GetKernelId()):
		return proto.Errorf(proto.CodeInvalid, "the request has no good kernel id")
	case len(m.GetMoveId()) == 0 || len(m.MoveId) > 64:
		return proto.Errorf(proto.CodeInvalid, "the request has no good id of a move")
	case m.Principal.GetTokenId() == "" || m.Principal.GetOrganization() == "":
		return proto.Errorf(proto.CodeInvalid, "the request names no principal")
	}
	return nil
}

// moveDo does one step of a move and records it; what is empty for what only looks.
// here: the kernel must be here, and the principal's.
func moveDo[R any](ctx context.Context, h *Host, m *posternv1.MoveRequest, what string, here bool, do func(ctx context.Context) (*R, error)) (*connect.Response[R], error) {
	began := time.Now()
	entry := kernelEntry(actionKernelMove, m.GetKernelId(), m.GetPrincipal())
	entry.Statement = clip(what)
	err := checkMove(m)
	if err == nil && here {
		_, err = h.kernelFor(ctx, m.KernelId, m.Principal, true)
	}
	if err == nil && what != "" {
		err = h.settle()
	}
	var r *R
	if err == nil {
		if what != "" {
			ctx = context.WithoutCancel(ctx)
		}
		r, err = do(ctx)
	}
	if what != "" {
		h.note(entry, began, err)
	}
	if err != nil {
		return nil, proto.ConnectError(err)
	}
	return connect.NewResponse(r), nil
}

// DescribeMove says what a kernel needs of another host.
func (s moveRPC) DescribeMove(ctx context.Context, r *connect.Request[posternv1.MoveRequest]) (*connect.Response[posternv1.KernelNeeds], error) {
	return moveDo(ctx, s.h, r.Msg, "", true, func(ctx context.Context) (*posternv1.KernelNeeds, error) {
		return s.h.cfg.Moves.DescribeMove(ctx, r.Msg.Principal.Organization, r.Msg.KernelId)
	})
}

// OfferMove says whether this host takes a kernel.
func (s moveRPC) OfferMove(ctx context.Context, r *connect.Request[posternv1.OfferMoveRequest]) (*connect.Response[posternv1.MoveParty], error) {
	return moveDo(ctx, s.h, r.Msg.Move, "", false, func(ctx context.Context) (*posternv1.MoveParty, error) {
		return s.h.cfg.Moves.OfferMove(ctx, r.Msg.Move.Principal, r.Msg)
	})
}

// BeginMove suspends a kernel and holds it.
func (s moveRPC) BeginMove(ctx context.Context, r *connect.Request[posternv1.BeginMoveRequest]) (*connect.Response[posternv1.BeginMoveResponse], error) {
	return moveDo(ctx, s.h, r.Msg.Move, "to agent "+r.Msg.To+": suspended", true, func(ctx context.Context) (*posternv1.BeginMoveResponse, error) {
		return s.h.cfg.Moves.BeginMove(ctx, r.Msg.Move.Principal.Organization, r.Msg)
	})
}

// FinishMove makes a kernel this host's, or says that it will not be.
func (s moveRPC) FinishMove(ctx context.Context, r *connect.Request[posternv1.FinishMoveRequest]) (*connect.Response[posternv1.FinishMoveResponse], error) {
	what := "forgotten here"
	if r.Msg.Forward {
		what = "brought back here"
	}
	m := r.Msg.Move
	return moveDo(ctx, s.h, m, what, false, func(ctx context.Context) (*posternv1.FinishMoveResponse, error) {
		committed, reason, err := s.h.cfg.Moves.FinishMove(ctx, m.Principal.Organization, m.KernelId, m.MoveId, r.Msg.Forward)
		return &posternv1.FinishMoveResponse{Committed: committed, Reason: reason}, err
	})
}

// EndMove forgets a kernel that is another host's, or lets it go on.
func (s moveRPC) EndMove(ctx context.Context, r *connect.Request[posternv1.EndMoveRequest]) (*connect.Response[posternv1.EndMoveResponse], error) {
	what := "goes on here"
	if r.Msg.Gone {
		what = "is on another host now"
	}
	m := r.Msg.Move
	return moveDo(ctx, s.h, m, what, false, func(ctx context.Context) (*posternv1.EndMoveResponse, error) {
		return &posternv1.EndMoveResponse{}, s.h.cfg.Moves.EndMove(ctx, m.Principal.Organization, m.KernelId, m.MoveId, r.Msg.Gone, r.Msg.Unsent)
	})
}

// serveExport sends a kernel that is held. The stream ends early if that fails: then the
// other host takes nothing.
func (h *Host) serveExport(w http.ResponseWriter, r *http.Request) {
	h.serveMove(w, r, kernelmove.Export, "sent", func(ctx context.Context, m *posternv1.MoveRequest, c io.ReadWriter) error {
		return h.cfg.Moves.Export(ctx, m.Principal.Organization, m.KernelId, m.MoveId, c)
	})
}

// serveImport receives a kernel and answers when all of it is on stable storage.
func (h *Host) serveImport(w http.ResponseWriter, r *http.Request) {
	h.serveMove(w, r, kernelmove.Import, "received", func(ctx context.Context, m *posternv1.MoveRequest, c io.ReadWriter) error {
		other := struct {
			io.Reader
			io.Writer
		}{c, kernelmove.Answers{W: c}}
		err := h.cfg.Moves.Receive(ctx, m.Principal.Organization, m.KernelId, m.MoveId, other)
		if werr := kernelmove.WriteResult(c, err); err == nil && werr != nil {
			h.logger.Warn("a kernel was received, and who asked has gone", "kernel", m.KernelId, "err", werr)
		}
		return err
	})
}

func (h *Host) serveMove(w http.ResponseWriter, r *http.Request, stream kernelmove.Stream, what string, do func(context.Context, *posternv1.MoveRequest, io.ReadWriter) error) {
	m, err := stream.ReadRequest(w, r)
	if err == nil {
		err = checkMove(m)
	}
	if err == nil && stream == kernelmove.Export {
		_, err = h.kernelFor(r.Context(), m.KernelId, m.Principal, true)
	}
	if err == nil {
		err = h.settle()
	}
	if err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	began := time.Now()
	entry := kernelEntry(actionKernelMove, m.KernelId, m.Principal)
	entry.Statement = what
	conn, err := stream.Accept(w)
	if err != nil {
		h.logger.Warn("stream of a move not taken over", "kernel", m.KernelId, "err", err)
		return
	}
	defer conn.Close() //nolint:errcheck // it is done with
	if !h.hold(conn) {
		return
	}
	defer h.release(conn)
	err = do(context.WithoutCancel(r.Context()), m, conn)
	h.note(entry, began, err)
	h.logger.Info("kernel "+what, "kernel", m.KernelId, "move", m.MoveId, "duration_seconds", time.Since(began).Seconds(), "err", err)
}
