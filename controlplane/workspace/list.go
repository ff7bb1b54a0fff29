package workspace

import (
	"context"
	"encoding/binary"
	"slices"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// maxFrontier bounds the directories that a recursive listing has still before it;
	// what is beyond is not told as complete, and asked for again.
	maxFrontier = 20_000
	// maxToken bounds a page token, in bytes.
	maxToken = maxFrontier*binary.MaxVarintLen64 + filetree.MaxName + 8
)

// listToken is where a listing goes on: the directories before it, and the last name that
// was told of the first of them. It is a varint of that name's length, the name, and varints.
type listToken struct {
	after []byte
	dirs  []uint64
}

func (k listToken) encode() []byte {
	if len(k.dirs) == 0 {
		return nil
	}
	b := binary.AppendUvarint(nil, uint64(len(k.after)))
	b = append(b, k.after...)
	for _, dir := range k.dirs {
		b = binary.AppendUvarint(b, dir)
	}
	return b
}

func decodeListToken(b []byte) (listToken, error) {
	bad := proto.Errorf(proto.CodeInvalid, "the page token is not one of ours")
	n, used := binary.Uvarint(b)
	if len(b) > maxToken || used <= 0 || n > filetree.MaxName || uint64(len(b)-used) < n {
		return listToken{}, bad
	}
	k := listToken{after: b[used : used+int(n)]}
	for b = b[used+int(n):]; len(b) > 0; {
		dir, used := binary.Uvarint(b)
		if used <= 0 || dir == 0 || dir >= filetree.NoBase || len(k.dirs) > maxFrontier+maxDirectories {
			return listToken{}, bad
		}
		k.dirs, b = append(k.dirs, dir), b[used:]
	}
	if len(k.dirs) == 0 {
		return listToken{}, bad
	}
	return k, nil
}

// ListNodes implements AttachService.
func (h attach) ListNodes(ctx context.Context, req *connect.Request[posternv1.ListNodesRequest]) (*connect.Response[posternv1.ListNodesResponse], error) {
	return answer(ctx, h.s, "list nodes", func(a Agent) (*posternv1.ListNodesResponse, error) {
		r := req.Msg
		k := listToken{dirs: r.Directories}
		var err error
		switch {
		case len(r.PageToken) > 0:
			if k, err = decodeListToken(r.PageToken); err != nil {
				return nil, err
			}
		case len(r.Directories) == 0 || len(r.Directories) > maxDirectories:
			return nil, proto.Errorf(proto.CodeInvalid, "%d directories: 1 to %d at once", len(r.Directories), maxDirectories)
		}
		w, err := h.s.forAgent(ctx, a, r.WorkspaceId)
		if err != nil {
			return nil, err
		}
		var resp *posternv1.ListNodesResponse
		return resp, h.s.cfg.Store.ReadFiles(ctx, a.Organization, w.ID, func(tx filetree.Tx) error {
			resp, err = listNodes(ctx, tx, k, r.Recursive)
			return err
		})
	})
}

func listNodes(ctx context.Context, tx filetree.Tx, k listToken, recursive bool) (*posternv1.ListNodesResponse, error) {
	resp := &posternv1.ListNodesResponse{Seq: tx.Workspace().Seq}
	inline := 0
	for len(k.dirs) > 0 && len(resp.Entries) < listPage && inline < maxInlinePage {
		dir := k.dirs[0]
		want := listPage - len(resp.Entries)
		var listed []filetree.Listed
		var err error
		if dir == filetree.Root || dir > filetree.LastReserved {
			if listed, err = tx.List(ctx, dir, k.after, want); err != nil {
				return nil, err
			}
		}
		page := 0
		for i := range listed {
			l := &listed[i]
			n, err := protoNode(&l.Of)
			if err != nil {
				return nil, err
			}
			resp.Entries = append(resp.Entries, &posternv1.Entry{Parent: dir, Name: l.Name, Node: n})
			page += len(l.Of.Inline)
			if recursive && l.Of.Type == filetree.Directory && len(k.dirs) < maxFrontier {
				k.dirs = append(k.dirs, l.Of.ID)
			}
		}
		inline += page
		if len(listed) == want || page >= maxListed { // there may be more of it
			k.after = listed[len(listed)-1].Name
			continue
		}
		resp.Complete = append(resp.Complete, dir)
		k.dirs, k.after = k.dirs[1:], nil
	}
	resp.NextPageToken = k.encode()
	return resp, nil
}

const (
	// maxListed is what one Tx.List returns of contents at most before it stops, in bytes;
	// maxInlinePage what an answer does.
	maxListed     = 2 << 20
	maxInlinePage = 2 << 20
)

// GetNodes implements AttachService.
func (h attach) GetNodes(ctx context.Context, req *connect.Request[posternv1.GetNodesRequest]) (*connect.Response[posternv1.GetNodesResponse], error) {
	return answer(ctx, h.s, "get nodes", func(a Agent) (*posternv1.GetNodesResponse, error) {
		if len(req.Msg.Ids) > maxGetNodes {
			return nil, proto.Errorf(proto.CodeInvalid, "%d ids: at most %d at once", len(req.Msg.Ids), maxGetNodes)
		}
		w, err := h.s.forAgent(ctx, a, req.Msg.WorkspaceId)
		if err != nil {
			return nil, err
		}
		var resp *posternv1.GetNodesResponse
		return resp, h.s.cfg.Store.ReadFiles(ctx, a.Organization, w.ID, func(tx filetree.Tx) error {
			resp, err = getNodes(ctx, tx, req.Msg.Ids)
			return err
		})
	})
}

