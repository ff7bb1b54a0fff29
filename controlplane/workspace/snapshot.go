package workspace

import (
	"context"
	"regexp"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// snapshotPrefix begins a snapshot's id; maxSnapshots bounds those of a workspace.
	snapshotPrefix = "snp_"
	maxSnapshots   = 1000
)

var snapshotName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

func protoSnapshot(s *filetree.Snapshot) *posternv1.WorkspaceSnapshot {
	return &posternv1.WorkspaceSnapshot{Id: s.ID, Name: s.Name, Seq: s.Seq, Created: timestamppb.New(s.Created), By: s.By, Nodes: s.Nodes, Bytes: s.Bytes}
}

// CreateSnapshot implements FileService.
func (f files) CreateSnapshot(ctx context.Context, req *connect.Request[posternv1.CreateSnapshotRequest]) (*connect.Response[posternv1.WorkspaceSnapshot], error) {
	return serve(ctx, f.s, "create snapshot", func(c Caller) (*posternv1.WorkspaceSnapshot, error) {
		r := req.Msg
		var made filetree.Snapshot
		w, err := f.s.change(ctx, c, r.Workspace, func(t *tree) error {
			name := r.Name
			if name == "" {
				name = t.now.UTC().Format("2006-01-02T15-04-05.000")
			}
			if !snapshotName.MatchString(name) {
				return proto.Errorf(proto.CodeInvalid, "%q is no name for a snapshot: 1 to 63 letters, digits, '-', '_' and '.', beginning with a letter or digit", clip(name))
			}
			// Each snapshot may come to keep a row of every node and name.
			if err := t.mayKeep(1); err != nil {
				return err
			}
			all, err := t.tx.Snapshots(ctx)
			if err != nil {
				return err
			}
			if len(all) >= maxSnapshots {
				return proto.Errorf(proto.CodeOverloaded, "workspace %s has %d snapshots: delete some", t.ws.Name, len(all))
			}
			made = filetree.Snapshot{ID: proto.NewID(snapshotPrefix), Name: name, Seq: t.ws.Seq, Created: t.now, By: t.by, Nodes: t.ws.Nodes, Bytes: t.ws.UsedBytes}
			// What comes next must have another number than what the snapshot shows.
			t.ws.Seq++
			return t.tx.PutSnapshot(ctx, &made)
		})
		return protoSnapshot(&made), f.s.auditChange(ctx, c, "file.snapshot.create", w, r.Workspace, []byte(clip(r.Name)), err)
	})
}

// ListSnapshots implements FileService.
func (f files) ListSnapshots(ctx context.Context, req *connect.Request[posternv1.WorkspaceRequest]) (*connect.Response[posternv1.ListSnapshotsResponse], error) {
	return serve(ctx, f.s, "list snapshots", func(c Caller) (*posternv1.ListSnapshotsResponse, error) {
		resp := &posternv1.ListSnapshotsResponse{}
		_, err := f.s.read(ctx, c, req.Msg.Workspace, func(t *tree) error {
			all, err := t.tx.Snapshots(ctx)
			for i := range all {
				resp.Snapshots = append(resp.Snapshots, protoSnapshot(&all[i]))
			}
			return err
		})
		return resp, err
	})
}

func (t *tree) snapshot(idOrName string) (*filetree.Snapshot, error) {
	all, err := t.tx.Snapshots(t.ctx)
	if err != nil {
		return nil, err
	}
	for _, byID := range []bool{true, false} {
		for i := range all {
			if byID && all[i].ID == idOrName || !byID && all[i].Name == idOrName {
				return &all[i], nil
			}
		}
	}
	return nil, proto.Errorf(proto.CodeNotFound, "workspace %s has no snapshot %q", t.ws.Name, clip(idOrName))
}

