package remote

import (
	"context"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Remote is AttachService and the bodies beside it. Every call may be repeated: Commit
// is idempotent by the numbers of its operations. An error that carries NOT_FOUND,
// POLICY_DENIED, INVALID or OVERLOADED is the control plane's answer; any other may pass. Calls come
// from many goroutines, and end when their context does.
type Remote interface {
	OpenWorkspace(context.Context, *posternv1.OpenWorkspaceRequest) (*posternv1.OpenWorkspaceResponse, error)
	ListNodes(context.Context, *posternv1.ListNodesRequest) (*posternv1.ListNodesResponse, error)
	GetNodes(context.Context, *posternv1.GetNodesRequest) (*posternv1.GetNodesResponse, error)
	GetContent(context.Context, *posternv1.GetContentRequest) (*posternv1.GetContentResponse, error)
	ReserveIDs(context.Context, *posternv1.ReserveIDsRequest) (*posternv1.ReserveIDsResponse, error)
	MissingChunks(context.Context, *posternv1.MissingChunksRequest) (*posternv1.MissingChunksResponse, error)
	Commit(context.Context, *posternv1.CommitRequest) (*posternv1.CommitResponse, error)
	// WatchChanges calls each with every answer until the stream or the context ends, or
	// each returns an error, which it returns.
	WatchChanges(ctx context.Context, req *posternv1.WatchChangesRequest, each func(*posternv1.WatchChangesResponse) error) error
	// FetchChunks calls each with the content of every hash, at most 256, in order. The
	// bytes are only valid during the call, and not checked.
	FetchChunks(ctx context.Context, workspaceID string, hashes [][]byte, each func(i int, content []byte) error) error
	// StoreChunks returns when the chunks are durable at the control plane.
	StoreChunks(ctx context.Context, workspaceID string, chunks [][]byte) error
}
