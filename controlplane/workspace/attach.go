package workspace

import (
	"context"
	"errors"
	"regexp"
	"time"

	"connectrpc.com/connect"
	protobuf "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// Bounds of what agents ask for at once; attach.proto says them too.
const (
	maxOps         = 500
	maxDirectories = 256
	maxGetNodes    = 1000
	maxBlock       = 65536
	maxBlocks      = 100_000 // rows of numbers that are set aside, of all agents
	maxMissing     = 1024
	maxMounts      = 1000 // of an agent on a workspace
	listPage       = 2000 // entries
	contentPage    = 16384
	// agentRequests bounds what an agent has under way at once, bulk and streams apart.
	agentRequests = 16
	agentStreams  = 64
	agentBulk     = 8
)

// attach implements AttachService.
type attach struct {
	posternv1connect.UnimplementedAttachServiceHandler
	s *Service
}

var _ posternv1connect.AttachServiceHandler = attach{}

var mountID = regexp.MustCompile(`^[0-9a-zA-Z_-]{8,64}$`)

// answer runs f for the agent that calls, within its limits.
func answer[T any](ctx context.Context, s *Service, what string, f func(Agent) (*T, error)) (*connect.Response[T], error) {
	a := s.cfg.Agent(ctx)
	leave, err := s.busy.enter("agent "+a.ID, agentRequests)
	if err != nil {
		return nil, proto.ConnectError(err)
	}
	defer leave()
	if !s.cfg.Ops.Allow(a.ID) {
		return nil, proto.ConnectError(proto.Errorf(proto.CodeRateLimited, "agent %s makes too many requests a second: slow down", a.Name))
	}
	msg, err := f(a)
	if err != nil {
		return nil, s.refused(ctx, what, err)
	}
	return connect.NewResponse(msg), nil
}

// refused logs what is our fault and makes the error fit to be sent.
func (s *Service) refused(ctx context.Context, what string, err error) error {
	if proto.CodeOf(err) == proto.CodeInternal && ctx.Err() == nil {
		s.cfg.Logger.Error("request of files failed", "request", what, "err", err)
	}
	return proto.ConnectError(err)
}

// OpenWorkspace implements AttachService.
func (h attach) OpenWorkspace(ctx context.Context, req *connect.Request[posternv1.OpenWorkspaceRequest]) (*connect.Response[posternv1.OpenWorkspaceResponse], error) {
	return answer(ctx, h.s, "open workspace", func(a Agent) (*posternv1.OpenWorkspaceResponse, error) {
		r := req.Msg
		if !mountID.MatchString(r.MountId) {
			return nil, proto.Errorf(proto.CodeInvalid, "a mount's id has 8 to 64 letters, digits, '-' and '_'")
		}
		w, err := h.s.forAgent(ctx, a, r.Name)
		if err != nil {
			return nil, err
		}
		resp := &posternv1.OpenWorkspaceResponse{WorkspaceId: w.ID, Name: w.Name, ReadOnly: r.ReadOnly, ChunkSize: filechunk.Size}
		isNew := false
		err = h.s.cfg.Store.UpdateFiles(ctx, a.Organization, w.ID, func(tx filetree.Tx) error {
			m, err := tx.Mount(ctx, a.ID, r.MountId)
			if err != nil {
				return err
			}
			if isNew = m == nil; isNew {
				if n, err := tx.CountMounts(ctx, a.ID); err != nil {
					return err
				} else if n >= maxMounts {
					return proto.Errorf(proto.CodeOverloaded, "agent %s has mounted workspace %s %d times under different ids", a.Name, w.Name, n)
				}
				m = &filetree.Mount{Agent: a.ID, ID: r.MountId}
			}
			m.ReadOnly, m.Opened = r.ReadOnly, time.Now()
			if err := tx.PutMount(ctx, m); err != nil {
				return err
			}
			ws := tx.Workspace()
			resp.Seq, resp.QuotaBytes, resp.QuotaNodes, resp.UsedBytes, resp.UsedNodes, resp.LastOp = ws.Seq, ws.QuotaBytes, ws.QuotaNodes, ws.UsedBytes, ws.Nodes, m.LastOp
			root, err := tx.Node(ctx, filetree.Root)
			if err == nil && root == nil {
				err = errors.New("the workspace has no root")
			}
			if err == nil {
				resp.Root, err = protoNode(root)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
		if isNew {
			d := &deeds{}
			d.line("mount " + r.MountId)
			if err := h.s.note(ctx, a, w, "file.mount", d); err != nil {
				return nil, err
			}
		}
		return resp, nil
	})
}

// ReserveIDs implements AttachService.
func (h attach) ReserveIDs(ctx context.Context, req *connect.Request[posternv1.ReserveIDsRequest]) (*connect.Response[posternv1.ReserveIDsResponse], error) {
	return answer(ctx, h.s, "reserve ids", func(a Agent) (*posternv1.ReserveIDsResponse, error) {
		count := req.Msg.Count
		if count == 0 || count > maxBlock {
			return nil, proto.Errorf(proto.CodeInvalid, "%d ids: 1 to %d", count, maxBlock)
		}
		w, err := h.s.forAgent(ctx, a, req.Msg.WorkspaceId)
		if err != nil {
			return nil, err
		}
		resp := &posternv1.ReserveIDsResponse{Count: count}
		return resp, h.s.cfg.Store.UpdateFiles(ctx, a.Organization, w.ID, func(tx filetree.Tx) error {
			ws := tx.Workspace()
			if ws.NextID >= 1<<62 {
				return proto.Errorf(proto.CodeOverloaded, "the workspace has no node numbers left")
			}
			if n, err := tx.CountBlocks(ctx, maxBlocks); err != nil {
				return err
			} else if n >= maxBlocks {
				return proto.Errorf(proto.CodeStorageFull, "workspace %s has set aside node numbers %d times: copy what is in it to a new one", ws.Name, n)
			}
			resp.First = ws.NextID
			ws.NextID += uint64(count)
			return tx.PutBlock(ctx, a.ID, resp.First, ws.NextID-1)
		})
	})
}

// MissingChunks implements AttachService.
func (h attach) MissingChunks(ctx context.Context, req *connect.Request[posternv1.MissingChunksRequest]) (*connect.Response[posternv1.MissingChunksResponse], error) {
	return answer(ctx, h.s, "missing chunks", func(a Agent) (*posternv1.MissingChunksResponse, error) {
		w, err := h.s.forAgent(ctx, a, req.Msg.WorkspaceId)
		if err != nil {
			return nil, err
		}
		return h.s.missing(ctx, w, req.Msg.Hashes)
	})
}

func (s *Service) missing(ctx context.Context, w *filetree.Workspace, names [][]byte) (*posternv1.MissingChunksResponse, error) {
	hashes, err := toHashes(names, maxMissing)
	if err != nil {
		return nil, err
	}
	missing, err := s.cfg.Store.MissingChunks(ctx, w.Organization, w.Number, hashes, time.Now())
	if err != nil {
		return nil, err
	}
	return &posternv1.MissingChunksResponse{Hashes: fromHashes(missing)}, nil
}

// toHashes checks a list of at most limit hashes.
func toHashes(names [][]byte, limit int) ([]filetree.Hash, error) {
	if len(names) > limit {
		return nil, proto.Errorf(proto.CodeInvalid, "%d hashes: at most %d at once", len(names), limit)
	}
	hashes := make([]filetree.Hash, len(names))
	for i, name := range names {
		if len(name) != len(hashes[i]) {
			return nil, proto.Errorf(proto.CodeInvalid, "hash %d has %d bytes: it must have %d", i, len(name), len(hashes[i]))
		}
		copy(hashes[i][:], name)
	}
	return hashes, nil
}

func fromHashes(hashes []filetree.Hash) [][]byte {
	names := make([][]byte, len(hashes))
	for i := range hashes {
		names[i] = hashes[i][:]
	}
	return names
}

// Commit implements AttachService.
func (h attach) Commit(ctx context.Context, req *connect.Request[posternv1.CommitRequest]) (*connect.Response[posternv1.CommitResponse], error) {
	return answer(ctx, h.s, "commit", func(a Agent) (*posternv1.CommitResponse, error) {
		return h.s.commit(ctx, a, req.Msg)
	})
}

func (s *Service) commit(ctx context.Context, a Agent, r *posternv1.CommitRequest) (*posternv1.CommitResponse, error) {
	if len(r.Ops) == 0 || len(r.Ops) > maxOps {
		return nil, proto.Errorf(proto.CodeInvalid, "%d operations: 1 to %d at once", len(r.Ops), maxOps)
	}
	for i, op := range r.Ops {
		if op.GetNumber() != r.Ops[0].GetNumber()+uint64(i) || op.GetNumber() == 0 || op.GetNumber() >= filetree.NoBase {
			return nil, proto.Errorf(proto.CodeInvalid, "operation %d has the number %d: they must follow each other, from 1 on", i, op.GetNumber())
		}
	}
	w, err := s.forAgent(ctx, a, r.WorkspaceId)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	var resp *posternv1.CommitResponse
	var did *deeds
	err = s.cfg.Store.UpdateFiles(ctx, a.Organization, w.ID, func(tx filetree.Tx) error {
		resp, did = &posternv1.CommitResponse{}, &deeds{}
		return s.applyAll(ctx, tx, a, r, resp, did)
	})
	if err != nil {
		return nil, err
	}
	s.cfg.Metrics.committed(len(resp.Results), time.Since(began))
	if did.ops > 0 || len(did.lines) > 0 {
		s.bell.ring(w.Number)
		if err := s.note(ctx, a, w, "file.commit", did); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// applyAll applies a request's operations, and tells the answers to those that were
// applied before.
func (s *Service) applyAll(ctx context.Context, tx filetree.Tx, a Agent, r *posternv1.CommitRequest, resp *posternv1.CommitResponse, did *deeds) error {
	m, err := tx.Mount(ctx, a.ID, r.MountId)
	if err != nil {
		return err
	}
	switch {
	case m == nil:
		return proto.Errorf(proto.CodeNotFound, "mount %q is not open: open the workspace first", clip(r.MountId))
	case m.ReadOnly:
		return proto.Errorf(proto.CodePolicyDenied, "mount %s is read-only", m.ID)
	case r.Ops[0].Number > m.LastOp+1:
		return proto.Errorf(proto.CodeInvalid, "operation %d is missing: %d was the last", m.LastOp+1, m.LastOp)
	}
	ops := r.Ops
	for len(ops) > 0 && ops[0].Number <= m.LastOp {
		said, err := s.answered(ctx, tx, m, ops[0].Number)
		if err != nil {
			return err
		}
		resp.Results = append(resp.Results, said)
		ops = ops[1:]
	}
	t := newTree(ctx, tx, time.Now(), "agent "+a.Name, m.ID)
	t.organization = s.cfg.OrganizationNodes
	host := &host{tree: t, agent: a.ID, name: a.Name, mine: map[uint64]bool{}, did: did}
	var fresh []*posternv1.FileOpResult
	for _, op := range ops {
		result, err := host.apply(op)
		if errors.Is(err, errQuota) {
			if len(resp.Results)+len(fresh) > 0 {
				break
			}
			return t.quotaError()
		}
		if err != nil {
			return err
		}
		fresh = append(fresh, result)
	}
	if len(fresh) > 0 {
		if err := t.flush(); err != nil {
			return err
		}
		answers, err := protobuf.Marshal(&posternv1.CommitResponse{Results: fresh})
		if err != nil {
			return err
		}
		first := ops[0].Number
		m.LastOp = first + uint64(len(fresh)) - 1
		if err := tx.PutAnswers(ctx, m.Agent, m.ID, first, m.LastOp, answers); err != nil {
			return err
		}
		if err := tx.PutMount(ctx, m); err != nil {
			return err
		}
	}
	resp.Results = append(resp.Results, fresh...)
	resp.Seq, resp.UsedBytes = t.ws.Seq, t.ws.UsedBytes
	return nil
}

// answered is the answer that an operation got when it was applied.
func (s *Service) answered(ctx context.Context, tx filetree.Tx, m *filetree.Mount, number uint64) (*posternv1.FileOpResult, error) {
	encoded, err := tx.Answers(ctx, m.Agent, m.ID, number)
	if err != nil {
		return nil, err
	}
	var answers posternv1.CommitResponse
	if err := protobuf.Unmarshal(encoded, &answers); err != nil {
		return nil, err
	}
	for _, said := range answers.Results {
		if said.Number == number {
			return said, nil
		}
	}
	return nil, proto.Errorf(proto.CodeInvalid, "operation %d was applied so long ago that its answer is not kept: %d was the last", number, m.LastOp)
}