// DeleteSnapshot implements FileService.
func (f files) DeleteSnapshot(ctx context.Context, req *connect.Request[posternv1.SnapshotRequest]) (*connect.Response[posternv1.DeleteSnapshotResponse], error) {
	return serve(ctx, f.s, "delete snapshot", func(c Caller) (*posternv1.DeleteSnapshotResponse, error) {
		r := req.Msg
		w, err := f.s.change(ctx, c, r.Workspace, func(t *tree) error {
			s, err := t.snapshot(r.Snapshot)
			if err != nil {
				return err
			}
			return t.tx.DeleteSnapshot(ctx, s.ID)
		})
		return &posternv1.DeleteSnapshotResponse{}, f.s.auditChange(ctx, c, "file.snapshot.delete", w, r.Workspace, []byte(clip(r.Snapshot)), err)
	})
}

// RestoreSnapshot implements FileService.
func (f files) RestoreSnapshot(ctx context.Context, req *connect.Request[posternv1.RestoreSnapshotRequest]) (*connect.Response[posternv1.RestoreSnapshotResponse], error) {
	return serve(ctx, f.s, "restore snapshot", func(c Caller) (resp *posternv1.RestoreSnapshotResponse, err error) {
		r := req.Msg
		w, err := f.s.change(ctx, c, r.Workspace, func(t *tree) error {
			s, err := t.snapshot(r.Snapshot)
			if err != nil {
				return err
			}
			path := r.Path
			if len(path) == 0 {
				path = []byte("/")
			}
			resp, err = t.rewind(s.Seq, path)
			return err
		})
		return resp, f.s.auditChange(ctx, c, "file.snapshot.restore", w, r.Workspace, []byte(clip(r.Snapshot)+" "+string(r.Path)), err)
	})
}

// rewinder puts a workspace back to what it was. Work goes with what has changed since.
type rewinder struct {
	*tree
	seq uint64
	// then are nodes as they were, that have changed.
	then map[uint64]*filetree.Node
	// top is the directory below which it works.
	top uint64
	// renamed are the numbers that nodes have which were gone for good.
	renamed map[uint64]uint64
	resp    *posternv1.RestoreSnapshotResponse
}

// rewind puts back what is below a path, which must be a directory now and then.
func (t *tree) rewind(seq uint64, path []byte) (*posternv1.RestoreSnapshotResponse, error) {
	dir, _, err := t.find(path)
	if err != nil {
		return nil, err
	}
	if dir.Type != filetree.Directory {
		return nil, proto.Errorf(proto.CodeInvalid, "%s:%s is no directory: restore a file by its version", t.ws.Name, clip(string(path)))
	}
	r := &rewinder{tree: t, seq: seq, top: dir.ID, renamed: map[uint64]uint64{}, resp: &posternv1.RestoreSnapshotResponse{}}
	if r.then, err = t.tx.NodesAt(t.ctx, seq); err != nil {
		return nil, err
	}
	if was, err := r.was(dir.ID); err != nil {
		return nil, err
	} else if was == nil {
		return nil, proto.Errorf(proto.CodeNotFound, "%s:%s was not there in that snapshot, or is another directory now: restore the directory above it", t.ws.Name, clip(string(path)))
	}
	lost, err := t.tx.EntriesAt(t.ctx, seq)
	if err != nil {
		return nil, err
	}
	won, err := t.tx.EntriesSince(t.ctx, seq)
	if err != nil {
		return nil, err
	}
	if lost, err = r.scope(lost, true); err != nil {
		return nil, err
	}
	if won, err = r.scope(won, false); err != nil {
		return nil, err
	}
	for _, step := range []func(lost, won []filetree.Entry) error{r.revive, r.takeAway, r.makeAgain, r.bringBack, r.removeNew, r.contents} {
		if err := step(lost, won); err != nil {
			return nil, err
		}
	}
	if t.overQuota() {
		return nil, errQuota
	}
	if err := t.mayAdd(0); err != nil {
		return nil, err
	}
	return r.resp, nil
}

// was is a node as it was; nil: there was none.
func (r *rewinder) was(id uint64) (*filetree.Node, error) {
	if n := r.then[id]; n != nil {
		return n, nil
	}
	n, err := r.node(id)
	if err != nil || n == nil || n.Seq > r.seq {
		return nil, err
	}
	return &n.Node, nil
}

