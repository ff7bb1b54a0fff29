package workspace

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	protobuf "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/controlplane/filetree"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// tree changes a workspace within one transaction. It holds what it has read and
// written, so that an operation sees what those before it did, and writes all of it in
// flush. It is not for concurrent use.
type tree struct {
	ctx context.Context // the transaction's
	tx  filetree.Tx
	ws  *filetree.Workspace
	now time.Time
	// by is "token NAME" or "agent NAME"; mount is the mount that does it, if one does.
	by, mount string
	// full is what errQuota was for.
	full fullness
	// organization bounds the nodes of all of its workspaces; 0: it doesn't. siblings, once
	// known, are those of the others.
	organization uint64
	siblings     *siblings
	// quiet: changes get numbers, but are not in the log.
	quiet bool

	nodes   map[uint64]*node
	entries map[place]*entry
	changes []filetree.Change

	// What the operation under way has changed.
	touched []*node
	moved   []*entry
	names   map[uint64]*posternv1.NodeChange
}

// place is a name in a directory.
type place struct {
	parent uint64
	name   string
}

type node struct {
	filetree.Node
	gone  bool // to be deleted
	dirty bool
	saved bool // it is in the store
	// bumped: it is a directory of which only the times change.
	bumped bool
}

type entry struct {
	place
	node  uint64 // 0: none
	seq   uint64
	dirty bool
	saved bool
}

func newTree(ctx context.Context, tx filetree.Tx, now time.Time, by, mount string) *tree {
	return &tree{
		ctx: ctx, tx: tx, ws: tx.Workspace(), now: now, by: by, mount: mount,
		nodes: map[uint64]*node{}, entries: map[place]*entry{}, names: map[uint64]*posternv1.NodeChange{},
	}
}

// node returns a node, or nil if there is none.
func (t *tree) node(id uint64) (*node, error) {
	n, known := t.nodes[id]
	if !known {
		row, err := t.tx.Node(t.ctx, id)
		if err != nil {
			return nil, err
		}
		if row != nil {
			n = &node{Node: *row, saved: true}
		}
		t.nodes[id] = n
	}
	if n == nil || n.gone {
		return nil, nil
	}
	return n, nil
}

func (t *tree) entry(parent uint64, name []byte) (*entry, error) {
	at := place{parent, string(name)}
	e, known := t.entries[at]
	if !known {
		row, err := t.tx.Entry(t.ctx, parent, name)
		if err != nil {
			return nil, err
		}
		e = &entry{place: at}
		if row != nil {
			e.node, e.seq, e.saved = row.Node, row.Seq, true
		}
		t.entries[at] = e
	}
	return e, nil
}

// lookup is what a name stands for; nil: nothing.
func (t *tree) lookup(parent uint64, name []byte) (*node, error) {
	e, err := t.entry(parent, name)
	if err != nil || e.node == 0 {
		return nil, err
	}
	n, err := t.node(e.node)
	if err == nil && n == nil {
		err = fmt.Errorf("workspace %s has an entry of node %d, which is not there", t.ws.ID, e.node)
	}
	return n, err
}

// maxDepth bounds how deep directories may lie in each other.
const maxDepth = 1024

// alive reports whether a node can be reached from the root.
func (t *tree) alive(n *node) (bool, error) {
	for range maxDepth + 2 {
		switch {
		case n == nil:
			return false, nil
		case n.ID == filetree.Root:
			return true, nil
		case n.Parent == filetree.Trash || n.Parent == 0:
			return false, nil
		}
		var err error
		if n, err = t.node(n.Parent); err != nil {
			return false, err
		}
	}
	return false, fmt.Errorf("workspace %s has a loop", t.ws.ID)
}

