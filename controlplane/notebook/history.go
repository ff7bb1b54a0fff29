package notebook

import (
	"context"
	"slices"
	"strings"

	"github.com/postern-dev/postern/proto/notebook"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// stateOf is the state that a checkpoint of a notebook is of.
func stateOf(p *posternv1.KernelCheckpoint) (string, bool) {
	return strings.CutPrefix(p.GetLabel(), label)
}

// History is the tree of a kernel's checkpoints, each below the one that it descends
// from.
func (s *Service) History(ctx context.Context, c Caller, m *posternv1.NotebookHistoryRequest) (*posternv1.NotebookHistoryResponse, error) {
	if err := check(m.Cells); err != nil {
		return nil, err
	}
	found, err := s.cfg.Kernels.Get(ctx, c, m.KernelId)
	if err != nil {
		return nil, err
	}
	list, err := s.cfg.Kernels.ListCheckpoints(ctx, c, &posternv1.KernelCheckpointRequest{KernelId: m.KernelId})
	if err != nil {
		return nil, err
	}
	cells := map[string]uint32{}
	if len(m.Cells) > 0 {
		var texts []string
		for _, i := range filled(m.Cells) {
			texts = append(texts, m.Cells[i].GetSource())
		}
		for n, state := range notebook.Chain(found.Kernel.GetSpec(), texts) {
			cells[state.String()] = top(m.Cells, n)
		}
	}
	out := &posternv1.NotebookHistoryResponse{}
	current := head(found.Kernel, list.Checkpoints)
	for _, node := range tree(list.Checkpoints) {
		state := &posternv1.NotebookState{Checkpoint: node.checkpoint, Depth: node.depth, Current: node.checkpoint.Id == current}
		if text, ok := stateOf(node.checkpoint); ok {
			if n, wanted := cells[text]; wanted {
				state.Cells = &n
			}
		}
		out.States = append(out.States, state)
	}
	return out, nil
}

// head is the checkpoint that a kernel's state descends from: the newest one since its
// processes came to be, or the one that they came of.
func head(k *posternv1.Kernel, all []*posternv1.KernelCheckpoint) string {
	id, at := k.GetCheckpoint(), k.GetStarted().AsTime()
	for _, p := range all {
		if t := p.Time.AsTime(); t.After(at) {
			id, at = p.Id, t
		}
	}
	return id
}

type node struct {
	checkpoint *posternv1.KernelCheckpoint
	depth      uint32
}

// tree orders checkpoints: children after their parent, in the order of time; a line of
// descent without branches has one depth.
func tree(all []*posternv1.KernelCheckpoint) []node {
	all = slices.Clone(all)
	slices.SortStableFunc(all, func(x, y *posternv1.KernelCheckpoint) int { return x.Time.AsTime().Compare(y.Time.AsTime()) })
	known := map[string]bool{}
	for _, p := range all {
		known[p.Id] = true
	}
	below := map[string][]*posternv1.KernelCheckpoint{}
	for _, p := range all {
		parent := p.Parent
		if !known[parent] || parent == p.Id {
			parent = ""
		}
		below[parent] = append(below[parent], p)
	}
	var out []node
	// A chain of thousands is no reason to recurse.
	var todo []node
	push := func(children []*posternv1.KernelCheckpoint, depth uint32) {
		for _, p := range slices.Backward(children) {
			todo = append(todo, node{p, depth})
		}
	}
	push(below[""], 0)
	for len(todo) > 0 {
		next := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		out = append(out, next)
		children := below[next.checkpoint.Id]
		depth := next.depth
		if len(children) > 1 {
			depth++
		}
		push(children, depth)
	}
	return out
}
