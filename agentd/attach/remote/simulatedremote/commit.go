package simulatedremote

import (
	"context"
	"fmt"
	"strings"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Commit implements remote.Remote.
func (r *Remote) Commit(ctx context.Context, req *posternv1.CommitRequest) (*posternv1.CommitResponse, error) {
	if err := r.begin(ctx); err != nil {
		return nil, err
	}
	defer r.mu.Unlock()
	var late error
	if r.OnCommit != nil {
		err, after := r.OnCommit()
		if err != nil && !after {
			return nil, err
		}
		late = err
	}
	m := r.mount(req.MountId)
	resp := &posternv1.CommitResponse{}
	for _, op := range req.Ops {
		if res := m.results[op.Number]; res != nil {
			resp.Results = append(resp.Results, res)
			continue
		}
		if op.Number != m.last+1 {
			return nil, proto.Errorf(proto.CodeInvalid, "operation %d after %d", op.Number, m.last)
		}
		res := &posternv1.FileOpResult{Number: op.Number}
		if why := r.apply(req.MountId, op, res); why != "" {
			res.RefusedCode, res.Refused = "INVALID_ARGUMENT", why
		}
		res.Seq = r.seq
		m.last, m.results[op.Number] = op.Number, res
		resp.Results = append(resp.Results, res)
	}
	resp.Seq = r.seq
	for _, n := range r.nodes {
		resp.UsedBytes += n.Size
	}
	r.cond.Broadcast()
	return resp, late
}

func (r *Remote) change(mount string, id uint64, added, removed []*posternv1.Entry) {
	r.seq++
	c := &posternv1.NodeChange{Seq: r.seq, MountId: mount, Added: added, Removed: removed}
	if n := r.nodes[id]; n != nil {
		n.Seq = r.seq
		n.CtimeNs++
		c.Node = clone(n)
	} else {
		c.Node, c.Gone = &posternv1.Node{Id: id}, true
	}
	r.changes = append(r.changes, c)
}

func entry(dir uint64, name string) []*posternv1.Entry {
	return []*posternv1.Entry{{Parent: dir, Name: []byte(name)}}
}

// free finds a name for what cannot have the one it wants.
func (r *Remote) free(dir uint64, name string) string {
	for i := 1; ; i++ {
		kept := fmt.Sprintf("%s (conflict %d)", name, i)
		if r.names[dir][kept] == 0 {
			return kept
		}
	}
}

func conflict(want, kept string, id uint64) *posternv1.FileConflict {
	return &posternv1.FileConflict{Path: []byte("/" + want), KeptAs: []byte("/" + kept), KeptId: id}
}

func (r *Remote) apply(mount string, op *posternv1.FileOp, res *posternv1.FileOpResult) string {
	switch o := op.Op.(type) {
	case *posternv1.FileOp_Create_:
		return r.create(mount, o.Create, res)
	case *posternv1.FileOp_SetContent_:
		return r.setContent(mount, o.SetContent, res)
	case *posternv1.FileOp_SetAttr_:
		return r.setAttr(mount, o.SetAttr)
	case *posternv1.FileOp_SetXattr_:
		n := r.nodes[o.SetXattr.Id]
		if n == nil {
			return "no such node"
		}
		if n.Xattrs == nil {
			n.Xattrs = map[string][]byte{}
		}
		if n.Xattrs[o.SetXattr.Name] = o.SetXattr.Value; o.SetXattr.Remove {
			delete(n.Xattrs, o.SetXattr.Name)
		}
		r.change(mount, n.Id, nil, nil)
	case *posternv1.FileOp_MakeLink_:
		l := o.MakeLink
		n, name := r.nodes[l.Id], string(l.Name)
		if n == nil || r.names[l.Parent] == nil {
			return "no such node"
		}
		if r.names[l.Parent][name] != 0 {
			kept := r.free(l.Parent, name)
			res.Conflict = conflict(name, kept, n.Id)
			name = kept
		}
		n.Links++
		r.names[l.Parent][name] = n.Id
		r.change(mount, n.Id, entry(l.Parent, name), nil)
	case *posternv1.FileOp_Remove_:
		m := o.Remove
		if r.names[m.Parent][string(m.Name)] != m.Id {
			return "" // somebody else removed or replaced it
		}
		if len(r.names[m.Id]) > 0 {
			return "directory is not empty"
		}
		r.unlink(mount, m.Parent, string(m.Name))
	case *posternv1.FileOp_Rename_:
		return r.rename(mount, o.Rename, res)
	default:
		return "unknown"
	}
	return ""
}

func (r *Remote) create(mount string, c *posternv1.FileOp_Create, res *posternv1.FileOpResult) string {
	if r.names[c.Parent] == nil {
		return "no such directory"
	}
	name := string(c.Name)
	if r.nodes[c.Node.Id] != nil || name == "" || strings.Contains(name, "/") {
		return "cannot be"
	}
	n := clone(c.Node)
	n.Links, n.Size, n.Version = 1, uint64(len(n.Target)), 0
	r.nodes[n.Id] = n
	if n.Type == posternv1.NodeType_NODE_TYPE_DIRECTORY {
		r.names[n.Id] = map[string]uint64{}
	}
	if r.names[c.Parent][name] != 0 {
		kept := r.free(c.Parent, name)
		res.Conflict = conflict(name, kept, n.Id)
		name = kept
	}
	r.names[c.Parent][name] = n.Id
	r.change(mount, n.Id, entry(c.Parent, name), nil)
	return ""
}

func (r *Remote) setAttr(mount string, a *posternv1.FileOp_SetAttr) string {
	n := r.nodes[a.Id]
	if n == nil {
		return "no such node"
	}
	if a.Mode == nil && a.Uid == nil && a.Gid == nil && a.MtimeNs == nil {
		return ""
	}
	if a.Mode != nil {
		n.Mode = *a.Mode
	}
	if a.Uid != nil {
		n.Uid = *a.Uid
	}
	if a.Gid != nil {
		n.Gid = *a.Gid
	}
	if a.MtimeNs != nil {
		n.MtimeNs = *a.MtimeNs
	}
	r.change(mount, n.Id, nil, nil)
	return ""
}

func (r *Remote) unlink(mount string, dir uint64, name string) {
	id := r.names[dir][name]
	delete(r.names[dir], name)
	n := r.nodes[id]
	if n.Links--; n.Links == 0 {
		delete(r.nodes, id)
		delete(r.names, id)
	}
	r.change(mount, id, nil, entry(dir, name))
}

func (r *Remote) rename(mount string, o *posternv1.FileOp_Rename, res *posternv1.FileOpResult) string {
	name, newName := string(o.Name), string(o.NewName)
	if r.names[o.Parent][name] != o.Id || r.names[o.NewParent] == nil {
		return "moved or gone"
	}
	there := r.names[o.NewParent][newName]
	if o.Exchange {
		if there != o.Replaces {
			return "moved or gone"
		}
		r.names[o.Parent][name], r.names[o.NewParent][newName] = there, o.Id
		r.change(mount, o.Id, entry(o.NewParent, newName), entry(o.Parent, name))
		r.change(mount, there, entry(o.Parent, name), entry(o.NewParent, newName))
		return ""
	}
	switch {
	case there != 0 && there != o.Replaces:
		kept := r.free(o.NewParent, newName)
		res.Conflict = conflict(newName, kept, o.Id)
		newName = kept
	case there != 0:
		r.unlink(mount, o.NewParent, newName)
	}
	delete(r.names[o.Parent], name)
	r.names[o.NewParent][newName] = o.Id
	r.change(mount, o.Id, entry(o.NewParent, newName), entry(o.Parent, name))
	return ""
}

func (r *Remote) setContent(mount string, s *posternv1.FileOp_SetContent, res *posternv1.FileOpResult) string {
	n := r.nodes[s.Id]
	if n == nil {
		return "no such node"
	}
	v := version{size: s.Size, chunks: s.Chunks, inline: s.Inline, is: s.Size <= filechunk.MaxInline}
	if v.is {
		if uint64(len(s.Inline)) != s.Size {
			return "inline content of another size"
		}
		v.chunks = filechunk.Names(v.inline)
		if len(v.chunks) > 0 && v.chunks[0] != nil {
			r.chunks[string(v.chunks[0])] = v.inline
		}
	} else {
		if err := filechunk.Check(s.Size, s.Chunks); err != nil {
			return err.Error()
		}
		for _, h := range s.Chunks {
			if len(h) > 0 && r.chunks[string(h)] == nil {
				return fmt.Sprintf("chunk %x is missing", h)
			}
		}
	}
	if r.quota > 0 && s.Size > r.quota {
		return "over quota"
	}
	if n.Version == s.BaseVersion {
		r.putContent(n, v, s.MtimeNs)
		res.Version = n.Version
		r.change(mount, n.Id, nil, nil)
		return ""
	}
	for dir, names := range r.names {
		for name, id := range names {
			if id != s.Id {
				continue
			}
			kept := r.free(dir, name)
			r.nextID++
			c := clone(n)
			c.Id, c.Links = r.nextID+1<<40, 1
			r.nodes[c.Id] = c
			r.names[dir][kept] = c.Id
			r.putContent(c, v, s.MtimeNs)
			r.change(mount, c.Id, entry(dir, kept), nil)
			res.Conflict = conflict(name, kept, c.Id)
			return ""
		}
	}
	return "no name"
}

func (r *Remote) putContent(n *posternv1.Node, v version, mtime int64) {
	r.version++
	n.Version, n.Size, n.MtimeNs = r.version, v.size, mtime
	if r.content[n.Id] == nil {
		r.content[n.Id] = map[uint64]version{}
	}
	r.content[n.Id][n.Version] = v
}

// Fill makes so many directories with so many empty files each, as if they had always been there.
func (r *Remote) Fill(dirs, files int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	add := func(parent uint64, name string, typ posternv1.NodeType) uint64 {
		id := r.nextID
		r.nextID++
		r.nodes[id] = &posternv1.Node{Id: id, Type: typ, Mode: 0o755, Links: 1, MtimeNs: 1, CtimeNs: 1, BtimeNs: 1, Seq: 1}
		r.names[parent][name] = id
		return id
	}
	r.seq++
	for d := range dirs {
		dir := add(1, fmt.Sprintf("directory-%d", d), posternv1.NodeType_NODE_TYPE_DIRECTORY)
		r.names[dir] = map[string]uint64{}
		for f := range files {
			add(dir, fmt.Sprintf("file-%d.data", f), posternv1.NodeType_NODE_TYPE_FILE)
		}
	}
}