// path is a node's path, or that of what it is called by if it has several names; of
// what is in the trash it begins below it.
func (t *tree) path(n *node) ([]byte, error) {
	var parts [][]byte
	for n != nil && n.ID != filetree.Root && n.ID != filetree.Trash {
		if len(parts) > maxDepth+2 {
			return nil, fmt.Errorf("workspace %s has a loop", t.ws.ID)
		}
		parts = append(parts, n.Name)
		if n.Parent == filetree.Trash {
			break
		}
		var err error
		if n, err = t.node(n.Parent); err != nil {
			return nil, err
		}
	}
	if len(parts) == 0 {
		return []byte("/"), nil
	}
	var path []byte
	for _, part := range slices.Backward(parts) {
		path = append(append(path, '/'), part...)
	}
	return path, nil
}

// pathIn is the path of a name in a directory.
func (t *tree) pathIn(parent uint64, name []byte) ([]byte, error) {
	d, err := t.node(parent)
	if err != nil {
		return nil, err
	}
	if d == nil {
		return append([]byte("/"), name...), nil
	}
	path, err := t.path(d)
	if err != nil {
		return nil, err
	}
	if len(path) > 1 {
		path = append(path, '/')
	}
	return append(path, name...), nil
}

// depth is how many directories lie above a node, the root among them.
func (t *tree) depth(n *node) (int, error) {
	depth := 0
	for n != nil && n.ID != filetree.Root {
		if depth++; depth > maxDepth+2 {
			return depth, nil
		}
		var err error
		if n, err = t.node(n.Parent); err != nil {
			return 0, err
		}
	}
	return depth, nil
}

// touch marks a node as changed by the operation under way.
func (t *tree) touch(n *node) {
	if _, known := t.names[n.ID]; !known || n.bumped {
		if !known {
			t.names[n.ID] = &posternv1.NodeChange{}
		}
		if !slices.Contains(t.touched, n) {
			t.touched = append(t.touched, n)
		}
	}
	n.dirty, n.bumped = true, false
}

// bump sets a directory's times because its names changed.
func (t *tree) bump(id uint64, at int64) error {
	if id == filetree.Trash {
		return nil
	}
	d, err := t.node(id)
	if err != nil || d == nil {
		return err
	}
	d.Mtime, d.Ctime = at, at
	if !slices.Contains(t.touched, d) {
		d.bumped = true
		t.touched = append(t.touched, d)
	}
	d.dirty = true
	return nil
}

func (t *tree) namesOf(n *node) *posternv1.NodeChange {
	t.touch(n)
	return t.names[n.ID]
}

// link gives a node a name that is free.
func (t *tree) link(parent uint64, name []byte, n *node, at int64) error {
	e, err := t.entry(parent, name)
	if err != nil {
		return err
	}
	if e.node != 0 {
		return fmt.Errorf("link: %q is taken", name)
	}
	e.node, e.dirty = n.ID, true
	t.moved = append(t.moved, e)
	if n.Type == filetree.Directory {
		n.Links = 1
	} else {
		if n.Links++; n.Links > 1 {
			t.ws.KeptRows++ // a further name is a row of its own
		}
	}
	n.Parent, n.Name = parent, bytes.Clone(name)
	change := t.namesOf(n)
	if parent != filetree.Trash {
		change.Added = append(change.Added, &posternv1.Entry{Parent: parent, Name: n.Name})
	}
	return t.bump(parent, at)
}

// unlink takes a name away. The node may have no name then.
func (t *tree) unlink(parent uint64, name []byte, n *node, at int64) error {
	e, err := t.entry(parent, name)
	if err != nil {
		return err
	}
	if e.node != n.ID {
		return fmt.Errorf("unlink: %q is not node %d", name, n.ID)
	}
	e.node, e.dirty = 0, true
	t.moved = append(t.moved, e)
	change := t.namesOf(n)
	if parent != filetree.Trash {
		change.Removed = append(change.Removed, &posternv1.Entry{Parent: parent, Name: bytes.Clone(name)})
	}
	if n.Type == filetree.Directory {
		n.Links = 0
	} else {
		if n.Links--; n.Links > 0 {
			t.fewerRows()
		}
	}
	if n.Links > 0 && n.Parent == parent && bytes.Equal(n.Name, name) {
		if err := t.rename(n); err != nil {
			return err
		}
	} else if n.Links == 0 {
		n.Parent, n.Name = 0, nil
	}
	return t.bump(parent, at)
}

