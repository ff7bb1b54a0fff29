package bucketfs

import (
	"context"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sync/errgroup"

	"github.com/postern-dev/postern/agentd/attach/bucket"
)

// found is what a name stands for in the bucket.
type found struct {
	dir    bool
	object bucket.Object
}

// look asks the bucket for a name: a directory of this name hides an object of it.
func (f *FS) look(ctx context.Context, key string) (found, error) {
	var page bucket.Page
	var out found
	missing := false
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() (err error) {
		out.object, err = f.b.cfg.Remote.Head(ctx, key)
		if missing = bucket.NotFound(err); missing {
			err = nil
		}
		return err
	})
	group.Go(func() (err error) {
		page, err = f.b.cfg.Remote.List(ctx, key+"/", "", 1)
		return err
	})
	err := group.Wait()
	f.b.heard(err)
	switch {
	case err != nil:
		return found{}, err
	case len(page.Entries) > 0 || page.Hidden > 0 || page.Marker:
		return found{dir: true}, nil
	case missing:
		return found{}, syscall.ENOENT
	}
	return out, nil
}

// child finds a name in a directory; fresh: what is known of it does not count.
func (f *FS) child(ctx context.Context, parent *node, name string, fresh bool) (*node, error) {
	if !bucket.ValidName(name) {
		if len(name) > bucket.MaxName {
			return nil, syscall.ENAMETOOLONG
		}
		return nil, syscall.ENOENT
	}
	f.b.mu.Lock()
	key := keyOf(parent) + name
	if len(key) >= bucket.MaxKey {
		f.b.mu.Unlock()
		return nil, syscall.ENAMETOOLONG
	}
	if n := parent.kids[name]; n != nil {
		staged := f.stageLocked(n) != nil
		if staged || !fresh && time.Now().Before(n.until) {
			f.b.mu.Unlock()
			return n, nil
		}
	} else if f.b.byKey[key] != nil {
		n, lines := f.childLocked(parent, name, false, 0)
		err := f.noteLocked(lines...)
		f.b.mu.Unlock()
		return n, err
	}
	f.b.mu.Unlock()
	got, err := f.look(ctx, key)
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	n := parent.kids[name]
	if n != nil && f.stageLocked(n) != nil {
		return n, nil
	}
	if err == syscall.ENOENT && n != nil {
		f.detachLocked(n)
		n.gone = true
		f.noteLocked(line{ID: n.id, Gone: true}) //nolint:errcheck // it is logged
	}
	if err != nil {
		return nil, err
	}
	n, lines := f.childLocked(parent, name, got.dir, 0)
	f.learnLocked(n, got.object)
	return n, f.noteLocked(lines...)
}

// Lookup implements fuse.RawFileSystem.
func (f *FS) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	ctx, done := request(cancel, f.b.cfg.Deadline)
	defer done()
	parent, _, err := f.directory(h.NodeId)
	if err != nil {
		return status(err)
	}
	n := parent
	switch name {
	case ".":
	case "..":
		f.b.mu.Lock()
		if parent.parent != nil {
			n = parent.parent
		}
		f.b.mu.Unlock()
	default:
		n, err = f.child(ctx, parent, name, false)
	}
	if err == syscall.ENOENT {
		out.SetEntryTimeout(min(noEntry, f.b.cfg.TTL))
		out.NodeId = 0
		return fuse.OK
	}
	if err != nil {
		return status(err)
	}
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	f.entryLocked(n, out)
	return fuse.OK
}

// mayMake refuses names that cannot be, and changes where none are allowed.
func (f *FS) mayMake(parent *node, name string) (key string, err error) {
	if f.b.cfg.ReadOnly {
		return "", syscall.EROFS
	}
	f.b.mu.Lock()
	key = keyOf(parent) + name
	f.b.mu.Unlock()
	switch {
	case len(name) > bucket.MaxName || len(key) >= bucket.MaxKey:
		return "", syscall.ENAMETOOLONG
	case !bucket.ValidName(name):
		return "", syscall.EINVAL
	}
	return key, nil
}

