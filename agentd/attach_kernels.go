package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/attach/mountd"
	"github.com/postern-dev/postern/agentd/kernel"
	"github.com/postern-dev/postern/agentd/policy"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// kernelMounts, in attachDir, is where agentd has a mount of each workspace that kernels
	// have; their sandboxes are made of it, also when they are restored.
	kernelMounts = "kernels"
	// awaitMountd is how long the start of a kernel waits for a mountd that is starting.
	awaitMountd = 5 * time.Second
)

// decideKernelMount holds one of a kernel's mounts against the policy.
func decideKernelMount(p policy.Attachments, all []*posternv1.KernelMount, i int) (reason string) {
	m := all[i]
	if !workspaceName.MatchString(m.Workspace) {
		return fmt.Sprintf("%.80q is no name of a workspace: 1 to 63 of a-z, 0-9, - _ and ., beginning with a letter or digit", m.Workspace)
	}
	if slices.ContainsFunc(all[:i], func(other *posternv1.KernelMount) bool { return other.Workspace == m.Workspace }) {
		return fmt.Sprintf("workspace %s is there twice", m.Workspace)
	}
	readOnly, reason := p.Mount(m.Workspace)
	if reason == "" && readOnly && !m.ReadOnly {
		reason = fmt.Sprintf("workspace %s may only be mounted read-only on this host: ask for %s:ro", m.Workspace, m.Workspace)
	}
	return reason
}

func kernelHolder(id string) string { return "kernel:" + id }

// kernelMount is where agentd has a workspace for kernels.
func (a *attachments) kernelMount(workspace string) string {
	return filepath.Join(a.client.Dir, kernelMounts, workspace)
}

// toKernel makes a kernel the holder of workspaces, and them ready to be mounted in it.
// done is called when the kernel is listed, or was not started.
func (a *attachments) toKernel(ctx context.Context, id string, mounts []*posternv1.KernelMount) (out []kernel.Mount, done func(), err error) {
	if len(mounts) == 0 {
		return nil, func() {}, nil
	}
	a.mu.Lock()
	a.starting[id]++
	a.mu.Unlock()
	listed := func() {
		a.mu.Lock()
		if a.starting[id]--; a.starting[id] == 0 {
			delete(a.starting, id)
		}
		a.mu.Unlock()
	}
	defer func() {
		if err != nil {
			listed() // what it holds is taken away by tend
		}
	}()
	c := a.daemon.config.Load().Attachments
	waited := false
	for _, m := range mounts {
		if b, ok := c.Bind(m.Workspace); ok {
			if st, err := os.Stat(b.Path); err != nil || !st.IsDir() {
				return nil, nil, proto.Errorf(proto.CodeNotFound, "%s is no directory on this host: see attachments.binds in agentd.yaml", b.Path)
			}
			out = append(out, kernel.Mount{Workspace: b.Name, Source: b.Path, ReadOnly: m.ReadOnly || b.ReadOnly})
			continue
		}
		if !waited {
			a.await(ctx)
			waited = true
		}
		h := mountd.Holder{Workspace: m.Workspace, Name: kernelHolder(id), ReadOnly: m.ReadOnly, Squash: true}
		if _, err := a.client.Attach(ctx, h); err != nil {
			return nil, nil, err
		}
		if err := a.show(ctx, m.Workspace, kernelHolder(id)); err != nil {
			return nil, nil, proto.Errorf(proto.CodeUnavailable, "mount workspace %s for the kernel: %v", m.Workspace, err)
		}
		out = append(out, kernel.Mount{Workspace: m.Workspace, Source: a.kernelMount(m.Workspace), ReadOnly: m.ReadOnly})
	}
	return out, listed, nil
}

// await waits for a mountd that is just starting.
func (a *attachments) await(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, awaitMountd)
	defer cancel()
	for ctx.Err() == nil {
		if _, err := a.client.Status(ctx); err == nil {
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// show sees to it that a workspace is mounted where sandboxes take it from: in agentd's
// own mount namespace, which another agentd may not share.
func (a *attachments) show(ctx context.Context, workspace, holder string) error {
	a.showing.Lock()
	defer a.showing.Unlock()
	dir := a.kernelMount(workspace)
	tree, err := a.client.Tree(ctx, workspace, holder)
	if err != nil {
		return err
	}
	defer tree.Close() //nolint:errcheck // it was moved
	var st unix.Statx_t
	if err := unix.Statx(int(tree.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st); err != nil {
		return err
	}
	minor, ours, err := mountd.MountedMinor(dir)
	switch {
	case err != nil:
		return err
	case ours && minor == st.Dev_minor:
		return nil
	case ours: // of a connection that has ended
		if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// tend compares what kernels have with what mountd holds for them: kernels that are gone
// release theirs, others get it back after a restart of agentd.
func (a *attachments) tend(ctx context.Context, status mountd.Status) error {
	kernels := map[string][]*posternv1.KernelMount{}
	for _, k := range a.daemon.kernels.List() {
		kernels[k.Id] = k.Mounts
	}
	a.mu.Lock()
	starting := map[string]bool{}
	for id := range a.starting {
		starting[id] = true
	}
	a.mu.Unlock()
	var errs []error
	held := map[string]bool{} // workspaces
	bound := a.daemon.config.Load().Attachments
	for _, h := range status.Holders {
		id, ok := strings.CutPrefix(h.Name, "kernel:")
		if !ok {
			continue
		}
		if _, there := kernels[id]; !there && !starting[id] {
			errs = append(errs, a.client.Detach(ctx, h.Workspace, h.Name))
			continue
		}
		held[h.Workspace] = true
	}
	for id, mounts := range kernels {
		for _, m := range mounts {
			if _, ok := bound.Bind(m.Workspace); ok {
				continue
			}
			holds := slices.ContainsFunc(status.Holders, func(h mountd.Holder) bool {
				return h.Name == kernelHolder(id) && h.Workspace == m.Workspace
			})
			if !holds {
				// A fork, or a kernel whose mount has ended: it is mounted anew for its next start.
				_, err := a.client.Attach(ctx, mountd.Holder{Workspace: m.Workspace, Name: kernelHolder(id), ReadOnly: m.ReadOnly, Squash: true})
				switch proto.CodeOf(err) {
				case proto.CodePolicyDenied, proto.CodeNotFound:
					continue // its configuration, or the workspace, has gone meanwhile
				}
				if err != nil {
					errs = append(errs, fmt.Errorf("kernel %s: %w", id, err))
					continue
				}
			}
			held[m.Workspace] = true
			if err := a.show(ctx, m.Workspace, kernelHolder(id)); err != nil {
				errs = append(errs, fmt.Errorf("kernel %s: %w", id, err))
			}
		}
	}
	a.hide(held, len(starting) > 0)
	return errors.Join(errs...)
}

// hide takes away mounts that no kernel needs.
func (a *attachments) hide(held map[string]bool, starting bool) {
	if starting {
		return
	}
	a.showing.Lock()
	defer a.showing.Unlock()
	entries, _ := os.ReadDir(filepath.Join(a.client.Dir, kernelMounts))
	for _, e := range entries {
		if held[e.Name()] {
			continue
		}
		dir := a.kernelMount(e.Name())
		if ours, err := mountd.Mounted(dir); err == nil && ours {
			_ = unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
		_ = os.Remove(dir)
	}
}