// scope are the entries of directories that lay, or lie, below the top.
func (r *rewinder) scope(entries []filetree.Entry, then bool) ([]filetree.Entry, error) {
	var in []filetree.Entry
	for _, e := range entries {
		ok, err := r.inside(e.Parent, true)
		if err == nil && !ok && !then {
			ok, err = r.inside(e.Parent, false)
		}
		if err != nil {
			return nil, err
		}
		if ok {
			in = append(in, e)
		}
	}
	return in, nil
}

func (r *rewinder) inside(dir uint64, then bool) (bool, error) {
	for range maxDepth + 2 {
		if dir == r.top {
			return true, nil
		}
		var n *filetree.Node
		if then {
			var err error
			if n, err = r.was(dir); err != nil {
				return false, err
			}
		} else {
			now, err := r.node(dir)
			if err != nil {
				return false, err
			}
			if now != nil {
				n = &now.Node
			}
		}
		if n == nil || n.Parent == 0 || n.Parent == filetree.Trash {
			return false, nil
		}
		dir = n.Parent
	}
	return false, nil
}

// revive takes out of the trash what is to come back, each with what is in it.
func (r *rewinder) revive(lost, _ []filetree.Entry) error {
	for _, e := range lost {
		n, err := r.node(e.Node)
		if err != nil {
			return err
		}
		if n == nil || n.Links == 0 {
			continue
		}
		ok, err := r.trashed(n)
		if err != nil {
			return err
		}
		switch {
		case !ok:
		case n.Parent == filetree.Trash:
			err = r.untrash(n)
		default:
			// It lies within something in the trash, which may come out by itself.
			err = r.pull(n)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// trashed reports whether a node lies in the trash; what lies in something that has lost its
// name for now does not, and is counted.
func (r *rewinder) trashed(n *node) (bool, error) {
	for range maxDepth + 2 {
		switch {
		case n == nil, n.ID == filetree.Root, n.Parent == 0:
			return false, nil
		case n.Parent == filetree.Trash:
			return true, nil
		}
		var err error
		if n, err = r.node(n.Parent); err != nil {
			return false, err
		}
	}
	return false, nil
}

// pull takes all names of what lies within the trash away, and counts it.
func (r *rewinder) pull(n *node) error {
	if err := r.flush(); err != nil {
		return err
	}
	names, err := r.tx.EntriesOf(r.ctx, []uint64{n.ID})
	if err != nil {
		return err
	}
	for _, e := range names {
		if err := r.unlink(e.Parent, e.Name, n, r.now.UnixNano()); err != nil {
			return err
		}
	}
	return r.recharge(n, place{})
}

// takeAway takes names away that were not there, of what was somewhere else.
func (r *rewinder) takeAway(lost, won []filetree.Entry) error {
	back := map[uint64]bool{}
	same := map[place]uint64{}
	for _, e := range lost {
		back[e.Node] = true
		same[place{e.Parent, string(e.Name)}] = e.Node
	}
	for _, e := range won {
		if same[place{e.Parent, string(e.Name)}] == e.Node {
			continue
		}
		n, err := r.held(e)
		if err != nil {
			return err
		}
		if n == nil || !back[e.Node] && n.Links < 2 {
			continue
		}
		if err := r.unlink(e.Parent, e.Name, n, r.now.UnixNano()); err != nil {
			return err
		}
	}
	return nil
}

// held is the node of an entry, if it is still that entry's.
func (r *rewinder) held(e filetree.Entry) (*node, error) {
	have, err := r.entry(e.Parent, e.Name)
	if err != nil || have.node != e.Node {
		return nil, err
	}
	return r.node(e.Node)
}

// removeNew moves what was not there to the trash.
func (r *rewinder) removeNew(lost, won []filetree.Entry) error {
	same := map[place]uint64{}
	for _, e := range lost {
		same[place{e.Parent, string(e.Name)}] = e.Node
	}
	for _, e := range won {
		if same[place{e.Parent, string(e.Name)}] == e.Node {
			continue
		}
		d, err := r.node(e.Parent)
		if err != nil {
			return err
		}
		if ok, err := r.alive(d); err != nil {
			return err
		} else if !ok {
			continue // gone with its directory
		}
		n, err := r.held(e)
		if err != nil {
			return err
		}
		if n == nil {
			continue
		}
		if err := r.trash(e.Parent, e.Name, n, r.now.UnixNano()); err != nil {
			return err
		}
		r.resp.Removed++
	}
	return nil
}

// bringBack gives names back that are gone.
func (r *rewinder) bringBack(lost, _ []filetree.Entry) error {
	at := r.now.UnixNano()
	for _, e := range lost {
		id, parent := r.number(e.Node), r.number(e.Parent)
		n, err := r.node(id)
		if err != nil {
			return err
		}
		if n == nil {
			continue
		}
		there, err := r.lookup(parent, e.Name)
		if err != nil {
			return err
		}
		if there != nil {
			if there.ID == id {
				continue
			}
			if err := r.trash(parent, e.Name, there, at); err != nil {
				return err
			}
			r.resp.Removed++
		}
		if n.Type == filetree.Directory && n.Links > 0 {
			// It was moved out of where we work.
			if err := r.unlink(n.Parent, n.Name, n, at); err != nil {
				return err
			}
		}
		if err := r.link(parent, e.Name, n, at); err != nil {
			return err
		}
		r.resp.Restored++
	}
	return nil
}

func (r *rewinder) number(id uint64) uint64 {
	if now, ok := r.renamed[id]; ok {
		return now
	}
	return id
}

// makeAgain makes what is gone for good under new numbers. A file that is now somewhere
// that is not ours gets a copy.
func (r *rewinder) makeAgain(lost, _ []filetree.Entry) error {
	for _, e := range lost {
		if _, done := r.renamed[e.Node]; done {
			continue
		}
		n, err := r.node(e.Node)
		if err != nil {
			return err
		}
		if n != nil && (n.Links == 0 || n.Type == filetree.Directory || r.top == filetree.Root) {
			continue
		}
		was, err := r.was(e.Node)
		if err != nil {
			return err
		}
		if was == nil {
			continue
		}
		row := *was
		row.ID, row.Links, row.Parent, row.Name, row.Version, row.Stored, row.Inline, row.HasInline = r.newID(), 0, 0, nil, 0, 0, nil, false
		if row.Type == filetree.File {
			row.Size = 0
		}
		made := r.make(row)
		r.renamed[e.Node] = row.ID
		if err := r.charge(1, 0, true); err != nil {
			return err
		}
		if err := r.content(made, e.Node, was.Version); err != nil {
			return err
		}
	}
	return nil
}

// content gives a file the content that another number, or its own, had.
func (r *rewinder) content(n *node, id, version uint64) error {
	if n.Type != filetree.File || version == 0 {
		return nil
	}
	v, err := r.tx.Version(r.ctx, id, version)
	if err != nil {
		return err
	}
	if v == nil {
		return proto.Errorf(proto.CodeInternal, "version %d of file %d, which a snapshot needs, is not there", version, id)
	}
	if err := r.charge(0, int64(v.Stored)-int64(n.Stored), true); err != nil {
		return err
	}
	return r.copyVersion(n, v)
}

// contents puts attributes and contents back.
func (r *rewinder) contents(_, _ []filetree.Entry) error {
	for id, was := range r.then {
		if was.Parent == filetree.Trash || was.Links == 0 {
			continue
		}
		n, err := r.node(r.number(id))
		if err != nil {
			return err
		}
		if n == nil {
			continue
		}
		if ok, err := r.alive(n); err != nil {
			return err
		} else if !ok {
			continue
		}
		if id != r.top {
			if ok, err := r.inside(n.Parent, false); err != nil {
				return err
			} else if !ok {
				continue
			}
		}
		if _, made := r.renamed[id]; !made && n.Type == filetree.File && n.Version != was.Version {
			if was.Version == 0 {
				if err := r.charge(0, -int64(n.Stored), true); err != nil {
					return err
				}
				if err := r.addVersion(n, content{}, n.Version, 0); err != nil {
					return err
				}
			} else if err := r.content(n, id, was.Version); err != nil {
				return err
			}
			r.resp.Restored++
		}
		n.Mode, n.UID, n.GID, n.Xattrs, n.Mtime, n.Ctime = was.Mode, was.UID, was.GID, was.Xattrs, was.Mtime, r.now.UnixNano()
		r.touch(n)
	}
	return nil
}