// Mkdir implements fuse.RawFileSystem: a directory is an empty object whose key ends in a slash.
func (f *FS) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	ctx, done := request(cancel, f.b.cfg.Deadline)
	defer done()
	parent, _, err := f.directory(in.NodeId)
	if err != nil {
		return status(err)
	}
	key, err := f.mayMake(parent, name)
	if err != nil {
		return status(err)
	}
	n, err := f.child(ctx, parent, name, true)
	if err == nil {
		f.b.mu.Lock()
		defer f.b.mu.Unlock()
		if in.Unique&resent == 0 || !n.dir {
			return fuse.Status(syscall.EEXIST)
		}
		f.entryLocked(n, out) // it was made before a takeover
		return fuse.OK
	}
	if err != syscall.ENOENT {
		return status(err)
	}
	_, err = f.b.cfg.Remote.Write(ctx, key+"/", strings.NewReader(""), 0)
	f.b.heard(err)
	if err != nil {
		return status(err)
	}
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	n, lines := f.childLocked(parent, name, true, in.Unique)
	f.learnLocked(n, bucket.Object{})
	if err := f.noteLocked(lines...); err != nil {
		return fuse.EIO
	}
	f.entryLocked(n, out)
	return fuse.OK
}

// Symlink implements fuse.RawFileSystem: a bucket has none.
func (f *FS) Symlink(<-chan struct{}, *fuse.InHeader, string, string, *fuse.EntryOut) fuse.Status {
	return fuse.EPERM
}

// Link implements fuse.RawFileSystem: a bucket has none.
func (f *FS) Link(<-chan struct{}, *fuse.LinkIn, string, *fuse.EntryOut) fuse.Status {
	return fuse.EPERM
}

// removedLocked says that a name's object is no more; its content stays for those who have it open.
func (f *FS) removedLocked(n *node) {
	if st := f.stageLocked(n); st != nil {
		f.goneStageLocked(st, n)
	}
	f.detachLocked(n)
	n.gone = true
	f.noteLocked(line{ID: n.id, Gone: true}) //nolint:errcheck // it is logged
}

// goneStageLocked takes the name from a stage.
func (f *FS) goneStageLocked(st *stage, n *node) {
	if f.b.byKey[st.rec.Key] == st {
		delete(f.b.byKey, st.rec.Key)
	}
	st.rec.Gone, st.rec.Slot, st.rec.Node = true, f.slot, n.id
	if st.users == 0 {
		f.b.endLocked(st, bucket.Object{})
		return
	}
	if err := f.b.save(st.id, st.rec); err != nil {
		f.b.cfg.Log.Warn("staged file not noted as removed", "bucket", f.b.cfg.Name, "err", err)
	}
}

// quiet waits for the upload of a stage, after ending it, and keeps others from starting.
// The caller calls the function that it returns.
func (f *FS) quiet(n *node) func() {
	f.b.mu.Lock()
	st := f.stageLocked(n)
	if st == nil {
		f.b.mu.Unlock()
		return func() {}
	}
	if st.stop != nil {
		st.stop()
	}
	f.b.mu.Unlock()
	st.uploading.Lock()
	return st.uploading.Unlock
}

// Unlink implements fuse.RawFileSystem.
func (f *FS) Unlink(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	ctx, done := request(cancel, f.b.cfg.Deadline)
	defer done()
	if f.b.cfg.ReadOnly {
		return fuse.EROFS
	}
	parent, dir, err := f.directory(h.NodeId)
	if err != nil {
		return status(err)
	}
	n, err := f.child(ctx, parent, name, false)
	if err == syscall.ENOENT && h.Unique&resent != 0 {
		return fuse.OK
	}
	if err != nil {
		return status(err)
	}
	if n.dir {
		return fuse.Status(syscall.EISDIR)
	}
	defer f.quiet(n)()
	err = f.b.cfg.Remote.Delete(ctx, dir+name)
	f.b.heard(err)
	if err != nil {
		return status(err)
	}
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	f.removedLocked(n)
	return fuse.OK
}

