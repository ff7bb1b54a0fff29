package replica

import (
	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/agentd/attach/tree"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// MaxUnsentPaths is how many paths Unsent lists.
	MaxUnsentPaths = 1000
	// maxConflicts is how many conflicts are remembered, the newest ones.
	maxConflicts = 100
	// maxDepth is how many directories a path may go through to be told.
	maxDepth = 2048
)

// Conflict is what was changed here and elsewhere: KeptAs has what was made here.
type Conflict struct {
	// Path and KeptAs begin with "/"; names may have any bytes.
	Path, KeptAs string
	// TimeNs is nanoseconds since 1970.
	TimeNs int64
}

// Unsent lists the paths that operations in the queue are about, in their order, each once, and
// MaxUnsentPaths at most: "/" and names, of removed ones, too. What lost its name since is not in it.
func (r *Replica) Unsent() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	type place struct {
		at   nameAt
		node uint64 // 0: at is the name
	}
	var places []place
	seen := map[place]bool{}
	for _, op := range r.s.Queue() {
		names := namesOf(op)
		if len(names) == 0 {
			names = []nameAt{{}}
		}
		for _, at := range names[len(names)-1:] { // of a rename, the new one
			p := place{at: at}
			if at.dir == 0 {
				p.node = op.ID
			}
			if !seen[p] && op.ID != tree.Root {
				seen[p] = true
				places = append(places, p)
			}
		}
		if len(places) >= 2*MaxUnsentPaths { // some are the same path
			break
		}
	}
	n := namer{r: r, want: map[uint64]map[uint64]string{}}
	for _, p := range places {
		n.ask(p.node)
		n.ask(p.at.dir)
	}
	n.find()
	var out []string
	told := map[string]bool{}
	for _, p := range places {
		path, ok := "", false
		if p.node != 0 {
			path, ok = n.path(p.node)
		} else if path, ok = n.path(p.at.dir); ok {
			if path == "/" {
				path = ""
			}
			path += "/" + p.at.name
		}
		if len(out) == MaxUnsentPaths {
			break
		}
		if ok && !told[path] {
			told[path] = true
			out = append(out, path)
		}
	}
	return out
}

// namer finds the names of nodes, with one look through each directory that has one of them. The
// replica's lock is held for all of it.
type namer struct {
	r *Replica
	// want has, by directory, the nodes whose names are looked for; "" until found.
	want map[uint64]map[uint64]string
}

// ask looks for the names of a node and of the directories that it is in.
func (n *namer) ask(id uint64) {
	for range maxDepth {
		node := n.r.s.Node(id)
		if node == nil || id == tree.Root {
			return
		}
		in := n.want[node.Parent]
		if in == nil {
			in = map[uint64]string{}
			n.want[node.Parent] = in
		}
		if _, asked := in[id]; asked {
			return
		}
		in[id] = ""
		id = node.Parent
	}
}

func (n *namer) find() {
	for dir, ids := range n.want {
		d := n.r.s.Node(dir)
		if d == nil || d.Dir == nil {
			continue
		}
		left := len(ids)
		d.Dir.From(0, func(e tree.Entry) bool {
			if name, ok := ids[e.ID]; ok && name == "" {
				ids[e.ID] = e.Name
				left--
			}
			return left > 0
		})
	}
}

func (n *namer) path(id uint64) (string, bool) {
	var parts []string
	for range maxDepth {
		if id == tree.Root {
			path := ""
			for i := len(parts) - 1; i >= 0; i-- {
				path += "/" + parts[i]
			}
			if path == "" {
				path = "/"
			}
			return path, true
		}
		node := n.r.s.Node(id)
		if node == nil {
			return "", false
		}
		name := n.want[node.Parent][id]
		if name == "" {
			return "", false
		}
		parts = append(parts, name)
		id = node.Parent
	}
	return "", false
}

// Conflicts lists what was kept under another name since the process began, the newest last, 100 at
// most. The control plane has all of them.
func (r *Replica) Conflicts() []Conflict {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Conflict(nil), r.conflicts...)
}

func (r *Replica) rememberLocked(c *posternv1.FileConflict) {
	const longest = 8 << 10 // of paths that go on to mountd's clients
	if gproto.Size(c) > longest {
		return
	}
	at := c.TimeNs
	if at == 0 {
		at = r.now(0)
	}
	r.conflicts = append(r.conflicts, Conflict{Path: string(c.Path), KeptAs: string(c.KeptAs), TimeNs: at})
	if n := len(r.conflicts); n > maxConflicts {
		r.conflicts = append(r.conflicts[:0:0], r.conflicts[n-maxConflicts:]...)
	}
}
