package simulatedremote

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// ErrCut is what every call returns while the link is cut.
var ErrCut = errors.New("the link is cut")

// Remote is the control plane. It implements remote.Remote for any number of replicas.
type Remote struct {
	// OnCommit, if set, is called before each commit; its error is the answer, and if
	// after is set the commit is made all the same.
	OnCommit func() (err error, after bool)

	mu      sync.Mutex
	cond    *sync.Cond
	isCut   bool
	silent  bool
	seq     uint64
	nextID  uint64
	version uint64
	nodes   map[uint64]*posternv1.Node
	names   map[uint64]map[string]uint64 // directory → name → node
	content map[uint64]map[uint64]version
	chunks  map[string][]byte
	changes []*posternv1.NodeChange
	mounts  map[string]*mount
	fetched int
	refused int
	listed  int
	quota   uint64
	delay   time.Duration
}

type version struct {
	size   uint64
	chunks [][]byte
	inline []byte
	is     bool
}

type mount struct {
	last    uint64
	results map[uint64]*posternv1.FileOpResult
}

// New returns a control plane with an empty workspace.
func New() *Remote {
	r := &Remote{
		nextID: 1000, nodes: map[uint64]*posternv1.Node{}, names: map[uint64]map[string]uint64{1: {}}, content: map[uint64]map[uint64]version{},
		chunks: map[string][]byte{}, mounts: map[string]*mount{},
	}
	r.cond = sync.NewCond(&r.mu)
	r.nodes[1] = &posternv1.Node{Id: 1, Type: posternv1.NodeType_NODE_TYPE_DIRECTORY, Mode: 0o755, Links: 1, MtimeNs: 1, CtimeNs: 1, BtimeNs: 1}
	return r
}

// Cut cuts the link, or mends it.
func (r *Remote) Cut(cut bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.isCut = cut
	r.cond.Broadcast()
}

// Silence makes every call wait for its context, as a link does that carries nothing.
func (r *Remote) Silence(silent bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.silent = silent
}

// Delay makes every fetch take at least d.
func (r *Remote) Delay(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.delay = d
}

// Quota sets the limit in bytes that OpenWorkspace tells.
func (r *Remote) Quota(n uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.quota = n
}

// Fetched is how many chunks were fetched.
func (r *Remote) Fetched() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.fetched
}

// Refused is how many calls came while the link was cut.
func (r *Remote) Refused() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.refused
}

// begin locks, unless the link is down.
func (r *Remote) begin(ctx context.Context) error {
	r.mu.Lock()
	silent, cut := r.silent, r.isCut
	if !silent && !cut {
		return nil
	}
	if cut {
		r.refused++
	}
	r.mu.Unlock()
	if cut {
		return ErrCut
	}
	<-ctx.Done()
	return ctx.Err()
}

// OpenWorkspace implements remote.Remote.
func (r *Remote) OpenWorkspace(ctx context.Context, req *posternv1.OpenWorkspaceRequest) (*posternv1.OpenWorkspaceResponse, error) {
	if err := r.begin(ctx); err != nil {
		return nil, err
	}
	defer r.mu.Unlock()
	return &posternv1.OpenWorkspaceResponse{
		WorkspaceId: "ws-" + req.Name, Name: req.Name, ReadOnly: req.ReadOnly, Seq: r.seq, ChunkSize: filechunk.Size,
		LastOp: r.mount(req.MountId).last, Root: clone(r.nodes[1]), QuotaBytes: r.quota,
	}, nil
}

func (r *Remote) mount(id string) *mount {
	m := r.mounts[id]
	if m == nil {
		m = &mount{results: map[uint64]*posternv1.FileOpResult{}}
		r.mounts[id] = m
	}
	return m
}

func clone(n *posternv1.Node) *posternv1.Node { return gproto.Clone(n).(*posternv1.Node) }

// ListNodes implements remote.Remote, without recursive.
func (r *Remote) ListNodes(ctx context.Context, req *posternv1.ListNodesRequest) (*posternv1.ListNodesResponse, error) {
	if err := r.begin(ctx); err != nil {
		return nil, err
	}
	defer r.mu.Unlock()
	resp := &posternv1.ListNodesResponse{Seq: r.seq}
	r.listed++
	// The token is the index of the directory and the last name of it that was told.
	first, after := 0, ""
	if token := string(req.PageToken); token != "" {
		index, name, _ := strings.Cut(token, "/")
		first, _ = strconv.Atoi(index)
		after = name
	}
	for d, dir := range req.Directories[min(first, len(req.Directories)):] {
		for _, name := range slices.Sorted(maps.Keys(r.names[dir])) {
			if d == 0 && name <= after {
				continue
			}
			if len(resp.Entries) == 2000 {
				last := resp.Entries[1999]
				at := slices.Index(req.Directories, last.Parent)
				resp.NextPageToken = fmt.Appendf(nil, "%d/%s", at, last.Name)
				return resp, nil
			}
			resp.Entries = append(resp.Entries, &posternv1.Entry{Parent: dir, Name: []byte(name), Node: clone(r.nodes[r.names[dir][name]])})
		}
		resp.Complete = append(resp.Complete, dir)
	}
	return resp, nil
}