// Rmdir implements fuse.RawFileSystem. A directory without a marker is gone with its last object.
func (f *FS) Rmdir(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	ctx, done := request(cancel, f.b.cfg.Deadline)
	defer done()
	if f.b.cfg.ReadOnly {
		return fuse.EROFS
	}
	parent, dir, err := f.directory(h.NodeId)
	if err != nil {
		return status(err)
	}
	f.b.mu.Lock()
	n := parent.kids[name]
	f.b.mu.Unlock()
	if n == nil {
		if n, err = f.child(ctx, parent, name, false); err != nil {
			if err == syscall.ENOENT && h.Unique&resent != 0 {
				return fuse.OK
			}
			return status(err)
		}
	}
	if !n.dir {
		return fuse.Status(syscall.ENOTDIR)
	}
	key := dir + name + "/"
	page, err := f.b.cfg.Remote.List(ctx, key, "", 2)
	f.b.heard(err)
	if err != nil {
		return status(err)
	}
	f.b.mu.Lock()
	full := len(page.Entries) > 0 || page.Hidden > 0 || page.Next != ""
	for staged := range f.b.byKey {
		full = full || strings.HasPrefix(staged, key)
	}
	f.b.mu.Unlock()
	if full {
		return fuse.Status(syscall.ENOTEMPTY)
	}
	err = f.b.cfg.Remote.Delete(ctx, key)
	f.b.heard(err)
	if err != nil {
		return status(err)
	}
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	f.removedLocked(n)
	return fuse.OK
}

// Rename implements fuse.RawFileSystem: the object is copied, then removed. Directories and
// objects that are too large for that are EXDEV: mv copies them.
func (f *FS) Rename(cancel <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	ctx, done := request(cancel, copyDeadline)
	defer done()
	const noReplace = 1
	if in.Flags&^uint32(noReplace) != 0 {
		return fuse.EINVAL
	}
	from, fromKey, err := f.directory(in.NodeId)
	if err != nil {
		return status(err)
	}
	to, _, err := f.directory(in.Newdir)
	if err != nil {
		return status(err)
	}
	newKey, err := f.mayMake(to, newName)
	if err != nil {
		return status(err)
	}
	n, err := f.child(ctx, from, oldName, false)
	if err == syscall.ENOENT && in.Unique&resent != 0 {
		return fuse.OK
	}
	if err != nil {
		return status(err)
	}
	if n.dir {
		return fuse.Status(syscall.EXDEV)
	}
	target, err := f.child(ctx, to, newName, in.Flags&noReplace != 0)
	switch {
	case err == syscall.ENOENT:
		target = nil
	case err != nil:
		return status(err)
	case target == n:
		return fuse.OK
	case in.Flags&noReplace != 0:
		return fuse.Status(syscall.EEXIST)
	case target.dir:
		return fuse.Status(syscall.EISDIR)
	}
	if target != nil {
		defer f.quiet(target)()
	}
	return status(f.move(ctx, n, target, fromKey+oldName, newKey, to, newName))
}

func (f *FS) move(ctx context.Context, n, target *node, oldKey, newKey string, to *node, newName string) error {
	b := f.b
	unlock := f.quiet(n)
	b.mu.Lock()
	st := f.stageLocked(n)
	dirty, size, known := st != nil && st.rec.Dirty, n.object.Size, st == nil || st.rec.Uploaded
	var gen uint64
	if st != nil {
		gen, size = st.gen, st.size
	}
	b.mu.Unlock()
	defer unlock()
	var o bucket.Object
	var err error
	switch {
	case dirty:
		o, err = b.cfg.Remote.Write(ctx, newKey, st.f, size)
	case size > bucket.MaxCopy:
		return syscall.EXDEV
	default:
		o, err = b.cfg.Remote.Copy(ctx, newKey, oldKey)
	}
	if err == nil && known {
		err = b.cfg.Remote.Delete(ctx, oldKey)
	}
	b.heard(err)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if target != nil {
		f.removedLocked(target)
	}
	if st != nil {
		delete(b.byKey, st.rec.Key)
		st.rec.Key, st.rec.Uploaded, st.object = newKey, true, o
		st.rec.Dirty = st.gen != gen
		b.byKey[newKey] = st
		if err := b.save(st.id, st.rec); err != nil {
			return err
		}
	}
	f.detachLocked(n)
	f.attachLocked(n, to, newName)
	f.learnLocked(n, o)
	for _, h := range n.handles {
		h.object = o
	}
	if err := f.noteLocked(line{ID: n.id, Parent: to.id, Name: newName}); err != nil {
		return err
	}
	if st != nil && st.users == 0 && !st.rec.Dirty {
		b.endLocked(st, o)
	}
	return nil
}
