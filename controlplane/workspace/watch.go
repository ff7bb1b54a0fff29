package workspace

import (
	"context"
	"crypto/sha256"
	"time"

	"connectrpc.com/connect"
	protobuf "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const hashSize = sha256.Size

var zeroTime time.Time

func now() time.Time { return time.Now() }

func chunkCount(size uint64) uint64 { return filechunk.Count(size) }

// changesPage bounds the changes in one answer of WatchChanges.
const changesPage = 500

// WatchChanges implements AttachService.
func (h attach) WatchChanges(ctx context.Context, req *connect.Request[posternv1.WatchChangesRequest], stream *connect.ServerStream[posternv1.WatchChangesResponse]) error {
	a := h.s.cfg.Agent(ctx)
	leave, err := h.s.busy.enter("streams "+a.ID, agentStreams)
	if err != nil {
		return proto.ConnectError(err)
	}
	defer leave()
	h.s.cfg.Metrics.watching(1)
	defer h.s.cfg.Metrics.watching(-1)
	if err := h.s.watch(ctx, a, req.Msg, stream.Send); err != nil {
		return h.s.refused(ctx, "watch changes", err)
	}
	return nil
}

// watch sends changes until ctx ends, the service closes or the workspace is gone.
func (s *Service) watch(ctx context.Context, a Agent, r *posternv1.WatchChangesRequest, send func(*posternv1.WatchChangesResponse) error) error {
	w, err := s.forAgent(ctx, a, r.WorkspaceId)
	if err != nil {
		return err
	}
	since := r.SinceSeq
	alive := time.NewTicker(s.cfg.SignOfLife)
	defer alive.Stop()
	poll := make(<-chan time.Time)
	if s.cfg.Poll > 0 {
		ticker := time.NewTicker(s.cfg.Poll)
		defer ticker.Stop()
		poll = ticker.C
	}
	first := true
	for {
		changed := s.bell.listen(w.Number)
		// Whether the agent may still see it is looked at now and then.
		if !first {
			if w, err = s.forAgent(ctx, a, w.ID); err != nil {
				return err
			}
		}
		for {
			resp, more, err := s.changes(ctx, w, since)
			if err != nil {
				return err
			}
			if len(resp.Changes) > 0 || resp.Reset_ || first {
				if err := send(resp); err != nil {
					return err
				}
			}
			first = false
			since = resp.Seq
			if !more {
				break
			}
		}
	wait:
		for {
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-s.ctx.Done():
				return proto.Errorf(proto.CodeUnavailable, "this control plane is stopping: try again")
			case <-changed:
				break wait
			case <-alive.C:
				if err := send(&posternv1.WatchChangesResponse{Seq: since}); err != nil {
					return err
				}
				break wait
			case <-poll:
				seq, err := s.cfg.Store.WorkspaceSeq(ctx, w.Number)
				if err != nil {
					return err
				}
				if seq != since {
					break wait
				}
			}
		}
	}
}

// changes are those after a number; more tells that there are others.
func (s *Service) changes(ctx context.Context, w *filetree.Workspace, since uint64) (resp *posternv1.WatchChangesResponse, more bool, err error) {
	err = s.cfg.Store.ReadFiles(ctx, w.Organization, w.ID, func(tx filetree.Tx) error {
		ws := tx.Workspace()
		resp, more = &posternv1.WatchChangesResponse{Seq: ws.Seq}, false
		if since == ws.Seq {
			return nil
		}
		if since > ws.Seq || since+1 < ws.OldestChange {
			resp.Reset_ = true
			return nil
		}
		rows, err := tx.Changes(ctx, since, changesPage)
		if err != nil {
			return err
		}
		if len(rows) == changesPage {
			resp.Seq, more = rows[len(rows)-1].Seq, true
		}
		resp.Changes, err = describe(ctx, tx, rows)
		return err
	})
	return resp, more, err
}

// describe tells changes with what the nodes are now.
func describe(ctx context.Context, tx filetree.Tx, rows []filetree.Change) ([]*posternv1.NodeChange, error) {
	var ids []uint64
	seen := map[uint64]bool{}
	want := func(id uint64) {
		if !seen[id] {
			seen[id] = true
			ids = append(ids, id)
		}
	}
	changes := make([]*posternv1.NodeChange, len(rows))
	for i, row := range rows {
		c := &posternv1.NodeChange{}
		if err := protobuf.Unmarshal(row.Names, c); err != nil {
			return nil, err
		}
		c.Seq, c.MountId, c.Node = row.Seq, row.Mount, &posternv1.Node{Id: row.Node}
		changes[i] = c
		want(row.Node)
		for _, names := range [][]*posternv1.Entry{c.Added, c.Removed} {
			for _, e := range names {
				want(e.Parent)
			}
		}
	}
	nodes, err := tx.Nodes(ctx, ids)
	if err != nil {
		return nil, err
	}
	alive, err := living(ctx, tx, nodes)
	if err != nil {
		return nil, err
	}
	told := map[uint64]bool{}
	fill := func(c *posternv1.NodeChange) error {
		id := c.Node.Id
		told[id] = true
		if !alive[id] {
			c.Gone = true
			return nil
		}
		var err error
		c.Node, err = protoNode(nodes[id])
		return err
	}
	var all []*posternv1.NodeChange
	for _, c := range changes {
		if err := fill(c); err != nil {
			return nil, err
		}
		all = append(all, c)
		for _, names := range [][]*posternv1.Entry{c.Added, c.Removed} {
			for _, e := range names {
				if told[e.Parent] || !alive[e.Parent] {
					continue
				}
				parent := &posternv1.NodeChange{Seq: c.Seq, MountId: c.MountId, Node: &posternv1.Node{Id: e.Parent}}
				if err := fill(parent); err != nil {
					return nil, err
				}
				all = append(all, parent)
			}
		}
	}
	return all, nil
}
