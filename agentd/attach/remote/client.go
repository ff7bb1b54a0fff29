package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"connectrpc.com/connect"
	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// base is the address of agentd on its socket; the host name means nothing.
const base = "http://agentd"

// Client is a Remote by agentd's unix socket: AttachService, and
//
//	POST /postern/v1/attach/WORKSPACE_ID/fetch  FetchChunksRequest → frames, in the order asked
//	POST /postern/v1/attach/WORKSPACE_ID/store  frames → StoreChunksResponse
type Client struct {
	http   *http.Client
	attach posternv1connect.AttachServiceClient
}

var _ Remote = (*Client)(nil)

// Dial returns a Client of the socket at path. It connects when it is used, and again
// after agentd was restarted.
func Dial(path string) *Client {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	c := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
		Protocols:           protocols,
		MaxIdleConnsPerHost: 16,
		IdleConnTimeout:     time.Minute,
		DisableCompression:  true,
	}}
	return &Client{http: c, attach: posternv1connect.NewAttachServiceClient(c, base, connect.WithReadMaxBytes(32<<20))}
}

// Close closes connections that are idle.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func call[Q, A any](ctx context.Context, f func(context.Context, *connect.Request[Q]) (*connect.Response[A], error), req *Q) (*A, error) {
	resp, err := f(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}

// OpenWorkspace implements Remote.
func (c *Client) OpenWorkspace(ctx context.Context, req *posternv1.OpenWorkspaceRequest) (*posternv1.OpenWorkspaceResponse, error) {
	return call(ctx, c.attach.OpenWorkspace, req)
}

// ListNodes implements Remote.
func (c *Client) ListNodes(ctx context.Context, req *posternv1.ListNodesRequest) (*posternv1.ListNodesResponse, error) {
	return call(ctx, c.attach.ListNodes, req)
}

// GetNodes implements Remote.
func (c *Client) GetNodes(ctx context.Context, req *posternv1.GetNodesRequest) (*posternv1.GetNodesResponse, error) {
	return call(ctx, c.attach.GetNodes, req)
}

// GetContent implements Remote.
func (c *Client) GetContent(ctx context.Context, req *posternv1.GetContentRequest) (*posternv1.GetContentResponse, error) {
	return call(ctx, c.attach.GetContent, req)
}

// ReserveIDs implements Remote.
func (c *Client) ReserveIDs(ctx context.Context, req *posternv1.ReserveIDsRequest) (*posternv1.ReserveIDsResponse, error) {
	return call(ctx, c.attach.ReserveIDs, req)
}

// MissingChunks implements Remote.
func (c *Client) MissingChunks(ctx context.Context, req *posternv1.MissingChunksRequest) (*posternv1.MissingChunksResponse, error) {
	return call(ctx, c.attach.MissingChunks, req)
}

// Commit implements Remote.
func (c *Client) Commit(ctx context.Context, req *posternv1.CommitRequest) (*posternv1.CommitResponse, error) {
	return call(ctx, c.attach.Commit, req)
}

// WatchChanges implements Remote.
func (c *Client) WatchChanges(ctx context.Context, req *posternv1.WatchChangesRequest, each func(*posternv1.WatchChangesResponse) error) error {
	stream, err := c.attach.WatchChanges(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	defer stream.Close()
	for stream.Receive() {
		if err := each(stream.Msg()); err != nil {
			return err
		}
	}
	if err := stream.Err(); err != nil {
		return err
	}
	return io.EOF
}

func (c *Client) post(ctx context.Context, workspaceID, what string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/postern/v1/attach/"+url.PathEscape(workspaceID)+"/"+what, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/proto")
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		return nil, proto.ReadHTTPError(resp)
	}
	return resp, nil
}

// chunkBuffers are used again: four chunks would cost the collector one, each time.
var chunkBuffers = sync.Pool{New: func() any { return new([filechunk.Size]byte) }}

// FetchChunks implements Remote. It holds one chunk in memory, which is each's until it returns.
func (c *Client) FetchChunks(ctx context.Context, workspaceID string, hashes [][]byte, each func(i int, content []byte) error) error {
	body, err := gproto.Marshal(&posternv1.FetchChunksRequest{Hashes: hashes})
	if err != nil {
		return err
	}
	resp, err := c.post(ctx, workspaceID, "fetch", bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	buf := chunkBuffers.Get().(*[filechunk.Size]byte)
	defer chunkBuffers.Put(buf)
	for i := range hashes {
		chunk, err := filechunk.ReadFrame(resp.Body, buf[:])
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("chunk %d of %d: %w", i, len(hashes), err)
		}
		if err := each(i, chunk); err != nil {
			return err
		}
	}
	return nil
}

// StoreChunks implements Remote.
func (c *Client) StoreChunks(ctx context.Context, workspaceID string, chunks [][]byte) error {
	r, w := io.Pipe()
	go func() {
		for _, chunk := range chunks {
			if err := filechunk.WriteFrame(w, chunk); err != nil {
				w.CloseWithError(err)
				return
			}
		}
		w.Close()
	}()
	defer r.Close() // ends the writer, whatever happened
	resp, err := c.post(ctx, workspaceID, "store", r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return err
	}
	var answer posternv1.StoreChunksResponse
	if err := gproto.Unmarshal(body, &answer); err != nil {
		return fmt.Errorf("answer to stored chunks: %w", err)
	}
	if len(answer.Hashes) != len(chunks) {
		return fmt.Errorf("%d of %d chunks were stored", len(answer.Hashes), len(chunks))
	}
	return nil
}
