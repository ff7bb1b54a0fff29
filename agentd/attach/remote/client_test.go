package remote_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/agentd/attach/remote"
	"github.com/postern-dev/postern/agentd/attach/remote/simulatedremote"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var _ remote.Remote = (*simulatedremote.Remote)(nil)

func dial(t *testing.T) (*remote.Client, *simulatedremote.Remote) {
	t.Helper()
	r := simulatedremote.New()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &http.Server{Handler: simulatedremote.Handler(r), BaseContext: func(net.Listener) context.Context { return ctx }}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	c := remote.Dial(path)
	t.Cleanup(func() {
		c.Close()
		cancel()
		s.Close()
		<-done
	})
	return c, r
}

func TestChunks(t *testing.T) {
	c, r := dial(t)
	ctx := context.Background()
	chunks := [][]byte{bytes.Repeat([]byte("a"), 1<<20), []byte("b"), bytes.Repeat([]byte("c"), 12345)}
	if err := c.StoreChunks(ctx, "w", chunks); err != nil {
		t.Fatal(err)
	}
	var hashes [][]byte
	for _, chunk := range chunks {
		h := sha256.Sum256(chunk)
		hashes = append(hashes, h[:])
	}
	n := 0
	err := c.FetchChunks(ctx, "w", hashes, func(i int, content []byte) error {
		if i != n || !bytes.Equal(content, chunks[i]) {
			t.Errorf("chunk %d: %d bytes, want chunk %d", i, len(content), n)
		}
		n++
		return nil
	})
	if err != nil || n != 3 {
		t.Fatalf("%d chunks, %v", n, err)
	}
	missing := sha256.Sum256([]byte("missing"))
	resp, err := c.MissingChunks(ctx, &posternv1.MissingChunksRequest{Hashes: append(hashes, missing[:])})
	if err != nil || len(resp.Hashes) != 1 || !bytes.Equal(resp.Hashes[0], missing[:]) {
		t.Errorf("missing: %v, %v", resp, err)
	}
	stop := errors.New("stop")
	if err := c.FetchChunks(ctx, "w", hashes, func(int, []byte) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("%v, want the caller's error", err)
	}
	// A link that breaks in the midst of it.
	if err := c.FetchChunks(ctx, "w", append(hashes, missing[:]), func(int, []byte) error { return nil }); err == nil {
		t.Error("a fetch that was cut short has no error")
	}
	r.Cut(true)
	if err := c.StoreChunks(ctx, "w", chunks); err == nil {
		t.Error("chunks were stored over a cut link")
	}
}

func TestCalls(t *testing.T) {
	c, r := dial(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	open, err := c.OpenWorkspace(ctx, &posternv1.OpenWorkspaceRequest{Name: "w", MountId: "m"})
	if err != nil || open.Root.GetId() != 1 {
		t.Fatalf("%v, %v", open, err)
	}
	ids, err := c.ReserveIDs(ctx, &posternv1.ReserveIDsRequest{Count: 10})
	if err != nil || ids.Count != 10 {
		t.Fatalf("%v, %v", ids, err)
	}
	seen := make(chan uint64, 10)
	watching, stop := context.WithCancel(ctx)
	ended := make(chan error)
	go func() {
		ended <- c.WatchChanges(watching, &posternv1.WatchChangesRequest{}, func(resp *posternv1.WatchChangesResponse) error {
			for _, change := range resp.Changes {
				seen <- change.Node.GetId()
			}
			return nil
		})
	}()
	_, err = c.Commit(ctx, &posternv1.CommitRequest{MountId: "m", Ops: []*posternv1.FileOp{{Number: 1, Op: &posternv1.FileOp_Create_{Create: &posternv1.FileOp_Create{
		Parent: 1, Name: []byte("\xff\n"), Node: &posternv1.Node{Id: ids.First, Type: posternv1.NodeType_NODE_TYPE_FILE},
	}}}}})
	if err != nil {
		t.Fatal(err)
	}
	if id := <-seen; id != ids.First {
		t.Errorf("change of node %d, want %d", id, ids.First)
	}
	stop()
	if err := <-ended; err == nil {
		t.Error("a watch that was stopped has no error")
	}
	list, err := c.ListNodes(ctx, &posternv1.ListNodesRequest{Directories: []uint64{1}})
	if err != nil || len(list.Entries) != 1 || string(list.Entries[0].Name) != "\xff\n" {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := c.GetContent(ctx, &posternv1.GetContentRequest{Id: ids.First, Version: 7}); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("a version that is not there: %v", err)
	}
	r.Cut(true)
	if _, err := c.GetNodes(ctx, &posternv1.GetNodesRequest{Ids: []uint64{1}}); err == nil {
		t.Error("an answer over a cut link")
	}
}
