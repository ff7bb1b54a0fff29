package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/postern-dev/postern/agentd/checkpoint/internal/criu"
	"github.com/postern-dev/postern/agentd/checkpoint/internal/images"
	"github.com/postern-dev/postern/agentd/checkpoint/pagestore"
	"github.com/postern-dev/postern/proto"
)

// find returns a checkpoint of an organization; those of others are not there.
func (e *Engine) find(organization, checkpoint string) (Checkpoint, error) {
	c, err := e.store.Get(pagestore.ID(checkpoint))
	if err != nil {
		return c, err
	}
	if c.Organization != organization {
		return c, proto.Errorf(proto.CodeNotFound, "no checkpoint %s on this host", checkpoint)
	}
	return c, nil
}

// Rollback puts a kernel back to one of its checkpoints, or to one that it was forked
// from: its processes and its private files, not what is on workspaces. Everything that
// can be known to be wrong is refused while the kernel still runs as it was.
func (e *Engine) Rollback(ctx context.Context, organization, id, checkpoint string) error {
	done, err := e.enter(id, "a rollback")
	if err != nil {
		return err
	}
	defer done()
	k, err := e.look(ctx, organization, id)
	if err != nil {
		return err
	}
	c, err := e.find(organization, checkpoint)
	if err != nil {
		return err
	}
	if c.Kernel != id && !e.descends(organization, string(e.parent(k)), c.ID) {
		return proto.Errorf(proto.CodeInvalid, "checkpoint %s is not one of kernel %s: fork it to get a kernel of it", checkpoint, id)
	}
	if c.Kernel == id || c.Protected {
		return e.bring(ctx, k, c, "rollback", "")
	}
	// Until it is back the kernel is that checkpoint, and its own limits don't keep it.
	if err := e.store.Protect(c.ID, true); err != nil {
		return err
	}
	if err := e.bring(ctx, k, c, "rollback", ""); err != nil {
		return err
	}
	e.unprotect(c)
	return nil
}

// unprotect lets go of a checkpoint that there was no other copy of its kernel beside.
func (e *Engine) unprotect(c Checkpoint) {
	if err := e.store.Protect(c.ID, false); err != nil {
		e.cfg.Logger.Warn("checkpoint stays protected", "kernel", c.Kernel, "checkpoint", c.ID, "err", err)
	}
}

// Resume brings a suspended kernel back.
func (e *Engine) Resume(ctx context.Context, organization, id string) error {
	done, err := e.enter(id, "a resume")
	if err != nil {
		return err
	}
	defer done()
	k, err := e.look(ctx, organization, id)
	switch {
	case err != nil:
		return err
	case k.Running:
		return nil // it may have been asked twice
	case !k.Suspended:
		return proto.Errorf(proto.CodeInvalid, "kernel %s is not suspended: restart it", id)
	}
	return e.resume(ctx, organization, k)
}

// resume brings a suspended kernel back. The caller has it.
func (e *Engine) resume(ctx context.Context, organization string, k Kernel) error {
	c, err := e.find(organization, k.Checkpoint)
	if err != nil {
		return err
	}
	if err := e.bring(ctx, k, c, "resume", ""); err != nil || c.Kind != KindSuspend {
		return err
	}
	e.unprotect(c)
	return nil
}

// maxAncestors bounds how far a fork's origin is followed.
const maxAncestors = 10_000

// descends reports whether checkpoint from has wanted among its ancestors, or is it.
func (e *Engine) descends(organization, from string, wanted pagestore.ID) bool {
	for at, n := pagestore.ID(from), 0; at != "" && n < maxAncestors; n++ {
		if at == wanted {
			return true
		}
		c, err := e.store.Get(at)
		if err != nil || c.Organization != organization {
			return false
		}
		at = c.Parent
	}
	return false
}

// unpacked is a checkpoint that was written out.
type unpacked struct {
	dir             string // all of it but private; remove removes it, done both
	remove          func()
	images, private string
	kernel          []byte
	from            images.Owners
	done            func()
}

