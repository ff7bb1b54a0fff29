package workspace

import (
	"context"
	"encoding/hex"
	"slices"
	"strconv"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// ListFileVersions implements FileService.
func (f files) ListFileVersions(ctx context.Context, req *connect.Request[posternv1.FileRequest]) (*connect.Response[posternv1.ListFileVersionsResponse], error) {
	return serve(ctx, f.s, "list versions", func(c Caller) (*posternv1.ListFileVersionsResponse, error) {
		resp := &posternv1.ListFileVersionsResponse{}
		_, err := f.s.read(ctx, c, req.Msg.Workspace, func(t *tree) error {
			n, _, err := t.find(req.Msg.Path)
			if err != nil {
				return err
			}
			versions, err := t.tx.Versions(ctx, n.ID)
			for _, v := range versions {
				resp.Versions = append(resp.Versions, &posternv1.FileVersion{
					Version: v.Version, BaseVersion: v.Base, Size: v.Size, Created: timestamppb.New(v.Created), By: v.By,
					Current: v.Version == n.Version, Etag: hex.EncodeToString(v.ETag[:]),
				})
			}
			return err
		})
		return resp, err
	})
}

// RestoreFile implements FileService.
func (f files) RestoreFile(ctx context.Context, req *connect.Request[posternv1.RestoreFileRequest]) (*connect.Response[posternv1.FileInfo], error) {
	return serve(ctx, f.s, "restore file", func(c Caller) (info *posternv1.FileInfo, err error) {
		r := req.Msg
		w, err := f.s.change(ctx, c, r.Workspace, func(t *tree) error {
			if r.Version != 0 {
				info, err = t.restoreVersion(r.Path, r.Version)
			} else {
				info, err = t.restoreTrashed(r.Path, r.TrashId)
			}
			return err
		})
		path := r.Path
		if r.Version != 0 {
			path = []byte(string(path) + "@" + strconv.FormatUint(r.Version, 10))
		}
		return info, f.s.auditChange(ctx, c, "file.restore", w, r.Workspace, path, err)
	})
}

// restoreVersion makes an older version a file's newest.
func (t *tree) restoreVersion(path []byte, version uint64) (*posternv1.FileInfo, error) {
	n, parts, err := t.find(path)
	if err != nil {
		return nil, err
	}
	v, err := t.tx.Version(t.ctx, n.ID, min(version, filetree.NoBase))
	if err != nil {
		return nil, err
	}
	if v == nil {
		return nil, proto.Errorf(proto.CodeNotFound, "%s:%s has no version %d: it may have been too old to be kept", t.ws.Name, clip(string(path)), version)
	}
	if version != n.Version {
		if err := t.mayKeep(1); err != nil {
			return nil, err
		}
		if err := t.charge(0, int64(v.Stored)-int64(n.Stored), false); err != nil {
			return nil, err
		}
		at := t.now.UnixNano()
		n.Mtime, n.Ctime = at, at
		if err := t.copyVersion(n, v); err != nil {
			return nil, err
		}
	}
	if _, err := t.done(); err != nil {
		return nil, err
	}
	return t.info(joinPath(parts), &n.Node)
}

// copyVersion makes a kept version, of this file or another, a file's next one. Who calls
// has charged it.
func (t *tree) copyVersion(n *node, v *filetree.Version) error {
	next := *v
	next.Node, next.Version, next.Base, next.Created, next.By = n.ID, n.Version+1, n.Version, t.now, t.by
	lists := map[filetree.Hash][]byte{}
	for _, hash := range v.Segments {
		list, err := t.tx.Segment(t.ctx, hash)
		if err != nil {
			return err
		}
		lists[hash] = list
	}
	if err := t.tx.PutVersion(t.ctx, &next, lists); err != nil {
		return err
	}
	n.Version, n.Size, n.Stored = next.Version, next.Size, next.Stored
	t.touch(n)
	return t.thin(n)
}

// restoreTrashed brings back what lay at a path, or an entry of the trash, where it was. Without an
// id the newest counts.
func (t *tree) restoreTrashed(path []byte, id uint64) (*posternv1.FileInfo, error) {
	var record *filetree.Trashed
	var err error
	if id != 0 {
		if record, err = t.tx.Trashed(t.ctx, min(id, filetree.NoBase)); err != nil {
			return nil, err
		}
	} else {
		parts, err := splitPath(path)
		if err != nil {
			return nil, err
		}
		all, err := t.tx.ListTrashed(t.ctx, 0, joinPath(parts), 1)
		if err != nil {
			return nil, err
		}
		if len(all) > 0 {
			record = &all[0]
		}
	}
	if record == nil {
		return nil, proto.Errorf(proto.CodeNotFound, "%s:%s is not in the trash", t.ws.Name, clip(string(path)))
	}
	n, err := t.node(record.Node)
	if err != nil {
		return nil, err
	}
	if n == nil || n.Parent != filetree.Trash {
		return nil, proto.Errorf(proto.CodeNotFound, "entry %d of the trash of %s is gone", record.ID, t.ws.Name)
	}
	to := record.Path
	if id != 0 && len(path) > 0 {
		to = path
	}
	parts, err := splitPath(to)
	if err != nil {
		return nil, err
	}
	if len(parts) == 0 {
		return nil, proto.Errorf(proto.CodeInvalid, "the root of a workspace can't be replaced")
	}
	dir, err := t.mkdir(parts[:len(parts)-1], true)
	if err != nil {
		return nil, err
	}
	name := parts[len(parts)-1]
	there, err := t.lookup(dir.ID, name)
	if err != nil {
		return nil, err
	}
	if there != nil {
		return nil, proto.Errorf(proto.CodeAlreadyExists, "%s:%s is there: move it away, or restore to another path (with the trash id %d)", t.ws.Name, clip(string(to)), record.ID)
	}
	if err := t.untrash(n); err != nil {
		return nil, err
	}
	at := t.now.UnixNano()
	n.Ctime = at
	if err := t.link(dir.ID, name, n, at); err != nil {
		return nil, err
	}
	if t.overQuota() {
		return nil, errQuota
	}
	if err := t.mayAdd(0); err != nil {
		return nil, err
	}
	if _, err := t.done(); err != nil {
		return nil, err
	}
	return t.info(joinPath(parts), &n.Node)
}

func (t *tree) overQuota() bool {
	return t.ws.QuotaNodes > 0 && t.ws.Nodes > t.ws.QuotaNodes || t.ws.QuotaBytes > 0 && t.ws.UsedBytes > t.ws.QuotaBytes
}

// untrash takes something out of the trash and counts it; it has no name then.
func (t *tree) untrash(n *node) error {
	from := place{n.Parent, string(n.Name)}
	if err := t.unlink(from.parent, n.Name, n, t.now.UnixNano()); err != nil {
		return err
	}
	return t.recharge(n, from)
}

// trashPage bounds a page of the trash's list.
const trashPage = 500

// ListTrash implements FileService.
func (f files) ListTrash(ctx context.Context, req *connect.Request[posternv1.ListTrashRequest]) (*connect.Response[posternv1.ListTrashResponse], error) {
	return serve(ctx, f.s, "list trash", func(c Caller) (*posternv1.ListTrashResponse, error) {
		var before uint64
		if token := req.Msg.PageToken; len(token) > 0 {
			var ok bool
			if before, ok = parseTrashName(token); !ok || before == 0 {
				return nil, proto.Errorf(proto.CodeInvalid, "the page token is not one of ours")
			}
		}
		resp := &posternv1.ListTrashResponse{}
		_, err := f.s.read(ctx, c, req.Msg.Workspace, func(t *tree) error {
			all, err := t.tx.ListTrashed(ctx, before, nil, trashPage)
			if err != nil {
				return err
			}
			ids := make([]uint64, len(all))
			for i := range all {
				ids[i] = all[i].Node
			}
			nodes, err := t.tx.Nodes(ctx, ids)
			if err != nil {
				return err
			}
			for i := range all {
				r := &all[i]
				n := nodes[r.Node]
				if n == nil {
					continue
				}
				n.Inline, n.HasInline = nil, false
				p, err := protoNode(n)
				if err != nil {
					return err
				}
				e := &posternv1.TrashEntry{TrashId: r.ID, Path: r.Path, Node: p, Removed: timestamppb.New(r.Removed), By: r.By, Files: r.Files, Bytes: r.Bytes}
				if t.ws.KeepFor > 0 {
					e.Expires = timestamppb.New(r.Removed.Add(t.ws.KeepFor))
				}
				resp.Entries = append(resp.Entries, e)
			}
			if len(all) == trashPage {
				resp.NextPageToken = trashName(all[len(all)-1].ID)
			}
			return nil
		})
		return resp, err
	})
}

// EmptyTrash implements FileService.
func (f files) EmptyTrash(ctx context.Context, req *connect.Request[posternv1.EmptyTrashRequest]) (*connect.Response[posternv1.EmptyTrashResponse], error) {
	return serve(ctx, f.s, "empty trash", func(c Caller) (*posternv1.EmptyTrashResponse, error) {
		resp := &posternv1.EmptyTrashResponse{}
		r := req.Msg
		more := true
		var w *filetree.Workspace
		var err error
		for err == nil && more {
			var n uint64
			w, err = f.s.change(ctx, c, r.Workspace, func(t *tree) error {
				n, more = 0, false
				var all []filetree.Trashed
				if r.TrashId != 0 {
					one, err := t.tx.Trashed(ctx, min(r.TrashId, filetree.NoBase))
					if err != nil {
						return err
					}
					if one == nil {
						return proto.Errorf(proto.CodeNotFound, "there is no entry %d in the trash of %s", r.TrashId, t.ws.Name)
					}
					all = append(all, *one)
				} else {
					var err error
					if all, err = t.tx.ListTrashed(ctx, 0, nil, trashPage); err != nil {
						return err
					}
					more = len(all) == trashPage
				}
				for i := range all {
					if err := t.tx.MarkPurging(ctx, all[i].ID); err != nil {
						return err
					}
					n++
				}
				return nil
			})
			if err == nil {
				resp.Entries += n
			}
		}
		if err == nil {
			err = f.s.purge(ctx, w)
		}
		return resp, f.s.auditChange(ctx, c, "file.trash.empty", w, r.Workspace, nil, err)
	})
}

// purgeStep is how many nodes one transaction removes for good.
const purgeStep = 200

// purge removes for good what was marked, in steps.
func (s *Service) purge(ctx context.Context, w *filetree.Workspace) error {
	for {
		more := false
		err := s.cfg.Store.UpdateFiles(ctx, w.Organization, w.ID, func(tx filetree.Tx) error {
			more = false
			all, err := tx.Purging(ctx, purgeStep)
			if err != nil || len(all) == 0 {
				return err
			}
			more = true
			t := s.quietTree(ctx, tx)
			budget := purgeStep
			for i := range all {
				if budget <= 0 {
					break
				}
				if err := t.purgeOne(&all[i], &budget); err != nil {
					return err
				}
			}
			return t.flush()
		})
		if err != nil || !more {
			return err
		}
	}
}

// quietTree is a tree whose changes nobody is told: of what was gone before.
func (s *Service) quietTree(ctx context.Context, tx filetree.Tx) *tree {
	t := newTree(ctx, tx, now(), "", "")
	t.quiet = true
	return t
}

// purgeOne removes an entry of the trash, or a part of it within the budget.
func (t *tree) purgeOne(record *filetree.Trashed, budget *int) error {
	n, err := t.node(record.Node)
	if err != nil {
		return err
	}
	*budget--
	if n == nil || n.Parent != filetree.Trash || string(n.Name) != string(trashName(record.ID)) {
		return t.tx.DeleteTrashed(t.ctx, record.ID)
	}
	at := t.now.UnixNano()
	if n.Type == filetree.Directory {
		if err := t.flush(); err != nil {
			return err
		}
		listed, err := t.tx.List(t.ctx, n.ID, nil, max(*budget, 1))
		if err != nil {
			return err
		}
		for i := range listed {
			*budget--
			if err := t.purgeEntry(n, &listed[i].Entry, at); err != nil {
				return err
			}
		}
		if *budget <= 0 {
			return nil // the rest next time
		}
		if some, err := t.hasEntries(n.ID); err != nil || some {
			return err
		}
	}
	if err := t.unlink(filetree.Trash, slices.Clone(n.Name), n, at); err != nil {
		return err
	}
	if err := t.tx.DeleteTrashed(t.ctx, record.ID); err != nil {
		return err
	}
	if n.Links > 0 {
		return nil
	}
	return t.dropUncounted(n)
}

// purgeEntry removes a name below the trash. A directory becomes an entry of the trash by
// itself, to be purged.
func (t *tree) purgeEntry(dir *node, e *filetree.Entry, at int64) error {
	child, err := t.node(e.Node)
	if err != nil || child == nil {
		return err
	}
	if err := t.unlink(dir.ID, e.Name, child, at); err != nil {
		return err
	}
	if child.Type != filetree.Directory {
		if child.Links > 0 {
			return nil
		}
		return t.dropUncounted(child)
	}
	record := &filetree.Trashed{ID: t.newID(), Node: child.ID, Path: []byte("/"), Removed: t.now}
	if err := t.link(filetree.Trash, trashName(record.ID), child, at); err != nil {
		return err
	}
	if err := t.tx.PutTrashed(t.ctx, record); err != nil {
		return err
	}
	return t.tx.MarkPurging(t.ctx, record.ID)
}