// rename chooses which of its names a node is called by.
func (t *tree) rename(n *node) error {
	for _, e := range t.entries {
		if e.node == n.ID {
			n.Parent, n.Name = e.parent, []byte(e.name)
			return nil
		}
	}
	saved, err := t.tx.EntriesOf(t.ctx, []uint64{n.ID})
	if err != nil {
		return err
	}
	for _, e := range saved {
		if known, ok := t.entries[place{e.Parent, string(e.Name)}]; !ok || known.node == n.ID {
			n.Parent, n.Name = e.Parent, e.Name
			return nil
		}
	}
	return fmt.Errorf("node %d has %d names, and none", n.ID, n.Links)
}

// hasEntries reports whether there is something in a directory.
func (t *tree) hasEntries(id uint64) (bool, error) {
	for at, e := range t.entries {
		if at.parent == id && e.node != 0 {
			return true, nil
		}
	}
	if err := t.flush(); err != nil {
		return false, err
	}
	return t.tx.HasEntries(t.ctx, id)
}

// done ends an operation: everything it changed gets its number. It returns the last.
func (t *tree) done() (uint64, error) {
	var touched, bumped []*node
	for _, n := range t.touched {
		if n.bumped {
			bumped = append(bumped, n)
		} else {
			touched = append(touched, n)
		}
	}
	if len(touched) == 0 && len(bumped) > 0 {
		touched, bumped = bumped, nil
	}
	for _, n := range touched {
		t.ws.Seq++
		n.Seq = t.ws.Seq
		var names []byte
		if change := t.names[n.ID]; change != nil {
			var err error
			if names, err = protobuf.Marshal(change); err != nil {
				return 0, err
			}
		}
		if n.bumped = false; t.quiet {
			continue
		}
		t.changes = append(t.changes, filetree.Change{Seq: t.ws.Seq, Mount: t.mount, Node: n.ID, Names: names})
	}
	for _, n := range bumped {
		n.Seq, n.bumped = t.ws.Seq, false
	}
	for _, e := range t.moved {
		e.seq = t.ws.Seq
	}
	t.touched, t.moved = nil, nil
	clear(t.names)
	return t.ws.Seq, nil
}

// flush writes everything. What an operation has begun must be done.
func (t *tree) flush() error {
	if len(t.touched) > 0 || len(t.moved) > 0 {
		if _, err := t.done(); err != nil {
			return err
		}
	}
	var put []*filetree.Node
	var gone []uint64
	for id, n := range t.nodes {
		if n == nil || !n.dirty {
			continue
		}
		n.dirty = false
		switch {
		case !n.gone:
			put = append(put, &n.Node)
			n.saved = true
		case n.saved:
			gone = append(gone, id)
			n.saved = false
		}
	}
	var add, remove []filetree.Entry
	for at, e := range t.entries {
		if !e.dirty {
			continue
		}
		e.dirty = false
		row := filetree.Entry{Parent: at.parent, Name: []byte(at.name), Node: e.node, Seq: e.seq}
		switch {
		case e.node != 0:
			add = append(add, row)
			e.saved = true
		case e.saved:
			remove = append(remove, row)
			e.saved = false
		}
	}
	slices.SortFunc(put, func(a, b *filetree.Node) int { return int(a.ID) - int(b.ID) })
	slices.SortFunc(add, func(a, b filetree.Entry) int { return bytes.Compare(a.Name, b.Name) })
	err := errors.Join(t.tx.PutNodes(t.ctx, put))
	if err == nil {
		err = t.tx.DeleteNodes(t.ctx, gone)
	}
	if err == nil {
		err = t.tx.DeleteEntries(t.ctx, remove)
	}
	if err == nil {
		err = t.tx.PutEntries(t.ctx, add)
	}
	if err == nil {
		err = t.tx.PutChanges(t.ctx, t.changes)
	}
	t.changes = nil
	return err
}

// newID is the next free node number.
func (t *tree) newID() uint64 {
	id := t.ws.NextID
	t.ws.NextID++
	return id
}

