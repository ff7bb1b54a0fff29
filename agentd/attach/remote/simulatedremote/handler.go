package simulatedremote

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net/http"

	"connectrpc.com/connect"
	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// Handler serves r as agentd's socket does, for replicas in another process.
func Handler(r *Remote) http.Handler {
	mux := http.NewServeMux()
	mux.Handle(posternv1connect.NewAttachServiceHandler(service{r}))
	mux.HandleFunc("POST /postern/v1/attach/{workspace}/fetch", func(w http.ResponseWriter, req *http.Request) {
		body, err := io.ReadAll(req.Body)
		var ask posternv1.FetchChunksRequest
		if err == nil {
			err = gproto.Unmarshal(body, &ask)
		}
		if err == nil {
			err = r.FetchChunks(req.Context(), req.PathValue("workspace"), ask.Hashes, func(_ int, c []byte) error { return filechunk.WriteFrame(w, c) })
		}
		if err != nil {
			panic(http.ErrAbortHandler) // as a cut link looks
		}
	})
	mux.HandleFunc("POST /postern/v1/attach/{workspace}/store", func(w http.ResponseWriter, req *http.Request) {
		answer := &posternv1.StoreChunksResponse{}
		buf := make([]byte, filechunk.Size)
		for {
			c, err := filechunk.ReadFrame(req.Body, buf)
			if errors.Is(err, io.EOF) {
				break
			}
			if err == nil {
				err = r.StoreChunks(req.Context(), req.PathValue("workspace"), [][]byte{c})
			}
			if err != nil {
				panic(http.ErrAbortHandler)
			}
			h := sha256.Sum256(c)
			answer.Hashes = append(answer.Hashes, h[:])
		}
		body, err := gproto.Marshal(answer)
		if err == nil {
			_, err = w.Write(body)
		}
		if err != nil {
			panic(http.ErrAbortHandler)
		}
	})
	return mux
}

type service struct{ r *Remote }

func serve[Q, A any](ctx context.Context, f func(context.Context, *Q) (*A, error), req *connect.Request[Q]) (*connect.Response[A], error) {
	answer, err := f(ctx, req.Msg)
	if err != nil {
		return nil, proto.ConnectError(err)
	}
	return connect.NewResponse(answer), nil
}

// The methods of AttachService.

func (s service) OpenWorkspace(ctx context.Context, req *connect.Request[posternv1.OpenWorkspaceRequest]) (*connect.Response[posternv1.OpenWorkspaceResponse], error) {
	return serve(ctx, s.r.OpenWorkspace, req)
}

func (s service) ListNodes(ctx context.Context, req *connect.Request[posternv1.ListNodesRequest]) (*connect.Response[posternv1.ListNodesResponse], error) {
	return serve(ctx, s.r.ListNodes, req)
}

func (s service) GetNodes(ctx context.Context, req *connect.Request[posternv1.GetNodesRequest]) (*connect.Response[posternv1.GetNodesResponse], error) {
	return serve(ctx, s.r.GetNodes, req)
}

func (s service) GetContent(ctx context.Context, req *connect.Request[posternv1.GetContentRequest]) (*connect.Response[posternv1.GetContentResponse], error) {
	return serve(ctx, s.r.GetContent, req)
}

func (s service) ReserveIDs(ctx context.Context, req *connect.Request[posternv1.ReserveIDsRequest]) (*connect.Response[posternv1.ReserveIDsResponse], error) {
	return serve(ctx, s.r.ReserveIDs, req)
}

func (s service) MissingChunks(ctx context.Context, req *connect.Request[posternv1.MissingChunksRequest]) (*connect.Response[posternv1.MissingChunksResponse], error) {
	return serve(ctx, s.r.MissingChunks, req)
}

func (s service) Commit(ctx context.Context, req *connect.Request[posternv1.CommitRequest]) (*connect.Response[posternv1.CommitResponse], error) {
	return serve(ctx, s.r.Commit, req)
}

func (s service) WatchChanges(ctx context.Context, req *connect.Request[posternv1.WatchChangesRequest], stream *connect.ServerStream[posternv1.WatchChangesResponse]) error {
	return s.r.WatchChanges(ctx, req.Msg, stream.Send)
}

// ReportStatus takes a report and forgets it.
func (s service) ReportStatus(context.Context, *connect.Request[posternv1.ReportStatusRequest]) (*connect.Response[posternv1.ReportStatusResponse], error) {
	return connect.NewResponse(&posternv1.ReportStatusResponse{}), nil
}
