package tree

import (
	"fmt"
	"sort"
)

// State is all that a replica knows. The zero value is not one; see New.
type State struct {
	nodes map[uint64]*Node
	meta  Meta
	// Operations in order of Number, without gaps.
	queue   []Op
	touched map[uint64]int
	replies map[uint64]Reply
	order   []uint64 // of replies, oldest first
	bytes   int64    // of nodes and names
}

// Meta is what there is once. It is journaled whole.
type Meta struct {
	WorkspaceID string
	// Boot tells one life of the host from the next: after a crash of the host only, what
	// was not synced is lost.
	Boot string
	// Seq: every change up to it is known.
	Seq uint64
	// NextOp is the number of the next operation.
	NextOp uint64
	// Ranges of node ids that are reserved and not used, [first, end).
	IDs [][2]uint64
	// DirtyBytes is not kept exactly; see Unsent.
	QuotaBytes, QuotaNodes, UsedBytes, UsedNodes uint64
}

// Op is an operation that the control plane has not confirmed.
type Op struct {
	Number uint64
	// Body is a marshalled FileOp.
	Body []byte
	// ID is the node and Dirs are the directories that it is about.
	ID   uint64
	Dirs [2]uint64
	// Content: a SetContent, whose chunks are found when it is sent.
	Content bool
}

// Reply is what a request was answered, for when the kernel sends it again.
type Reply struct {
	Unique uint64
	ID     uint64
}

// keepReplies is how many replies are kept: many more than requests can be on their way at
// once, 64 of the background and one for each thread that waits.
const keepReplies = 8192

// New returns a State of a root that is not loaded.
func New() *State {
	s := &State{
		nodes:   map[uint64]*Node{},
		touched: map[uint64]int{},
		replies: map[uint64]Reply{},
		meta:    Meta{NextOp: 1},
	}
	s.nodes[Root] = &Node{ID: Root, Type: Directory, Mode: 0o755, Links: 1, Parent: Root, Dir: newDir()}
	return s
}

// Node finds a node, nil if it is not known. It must not be changed; see Node.Clone.
func (s *State) Node(id uint64) *Node { return s.nodes[id] }

// Bytes is about how much memory nodes and names take.
func (s *State) Bytes() int64 { return s.bytes }

const (
	nodeBytes  = 240 // a Node, and its place in the map
	nameBytes  = 64  // an Entry, and its places in the index
	xattrBytes = 64  // two strings and their place in a map
)

// Bytes is about how much memory a node takes, without what is in it.
func (n *Node) Bytes() int64 {
	b := nodeBytes + int64(len(n.Target))
	for k, v := range n.Xattrs {
		b += xattrBytes + int64(len(k)+len(v))
	}
	return b
}

// Bytes is about how much memory a name takes.
func (e Entry) Bytes() int64 { return nameBytes + int64(len(e.Name)) }

// Len is the number of nodes.
func (s *State) Len() int { return len(s.nodes) }

// Each calls f for every node, in no order. It may drop the node.
func (s *State) Each(f func(*Node)) {
	for _, n := range s.nodes {
		f(n)
	}
}

// Meta returns what there is once.
func (s *State) Meta() Meta { return s.meta }

// Queue returns the operations that are not confirmed, oldest first. It must not be changed, and is
// valid until the state is.
func (s *State) Queue() []Op { return s.queue }

// Touched tells how many operations in the queue are about a node, or about names in it.
func (s *State) Touched(id uint64) int { return s.touched[id] }

// Reply finds what a request was answered.
func (s *State) Reply(unique uint64) (Reply, bool) {
	r, ok := s.replies[unique]
	return r, ok
}

func (s *State) put(n *Node) {
	old := s.nodes[n.ID]
	s.bytes += n.Bytes()
	if old != nil {
		s.bytes -= old.Bytes()
		n.Dir, n.Names = old.Dir, old.Names
	} else {
		n.Dir, n.Names = nil, 0
	}
	if n.Type == Directory && n.Dir == nil {
		n.Dir = newDir()
	}
	s.nodes[n.ID] = n
}

func (s *State) drop(id uint64) {
	n := s.nodes[id]
	if id == Root || n == nil {
		return
	}
	s.bytes -= n.Bytes()
	if n.Dir != nil {
		n.Dir.From(0, func(e Entry) bool {
			s.bytes -= e.Bytes()
			return true
		})
	}
	delete(s.nodes, id)
}

func (s *State) link(parent uint64, name string, id, cookie uint64) error {
	dir, child := s.nodes[parent], s.nodes[id]
	if dir == nil || dir.Dir == nil || child == nil {
		return fmt.Errorf("name %q of node %d in %d: no such node", name, id, parent)
	}
	if old := dir.Dir.set(name, id, cookie); old != 0 {
		s.unnamed(dir, old)
	} else {
		s.bytes += Entry{Name: name}.Bytes()
	}
	child.Names++
	child.Parent = parent
	if child.Type == Directory {
		dir.Dir.subdirectories++
	}
	return nil
}

func (s *State) unlink(parent uint64, name string) {
	dir := s.nodes[parent]
	if dir == nil || dir.Dir == nil {
		return
	}
	if old := dir.Dir.remove(name); old != 0 {
		s.bytes -= Entry{Name: name}.Bytes()
		s.unnamed(dir, old)
	}
}

func (s *State) unnamed(dir *Node, id uint64) {
	child := s.nodes[id]
	if child == nil {
		return
	}
	if child.Names > 0 {
		child.Names--
	}
	if child.Type == Directory {
		dir.Dir.subdirectories--
	}
}

func (s *State) enqueue(op Op) {
	if n := len(s.queue); n > 0 && op.Number <= s.queue[n-1].Number {
		return // applied before
	}
	s.queue = append(s.queue, op)
	s.touch(op, 1)
	if op.Number >= s.meta.NextOp {
		s.meta.NextOp = op.Number + 1
	}
}

func (s *State) touch(op Op, by int) {
	for _, id := range [...]uint64{op.ID, op.Dirs[0], op.Dirs[1]} {
		if id == 0 {
			continue
		}
		if s.touched[id] += by; s.touched[id] <= 0 {
			delete(s.touched, id)
		}
	}
}

func (s *State) confirm(number uint64) {
	n := sort.Search(len(s.queue), func(i int) bool { return s.queue[i].Number > number })
	for _, op := range s.queue[:n] {
		s.touch(op, -1)
	}
	s.queue = s.queue[n:]
	if len(s.queue) == 0 {
		s.queue = nil
	}
}

func (s *State) reply(r Reply) {
	if _, ok := s.replies[r.Unique]; ok {
		return
	}
	s.replies[r.Unique] = r
	s.order = append(s.order, r.Unique)
	if len(s.order) > 2*keepReplies {
		for _, u := range s.order[:keepReplies] {
			delete(s.replies, u)
		}
		s.order = append([]uint64(nil), s.order[keepReplies:]...)
	}
}

// ForgetReplies forgets all replies: of requests of a mount that has ended.
func (s *State) ForgetReplies() {
	s.replies, s.order = map[uint64]Reply{}, nil
}