func getNodes(ctx context.Context, tx filetree.Tx, ids []uint64) (*posternv1.GetNodesResponse, error) {
	resp := &posternv1.GetNodesResponse{Seq: tx.Workspace().Seq}
	ids = slices.DeleteFunc(slices.Clone(ids), func(id uint64) bool { return id >= filetree.NoBase || id == filetree.Trash })
	nodes, err := tx.Nodes(ctx, ids)
	if err != nil {
		return nil, err
	}
	living, err := living(ctx, tx, nodes)
	if err != nil {
		return nil, err
	}
	encoded := map[uint64]*posternv1.Node{}
	for id := range living {
		if encoded[id], err = protoNode(nodes[id]); err != nil {
			return nil, err
		}
	}
	if n := encoded[filetree.Root]; n != nil {
		resp.Entries = append(resp.Entries, &posternv1.Entry{Node: n})
	}
	entries, err := tx.EntriesOf(ctx, ids)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if n := encoded[e.Node]; n != nil && e.Parent != filetree.Trash {
			resp.Entries = append(resp.Entries, &posternv1.Entry{Parent: e.Parent, Name: e.Name, Node: n})
		}
	}
	return resp, nil
}

// living are those of nodes that can be reached from the root.
func living(ctx context.Context, tx filetree.Tx, nodes map[uint64]*filetree.Node) (map[uint64]bool, error) {
	t := newTree(ctx, tx, zeroTime, "", "")
	all := map[uint64]bool{}
	for id, n := range nodes {
		ok, err := t.alive(&node{Node: *n})
		if err != nil {
			return nil, err
		}
		if ok {
			all[id] = true
		}
	}
	return all, nil
}

// GetContent implements AttachService.
func (h attach) GetContent(ctx context.Context, req *connect.Request[posternv1.GetContentRequest]) (*connect.Response[posternv1.GetContentResponse], error) {
	return answer(ctx, h.s, "get content", func(a Agent) (*posternv1.GetContentResponse, error) {
		r := req.Msg
		w, err := h.s.forAgent(ctx, a, r.WorkspaceId)
		if err != nil {
			return nil, err
		}
		var resp *posternv1.GetContentResponse
		err = h.s.cfg.Store.ReadFiles(ctx, a.Organization, w.ID, func(tx filetree.Tx) error {
			n, err := tx.Node(ctx, min(r.Id, filetree.NoBase))
			if err != nil {
				return err
			}
			if n == nil || n.Type != filetree.File {
				return proto.Errorf(proto.CodeNotFound, "file %d is not there", r.Id)
			}
			version := r.Version
			if version == 0 {
				version = n.Version
			}
			resp, err = getContent(ctx, tx, n.ID, version, r.From)
			return err
		})
		if err == nil && r.From == 0 {
			err = h.s.noteRead(ctx, a, w, r.Id, resp.Size)
		}
		return resp, err
	})
}

// getContent is a page of a version's chunks; version 0 is the empty content that a file
// begins with.
func getContent(ctx context.Context, tx filetree.Tx, id, version, from uint64) (*posternv1.GetContentResponse, error) {
	if version == 0 {
		return &posternv1.GetContentResponse{HasInline: true}, nil
	}
	v, err := tx.Version(ctx, id, min(version, filetree.NoBase))
	if err != nil {
		return nil, err
	}
	if v == nil {
		return nil, proto.Errorf(proto.CodeNotFound, "file %d has no version %d: it may have been too old to be kept", id, version)
	}
	resp := &posternv1.GetContentResponse{Version: v.Version, Size: v.Size}
	if v.Inline != nil || v.Size == 0 {
		resp.Inline, resp.HasInline = v.Inline, true
		return resp, nil
	}
	resp.Chunks, resp.ChunksTotal, err = chunksOf(ctx, tx, v, from, contentPage)
	return resp, err
}

// chunksOf are the names of at most limit chunks of a version, from one on, and how many
// it has.
func chunksOf(ctx context.Context, tx filetree.Tx, v *filetree.Version, from uint64, limit int) ([][]byte, uint64, error) {
	total := chunkCount(v.Size)
	var names [][]byte
	for i := from / filetree.SegmentChunks; i < uint64(len(v.Segments)) && len(names) < limit && from < total; i++ {
		list, err := tx.Segment(ctx, v.Segments[i])
		if err != nil {
			return nil, 0, err
		}
		for j := from % filetree.SegmentChunks; j*hashSize < uint64(len(list)) && len(names) < limit; j++ {
			name := list[j*hashSize : (j+1)*hashSize]
			if filetree.Hash(name) == (filetree.Hash{}) {
				name = nil
			}
			names = append(names, name)
			from++
		}
	}
	return names, total, nil
}