// unpack writes a checkpoint out, its private files beside the directory that they are
// to replace.
func (e *Engine) unpack(ctx context.Context, c Checkpoint, private string) (u unpacked, err error) {
	if err := e.fits(ctx, c); err != nil {
		return u, err
	}
	dir, done, err := e.spool.room(c.Size)
	if err != nil {
		return u, err
	}
	u = unpacked{dir: dir, remove: done, images: filepath.Join(dir, treeImages), private: private, done: func() {
		_ = os.RemoveAll(private)
		done()
	}}
	defer func() {
		if err != nil {
			u.done()
		}
	}()
	kernel := filepath.Join(dir, treeKernel)
	if err := errors.Join(os.RemoveAll(private), os.Mkdir(u.images, 0o700), os.Mkdir(kernel, 0o700), os.Mkdir(private, 0o700)); err != nil {
		return u, fmt.Errorf("restore %s: %w", c.ID, err)
	}
	trees := map[string]string{treeImages: u.images, treePrivate: private, treeKernel: kernel}
	if e.spool.holds(dir) && e.spool.kept.link(c.ID, u.images) {
		trees[treeImages] = ""
	}
	if _, err := e.store.Restore(ctx, c.ID, trees); err != nil {
		return u, err
	}
	if info, err := os.Stat(filepath.Join(kernel, kernelFile)); err != nil || info.Size() > maxKernel {
		return u, errors.Join(fmt.Errorf("restore %s: its description of the kernel is missing or too large", c.ID), err)
	}
	if u.kernel, err = os.ReadFile(filepath.Join(kernel, kernelFile)); err != nil {
		return u, err
	}
	uid, err1 := strconv.ParseUint(c.Attributes["uid"], 10, 32)
	gid, err2 := strconv.ParseUint(c.Attributes["gid"], 10, 32)
	if err := errors.Join(err1, err2); err != nil {
		return u, fmt.Errorf("restore %s: its user: %w", c.ID, err)
	}
	u.from = images.Owners{UID: uint32(uid), GID: uint32(gid)}
	// What was made on another host; kept images were looked at before.
	if c.Attributes[fromAttribute] != "" && trees[treeImages] != "" && e.cfg.Moves != nil {
		if err = images.Check(u.images, u.from); err == nil {
			err = e.cfg.Moves.CheckSaved(u.kernel)
		}
		if err != nil {
			return u, proto.Errorf(proto.CodePolicyDenied, "checkpoint %s, which came from another host, is not restored here: %v", c.ID, err)
		}
	}
	return u, nil
}

// bring puts a kernel back, its private files too: a suspended one may have others, of
// before a rollback that failed. why is rollback, resume or move; move is
// the one that this is for, if any.
func (e *Engine) bring(ctx context.Context, k Kernel, c Checkpoint, why, move string) error {
	if k.Held && move == "" {
		return heldError(k.ID)
	}
	u, err := e.unpack(ctx, c, k.PrivateDir+".new")
	if err != nil {
		return err
	}
	back := false
	defer func() {
		if !back || !e.spool.holds(u.dir) {
			u.done()
			return
		}
		_ = os.RemoveAll(u.private)
		e.spool.kept.keep(k.ID, c.ID, u.images, c.Size, u.remove)
	}()
	if err := e.unchanged(ctx, k, c, u.images); err != nil {
		return err
	}
	to := images.Owners{UID: k.UID, GID: k.GID}
	if err := errors.Join(images.Reown(u.images, u.from, to), images.ReownTree(u.private, u.from, to)); err != nil {
		return fmt.Errorf("restore %s: %w", c.ID, err)
	}
	o := RestoreOrder{Images: u.images, Private: u.private, Kernel: u.kernel, Checkpoint: string(c.ID), Move: move, Why: why, SavedAt: c.Time}
	ctx, cancel := context.WithTimeout(ctx, dumpTimeout(c.Size))
	defer cancel()
	if err := e.cfg.Kernels.Restore(ctx, k.ID, o); err != nil {
		return err
	}
	// As the checkpoint has them, unless they were made another user's.
	back = u.from == to
	return nil
}