// make makes a node without a name.
func (t *tree) make(n filetree.Node) *node {
	made := &node{Node: n, dirty: true}
	t.ws.KeptRows++
	t.nodes[n.ID] = made
	t.touch(made)
	return made
}

// trash takes a node's last name away and keeps it in the trash. What has no content
// worth keeping is gone for good.
func (t *tree) trash(parent uint64, name []byte, n *node, at int64) error {
	path, err := t.pathIn(parent, name)
	if err != nil {
		return err
	}
	if err := t.unlink(parent, name, n, at); err != nil {
		return err
	}
	if n.Links > 0 {
		return nil
	}
	record := filetree.Trashed{Node: n.ID, Path: path, Removed: t.now, By: t.by}
	switch n.Type {
	case filetree.Directory:
		some, err := t.hasEntries(n.ID)
		if err != nil {
			return err
		}
		if !some {
			return t.drop(n)
		}
		if err := t.detach(n); err != nil {
			return err
		}
		nodes, files, stored, err := t.tx.Subtree(t.ctx, n.ID)
		if err != nil {
			return err
		}
		record.Files, record.Bytes = files, stored
		if err := t.charge(-int64(nodes)-1, -int64(stored), true); err != nil {
			return err
		}
	case filetree.File:
		if n.Size == 0 {
			return t.drop(n)
		}
		record.Files, record.Bytes = 1, n.Stored
		if err := t.charge(-1, -int64(n.Stored), true); err != nil {
			return err
		}
	default:
		record.Files = 1
		if err := t.charge(-1, 0, true); err != nil {
			return err
		}
	}
	record.ID = t.newID()
	if err := t.link(filetree.Trash, trashName(record.ID), n, at); err != nil {
		return err
	}
	return t.tx.PutTrashed(t.ctx, &record)
}

func trashName(id uint64) []byte { return fmt.Appendf(nil, "%d", id) }

// drop removes a node that has no name.
func (t *tree) drop(n *node) error {
	if err := t.charge(-1, -int64(n.Stored), true); err != nil {
		return err
	}
	return t.dropUncounted(n)
}

// dropUncounted is drop for what is not counted, since it was in the trash.
func (t *tree) dropUncounted(n *node) error {
	t.touch(n)
	n.gone = true
	t.fewerRows()
	if n.Type != filetree.File || n.Version == 0 {
		return nil
	}
	if err := t.flush(); err != nil { // snapshots keep what they need first
		return err
	}
	return t.tx.DropVersions(t.ctx, n.ID)
}

// detach lets files that are also called from outside of a directory go from it.
func (t *tree) detach(dir *node) error {
	if err := t.flush(); err != nil {
		return err
	}
	linked, err := t.tx.Linked(t.ctx, dir.ID)
	if err != nil || len(linked) == 0 {
		return err
	}
	names, err := t.tx.EntriesOf(t.ctx, linked)
	if err != nil {
		return err
	}
	inside := map[uint64][]filetree.Entry{}
	outside := map[uint64]bool{}
	for _, e := range names {
		in, err := t.below(e.Parent, dir.ID)
		if err != nil {
			return err
		}
		if in {
			inside[e.Node] = append(inside[e.Node], e)
		} else {
			outside[e.Node] = true
		}
	}
	for _, id := range linked {
		if !outside[id] {
			continue
		}
		n, err := t.node(id)
		if err != nil || n == nil {
			return err
		}
		for _, e := range inside[id] {
			if err := t.unlink(e.Parent, e.Name, n, t.now.UnixNano()); err != nil {
				return err
			}
		}
	}
	return t.flush()
}

// below reports whether a directory is another one or lies below it.
func (t *tree) below(id, top uint64) (bool, error) {
	for range maxDepth + 2 {
		if id == top {
			return true, nil
		}
		n, err := t.node(id)
		if err != nil || n == nil || n.Parent == 0 {
			return false, err
		}
		id = n.Parent
	}
	return false, fmt.Errorf("workspace %s has a loop", t.ws.ID)
}
