package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/attach/mountd"
	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/proto"
)

// mountTime bounds a mount or unmount, with the opening of a workspace for the first time.
const mountTime = 2 * time.Minute

func newMount() *cobra.Command {
	var p places
	var readOnly bool
	cmd := &cobra.Command{
		Use:   "mount WORKSPACE DIR",
		Short: "mount a workspace on a directory of this host",
		Long: `Mount a workspace on a directory of this host, where attachments.host_mounts in agentd.yaml
lets it. The mount outlives this command and agentd; it does not come back after a reboot.`,
		Example: "  agentd mount reports /srv/postern/reports --ro",
		Args:    twoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(context.Background(), mountTime)
			defer cancel()
			return mountHere(ctx, &p, cmd.OutOrStdout(), args[0], args[1], readOnly)
		},
	}
	cmd.Flags().BoolVar(&readOnly, "ro", false, "read-only")
	p.flags(cmd, "state", "runtime")
	return cmd
}

func twoArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 2 {
		return nil
	}
	return usagef("%s takes a workspace and a directory: see %s --help", cmd.CommandPath(), cmd.CommandPath())
}

func newUmount() *cobra.Command {
	var p places
	var force bool
	cmd := &cobra.Command{
		Use:   "umount DIR",
		Short: "unmount a workspace from a directory of this host",
		Long: `Unmount a workspace from a directory of this host. It waits 10 s until everything written is at
the control plane, and refuses if it is not; with --force it is sent later, from this host.`,
		Example: "  agentd umount /srv/postern/reports",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				return nil
			}
			return usagef("%s takes a directory: see %s --help", cmd.CommandPath(), cmd.CommandPath())
		},
		RunE: func(_ *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(context.Background(), mountTime)
			defer cancel()
			return umountHere(ctx, &p, args[0], force)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "even with writes that are not yet at the control plane, and while files are open")
	p.flags(cmd, "state", "runtime")
	return cmd
}

// realDir is a directory's path without symbolic links. It looks at the parent alone: the
// directory itself may be a mount that nobody serves.
func realDir(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if abs == "/" {
		return "", usagef("/ cannot be a mount point")
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", err
	}
	return filepath.Join(parent, filepath.Base(abs)), nil
}

func askMount(ctx context.Context, p *places, m control.Mount) (control.MountAnswer, error) {
	a, err := control.AskMount(ctx, p.runtimeDir(), m)
	if errors.Is(err, control.ErrNotRunning) {
		return a, proto.Errorf(proto.CodeUnavailable, "agentd is not running: run systemctl start agentd")
	}
	if err == nil && a.Error != "" {
		err = &proto.Error{Code: a.Code, Message: a.Error}
	}
	return a, err
}

func mountHere(ctx context.Context, p *places, w io.Writer, workspace, dir string, readOnly bool) error {
	real, err := realDir(dir)
	if err != nil {
		return fmt.Errorf("mount on %s: %w", dir, err)
	}
	// lstat asks nobody but the kernel where nothing is mounted; a symbolic link is refused.
	st, err := os.Lstat(real)
	switch {
	case errors.Is(err, unix.ENOTCONN):
		return fmt.Errorf("mount on %s: a mount is there whose server has gone: run agentd umount %s", real, real)
	case err != nil:
		return fmt.Errorf("mount on %s: %w", dir, err)
	case !st.IsDir():
		return fmt.Errorf("mount on %s: it is no directory", real)
	}
	a, err := askMount(ctx, p, control.Mount{Step: control.MountAttach, Workspace: workspace, Dir: real, ReadOnly: readOnly})
	if err != nil {
		return err
	}
	undo := func(err error) error {
		_, derr := askMount(context.WithoutCancel(ctx), p, control.Mount{Step: control.MountDetach, Workspace: workspace, Dir: real})
		return errors.Join(fmt.Errorf("mount %s on %s: %w", workspace, real, err), derr)
	}
	tree, err := mountd.Client{Dir: a.Sockets}.Tree(ctx, workspace, "host:"+real)
	if err != nil {
		return undo(err)
	}
	defer tree.Close() //nolint:errcheck // it was moved
	if err := unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, real, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return undo(err)
	}
	mode := ""
	if a.ReadOnly {
		mode = ", read-only"
	}
	_, err = fmt.Fprintf(w, "%s is mounted on %s%s\n", workspace, real, mode)
	return err
}

func umountHere(ctx context.Context, p *places, dir string, force bool) error {
	real, err := realDir(dir)
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	ours, err := mountd.Mounted(real)
	if err != nil {
		return fmt.Errorf("unmount %s: %w", real, err)
	}
	if !ours && !held(ctx, p, real) {
		return proto.Errorf(proto.CodeNotFound, "unmount %s: no workspace is mounted there: agentd status lists mounts", real)
	}
	if !force {
		if _, err := askMount(ctx, p, control.Mount{Step: control.MountSettle, Dir: real}); err != nil {
			return err
		}
	}
	flags := unix.UMOUNT_NOFOLLOW
	if force {
		flags |= unix.MNT_DETACH
	}
	if ours { // else somebody unmounted it by hand, and what is left is to tell mountd
		err = unix.Unmount(real, flags)
	}
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("unmount %s: files there are open: close them, or use --force", real)
	case err != nil:
		return fmt.Errorf("unmount %s: %w", real, err)
	}
	_, err = askMount(ctx, p, control.Mount{Step: control.MountDetach, Dir: real, Forced: force})
	return err
}

// held tells whether mountd keeps a mount for a directory.
func held(ctx context.Context, p *places, dir string) bool {
	s, err := control.Ask(ctx, p.runtimeDir())
	return err == nil && slices.ContainsFunc(s.Attachments.Workspaces, func(a control.Attachment) bool { return slices.Contains(a.Mounts, dir) })
}