// Fork makes a new kernel, id, of a checkpoint, or of a kernel as it is now if
// checkpoint is empty: the same memory and private files, side by side with the old one.
// It returns the checkpoint that it came from.
func (e *Engine) Fork(ctx context.Context, organization, from, checkpoint, id string) (string, error) {
	done, err := e.enter(id, "a fork")
	if err != nil {
		return "", err
	}
	defer done()
	if checkpoint == "" {
		free, err := e.enter(from, "a fork")
		if err != nil {
			return "", err
		}
		s, err := e.save(ctx, organization, from, KindFork, Label{}, "")
		free()
		if err != nil {
			return "", err
		}
		checkpoint = string(s.ID)
	}
	c, err := e.find(organization, checkpoint)
	if err != nil {
		return "", err
	}
	k, err := e.look(ctx, organization, from)
	if err != nil {
		return "", err
	}
	if c.Kernel != from && !e.descends(organization, string(e.parent(k)), c.ID) {
		return "", proto.Errorf(proto.CodeInvalid, "checkpoint %s is not one of kernel %s", checkpoint, from)
	}
	u, err := e.unpack(ctx, c, filepath.Join(filepath.Dir(k.PrivateDir), "fork-"+id))
	if err != nil {
		return "", err
	}
	defer u.done()
	if err := e.unchanged(ctx, k, c, u.images); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, dumpTimeout(c.Size))
	defer cancel()
	o := RestoreOrder{Images: u.images, Private: u.private, Kernel: u.kernel, Checkpoint: checkpoint, Why: "fork", SavedAt: c.Time}
	err = e.cfg.Kernels.Fork(ctx, id, from, o, func(uid, gid uint32, private string) error {
		to := images.Owners{UID: uid, GID: gid}
		return errors.Join(images.Reown(u.images, u.from, to), images.ReownTree(u.private, u.from, to))
	})
	return checkpoint, err
}

// statTime bounds the look at files on workspaces, which may not answer.
const statTime = 20 * time.Second

// unchanged refuses a restore for which files that were open on workspaces have another
// size than they had: CRIU would refuse it when it is too late.
func (e *Engine) unchanged(ctx context.Context, k Kernel, c Checkpoint, dir string) error {
	return e.unchangedSince(ctx, k, c, dir, nil)
}

// unchangedSince is unchanged for files of which more is known than their sizes: when they
// were changed last, in nanoseconds since the epoch, by their paths in the kernel.
func (e *Engine) unchangedSince(ctx context.Context, k Kernel, c Checkpoint, dir string, times map[string]int64) error {
	files, err := images.OpenFiles(dir, func(key string) bool { _, ok := k.Attachments[key]; return ok })
	if err != nil {
		return fmt.Errorf("restore %s: %w", c.ID, err)
	}
	if len(files) == 0 {
		return nil
	}
	d, err := e.cfg.Driver.driver()
	if err != nil {
		return err
	}
	want := make([]criu.Sized, len(files))
	for i, f := range files {
		want[i] = criu.Sized{Path: filepath.Join(k.Attachments[f.Key], f.Path), Size: f.Size}
	}
	ctx, cancel := context.WithTimeout(ctx, statTime)
	defer cancel()
	sizes, changedAt, err := d.Sizes(ctx, want)
	if ctx.Err() != nil {
		return proto.Errorf(proto.CodeTimeout, "restore %s: a workspace that was in use does not answer: look whether its mount is well", c.ID)
	}
	if err != nil {
		return public(err)
	}
	var changed []string
	for i, f := range files {
		switch {
		case sizes[i] < 0 && f.Size >= 0:
			changed = append(changed, f.Inside+" is gone")
		case f.Size >= 0 && sizes[i] != f.Size:
			changed = append(changed, fmt.Sprintf("%s has %d bytes and had %d", f.Inside, sizes[i], f.Size))
		case times[f.Inside] != 0 && times[f.Inside] != changedAt[i]:
			changed = append(changed, f.Inside+" has another content")
		}
	}
	if len(changed) == 0 {
		return nil
	}
	if len(changed) > 5 {
		changed = append(changed[:5], fmt.Sprintf("and %d more", len(changed)-5))
	}
	return proto.Errorf(proto.CodeInvalid, "checkpoint %s can't be restored: files on workspaces that were open have changed since: %s: put them back, or take another checkpoint", c.ID, strings.Join(changed, "; "))
}