// Listed is how many times directories were listed.
func (r *Remote) Listed() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.listed
}

// GetNodes implements remote.Remote.
func (r *Remote) GetNodes(ctx context.Context, req *posternv1.GetNodesRequest) (*posternv1.GetNodesResponse, error) {
	if err := r.begin(ctx); err != nil {
		return nil, err
	}
	defer r.mu.Unlock()
	resp := &posternv1.GetNodesResponse{Seq: r.seq}
	for _, id := range req.Ids {
		n := r.nodes[id]
		if n == nil {
			continue
		}
		n = clone(n)
		if v := r.content[id][n.Version]; v.is {
			n.Inline, n.HasInline = v.inline, true
		}
		for dir, names := range r.names {
			for name, at := range names {
				if at == id {
					resp.Entries = append(resp.Entries, &posternv1.Entry{Parent: dir, Name: []byte(name), Node: n})
				}
			}
		}
	}
	return resp, nil
}

// GetContent implements remote.Remote.
func (r *Remote) GetContent(ctx context.Context, req *posternv1.GetContentRequest) (*posternv1.GetContentResponse, error) {
	if err := r.begin(ctx); err != nil {
		return nil, err
	}
	defer r.mu.Unlock()
	v, ok := r.content[req.Id][req.Version]
	if !ok {
		return nil, proto.Errorf(proto.CodeNotFound, "no version %d of %d", req.Version, req.Id)
	}
	if req.From > uint64(len(v.chunks)) {
		return nil, proto.Errorf(proto.CodeInvalid, "from %d", req.From)
	}
	part := v.chunks[req.From:]
	return &posternv1.GetContentResponse{Version: req.Version, Size: v.size, ChunksTotal: uint64(len(v.chunks)), Chunks: part[:min(len(part), 100)]}, nil
}

// ReserveIDs implements remote.Remote.
func (r *Remote) ReserveIDs(ctx context.Context, req *posternv1.ReserveIDsRequest) (*posternv1.ReserveIDsResponse, error) {
	if err := r.begin(ctx); err != nil {
		return nil, err
	}
	defer r.mu.Unlock()
	first := r.nextID
	r.nextID += uint64(req.Count)
	return &posternv1.ReserveIDsResponse{First: first, Count: req.Count}, nil
}

// MissingChunks implements remote.Remote.
func (r *Remote) MissingChunks(ctx context.Context, req *posternv1.MissingChunksRequest) (*posternv1.MissingChunksResponse, error) {
	if err := r.begin(ctx); err != nil {
		return nil, err
	}
	defer r.mu.Unlock()
	resp := &posternv1.MissingChunksResponse{}
	for _, h := range req.Hashes {
		if r.chunks[string(h)] == nil {
			resp.Hashes = append(resp.Hashes, h)
		}
	}
	return resp, nil
}

// FetchChunks implements remote.Remote.
func (r *Remote) FetchChunks(ctx context.Context, _ string, hashes [][]byte, each func(int, []byte) error) error {
	for i, h := range hashes {
		if err := r.begin(ctx); err != nil {
			return err
		}
		c, delay := r.chunks[string(h)], r.delay
		r.fetched++
		r.mu.Unlock()
		if c == nil {
			return proto.Errorf(proto.CodeNotFound, "no chunk %x", h)
		}
		if delay > 0 {
			time.Sleep(delay)
		}
		if err := each(i, c); err != nil {
			return err
		}
	}
	return nil
}

// StoreChunks implements remote.Remote.
func (r *Remote) StoreChunks(ctx context.Context, _ string, chunks [][]byte) error {
	if err := r.begin(ctx); err != nil {
		return err
	}
	defer r.mu.Unlock()
	for _, c := range chunks {
		h := sha256.Sum256(c)
		r.chunks[string(h[:])] = bytes.Clone(c)
	}
	return nil
}

// WatchChanges implements remote.Remote.
func (r *Remote) WatchChanges(ctx context.Context, req *posternv1.WatchChangesRequest, each func(*posternv1.WatchChangesResponse) error) error {
	defer context.AfterFunc(ctx, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.cond.Broadcast()
	})()
	since, first := req.SinceSeq, true
	for {
		r.mu.Lock()
		for ctx.Err() == nil && !r.isCut && (r.seq <= since && !first || r.silent) {
			r.cond.Wait()
		}
		if ctx.Err() != nil || r.isCut {
			r.mu.Unlock()
			return errors.Join(ctx.Err(), ErrCut)
		}
		resp := &posternv1.WatchChangesResponse{Seq: r.seq}
		i := sort.Search(len(r.changes), func(i int) bool { return r.changes[i].Seq > since })
		for _, c := range r.changes[i:] {
			resp.Changes = append(resp.Changes, gproto.Clone(c).(*posternv1.NodeChange))
		}
		since, first = r.seq, false
		r.mu.Unlock()
		if err := each(resp); err != nil {
			return err
		}
	}
}
